"""Checkpoints of others as tensors that are read one at a time: safetensors files, their indices, and torch's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hbfp.files import File

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, still on the disk.

    Attributes:
        dtype: in the words of safetensors; of an array that is encoded already, its format.
        shape: of the tensor.
        nbytes: that it takes in the checkpoint.
        data: reads its bytes, uint8; of an encoded one, the `BlockArray`.
        axis: of an encoded one.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Any]
    axis: int | None = None

    def floats(self) -> NDArray[Any]:
        """The values of a tensor of `FLOATS`: float32, float16 or float64; bfloat16 widened."""
        import numpy as np

        data: NDArray[np.uint8] = self.data()
        if self.dtype == "BF16":
            wide = data.view(np.uint16).astype(np.uint32)
            wide <<= np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[self.dtype]
        values: NDArray[Any] = data.view(np.dtype(kind)).reshape(self.shape)
        return values


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata. What is not safetensors and begins as torch's files do is read by torch.

    Raises:
        FileError: the file is neither, is damaged, or holds something other than tensors.
        OSError: it cannot be read.
    """
    if os.path.isfile(path):
        with open(path, "rb") as file:
            begin = file.read(9)
        # A header begins after 8 bytes, which may be any; torch's files are zip archives, older ones pickles.
        if begin[8:] != b"{" and (begin.startswith(b"PK\x03\x04") or begin.startswith(b"\x80")):
            return _of_torch(path, mapped=begin.startswith(b"PK")), {}
    return _of_safetensors(path)


def _of_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    import hbfp

    file = hbfp.open(path)
    tensors = {}
    for name in file:
        described = file.description(name)
        if described is not None:
            make = partial(file.__getitem__, name)
            tensors[name] = Tensor(str(described.format), described.shape, file.nbytes(name), make, described.axis)
        else:
            tensors[name] = plain(file, name)
    return tensors, file.metadata


def plain(file: File, name: str) -> Tensor:
    """A tensor of an open file that is not encoded."""
    entry, _ = file.stored(name)
    return Tensor(entry.dtype, entry.shape, entry.nbytes, partial(_stored, file, name))


def _stored(file: File, name: str) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = file.stored(name)[1]
    # Of others' files a tensor may lie askew.
    return data if data.ctypes.data % 8 == 0 else data.copy()


def _of_torch(path: str, *, mapped: bool) -> dict[str, Tensor]:
    import torch

    from hbfp.errors import FileError
    from hbfp.files.strict import shown

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch have no error in common
        reason = str(error).strip().splitlines()
        raise FileError(
            f"{path}: expected a checkpoint that torch.load(weights_only=True) reads; found"
            f" {reason[0][:200] if reason else type(error).__name__}"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise FileError(f"{path}: expected a state_dict, or one under 'state_dict' or 'model'; found {shown(content)}")
    names = {getattr(torch, name): dtype for dtype, name in _TORCH_NAMES.items()}
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FileError(f"{path}: expected tensors by name; found {shown(name)}: {type(value).__name__}")
        if value.layout is not torch.strided or value.dtype not in names:
            raise FileError(
                f"{path}: tensor {shown(name)}: expected plain numbers; found {value.dtype}, {value.layout}"
            )
        tensors[name] = Tensor(names[value.dtype], tuple(value.shape), value.nbytes, partial(_bytes, value))
    return tensors


_TORCH_NAMES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def _bytes(tensor: Any) -> NDArray[np.uint8]:
    import numpy as np
    import torch

    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return np.asarray(np.from_dlpack(data), np.uint8)
