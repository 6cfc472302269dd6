"""Conversion in place: what changes, what must not, and what is refused by name."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402


class Late(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 4)
        self.middle = nn.Linear(16, 16)
        self.first = nn.Linear(8, 16)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def formats(model):
    return {n: str(m.hbfp_state.recipe) for n, m in model.named_modules() if getattr(m, "hbfp_state", None)}


def widths(model):
    return {
        n: m.hbfp_state.recipe.forward.left.format.bits
        for n, m in model.named_modules()
        if getattr(m, "hbfp_state", None)
    }


def test_first_and_last_by_execution():
    model = Late()
    report = hbfp.convert_(model, "booster", example_inputs=torch.randn(2, 8))
    assert widths(model) == {"first": 6, "middle": 4, "last": 6}
    assert "first" in str(report)


def test_registration_order_is_said_to_be_taken_without_inputs():
    report = hbfp.convert_(Late(), "booster")
    assert "example_inputs" in str(report)


def test_keys_identity_and_values_stay_and_revert_is_the_inverse():
    model = Late()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    x = torch.randn(3, 8)
    before = model(x)
    hbfp.convert_(model, "hbfp4")
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not torch.equal(model(x), before)
    hbfp.revert_(model)
    assert type(model.first) is nn.Linear
    assert torch.equal(model(x), before)
    assert not model._forward_pre_hooks


def test_rules_first_match_none_and_no_match():
    model = Late()
    hbfp.convert_(model, "hbfp4", rules={"re:.*last": hbfp.HBFP8, "mid*": None})
    assert widths(model) == {"first": 4, "last": 8}
    assert type(model.middle) is nn.Linear
    with pytest.raises(hbfp.RuleError, match="matches no module"):
        hbfp.convert_(Late(), rules={"encoder.*": None})


def test_twice_is_refused_and_the_model_is_as_it_was():
    model = Late()
    hbfp.convert_(model, "hbfp4")
    found = formats(model)
    with pytest.raises(hbfp.ConversionError, match="converted already"):
        hbfp.convert_(model, "hbfp8")
    assert formats(model) == found


def test_what_is_not_supported_yet_is_reported_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4), nn.LSTM(4, 4))
    report = str(hbfp.convert_(model, "hbfp4"))
    assert report.count("not supported yet") == 2


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    report = hbfp.convert_(model, "hbfp4")
    assert type(model[0]) is Scaled
    assert "its own forward" in str(report)


def test_parametrised_modules_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(hbfp.ConversionError, match="parametrised"):
        hbfp.convert_(model, "hbfp4")


def test_a_shared_module_is_converted_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    hbfp.convert_(model, "hbfp4")
    assert len(formats(model)) == 1
    hbfp.revert_(model)
    assert type(layer) is nn.Linear


def test_deepcopy_and_pickle_keep_the_arithmetic():
    model = Late()
    hbfp.convert_(model, "emulator", example_inputs=torch.randn(2, 8))
    hbfp.set_step(model, 3)
    x = torch.randn(5, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        hbfp.set_step(other, 4)
        assert not torch.equal(other(x), model(x))


def test_an_fp32_checkpoint_loads_into_a_converted_model_and_back(tmp_path):
    plain, converted = Late(), Late()
    hbfp.convert_(converted, "hbfp4")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    converted.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    other = Late()
    other.load_state_dict(converted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True))


def test_recipes_and_streams():
    assert {str(hbfp.recipe(n)) for n in ("hbfp4", "hbfp6", "hbfp8", "booster", "emulator")} == {
        "hbfp4",
        "hbfp6",
        "hbfp8",
        "booster",
        "emulator",
    }
    with pytest.raises(hbfp.HBFPError, match="unknown recipe"):
        hbfp.recipe("int4")
    from hbfp.policy import stream

    assert stream(1, 2, 3, 4) == (1 << 32) | (2 << 12) | (3 << 4) | 4
    with pytest.raises(hbfp.HBFPError, match="site"):
        stream(0, 2**20)
