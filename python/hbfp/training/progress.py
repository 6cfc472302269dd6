"""How far a training is: a live table on a terminal, a line now and then anywhere else. Both go to standard error, so
that standard output holds results only."""

import sys
import time
from collections.abc import Mapping
from statistics import fmean, median
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hbfp.training.loop import Observer, Run

_LINES = 10
_REFRESH_SECONDS = 0.25


class Progress(Observer):
    """Watches runs, by name, that advance towards the same number of steps; `update` it after each step.

    Used as a context. Nothing is drawn from a thread of its own: that would run in the middle of a timed step.
    """

    def __init__(self, title: str, runs: Mapping[str, Run]) -> None:
        self._title = title
        self._runs = runs
        self._first = self._taken
        self._started = time.monotonic()
        self._next_line = 0
        self._next_draw = 0.0
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str) -> None:
        """Say what is done after the last step."""
        if self._live is not None:
            self._live.update(self._drawing(name), refresh=True)
        else:
            print(f"{self._title}: {name}", file=sys.stderr, flush=True)

    def stepped(self, run: Run) -> None:
        self.update()

    def update(self) -> None:
        """Show how far the runs are, if it is time to."""
        now = time.monotonic()
        if self._live is not None:
            if now >= self._next_draw or self._taken == self._total:
                self._next_draw = now + _REFRESH_SECONDS
                self._live.update(self._drawing(self._left(now)), refresh=True)
            return
        steps = {run.step for run in self._runs.values()}
        if len(steps) == 1 and (step := steps.pop()) >= self._next_line:  # a line compares runs at the same step
            total = next(iter(self._runs.values())).plan.steps
            self._next_line = min(total, step + max(1, total // _LINES))
            losses = "  ".join(f"{name} {_recent(run):.3f}" for name, run in self._runs.items())
            print(f"{self._title}: step {step}/{total}  {losses}  {self._left(now)}", file=sys.stderr, flush=True)

    @property
    def _taken(self) -> int:
        return sum(run.step for run in self._runs.values())

    @property
    def _total(self) -> int:
        return sum(run.plan.steps for run in self._runs.values())

    def _left(self, now: float) -> str:
        taken = self._taken - self._first
        if not taken:
            return "starting"
        seconds = round((now - self._started) / taken * (self._total - self._taken))
        return f"{seconds // 60}:{seconds % 60:02d} left"

    def _drawing(self, state: str) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("run")
        table.add_column("loss", justify="right")
        table.add_column("ms/step", justify="right")
        table.add_column("phase")
        table.add_column("step", justify="right")
        table.add_column("")
        table.add_column("", justify="right")
        for name, run in self._runs.items():
            table.add_row(
                name,
                f"{_recent(run):.3f}" if run.losses else "",
                f"{1000 * median(run.seconds[-50:]):.0f}" if run.seconds else "",
                run.phase,
                f"{run.step}/{run.plan.steps}",
                ProgressBar(run.plan.steps, run.step, width=24),
                f"{run.step / run.plan.steps:.0%}",
            )
        return Group(Text.assemble((self._title, "bold"), "  ", (state, "dim")), table)


def _recent(run: Run) -> float:
    return fmean(run.losses[-10:])
