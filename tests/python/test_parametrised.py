"""Layers whose weights are computed: parametrised, normed by a hook, pruned.

The bugs these hunt: products that read the weight of before, a weight that is computed more often than torch would
(spectral_norm changes its state each time), a conversion after which the parametrisation can't be removed or is lost,
and an optimizer's master copy that is kept in vain.
"""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

import hbfp  # noqa: E402
from hbfp.nn.conversion import LAYERS  # noqa: E402


def _hook(name):
    def apply(module, weight="weight"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(nn.utils, name)(module, weight)

    return apply


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm by a hook": _hook("weight_norm"),
    "spectral_norm by a hook": _hook("spectral_norm"),
    "pruned": lambda module, weight="weight": prune.l1_unstructured(module, weight, 0.5),
}
normed = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def layer(norm=parametrizations.weight_norm, seed=0):
    torch.manual_seed(seed)
    return norm(nn.Linear(40, 24))


X = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))


@normed
def test_the_products_read_the_weight_that_is_computed_and_gradients_reach_its_parameters(norm):
    plain, converted = layer(norm), layer(norm)
    keys = list(plain.state_dict())
    hbfp.convert_(converted, "hbfp8")
    assert list(converted.state_dict()) == keys
    out = converted(X)
    plain(X)  # as many power iterations for spectral_norm, and no more of them
    plain.eval()
    expected = hbfp.nn.functional.linear(X, plain.weight, plain.bias, recipe="hbfp8", stream=1 << 32)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in zip(converted.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)
        assert wanted.grad.abs().max() > 0
    for name, buffer in plain.named_buffers():
        assert torch.equal(converted.get_buffer(name), buffer)


@normed
def test_revert_is_the_inverse(norm):
    module = layer(norm)
    before = module.eval()(X)
    attributes, kind = dict(vars(module)), type(module)
    hbfp.convert_(module, "hbfp8")
    assert not torch.equal(module(X), before)
    hbfp.revert_(module)
    assert vars(module).keys() == attributes.keys()
    assert (type(module).__name__, type(module).__bases__) == (kind.__name__, kind.__bases__)
    assert torch.equal(module(X), before)


@normed
def test_checkpoints_both_ways_and_packed_files(norm, tmp_path):
    plain, converted = layer(norm), layer(norm, 1)
    hbfp.convert_(converted, "hbfp4")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    converted.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True), strict=True)
    other = layer(norm, 2)
    other.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(other.eval()(X), plain.eval()(X))
    expected = converted.eval()(X)
    hbfp.save_model(tmp_path / "m.safetensors", converted)
    loaded = layer(norm, 3)
    hbfp.convert_(loaded, "hbfp4")
    hbfp.load_model(tmp_path / "m.safetensors", loaded)
    assert torch.equal(loaded.eval()(X), expected)


@normed
def test_wide_weights_are_refused_by_name(norm):
    """The optimizer holds other tensors than the weight: to round none of them and say nothing would be a lie."""
    model = nn.Sequential(nn.Linear(40, 40), layer(norm))
    hbfp.convert_(model, "hbfp4")
    with pytest.raises(hbfp.ConversionError, match="of '1' is no parameter but computed from others"):
        hbfp.wide_weights(torch.optim.SGD(model.parameters(), 0.1), model)


def test_the_parametrisation_can_be_removed_and_put_on_while_converted():
    module = layer()
    hbfp.convert_(module, "hbfp8")
    weight, out = module.weight, module.eval()(X)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is hbfp.nn.Linear
    assert torch.equal(module.weight, weight)
    assert torch.equal(module(X), out)
    parametrizations.weight_norm(module)
    later = module(X)
    hbfp.revert_(module)
    assert parametrize.type_before_parametrizations(module) is nn.Linear
    assert not torch.equal(module(X), later)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Linear


def test_copies_are_converted_and_taken_back_by_themselves():
    """torch's copies share one class, which must not change under the others."""
    module = layer()
    first, second = copy.deepcopy(module), copy.deepcopy(module)
    plain = module(X)
    hbfp.convert_(first, "hbfp4")
    third = copy.deepcopy(first)
    out = first.eval()(X)
    assert torch.equal(second(X), plain)
    hbfp.revert_(first)
    assert torch.equal(first(X), plain)
    assert torch.equal(third.eval()(X), out)
    hbfp.revert_(third)
    parametrize.remove_parametrizations(third, "weight")
    assert torch.equal(first(X), plain)


def test_an_optimizer_made_before_conversion_trains_the_parameters_behind():
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    hbfp.convert_(module, "hbfp4")
    out = module.eval()(X)
    out.square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert not torch.equal(module(X), out)


CASES = {
    nn.Conv1d: (lambda: nn.Conv1d(3, 4, 2), ["weight"], lambda: (torch.randn(2, 3, 5),)),
    nn.Conv2d: (lambda: nn.Conv2d(3, 4, 2), ["weight"], lambda: (torch.randn(2, 3, 5, 5),)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(3, 4, 2), ["weight"], lambda: (torch.randn(2, 3, 5, 5),)),
    nn.Bilinear: (lambda: nn.Bilinear(3, 3, 4), ["weight"], lambda: (torch.randn(2, 3), torch.randn(2, 3))),
    nn.LSTM: (lambda: nn.LSTM(3, 4), ["weight_ih_l0", "weight_hh_l0"], lambda: (torch.randn(5, 2, 3),)),
    nn.GRUCell: (lambda: nn.GRUCell(3, 4), ["weight_ih", "weight_hh"], lambda: (torch.randn(2, 3),)),
    nn.MultiheadAttention: (
        lambda: nn.MultiheadAttention(4, 2),
        ["in_proj_weight", "out_proj.weight"],
        lambda: (torch.randn(5, 2, 4),) * 3,
    ),
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_every_kind_of_layer_computes_its_weight_once_a_step(kind, norm):
    """The same layer with the weights put in as parameters gives the bits; spectral_norm counts the evaluations."""
    make, names, draw = CASES[kind]

    def build():
        torch.manual_seed(2)
        module = make()
        for name in names:
            owner, _, weight = name.rpartition(".")
            NORMS[norm](module.get_submodule(owner), weight)
        return module

    parametrised, reference = build(), build()
    inputs = draw()
    hbfp.convert_(parametrised, "hbfp8")
    out = parametrised(*inputs)[0]
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in parametrised.parameters())
    for name in names:  # one evaluation in training mode, and from then on the weights of that one
        owner, _, weight = name.rpartition(".")
        getattr(reference.get_submodule(owner), weight)
    reference.eval()
    for name, buffer in reference.named_buffers():
        assert torch.equal(parametrised.get_buffer(name), buffer)
    for name in names:
        owner, _, weight = name.rpartition(".")
        parametrize.remove_parametrizations(reference.get_submodule(owner), weight)
    hbfp.convert_(reference.train(), "hbfp8")
    assert type(reference) is LAYERS[kind]
    assert torch.equal(reference(*inputs)[0], out)


def test_a_hook_that_never_runs_is_refused():
    """Attention reads the weight of its output layer without calling it, so that the hook's weight would stay old."""
    for norm in (NORMS["weight_norm by a hook"], NORMS["pruned"]):
        module = nn.MultiheadAttention(8, 2)
        norm(module.out_proj)
        with pytest.raises(hbfp.ConversionError, match="never runs"):
            hbfp.convert_(nn.Sequential(module), "hbfp4")
        hbfp.convert_(nn.Sequential(module, nn.Linear(8, 8)), "hbfp4", rules={"0": None})


def test_the_report_and_the_audit_say_what_is_computed_outside_the_products():
    module = nn.Sequential(layer(parametrizations.spectral_norm), nn.Linear(24, 4))
    report = str(hbfp.convert_(module, "hbfp4", rules={"0": hbfp.HBFP8}))
    assert "rule '0', parametrised: weight computed in FP32" in report
    rows = hbfp.audit(module, X).fp32
    assert {row.layer for row in rows} == {"0.parametrizations.weight.0"}
    assert all("outside its products" in row.reason for row in rows)


def test_products_inside_a_parametrisation_of_ones_own_are_seen():
    """A low-rank update of the weight is a product in FP32, and must be reported as one."""

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(24, 2)), nn.Parameter(torch.randn(2, 40))

        def forward(self, weight):
            return weight + self.a @ self.b

    model = nn.Sequential(nn.Linear(40, 24))
    parametrize.register_parametrization(model[0], "weight", LowRank())
    report = hbfp.convert_(model, "hbfp4")
    assert [row.name for row in report.left] == ["0.parametrizations.weight.0"]
    assert "may multiply by a, b itself" in report.left[0].note
    assert {row.product for row in hbfp.audit(model, X).fp32} == {"mm", "mm, backward"}
