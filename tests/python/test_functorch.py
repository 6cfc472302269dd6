"""What has no meaning in fixed point is refused by name: batching transforms, forward-mode and second derivatives.

The bugs these hunt: a Hessian of zeros, a tangent lost in silence, a `vmap` that rounds each example by the random bits
of the first, and errors that speak of torch's insides.
"""

import pytest

torch = pytest.importorskip("torch")

from torch import func  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from zoo import LAYERS, leaves, values  # noqa: E402

import hbfp  # noqa: E402


def converted(name):
    make, shapes = LAYERS[name]
    layer = make()
    hbfp.convert_(layer, "hbfp4")
    return layer, [values(*shape, seed=i) for i, shape in enumerate(shapes)]


TRANSFORMS = {
    "vmap": lambda f, x: func.vmap(f)(torch.stack([x, x])),
    "grad": lambda f, x: func.grad(f)(x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
def test_transforms_of_functions_are_refused(name, transform):
    layer, (first, *others) = converted(name)
    if name == "MultiheadAttention" and transform == "vmap":
        layer.eval()

    def total(x):
        return sum(result.sum() for result in leaves(layer(x, *others)))

    with pytest.raises(hbfp.HBFPError, match=r"torch\.func's transforms"):
        TRANSFORMS[transform](total, first)


def test_functions_are_refused_without_gradients_too():
    weight = values(4, 8)
    with torch.no_grad(), pytest.raises(hbfp.HBFPError, match=r"torch\.func's transforms"):
        func.vmap(lambda x: hbfp.nn.functional.linear(x, weight, recipe="hbfp4"))(values(3, 2, 8))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
def test_forward_mode_is_refused(name):
    layer, (first, *others) = converted(name)
    with forward_ad.dual_level():
        layer(first, *others)  # nothing to refuse: no tangent
        with pytest.raises(hbfp.HBFPError, match="forward-mode"):
            layer(forward_ad.make_dual(first, first), *others)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_refused(name):
    layer, (first, *others) = converted(name)
    first.requires_grad_()
    loss = sum(result.square().sum() for result in leaves(layer(first, *others)))
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        # With allow_unused torch gives None, and its functional.hessian zeros, where it finds no way back.
        torch.autograd.grad(gradient.sum(), first, allow_unused=True)


def test_a_hessian_is_refused_and_not_zero():
    layer, (x,) = converted("Linear")
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        torch.autograd.functional.hessian(lambda x: layer(x).square().sum(), x)


def test_create_graph_without_a_second_derivative_gives_the_same_gradients():
    layer, (x,) = converted("Linear")
    hbfp.set_step(layer, 3)
    x.requires_grad_()
    found = [torch.autograd.grad(layer(x).square().sum(), x, create_graph=create)[0] for create in (False, True)]
    assert torch.equal(*found)


def test_functional_call_is_no_transform():
    layer, (x,) = converted("Linear")
    hbfp.set_step(layer, 3)
    assert torch.equal(func.functional_call(layer, dict(layer.named_parameters()), (x,)), layer(x))
