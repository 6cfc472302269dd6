"""Differentiable products: linear, matmul and attention, whose backward passes are fixed-point products too.

Every operand is encoded anew along the reduction of the product at hand (FORMAT section 6), and backward computes the
gradients that are asked for and no others. Of the tensors that it needs, a product with a matrix keeps X as the codes
of its weight gradient, made in the same pass as those of the forward product; the rest are float tensors.

Each function takes `seed` and `stream` as numbers. The stream's low four bits are 0; every operand adds its role, so
that no two operands of a step share random bits. Recomputation with the same numbers gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import wraps
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from hbfp import ops
from hbfp.backends import Arithmetic, arithmetic
from hbfp.errors import HBFPError, ShapeError
from hbfp.packed import PackedWeight
from hbfp.policy import Backend, Recipe

__all__ = [
    "AttentionFunction",
    "FusedAttentionFunction",
    "LinearFunction",
    "MatmulFunction",
    "Role",
    "attention",
    "drawn_dropout",
    "keeps_codes",
    "linear",
    "matmul",
    "once",
    "require_plain",
    "unseen",
]


class Role(IntEnum):
    """What an operand is to its product: the low four bits of its random stream.

    The first six serve linear and matmul (whose A stands for X and B for W); attention has its own.
    """

    X_FORWARD = 0
    W_FORWARD = 1
    DY_FOR_DX = 2
    W_FOR_DX = 3
    DY_FOR_DW = 4
    X_FOR_DW = 5
    Q_FORWARD = 6
    K_FORWARD = 7
    P_FORWARD = 8
    V_FORWARD = 9
    DO_FOR_DP = 10
    DO_FOR_DV = 11
    DS_FOR_DQ = 12
    DS_FOR_DK = 13
    P_FOR_DV = 14
    QKV_BACKWARD = 15


# Plain numbers: the eager path adds them to a stream at every call.
_X, _W, _DY_X, _W_X, _DY_W, _X_W, _Q, _K, _P, _V, _DO_P, _DO_V, _DS_Q, _DS_K, _P_V, _QKV = (int(role) for role in Role)

_INTEGER = Backend.INTEGER
_transform, _tracer = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state


class _Underivable(torch.autograd.Function):
    """Gradients that may not be differentiated themselves, tied to those that they were computed from.

    Without the tie (torch's `once_differentiable` has none) `torch.autograd.functional.hessian` would find no way back
    and give zeros.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise HBFPError(
            "a gradient of fixed-point products was differentiated again (create_graph=True): rounding has no "
            "derivative. Keep the layers that you differentiate twice in FP32, by rules or outside the conversion"
        )


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose results cannot be differentiated; HBFPError says so to who tries."""

    @wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> Any:
        if not is_grad_enabled() or is_compiling():  # without create_graph, or where torch refuses it
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        tied = [x for x in gradients if x is not None and x.requires_grad]
        return _Underivable.apply(len(found), *found, *tied) if tied else found

    return guarded


def require_plain(*tensors: Tensor | None) -> None:
    """Raises HBFPError inside the transforms of torch.func, and for tensors with a tangent, as jvp makes them."""
    if is_compiling():
        return
    if _transform() is not None:
        raise HBFPError(
            "fixed-point layers are not defined inside torch.func's transforms (vmap, grad, jvp, jacrev, ...): blocks "
            "and random bits would depend on how it batches. Take gradients by torch.autograd, and give batches as "
            "leading dimensions"
        )
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise HBFPError(
            "fixed-point layers have no forward-mode derivative (jvp, dual tensors): take gradients by backward()"
        )


def keeps_codes(recipe: Recipe, source: object, stream: int) -> bool:
    """Whether a layer keeps of X, for the weight gradient, the codes along the batch that this product is to read.

    An eighth of the floats' memory at 4 bits. The core makes them, and whoever watches an operand wants the floats.
    """
    backends = recipe.backends
    integer = backends.forward is _INTEGER and backends.weight_gradient is _INTEGER
    return integer and not (ops.recorders and ops.observed(source, stream))


def _sum_to(gradient: Tensor, shape: Sequence[int], by: Arithmetic) -> Tensor:
    """`gradient` summed over the dimensions that `shape` was broadcast along, as bias gradients are."""
    if gradient.shape == torch.Size(shape):
        return gradient
    extra = gradient.dim() - len(shape)
    summed = [d for d in range(gradient.dim()) if d < extra or (shape[d - extra] == 1 and gradient.shape[d] != 1)]
    kept = [d for d in range(gradient.dim()) if d not in summed]
    rows, columns = (prod(gradient.shape[d] for d in dims) for dims in (summed, kept))
    return by.column_sums(gradient.permute(summed + kept).reshape(rows, columns)).reshape(shape)


def _by_codes(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, seed: int, stream: int) -> Tensor | None:
    """The forward product with a packed weight, past torch's dispatcher, which takes longer than a small product; None
    where that would be seen, where the weight has floats, and where anything is not as usual."""
    if type(weight) is not PackedWeight or recipe.backends.forward is not _INTEGER or ops.recorders:
        return None
    if not unseen(x, weight, bias):
        return None
    policy = recipe.forward
    return weight.quick_product(x, policy.formats, policy.roundings[0], seed, stream | _X, bias)


class LinearFunction(torch.autograd.Function):
    """Y = X Wᵀ + bias. X [..., in], W [out, in], bias [out] or None; Y [..., out], all float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        seed: int,
        stream: int,
        source: object,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        policy = recipe.forward
        streams = (stream | _X, stream | _W)
        kept = None
        if need_weight and keeps_codes(recipe, source, stream):
            later = recipe.weight_gradient
            keep = (later.formats[1], later.roundings[1], stream | _X_W)
            out, kept = ops.product_keeping(
                x, weight, -1, policy.formats, policy.roundings, seed, streams, bias, keep,
                name="forward", source=source,
            )  # fmt: skip
        elif (quick := _by_codes(x, weight, bias, recipe, seed, stream)) is not None:
            out = quick
        else:
            out = arithmetic(recipe.backends.forward).product(
                x, -1, weight, -1, policy.formats, policy.roundings, seed, streams, bias, name="forward", source=source
            )
        ctx.kept, ctx.columns = kept is not None, x.shape[-1]
        ctx.save_for_backward((x if kept is None else kept) if need_weight else None, weight if need_x else None)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        recipe, seed, stream, source = ctx.recipe, ctx.seed, ctx.stream, ctx.source
        for_dx, for_dw = arithmetic(recipe.backends.input_gradient), arithmetic(recipe.backends.weight_gradient)
        dx = dweight = dbias = None
        if need_x:
            policy = recipe.input_gradient
            dx = for_dx.product(
                dy, -1, weight, -2, policy.formats, policy.roundings, seed, (stream | _DY_X, stream | _W_X),
                name="input gradient", source=source,
            )  # fmt: skip
        rows = dy.flatten(0, -2) if need_weight or need_bias else dy
        if need_weight and ctx.kept:
            policy = recipe.weight_gradient
            if need_bias:
                dbias = torch.empty(rows.shape[1], dtype=torch.float32)
            dweight = ops.kept_product(
                rows, x, ctx.columns, policy.formats, policy.roundings, seed, (stream | _DY_W, stream | _X_W),
                sums=dbias, name="weight gradient", source=source,
            )  # fmt: skip
        elif need_weight:
            policy = recipe.weight_gradient
            dweight = for_dw.product(
                rows, -2, x.flatten(0, -2), -2, policy.formats, policy.roundings, seed,
                (stream | _DY_W, stream | _X_W), name="weight gradient", source=source,
            )  # fmt: skip
        if need_bias and dbias is None:
            dbias = for_dw.column_sums(rows)
        return dx, dweight, dbias, None, None, None, None


class MatmulFunction(torch.autograd.Function):
    """C = A B. A [..., M, K], B [..., K, N] with batch dimensions that broadcast; C [..., M, N] float32.

    Where B is a matrix the batch dimensions of A count as rows, as in a linear layer: the gradient of B is then one
    product, blocked along all of them.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, recipe: Recipe, seed: int, stream: int, source: object) -> Tensor:
        need_a, need_b = ctx.needs_input_grad[:2]
        ctx.shapes = a.shape, b.shape
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        policy = recipe.forward
        streams = (stream | _X, stream | _W)
        kept = None
        if need_b and b.dim() == 2 and keeps_codes(recipe, source, stream):
            later = recipe.weight_gradient
            keep = (later.formats[1], later.roundings[1], stream | _X_W)
            out, kept = ops.product_keeping(
                a, b, -2, policy.formats, policy.roundings, seed, streams, None, keep, name="forward", source=source
            )
        else:
            batch = _batch_of(a, b) if b.dim() > 2 else None
            left, right = (a, b) if batch is None else (_expand(a, batch), _expand(b, batch))
            out = arithmetic(recipe.backends.forward).product(
                left, -1, right, -2, policy.formats, policy.roundings, seed, streams, name="forward", source=source
            )
        ctx.kept = kept is not None
        ctx.save_for_backward((a if kept is None else kept) if need_b else None, b if need_a else None)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        a_shape, b_shape = ctx.shapes
        need_a, need_b = ctx.needs_input_grad[:2]
        recipe, seed, stream, source = ctx.recipe, ctx.seed, ctx.stream, ctx.source
        batch = dc.shape[:-2]
        da = db = None
        if need_a:
            policy, by = recipe.input_gradient, arithmetic(recipe.backends.input_gradient)
            da = by.product(
                dc, -1, _expand(b, batch) if b.dim() > 2 else b, -1, policy.formats, policy.roundings, seed,
                (stream | _DY_X, stream | _W_X),
                name="input gradient", source=source,
            )  # fmt: skip
            da = _sum_to(da, a_shape, by)
        if need_b and ctx.kept:
            policy = recipe.weight_gradient
            db = ops.kept_product(
                dc.flatten(0, -2), a, b_shape[0], policy.formats, policy.roundings, seed,
                (stream | _DY_W, stream | _X_W), name="weight gradient", source=source,
            ).mT  # fmt: skip
        elif need_b:
            if len(b_shape) == 2:
                a, dc = a.flatten(0, -2), dc.flatten(0, -2)
            else:
                a = _expand(a, batch)
            # The recipe speaks of dYᵀ X; this is its transpose, Aᵀ dC.
            policy, by = recipe.weight_gradient, arithmetic(recipe.backends.weight_gradient)
            db = by.product(
                a, -2, dc, -2, policy.formats[::-1], policy.roundings[::-1], seed, (stream | _X_W, stream | _DY_W),
                name="weight gradient", source=source,
            )  # fmt: skip
            db = _sum_to(db, b_shape, by)
        return da, db, None, None, None, None


class AttentionFunction(torch.autograd.Function):
    """O = dropout(softmax(scale Q Kᵀ + mask)) V: two integer products around a float32 softmax.

    Shapes: Q [..., L, E], K [..., S, E], V [..., S, Ev] with batch dimensions that broadcast; mask, float32, broadcasts
    to [..., L, S], as a boolean one does; O [..., L, Ev] float32. This is the definition, with the L x S matrix in
    memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        dropped: int,
        word: Tensor | None,
        recipe: Recipe,
        seed: int,
        stream: int,
        source: object,
    ) -> Tensor:
        policy = recipe.forward
        by = arithmetic(recipe.backends.forward)
        batch = _batch_of(q, k, v)
        scores = by.product(
            _expand(q, batch), -1, _expand(k, batch), -1, policy.formats, policy.roundings, seed,
            (stream | _Q, stream | _K),
            name="scores", source=source,
        )  # fmt: skip
        wide_mask = None if mask is None else _additive(mask).expand(scores.shape)
        p = by.softmax(scores, scale, causal, wide_mask, reuse=True)
        kept = p if word is None else by.dropout(p, dropped, word)
        out = by.product(
            kept, -1, _expand(v, batch), -2, policy.formats, policy.roundings, seed, (stream | _P, stream | _V),
            name="context", source=source,
        )  # fmt: skip
        need_q, need_k, need_v, need_mask = ctx.needs_input_grad[:4]
        need_scores = need_q or need_k or need_mask
        ctx.save_for_backward(
            q if need_k else None,
            k if need_q else None,
            v if need_scores else None,
            p if need_scores or need_v else None,
            word,
        )
        ctx.shapes = q.shape, k.shape, v.shape, None if mask is None else mask.shape
        ctx.scale, ctx.dropped = scale, dropped
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        return out

    @staticmethod
    @once
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, word = ctx.saved_tensors
        q_shape, k_shape, v_shape, mask_shape = ctx.shapes
        batch = do.shape[:-2]
        need_q, need_k, need_v, need_mask = ctx.needs_input_grad[:4]
        scale, dropped = ctx.scale, ctx.dropped
        recipe, seed, stream, source = ctx.recipe, ctx.seed, ctx.stream, ctx.source
        by, by_right = arithmetic(recipe.backends.input_gradient), arithmetic(recipe.backends.weight_gradient)
        towards_input, towards_right = recipe.input_gradient, recipe.weight_gradient
        dq = dk = dv = dmask = None
        if need_v:
            kept = p if word is None else by_right.dropout(p, dropped, word)
            dv = by_right.product(
                kept, -2, do, -2, towards_right.formats[::-1], towards_right.roundings[::-1], seed,
                (stream | _P_V, stream | _DO_V), name="gradient of V", source=source,
            )  # fmt: skip
            dv = _sum_to(dv, v_shape, by_right)
        if need_q or need_k or need_mask:
            dp = by.product(
                do, -1, _expand(v, batch), -1, towards_input.formats, towards_input.roundings, seed, (stream | _DO_P,
                stream | _QKV), name="gradient of P", source=source,
            )  # fmt: skip
            if word is not None:
                dp = by.dropout(dp, dropped, word)
            if need_mask:
                dmask = _sum_to(by.softmax_backward(p, dp, 1.0), mask_shape, by)
            if need_q or need_k:
                ds = by.softmax_backward(p, dp, scale, reuse=True)
            if need_q:
                dq = by.product(
                    ds, -1, _expand(k, batch), -2, towards_input.formats, towards_input.roundings, seed,
                    (stream | _DS_Q, stream | _QKV), name="gradient of Q", source=source,
                )  # fmt: skip
                dq = _sum_to(dq, q_shape, by)
            if need_k:
                dk = by_right.product(
                    ds, -2, _expand(q, batch), -2, towards_right.formats, towards_right.roundings, seed,
                    (stream | _DS_K, stream | _QKV), name="gradient of K", source=source,
                )  # fmt: skip
                dk = _sum_to(dk, k_shape, by_right)
        return dq, dk, dv, dmask, None, None, None, None, None, None, None, None


class FusedAttentionFunction(torch.autograd.Function):
    """The same bits without the L x S matrix: what is saved is Q, K, V, the mask and the seed of dropout, and backward
    computes P again.

    For the integer backend and formats of at most 8 bits in lines; a mask with a gradient has a value for each column
    (see `_fuses`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        dropped: int,
        word: Tensor | None,
        recipe: Recipe,
        seed: int,
        stream: int,
        source: object,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask, word)
        ctx.causal, ctx.scale, ctx.dropped = causal, scale, dropped
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        policy = recipe.forward
        call = _call(q, k, v, mask, causal, scale, seed, dropped, word)
        streams = stream | _Q, stream | _K, stream | _P, stream | _V
        return ops.attention(call, policy.formats, policy.roundings, streams, source=source)

    @staticmethod
    @once
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, word = ctx.saved_tensors
        recipe, stream = ctx.recipe, ctx.stream
        policies = recipe.forward, recipe.input_gradient, recipe.weight_gradient
        (f0, f1, f2), (r0, r1, r2) = [p.formats for p in policies], [p.roundings for p in policies]
        need_q, need_k, need_v, need_mask = ctx.needs_input_grad[:4]
        call = _call(q, k, v, mask, ctx.causal, ctx.scale, ctx.seed, ctx.dropped, word)
        dq = dk = dv = dmask = None
        if need_q or need_k or need_v:
            roles = _Q, _K, _DO_P, _QKV, _DS_Q, _QKV, _DS_K, _QKV, _P_V, _DO_V
            streams, needs = [stream | role for role in roles], (need_q, need_k, need_v)
            gradients = ops.attention_backward(do, call, (f0, f1, f2), (r0, r1, r2), streams, needs, source=ctx.source)
            dq, dk, dv = (
                None if gradient is None else _sum_to(gradient, x.shape, ops)
                for gradient, x in zip(gradients, (q, k, v), strict=True)
            )
        if need_mask:
            streams, alone = [stream | role for role in (_Q, _K, _DO_P, _QKV)], not (need_q or need_k)
            dmask = ops.attention_mask_gradient(
                do, call, mask.shape, (f0, f1), (r0, r1), streams, alone=alone, source=ctx.source
            )
        return dq, dk, dv, dmask, None, None, None, None, None, None, None, None


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *settings: Any) -> ops.AttentionCall:
    """With all batch dimensions, and the mask as float32 that is added to the scores; no copies of any."""
    batch = _batch_of(q, k, v)
    if mask is not None:
        mask = _additive(mask).expand(*batch, q.shape[-2], k.shape[-2])
    return ops.AttentionCall(_expand(q, batch), _expand(k, batch), _expand(v, batch), mask, *settings)


def _fuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, recipe: Recipe) -> bool:
    """Whether the core computes this attention without its matrices."""
    return (
        all(backend is _INTEGER for backend in recipe.backends)
        # The sum over all columns of such a gradient, which is 0 but for roundings, is not worth a kernel.
        and not (
            mask is not None
            and mask.requires_grad
            and is_grad_enabled()
            and (mask.dim() == 0 or mask.shape[-1] != k.shape[-2])
        )
        and all(
            format.core.encodes_to_panels
            for policy in (recipe.forward, recipe.input_gradient, recipe.weight_gradient)
            for format in policy.formats
        )
        and min(*q.shape[-2:], *k.shape[-2:], v.shape[-1]) > 0
    )


def drawn_dropout(p: float, like: Tensor) -> tuple[int, Tensor | None]:
    """How many of 2^16 elements a share `p` drops, and the seed that says which, drawn from torch's generator (6.25).

    Args:
        like: of the call that drops.
    """
    if not 0.0 <= p <= 1.0:
        raise HBFPError(f"dropout is a probability; found {p}")
    dropped = round(p * 2**16)
    return dropped, ops.random_word(like) if dropped else None


def _expand(x: Tensor, batch: torch.Size) -> Tensor:
    """`x` with the batch dimensions given; no copy."""
    return x if x.shape[:-2] == batch else x.expand(*batch, *x.shape[-2:])


def _batch_of(*tensors: Tensor) -> torch.Size:
    first, *others = (x.shape[:-2] for x in tensors)
    # Mostly they are equal, and torch takes as long for its answer as a batch of small products.
    if all(batch == first for batch in others):
        return first
    try:
        return torch.Size(torch.broadcast_shapes(*(x.shape[:-2] for x in tensors)))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ShapeError(f"batch dimensions do not broadcast: {shapes}") from None


def _distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, no two the same object where torch.compile traces: it cannot when a function is given one twice."""
    if not is_compiling():
        return tensors
    seen: list[Tensor] = []
    for x in tensors:
        seen.append(x.view_as(x) if any(x is other for other in seen) else x)
    return tuple(seen)


def unseen(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a node of autograd would be seen by nobody: no gradient is asked for, nothing traces or transforms."""
    return not (
        is_dynamo_compiling()  # other tracers set a mode of dispatch, which every short way asks for
        or (
            is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
        or forward_ad._current_level >= 0
        or _transform() is not None
        or _tracer() is not None
    )


# --- the same as plain functions, with the checks that autograd's interface has no room for --------------------------


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, seed: int, stream: int, source: object = None
) -> Tensor:
    """x [..., in] times weightᵀ [out, in], plus bias [out]; see `hbfp.nn.functional.linear`."""
    if recipe.backends.forward is _INTEGER and not ops.recorders and unseen(x, weight, bias):
        policy = recipe.forward
        quick = None
        if type(weight) is PackedWeight:
            quick = weight.quick_product(x, policy.formats, policy.roundings[0], seed, stream | _X, bias)
        elif weight.dim() == 2 and x.dim() > 1:
            quick = ops.quick_product(
                x, -1, weight, -1, policy.formats, policy.roundings, seed, (stream | _X, stream | _W), bias
            )
        if quick is not None:
            return quick
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear takes x [..., in] and weight [out, in]; found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    ops.require_real(x, weight, bias)
    require_plain(x, weight, bias)
    if x.dim() == 1:
        row: Tensor = LinearFunction.apply(x.unsqueeze(0), weight, bias, recipe, seed, stream, source)
        return row.squeeze(0)
    out: Tensor = LinearFunction.apply(x, weight, bias, recipe, seed, stream, source)
    return out


def matmul(a: Tensor, b: Tensor, recipe: Recipe, seed: int, stream: int, source: object = None) -> Tensor:
    """a [..., M, K] times b [..., K, N]; see `hbfp.nn.functional.matmul`."""
    if recipe.backends.forward is _INTEGER and not ops.recorders and a.dim() > 1 < b.dim() and unseen(a, b, None):
        policy = recipe.forward
        quick = ops.quick_product(
            a, -1, b, -2, policy.formats, policy.roundings, seed, (stream | _X, stream | _W), None
        )
        if quick is not None:
            return quick
    ops.require_real(a, b)
    require_plain(a, b)
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise ShapeError(f"matmul takes [..., M, K] and [..., K, N]; found {tuple(a.shape)} and {tuple(b.shape)}")
    if b.dim() > 2:
        _batch_of(a, b)
    a, b = _distinct(a, b)
    out: Tensor = MatmulFunction.apply(a, b, recipe, seed, stream, source)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    recipe: Recipe,
    seed: int,
    stream: int,
    source: object = None,
    *,
    enable_gqa: bool = False,
) -> Tensor:
    """See `hbfp.nn.functional.scaled_dot_product_attention`."""
    if causal and mask is not None:
        raise HBFPError("give a mask or ask for a causal one, not both: the causal one can be made part of the mask")
    ops.require_real(q, k, v)
    require_plain(q, k, v)
    if min(q.dim(), k.dim(), v.dim()) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ShapeError(
            "attention takes q [..., L, E], k [..., S, E] and v [..., S, Ev]; found "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if enable_gqa:
        q, k, v = _grouped(q, k, v)
    if mask is not None:
        if mask.dtype is not torch.bool:
            ops.require_real(mask)
        scores = [*_batch_of(q, k, v), q.shape[-2], k.shape[-2]]
        # Two dimensions of the batch stand for the heads where they are grouped.
        ungrouped = [*scores[:-4], scores[-4] * scores[-3], *scores[-2:]] if enable_gqa else scores
        if not _broadcasts(mask.shape, ungrouped):
            raise ShapeError(f"the mask must broadcast to the scores, {tuple(ungrouped)}; found {tuple(mask.shape)}")
        if enable_gqa and mask.dim() > 2:
            mask = mask.unflatten(-3, (1, 1) if mask.shape[-3] == 1 else scores[-4:-2])
    if scale is None:
        scale = 1.0 / sqrt(max(q.shape[-1], 1))
    dropped, word = drawn_dropout(dropout, q)
    q, k, v = _distinct(q, k, v)
    fused = _fuses(q, k, v, mask, recipe) and not (ops.recorders and ops.observed(source, stream))
    function = FusedAttentionFunction if fused else AttentionFunction
    out: Tensor = function.apply(q, k, v, mask, causal, scale, dropped, word, recipe, seed, stream, source)
    return out.flatten(-4, -3) if enable_gqa else out


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as groups of query heads that share a head of keys and values: views that broadcast."""
    if min(q.dim(), k.dim(), v.dim()) < 3 or k.shape[-3] != v.shape[-3] or q.shape[-3] % max(k.shape[-3], 1):
        raise ShapeError(
            "grouped queries take q [..., H, L, E], k [..., G, S, E] and v [..., G, S, Ev], H a multiple of G; found "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    groups = k.shape[-3]
    return q.unflatten(-3, (groups, q.shape[-3] // max(groups, 1))), k.unsqueeze(-3), v.unsqueeze(-3)


def _additive(mask: Tensor) -> Tensor:
    """A mask as float32 that is added to the scores; booleans say which elements take part."""
    if mask.dtype is torch.bool:
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return zeros.masked_fill_(~mask, float("-inf"))
    ops.require_real(mask)
    return mask.to(torch.float32)


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))
