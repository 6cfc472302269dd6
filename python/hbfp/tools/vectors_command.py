"""`hbfp vectors gen|check`: the conformance vectors that the exact-arithmetic oracle makes."""

import argparse
import json
from pathlib import Path

NAME = "vectors"
HELP = "write the conformance vectors, or check that they are up to date"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("gen", "check"), help="gen writes them; check names those that are stale")
    parser.add_argument("--dir", type=Path, default=Path("tests/vectors"), help="where they lie (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.tools import vectors

    if arguments.action == "gen":
        vectors.generate(arguments.dir)
        print(json.dumps({"written": str(arguments.dir)}) if arguments.json else f"vectors written to {arguments.dir}")
        return 0
    stale = [str(path) for path in vectors.check(arguments.dir)]
    if arguments.json:
        print(json.dumps({"stale": stale}))
    elif stale:
        print("\n".join(stale))
        print(f"{len(stale)} stale; write them anew with: hbfp vectors gen --dir {arguments.dir}")
    else:
        print(f"the vectors in {arguments.dir} are up to date")
    return 1 if stale else 0
