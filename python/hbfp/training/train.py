"""`hbfp train`: the character GPT on a user's text, stoppable and resumable at any step."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hbfp.errors import FileError, HBFPError
from hbfp.training.data import Corpus, Windows
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.loop import Plan, Run, read_checkpoint

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is started with, and what its checkpoint remembers: any change would be another run."""

    data: str
    recipe: str = "booster"
    steps: int = 1000
    batch: int = 8
    layers: int = 4
    width: int = 256
    context: int = 128
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TextRun:
    """A GPT in training on a corpus."""

    settings: Settings
    windows: Windows
    model: GPT
    run: Run

    @classmethod
    def start(cls, settings: Settings) -> "TextRun":
        """Model, data and optimizer at step 0."""
        corpus = Corpus.read(Path(settings.data))
        windows = Windows(corpus, settings.batch, settings.context)
        shape = GPTShape(len(corpus.vocabulary), settings.layers, settings.width, settings.context)
        plan = Plan(settings.recipe, settings.steps, settings.lr, settings.seed)
        torch.manual_seed(settings.seed)
        model = GPT(shape)
        example, _ = windows.batch(settings.seed, 0)
        return cls(settings, windows, model, Run(model, plan, example))

    @classmethod
    def resume(cls, checkpoint: Path, given: dict[str, Any]) -> "TextRun":
        """The run that `checkpoint` was taken of.

        `given` holds the options typed with --resume: only `data` may differ, and only in where the same text lies now.
        """
        content = read_checkpoint(checkpoint)
        stored = content["settings"]
        names = {field.name for field in fields(Settings)}
        if not isinstance(stored, dict) or set(stored) != names | {"arch", "sha256"} or stored["arch"] != "gpt":
            raise FileError(f"{checkpoint} is not a checkpoint of `hbfp train`")
        for name in names - {"data"}:
            if name in given and given[name] != stored[name]:
                raise HBFPError(
                    f"{checkpoint} was started with --{name} {stored[name]}, not {given[name]}: "
                    f"leave --{name} out to go on with it, or start another run with another --out"
                )
        settings = Settings(**{name: stored[name] for name in names} | {"data": given.get("data", stored["data"])})
        self = cls.start(settings)
        if self.windows.corpus.sha256 != stored["sha256"]:
            raise HBFPError(
                f"{settings.data} is not the text that {checkpoint} was trained on; give that one with --data"
            )
        self.run.load_state_dict(content)
        return self

    @property
    def remembered(self) -> dict[str, Any]:
        """What the checkpoint holds besides the state."""
        return {
            **asdict(self.settings),
            "arch": "gpt",
            "data": str(Path(self.settings.data).resolve()),
            "sha256": self.windows.corpus.sha256,
        }
