"""GGUF, the file format of ggml and llama.cpp: Q4_0 and Q8_0 blocks of 32 elements that share a float16 scale.

A Q4_0 element is d · (n - 8), n an unsigned nibble; the low nibbles of a block's 16 bytes are its elements 0 to 15, the
high ones its elements 16 to 31. A Q8_0 element is d · q, q an int8 (`block_q4_0` and `block_q8_0` in ggml-common.h,
their `dequantize_row` in ggml-quants.c; github.com/ggml-org/llama.cpp). HBFP4 fits the first and HBFP5 to HBFP8 the
second wherever d = 2^s is a float16, which is so for -24 ≤ s ≤ 15. ggml's own quantisers also make negative d.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp.array import BlockArray
from hbfp.errors import FileError
from hbfp.exports.lossless import Groups, array_of, groups_of, place, refuse, required
from hbfp.files.replacing import replaced
from hbfp.format import HBFP

__all__ = ["ARCHITECTURE", "Blocks", "load", "pack", "save", "unpack"]

BLOCK = 32
LOWEST, HIGHEST = -24, 15  # float16 has these powers of two, the ten smallest as subnormals
LONGEST_NAME = 63  # GGML_MAX_NAME without its final zero
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS

ARCHITECTURE = "hbfp"
"""What a file of tensors says it is: no network that llama.cpp runs."""

_BYTES = {"Q4_0": 2 + BLOCK // 2, "Q8_0": 2 + BLOCK}
_NEAREST = {"Q4_0": "hbfp4b32", "Q8_0": "hbfp8b32"}
_PLAIN = ("float16", "float32", "float64", "int8", "int16", "int32", "int64")


class Blocks(NamedTuple):
    """A tensor in Q4_0 or Q8_0."""

    type: str
    """"Q4_0" or "Q8_0"."""
    data: NDArray[np.uint8]
    """[..., bytes of a row]: 18 or 34 for each block of 32 elements."""


def pack(array: BlockArray, name: str = "array") -> Blocks:
    """An array in Q4_0 if its codes have 4 bits or fewer, else in Q8_0.

    Args:
        array: of 2 to 8 bits, blocked along its last axis in a multiple of 32 (or one exponent for all of it), rows of
            a multiple of 32 elements, every scale exponent s in -24 ... 15 where codes are not all zero.
        name: of the tensor, for messages.

    Raises:
        ExportError: the array does not fit.
        CodeError: the array was read from a file that holds forbidden codes.
    """
    codes, scales = groups_of(array, place(array, name), BLOCK, 8, LOWEST, HIGHEST, "GGUF")
    d = scales.astype("<f2")[..., None].view(np.uint8)
    if array.format.bits <= 4:
        type, nibbles = "Q4_0", (codes + 8).astype(np.uint8)
        elements = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    else:
        type, elements = "Q8_0", codes.astype(np.int8).view(np.uint8)
    return Blocks(type, np.concatenate([d, elements], axis=-1).reshape(*array.shape[:-1], -1))


def unpack(parts: Blocks, name: str = "array", format: HBFP | str | None = None) -> BlockArray:
    """The array of a tensor in Q4_0 or Q8_0.

    Args:
        parts: type and bytes.
        name: of the tensor, for messages.
        format: of the result, hbfp4b32 for Q4_0 and hbfp8b32 for Q8_0 if None. Another one must have all codes, and
            blocks of a multiple of 32 whose scales agree.

    Raises:
        ExportError: a scale that is no power of two; a code that the format does not have, such as -8 or -128; another
            type; bytes of another shape.
    """
    return _array(parts, f"tensor {name!r}", format)


def _array(parts: Blocks, where: str, format: HBFP | str | None) -> BlockArray:
    type, data = parts
    if type not in _BYTES:
        refuse(where, "type", " or ".join(_BYTES), type)
    size = _BYTES[type]
    if data.dtype != np.uint8 or not data.ndim or data.shape[-1] % size:
        refuse(where, "data", f"uint8, rows of a multiple of {size} bytes", f"{data.dtype} {list(data.shape)}")
    blocks = np.ascontiguousarray(data).reshape(*data.shape[:-1], data.shape[-1] // size, size)
    scales = blocks[..., :2].copy().view("<f2")[..., 0].astype(np.float64)
    elements = blocks[..., 2:]
    if type == "Q4_0":
        codes = np.concatenate([elements & 15, elements >> 4], axis=-1).astype(np.int8) - np.int8(8)
    else:
        codes = elements.view(np.int8)
    return array_of(Groups(codes, scales), where, format or _NEAREST[type])


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, BlockArray | ArrayLike],
    architecture: str = ARCHITECTURE,
    describe: Callable[[Any], None] | None = None,
) -> None:
    """Writes a file of encoded arrays in Q4_0 and Q8_0 and plain arrays as they are.

    Args:
        path: of the file, which appears complete or not at all; one that exists is replaced.
        tensors: by name, of at most 63 bytes; of one to four dimensions.
        architecture: what the file says it is.
        describe: is called with the `gguf.GGUFWriter` to add the metadata of a model.

    Raises:
        ExportError: a tensor does not fit (`pack`), or is of a type that GGUF does not have; nothing is written.
        ModuleNotFoundError: the package gguf is not installed.
        OSError: the file cannot be written.
    """
    gguf = required("gguf")
    packed = {name: _packed(value, name) for name, value in tensors.items()}
    with replaced(path) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        if describe is not None:
            describe(writer)
        for name, value in packed.items():
            if isinstance(value, Blocks):
                writer.add_tensor(name, value.data, raw_dtype=gguf.GGMLQuantizationType[value.type])
            else:
                writer.add_tensor(name, value)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _packed(value: BlockArray | ArrayLike, name: str) -> Blocks | NDArray[Any]:
    array = value if isinstance(value, BlockArray) else np.asarray(value)
    where = place(array, name) if isinstance(array, BlockArray) else f"tensor {name!r}"
    if len(name.encode()) > LONGEST_NAME:
        refuse(where, "name", f"at most {LONGEST_NAME} bytes", f"{len(name.encode())}: rename it")
    if not 1 <= array.ndim <= MOST_DIMENSIONS or not array.size:
        refuse(where, "shape", f"1 to {MOST_DIMENSIONS} dimensions, none of them 0", list(array.shape))
    if isinstance(array, BlockArray):
        return pack(array, name)
    if array.dtype.name not in _PLAIN:
        refuse(where, "dtype", f"one of {', '.join(_PLAIN)}", array.dtype.name)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def load(
    path: str | os.PathLike[str], formats: Mapping[str, HBFP | str] | None = None
) -> dict[str, BlockArray | NDArray[Any]]:
    """Reads a file: Q4_0 and Q8_0 tensors as `BlockArray`, F16, F32, F64 and integers as numpy arrays, by name.

    Args:
        path: of the file.
        formats: by name, where another one than hbfp4b32 or hbfp8b32 is wanted (`unpack`).

    Raises:
        ExportError: a tensor does not fit (`unpack`), or is of another type.
        FileError: the file is damaged or not GGUF.
        ModuleNotFoundError: the package gguf is not installed.
        OSError: the file cannot be read.
    """
    where = os.fspath(path)
    result: dict[str, BlockArray | NDArray[Any]] = {}
    for tensor in _read(where):
        place = f"{where}: tensor {tensor.name!r}"
        type = tensor.tensor_type.name
        if type in _BYTES:
            result[tensor.name] = _array(Blocks(type, np.asarray(tensor.data)), place, (formats or {}).get(tensor.name))
        elif tensor.data.dtype.name in _PLAIN:
            result[tensor.name] = np.array(tensor.data)
        else:
            refuse(place, "type", f"{', '.join(_BYTES)}, floats or integers", type)
    return result


def _read(path: str) -> list[Any]:
    gguf = required("gguf")
    try:
        return list(gguf.GGUFReader(path).tensors)
    except OSError:
        raise
    # What numpy and the reader raise where lengths and offsets point outside of the file, or tags are unknown.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise FileError(f"{path}: expected a GGUF file; found one that cannot be read: {error}") from error
