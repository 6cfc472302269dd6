"""Models in several files: shards, each a whole file of its own, and an index that says which tensor lies in which.

The names and the form are those of the Hugging Face Hub: `model-00001-of-00003.safetensors` and so on, and
`model.safetensors.index.json`, {"metadata": {"total_size": bytes}, "weight_map": {stored name: file}}.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hbfp.errors import FileError
from hbfp.files.container import LARGEST_HEADER, Container
from hbfp.files.strict import is_text, parse_object, refuse, shown

SUFFIX = ".index.json"


def index_of(path: str | os.PathLike[str]) -> Path:
    """Where the index of the model called `path` lies."""
    return Path(f"{os.fspath(path)}{SUFFIX}")


def shard_name(path: Path, number: int, count: int, generation: str = "") -> str:
    """`model-00002-of-00003.safetensors` of `model.safetensors`; after "model" comes `generation`."""
    return f"{path.stem}{generation}-{number:05}-of-{count:05}{path.suffix}"


def own_shards(path: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that `shard_name` could have given to a shard of `path`."""
    form = re.compile(rf"{re.escape(path.stem)}(\.[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
    return [name for name in names if form.fullmatch(name)]


def index_text(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The content of an index."""
    whole = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


def read_index(path: str) -> dict[str, str]:
    """Stored name -> name of the file beside the index.

    Raises:
        FileError: the index is damaged, or leads out of its folder.
        OSError: it cannot be read.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise FileError(f"{path}: expected an index of shards; found no regular file")
    with open(path, "rb") as file:
        text = file.read(LARGEST_HEADER + 1)
    if len(text) > LARGEST_HEADER:
        refuse(path, None, "index", f"at most {LARGEST_HEADER} bytes", "more")
    weights = parse_object(path, "index", text).get("weight_map")
    if not isinstance(weights, dict):
        refuse(path, None, "weight_map", "a JSON object", shown(weights))
    for name, file_name in weights.items():
        if not is_text(name):
            refuse(path, None, "weight_map", "names that are text", f"half a surrogate pair in {shown(name)}")
        plain = is_text(file_name) and file_name not in ("", ".", "..") and not re.search(r"[/\\\0:]", file_name)
        if not plain:
            refuse(path, name, "weight_map", "the name of a file in the folder of the index", shown(file_name))
    return weights


def open_shards(path: str) -> list[Container]:
    """The files of an index, opened: they hold the tensors that it says, and no others.

    Raises:
        FileError: index and files do not fit together, or one of them is damaged.
        OSError: one cannot be read.
    """
    weights = read_index(path)
    containers = {name: Container(os.path.join(os.path.dirname(path), name)) for name in sorted({*weights.values()})}
    for name, file_name in weights.items():
        if name not in containers[file_name].entries:
            refuse(path, name, "weight_map", f"a tensor that {file_name} holds", "none of that name in it")
    for file_name, container in containers.items():
        for name in container.entries:
            if weights.get(name) != file_name:
                found = f"{shown(weights[name])}" if name in weights else "none"
                refuse(path, name, "weight_map", f"{file_name}, which holds a tensor of that name", found)
    return list(containers.values())
