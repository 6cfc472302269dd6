"""Scaled dot product attention: the fused products, and the softmax between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

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


def _drawn_dropout(dropped: int, word: Tensor | None) -> tuple[int, int] | None:
    """As the core takes it."""
    return None if word is None else (dropped, int(word))


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


def _record_attention(
    q: Tensor,
    k: Tensor,
    depth: int,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: Sequence[int],
    name: str,
    source: object,
) -> None:
    """Tells of one product of attention, whose multiply-accumulates are those of all rows with all columns."""

    def operands() -> tuple[Operand, ...]:
        return tuple(Operand(None, formats[i], -1, roundings[i], seed, streams[i]) for i in (0, 1))

    macs = prod(q.shape[:-1]) * k.shape[-2] * depth
    tell(Product(name, source, macs, formats[0], formats[1], streams[0], operands))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: Sequence[int],
    dropped: int = 0,
    word: Tensor | None = None,
    *,
    source: object = None,
) -> Tensor:
    """softmax(scale Q Kᵀ + mask) V without the L x S matrix in memory: the bits of two `product`s and `softmax`.

    Shapes:
        q: [..., L, E]; k: [..., S, E]; v: [..., S, Ev]; mask: float32 [..., L, S], added to the scaled scores. All with
            the same batch dimensions, and strides of 0 where something is shared; L, S, E and Ev are not 0.
        result: [..., L, Ev], float32, contiguous.

    Args:
        causal: row i sees columns 0 … i.
        formats, roundings: of Q and P on the left, of K and V on the right; lines of at most 8 bits.
        seed, streams: of Q, K, P and V.
        dropped, word: as for `dropout`, which is applied to the softmax; no word: nothing is dropped.
        source: told to the recorders, no part of the result.

    Raises:
        ShapeError: the shapes do not fit; FormatError: the formats are others;
        DTypeError: a tensor is not real, dense and on the CPU.
    """
    if direct(q, k, v) and (mask is None or direct(mask)):
        out = _run_attention(q, k, v, mask, causal, scale, formats, roundings, seed, streams, dropped, word)
    else:
        numbers, drawn = crossing(streams)
        out = torch.ops.hbfp.attention(
            q, k, v, mask, causal, scale, [str(format) for format in formats], list(roundings), numbers, signed(seed),
            drawn, dropped, word,
        )  # fmt: skip
    if recorders and not is_compiling():
        _record_attention(q, k, q.shape[-1], formats, roundings, seed, streams[:2], "scores", source)
        _record_attention(q, k, v.shape[-1], formats, roundings, seed, streams[2:], "context", source)
    return out


def _run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: Sequence[int],
    dropped: int,
    word: Tensor | None,
) -> Tensor:
    q, k, v = float32(q), float32(k), float32(v)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32, device="cpu")
    scores, context = (codings(formats, roundings, streams[i : i + 2]) for i in (0, 2))
    _core.attention(
        q,
        k,
        v,
        None if mask is None else float32(mask),
        out,
        causal,
        scale,
        _drawn_dropout(dropped, word),
        scores,
        context,
        seed,
        threads(),
    )
    return out


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    formats: tuple[Formats, Formats, Formats],
    roundings: tuple[Roundings, Roundings, Roundings],
    seed: int,
    streams: Sequence[int],
    needs: tuple[bool, bool, bool],
    dropped: int = 0,
    word: Tensor | None = None,
    *,
    source: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, as far as `needs` says so, from that of the output; nothing but the inputs is kept.

    Shapes: as for `attention`; do: [..., L, Ev]; results: the shapes of q, k and v, one matrix for each of the batch.

    Args:
        formats, roundings: of the forward products; of dP = dO Vᵀ and dQ = dS K; of dK = dSᵀ Q and of dV = (dOᵀ P)ᵀ.
        seed, streams: of Q, K (scores); dO, V (dP); dS, K (dQ); dS, Q (dK); P, dO (dV).
        dropped, word: those of the forward pass.

    Raises: as `attention`.
    """
    if direct(do, q, k, v) and (mask is None or direct(mask)):
        out = _run_attention_backward(
            do, q, k, v, mask, causal, scale, formats, roundings, seed, streams, needs, dropped, word
        )
    else:
        numbers, drawn = crossing(streams)
        found = torch.ops.hbfp.attention_backward(
            do, q, k, v, mask, causal, scale, [str(format) for pair in formats for format in pair],
            [rounding for pair in roundings for rounding in pair], numbers, signed(seed), list(needs), drawn,
            dropped, word,
        )  # fmt: skip
        dq, dk, dv = (x if needed else None for x, needed in zip(found, needs, strict=True))
        out = dq, dk, dv
    if recorders and not is_compiling():
        (_, toward, right), (_, toward_roundings, right_roundings) = formats, roundings
        for name, needed, x, pair, rounded, first in (
            ("gradient of V", needs[2], v, (right[1], right[0]), (right_roundings[1], right_roundings[0]), 8),
            ("gradient of P", needs[0] or needs[1], v, toward, toward_roundings, 2),
            ("gradient of Q", needs[0], q, toward, toward_roundings, 4),
            ("gradient of K", needs[1], q, right, right_roundings, 6),
        ):
            if needed:
                pick = streams[first : first + 2]
                _record_attention(q, k, x.shape[-1], pair, rounded, seed, pick, name, source)
    return out


def _run_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    formats: tuple[Formats, Formats, Formats],
    roundings: tuple[Roundings, Roundings, Roundings],
    seed: int,
    streams: Sequence[int],
    needs: tuple[bool, bool, bool],
    dropped: int,
    word: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    do, q, k, v = float32(do), float32(q), float32(k), float32(v)
    dq, dk, dv = (
        torch.empty(x.shape, dtype=torch.float32, device="cpu") if needed else None
        for x, needed in zip((q, k, v), needs, strict=True)
    )
    chosen = [(formats[i], roundings[i]) for i in (0, 1, 1, 2)] + [(formats[2][::-1], roundings[2][::-1])]
    scores, weights, queries, keys, values = (
        codings(*pair, streams[2 * i : 2 * i + 2]) for i, pair in enumerate(chosen)
    )
    _core.attention_backward(
        do, q, k, v, None if mask is None else float32(mask), dq, dk, dv, causal, scale, _drawn_dropout(dropped, word),
        scores, weights, queries, keys, values, seed, threads(),
    )  # fmt: skip
    return dq, dk, dv


def attention_mask_gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    shape: Sequence[int],
    scale: float,
    formats: tuple[Formats, Formats],
    roundings: tuple[Roundings, Roundings],
    seed: int,
    streams: Sequence[int],
    dropped: int = 0,
    word: Tensor | None = None,
    *,
    alone: bool = False,
    source: object = None,
) -> Tensor:
    """Gradient of a mask of `shape` that was broadcast to `mask`, without anything of the size of the scores.

    The bits of `softmax_backward` with scale 1, summed as by `column_sums` over all that one element was added to.

    Shapes: as for `attention`; do: [..., L, Ev]; shape: broadcasts to that of `mask`, and its last dimension is S.

    Args:
        formats, roundings: of the forward products; of dP = dO Vᵀ.
        seed, streams: of Q, K (scores); dO, V (dP).
        dropped, word: those of the forward pass.
        alone: no other gradient has need of dP, so that the recorders have not been told of its product yet.

    Raises: as `attention`.
    """
    if direct(do, q, k, v, mask):
        out = _run_mask_gradient(do, q, k, v, mask, shape, scale, formats, roundings, seed, streams, dropped, word)
    else:
        numbers, drawn = crossing(streams)
        out = torch.ops.hbfp.attention_mask_gradient(
            do, q, k, v, mask, list(shape), scale, [str(format) for pair in formats for format in pair],
            [rounding for pair in roundings for rounding in pair], numbers, signed(seed), drawn, dropped, word,
        )  # fmt: skip
    if alone and recorders and not is_compiling():
        _record_attention(
            q, k, v.shape[-1], formats[1], roundings[1], seed, streams[2:], "gradient of P", source
        )  # fmt: skip
    return out


def _run_mask_gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    shape: Sequence[int],
    scale: float,
    formats: tuple[Formats, Formats],
    roundings: tuple[Roundings, Roundings],
    seed: int,
    streams: Sequence[int],
    dropped: int,
    word: Tensor | None,
) -> Tensor:
    out = torch.empty([1] * (mask.dim() - len(shape)) + list(shape), dtype=torch.float32, device="cpu")
    scores, weights = (codings(formats[i], roundings[i], streams[2 * i : 2 * i + 2]) for i in (0, 1))
    _core.attention_mask_gradient(
        float32(do), float32(q), float32(k), float32(v), float32(mask), out, list(shape) != list(mask.shape), False,
        scale, _drawn_dropout(dropped, word), scores, weights, seed, threads(),
    )  # fmt: skip
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
    return _run_attention(
        q, k, v, mask, causal, scale, pairs(map(format_of, formats))[0], pairs(roundings)[0], seed & WORD,
        crossed(streams, drawn), dropped, word,
    )  # fmt: skip


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
    gradients = _run_attention_backward(
        do, q, k, v, mask, causal, scale, pairs(map(format_of, formats)), pairs(roundings), seed & WORD,
        crossed(streams, drawn), (needs[0], needs[1], needs[2]), dropped, word,
    )  # fmt: skip
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
    return _run_mask_gradient(
        do, q, k, v, mask, shape, scale, pairs(map(format_of, formats)), pairs(roundings), seed & WORD,
        crossed(streams, drawn), dropped, word,
    )  # fmt: skip


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
