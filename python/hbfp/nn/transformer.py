"""Transformer layers: containers whose parts compute in fixed point, without torch's fused paths around those parts."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from hbfp.nn.functional import RecipeLike
from hbfp.nn.linear import Linear
from hbfp.nn.multihead import MultiheadAttention
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, RootState, solo_state

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]


def _build(layer: nn.Module, recipe: RecipeLike, seed: int, site: int) -> RootState:
    """Has the parts of a layer that was just built compute in fixed point, numbered from `site` on."""
    first = solo_state(recipe, seed, site)
    for part in layer.children():
        kind = MultiheadAttention if isinstance(part, nn.MultiheadAttention) else Linear
        if isinstance(part, nn.MultiheadAttention | nn.Linear):
            part.__class__ = kind
            part.__dict__["hbfp_state"] = LayerState(first.base, first.recipe, first.root, site)
            site += 5 if kind is MultiheadAttention else 1
    solo_state(recipe, seed, site - 1)  # the last number, too, must fit
    return first.root


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` whose attention and linear layers compute in fixed point.

    In evaluation torch's own layer hands its parts' weights to one fused FP32 function; this one always calls its
    parts.

    Args:
        args, keywords: as in `torch.nn.TransformerEncoderLayer`.
        recipe: a name, a format or a `hbfp.Recipe`, for all parts.
        seed: of stochastic rounding.
        site: the first of the seven numbers of the parts: attention's five, then one for each linear layer.

    A stack of copies (`torch.nn.TransformerEncoder`) would share its numbers: convert the stack of torch's layers with
    `hbfp.convert_` instead.
    """

    hbfp_own: RootState | None = None
    """Made by its constructor and not by `convert_`: the layer advances the step itself."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_own = _build(self, recipe, seed, site)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As in torch."""
        if isinstance(src, Proxy):
            return cast(Tensor, node(self, src, src_mask, src_key_padding_mask, is_causal))
        if self.hbfp_own is not None and self.training:
            self.hbfp_own.advance()
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` whose attention and linear layers compute in fixed point.

    Args:
        args, keywords: as in `torch.nn.TransformerDecoderLayer`.
        recipe: a name, a format or a `hbfp.Recipe`, for all parts.
        seed: of stochastic rounding.
        site: the first of the twelve numbers of the parts: five for each attention, then one for each linear layer.
    """

    hbfp_own: RootState | None = None
    """Made by its constructor and not by `convert_`: the layer advances the step itself."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_own = _build(self, recipe, seed, site)

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        """As in torch."""
        if args and isinstance(args[0], Proxy):
            return cast(Tensor, node(self, *args, **keywords))
        if self.hbfp_own is not None and self.training:
            self.hbfp_own.advance()
        return super().forward(*args, **keywords)
