"""`hbfp inspect FILE`: the tensors of a file, or the bits of one block."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbfp.files import File

NAME = "inspect"
HELP = "list the tensors of a file, or show the bits of one block"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a packed file, or the index of its shards")
    parser.add_argument(
        "--block",
        nargs=3,
        metavar=("NAME", "I", "J"),
        help="block J of row I of an encoded tensor, counted in its exponent plane",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import hbfp

    with hbfp.open(arguments.file) as file:
        if arguments.block:
            found = _block(file, *arguments.block)
            print(json.dumps(found, indent=1) if arguments.json else _block_told(found))
        else:
            rows = [_row(file, name) for name in file]
            whole = {"file": arguments.file, "metadata": file.metadata, "tensors": rows}
            print(json.dumps(whole, indent=1) if arguments.json else _told(rows))
    return 0


def _row(file: File, name: str) -> dict[str, Any]:
    described = file.description(name)
    nbytes = file.nbytes(name)
    stored = file.stored(name)[0] if described is None else described
    elements = math.prod(stored.shape)
    return {
        "name": name,
        "format": file.stored(name)[0].dtype if described is None else str(described.format),
        "encoded": described is not None,
        "shape": list(stored.shape),
        "axis": None if described is None else described.axis,
        "rounding": None if described is None or described.rounding is None else str(described.rounding),
        "sha256": None if described is None else described.sha256,
        "bytes": nbytes,
        "bits_per_element": nbytes * 8 / elements if elements else None,
    }


def _told(rows: list[dict[str, Any]]) -> str:
    from hbfp.tables import in_bytes, table

    head = ("tensor", "format", "shape", "axis", "rounding", "bytes", "bits/element")
    lines = [
        (
            row["name"],
            row["format"],
            "x".join(map(str, row["shape"])) or "-",
            "-" if row["axis"] is None else str(row["axis"]),
            row["rounding"] or "-",
            in_bytes(row["bytes"]),
            "-" if row["bits_per_element"] is None else f"{row['bits_per_element']:.3f}",
        )
        for row in rows
    ]
    encoded = sum(row["encoded"] for row in rows)
    total = in_bytes(sum(row["bytes"] for row in rows))
    return f"{table(head, lines, right=(5, 6))}\n{len(rows)} tensors, {encoded} of them encoded, {total}"


def _block(file: File, name: str, row: str, column: str) -> dict[str, Any]:
    from hbfp.array import BlockArray
    from hbfp.errors import HBFPError
    from hbfp.tools.blocks import block

    if name not in file:
        raise HBFPError(f"{file.path}: no tensor {name!r}: see hbfp inspect {file.path} for their names")
    array = file[name]
    if not isinstance(array, BlockArray):
        raise HBFPError(f"{file.path}: tensor {name!r} is not encoded and has no blocks")
    try:
        place = int(row), int(column)
    except ValueError:
        raise HBFPError(f"--block: expected NAME and two numbers; found {row!r} and {column!r}") from None
    found = block(array, *place)
    bits = array.format.bits
    # The bits as they are, forbidden ones too: a damaged block is what one looks at.
    codes = [field - (field >> bits - 1 << bits) for field in found.codes]
    nan = found.exponent == 255
    values = ["nan" if nan else _value(code, found.exponent - 127) for code in codes]
    return {
        "name": name,
        "format": str(array.format),
        "row": found.row,
        "block": found.column,
        "first_element": list(found.first),
        "exponent_byte": found.exponent,
        "scale_exponent": None if nan else found.exponent - 127,
        "bytes": found.data.hex(" "),
        "fields": [format(field, f"0{bits}b") for field in found.codes],
        "codes": codes,
        "values": values,
    }


def _value(code: int, exponent: int) -> float | str:
    value = math.ldexp(code, exponent)
    return value if abs(value) < 2.0**128 else "inf" if value > 0 else "-inf"


def _block_told(found: dict[str, Any]) -> str:
    from hbfp.tables import table

    c, s = found["exponent_byte"], found["scale_exponent"]
    scale = "a NaN block" if s is None else f"s = c - 127 = {s}; a value is q * 2^{s}"
    lines = [
        (str(i), field, str(code), str(value))
        for i, (field, code, value) in enumerate(zip(found["fields"], found["codes"], found["values"], strict=True))
    ]
    first = ", ".join(map(str, found["first_element"]))
    return "\n".join(
        [
            f"{found['name']}: {found['format']}, row {found['row']}, block {found['block']}, from element [{first}]",
            f"exponent  {c:08b}  c = {c} (0x{c:02x}): {scale}",
            f"bytes     {found['bytes']}",
            table(("", "stored", "q", "value"), lines, right=(0, 1, 2, 3)),
        ]
    )
