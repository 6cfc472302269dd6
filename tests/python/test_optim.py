"""Wide weights: on the grid after every step, nothing else touched, and known to whoever resumes."""

import copy
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import hbfp  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "SGD-foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=4, history_size=3),
}


def network(recipe="hbfp4", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 20), nn.Linear(20, 3))
    hbfp.convert_(model, recipe, **{"rules": {"1": None}, **options})
    return model


def trained(make, bits=None, steps=1, resumed=None):
    """A model after some steps, its optimizer and the handle of its wide weights; `resumed` goes on from a pair."""
    model = network()
    optimizer = make(model.parameters())
    handle = None if bits is None else hbfp.wide_weights(optimizer, model, bits)
    first = 0
    if resumed is not None:
        for part, state in zip((model, optimizer), resumed[:2], strict=True):
            part.load_state_dict(state)
        first = resumed[2]
    for step in range(first, steps):
        x = torch.randn(5, 70, generator=torch.Generator().manual_seed(step))

        def closure(x=x, step=step):
            hbfp.set_step(model, step)
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    return model, optimizer, handle


def on_grid(weight, bits):
    weight = weight.detach()
    return torch.equal(weight, torch.from_dlpack(hbfp.quantize(np.from_dlpack(weight), hbfp.HBFP(bits))))


def same(ours, theirs):
    """Whether two state_dicts have the same values, tensors to the bit."""
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_on_the_grid_and_the_rest_is_untouched(name):
    """Rounding what is not a weight of a converted layer, the momentum above all, would be another optimizer."""
    make = OPTIMIZERS[name]
    wide, optimizer, handle = trained(make, bits=8)
    plain, other, _ = trained(make)
    expected = hbfp.quantize(np.from_dlpack(plain[0].weight.detach()), hbfp.HBFP8)
    assert not on_grid(plain[0].weight, 8)
    assert np.array_equal(np.from_dlpack(wide[0].weight.detach()), expected)
    assert torch.equal(wide[0].bias, plain[0].bias)
    assert torch.equal(wide[1].weight, plain[1].weight)
    assert tree_leaves(optimizer.state_dict()["state"])
    assert same(optimizer.state_dict()["state"], other.state_dict()["state"])
    handle.remove()
    wide[0].weight.data += 0.1  # off the grid
    optimizer.step(lambda: torch.zeros(()))
    assert not on_grid(wide[0].weight, 8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_bits_of_the_uncut_one(name, tmp_path):
    make = OPTIMIZERS[name]
    uncut, optimizer, _ = trained(make, bits=10, steps=4)
    model, half, _ = trained(make, bits=10, steps=2)
    torch.save((model.state_dict(), half.state_dict(), 2), tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint[1]["hbfp_wide_weights"] == {"bits": 10}
    resumed, again, _ = trained(make, bits=10, steps=4, resumed=checkpoint)
    for ours, theirs in zip(resumed.parameters(), uncut.parameters(), strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert same(again.state_dict(), optimizer.state_dict())


def test_sixteen_bits_by_default_or_what_the_recipe_names():
    def bits(recipe, **options):
        model = network(recipe, **options)
        return hbfp.wide_weights(torch.optim.SGD(model.parameters(), 0.1), model).format.bits

    named = dataclasses.replace(hbfp.recipe("hbfp4"), wide_weights=12)
    assert bits("hbfp4") == 16
    assert bits(named) == 12
    with pytest.raises(hbfp.FormatError, match=r"\[9, 12\] bits: give bits"):
        bits(named, rules={"1": dataclasses.replace(named, wide_weights=9)})


def test_states_of_another_width_are_refused_and_change_nothing():
    """Half a run at 8 bits and half at 16, or in float32, with nobody the wiser."""
    states = {bits: trained(OPTIMIZERS["AdamW"], bits, 2)[1].state_dict() for bits in (8, 16, None)}
    for bits, expected in ((8, "found a state with 8"), (None, "found one without")):
        _, optimizer, _ = trained(OPTIMIZERS["AdamW"], 16, 1)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(hbfp.ConversionError, match=expected):
            optimizer.load_state_dict(states[bits])
        assert same(optimizer.state_dict(), before)
    assert "hbfp_wide_weights" not in states[None]


def test_wide_weights_begin_where_they_are_asked_for():
    """From a state loaded before, of whatever width; and plain optimizers take the states of wide ones."""
    for bits in (8, None):
        state = trained(OPTIMIZERS["AdamW"], bits, 2)[1].state_dict()
        model, optimizer, _ = trained(OPTIMIZERS["AdamW"])
        optimizer.load_state_dict(state)
        assert "hbfp_wide_weights" not in optimizer.state_dict()
        assert optimizer.state[model[0].weight]["step"] == 2
        hbfp.wide_weights(optimizer, model)
        assert optimizer.state_dict()["hbfp_wide_weights"] == {"bits": 16}


def test_removed_is_as_if_it_had_never_been():
    model, optimizer, handle = trained(OPTIMIZERS["SGD"], 8)
    handle.remove()
    handle.remove()
    assert "hbfp_wide_weights" not in optimizer.state_dict()
    optimizer.load_state_dict(trained(OPTIMIZERS["SGD"])[1].state_dict())
    again = hbfp.wide_weights(optimizer, model, 6)
    handle.remove()  # the old handle ends nothing of the new one
    with pytest.raises(hbfp.ConversionError, match="6 bits already"):
        hbfp.wide_weights(optimizer, model)
    again.remove()


def test_a_second_call_is_refused():
    """Rounded twice, to 16 bits and to 8, the weights would be of the width that came last."""
    model, optimizer, _ = trained(OPTIMIZERS["SGD"], 16)
    with pytest.raises(hbfp.ConversionError, match="16 bits already"):
        hbfp.wide_weights(optimizer, model, 8)


def test_copies_have_no_hooks_and_may_be_given_some():
    model, optimizer, _ = trained(OPTIMIZERS["SGD"], 8)
    copied = copy.deepcopy(optimizer)
    assert "hbfp_wide_weights" not in copied.state_dict()
    both = copy.deepcopy(nn.ModuleDict({"model": model}))["model"]
    for ours, theirs in zip(copied.param_groups[0]["params"], both.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    hbfp.wide_weights(torch.optim.SGD(both.parameters(), 0.1), both, 8)


def test_parameters_that_come_later():
    """Found once and for all, groups added and parameters exchanged after the call would stay float32."""
    model = network(rules=None)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    hbfp.wide_weights(optimizer, model, 8)
    optimizer.step()
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.01})
    model[0].weight = nn.Parameter(torch.randn(20, 70))
    optimizer.param_groups[0]["params"][0] = model[0].weight
    model(torch.randn(5, 70)).sum().backward()
    optimizer.step()
    assert on_grid(model[0].weight, 8)
    assert on_grid(model[1].weight, 8)
    assert not on_grid(model[1].bias[None], 8)


def test_a_layer_that_was_taken_back_is_float32():
    model, optimizer, _ = trained(OPTIMIZERS["SGD"], 8)
    hbfp.revert_(model)
    model(torch.randn(5, 70)).sum().backward()
    optimizer.step()
    assert not on_grid(model[0].weight, 8)


def test_under_a_gradient_scaler():
    """A step that the scaler leaves out is none: weights stay where they are."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    hbfp.wide_weights(optimizer, model, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = model[0].weight.detach().clone()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(5, 70)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == (factor != 1.0)
        assert on_grid(model[0].weight, 8) == (factor == 1.0)


def test_several_models_and_one_optimizer():
    models = nn.ModuleList([network(), network("hbfp6")])
    optimizer = torch.optim.AdamW(models.parameters())
    hbfp.wide_weights(optimizer, models, 8)
    sum(model(torch.randn(5, 70)).sum() for model in models).backward()
    optimizer.step()
    assert all(on_grid(model[0].weight, 8) for model in models)


def test_layers_without_weights_are_no_obstacle():
    """Attention by itself has none; torch's attention has three that are None."""
    model = nn.ModuleList([hbfp.nn.DotProductAttention(), nn.MultiheadAttention(16, 2), nn.LSTM(16, 8, proj_size=4)])
    hbfp.convert_(model, "hbfp4")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hbfp.wide_weights(optimizer, model, 6)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert on_grid(parameter, 6) == (parameter.dim() > 1 or not parameter.any()), name


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "apply", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, old_weight_norm]
)
def test_parametrised_weights_are_refused_by_name(apply):
    """The optimizer holds what they are computed from; passed over, they would be float32 in silence."""
    model = network(rules=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    apply(model[1])
    with pytest.raises(hbfp.ConversionError, match="weight of '1' is no parameter"):
        hbfp.wide_weights(optimizer, model)


def test_a_parametrisation_that_comes_later_is_refused_at_the_step():
    model, optimizer, _ = trained(OPTIMIZERS["SGD"], 8)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(hbfp.ConversionError, match="weight of '0' is no parameter"):
        optimizer.step(lambda: torch.zeros(()))


def test_a_model_that_was_not_converted_is_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(hbfp.ConversionError):
        hbfp.wide_weights(torch.optim.SGD(model.parameters(), 0.1), model)


def test_an_optimizer_of_another_model_is_refused():
    """It would round nothing, in silence."""
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    hbfp.convert_(model, "hbfp4")
    with pytest.raises(hbfp.ConversionError, match="none of the 1 weights"):
        hbfp.wide_weights(torch.optim.SGD(other.parameters(), 0.1), model)


def test_what_is_no_optimizer_is_refused():
    model = network()
    with pytest.raises(hbfp.ConversionError, match="found Sequential"):
        hbfp.wide_weights(model, torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("bits", [1, 17])
def test_widths_that_do_not_exist(bits):
    model = network()
    with pytest.raises(hbfp.FormatError):
        hbfp.wide_weights(torch.optim.SGD(model.parameters(), 0.1), model, bits)
