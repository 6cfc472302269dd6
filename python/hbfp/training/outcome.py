"""What `hbfp train` has to show at the end of a run: a table, a plot, and both as numbers."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hbfp.audit import audit
from hbfp.training.loop import Run, replacing
from hbfp.training.report import COLOURS, environment, smooth
from hbfp.training.train import Training

REPORT = "report.json"
PLOT = "loss.png"

_ROWS = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that is done. Losses are in nats, accuracies and shares fractions, times in seconds."""

    arch: str
    recipe: str
    data: str
    steps: int
    steps_per_epoch: int
    first_boosted_step: int
    final_loss: float
    """Of the validation set after the last step, in the last phase's formats; so is the accuracy."""
    accuracy: float
    seconds_per_step: float | None
    """The median since the run was started or resumed; None if no step was left."""
    share_4bit: float
    """Of the run's multiply-accumulates."""
    checkpoint: str
    validations: list[tuple[int, float, float]]
    """Steps done, loss, accuracy."""
    environment: dict[str, str]
    losses: list[float] = field(repr=False)
    """Of each step's batch."""

    @classmethod
    def of(cls, training: Training, checkpoint: Path) -> "Outcome":
        """Of a run that was validated after its last step."""
        run, settings = training.run, training.settings
        _, loss, accuracy = run.validations[-1]
        return cls(
            arch=settings.arch,
            recipe=settings.recipe,
            data=settings.data,
            steps=run.step,
            steps_per_epoch=training.data.steps_per_epoch,
            first_boosted_step=run.boosted_from,
            final_loss=loss,
            accuracy=accuracy,
            seconds_per_step=median(run.seconds) if run.seconds else None,
            share_4bit=_share(training),
            checkpoint=str(checkpoint),
            validations=run.validations,
            environment=environment(),
            losses=run.losses,
        )

    def write(self, folder: Path) -> None:
        """The numbers, as `REPORT`."""
        with replacing(folder / REPORT) as file:
            file.write(json.dumps(asdict(self), indent=1, allow_nan=False).encode())

    def phase(self, step: int) -> str:
        """What a step was done in."""
        if self.recipe != "booster":
            return self.recipe
        return "boosted" if step >= self.first_boosted_step else "base"

    def table(self) -> Table:
        """The validations, or a dozen of them at even distances, with the mean loss of the steps before each."""
        result = Table(title=f"{self.arch} in {self.recipe}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for heading in ("steps", "epochs", "phase", "training loss", "validation loss", "accuracy"):
            result.add_column(heading, justify="left" if heading == "phase" else "right")
        count = len(self.validations)
        rows = min(count, _ROWS)
        chosen = [(index + 1) * count // rows - 1 for index in range(rows)]
        before = 0
        for index in chosen:
            steps, loss, accuracy = self.validations[index]
            result.add_row(
                f"{steps:,}",
                f"{steps / self.steps_per_epoch:.2f}",
                self.phase(steps - 1),
                f"{fmean(self.losses[before:steps]):.4f}",
                f"{loss:.4f}",
                f"{accuracy:.2%}",
            )
            before = steps
        return result

    def plot(self, folder: Path) -> None:
        """Losses and accuracy over the steps as `PLOT`, Booster's last phase shaded. Needs matplotlib."""
        from matplotlib.figure import Figure

        window = max(1, self.steps // 100)
        colour = COLOURS.get(self.recipe, COLOURS["hbfp6"])
        steps, losses, accuracies = (np.array(column) for column in zip(*self.validations, strict=True))
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        label = "training" if window == 1 else f"training, mean of {window} steps"
        trained = smooth(self.losses, window)
        left.plot(np.arange(window, self.steps + 1), trained, color=colour, lw=1.4, label=label)
        left.plot(steps, losses, color="black", lw=1, marker="o", ms=3, label="validation")
        # The first validation of a network with norms can lie far above all others: it may leave the picture.
        left.set_ylim(0, 1.05 * float(trained.max()))
        left.set_ylabel("loss (nats)")
        right.plot(steps, 100 * accuracies, color="black", lw=1, marker="o", ms=3)
        right.set_ylabel("validation accuracy (%)")
        for axes in (left, right):
            if self.first_boosted_step < self.steps:
                axes.axvspan(
                    self.first_boosted_step, self.steps, color=COLOURS["booster"], alpha=0.15, lw=0, label="boosted"
                )
            axes.set_xlim(0, self.steps)
            axes.set_xlabel("step")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False)
        figure.suptitle(f"{self.arch} in {self.recipe}")
        with replacing(folder / PLOT) as file:
            figure.savefig(file, format="png", dpi=120)


def _share(training: Training) -> float:
    """Share of the run's multiply-accumulates at 4 bits: every step does the same, so the mean of its phases."""
    run = training.run
    if run.plan.recipe == "fp32":
        return 0.0
    boosted = 1 - run.boosted_from / run.plan.steps
    first, last = (_share_at(run, training, step) for step in (0, run.plan.steps))
    return first * (1 - boosted) + last * boosted


def _share_at(run: Run, training: Training, step: int) -> float:
    run.enter(step)
    inputs, _ = training.data.batch(run.plan.seed, 0)
    return audit(run.model, inputs[:2]).share(4)
