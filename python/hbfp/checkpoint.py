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
from torch import Tensor, nn

from hbfp.array import BlockArray, encode
from hbfp.errors import FileError
from hbfp.files import load, save
from hbfp.format import ExponentRule, Rounding
from hbfp.nn.conversion import FROZEN
from hbfp.packed import PackedWeight
from hbfp.policy import OperandPolicy, layer_states, weights_of

__all__ = ["load_model", "save_model"]


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
    return {key: policy for key, policy in policies.items() if policy is not None and is_idempotent(policy[0])}


def is_idempotent(policy: OperandPolicy) -> bool:
    """Whether decoded values encode to the codes that they came from."""
    return policy.rounding is not Rounding.STOCHASTIC and policy.format.exponent_rule != ExponentRule.CEIL


def _tied(model: nn.Module) -> list[tuple[PackedWeight, nn.Parameter]]:
    """Packed weights that stand for a parameter which others keep as floats: a file has the floats alone."""
    pairs: list[Any] = [
        (module._parameters[name], frozen.tied)
        for module in model.modules()
        for name, frozen in module.__dict__.get(FROZEN, {}).items()
        if frozen.tied is not None
    ]
    return pairs


def _entries(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state_dict; one that has several names under the first of them."""
    seen = {id(packed) for packed, _ in _tied(model)}
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


def save_model(path: str | os.PathLike[str], model: nn.Module, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's state_dict with the weights of converted layers packed, blocked along the inputs.

    Args:
        path: of the file (safetensors); it appears complete or not at all.
        model: converted by `hbfp.convert_`, at the widths in force now, or frozen by `hbfp.freeze_`, whose weights are
            written as they are. bfloat16 tensors are stored as float32.
        metadata: further strings for the header, as in `hbfp.save`.

    Raises:
        FileError: something in the state_dict is not a tensor.
        DTypeError: a plain tensor's type can't be stored.
        OSError: the file can't be written.
    """
    policies = _packed(model)
    tensors = _entries(model)
    content: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedWeight):
            content[name] = tensor.block_array()
            continue
        array = content[name] = _array(tensor)
        if id(tensor) in policies:
            policy, axis = policies[id(tensor)]
            content[name] = encode(array, policy.format, axis=axis, rounding=policy.rounding)
    save(path, content, metadata)


def load_model(path: str | os.PathLike[str], model: nn.Module, *, any_format: bool = False) -> None:
    """Reads a file written by `save_model` into `model`, in place: converted or not, of the same architecture.

    Values are cast to the types that the model's tensors have. Weights that `hbfp.freeze_` packed take the file's codes
    without becoming floats, and are laid out for the kernels at their first product. A model on "meta" gets its memory
    here: frozen first, it is loaded without its floats ever being in memory.

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
    for name, value in content.items():
        tensor = tensors[name]
        if tuple(value.shape) != tuple(tensor.shape):
            raise FileError(
                f"{os.fspath(path)}: {name}: expected shape {tuple(tensor.shape)}, as the model has it; "
                f"found {tuple(value.shape)}"
            )
        policy, _ = policies.get(id(tensor), (None, None))
        format = tensor.format if isinstance(tensor, PackedWeight) else None if policy is None else policy.format
        if isinstance(value, BlockArray) and format is not None and value.format != format and not any_format:
            raise FileError(
                f"{os.fspath(path)}: {name}: expected {format}, in which the layer computes now; found "
                f"{value.format}: set the schedule to the step that the model was saved at, or convert to that format, "
                "or load with any_format=True"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and not any(buffer is tensor for tensor in tensors.values()):
            raise FileError(f"{name}: expected a value, as the buffer is on 'meta' and no file holds it: set it first")
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            new = _fill(tensor, content[name])
            if new is not tensor:
                made[id(tensor)] = new
        for packed, floats in _tied(model):
            new = _fill(packed, np.from_dlpack(made.get(id(floats), floats).detach()))
            if new is not packed:
                made[id(packed)] = new
    if made:
        _exchange(model, made)


def _fill(tensor: Tensor, value: Any) -> Tensor:
    """`tensor` with the values of the file; on "meta", where there is nothing to fill, another in its place."""
    if isinstance(tensor, PackedWeight):
        same = isinstance(value, BlockArray) and (value.format, value.axis) == (tensor.format, tensor.axis)
        packed = (
            PackedWeight.from_block_array(value)
            if same
            else PackedWeight.of(torch.from_numpy(_floats(value)), tensor.format, tensor.axis)
        )
        if not tensor.is_meta:
            tensor.adopt(packed)
            return tensor
        return nn.Parameter(packed.to(tensor.dtype), requires_grad=False)
    values = torch.from_numpy(_floats(value))
    if not tensor.is_meta:
        return tensor.copy_(values)
    values = values.to(tensor.dtype)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _floats(value: Any) -> Any:
    return value.decode() if isinstance(value, BlockArray) else np.array(value)


def _exchange(model: nn.Module, made: dict[int, Tensor]) -> None:
    """Puts tensors with memory in the places of those on "meta", all of them."""
    for module in model.modules():
        for entries in (module._parameters, module._buffers):
            for name, old in entries.items():
                if old is not None and id(old) in made:
                    entries[name] = made[id(old)]  # type: ignore[assignment]
        for frozen in module.__dict__.get(FROZEN, {}).values():
            if frozen.tied is not None:
                frozen.tied = made.get(id(frozen.tied), frozen.tied)
