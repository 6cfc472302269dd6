"""Models as packed files: converted weights as the codes that the forward product reads, everything else as it is.

A loaded model must compute the same bits. It does where encoding is idempotent: a decoded weight encodes to the codes
it came from. So a weight is packed if its layer's forward product rounds it deterministically and by an exponent rule
other than `ceil`, and if nothing but converted layers of one format reads it (a tied embedding looks rows up in FP32);
other weights are stored as they are. So are those of convolutions over flattened patches, whose blocks no axis has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hbfp.array import BlockArray, encode
from hbfp.errors import FileError
from hbfp.files import load, save
from hbfp.format import ExponentRule, Rounding
from hbfp.policy import OperandPolicy, layer_states, weights_of

__all__ = ["encoded_state", "load_model", "save_model"]


_Encoding = tuple[OperandPolicy, int]
"""Format and rounding, and the blocked axis."""


def _packed(model: nn.Module) -> dict[int, _Encoding]:
    """How each weight that can be packed is encoded, by the identity of its tensor (tied weights are one)."""
    policies: dict[int, _Encoding | None] = {}
    read: dict[tuple[int, str], _Encoding] = {}
    for _, layer, state in layer_states(model):
        right = state.recipe.forward.right
        for weight in weights_of(layer, right.format):
            if weight.packs:
                read[id(weight.owner), weight.name] = right, weight.axis
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            policy = read.get((id(module), name))
            if policies.setdefault(id(parameter), policy) != policy:
                policies[id(parameter)] = None
    return {key: policy for key, policy in policies.items() if policy is not None and _idempotent(policy[0])}


def _idempotent(policy: OperandPolicy) -> bool:
    return policy.rounding is not Rounding.STOCHASTIC and policy.format.exponent_rule != ExponentRule.CEIL


def _entries(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state_dict; one that has several names under the first of them."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise FileError(f"{name}: expected a tensor in the state_dict; found {type(value).__name__}")
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    return tensors


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16; float32 holds all of its values.
    return np.from_dlpack((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).contiguous())


def encoded_state(model: nn.Module) -> dict[str, BlockArray | NDArray[Any]]:
    """The model's state_dict as arrays, with the weights of converted layers encoded, blocked along the inputs.

    Args:
        model: converted by `hbfp.convert_`; at the widths in force now. bfloat16 tensors become float32.

    Raises:
        FileError: something in the state_dict is not a tensor.
    """
    policies = _packed(model)
    content: dict[str, BlockArray | NDArray[Any]] = {}
    for name, tensor in _entries(model).items():
        array = content[name] = _array(tensor)
        if id(tensor) in policies:
            policy, axis = policies[id(tensor)]
            content[name] = encode(array, policy.format, axis=axis, rounding=policy.rounding)
    return content


def save_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Writes the model's state_dict with the weights of converted layers packed, blocked along the inputs.

    Args:
        path: of the file (safetensors); it appears complete or not at all.
        model: converted by `hbfp.convert_`; at the widths in force now. bfloat16 tensors are stored as float32.

    Raises:
        FileError: something in the state_dict is not a tensor.
        DTypeError: a plain tensor's type can't be stored.
        OSError: the file can't be written.
    """
    save(path, encoded_state(model))


def load_model(path: str | os.PathLike[str], model: nn.Module, *, any_format: bool = False) -> None:
    """Reads a file written by `save_model` into `model`, in place: converted or not, of the same architecture.

    Values are cast to the types that the model's tensors have.

    Args:
        path: of the file.
        model: where it has converted layers they must compute in the formats of the file, or the outputs would be
            others than those of the model that was saved. After a schedule, set its last step first.
        any_format: load into layers of other formats nevertheless.

    Raises:
        FileError: names, shapes or formats of the file and the model differ (the model is as it was), or the file is
            broken.
    """
    content: Mapping[str, Any] = load(path)
    tensors = _entries(model)
    missing, unexpected = sorted(tensors.keys() - content.keys()), sorted(content.keys() - tensors.keys())
    if missing or unexpected:
        raise FileError(
            f"{os.fspath(path)}: expected the {len(tensors)} tensors of {type(model).__name__}; "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    policies = _packed(model)
    values: dict[str, Tensor] = {}
    for name, value in content.items():
        array = value.decode() if isinstance(value, BlockArray) else np.array(value)
        if array.shape != tuple(tensors[name].shape):
            raise FileError(
                f"{os.fspath(path)}: {name}: expected shape {tuple(tensors[name].shape)}, as the model has it; "
                f"found {array.shape}"
            )
        policy, _ = policies.get(id(tensors[name]), (None, None))
        if isinstance(value, BlockArray) and policy is not None and value.format != policy.format and not any_format:
            raise FileError(
                f"{os.fspath(path)}: {name}: expected {policy.format}, in which the layer computes now; found "
                f"{value.format}: set the schedule to the step that the model was saved at, or convert to that format, "
                "or load with any_format=True"
            )
        values[name] = torch.from_numpy(array)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
