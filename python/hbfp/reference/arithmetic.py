"""Formats, encoding, packing, products of matrices, linear layers and softmax: the specification section by section.

float32 values enter and leave as bit patterns; between the two every number is an `int` or a `fractions.Fraction`, and
numpy is a container only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from operator import mul
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CANONICAL_NAN",
    "BlockFormat",
    "Encoded",
    "FormatDescription",
    "LinearStep",
    "Lines",
    "bias_gradient",
    "block_exponent",
    "encode",
    "encode_with",
    "float32_add",
    "float32_value",
    "linear",
    "linear_step",
    "matmul",
    "max_code",
    "pack_codes",
    "philox4x32",
    "product",
    "product_of_lines",
    "quantize",
    "random_bits",
    "round_to_code",
    "round_to_float32",
    "row_and_column",
    "scale_exponent",
    "scale_range",
    "stream_number",
    "unpack_codes",
]

Index = tuple[int, ...]

CANONICAL_NAN = 0x7FC00000
INFINITY = 0x7F800000
SIGN = 0x80000000

NAN_BLOCK = 255
"""The exponent byte of a block that held something non-finite."""
SCALE_OFFSET = 127
"""The exponent byte is the scale exponent plus this, whatever the format's own bias."""
BIAS_GRADIENT_ROWS = 64

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
RULES = ("max_exponent", "ceil", "no_clip")


# ------------------------------------------------------------------------------------------------- formats (clause 4.7)


class BlockFormat(Protocol):
    """What the oracle reads of a format."""

    @property
    def bits(self) -> int: ...
    @property
    def block(self) -> int | None: ...
    @property
    def tile(self) -> int | None: ...
    @property
    def exponent_rule(self) -> object: ...
    @property
    def exponent_bits(self) -> int: ...
    @property
    def exponent_bias(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class FormatDescription:
    """A format as the oracle sees it: attributes and the written form, without the compiled core."""

    bits: int
    block: int | None = 64
    tile: int | None = None
    exponent_rule: str = "max_exponent"
    exponent_bits: int = 8
    exponent_bias: int | None = None

    @classmethod
    def parse(cls, text: str) -> FormatDescription:
        """The format written `text`, for instance "hbfp4b64", "hbfp4t8", "hbfp4tensor" or "hbfp4b64-ceil-e5-bias20"."""
        found = re.fullmatch(
            r"hbfp(\d+)(?:b(?P<block>\d+)|t(?P<tile>\d+)|tensor)"
            r"(?:-(?P<rule>ceil|noclip))?(?:-e(?P<width>\d+)(?:-bias(?P<bias>-?\d+))?)?",
            text,
        )
        if found is None:
            raise ValueError(f"expected a format such as hbfp4b64 or hbfp6t8-noclip-e5; found {text!r}")

        def number(name: str) -> int | None:
            return None if found[name] is None else int(found[name])

        rule = {None: "max_exponent", "ceil": "ceil", "noclip": "no_clip"}[found["rule"]]
        result = cls(int(found[1]), number("block"), number("tile"), rule, number("width") or 8, number("bias"))
        if str(result) != text:
            raise ValueError(f"{text!r} is written {str(result)!r}: expected the one written form")
        return result

    def __str__(self) -> str:
        cut = f"t{self.tile}" if self.tile is not None else "tensor" if self.block is None else f"b{self.block}"
        rule = {"max_exponent": "", "ceil": "-ceil", "no_clip": "-noclip"}[self.exponent_rule]
        biased = self.exponent_bias is not None and self.exponent_bias != 2 ** (self.exponent_bits - 1) - 1
        width = f"-e{self.exponent_bits}" if self.exponent_bits != 8 or biased else ""
        bias = f"-bias{self.exponent_bias}" if biased else ""
        return f"hbfp{self.bits}{cut}{rule}{width}{bias}"


def _option(value: object, known: tuple[str, ...]) -> str:
    """The string of an enum member or a string, if it is one of `known`."""
    text = str(getattr(value, "value", value))
    if text not in known:
        raise ValueError(f"expected one of {', '.join(known)}; found {text!r}")
    return text


def max_code(bits: int) -> int:
    """The largest code of an m-bit mantissa; the smallest is its negative."""
    return (1 << (bits - 1)) - 1


def scale_range(fmt: BlockFormat) -> tuple[int, int]:
    """The smallest and the largest scale exponent s that the format's exponent field can hold."""
    bias = fmt.exponent_bias if fmt.exponent_bias is not None else (1 << (fmt.exponent_bits - 1)) - 1
    return max(-bias, -127), min((1 << fmt.exponent_bits) - 2 - bias, 127)


# ----------------------------------------------------------------------------------------------------- exact arithmetic


def _power_of_two(exponent: int) -> Fraction:
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def _floor_log2(value: Fraction) -> int:
    """The integer e with 2^e <= value < 2^(e + 1); value > 0."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if _power_of_two(e) <= value else e - 1


def _round_half_even(value: Fraction) -> int:
    below = math.floor(value)
    rest = value - below
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1):
        return below + 1
    return below


def _round_half_away(value: Fraction) -> int:
    magnitude = math.floor(abs(value) + Fraction(1, 2))
    return magnitude if value >= 0 else -magnitude


def _toward_zero(value: Fraction) -> int:
    magnitude = math.floor(abs(value))
    return magnitude if value >= 0 else -magnitude


_ROUND = {"nearest_even": _round_half_even, "nearest_away": _round_half_away, "toward_zero": _toward_zero}


# ------------------------------------------------------------------------------------------------- float32 bit patterns


def _is_nan(pattern: int) -> bool:
    return pattern & ~SIGN > INFINITY


def _is_finite(pattern: int) -> bool:
    return pattern & ~SIGN < INFINITY


def _ieee_value(pattern: int, exponent_bits: int, fraction_bits: int) -> Fraction:
    """The value of a finite IEEE 754 binary pattern."""
    bias = (1 << (exponent_bits - 1)) - 1
    negative = pattern >> (exponent_bits + fraction_bits) & 1
    exponent = pattern >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = pattern & ((1 << fraction_bits) - 1)
    if exponent > 0:
        fraction += 1 << fraction_bits
    magnitude = fraction * _power_of_two(max(exponent, 1) - bias - fraction_bits)
    return -magnitude if negative else magnitude


def float32_value(pattern: int) -> Fraction:
    """The value of a finite float32 bit pattern (both zeros give 0)."""
    return _ieee_value(pattern, 8, 23)


def round_to_float32(value: Fraction | int) -> int:
    """The bit pattern of the float32 nearest to `value`: ties to even, gradual underflow, overflow to infinity.

    An exact zero is +0.0; a value that underflows to zero keeps its sign.
    """
    value = Fraction(value)
    if value == 0:
        return 0
    sign = SIGN if value < 0 else 0
    magnitude = abs(value)
    spacing = max(_floor_log2(magnitude) - 23, -149)
    steps = _round_half_even(magnitude * _power_of_two(-spacing))
    # `steps` is at most 2^24; a carry out of the fraction lands in the exponent field, as it should.
    return sign | min(((spacing + 149) << 23) + steps, INFINITY)


def _round_scaled(n: int, exponent: int) -> int:
    """`round_to_float32` of n · 2^exponent, which needs no fraction: all that products and sums ever round."""
    if n == 0:
        return 0
    magnitude = abs(n)
    spacing = max(magnitude.bit_length() - 1 + exponent - 23, -149)
    dropped = spacing - exponent
    if dropped <= 0:
        steps = magnitude << -dropped
    else:
        steps, rest, half = magnitude >> dropped, magnitude & ((1 << dropped) - 1), 1 << (dropped - 1)
        steps += rest > half or (rest == half and steps % 2 == 1)
    return (SIGN if n < 0 else 0) | min(((spacing + 149) << 23) + steps, INFINITY)


def _scaled(pattern: int) -> tuple[int, int]:
    """A finite float32 as n and e of n · 2^e."""
    exponent, fraction = pattern >> 23 & 0xFF, pattern & 0x7FFFFF
    n = fraction | 1 << 23 if exponent else fraction
    return -n if pattern & SIGN else n, max(exponent, 1) - 150


def float32_add(a: int, b: int) -> int:
    """The float32 sum of two bit patterns; every NaN result is the canonical one."""
    if _is_nan(a) or _is_nan(b):
        return CANONICAL_NAN
    if not _is_finite(a) or not _is_finite(b):
        if _is_finite(b):
            return a
        if _is_finite(a):
            return b
        return a if a == b else CANONICAL_NAN
    (n_a, e_a), (n_b, e_b) = _scaled(a), _scaled(b)
    lower = min(e_a, e_b)
    total = (n_a << (e_a - lower)) + (n_b << (e_b - lower))
    if total == 0:
        return SIGN if a & b & SIGN else 0
    return _round_scaled(total, lower)


_INPUTS = {"float16": ("u2", 5, 10), "bfloat16": ("u2", 8, 7), "float64": ("u8", 11, 52)}


def _float32_patterns(x: ArrayLike) -> NDArray[np.uint32]:
    """Bit patterns of `x`, in its shape: float32 as it is, float16 and bfloat16 widened, float64 rounded once."""
    array: NDArray[Any] = np.asarray(x)
    native: NDArray[Any] = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
    name = native.dtype.name
    if name == "float32":
        return native.view(np.uint32)
    if name not in _INPUTS:
        raise ValueError(f"expected float32, float16, bfloat16 or float64; found {name}")
    unsigned, exponent_bits, fraction_bits = _INPUTS[name]
    special = ((1 << exponent_bits) - 1) << fraction_bits
    sign_place = exponent_bits + fraction_bits
    result = np.zeros(native.shape, np.uint32)
    for index, pattern in _items(native.view(unsigned)):
        sign = SIGN if pattern >> sign_place else 0
        magnitude = pattern & ((1 << sign_place) - 1)
        if magnitude > special:
            result[index] = CANONICAL_NAN
        elif magnitude == special:
            result[index] = sign | INFINITY
        else:
            result[index] = sign | round_to_float32(_ieee_value(magnitude, exponent_bits, fraction_bits))
    return result


def _floats(patterns: NDArray[np.uint32]) -> NDArray[np.float32]:
    return patterns.view(np.float32)


def _items(array: NDArray[Any]) -> Iterator[tuple[Index, int]]:
    """Row-major pairs of index and element, the element as a Python int."""
    return zip(np.ndindex(array.shape), array.reshape(-1).tolist(), strict=True)


# ----------------------------------------------------------------------------------- exponent and codes (sections 2, 3)


def block_exponent(amax: Fraction, bits: int, rule: object = "max_exponent") -> int:
    """E of a block whose largest magnitude is `amax` > 0, before any clamping."""
    name = _option(rule, RULES)
    floor = _floor_log2(amax)
    if name == "ceil":
        return floor if amax == _power_of_two(floor) else floor + 1
    if name == "max_exponent":
        return floor + 1
    exponent = floor
    while _round_half_even(amax * _power_of_two(bits - 1 - exponent)) > max_code(bits):
        exponent += 1
    return exponent


def scale_exponent(amax: Fraction, fmt: BlockFormat) -> int:
    """The scale exponent s of a block whose largest magnitude is `amax` > 0: E - (m - 1), clamped to its field."""
    low, high = scale_range(fmt)
    s = block_exponent(amax, fmt.bits, fmt.exponent_rule) - (fmt.bits - 1)
    return min(max(s, low), high)


def round_to_code(value: Fraction, s: int, bits: int, rounding: object = "nearest_even", r: int = 0) -> int:
    """The code of `value` in a block of scale exponent s; r in 0..65535 are the random bits of stochastic rounding."""
    name = _option(rounding, ROUNDINGS)
    limit = max_code(bits)
    if name == "stochastic":
        scaled = value * _power_of_two(16 - s)
        y = _round_half_even(min(max(scaled, Fraction(-limit << 16)), Fraction(limit << 16)))
        return (y + r) >> 16
    return min(max(_ROUND[name](value * _power_of_two(-s)), -limit), limit)


# ---------------------------------------------------------------------------------------------- random bits (section 3)

_MASK = 0xFFFFFFFF


@lru_cache(maxsize=4096)
def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words from a counter of four words and a key of two.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_bits(row: int, column: int, seed: int = 0, stream: int = 0) -> int:
    """The 16 random bits of the element at (row, column) of the tensor seen as rows of its last dimension."""
    counter = (column // 8, row, stream & _MASK, stream >> 32)
    words = philox4x32(counter, (seed & _MASK, seed >> 32))
    half_word = column % 8
    return words[half_word // 2] >> (16 * (half_word % 2)) & 0xFFFF


def stream_number(step: int, site: int, index: int, role: int) -> int:
    """The stream of one operand of one product in training: step (32 bits), site (20), index (modulo 256), role (4)."""
    for name, value, width in (("step", step, 32), ("site", site, 20), ("role", role, 4)):
        if not 0 <= value < 1 << width:
            raise ValueError(f"{name} must fit {width} bits; found {value}")
    return step << 32 | site << 12 | index % 256 << 4 | role


# ----------------------------------------------------------------------------------------- shapes of blocks (section 4)


def _blocked_axis(fmt: BlockFormat, axis: int, ndim: int) -> int:
    """`axis` counted from the front; the last one where it plays no part."""
    dimensions = max(ndim, 1)
    if not -dimensions <= axis < dimensions:
        raise ValueError(f"axis {axis} is out of range for {ndim} dimensions")
    return axis % dimensions if fmt.tile is None and fmt.block is not None else dimensions - 1


def _block_edges(fmt: BlockFormat, shape: Index, axis: int) -> list[int | None]:
    """Elements of a block along each dimension; None: all of them."""
    edges: list[int | None] = [1] * len(shape)
    if fmt.tile is not None:
        edges[-2:] = [fmt.tile] * len(edges[-2:])
    elif fmt.block is None:
        edges = [None] * len(shape)
    elif shape:
        edges[axis] = fmt.block
    return edges


def _block_of(index: Index, edges: Sequence[int | None]) -> Index:
    """Where the exponent of the element at `index` stands among the exponents."""
    return tuple(0 if edge is None else i // edge for i, edge in zip(index, edges, strict=True))


def _exponent_shape(fmt: BlockFormat, shape: Index, axis: int) -> Index:
    edges = _block_edges(fmt, shape, axis)
    return tuple(min(size, 1) if edge is None else -(-size // edge) for size, edge in zip(shape, edges, strict=True))


# -------------------------------------------------------------------------------------------------- packing (section 7)


def pack_codes(codes: Sequence[int], bits: int) -> bytes:
    """One block: two's-complement codes as a stream, least significant bit first, zero bits up to the next byte."""
    word = 0
    for position, code in enumerate(codes):
        word |= (code & ((1 << bits) - 1)) << (position * bits)
    return word.to_bytes(_block_bytes(len(codes), bits), "little")


def unpack_codes(data: bytes, count: int, bits: int) -> list[int]:
    """The inverse of `pack_codes`. Raises on the forbidden code -2^(m - 1) and on padding bits that are not zero."""
    word = int.from_bytes(data, "little")
    codes = []
    for position in range(count):
        field = word >> (position * bits) & ((1 << bits) - 1)
        code = field - (1 << bits) if field >> (bits - 1) else field
        if code < -max_code(bits):
            raise ValueError(f"forbidden code {code} at position {position} of a block; codes are {bits} bits wide")
        codes.append(code)
    if word >> (count * bits):
        raise ValueError(f"non-zero padding after the {count} codes of a block")
    return codes


def _block_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


class _Layout:
    """Where each block's codes lie in the mantissa plane: rows of blocks, each block a list of element indices.

    An index of None is padding (tiles only).
    """

    def __init__(self, fmt: BlockFormat, shape: Index, axis: int) -> None:
        self.rows: list[list[tuple[Index, list[Index | None]]]]
        if fmt.tile is not None:
            self.rows = list(self._tile_rows(fmt.tile, shape))
            columns = _exponent_shape(fmt, shape, axis)[-1] if shape else 1
            self.row_bytes = columns * _block_bytes(fmt.tile**2, fmt.bits)
        elif fmt.block is None:
            everything: list[Index | None] = list(np.ndindex(shape))
            self.rows = [[((0,) * len(shape), everything)] if everything else []]
            columns = len(self.rows[0])
            self.row_bytes = _block_bytes(len(everything), fmt.bits)
        else:
            self.rows = list(self._line_rows(fmt.block, shape, axis))
            length = shape[axis] if shape else 1
            columns = -(-length // fmt.block)
            self.row_bytes = (length // fmt.block) * _block_bytes(fmt.block, fmt.bits)
            self.row_bytes += _block_bytes(length % fmt.block, fmt.bits)
        self.exponent_plane = (len(self.rows), columns)
        self.mantissa_plane = (len(self.rows), self.row_bytes)

    @staticmethod
    def _line_rows(block: int, shape: Index, axis: int) -> Iterator[list[tuple[Index, list[Index | None]]]]:
        if not shape:
            yield [((), [()])]
            return
        others = shape[:axis] + shape[axis + 1 :]
        for line in np.ndindex(others):
            before, after = line[:axis], line[axis:]
            yield [
                (
                    (*before, number, *after),
                    [(*before, k, *after) for k in range(start, min(start + block, shape[axis]))],
                )
                for number, start in enumerate(range(0, shape[axis], block))
            ]

    @staticmethod
    def _tile_rows(tile: int, shape: Index) -> Iterator[list[tuple[Index, list[Index | None]]]]:
        missing = max(2 - len(shape), 0)
        rows, columns = ((1,) * missing + shape)[-2:]
        for batch in np.ndindex(shape[:-2]):
            for tile_row in range(-(-rows // tile)):
                line: list[tuple[Index, list[Index | None]]] = []
                for tile_column in range(-(-columns // tile)):
                    elements: list[Index | None] = []
                    for i in range(tile_row * tile, (tile_row + 1) * tile):
                        for j in range(tile_column * tile, (tile_column + 1) * tile):
                            inside = i < rows and j < columns
                            elements.append((*batch, *(i, j)[missing:]) if inside else None)
                    line.append(((*batch, *(tile_row, tile_column)[missing:]), elements))
                yield line


# ------------------------------------------------------------------------------------- encode, decode (sections 1 to 4)


def _integers(x: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(x)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"expected {name} as integers; found {array.dtype}")
    return array.astype(np.int64)


def _code_type(bits: int) -> type[np.signedinteger[Any]]:
    return np.int8 if bits <= 8 else np.int16


@dataclass(frozen=True, eq=False)
class Encoded:
    """An encoded tensor, unpacked.

    Attributes:
        mantissas: the codes, int8 (int16 above 8 bits), in the logical shape.
        exponents: the bytes c = s + 127, uint8, in the logical shape with the blocked axis counted in blocks (tiles:
            both last dimensions counted in tiles; whole tensor: every dimension 1).
        format: the format.
        axis: the blocked axis, counted from the front; the last one for tiles and whole tensors.
    """

    mantissas: NDArray[Any]
    exponents: NDArray[np.uint8]
    format: BlockFormat
    axis: int

    def __post_init__(self) -> None:
        self.mantissas.flags.writeable = False
        self.exponents.flags.writeable = False

    @classmethod
    def from_parts(
        cls, mantissas: ArrayLike, exponents: ArrayLike, fmt: BlockFormat, shape: Sequence[int], axis: int = -1
    ) -> Encoded:
        """Codes and exponents made elsewhere, checked: shapes, range of the codes, zero codes under c = 255."""
        shape = tuple(shape)
        axis = _blocked_axis(fmt, axis, len(shape))
        codes, bytes_ = _integers(mantissas, "codes"), _integers(exponents, "exponents")
        expected = _exponent_shape(fmt, shape, axis)
        if codes.shape != shape or bytes_.shape != expected:
            raise ValueError(f"expected codes {shape} and exponents {expected}; found {codes.shape} and {bytes_.shape}")
        for index, c in _items(bytes_):
            if not 0 <= c <= 255:
                raise ValueError(f"exponent byte {c} at {index} is not in 0..255")
        edges = _block_edges(fmt, shape, axis)
        limit = max_code(fmt.bits)
        for index, code in _items(codes):
            if not -limit <= code <= limit:
                raise ValueError(f"forbidden code {code} at {index}: expected -{limit}..{limit}")
            if code != 0 and bytes_[_block_of(index, edges)] == NAN_BLOCK:
                raise ValueError(f"code {code} at {index} lies in a NaN block: expected 0")
        return cls(codes.astype(_code_type(fmt.bits)), bytes_.astype(np.uint8), fmt, axis)

    @classmethod
    def from_planes(
        cls,
        exponents: NDArray[np.uint8],
        mantissas: NDArray[np.uint8],
        fmt: BlockFormat,
        shape: Sequence[int],
        axis: int = -1,
    ) -> Encoded:
        """The packed planes of a tensor of logical `shape`, checked as readers must."""
        shape = tuple(shape)
        axis = _blocked_axis(fmt, axis, len(shape))
        layout = _Layout(fmt, shape, axis)
        if exponents.shape != layout.exponent_plane or mantissas.shape != layout.mantissa_plane:
            raise ValueError(
                f"expected planes {layout.exponent_plane} and {layout.mantissa_plane}; "
                f"found {exponents.shape} and {mantissas.shape}"
            )
        codes = np.zeros(shape, np.int64)
        logical = np.zeros(_exponent_shape(fmt, shape, axis), np.int64)
        for row, blocks in enumerate(layout.rows):
            data = mantissas[row].tobytes()
            for column, (place, elements) in enumerate(blocks):
                logical[place] = int(exponents[row, column])
                size = _block_bytes(len(elements), fmt.bits)
                for index, code in zip(elements, unpack_codes(data[:size], len(elements), fmt.bits), strict=True):
                    if index is not None:
                        codes[index] = code
                    elif code != 0:
                        raise ValueError(f"code {code} in the padding of a tile: expected 0")
                data = data[size:]
        return cls.from_parts(codes, logical, fmt, shape, axis)

    @property
    def shape(self) -> Index:
        """The logical shape."""
        return self.mantissas.shape

    @property
    def mT(self) -> Encoded:
        """The same encoding with the last two dimensions exchanged."""
        if len(self.shape) < 2:
            raise ValueError(f"expected two dimensions or more; found shape {self.shape}")
        last, other = len(self.shape) - 1, len(self.shape) - 2
        swapped = {last: other, other: last}.get(self.axis, self.axis)
        axis = _blocked_axis(self.format, swapped, len(self.shape))
        return Encoded(self.mantissas.swapaxes(-1, -2), self.exponents.swapaxes(-1, -2), self.format, axis)

    @property
    def T(self) -> Encoded:
        """The transpose of a matrix, with the same codes."""
        if len(self.shape) != 2:
            raise ValueError(f"expected two dimensions; found shape {self.shape}")
        return self.mT

    def block_of(self, index: Index) -> Index:
        """Where the exponent of the element at `index` stands in `exponents`."""
        return _block_of(index, _block_edges(self.format, self.shape, self.axis))

    def scale(self, index: Index) -> int | None:
        """The scale exponent s that applies to the element at `index`; None in a NaN block."""
        c = int(self.exponents[self.block_of(index)])
        return None if c == NAN_BLOCK else c - SCALE_OFFSET

    def decode(self) -> NDArray[np.float32]:
        """q · 2^s of every element as float32; NaN blocks give the canonical NaN."""
        result = np.zeros(self.shape, np.uint32)
        for index, code in _items(self.mantissas):
            s = self.scale(index)
            result[index] = CANONICAL_NAN if s is None else round_to_float32(code * _power_of_two(s))
        return _floats(result)

    def planes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The exponent plane and the mantissa plane, each [rows, bytes per row]."""
        layout = _Layout(self.format, self.shape, self.axis)
        exponents = np.zeros(layout.exponent_plane, np.uint8)
        mantissas = np.zeros(layout.mantissa_plane, np.uint8)
        for row, blocks in enumerate(layout.rows):
            data = b""
            for column, (place, elements) in enumerate(blocks):
                exponents[row, column] = self.exponents[place]
                codes = [0 if index is None else int(self.mantissas[index]) for index in elements]
                data += pack_codes(codes, self.format.bits)
            mantissas[row] = np.frombuffer(data, np.uint8)
        return exponents, mantissas


def encode(
    x: ArrayLike,
    fmt: BlockFormat,
    axis: int = -1,
    rounding: object = "nearest_even",
    seed: int = 0,
    stream: int = 0,
    check: bool = False,
) -> Encoded:
    """Encode a tensor of any shape.

    Args:
        x: float32, or float16, bfloat16 (widened exactly), float64 (rounded once to float32).
        fmt: the format.
        axis: the axis along which blocks lie; plays no part with tiles and whole-tensor blocks.
        rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic".
        seed, stream: 64 bits each; used by stochastic rounding only.
        check: raise on the first NaN or infinity instead of making NaN blocks.
    """
    for label, number in (("seed", seed), ("stream", stream)):
        if not 0 <= number < 1 << 64:
            raise ValueError(f"{label} must be in 0..2^64 - 1; found {number}")
    shape = np.shape(x)
    if math.prod(shape[:-1]) > 1 << 32:
        raise ValueError(f"expected at most 2^32 rows; found shape {shape}")
    return encode_with(
        x, fmt, axis, rounding, lambda index: random_bits(*row_and_column(index, shape), seed, stream), check
    )


def encode_with(
    x: ArrayLike,
    fmt: BlockFormat,
    axis: int,
    rounding: object,
    random: Callable[[Index], int],
    check: bool = False,
) -> Encoded:
    """`encode` of a tensor whose random bits are not those of its own rows: `random` gives them for each index."""
    name = _option(rounding, ROUNDINGS)
    patterns = _float32_patterns(x)
    shape = patterns.shape
    axis = _blocked_axis(fmt, axis, len(shape))
    edges = _block_edges(fmt, shape, axis)
    blocks: dict[Index, list[tuple[Index, int]]] = {}
    for index, pattern in _items(patterns):
        if check and not _is_finite(pattern):
            raise ValueError(f"expected finite values; found a NaN or an infinity, the first at index {index}")
        blocks.setdefault(_block_of(index, edges), []).append((index, pattern))

    mantissas = np.zeros(shape, _code_type(fmt.bits))
    exponents = np.zeros(_exponent_shape(fmt, shape, axis), np.uint8)
    for place, elements in blocks.items():
        # Magnitudes of float32 order as their bit patterns do; anything non-finite comes out on top.
        largest = max(pattern & ~SIGN for _, pattern in elements)
        if not _is_finite(largest):
            exponents[place] = NAN_BLOCK
            continue
        if largest == 0:
            continue
        s = scale_exponent(float32_value(largest), fmt)
        exponents[place] = s + SCALE_OFFSET
        for index, pattern in elements:
            r = random(index) if name == "stochastic" else 0
            mantissas[index] = round_to_code(float32_value(pattern), s, fmt.bits, name, r)
    return Encoded(mantissas, exponents, fmt, axis)


def row_and_column(index: Index, shape: Index) -> tuple[int, int]:
    """Place of an element in the tensor seen as rows of its last dimension."""
    row = 0
    for i, size in zip(index[:-1], shape[:-1], strict=True):
        row = row * size + i
    return row, index[-1] if index else 0


def quantize(
    x: ArrayLike,
    fmt: BlockFormat,
    axis: int = -1,
    rounding: object = "nearest_even",
    seed: int = 0,
    stream: int = 0,
    check: bool = False,
) -> NDArray[np.float32]:
    """The values of `x` on the format's grid: `encode(...).decode()`."""
    return encode(x, fmt, axis, rounding, seed, stream, check).decode()


# ------------------------------------------------------------------------------------------------- products (section 5)


def _boundaries(operand: Encoded, axis: int) -> list[int]:
    """Where blocks begin along `axis`, the reduction of a product."""
    length = operand.shape[axis]
    fmt = operand.format
    if fmt.tile is None and fmt.block is not None and operand.axis != axis % len(operand.shape):
        raise ValueError(f"expected an operand blocked along its reduction, axis {axis}; found axis {operand.axis}")
    edge = fmt.tile or fmt.block or max(length, 1)
    return list(range(0, length, edge))


def product(
    a: Encoded, b: Encoded, c: NDArray[np.float32] | None = None, bias: ArrayLike | None = None
) -> NDArray[np.float32]:
    """a [.., M, K] blocked along -1 times b [.., K, N] blocked along -2, added block by block to c, then to the bias.

    Batch dimensions of a and b are equal, or b has none. c [.., M, N] and bias [N] are float32; without c sums start
    at +0.0. Every NaN of the result is the canonical one.
    """
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"expected [.., M, K] and [.., K, N]; found {a.shape} and {b.shape}")
    if b.shape[:-2] not in ((), a.shape[:-2]):
        raise ValueError(f"expected equal batch dimensions, or none on the right; found {a.shape} and {b.shape}")
    starts = _boundaries(a, -1)
    if starts != _boundaries(b, -2):
        raise ValueError("the operands' blocks begin at different places along the reduction")
    shape = (*a.shape[:-1], b.shape[-1])
    if c is not None:
        _check_shape(c, shape, "C")
    if bias is not None:
        _check_shape(bias, shape[-1:], "the bias")
    return product_of_lines(_lines(a, starts), _lines(b.mT, starts), starts, c, bias)


class Lines(NamedTuple):
    """One operand as a product reads it: a line for each row of A or column of B, along the reduction.

    Attributes:
        codes: integers [.., lines, K].
        exponents: the bytes c of each line's blocks, [.., lines, blocks].
    """

    codes: NDArray[Any]
    exponents: NDArray[np.uint8]


def _lines(operand: Encoded, starts: list[int]) -> Lines:
    """An operand whose reduction is its last dimension."""
    exponents = np.zeros((*operand.shape[:-1], len(starts)), np.uint8)
    for index in np.ndindex(exponents.shape):
        exponents[index] = operand.exponents[operand.block_of((*index[:-1], starts[index[-1]]))]
    return Lines(operand.mantissas, exponents)


def product_of_lines(
    a: Lines,
    b: Lines,
    starts: Sequence[int],
    c: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """The sums of section 5: for each line of a [.., M, K] and of b [.., N, K] the terms of the blocks in order.

    Args:
        a, b: their leading dimensions are equal, or b has none.
        starts: where the blocks begin along K.
        c: float32 [.., M, N] at which the sums start; +0.0 if None.
        bias: float32 [N], added last.
    """
    shape = (*a.codes.shape[:-1], b.codes.shape[-2])
    stops = [*starts, a.codes.shape[-1]][1:]
    start = None if c is None else _float32_patterns(c)
    offset = None if bias is None else _float32_patterns(bias)

    def cut(lines: Lines, line: Index) -> list[tuple[list[int], int | None]]:
        codes, bytes_ = lines.codes[line].tolist(), lines.exponents[line].tolist()
        scales = [None if byte == NAN_BLOCK else byte - SCALE_OFFSET for byte in bytes_]
        return [(codes[i:j], s) for i, j, s in zip(starts, stops, scales, strict=True)]

    columns = {line: cut(b, line) for line in np.ndindex(b.codes.shape[:-1])}
    result = np.zeros(shape, np.uint32)
    for row in np.ndindex(shape[:-1]):
        blocks_a = cut(a, row)
        for j in range(shape[-1]):
            blocks_b = columns[(*(row[:-1] if b.codes.ndim > 2 else ()), j)]
            total = 0 if start is None else int(start[(*row, j)])
            for (codes_a, s_a), (codes_b, s_b) in zip(blocks_a, blocks_b, strict=True):
                total = float32_add(total, _term(codes_a, codes_b, s_a, s_b))
            if offset is not None:
                total = float32_add(total, int(offset[j]))
            result[(*row, j)] = CANONICAL_NAN if _is_nan(total) else total
    return _floats(result)


def _term(codes_a: list[int], codes_b: list[int], s_a: int | None, s_b: int | None) -> int:
    """One block's share of a dot product, exact in integers and rounded once to float32."""
    if s_a is None or s_b is None:
        return CANONICAL_NAN
    return _round_scaled(sum(map(mul, codes_a, codes_b)), s_a + s_b)


def _check_shape(x: ArrayLike, shape: Index, name: str) -> None:
    array = np.asarray(x)
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"expected {name} as float32 {shape}; found {array.dtype} {array.shape}")


def matmul(
    a: Encoded | ArrayLike,
    b: Encoded | ArrayLike,
    *,
    format: BlockFormat | None = None,
    out: NDArray[np.float32] | None = None,
    accumulate: bool = False,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """a [.., M, K] times b [.., K, N] in float32 [.., M, N].

    Args:
        a: encoded along -1, or floats, which are encoded so with `format` (the other operand's if None), nearest-even.
        b: encoded along -2, or floats.
        format: the format of operands that are floats.
        out: where to write the result; it is returned as well.
        accumulate: add to what `out` holds.
        threads: of no effect here.
    """
    left = _encoded(a, b, format, -1)
    right = _encoded(b, a, format, -2)
    return _store(product(left, right, out if accumulate else None), out, accumulate)


def linear(
    x: ArrayLike,
    w: Encoded,
    bias: ArrayLike | None = None,
    format: BlockFormat | None = None,
    *,
    rounding: object = "nearest_even",
    seed: int = 0,
    stream: int = 0,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """x [.., K] times the transpose of w [N, K], plus bias [N], in float32 [.., N].

    x is one matrix, its leading dimensions flattened (this is what tiles see), encoded with `format` (the weight's if
    None) and `rounding`. `threads` is of no effect here.
    """
    patterns = _float32_patterns(x)
    activations = encode(_floats(_as_rows(patterns)), format or w.format, -1, rounding, seed, stream)
    return product(activations, w.T, None, bias).reshape(*patterns.shape[:-1], w.shape[0])


def _as_rows(patterns: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """All leading dimensions flattened into one."""
    if patterns.ndim == 0:
        raise ValueError("expected one dimension or more; found a scalar")
    return patterns.reshape(math.prod(patterns.shape[:-1]), patterns.shape[-1])


def _encoded(operand: Encoded | ArrayLike, other: object, fmt: BlockFormat | None, axis: int) -> Encoded:
    if isinstance(operand, Encoded):
        return operand
    if fmt is None and isinstance(other, Encoded):
        fmt = other.format
    if fmt is None:
        raise ValueError("floats need a format to be encoded with")
    return encode(operand, fmt, axis)


def _store(result: NDArray[np.float32], out: NDArray[np.float32] | None, accumulate: bool) -> NDArray[np.float32]:
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs out")
        return result
    if out.dtype != np.float32 or out.shape != result.shape:
        raise ValueError(f"expected out as float32 {result.shape}; found {out.dtype} {out.shape}")
    out[...] = result
    return out


# ------------------------------------------------------------------------------------------------- training (section 6)


class LinearStep(NamedTuple):
    """The four results of one training step of a linear layer, float32 bit for bit."""

    y: NDArray[np.float32]
    dx: NDArray[np.float32]
    dw: NDArray[np.float32]
    db: NDArray[np.float32]


def linear_step(
    x: ArrayLike,
    w: ArrayLike,
    dy: ArrayLike,
    formats: BlockFormat | Sequence[BlockFormat],
    roundings: object | Sequence[object] = "nearest_even",
    *,
    bias: ArrayLike | None = None,
    seed: int = 0,
    step: int = 0,
    site: int = 0,
    index: int = 0,
) -> LinearStep:
    """Forward, input gradient, weight gradient and bias gradient of a linear layer.

    Args:
        x: [batch.., in]; w: [out, in]; dy: [batch.., out], all float32.
        formats, roundings: one for all, or six in the order of the operand roles: X and W forward, dY and W for dX,
            dY and X for dW.
        bias: [out], added to y.
        seed, step, site, index: from which the random stream of each operand is made.
    """
    patterns_x, patterns_dy = _float32_patterns(x), _float32_patterns(dy)
    rows_x, rows_dy = _floats(_as_rows(patterns_x)), _floats(_as_rows(patterns_dy))
    each_format = list(formats) if isinstance(formats, Sequence) else [formats] * 6
    each_rounding = list(roundings) if isinstance(roundings, list | tuple) else [roundings] * 6

    def operand(tensor: ArrayLike, axis: int, role: int) -> Encoded:
        stream = stream_number(step, site, index, role)
        return encode(tensor, each_format[role], axis, each_rounding[role], seed, stream)

    y = product(operand(rows_x, -1, 0), operand(w, -1, 1).T, None, bias)
    dx = product(operand(rows_dy, -1, 2), operand(w, -2, 3))
    dw = product(operand(rows_dy, -2, 4).T, operand(rows_x, -2, 5))
    return LinearStep(
        y.reshape(*patterns_x.shape[:-1], y.shape[-1]), dx.reshape(patterns_x.shape), dw, bias_gradient(rows_dy)
    )


def bias_gradient(dy: ArrayLike) -> NDArray[np.float32]:
    """Column sums of dy [batch.., n]: blocks of 64 rows, each summed in row order, then the blocks in order."""
    rows = _as_rows(_float32_patterns(dy))
    result = np.zeros(rows.shape[1], np.uint32)
    for j in range(rows.shape[1]):
        total = 0
        for start in range(0, rows.shape[0], BIAS_GRADIENT_ROWS):
            partial = 0
            for pattern in rows[start : start + BIAS_GRADIENT_ROWS, j].tolist():
                partial = float32_add(partial, pattern)
            total = float32_add(total, partial)
        result[j] = total
    return _floats(result)


# --- softmax (6.13) --------------------------------------------------------------------------------------------------

_NEGATIVE_INFINITY = SIGN | INFINITY
_LOG2_E = round_to_float32(Fraction("1.44269504"))
_LN2_HIGH = round_to_float32(Fraction("0.693359375"))
_LN2_LOW = round_to_float32(Fraction("-2.12194440e-4"))
_EXP_COEFFICIENTS = [round_to_float32(Fraction(1, n)) for n in (5040, 720, 120, 24, 6, 2, 1, 1)]
_EXP_LEAST = -87
_PARTIAL_SUMS = 16


def float32_multiply(a: int, b: int) -> int:
    """The float32 product of two finite bit patterns."""
    product = float32_value(a) * float32_value(b)
    return (a ^ b) & SIGN if product == 0 else round_to_float32(product)


def _subtract(a: int, b: int) -> int:
    return float32_add(a, b ^ SIGN)


def _exponential(u: int) -> int:
    """exp of u, which is not above 0."""
    if not _is_finite(u) or float32_value(u) < _EXP_LEAST:
        return 0
    n = _round_half_even(float32_value(float32_multiply(u, _LOG2_E)))
    n_pattern = round_to_float32(n)
    r = _subtract(_subtract(u, float32_multiply(n_pattern, _LN2_HIGH)), float32_multiply(n_pattern, _LN2_LOW))
    p = _EXP_COEFFICIENTS[0]
    for c in _EXP_COEFFICIENTS[1:]:
        p = float32_add(float32_multiply(p, r), c)
    return float32_multiply(p, round_to_float32(_power_of_two(n)))


def _sum_of_row(patterns: Sequence[int]) -> int:
    partial = [0] * _PARTIAL_SUMS
    for j, pattern in enumerate(patterns):
        partial[j % _PARTIAL_SUMS] = float32_add(partial[j % _PARTIAL_SUMS], pattern)
    for half in (8, 4, 2, 1):
        for i in range(half):
            partial[i] = float32_add(partial[i], partial[i + half])
    return partial[0]


def softmax(scores: ArrayLike, scale: float = 1) -> NDArray[np.float32]:
    """Row softmax of scores · scale over the last dimension; scores are float32 and may be -inf, inf or NaN."""
    patterns = _float32_patterns(scores)
    factor = int(_float32_patterns(np.float32(scale)).item())
    rows = _as_rows(patterns)
    for i in range(rows.shape[0]):
        row = [x if not _is_finite(x) else float32_multiply(x, factor) for x in rows[i].tolist()]
        if any(_is_nan(x) or x == INFINITY for x in row):
            rows[i] = CANONICAL_NAN
            continue
        finite = [x for x in row if _is_finite(x)]
        if not finite:
            rows[i] = 0
            continue
        top = max(finite, key=float32_value)
        powers = [_exponential(x if not _is_finite(x) else _subtract(x, top)) for x in row]
        total = float32_value(_sum_of_row(powers))
        rows[i] = [round_to_float32(Fraction(float32_value(e), total)) for e in powers]
    return _floats(rows.reshape(patterns.shape))


def softmax_backward(p: ArrayLike, dp: ArrayLike, scale: float = 1) -> NDArray[np.float32]:
    """Gradient of `softmax` for its scores, (p · (dp - sum of p · dp)) · scale, all finite."""
    shape = np.shape(p)
    factor = int(_float32_patterns(np.float32(scale)).item())
    p_rows, dp_rows = _as_rows(_float32_patterns(p)), _as_rows(_float32_patterns(dp))
    result = np.zeros(p_rows.shape, np.uint32)
    for i in range(p_rows.shape[0]):
        weights, gradients = p_rows[i].tolist(), dp_rows[i].tolist()
        total = _sum_of_row([float32_multiply(a, b) for a, b in zip(weights, gradients, strict=True)])
        result[i] = [
            float32_multiply(float32_multiply(a, _subtract(b, total)), factor)
            for a, b in zip(weights, gradients, strict=True)
        ]
    return _floats(result.reshape(shape))


# --- dropout (6.25) --------------------------------------------------------------------------------------------------

_DROPOUT_STEPS = 2**16


def dropout_step(p: Fraction | float) -> tuple[int, int]:
    """How many of 2^16 elements a share p drops, and the pattern of what the others are multiplied by."""
    dropped = _round_half_even(Fraction(p) * _DROPOUT_STEPS)
    kept = _DROPOUT_STEPS - dropped
    return dropped, round_to_float32(Fraction(_DROPOUT_STEPS, kept)) if kept else 0


def dropout(x: ArrayLike, p: Fraction | float, seed: int = 0) -> NDArray[np.float32]:
    """x [.., columns], float32, with a share p of its elements set to 0 and the others multiplied."""
    patterns = _float32_patterns(x)
    dropped, factor = dropout_step(p)
    result = np.zeros(patterns.shape, np.uint32)
    for index, pattern in _items(patterns):
        if random_bits(*row_and_column(index, patterns.shape), seed) < dropped:
            continue
        if _is_finite(pattern):
            result[index] = float32_multiply(pattern, factor)
        else:
            result[index] = CANONICAL_NAN if _is_nan(pattern) else pattern
    return _floats(result)
