"""OCP MX files with the element type INT8 (MXINT8): blocks of 32 that share one E8M0 scale.

An element is q · 2^-6, q two's complement of 8 bits, under the scale 2^(e - 127), e = 255 marking NaN (OCP
Microscaling Formats specification, version 1.0, sections 5.3.4 and 5.4.1). So it is HBFP8 with s = e - 127 - 6, that is
c = e - 6. The specification leaves the code -128 to the implementation; HBFP8 does not have it.

The specification knows no file. Here one is safetensors, with `name` (I8, the logical shape) beside `name` +
"_scale" (U8, the last dimension counted in blocks), the way checkpoints of quantised models are usually laid out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp import files
from hbfp.array import BlockArray
from hbfp.errors import FileError
from hbfp.exports.lossless import NAN_BYTE, Groups, array_of, groups_of, place, refuse
from hbfp.format import HBFP

__all__ = ["MXINT8", "load", "pack", "save", "unpack"]

BLOCK = 32
FRACTION_BITS = 6
SCALE = "_scale"


class MXINT8(NamedTuple):
    """A tensor in MXINT8."""

    elements: NDArray[np.int8]
    """Of the logical shape."""
    scales: NDArray[np.uint8]
    """E8M0 bytes e; the logical shape with the last dimension counted in blocks of 32."""


def pack(array: BlockArray, name: str = "array") -> MXINT8:
    """An array in MXINT8.

    Args:
        array: of 2 to 8 bits, blocked along its last axis in a multiple of 32 (or one exponent for all of it), rows of
            a multiple of 32 elements, every scale exponent s at most 121.
        name: of the tensor, for messages.

    Raises:
        ExportError: the array does not fit.
        CodeError: the array was read from a file that holds forbidden codes.
    """
    low, high = -127, 127 - FRACTION_BITS
    codes, scales = groups_of(array, place(array, name), BLOCK, 8, low, high, "MXINT8")
    bytes_ = np.where(scales == 0, 0, np.frexp(scales)[1] - 1 + 127 + FRACTION_BITS)
    return MXINT8(codes.astype(np.int8).reshape(array.shape), bytes_.astype(np.uint8))


def unpack(parts: MXINT8, name: str = "array", format: HBFP | str = "hbfp8b32") -> BlockArray:
    """The array of a tensor in MXINT8.

    Args:
        parts: elements int8 [..., n], n a multiple of 32, and scales uint8 [..., n / 32].
        name: of the tensor, for messages.
        format: of the result; another one must have all codes, and blocks of a multiple of 32 whose scales agree.

    Raises:
        ExportError: the code -128; a scale below 2^-127 per unit of code (e < 6) over elements that are not zero; parts
            that do not fit together.
    """
    return _array(parts, f"tensor {name!r}", format)


def _array(parts: MXINT8, where: str, format: HBFP | str) -> BlockArray:
    elements, scales = parts
    if elements.dtype != np.int8 or not elements.ndim or elements.shape[-1] % BLOCK:
        refuse(where, "elements", f"int8, rows of a multiple of {BLOCK}", f"{elements.dtype} {list(elements.shape)}")
    blocks = (*elements.shape[:-1], elements.shape[-1] // BLOCK)
    if scales.dtype != np.uint8 or scales.shape != blocks:
        refuse(where, "scales", f"uint8 {list(blocks)}", f"{scales.dtype} {list(scales.shape)}")
    codes = elements.reshape(*blocks, BLOCK)
    powers = np.ldexp(1.0, scales.astype(np.int64) - 127 - FRACTION_BITS)
    powers[~codes.any(axis=-1) & (scales < FRACTION_BITS)] = 0.0  # zeros, whatever the scale
    powers[scales == NAN_BYTE] = np.nan
    return array_of(Groups(codes, powers), where, format)


def save(path: str | os.PathLike[str], tensors: Mapping[str, BlockArray | ArrayLike]) -> None:
    """Writes a file of encoded arrays in MXINT8 and plain arrays as they are.

    Args:
        path: of the file (safetensors), which appears complete or not at all; one that exists is replaced.
        tensors: by name.

    Raises:
        ExportError: an array does not fit (`pack`), or two tensors would have one name; nothing is written.
        FileError, DTypeError, OSError: as `hbfp.save`.
    """
    content: dict[str, ArrayLike] = {}
    for name, value in tensors.items():
        parts: dict[str, ArrayLike] = {name: value}
        if isinstance(value, BlockArray):
            elements, scales = pack(value, name)
            parts = {name: elements, name + SCALE: scales}
        for part in parts.keys() & content.keys():
            refuse(f"{os.fspath(path)}: tensor {part!r}", "name", "one tensor of it", "the scales of another, too")
        content |= parts
    files.save(path, content)


def load(
    path: str | os.PathLike[str], formats: Mapping[str, HBFP | str] | None = None
) -> dict[str, BlockArray | NDArray[Any]]:
    """Reads a file: int8 tensors that have a scale beside them as `BlockArray`, all others as plain arrays.

    Args:
        path: of the file (safetensors).
        formats: by name, where another one than hbfp8b32 is wanted.

    Raises:
        ExportError: a tensor is not what HBFP8 can hold (`unpack`).
        FileError: the file is damaged, or holds arrays in HBFP already.
        OSError: the file cannot be read.
    """
    where = os.fspath(path)
    result: dict[str, BlockArray | NDArray[Any]] = {}
    content: dict[str, NDArray[Any]] = {}
    for name, value in files.load(path).items():
        if isinstance(value, BlockArray):
            raise FileError(f"{where}: tensor {name!r}: expected MX; found {value.format}: read it with hbfp.load")
        content[name] = value
    encoded = {name for name, value in content.items() if value.dtype == np.int8 and name + SCALE in content}
    for name in sorted(content.keys() - {name + SCALE for name in encoded}):
        if name in encoded:
            format = (formats or {}).get(name, "hbfp8b32")
            parts = MXINT8(content[name], content[name + SCALE])
            result[name] = _array(parts, f"{where}: tensor {name!r}", format)
        else:
            result[name] = content[name]
    return result
