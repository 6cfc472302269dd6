"""`hbfp info`: the CPU level and the threads in use, how the core was built, and the versions around it."""

import argparse
import json
import platform
from importlib import metadata
from typing import Any

NAME = "info"
HELP = "show the kernels in use, the CPU's features, threads and versions"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import hbfp

    facts: dict[str, Any] = {**hbfp.info(), "versions": _versions()}
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        for line in _lines(facts):
            print(line)
    return 0


def _versions() -> dict[str, str]:
    # Asked of the installed packages' descriptions: importing torch takes seconds.
    found = {"python": platform.python_version()}
    for name in ("hbfp", "numpy", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    result = []
    for name, value in facts.items():
        if isinstance(value, dict):
            result += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple | set | frozenset) else value
            result.append(f"{indent}{name:<{16 - len(indent)}}{text}")
    return result
