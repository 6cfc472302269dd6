"""The demo: two small networks, each trained in FP32, HBFP4, HBFP6 and with Accuracy Booster, then packed, reloaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

import hbfp
from hbfp.audit import audit
from hbfp.checkpoint import load_model, save_model
from hbfp.training.data import Corpus, Data, Digits, Windows
from hbfp.training.digits import DigitsClassifier
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.loop import Run, grade
from hbfp.training.plan import Plan
from hbfp.training.progress import Progress
from hbfp.training.report import DemoReport, Packed, RunReport, TaskReport, environment
from hbfp.training.resnet import ResNetShape

NAMES = ("fp32", "hbfp4", "hbfp6", "booster")
TASKS = ("digits", "text")

_TURN = 4
"""Steps that a run takes before the next has its turn: few, so that a noisy minute hits all alike."""
_PAPER_EPOCHS = 160


@dataclass(frozen=True, slots=True)
class Task:
    """A network and its data. `build` makes the network with the random weights of torch's seed of the moment."""

    name: str
    title: str
    model: str
    source: str
    steps: int
    learning_rate: float
    data: Data
    build: Callable[[], nn.Module]


def digits(quick: bool) -> Task:
    """Handwritten digits, a residual network."""
    data = Digits.load()
    widths = (32, 64, 128)
    layers = ResNetShape(channels=1, widths=widths, blocks=1).layers
    counts = f"{len(data.train[0])} training and {len(data.held_out[0])} validation images of 8 × 8 pixels"
    return Task(
        name="digits",
        title="Handwritten digits",
        model=f"A ResNet-{layers} of 3 × 3 convolutions, {', '.join(map(str, widths))} channels wide",
        source=f"scikit-learn's digits: {counts}, {data.size} a batch",
        steps=40 if quick else 250,
        learning_rate=2e-3,
        data=data,
        build=partial(DigitsClassifier, widths),
    )


def text(quick: bool) -> Task:
    """Characters of the Python standard library, a GPT."""
    corpus = Corpus.library(400_000 if quick else 4_000_000)
    size = GPTShape(len(corpus.vocabulary), 2, 128, 64) if quick else GPTShape(len(corpus.vocabulary))
    data = Windows(corpus, size=8, context=size.context, held_out=32 if quick else 128)
    return Task(
        name="text",
        title="Next character of Python source",
        model=f"A GPT of {size.layers} layers, {size.width} wide, {size.heads} heads, context {size.context}, "
        "attention products included",
        source=f"{corpus.source}, {len(corpus.codes):,} characters, {data.size} × {data.context} a batch",
        steps=60 if quick else 300,
        learning_rate=1e-3,
        data=data,
        build=partial(GPT, size),
    )


def demo(names: tuple[str, ...], out: Path, *, quick: bool, steps: int | None, seed: int) -> DemoReport:
    """Run the tasks and write `report.json`, `report.html` and the packed models under `out`.

    `steps` replaces each task's own number. Progress goes to standard error.
    """
    known = {"digits": digits, "text": text}
    reports = [run_task(known[name](quick), out / "models", steps=steps, seed=seed) for name in names]
    report = DemoReport(seed, environment(), reports)
    report.write(out)
    return report


def run_task(task: Task, folder: Path, *, steps: int | None, seed: int) -> TaskReport:
    """All four runs of a task, side by side; the models packed into `folder`."""
    started = time.monotonic()
    total = task.steps if steps is None else steps
    runs = {name: _start(task, name, total, seed) for name in NAMES}
    with Progress(task.name, runs) as progress:
        while not all(run.done for run in runs.values()):
            for run in runs.values():
                for _ in range(min(_TURN, total - run.step)):
                    run.advance(task.data.batch(seed, run.step))
                    progress.update()
        progress.stage("evaluating, packing and loading back")
        reports = [_finish(task, name, run, runs["fp32"], folder) for name, run in runs.items()]
    fp32, hbfp4 = reports[0], reports[1]
    return TaskReport(
        task=task.name,
        title=task.title,
        model=task.model,
        data=task.source,
        steps=total,
        first_boosted_step=runs["booster"].boosted_from,
        seconds=time.monotonic() - started,
        runs=reports,
        packed=Packed(hbfp4.file_bytes, fp32.file_bytes, bool(hbfp4.logits_identical)),
    )


def _start(task: Task, name: str, steps: int, seed: int) -> Run:
    torch.manual_seed(seed)  # for each run: the same initial weights
    example, _ = task.data.batch(seed, 0)
    return Run(task.build(), Plan(name, steps, task.learning_rate, seed), example)


def _finish(task: Task, name: str, run: Run, fp32: Run, folder: Path) -> RunReport:
    batches = list(task.data.validation())
    outputs = run.outputs(batches)
    score = grade((scores, targets) for scores, (_, targets) in zip(outputs, batches, strict=True))
    path = folder / f"{task.name}-{name}.safetensors"
    file_bytes, identical = _pack(task, run, path, outputs)
    now, paper = _shares(task, run)
    seconds = median(run.seconds)
    return RunReport(
        name=name,
        final_loss=score.loss,
        accuracy=score.accuracy,
        seconds_per_step=seconds,
        ratio_to_fp32=seconds / median(fp32.seconds),
        share_4bit=now,
        share_4bit_paper=paper,
        file_bytes=file_bytes,
        logits_identical=identical,
        losses=run.losses,
    )


def _pack(task: Task, run: Run, path: Path, outputs: list[Tensor]) -> tuple[int, bool | None]:
    """Write the model and read it into another one: bytes of the file, and whether both give the same logits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if run.plan.recipe == "fp32":
        hbfp.save(path, {name: np.from_dlpack(tensor) for name, tensor in run.model.state_dict().items()})
        return path.stat().st_size, None
    save_model(path, run.model)
    # Other initial weights: what the file does not bring shows.
    other = _start(task, run.plan.recipe, run.plan.steps, run.plan.seed + 1)
    other.enter(run.plan.steps - 1)
    load_model(path, other.model)
    pairs = zip(outputs, other.outputs(task.data.validation()), strict=True)
    identical = all(torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) for ours, theirs in pairs)
    return path.stat().st_size, identical


def _shares(task: Task, run: Run) -> tuple[float, float]:
    """Share of the multiply-accumulates at 4 bits: of this run, and with the paper's one boosted epoch in 160.

    Every step does the same products, so the share of a run is the mean of its phases', weighted by their steps.
    """
    if run.plan.recipe == "fp32":
        return 0.0, 0.0
    inputs, _ = task.data.batch(run.plan.seed, 0)
    # One step past the last is boosted even where a tenth of the steps is none.
    first, last = (_share(run, step, inputs) for step in (0, run.plan.steps))
    boosted = 1 - run.boosted_from / run.plan.steps
    return first * (1 - boosted) + last * boosted, first * (1 - 1 / _PAPER_EPOCHS) + last / _PAPER_EPOCHS


def _share(run: Run, step: int, inputs: Tensor) -> float:
    run.enter(step)
    return audit(run.model, inputs).share(4)
