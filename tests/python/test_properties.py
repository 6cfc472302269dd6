"""Laws that hold for every input, each of which some implementation has broken. Compared bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hbfp
from hbfp import HBFP, BlockArray, Rounding, reference, testing
from hbfp.reference import arithmetic

NEAREST = (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY)


def bits(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.float32
    return np.ascontiguousarray(array).view(np.uint32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(bits(a), bits(b))


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def with_matrix(formats: st.SearchStrategy[HBFP], **elements: object) -> st.SearchStrategy[tuple[HBFP, np.ndarray]]:
    """Pairs of a format and a matrix that ends near its block boundaries."""
    return formats.flatmap(lambda f: st.tuples(st.just(f), testing.matrices(f, **elements)))


def with_block(formats: st.SearchStrategy[HBFP], **elements: object) -> st.SearchStrategy[tuple[HBFP, np.ndarray]]:
    """Pairs of a format and one block of it."""
    return formats.flatmap(lambda f: st.tuples(st.just(f), testing.blocks(f, **elements)))


def steps(t: BlockArray) -> np.ndarray:
    """2^s of every element, float64 of the logical shape."""
    exponents = t.exponents
    for axis, (size, count) in enumerate(zip(t.shape, exponents.shape, strict=True)):
        if t.format.tile is not None:
            edge = t.format.tile if axis >= t.ndim - 2 else 1
        elif t.format.block is None:
            edge = size
        else:
            edge = t.format.block if axis == t.axis else 1
        assert count == -(-size // edge)
        exponents = np.repeat(exponents, edge, axis).take(range(size), axis)
    return np.ldexp(1.0, exponents.astype(np.int64) - 127)


# --- one encoding ----------------------------------------------------------------------------------------------------


@given(
    with_matrix(testing.formats(rules=["max_exponent"])),
    testing.roundings(),
    testing.roundings(),
    st.sampled_from([0, 1]),
    testing.seeds(),
)
def test_idempotence(case, first, second, axis, seed):
    """What is on the grid stays where it is, whatever the roundings: weights must not creep when saved and loaded."""
    format, x = case
    once = hbfp.quantize(x, format, axis, first, seed)
    assert same(hbfp.quantize(once, format, axis, second, seed, 1), once)


@given(with_matrix(testing.formats()), testing.roundings(), st.sampled_from([0, 1]), testing.seeds())
def test_values_lie_on_the_grid(case, rounding, axis, seed):
    """Codes within their symmetric range, values equal to code times step, and `quantize` equal to both."""
    format, x = case
    t = hbfp.encode(x, format, axis, rounding, seed)
    codes = t.mantissas.astype(np.int64)
    assert np.abs(codes).max() <= format.max_code
    with np.errstate(over="ignore"):
        values = (codes * steps(t)).astype(np.float32)
    assert same(t.decode(), values)
    assert same(hbfp.quantize(x, format, axis, rounding, seed), values)


@given(with_matrix(testing.formats()), st.sampled_from([0, 1]))
def test_codes_are_those_of_a_float64_reference(case, axis):
    """Double rounding, a scale of 2^-s that is no float32, a wrong tie: x / step is exact in float64."""
    format, x = case
    for rounding in (*NEAREST, Rounding.TOWARD_ZERO):
        t = hbfp.encode(x, format, axis, rounding)
        y = x.astype(np.float64) / steps(t)
        if rounding is Rounding.NEAREST_EVEN:
            rounded = np.rint(y)
        elif rounding is Rounding.NEAREST_AWAY:
            rounded = np.copysign(np.floor(np.abs(y) + 0.5), y)
        else:
            rounded = np.trunc(y)
        assert np.array_equal(t.mantissas, np.clip(rounded, -format.max_code, format.max_code))


@given(with_matrix(testing.formats()), testing.roundings(), st.sampled_from([0, 1]), testing.seeds())
def test_error_is_at_most_half_a_step(case, rounding, axis, seed):
    """Half a step for nearest, under one for the others, wherever the code did not saturate."""
    format, x = case
    t = hbfp.encode(x, format, axis, rounding, seed)
    exact, step = x.astype(np.float64), steps(t)
    inside = np.abs(exact) <= format.max_code * step
    error = np.abs(exact - t.mantissas * step)[inside]
    limit = step[inside]
    if rounding in NEAREST:
        assert (error <= limit / 2).all()
    elif rounding is Rounding.TOWARD_ZERO:
        assert (error < limit).all()
    else:  # of the fraction only 16 bits count
        assert (error < limit * (1 + 2.0**-17)).all()
    outside = ~inside
    assert (np.abs(t.mantissas[outside].astype(np.int64)) == format.max_code).all()


@given(with_block(testing.formats()), testing.roundings(stochastic=False))
def test_monotonicity(case, rounding):
    """Rounding must not exchange two values."""
    format, x = case
    order = np.argsort(x, axis=None, kind="stable")
    codes = hbfp.encode(x, format, rounding=rounding).mantissas.astype(np.int64).ravel()[order]
    assert (np.diff(codes) >= 0).all()


@given(with_block(testing.formats(tiles=False), nonfinite=True), testing.roundings(stochastic=False), st.randoms())
def test_permutation_within_a_block(case, rounding, random):
    """The exponent belongs to the set of elements, so the vector lanes and the tail must treat them alike."""
    format, x = case
    order = list(range(x.size))
    random.shuffle(order)
    t, permuted = hbfp.encode(x, format, rounding=rounding), hbfp.encode(x[order], format, rounding=rounding)
    assert np.array_equal(permuted.exponents, t.exponents)
    assert np.array_equal(permuted.mantissas, t.mantissas[order])


@given(
    with_matrix(testing.formats(narrow_exponents=False), exponents=(-60, 60)),
    st.integers(-40, 40),
    testing.roundings(),
    testing.seeds(),
)
def test_scaling_by_a_power_of_two(case, k, rounding, seed):
    """Codes do not change and exponents move by k, wherever nothing is clamped: no hidden absolute threshold."""
    format, x = case
    t = hbfp.encode(x, format, rounding=rounding, seed=seed)
    scaled = hbfp.encode(np.ldexp(x, k), format, rounding=rounding, seed=seed)
    assert np.array_equal(scaled.mantissas, t.mantissas)
    # A block of zeros has no exponent to move.
    zero = t.exponents == 0
    assert np.array_equal(scaled.exponents == 0, zero)
    assert np.array_equal(scaled.exponents[~zero].astype(int), t.exponents[~zero].astype(int) + k)
    assert same(scaled.decode(), np.ldexp(t.decode(), k))


@given(with_matrix(testing.formats(), nonfinite=True), testing.roundings(stochastic=False), st.sampled_from([0, 1]))
def test_negation(case, rounding, axis):
    """The code -2^(m-1) would break this: the range is symmetric."""
    format, x = case
    t, negated = hbfp.encode(x, format, axis, rounding), hbfp.encode(-x, format, axis, rounding)
    assert np.array_equal(negated.mantissas, -t.mantissas)
    assert np.array_equal(negated.exponents, t.exponents)


@given(with_matrix(testing.formats(), nonfinite=True), testing.roundings(stochastic=False))
def test_transposition(case, rounding):
    """Encoding down the columns of a matrix and along the rows of its transpose are two kernels and one result."""
    format, x = case
    assert hbfp.encode(x, format, 0, rounding) == hbfp.encode(x.T, format, 1, rounding).T
    assert hbfp.encode(x, format, 0, rounding) == hbfp.encode(np.ascontiguousarray(x.T), format, 1, rounding).T


@given(with_matrix(testing.formats(tiles=False, tensors=False)), testing.seeds(), testing.seeds())
def test_random_bits_belong_to_the_element(case, seed, stream):
    """Blocks of one element have their own exponent, so along either axis each must be rounded alike."""
    format, x = case
    lone = HBFP(format.bits, 1, exponent_rule=format.exponent_rule)
    along, across = (hbfp.encode(x, lone, axis, "stochastic", seed, stream) for axis in (1, 0))
    assert np.array_equal(along.mantissas, across.mantissas)
    layout = np.asfortranarray(x)
    for axis in (0, 1):
        t = hbfp.encode(x, format, axis, "stochastic", seed, stream)
        assert hbfp.encode(layout, format, axis, "stochastic", seed, stream) == t


@given(with_matrix(testing.formats(tiles=False, tensors=False), nonfinite=True), testing.roundings(stochastic=False))
def test_blocks_do_not_see_each_other(case, rounding):
    """A tensor encoded whole equals its rows encoded alone: nothing leaks over a row's tail."""
    format, x = case
    whole = hbfp.encode(x, format, rounding=rounding)
    for i, row in enumerate(x):
        alone = hbfp.encode(row, format, rounding=rounding)
        assert np.array_equal(alone.mantissas, whole.mantissas[i])
        assert np.array_equal(alone.exponents, whole.exponents[i])


# --- products --------------------------------------------------------------------------------------------------------


def with_operands(formats: st.SearchStrategy[HBFP], **elements: object) -> st.SearchStrategy[tuple[HBFP, tuple]]:
    return formats.flatmap(lambda f: st.tuples(st.just(f), testing.product_operands(f, **elements)))


@given(with_operands(testing.formats(), nonfinite=True))
def test_a_product_is_the_transpose_of_the_transposed_one(case):
    """The roles of the operands in the kernels: neither side may be rounded differently."""
    format, (a, b) = case
    assert same(hbfp.matmul(b.T, a.T, format=format), hbfp.matmul(a, b, format=format).T)


@given(with_operands(testing.formats(tiles=False, tensors=False), max_rows=9, nonfinite=True), st.data())
def test_batch_invariance(case, data):
    """A row of the result depends on that row alone, not on how many rows it came with: edge tiles of the kernels."""
    format, (a, b) = case
    whole = hbfp.matmul(a, b, format=format)
    start = data.draw(st.integers(0, len(a) - 1))
    stop = data.draw(st.integers(start + 1, len(a)))
    assert same(hbfp.matmul(a[start:stop], b, format=format), whole[start:stop])
    assert same(hbfp.matmul(a, b[:, :1], format=format), whole[:, :1])
    batch = np.stack([a, a[::-1]])
    assert same(hbfp.matmul(batch, b, format=format), np.stack([whole, whole[::-1]]))
    assert same(hbfp.matmul(batch, np.stack([b, b]), format=format), np.stack([whole, whole[::-1]]))


@given(with_operands(testing.formats(rules=["max_exponent"], narrow_exponents=False), exponents=(-30, 30)))
def test_a_product_of_scaled_operands_is_the_scaled_product(case):
    """No rounding at a fixed place: powers of two pass through."""
    format, (a, b) = case
    expected = np.ldexp(hbfp.matmul(a, b, format=format), 3)
    assert same(hbfp.matmul(np.ldexp(a, 5), np.ldexp(b, -2), format=format), expected)


@given(with_operands(testing.formats(bits=(2, 6), rules=["max_exponent"]), exponents=(-3, 3)))
def test_a_product_of_decoded_operands_is_exact_in_float64(case):
    """The fixed-point product and plain arithmetic on the decoded values are the same numbers where none is rounded."""
    format, (a, b) = case
    t, u = hbfp.encode(a, format), hbfp.encode(b, format, 0)
    exact = t.decode().astype(np.float64) @ u.decode().astype(np.float64)
    spans = [array.exponents[array.exponents > 0] for array in (t, u)]
    assume(all(span.size == 0 or np.ptp(span) <= 2 for span in spans))  # then 24 bits hold every partial sum
    assert np.array_equal(hbfp.matmul(t, u), exact)


# --- where it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hbfp4b64", "hbfp12b16", "hbfp4t8", "hbfp6tensor"])
def test_thread_invariance(format):
    """Large enough to be cut among threads, in sizes that do not divide evenly."""
    x, w = sample((301, 517), 1), sample((203, 517), 2)
    results = []
    for threads in (1, 2, 3, 7):
        hbfp.set_num_threads(threads)
        packed = hbfp.prepack(hbfp.encode(w, format, rounding="stochastic", seed=1))
        results.append(
            [hbfp.encode(x, format, axis, "stochastic", 1, 2).decode() for axis in (0, 1)]
            + [
                hbfp.quantize(x, format, 0, "stochastic", 1, 2),
                hbfp.matmul(x, w.T, format=format),
                hbfp.linear(x, packed, rounding="stochastic", seed=1),
                hbfp.matmul(x, w.T, format=format, threads=1),
            ]
        )
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


FORK = """
    import os, signal, sys
    {first}
    import numpy as np
    import hbfp

    def everything():
        x = np.random.default_rng(0).standard_normal((300, 512)).astype(np.float32)
        t = hbfp.encode(x, hbfp.HBFP4, rounding="stochastic", seed=1)
        return t.mantissa_plane.tobytes() + hbfp.matmul(x, x.T, format=hbfp.HBFP4).tobytes()

    hbfp.set_num_threads(4)
    expected = everything()  # whatever threads there will be have been started now
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive the test
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(everything())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child ended with {{status}}"
    assert found == expected
    assert everything() == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    "first", ["", "import torch; torch.ones(400, 400) @ torch.ones(400, 400)"], ids=["alone", "torch"]
)
def test_fork_invariance(first):
    """A forked child has none of its parent's threads: a pool that waits for them hangs."""
    if first:
        pytest.importorskip("torch")
    script = textwrap.dedent(FORK).format(first=first)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def flushed_subnormals() -> Iterator[Callable[[], bool]]:
    """This thread treats subnormals as zero, as training scripts ask of torch; gives a check that it still does."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    tiny = torch.tensor([1e-40])
    try:
        assert (tiny * 1).item() == 0
        yield lambda: (tiny * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)


def subnormal_case() -> tuple[np.ndarray, np.ndarray]:
    """Operands of which the left one is subnormal, with products on either side of the smallest normal number."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2**24, size=(40, 70), dtype=np.uint32)
    return patterns.view(np.float32), np.exp2(random.uniform(-4, 2, size=(70, 9))).astype(np.float32)


def subnormal_results() -> list[np.ndarray]:
    x, b = subnormal_case()
    results = []
    for format, rounding in itertools.product(("hbfp4b64", "hbfp16b7", "hbfp6t4"), Rounding):
        t = hbfp.encode(x, format, rounding=rounding, seed=3)
        results += [t.mantissas, t.decode(), hbfp.quantize(x, format, 0, rounding, 3)]
        results += [hbfp.matmul(t, b), hbfp.linear(x, b.T.copy(), format=format)]
    half = np.arange(1, 200) * 2.0**-130  # float64: the first of them become subnormals on the way in
    results += [hbfp.quantize(half, "hbfp16b1"), hbfp.encode(half[:15], "hbfp4b64").mantissas]
    return [r.view(np.uint32) if r.dtype == np.float32 else r for r in results]


def test_flush_denormal_invariance():
    """Results must not depend on a processor flag that the caller set; and the flag must still be set afterwards."""
    expected = subnormal_results()
    with flushed_subnormals() as still_flushed:
        found = subnormal_results()
        assert still_flushed()
    assert all(result.any() for result in expected)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# --- stochastic rounding ---------------------------------------------------------------------------------------------

# In steps: near 0, ties, both signs, more than 16 fraction bits, saturation.
FRACTIONS = [0.25, -0.25, 0.5, 3.3, -6.999, 2.0**-16, -(2.0**-18), 6.0, 7.75, -7.75]


@pytest.mark.parametrize("y", FRACTIONS)
def test_stochastic_rounding_is_exactly_unbiased(y):
    """Over all 65,536 values of r the codes add up to Y = RNE(y 2^16), so their mean is Y / 2^16: no drift at all."""
    fixed = arithmetic._round_half_even(Fraction(min(max(y, -7.0), 7.0)) * 2**16)
    value = Fraction(y)
    codes = [reference.round_to_code(value, 0, 4, "stochastic", r) for r in range(2**16)]
    assert sum(codes) == fixed
    assert {abs(code) <= 7 for code in codes} == {True}
    assert abs(Fraction(fixed, 2**16) - max(min(value, 7), -7)) <= Fraction(1, 2**17)


def philox_bits(rows: int, columns: int, seed: int, stream: int) -> np.ndarray:
    """The 16 random bits of every element of a matrix: Philox4x32-10 over whole arrays of counters."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    row, group = (part.astype(np.uint64) for part in np.indices((rows, columns // 8)))
    c0, c1 = group, row
    c2, c3 = (np.full_like(row, part) for part in (stream & 0xFFFFFFFF, stream >> 32))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    halves = [word >> np.uint64(16 * half) & np.uint64(0xFFFF) for word in (c0, c1, c2, c3) for half in (0, 1)]
    return np.stack(halves, -1).reshape(rows, columns).astype(np.int64)


def test_the_core_rounds_by_every_r():
    """The same sum over codes that the core made: a million elements, among whose random bits every r occurs."""
    rows, columns, seed, stream = 1024, 1024, 2**40 + 1, 2**63 + 5
    r = philox_bits(rows, columns, seed, stream)
    for i, j in ((0, 0), (1, 9), (1023, 1023)):
        assert r[i, j] == reference.random_bits(i, j, seed, stream)
    anchors = np.zeros((rows, columns), bool)
    anchors[:, ::64] = True  # 7.0 fixes the step of each block at 1
    values, first = np.unique(r[~anchors], return_index=True)
    assert len(values) == 2**16
    for y in FRACTIONS[:8]:
        x = np.where(anchors, np.float32(7), np.float32(y))
        codes = hbfp.encode(x, hbfp.HBFP4, rounding="stochastic", seed=seed, stream=stream).mantissas
        fixed = int(np.rint(np.float64(np.float32(y)) * 2**16))
        assert np.array_equal(codes[~anchors], (fixed + r[~anchors]) >> 16)
        assert int(codes[~anchors][first].sum(dtype=np.int64)) == fixed
