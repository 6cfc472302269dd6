"""`hbfp train`: a character-level GPT on a text of your own, in any of the arithmetics."""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

NAME = "train"
HELP = "train a character-level GPT on a text file, in fixed-point or FP32 arithmetic"

# Options that make the run what it is: stored in the checkpoint, not to be changed by --resume. They have no defaults
# here, so that what was typed can be told from what was not; the defaults are those of training.train.Settings.
_REMEMBERED = ("data", "recipe", "steps", "batch", "layers", "width", "context", "lr", "seed")


def configure(parser: argparse.ArgumentParser) -> None:
    # Other architectures will be an --arch beside --data.
    parser.add_argument("--data", metavar="FILE", help="the text to learn, UTF-8")
    parser.add_argument(
        "--recipe", choices=("fp32", "hbfp4", "hbfp6", "hbfp8", "booster"), help="the arithmetic (default: booster)"
    )
    parser.add_argument("--steps", type=int, help="default: 1000")
    parser.add_argument("--batch", type=int, help="windows of text per step (default: 8)")
    parser.add_argument("--layers", type=int, help="default: 4")
    parser.add_argument("--width", type=int, help="a multiple of 64 (default: 256)")
    parser.add_argument("--context", type=int, help="characters the model sees (default: 128)")
    parser.add_argument("--lr", type=float, help="highest learning rate of AdamW (default: 0.001)")
    parser.add_argument("--seed", type=int, help="of weights and batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/train"), help="folder of the checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its options")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="at the end, print N characters that the model writes"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.errors import FileError, HBFPError
    from hbfp.training.gpt import sample
    from hbfp.training.loop import train
    from hbfp.training.progress import Progress
    from hbfp.training.train import CHECKPOINT, Settings, TextRun

    given: dict[str, Any] = {
        name: getattr(arguments, name) for name in _REMEMBERED if getattr(arguments, name) is not None
    }
    checkpoint: Path = arguments.out / CHECKPOINT
    if arguments.save_every < 1:
        raise HBFPError(f"--save-every is at least 1, not {arguments.save_every}")
    if arguments.resume:
        text = TextRun.resume(checkpoint, given)
    elif checkpoint.exists():
        raise FileError(f"{checkpoint} is there already: add --resume to go on with it, or give another --out")
    elif "data" not in given:
        raise HBFPError("which text? give a file with --data FILE")
    else:
        text = TextRun.start(Settings(**given))

    try:
        with Progress(f"train {text.settings.data}", {text.settings.recipe: text.run}) as progress:
            train(
                text.run,
                text.windows,
                checkpoint,
                every=arguments.save_every,
                settings=text.remembered,
                report=lambda run: progress.update(),
            )
    except KeyboardInterrupt:
        state = "in the middle of a step, the last checkpoint stands" if text.run.torn else "saved"
        print(
            f"hbfp train: stopped after {text.run.step} of {text.settings.steps} steps, {state}. "
            f"Go on with: hbfp train --resume --out {arguments.out}",
            file=sys.stderr,
        )
        raise

    score = text.run.evaluate(text.windows.validation())
    corpus = text.windows.corpus
    written = ""
    if arguments.sample > 0:
        codes = sample(text.model, corpus.encode("\n"), arguments.sample, seed=text.settings.seed)
        written = corpus.decode(codes)
    result = {
        "steps": text.run.step,
        "final_loss": score.loss,
        "accuracy": score.accuracy,
        "seconds_per_step": median(text.run.seconds) if text.run.seconds else None,
        "checkpoint": str(checkpoint),
        "sample": written,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(
            f"validation loss {score.loss:.4f}, next character right {score.accuracy:.2%}, after {text.run.step} steps"
        )
        print(f"checkpoint: {checkpoint}")
        if written:
            print(f"\n{written}")
    return 0
