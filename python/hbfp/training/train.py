"""`hbfp train`: a GPT on a user's text, or a convolutional network on CIFAR, stoppable and resumable at any step.

The networks for images come with the hyper-parameters of the published HBFP runs (the emulator's scripts and its
learning rates, github.com/parsa-epfl/HBFPEmulator): SGD with Nesterov's momentum, batches of 128, a rate of 0.1 for
each worker that falls to a tenth twice, a weight decay of 1e-4, here 0 on norms and biases. The GPT's are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hbfp.errors import FileError, HBFPError
from hbfp.training.bottleneck import BottleneckResNet, BottleneckShape
from hbfp.training.cifar import CIFAR
from hbfp.training.data import Corpus, Windows
from hbfp.training.densenet import DenseNet, DenseNetShape
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.images import Images
from hbfp.training.loop import Run, read_checkpoint
from hbfp.training.plan import SGD, AdamW, Cosine, Drops, Plan
from hbfp.training.processes import ALONE, Processes
from hbfp.training.resnet import ResNet, ResNetShape

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Classifier:
    """A network for images and its published run."""

    build: Callable[[int], nn.Module]
    """Of the number of classes."""
    epochs: int
    drops: tuple[int, int]
    """Epochs from which on the rate is a tenth of what it was."""
    warmup: int = 5
    """Epochs in which the rate climbs from one worker's to that of all."""


CLASSIFIERS: Mapping[str, Classifier] = {
    "resnet20": Classifier(lambda classes: ResNet(ResNetShape(classes=classes)), 160, (82, 122)),
    "resnet50-cifar": Classifier(lambda classes: BottleneckResNet(BottleneckShape(classes=classes)), 300, (150, 225)),
    "densenet40": Classifier(lambda classes: DenseNet(DenseNetShape(classes=classes)), 300, (150, 225)),
}
ARCHITECTURES = ("gpt", *CLASSIFIERS)

_TEXT_DEFAULTS: Mapping[str, Any] = {
    "steps": 1000,
    "batch": 8,
    "lr": 1e-3,
    "layers": 4,
    "width": 256,
    "context": 128,
}
_TEXT_ONLY = ("layers", "width", "context")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is started with, and what its checkpoint remembers: any change would be another run."""

    arch: str
    data: str
    recipe: str
    batch: int
    """Windows of text, or images, of each worker in a step."""
    lr: float
    """The highest; for images, of each worker."""
    seed: int
    epochs: int | None = None
    """These or `steps` are the length of the run, the other is None."""
    steps: int | None = None
    boosted_steps: int | None = None
    eval_every: int | None = None
    """Steps between validations; None: an epoch of images, a tenth of a run on text."""
    workers: int = 1
    """A step has the batches of so many, and for images the rate of all."""
    processes: int = 1
    """Among which the workers are divided evenly."""
    layers: int | None = None
    width: int | None = None
    context: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], processes: int = 1) -> "Settings":
        """The options typed, and the architecture's defaults for all others; of each process, one worker."""
        arch = given.get("arch", "gpt")
        if arch not in ARCHITECTURES:
            raise HBFPError(f"no architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
        for name in _TEXT_ONLY:
            if arch != "gpt" and name in given:
                raise HBFPError(f"--{name} is no option of --arch {arch}: leave it out")
        if "epochs" in given and "steps" in given:
            raise HBFPError("--epochs and --steps are both the length of the run: give one of them")
        defaults: dict[str, Any] = {"arch": arch, "recipe": "booster", "seed": 0, "workers": processes}
        if arch == "gpt":
            defaults |= _TEXT_DEFAULTS
        else:
            defaults |= {"epochs": CLASSIFIERS[arch].epochs, "batch": 128, "lr": 0.1}
        for name, other in (("epochs", "steps"), ("steps", "epochs")):
            if name in given:
                defaults.pop(other, None)
        settings = cls(**defaults | dict(given), processes=processes)
        for name in ("epochs", "steps", "batch", "workers", "eval_every"):
            value = getattr(settings, name)
            if value is not None and value < 1:
                raise HBFPError(f"{option(name)} is at least 1, not {value}")
        if settings.workers % processes:
            raise HBFPError(f"--workers is a multiple of the {processes} processes, not {settings.workers}")
        return settings


@dataclass(frozen=True, slots=True)
class Training:
    """A network in training on a user's data."""

    settings: Settings
    data: Windows | Images
    sha256: str
    """Of the data."""
    run: Run

    @classmethod
    def start(cls, settings: Settings, rank: int = 0) -> "Training":
        """Model, data and optimizer at step 0, in the process of that rank."""
        data: Windows | Images
        if settings.arch == "gpt":
            corpus = Corpus.read(Path(settings.data))
            data = Windows(corpus, settings.batch * settings.workers, settings.context or 0)
            sha256 = corpus.sha256
            shape = GPTShape(len(corpus.vocabulary), settings.layers or 0, settings.width or 0, settings.context or 0)
        else:
            cifar = CIFAR.read(Path(settings.data))
            data = Images(cifar, settings.batch * settings.workers)
            sha256 = cifar.sha256
        plan = _plan(settings, data.steps_per_epoch)
        torch.manual_seed(settings.seed)
        model = GPT(shape) if settings.arch == "gpt" else CLASSIFIERS[settings.arch].build(cifar.classes)
        example, _ = data.batch(settings.seed, 0)
        return cls(settings, data, sha256, Run(model, plan, example, Processes(settings.processes, rank)))

    @classmethod
    def resume(cls, checkpoint: Path, given: Mapping[str, Any], processes: Processes = ALONE) -> "Training":
        """The run that `checkpoint` was taken of, in as many processes.

        `given` holds the options typed with --resume: only `data` may differ, and only in where the same data lie now.
        """
        content = read_checkpoint(checkpoint)
        stored = content.get("settings")
        names = {field.name for field in fields(Settings)}
        if not isinstance(stored, dict) or set(stored) - {"vocabulary"} != names | {"sha256"}:
            raise FileError(f"{checkpoint} is not a checkpoint of `hbfp train`")
        if stored["processes"] != processes.count:
            raise HBFPError(
                f"{checkpoint} was started in {_number(stored['processes'])}, not in {processes.count}: "
                "go on with it in as many, or start another run with another --out"
            )
        for name in names - {"data", "processes"}:
            if name in given and given[name] != stored[name]:
                typed = option(name)
                started = f"{typed} {stored[name]}" if stored[name] is not None else f"no {typed}"
                raise HBFPError(
                    f"{checkpoint} was started with {started}, not {given[name]}: "
                    f"leave {typed} out to go on with it, or start another run with another --out"
                )
        settings = Settings(**{name: stored[name] for name in names} | {"data": given.get("data", stored["data"])})
        self = cls.start(settings, processes.rank)
        if self.sha256 != stored["sha256"]:
            raise HBFPError(
                f"{settings.data} does not hold the data that {checkpoint} was trained on; give those with --data"
            )
        self.run.load_state_dict(content)
        return self

    @property
    def remembered(self) -> dict[str, Any]:
        """What the checkpoint holds besides the state."""
        return {
            **asdict(self.settings),
            "data": str(Path(self.settings.data).resolve()),
            "sha256": self.sha256,
            **({"vocabulary": self.data.corpus.vocabulary} if isinstance(self.data, Windows) else {}),
        }

    @property
    def validate_every(self) -> int:
        if self.settings.eval_every is not None:
            return self.settings.eval_every
        return max(1, self.run.plan.steps // 10) if isinstance(self.data, Windows) else self.data.steps_per_epoch

    def summary(self) -> str:
        """The run in a line."""
        plan, settings = self.run.plan, self.settings
        length = f"{plan.steps:,} steps"
        if settings.epochs is not None:
            length = f"{settings.epochs} epochs of {self.data.steps_per_epoch:,} steps"
        source = self.data.corpus.source if isinstance(self.data, Windows) else self.data.cifar.source
        boosted = f", the last {plan.boosted_steps:,} boosted" if plan.recipe == "booster" else ""
        spread = f", in {_number(settings.processes)}" if settings.processes > 1 else ""
        return f"{settings.arch} in {plan.recipe} on {source}: {length} of {self.data.size}{boosted}{spread}"


def _number(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def option(name: str) -> str:
    """A setting, as it is typed."""
    return "--" + name.replace("_", "-")


def _plan(settings: Settings, steps_per_epoch: int) -> Plan:
    """The last epoch is boosted where a run on images is counted in epochs, the last tenth anywhere else.

    Epochs of warm-up and of drops are those of the published run, or the same parts of a run of another length.
    """
    steps = settings.steps if settings.epochs is None else settings.epochs * steps_per_epoch
    assert steps is not None
    boosted = settings.boosted_steps
    if settings.arch == "gpt":
        return Plan(settings.recipe, steps, settings.lr, settings.seed, boosted, AdamW(), Cosine())
    if boosted is None and settings.epochs is not None:
        boosted = steps_per_epoch
    published = CLASSIFIERS[settings.arch]

    def part(epoch: int) -> int:
        return steps * epoch // published.epochs

    schedule = Drops(tuple(part(drop) for drop in published.drops), part(published.warmup), settings.lr)
    rate = settings.lr * settings.workers
    return Plan(settings.recipe, steps, rate, settings.seed, boosted, SGD(), schedule)
