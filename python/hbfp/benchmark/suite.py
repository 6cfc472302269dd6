"""Which cases run, in which order."""

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import torch

import hbfp
from hbfp.benchmark import cases, inference, layers
from hbfp.benchmark.cases import Bench
from hbfp.benchmark.results import Results, cpu_name
from hbfp.benchmark.timing import Effort

__all__ = ["Step", "default_threads", "new_results", "plan", "run"]

_QUICK = Effort(rounds=5, calls=5, slow_rounds=1)
_LAYERS = Effort(rounds=5, calls=1, slow_rounds=3)
"""Calls of a tenth of a second and more: five in turn."""
_PLOT = Effort(rounds=3, calls=2, slow_rounds=1)
"""The sweep feeds a plot, no gate."""


@dataclass(frozen=True, slots=True)
class Step:
    """One case at one shape and one number of threads."""

    case: str
    label: str
    threads: int
    work: Callable[[Bench], None]
    effort: Effort


def default_threads() -> tuple[int, ...]:
    """One, and all cores."""
    return tuple(sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1}))


def plan(threads: Sequence[int], *, quick: bool = False, only: Sequence[str] = ()) -> list[Step]:
    """The steps of a run. The ceilings come always: shares need them. `only` names cases."""
    effort = _QUICK if quick else Effort()
    plot = Effort(rounds=1, calls=3, slow_rounds=1) if quick else _PLOT
    steps: list[Step] = []

    def add(case: str, label: str, count: int, work: Callable[[Bench], None], effort: Effort = effort) -> None:
        if not only or case in only or case == "ceilings":
            steps.append(Step(case, label, count, work, effort))

    for count in threads:
        first = count == min(threads)
        add("ceilings", "ceilings", count, cases.measure_ceilings)
        add("packed", "packed product 1024³", count, cases.packed_product)
        add("packed", "packed product 1024³, exponents far apart", count, cases.packed_product_far_apart)
        if not quick or first:
            add("forward", "forward 1024³", count, partial(cases.forward, m=1024, n=1024, k=1024))
        if not quick:
            add("forward", "forward 256x4096²", count, partial(cases.forward, m=256, n=4096, k=4096))
        if not quick or first:
            for m in (1, 32) if quick else (1, 2, 4, 8, 16, 32):
                add("few-rows", f"{m} row{'s' * (m > 1)}", count, partial(cases.few_rows, m=m))
            add("cold-row", "one row, cold", count, cases.cold_row)
            add("encode", "encoders", count, cases.encode)
        if not quick:
            for matrices, m, n, k in cases.BATCHES:
                work = partial(cases.batched, matrices=matrices, m=m, n=n, k=k)
                add("batched", f"batch of {matrices} products {m}x{n}x{k}", count, work)
        add("training", "training step 1024³", count, partial(cases.training_step, m=1024, n=1024, k=1024))
        if not quick:
            add("training", "training step 256x4096²", count, partial(cases.training_step, m=256, n=4096, k=4096))
        if first:
            for m, n, k in ((1, 8, 8), (8, 64, 64)):
                add("overhead", f"overhead {m}x{n}x{k}", count, partial(cases.overhead, m=m, n=n, k=k))
        if not quick:
            add("layers", "GPT step", count, layers.gpt, _LAYERS)
            for channels, pixels in layers.CONVOLUTIONS:
                work = partial(layers.convolution, channels=channels, pixels=pixels)
                add("layers", f"convolution {channels} at {pixels}²", count, work, _LAYERS)
            for channels, pixels, groups, size, batch in layers.GROUPED:
                work = partial(
                    layers.grouped_convolution, channels=channels, pixels=pixels, groups=groups, size=size, batch=batch
                )
                add("layers", f"convolution {channels} at {pixels}², {groups} groups", count, work, _LAYERS)
            add("layers", "ResNet20 step", count, layers.resnet20, _LAYERS)
            for context in (512, 2048):
                add("layers", f"attention {context}", count, partial(layers.attention, context=context), _LAYERS)
            for context in (512, 2048):
                work = partial(layers.attention, context=context, dropout=0.1)
                add("layers", f"attention {context}, dropout", count, work, _LAYERS)
            add("layers", "LSTM", count, layers.lstm, _LAYERS)
            for m in (1, 4, 16):
                add("inference", f"frozen linear, {m}", count, partial(inference.frozen_linear, m=m))
            for batch in (1, 8):
                work = partial(inference.frozen_resnet20, batch=batch)
                add("inference", f"frozen ResNet20, {batch} image{'s' * (batch > 1)}", count, work)
            for name, shape in inference.GPTS.items():
                work = partial(inference.generation, name=name, shape=shape)
                add("inference", f"generation, {name}", count, work, _LAYERS)
            add("inference", "loading", count, inference.load)
    most = max(threads)
    if not quick:
        add("layers", "saved activations", most, layers.saved_activations)
        add("layers", "peak memory", most, layers.peak_memory)
    if most > 1 and 1 in threads:
        for size in (1024,) if quick else (1024, 2048):
            add("scaling", f"threads, {size}³", most, partial(cases.scaling, size=size, thread_counts=(1, most)))
    # Last, so that an interrupt costs the plot and not the table.
    sizes = (128, 512, 1024) if quick else (64, 128, 256, 512, 1024, 2048, 4096)
    for count in threads[:1] if quick else threads:
        add("sweep", "sweep of sizes", count, partial(cases.sweep, sizes=sizes), plot)
    return steps


def new_results(quick: bool) -> Results:
    """Empty results that name this machine and these versions."""
    info = hbfp.info()
    versions = {"hbfp": hbfp.__version__, "python": platform.python_version()}
    for name in ("torch", "torchao", "llama-cpp-python"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    levels = {
        f"level {name}": f"not run: {'HBFP_LEVEL chose another' if state == 'available' else state}"
        for name, state in info["levels"].items()
        if name != info["level"]
    }
    environment = {**versions, "threading": str(info["threading"]), "build": str(info["build"]), **levels}
    return Results(str(info["level"]), cpu_name(), environment, quick)


def run(results: Results, steps: Sequence[Step], progress: Callable[[Step], None] | None = None) -> None:
    """Runs the steps, adding to the results as it goes: what an interrupt leaves there is whole cases.

    Raises:
        WrongAnswer: one of our own products is not the oracle's.
    """
    with _threads_restored():
        for step in steps:
            if progress is not None:
                progress(step)
            torch.set_num_threads(step.threads)
            step.work(Bench(results, step.threads, step.effort, results.quick))


@contextmanager
def _threads_restored() -> Iterator[None]:
    kept = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def show_progress(step: Step) -> None:
    """One line of a terminal, written over by the next."""
    line = f"{step.label}, {step.threads} thread{'s' * (step.threads > 1)}"
    print(f"\r\033[K{line} ...", end="", file=sys.stderr, flush=True)
