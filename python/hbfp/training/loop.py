"""One training step, told once; the loop around it, and checkpoints that resume to the bit.

A run is a pure function of its plan: learning rate, batch, phase and random bits each follow from the step's number.
So a checkpoint needs no generator's state, and a run cut anywhere and resumed ends in the bits of the uncut one.
"""

import contextlib
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor, nn

from hbfp.errors import FileError, HBFPError
from hbfp.nn.conversion import convert_
from hbfp.optim import wide_weights
from hbfp.schedule import Booster, set_step
from hbfp.training.data import Batch, Data

RECIPES = ("fp32", "hbfp4", "hbfp6", "hbfp8", "booster")
CHECKPOINT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run of AdamW depends on besides model and data."""

    recipe: str
    steps: int
    learning_rate: float = 1e-3
    seed: int = 0
    last_fraction: float = 0.1
    """Booster only: the share of the steps at the end that every layer spends in the wider format."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise HBFPError(f"no recipe {self.recipe!r}; known: {', '.join(RECIPES)}")
        if self.steps < 1:
            raise HBFPError(f"a run has at least one step, not {self.steps}")
        if not 0 < self.learning_rate < math.inf:
            raise HBFPError(f"the learning rate is a positive number, not {self.learning_rate}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Score:
    """Mean cross-entropy (nats) and the share of right answers over a validation set."""

    loss: float
    accuracy: float


class Run:
    """A model in training: converted by the plan's recipe, its optimizer, and how far it is.

    `example` is a batch's inputs: the forward pass over it tells which layers come first and last.
    """

    def __init__(self, model: nn.Module, plan: Plan, example: Tensor) -> None:
        self.model = model
        self.plan = plan
        self.step = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.torn = False
        """True while the optimizer writes: only then would a checkpoint hold half a step."""
        self.booster: Booster | None = None
        if plan.recipe != "fp32":
            convert_(model, plan.recipe, example_inputs=(example,), seed=plan.seed)
        if plan.recipe == "booster":
            self.booster = Booster(model, total_steps=plan.steps, last_fraction=plan.last_fraction)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True)
        if plan.recipe != "fp32":
            wide_weights(self.optimizer, model)
        self.enter(0)

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps

    @property
    def boosted_from(self) -> int:
        """The first step of Booster's last phase; the number of steps where there is none."""
        return self.plan.steps if self.booster is None else self.booster.boosted_from

    @property
    def phase(self) -> str:
        """What the last step was done in."""
        if self.booster is None:
            return self.plan.recipe
        return "boosted" if self.step > self.boosted_from else "base"

    def enter(self, step: int) -> None:
        """Set the formats and the random streams of a step."""
        if self.booster is not None:
            self.booster.step(step)
        elif self.plan.recipe != "fp32":
            set_step(self.model, step)

    def advance(self, batch: Batch) -> float:
        """One step: forward, backward, clip, update. Returns the batch's loss; its time goes to `seconds`."""
        inputs, targets = batch
        self.enter(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.model.train()
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(self.model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.torn = True
        self.optimizer.step()
        value = loss.item()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(value)
        self.step += 1
        self.torn = False
        if not math.isfinite(value):
            raise HBFPError(f"the loss of step {self.step - 1} is {value}; start again with a smaller learning rate")
        return value

    def evaluate(self, batches: list[Batch]) -> Score:
        """Score on a validation set, in the formats in force (after the last step: the final phase's)."""
        return grade(self.outputs(batches), batches)

    @torch.no_grad()
    def outputs(self, batches: list[Batch]) -> list[Tensor]:
        """The model's output for each batch, in evaluation mode."""
        self.model.eval()
        return [self.model(inputs) for inputs, _ in batches]

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.losses = list(state["losses"])
        self.enter(max(0, min(self.step, self.plan.steps) - 1))


def grade(outputs: list[Tensor], batches: list[Batch]) -> Score:
    """Loss and accuracy of a model's outputs for `batches`."""
    loss, right, count = 0.0, 0, 0
    for scores, (_, targets) in zip(outputs, batches, strict=True):
        loss += cross_entropy(scores, targets).item() * targets.numel()
        right += int((scores.argmax(-1) == targets).sum())
        count += targets.numel()
    return Score(loss / count, right / count)


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean over every leading dimension, in nats."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


def train(
    run: Run,
    data: Data,
    checkpoint: Path,
    *,
    every: int,
    settings: dict[str, Any],
    report: Callable[[Run], None] = lambda run: None,
) -> None:
    """Run to the plan's last step, saving a checkpoint every `every` steps and at the end.

    `settings` is stored beside the state (plain values), `report` is called after each step. On Ctrl-C the step under
    way is finished, the state saved, and KeyboardInterrupt raised; a second Ctrl-C does not wait for the step.
    """
    try:
        with deferred_interrupt() as interrupted:
            while not run.done:
                run.advance(data.batch(run.plan.seed, run.step))
                report(run)
                if interrupted():
                    raise KeyboardInterrupt
                if run.step % every == 0:
                    save_checkpoint(checkpoint, run, settings)
        save_checkpoint(checkpoint, run, settings)
    except KeyboardInterrupt:
        if not run.torn:
            save_checkpoint(checkpoint, run, settings)
        raise


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is noted (the value asked for tells) and the second raises as usual."""
    noted = False
    # Only the main thread is given signals; and who started us in the background asked that Ctrl-C be ignored.
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield lambda: noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def save_checkpoint(path: Path, run: Run, settings: dict[str, Any]) -> None:
    """State and settings, of types that `torch.load(weights_only=True)` reads; the old file stands until then."""
    content = {"version": CHECKPOINT_VERSION, "settings": settings, **run.state_dict()}
    with replacing(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote. Raises FileError for anything else; runs no code from the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileError(f"no checkpoint at {path}; leave out --resume to start a run there") from error
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise FileError(
            f"{path} is not a checkpoint of `hbfp train`: torch cannot load it ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("version") != CHECKPOINT_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise FileError(f"{path}: expected a checkpoint of version {CHECKPOINT_VERSION}, found {found}")
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place, at once, when all is written; on an error `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
