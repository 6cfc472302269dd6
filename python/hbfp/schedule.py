"""Accuracy Booster's schedule: when each layer computes at which width (Harma et al., arXiv 2211.10737).

The base width everywhere; the boosted width in the first and the last layer throughout, and in every layer in the last
epoch or epochs. All of it is one pure function of the step, so that a resumed run is where the uncut run was.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from hbfp.errors import ScheduleError
from hbfp.format import HBFP, HBFP4, HBFP6
from hbfp.policy import LayerState, Position, Recipe, layer_states, root_states

__all__ = ["PRESETS", "Booster", "Phase", "Preset", "set_step"]


def set_step(model: nn.Module, step: int) -> None:
    """Sets the step that random streams are drawn from, for recipes without a schedule.

    The converted model stops counting training forwards by itself.

    Raises:
        HBFPError: step is outside 0 … 2^32 − 1.
        ConversionError: the model has no converted layer.
    """
    for root in root_states(model):
        root.set_step(step)


_GEOMETRY = operator.attrgetter("block", "tile", "exponent_rule", "exponent_bits", "exponent_bias")
"""All of a format but its width."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps first … end − 1, in which inner layers compute in `format`."""

    first: int
    end: int
    format: HBFP
    boosted: bool


@dataclass(frozen=True, slots=True)
class Preset:
    """How long a published run was, and how much of its end was boosted; in epochs, or in steps."""

    about: str
    epochs: int | None = None
    last_epochs: int | None = None
    steps: int | None = None
    last_steps: int | None = None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "160-epochs": Preset("the last of 160 epochs", epochs=160, last_epochs=1),
        "90-epochs": Preset("epochs 86 to 90 of 90", epochs=90, last_epochs=5),
        "100k-steps": Preset("the last 1,000 of 100,000 steps", steps=100_000, last_steps=1_000),
    }
)
"""How long published runs (Harma et al., arXiv 2211.10737) were and which end of them was boosted, for
`Booster.preset`. Widths are Booster's own.
"""


class Booster:
    """Sets the widths of a converted model's layers by the step.

    How long the boosted end is, is said in one of three ways: in epochs, as a fraction, or in steps.

    Args:
        model: converted; layers whose width a rule named keep it.
        total_steps: steps of the whole run; the last ones are boosted, so it must be known.
        steps_per_epoch: steps of an epoch; `last_epochs` counts in these.
        last_epochs: boosted epochs at the end.
        last_fraction: boosted fraction of the steps at the end, in place of epochs.
        last_steps: boosted steps at the end, in place of epochs.
        base: format of inner layers before that.
        boost: format of the first and the last layer throughout, and of all at the end.

    A schedule changes widths: every operand of a layer takes the format, and keeps its rounding. Blocks and exponents
    are the recipe's to choose, so `base` and `boost` must have those that the model was converted with.

    Raises:
        ScheduleError: the total is unknown, the end is said in no way or in two, the boosted steps do not fit into the
            run, or `base` or `boost` differ from a layer's formats in more than width.
        ConversionError: the model has no converted layer.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        last_epochs: int = 1,
        *,
        last_fraction: float | None = None,
        last_steps: int | None = None,
        base: HBFP | str = HBFP4,
        boost: HBFP | str = HBFP6,
    ) -> None:
        if total_steps is None:
            raise ScheduleError(
                "total_steps is not known: give the number of steps of the whole run, as len(loader) * epochs, for the "
                "boosted steps are counted back from its end"
            )
        total = _whole("total_steps", total_steps, least=1)
        boosted = _boosted_steps(total, steps_per_epoch, last_epochs, last_fraction, last_steps)
        if boosted > total:
            raise ScheduleError(f"{boosted} boosted steps are more than the {total} steps of the run")
        root_states(model)  # raises for a model that was not converted
        self.model = model
        self.total_steps = total
        self.boosted_from = total - boosted
        self.base, self.boost = HBFP.parse(base), HBFP.parse(boost)
        self.current_step = 0
        self._recipes: dict[LayerState, tuple[Recipe, Recipe]] = {}
        self.step(0)

    @classmethod
    def preset(
        cls,
        name: str,
        model: nn.Module,
        steps_per_epoch: int | None = None,
        *,
        base: HBFP | str = HBFP4,
        boost: HBFP | str = HBFP6,
    ) -> Booster:
        """The schedule of a published run.

        Args:
            name: a key of `hbfp.schedule.PRESETS`.
            model, base, boost: as above.
            steps_per_epoch: of your data and batch, `len(loader)`; for runs that are counted in epochs.

        Raises:
            ScheduleError: no preset is called so; or `steps_per_epoch` is missing, or given to a run that is counted
                in steps.
        """
        preset = PRESETS.get(name)
        if preset is None:
            raise ScheduleError(f"unknown preset {name!r}: expected one of {', '.join(map(repr, PRESETS))}")
        if preset.epochs is None or preset.last_epochs is None:
            if steps_per_epoch is not None:
                raise ScheduleError(
                    f"the run {name!r} is counted in steps ({preset.about}); found steps_per_epoch={steps_per_epoch}: "
                    "leave it out"
                )
            return cls(model, preset.steps, last_steps=preset.last_steps, base=base, boost=boost)
        if steps_per_epoch is None:
            raise ScheduleError(
                f"the run {name!r} is counted in epochs ({preset.about}): give steps_per_epoch, as len(loader)"
            )
        steps_per_epoch = _whole("steps_per_epoch", steps_per_epoch, least=1)
        total = preset.epochs * steps_per_epoch
        return cls(model, total, steps_per_epoch, preset.last_epochs, base=base, boost=boost)

    def is_boosted(self, step: int) -> bool:
        """Whether all layers compute in the boosted format at `step`: from `boosted_from` on, half-open."""
        return step >= self.boosted_from

    def format_at(self, step: int, position: Position) -> HBFP:
        """Format of a layer at a step: the pure function that everything else here applies."""
        return self.boost if position is not Position.INNER or self.is_boosted(step) else self.base

    def step(self, global_step: int) -> None:
        """Sets the widths and the random streams for step `global_step`, counted from 0.

        Raises:
            ScheduleError: the step is no whole number, negative or beyond `total_steps`.
        """
        global_step = _whole("the step", global_step)
        if global_step > self.total_steps:
            raise ScheduleError(f"the step must be in 0…{self.total_steps}, the total given; found {global_step}")
        self.current_step = global_step
        for name, _, state in layer_states(self.model):
            if not state.pinned:
                if state not in self._recipes:
                    self._recipes[state] = self._widths(name, state.base)
                base, boost = self._recipes[state]
                state.recipe = boost if self.format_at(global_step, state.position) == self.boost else base
        set_step(self.model, global_step)

    def _widths(self, name: str, recipe: Recipe) -> tuple[Recipe, Recipe]:
        """A layer's recipe at the base and at the boosted width."""
        for policy in recipe.products.values():
            for found in policy.formats:
                for wanted in (self.base, self.boost):
                    if _GEOMETRY(found) != _GEOMETRY(wanted):
                        raise ScheduleError(
                            f"layer {name!r} was converted to {found}, from which the schedule's {wanted} differs in "
                            "more than width: convert with the blocks and exponents you want, and give base and boost "
                            "the same"
                        )
        return recipe.at(self.base), recipe.at(self.boost)

    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run, in order; empty ones are left out."""
        phases = (
            Phase(0, self.boosted_from, self.base, False),
            Phase(self.boosted_from, self.total_steps, self.boost, True),
        )
        return tuple(phase for phase in phases if phase.first < phase.end)

    def timeline(self, width: int = 60) -> str:
        """The schedule drawn in characters: one row for the ends, one for the layers between them, one of steps.

        `width` is that of the bar, at least 2. A phase that is there has one character or more, however short it is.
        """
        width = _whole("width", width, least=2)
        cut = round(width * self.boosted_from / self.total_steps)
        if 0 < self.boosted_from < self.total_steps:
            cut = min(max(cut, 1), width - 1)
        inner = "." * cut + "#" * (width - cut)
        formats = " then ".join(str(phase.format) for phase in self.phases())
        head = len("first, last  ")
        steps = "step"
        for step, column in {0: 0, self.boosted_from: cut, self.total_steps: width}.items():
            # Under its column, or as near behind the number before as can be read.
            steps = f"{steps:<{max(head + column, len(steps) + 1)}}{step}"
        return "\n".join(
            (
                f"{'first, last':<{head}}{'#' * width}  {self.boost}",
                f"{'all others':<{head}}{inner}  {formats}",
                steps,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the schedule's parameters, to be compared, and the step."""
        return {
            "total_steps": self.total_steps,
            "boosted_from": self.boosted_from,
            "base": str(self.base),
            "boost": str(self.boost),
            "step": self.current_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved step.

        Raises:
            ScheduleError: the state is of another schedule, or not of a schedule at all.
        """
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise ScheduleError(f"expected a state of hbfp.Booster; found one without {', '.join(missing)}")
        for key in ("total_steps", "boosted_from", "base", "boost"):
            if state[key] != own[key]:
                raise ScheduleError(f"{key}: expected {own[key]!r}, as this schedule has it; found {state[key]!r}")
        self.step(state["step"])


def _whole(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int: numpy's are welcome, floats and truth values are slips.

    Raises:
        ScheduleError: it is none, or below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ScheduleError(f"{name} must be a whole number, {least} or more; found {value!r}")
    return number


def _boosted_steps(
    total: int,
    steps_per_epoch: int | None,
    last_epochs: int,
    last_fraction: float | None,
    last_steps: int | None,
) -> int:
    """Steps of the boosted end, given in exactly one of the three ways."""
    ways = {"steps_per_epoch": steps_per_epoch, "last_fraction": last_fraction, "last_steps": last_steps}
    given = [f"{name}={value}" for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ScheduleError(
            "how long is the boosted end? Give one of steps_per_epoch (with last_epochs), last_fraction and "
            f"last_steps; found {' and '.join(given) or 'none'}"
        )
    if steps_per_epoch is not None:
        return _whole("steps_per_epoch", steps_per_epoch, least=1) * _whole("last_epochs", last_epochs)
    if last_fraction is not None:
        if not 0.0 <= last_fraction <= 1.0:
            raise ScheduleError(f"last_fraction must be in 0…1; found {last_fraction}")
        return round(total * last_fraction)
    return _whole("last_steps", last_steps)
