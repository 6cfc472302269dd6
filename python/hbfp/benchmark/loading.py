"""Loads a packed model in a process of its own, and tells how long it took and how much memory.

    python -m hbfp.benchmark.loading FILE LAYERS THREADS WIDTH

The file is mapped: loading reads its header. Laying the weights out for the kernels reads the planes, weight by weight,
from the page cache, and gives their pages back.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hbfp.benchmark.results import NotRun

__all__ = ["Loading", "measure", "write"]

_WIDTH = 4096


@dataclass(frozen=True, slots=True)
class Loading:
    """Seconds since loading began, and bytes."""

    loaded: float
    laid_out: float
    peak: int
    """Most resident memory above what there was before."""


def write(path: Path, megabytes: int, width: int = _WIDTH) -> int:
    """Writes a model of so many bytes, all of whose layers have one random weight; how many layers."""
    import numpy as np

    import hbfp

    weight = np.random.default_rng(0).standard_normal((width, width), dtype=np.float32)
    array = hbfp.encode(weight, hbfp.HBFP4)
    layers = max(1, round(megabytes * 1e6 / array.nbytes))
    hbfp.save(path, {f"{number}.weight": array for number in range(layers)})
    return layers


def measure(path: Path, layers: int, threads: int, width: int = _WIDTH) -> Loading:
    """Loads the file in another process.

    Raises:
        NotRun: the process failed.
    """
    command = [sys.executable, "-m", "hbfp.benchmark.loading", str(path), str(layers), str(threads), str(width)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NotRun(f"its process failed: {lines[-1]}"[:200])
    return Loading(**json.loads(done.stdout))


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _main(path: str, layers: int, threads: int, width: int) -> None:
    import torch

    import hbfp

    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    hbfp.freeze_(model, "hbfp4")
    other = torch.nn.Linear(64, 64)
    hbfp.freeze_(other, "hbfp4")
    other(torch.ones(1, 64))  # threads and buffers are there
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    hbfp.load_model(path, model)
    loaded = time.perf_counter()
    hbfp.freeze_(model)
    ended = time.perf_counter()
    peak = _resident("VmHWM") - before
    print(json.dumps({"loaded": loaded - started, "laid_out": ended - started, "peak": peak}))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
