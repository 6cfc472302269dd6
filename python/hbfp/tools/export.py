"""`hbfp export`: a packed file in the format of another runtime, without changing a bit, or refused by name."""

import argparse
import dataclasses
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hbfp.array import BlockArray

    Tensor: TypeAlias = BlockArray | NDArray[Any]
    Tensors: TypeAlias = Mapping[str, Tensor]

NAME = "export"
HELP = "write a packed file as GGUF or ONNX, losslessly, or say which tensor does not fit and why"

# By the width of what is read back.
_TYPES = {"gguf": {4: "Q4_0", 8: "Q8_0"}, "onnx": {4: "INT4", 8: "INT8", 16: "INT16"}}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"""{HELP}.

  hbfp export model.safetensors --to gguf
  hbfp export build/train/checkpoint.pt --to gguf
  hbfp export mlp.safetensors --to onnx --layers 0 2 4

The file is read back before it is done: exit code 1 if a value differs."""
    parser.add_argument("file", type=Path, metavar="FILE", help="packed (safetensors), or a checkpoint of hbfp train")
    parser.add_argument("--to", choices=("gguf", "onnx"), required=True, help="the format")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="default: FILE with the format's ending")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="TEXT",
        help="gguf, a GPT: the text that it was trained on, for the tokenizer (default: what a checkpoint names)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="onnx: a network that runs, of these linear layers with a ReLU between one and the next "
        "(default: the tensors alone)",
    )
    parser.add_argument(
        "--activations", metavar="FORMAT", help="onnx, --layers: of the layers' inputs (default: as each one's weight)"
    )
    parser.add_argument(
        "--any-order",
        action="store_true",
        help="onnx, --layers: let the runtime add up blocks in any order, which is faster and may differ in last bits",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.errors import ExportError, HBFPError

    _check_options(arguments)
    file: Path = arguments.file
    out: Path = arguments.out or file.with_suffix(f".{arguments.to}")
    if out.resolve() == file.resolve():
        raise HBFPError(f"{out} is the file itself: give another one with --out")
    tensors, vocabulary = _read(file, arguments.data)
    try:
        pairs = _written(out, tensors, vocabulary, arguments)
    except ExportError as error:
        # Arrays know the file that they come from, plain tensors don't.
        raise error if str(error).startswith(str(file)) else ExportError(f"{file}: {error}") from error
    rows = [_row(name, *pair, _TYPES[arguments.to]) for name, pair in pairs.items()]
    if arguments.json:
        print(json.dumps({"file": str(out), "bytes": out.stat().st_size, "tensors": rows}, indent=1))
    else:
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            shape = " × ".join(map(str, row["shape"]))
            print(f"{row['name']:<{width}}  {shape:<14} {row['from']:<12} → {row['to']}")
        print(f"written: {out}, {out.stat().st_size:,} bytes")
    wrong = [row["name"] for row in rows if not row["same"]]
    if wrong:
        print(f"hbfp export: {out}: other values read back from {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _check_options(arguments: argparse.Namespace) -> None:
    from hbfp.errors import HBFPError

    if arguments.to != "onnx" and arguments.layers:
        raise HBFPError("--layers is an option of --to onnx: leave it out")
    if arguments.to != "gguf" and arguments.data is not None:
        raise HBFPError("--data is an option of --to gguf: leave it out")
    if not arguments.layers and (arguments.activations is not None or arguments.any_order):
        raise HBFPError("--activations and --any-order are of networks: name the layers with --layers")


def _read(file: Path, data: Path | None) -> tuple["Tensors", str | None]:
    """The tensors of a packed file or of a training checkpoint, and the characters of the text."""
    import hbfp

    if zipfile.is_zipfile(file):  # what torch.save writes
        from hbfp.checkpoint import encoded_state
        from hbfp.training.data import Windows
        from hbfp.training.train import Training

        training = Training.resume(file, {} if data is None else {"data": str(data)})
        state = encoded_state(training.run.model)
        vocabulary = training.data.corpus.vocabulary if isinstance(training.data, Windows) else None
        return {name: _of_file(value, file, name) for name, value in state.items()}, vocabulary
    if data is None:
        return hbfp.load(file), None
    from hbfp.training.data import Corpus

    return hbfp.load(file), Corpus.read(data).vocabulary


def _of_file(value: Any, file: Path, name: str) -> Any:
    from hbfp.array import BlockArray

    return dataclasses.replace(value, source=f"{file}: tensor {name!r}") if isinstance(value, BlockArray) else value


def _written(
    out: Path, tensors: "Tensors", vocabulary: str | None, arguments: argparse.Namespace
) -> dict[str, tuple["Tensor", "Tensor"]]:
    """Writes the file; by its names there, each tensor and what was read back."""
    from hbfp.errors import ExportError
    from hbfp.exports import gguf, gpt2, onnx, onnx_network

    if arguments.to == "onnx":
        if arguments.layers:
            onnx_network.save(
                out,
                tensors,
                arguments.layers,
                activations=arguments.activations,
                exact=not arguments.any_order,
            )
        else:
            onnx.save(out, tensors)
        return {name: (tensors[name], value) for name, value in onnx.load(out).items()}
    if gpt2.is_gpt(tensors):
        gpt2.save(out, tensors, vocabulary)
        named = {theirs: tensors[ours] for ours, theirs in gpt2.names(tensors).items()}
    elif arguments.data is not None:
        raise ExportError("--data is for the tokenizer of a GPT of hbfp train; found other tensors: leave it out")
    else:
        gguf.save(out, tensors)
        named = dict(tensors)
    return {name: (named[name], value) for name, value in gguf.load(out).items()}


def _row(name: str, given: "Tensor", read: "Tensor", types: Mapping[int, str]) -> dict[str, Any]:
    import numpy as np

    from hbfp.array import BlockArray

    before, after = (np.asarray(value) for value in (given, read))
    return {
        "name": name,
        "shape": list(given.shape),
        "from": str(given.format if isinstance(given, BlockArray) else given.dtype),
        "to": types[read.format.bits] if isinstance(read, BlockArray) else str(read.dtype),
        "same": np.array_equal(before, after, equal_nan=before.dtype.kind in "fc"),
    }
