"""Wide weights: the optimizer's master copy kept in block floating point, too.

The narrow codes of each product are derived from the weights; the weights themselves stay wide: float32, or, after
`wide_weights`, 16-bit mantissas in blocks of 64 (Drumond et al., *Training DNNs with Hybrid Block Floating Point*,
NeurIPS 2018, keep them so).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hbfp import emulation, ops
from hbfp.errors import ConversionError
from hbfp.format import HBFP
from hbfp.policy import layer_states, weights_of

__all__ = ["wide_weights"]


def wide_weights(optimizer: torch.optim.Optimizer, model: nn.Module, bits: int = 16) -> RemovableHandle:
    """Rounds the weights of the converted layers to HBFP after every step of `optimizer`, in place.

    Weights are rounded to nearest even in blocks of 64 along their last axis, those of convolutions along the channels
    of the input at each tap. Momentum and all else that the optimizer keeps is untouched, and so are biases and
    parameters of layers in FP32.

    Args:
        optimizer: any torch optimizer, made before or after conversion.
        model: a converted model. Weights that the optimizer does not hold (frozen ones) are left alone.
        bits: mantissa width, 2…16, sign included.

    Returns:
        A handle; `.remove()` ends it.

    Raises:
        FormatError: `bits` is outside 2…16.
        ConversionError: `model` has no converted layer with a weight, or one whose weight is computed from other
            parameters (a parametrisation); or `optimizer` holds none of their weights.
    """
    format = HBFP(bits)
    weights: dict[int, tuple[Tensor, int]] = {}
    for _, module, _ in layer_states(model):
        for entry in weights_of(module, format):
            weight = entry.parameter
            if weight is not None:
                weights.setdefault(id(weight), (weight, entry.axis))
    if not weights:
        raise ConversionError("no converted layer has a weight: call hbfp.convert_(model) before hbfp.wide_weights")

    if not any(id(parameter) in weights for group in optimizer.param_groups for parameter in group["params"]):
        raise ConversionError(
            f"the optimizer holds none of the {len(weights)} weights of {type(model).__name__}'s converted layers: "
            "make it of this model's parameters"
        )

    def widen(optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in weights:
                    _, axis = weights[id(parameter)]
                    with torch.no_grad():
                        # The same bits either way; the core reads the memory of CPUs.
                        quantize = ops.quantize if parameter.is_cpu else emulation.quantize
                        parameter.copy_(quantize(parameter.detach(), format, axis))

    return optimizer.register_step_post_hook(widen)
