"""What a small product costs beside its arithmetic, counted and not timed; and the same bits by the short way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.nn.utils import parametrize, prune  # noqa: E402

import hbfp  # noqa: E402
from hbfp import autograd, ops  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.packed import PackedWeight  # noqa: E402

PACKAGE = str(Path(hbfp.__file__).parent)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, W, B = values(8, 64), values(64, 64, seed=1), values(64, seed=2)


def linear(x: torch.Tensor, weight: torch.Tensor = W, bias: torch.Tensor | None = B) -> torch.Tensor:
    return functional.linear(x, weight, bias, recipe="hbfp4")


def calls_within(work: Callable[[], object]) -> list[str]:
    """Names of the package's own Python functions that `work` calls."""
    names: list[str] = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


def layer(training: bool = False) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    hbfp.convert_(model, "hbfp4")
    return model.train(training)[0]


def test_a_call_without_gradients_stays_short():
    """A step added to every call of every layer is seen here; nobody sees half a microsecond."""
    module = layer()
    with torch.no_grad():
        linear(X), module(X)  # the first call reads recipes
        assert len(calls_within(lambda: linear(X))) <= 6
        assert len(calls_within(lambda: module(X))) <= 5


def test_a_call_of_a_frozen_layer_stays_short():
    """One of 4096 x 4096 has pushed Python out of the second-level cache: each function then takes a microsecond."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    hbfp.freeze_(model)
    with torch.no_grad():
        model[0](X)
        assert len(calls_within(lambda: model[0](X))) <= 5


@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d])
def test_a_call_of_a_convolution_stays_short(kind):
    """From images of any layout in memory: one that the core declines is multiplied all the same, in twice the time."""
    rank = int(kind.__name__[4])
    dense = values(2, 32, *(5,) * rank)
    x = dense.movedim(1, -1).contiguous().movedim(-1, 1)
    strided = values(2, 32, *(10,) * rank)[(..., *(slice(None, None, 2),) * rank)]
    for change in (hbfp.convert_, hbfp.freeze_):
        module = kind(32, 32, 3)
        change(module, "hbfp4")
        module.eval()
        with torch.no_grad():
            module(x)  # the first call lays out, and reads recipes and geometry
            for given in (x, dense, strided, dense[:1].expand_as(dense)):
                assert len(calls_within(lambda module=module, given=given: module(given))) <= 10
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
                module(x)
        names = [event.name for event in profile.events() if event.name.startswith("aten::")]
        moves = ["aten::movedim", "aten::permute", "aten::as_strided"] if rank == 1 else []
        assert names == [*moves, *moves, "aten::new_empty_strided", "aten::empty_strided"]


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_a_gradient_of_another_layout_is_copied_once_for_both_products(kind):
    module = kind(32, 32, 3, bias=False)
    hbfp.convert_(module, "hbfp4")
    x = values(2, 32, 5, 5).requires_grad_()
    y = module(x)
    dy = values(*y.shape)
    together = dy.contiguous(memory_format=torch.channels_last)
    copies = []
    for given in (together, dy):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            torch.autograd.grad(y, (x, module.weight), given, retain_graph=True)
        copies.append(sum(event.name == "aten::copy_" for event in profile.events()))
    assert copies[1] == copies[0] + 1


def test_a_call_with_gradients_stays_short():
    weight = W.clone().requires_grad_()
    linear(X, weight)
    assert len(calls_within(lambda: linear(X, weight))) <= 10


FROZEN = {
    "linear": (lambda: torch.nn.Linear(64, 48), X),
    "convolution": (lambda: torch.nn.Conv2d(32, 48, 3, padding=1), values(2, 32, 5, 4)),
    "transposed convolution": (lambda: torch.nn.ConvTranspose2d(32, 48, 3, 2), values(2, 32, 5, 4)),
}


@pytest.mark.parametrize("wants", ["bias", "input"])
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_layer_with_gradients_to_come_asks_no_dispatcher(name, wants):
    """In evaluation without no_grad, as the bias wants a gradient: twice through torch's dispatcher was half of it."""
    make, x = FROZEN[name]
    module = make()
    hbfp.freeze_(module, "hbfp4")
    x = x.clone().requires_grad_(wants == "input")
    module.requires_grad_(False)
    module.bias.requires_grad_(wants == "bias")
    module(x)
    names = calls_within(lambda: module(x))
    assert "forward" in names
    assert "__torch_dispatch__" not in names
    with torch.no_grad():
        expected = module(x)
    y = module(x)
    assert y.requires_grad
    assert torch.equal(y, expected)
    with pytest.raises(AssertionError, match="forward"), told_of_products():
        module(x)


@pytest.mark.parametrize("backend", ["emulate", "reference"])
@pytest.mark.parametrize("name", FROZEN)
def test_codes_go_to_the_core_by_no_other_backend(name, backend, monkeypatch):
    make, x = FROZEN[name]
    module = make()
    hbfp.freeze_(module, "hbfp4")
    module.hbfp_state.recipe = replace(module.hbfp_state.recipe, backend=backend)  # freeze_ would refuse it
    assert type(module.weight) is PackedWeight

    def refuse(*_):
        raise AssertionError("multiplied in integers")

    monkeypatch.setattr(PackedWeight, "quick_product", refuse)
    monkeypatch.setattr(ops, "quick_convolution", refuse)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert module(x).requires_grad == gradients


@contextmanager
def told_of_products():
    def refuse(product):
        raise AssertionError(product.name)

    ops.recorders.append(refuse)
    try:
        yield
    finally:
        ops.recorders.remove(refuse)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_no_node_where_no_gradient_is_asked_for(grad_mode, monkeypatch):
    def refuse(*_):
        raise AssertionError("autograd was asked")

    monkeypatch.setattr(autograd.LinearFunction, "apply", refuse)
    with torch.set_grad_enabled(grad_mode):
        # Parameters of a layer in evaluation want a gradient, but in no_grad nobody asks.
        out = linear(X) if grad_mode else linear(X, torch.nn.Parameter(W), torch.nn.Parameter(B))
    assert out.grad_fn is None
    assert not out.requires_grad


@pytest.mark.parametrize("which", range(3))
def test_each_input_may_be_the_only_one_that_wants_a_gradient(which):
    inputs = [x.clone().requires_grad_(i == which) for i, x in enumerate((X, W, B))]
    linear(*inputs).sum().backward()
    assert inputs[which].grad is not None


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_one_allocation_a_call(batch):
    x = values(*batch, 8, 64)
    linear(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        linear(x)
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    assert names == ["aten::new_empty", "aten::empty"]


FORMATS = ("hbfp4b16", "hbfp6b64", "hbfp8t8", "hbfp4tensor", "hbfp12b16", "hbfp4b512")
OPERANDS = {
    "matrices": (values(5, 70), -1, values(6, 70), -1),
    "columns": (values(70, 5), -2, values(70, 6), -2),
    "transposed": (values(70, 5).T, -1, values(6, 70).T, -2),
    "one row": (values(1, 8), -1, values(8, 8), -1),
    "batch": (values(2, 3, 5, 70), -1, values(2, 3, 70, 6), -2),
    "batch of columns": (values(3, 70, 5), -2, values(3, 70, 6), -2),
    "expanded": (values(5, 70).expand(3, 5, 70), -1, values(6, 70).expand(3, 6, 70), -1),
    "many rows": (values(2, 3, 5, 70), -1, values(6, 70), -1),
    "slices": (values(9, 140)[1:6, ::2], -1, values(20, 80)[::3, 3:73], -1),
    "parameter": (values(5, 70), -1, torch.nn.Parameter(values(6, 70)), -1),
    "not small": (values(130, 70), -1, values(200, 70), -1),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_the_short_way_gives_the_same_bits(name):
    a, a_axis, b, b_axis = OPERANDS[name]
    columns = b.shape[-2 if b_axis == -1 else -1]
    for text, rounding, bias in product(FORMATS, (0, 3), (None, values(columns))):
        format = hbfp.HBFP.parse(text)
        rest = (format, format), (rounding, rounding), 2**64 - 1, (2**63 + 16, 7), bias
        short = ops.quick_product(a, a_axis, b, b_axis, *rest)
        assert short is not None, "nothing here is unusual"
        full = ops.products._run_product(a.detach(), a_axis, b.detach(), b_axis, *rest)
        assert (short.shape, short.stride(), short.requires_grad) == (full.shape, full.stride(), False)
        assert torch.equal(short, full)


class Marked(torch.Tensor):
    pass


Z = torch.complex(X, X).conj().imag
UNUSUAL = {
    "negated left": (Z, W, None),
    "negated right": (X, torch.complex(W, W).conj().imag, None),
    "negated bias": (X, W, torch.complex(B, B).conj().imag),
    "half": (X.bfloat16(), W, None),
    "double weight": (X, W.double(), None),
    "integers": (X.int(), W, None),
    "subclass": (X.as_subclass(Marked), W, None),
    "subclass as weight": (X, W.as_subclass(Marked), None),
    "meta": (X.to("meta"), W, None),
    "sparse": (X.to_sparse(), W, None),
    "no rows": (X[:0], W, None),
    "no reduction": (X[:, :0], W[:, :0], None),
    "vector": (X[0], W, None),
    "other reduction": (X[:, :5], W, None),
    "other batch": (values(2, 3, 64), values(3, 5, 64), None),
    "rows apart": (values(3, 2, 64).transpose(0, 1), W, None),
    "strided bias": (X, W, values(128)[::2]),
    "no storage": (torch._efficientzerotensor((8, 64)), W, None),
    "no tensor": (X.tolist(), W, None),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_short_way_declines_what_it_does_not_know(name):
    a, b, bias = UNUSUAL[name]
    formats = (hbfp.HBFP4, hbfp.HBFP4)
    assert ops.quick_product(a, -1, b, -1, formats, (0, 0), 0, (0, 0), bias) is None


IMAGE, KERNEL, ADDED = values(2, 32, 6, 5), values(48, 32, 3, 3, seed=1), values(48, seed=2)
ZI, ZK = (torch._neg_view(x) for x in (IMAGE.contiguous(memory_format=torch.channels_last), KERNEL))
UNUSUAL_CONVOLUTIONS = {
    "negated image": (ZI, KERNEL, None),
    "negated kernel": (IMAGE, ZK, None),
    "half": (IMAGE.bfloat16(), KERNEL, None),
    "double kernel": (IMAGE, KERNEL.double(), None),
    "subclass": (IMAGE.as_subclass(Marked), KERNEL, None),
    "subclass as kernel": (IMAGE, KERNEL.as_subclass(Marked), None),
    "meta": (IMAGE.to("meta"), KERNEL, None),
    "sparse": (IMAGE.to_sparse(), KERNEL, None),
    "no samples": (IMAGE[:0], KERNEL, None),
    "no outputs": (IMAGE, KERNEL[:0], None),
    "no batch": (IMAGE[0], KERNEL, None),
    "other channels": (IMAGE[:, :31], KERNEL, None),
    "other taps": (IMAGE, KERNEL[..., :2], None),
    "another rank": (IMAGE, KERNEL[..., 0], None),
    "smaller than the kernel": (IMAGE[..., :2], KERNEL, None),
    "other bias": (IMAGE, KERNEL, ADDED[:47]),
    "strided bias": (IMAGE, KERNEL, values(96)[::2]),
    "half bias": (IMAGE, KERNEL, ADDED.bfloat16()),
}


@pytest.mark.parametrize("spatial", [None, (8, 7)])
@pytest.mark.parametrize("name", UNUSUAL_CONVOLUTIONS)
def test_the_short_way_of_convolutions_declines_what_it_does_not_know(name, spatial):
    x, weight, bias = UNUSUAL_CONVOLUTIONS[name]
    if spatial is not None:  # an input gradient has channels and outputs exchanged
        weight = weight.as_subclass(torch.Tensor).transpose(0, 1).as_subclass(type(weight))
        if name == "smaller than the kernel":
            return  # of an X there are more pixels than of its Y
    geometry = ops.core_geometry(ops.Geometry((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)))
    formats = (hbfp.HBFP4, hbfp.HBFP4)
    assert ops.quick_convolution(x, weight, formats, (0, 0), 0, (0, 0), bias, geometry, spatial) is None


@pytest.mark.parametrize("text", ["hbfp4t8", "hbfp4tensor"])
def test_the_short_way_of_convolutions_declines_tiles(text):
    geometry = ops.core_geometry(ops.Geometry((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)))
    formats = (hbfp.HBFP.parse(text),) * 2
    assert ops.quick_convolution(IMAGE, KERNEL, formats, (0, 0), 0, (0, 0), None, geometry) is None


def test_negated_images_are_multiplied_with_their_signs():
    expected = functional.conv2d(-IMAGE, KERNEL, recipe="hbfp4")
    assert torch.equal(functional.conv2d(ZI, KERNEL, recipe="hbfp4"), expected)
    assert torch.equal(functional.conv2d(IMAGE, ZK, recipe="hbfp4"), functional.conv2d(IMAGE, -KERNEL, recipe="hbfp4"))


IMAGES = {
    "dense": IMAGE,
    "channels last": IMAGE.contiguous(memory_format=torch.channels_last),
    "every second": values(2, 32, 12, 10)[:, :, ::2, ::2],
    "expanded": IMAGE[:1].expand(2, -1, -1, -1),
    "one pixel": values(2, 32, 1, 1),
    "one channel": values(2, 1, 6, 5),
}
WAYS = (
    ("conv2d", {"padding": 1}),
    ("conv2d", {"padding": [3, 2], "stride": [2, 1], "dilation": 2}),
    ("conv2d", {"padding": "same"}),
    ("conv_transpose2d", {"padding": 1}),
    ("conv_transpose2d", {"stride": (2, 3), "output_padding": 1}),
)


@pytest.mark.parametrize("text", ["hbfp4b16", "hbfp6b64", "hbfp12b16", "hbfp4b512"])
@pytest.mark.parametrize("name", IMAGES)
def test_the_short_way_of_convolutions_gives_the_same_bits(name, text):
    """With a gradient to come the products go the long way, and keep what backward needs."""
    x = IMAGES[name]
    kernel = values(x.shape[1], 40, 3, 3, seed=1).transpose(2, 3)
    for rounding in ("nearest_even", "stochastic"):
        recipe = hbfp.recipe(text, forward=(hbfp.OperandPolicy(text, rounding),) * 2)
        for way, options in WAYS:
            weight = kernel if "transpose" in way else kernel.transpose(0, 1)
            convolve, words = getattr(functional, way), {"seed": 2**64 - 1, "stream": 2**40}
            short = convolve(x, weight, ADDED[:40], **options, **words, recipe=recipe)
            full = convolve(x, weight.clone().requires_grad_(), ADDED[:40], **options, **words, recipe=recipe)
            assert (short.shape, short.stride(), short.requires_grad) == (full.shape, full.stride(), False)
            assert torch.equal(short, full)


def test_negated_views_are_multiplied_with_their_signs():
    assert torch.equal(linear(Z), linear(-X))
    assert torch.equal(linear(X, W, torch.complex(B, B).conj().imag), linear(X, W, -B))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward mode's own
def test_transforms_and_forward_mode_are_refused_as_with_gradients():
    """They would pass a function that leaves no node, and take its result for a constant."""
    unmapped = torch.vmap(lambda x: x + linear(X))
    for transformed in (torch.vmap(linear), torch.func.grad(lambda x: linear(x).sum()), unmapped):
        with pytest.raises(hbfp.HBFPError, match=r"torch\.func's transforms"):
            transformed(X)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(hbfp.HBFPError, match="forward-mode"):
        linear(torch.autograd.forward_ad.make_dual(X, X))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_computes_anew():
    """A tracer that sees only an allocation would replay it as the result."""
    traced = torch.jit.trace(linear, X, check_trace=False)
    assert torch.equal(traced(2 * X), linear(2 * X))


def test_a_second_derivative_is_refused():
    x = X.clone().requires_grad_()
    weight = W.clone().requires_grad_()
    (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        first.sum().backward()


def test_a_layer_reads_its_weight_wherever_it_is():
    """Pruning and parametrizations take the weight out of the module's parameters."""
    module = layer()
    prune.l1_unstructured(module, "weight", 0.5)
    assert torch.equal(module(X), linear(X, module.weight, module.bias))
    module = layer()
    expected = linear(X, 2 * module.weight, module.bias)

    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, "weight", Twice())
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("recorded", [False, True])
def test_recorders_hear_of_calls_without_gradients(recorded):
    heard: list[ops.Product] = []
    if recorded:
        ops.recorders.append(heard.append)
    try:
        linear(X)
    finally:
        ops.recorders.clear()
    assert [(p.name, p.macs) for p in heard] == [("forward", 8 * 64 * 64)] * recorded
