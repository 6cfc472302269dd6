"""`hbfp explain VALUES`: how one block is encoded, told clause by clause by the exact-arithmetic oracle.

Everything is computed in integers and fractions by `hbfp.reference`; the compiled core has no part in it.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbfp.format import HBFP, Rounding

NAME = "explain"
HELP = "show how a block of values becomes codes, clause by clause"

_SIGN = 0x80000000
_INFINITY = 0x7F800000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "values",
        nargs="+",
        metavar="VALUES",
        help="the block: numbers, nan, inf, or float32 patterns such as 0x3f800000",
    )
    parser.add_argument("--format", default="hbfp4b64", help="such as hbfp6b16 or hbfp4b64-ceil (default: %(default)s)")
    parser.add_argument(
        "--rounding",
        default="nearest_even",
        help="nearest_even, nearest_away, toward_zero or stochastic (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding (default: %(default)s)")
    parser.add_argument("--stream", type=int, default=0, help="of stochastic rounding (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.format import HBFP, Rounding

    block = derive(
        [_pattern(word) for word in arguments.values],
        HBFP.parse(arguments.format),
        Rounding.parse(arguments.rounding),
        arguments.seed,
        arguments.stream,
    )
    print(json.dumps(asdict(block), indent=1, allow_nan=False) if arguments.json else "\n".join(_told(block)))
    return 0


@dataclass(frozen=True, slots=True)
class Element:
    """One value on its way to a code. What is not finite is text; what a NaN block has no use for is None."""

    x: float | str
    bits: str
    """x as a float32 pattern."""
    y: str | None
    """x · 2^-s, exactly, as a decimal."""
    random_bits: int | None
    """r of stochastic rounding."""
    code: int
    code_bits: str
    """The stored field, two's complement."""
    value: float | str
    """What decoding gives."""
    note: str


@dataclass(frozen=True, slots=True)
class Block:
    """One block's derivation; exponents are None in blocks of zeros and NaN blocks."""

    format: str
    rounding: str
    amax: float | str
    amax_bits: str
    amax_index: int
    block_exponent: int | None
    scale_exponent: int | None
    """After clamping to what the format's exponent field holds."""
    exponent_byte: int
    exponent_plane: str
    mantissa_plane: str
    elements: list[Element]


def derive(patterns: list[int], fmt: HBFP, rounding: Rounding, seed: int = 0, stream: int = 0) -> Block:
    """Encode float32 patterns that make one block. Raises HBFPError if they are more than the format's block holds."""
    import numpy as np

    from hbfp import reference
    from hbfp.errors import HBFPError

    room = fmt.tile or fmt.block
    if room is not None and len(patterns) > room:
        raise HBFPError(f"{len(patterns)} values, but a block of {fmt} along one row holds {room}: give {room} at most")
    for name, number in (("seed", seed), ("stream", stream)):
        if not 0 <= number < 1 << 64:
            raise HBFPError(f"--{name} is in 0…2^64 - 1, not {number}")

    # A column for a tile would have other padding, not other codes: one row stands for both.
    encoded = reference.encode(np.array([patterns], np.uint32).view(np.float32), fmt, -1, rounding.value, seed, stream)
    exponent_plane, mantissa_plane = encoded.planes()
    decoded = encoded.decode().view(np.uint32)[0].tolist()
    codes = encoded.mantissas[0].tolist()
    byte = int(exponent_plane[0, 0])
    largest = max(pattern & ~_SIGN for pattern in patterns)
    plain = 0 < largest < _INFINITY
    s = byte - reference.SCALE_OFFSET if plain else None
    exponent = (
        reference.block_exponent(reference.float32_value(largest), fmt.bits, fmt.exponent_rule) if plain else None
    )

    elements = []
    for index, (pattern, code, result) in enumerate(zip(patterns, codes, decoded, strict=True)):
        y = None if s is None else reference.float32_value(pattern) * Fraction(2) ** -s
        stochastic = rounding.value == "stochastic" and y is not None
        elements.append(
            Element(
                x=_number(pattern),
                bits=f"0x{pattern:08x}",
                y=None if y is None else _decimal(y),
                random_bits=reference.random_bits(0, index, seed, stream) if stochastic else None,
                code=code,
                code_bits=format(code & ((1 << fmt.bits) - 1), f"0{fmt.bits}b"),
                value=_number(result),
                note=_note(pattern, y, code, fmt.max_code, stochastic),
            )
        )
    return Block(
        format=str(fmt),
        rounding=str(rounding),
        amax=_number(largest),
        amax_bits=f"0x{largest:08x}",
        amax_index=next(index for index, pattern in enumerate(patterns) if pattern & ~_SIGN == largest),
        block_exponent=exponent,
        scale_exponent=s,
        exponent_byte=byte,
        exponent_plane=exponent_plane.tobytes().hex(" "),
        mantissa_plane=mantissa_plane.tobytes().hex(" "),
        elements=elements,
    )


def _note(pattern: int, y: Fraction | None, code: int, limit: int, stochastic: bool) -> str:
    if pattern & ~_SIGN > _INFINITY:
        return "NaN (1.6)"
    if pattern & ~_SIGN == _INFINITY:
        return "infinite (1.6)"
    if y is None:
        return "minus zero (1.5)" if pattern == _SIGN else ""
    notes = []
    if pattern == _SIGN:
        notes.append("minus zero (1.5)")
    if abs(y) > limit and abs(code) == limit:
        notes.append("saturates (3.5)")
    elif not stochastic and (abs(y) * 2).denominator == 1 and y.denominator == 2:
        notes.append("a tie")
    if y != 0 and code == 0:
        notes.append("underflows")
    if 0 < pattern & ~_SIGN < 0x00800000:
        notes.append("subnormal (1.9)")
    return ", ".join(notes)


# What a rule or a rounding does, and the clause that says so.
_RULES = {
    "max_exponent": ("2.2", "floor(log2 amax) + 1"),
    "ceil": ("2.3", "ceil(log2 amax)"),
    "no_clip": ("2.4", "the least with which amax does not saturate"),
}
_ROUNDINGS = {
    "nearest_even": ("3.2", "y to the nearest integer, a tie to the even one"),
    "nearest_away": ("3.3", "y to the nearest integer, a tie away from zero"),
    "toward_zero": ("3.4", "y without its fraction"),
    "stochastic": ("3.6", "floor(y + r / 2^16), y to 16 fraction bits first"),
}


def _told(block: Block) -> list[str]:
    """The derivation as lines of text, each with its clause of docs/spec.md."""
    from hbfp.format import HBFP

    fmt = HBFP.parse(block.format)
    m, limit, byte = fmt.bits, fmt.max_code, block.exponent_byte
    derivation = [("2.1", f"amax = {block.amax} ({block.amax_bits}), element {block.amax_index}")]
    if byte == 255:
        derivation.append(
            ("1.6", "c = 255 (0xff): not all is finite, a NaN block; codes are 0 and values decode to NaN")
        )
    elif block.scale_exponent is None or block.block_exponent is None:
        derivation.append(("1.5", "c = 0 (0x00): a block of zeros"))
    else:
        s, e = block.scale_exponent, block.block_exponent
        unclamped = e - (m - 1)
        clause, told = _RULES[str(fmt.exponent_rule)]
        derivation.append((clause, f"E = {told} = {e}"))
        derivation.append(("1.2", f"s = E - (m - 1) = {e} - {m - 1} = {unclamped}"))
        if s != unclamped:
            end = "smallest" if s > unclamped else "largest"
            derivation.append(("2.6", f"s = {s}, the {end} that the exponent's field holds"))
        derivation.append(("1.3", f"c = s + 127 = {byte} (0x{byte:02x}); a step is 2^s = {_decimal(Fraction(2) ** s)}"))
        derivation.append(("3.1", f"y = x * 2^-s = x * {_decimal(Fraction(2) ** -s)}"))
        clause, told = _ROUNDINGS[block.rounding]
        derivation.append((clause, f"q = {told}"))
    return [
        f"{block.format}, {block.rounding}: m = {m}, codes {-limit} to {limit}; one block of {len(block.elements)}",
        "",
        *(f"{clause}  {line}" for clause, line in derivation),
        "",
        *_columns(block),
        "",
        f"7.2  exponent plane  {block.exponent_plane}",
        f"7.3  mantissa plane  {block.mantissa_plane}",
    ]


def _columns(block: Block) -> list[str]:
    stochastic = any(element.random_bits is not None for element in block.elements)
    head = ["", "x", "float32", "y", *(["r / 2^16"] if stochastic else []), "q", "stored", "value", ""]
    rows = [head]
    for index, element in enumerate(block.elements):
        random = [] if not stochastic else [f"{(element.random_bits or 0) / 65536:.5f}"]
        y = "" if element.y is None else element.y
        cells = [str(index), str(element.x), element.bits, y, *random, str(element.code), element.code_bits]
        rows.append([*cells, str(element.value), element.note])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column == len(head) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _pattern(word: str) -> int:
    """A typed number as a float32 pattern: rounded through float64 to float32, or the pattern itself after 0x."""
    from hbfp.errors import HBFPError

    try:
        if word.strip().lower().startswith("0x"):
            pattern = int(word, 16)
            if pattern < 1 << 32:
                return pattern
            raise ValueError
        return _float32_pattern(float(word))
    except ValueError:
        raise HBFPError(f"{word!r} is neither a number nor a float32 pattern such as 0x3f800000") from None


def _float32_pattern(value: float) -> int:
    if math.isnan(value):
        return 0x7FC00000
    try:
        return int.from_bytes(struct.pack("<f", value), "little")
    except OverflowError:
        return _INFINITY | (_SIGN if value < 0 else 0)


def _number(pattern: int) -> float | str:
    """A float32's value for people: the shortest decimal that reads back as the same float32."""
    import numpy as np

    value = np.array([pattern], np.uint32).view(np.float32)[0]
    return float(str(value)) if np.isfinite(value) else str(value)


def _decimal(value: Fraction) -> str:
    """A dyadic fraction in decimal: exactly while that is short."""
    exact = f"{float(value):.12g}"
    return exact if Fraction(exact) == value else f"~{float(value):.6g}"
