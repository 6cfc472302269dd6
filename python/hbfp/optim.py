"""Wide weights: the optimizer's master copy kept in block floating point, too.

The narrow codes of each product are derived from the weights; the weights themselves stay wide: float32, or, after
`wide_weights`, 16-bit mantissas in blocks of 64 (Drumond et al., *Training DNNs with Hybrid Block Floating Point*,
NeurIPS 2018, keep them so).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hbfp import emulation, ops
from hbfp.errors import ConversionError, FormatError
from hbfp.format import HBFP, HBFP16
from hbfp.policy import layer_states, weights_of

__all__ = ["WideWeights", "wide_weights"]

STATE_KEY = "hbfp_wide_weights"
"""Under which the width stands in the optimizer's state_dict, beside `state` and `param_groups`; torch ignores it."""


class WideWeights:
    """The wide weights of one optimizer: what `wide_weights` returns. `remove()` ends them."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, format: HBFP) -> None:
        self.model = model
        self.format = format
        self._optimizer = optimizer
        self._handles = (
            optimizer.register_step_post_hook(self._round),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check),
        )
        # torch pickles and copies an optimizer without its hooks; this goes the same way.
        optimizer.__dict__[STATE_KEY] = self

    def remove(self) -> None:
        """Weights are float32 again from the next step on. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        if self._optimizer.__dict__.get(STATE_KEY) is self:
            del self._optimizer.__dict__[STATE_KEY]

    def _round(self, optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        # Looked up at each step: parameters may have been replaced, and groups added.
        weights = _weights(self.model, self.format)
        # The same bits either way; the core reads the memory of CPUs.
        with torch.no_grad():
            for parameter in _held(optimizer, weights):
                quantize = ops.quantize if parameter.is_cpu else emulation.quantize
                parameter.copy_(quantize(parameter.detach(), self.format, weights[parameter]))

    def _save(self, _optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[STATE_KEY] = {"bits": self.format.bits}

    def _check(self, _optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        saved = state.get(STATE_KEY)
        if saved is None:
            raise ConversionError(
                f"expected the state of an optimizer with wide weights of {self.format.bits} bits; found one without: "
                "its weights were float32. To begin wide weights there, load the state before hbfp.wide_weights is "
                "called"
            )
        found = saved.get("bits") if isinstance(saved, Mapping) else saved
        if found != self.format.bits:
            raise ConversionError(
                f"expected wide weights of {self.format.bits} bits; found a state with {found!r}: call "
                "hbfp.wide_weights with its bits, or, to change the width, after the state is loaded"
            )


def wide_weights(optimizer: torch.optim.Optimizer, model: nn.Module, bits: int | None = None) -> WideWeights:
    """Rounds the weights of the converted layers to HBFP after every step of `optimizer`, in place.

    Weights are rounded to nearest even in blocks of 64 along their last axis, those of convolutions along the channels
    of the input at each tap. Momentum and all else that the optimizer keeps is untouched, and so are biases and
    parameters of layers in FP32. A step that evaluates a closure several times (LBFGS) is one step.

    The optimizer's state_dict says that its weights are wide, and how wide: under "hbfp_wide_weights", which an
    optimizer without wide weights takes and forgets. One with them loads only states of its own width, so that a
    resumed run is the run that was saved; a state that was loaded before this call is not asked. Copies and pickles of
    an optimizer lack its hooks, these among them, as everywhere in torch: call this again for them.

    Args:
        optimizer: any torch optimizer, made before or after conversion. Parameters that it is given later count, too.
        model: a converted model; one module around all of them if the optimizer serves several. Weights that the
            optimizer does not hold (frozen ones) are left alone.
        bits: mantissa width, 2…16, sign included; None: the one that recipes name (`Recipe.wide_weights`), or else 16.

    Returns:
        A handle; `.remove()` ends it.

    Raises:
        FormatError: `bits` is outside 2…16, or not given where recipes name several.
        ConversionError: `model` has no converted layer with a weight, or one that is computed by a parametrisation;
            `optimizer` holds none of their weights, or has wide weights already.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConversionError(f"expected a torch.optim.Optimizer; found {type(optimizer).__name__}")
    format = HBFP(_named(model) if bits is None else bits)
    if STATE_KEY in optimizer.__dict__:
        raise ConversionError(
            f"this {type(optimizer).__name__} has wide weights of {optimizer.__dict__[STATE_KEY].format.bits} bits "
            "already: remove() the handle first, or, for several models, give one nn.ModuleList of them"
        )
    weights = _weights(model, format)
    if not weights:
        raise ConversionError("no converted layer has a weight: call hbfp.convert_(model) before hbfp.wide_weights")
    if not _held(optimizer, weights):
        raise ConversionError(
            f"the optimizer holds none of the {len(weights)} weights of {type(model).__name__}'s converted layers: "
            "make it of this model's parameters"
        )
    return WideWeights(optimizer, model, format)


def _named(model: nn.Module) -> int:
    """The width that the recipes of `model` name, or HBFP16's."""
    recipes = [state.base for _, _, state in layer_states(model)]
    named = {recipe.wide_weights for recipe in recipes if recipe.wide_weights is not None}
    if len(named) > 1:
        raise FormatError(f"the layers' recipes name wide weights of {sorted(named)} bits: give bits, one for all")
    return next(iter(named), HBFP16.bits)


def _weights(model: nn.Module, format: HBFP) -> dict[Tensor, int]:
    """The weights of the converted layers, each with the axis of its blocks. Tensors are hashed by identity."""
    weights: dict[Tensor, int] = {}
    for layer, module, _ in layer_states(model):
        for entry in weights_of(module, format):
            # As torch's parametrisations hold it, or as the hooks before them did.
            if parametrize.is_parametrized(entry.owner, entry.name) or entry.name in entry.owner.__dict__:
                raise ConversionError(
                    f"{entry.name} of {layer or type(module).__name__!r} is no parameter but computed from others "
                    "(weight_norm, spectral_norm, ...), which have no block format: remove the parametrisation, or do "
                    "without wide weights"
                )
            weight = entry.owner._parameters.get(entry.name)  # None: the layer has none, as attention by itself
            if weight is not None:
                weights.setdefault(weight, entry.axis)
    return weights


def _held(optimizer: torch.optim.Optimizer, weights: Mapping[Tensor, int]) -> list[Tensor]:
    """Those of `weights` that `optimizer` holds."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in weights]
