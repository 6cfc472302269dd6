"""A line that tells how far a command is, on a terminal and nowhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts bytes: `with Progress(total) as progress: progress.add(name, nbytes)`."""

    def __init__(self, total: int) -> None:
        self.total, self.done = max(total, 1), 0
        self._shown = 0.0
        self._visible = sys.stderr.isatty()

    def add(self, name: str, nbytes: int) -> None:
        """So many bytes more; `name` is what comes next, or was last."""
        self.done += nbytes
        now = time.monotonic()
        if self._visible and now - self._shown > 0.1:
            self._shown = now
            print(f"\r\x1b[K{self.done / self.total:4.0%}  {name[-60:]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
