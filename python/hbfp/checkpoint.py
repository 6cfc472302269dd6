"""Models as packed files: converted weights as the codes that the forward product reads, everything else as it is.

The codes are those of the layer's forward weight format, nearest-even, blocked along the inputs. Encoding is idempotent
under the `max_exponent` rule: a loaded model encodes its weights to the same codes, so its outputs are the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hbfp.array import BlockArray, encode
from hbfp.errors import FileError
from hbfp.files import load, save
from hbfp.format import HBFP, Rounding
from hbfp.policy import layer_states

__all__ = ["load_model", "save_model"]


def _packed_formats(model: nn.Module) -> dict[int, HBFP]:
    """Format of each converted weight, by the identity of its memory (tied weights are one)."""
    formats: dict[int, HBFP] = {}
    for _, module, state in layer_states(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            formats[id(weight)] = state.recipe.forward.formats[1]
    return formats


def _entries(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of the state_dict under their first name, and for further names of the same tensor the first one."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise FileError(f"{name}: expected a tensor in the state_dict; found {type(value).__name__}")
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, tied


def _array(tensor: Tensor) -> Any:
    return np.from_dlpack(tensor.detach().cpu().contiguous())


def save_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Writes the model's state_dict with the weights of converted layers packed.

    Args:
        path: of the file (safetensors); it appears complete or not at all.
        model: converted by `hbfp.convert_`; at the widths in force now.

    Raises:
        FileError: something in the state_dict is not a tensor.
        DTypeError: a plain tensor's type can't be stored.
        OSError: the file can't be written.
    """
    formats = _packed_formats(model)
    tensors, _ = _entries(model)
    content: dict[str, Any] = {}
    for name, tensor in tensors.items():
        format = formats.get(id(tensor))
        array = _array(tensor)
        content[name] = array if format is None else encode(array, format, axis=-1, rounding=Rounding.NEAREST_EVEN)
    save(path, content)


def load_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Reads a file written by `save_model` into `model`, in place: converted or not, of the same architecture.

    Raises:
        FileError: names or shapes of the file and the model differ (the model is as it was), or the file is broken.
    """
    content: Mapping[str, Any] = load(path)
    tensors, _ = _entries(model)
    missing, unexpected = sorted(tensors.keys() - content.keys()), sorted(content.keys() - tensors.keys())
    if missing or unexpected:
        raise FileError(
            f"{os.fspath(path)}: expected the {len(tensors)} tensors of {type(model).__name__}; "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    values: dict[str, Tensor] = {}
    for name, value in content.items():
        array = value.decode() if isinstance(value, BlockArray) else np.array(value)
        if array.shape != tuple(tensors[name].shape):
            raise FileError(
                f"{os.fspath(path)}: {name}: expected shape {tuple(tensors[name].shape)}, as the model has it; "
                f"found {array.shape}"
            )
        values[name] = torch.from_numpy(array)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
