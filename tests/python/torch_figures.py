"""The figures of converted models among torch's tools, in three tables: shares, compilations, the cost of watching.

    python tests/python/torch_figures.py [--quick]

Shares and compilations are exact. Times are ratios of blocks of steps that take turns in one process, the median of the
rounds; they are figures of the machine at hand, and tests assert none.
"""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Callable

import test_audit
import torch
from test_coverage import ZOO
from torch import nn
from torch._dynamo.utils import counters
from zoo import MODELS, leaves

import hbfp
from hbfp.benchmark.results import cpu_name
from hbfp.benchmark.timing import Effort, interleave, ratio
from hbfp.tables import table
from hbfp.training.gpt import GPT, GPTShape

NETWORKS = (*ZOO, test_audit.Convolutions, test_audit.LSTMs, test_audit.ResNet20, test_audit.CharacterGPT)
COMPILED = {
    "integer": ("aot_eager", tuple(MODELS)),
    "emulate": ("aot_eager", ("mlp",)),
    "reference": ("aot_eager", ("mlp",)),
}
"""Backend of the products -> backend of torch.compile, and which of the models in zoo.py."""


def shares(kinds: tuple[type[nn.Module], ...] = NETWORKS) -> str:
    """Of a training step of each network, converted with the recipe "booster": multiply-accumulates by width."""
    rows = []
    for kind in kinds:
        torch.manual_seed(0)
        model, inputs = kind(), kind.inputs()
        hbfp.convert_(model, "booster", example_inputs=inputs)
        found = hbfp.audit(model, *inputs)
        widths = (f"{100 * found.share(bits):.2f}" for bits in (4, 6, 32))
        rows.append((kind.__name__, f"{found.macs:,}", *widths))
    return table(("network", "MACs a step", "4 bits %", "6 bits %", "FP32 %"), rows, right=(1, 2, 3, 4))


def compilations(backend: str, name: str, steps: int = 10, boosted_from: int = 6) -> tuple[str, ...]:
    """A row: graphs compiled in a run whose phase changes, in its first step, at the change, and in all others."""
    compiler = COMPILED[backend][0]
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make()
    hbfp.convert_(model, hbfp.recipe("booster", backend=backend), example_inputs=inputs(0))
    schedule = hbfp.Booster(model, steps, last_steps=steps - boosted_from)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    counts = [0]
    with torch._dynamo.config.patch(allow_rnn=True):
        for step in range(steps):
            schedule.step(step)
            sum(result.square().mean() for result in leaves(compiled(*inputs(step)))).backward()
            counts.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    new = [b - a for a, b in itertools.pairwise(counts)]
    first, change = new[0], new[boosted_from]
    return (name, backend, compiler, str(steps), str(first), str(change), str(sum(new) - first - change))


def watching(rounds: int = 5, steps: int = 100) -> str:
    """Time of a training step with `hbfp.watch`, as a multiple of one without, in blocks of `steps` steps."""
    torch.manual_seed(0)
    model = GPT(GPTShape(vocabulary=64, layers=2, width=128, context=64))
    hbfp.convert_(model, "booster")
    codes = torch.randint(64, (8, 64))

    def block(every: int | None) -> Callable[[], None]:
        def run() -> None:
            watch = None if every is None else hbfp.watch(model, every=every)
            for step in range(1, steps + 1):
                hbfp.set_step(model, step)
                model.zero_grad()
                nn.functional.cross_entropy(model(codes).flatten(0, 1), codes.flatten()).backward()
            if watch is not None:
                watch.close()

        return run

    contestants = {
        "off": block(None),
        "open, no step sampled": block(steps + 1),
        f"every {steps} steps": block(steps),
        "every step": block(1),
    }
    times = interleave(contestants, Effort(rounds=rounds, calls=1))
    rows = [
        (name, f"{1e3 * sorted(found)[len(found) // 2] / steps:.2f}", f"{ratio(times['off'], found):.3f}")
        for name, found in times.items()
    ]
    return table(("watch", "ms a step", "times as long"), rows, right=(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small network in each table")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"{cpu_name()}, level {hbfp.info()['level']}, torch {torch.__version__}, Python {platform.python_version()}")
    print('\nMultiply-accumulates by width, recipe "booster", first and last layer at 6 bits\n')
    print(shares(NETWORKS[:1] if quick else NETWORKS), flush=True)
    print("\nGraphs that torch.compile(fullgraph=True) makes in ten steps with a change of phase\n")
    head = ("model", "products by", "compiler", "steps", "first step", "change of phase", "all other steps")
    cases = [(backend, name) for backend, (_, names) in COMPILED.items() for name in (names[:1] if quick else names)]
    rows = [compilations(backend, name) for backend, name in (cases[:1] if quick else cases)]
    print(table(head, rows, right=range(3, 7)), flush=True)
    print("\nA training step of a GPT (2 blocks of 128, 8 x 64 characters) under hbfp.watch, one thread\n")
    print(watching(*(1, 3) if quick else ()))


if __name__ == "__main__":
    main()
