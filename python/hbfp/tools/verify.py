"""`hbfp verify FILE`: everything that can be checked, on every byte of a file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from hbfp.tools.progress import Progress

if TYPE_CHECKING:
    from hbfp.files import File

NAME = "verify"
HELP = "check a file: structure, codes, checksums"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a packed file, or the index of its shards")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import hbfp

    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    try:
        with hbfp.open(arguments.file) as file, Progress(sum(map(file.nbytes, file))) as progress:
            for name in file:
                rows.append(_checked(file, name))
                progress.add(name, file.nbytes(name))
    except hbfp.FileError as error:  # of the structure: nothing more can be read
        faults.append(str(error))
    faults += [row["fault"] for row in rows if row["fault"]]
    if arguments.json:
        print(json.dumps({"file": arguments.file, "good": not faults, "faults": faults, "tensors": rows}, indent=1))
    else:
        told = [f"{row['name']}: {row['checked']}" for row in rows if not row["fault"]]
        verdict = f"{len(faults)} of the checks failed" if faults else f"{len(rows)} tensors, all good"
        print("\n".join([*told, *faults, verdict]))
    return 1 if faults else 0


def _checked(file: File, name: str) -> dict[str, Any]:
    from hbfp.array import BlockArray
    from hbfp.errors import CodeError, FileError

    described, fault = file.description(name), None
    checked = "plain, its place" if described is None else "codes and sha256"
    try:
        if described is not None and described.sha256 is None:
            checked = "codes; the file has no sha256 of it"
            array = file[name]
            assert isinstance(array, BlockArray)
            array.check_codes()
        else:
            file.verify(name)
    except (FileError, CodeError) as error:
        fault = str(error)
    return {"name": name, "checked": checked, "fault": fault}
