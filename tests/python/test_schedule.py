"""Booster's schedule and the step: pure functions, with half-open intervals."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402
from hbfp.schedule import PRESETS  # noqa: E402


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


def test_fractions_steps_and_phases():
    model = converted()
    booster = hbfp.Booster(model, total_steps=100_000, last_fraction=0.01)
    assert booster.boosted_from == 99_000
    assert [(p.first, p.end) for p in booster.phases()] == [(0, 99_000), (99_000, 100_000)]
    for fraction, boosted in ((0.0, 0), (0.04, 0), (0.29, 3), (0.31, 3), (1.0, 10)):  # the nearest number of steps
        assert hbfp.Booster(model, total_steps=10, last_fraction=fraction).boosted_from == 10 - boosted
    assert hbfp.Booster(model, total_steps=90, steps_per_epoch=1, last_epochs=5).boosted_from == 85
    for last_steps in (0, 1, 90):
        booster = hbfp.Booster(model, total_steps=90, last_steps=last_steps)
        assert [booster.is_boosted(step) for step in range(90)] == [step >= 90 - last_steps for step in range(90)]


@pytest.mark.parametrize(
    ("name", "steps_per_epoch", "total", "boosted_from"),
    [
        ("160-epochs", 391, 160 * 391, 159 * 391),
        ("90-epochs", 391, 90 * 391, 85 * 391),
        ("100k-steps", None, 100_000, 99_000),
    ],
)
def test_presets(name, steps_per_epoch, total, boosted_from):
    """Counting from 1, "epochs 86 to 90" begin with the step after the 85th epoch: an off-by-one loses an epoch."""
    model = converted()
    booster = hbfp.Booster.preset(name, model, steps_per_epoch=steps_per_epoch)
    assert (booster.total_steps, booster.boosted_from) == (total, boosted_from)
    booster.step(boosted_from - 1)
    assert widths(model) == [6, 4, 4, 6]
    booster.step(boosted_from)
    assert widths(model) == [6] * 4


def test_every_preset_is_a_schedule():
    for name, preset in PRESETS.items():
        booster = hbfp.Booster.preset(name, converted(), None if preset.epochs is None else 7)
        assert 0 < booster.boosted_from < booster.total_steps
        assert preset.about


def test_a_preset_takes_formats():
    model = converted("hbfp4b16")
    booster = hbfp.Booster.preset("90-epochs", model, 2, base="hbfp4b16", boost="hbfp8b16")
    booster.step(booster.boosted_from)
    assert widths(model) == [8] * 4


def test_presets_that_do_not_fit_are_refused():
    model = converted()
    with pytest.raises(hbfp.ScheduleError, match="'160-epochs', '90-epochs', '100k-steps'"):
        hbfp.Booster.preset("resnet50", model, 391)
    with pytest.raises(hbfp.ScheduleError, match="len\\(loader\\)"):
        hbfp.Booster.preset("160-epochs", model)
    with pytest.raises(hbfp.ScheduleError, match="counted in steps"):
        hbfp.Booster.preset("100k-steps", model, 391)


@pytest.mark.parametrize("width", [2, 3, 20, 60, 200])
@pytest.mark.parametrize("last_steps", [0, 1, 5, 50, 99, 100])
def test_timeline(width, last_steps):
    """A phase shorter than a character must not vanish, nor one that is not there appear."""
    booster = hbfp.Booster(converted(), total_steps=100, last_steps=last_steps)
    ends, inner, steps = booster.timeline(width).splitlines()
    head = len("first, last  ")
    assert ends == f"first, last  {'#' * width}  hbfp6b64"
    bar = inner[head : head + width]
    assert bar == "." * bar.count(".") + "#" * bar.count("#")
    assert ("." in bar, "#" in bar) == (last_steps < 100, last_steps > 0)
    formats = [format for format, share in (("hbfp4b64", 100 - last_steps), ("hbfp6b64", last_steps)) if share]
    assert inner[head + width :] == "  " + " then ".join(formats)
    assert [int(number) for number in steps.split()[1:]] == sorted({0, 100 - last_steps, 100})
    if width >= 20 and last_steps == 50:
        assert steps.index(f" {100 - last_steps} ") == head + bar.index("#") - 1


def test_the_timeline_of_the_readme_run():
    booster = hbfp.Booster(converted(), total_steps=20, steps_per_epoch=5)
    assert booster.timeline(20) == (
        "first, last  ####################  hbfp6b64\n"
        "all others   ...............#####  hbfp4b64 then hbfp6b64\n"
        "step         0              15   20"
    )
    with pytest.raises(hbfp.ScheduleError, match="width"):
        booster.timeline(1)


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
    with pytest.raises(hbfp.ScheduleError, match="boost: expected 'hbfp8b64'"):
        hbfp.Booster(other, 10, last_fraction=0.5, boost=hbfp.HBFP8).load_state_dict(booster.state_dict())
    for state in ({}, {**booster.state_dict(), "step": None}, {**booster.state_dict(), "step": 11}):
        with pytest.raises(hbfp.ScheduleError):
            resumed.load_state_dict(state)
    assert resumed.current_step == 7


def test_the_state_is_plain(tmp_path):
    """It goes into a checkpoint that is read by `weights_only=True`, and through JSON."""
    booster = hbfp.Booster.preset("90-epochs", converted(), np.int64(3))
    booster.step(np.int64(4))
    state = booster.state_dict()
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "schedule.pt")
    assert torch.load(tmp_path / "schedule.pt", weights_only=True) == state


@pytest.mark.parametrize("cut", [0, 3, 5, 6, 9, 10])
def test_a_run_cut_anywhere_and_resumed_has_the_bits_of_the_uncut_one(cut):
    """Weights, widths and random streams: a schedule that counted by itself would be a step off after the cut."""

    def fresh():
        torch.manual_seed(0)
        model = converted()
        return model, hbfp.Booster(model, total_steps=10, last_steps=4), torch.optim.SGD(model.parameters(), 0.5, 0.9)

    def train(model, booster, optimizer, steps):
        for step in steps:
            booster.step(step)
            optimizer.zero_grad()
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    uncut = fresh()
    train(*uncut, range(10))
    first = fresh()
    train(*first, range(cut))
    second = fresh()
    for ours, theirs in zip(second, first, strict=True):
        ours.load_state_dict(theirs.state_dict())
    assert second[1].current_step == first[1].current_step
    train(*second, range(cut, 10))
    for ours, theirs in zip(second[0].parameters(), uncut[0].parameters(), strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert widths(second[0]) == widths(uncut[0])


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": None, "steps_per_epoch": 5},
        {"total_steps": 10.0, "last_steps": 1},
        {"total_steps": True, "last_steps": 1},
        {"total_steps": 10, "last_steps": 1, "last_fraction": 0.1},
        {"total_steps": 10, "last_steps": 1, "steps_per_epoch": 2},
        {"total_steps": 10, "last_fraction": 0.1, "steps_per_epoch": 2},
        {"total_steps": 10, "last_steps": 11},
        {"total_steps": 10, "last_steps": -1},
        {"total_steps": 10, "last_steps": 2.5},
        {"total_steps": 10, "last_fraction": float("nan")},
        {"total_steps": 10, "steps_per_epoch": 390 / 128},
        {"total_steps": 10, "steps_per_epoch": 2, "last_epochs": -1},
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


def test_an_unknown_total_says_what_to_give():
    for options in ({}, {"last_steps": 5}, {"steps_per_epoch": 5}):
        with pytest.raises(hbfp.ScheduleError, match=r"total_steps is not known.*len\(loader\) \* epochs"):
            hbfp.Booster(converted(), **options)


def test_steps_outside_the_run_are_refused():
    booster = hbfp.Booster(converted(), total_steps=10, last_fraction=0.5)
    for step in (-1, 11, 1.0, None):
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
