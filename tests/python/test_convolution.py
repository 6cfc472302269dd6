"""Convolutions in autograd: output and gradients equal to the oracle's by bits, over shapes with tails of every kind.

The bugs these hunt: an operand blocked along the wrong reduction, a short block that reaches into the next tap or
group, padding that is skipped or encoded, strides mixed up between input and output, a memory format that shows in the
bits.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops, reference  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import MatmulPolicy, OperandPolicy, Recipe, stream  # noqa: E402

SEED, STREAM = 2**40 + 11, stream(5, 3)

MIXED = Recipe(
    MatmulPolicy(OperandPolicy(hbfp.HBFP4), OperandPolicy(hbfp.HBFP6)),
    MatmulPolicy(OperandPolicy(hbfp.HBFP8, "stochastic"), OperandPolicy(hbfp.HBFP4, "toward_zero")),
    MatmulPolicy(OperandPolicy(hbfp.HBFP6, "nearest_away"), OperandPolicy(hbfp.HBFP4, "stochastic")),
)
RECIPES = ["hbfp4", "hbfp6", "hbfp8", "emulator", "hbfp6b16", "hbfp12b64", "hbfp4b3-noclip", MIXED]


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    return np.from_dlpack(x.detach().contiguous()).view(np.uint32)


def array(x):
    return np.from_dlpack(x.detach().to(torch.float32).contiguous())


def policies(recipe):
    """Formats and roundings of each product, as the oracle takes them."""
    for policy in hbfp.recipe(recipe).products.values():
        operands = policy.left, policy.right
        yield tuple(o.format for o in operands), tuple(o.rounding.value for o in operands)


def expected(x, w, bias, dy, recipe, **geometry):
    """Y, dX, dW and dB of a convolution by the oracle."""
    x, w, bias, dy = (None if t is None else array(t) for t in (x, w, bias, dy))
    forward, input_gradient, weight_gradient = (
        (*policy, SEED, (STREAM | role, STREAM | role + 1))
        for policy, role in zip(policies(recipe), (0, 2, 4), strict=True)
    )
    return (
        reference.convolution(x, w, bias, *forward, **geometry),
        reference.convolution_input_gradient(dy, w, x.shape[2:], *input_gradient, **geometry),
        reference.convolution_weight_gradient(dy, x, w.shape[2:], *weight_gradient, **geometry),
        None if bias is None else reference.convolution_bias_gradient(dy),
    )


def expected_transposed(x, w, bias, dy, recipe, **geometry):
    """The same of a transposed convolution: each operand keeps its format, rounding and role (docs/spec.md, 6.18)."""
    x, w, bias, dy = (None if t is None else array(t) for t in (x, w, bias, dy))
    forward, input_gradient, (formats, roundings) = policies(recipe)
    dx = reference.convolution(dy, w, None, *input_gradient, SEED, (STREAM | 2, STREAM | 3), **geometry, flatten=False)
    return (
        reference.convolution_input_gradient(
            x, w, dy.shape[2:], *forward, SEED, (STREAM | 0, STREAM | 1), **geometry, bias=bias
        ),
        dx[(..., *(slice(size) for size in x.shape[2:]))],
        reference.convolution_weight_gradient(
            x, dy, w.shape[2:], formats[::-1], roundings[::-1], SEED, (STREAM | 5, STREAM | 4), **geometry
        ),
        None if bias is None else reference.convolution_bias_gradient(dy),
    )


def convolve(x, w, bias=None, *, recipe="hbfp4", transposed=False, **geometry):
    """The function for the weight's number of dimensions."""
    function = getattr(functional, f"conv{'_transpose' * transposed}{w.dim() - 2}d")
    return function(x, w, bias, **geometry, recipe=recipe, seed=SEED, stream=STREAM)


def step(x, w, bias, **options):
    """Y, its random gradient dY, and the gradients of what is given."""
    given_ = [t for t in (x, w, bias) if t is not None]
    for t in given_:
        t.requires_grad_()
    y = convolve(x, w, bias, **options)
    dy = values(*y.shape, seed=9)
    return y, dy, torch.autograd.grad(y, given_, dy)


def assert_same(found, oracles):
    for ours, theirs in zip(found, oracles, strict=True):
        assert ours.dtype == torch.float32
        assert tuple(ours.shape) == theirs.shape
        assert np.array_equal(bits(ours), theirs.view(np.uint32))


def assert_equals_the_oracle(x_shape, w_shape, *, recipe="hbfp4", bias=True, transposed=False, **geometry):
    outputs = w_shape[1] * geometry.get("groups", 1) if transposed else w_shape[0]
    x, w, b = values(*x_shape), values(*w_shape, seed=1), values(outputs, seed=2) if bias else None
    y, dy, gradients = step(x, w, b, recipe=recipe, transposed=transposed, **geometry)
    geometry.pop("output_padding", None)
    oracle = expected_transposed if transposed else expected
    assert_same((y, *gradients), [t for t in oracle(x, w, b, dy, recipe, **geometry) if t is not None])


# ------------------------------------------------------------------------------------------------ against the oracle

CASES = {
    "a short block at every tap": ((2, 20, 4, 5), (5, 20, 3, 3), {"padding": 1}),
    "a block and a tail at every tap": ((1, 70, 2, 3), (3, 70, 3, 2), {"padding": 1}),
    "an RGB stem, flattened": ((3, 3, 8, 7), (5, 3, 3, 3), {"stride": 2, "padding": 1}),
    "a flattened patch of three blocks": ((1, 15, 4, 4), (4, 15, 3, 3), {}),
    "depthwise": ((2, 6, 6, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "depthwise with two outputs, dilated": ((1, 5, 6, 7), (10, 1, 3, 3), {"groups": 5, "dilation": 2, "padding": 2}),
    "pointwise in groups": ((3, 34, 3, 4), (10, 17, 1, 1), {"groups": 2}),
    "pointwise, strided": ((2, 16, 5, 4), (6, 16, 1, 1), {"stride": 2}),
    "every dimension its own": (
        (1, 17, 7, 6), (3, 17, 3, 2), {"stride": (2, 1), "padding": (2, 0), "dilation": (1, 3)},
    ),
    "a stride beyond the kernel": ((2, 16, 8, 9), (4, 16, 2, 1), {"stride": (3, 4)}),
    "an odd batch beyond one block": ((67, 2, 3, 3), (3, 2, 2, 2), {}),
    "more outputs than a block": ((1, 17, 3, 3), (66, 17, 2, 2), {"stride": 2, "padding": 1}),
    "outputs beyond a block in groups": ((1, 4, 3, 3), (130, 2, 2, 2), {"groups": 2}),
    "nearly all padding": ((2, 16, 1, 1), (4, 16, 3, 3), {"padding": 2}),
    "one element": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "a kernel as large as the input": ((2, 18, 3, 4), (7, 18, 3, 4), {}),
    "sequences": ((2, 20, 11), (6, 20, 4), {"stride": 2, "padding": 3}),
    "sequences, causal and dilated": ((1, 16, 13), (4, 8, 3), {"dilation": 4, "padding": 4, "groups": 2}),
    "volumes": ((1, 17, 3, 4, 2), (3, 17, 2, 3, 1), {"padding": (1, 1, 0), "stride": (1, 2, 1)}),
    "volumes, flattened": ((2, 2, 3, 3, 4), (4, 2, 2, 2, 3), {"padding": 1}),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["hbfp4", "emulator"])
@pytest.mark.parametrize("case", CASES)
def test_convolution_equals_the_oracle(case, recipe):
    x, w, geometry = CASES[case]
    assert_equals_the_oracle(x, w, recipe=recipe, **geometry)


SOME = ["an RGB stem, flattened", "depthwise", "a short block at every tap", "every dimension its own"]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", SOME)
def test_every_recipe_equals_the_oracle(case, recipe):
    x, w, geometry = CASES[case]
    assert_equals_the_oracle(x, w, recipe=recipe, bias=False, **geometry)


TRANSPOSED = {
    "doubling": ((2, 20, 3, 4), (20, 5, 2, 2), {"stride": 2}),
    "doubling, overlapping": ((1, 17, 3, 3), (17, 4, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "few channels": ((2, 3, 4, 3), (3, 2, 3, 3), {}),
    "in groups, dilated": ((1, 34, 3, 3), (34, 3, 2, 3), {"groups": 2, "dilation": (2, 1), "padding": (0, 1)}),
    "depthwise": ((2, 5, 3, 4), (5, 1, 3, 3), {"groups": 5, "stride": 2, "padding": 1}),
    "a block and a tail of inputs": ((1, 70, 2, 2), (70, 3, 2, 2), {"stride": 3, "output_padding": (2, 0)}),
    "an output padding beyond the stride": ((1, 16, 3, 3), (16, 2, 3, 3), {"dilation": 3, "output_padding": 2}),
    "sequences": ((3, 18, 5), (18, 4, 4), {"stride": 2, "padding": 1}),
    "volumes": ((1, 16, 2, 3, 2), (16, 3, 2, 2, 2), {"stride": 2}),
}


@pytest.mark.parametrize("recipe", ["hbfp4", "emulator", MIXED], ids=str)
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolution_equals_the_oracle(case, recipe):
    x, w, geometry = TRANSPOSED[case]
    assert_equals_the_oracle(x, w, recipe=recipe, transposed=True, **geometry)


@st.composite
def geometries(draw):
    """Shapes of X and W and the keywords of one convolution."""
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels, outputs = draw(st.sampled_from([1, 2, 5, 16, 17])), draw(st.integers(1, 3))
    kernel, stride, padding, dilation, spatial = ([] for _ in range(5))
    for _ in range(rank):
        kernel.append(draw(st.integers(1, 3)))
        stride.append(draw(st.integers(1, 3)))
        padding.append(draw(st.integers(0, 2)))
        dilation.append(draw(st.integers(1, 2)))
        least = max(dilation[-1] * (kernel[-1] - 1) + 1 - 2 * padding[-1], 1)
        spatial.append(draw(st.integers(least, max(least, 6 - rank))))
    names = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}
    x = (draw(st.integers(1, 2)), groups * channels, *spatial)
    return x, (groups * outputs, channels, *kernel), names


@given(geometries(), st.sampled_from(["hbfp4", "hbfp8b16", "emulator", "hbfp6b5", MIXED]))
def test_any_convolution_equals_the_oracle(drawn, recipe):
    x, w, geometry = drawn
    assert_equals_the_oracle(x, w, recipe=recipe, **geometry)


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_padding_by_name(kernel):
    """An even kernel that keeps the size has one zero more after the pixels, as in torch; "valid" pads nothing."""
    x, w = values(2, 16, 5, 6), values(4, 16, *kernel, seed=1)
    pads = [((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in zip(kernel, (1, 2), strict=True)]
    y, dy, gradients = step(x, w, None, padding="same", dilation=(1, 2))
    assert y.shape[2:] == x.shape[2:]
    assert_same((y, *gradients), expected(x, w, None, dy, "hbfp4", padding=pads, dilation=(1, 2))[:3])
    assert torch.equal(convolve(x, w, padding="valid"), convolve(x, w, padding=0))


def test_the_reference_backend_has_the_same_bits():
    x, w, geometry = CASES["an RGB stem, flattened"]
    assert_equals_the_oracle(x, w, recipe=replace(hbfp.recipe("emulator"), backend="reference"), **geometry)


# --------------------------------------------------------------------------------------------------- tensors as held


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [3, 20])
def test_memory_formats_do_not_show_in_the_bits(channels, transposed):
    """channels_last operands, views and slices are the same numbers, and so are the places of their random bits."""
    outputs = 6
    w_shape = (channels, outputs, 3, 3) if transposed else (outputs, channels, 3, 3)
    x, w, bias = values(3, channels, 6, 5), values(*w_shape, seed=1), values(outputs, seed=2)
    options = {"stride": 2, "padding": 1, "recipe": "emulator", "transposed": transposed}

    def wide(t):
        return torch.stack([t, t + 1], -1).flatten(-2)[..., ::2]

    def turned(t):
        return t.movedim(1, 0).contiguous().movedim(0, 1)

    plain, dy, gradients = step(x, w, bias, **options)
    for change in (lambda t: t.contiguous(memory_format=torch.channels_last), wide, turned):
        leaves = [change(t.detach()).requires_grad_() for t in (x, w, bias) if t.dim() == 4]
        y = convolve(*leaves, bias, **options)
        assert torch.equal(y, plain)
        for ours, theirs in zip(torch.autograd.grad(y, leaves, change(dy)), gradients, strict=False):
            assert torch.equal(ours, theirs)


def test_a_gradient_that_is_one_number_expanded():
    """`y.sum().backward()` gives dY without strides of its own."""
    x, w, bias = values(2, 16, 4, 4), values(5, 16, 3, 3, seed=1), values(5, seed=2)
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    y = convolve(*leaves, padding=1)
    found = torch.autograd.grad(y.sum(), leaves)
    assert_same((y, *found), expected(x, w, bias, torch.ones_like(y), "hbfp4", padding=1))


@pytest.mark.parametrize("transposed", [False, True])
def test_one_sample_without_a_batch(transposed):
    x, w = values(16, 5, 4), values(16, 16, 3, 3, seed=1)
    y = convolve(x, w, stride=2, transposed=transposed)
    assert torch.equal(y, convolve(x.unsqueeze(0), w, stride=2, transposed=transposed).squeeze(0))
    assert y.dim() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_cast(dtype):
    """The result is float32; gradients come back in the type of what they are the gradients of."""
    x, w = values(2, 16, 4, 4).to(dtype), values(3, 16, 2, 2, seed=1).to(dtype)
    y, dy, gradients = step(x, w, None)
    oracle = expected(x, w, None, dy, "hbfp4")[:3]
    assert_same((y, *(g.float() for g in gradients)), [oracle[0], *(
        array(torch.from_numpy(t).to(dtype).float()) for t in oracle[1:]
    )])  # fmt: skip
    assert [g.dtype for g in gradients] == [dtype] * 2


def test_no_samples():
    """An empty batch gives an empty Y and a weight gradient of zeros."""
    x, w, bias = values(0, 16, 4, 4), values(3, 16, 3, 3), values(3)
    y, _, (dx, dw, db) = step(x, w, bias)
    assert y.shape == (0, 3, 2, 2)
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros(3))


# ------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("where", ["x", "w", "dy"])
@pytest.mark.parametrize("channels", [3, 20])
def test_not_a_number_spreads_as_in_the_oracle(where, channels):
    """A NaN of W meets the padding too; no block of zeros is left out (docs/spec.md, 6.15)."""
    x, w = values(2, channels, 4, 4), values(5, channels, 3, 3, seed=1)
    if where != "dy":
        {"x": x, "w": w}[where][1, 2, 0, 1] = torch.nan
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = convolve(*leaves, padding=1, stride=2)
    dy = values(*y.shape, seed=9)
    if where == "dy":
        dy[1, 2, 0, 1] = torch.inf
    found = torch.autograd.grad(y, leaves, dy)
    assert_same((y, *found), expected(x, w, None, dy, "hbfp4", padding=1, stride=2)[:3])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False), (True, True)])
def test_backward_computes_only_what_is_asked_for(needs, transposed):
    x, w = values(2, 16, 4, 4).requires_grad_(needs[0]), values(16, 16, 2, 2, seed=1).requires_grad_(needs[1])
    bias = values(16).requires_grad_()
    seen = []
    ops.recorders.append(lambda product: seen.append(product.name))
    try:
        convolve(x, w, bias, transposed=transposed).sum().backward()
    finally:
        ops.recorders.clear()
    assert seen == ["forward"] + ["input gradient"] * needs[0] + ["weight gradient"] * needs[1]
    assert (x.grad is not None, w.grad is not None) == needs


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("channels", [3, 32])
def test_bits_do_not_depend_on_threads(channels, threads):
    before = torch.get_num_threads()

    def run():
        x, w, bias = values(4, channels, 20, 20), values(40, channels, 3, 3, seed=1), values(40, seed=2)
        y, _, gradients = step(x, w, bias, recipe="emulator", padding=1)
        return [y, *gradients]

    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_samples_do_not_depend_on_their_batch():
    """Forward, each sample is computed alone: with nearest rounding a batch is its samples."""
    x, w = values(5, 20, 5, 5), values(6, 20, 3, 3, seed=1)
    whole = convolve(x, w, padding=1)
    assert torch.equal(whole, torch.cat([convolve(x[i : i + 1], w, padding=1) for i in range(5)]))


def test_double_backward_is_refused():
    x, w = values(1, 16, 4, 4).requires_grad_(), values(4, 16, 3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
def test_wide_formats_agree_with_torch(transposed):
    """The roles of groups, output padding and the like are torch's own."""
    x, w, bias = values(2, 6, 5, 5), values(6, 3, 3, 3, seed=1), values(6, seed=2)
    geometry = {"stride": 2, "padding": 1, "groups": 2}
    if transposed:
        geometry["output_padding"] = 1
    ours = convolve(x, w, bias, recipe="hbfp16b16", transposed=transposed, **geometry)
    theirs = getattr(torch.nn.functional, f"conv{'_transpose' * transposed}2d")(x, w, bias, **geometry)
    # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": values(2, 15, 5, 5)}, hbfp.ShapeError),
        ({"x": values(2, 16, 5)}, hbfp.ShapeError),
        ({"x": values(1, 2, 16, 5, 5)}, hbfp.ShapeError),
        ({"bias": values(5)}, hbfp.ShapeError),
        ({"bias": values(4, 1)}, hbfp.ShapeError),
        ({"groups": 3}, hbfp.ShapeError),
        ({"groups": 0}, hbfp.ShapeError),
        ({"dilation": 3}, hbfp.ShapeError),
        ({"stride": 0}, hbfp.ShapeError),
        ({"stride": (1, 2, 3)}, hbfp.ShapeError),
        ({"padding": -1}, hbfp.ShapeError),
        ({"padding": "sane"}, hbfp.HBFPError),
        ({"padding": "same", "stride": 2}, hbfp.HBFPError),
        ({"x": torch.ones(2, 16, 5, 5, dtype=torch.int32)}, hbfp.DTypeError),
        ({"w": torch.ones(4, 16, 3, 3, dtype=torch.complex64)}, hbfp.DTypeError),
        ({"recipe": "hbfp4t8"}, hbfp.FormatError),
        ({"recipe": "hbfp4tensor"}, hbfp.FormatError),
        ({"recipe": "hbfp"}, hbfp.HBFPError),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, error):
    arguments = {"x": values(2, 16, 5, 5), "w": values(4, 16, 3, 3), "bias": values(4), **change}
    with pytest.raises(error):
        convolve(**arguments)


@pytest.mark.parametrize("change", [{"output_padding": 2}, {"output_padding": -1}, {"x": values(2, 15, 5, 5)}])
def test_bad_arguments_of_a_transposed_convolution_are_named(change):
    arguments = {"x": values(2, 16, 5, 5), "w": values(16, 4, 3, 3), "bias": values(4), "stride": 2, **change}
    with pytest.raises(hbfp.ShapeError):
        convolve(**arguments, transposed=True)


@pytest.mark.parametrize("words", [{"seed": -1}, {"seed": 2**64}, {"stream": 1}, {"stream": 2**64}])
def test_seeds_and_streams_are_checked(words):
    with pytest.raises(hbfp.HBFPError):
        functional.conv2d(values(1, 16, 3, 3), values(2, 16, 3, 3), recipe="hbfp4", **words)
