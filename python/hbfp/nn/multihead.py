"""Multi-head attention whose projections and attention run in fixed point."""

from __future__ import annotations

from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hbfp import autograd, ops
from hbfp.attention import ContextFunction, DropoutFunction, WeightsFunction
from hbfp.errors import HBFPError, ShapeError
from hbfp.format import HBFP
from hbfp.nn.functional import RecipeLike
from hbfp.nn.precision import as_wide_as
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, Weight, solo_state

__all__ = ["MultiheadAttention"]

_Q, _K, _V, _ATTENTION, _OUT = range(5)
"""The sites of one layer, in order."""


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` in fixed point: same parameters, same state_dict, same initialisation.

    The projections are linear layers on the inputs as they lie, rows in the order of their leading dimensions: one
    product where `query`, `key` and `value` are one tensor, one for `query` and one for both others where those two
    are one tensor, else three. Heads are batches of attention, [batch, heads, L, E / heads].

    Differs from torch in a row whose every column is masked (0, not NaN), and in that there is no fused path for
    inference and no nested input. Results are float32, or in the dtype of `query` if that is bfloat16 or float16,
    unless autocasting; what is between the products is float32 in any case.

    Args:
        args, keywords: as in `torch.nn.MultiheadAttention`.
        recipe: a name, a format or a `hbfp.Recipe`.
        seed: of stochastic rounding.
        site: the first of the five numbers that tell the layer's random bits from others' with the same seed.
    """

    hbfp_state: LayerState | None = None
    """None: the layer computes in FP32, as torch's does."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_state = solo_state(recipe, seed, site, self.hbfp_sites())

    def hbfp_sites(self) -> int:
        """How many numbers the layer takes."""
        return 5

    def hbfp_parts(self) -> list[str]:
        """What each number stands for, as the weights are called; a packed weight as a whole is the first."""
        packed = self._qkv_same_embed_dim
        inputs = ["in_proj", "in_proj_k", "in_proj_v"] if packed else ["q_proj", "k_proj", "v_proj"]
        return [*inputs, "attention", "out_proj"]

    def hbfp_weights(self, format: HBFP) -> list[Weight]:
        """The weights of all projections.

        The packed one may be read in three parts; only lines have the same codes in the parts as in the whole.
        """
        parts = [Weight(self, name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        whole = Weight(self, "in_proj_weight", packs=format.tile is None and format.block is not None)
        return [*parts, whole, Weight(self.out_proj, "weight")]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in torch. `need_weights` costs time and memory, and does not change the output's bits."""
        state = self.hbfp_state
        if state is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if isinstance(query, Proxy):
            return cast(
                tuple[Tensor, Tensor | None],
                node(
                    self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                ),
            )
        if state.solo and self.training:
            state.root.advance()
        if is_causal and attn_mask is None:
            raise HBFPError("is_causal is a hint about attn_mask and needs it, as in torch; found no mask")
        batched = query.dim() == 3
        self._check(query, key, value)
        q, k, v = (self._heads(x, batched) for x in self._project(state, query, key, value))

        causal = is_causal and key_padding_mask is None and not need_weights and not self._extended
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k, batched)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (self._append(x, bias) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        p = self.dropout if self.training else 0.0
        numbers = state.recipe, state.root.seed, state.stream(0, _ATTENTION), state
        weights: Tensor | None = None
        if need_weights:
            weights = WeightsFunction.apply(q, k, mask, 1.0 / sqrt(self.head_dim), *numbers)
            dropped, word = autograd.drawn_dropout(p, q)
            weights = weights if word is None else DropoutFunction.apply(weights, dropped, word, state.recipe)
            context = ContextFunction.apply(weights, v, *numbers)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            context = autograd.attention(q, k, v, mask, p, causal, None, *numbers)
        out = as_wide_as(query, self._out(state, context, batched))
        return out, None if weights is None else as_wide_as(query, weights)

    @property
    def _extended(self) -> bool:
        """Whether keys and values get rows beyond those of the input."""
        return self.bias_k is not None or self.add_zero_attn

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        ops.require_real(query, key, value)
        autograd.require_plain(query, key, value)
        if query.is_nested or key.is_nested or value.is_nested:
            raise ShapeError("expected padded tensors; found a nested one: pad it, and mask by key_padding_mask")
        found = [tuple(x.shape) for x in (query, key, value)]
        fit = (
            query.dim() in (2, 3)
            and query.dim() == key.dim() == value.dim()
            and [shape[-1] for shape in found] == [self.embed_dim, self.kdim, self.vdim]
            and found[1][:-1] == found[2][:-1]
        )
        if fit and query.dim() == 3:
            place = 0 if self.batch_first else 1
            fit = found[0][place] == found[1][place]
        if not fit:
            layout = "[N, L, …], [N, S, …], [N, S, …]" if self.batch_first else "[L, N, …], [S, N, …], [S, N, …]"
            raise ShapeError(
                f"query, key and value are {layout}, or without N, of {self.embed_dim}, {self.kdim} and {self.vdim} "
                f"features; found {found[0]}, {found[1]} and {found[2]}"
            )

    def _project(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        width = self.embed_dim
        bias = cast(Tensor | None, self.in_proj_bias)

        def project(x: Tensor, weight: Tensor, first: int, end: int, site: int) -> Tensor:
            part = None if bias is None else bias if end - first == 3 else bias[first * width : end * width]
            return autograd.linear(x, weight, part, state.recipe, state.root.seed, state.stream(0, site), state)

        if not self._qkv_same_embed_dim:
            separate = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            inputs = query, key, value
            return tuple(project(inputs[i], separate[i], i, i + 1, i) for i in range(3))
        packed = self.in_proj_weight
        if query is key and key is value:
            return project(query, packed, 0, 3, _Q).chunk(3, -1)
        q = project(query, packed[:width], 0, 1, _Q)
        if key is value:
            return (q, *project(key, packed[width:], 1, 3, _K).chunk(2, -1))
        return (
            q,
            project(key, packed[width : 2 * width], 1, 2, _K),
            project(value, packed[2 * width :], 2, 3, _V),
        )

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """[N, heads, L, E / heads] of a projected input."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _append(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [N, heads, S, E / heads] with the learned row [1, 1, E] behind the others."""
        row = bias.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
        return torch.cat((x, row.expand(x.shape[0], -1, -1, -1)), 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, batched: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores [N, heads, L, S']; None without any."""
        sequences, rows, columns = q.shape[0], q.shape[2], k.shape[2]
        parts = []
        if attn_mask is not None:
            if tuple(attn_mask.shape) == (rows, columns):
                parts.append(_additive(attn_mask))
            elif tuple(attn_mask.shape) == (sequences * self.num_heads, rows, columns):
                parts.append(_additive(attn_mask).unflatten(0, (sequences, self.num_heads)))
            else:
                raise ShapeError(
                    f"attn_mask is [L, S], here {(rows, columns)}, or [N · heads, L, S], here "
                    f"{(sequences * self.num_heads, rows, columns)}; found {tuple(attn_mask.shape)}"
                )
        if key_padding_mask is not None:
            expected = (sequences, columns) if batched else (columns,)
            if tuple(key_padding_mask.shape) != expected:
                raise ShapeError(f"key_padding_mask is {expected} here; found {tuple(key_padding_mask.shape)}")
            parts.append(_additive(key_padding_mask).view(sequences, 1, 1, columns))
        if not parts:
            return None
        mask = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        # The rows that are appended to keys and values are never masked.
        return pad(mask, (0, (self.bias_k is not None) + bool(self.add_zero_attn))) if self._extended else mask

    def _out(self, state: LayerState, context: Tensor, batched: bool) -> Tensor:
        x = context.transpose(1, 2) if self.batch_first or not batched else context.permute(2, 0, 1, 3)
        x = (x if batched else x.squeeze(0)).flatten(-2)
        weight, bias = self.out_proj.weight, self.out_proj.bias
        return autograd.linear(x, weight, bias, state.recipe, state.root.seed, state.stream(0, _OUT), state)

    def extra_repr(self) -> str:
        return "FP32" if self.hbfp_state is None else self.hbfp_state.recipe.formats


def _additive(mask: Tensor) -> Tensor:
    """A mask as float32 that is added to the scores; of booleans, True says which elements do not take part."""
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(mask, float("-inf"))
    ops.require_real(mask)
    return mask.to(torch.float32)
