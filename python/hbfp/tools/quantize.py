"""`hbfp quantize IN OUT`: a checkpoint in floats becomes a packed file, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hbfp.tools import checkpoints
from hbfp.tools.checkpoints import FLOATS, Tensor
from hbfp.tools.progress import Progress

if TYPE_CHECKING:
    from hbfp.array import BlockArray
    from hbfp.files import Deferred
    from hbfp.format import HBFP
    from hbfp.patterns import Matches

NAME = "quantize"
HELP = "pack the weights of a checkpoint"

SHORTEST = 16
"""A line shorter than that has more exponent than it saves; convolutions take other blocks there too."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"""{HELP}

Packed are floats of two dimensions or more, along the last axis; where that is shorter than {SHORTEST} and there are
three dimensions or more, as in the kernels of convolutions, along axis 1. What is shorter than {SHORTEST} there stays
as it is. A rule decides otherwise, the first that covers a tensor's name or that of a module around it:

  hbfp quantize model.safetensors packed.safetensors --rule 'lm_head=hbfp6b64' --rule 're:.*norm.*=none'
  hbfp quantize model.pt packed.safetensors --format hbfp6b16 --rule 'conv*=hbfp6b16@1'"""
    parser.add_argument("source", metavar="IN", help="safetensors, an index of shards, or a checkpoint of torch")
    parser.add_argument("target", metavar="OUT", nargs="?", help="the packed file; not with --dry-run")
    parser.add_argument("--format", default="hbfp4b64", help="of what no rule covers (default: %(default)s)")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT[@AXIS]",
        help="a glob, or re: and a regular expression; none leaves a tensor as it is (may be given several times)",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB: write shards with an index")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; print sizes and errors by tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.errors import HBFPError

    if (arguments.target is None) != arguments.dry_run:
        raise HBFPError("give IN and OUT, or IN and --dry-run")
    begin = time.monotonic()
    tensors, metadata = checkpoints.read(arguments.source)
    rows = list(_plan(tensors, arguments.format, arguments.rule))
    with Progress(sum(row.bytes for row in rows)) as progress:
        if arguments.dry_run:
            rows = [_measured(row, tensors[row.name], progress) for row in rows]
        else:
            _write(arguments.target, arguments.max_shard_size, rows, tensors, metadata, progress)
    seconds = time.monotonic() - begin
    whole = {
        "tensors": [asdict(row) for row in rows],
        "bytes": sum(row.bytes for row in rows),
        "packed_bytes": sum(row.packed_bytes for row in rows),
        "seconds": seconds,
    }
    print(json.dumps(whole, indent=1) if arguments.json else _told(rows, seconds, arguments))
    return 0


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    """None: it stays as it is."""
    axis: int | None
    bytes: int
    packed_bytes: int
    sqnr: float | None = None
    """dB, of a dry run; None too where the encoding is exact."""
    saturated: float | None = None
    """Share of the elements that are not zero, of a dry run."""


@dataclass(frozen=True, slots=True)
class _Rule:
    text: str
    matches: Matches
    format: HBFP | None
    axis: int | None


def _rule(text: str) -> _Rule:
    from hbfp.errors import HBFPError, RuleError
    from hbfp.format import HBFP
    from hbfp.patterns import matcher

    pattern, equals, value = text.rpartition("=")
    form, at, axis = value.partition("@")
    if not equals or not pattern:
        raise RuleError(f"rule {text!r}: expected PATTERN=FORMAT, PATTERN=FORMAT@AXIS or PATTERN=none")
    try:
        number = int(axis) if at else None
        return _Rule(text, matcher(pattern), None if form == "none" else HBFP.parse(form), number)
    except RuleError:
        raise
    except (HBFPError, ValueError) as error:
        raise RuleError(f"rule {text!r}: {error}") from None


def _plan(tensors: Mapping[str, Tensor], form: str, texts: list[str]) -> Iterator[Row]:
    from hbfp.errors import HBFPError, RuleError
    from hbfp.format import HBFP
    from hbfp.patterns import covers

    default, rules = HBFP.parse(form), [_rule(text) for text in texts]
    for given in rules:
        if not any(covers(given.matches, name) for name in tensors):
            raise RuleError(f"rule {given.text!r} covers no tensor: see hbfp quantize IN --dry-run for their names")
    for name, tensor in tensors.items():
        rule: _Rule | None = next((rule for rule in rules if covers(rule.matches, name)), None)
        axis = _axis(tensor.shape) if rule is None or rule.axis is None else rule.axis
        format = default if rule is None else rule.format
        if tensor.dtype not in FLOATS or (rule is None and not _worth(tensor.shape, axis, default)):
            format = None
        if format is None:
            yield Row(name, tensor.shape, tensor.dtype, None, tensor.axis, tensor.nbytes, tensor.nbytes)
            continue
        try:
            axis = format.blocked_axis(axis, tensor.shape)
        except HBFPError as error:
            raise RuleError(f"tensor {name!r}: {error}") from None
        packed = format.storage_bytes(tensor.shape, axis)
        yield Row(name, tensor.shape, tensor.dtype, str(format), axis, tensor.nbytes, packed)


def _axis(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) > 2 and shape[-1] < SHORTEST else max(len(shape) - 1, 0)


def _worth(shape: tuple[int, ...], axis: int, format: HBFP) -> bool:
    return len(shape) >= 2 and (format.block is None or shape[axis] >= SHORTEST)


def _measured(row: Row, tensor: Tensor, progress: Progress) -> Row:
    from dataclasses import replace

    from hbfp.array import encoding_error

    progress.add(row.name, row.bytes)
    if row.format is None or row.axis is None:
        return row
    nonzero, signal, noise, saturated = encoding_error(tensor.floats(), row.format, row.axis)
    sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    return replace(row, sqnr=sqnr, saturated=saturated / max(nonzero, 1))


def _write(
    target: str,
    max_shard_size: str | None,
    rows: list[Row],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    from hbfp.files import save

    limit = None if max_shard_size is None else _size(max_shard_size)
    save(target, {row.name: _later(row, tensors[row.name], progress) for row in rows}, metadata, max_shard_size=limit)


def _later(row: Row, tensor: Tensor, progress: Progress) -> Deferred | BlockArray:
    from hbfp.files import Deferred
    from hbfp.format import HBFP, Rounding

    def counted(data: Any) -> Any:
        progress.add(row.name, row.bytes)
        return data

    if row.format is not None and row.axis is not None:
        make = partial(_encoded, row, tensor)
        format = HBFP.parse(row.format)
        return Deferred(format, row.shape, lambda: counted(make()), row.axis, Rounding.NEAREST_EVEN)
    if tensor.axis is not None:
        packed: BlockArray = counted(tensor.data())
        return packed
    return Deferred(tensor.dtype, tensor.shape, lambda: counted(tensor.data()))


def _encoded(row: Row, tensor: Tensor) -> BlockArray:
    from hbfp.array import encode
    from hbfp.errors import NonFiniteError

    try:
        return encode(tensor.floats(), row.format or "", row.axis or 0, check=True)
    except NonFiniteError as error:
        raise NonFiniteError(f"tensor {row.name!r}: {error}; leave it as it is with --rule '{row.name}=none'") from None


def _size(text: str) -> int:
    from hbfp.errors import HBFPError

    number = text.upper().removesuffix("B")
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        size = int(float(number.rstrip("KMG")) * scale)
    except ValueError:
        size = 0
    if size < 1:
        raise HBFPError(f"--max-shard-size: expected a size such as 5GB or 500MB; found {text!r}")
    return size


def _told(rows: list[Row], seconds: float, arguments: argparse.Namespace) -> str:
    from hbfp.tables import in_bytes, table

    before, after = sum(row.bytes for row in rows), sum(row.packed_bytes for row in rows)
    packed = sum(row.format is not None for row in rows)
    summary = (
        f"{packed} of {len(rows)} tensors packed: {in_bytes(before)} -> {in_bytes(after)},"
        f" {before / max(after, 1):.2f} times smaller; {seconds:.1f} s, {in_bytes(int(before / max(seconds, 1e-9)))}/s"
    )
    if not arguments.dry_run:
        return summary
    head = ("tensor", "shape", "dtype", "packed as", "axis", "bytes", "packed", "SQNR, dB", "saturated")
    lines = [
        (
            row.name,
            "x".join(map(str, row.shape)) or "-",
            row.dtype,
            row.format or "-",
            "-" if row.axis is None else str(row.axis),
            in_bytes(row.bytes),
            in_bytes(row.packed_bytes),
            "" if row.format is None else "exact" if row.sqnr is None else f"{row.sqnr:.1f}",
            "" if row.saturated is None else f"{row.saturated:.2%}",
        )
        for row in rows
    ]
    return f"{table(head, lines, right=(5, 6, 7, 8))}\n{summary}"
