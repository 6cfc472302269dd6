"""`hbfp diff A B`: which tensors of two files differ, where first, and by how much."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbfp.files import File

NAME = "diff"
HELP = "compare two files tensor by tensor"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a file, packed or not, or the index of its shards")
    parser.add_argument("b", metavar="B", help="another, of the same tensors")
    parser.add_argument("--all", action="store_true", help="also list the tensors that are equal")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import hbfp

    with hbfp.open(arguments.a) as a, hbfp.open(arguments.b) as b:
        names = [*a, *(name for name in b if name not in a)]
        rows = [_compare(a, b, name) for name in names]
    differ = [row for row in rows if row.difference is not None]
    if arguments.json:
        print(json.dumps({"equal": not differ, "tensors": [asdict(row) for row in rows]}, indent=1))
    else:
        print(_told(rows if arguments.all else differ, len(rows), len(differ)))
    return 1 if differ else 0


@dataclass(frozen=True, slots=True)
class Row:
    """How a tensor of B compares with that of A."""

    name: str
    difference: str | None
    """None: equal in type, description and every bit. The rounding that made the codes plays no part."""
    block: tuple[int, int] | None = None
    """Row and column, in the exponent plane, of the first block that differs."""
    first_element: tuple[int, ...] | None = None
    sqnr: float | None = None
    """dB: A's values against their differences from B's; None where they are equal, or cannot be compared."""


def _compare(a: File, b: File, name: str) -> Row:
    import numpy as np

    from hbfp.array import BlockArray
    from hbfp.tools.blocks import first_difference, first_element

    if name not in a or name not in b:
        return Row(name, f"only in {'B' if name in b else 'A'}")
    told_a, told_b = _description(a, name), _description(b, name)
    encoded = a.description(name) is not None and b.description(name) is not None
    if told_a == told_b and encoded:
        one, other = a[name], b[name]
        assert isinstance(one, BlockArray)
        assert isinstance(other, BlockArray)
        place = first_difference(one, other)
        if place is None:
            return Row(name, None)
        return Row(name, "codes", place, first_element(one, *place), _sqnr(a, b, name))
    if told_a == told_b:
        if np.array_equal(a.stored(name)[1], b.stored(name)[1]):
            return Row(name, None)
        return Row(name, "values", sqnr=_sqnr(a, b, name))
    return Row(name, f"{told_a} and {told_b}", sqnr=_sqnr(a, b, name))


def _description(file: File, name: str) -> str:
    described = file.description(name)
    if described is None:
        entry = file.stored(name)[0]
        return f"{entry.dtype} {list(entry.shape)}"
    return f"{described.format} {list(described.shape)}, axis {described.axis}"


def _sqnr(a: File, b: File, name: str) -> float | None:
    import numpy as np

    x, y = _values(a, name), _values(b, name)
    if x is None or y is None or x.shape != y.shape:
        return None
    signal = noise = 0.0
    # By runs, for a difference in float64 of all of a large tensor would take twice its memory.
    x, y = x.reshape(-1), y.reshape(-1)
    with np.errstate(all="ignore"):
        for begin in range(0, x.size, 2**20):
            part = x[begin : begin + 2**20].astype(np.float64)
            signal += float(np.square(part).sum())
            noise += float(np.square(part - y[begin : begin + 2**20]).sum())
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal == 0 or noise == 0:
        return None
    return 10 * math.log10(signal / noise)


def _values(file: File, name: str) -> Any:
    from hbfp.array import BlockArray
    from hbfp.tools.checkpoints import FLOATS, plain

    if file.description(name) is not None:
        array = file[name]
        assert isinstance(array, BlockArray)
        return array.decode()
    tensor = plain(file, name)
    return tensor.floats() if tensor.dtype in FLOATS else None


def _told(rows: list[Row], count: int, differ: int) -> str:
    from hbfp.tables import table

    summary = f"{count} tensors, {differ} differ" if differ else f"{count} tensors, all equal"
    if not rows:
        return summary
    lines = [
        (
            row.name,
            row.difference or "equal",
            "" if row.block is None else f"row {row.block[0]}, block {row.block[1]}",
            "" if row.first_element is None else str(list(row.first_element)),
            "" if row.sqnr is None else f"{row.sqnr:.1f}",
        )
        for row in rows
    ]
    head = ("tensor", "difference", "first in", "from element", "SQNR, dB")
    return f"{table(head, lines, right=(4,))}\n{summary}"
