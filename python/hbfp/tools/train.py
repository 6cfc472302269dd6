"""`hbfp train`: a GPT on a text of your own or a convolutional network on CIFAR, in any of the arithmetics."""

import argparse
import contextlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbfp.training.processes import Processes
    from hbfp.training.train import Settings

NAME = "train"
HELP = "train a character-level GPT on a text, or a network for images on CIFAR, in fixed-point or FP32 arithmetic"

SAVE_EVERY = 100
PACKED = "model.safetensors"

# Options that make the run what it is: stored in the checkpoint, not to be changed by --resume. They have no defaults
# here, so that what was typed can be told from what was not; the defaults are those of training.train.Settings.
_REMEMBERED = (
    "arch",
    "data",
    "recipe",
    "epochs",
    "steps",
    "batch",
    "lr",
    "seed",
    "boosted_steps",
    "eval_every",
    "workers",
    "layers",
    "width",
    "context",
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"""{HELP}.

  hbfp train --data book.txt
  hbfp train --arch resnet20 --data cifar-10-binary.tar.gz
  hbfp train --resume
  torchrun --standalone --nproc-per-node 4 --no-python hbfp train --data book.txt

A run is a function of its options and its data: stopped by Ctrl-C or SIGTERM, or killed, and resumed, it ends in the
same bits."""

    run = parser.add_argument_group("what is trained")
    run.add_argument(
        "--arch",
        choices=("gpt", "resnet20", "resnet50-cifar", "densenet40"),
        help="default: gpt, a character-level transformer; the others classify images of 32 × 32 pixels",
    )
    run.add_argument(
        "--data",
        metavar="PATH",
        help="a UTF-8 text; for images CIFAR-10 or CIFAR-100, binary or python version, the folder or the .tar.gz",
    )
    run.add_argument(
        "--recipe", choices=("fp32", "hbfp4", "hbfp6", "hbfp8", "booster"), help="the arithmetic (default: booster)"
    )
    run.add_argument("--seed", type=int, metavar="N", help="of weights, batches and rounding (default: 0)")

    length = parser.add_argument_group(
        "how (defaults for images: the published HBFP runs, whose drops of the rate keep their share of any length)"
    )
    length.add_argument("--epochs", type=int, metavar="N", help="default: 160 for resnet20, 300 for the other two")
    length.add_argument("--steps", type=int, metavar="N", help="in place of epochs (default for gpt: 1000)")
    length.add_argument(
        "--batch", type=int, metavar="N", help="images, or windows of text, in a step (default: 128, for gpt 8)"
    )
    length.add_argument(
        "--lr", type=float, metavar="RATE", help="highest learning rate (default: SGD's 0.1, for gpt AdamW's 0.001)"
    )
    length.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="a step has N times --batch; for images a rate that climbs from --lr to N times --lr in the first epochs. "
        "Processes that torchrun starts divide the workers among them (default: one for each process)",
    )
    length.add_argument(
        "--boosted-steps",
        type=int,
        metavar="N",
        help="booster: steps at the end that every layer spends in HBFP6 "
        "(default: the last epoch of images, else a tenth of --steps)",
    )
    length.add_argument("--layers", type=int, metavar="N", help="gpt: blocks (default: 4)")
    length.add_argument("--width", type=int, metavar="N", help="gpt: a multiple of 64 (default: 256)")
    length.add_argument("--context", type=int, metavar="N", help="gpt: characters it sees (default: 128)")

    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--out",
        type=Path,
        default=Path("build/train"),
        metavar="DIR",
        help="folder of checkpoint, report and plot (default: %(default)s)",
    )
    out.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its options")
    out.add_argument(
        "--save-every",
        type=int,
        default=SAVE_EVERY,
        metavar="N",
        help="steps between checkpoints (default: 100)",
    )
    out.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between validations (default: an epoch of images, a tenth of a run on text)",
    )
    out.add_argument("--tensorboard", type=Path, metavar="DIR", help="log curves there for TensorBoard")
    out.add_argument(
        "--sample", type=int, default=0, metavar="N", help="gpt: at the end, print N characters that it writes"
    )
    out.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.training.processes import joined

    with joined() as processes:
        return _run(arguments, processes)


def _run(arguments: argparse.Namespace, processes: "Processes") -> int:
    from rich.console import Console

    from hbfp.errors import FileError, HBFPError
    from hbfp.training.data import Windows
    from hbfp.training.generation import Writer
    from hbfp.training.gpt import GPT
    from hbfp.training.loop import Observer, train
    from hbfp.training.outcome import PLOT, REPORT, Outcome
    from hbfp.training.progress import Progress
    from hbfp.training.scalars import ScalarLog
    from hbfp.training.stopping import Terminated
    from hbfp.training.train import CHECKPOINT, Settings, Training

    given: dict[str, Any] = {
        name: getattr(arguments, name) for name in _REMEMBERED if getattr(arguments, name) is not None
    }
    checkpoint: Path = arguments.out / CHECKPOINT
    if arguments.save_every < 1:
        raise HBFPError(f"--save-every is at least 1, not {arguments.save_every}")
    if arguments.resume:
        training = Training.resume(checkpoint, given, processes)
        _check_sample(arguments.sample, training.settings)
        for half in arguments.out.glob(f".{CHECKPOINT}.*.tmp"):  # what a killed run was writing
            half.unlink(missing_ok=True)
    elif checkpoint.exists():
        raise FileError(f"{checkpoint} is there already: add --resume to go on with it, or give another --out")
    else:
        settings = Settings.of({"data": "", **given}, processes.count)
        if not settings.data:
            raise HBFPError(
                "which text? give a file with --data FILE"
                if settings.arch == "gpt"
                else "which images? give the folder or the archive of CIFAR-10 or CIFAR-100 with --data PATH"
            )
        _check_sample(arguments.sample, settings)
        training = Training.start(settings, processes.rank)
    if processes.leads and not arguments.json:
        print(training.summary(), file=sys.stderr)

    settings = training.settings
    try:
        with contextlib.ExitStack() as stack:
            observers: list[Observer] = []
            if processes.leads:
                progress = Progress(f"train {settings.arch}", {settings.recipe: training.run})
                observers.append(stack.enter_context(progress))
            if processes.leads and arguments.tensorboard is not None:
                observers.append(stack.enter_context(ScalarLog(arguments.tensorboard, training.run)))
            train(
                training.run,
                training.data,
                checkpoint,
                every=arguments.save_every,
                settings=training.remembered,
                validate_every=training.validate_every,
                observers=observers,
            )
    except KeyboardInterrupt as stop:
        state = "in the middle of a step, the last checkpoint stands" if training.run.torn else "saved"
        if processes.leads:
            again = "Go on with" if processes.count == 1 else f"Go on, in {processes.count} processes, with"
            print(
                f"hbfp train: stopped after {training.run.step} of {training.run.plan.steps} steps, {state}. "
                f"{again}: {_command_to_resume(arguments)}",
                file=sys.stderr,
            )
        if isinstance(stop, Terminated):
            return 143
        raise

    if not processes.leads:
        return 0
    written = ""
    packed: Path | None = None
    if isinstance(training.run.model, GPT) and isinstance(training.data, Windows):
        writer = Writer(training.run.model, training.data.corpus.vocabulary)
        packed = arguments.out / PACKED
        writer.save(packed)
        written = "".join(writer.write("", arguments.sample, seed=settings.seed))
    outcome = Outcome.of(training, checkpoint)
    outcome.write(arguments.out)
    plot: Path | None = arguments.out / PLOT
    try:
        outcome.plot(arguments.out)
    except ModuleNotFoundError as error:
        plot = None
        print(f"hbfp train: no plot: {error.name} is not installed; pip install 'hbfp[demo]'", file=sys.stderr)
    if arguments.json:
        result = asdict(outcome) | {"plot": None if plot is None else str(plot), "sample": written}
        result |= {"model": None if packed is None else str(packed)}
        del result["losses"]  # they are in the report
        print(json.dumps(result, indent=1))
        return 0
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(outcome.table())
    if outcome.seconds_per_step is not None:
        print(f"{1000 * outcome.seconds_per_step:.0f} ms a step (median)")
    print(f"{outcome.share_4bit:.2%} of the multiply-accumulates at 4 bits")
    answer = "next character" if settings.arch == "gpt" else "class"
    print(
        f"validation loss {outcome.final_loss:.4f}, {answer} right {outcome.accuracy:.2%}, after {outcome.steps} steps"
    )
    print(f"checkpoint: {checkpoint}")
    if packed is not None:
        print(f"packed model: {packed}; go on with: hbfp generate {shlex.quote(str(packed))}")
    print(f"losses and plot: {arguments.out / REPORT}{'' if plot is None else f', {plot}'}")
    if written:
        print(f"\n{written}")
    return 0


def _check_sample(characters: int, settings: "Settings") -> None:
    from hbfp.errors import HBFPError

    if characters < 0:
        raise HBFPError(f"--sample is a number of characters, not {characters}")
    if characters and settings.arch != "gpt":
        raise HBFPError(f"--sample is no option of --arch {settings.arch}: leave it out")


def _command_to_resume(arguments: argparse.Namespace) -> str:
    """With the options that the checkpoint does not remember."""
    words = ["hbfp", "train", "--resume", "--out", str(arguments.out)]
    if arguments.save_every != SAVE_EVERY:
        words += ["--save-every", str(arguments.save_every)]
    if arguments.tensorboard is not None:
        words += ["--tensorboard", str(arguments.tensorboard)]
    if arguments.sample:
        words += ["--sample", str(arguments.sample)]
    return shlex.join([*words, *(["--json"] if arguments.json else [])])
