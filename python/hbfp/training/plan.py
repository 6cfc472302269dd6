"""What a run does at each step: arithmetic, update rule, learning rate. Values, and pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from hbfp.errors import HBFPError

RECIPES = ("fp32", "hbfp4", "hbfp6", "hbfp8", "booster")

_BOOSTED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class AdamW:
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), as transformers are trained: gradients are clipped to norm 1."""

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        groups = _groups(model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=rate, betas=self.betas, fused=True)


@dataclass(frozen=True, slots=True)
class SGD:
    """Gradient descent with Nesterov's momentum, as residual networks are trained."""

    weight_decay: float = 1e-4
    momentum: float = 0.9
    clip: float | None = None

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        groups = _groups(model, self.weight_decay)
        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, nesterov=True, fused=True)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices and kernels; none on biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@dataclass(frozen=True, slots=True)
class Cosine:
    """A linear warm-up over a twentieth of the steps, then a cosine to a tenth."""

    def rate(self, peak: float, step: int, steps: int) -> float:
        """Learning rate of a step."""
        warmup = max(1, steps // 20)
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return peak * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Drops:
    """A tenth of the rate from each of the steps `at` on; before `warmup`, a straight climb from `start` to the peak.

    The climb is that of Goyal et al. 2017 (arXiv 1706.02677), from one worker's rate to that of all.
    """

    at: tuple[int, ...]
    warmup: int = 0
    start: float = 0.0

    def rate(self, peak: float, step: int, steps: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            peak = self.start + (peak - self.start) * step / self.warmup
        return float(peak / 10 ** sum(step >= drop for drop in self.at))


Update: TypeAlias = AdamW | SGD
Schedule: TypeAlias = Cosine | Drops


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run depends on besides model and data."""

    recipe: str
    steps: int
    learning_rate: float = 1e-3
    seed: int = 0
    boosted: int | None = None
    """Booster only: how many steps at the end every layer spends in the wider format; None: a tenth of them."""
    update: Update = AdamW()
    schedule: Schedule = Cosine()

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise HBFPError(f"no recipe {self.recipe!r}; known: {', '.join(RECIPES)}")
        if self.steps < 1:
            raise HBFPError(f"a run has at least one step, not {self.steps}")
        if not 0 < self.learning_rate < math.inf:
            raise HBFPError(f"the learning rate is a positive number, not {self.learning_rate}")
        if not 0 <= self.seed < 2**64:
            raise HBFPError(f"the seed is an unsigned 64-bit number, not {self.seed}")
        if not 0 <= self.boosted_steps <= self.steps:
            raise HBFPError(f"of {self.steps} steps, 0 to {self.steps} can be boosted, not {self.boosted}")

    @property
    def boosted_steps(self) -> int:
        return round(self.steps * _BOOSTED_SHARE) if self.boosted is None else self.boosted

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.schedule.rate(self.learning_rate, step, self.steps)
