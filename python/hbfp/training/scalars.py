"""A run's curves for TensorBoard, in a folder of event files."""

import importlib
from pathlib import Path
from types import TracebackType

from hbfp.training.loop import Observer, Run


class ScalarLog(Observer):
    """Writes loss, learning rate, seconds and phase of each step, and validations, each under the number of its step.

    A run that goes on from a checkpoint replaces what was logged of later steps. Used as a context.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        importlib.import_module("tensorboard")  # torch's own complaint does not name it
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=run.step)

    def __enter__(self) -> "ScalarLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def stepped(self, run: Run) -> None:
        step = run.step - 1
        self._write("train/loss", run.losses[-1], step)
        self._write("train/learning_rate", run.plan.rate(step), step)
        self._write("train/seconds_per_step", run.seconds[-1], step)
        self._write("train/boosted", float(run.phase == "boosted"), step)

    def validated(self, run: Run) -> None:
        steps, loss, accuracy = run.validations[-1]
        # Under the last step that was done: the next one may be replaced.
        self._write("validation/loss", loss, steps - 1)
        self._write("validation/accuracy", accuracy, steps - 1)

    def saving(self, run: Run) -> None:
        """What the checkpoint has behind it must be on disk: a resumed run does not write it again."""
        self._writer.flush()

    def _write(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)
