"""What the machine gives at most: multiply-adds in registers, and reading from L3 and from memory."""

from collections.abc import Callable

import numpy as np

from hbfp import _core
from hbfp.benchmark.results import Row
from hbfp.benchmark.timing import FULL, Effort, interleave

__all__ = ["CASE", "DRAM", "L3", "PEAK", "measure"]

CASE = "ceiling"
PEAK, L3, DRAM = "multiply-adds in registers", "read from L3", "read from memory"

_L3_BYTES = 8 << 20  # more than the L2 caches of known cores, less than the L3 of those that have one
_DRAM_BYTES = 256 << 20
_ROUNDS = 1_000_000  # some milliseconds: threads that start late must not count


def measure(threads: int, effort: Effort = FULL, dram_bytes: int = _DRAM_BYTES) -> list[Row]:
    """The three ceilings on so many threads."""
    near, far = (np.ones(size // 4, np.float32) for size in (_L3_BYTES, dram_bytes))
    work: dict[str, tuple[Callable[[], int], str]] = {
        PEAK: (lambda: _core.multiply_adds(_ROUNDS, threads), "GOP/s"),
        L3: (lambda: _core.read_memory(near, 16, threads), "GB/s"),
        DRAM: (lambda: _core.read_memory(far, 1, threads), "GB/s"),
    }
    amounts = {name: call() for name, (call, _) in work.items()}
    # Not interleaved: the big stream would push the small one out of L3.
    times = {name: interleave({name: call}, effort)[name] for name, (call, _) in work.items()}
    notes = {PEAK: "of this level", L3: f"{_L3_BYTES >> 20} MiB again and again", DRAM: f"{dram_bytes >> 20} MiB"}
    return [
        Row(CASE, "", name, threads, float(amounts[name]), unit, times[name], notes[name])
        for name, (_, unit) in work.items()
    ]
