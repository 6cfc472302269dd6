"""Attention in two halves, for callers that want the softmax between them too.

The bits are those of `hbfp.autograd.attention` with the same numbers: the same products with the same roles, and
between the halves the same dropout. What
reaches the softmax from elsewhere, a loss on the weights, is added to what reaches it through the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfp.autograd import Role, once
from hbfp.backends import arithmetic
from hbfp.policy import Recipe

__all__ = ["ContextFunction", "DropoutFunction", "WeightsFunction"]


class WeightsFunction(torch.autograd.Function):
    """P = softmax(scale Q Kᵀ + mask). Q [..., L, E], K [..., S, E], mask [..., L, S] float32 or None; P [..., L, S]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float,
        recipe: Recipe,
        seed: int,
        stream: int,
        source: object,
    ) -> Tensor:
        policy = recipe.forward
        by = arithmetic(recipe.backends.forward)
        scores = by.product(
            q, -1, k, -1, policy.formats, policy.roundings, seed,
            (stream | Role.Q_FORWARD, stream | Role.K_FORWARD), name="scores", source=source,
        )  # fmt: skip
        p = by.softmax(scores, scale, False, None if mask is None else mask.expand(scores.shape), reuse=True)
        need_q, need_k, need_mask = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            q if need_k else None, k if need_q else None, p if any((need_q, need_k, need_mask)) else None
        )
        ctx.mask_shape, ctx.scale = None if mask is None else mask.shape, scale
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        return p

    @staticmethod
    @once
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        q, k, p = ctx.saved_tensors
        need_q, need_k, need_mask = ctx.needs_input_grad[:3]
        recipe, seed, stream, source = ctx.recipe, ctx.seed, ctx.stream, ctx.source
        by, by_right = arithmetic(recipe.backends.input_gradient), arithmetic(recipe.backends.weight_gradient)
        dq = dk = dmask = None
        if need_mask:
            dmask = by.softmax_backward(p, dp, 1.0).sum_to_size(ctx.mask_shape)
        if need_q or need_k:
            ds = by.softmax_backward(p, dp, ctx.scale)
        if need_q:
            policy = recipe.input_gradient
            dq = by.product(
                ds, -1, k, -2, policy.formats, policy.roundings, seed,
                (stream | Role.DS_FOR_DQ, stream | Role.QKV_BACKWARD), name="gradient of Q", source=source,
            )  # fmt: skip
        if need_k:
            policy = recipe.weight_gradient
            dk = by_right.product(
                ds, -2, q, -2, policy.formats, policy.roundings, seed,
                (stream | Role.DS_FOR_DK, stream | Role.QKV_BACKWARD), name="gradient of K", source=source,
            )  # fmt: skip
        return dq, dk, dmask, None, None, None, None, None


class DropoutFunction(torch.autograd.Function):
    """P [..., L, S] with the elements dropped that attention drops; see `hbfp.autograd.drawn_dropout`."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, dropped: int, word: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(word)
        ctx.dropped, ctx.recipe = dropped, recipe
        return arithmetic(recipe.backends.forward).dropout(p, dropped, word)

    @staticmethod
    @once
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        (word,) = ctx.saved_tensors
        return arithmetic(ctx.recipe.backends.input_gradient).dropout(dp, ctx.dropped, word), None, None, None


class ContextFunction(torch.autograd.Function):
    """O = P V. P [..., L, S], V [..., S, Ev]; O [..., L, Ev]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, v: Tensor, recipe: Recipe, seed: int, stream: int, source: object) -> Tensor:
        policy = recipe.forward
        need_p, need_v = ctx.needs_input_grad[:2]
        ctx.save_for_backward(p if need_v else None, v if need_p else None)
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        return arithmetic(recipe.backends.forward).product(
            p, -1, v, -2, policy.formats, policy.roundings, seed,
            (stream | Role.P_FORWARD, stream | Role.V_FORWARD), name="context", source=source,
        )  # fmt: skip

    @staticmethod
    @once
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        p, v = ctx.saved_tensors
        need_p, need_v = ctx.needs_input_grad[:2]
        recipe, seed, stream, source = ctx.recipe, ctx.seed, ctx.stream, ctx.source
        dp = dv = None
        if need_p:
            policy = recipe.input_gradient
            dp = arithmetic(recipe.backends.input_gradient).product(
                do, -1, v, -1, policy.formats, policy.roundings, seed,
                (stream | Role.DO_FOR_DP, stream | Role.QKV_BACKWARD), name="gradient of P", source=source,
            )  # fmt: skip
        if need_v:
            policy = recipe.weight_gradient
            dv = arithmetic(recipe.backends.weight_gradient).product(
                p, -2, do, -2, policy.formats[::-1], policy.roundings[::-1], seed,
                (stream | Role.P_FOR_DV, stream | Role.DO_FOR_DV), name="gradient of V", source=source,
            )  # fmt: skip
        return dp, dv, None, None, None, None
