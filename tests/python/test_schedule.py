"""Booster's schedule and the step: pure functions, with half-open intervals."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402


def converted(recipe="booster", **options):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    hbfp.convert_(model, recipe, example_inputs=torch.randn(2, 8), **options)
    return model


def widths(model):
    return [m.hbfp_state.recipe.forward.left.format.bits for m in model]


def test_the_last_epoch_begins_at_its_first_step():
    model = converted()
    booster = hbfp.Booster(model, total_steps=1600, steps_per_epoch=10)
    for step, expected in ((0, [6, 4, 4, 6]), (1589, [6, 4, 4, 6]), (1590, [6] * 4), (1599, [6] * 4)):
        booster.step(step)
        assert widths(model) == expected, step
        assert model[0].hbfp_state.root.step == step
    booster.step(3)  # back again: nothing is remembered
    assert widths(model) == [6, 4, 4, 6]


def test_fraction_presets_and_timeline():
    model = converted()
    booster = hbfp.Booster(model, total_steps=100_000, last_fraction=0.01)
    assert booster.boosted_from == 99_000
    assert [(p.first, p.end) for p in booster.phases()] == [(0, 99_000), (99_000, 100_000)]
    assert "99000" in booster.timeline()
    assert hbfp.Booster(model, total_steps=90, steps_per_epoch=1, last_epochs=5).boosted_from == 85


def test_a_rule_pins_a_width():
    model = converted(rules={"1": hbfp.HBFP8})
    booster = hbfp.Booster(model, total_steps=10, last_fraction=0.5)
    booster.step(9)
    assert widths(model) == [6, 8, 6, 6]


def test_resuming():
    model, other = converted(), converted()
    booster = hbfp.Booster(model, total_steps=10, last_fraction=0.5)
    booster.step(7)
    resumed = hbfp.Booster(other, total_steps=10, last_fraction=0.5)
    resumed.load_state_dict(booster.state_dict())
    assert widths(other) == widths(model)
    assert resumed.current_step == 7
    with pytest.raises(hbfp.ScheduleError, match="total_steps"):
        hbfp.Booster(other, total_steps=11, last_fraction=0.5).load_state_dict(booster.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": None, "steps_per_epoch": 5},
        {"total_steps": 0, "last_fraction": 0.1},
        {"total_steps": 10},
        {"total_steps": 10, "last_fraction": 1.5},
        {"total_steps": 10, "steps_per_epoch": 20},
        {"total_steps": 10, "steps_per_epoch": 0},
    ],
)
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(hbfp.ScheduleError):
        hbfp.Booster(converted(), **options)


def test_steps_outside_the_run_are_refused():
    booster = hbfp.Booster(converted(), total_steps=10, last_fraction=0.5)
    for step in (-1, 11):
        with pytest.raises(hbfp.ScheduleError):
            booster.step(step)
    with pytest.raises(hbfp.ConversionError):
        hbfp.Booster(nn.Linear(2, 2), total_steps=10, last_fraction=0.5)


@pytest.mark.parametrize("recipe", ["emulator", "hbfp4b16", "hbfp4t8"])
def test_a_schedule_changes_widths_and_nothing_else(recipe):
    """The defaults, in blocks of 64 under max_exponent, must not replace blocks and exponents that the user chose."""
    model = converted(recipe)
    with pytest.raises(hbfp.ScheduleError, match="more than width"):
        hbfp.Booster(model, total_steps=10, last_fraction=0.5)
    wider = hbfp.recipe(recipe).formats.replace("hbfp4", "hbfp6")
    booster = hbfp.Booster(model, total_steps=10, last_fraction=0.5, base=hbfp.recipe(recipe).formats, boost=wider)
    booster.step(9)
    assert {m.hbfp_state.recipe.formats for m in model} == {wider}
    assert model[1].hbfp_state.recipe.forward.roundings == hbfp.recipe(recipe).forward.roundings


def test_two_schedules_of_one_model_do_not_remember():
    model = converted()
    first, second = (hbfp.Booster(model, total_steps=10, last_fraction=0.5) for _ in range(2))
    second.step(9)
    first.step(0)
    assert widths(model) == [6, 4, 4, 6]
