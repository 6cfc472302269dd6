"""Hypothesis strategies for code that encodes arrays: formats, roundings, and float32 arrays made to hurt.

    from hypothesis import given
    from hbfp import testing

    @given(testing.formats(), testing.matrices())
    def test_my_encoder(format, x): ...

Arrays come with powers of two and their neighbours, ties, subnormals, both zeros, the ends of the range and, where
asked for, NaN and infinity. Needs hypothesis: `pip install hbfp[testing]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hbfp.format import HBFP, ExponentRule, Rounding

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ImportError("hbfp.testing needs hypothesis, which is not installed: pip install hbfp[testing]") from error

__all__ = ["arrays", "bit_patterns", "blocks", "formats", "matrices", "product_operands", "roundings", "seeds"]

Float32: TypeAlias = NDArray[np.float32]

SMALLEST, LARGEST = -149, 127
"""floor(log2 |x|) of the smallest subnormal and of the largest float32."""

_SPECIAL_FRACTIONS = (0x000000, 0x7FFFFF, 0x400000, 0x000001, 0x7FFFFE, 0x3FFFFF, 0x400001)
_NOT_FINITE = (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF)
_DRAWN_ONE_BY_ONE = 24


def formats(
    *,
    bits: tuple[int, int] = (2, 16),
    blocks: tuple[int, int] = (1, 80),
    tiles: bool = True,
    tensors: bool = True,
    rules: Sequence[str] = tuple(ExponentRule),
    narrow_exponents: bool = True,
) -> st.SearchStrategy[HBFP]:
    """Formats of every kind.

    Args:
        bits: least and greatest mantissa width.
        blocks: least and greatest block; the usual 16 and 64 come often.
        tiles: also square tiles.
        tensors: also one exponent for the whole tensor.
        rules: exponent rules to choose from.
        narrow_exponents: also exponents under 8 bits and other biases, which clamp.
    """
    usual = [block for block in (1, 2, 16, 64) if blocks[0] <= block <= blocks[1]]
    lines = st.integers(*blocks)
    if usual:
        lines = st.one_of(st.sampled_from(usual), lines)
    cuts: list[st.SearchStrategy[dict[str, Any]]] = [lines.map(lambda block: {"block": block})]
    if tiles:
        cuts.append(st.one_of(st.sampled_from([4, 8]), st.integers(1, 32)).map(lambda tile: {"tile": tile}))
    if tensors:
        cuts.append(st.just({"block": None}))
    exponents: st.SearchStrategy[dict[str, Any]] = st.just({})
    if narrow_exponents:
        narrow = st.builds(
            lambda width, shift: {"exponent_bits": width, "exponent_bias": 2 ** (width - 1) - 1 + shift},
            st.integers(2, 8),
            st.one_of(st.just(0), st.integers(-20, 20)),
        )
        exponents = st.one_of(exponents, narrow)
    return st.builds(
        lambda width, cut, rule, exponent: HBFP(width, exponent_rule=rule, **cut, **exponent),
        st.one_of(
            st.sampled_from([width for width in (4, 6, 8) if bits[0] <= width <= bits[1]] or [bits[0]]),
            st.integers(*bits),
        ),
        st.one_of(cuts),
        st.sampled_from([str(rule) for rule in rules]),
        exponents,
    )


def roundings(*, stochastic: bool = True) -> st.SearchStrategy[Rounding]:
    """Roundings; without `stochastic` those that depend on nothing but the value."""
    return st.sampled_from([rounding for rounding in Rounding if stochastic or rounding is not Rounding.STOCHASTIC])


def seeds() -> st.SearchStrategy[int]:
    """Seeds and streams: 64-bit numbers, often those whose halves must not be mixed up."""
    return st.one_of(st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))


def bit_patterns(
    *, exponents: tuple[int, int] = (SMALLEST, LARGEST), zeros: bool = True, nonfinite: bool = False
) -> st.SearchStrategy[int]:
    """float32 bit patterns.

    Args:
        exponents: least and greatest floor(log2 |x|) of the values other than zero.
        zeros: also +0.0 and -0.0.
        nonfinite: also NaN (quiet, signalling, of either sign) and infinity.
    """
    fractions = st.one_of(st.sampled_from(_SPECIAL_FRACTIONS), st.integers(0, 0x7FFFFF))
    choices = [st.builds(_pattern, st.booleans(), st.integers(*exponents), fractions)]
    if zeros:
        choices.insert(0, st.sampled_from([0x00000000, 0x80000000]))
    if nonfinite:
        choices.append(st.sampled_from(_NOT_FINITE))
    return st.one_of(choices)


def _pattern(negative: bool, exponent: int, fraction: int) -> int:
    if exponent >= -126:
        magnitude = (exponent + 127) << 23 | fraction
    else:
        leading = 1 << (exponent + 149)
        magnitude = leading | fraction & (leading - 1)
    return magnitude | (0x80000000 if negative else 0)


@st.composite
def arrays(
    draw: st.DrawFn,
    shape: int | tuple[int, ...] | st.SearchStrategy[tuple[int, ...]],
    *,
    exponents: tuple[int, int] = (SMALLEST, LARGEST),
    zeros: bool = True,
    nonfinite: bool = False,
) -> Float32:
    """float32 arrays of a shape, or of shapes drawn from a strategy.

    Small arrays are drawn element by element. Large ones are random bits in a band of magnitudes (all zero when shrunk)
    with a few elements drawn one by one at drawn places.
    """
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = math.prod(shape)
    element = bit_patterns(exponents=exponents, zeros=zeros, nonfinite=nonfinite)
    if size <= _DRAWN_ONE_BY_ONE:
        patterns = np.array(draw(st.lists(element, min_size=size, max_size=size)), dtype=np.uint32)
        return patterns.reshape(shape).view(np.float32)
    low = draw(st.integers(*exponents))
    high = draw(st.integers(low, min(low + 20, exponents[1])))
    patterns = _random_patterns(draw(st.integers(0 if zeros else 1, 2**32 - 1)), size, low, high)
    places = draw(st.lists(st.integers(0, size - 1), max_size=8))
    for place in places:
        patterns[place] = draw(element)
    return patterns.reshape(shape).view(np.float32)


def _random_patterns(seed: int, size: int, low: int, high: int) -> NDArray[np.uint32]:
    """Random signs and fractions, floor(log2 |x|) uniform in low ... high; seed 0 gives zeros."""
    if seed == 0:
        return np.zeros(size, np.uint32)
    random = np.random.default_rng(seed)
    exponent = random.integers(low, high, size=size, endpoint=True)
    fraction = random.integers(0, 2**23, size=size)
    leading = 1 << np.clip(exponent + 149, 0, 23)
    magnitude = np.where(exponent >= -126, (exponent + 127) << 23 | fraction, leading | fraction & (leading - 1))
    patterns: NDArray[np.uint32] = (magnitude | random.integers(0, 2, size=size) << 31).astype(np.uint32)
    return patterns


def blocks(format: HBFP, **elements: Any) -> st.SearchStrategy[Float32]:
    """One block of a format, 1-D (tiles: 2-D), whole or cut short as at the end of a line.

    Args:
        format: whole tensors count as blocks of up to 80 elements.
        elements: keywords of `arrays`.
    """
    if format.tile is not None:
        return arrays(st.tuples(st.integers(1, format.tile), st.integers(1, format.tile)), **elements)
    block = format.block or 80
    return arrays(st.one_of(st.just((block,)), st.tuples(st.integers(1, block))), **elements)


@st.composite
def matrices(
    draw: st.DrawFn,
    /,
    format: HBFP | None = None,
    *,
    max_rows: int = 6,
    max_columns: int = 160,
    **elements: Any,
) -> Float32:
    """Matrices, often with a short last block: columns around multiples of the block (or of 64 without a format).

    Args:
        format: of which to hit the block boundaries.
        max_rows, max_columns: greatest sizes; the least is 1.
        elements: keywords of `arrays`.
    """
    rows = draw(st.integers(1, max_rows))
    return draw(arrays((rows, draw(_lengths(format, max_columns))), **elements))


def _lengths(format: HBFP | None, longest: int) -> st.SearchStrategy[int]:
    step = 64 if format is None else format.tile or format.block or 64
    near = [length for n in (1, 2, 3) for length in (n * step - 1, n * step, n * step + 1) if 1 <= length <= longest]
    anywhere = st.integers(1, longest)
    return st.one_of(st.sampled_from(near), anywhere) if near else anywhere


@st.composite
def product_operands(
    draw: st.DrawFn,
    /,
    format: HBFP | None = None,
    *,
    max_rows: int = 5,
    max_columns: int = 5,
    max_reduction: int = 140,
    **elements: Any,
) -> tuple[Float32, Float32]:
    """Pairs a [M, K], b [K, N] for a product, K often around multiples of the block.

    Args:
        format: of which to hit the block boundaries along K.
        max_rows, max_columns, max_reduction: greatest M, N and K; the least is 1.
        elements: keywords of `arrays`.
    """
    k = draw(_lengths(format, max_reduction))
    a = draw(arrays((draw(st.integers(1, max_rows)), k), **elements))
    b = draw(arrays((k, draw(st.integers(1, max_columns))), **elements))
    return a, b
