"""Timing that stands noise: contestants take turns in one process, a round is the best of several calls, the figure the
median of the rounds, and a ratio the median of the rounds' ratios."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

__all__ = ["FULL", "Call", "Effort", "best_of", "interleave", "ratio", "seconds_per_call"]

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How often to measure."""

    rounds: int = 7
    calls: int = 5
    """Samples in a round, of which the best counts."""
    sample: float = 1e-3
    """Seconds that a sample lasts at least: short calls are repeated inside it."""
    slow: float = 8.0
    """A contestant that takes so many times the fastest one's time is timed by `slow_rounds` single calls."""
    slow_rounds: int = 3
    hopeless: float = 2.0
    """A slow contestant whose call takes so many seconds is timed by one."""


FULL = Effort()


def seconds_per_call(call: Call, repeats: int) -> float:
    """One sample: the mean over so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def best_of(call: Call, calls: int, repeats: int = 1) -> float:
    """Seconds of the best of `calls` samples."""
    return min(seconds_per_call(call, repeats) for _ in range(calls))


def interleave(contestants: Mapping[str, Call], effort: Effort = FULL) -> dict[str, tuple[float, ...]]:
    """Seconds of each contestant in each round. Contestants must have run once before: caches and buffers are warm."""
    first = {name: _first(call) for name, call in contestants.items()}
    fastest = min(first.values(), default=0.0)
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(effort.rounds):
        for name, call in contestants.items():
            if first[name] > max(effort.slow * fastest, 20 * effort.sample):
                if number < (1 if first[name] > effort.hopeless else effort.slow_rounds):
                    found[name].append(first[name] if number == 0 else seconds_per_call(call, 1))
            else:
                repeats = max(1, round(effort.sample / max(first[name], 1e-7) + 0.5))
                found[name].append(best_of(call, effort.calls, repeats))
    return {name: tuple(seconds) for name, seconds in found.items()}


def _first(call: Call) -> float:
    seconds = seconds_per_call(call, 1)
    # Once more where that is cheap: what a disturbance made slow would be timed by single calls.
    return seconds if seconds > 0.5 else min(seconds, seconds_per_call(call, 1))


def ratio(own: tuple[float, ...], other: tuple[float, ...]) -> float:
    """How many times as fast as `other`: round by round where both took part in all, so that a disturbance that lasts
    a round cancels out."""
    if len(own) == len(other):
        return median(b / a for a, b in zip(own, other, strict=True))
    return median(other) / median(own)
