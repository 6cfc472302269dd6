"""Scaled dot-product attention as a module, so that conversion can find it and give it formats."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from hbfp import autograd
from hbfp.nn.functional import RecipeLike
from hbfp.nn.precision import as_wide_as
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, solo_state

__all__ = ["DotProductAttention"]


class DotProductAttention(nn.Module):
    """softmax(scale · query · keyᵀ + mask) · value, without parameters.

    A network that holds one of these in place of the call to `torch.nn.functional.scaled_dot_product_attention`
    computes
    the same as before, until `hbfp.convert_` gives it formats: then both products, and the four of the backward pass,
    run in fixed point. Use one module per call: its number tells its random bits from others'.

    Args:
        recipe: None until conversion; or a name, a format or a `hbfp.Recipe`, for use without `convert_`.
        seed, site: as in `hbfp.nn.Linear`; of no effect without a recipe.
    """

    hbfp_state: LayerState | None = None
    """None: the module computes in FP32."""

    def __init__(self, *, recipe: RecipeLike | None = None, seed: int = 0, site: int = 0) -> None:
        super().__init__()
        if recipe is not None:
            self.hbfp_state = solo_state(recipe, seed, site)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `torch.nn.functional.scaled_dot_product_attention`; in fixed point the result is float32, or in the dtype
        of `query` if that is bfloat16 or float16, unless autocasting.
        """
        state = self.hbfp_state
        if state is None:
            return torch_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if isinstance(query, Proxy):
            return cast(
                Tensor,
                node(self, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa),
            )
        if state.solo and self.training:
            state.root.advance()
        out = autograd.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale,
            state.recipe, state.root.seed, state.stream(), state, enable_gqa=enable_gqa,
        )  # fmt: skip
        return as_wide_as(query, out)

    def extra_repr(self) -> str:
        return "FP32" if self.hbfp_state is None else self.hbfp_state.recipe.formats
