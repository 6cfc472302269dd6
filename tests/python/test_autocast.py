"""dtypes: autocasting changes nothing in a converted layer, and 16-bit inputs give 16-bit results and gradients.

The bugs these hunt: a product beside the core that autocasting runs in bfloat16, a result rounded twice, a gradient
in another dtype than its tensor, a model made bfloat16 as a whole whose norms then meet float32.
"""

import copy
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from zoo import LAYERS, gradients, leaves, same, values  # noqa: E402

import hbfp  # noqa: E402

CONTAINERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")


def converted(name, recipe="hbfp4"):
    make, shapes = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    hbfp.convert_(layer, recipe)
    hbfp.set_step(layer, 3)
    return layer, [values(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("backend", ["integer", "emulate"])
@pytest.mark.parametrize("name", LAYERS)
def test_autocasting_changes_no_bit(name, backend):
    layer, inputs = converted(name, replace(hbfp.recipe("hbfp4"), backend=backend))

    def autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(*inputs)

    expected, found = gradients(layer, inputs), gradients(layer, inputs, autocast)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_autocasting_leaves_results_in_float32_whatever_the_operator_before_gave():
    layer, (x,) = converted("Linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert same(layer(x.bfloat16()), layer(x.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in CONTAINERS])
def test_half_inputs_give_half_results_rounded_once(name, weights_too, dtype):
    layer, inputs = converted(name)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    if weights_too:
        layer.to(dtype)
    wide, wide_inputs = copy.deepcopy(layer).float(), [x.detach().float().requires_grad_() for x in inputs]
    found, expected = leaves(layer(*inputs)), leaves(wide(*wide_inputs))
    assert all(same(a, b.to(dtype)) for a, b in zip(found, expected, strict=True))
    upstream = [values(*y.shape, seed=5 + i).to(dtype) for i, y in enumerate(found)]
    torch.autograd.backward(found, upstream)
    torch.autograd.backward(expected, [dy.float() for dy in upstream])
    for x, wide_x in zip([*inputs, *layer.parameters()], [*wide_inputs, *wide.parameters()], strict=True):
        assert same(x.grad, None if wide_x.grad is None else wide_x.grad.to(x.dtype))


@pytest.mark.parametrize("name", CONTAINERS)
def test_whole_models_may_be_bfloat16(name):
    layer, inputs = converted(name)
    layer.to(torch.bfloat16)
    found = gradients(layer, [x.bfloat16() for x in inputs])
    assert {x.dtype for x in found} == {torch.bfloat16}


def test_float64_gives_float32():
    layer, (x,) = converted("Linear")
    assert same(layer(x.double()), layer(x))


def test_functions_give_float32():
    x, w = values(3, 20).bfloat16(), values(6, 20).bfloat16()
    assert hbfp.nn.functional.linear(x, w, recipe="hbfp4").dtype is torch.float32
