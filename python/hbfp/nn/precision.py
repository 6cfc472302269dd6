"""The dtype of what a layer returns."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_wide_as"]

_HALVES = frozenset({torch.bfloat16, torch.float16})


def as_wide_as(input: Tensor, result: Tensor) -> Tensor:
    """`result`, float32, in the dtype of the layer's input if that has 16 bits (docs/spec.md, 9.30).

    Computed in float32 and rounded once, to nearest even: activations then take half the memory between layers, and a
    model may be bfloat16 as a whole. Under autocast, which leaves inputs in whatever dtype the operator before liked,
    results stay float32.
    """
    dtype = input.dtype
    if dtype in _HALVES and not torch.is_autocast_enabled(input.device.type):
        return result.to(dtype)
    return result
