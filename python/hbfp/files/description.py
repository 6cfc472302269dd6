"""What a file says of its encoded arrays: one JSON text under the metadata key `hbfp` (docs/spec.md 7.8)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hbfp.array import BlockArray
from hbfp.errors import FileError, FormatError, ShapeError
from hbfp.files.container import Container
from hbfp.files.strict import check_shape, is_text, parse_object, refuse, shown
from hbfp.format import HBFP, Rounding

VERSION = 1
METADATA_KEY = "hbfp"
EXPONENTS = ".hbfp_exponents"
MANTISSAS = ".hbfp_mantissas"
SUFFIXES = (EXPONENTS, MANTISSAS)

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class Description(NamedTuple):
    """What the header says of one encoded array, checked."""

    format: HBFP
    shape: tuple[int, ...]
    axis: int
    rounding: Rounding | None
    sha256: str | None

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the exponent and of the mantissa plane."""
        return self.format.plane_shapes(self.shape, self.axis)


def written(descriptions: Mapping[str, Description]) -> str:
    """The JSON text for the header."""
    tensors: dict[str, Any] = {}
    for name, description in descriptions.items():
        entry = tensors[name] = {
            "format": str(description.format),
            "shape": list(description.shape),
            "axis": description.axis,
        }
        if description.rounding is not None:
            entry["rounding"] = str(description.rounding)
        entry["sha256"] = description.sha256
    return json.dumps({"version": VERSION, "tensors": tensors}, separators=(",", ":"))


def read(container: Container) -> dict[str, Description]:
    """The descriptions of a file, each with planes that fit it, and no plane without one.

    Raises:
        FileError: names file, tensor and field, what was expected and what was found.
    """
    path = container.path
    described: dict[str, Description] = {}
    if METADATA_KEY in container.metadata:
        whole = parse_object(path, "description", container.metadata[METADATA_KEY])
        version, tensors = whole.get("version"), whole.get("tensors")
        if type(version) is not int or version != VERSION:
            refuse(path, None, "version", f"{VERSION}, which is what this release reads", shown(version))
        if not isinstance(tensors, dict):
            refuse(path, None, "tensors", "a JSON object", shown(tensors))
        described = {name: _description(path, name, entry) for name, entry in tensors.items()}
    for name, description in described.items():
        _check_planes(container, name, description)
    for plane in container.entries:
        owner = plane.removesuffix(EXPONENTS).removesuffix(MANTISSAS)
        if owner != plane and owner not in described:
            refuse(path, owner, "description", f"one for the plane {shown(plane)}", "none in the header")
    return described


def _description(path: str, name: str, entry: Any) -> Description:
    if not is_text(name):
        refuse(path, None, "tensors", "names that are text", f"half a surrogate pair in {shown(name)}")
    if not isinstance(entry, dict):
        refuse(path, name, "description", "a JSON object", shown(entry))
    text = entry.get("format")
    if not isinstance(text, str) or len(text) > 100:
        refuse(path, name, "format", "a written form such as 'hbfp4b64'", shown(text))
    try:
        format = HBFP.parse(text)
    except FormatError as error:
        raise FileError(f"{path}: tensor {shown(name)}: format: {error}") from error
    shape = check_shape(path, name, entry.get("shape"))
    axis = entry.get("axis")
    if type(axis) is not int or not 0 <= axis < max(len(shape), 1):
        refuse(path, name, "axis", f"an axis of shape {shown(list(shape))}, counted from 0", shown(axis))
    rounding = entry.get("rounding")
    if rounding is not None and rounding not in [member.value for member in Rounding]:
        refuse(path, name, "rounding", f"one of {', '.join(Rounding)}", shown(rounding))
    sha256 = entry.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and _DIGEST.fullmatch(sha256)):
        refuse(path, name, "sha256", "64 hexadecimal digits", shown(sha256))
    return Description(format, shape, axis, None if rounding is None else Rounding(rounding), sha256)


def _check_planes(container: Container, name: str, description: Description) -> None:
    path, entries = container.path, container.entries
    try:
        shapes = description.plane_shapes
    except ShapeError as error:
        raise FileError(f"{path}: tensor {shown(name)}: shape: {error}") from error
    for suffix, shape in zip(SUFFIXES, shapes, strict=True):
        if name + suffix not in entries:
            refuse(path, name, "planes", f"a plane {shown(name + suffix)}", "none in the file")
        found = entries[name + suffix]
        if (found.dtype, found.shape) != ("U8", tuple(shape)):
            refuse(path, name, suffix[1:], f"U8 {list(shape)}", f"{found.dtype} {shown(list(found.shape))}")
    if name in entries:
        refuse(path, name, "planes", "an encoded array only", "a plain array of the same name as well")


def array(container: Container, name: str, description: Description) -> BlockArray:
    """The encoded array: its planes are views of the file. Codes are checked when they are first read."""
    exponents, mantissas = (
        container.bytes_of(name + suffix).reshape(shape)
        for suffix, shape in zip(SUFFIXES, description.plane_shapes, strict=True)
    )
    source = f"{container.path}: tensor {shown(name)}"
    format, shape, axis, rounding, _ = description
    return BlockArray(exponents, mantissas, format, shape, axis, rounding, source=source)


def digest(array: BlockArray) -> str:
    """sha256 of the exponent plane's bytes followed by the mantissa plane's, in hexadecimal."""
    sha256 = hashlib.sha256(array.exponent_plane.reshape(-1).data)
    sha256.update(array.mantissa_plane.reshape(-1).data)
    return sha256.hexdigest()


def verify(path: str, name: str, array: BlockArray, description: Description) -> None:
    """Read all of an array: compare it with its digest, then check its codes.

    Raises:
        FileError: the digest is another, or there is none.
        CodeError: what no encoder writes.
    """
    if description.sha256 is None:
        refuse(path, name, "sha256", "one to verify the planes with", "none: load it without verify and save it again")
    found = digest(array)
    if found != description.sha256.lower():
        refuse(path, name, "sha256", description.sha256, f"{found}: the planes have changed since they were written")
    array.check_codes()
