"""A bilinear layer whose products run in fixed point."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from hbfp.format import HBFP
from hbfp.nn.functional import RecipeLike, bilinear_products
from hbfp.nn.precision import as_wide_as
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, Weight, solo_state

__all__ = ["Bilinear"]


class Bilinear(nn.Bilinear):
    """`torch.nn.Bilinear` in fixed point: same parameters, same state_dict, same initialisation.

    The products are those of `hbfp.nn.functional.bilinear`.

    Args:
        args, keywords: as in `torch.nn.Bilinear`.
        recipe: a name, a format or a `hbfp.Recipe`.
        seed: of stochastic rounding.
        site: tells the random bits of this layer from those of other layers with the same seed, 0 … 2^20 − 1.

    Shapes: inputs [..., in1_features] and [..., in2_features] of any real floating dtype; output [..., out_features],
    float32, or in the dtype of the first input if that is bfloat16 or float16, unless autocasting.
    """

    hbfp_state: LayerState | None = None
    """None: the layer computes in FP32, as torch's does."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_state = solo_state(recipe, seed, site)

    def hbfp_weights(self, format: HBFP) -> list[Weight]:
        """The weight. Its product sees a matrix, in which tiles reach from one output's slice into the next."""
        return [Weight(self, "weight", packs=format.tile is None)]

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        state = self.hbfp_state
        if state is None:
            return super().forward(input1, input2)
        if isinstance(input1, Proxy):
            return cast(Tensor, node(self, input1, input2))
        if state.solo and self.training:
            state.root.advance()
        out = bilinear_products(
            input1, input2, self.weight, self.bias, state.recipe, state.root.seed, state.stream(), state
        )
        return as_wide_as(input1, out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'FP32' if self.hbfp_state is None else self.hbfp_state.recipe.formats}"
