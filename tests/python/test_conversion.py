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
    for inputs, inner in ((torch.randn(2, 8), "middle"), (None, "first")):  # None: by registration
        model = Late()
        model._modules = {name: model._modules[name] for name in ("middle", "first", "last")}
        hbfp.convert_(model, "booster", example_inputs=inputs)
        assert [name for name, bits in widths(model).items() if bits == 4] == [inner]


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
    for rules, found in (
        ({"mid*": hbfp.HBFP8, "*": hbfp.HBFP6}, {"last": 6, "middle": 8, "first": 6}),
        ({"*": hbfp.HBFP6, "mid*": hbfp.HBFP8}, {"last": 6, "middle": 6, "first": 6}),
        ({"mid*": None, "re:.*": hbfp.HBFP6}, {"last": 6, "first": 6}),
        ({"first": hbfp.HBFP8, "*": None}, {"first": 8}),
    ):
        model = Late()
        hbfp.convert_(model, "hbfp4", rules=rules)
        assert widths(model) == found
    with pytest.raises(hbfp.RuleError, match="matches no module"):
        hbfp.convert_(Late(), rules={"encoder.*": None})


def test_recurrent_subclasses_with_a_forward_of_their_own_are_left_alone():
    class Last(nn.GRU):
        def forward(self, input, hx=None):
            return super().forward(input, hx)[0][-1]

    model = nn.Sequential(Last(4, 4), nn.Linear(4, 4))
    report = hbfp.convert_(model, "hbfp4")
    assert list(formats(model)) == ["1"]
    assert "subclass of GRU with its own forward" in str(report)


def test_twice_is_refused_and_the_model_is_as_it_was():
    model = Late()
    hbfp.convert_(model, "hbfp4")
    found = formats(model)
    with pytest.raises(hbfp.ConversionError, match="converted already"):
        hbfp.convert_(model, "hbfp8")
    assert formats(model) == found


def test_a_layer_of_ones_own_with_a_weight_is_reported_with_the_reason():
    class Own(nn.modules.conv._ConvNd):
        pass

    model = nn.Sequential(
        nn.Linear(16, 4), Own(3, 4, (3,), (1,), (0,), (1,), False, (0,), 1, True, "zeros", None, None)
    )
    report = str(hbfp.convert_(model, "hbfp4"))
    assert report.count("may multiply by weight itself") == 1


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    report = hbfp.convert_(model, "hbfp4")
    assert type(model[0]) is Scaled
    assert "its own forward" in str(report)


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


def test_none_skips_a_module_by_any_of_its_names():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})
    with pytest.raises(hbfp.RuleError, match="different things"):
        hbfp.convert_(model, "hbfp4", rules={"b": None})
    hbfp.convert_(model, "hbfp4", rules={"[ab]": None})
    assert list(formats(model)) == ["c"]


def test_none_skips_what_is_inside():
    model = nn.ModuleDict({"encoder": Late(), "head": nn.Linear(4, 4)})
    hbfp.convert_(model, "hbfp4", rules={"encoder": None})
    assert list(formats(model)) == ["head"]


def test_a_width_for_what_cannot_have_one_is_refused():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(hbfp.RuleError, match="no module that can be converted"):
        hbfp.convert_(model, "hbfp4", rules={"0": hbfp.HBFP6})
    hbfp.convert_(model, "hbfp4", rules={"0": None})


def test_attention_is_converted_with_its_parts_and_an_encoder_layer_by_its_parts():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 2)

    model = Encoder()
    report = hbfp.convert_(model, "hbfp4")
    assert list(formats(model)) == ["layer.self_attn", "layer.linear1", "layer.linear2", "head"]
    assert [row.name for row in report.converted] == list(formats(model))


def test_a_lazy_layer_is_refused():
    with pytest.raises(hbfp.ConversionError, match="no shape yet"):
        hbfp.convert_(nn.Sequential(nn.LazyLinear(4)), "hbfp4")


def test_nothing_to_convert_is_refused():
    with pytest.raises(hbfp.ConversionError, match="nothing to convert"):
        hbfp.convert_(nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()))


def test_the_trace_leaves_no_trace():
    """Modes per module, batch statistics, generators and hooks; also when the forward pass fails."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        hbfp.convert_(model, "hbfp4", example_inputs=torch.randn(2, 99, generator=torch.Generator()))
    assert not formats(model)
    hbfp.convert_(model, "hbfp4", example_inputs=torch.zeros(2, 4))
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model)


def test_first_and_last_by_name():
    model = Late()
    hbfp.convert_(model, "booster", first="first", last="last")
    assert widths(model) == {"first": 6, "middle": 4, "last": 6}
    with pytest.raises(hbfp.ConversionError, match="not among"):
        hbfp.convert_(Late(), "booster", first="embedding")


def test_attention_module_before_between_and_after():
    module = hbfp.nn.DotProductAttention()
    model = nn.Sequential(nn.Linear(8, 8))
    model.attention = module
    q = torch.randn(2, 3, 5, 8)
    plain = module(q, q, q, is_causal=True)
    assert torch.equal(plain, nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    hbfp.convert_(model, "hbfp4")
    assert not torch.equal(module(q, q, q, is_causal=True), plain)
    hbfp.revert_(model)
    assert torch.equal(module(q, q, q, is_causal=True), plain)


def test_a_layer_built_directly_is_adopted_and_given_back():
    layer = hbfp.nn.Linear(8, 8, recipe="hbfp8")
    model = nn.Sequential(layer, nn.Linear(8, 8))
    own = layer.hbfp_state
    hbfp.convert_(model, "hbfp4")
    assert widths(model) == {"0": 4, "1": 4}
    hbfp.revert_(model)
    assert layer.hbfp_state is own
    x = torch.randn(4, 8)
    step = own.root.step
    layer(x)
    layer.eval()(x)
    assert own.root.step == step + 1


def test_only_training_forwards_advance_the_step_and_copies_go_their_own_way():
    model = Late()
    hbfp.convert_(model, "emulator")
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(2, 8)
    model(x)
    model(x)
    model.eval()(x)
    assert model.first.hbfp_state.root.step == 2
    assert other.first.hbfp_state.root.step == 0
    other(x)
    assert {m.hbfp_state.root.step for m in (other.first, other.middle, other.last)} == {1}


def test_a_forward_replaced_on_an_instance_is_left_alone():
    """Its class may be exchanged as often as one likes: the instance's own forward is what is called."""

    class Plain(nn.Linear):
        pass

    model = nn.Sequential(Plain(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    for module in (model[0], model[2]):
        module.forward = lambda x: x
    report = hbfp.convert_(model, "hbfp4")
    assert list(formats(model)) == ["1"]
    assert [row.note for row in report.left] == ["its forward was replaced on the instance"] * 2


def test_a_subclass_is_converted_unless_something_would_be_lost():
    class Bare(nn.Linear):
        def __init__(self, features):
            super().__init__(features, features)
            self.features = features

    class Tagged(nn.Linear):
        tag = "read by the code around it"

    model = nn.Sequential(Bare(4), Tagged(4, 4))
    report = hbfp.convert_(model, "hbfp4")
    assert list(formats(model)) == ["0"]
    assert model[0].features == 4
    assert report.left[0].note == "subclass of Linear with its own tag"
    hbfp.revert_(model)
    assert type(model[0]) is Bare


def test_lists_and_dictionaries_of_modules_have_no_step_of_their_own():
    """Nobody calls their forward, which would count: the random bits would be the same at each step, in silence."""
    model = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.Linear(4, 4)])
    report = hbfp.convert_(model, "emulator")
    assert list(formats(model)) == ["0.a", "1"]
    assert "ModuleList has no forward that would count steps: call hbfp.set_step" in str(report)
    assert "set_step" not in str(hbfp.convert_(nn.Sequential(nn.Linear(4, 4)), "emulator"))


def test_parts_of_a_converted_model():
    model = nn.ModuleDict({"a": Late(), "b": nn.Linear(4, 4)})
    hbfp.convert_(model["a"], "hbfp6")
    with pytest.raises(hbfp.ConversionError, match=r"'a\.last' is converted already"):
        hbfp.convert_(model, "hbfp4")
    hbfp.convert_(model, "hbfp4", rules={"a": None})
    assert widths(model) == {"a.last": 6, "a.middle": 6, "a.first": 6, "b": 4}
    hbfp.revert_(model["a"])
    assert widths(model) == {"b": 4}
    assert type(model["a"].first) is nn.Linear
    hbfp.revert_(model)
    assert not widths(model)
    with pytest.raises(hbfp.ConversionError, match="nothing to take back"):
        hbfp.revert_(model)


def test_lazy_layers_with_a_shape_are_layers():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    model(torch.randn(2, 6))
    hbfp.convert_(model, "hbfp4")
    assert list(formats(model)) == ["0", "1"]
    hbfp.convert_(nn.Sequential(nn.LazyConv2d(3, 1), nn.Linear(4, 4)), "hbfp4", rules={"0": None})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_is_left_and_named():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    report = hbfp.convert_(model, "hbfp4")
    assert list(formats(model)) == ["1"]
    assert report.left[0].name == "0"
    with pytest.raises(hbfp.ConversionError, match="scripted"):
        hbfp.convert_(model[0], "hbfp4")


def test_a_named_tuple_of_example_inputs_is_one_argument():
    """A packed sequence is a tuple, whose parts are no arguments."""
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.recurrent = nn.Linear(4, 2), nn.LSTM(4, 4)

        def forward(self, sequences):
            return self.head(self.recurrent(sequences)[0].data)

    for inputs in (packed, (packed,), {"sequences": packed}):
        model = Tagger()
        report = hbfp.convert_(model, "booster", example_inputs=inputs)
        assert {row.name: str(row.position) for row in report.rows} == {"head": "last", "recurrent": "first"}


def test_layers_that_the_example_does_not_reach_are_named():
    model = Late()
    model.forward = lambda x: model.middle(model.first(x))
    report = hbfp.convert_(model, "booster", example_inputs=torch.randn(2, 8))
    assert widths(model) == {"first": 6, "middle": 6, "last": 4}
    assert "not reached by example_inputs: 'last'" in str(report)


def test_the_table_shows_products_and_backends_where_they_differ():
    model = Late()
    rules = {"last": {"input_gradient": hbfp.HBFP8, "weight_gradient": "reference"}}
    report = hbfp.convert_(model, "hbfp4", rules=rules)
    row = next(row for row in report.rows if row.name == "last")
    assert row.formats == "Y hbfp4b64, dX hbfp8b64, dW hbfp4b64"
    assert row.computed_by == "Y integer, dX integer, dW reference"
    assert "computed by" in str(report)
    assert "computed by" not in str(hbfp.convert_(Late(), "hbfp4"))


def test_a_rule_for_backends_leaves_the_widths_to_the_schedule():
    model = Late()
    rules = {"middle": {"weight_gradient": "reference"}, "last": {"forward": hbfp.HBFP8}}
    hbfp.convert_(model, "booster", rules=rules, first="first", last="middle")
    booster = hbfp.Booster(model, total_steps=10, last_fraction=0.5)
    state = model.middle.hbfp_state
    assert state.recipe.forward.bits == 6  # the last layer by name
    assert [model.last.hbfp_state.recipe.forward.bits, model.last.hbfp_state.recipe.input_gradient.bits] == [8, 4]
    booster.step(7)
    assert state.recipe.backends == ("integer", "integer", "reference")
    assert [model.last.hbfp_state.recipe.forward.bits, model.last.hbfp_state.recipe.input_gradient.bits] == [8, 4]


def test_a_model_under_torch_compile_computes_what_it_is_converted_to():
    """A graph that was compiled before conversion knows other classes and must not be used again."""
    model = Late().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 8)
    plain = compiled(x)
    hbfp.convert_(compiled, "hbfp4")
    assert list(compiled.state_dict()) == [f"_orig_mod.{name}" for name in Late().state_dict()]
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), plain)
    hbfp.revert_(compiled)
    assert torch.equal(compiled(x), plain)
