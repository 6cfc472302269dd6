"""The numpy level against the oracle, bit for bit, and the behaviour of encoded arrays as Python objects."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hbfp
from hbfp import HBFP, BlockArray, Rounding, reference, testing
from hbfp.array import _round_float64, _widen_bfloat16
from hbfp.reference import arithmetic

FORMATS = [
    HBFP.parse(text)
    for text in (
        "hbfp4b4",
        "hbfp6b5",
        "hbfp9b3-ceil",
        "hbfp2b1",
        "hbfp16b7-noclip-e5",
        "hbfp4t3",
        "hbfp7t2",
        "hbfp5tensor",
    )
]
SHAPES = [(), (7,), (5, 9), (2, 4, 5), (0, 3), (3, 0), (2, 3, 0), (2, 1, 2, 3)]


def bits(array: np.ndarray) -> np.ndarray:
    """What may be compared: -0.0 is not +0.0, and one NaN is not another."""
    assert array.dtype == np.float32
    return np.ascontiguousarray(array).view(np.uint32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(bits(a), bits(b))


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Magnitudes over 160 powers of two, subnormals among them."""
    random = np.random.default_rng([seed, *shape])
    return np.ldexp(random.standard_normal(shape), random.integers(-140, 20, shape)).astype(np.float32)


# --- encode, decode, quantize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_is_the_oracles(format, shape):
    """Every axis and rounding of every kind of block: shapes, planes and values; short tails, empty and 0-d arrays."""
    x = sample(shape)
    dimensions = max(len(shape), 1)
    for axis, rounding in itertools.product(range(-dimensions, dimensions), Rounding):
        arguments = (axis, str(rounding), 5, 2**40 + 3)
        expected = reference.encode(x, format, *arguments)
        t = hbfp.encode(x, format, *arguments)
        assert t.shape == shape
        assert t.mantissas.dtype == expected.mantissas.dtype
        assert np.array_equal(t.mantissas, expected.mantissas)
        assert t.mantissas.shape == shape
        assert t.exponents.dtype == np.uint8
        assert t.exponents.shape == expected.exponents.shape
        assert np.array_equal(t.exponents, expected.exponents)
        for plane, other in zip((t.exponent_plane, t.mantissa_plane), expected.planes(), strict=True):
            assert plane.shape == other.shape
            assert np.array_equal(plane, other)
        assert same(t.decode(), expected.decode())
        assert same(hbfp.quantize(x, format, *arguments), expected.decode())


@given(testing.formats().flatmap(lambda f: st.tuples(st.just(f), testing.matrices(f, max_rows=4, nonfinite=True))))
def test_encode_of_anything_is_the_oracles(case):
    """NaN blocks, infinities, subnormals, clamped exponents, saturation."""
    format, x = case
    for axis in (-1, -2):
        t, expected = hbfp.encode(x, format, axis), reference.encode(x, format, axis)
        assert np.array_equal(t.mantissas, expected.mantissas)
        assert np.array_equal(t.exponents, expected.exponents)
        assert same(t.decode(), expected.decode())
        assert same(hbfp.quantize(x, format, axis), expected.decode())


@given(testing.matrices(max_rows=3), testing.seeds(), testing.seeds(), st.sampled_from(FORMATS))
def test_stochastic_rounding_is_the_oracles(x, seed, stream, format):
    """Halves of seed or stream swapped, a counter that runs on from row to row."""
    arguments = (format, -1, "stochastic", seed, stream)
    assert same(hbfp.quantize(x, *arguments), reference.quantize(x, *arguments))


def test_values_by_hand():
    """HBFP4: 1.0 has E = 1, s = -2, steps of a quarter."""
    t = hbfp.encode(np.array([1.0, -0.3, 0.125, -0.0], np.float32), hbfp.HBFP4)
    assert t.mantissas.tolist() == [4, -1, 0, 0]
    assert t.exponents.tolist() == [125]
    assert t.decode().tolist() == [1.0, -0.25, 0.0, 0.0]
    assert t.mantissa_plane.tolist() == [[0xF4, 0x00]]
    assert t.nbytes == 3


def test_quantize_into_out():
    x = sample((6, 40))
    expected = hbfp.quantize(x, hbfp.HBFP4)
    out = np.empty_like(x)
    assert hbfp.quantize(x, hbfp.HBFP4, out=out) is out
    assert same(out, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_quantize_in_place(axis):
    """A block read after its elements were overwritten."""
    x = sample((70, 70))
    expected = hbfp.quantize(x, "hbfp4b16", axis)
    assert hbfp.quantize(x, "hbfp4b16", axis, out=x) is x
    assert same(x, expected)


def test_quantize_a_view_of_out():
    """The transpose of `out` is `out` as well: read whole before it is written."""
    x = sample((40, 40))
    expected = hbfp.quantize(x.T.copy(), hbfp.HBFP4)
    assert same(hbfp.quantize(x.T, hbfp.HBFP4, out=x), expected)


# --- inputs of other types and layouts -------------------------------------------------------------------------------


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same matrix, held in memory in every way that numpy knows."""
    spaced = np.zeros((2 * x.shape[0], 3 * x.shape[1]), np.float32)
    spaced[::2, ::3] = x
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned[...] = x
    record = np.zeros(x.shape, np.dtype([("pad", "u1"), ("value", "<f4")]))
    record["value"] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    return {
        "fortran": np.asfortranarray(x),
        "transposed": np.ascontiguousarray(x.T).T,
        "spaced": spaced[::2, ::3],
        "reversed": np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
        "unaligned": unaligned,
        "record": record["value"],
        "read-only": read_only,
        "big-endian": x.astype(">f4"),
        "subclass": x.view(type("Sub", (np.ndarray,), {})),
    }


@pytest.mark.parametrize("kind", layouts(np.zeros((2, 2), np.float32)))
@pytest.mark.parametrize("axis", [0, 1])
def test_layout_in_memory_plays_no_part(kind, axis):
    """Strides in bytes taken for elements, a negative stride, a pointer that is not aligned."""
    x = sample((9, 70))
    given = layouts(x)[kind]
    expected = hbfp.encode(x, hbfp.HBFP4, axis, "stochastic", 3, 4)
    assert hbfp.encode(given, hbfp.HBFP4, axis, "stochastic", 3, 4) == expected
    assert type(hbfp.quantize(given, hbfp.HBFP4, axis)) is np.ndarray
    assert same(hbfp.quantize(given, hbfp.HBFP4, axis, "stochastic", 3, 4), expected.decode())
    w = hbfp.encode(sample((4, 70)), hbfp.HBFP4)
    assert same(hbfp.linear(given, w), hbfp.linear(x, w))


def test_broadcast_input():
    """A stride of zero."""
    x = np.broadcast_to(sample((1, 70)), (5, 70))
    assert hbfp.encode(x, hbfp.HBFP4) == hbfp.encode(x.copy(), hbfp.HBFP4)
    x = np.broadcast_to(np.float32(0.3), (3, 4))
    assert hbfp.encode(x, hbfp.HBFP4, 0) == hbfp.encode(x.copy(), hbfp.HBFP4, 0)


def test_float16_widens():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    t = hbfp.encode(every, "hbfp16b1")
    assert t == hbfp.encode(every.astype(np.float32), "hbfp16b1")
    finite = np.isfinite(every)
    assert np.array_equal(t.decode()[finite], every.astype(np.float32)[finite])
    assert t == hbfp.encode(every.astype(">f2"), "hbfp16b1")


def test_bfloat16_widens():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(2**16, dtype=np.uint16)
    wide = (every.astype(np.uint32) << 16).view(np.float32)
    for shape in ((2**16,), (256, 256)):
        x = every.view(ml_dtypes.bfloat16).reshape(shape)
        assert hbfp.encode(x, "hbfp9b1") == hbfp.encode(wide.reshape(shape), "hbfp9b1")
        assert hbfp.encode(x[..., ::-1], "hbfp9b1") == hbfp.encode(wide.reshape(shape)[..., ::-1], "hbfp9b1")


def test_bfloat16_patterns_widen():
    """The part of the above that needs no dtype from elsewhere."""
    every = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(_widen_bfloat16(every).view(np.uint32), every.astype(np.uint32) << 16)
    assert _widen_bfloat16(np.array(0x3F80, np.uint16)).shape == ()
    assert _widen_bfloat16(np.array(0x3F80, np.uint16)) == 1


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8), st.integers(-1080, 130))
def test_float64_is_rounded_once_to_float32(patterns, exponent):
    """Ties, subnormal results, overflow and double rounding, against exact arithmetic."""
    x = np.array(patterns, np.uint64).view(np.float64)
    with np.errstate(all="ignore"):
        near = np.ldexp(1.0 + (np.array(patterns, np.uint64) % 64).astype(np.float64) * 2.0**-26, exponent)
    for values in (x, near, -near):
        finite = values[np.isfinite(values)]
        expected = arithmetic._float32_patterns(finite)
        assert np.array_equal(_round_float64(finite).view(np.uint32), expected)
        assert np.array_equal(_round_float64(finite.astype(">f8")).view(np.uint32), expected)


def test_float64_enters_as_float32():
    x = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, 2.0**-149 * 1.5, 1e300, -1e300])
    y = np.array([1, 1 + 2.0**-22, 2.0**-148, np.inf, -np.inf], np.float32)
    assert hbfp.encode(x, "hbfp16b1") == hbfp.encode(y, "hbfp16b1")
    assert hbfp.encode(x.tolist(), "hbfp16b1") == hbfp.encode(y, "hbfp16b1")
    assert hbfp.encode(0.3, hbfp.HBFP4) == hbfp.encode(np.float32(0.3), hbfp.HBFP4)


def test_a_tensor_enters_like_an_array():
    torch = pytest.importorskip("torch")
    x = sample((5, 40))
    assert hbfp.encode(torch.from_numpy(x), hbfp.HBFP4) == hbfp.encode(x, hbfp.HBFP4)
    assert hbfp.encode(torch.from_numpy(x).T, hbfp.HBFP4) == hbfp.encode(x.T, hbfp.HBFP4)


def test_an_encoded_array_can_be_encoded_again():
    t = hbfp.encode(sample((5, 70)), hbfp.HBFP8)
    assert hbfp.encode(t, hbfp.HBFP4, 0) == hbfp.encode(t.decode(), hbfp.HBFP4, 0)


# --- BlockArray as an object -----------------------------------------------------------------------------------------


def test_description():
    t = hbfp.encode(sample((3, 5, 70)), "hbfp4b16", axis=-2, rounding="toward_zero")
    assert (t.shape, t.ndim, t.size, t.axis) == ((3, 5, 70), 3, 1050, 1)
    assert t.format == HBFP(4, 16)
    assert t.rounding is Rounding.TOWARD_ZERO
    assert t.nbytes == t.exponent_plane.nbytes + t.mantissa_plane.nbytes == t.format.storage_bytes(t.shape, t.axis)
    assert repr(t) == f"BlockArray(hbfp4b16, shape=[3, 5, 70], axis=1, toward_zero, {t.nbytes} bytes)"


def test_immutable():
    t = hbfp.encode(sample((3, 70)), hbfp.HBFP4)
    for plane in (t.exponent_plane, t.mantissa_plane, t.exponents):
        with pytest.raises(ValueError, match="read-only"):
            plane[0] = 1
    with pytest.raises(AttributeError):
        t.shape = (70, 3)
    with pytest.raises(TypeError, match="unhashable"):
        hash(t)


def test_asarray_decodes():
    t = hbfp.encode(sample((3, 70)), hbfp.HBFP4)
    assert same(np.asarray(t), t.decode())
    assert same(np.array(t), t.decode())
    assert same(np.array(t, copy=True), t.decode())
    assert np.asarray(t, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.asarray(t, dtype=np.float64), t.decode())
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="copy=False"):
            np.asarray(t, copy=False)


def test_numpy_operators_do_not_decode_behind_the_back():
    """`x @ t` in FP32 would be a product that is silently not quantised."""
    x, t = sample((2, 40)), hbfp.encode(sample((40, 3)), hbfp.HBFP4, axis=0)
    assert same(x @ t, hbfp.matmul(x, t))
    assert same(hbfp.encode(x, hbfp.HBFP4) @ t, hbfp.matmul(x, t))
    with pytest.raises(TypeError):
        x.T + t
    with pytest.raises(TypeError):
        np.exp(t)


def test_equality_is_of_description_and_codes():
    x = sample((4, 64))
    t = hbfp.encode(x, hbfp.HBFP4)
    assert t == hbfp.encode(x, hbfp.HBFP4)
    on_grid = t.decode()
    assert hbfp.encode(on_grid, hbfp.HBFP4, rounding="toward_zero") == t  # how it was rounded plays no part
    assert t != hbfp.encode(x, "hbfp4b32")
    assert t != hbfp.encode(x, hbfp.HBFP4, axis=0)
    assert t != hbfp.encode(x.reshape(8, 32), hbfp.HBFP4)
    assert t != hbfp.encode(-x, hbfp.HBFP4)
    assert t != "t"


@pytest.mark.parametrize("format", ["hbfp4b16", "hbfp6t4", "hbfp5tensor"])
def test_pickle_and_copy(format):
    t = hbfp.encode(sample((6, 20)), format, rounding="stochastic")
    for original in (t, t.T):
        for twin in (pickle.loads(pickle.dumps(original)), copy.copy(original), copy.deepcopy(original)):
            assert twin == original
            assert twin.rounding is Rounding.STOCHASTIC
            assert not twin.mantissa_plane.flags.writeable


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) >= 2], ids=str)
def test_transposed_view(format, shape):
    """Codes of the transpose read from planes that were not copied."""
    x = sample(shape)
    for axis in (-1, -2):
        t = hbfp.encode(x, format, axis)
        view, expected = t.mT, reference.encode(x, format, axis).mT
        assert view.shape == expected.shape == (*shape[:-2], shape[-1], shape[-2])
        assert np.shares_memory(view.mantissa_plane, t.mantissa_plane) or t.nbytes == 0
        assert np.array_equal(view.mantissas, expected.mantissas)
        assert np.array_equal(view.exponents, expected.exponents)
        assert view.exponents.shape == expected.exponents.shape
        assert same(view.decode(), t.decode().swapaxes(-1, -2))
        assert view.nbytes == t.nbytes
        assert view.mT == t
        assert view == view.canonical()
        assert not view.canonical().transposed
        if len(shape) == 2:
            assert view == t.T
        # The encoding of the transpose has the same codes, so it is the same array.
        across = -3 - axis
        assert view == hbfp.encode(np.ascontiguousarray(x.swapaxes(-1, -2)), format, across)


@given(testing.formats(), testing.matrices(nonfinite=True, max_columns=70), st.sampled_from([0, 1]))
def test_from_parts_round_trips(format, x, axis):
    t = hbfp.encode(x, format, axis)
    assert BlockArray.from_parts(t.mantissas, t.exponents, format, t.shape, axis) == t
    wide = t.mantissas.astype(np.int64).tolist()
    assert BlockArray.from_parts(wide, t.exponents.astype(np.int32), str(format), x.shape, axis) == t


def test_from_parts_of_arrays_without_elements():
    for shape in ((0, 3), (3, 0), ()):
        t = hbfp.encode(np.ones(shape), hbfp.HBFP4)
        assert BlockArray.from_parts(t.mantissas, t.exponents, hbfp.HBFP4, shape) == t


def test_constructor_takes_planes():
    t = hbfp.encode(sample((5, 70)), hbfp.HBFP4, axis=0)
    twin = BlockArray(t.exponent_plane.copy(), t.mantissa_plane.copy(), t.format, t.shape, -2)
    assert twin == t
    assert same(twin.decode(), t.decode())


# --- products --------------------------------------------------------------------------------------------------------

PAIRS = [
    ("hbfp4b4", "hbfp4b4"),
    ("hbfp4b5", "hbfp6b5"),
    ("hbfp12b5", "hbfp16b5"),
    ("hbfp4t3", "hbfp4t3"),
    ("hbfp4t3", "hbfp4b3"),
    ("hbfp5tensor", "hbfp5tensor"),
    ("hbfp9b16", "hbfp4tensor"),
]


@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("m", [1, 3, 5])
def test_matmul_is_the_oracles(formats, lead, m):
    """Floats, encoded arrays and transposed views on either side, batches, tails, tiles that end within a batch."""
    left, right = map(HBFP.parse, formats)
    k, n = 7, 4
    a = sample((*lead, m, k), 1)
    t, expected_t = hbfp.encode(a, left), reference.encode(a, left)
    for b in (sample((k, n), 2), sample((*lead, k, n), 3)):
        u, expected_u = hbfp.encode(b, right, -2), reference.encode(b, right, -2)
        expected = reference.matmul(expected_t, expected_u)
        assert same(hbfp.matmul(t, u), expected)
        assert same(hbfp.matmul(a, u, format=left), expected)
        assert same(hbfp.matmul(t, b, format=right), expected)
        across = hbfp.encode(np.ascontiguousarray(a.swapaxes(-1, -2)), left, -2).mT
        down = hbfp.encode(np.ascontiguousarray(b.swapaxes(-1, -2)), right, -1).mT
        assert same(hbfp.matmul(across, down), expected)
        if left == right:
            assert same(hbfp.matmul(a, b, format=left), expected)
            assert same(hbfp.matmul(a, u), expected)  # the format of the other one
            assert same(hbfp.matmul(t, b), expected)


@given(testing.formats().flatmap(lambda f: st.tuples(st.just(f), testing.product_operands(f, nonfinite=True))))
def test_matmul_of_anything_is_the_oracles(case):
    """NaN blocks, overflow, underflow, sums that lose bits: the order of the blocks shows."""
    format, (a, b) = case
    assert same(hbfp.matmul(a, b, format=format), reference.matmul(a, b, format=format))


def test_matmul_accumulates():
    a, b, c = sample((5, 70)), sample((70, 4)), sample((5, 4), 9)
    expected = reference.matmul(a, b, format=hbfp.HBFP4, out=c.copy(), accumulate=True)
    assert hbfp.matmul(a, b, format=hbfp.HBFP4, out=c, accumulate=True) is c
    assert same(c, expected)


def test_accumulating_zero_blocks_into_minus_zero():
    """-0.0 + 0.0 is +0.0: blocks of zeros may not be skipped here."""
    out = np.full((2, 2), -0.0, np.float32)
    hbfp.matmul(np.zeros((2, 64)), np.zeros((64, 2)), format=hbfp.HBFP4, out=out, accumulate=True)
    assert same(out, np.zeros((2, 2), np.float32))


def test_matmul_overwrites_out():
    """What `out` held before, NaN included, must not leak in."""
    a, b = sample((5, 70)), sample((70, 4))
    out = np.full((5, 4), np.nan, np.float32)
    hbfp.matmul(a, b, format=hbfp.HBFP4, out=out)
    assert same(out, hbfp.matmul(a, b, format=hbfp.HBFP4))


def test_matmul_into_one_of_its_operands():
    a, b = sample((6, 6), 1), sample((6, 6), 2)
    expected = hbfp.matmul(a, b, format=hbfp.HBFP4)
    for operand in (0, 1):
        pair = [a.copy(), b.copy()]
        assert same(hbfp.matmul(*pair, format=hbfp.HBFP4, out=pair[operand]), expected)
    bias = np.ascontiguousarray(a[0])
    expected = hbfp.linear(a[:1], b, bias, hbfp.HBFP4)
    assert same(hbfp.linear(a[:1], b, bias, hbfp.HBFP4, out=bias[None]), expected)


@pytest.mark.parametrize("shapes", [((0, 5), (5, 3)), ((3, 5), (5, 0)), ((3, 0), (0, 4)), ((2, 0, 5), (5, 3))], ids=str)
@pytest.mark.parametrize("format", ["hbfp4b64", "hbfp4t4", "hbfp4tensor"])
def test_products_without_elements(shapes, format):
    a, b = (np.ones(shape, np.float32) for shape in shapes)
    expected = np.zeros((*shapes[0][:-1], shapes[1][-1]), np.float32)
    assert same(hbfp.matmul(a, b, format=format), expected)
    assert same(hbfp.matmul(hbfp.encode(a, format), hbfp.encode(b, format, 0)), expected)
    out = np.full(expected.shape, 2.5, np.float32)
    assert same(hbfp.matmul(a, b, format=format, out=out, accumulate=True), expected + np.float32(2.5))


@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)], ids=str)
def test_linear_is_the_oracles(formats, lead):
    left, right = map(HBFP.parse, formats)
    k, n = 11, 6
    x, weight, bias = sample((*lead, k), 1), sample((n, k), 2), sample((n,), 3)
    how = {"rounding": "stochastic", "seed": 3, "stream": 2**33 + 9}
    w = hbfp.encode(weight, right)
    expected = reference.linear(x, reference.encode(weight, right), bias, left, **how)
    for operand in (w, hbfp.encode(np.ascontiguousarray(weight.T), right, 0).T, hbfp.prepack(w)):
        assert same(hbfp.linear(x, operand, bias, left, **how), expected)
        out = np.empty_like(expected)
        assert hbfp.linear(x, operand, bias, left, out=out, **how) is out
        assert same(out, expected)
    if left == right:
        assert same(hbfp.linear(x, weight, bias, left, **how), expected)
        assert same(hbfp.linear(x, w, bias, **how), expected)
        assert same(hbfp.linear(x, hbfp.prepack(w), bias, **how), expected)
    without = reference.linear(x, reference.encode(weight, right), None, left)
    assert same(hbfp.linear(x, w, format=left), without)
    if not lead[:-1] or left.tile is None:
        assert same(hbfp.linear(hbfp.encode(x, left), w), without)


def test_linear_accumulates():
    x, weight = sample((5, 70)), sample((4, 70))
    out = sample((5, 4), 8)
    expected = reference.matmul(x, weight.T, format=hbfp.HBFP4, out=out.copy(), accumulate=True)
    assert same(hbfp.linear(x, weight, format=hbfp.HBFP4, out=out, accumulate=True), expected)


def test_prepacked_weight_describes_itself():
    w = hbfp.prepack(hbfp.encode(sample((6, 70)), hbfp.HBFP6))
    assert w.shape == (6, 70)
    assert w.format == hbfp.HBFP6
    assert w.nbytes > 0
    assert w.level == hbfp.info()["level"]


# --- threads and build -----------------------------------------------------------------------------------------------


def test_threads_that_were_set():
    hbfp.set_num_threads(3)
    assert hbfp.get_num_threads() == 3
    hbfp.set_num_threads(None)
    assert hbfp.get_num_threads() != 0


def test_threads_follow_the_affinity_without_torch(monkeypatch):
    """A container with two of sixty-four cores must not start sixty-four threads."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 7, 9})
    assert hbfp.get_num_threads() == 3


def test_threads_follow_torch_where_it_is_loaded(monkeypatch):
    """Two settings that do not know of each other oversubscribe the machine."""
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"get_num_threads": staticmethod(lambda: 5)}))
    assert hbfp.get_num_threads() == 5
    hbfp.set_num_threads(2)
    assert hbfp.get_num_threads() == 2


def test_info():
    info = hbfp.info()
    assert info["version"] == hbfp.__version__
    assert info["levels"][info["level"]] == "available"
    assert "scalar" in info["levels"]
    assert info["num_threads"] == hbfp.get_num_threads()
