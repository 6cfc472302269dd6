"""A linear layer whose three products run in fixed point."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hbfp import autograd
from hbfp.nn.functional import RecipeLike
from hbfp.nn.precision import as_wide_as
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, solo_state

__all__ = ["Linear"]


class Linear(nn.Linear):
    """`torch.nn.Linear` in fixed point: same parameters, same state_dict, same initialisation.

    `hbfp.convert_` makes these out of `torch.nn.Linear` in place; built directly, the layer is a conversion of its own:
    each training forward draws new random bits.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        recipe: a name, a format or a `hbfp.Recipe`.
        seed: of stochastic rounding.
        site: tells the random bits of this layer from those of other layers with the same seed, 0 … 2^20 - 1.

    Shapes: input [..., in_features] of any real floating dtype; output [..., out_features], float32, or in the input's
    dtype if that is bfloat16 or float16, unless autocasting.
    """

    hbfp_state: LayerState | None = None
    """None: the layer computes in FP32, as `torch.nn.Linear` does."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: RecipeLike = "hbfp4",
        seed: int = 0,
        site: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.hbfp_state = solo_state(recipe, seed, site)

    def forward(self, input: Tensor) -> Tensor:
        state = self.hbfp_state
        if state is None:
            return super().forward(input)
        if isinstance(input, Proxy):
            return cast(Tensor, node(self, input))
        if state.solo and self.training:
            state.root.advance()
        try:  # here `self.weight` looks last of all, a matter of a microsecond
            weight: Any = self._parameters["weight"]
            bias: Tensor | None = self._parameters["bias"]
        except KeyError:  # pruned, or parametrized
            weight, bias = self.weight, self.bias
        out = autograd.linear(input, weight, bias, state.recipe, state.root.seed, state.stream(), state)
        return out if input.dtype is torch.float32 else as_wide_as(input, out)

    def extra_repr(self) -> str:
        state = self.hbfp_state
        return f"{super().extra_repr()}, {'FP32' if state is None else state.recipe.formats}"
