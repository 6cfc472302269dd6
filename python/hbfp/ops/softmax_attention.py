"""Scaled dot product attention: the fused products, and the softmax between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hbfp import _core
from hbfp.errors import DTypeError
from hbfp.ops.entrance import (
    LIBRARY,
    WORD,
    Formats,
    Operand,
    Product,
    Roundings,
    codings,
    crossed,
    crossing,
    direct,
    float32,
    format_of,
    operator,
    pairs,
    recorders,
    signed,
    tell,
    threads,
)


def softmax(
    scores: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None, *, reuse: bool = False
) -> Tensor:
    """Row softmax of scale * scores (+ mask) over the last dimension, by the library's own exponential.

    Args:
        scores: [..., rows, columns].
        causal: element (i, j) is masked where j > i, whatever the numbers of rows and columns.
        mask: float32 of the shape of `scores` (strides of 0 are fine), added after scaling; a row that is masked
            everywhere gives 0.
        reuse: the caller has no more use of `scores`, whose memory may then hold the result.
    """
    if direct(scores) and (mask is None or direct(mask)):
        return _run_softmax(scores, scale, causal, mask, reuse)
    out: Tensor = torch.ops.hbfp.softmax(scores, scale, causal, mask)
    return out


def _run_softmax(scores: Tensor, scale: float, causal: bool, mask: Tensor | None, reuse: bool) -> Tensor:
    scores = float32(scores).contiguous()
    out = scores if reuse else torch.empty(scores.shape, dtype=torch.float32, device="cpu")
    mask = None if mask is None else float32(mask).contiguous()
    _core.softmax(scores, out, scale, causal, mask, threads())
    return out


def softmax_backward(p: Tensor, dp: Tensor, scale: float, *, reuse: bool = False) -> Tensor:
    """Gradient of `softmax` for its scores: scale * p * (dp - rowsum(p * dp)).

    Args:
        p, dp: [..., rows, columns], the softmax and the gradient that reaches it.
        reuse: the caller has no more use of `dp`, whose memory may then hold the result.
    """
    if direct(p, dp):
        return _run_softmax_backward(p, dp, scale, reuse)
    out: Tensor = torch.ops.hbfp.softmax_backward(p, dp, scale)
    return out


def _run_softmax_backward(p: Tensor, dp: Tensor, scale: float, reuse: bool) -> Tensor:
    p, dp = float32(p).contiguous(), float32(dp).contiguous()
    out = dp if reuse else torch.empty(dp.shape, dtype=torch.float32, device="cpu")
    _core.softmax_backward(p, dp, out, scale, threads())
    return out


def random_word(like: Tensor) -> Tensor:
    """63 bits from torch's generator of the CPU, as an int64 without dimensions: the seed of one call's dropout.

    Args:
        like: tells torch that there is something to do; not read.
    """
    out: Tensor = torch.ops.hbfp.random_word(like)
    return out


def dropout(x: Tensor, dropped: int, word: Tensor) -> Tensor:
    """`x` with `dropped` of 2^16 elements set to 0, and the others times 2^16 / (2^16 - dropped) (spec 6.25).

    Args:
        x: [..., rows, columns].
        word: of `random_word`; the same word drops the same elements.
    """
    if direct(x) and direct(word):
        return _run_dropout(x, dropped, word)
    out: Tensor = torch.ops.hbfp.dropout(x, dropped, word)
    return out


def _run_dropout(x: Tensor, dropped: int, word: Tensor) -> Tensor:
    x = float32(x).contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _core.dropout(x, out, dropped, int(word), threads())
    return out


GrownAttention = _core.GrownAttention


def grown_attention(formats: Formats, roundings: Roundings) -> GrownAttention:
    """Attention over a text that grows, for `attend`: no tokens yet.

    Args:
        formats, roundings: of Q and K, and of P and V; lines of at most 8 bits, rounded deterministically.
    """
    coding = codings(formats, roundings, (0, 0))
    return _core.GrownAttention(coding, coding)


def attend(grown: GrownAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the next tokens to all so far, whose keys and values are kept as codes; told to no recorder.

    Shapes:
        q, k: [..., tokens, E]; v: [..., tokens, Ev], with the same batch dimensions at each call; [..., tokens, Ev].

    Raises:
        ShapeError: the shapes do not fit.
    """
    scale = 1 / sqrt(max(q.shape[-1], 1))
    out: Tensor | None = grown.attend(q, k, v, scale, threads())
    if out is None:
        queries, keys, values = (float32(x.detach()).contiguous() for x in (q, k, v))
        out = grown.attend(queries, keys, values, scale, threads())
    if out is None:
        raise DTypeError(f"expected dense tensors on the CPU; found {type(q).__name__} on {q.device}")
    return out


class AttentionCall(NamedTuple):
    """softmax(scale Q Kᵀ + mask) V: what the passes of one call of attention share.

    Shapes:
        q: [..., L, E]; k: [..., S, E]; v: [..., S, Ev]; mask: float32 [..., L, S], added to the scaled scores. All with
            the same batch dimensions, and strides of 0 where something is shared; L, S, E and Ev are not 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    """Row i sees columns 0 … i; not where the mask has a gradient."""
    scale: float
    seed: int
    dropped: int = 0
    """As for `dropout`, which is applied to the softmax."""
    word: Tensor | None = None
    """As for `dropout`; None: nothing is dropped."""

    def direct(self, *others: Tensor) -> bool:
        """Whether `_core` may be called with all its tensors, and others."""
        return direct(self.q, self.k, self.v, *others) and (self.mask is None or direct(self.mask))

    def core(self, formats: Formats, roundings: Roundings, streams: Sequence[int]) -> _core._AttentionCall:
        """As the core takes it; the arguments are those of Q and K."""
        q, k, v = float32(self.q), float32(self.k), float32(self.v)
        mask = None if self.mask is None else float32(self.mask)
        dropout = None if self.word is None else (self.dropped, int(self.word))
        return q, k, v, mask, self.causal, self.scale, dropout, codings(formats, roundings, streams), self.seed


def _record_attention(
    call: AttentionCall,
    depth: int,
    formats: Formats,
    roundings: Roundings,
    streams: Sequence[int],
    name: str,
    source: object,
) -> None:
    """Tells of one product of attention, whose multiply-accumulates are those of all rows with all columns."""

    def operands() -> tuple[Operand, ...]:
        return tuple(Operand(None, formats[i], -1, roundings[i], call.seed, streams[i]) for i in (0, 1))

    macs = prod(call.q.shape[:-1]) * call.k.shape[-2] * depth
    tell(Product(name, source, macs, formats[0], formats[1], streams[0], operands))


def attention(
    call: AttentionCall, formats: Formats, roundings: Roundings, streams: Sequence[int], *, source: object = None
) -> Tensor:
    """Attention without the L x S matrix in memory: [..., L, Ev], contiguous, the bits of two `product`s and `softmax`.

    Args:
        formats, roundings: of Q and P on the left, of K and V on the right; lines of at most 8 bits.
        streams: of Q, K, P and V.
        source: told to the recorders, no part of the result.

    Raises:
        ShapeError: the shapes do not fit; FormatError: the formats are others;
        DTypeError: a tensor is not real, dense and on the CPU.
    """
    if call.direct():
        out = _run_attention(call, formats, roundings, streams)
    else:
        numbers, drawn = crossing(streams)
        out = torch.ops.hbfp.attention(
            call.q, call.k, call.v, call.mask, call.causal, call.scale, [str(format) for format in formats],
            list(roundings), numbers, signed(call.seed), drawn, call.dropped, call.word,
        )  # fmt: skip
    if recorders and not is_compiling():
        _record_attention(call, call.q.shape[-1], formats, roundings, streams[:2], "scores", source)
        _record_attention(call, call.v.shape[-1], formats, roundings, streams[2:], "context", source)
    return out


def _run_attention(call: AttentionCall, formats: Formats, roundings: Roundings, streams: Sequence[int]) -> Tensor:
    out = torch.empty((*call.q.shape[:-1], call.v.shape[-1]), dtype=torch.float32, device="cpu")
    context = codings(formats, roundings, streams[2:])
    _core.attention(call.core(formats, roundings, streams[:2]), context, out, threads())
    return out


def attention_backward(
    do: Tensor,
    call: AttentionCall,
    formats: tuple[Formats, Formats, Formats],
    roundings: tuple[Roundings, Roundings, Roundings],
    streams: Sequence[int],
    needs: tuple[bool, bool, bool],
    *,
    source: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, as far as `needs` says so, from that of the output; nothing but the inputs is kept.

    Shapes:
        do: [..., L, Ev]; results: the shapes of q, k and v, one matrix for each of the batch.

    Args:
        formats, roundings: of the forward products; of dP = dO Vᵀ and dQ = dS K; of dK = dSᵀ Q and of dV = (dOᵀ P)ᵀ.
        streams: of Q, K (scores); dO, V (dP); dS, K (dQ); dS, Q (dK); P, dO (dV).

    Raises: as `attention`.
    """
    if call.direct(do):
        out = _run_attention_backward(do, call, formats, roundings, streams, needs)
    else:
        numbers, drawn = crossing(streams)
        found = torch.ops.hbfp.attention_backward(
            do, call.q, call.k, call.v, call.mask, call.causal, call.scale,
            [str(format) for pair in formats for format in pair], [rounding for pair in roundings for rounding in pair],
            numbers, signed(call.seed), list(needs), drawn, call.dropped, call.word,
        )  # fmt: skip
        dq, dk, dv = (x if needed else None for x, needed in zip(found, needs, strict=True))
        out = dq, dk, dv
    if recorders and not is_compiling():
        (_, toward, right), (_, toward_roundings, right_roundings) = formats, roundings
        for name, needed, x, pair, rounded, first in (
            ("gradient of V", needs[2], call.v, (right[1], right[0]), (right_roundings[1], right_roundings[0]), 8),
            ("gradient of P", needs[0] or needs[1], call.v, toward, toward_roundings, 2),
            ("gradient of Q", needs[0], call.q, toward, toward_roundings, 4),
            ("gradient of K", needs[1], call.q, right, right_roundings, 6),
        ):
            if needed:
                _record_attention(call, x.shape[-1], pair, rounded, streams[first : first + 2], name, source)
    return out


def _run_attention_backward(
    do: Tensor,
    call: AttentionCall,
    formats: tuple[Formats, Formats, Formats],
    roundings: tuple[Roundings, Roundings, Roundings],
    streams: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dq, dk, dv = (
        torch.empty(x.shape, dtype=torch.float32, device="cpu") if needed else None
        for x, needed in zip((call.q, call.k, call.v), needs, strict=True)
    )
    chosen = [(formats[i], roundings[i]) for i in (1, 1, 2)] + [(formats[2][::-1], roundings[2][::-1])]
    weights, queries, keys, values = (
        codings(*pair, streams[2 * i : 2 * i + 2]) for i, pair in enumerate(chosen, start=1)
    )
    scores = call.core(formats[0], roundings[0], streams[:2])
    _core.attention_backward(scores, float32(do), (weights, queries, keys, values), (dq, dk, dv), threads())
    return dq, dk, dv


def attention_mask_gradient(
    do: Tensor,
    call: AttentionCall,
    shape: Sequence[int],
    formats: tuple[Formats, Formats],
    roundings: tuple[Roundings, Roundings],
    streams: Sequence[int],
    *,
    alone: bool = False,
    source: object = None,
) -> Tensor:
    """Gradient of a mask of `shape` that was broadcast to that of the call, without anything of the size of the scores.

    The bits of `softmax_backward` with scale 1, summed as by `column_sums` over all that one element was added to.

    Shapes:
        do: [..., L, Ev]; shape: broadcasts to that of the call's mask, and its last dimension is S.

    Args:
        formats, roundings: of the forward products; of dP = dO Vᵀ.
        streams: of Q, K (scores); dO, V (dP).
        alone: no other gradient has need of dP, so that the recorders have not been told of its product yet.

    Raises: as `attention`.
    """
    if call.direct(do):
        out = _run_mask_gradient(do, call, shape, formats, roundings, streams)
    else:
        numbers, drawn = crossing(streams)
        out = torch.ops.hbfp.attention_mask_gradient(
            do, call.q, call.k, call.v, call.mask, list(shape), call.scale,
            [str(format) for pair in formats for format in pair], [rounding for pair in roundings for rounding in pair],
            numbers, signed(call.seed), drawn, call.dropped, call.word,
        )  # fmt: skip
    if alone and recorders and not is_compiling():
        depth = call.v.shape[-1]
        _record_attention(call, depth, formats[1], roundings[1], streams[2:], "gradient of P", source)
    return out


def _run_mask_gradient(
    do: Tensor,
    call: AttentionCall,
    shape: Sequence[int],
    formats: tuple[Formats, Formats],
    roundings: tuple[Roundings, Roundings],
    streams: Sequence[int],
) -> Tensor:
    assert call.mask is not None
    wide = call.mask.shape
    out = torch.empty([1] * (len(wide) - len(shape)) + list(shape), dtype=torch.float32, device="cpu")
    weights = codings(formats[1], roundings[1], streams[2:])
    scores = call.core(formats[0], roundings[0], streams[:2])
    _core.attention_mask_gradient(scores, float32(do), weights, out, list(shape) != list(wide), threads())
    return out.view(list(shape))


# --- behind torch's dispatcher ---------------------------------------------------------------------------------------


@operator("softmax(Tensor scores, float scale, bool causal, Tensor? mask) -> Tensor")
def _softmax_kernel(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    return _run_softmax(scores, scale, causal, mask, False)


@operator("softmax_backward(Tensor p, Tensor dp, float scale) -> Tensor")
def _softmax_backward_kernel(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    return _run_softmax_backward(p, dp, scale, False)


@operator("dropout(Tensor x, int dropped, Tensor word) -> Tensor")
def _dropout_kernel(x: Tensor, dropped: int, word: Tensor) -> Tensor:
    return _run_dropout(x, dropped, word)


# Random, so that no compiler computes it again or once for two; of the CPU's generator on every device.
LIBRARY.define("random_word(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _random_word_kernel(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


LIBRARY.impl("random_word", _random_word_kernel, "CompositeExplicitAutograd")


@operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, str[] formats, int[] roundings, "
    "SymInt[] streams, SymInt seed, Tensor[]? drawn=None, int dropped=0, Tensor? word=None) -> Tensor"
)
def _attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    formats: list[str],
    roundings: list[int],
    streams: list[int],
    seed: int,
    drawn: list[Tensor] | None = None,
    dropped: int = 0,
    word: Tensor | None = None,
) -> Tensor:
    call = AttentionCall(q, k, v, mask, causal, scale, seed & WORD, dropped, word)
    return _run_attention(call, pairs(map(format_of, formats))[0], pairs(roundings)[0], crossed(streams, drawn))


@operator(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "str[] formats, int[] roundings, SymInt[] streams, SymInt seed, bool[] needs, Tensor[]? drawn=None, "
    "int dropped=0, Tensor? word=None) -> (Tensor, Tensor, Tensor)"
)
def _attention_backward_kernel(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    formats: list[str],
    roundings: list[int],
    streams: list[int],
    seed: int,
    needs: list[bool],
    drawn: list[Tensor] | None = None,
    dropped: int = 0,
    word: Tensor | None = None,
) -> tuple[Tensor, ...]:
    call = AttentionCall(q, k, v, mask, causal, scale, seed & WORD, dropped, word)
    gradients = _run_attention_backward(
        do,
        call,
        pairs(map(format_of, formats)),
        pairs(roundings),
        crossed(streams, drawn),
        (needs[0], needs[1], needs[2]),
    )
    # A schema has no optional results.
    return tuple(torch.empty(0) if x is None else x for x in gradients)


@operator(
    "attention_mask_gradient(Tensor do, Tensor q, Tensor k, Tensor v, Tensor mask, SymInt[] shape, float scale, "
    "str[] formats, int[] roundings, SymInt[] streams, SymInt seed, Tensor[]? drawn=None, int dropped=0, "
    "Tensor? word=None) -> Tensor"
)
def _mask_gradient_kernel(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    shape: list[int],
    scale: float,
    formats: list[str],
    roundings: list[int],
    streams: list[int],
    seed: int,
    drawn: list[Tensor] | None = None,
    dropped: int = 0,
    word: Tensor | None = None,
) -> Tensor:
    call = AttentionCall(q, k, v, mask, False, scale, seed & WORD, dropped, word)
    return _run_mask_gradient(
        do, call, shape, pairs(map(format_of, formats)), pairs(roundings), crossed(streams, drawn)
    )


@torch.library.register_fake("hbfp::softmax", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _softmax_fake(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::softmax_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _softmax_backward_fake(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    return dp.new_empty(dp.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::dropout", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _dropout_fake(x: Tensor, dropped: int, word: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::random_word", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _random_word_fake(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("hbfp::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)


@torch.library.register_fake("hbfp::attention_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[7]
    return tuple(
        x.new_empty(x.shape if needed else 0, dtype=torch.float32) for x, needed in zip((q, k, v), needs, strict=True)
    )


@torch.library.register_fake("hbfp::attention_mask_gradient", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _mask_gradient_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, shape: Any, *_: Any) -> Tensor:
    return mask.new_empty(shape, dtype=torch.float32)
