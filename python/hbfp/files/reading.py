"""Reading: a file or its shards as one mapping from names to arrays that stay on the disk until they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbfp.array import BlockArray
from hbfp.errors import HBFPError
from hbfp.files import description
from hbfp.files.container import Container, Entry
from hbfp.files.description import METADATA_KEY, SUFFIXES, Description
from hbfp.files.index import SUFFIX, index_of, open_shards
from hbfp.files.strict import refuse


class File(Mapping[str, BlockArray | NDArray[Any]]):
    """An open file, or the shards of an index, as a mapping: `file["name"]` is a `BlockArray` or a numpy array.

        with hbfp.open("model.safetensors") as file:
            rows = file["embedding.weight"][1000:1010].decode()

    Opening reads and checks the header and nothing else. Arrays are views of the file in memory: their bytes are read
    when they are used, those of a slice alone where it is a slice, and stay valid after `close`. Plain arrays may be
    written into; the file does not change. Files must be replaced by renaming, as `save` does: one that another program
    cuts short takes everybody down who reads it.

    Raises:
        FileError: the file is damaged or not such a file; names the tensor and the field, what was expected and found.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not os.path.exists(self.path) and os.path.exists(index_of(self.path)):
            self.path = os.fspath(index_of(self.path))  # `save` was given that name, and made shards
        sharded = self.path.endswith(SUFFIX)
        containers = open_shards(self.path) if sharded else [Container(self.path)]
        self._encoded: dict[str, Description] = {}
        self._containers: dict[str, Container] = {}
        plain: list[str] = []
        for container in containers:
            described = description.read(container)
            stored = [name for name in container.entries if not name.endswith(SUFFIXES)]
            for name in [*described, *stored]:
                if name in self._containers:
                    refuse(self.path, name, "planes", "one array of this name", "another one in another file")
                self._containers[name] = container
            self._encoded |= described
            plain += stored
        self._names = [*self._encoded, *sorted(plain)]
        self._metadata = dict(containers[0].metadata) if containers else {}
        self._closed = False

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that were given to `save`; of shards, those of the first."""
        return {key: text for key, text in self._metadata.items() if key != METADATA_KEY}

    def description(self, name: str) -> Description | None:
        """Format, shape, axis, rounding and digest of an encoded array; None for a plain one. KeyError for none."""
        self._container(name)
        return self._encoded.get(name)

    def stored(self, name: str) -> tuple[Entry, NDArray[np.uint8]]:
        """A plain array as it is stored: its dtype in the container's words and its shape, and its bytes."""
        container = self._container(name)
        return container.entries[name], container.bytes_of(name)

    def nbytes(self, name: str) -> int:
        """Bytes that an array takes in the file."""
        entries = self._container(name).entries
        stored = [name + suffix for suffix in SUFFIXES] if name in self._encoded else [name]
        return sum(entries[plane].nbytes for plane in stored)

    def verify(self, name: str) -> None:
        """Read all of an encoded array and compare it with its digest; then check its codes. Plain ones have no digest.

        Raises:
            FileError: the planes are not those that were written, or there is no digest to tell.
            CodeError: the array holds forbidden codes.
        """
        container = self._container(name)
        if name in self._encoded:
            described = self._encoded[name]
            description.verify(container.path, name, description.array(container, name, described), described)

    def close(self) -> None:
        """Give the file up; arrays that were read from it stay valid."""
        self._containers.clear()
        self._closed = True

    def _container(self, name: str) -> Container:
        if self._closed:
            raise HBFPError(f"{self.path} is closed: open it again")
        return self._containers[name]

    def __getitem__(self, name: str) -> BlockArray | NDArray[Any]:
        container = self._container(name)
        if name in self._encoded:
            return description.array(container, name, self._encoded[name])
        return container.array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{'closed ' if self._closed else ''}hbfp file {self.path!r}, {len(self._names)} tensors>"


def load(path: str | os.PathLike[str], *, verify: bool = False) -> dict[str, BlockArray | NDArray[Any]]:
    """All arrays of a file, or of the shards of an index: encoded ones as `BlockArray`, plain ones as numpy arrays.

    The structure is checked before anything is used; the codes of an array are checked when they are first read. Arrays
    are views of the file, as those of `open`.

    Args:
        path: of the file, or of the index of a model in shards; also what `save` was given, where it made shards of it.
        verify: also compare every encoded array with its recorded sha256, and read all codes at once.

    Raises:
        FileError: the file is damaged or not such a file; names the tensor and the field, what was expected and found.
        CodeError: with `verify`, an array holds forbidden codes.
        OSError: the file cannot be read.
    """
    with File(path) as file:
        if verify:
            for name in file:
                file.verify(name)
        return dict(file)


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were given to `save` as metadata.

    Raises:
        FileError: the file is damaged or not a safetensors file.
        OSError: the file cannot be read.
    """
    with File(path) as file:
        return file.metadata
