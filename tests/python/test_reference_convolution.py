"""The oracle's convolutions against torch where every number is exact, and against their definition in nested loops.

The bugs these hunt: a kernel that is flipped, taps or blocks in another order, blocks that reach into the next tap,
group or pixel, padding that is skipped where a NaN stands opposite, random bits of a tensor that was permuted first.

Clause numbers are those of docs/spec.md.
"""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from hbfp import reference
from hbfp.reference import FormatDescription

SEED = 0x123456789ABCDEF
STREAMS = (2**40 + 4, 2**33 + 5)
NEAREST = ("nearest_even", "nearest_even")


def fmt(text):
    return FormatDescription.parse(text)


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def same(found, expected):
    return found.shape == expected.shape and np.array_equal(bits(found), bits(expected))


# ----------------------------------------------------------------------------------------------------------- geometries


class Case:
    """Shapes of one convolution: X [n, C, *spatial], W [Co, C/g, *kernel], dY [n, Co, *out]."""

    def __init__(self, n, groups, channels, outputs, dimensions):
        self.n, self.groups, self.dimensions = n, groups, dimensions
        self.spatial, self.kernel, self.stride, self.padding, self.dilation = zip(*dimensions, strict=True)
        self.x = (n, groups * channels, *self.spatial)
        self.w = (groups * outputs, channels, *self.kernel)
        self.out = tuple((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in dimensions)
        self.dy = (n, groups * outputs, *self.out)

    @property
    def geometry(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def __repr__(self):
        return f"x {self.x}, w {self.w}, {self.geometry}"


@st.composite
def cases(draw, ranks=(1, 2, 3), most_terms=1500):
    rank = draw(st.sampled_from(ranks))
    longest = {1: 7, 2: 4, 3: 3}[rank]

    def dimension():
        kernel, dilation, padding = (draw(st.integers(*limits)) for limits in ((1, 3), (1, 2), (0, 2)))
        least = max(dilation * (kernel - 1) + 1 - 2 * padding, 1)
        return draw(st.integers(least, max(least, longest))), kernel, draw(st.integers(1, 3)), padding, dilation

    case = Case(*(draw(st.integers(1, 3)) for _ in range(4)), [dimension() for _ in range(rank)])
    terms = case.n * math.prod(case.kernel) * max(math.prod(case.out), math.prod(case.spatial)) * math.prod(case.w[:2])
    return case if terms <= most_terms else Case(1, case.groups, 1, 1, case.dimensions)


def integers(random, shape, largest=9):
    return random.integers(-largest, largest, shape, endpoint=True).astype(np.float32)


# ------------------------------------------------------------------------------------------------ against exact numbers


def torch_results(case, x, w, bias, dy):
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (x, w, bias)]
    conv = getattr(torch.nn.functional, f"conv{len(case.kernel)}d")
    y = conv(*tensors, case.stride, case.padding, case.dilation, case.groups)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    return [t.detach().numpy().astype(np.float32) for t in (y, *(t.grad for t in tensors))]


@given(
    cases(),
    st.sampled_from(["hbfp16b64", "hbfp8b64", "hbfp8b2", "hbfp6b1", "hbfp12b3-noclip"]),
    st.sampled_from(reference.ROUNDINGS),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_exact_numbers_give_torch_results(case, format, rounding, flatten, seed):
    """Small integers are exact in the format and their sums in float32: what is added must be what torch adds."""
    random = np.random.default_rng(seed)
    x, w, bias, dy = (integers(random, shape) for shape in (case.x, case.w, case.w[:1], case.dy))
    x *= 0.25
    y, dx, dw, db = torch_results(case, x, w, bias, dy)
    how = ((fmt(format),) * 2, (rounding, rounding), SEED, STREAMS)
    assert np.array_equal(reference.convolution(x, w, bias, *how, **case.geometry, flatten=flatten), y)
    assert np.array_equal(reference.convolution_input_gradient(dy, w, case.spatial, *how, **case.geometry), dx)
    assert np.array_equal(reference.convolution_weight_gradient(dy, x, case.kernel, *how, **case.geometry), dw)
    assert np.array_equal(reference.convolution_bias_gradient(dy), db)


@given(cases(), st.data(), st.integers(0, 2**32 - 1))
def test_exact_numbers_give_torch_results_transposed(case, data, seed):
    """A transposed convolution is the same three products with the operands' parts exchanged (6.18)."""
    torch = pytest.importorskip("torch")
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(case.stride, case.dilation, strict=True))
    random = np.random.default_rng(seed)
    channels_in, channels_out = case.w[0], case.w[1] * case.groups
    x = integers(random, (case.n, channels_in, *case.spatial))
    w, bias = integers(random, case.w), integers(random, (channels_out,))
    tensors = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (x, w, bias)]
    conv = getattr(torch.nn.functional, f"conv_transpose{len(case.kernel)}d")
    sizes = [
        (s - 1) * step - 2 * p + d * (k - 1) + e + 1
        for s, step, p, d, k, e in zip(
            case.spatial, case.stride, case.padding, case.dilation, case.kernel, extra, strict=True
        )
    ]
    if min(sizes) < 1:
        return
    y = conv(*tensors, case.stride, case.padding, extra, case.groups, case.dilation)
    assert list(y.shape[2:]) == sizes
    dy = integers(random, y.shape)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    expected = [t.detach().numpy() for t in (y, *(t.grad for t in tensors))]
    how = ((fmt("hbfp8b2"),) * 2, NEAREST, SEED, STREAMS)
    found = [
        reference.convolution_input_gradient(x, w, sizes, *how, **case.geometry, bias=bias),
        reference.convolution(dy, w, None, *how, **case.geometry, flatten=False),
        reference.convolution_weight_gradient(x, dy, case.kernel, *how, **case.geometry),
        reference.convolution_bias_gradient(dy),
    ]
    # More output than stride · input: the last pixels of dY then see no input.
    found[1] = found[1][(..., *(slice(s) for s in case.spatial))]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)


# ---------------------------------------------------------------------------------------------- against the definition


class Operand:
    """One operand of a product, encoded block by block; an element is its value and the place of its random bits."""

    def __init__(self, tensor, format, rounding, stream):
        self.tensor, self.format, self.rounding, self.stream = tensor, format, rounding, stream

    def at(self, *index):
        """An element of the tensor as it is held: its random bits are those of its own row and column (6.17)."""
        row = 0
        for i, size in zip(index[:-1], self.tensor.shape[:-1], strict=True):
            row = row * size + i
        return self.tensor[index], row, index[-1]

    def encoded(self, block):
        """Codes and s; s is None for a NaN block."""
        patterns = [int(np.float32(value).view(np.uint32)) for value, _, _ in block]
        if any(pattern & 0x7FFFFFFF >= 0x7F800000 for pattern in patterns):
            return [0] * len(block), None
        values = [reference.float32_value(pattern) for pattern in patterns]
        if not any(values):
            return [0] * len(block), -127
        s = reference.scale_exponent(max(map(abs, values)), self.format)
        return [
            reference.round_to_code(
                value, s, self.format.bits, self.rounding, reference.random_bits(row, column, SEED, self.stream)
            )
            for value, (_, row, column) in zip(values, block, strict=True)
        ], s


ZERO = (0.0, 0, 0)


def cut(elements, block):
    return [elements[i : i + block] for i in range(0, len(elements), block)]


def dot(left, right, blocks, bias=0):
    """acc = RNE(acc + t_b) over pairs of blocks in their order, then the bias (5.5, 5.7), as a float32."""
    total = 0
    for block_left, block_right in blocks:
        (codes_left, s_left), (codes_right, s_right) = left.encoded(block_left), right.encoded(block_right)
        term = reference.CANONICAL_NAN
        if s_left is not None and s_right is not None:
            exact = sum(p * q for p, q in zip(codes_left, codes_right, strict=True))
            term = reference.round_to_float32(exact * Fraction(2) ** (s_left + s_right))
        total = reference.float32_add(total, term)
    return np.uint32(reference.float32_add(total, bias)).view(np.float32)


def read(case, pixel, tap):
    """The input pixel that a tap of an output pixel reads; None in the padding."""
    place = tuple(
        o * s - p + k * d for o, s, p, k, d in zip(pixel, case.stride, case.padding, tap, case.dilation, strict=True)
    )
    return place if all(0 <= i < size for i, size in zip(place, case.spatial, strict=True)) else None


def written(case, pixel, tap):
    """The output pixel to which an input pixel gives through a tap; None if there is none."""
    places = []
    for i, s, p, k, d, size in zip(pixel, case.stride, case.padding, tap, case.dilation, case.out, strict=True):
        o, rest = divmod(i + p - k * d, s)
        if rest or not 0 <= o < size:
            return None
        places.append(o)
    return tuple(places)


def literal_convolution(case, x, w, bias, block):
    """6.14; `x` and `w` are operands."""
    y = np.zeros(case.dy, np.float32)
    channels, outputs = case.w[1], case.w[0] // case.groups
    for n, co in np.ndindex(case.n, case.w[0]):
        first = co // outputs * channels
        for pixel in np.ndindex(case.out):
            blocks = []
            for tap in np.ndindex(case.kernel):
                place = read(case, pixel, tap)
                left = [ZERO if place is None else x.at(n, first + c, *place) for c in range(channels)]
                right = [w.at(co, c, *tap) for c in range(channels)]
                blocks += zip(cut(left, block), cut(right, block), strict=True)
            y[(n, co, *pixel)] = dot(x, w, blocks, int(bits(bias)[co]))
    return y


def literal_flattened_convolution(case, x, w, bias, block):
    """6.16: the patch is a row of a tensor [N, g, *out, taps · C/g]."""
    y = np.zeros(case.dy, np.float32)
    channels, outputs = case.w[1], case.w[0] // case.groups
    for n, co in np.ndindex(case.n, case.w[0]):
        group = co // outputs
        for number, pixel in enumerate(np.ndindex(case.out)):
            row = (n * case.groups + group) * math.prod(case.out) + number
            left, right = [], []
            for tap in np.ndindex(case.kernel):
                place = read(case, pixel, tap)
                for c in range(channels):
                    value = 0.0 if place is None else x.tensor[(n, group * channels + c, *place)]
                    left.append((value, row, len(left)))
                    right.append(w.at(co, c, *tap))
            blocks = zip(cut(left, block), cut(right, block), strict=True)
            y[(n, co, *pixel)] = dot(x, w, blocks, int(bits(bias)[co]))
    return y


def literal_input_gradient(case, dy, w, block):
    """6.14"""
    dx = np.zeros(case.x, np.float32)
    channels, outputs = case.w[1], case.w[0] // case.groups
    for n, ci in np.ndindex(case.x[:2]):
        group, c = divmod(ci, channels)
        for pixel in np.ndindex(case.spatial):
            blocks = []
            for tap in np.ndindex(case.kernel):
                place = written(case, pixel, tap)
                members = range(group * outputs, (group + 1) * outputs)
                left = [ZERO if place is None else dy.at(n, co, *place) for co in members]
                right = [w.at(co, c, *tap) for co in members]
                blocks += zip(cut(left, block), cut(right, block), strict=True)
            dx[(n, ci, *pixel)] = dot(dy, w, blocks)
    return dx


def literal_weight_gradient(case, dy, x, block):
    """6.14"""
    dw = np.zeros(case.w, np.float32)
    channels, outputs = case.w[1], case.w[0] // case.groups
    for co, c in np.ndindex(case.w[:2]):
        ci = co // outputs * channels + c
        for tap in np.ndindex(case.kernel):
            blocks = []
            for pixel in np.ndindex(case.out):
                place = read(case, pixel, tap)
                left = [dy.at(n, co, *pixel) for n in range(case.n)]
                right = [ZERO if place is None else x.at(n, ci, *place) for n in range(case.n)]
                blocks += zip(cut(left, block), cut(right, block), strict=True)
            dw[(co, c, *tap)] = dot(dy, x, blocks)
    return dw


def spread(random, shape):
    """Magnitudes over 60 powers of two: sums that depend on every cut and on the order of the terms."""
    return (random.standard_normal(shape) * 2.0 ** random.integers(-30, 30, shape)).astype(np.float32)


def both(case, tensors, formats, roundings, flatten):
    """Pairs of the oracle's result and of the definition's, for the three products."""
    x, w, bias, dy = tensors
    block = formats[0].block

    def operands(left, right):
        return (Operand(t, f, r, s) for t, f, r, s in zip((left, right), formats, roundings, STREAMS, strict=True))

    literal = literal_flattened_convolution if flatten else literal_convolution
    how = (formats, roundings, SEED, STREAMS)
    yield (
        reference.convolution(x, w, bias, *how, **case.geometry, flatten=flatten),
        literal(case, *operands(x, w), bias, block),
    )
    yield (
        reference.convolution_input_gradient(dy, w, case.spatial, *how, **case.geometry),
        literal_input_gradient(case, *operands(dy, w), block),
    )
    yield (
        reference.convolution_weight_gradient(dy, x, case.kernel, *how, **case.geometry),
        literal_weight_gradient(case, *operands(dy, x), block),
    )


@given(
    cases(most_terms=300),
    st.sampled_from([("hbfp4b64", "hbfp6b64"), ("hbfp4b2", "hbfp4b2-ceil"), ("hbfp12b1", "hbfp8b1")]),
    st.tuples(st.sampled_from(reference.ROUNDINGS), st.sampled_from(reference.ROUNDINGS)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_products_are_their_definition(case, formats, roundings, flatten, holes, seed):
    """Order of taps and blocks, cuts, zero blocks, the place of every random bit, NaN; all by bits."""
    random = np.random.default_rng(seed)
    tensors = [spread(random, shape) for shape in (case.x, case.w, case.w[:1], case.dy)]
    if holes:
        for tensor in tensors[:2]:
            tensor.reshape(-1)[random.integers(tensor.size)] = random.choice([np.nan, np.inf, 0.0])
    for found, expected in both(case, tensors, (fmt(formats[0]), fmt(formats[1])), roundings, flatten):
        assert same(found, expected)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_many_channels_are_cut_into_blocks_per_tap(rounding, flatten):
    """Whole blocks and a short one at every tap, in both groups; rows of random bits far beyond the first."""
    case = Case(4, 2, 7, 4, [(3, 3, 2, 1, 1), (5, 2, 1, 0, 2)])
    random = np.random.default_rng(1)
    tensors = [spread(random, shape) for shape in (case.x, case.w, case.w[:1], case.dy)]
    if not flatten:
        tensors[0][0, 0], tensors[3][0, 1] = 0.0, 0.0
    for found, expected in both(case, tensors, (fmt("hbfp4b3"), fmt("hbfp6b3")), (rounding, rounding), flatten):
        assert same(found, expected)


# ----------------------------------------------------------------------------------------------------------- by hand

HBFP8 = (fmt("hbfp8b64"), fmt("hbfp8b64"))
HOW = (HBFP8, NEAREST, 0, (0, 0))


def line(*values):
    """One channel of one sample in one spatial dimension."""
    return np.array(values, np.float32).reshape(1, 1, -1)


def test_taps_are_added_in_the_kernels_own_order():
    """2^30 − 2^30 + 1 is 1, and 1 + 2^30 − 2^30 is 0 in float32; flipped taps would exchange the two."""
    big = 2.0**30
    kernel = line(big, -big, 1)
    assert reference.convolution(line(1, 1, 1), kernel, None, *HOW, flatten=False).item() == 1
    assert reference.convolution(line(1, 1, 1), kernel[..., ::-1], None, *HOW, flatten=False).item() == 0
    # The middle pixel of dX sees dY through taps 0, 1, 2 at output pixels 1, 0, −1: by tap, not by pixel.
    dx = reference.convolution_input_gradient(line(1, 1, 1), kernel, (3,), *HOW, padding=1)
    assert dx[0, 0, 1] == 1
    # dW of the first tap: output pixels in their order.
    dw = reference.convolution_weight_gradient(line(1, 1, 1), line(big, -big, 1), (1,), *HOW)
    assert dw.item() == 1


def test_a_nan_of_the_weight_meets_the_padding():
    """A tap in the padding is a block like any other: what stands opposite may poison it (6.15)."""
    kernel = line(np.nan, 1, 1)
    y = reference.convolution(line(1, 2, 3), kernel, None, *HOW, padding=1, flatten=False)
    assert bits(y).ravel().tolist() == [0x7FC00000] * 3
    # Stride 2: half the taps of dX meet no output pixel, and are blocks of zeros too.
    dx = reference.convolution_input_gradient(line(1, 2), line(np.nan, 1), (4,), *HOW, stride=2)
    assert bits(dx).ravel().tolist() == [0x7FC00000] * 4
    # dW of the tap that reads beyond the edge at the one output pixel whose dY is NaN.
    dw = reference.convolution_weight_gradient(line(np.nan, 0, 0), line(1, 1, 1), (3,), *HOW, padding=1)
    assert bits(dw).ravel().tolist() == [0x7FC00000] * 3


def test_a_nan_poisons_its_block_alone():
    """Per tap, the pixels that read it; in a flattened patch with blocks of 2, those as well; no other group."""
    x = np.ones((1, 2, 6), np.float32)
    x[0, 0, 2] = np.nan
    w = np.ones((2, 1, 2), np.float32)
    for flatten in (False, True):
        y = reference.convolution(x, w, None, *HOW, groups=2, flatten=flatten)
        assert np.isnan(y[0, 0]).tolist() == [False, True, True, False, False]
        assert not np.isnan(y[0, 1]).any()


def test_flattened_blocks_cross_taps():
    """One exponent for the patch: what is small beside another tap's value vanishes, and only there."""
    x, w = line(1, 2.0**-10, 2.0**-10), line(1, 1)
    assert reference.convolution(x, w, None, *HOW).ravel().tolist() == [1, 2.0**-9]
    assert reference.convolution(x, w, None, *HOW, flatten=False).ravel().tolist() == [1 + 2.0**-10, 2.0**-9]


@pytest.mark.parametrize(("channels", "flattened"), [(15, True), (16, False)])
def test_fewer_than_16_channels_of_a_group_are_flattened(channels, flattened):
    random = np.random.default_rng(2)
    x, w = spread(random, (1, 2 * channels, 4)), spread(random, (2, channels, 2))
    found = reference.convolution(x, w, None, *HOW, groups=2)
    assert same(found, reference.convolution(x, w, None, *HOW, groups=2, flatten=flattened))
    assert not same(found, reference.convolution(x, w, None, *HOW, groups=2, flatten=not flattened))


@pytest.mark.parametrize("kernel", [2, 3])
def test_padding_before_and_after_may_differ(kernel):
    """ "same" with an even kernel pads one more after the pixels; both kernels give as many pixels as they read."""
    x, w = line(1, 2, 3, 4), np.ones((1, 1, kernel), np.float32)
    before, after = (kernel - 1) // 2, kernel // 2
    y = reference.convolution(x, w, None, *HOW, padding=[(before, after)])
    padded = np.pad(x, ((0, 0), (0, 0), (before, after)))
    assert same(y, reference.convolution(padded, w, None, *HOW))
    assert y.shape == x.shape


def test_bias_gradient_takes_rows_by_sample_and_pixel():
    """Sample after sample, pixel after pixel, in blocks of 64 rows (6.19)."""
    dy = spread(np.random.default_rng(3), (3, 2, 5, 9))
    rows = np.array([dy[n, :, i, j] for n in range(3) for i in range(5) for j in range(9)])
    assert same(reference.convolution_bias_gradient(dy), reference.bias_gradient(rows))
    assert not same(reference.convolution_bias_gradient(dy), reference.bias_gradient(rows[::-1]))


def test_a_batch_of_none():
    """No samples: no pixels of Y, and a weight gradient of +0.0."""
    x, w, dy = (np.zeros(shape, np.float32) for shape in ((0, 2, 5), (3, 2, 2), (0, 3, 4)))
    assert reference.convolution(x, w, None, *HOW).shape == (0, 3, 4)
    assert reference.convolution_input_gradient(dy, w, (5,), *HOW).shape == (0, 2, 5)
    assert same(reference.convolution_weight_gradient(dy, x, (2,), *HOW), np.zeros((3, 2, 2), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 3, 5)}, "4 channels"),
        ({"x": (1, 4, 5, 5)}, "1 spatial"),
        ({"x": (1, 4)}, "spatial dimensions"),
        ({"w": (3, 2, 3)}, "groups that divide"),
        ({"w": (2, 2, 8)}, "fits the padded input"),
        ({"stride": (1, 1)}, "stride as 1 numbers"),
        ({"dilation": 0}, "dilation as 1 numbers of 1"),
        ({"padding": -1}, "padding as 1 numbers of 0"),
        ({"formats": ("hbfp4t8", "hbfp4t8")}, "no tiles"),
        ({"formats": ("hbfp4tensor", "hbfp4tensor")}, "whole tensors"),
        ({"formats": ("hbfp4b16", "hbfp4b64")}, "one size of blocks"),
    ],
)
def test_bad_arguments(change, message):
    """Each says what was expected and what was found."""
    given_ = {"x": (1, 4, 5), "w": (2, 2, 3), "formats": ("hbfp4b64", "hbfp4b64"), **change}
    x, w = (np.zeros(given_.pop(name), np.float32) for name in "xw")
    formats = tuple(map(fmt, given_.pop("formats")))
    with pytest.raises(ValueError, match=message):
        reference.convolution(x, w, None, formats, NEAREST, 0, (0, 0), groups=2, **given_)
