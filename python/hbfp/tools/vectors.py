"""Makes and checks the test vectors in tests/vectors, from the exact-arithmetic oracle alone.

Every file is a pure function of this module and of `hbfp.reference`: the same text on every machine. To add a case,
add it to the topic's generator with the flags it hunts, explain new flags in `FLAGS` and in docs/spec.md, run
`make vectors` and read the difference.

What the fields hold: float32 as space-separated hexadecimal bit patterns, codes and exponent bytes as integers in
row-major logical order, planes as hexadecimal bytes with their shapes, 64-bit numbers as "0x…".
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product as combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbfp import reference
from hbfp.reference import Encoded, FormatDescription

__all__ = ["FLAGS", "check", "generate", "main"]

Case = dict[str, Any]

FLAGS = {
    "AccumulateNegZero": "Adding to a given C: a block of zeros turns -0.0 into +0.0, so it may not be skipped; "
    "a term that underflows keeps its sign (5.4, 5.6, 5.8).",
    "BiasGradient": "Column sums run in blocks of 64 rows, then over the blocks; each sum starts at +0.0 (6.7).",
    "BiasLast": "The bias is added once, after the last block (5.7).",
    "BlockOrder": "Terms are added in block order, each addition rounded; any other order gives other bits (5.5).",
    "Booster": "The operands of one step in different widths, each encoded for its own product (6.1, 6.5).",
    "CanonicalNaN": "A NaN result is 0x7FC00000 whatever NaN went in (1.8, 5.9).",
    "Convolution": "Taps in the kernel's own order, blocks that restart at each tap, group and pixel, random bits of "
    "the tensors as they are held (6.14, 6.17, 6.19).",
    "Dropout": "Which elements are dropped, and the one rounding of those that are kept (6.25).",
    "EmptyReduction": "K = 0: the result is +0.0 or the given C, plus the bias (5.10).",
    "ExponentClamp": "The scale exponent is outside the exponent field and is clamped to it (1.4, 2.6).",
    "FlattenedPatch": "Few channels in a group: forward blocks run over the patch, whose padding is encoded (6.16).",
    "InfBlock": "An infinity makes a NaN block, and an infinite sum follows IEEE 754 (1.6, 5.9).",
    "KnownAnswer": "An answer published with Random123 for philox4x32-10 (3.8).",
    "MixedFormats": "Operands of different widths or kinds of block whose boundaries along K agree (5.1, 5.2).",
    "NaNBlock": "A block with a NaN encodes to c = 255, zero codes, and poisons what reads it (1.6, 5.9).",
    "NegZero": "The sign of zero is not encoded, and +0.0 plus -0.0 is +0.0 (1.5, 5.6).",
    "OddRows": "Leading dimensions: rows are counted through all of them, blocks and tiles are not (3.9, 4.2, 6.2).",
    "Overflow": "A decoded value, a term or a sum beyond float32 is infinite (1.8, 5.4, 5.9).",
    "PackOrder": "Codes are packed from the least significant bit upwards, low nibble first (7.3).",
    "PaddedTap": "A tap that meets no pixel is a block of zeros that takes part: a NaN opposite is not lost (6.15).",
    "Padding": "Zero bits fill the last byte, zero codes the last tiles; readers refuse others (7.3, 7.4, 7.6).",
    "PhiloxCounter": "The random bits of an element come from its row, its column, the seed and the stream (3.8, 3.9).",
    "PowerOfTwoMax": "A block's largest magnitude is a power of two, where the exponent rules part (2.2, 2.3, 2.4).",
    "Reject": "A reader must refuse these planes (7.6).",
    "Saturate": "A code beyond the largest saturates to it (3.5, 3.6).",
    "Scalar": "A tensor without dimensions is one row of one element (4.5).",
    "ShortTail": "The last block of a line is shorter: its exponent and its bytes are its own (4.1, 7.2).",
    "SlowScale": "A term that is not exact in float32: |D| above 2^24, or a result at the far ends of the range (5.4).",
    "StochasticColumnAxis": "Blocks across the rows draw the same bits as blocks along them (3.9).",
    "Softmax": "The row softmax and its derivative: the exponential, 16 partial sums, one rounding each (6.13).",
    "StreamRoles": "Each operand of a training step draws from the stream of its own role (6.3, 6.4).",
    "Subnormal": "float32 subnormals are read as they are; the smallest step is 2^-127 (2.6, 2.7).",
    "TieAway": "A value half-way between two codes goes away from zero (3.3).",
    "TieToEven": "A value half-way between two codes goes to the even one (3.2).",
    "Tile": "Square blocks of the last two dimensions, cut off at the edges, read in both directions (4.2, 7.4).",
    "TransposedConvolution": "Products are those of a convolution with the parts exchanged, roles are not (6.18).",
    "Truncate": "Rounding toward zero drops the fraction of negative values too (3.4).",
    "WholeTensor": "One exponent for the whole tensor (4.3, 7.5).",
    "WideCodes": "Codes of more than 8 bits: two bytes unpacked, sums beyond 32 bits (1.1, 5.3).",
    "ZeroBlock": "A block of zeros has c = 0, whatever the exponent field; c = 0 alone does not mean zeros (1.5, 1.7).",
    "ZeroSize": "A tensor without elements has empty planes (4.5).",
}
"""What each flag hunts, and the clauses of docs/spec.md that it tests."""


# ------------------------------------------------------------------------------------------------------------- inputs


class _Draw:
    """Deterministic numbers for one case, from its name."""

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(name.encode()).digest()
        self._key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
        self._count = 0

    def word(self) -> int:
        self._count += 1
        return reference.philox4x32((self._count, 0, 0, 0), self._key)[0]

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + self.word() % (high - low + 1)

    def pattern(self, low: int, high: int, fraction_bits: int = 23) -> int:
        """A float32 of either sign and of magnitude 2^low to 2^(high + 1), with so many bits after the first."""
        word = self.word()
        fraction = (word >> (23 - fraction_bits) << (23 - fraction_bits)) & 0x7FFFFF
        return (word & 0x80000000) | (self.integer(low, high) + 127) << 23 | fraction

    def patterns(
        self, shape: Sequence[int], low: int = -5, high: int = 2, fraction_bits: int = 23
    ) -> NDArray[np.uint32]:
        count = math.prod(shape)
        return np.array([self.pattern(low, high, fraction_bits) for _ in range(count)], np.uint32).reshape(shape)

    def lively(self, shape: Sequence[int], bits: int) -> NDArray[np.uint32]:
        """Values among which ties of an m-bit format, zeros of both signs and powers of two are frequent."""
        words = []
        for _ in range(math.prod(shape)):
            kind = self.integer(0, 15)
            if kind < 2:
                words.append(0x80000000 * kind)
            elif kind < 9:
                words.append(self.pattern(-bits, 0, self.integer(0, min(bits - 1, 23))))
            else:
                words.append(self.pattern(-4, 0))
        return np.array(words, np.uint32).reshape(shape)

    def codes(self, shape: Sequence[int], bits: int) -> NDArray[np.int64]:
        """Codes over the whole range, its ends frequent."""
        limit = reference.max_code(bits)
        ends = (limit, -limit, 1, -1, 0)
        drawn = [
            ends[kind] if (kind := self.integer(0, 15)) < len(ends) else self.integer(-limit, limit)
            for _ in range(math.prod(shape))
        ]
        return np.array(drawn, np.int64).reshape(shape)

    def encoded(self, text: str, shape: Sequence[int], axis: int, low: int = 120, high: int = 130) -> Encoded:
        """A tensor of drawn codes and exponent bytes."""
        fmt = FormatDescription.parse(text)
        places = reference.encode(np.zeros(shape, np.float32), fmt, axis).exponents.shape
        exponents = [self.integer(low, high) for _ in range(math.prod(places))]
        return Encoded.from_parts(
            self.codes(shape, fmt.bits), np.array(exponents, np.int64).reshape(places), fmt, shape, axis
        )


def _hex(patterns: NDArray[Any]) -> str:
    words = np.ascontiguousarray(patterns).view(np.uint32)
    return " ".join(f"{word:08x}" for word in words.reshape(-1).tolist())


def _floats(words: Sequence[int] | NDArray[Any], shape: Sequence[int] | None = None) -> NDArray[np.float32]:
    array = np.array(words, np.uint32)
    return array.reshape(array.shape if shape is None else tuple(shape)).view(np.float32)


def _from_values(*values: Fraction | int) -> list[int]:
    return [reference.round_to_float32(value) for value in values]


# ------------------------------------------------------------------------------------------------------------- philox


def _philox() -> Iterator[Case]:
    ones = 0xFFFFFFFF
    # Random123, tests/kat_vectors, "philox4x32 10".
    known = [
        ("zeros", (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ("ones", (ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            "pi",
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for name, counter, key, words in known:
        if reference.philox4x32(counter, key) != words:
            raise AssertionError(f"the oracle's Philox misses the published answer {name!r}")
        yield _philox_case(f"published/{name}", ["KnownAnswer"], counter, key)
    for place in range(4):
        yield _philox_case(f"counter-word-{place}", ["PhiloxCounter"], [int(place == i) for i in range(4)], (0, 0))
    for place in range(2):
        yield _philox_case(f"key-word-{place}", ["PhiloxCounter"], (0, 0, 0, 0), (int(place == 0), int(place == 1)))
    for name, row, seed, stream in (
        ("first-row", 0, 0, 0),
        ("row-7", 7, 1, 2),
        ("last-row", 0xFFFFFFFF, 0, 0),
        ("both-halves", 3, 0x0123456789ABCDEF, 0xFEDCBA9876543210),
        ("all-ones", 1, (1 << 64) - 1, (1 << 64) - 1),
    ):
        yield {
            "name": f"half-words/{name}",
            "flags": ["PhiloxCounter"],
            "row": row,
            "seed": hex(seed),
            "stream": hex(stream),
            "r_of_columns": [reference.random_bits(row, column, seed, stream) for column in range(19)],
        }


def _philox_case(name: str, flags: list[str], counter: Sequence[int], key: Sequence[int]) -> Case:
    words = reference.philox4x32((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))
    return {
        "name": name,
        "flags": flags,
        "counter": [f"{word:08x}" for word in counter],
        "key": [f"{word:08x}" for word in key],
        "words": [f"{word:08x}" for word in words],
    }


# ------------------------------------------------------------------------------------------------------------- encode


def _encode() -> Iterator[Case]:
    yield from _encode_widths()
    yield from _encode_axes()
    yield from _encode_blocks()
    yield from _encode_specials()
    yield from _encode_random()


def _encode_widths() -> Iterator[Case]:
    """Every width with every rule and rounding, in blocks of 16 with a tail of 5."""
    for bits, rule, rounding in combinations(range(2, 17), ("", "-ceil", "-noclip"), reference.ROUNDINGS):
        draw = _Draw(f"encode/width-{bits}")
        x = draw.lively((21,), bits)
        x[draw.integer(0, 15)] = 0x3F800000  # 1.0, the first block's largest
        x[18] = 0xBFFFFFFF  # all ones: rounds up and out of the second block's range
        yield _encode_case(f"width-{bits}{rule}/{rounding}", f"hbfp{bits}b16{rule}", x, -1, rounding, bits, 3)


def _encode_axes() -> Iterator[Case]:
    """Blocks of 1, 3, 16 and 64 along the first, the middle and the last axis."""
    shapes = {1: (2, 3, 4), 3: (4, 5, 7), 16: (19, 2, 2), 64: (67, 2, 1)}
    for block, axis in combinations(shapes, range(3)):
        shape = list(shapes[block])
        shape[0], shape[axis] = shape[axis], shape[0]
        for bits, rounding in ((4, "nearest_even"), (6, "stochastic")):
            x = _Draw(f"encode/axis-{block}-{axis}").lively(shape, bits)
            yield _encode_case(f"block-{block}/axis-{axis}/{rounding}", f"hbfp{bits}b{block}", x, axis, rounding, 5, 6)


def _encode_blocks() -> Iterator[Case]:
    """Tiles, whole tensors, and shapes with few dimensions or none."""
    for tile, rounding in combinations((1, 4, 5, 8, 32), ("nearest_even", "stochastic")):
        x = _Draw(f"encode/tile-{tile}").lively((9, 7), 4)
        yield _encode_case(f"tile-{tile}/{rounding}", f"hbfp4t{tile}", x, -1, rounding, 7, 8)
    for text in ("hbfp6t4-ceil", "hbfp12t3-noclip", "hbfp4t4-e5"):
        yield _encode_case(
            f"batch/{text}", text, _Draw(f"encode/{text}").lively((2, 5, 6), 6), -1, "nearest_away", 0, 0
        )
    yield _encode_case(
        "batch/tile-first-axis", "hbfp4t4", _Draw("encode/tile").lively((3, 2, 5), 4), 0, "stochastic", 1, 1
    )
    for axis, rounding in combinations((0, 1), ("nearest_even", "stochastic")):
        x = _Draw("encode/tensor").lively((3, 11), 5)
        yield _encode_case(f"tensor/axis-{axis}/{rounding}", "hbfp5tensor", x, axis, rounding, 9, 9)
    yield _encode_case(
        "tensor/3d", "hbfp4tensor", _Draw("encode/tensor-3d").lively((2, 3, 4), 4), 1, "toward_zero", 0, 0
    )
    for text in ("hbfp4b64", "hbfp4t8", "hbfp4tensor"):
        yield _encode_case(f"scalar/{text}", text, np.array(0xBFC00000, np.uint32), -1, "stochastic", 11, 12)
        yield _encode_case(f"vector/{text}", text, _Draw(f"encode/{text}").lively((11,), 4), 0, "stochastic", 11, 12)
        for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
            x = np.zeros(shape, np.uint32)
            yield _encode_case(f"empty/{text}/{'x'.join(map(str, shape))}", text, x, -1, "nearest_even", 0, 0)


def _encode_specials() -> Iterator[Case]:
    one, largest, least = 0x3F800000, 0x7F7FFFFF, 0x00000001
    half = Fraction(1, 2)
    # amax = 4 gives s = 0 at four bits, so that these are their own y.
    ties = _from_values(4, half, 3 * half, 5 * half, 7 * half, -half, -3 * half, -5 * half, -7 * half)
    just = [word + offset for word in ties[1:] for offset in (-1, 1)]
    saturating = _from_values(Fraction(15, 8), Fraction(-15, 8), Fraction(239, 128), Fraction(-31, 16))
    quarter_nan, negative_nan, infinity = 0x7FA00000, 0xFFC12345, 0x7F800000
    subnormals = [least, 0x80000001, 0x00200000, 0x00200001, 0x00400000, 0x80600000, 0x007FFFFF, 0x00A00000]
    fields = [
        "hbfp4b4-e2",
        "hbfp4b4-e5",
        "hbfp6b4-e5-bias20",
        "hbfp8b4-ceil-e4",
        "hbfp4b4-e8-bias100",
        "hbfp5b4-e4-bias-3",
        "hbfp3b4-noclip-e6",
    ]
    rows: list[tuple[str, str, list[int]]] = [
        ("ties", "hbfp4b64", ties),
        ("next-to-ties", "hbfp4b64", [ties[0], *just]),
        ("saturating", "hbfp4b1", saturating),
        ("saturating-no-clip", "hbfp4b1-noclip", saturating),
        ("one", "hbfp4b1", [one, one | 0x80000000]),
        ("one-ceil", "hbfp4b1-ceil", [one, one | 0x80000000, one + 1, one - 1]),
        ("one-no-clip", "hbfp4b1-noclip", [one, one | 0x80000000, one + 1, one - 1]),
        ("zeros", "hbfp4b2", [0, 0x80000000, 0x80000000, 0x80000000, one, 0x80000000]),
        ("zeros-narrow-exponent", "hbfp4b2-e5", [0, 0x80000000, 0x80000000, 0x80000000, one, 0x80000000]),
        ("rounds-to-zeros", "hbfp4b2", [least, least, one, 0x3C000000]),
        ("nan", "hbfp4b3", [one, quarter_nan, one, one, one, one, one, negative_nan]),
        ("infinity", "hbfp6b3", [one, infinity, one, one, one, infinity | 0x80000000, largest]),
        ("nan-whole-tensor", "hbfp4tensor", [one, one, negative_nan, one]),
        ("nan-tile", "hbfp4t2", [one, quarter_nan, one, one, one]),
        ("subnormals-one-by-one", "hbfp4b1", subnormals),
        ("subnormals-together", "hbfp12b64", subnormals),
        ("subnormals-beside-normals", "hbfp16b8", [*subnormals[:-1], 0x02000000]),
        ("largest", "hbfp4b2", [largest, 0x7F000000, largest | 0x80000000, 0x7F600000]),
        ("largest-no-clip", "hbfp4b2-noclip", [largest, 0x7F000000, largest | 0x80000000, 0x7F600000]),
        ("largest-2-bits", "hbfp2b2-noclip", [largest, 0x7F000000, largest | 0x80000000, 0x7F600000]),
        ("largest-16-bits", "hbfp16b2-ceil", [largest, 0x7F000000, 0x7F000000, 0x7F600000]),
        ("least-16-bits", "hbfp16b1", [0x01000000, 0x00800000, 0x04000000, 0x08000000, 0x08000001]),
    ]
    for text in fields:
        wide = [0x00400000, 0x0D800000, 0x33000001, 0x37800000, 0x3E000000, one, 0xC0600000, 0x45000001]
        wide += [0x47FFFFFF, 0x4F000000, largest, 0xC2200000]
        # In order blocks are small or large throughout, paired off they are both.
        pairs = [word for pair in zip(wide, wide[::-1], strict=True) for word in pair]
        rows.append((f"field-{text}", text, wide + pairs))
    for name, text, words in rows:
        for rounding in reference.ROUNDINGS:
            yield _encode_case(f"{name}/{rounding}", text, np.array(words, np.uint32), 0, rounding, 1, 1)


def _encode_random() -> Iterator[Case]:
    """Seeds, streams, rows and columns that tell the words of the counter apart."""
    numbers = [
        (0, 0),
        (1, 0),
        (1 << 32, 0),
        (0, 1),
        (0, 1 << 32),
        (0x0123456789ABCDEF, 0xFEDCBA9876543210),
        ((1 << 64) - 1, (1 << 64) - 1),
    ]
    for seed, stream in numbers:
        x = _Draw("encode/random").patterns((3, 19), -3, 0)
        yield _encode_case(f"random/{seed:x}-{stream:x}", "hbfp4b16", x, -1, "stochastic", seed, stream)
    same = np.full((5, 9), 0x3E99999A, np.uint32)
    for axis in (0, 1):
        yield _encode_case(f"random/same-value/axis-{axis}", "hbfp3b4", same, axis, "stochastic", 21, 22)
    x = _Draw("encode/rows").patterns((2, 3, 5), -3, 0)
    for axis in range(3):
        yield _encode_case(f"random/rows-3d/axis-{axis}", "hbfp4b2", x, axis, "stochastic", 23, 24)
    yield _encode_case("random/half-steps", "hbfp4tensor", _half_steps(27, 28), -1, "stochastic", 27, 28)
    long = _Draw("encode/long").patterns((1, 150), -3, 0)
    yield _encode_case("random/long-row", "hbfp4b64", long, -1, "stochastic", 25, 26)


def _half_steps(seed: int, stream: int) -> NDArray[np.uint32]:
    """Values half-way between two Y, so chosen that the code depends on the way this tie goes (E = 3, s = 0)."""
    words = _from_values(4)
    for column in range(1, 25):
        r = reference.random_bits(0, column, seed, stream)
        steps = 65536 - r - Fraction(1, 2) if column % 3 else -r - Fraction(1, 2)
        words.append(reference.round_to_float32(steps / 65536))
    return np.array(words, np.uint32)


def _encode_case(
    name: str, text: str, words: NDArray[np.uint32], axis: int, rounding: str, seed: int, stream: int
) -> Case:
    fmt = FormatDescription.parse(text)
    words = np.asarray(words, np.uint32)
    x = words.view(np.float32)
    encoded = reference.encode(x, fmt, axis, rounding, seed, stream)
    case: Case = {
        "name": name,
        "flags": _encode_flags(encoded, words, axis, rounding),
        "format": text,
        "shape": list(words.shape),
        "axis": axis,
        "rounding": rounding,
    }
    if rounding == "stochastic":
        case |= {"seed": hex(seed), "stream": hex(stream)}
    return case | {
        "input": _hex(words),
        "codes": encoded.mantissas.reshape(-1).tolist(),
        "exponents": encoded.exponents.reshape(-1).tolist(),
        "exponents_shape": list(encoded.exponents.shape),
        "decoded": _hex(encoded.decode()),
    }


def _encode_flags(encoded: Encoded, words: NDArray[np.uint32], axis: int, rounding: str) -> list[str]:
    """What a case does exercise, found by looking, so that no flag is an empty promise."""
    fmt, shape = encoded.format, words.shape
    flags = set(_kind_flags(fmt, shape, axis))
    if rounding == "stochastic" and words.size:
        flags.add("PhiloxCounter")
        if fmt.tile is None and fmt.block is not None and len(shape) > 1 and axis % len(shape) != len(shape) - 1:
            flags.add("StochasticColumnAxis")
    if len(shape) > 2 and words.size:
        flags.add("OddRows")
    limit = reference.max_code(fmt.bits)
    largest: dict[tuple[int, ...], Fraction] = {}
    for index, word in zip(np.ndindex(shape), words.reshape(-1).tolist(), strict=True):
        magnitude = word & 0x7FFFFFFF
        if magnitude >= 0x7F800000:
            flags.add("InfBlock" if magnitude == 0x7F800000 else "NaNBlock")
            continue
        if word == 0x80000000:
            flags.add("NegZero")
        if 0 < magnitude < 0x00800000:
            flags.add("Subnormal")
        s = encoded.scale(index)
        if s is None:
            continue
        value = reference.float32_value(word)
        place = encoded.block_of(index)
        largest[place] = max(largest.get(place, Fraction(0)), abs(value))
        steps = abs(value) * Fraction(2) ** -s
        if steps % 1 == Fraction(1, 2):
            flags |= {"nearest_even": {"TieToEven"}, "nearest_away": {"TieAway"}}.get(rounding, set())
        if rounding == "toward_zero" and value < 0 and steps % 1 != 0:
            flags.add("Truncate")
        if {"stochastic": steps, "toward_zero": steps - 1}.get(rounding, steps - Fraction(1, 2)) > limit:
            flags.add("Saturate")
    for amax in largest.values():
        if amax == 0:
            flags.add("ZeroBlock")
            continue
        if amax.numerator & (amax.numerator - 1) == 0 and amax.denominator & (amax.denominator - 1) == 0:
            flags.add("PowerOfTwoMax")
        s = reference.block_exponent(amax, fmt.bits, fmt.exponent_rule) - (fmt.bits - 1)
        if s != reference.scale_exponent(amax, fmt):
            flags.add("ExponentClamp")
    if 0x7F800000 in (encoded.decode().reshape(-1).view(np.uint32) & 0x7FFFFFFF):
        flags.add("Overflow")
    return sorted(flags)


def _kind_flags(fmt: reference.BlockFormat, shape: Sequence[int], axis: int) -> Iterator[str]:
    if fmt.tile is not None:
        yield "Tile"
    elif fmt.block is None:
        yield "WholeTensor"
    elif shape and shape[axis] % fmt.block:
        yield "ShortTail"
    if not shape:
        yield "Scalar"
    if 0 in shape:
        yield "ZeroSize"
    if fmt.bits > 8:
        yield "WideCodes"


# --------------------------------------------------------------------------------------------------------------- pack


def _pack() -> Iterator[Case]:
    lengths = {1: 3, 3: 8, 16: 21, 64: 69}
    for bits, (block, length) in combinations(range(2, 17), lengths.items()):
        yield _pack_case(f"width-{bits}/block-{block}", f"hbfp{bits}b{block}", (length,), 0)
    for bits, axis in combinations((4, 5, 6, 16), range(3)):
        yield _pack_case(f"axis-{axis}/width-{bits}", f"hbfp{bits}b3", (4, 2, 5), axis)
    for bits, tile in combinations((4, 5, 6, 11), (1, 3, 4, 8)):
        yield _pack_case(f"tile-{tile}/width-{bits}", f"hbfp{bits}t{tile}", (5, 7), -1)
    yield _pack_case("tile-4/batch", "hbfp6t4", (2, 5, 3), -1)
    yield _pack_case("tile-4/vector", "hbfp6t4", (7,), -1)
    yield _pack_case("tile-2/scalar", "hbfp6t2", (), -1)
    tensors: tuple[tuple[int, ...], ...] = ((3, 5), (2, 3, 3), (7,), ())
    for shape in tensors:
        yield _pack_case(f"tensor/{'x'.join(map(str, shape)) or 'scalar'}", "hbfp5tensor", shape, 0)
    empties: tuple[tuple[int, ...], ...] = ((0,), (0, 70), (70, 0), (2, 0, 5))
    for text, shape in combinations(("hbfp4b64", "hbfp4t8", "hbfp4tensor"), empties):
        yield _pack_case(f"empty/{text}/{'x'.join(map(str, shape))}", text, shape, -1)


def _pack_case(name: str, text: str, shape: Sequence[int], axis: int) -> Case:
    encoded = _Draw(f"pack/{name}").encoded(text, shape, axis, 0, 254)
    flags = set(_kind_flags(encoded.format, shape, axis))
    if math.prod(shape):
        flags.add("PackOrder")
    exponents, mantissas = encoded.planes()
    if encoded.mantissas.size * encoded.format.bits != mantissas.size * 8:
        flags.add("Padding")
    return {
        "name": name,
        "flags": sorted(flags),
        **_operand(encoded),
        "exponents_shape": list(encoded.exponents.shape),
        "exponent_plane_shape": list(exponents.shape),
        "exponent_plane": exponents.tobytes().hex(),
        "mantissa_plane_shape": list(mantissas.shape),
        "mantissa_plane": mantissas.tobytes().hex(),
    }


def _operand(encoded: Encoded) -> Case:
    return {
        "format": str(encoded.format),
        "shape": list(encoded.shape),
        "axis": encoded.axis - max(len(encoded.shape), 1),
        "codes": encoded.mantissas.reshape(-1).tolist(),
        "exponents": encoded.exponents.reshape(-1).tolist(),
    }


# ------------------------------------------------------------------------------------------------------------- decode


def _decode() -> Iterator[Case]:
    cycle = [(7, -7, 1, -1, 4, 0)[c % 6] if c < 255 else 0 for c in range(256)]
    every = Encoded.from_parts(cycle, list(range(256)), FormatDescription.parse("hbfp4b1"), (256,))
    yield _decode_case("every-exponent", ["CanonicalNaN", "NaNBlock", "Overflow", "Subnormal"], every)
    for bits in range(2, 17):
        limit = reference.max_code(bits)
        row = [limit, -limit, 1, -1, 0]
        ends = [0, 1, 21, 22, 23, 127, 254 - bits + 1, 254 - bits + 2, 254]
        encoded = Encoded.from_parts(
            [row] * len(ends), [[c] for c in ends], FormatDescription.parse(f"hbfp{bits}b5"), (len(ends), 5)
        )
        flags = ["Overflow", "Subnormal"] + ["WideCodes"] * (bits > 8) + ["ZeroBlock"]
        yield _decode_case(f"ends/width-{bits}", flags, encoded)
    for text, shape, axis in (
        ("hbfp5b3", (7, 4), 0),
        ("hbfp5b3", (2, 7, 2), 1),
        ("hbfp6t3", (2, 4, 5), -1),
        ("hbfp12tensor", (3, 4), -1),
        ("hbfp4t2", (5,), -1),
    ):
        encoded = _Draw(f"decode/{text}-{axis}").encoded(text, shape, axis)
        flags = sorted({*_kind_flags(encoded.format, shape, axis)})
        yield _decode_case(f"shape/{text}/{'x'.join(map(str, shape))}/axis-{encoded.axis}", flags, encoded)
    yield from _rejects()


def _decode_case(name: str, flags: list[str], encoded: Encoded) -> Case:
    return {"name": name, "flags": flags, **_operand(encoded), "decoded": _hex(encoded.decode())}


def _rejects() -> Iterator[Case]:
    """Planes that a reader must refuse, one reason each."""
    rows: list[tuple[str, list[str], str, tuple[int, ...], str, str]] = [
        ("forbidden-code-4", [], "hbfp4b64", (2,), "7f", "81"),
        ("forbidden-code-2", [], "hbfp2b4", (4,), "7f", "80"),
        ("forbidden-code-6", [], "hbfp6b4", (4,), "7f", "000080"),
        ("forbidden-code-16", [], "hbfp16b4", (2,), "7f", "01000080"),
        ("padding-bits-4", ["Padding"], "hbfp4b64", (3,), "7f", "1111"),
        ("padding-bits-3", ["Padding"], "hbfp3b5", (5,), "7f", "0080"),
        ("padding-bits-of-a-full-block", ["Padding"], "hbfp3b3", (4,), "7f7f", "000201"),
        ("padding-codes-of-a-tile", ["Padding", "Tile"], "hbfp4t2", (1, 1), "7f", "0010"),
        ("codes-in-a-nan-block", ["NaNBlock"], "hbfp4b2", (4,), "7fff", "1101"),
        ("codes-in-a-nan-tile", ["NaNBlock", "Tile"], "hbfp4t2", (2, 2), "ff", "0010"),
        ("codes-in-a-nan-tensor", ["NaNBlock", "WholeTensor"], "hbfp4tensor", (2, 2), "ff", "0010"),
    ]
    for name, flags, text, shape, exponents, mantissas in rows:
        planes = [np.frombuffer(bytes.fromhex(plane), np.uint8)[None] for plane in (exponents, mantissas)]
        try:
            Encoded.from_planes(planes[0], planes[1], FormatDescription.parse(text), shape)
        except ValueError as error:
            reason = str(error)
        else:
            raise AssertionError(f"the oracle accepts {name!r}")
        yield {
            "name": f"reject/{name}",
            "flags": sorted(["Reject", *flags]),
            "format": text,
            "shape": list(shape),
            "axis": -1,
            "exponent_plane_shape": list(planes[0].shape),
            "exponent_plane": exponents,
            "mantissa_plane_shape": list(planes[1].shape),
            "mantissa_plane": mantissas,
            "error": "CodeError",
            "reason": reason,
        }


# ------------------------------------------------------------------------------------------------------------- matmul


def _matmul() -> Iterator[Case]:
    pairs = [(2, 2), (2, 16), (3, 5), (4, 4), (4, 6), (6, 4), (5, 7), (7, 8), (8, 8), (9, 4), (10, 12), (11, 13)]
    pairs += [(14, 15), (16, 8), (16, 16)]
    for bits_a, bits_b in pairs:
        flags = ["ShortTail"] + ["MixedFormats"] * (bits_a != bits_b) + ["WideCodes"] * (max(bits_a, bits_b) > 8)
        a, b = f"hbfp{bits_a}b16", f"hbfp{bits_b}b16"
        yield _drawn(f"width-{bits_a}-by-{bits_b}", flags, a, (3, 37), b, (37, 4))
    for block, length in ((1, 5), (3, 8), (64, 131), (256, 300), (1024, 70)):
        flags = ["BlockOrder", "ShortTail"] if block > 1 else ["BlockOrder"]
        yield _drawn(f"block-{block}", flags, f"hbfp4b{block}", (2, length), f"hbfp6b{block}", (length, 3))
    yield from _matmul_kinds()
    yield from _matmul_order()
    yield from _matmul_scales()
    yield from _matmul_zeros()
    yield from _matmul_non_finite()


def _drawn(
    name: str,
    flags: list[str],
    a: str,
    shape_a: Sequence[int],
    b: str,
    shape_b: Sequence[int],
    *,
    low: int = 120,
    high: int = 130,
    c: bool = False,
    bias: bool = False,
) -> Case:
    draw = _Draw(f"matmul/{name}")
    left = draw.encoded(a, shape_a, -1, low, high)
    right = draw.encoded(b, shape_b, -2, low, high)
    shape = (*shape_a[:-1], shape_b[-1])
    start = draw.patterns(shape, -8, 8) if c else None
    offset = draw.patterns(shape[-1:], -8, 8) if bias else None
    return _matmul_case(name, flags, left, right, start, offset)


def _matmul_kinds() -> Iterator[Case]:
    """Tiles, whole tensors, batches, C and bias."""
    yield _drawn("tile-4", ["Tile"], "hbfp4t4", (5, 10), "hbfp4t4", (10, 7))
    yield _drawn("tile-8-mixed", ["MixedFormats", "Tile"], "hbfp4t8", (9, 17), "hbfp6t8", (17, 3))
    yield _drawn("tile-by-block", ["MixedFormats", "Tile"], "hbfp4t5", (6, 12), "hbfp6b5", (12, 3))
    yield _drawn("block-by-tile", ["MixedFormats", "Tile"], "hbfp8b5", (3, 12), "hbfp4t5", (12, 6))
    yield _drawn("tile-of-a-batch", ["OddRows", "Tile"], "hbfp4t4", (2, 5, 6), "hbfp4t4", (2, 6, 3))
    yield _drawn("tile-of-a-batch-shared", ["OddRows", "Tile"], "hbfp4t4", (2, 5, 6), "hbfp4t4", (6, 3))
    yield _drawn("tensor", ["WholeTensor"], "hbfp4tensor", (3, 70), "hbfp4tensor", (70, 2))
    yield _drawn("tensor-of-a-batch", ["OddRows", "WholeTensor"], "hbfp6tensor", (2, 2, 7), "hbfp4tensor", (2, 7, 2))
    yield _drawn("batch", ["OddRows"], "hbfp4b4", (2, 3, 2, 6), "hbfp4b4", (2, 3, 6, 2))
    yield _drawn("batch-shared", ["OddRows"], "hbfp4b4", (2, 3, 2, 6), "hbfp4b4", (6, 2))
    yield _drawn("accumulate", ["BlockOrder"], "hbfp4b4", (3, 10), "hbfp4b4", (10, 3), c=True)
    yield _drawn("bias", ["BiasLast"], "hbfp4b4", (3, 10), "hbfp4b4", (10, 3), bias=True)
    yield _drawn("accumulate-and-bias", ["BiasLast"], "hbfp4t4", (3, 10), "hbfp4t4", (10, 3), c=True, bias=True)


def _matmul_order() -> Iterator[Case]:
    """Sums whose value depends on the order of the additions."""
    big = 127 + 24
    for name, codes, exponents in (
        ("cancel-late", [1, 1, -1], [big, 127, big]),
        ("cancel-early", [1, -1, 1], [big, big, 127]),
        ("small-first", [1, 1, 1], [127, 127, big]),
        ("small-last", [1, 1, 1], [big, 127, 127]),
        ("many-halves", [1] + [1] * 16, [big] + [126] * 16),
    ):
        a = _parts("hbfp4b1", [codes], [exponents])
        b = _parts("hbfp4b1", [[1]] * len(codes), [[127]] * len(codes), 0)
        yield _matmul_case(f"order/{name}", ["BlockOrder"], a, b)
        yield _matmul_case(f"order/{name}/bias", ["BiasLast", "BlockOrder"], a, b, None, _from_values(1))
        yield _matmul_case(f"order/{name}/accumulate", ["BlockOrder"], a, b, _from_values(1))
    yield _drawn("order/drawn", ["BlockOrder"], "hbfp4b3", (4, 40), "hbfp4b3", (40, 4), low=105, high=145)


def _matmul_scales() -> Iterator[Case]:
    """Terms beyond 24 bits, and terms at the far ends of the range."""

    def dot(text: str, codes_a: list[int], codes_b: list[int], c_a: int, c_b: int) -> tuple[Encoded, Encoded]:
        return _parts(text, [codes_a], [[c_a]]), _parts(text, [[code] for code in codes_b], [[c_b]], 0)

    # D = 2^24 + 1 and 2^24 + 3: ties of float32. D = 2^24 + 2^22 + 1 on a grid of 2^23: no tie, unless rounded twice.
    yield _matmul_case("scale/tie-down", ["SlowScale"], *dot("hbfp16b2", [4096, 1], [4096, 1], 127, 127))
    yield _matmul_case("scale/tie-up", ["SlowScale"], *dot("hbfp16b2", [4096, 1], [4096, 3], 127, 127))
    twice = dot("hbfp16b2", [4096, 1], [5120, 1], 127 - 86, 127 - 86)
    yield _matmul_case("scale/twice-rounded", ["SlowScale", "Subnormal"], *twice)
    yield _matmul_case("scale/33-bits", ["WideCodes"], *dot("hbfp16b64", [32767] * 64, [32767] * 64, 127, 127))
    yield _matmul_case("scale/-33-bits", ["WideCodes"], *dot("hbfp16b64", [-32767] * 64, [32767] * 64, 100, 90))
    alternating = [32767 - i for i in range(1024)]
    signs = [(-1) ** i * 32767 for i in range(1024)]
    yield _matmul_case("scale/1024-wide", ["WideCodes"], *dot("hbfp16b1024", alternating, signs, 127, 127))
    yield _matmul_case("scale/int16-sums", ["Saturate"], *dot("hbfp8b64", [127] * 64, [127] * 64, 127, 127))
    yield _matmul_case("scale/-int16-sums", ["Saturate"], *dot("hbfp8b64", [-127] * 64, [127] * 64, 127, 127))
    for name, c_a, c_b in (
        ("least", 0, 0),
        ("subnormal", 0, 105),
        ("bottom", 0, 111),
        ("top", 254, 122),
        ("over", 254, 254),
    ):
        flag = "Overflow" if c_a == 254 else "Subnormal"
        for code in (1, -1, 3, 5, -7):
            yield _matmul_case(f"scale/{name}/{code}", [flag, "SlowScale"], *dot("hbfp4b1", [code], [7], c_a, c_b))
    low = _drawn("scale/low", ["SlowScale", "Subnormal"], "hbfp6b4", (3, 14), "hbfp6b4", (14, 3), low=47, high=57)
    high = _drawn("scale/high", ["Overflow", "SlowScale"], "hbfp6b4", (3, 14), "hbfp6b4", (14, 3), low=178, high=188)
    yield from (low, high)
    # Operands that decode to infinity still have a finite product.
    yield _matmul_case("scale/infinite-operand", ["Overflow"], *dot("hbfp4b2", [4, -7], [1, 1], 253, 100))


def _matmul_zeros() -> Iterator[Case]:
    one = _parts("hbfp4b2", [[1], [1]], [[0]], 0)
    zero, down = _parts("hbfp4b2", [[0, 0]], [[0]]), _parts("hbfp4b2", [[-1, 0]], [[0]])
    negative = [0x80000000]
    yield _matmul_case("zero/block", ["NegZero", "ZeroBlock"], zero, one)
    yield _matmul_case("zero/block/accumulate", ["AccumulateNegZero"], zero, one, negative)
    yield _matmul_case("zero/block/bias", ["NegZero"], zero, one, None, negative)
    yield _matmul_case("zero/block/accumulate-and-bias", ["AccumulateNegZero"], zero, one, negative, negative)
    yield _matmul_case("zero/underflow", ["NegZero"], down, one)
    yield _matmul_case("zero/underflow/accumulate", ["AccumulateNegZero"], down, one, negative)
    cancel = _parts("hbfp4b2", [[3, -3]], [[130]]), _parts("hbfp4b2", [[5], [5]], [[130]], 0)
    yield _matmul_case("zero/cancelling/accumulate", ["AccumulateNegZero"], *cancel, negative)
    # No codes differ from zero, but c does: as much a zero as the other.
    kept = _parts("hbfp4b2", [[0, 0]], [[200]])
    yield _matmul_case("zero/kept-exponent/accumulate", ["AccumulateNegZero"], kept, one, negative)
    fmt = FormatDescription.parse("hbfp4b2")
    nothing_a = Encoded.from_parts(np.zeros((1, 0), np.int8), np.zeros((1, 0), np.uint8), fmt, (1, 0))
    nothing_b = Encoded.from_parts(np.zeros((0, 1), np.int8), np.zeros((0, 1), np.uint8), fmt, (0, 1), 0)
    yield _matmul_case("empty", ["EmptyReduction"], nothing_a, nothing_b)
    yield _matmul_case("empty/bias", ["EmptyReduction"], nothing_a, nothing_b, None, _from_values(3))
    for name, word in (("value", 0x40490FDB), ("negative-zero", 0x80000000), ("nan", 0xFF812345)):
        flags = ["CanonicalNaN", "EmptyReduction"] if name == "nan" else ["EmptyReduction"]
        yield _matmul_case(f"empty/accumulate/{name}", flags, nothing_a, nothing_b, [word])
    no_rows = Encoded.from_parts(np.zeros((0, 2), np.int8), np.zeros((0, 1), np.uint8), fmt, (0, 2))
    yield _matmul_case("empty/no-rows", ["ZeroSize"], no_rows, one)


def _matmul_non_finite() -> Iterator[Case]:
    bad = _parts("hbfp4b2", [[1, 2, 3, 4], [1, 2, 0, 0], [0, 0, 1, 1]], [[127, 127], [127, 255], [255, 127]])
    good = _parts("hbfp4b2", [[1, 2]] * 4, [[127, 127]] * 2, 0)
    yield _matmul_case("nan/rows", ["CanonicalNaN", "NaNBlock"], bad, good)
    yield _matmul_case("nan/columns", ["CanonicalNaN", "NaNBlock"], _parts("hbfp4b2", [[1] * 4], [[127] * 2]), bad.T)
    tile = _parts("hbfp4t2", [[0, 0, 1], [0, 0, 1], [1, 1, 1]], [[255, 127], [127, 127]])
    yield _matmul_case("nan/tile", ["NaNBlock", "Tile"], tile, _parts("hbfp4t2", [[0], [0], [1]], [[0], [127]]))
    zero = _parts("hbfp4b2", [[0, 0, 0, 0]], [[0, 0]])
    yield _matmul_case(
        "nan/zero-times-nan", ["NaNBlock"], zero, _parts("hbfp4b2", [[0], [0], [1], [1]], [[255], [127]], 0)
    )
    infinite = _parts("hbfp4b1", [[2, -2], [2, 2], [-2, 1]], [[254, 254], [254, 254], [254, 127]])
    ones = _parts("hbfp4b1", [[1], [1]], [[127], [127]], 0)
    yield _matmul_case("infinity/rows", ["CanonicalNaN", "InfBlock", "Overflow"], infinite, ones)
    sums = _parts("hbfp4b1", [[1, 1], [-1, -1]], [[254, 254], [254, 254]])
    yield _matmul_case("infinity/sums", ["InfBlock", "Overflow"], sums, ones)
    plain = _parts("hbfp4b2", [[1, 1]], [[127]]), _parts("hbfp4b2", [[1], [1]], [[127]], 0)
    for name, word in (("nan", 0xFF812345), ("infinity", 0x7F800000), ("-infinity", 0xFF800000)):
        flag = "CanonicalNaN" if name == "nan" else "InfBlock"
        yield _matmul_case(f"{name}/accumulate", [flag], *plain, [word])
        yield _matmul_case(f"{name}/bias", [flag], *plain, None, [word])
    yield _matmul_case("infinity/minus-bias", ["CanonicalNaN", "InfBlock"], *plain, [0x7F800000], [0xFF800000])


def _parts(text: str, codes: Any, exponents: Any, axis: int = -1) -> Encoded:
    return Encoded.from_parts(codes, exponents, FormatDescription.parse(text), np.shape(codes), axis)


def _matmul_case(
    name: str,
    flags: list[str],
    a: Encoded,
    b: Encoded,
    c: Sequence[int] | NDArray[np.uint32] | None = None,
    bias: Sequence[int] | NDArray[np.uint32] | None = None,
) -> Case:
    shape = (*a.shape[:-1], b.shape[-1])
    start = None if c is None else _floats(c, shape)
    offset = None if bias is None else _floats(bias, shape[-1:])
    result = reference.product(a, b, start, offset)
    case: Case = {"name": name, "flags": flags, "a": _operand(a), "b": _operand(b)}
    if start is not None:
        case["c"] = _hex(start)
    if offset is not None:
        case["bias"] = _hex(offset)
    return case | {"shape": list(shape), "output": _hex(result)}


# ----------------------------------------------------------------------------------------------------------- training

_DEFAULT = ("nearest_even", "nearest_even", "stochastic", "nearest_even", "stochastic", "nearest_even")
"""Roundings in the order of the operand roles: gradients stochastic, weights and activations nearest-even."""
_EMULATOR = ("stochastic",) * 6


def _training() -> Iterator[Case]:
    four, six = ("hbfp4b4",) * 6, ("hbfp6b4",) * 6
    yield _step_case("default", ["ShortTail", "StreamRoles"], (5,), 6, 3, four, _DEFAULT)
    yield _step_case("emulator", ["PowerOfTwoMax", "StreamRoles"], (5,), 6, 3, ("hbfp4b4-ceil",) * 6, _EMULATOR)
    yield _step_case("nearest", ["ShortTail"], (4,), 5, 3, six, ("nearest_even",) * 6)
    yield _step_case("batch", ["OddRows", "StreamRoles"], (2, 3), 5, 4, four, _EMULATOR)
    mixed = ("hbfp4b4", "hbfp6b4", "hbfp8b4", "hbfp6b4", "hbfp8b4", "hbfp4b4")
    yield _step_case("mixed", ["Booster", "MixedFormats", "StreamRoles"], (6,), 5, 4, mixed, _DEFAULT)
    yield _step_case("block-64", ["ShortTail", "StreamRoles"], (67,), 3, 2, ("hbfp4b64",) * 6, _DEFAULT)
    yield _step_case("tile", ["OddRows", "StreamRoles", "Tile"], (2, 3), 6, 5, ("hbfp4t4",) * 6, _EMULATOR)
    yield _step_case("tensor", ["StreamRoles", "WholeTensor"], (2, 3), 4, 3, ("hbfp5tensor",) * 6, _EMULATOR)
    yield _step_case("wide", ["StreamRoles", "WideCodes"], (5,), 4, 3, ("hbfp12b3",) * 6, _EMULATOR)
    yield _step_case("vector", ["StreamRoles"], (), 6, 3, four, _EMULATOR)
    for name, step, site, index in (
        ("step", 0xFFFFFFFF, 0, 0),
        ("site", 0, 0xFFFFF, 0),
        ("index", 0, 0, 255),
        ("index-wraps", 0, 0, 258),
        ("all", 0x12345678, 0xABCDE, 0x9F),
    ):
        yield _step_case(
            f"stream/{name}", ["StreamRoles"], (3,), 4, 2, four, _EMULATOR, step=step, site=site, index=index
        )
    yield from _bias_gradients()


def _step_case(
    name: str,
    flags: list[str],
    batch: Sequence[int],
    width_in: int,
    width_out: int,
    formats: Sequence[str],
    roundings: Sequence[str],
    *,
    step: int = 3,
    site: int = 2,
    index: int = 1,
) -> Case:
    draw = _Draw(f"training/{name}")
    seed = draw.word() << 32 | draw.word()
    x, w = _floats(draw.patterns((*batch, width_in), -3, 1)), _floats(draw.patterns((width_out, width_in), -4, 0))
    dy, bias = _floats(draw.patterns((*batch, width_out), -9, -3)), _floats(draw.patterns((width_out,), -3, 0))
    result = reference.linear_step(
        x,
        w,
        dy,
        [FormatDescription.parse(text) for text in formats],
        roundings,
        bias=bias,
        seed=seed,
        step=step,
        site=site,
        index=index,
    )
    return {
        "name": f"linear/{name}",
        "flags": flags,
        "formats": list(formats),
        "roundings": list(roundings),
        "seed": hex(seed),
        "step": step,
        "site": site,
        "index": index,
        "streams": [hex(reference.stream_number(step, site, index, role)) for role in range(6)],
        "batch": list(batch),
        "in": width_in,
        "out": width_out,
        "x": _hex(x),
        "w": _hex(w),
        "bias": _hex(bias),
        "dy": _hex(dy),
        "y": _hex(result.y),
        "dx": _hex(result.dx),
        "dw": _hex(result.dw),
        "db": _hex(result.db),
    }


def _bias_gradients() -> Iterator[Case]:
    for rows in (0, 1, 63, 64, 65, 130):
        words = _Draw(f"training/bias-{rows}").patterns((rows, 2), -6, 6)
        yield _bias_gradient_case(f"rows-{rows}", ["BiasGradient"], words)
    absorbed = np.zeros((130, 1), np.uint32)
    absorbed[0], absorbed[64:] = 0x4B800000, 0x3F800000
    yield _bias_gradient_case("absorbed", ["BiasGradient", "BlockOrder"], absorbed)
    ends = np.array([[0x80000000, 0x7F800000, 0x7F800000, 0xFFC12345, 0x7F7FFFFF, 0x00000001]] * 2, np.uint32)
    ends[1, 2], ends[1, 3] = 0xFF800000, 0x3F800000
    yield _bias_gradient_case("ends", ["BiasGradient", "CanonicalNaN", "NegZero", "Overflow", "Subnormal"], ends)


def _bias_gradient_case(name: str, flags: list[str], words: NDArray[np.uint32]) -> Case:
    return {
        "name": f"bias-gradient/{name}",
        "flags": flags,
        "shape": list(words.shape),
        "dy": _hex(words),
        "db": _hex(reference.bias_gradient(words.view(np.float32))),
    }


# -------------------------------------------------------------------------------------------------------- convolution


def _convolution() -> Iterator[Case]:
    three, mixed = ("hbfp4b3",) * 6, ("hbfp4b4", "hbfp6b4", "hbfp8b4", "hbfp6b4", "hbfp8b4", "hbfp4b4")
    plain, flat = ["Convolution", "StreamRoles"], ["Convolution", "FlattenedPatch", "StreamRoles"]
    yield _convolution_case("taps", [*plain, "BlockOrder"], (2, 16, 5), (2, 16, 3), three, _DEFAULT, spread=12)
    yield _convolution_case(
        "geometry", [*plain, "PaddedTap", "ShortTail"], (1, 34, 3, 4), (4, 17, 2, 2), ("hbfp4b7",) * 6, _EMULATOR,
        stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2,
    )  # fmt: skip
    yield _convolution_case("volume", [*plain], (1, 16, 2, 2, 3), (2, 16, 1, 2, 2), mixed, _EMULATOR)
    yield _convolution_case("batch", [*plain, "ShortTail"], (5, 16, 3), (2, 16, 2), three, _DEFAULT, padding=1)
    yield _convolution_case("outputs", [*plain, "ShortTail"], (1, 16, 3), (7, 16, 1), three, _EMULATOR, stride=2)
    yield _convolution_case(
        "stem", [*flat, "PaddedTap", "ShortTail"], (2, 3, 4, 3), (2, 3, 3, 3), ("hbfp4b16",) * 6, _EMULATOR,
        stride=2, padding=1,
    )  # fmt: skip
    yield _convolution_case("depthwise", flat, (2, 3, 3, 4), (6, 1, 2, 2), mixed, _DEFAULT, padding=1, groups=3)
    yield _convolution_case("fifteen", flat, (1, 15, 3), (2, 15, 2), ("hbfp6b64",) * 6, _EMULATOR)
    for where in ("x", "w", "dy"):
        yield _convolution_case(
            f"nan-{where}", ["CanonicalNaN", "Convolution", "NaNBlock", "PaddedTap"], (2, 16, 4), (3, 16, 2), three,
            _DEFAULT, stride=2, padding=1, nan=where,
        )  # fmt: skip
    transposed = ["StreamRoles", "TransposedConvolution"]
    yield _convolution_case(
        "transposed", [*transposed, "ShortTail"], (2, 8, 3, 2), (8, 3, 2, 3), mixed, _EMULATOR,
        stride=2, padding=(0, 1), output_padding=(1, 0), transposed=True,
    )  # fmt: skip
    yield _convolution_case(
        "transposed-groups", transposed, (1, 34, 4), (34, 2, 3), three, _DEFAULT, groups=2, transposed=True
    )


def _convolution_case(
    name: str,
    flags: list[str],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    formats: Sequence[str],
    roundings: Sequence[str],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    spread: int = 3,
    nan: str = "",
) -> Case:
    rank = len(x_shape) - 2
    each: dict[str, Any] = {
        key: [value] * rank if isinstance(value, int) else list(value)
        for key, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
    }
    extra = [output_padding] * rank if isinstance(output_padding, int) else list(output_padding)
    outputs = w_shape[1] * groups if transposed else w_shape[0]
    out = []
    for size, k, s, p, d, e in zip(x_shape[2:], w_shape[2:], *each.values(), extra, strict=True):
        span = d * (k - 1) + 1
        out.append((size - 1) * s - 2 * p + span + e if transposed else (size + 2 * p - span) // s + 1)
    draw = _Draw(f"convolution/{name}")
    seed = draw.word() << 32 | draw.word()
    tensors = {
        "x": draw.patterns(x_shape, -spread, 1),
        "w": draw.patterns(w_shape, -1 - spread, 0),
        "bias": draw.patterns((outputs,), -3, 0),
        "dy": draw.patterns((x_shape[0], outputs, *out), -6 - spread, -3),
    }
    if nan:
        words = tensors[nan].reshape(-1)
        words[len(words) // 2] = 0xFFC12345
    x, w, bias, dy = (_floats(words) for words in tensors.values())
    streams = [reference.stream_number(3, 2, 0, role) for role in range(6)]

    def operands(left: int, right: int) -> tuple[Any, ...]:
        pair = left, right
        return (
            tuple(FormatDescription.parse(formats[role]) for role in pair),
            tuple(roundings[role] for role in pair),
            seed,
            tuple(streams[role] for role in pair),
        )

    if transposed:
        y = reference.convolution_input_gradient(x, w, out, *operands(0, 1), **each, groups=groups, bias=bias)
        dx = reference.convolution(dy, w, None, *operands(2, 3), **each, groups=groups, flatten=False)
        dw = reference.convolution_weight_gradient(x, dy, w_shape[2:], *operands(5, 4), **each, groups=groups)
    else:
        y = reference.convolution(x, w, bias, *operands(0, 1), **each, groups=groups)
        dx = reference.convolution_input_gradient(dy, w, x_shape[2:], *operands(2, 3), **each, groups=groups)
        dw = reference.convolution_weight_gradient(dy, x, w_shape[2:], *operands(4, 5), **each, groups=groups)
    return {
        "name": name,
        "flags": sorted(flags),
        "formats": list(formats),
        "roundings": list(roundings),
        "seed": hex(seed),
        "streams": [hex(stream) for stream in streams],
        "transposed": transposed,
        **each,
        "output_padding": extra,
        "groups": groups,
        "flattened": not transposed and w_shape[1] < 16,
        "x_shape": list(x_shape),
        "w_shape": list(w_shape),
        "y_shape": list(y.shape),
        **{key: _hex(words) for key, words in tensors.items()},
        "y": _hex(y),
        "dx": _hex(dx),
        "dw": _hex(dw),
        "db": _hex(reference.convolution_bias_gradient(dy)),
    }


# ------------------------------------------------------------------------------------------------------------ softmax


def _softmax() -> Iterator[Case]:
    for columns in (1, 2, 15, 16, 17, 40):
        draw = _Draw(f"softmax/columns-{columns}")
        yield _softmax_case(f"columns-{columns}", ["Softmax"], draw.patterns((2, columns), -6, 3))
    # Around the least argument of the exponential, -87, which is 0x42AE0000 below the largest.
    edge = np.array([[0, 0xC2ADFFFF, 0xC2AE0000, 0xC2AE0001, 0xC2B00000, 0x80000000]], np.uint32)
    yield _softmax_case("least-argument", ["NegZero", "Softmax"], edge)
    masked = np.array([[0x3F800000, 0xFF800000, 0], [0xFF800000] * 3, [0xFF800000, 0xC0000000, 0xFF800000]], np.uint32)
    yield _softmax_case("masked", ["Softmax"], masked)
    ends = np.array([[0, 0x7F800000, 0], [0, 0xFFC12345, 0]], np.uint32)
    yield _softmax_case("not-finite", ["CanonicalNaN", "Softmax"], ends)


def _softmax_case(name: str, flags: list[str], words: NDArray[np.uint32]) -> Case:
    scale = float(np.float32(0.35))
    p = reference.softmax(words.view(np.float32), scale)
    case: Case = {
        "name": name,
        "flags": flags,
        "shape": list(words.shape),
        "scale": _hex(np.array([scale], np.float32)),
        "scores": _hex(words),
        "p": _hex(p),
    }
    if "CanonicalNaN" not in flags:
        dp = _Draw(f"softmax/gradient/{name}").patterns(words.shape, -4, 2)
        ds = reference.softmax_backward(p, dp.view(np.float32), scale)
        case |= {"dp": _hex(dp), "ds": _hex(ds)}
    return case


# ------------------------------------------------------------------------------------------------------------ dropout


def _dropout() -> Iterator[Case]:
    for name, p, shape in (
        ("a-tenth", 0.1, (3, 20)),
        ("half", 0.5, (1, 17)),
        ("nothing", 0.0, (2, 3)),
        ("everything", 1.0, (2, 9)),
        ("all-but-one-of-65536", 65535 / 65536, (2, 8)),
        ("tie-to-even-down", 0.5 / 65536, (1, 8)),
        ("tie-to-even-up", 1.5 / 65536, (1, 8)),
        ("nearly-all", 1 - 2.0**-20, (1, 8)),
    ):
        yield _dropout_case(name, ["Dropout"], p, _Draw(f"dropout/{name}").patterns(shape, -8, 0))
    rows = _Draw("dropout/rows").patterns((2, 3, 5, 11), -8, 0)
    yield _dropout_case("rows-of-all-leading-dimensions", ["Dropout", "OddRows"], 0.25, rows)
    yield _dropout_case("one-dimension", ["Dropout"], 0.25, _Draw("dropout/line").patterns((9,), -8, 0))
    ends = np.array([[0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000, 0, 1, 0x00800000] * 2], np.uint32)
    yield _dropout_case("ends-of-the-range", ["CanonicalNaN", "Dropout", "NegZero", "Subnormal"], 0.3, ends)


def _dropout_case(name: str, flags: list[str], p: float, words: NDArray[np.uint32]) -> Case:
    seed = 0x1234567_89ABCDEF
    dropped, factor = reference.dropout_step(p)
    return {
        "name": name,
        "flags": flags,
        "shape": list(words.shape),
        "p": p,
        "seed": hex(seed),
        "x": _hex(words),
        "t": dropped,
        "f": _hex(np.array([factor], np.uint32)),
        "output": _hex(reference.dropout(words.view(np.float32), p, seed)),
    }


# -------------------------------------------------------------------------------------------------------------- files

_TOPICS: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "philox.json": ("Philox4x32-10 words, and the 16 bits of the first columns of a row.", _philox),
    "encode.json": ("float32 bit patterns to codes and exponent bytes, and the values these decode to.", _encode),
    "pack.json": ("Codes and exponent bytes to the two planes, and back.", _pack),
    "decode.json": ("Codes and exponent bytes to float32, and planes that a reader must refuse.", _decode),
    "matmul.json": ("a [.., M, K] times b [.., K, N], added to c if given, then to the bias if given.", _matmul),
    "training.json": (
        "One step of a linear layer: y = x·wT + bias, dx = dy·w, dw = dyT·x; and bias gradients.",
        _training,
    ),
    "convolution.json": (
        "One step of a convolution or, with its parts exchanged, of a transposed one: y with bias, dx, dw, db.",
        _convolution,
    ),
    "softmax.json": ("p = softmax(scores · scale) by rows, and ds from dp.", _softmax),
    "dropout.json": ("Elements of x that dropout keeps, multiplied by f; +0.0 in place of the others.", _dropout),
}


def _render(topic: str) -> str:
    """The text of one file, a line for each case."""
    about, cases = _TOPICS[topic]
    made = list(cases())
    names = [case["name"] for case in made]
    if len(set(names)) != len(names):
        raise AssertionError(f"{topic}: a case name is used twice")
    used = sorted({flag for case in made for flag in case["flags"]})
    flags = ",\n".join(f"  {json.dumps(flag)}: {json.dumps(FLAGS[flag])}" for flag in used)
    lines = ",\n".join(f"  {json.dumps(case, separators=(',', ':'))}" for case in made)
    return f'{{\n"about": {json.dumps(about)},\n"flags": {{\n{flags}\n}},\n"cases": [\n{lines}\n]\n}}\n'


def generate(directory: str | Path) -> list[str]:
    """Writes every file into `directory`; returns the names of those that changed."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stale = check(folder)
    for name in stale:
        if name in _TOPICS:
            (folder / name).write_text(_render(name), encoding="utf-8")
        else:
            (folder / name).unlink()
    return stale


def check(directory: str | Path) -> list[str]:
    """The names of files that are missing, differ from what `generate` would write, or belong to no topic."""
    folder = Path(directory)
    present = {path.name for path in folder.glob("*.json")}
    stale = [name for name in sorted(_TOPICS) if name not in present or _read(folder / name) != _render(name)]
    return stale + sorted(present - set(_TOPICS))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """`vectors gen DIR` writes the files, `vectors check DIR` exits with 1 if any is stale."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 2 or words[0] not in ("gen", "check"):
        print("usage: python -m hbfp.tools.vectors gen|check DIR", file=sys.stderr)
        return 2
    command, directory = words
    if command == "gen":
        changed = generate(directory)
        print("\n".join(f"wrote {name}" for name in changed) or "nothing changed")
        return 0
    stale = check(directory)
    for name in stale:
        print(f"{name} is stale: run `make vectors`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
