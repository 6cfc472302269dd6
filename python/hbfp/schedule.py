"""Accuracy Booster's schedule: when each layer computes at which width (Harma et al., arXiv 2211.10737).

The base width everywhere; the boosted width in the first and the last layer throughout, and in every layer in the last
epoch or epochs. All of it is one pure function of the step, so that a resumed run is where the uncut run was.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from hbfp.errors import ScheduleError
from hbfp.format import HBFP, HBFP4, HBFP6
from hbfp.policy import LayerState, Position, Recipe, layer_states, root_states

__all__ = ["Booster", "Phase", "set_step"]


def set_step(model: nn.Module, step: int) -> None:
    """Sets the step that random streams are drawn from, for recipes without a schedule.

    The converted model stops counting training forwards by itself.

    Raises:
        HBFPError: step is outside 0 … 2^32 − 1.
        ConversionError: the model has no converted layer.
    """
    for root in root_states(model):
        root.set_step(step)


_GEOMETRY = attrgetter("block", "tile", "exponent_rule", "exponent_bits", "exponent_bias")
"""All of a format but its width."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps first … end − 1, in which inner layers compute in `format`."""

    first: int
    end: int
    format: HBFP
    boosted: bool


class Booster:
    """Sets the widths of a converted model's layers by the step.

    Args:
        model: converted; layers whose width a rule named keep it.
        total_steps: steps of the whole run; the last ones are boosted, so it must be known.
        steps_per_epoch: steps of an epoch; `last_epochs` counts in these.
        last_epochs: boosted epochs at the end.
        last_fraction: boosted fraction of the steps at the end, in place of epochs.
        base: format of inner layers before that.
        boost: format of the first and the last layer throughout, and of all at the end.

    A schedule changes widths: every operand of a layer takes the format, and keeps its rounding. Blocks and exponents
    are the recipe's to choose, so `base` and `boost` must have those that the model was converted with.

    Raises:
        ScheduleError: the total is unknown, the boosted steps do not fit into it, or `base` or `boost` differ from a
            layer's formats in more than width.
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
        base: HBFP | str = HBFP4,
        boost: HBFP | str = HBFP6,
    ) -> None:
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ScheduleError(
                f"total_steps must be the number of steps of the whole run; found {total_steps!r}: the boosted steps "
                "are counted back from its end"
            )
        if last_fraction is not None:
            if not 0.0 <= last_fraction <= 1.0:
                raise ScheduleError(f"last_fraction must be in 0…1; found {last_fraction}")
            boosted = round(total_steps * last_fraction)
        elif steps_per_epoch is not None:
            if steps_per_epoch < 1 or last_epochs < 0:
                raise ScheduleError(
                    f"an epoch has a step or more and epochs are not negative; found "
                    f"steps_per_epoch={steps_per_epoch}, last_epochs={last_epochs}"
                )
            boosted = steps_per_epoch * last_epochs
        else:
            raise ScheduleError(
                "give steps_per_epoch (with last_epochs), or last_fraction: how long is the boosted end?"
            )
        if boosted > total_steps:
            raise ScheduleError(f"{boosted} boosted steps are more than the {total_steps} steps of the run")
        root_states(model)  # raises for a model that was not converted
        self.model = model
        self.total_steps = total_steps
        self.boosted_from = total_steps - boosted
        self.base, self.boost = HBFP.parse(base), HBFP.parse(boost)
        self.current_step = 0
        self._recipes: dict[LayerState, tuple[Recipe, Recipe]] = {}
        self.step(0)

    def is_boosted(self, step: int) -> bool:
        """Whether all layers compute in the boosted format at `step`: from `boosted_from` on, half-open."""
        return step >= self.boosted_from

    def format_at(self, step: int, position: Position) -> HBFP:
        """Format of a layer at a step: the pure function that everything else here applies."""
        return self.boost if position is not Position.INNER or self.is_boosted(step) else self.base

    def step(self, global_step: int) -> None:
        """Sets the widths and the random streams for step `global_step`, counted from 0.

        Raises:
            ScheduleError: the step is negative or beyond `total_steps`.
        """
        if not 0 <= global_step <= self.total_steps:
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
        """The schedule drawn in characters: one row for the ends, one for the layers between them."""
        cut = round(width * self.boosted_from / self.total_steps)
        if 0 < self.boosted_from < self.total_steps:
            cut = min(max(cut, 1), width - 1)
        label = "first, last  "
        inner = "all others   "
        change = f"{self.base} until step {self.boosted_from}, then {self.boost}"
        return "\n".join(
            (
                f"{label}{'#' * width}  {self.boost}",
                f"{inner}{'.' * cut}{'#' * (width - cut)}  {change}",
                f"{'step':<{len(label)}}0{self.total_steps:>{width - 1}}",
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
            ScheduleError: the state is of another schedule.
        """
        own = self.state_dict()
        for key in ("total_steps", "boosted_from", "base", "boost"):
            if state.get(key) != own[key]:
                raise ScheduleError(f"{key}: expected {own[key]!r}, as this schedule has it; found {state.get(key)!r}")
        self.step(int(state["step"]))
