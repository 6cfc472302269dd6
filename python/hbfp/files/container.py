"""The container, safetensors: its header read with suspicion, its data mapped into memory and never copied.

A file is 8 bytes, the length of the header as a little-endian integer; the header, one JSON object; the data. The
header maps each tensor's name to its dtype, shape and place, and `__metadata__` to strings. Here, and not through the
safetensors package, for two reasons: that one copies what it reads, and takes the last of two tensors of one name.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbfp.errors import FileError
from hbfp.files.strict import LARGEST, check_shape, is_text, parse_object, refuse, shown

METADATA = "__metadata__"
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package too."""

BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""Bits of an element, of every dtype that the container has."""

NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Their names in numpy, where it or the package ml_dtypes has them."""


class Entry(NamedTuple):
    """One stored tensor: what it is, and its place, in bytes from the begin of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Container:
    """A safetensors file, opened: every word of its header checked, its data mapped.

    Only the header is read. Arrays are views of the mapping and keep it alive, so the file may be closed, renamed or
    replaced by another (as `save` does) under them; one that is cut short in place takes the process down with it.

    Attributes:
        path: of the file, for messages.
        entries: by name, in the order of the data.
        metadata: the strings of the header.

    Raises:
        FileError: not a regular file, or not a safetensors file in every detail.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # Without O_NONBLOCK a pipe under that name would wait for its writer for ever.
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
                raise FileError(f"{self.path}: expected a safetensors file; found {found}")
            header, self._start = _header(self.path, descriptor, status.st_size)
            self.entries, self.metadata = _parse(self.path, header, status.st_size - self._start)
            self._mapping = _mapped(descriptor, status.st_size)
        finally:
            os.close(descriptor)

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, a view of the mapping."""
        entry = self.entries[name]
        return np.frombuffer(self._mapping, np.uint8, entry.nbytes, self._start + entry.start)

    def array(self, name: str) -> NDArray[Any]:
        """A stored tensor: a view of the mapping; a copy where it does not lie aligned.

        Raises:
            FileError: numpy has no such dtype.
        """
        entry = self.entries[name]
        try:
            dtype = np.dtype(NUMPY[entry.dtype])
        except (KeyError, TypeError):
            refuse(
                self.path,
                name,
                "dtype",
                "one that numpy has",
                f"{entry.dtype} (bfloat16 and the 8-bit floats need `import ml_dtypes` first)",
            )
        array: NDArray[Any] = self.bytes_of(name).view(dtype).reshape(entry.shape)
        return array if array.flags.aligned else array.copy()


def forget(array: NDArray[Any]) -> None:
    """Lets the memory go that a part of a mapped file takes; who reads it again, reads the file again.

    For arrays that nobody has written to. Does nothing for an array that is no part of a mapped file.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise"):
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + array.nbytes) // page * page
    if last > first:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """The file in memory. Private: whoever writes into an array writes into his own copy of a page."""
    if sys.platform == "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    # Without memory set aside for such copies, or a file larger than the memory could not be opened.
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    return mmap.mmap(descriptor, size, mmap.MAP_PRIVATE | unreserved, mmap.PROT_READ | mmap.PROT_WRITE)


def _header(path: str, descriptor: int, size: int) -> tuple[bytes, int]:
    """The bytes of the header, and where the data begin."""

    def broken(expected: str, found: str) -> FileError:
        return FileError(f"{path}: expected a safetensors file, {expected}; found {found}")

    if size < 8:
        raise broken("which begins with 8 bytes, the length of its header", f"a file of {size} bytes")
    length = int.from_bytes(_read(descriptor, 8, 0), "little")
    if length > LARGEST_HEADER:
        raise broken(f"with a header of at most {LARGEST_HEADER} bytes", f"one of {length}, by the file's first 8")
    if length > size - 8:
        raise broken(f"with its whole header of {length} bytes", f"{size - 8} after the first 8")
    header = _read(descriptor, length, 8)
    if len(header) != length:
        raise broken(f"with its whole header of {length} bytes", f"{len(header)}: it is being cut short")
    if not header.startswith(b"{"):
        raise broken("whose header begins with '{'", shown(header[:16]))
    return header, 8 + length


def _read(descriptor: int, size: int, offset: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    parts = []
    while size > 0 and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _parse(path: str, header: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries in the order of their data, and metadata."""
    whole = parse_object(path, "header", header)
    metadata = whole.pop(METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(is_text(key) and is_text(text) for key, text in metadata.items()):
        refuse(path, None, METADATA, "an object of strings", shown(metadata))
    entries = {name: _entry(path, name, value) for name, value in whole.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end, item[0])))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            kind = "a hole before it" if entry.start > end else "an overlap"
            expected = f"a start at {end}, where the tensor before it ends"
            refuse(path, name, "data_offsets", expected, f"{entry.start}, {kind}")
        end = entry.end
    if end != size:
        raise FileError(f"{path}: expected a safetensors file, with {end} bytes of data by its header; found {size}")
    return entries, metadata


def _entry(path: str, name: str, value: Any) -> Entry:
    if not is_text(name):
        refuse(path, None, "header", "names that are text", f"half a surrogate pair in {shown(name)}")
    if not isinstance(value, dict):
        refuse(path, name, "header", "an object with dtype, shape and data_offsets", shown(value))
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(path, name, "dtype", f"one of {', '.join(BITS)}", shown(dtype))
    shape = check_shape(path, name, value.get("shape"))
    bits = math.prod(shape) * BITS[dtype]
    if math.prod(length for length in shape if length) * BITS[dtype] > LARGEST * 8:
        refuse(path, name, "shape", "at most 2^63 - 1 bytes", f"{shown(list(shape))} of {dtype}")
    if bits % 8:
        refuse(path, name, "shape", f"elements of {dtype} that fill whole bytes", shown(list(shape)))
    offsets = value.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        refuse(path, name, "data_offsets", "two integers, start and end", shown(offsets))
    start, end = offsets
    if not 0 <= start <= end <= LARGEST:
        refuse(path, name, "data_offsets", "0 <= start <= end < 2^63", shown(offsets))
    if end - start != bits // 8:
        refuse(path, name, "data_offsets", f"{bits // 8} bytes, for {shown(list(shape))} of {dtype}", f"{end - start}")
    return Entry(dtype, shape, start, end)


def header_of(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file, up to its data, which follow without holes in the order of `entries`.

    Args:
        entries: name -> dtype, shape, bytes.
        metadata: strings by name.
    """
    whole: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape, nbytes) in entries.items():
        whole[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor lies aligned
    return len(text).to_bytes(8, "little") + text
