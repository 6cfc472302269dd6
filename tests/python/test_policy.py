"""Recipes, rules and streams: read once, refused by name, and nothing decided by accident.

The bugs these hunt: a rule that matches nothing and says nothing, a `None` that does not skip, two operands whose
blocks cannot meet, two call sites that share random bits.
"""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import reference  # noqa: E402
from hbfp.autograd import Role  # noqa: E402
from hbfp.policy import MatmulPolicy, OperandPolicy, RootState, parse_rules, stream  # noqa: E402

BASE = hbfp.recipe("hbfp4")
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
STOCHASTIC = (OperandPolicy(hbfp.HBFP4, "stochastic"), OperandPolicy(hbfp.HBFP4, "stochastic"))


def test_default_rounds_gradients_stochastically_and_nothing_else():
    for name in ("hbfp4", "hbfp6", "hbfp8", "booster"):
        recipe = hbfp.recipe(name)
        assert recipe.forward.roundings == (0, 0)
        assert recipe.input_gradient.roundings == recipe.weight_gradient.roundings == (3, 0)


def test_the_emulators_recipe():
    recipe = hbfp.recipe("emulator")
    assert recipe.formats == "hbfp4b64-ceil"
    assert all(policy.roundings == (3, 3) for policy in recipe.products.values())


def test_formats_are_recipes_too():
    assert hbfp.recipe("hbfp6b16") == hbfp.recipe(hbfp.HBFP(6, 16))
    assert hbfp.recipe("hbfp6b64") == hbfp.recipe("hbfp6")
    assert hbfp.recipe(BASE) is BASE


def test_frozen_copied_and_pickled():
    recipe = replace(BASE, backend="reference")
    with pytest.raises(FrozenInstanceError):
        recipe.backend = "integer"
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(recipe) != hash(BASE)


def test_blocks_that_cannot_meet_are_refused():
    with pytest.raises(hbfp.FormatError, match="cut alike"):
        MatmulPolicy(OperandPolicy(hbfp.HBFP4), OperandPolicy(hbfp.HBFP(4, 16)))
    mixed = MatmulPolicy(OperandPolicy(hbfp.HBFP4), OperandPolicy(hbfp.HBFP6))
    assert mixed.bits == 6


@pytest.mark.parametrize("change", [{"backend": "gpu"}, {"wide_weights": 17}, {"boost": "int6"}])
def test_recipes_are_checked(change):
    with pytest.raises(hbfp.HBFPError):
        replace(BASE, **change)


def test_a_pattern_covers_what_is_inside():
    (rule,) = parse_rules({"blocks.1": None}, BASE)
    assert rule.covers("blocks.1.mlp.up")
    assert not rule.covers("blocks.10")
    assert not rule.covers("blocks")
    (rule,) = parse_rules({"re:blocks[.][02]": hbfp.HBFP6}, BASE)
    assert rule.covers("blocks.0.up")
    assert not rule.covers("blocks.1")


def test_values_of_rules():
    rules = parse_rules({"a": hbfp.HBFP6, "b": "hbfp8", "c": "booster", "d": None, "e": "hbfp6b16"}, BASE)
    assert [str(rule.recipe) for rule in rules] == ["hbfp6b64", "hbfp8", "booster", "None", "hbfp6b16"]
    assert [rule.pinned for rule in rules] == [True, True, False, False, True]
    emulated = parse_rules({"a": hbfp.HBFP6}, hbfp.recipe("emulator"))
    assert emulated[0].recipe.forward.roundings == (3, 3)  # a format changes formats


def test_a_recipe_product_by_product():
    """Formats keep roundings, pairs of operands bring theirs, and a backend keeps both."""
    stochastic = OperandPolicy(hbfp.HBFP6, "stochastic")
    recipe = hbfp.recipe(
        "hbfp4",
        forward="hbfp6b64",
        input_gradient=(hbfp.HBFP8, "hbfp6b64"),
        weight_gradient="emulate",
    )
    assert recipe.forward == BASE.forward.at(hbfp.HBFP6)
    assert recipe.input_gradient.formats == (hbfp.HBFP8, hbfp.HBFP6)
    assert recipe.input_gradient.roundings == (3, 0)
    assert recipe.weight_gradient == replace(BASE.weight_gradient, backend="emulate")
    assert recipe.backends == ("integer", "integer", "emulate")
    assert recipe.formats == "Y hbfp6b64, dX hbfp8b64×hbfp6b64, dW hbfp4b64"
    assert hbfp.recipe("hbfp4", forward=(stochastic, stochastic)).forward.roundings == (3, 3)
    policy = MatmulPolicy(stochastic, stochastic, "reference")
    assert hbfp.recipe("hbfp4", forward=policy).forward is policy
    assert hbfp.recipe("hbfp4", backend="emulate", forward="reference").backends == ("reference", "emulate", "emulate")
    assert recipe.at("hbfp8b64").backends == recipe.backends
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe
    assert pickle.loads(pickle.dumps(recipe)).backends == recipe.backends
    assert hash(recipe) != hash(hbfp.recipe("hbfp4"))


@pytest.mark.parametrize("name", ["hbfp4", "hbfp6", "hbfp8", "booster", "emulator", "hbfp6b16"])
def test_a_recipe_with_a_name_prints_it(name):
    recipe = hbfp.recipe(name)
    assert str(recipe) == name
    assert repr(recipe) == f"hbfp.recipe({name!r})"
    assert hbfp.recipe(str(recipe)) == recipe


def test_other_recipes_print_product_by_product():
    recipe = hbfp.recipe("booster", forward="hbfp6b64", input_gradient=("hbfp8b64", "hbfp6b64"), backend="emulate")
    recipe = replace(recipe, weight_gradient=replace(recipe.forward, backend="reference"), wide_weights=16)
    assert str(recipe) == (
        "Y hbfp6b64 nearest_even, dX hbfp8b64 stochastic × hbfp6b64 nearest_even, "
        "dW hbfp6b64 nearest_even by reference, first and last layer hbfp6b64, wide weights of 16 bits, backend emulate"
    )
    assert repr(recipe) == f"<Recipe 'custom': {recipe}>"


def test_recipes_that_differ_print_differently():
    """A rounding, a backend or a width that is not shown; a name that outlives what it named."""
    changes = [
        *({product: value} for product in PRODUCTS for value in ("hbfp6b64", "integer", "emulate", STOCHASTIC)),
        {},
        {"backend": "emulate"},
        {"backend": "emulate", "forward": "emulate"},
    ]
    found = [hbfp.recipe(base, **change) for base in ("hbfp4", "booster", "emulator") for change in changes]
    found += [replace(recipe, wide_weights=16) for recipe in found]
    found.append(replace(BASE, backend="reference"))  # still called hbfp4
    found.append(parse_rules({"a": "hbfp6b64"}, BASE)[0].recipe)
    found.append(parse_rules({"a": hbfp.HBFP6}, hbfp.recipe("emulator"))[0].recipe)  # of the same name
    assert len({str(recipe) for recipe in found}) == len({repr(recipe) for recipe in found}) == len(set(found))
    assert len(set(found)) > 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forwards": hbfp.HBFP4}, "unknown part 'forwards' of a recipe: expected 'forward'"),
        ({"forward": None}, "forward: None keeps whole modules in FP32"),
        ({"forward": "int4"}, "forward: .*int4"),
        ({"forward": (hbfp.HBFP4,)}, "forward: expected a format, a backend, a pair"),
        ({"forward": 4}, "forward: expected a format, a backend, a pair"),
        ({"weight_gradient": (hbfp.HBFP4, "hbfp4b16")}, "weight_gradient: .*cut alike"),
        ({"backend": "gpu"}, "unknown backend 'gpu': expected one of 'integer'"),
    ],
)
def test_products_that_cannot_be_read(changes, message):
    with pytest.raises(hbfp.HBFPError, match=message):
        hbfp.recipe("hbfp4", **changes)
    with pytest.raises(hbfp.RuleError, match=f"rule 'a': {message}"):
        parse_rules({"a": changes}, BASE)


def test_a_product_with_an_unknown_backend():
    with pytest.raises(hbfp.HBFPError, match="unknown backend 'gpu'"):
        replace(BASE.forward, backend="gpu")


def test_rules_product_by_product():
    """A mapping changes the recipe of the conversion; who only names backends leaves widths to the schedule."""
    booster = hbfp.recipe("booster")
    rules = parse_rules(
        {"a": {"forward": hbfp.HBFP8}, "b": {"forward": "reference"}, "c": {"backend": "emulate"}, "d": {}}, booster
    )
    assert [rule.pinned for rule in rules] == [True, False, False, False]
    assert [rule.recipe.boost for rule in rules] == [None, hbfp.HBFP6, hbfp.HBFP6, hbfp.HBFP6]
    assert rules[0].recipe.forward.formats == (hbfp.HBFP8, hbfp.HBFP8)
    assert rules[0].recipe.weight_gradient == booster.weight_gradient
    assert rules[2].recipe.backends == ("emulate",) * 3


@pytest.mark.parametrize("rules", [{"a": "int4"}, {"re:(": None}, {3: None}])
def test_rules_that_cannot_be_read(rules):
    with pytest.raises(hbfp.RuleError):
        parse_rules(rules, BASE)


@pytest.mark.parametrize("parts", [(0, 0, 0, 0), (1, 2, 3, 4), (2**32 - 1, 2**20 - 1, 255, 15), (0, 0, 257, 1)])
def test_streams_are_those_of_the_oracle(parts):
    assert stream(*parts) == reference.stream_number(*parts)


@pytest.mark.parametrize("parts", [(2**32, 0), (-1, 0), (0, 2**20), (0, 0, 0, 16)])
def test_parts_that_do_not_fit_a_stream(parts):
    with pytest.raises(hbfp.HBFPError, match="must be in"):
        stream(*parts)


def test_every_role_is_its_own():
    assert sorted(Role) == list(range(16))


def test_the_step_wraps_and_a_set_step_stays():
    root = RootState(step=2**32 - 1)
    root.advance()
    assert root.step == 0
    root.set_step(5)
    root.advance()
    assert root.step == 5
    with pytest.raises(hbfp.HBFPError, match="step"):
        root.set_step(2**32)
