"""Files of encoded and plain arrays: safetensors, with the description of the encoded ones in its metadata.

Two byte planes stand for each encoded array (docs/spec.md section 7): `<name>.hbfp_exponents` and
`<name>.hbfp_mantissas`, described by one JSON text under the metadata key `hbfp`. Any safetensors reader opens such a
file; this one checks that the parts fit before it uses them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from hbfp.array import BlockArray
from hbfp.errors import DTypeError, FileError, FormatError, ShapeError
from hbfp.format import HBFP, Rounding

__all__ = ["load", "load_metadata", "save"]

VERSION = 1
METADATA_KEY = "hbfp"
EXPONENTS = ".hbfp_exponents"
MANTISSAS = ".hbfp_mantissas"

_LARGEST_SIZE = 2**63 - 1

_STORABLE = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "bfloat16", "float32", "float64", "complex64"}
)


# --- writing ---------------------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, BlockArray | ArrayLike],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write encoded and plain arrays to one file.

    The file appears complete or not at all: it is written under another name beside its place, flushed to the disk and
    renamed. If anything fails, what stood there before is untouched.

    Args:
        path: of the file; one that exists is replaced.
        tensors: by name; names must not end with ".hbfp_exponents" or ".hbfp_mantissas".
        metadata: further strings for the header, under any key but "hbfp".

    Raises:
        FileError: a name or a metadata key that the layout keeps for itself, or that is no string.
        DTypeError: a plain array of a type that the container does not have.
        CodeError: an array that was itself read from a file holds forbidden codes.
        OSError: the file cannot be written.
    """
    where = os.fspath(path)
    header = _checked_metadata(where, metadata)
    planes: dict[str, NDArray[Any]] = {}
    described: dict[str, Any] = {}
    for name, value in tensors.items():
        _check_name(where, name)
        if not isinstance(value, BlockArray):
            planes[name] = _plain(where, name, value)
            continue
        array = value.canonical()
        array.check_codes()
        planes[name + EXPONENTS] = array.exponent_plane
        planes[name + MANTISSAS] = array.mantissa_plane
        described[name] = {"format": str(array.format), "shape": list(array.shape), "axis": array.axis}
        if array.rounding is not None:
            described[name]["rounding"] = str(array.rounding)
        described[name]["sha256"] = _sha256(array)
    header[METADATA_KEY] = json.dumps({"version": VERSION, "tensors": described}, separators=(",", ":"))
    _write_whole(where, planes, header)


def _checked_metadata(path: str, metadata: Mapping[Any, Any] | None) -> dict[str, str]:
    header = dict(metadata or {})
    for key, text in header.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise FileError(f"{path}: metadata must map strings to strings; found {key!r}: {text!r}")
    if METADATA_KEY in header:
        raise FileError(f"{path}: metadata key {METADATA_KEY!r} holds the description of the tensors: use another key")
    return header


def _check_name(path: str, name: object) -> None:
    if not isinstance(name, str):
        raise FileError(f"{path}: names of tensors must be strings; found {name!r}")
    if name.endswith((EXPONENTS, MANTISSAS)) or name == "__metadata__":
        raise FileError(f"{path}: tensor {name!r}: the file layout keeps this name for itself: use another one")


def _plain(path: str, name: str, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value, order="C")
    if array.dtype.name not in _STORABLE:
        raise DTypeError(f"{path}: tensor {name!r}: arrays of {array.dtype} cannot be stored: convert it first")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _sha256(array: BlockArray) -> str:
    digest = hashlib.sha256(array.exponent_plane.tobytes())
    digest.update(array.mantissa_plane.tobytes())
    return digest.hexdigest()


def _write_whole(path: str, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    target = Path(path).resolve()  # through a symbolic link, not over it
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Created here for the permissions that any new file gets; replacing a file keeps its own.
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        if target.exists():
            mode = stat.S_IMODE(target.stat().st_mode)
        safetensors.numpy.save_file(tensors, draft, metadata)
        os.chmod(draft, mode)
        _flush(draft)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Have the operating system put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ---------------------------------------------------------------------------------------------------------


class _Description(NamedTuple):
    """What the header says of one encoded array, checked."""

    format: HBFP
    shape: tuple[int, ...]
    axis: int
    rounding: Rounding | None
    sha256: str | None


def load(path: str | os.PathLike[str], *, verify: bool = False) -> dict[str, BlockArray | NDArray[Any]]:
    """Read a file: encoded arrays as `BlockArray`, plain ones as numpy arrays, by name.

    The structure is checked before anything is used; the codes of an array are checked when they are first read.

    Args:
        path: of the file.
        verify: also compare every encoded array with its recorded sha256, and read all codes at once.

    Raises:
        FileError: the file is damaged or not such a file; names the tensor and the field, what was expected and found.
        CodeError: with `verify`, an array holds forbidden codes.
        OSError: the file cannot be read.
    """
    where = os.fspath(path)
    with _opened(where) as file:
        stored = set(file.keys())
        described = _descriptions(where, file.metadata() or {})
        _check_partners(where, stored, described)
        tensors: dict[str, BlockArray | NDArray[Any]] = {}
        for name, description in described.items():
            array = _read_encoded(where, file, name, description)
            if verify:
                _verify(where, name, array, description)
            tensors[name] = array
        for name in sorted(stored):
            if not name.endswith((EXPONENTS, MANTISSAS)):
                tensors[name] = _read_plain(where, file, name)
    return tensors


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were given to `save` as metadata.

    Raises:
        FileError: the file is damaged or not a safetensors file.
        OSError: the file cannot be read.
    """
    with _opened(os.fspath(path)) as file:
        return {key: text for key, text in (file.metadata() or {}).items() if key != METADATA_KEY}


def _opened(path: str) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise FileError(f"{path}: expected a safetensors file; found a header that cannot be read: {error}") from error


def _refuse(path: str, tensor: str | None, field: str, expected: str, found: object) -> NoReturn:
    place = path if tensor is None else f"{path}: tensor {tensor!r}"
    raise FileError(f"{place}: {field}: expected {expected}; found {found}")


def _descriptions(path: str, metadata: Mapping[str, str]) -> dict[str, _Description]:
    if METADATA_KEY not in metadata:
        return {}

    def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            _refuse(path, None, "description", "every name once", "repeated names")
        return result

    try:
        whole = json.loads(metadata[METADATA_KEY], object_pairs_hook=unrepeated)
    except (json.JSONDecodeError, RecursionError) as error:
        _refuse(path, None, "description", "JSON", f"{error}")
    if not isinstance(whole, dict):
        _refuse(path, None, "description", "a JSON object", repr(whole))
    version = whole.get("version")
    if type(version) is not int or version != VERSION:
        _refuse(path, None, "version", f"{VERSION}, which is what this release reads", repr(version))
    tensors = whole.get("tensors")
    if not isinstance(tensors, dict):
        _refuse(path, None, "tensors", "a JSON object", repr(tensors))
    return {name: _description(path, name, entry) for name, entry in tensors.items()}


def _description(path: str, name: str, entry: Any) -> _Description:
    if not isinstance(entry, dict):
        _refuse(path, name, "description", "a JSON object", repr(entry))
    try:
        format = HBFP.parse(entry.get("format", ""))
    except FormatError as error:
        raise FileError(f"{path}: tensor {name!r}: format: {error}") from error
    sizes = entry.get("shape")
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in sizes):
        _refuse(path, name, "shape", "a list of sizes from 0 to 2^63 - 1", repr(sizes))
    if math.prod(sizes) > _LARGEST_SIZE:
        _refuse(path, name, "shape", "at most 2^63 - 1 elements", repr(sizes))
    axis = entry.get("axis")
    if type(axis) is not int or not 0 <= axis < max(len(sizes), 1):
        _refuse(path, name, "axis", f"an axis of shape {sizes}, counted from 0", repr(axis))
    rounding = entry.get("rounding")
    if rounding is not None and rounding not in [member.value for member in Rounding]:
        _refuse(path, name, "rounding", f"one of {', '.join(Rounding)}", repr(rounding))
    sha256 = entry.get("sha256")
    if sha256 is not None and not isinstance(sha256, str):
        _refuse(path, name, "sha256", "a string", repr(sha256))
    return _Description(format, tuple(sizes), axis, None if rounding is None else Rounding(rounding), sha256)


def _check_partners(path: str, stored: set[str], described: Mapping[str, _Description]) -> None:
    for name in described:
        for suffix in (EXPONENTS, MANTISSAS):
            if name + suffix not in stored:
                _refuse(path, name, "planes", f"a plane {name + suffix!r}", "none in the file")
        if name in stored:
            _refuse(path, name, "planes", "an encoded array only", "a plain array of the same name as well")
    for plane in sorted(stored):
        name = plane.removesuffix(EXPONENTS).removesuffix(MANTISSAS)
        if name != plane and name not in described:
            _refuse(path, name, "description", f"one for the plane {plane!r}", "none in the header")


def _read_encoded(path: str, file: Any, name: str, description: _Description) -> BlockArray:
    format, shape, axis, rounding, _ = description
    try:
        expected = format.plane_shapes(shape, axis)
    except ShapeError as error:
        raise FileError(f"{path}: tensor {name!r}: shape: {error}") from error
    planes: list[NDArray[np.uint8]] = []
    for suffix, plane_shape in zip((EXPONENTS, MANTISSAS), expected, strict=True):
        plane = file.get_slice(name + suffix)
        found = plane.get_dtype(), tuple(plane.get_shape())
        if found != ("U8", tuple(plane_shape)):
            _refuse(path, name, suffix[1:], f"U8 {list(plane_shape)}", f"{found[0]} {list(found[1])}")
        planes.append(file.get_tensor(name + suffix))
    exponents, mantissas = planes
    return BlockArray(exponents, mantissas, format, shape, axis, rounding, source=f"{path}: tensor {name!r}")


def _verify(path: str, name: str, array: BlockArray, description: _Description) -> None:
    if description.sha256 is None:
        _refuse(path, name, "sha256", "one to verify the planes with", "none: load it without verify and save it again")
    found = _sha256(array)
    if found != description.sha256.lower():
        _refuse(path, name, "sha256", description.sha256, f"{found}: the planes have changed since they were written")
    array.check_codes()


def _read_plain(path: str, file: Any, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = file.get_tensor(name)
    except (TypeError, KeyError, AttributeError) as error:
        dtype = file.get_slice(name).get_dtype()
        raise FileError(
            f"{path}: tensor {name!r}: dtype: expected one that numpy has; found {dtype} (bfloat16 and the 8-bit floats"
            " need `import ml_dtypes` first)"
        ) from error
    return array
