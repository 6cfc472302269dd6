"""Writing: one tensor at a time, to a file that appears when all of it is on the disk."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp.array import BlockArray
from hbfp.errors import DTypeError, FileError
from hbfp.files import description
from hbfp.files.container import BITS, METADATA, NUMPY, header_of
from hbfp.files.description import METADATA_KEY, SUFFIXES, Description
from hbfp.files.index import index_of, index_text, own_shards, read_index, shard_name
from hbfp.files.replacing import replacing
from hbfp.files.strict import is_text, shown
from hbfp.format import HBFP, Rounding

_DTYPES = {name: dtype for dtype, name in NUMPY.items() if not dtype.startswith("F8")}
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class Deferred:
    """An array that is made when its turn to be written comes: files larger than the memory are written so.

    Attributes:
        dtype: of a plain array, in the container's words ("F32", "BF16", ...); the format of an encoded one.
        shape: of the array.
        make: gives the array: a `BlockArray` of that format, or the plain array's values, or its bytes as uint8.
        axis, rounding: of an encoded array.
    """

    dtype: str | HBFP
    shape: tuple[int, ...]
    make: Callable[[], BlockArray | NDArray[Any]]
    axis: int = -1
    rounding: Rounding | None = None


Value: TypeAlias = BlockArray | ArrayLike | Deferred


@dataclass(slots=True)
class _Part:
    """A tensor on its way to a file: what it will be stored as, and what makes it."""

    stored: dict[str, tuple[str, tuple[int, ...], int]]
    make: Callable[[], BlockArray | NDArray[Any]]
    description: Description | None = None

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.stored.values())


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Value],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int | None = None,
) -> None:
    """Write encoded and plain arrays to one file, or to shards with an index.

    The file appears complete or not at all: it is written under another name beside its place, flushed to the disk and
    renamed. If anything fails, what stood there before is untouched. Of shards the index is written last, and under
    names that no file has yet: until then, a reader of the old index finds the old model whole.

    Args:
        path: of the file; one that exists is replaced.
        tensors: by name; names must not end with ".hbfp_exponents" or ".hbfp_mantissas".
        metadata: further strings for the header, under any key but "hbfp".
        max_shard_size: bytes of data. Where there is more, shards of about that size are written beside `path`,
            "model-00001-of-00003.safetensors" and so on for "model.safetensors", with an index,
            "model.safetensors.index.json", in place of one file. No tensor is divided.

    Raises:
        FileError: a name or a metadata key that the layout keeps for itself, or that is no text.
        DTypeError: a plain array of a type that the container does not have.
        CodeError: an array that was itself read from a file holds forbidden codes.
        OSError: the file cannot be written.
    """
    where = os.fspath(path)
    strings = _checked_metadata(where, metadata)
    parts = {name: _part(where, name, value) for name, value in tensors.items()}
    target = Path(path).resolve()  # through a symbolic link, not over it
    shards = _shards(parts, max_shard_size)
    if len(shards) == 1:
        _write(target, shards[0], strings)
    else:
        _write_shards(target, shards, strings)


def _checked_metadata(path: str, metadata: Mapping[Any, Any] | None) -> dict[str, str]:
    strings = dict(metadata or {})
    for key, text in strings.items():
        if not is_text(key) or not is_text(text):
            raise FileError(f"{path}: metadata must map strings to strings; found {shown(key)}: {shown(text)}")
    if METADATA_KEY in strings:
        raise FileError(f"{path}: metadata key {METADATA_KEY!r} holds the description of the tensors: use another key")
    return strings


def _part(path: str, name: object, value: Value) -> _Part:
    if not isinstance(name, str) or not is_text(name):
        raise FileError(f"{path}: names of tensors must be strings; found {shown(name)}")
    if name.endswith(SUFFIXES) or name == METADATA:
        raise FileError(f"{path}: tensor {shown(name)}: the file layout keeps this name for itself: use another one")
    later = _deferred(path, name, value)
    if not isinstance(later.dtype, HBFP):
        nbytes = math.prod(later.shape) * BITS[later.dtype] // 8
        return _Part({name: (later.dtype, later.shape, nbytes)}, later.make)
    axis = later.dtype.blocked_axis(later.axis, later.shape)
    described = Description(later.dtype, later.shape, axis, later.rounding, _NO_DIGEST)
    planes = zip(SUFFIXES, described.plane_shapes, strict=True)
    return _Part({name + suffix: ("U8", shape, shape[0] * shape[1]) for suffix, shape in planes}, later.make, described)


def _deferred(path: str, name: str, value: Value) -> Deferred:
    if isinstance(value, Deferred):
        return value
    if isinstance(value, BlockArray):
        encoded = value
        return Deferred(encoded.format, encoded.shape, lambda: encoded, encoded.axis, encoded.rounding)
    plain = _plain(path, name, value)
    return Deferred(_DTYPES[plain.dtype.name], plain.shape, lambda: plain)


def _plain(path: str, name: str, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value, order="C")
    if array.dtype.name not in _DTYPES:
        raise DTypeError(f"{path}: tensor {shown(name)}: arrays of {array.dtype} cannot be stored: convert it first")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


# --- one file --------------------------------------------------------------------------------------------------------


def _write(target: Path, parts: Mapping[str, _Part], strings: Mapping[str, str]) -> None:
    with replacing(target) as file:
        _write_content(file, parts, strings)


def _write_content(file: IO[bytes], parts: Mapping[str, _Part], strings: Mapping[str, str]) -> None:
    # The widest dtypes first, so that each array begins at a multiple of its elements' size.
    order = sorted(parts, key=lambda name: (-max(BITS[dtype] for dtype, _, _ in parts[name].stored.values()), name))
    entries = {stored: entry for name in order for stored, entry in parts[name].stored.items()}
    described = {name: part.description for name, part in parts.items() if part.description is not None}
    header = _header(entries, described, strings)
    file.write(header)
    for name in order:
        part = parts[name]
        array = part.make()
        if isinstance(array, BlockArray):
            array = array.canonical()
            array.check_codes()
            described[name] = described[name]._replace(sha256=description.digest(array))
            planes: tuple[NDArray[Any], ...] = (array.exponent_plane, array.mantissa_plane)
        else:
            planes = (array,)
        for plane, (stored, (_, _, nbytes)) in zip(planes, part.stored.items(), strict=True):
            data = np.ascontiguousarray(plane).reshape(-1).view(np.uint8)
            if data.nbytes != nbytes:
                raise FileError(f"tensor {shown(stored)}: expected {nbytes} bytes to write; found {data.nbytes}")
            file.write(data.data)
    # Digests are known only now; they are all of one length.
    again = _header(entries, described, strings)
    assert len(again) == len(header)
    file.seek(0)
    file.write(again)


def _header(
    entries: Mapping[str, tuple[str, tuple[int, ...], int]],
    described: Mapping[str, Description],
    strings: Mapping[str, str],
) -> bytes:
    return header_of(entries, {**strings, METADATA_KEY: description.written(described)})


# --- several files ---------------------------------------------------------------------------------------------------


def _shards(parts: dict[str, _Part], limit: int | None) -> list[dict[str, _Part]]:
    """The parts in their order, cut into groups of up to `limit` bytes; one that is larger stands alone."""
    if limit is not None and (type(limit) is not int or limit < 1):
        raise FileError(f"max_shard_size must be a number of bytes from 1; found {limit!r}")
    groups: list[dict[str, _Part]] = [{}]
    size = 0
    for name, part in parts.items():
        if limit is not None and groups[-1] and size + part.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = part
        size += part.nbytes
    return groups


def _write_shards(target: Path, shards: list[dict[str, _Part]], strings: Mapping[str, str]) -> None:
    index = index_of(target)
    old = _shards_of(target, index)
    names = [shard_name(target, number, len(shards)) for number in range(1, len(shards) + 1)]
    if any(target.with_name(name).exists() for name in names):
        generation = f".{secrets.token_hex(4)}"
        names = [shard_name(target, number, len(shards), generation) for number in range(1, len(shards) + 1)]
    try:
        for name, parts in zip(names, shards, strict=True):
            _write(target.with_name(name), parts, strings)
        weight_map = {
            stored: name
            for name, parts in zip(names, shards, strict=True)
            for part in parts.values()
            for stored in part.stored
        }
        with replacing(index) as file:
            file.write(index_text(weight_map, sum(part.nbytes for parts in shards for part in parts.values())))
    except BaseException:
        for name in {*names} - {*_shards_of(target, index)}:  # unless the index has its name already
            target.with_name(name).unlink(missing_ok=True)
        raise
    # The new model is whole. What it replaces would only be found instead of it.
    for name in {*old, target.name} - {*names}:
        target.with_name(name).unlink(missing_ok=True)


def _shards_of(target: Path, index: Path) -> list[str]:
    """The shards of the model that is being replaced, by names that only `save` gives."""
    with suppress(FileError, OSError):
        return own_shards(target, {*read_index(os.fspath(index)).values()})
    return []
