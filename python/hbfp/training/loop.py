"""One training step, told once; the loop around it, and checkpoints that resume to the bit.

A run is a pure function of its plan: learning rate, batch, phase and random bits each follow from the step's number.
So a checkpoint needs no generator's state, and a run cut anywhere and resumed ends in the bits of the uncut one.
"""

import contextlib
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from hbfp.errors import FileError, HBFPError
from hbfp.files import replacing as whole
from hbfp.nn.conversion import convert_
from hbfp.optim import wide_weights
from hbfp.policy import layer_states
from hbfp.schedule import Booster, set_step
from hbfp.training.data import Batch, Data
from hbfp.training.plan import Plan
from hbfp.training.processes import ALONE, LostProcess, Processes
from hbfp.training.stopping import SIGNALS, deferred_interrupt

CHECKPOINT_VERSION = 3


@dataclass(frozen=True, slots=True)
class Score:
    """Mean cross-entropy (nats) and the share of right answers over a validation set."""

    loss: float
    accuracy: float


class Run:
    """A model in training: converted by the plan's recipe, its optimizer, and how far it is.

    `example` is a batch's inputs: the forward pass over it tells which layers come first and last. With several
    `processes` each has a run of the same model and plan, and they advance together.
    """

    def __init__(self, model: nn.Module, plan: Plan, example: Tensor, processes: Processes = ALONE) -> None:
        self.model = model
        self.plan = plan
        self.processes = processes
        self.step = 0
        self.losses: list[float] = []
        self.validations: list[tuple[int, float, float]] = []
        """Steps done, loss and accuracy, each time that the run was validated."""
        self.seconds: list[float] = []
        """Of the steps since this process began."""
        self.torn = False
        """True while the optimizer writes: only then would a checkpoint hold half a step."""
        self.booster: Booster | None = None
        if plan.recipe != "fp32":
            # Each process draws bits of its own for its rows, so that their rounding averages out, too.
            convert_(model, plan.recipe, example_inputs=(example,), seed=(plan.seed + processes.rank) % 2**64)
        if plan.recipe == "booster":
            # Epochs of one step: the plan counts in steps.
            self.booster = Booster(model, plan.steps, last_steps=plan.boosted_steps)
        self.optimizer = plan.update.optimizer(model, plan.learning_rate)
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
        """One step: forward, backward, update. Returns the batch's loss; its time goes to `seconds`.

        Of several processes each is given the whole batch.
        """
        inputs, targets = self.processes.part(batch)
        self.enter(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.model.train()
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with _buffers_kept(self.model):
            loss = cross_entropy(self.model(inputs), targets)
            loss.backward()
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            mean = loss.detach()
            self.processes.average([*gradients, mean])
        if self.plan.update.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.update.clip)
        self.torn = True
        self.optimizer.step()
        value = mean.item()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(value)
        self.step += 1
        self.torn = False
        if not math.isfinite(value):
            raise HBFPError(f"the loss of step {self.step - 1} is {value}; start again with a smaller learning rate")
        return value

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Score:
        """Score on a validation set, in the formats in force (after the last step: the final phase's)."""
        self.model.eval()
        return grade((self.model(inputs), targets) for inputs, targets in batches)

    def validate(self, batches: Iterable[Batch]) -> Score:
        """Evaluate, and remember the score in `validations`."""
        score = self.evaluate(batches)
        self.validations.append((self.step, score.loss, score.accuracy))
        return score

    def due(self, every: int | None) -> bool:
        """Whether a validation each `every` steps and at the end is due now and was not done yet."""
        if every is None or not (self.done or (self.step and self.step % every == 0)):
            return False
        return not self.validations or self.validations[-1][0] != self.step

    @torch.no_grad()
    def outputs(self, batches: Iterable[Batch]) -> list[Tensor]:
        """The model's output for each batch, in evaluation mode."""
        self.model.eval()
        return [self.model(inputs) for inputs, _ in batches]

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "validations": self.validations,
            "formats": formats_of(self.model),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.losses = list(state["losses"])
        self.validations = [tuple(validation) for validation in state["validations"]]
        self.enter(max(0, min(self.step, self.plan.steps) - 1))


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """On an error buffers are what they were: a norm that has counted a batch would count it again once resumed."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise


def formats_of(model: nn.Module) -> dict[str, str]:
    """The format of each converted layer's forward product, as it is now; empty for a model in FP32."""
    return {name: str(state.recipe.forward.right.format) for name, _, state in layer_states(model)}


def grade(answers: Iterable[Batch]) -> Score:
    """Loss and accuracy of scores, each with its target classes."""
    loss, right, count = 0.0, 0, 0
    for scores, targets in answers:
        loss += cross_entropy(scores, targets).item() * targets.numel()
        right += int((scores.argmax(-1) == targets).sum())
        count += targets.numel()
    return Score(loss / count, right / count)


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean over every leading dimension, in nats."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


class Observer:
    """What is told how a run gets on. Here, each method does nothing."""

    def stepped(self, run: Run) -> None:
        """A step is done."""

    def validated(self, run: Run) -> None:
        """The last of `run.validations` is new."""

    def saving(self, run: Run) -> None:
        """A checkpoint is about to be written: what the observer holds back would be missing after a resumption."""


def train(
    run: Run,
    data: Data,
    checkpoint: Path,
    *,
    every: int,
    settings: dict[str, Any],
    validate_every: int | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """Run to the plan's last step, saving a checkpoint before the first step, every `every` steps and at the end.

    `settings` is stored beside the state (plain values). With `validate_every`, the run is validated every so many
    steps and at the end. On Ctrl-C the step under way is finished, the state saved, and KeyboardInterrupt raised; on
    SIGTERM likewise Terminated, which is one. A second signal does not wait for the step. Of several processes the
    first validates and saves, and all stop after the same step if one is told to.
    """

    def save() -> None:
        for observer in observers:
            observer.saving(run)
        save_checkpoint(checkpoint, run, settings)

    leads = run.processes.leads
    changed = run.step == 0
    try:
        with deferred_interrupt() as interrupted:
            while True:
                if leads and run.due(validate_every):
                    with contextlib.suppress(_Interrupted):
                        run.validate(_until(interrupted, data.validation()))
                        changed = True
                        for observer in observers:
                            observer.validated(run)
                if stop := run.processes.highest(interrupted()):
                    raise SIGNALS[stop]
                if leads and changed and (run.done or run.step % every == 0):
                    save()
                if run.done:
                    return
                run.advance(data.batch(run.plan.seed, run.step))
                changed = True
                for observer in observers:
                    observer.stepped(run)
    except (KeyboardInterrupt, LostProcess):
        if leads and not run.torn:
            save()
        raise


class _Interrupted(Exception):
    """A validation was broken off."""


def _until(interrupted: Callable[[], int], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; a validation can be long, so Ctrl-C does not wait for its end."""
    for batch in batches:
        if interrupted():
            raise _Interrupted
        yield batch


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
    """`hbfp.files.replacing.replacing` in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole.replacing(path) as file:
        yield file
