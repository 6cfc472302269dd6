"""Models as packed files: converted weights as the codes that the forward product reads, everything else as it is.

A loaded model must compute the same bits. It does where encoding is idempotent: a decoded weight encodes to the codes
it came from. So a weight is packed if its layer's forward product rounds it deterministically and by an exponent rule
other than `ceil`, and if nothing but converted layers of one format reads it (a tied embedding looks rows up in FP32);
other weights are stored as they are. So are those of convolutions over flattened patches, whose blocks no axis has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hbfp.array import BlockArray, encode
from hbfp.errors import FileError
from hbfp.files import Deferred, Entry, File, save
from hbfp.format import HBFP, ExponentRule, Rounding
from hbfp.nn.conversion import FROZEN
from hbfp.packed import PackedWeight
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


def encoded_state(model: nn.Module) -> dict[str, BlockArray | NDArray[Any]]:
    """The model's state_dict as arrays, with the weights of converted layers encoded, blocked along the inputs.

    Args:
        model: converted by `hbfp.convert_`; at the widths in force now. bfloat16 tensors become float32.

    Raises:
        FileError: something in the state_dict is not a tensor.
    """
    return {name: x.make() if isinstance(x, Deferred) else x for name, x in _content(model).items()}


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int | None = None,
) -> None:
    """Writes the model's state_dict with the weights of converted layers packed, blocked along the inputs.

    Weights are packed one by one as they are written.

    Args:
        path: of the file (safetensors); it appears complete or not at all.
        model: converted by `hbfp.convert_`, at the widths in force now, or frozen by `hbfp.freeze_`, whose weights are
            written as they are. bfloat16 tensors are stored as float32.
        metadata: further strings for the header, as in `hbfp.save`.
        max_shard_size: bytes; see `hbfp.save`.

    Raises:
        FileError: something in the state_dict is not a tensor.
        DTypeError: a plain tensor's type can't be stored.
        OSError: the file can't be written.
    """
    save(path, _content(model), metadata, max_shard_size=max_shard_size)


def _content(model: nn.Module) -> dict[str, Any]:
    """What a file of the model holds, with weights that are encoded when their turn comes."""
    policies = _packed(model)
    content: dict[str, Any] = {}
    for name, tensor in _entries(model).items():
        if isinstance(tensor, PackedWeight):
            content[name] = Deferred(tensor.format, tuple(tensor.shape), tensor.block_array, tensor.axis)
        elif id(tensor) in policies:
            policy, axis = policies[id(tensor)]
            make = partial(_encoded, tensor, policy, axis)
            content[name] = Deferred(policy.format, tuple(tensor.shape), make, axis, policy.rounding)
        else:
            content[name] = _array(tensor)
    return content


def _encoded(tensor: Tensor, policy: OperandPolicy, axis: int) -> BlockArray:
    return encode(_array(tensor), policy.format, axis=axis, rounding=policy.rounding)


def load_model(path: str | os.PathLike[str], model: nn.Module, *, any_format: bool = False) -> None:
    """Reads a file written by `save_model` into `model`, in place: converted or not, of the same architecture.

    Values are cast to the types that the model's tensors have. Tensors are decoded one by one; those of a model that
    was made under `torch.device("meta")` become what was decoded, on the CPU, and exist once. Weights that
    `hbfp.freeze_` packed take the file's codes without becoming floats: they read the file until their first product,
    which checks the codes and lays them out for the kernels.

    Args:
        path: of the file, or of the index of its shards.
        model: where it has converted layers they must compute in the formats of the file, or the outputs would be
            others than those of the model that was saved. After a schedule, set its last step first.
        any_format: load into layers of other formats nevertheless.

    Raises:
        FileError: names, shapes or formats of the file and the model differ, the file is broken, or a tensor on the
            meta device is no part of the state_dict (the model is as it was).
        CodeError: the file holds forbidden codes (the model is as it was).
    """
    where = os.fspath(path)
    tensors = _entries(model)
    _refuse_unsaved(where, model, tensors)
    policies = _packed(model)
    with File(path) as file:
        missing, unexpected = sorted(tensors.keys() - file.keys()), sorted(file.keys() - tensors.keys())
        if missing or unexpected:
            raise FileError(
                f"{where}: expected the {len(tensors)} tensors of {type(model).__name__}; "
                f"missing {missing[:5]}, unexpected {unexpected[:5]}"
            )
        for name, tensor in tensors.items():
            policy, _ = policies.get(id(tensor), (None, None))
            format = tensor.format if isinstance(tensor, PackedWeight) else None if policy is None else policy.format
            _check(file, name, tensor, None if any_format else format)
        made: dict[int, Tensor] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                new = _fill(tensor, file, name)
                if new is not tensor:
                    made[id(tensor)] = new
            for packed, floats in _tied(model):
                new = _put(packed, _pack(packed, made.get(id(floats), floats)))
                if new is not packed:
                    made[id(packed)] = new
        _exchange(model, made)


def _check(file: File, name: str, tensor: Tensor, format: HBFP | None) -> None:
    """Refuse what can't become the value of `tensor`, whose layer computes in `format`."""
    described = file.description(name)
    stored = described or file.stored(name)[0]
    shape = stored.shape
    if shape != tuple(tensor.shape):
        raise FileError(
            f"{file.path}: {name}: expected shape {tuple(tensor.shape)}, as the model has it; found {shape}"
        )
    if isinstance(stored, Entry):
        if stored.dtype not in _TORCH:
            raise FileError(f"{file.path}: {name}: dtype: expected one that torch has; found {stored.dtype}")
        return
    if format is not None and stored.format != format:
        raise FileError(
            f"{file.path}: {name}: expected {format}, in which the layer computes now; found "
            f"{stored.format}: set the schedule to the step that the model was saved at, or convert to that format, "
            "or load with any_format=True"
        )
    if not isinstance(tensor, PackedWeight):
        cast(BlockArray, file[name]).check_codes()


_TORCH = {
    **{"BOOL": torch.bool, "C64": torch.complex64},
    **{"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def _fill(tensor: Tensor, file: File, name: str) -> Tensor:
    """`tensor` with the values of the file; on "meta", where there is nothing to fill, another in its place."""
    described = file.description(name)
    if isinstance(tensor, PackedWeight) and described is not None:
        array = cast(BlockArray, file[name])
        if (array.format, array.axis) == (tensor.format, tensor.axis):
            return _put(tensor, PackedWeight.from_block_array(array))
    if described is not None:
        values = torch.from_numpy(cast(BlockArray, file[name]).decode())
    else:
        entry, data = file.stored(name)
        values = torch.from_numpy(data.copy()).view(_TORCH[entry.dtype]).reshape(entry.shape)
    if isinstance(tensor, PackedWeight):
        return _put(tensor, _pack(tensor, values))
    if not tensor.is_meta:
        return tensor.copy_(values)
    values = values.to(tensor.dtype)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _pack(like: PackedWeight, values: Tensor) -> PackedWeight:
    return PackedWeight.of(values, like.format, like.axis)


def _put(place: PackedWeight, packed: PackedWeight) -> Tensor:
    if not place.is_meta:
        place.adopt(packed)
        return place
    return nn.Parameter(packed.to(place.dtype), requires_grad=False)


def _exchange(model: nn.Module, made: Mapping[int, Tensor]) -> None:
    """Puts tensors with memory in the places of those on "meta", all of them."""
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is not None and id(old) in made:
                setattr(module, name, made[id(old)])  # recurrent layers keep a list of their weights
        for frozen in module.__dict__.get(FROZEN, {}).values():
            if frozen.tied is not None:
                frozen.tied = made.get(id(frozen.tied), frozen.tied)


def _refuse_unsaved(path: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """A buffer that no file holds has no value where the model was made without memory."""
    saved = {id(tensor) for tensor in [*tensors.values(), *(packed for packed, _ in _tied(model))]}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and id(tensor) not in saved:
            raise FileError(
                f"{path}: {name}: expected a value for every tensor on the meta device; found one that the state_dict "
                "does not hold: make it on the CPU before loading"
            )
