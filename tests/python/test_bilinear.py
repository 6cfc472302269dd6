"""Bilinear layers: two products, each with gradients that are products, bit-equal to the two written out.

The bugs these hunt: the two inputs exchanged, random bits shared by the two products, rows of a batch mixed up.
"""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import stream  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.shape == b.shape and torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def multiply(policy, a, a_axis, b, b_axis, roles):
    streams = tuple(stream(5, 3, 0, role) for role in roles)
    return ops.product(a, a_axis, b, b_axis, policy.formats, policy.roundings, 11, streams)


def by_definition(x1, x2, weight, bias, dy, recipe):
    """Y, dX1, dX2, dW, db from matrices, by the clause on bilinear layers."""
    outputs, in1, in2 = weight.shape
    rows = x1.shape[0]
    w = weight.reshape(outputs * in1, in2)
    t = multiply(recipe.forward, x2, -1, w, -1, (0, 1)).view(rows, outputs, in1).mT
    y = multiply(recipe.forward, x1[:, None], -1, t, -2, (8, 9))[:, 0] + bias
    d = dy[:, None]
    dx1 = multiply(recipe.input_gradient, d, -1, t, -1, (10, 11))[:, 0]
    # The recipe speaks of dYᵀ X; the gradient of the right operand is its transpose.
    left, right = recipe.weight_gradient.formats[::-1], recipe.weight_gradient.roundings[::-1]
    dt = ops.product(x1[:, None], -2, d, -2, left, right, 11, (stream(5, 3, 0, 13), stream(5, 3, 0, 12)))
    dt = dt.mT.reshape(rows, outputs * in1)
    dx2 = multiply(recipe.input_gradient, dt, -1, w, -2, (2, 3))
    dw = multiply(recipe.weight_gradient, dt, -2, x2, -2, (4, 5)).view(weight.shape)
    return y, dx1, dx2, dw


@pytest.mark.parametrize("recipe", ["hbfp4", "emulator", "hbfp6b16", "hbfp4t4"])
@pytest.mark.parametrize("sizes", [(5, 7, 3, 4), (70, 20, 18, 2), (1, 1, 1, 1)])
def test_equals_the_two_products(recipe, sizes):
    rows, in1, in2, outputs = sizes
    x1, x2 = values(rows, in1).requires_grad_(), values(rows, in2, seed=1).requires_grad_()
    weight, bias = values(outputs, in1, in2, seed=2).requires_grad_(), values(outputs, seed=3).requires_grad_()
    y = functional.bilinear(x1, x2, weight, bias, recipe=recipe, seed=11, stream=stream(5, 3))
    dy = values(rows, outputs, seed=4)
    y.backward(dy)
    arguments = (t.detach() for t in (x1, x2, weight, bias))
    expected = by_definition(*arguments, dy, hbfp.recipe(recipe))
    assert all(same(a, b) for a, b in zip((y, x1.grad, x2.grad, weight.grad), expected, strict=True))
    # A sum over rows of float32, which torch orders as it likes.
    torch.testing.assert_close(bias.grad, dy.sum(0), rtol=1e-5, atol=1e-4)


def test_the_layer_is_the_function():
    model = nn.Bilinear(7, 6, 4)
    hbfp.convert_(model, "emulator", seed=11)
    hbfp.set_step(model, 5)
    x1, x2 = values(2, 3, 7), values(2, 3, 6, seed=1)
    found = model(x1, x2)
    expected = functional.bilinear(
        x1, x2, model.weight, model.bias, recipe="emulator", seed=11, stream=stream(5, 0)
    )  # fmt: skip
    assert same(found, expected)
    flat = model(x1.view(6, 7), x2.view(6, 6))
    assert same(found.view(6, 4), flat)
    assert model(x1[0, 0], x2[0, 0]).shape == (4,)


def test_agrees_with_torch():
    x1, x2 = values(9, 7), values(9, 6, seed=1)
    weight, bias = values(4, 7, 6, seed=2), values(4, seed=3)
    found = functional.bilinear(x1, x2, weight, bias, recipe="hbfp16b64")
    # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
    torch.testing.assert_close(found, nn.functional.bilinear(x1, x2, weight, bias), rtol=0, atol=1e-2)


def test_every_product_draws_random_bits_of_its_own():
    seen = []
    ops.recorders.append(lambda product: seen.extend(operand.stream for operand in product.operands()))
    try:
        tensors = [values(*shape).requires_grad_() for shape in ((5, 7), (5, 6), (4, 7, 6))]
        functional.bilinear(*tensors, recipe="emulator").sum().backward()
    finally:
        ops.recorders.clear()
    assert len(seen) == len(set(seen)) == 12


def test_conversion_and_back_and_audit():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pair = nn.Linear(7, 6), nn.Bilinear(6, 6, 3)

        def forward(self, x):
            h = self.first(x)
            return self.pair(h, h)

    model = Pair()
    x, keys = values(5, 7), list(model.state_dict())
    before = model(x)
    hbfp.convert_(model, "hbfp4")
    assert list(model.state_dict()) == keys
    found = hbfp.audit(model, x)
    assert found.share(4) == 1.0
    assert found.by_layer["pair"] == 3 * 5 * 3 * 6 * 6 + 3 * 5 * 3 * 6
    hbfp.revert_(model)
    assert type(model.pair) is nn.Bilinear
    assert same(model(x), before)


def test_shapes_that_do_not_fit_are_named():
    for shapes in (((5, 7), (5, 5), (4, 7, 6)), ((5, 7), (4, 6), (4, 7, 6)), ((5, 7), (5, 6), (4, 42))):
        with pytest.raises(hbfp.ShapeError, match="bilinear takes"):
            functional.bilinear(*(values(*shape) for shape in shapes), recipe="hbfp4")


def test_a_layer_built_directly_advances_its_step():
    layer = hbfp.nn.Bilinear(7, 6, 4, recipe="emulator")
    assert not torch.equal(layer(values(5, 7), values(5, 6)), layer(values(5, 7), values(5, 6)))
    assert "ceil" in repr(layer)
