"""The `hbfp` command: one subcommand per file of this folder.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done; 1 a check found differences;
2 bad input or usage, with one line that says what to do; 130 stopped by Ctrl-C; 141 nobody reads the output any more;
143 `hbfp train` stopped by SIGTERM.

A command's file is cheap to import: what it needs beyond the standard library it imports when it runs, so that
`hbfp info` works where torch is not installed.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from hbfp.errors import HBFPError
from hbfp.tools import (
    bench,
    demo,
    diff,
    explain,
    export,
    generate,
    info,
    inspection,
    quantize,
    train,
    vectors_command,
    verify,
)


class Command(Protocol):
    """A module that is a subcommand."""

    NAME: str
    HELP: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; the exit code."""


# report takes its place in this list.
COMMANDS: tuple[Command, ...] = (
    demo,
    info,
    explain,
    quantize,
    inspection,
    diff,
    verify,
    export,
    train,
    generate,
    bench,
    vectors_command,
)

# Modules of the optional parts, and the extra that brings them.
_EXTRAS = {
    "gguf": "export",
    "matplotlib": "demo",
    "ml_dtypes": "export",
    "onnx": "export",
    "rich": "demo",
    "sklearn": "demo",
    "tensorboard": "tensorboard",
    "torch": "torch",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    result = _Parser(prog="hbfp", description="Hybrid block floating point as real integer arithmetic.")
    result.add_argument("--version", action="store_true", help="print the version and exit")
    commands = result.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.configure(sub)
        sub.set_defaults(command=command)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    typed = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args([_as_value(word) for word in typed])
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    if arguments.version:
        import hbfp

        print(f"hbfp {hbfp.__version__}")
        return 0
    command: Command | None = getattr(arguments, "command", None)
    if command is None:
        parser().print_help(sys.stderr)
        return 2
    try:
        return command.run(arguments)
    except HBFPError as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        reason = f"{error.name} is not installed; get it with: pip install 'hbfp[{_EXTRAS[error.name]}]'"
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"hbfp {command.NAME}: {reason}", file=sys.stderr)
    return 2


def _as_value(word: str) -> str:
    """A negative number with a space before it: argparse takes a word such as -1e-3 or -inf for an option otherwise."""
    try:
        number = float(word)
    except ValueError:
        return word
    return f" {word}" if word.startswith("-") and not math.isnan(number) else word
