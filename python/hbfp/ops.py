"""The one door from torch tensors to the compiled core.

Every function here comes in two forms that give the same bits:

- called eagerly on plain CPU tensors it goes straight to `_core`, which costs a few microseconds;
- under `torch.compile`, under a dispatch mode and for tensor subclasses it goes through `torch.ops.hbfp.*`, which other
  parts of torch can see, trace and replace.

Rules of the door: float16, bfloat16 and float64 are cast to float32 on the way in (float64 rounds to nearest-even),
other
dtypes and devices raise; results are fresh float32 tensors, never views; nothing is remembered between calls, so seed
and streams are arguments. There are no derivatives at this level: `hbfp.autograd` builds them from these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from hbfp import _core
from hbfp.errors import DTypeError, ShapeError
from hbfp.format import HBFP, Rounding

__all__ = [
    "Geometry",
    "Product",
    "Recorder",
    "attention",
    "attention_backward",
    "channels_together",
    "column_sums",
    "convolution",
    "convolution_input_gradient",
    "convolution_keeping",
    "convolution_weight_gradient",
    "kept_convolution_weight_gradient",
    "kept_product",
    "product",
    "product_keeping",
    "product_shape",
    "quantize",
    "quick_product",
    "recorders",
    "reference_convolution",
    "reference_convolution_input_gradient",
    "reference_convolution_weight_gradient",
    "reference_product",
    "require_real",
    "softmax",
    "softmax_backward",
]

_core.set_tensor_type(torch.Tensor)

# Bound once: a product of a few rows takes less time than looking up a dozen names.
_dispatch_modes, _threads = torch._C._len_torch_dispatch_stack, torch.get_num_threads

_FLOAT32 = torch.float32
_CAST = frozenset({torch.float16, torch.bfloat16, torch.float64})
_WORD = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Product:
    """What a recorder is told of one product."""

    name: str
    """Which product of its layer: "forward", "input gradient", "weight gradient", ..."""
    source: object
    """The layer's state, or None for a functional call."""
    macs: int
    """Multiply-accumulates."""
    left: HBFP
    right: HBFP


Recorder = Callable[[Product], None]

recorders: list[Recorder] = []
"""Called for every product, in order; empty but for the moments in which somebody counts (see `hbfp.audit`)."""


def require_real(*tensors: Tensor | None) -> None:
    """Raises DTypeError unless every tensor given is of a floating dtype that the door takes."""
    for x in tensors:
        if x is not None and x.dtype is not _FLOAT32 and x.dtype not in _CAST:
            raise DTypeError(
                f"expected a float32 tensor (or float16, bfloat16, float64, which are cast); found {x.dtype}: "
                "integers and complex numbers have no block format"
            )


def _float32(x: Tensor) -> Tensor:
    """`x` as the core reads it: real, float32, strided, on the CPU; the same tensor where that is what it is."""
    if x.dtype is not torch.float32:
        require_real(x)
        x = x.to(torch.float32)
    if not x.is_cpu or x.layout is not torch.strided:
        raise DTypeError(
            f"expected a dense tensor on the CPU; found layout {x.layout} on device {x.device}: "
            "the integer kernels run on CPUs, move it with .cpu() or .to_dense(), or take a recipe whose backend is "
            "'emulate'"
        )
    # A lazily negated view (the imaginary part of a conjugate) holds the wrong signs in memory.
    return x.resolve_neg() if x.is_neg() else x


def _direct(*tensors: Tensor) -> bool:
    """True where `_core` may be called without the dispatcher noticing."""
    if is_compiling() or _dispatch_modes():
        return False
    for x in tensors:
        kind = type(x)
        if (kind is not Tensor and kind is not Parameter) or x.is_meta:
            return False
    return True


def _signed(word: int) -> int:
    """A 64-bit word as the signed integer that an operator's schema holds."""
    return word - 2**64 if word >= 2**63 else word


@lru_cache(maxsize=256)
def _format(text: str) -> HBFP:
    return HBFP.parse(text)


def product_shape(a: Tensor, a_axis: int, b: Tensor, b_axis: int) -> list[int]:
    """Shape of the product: batch dimensions of `a`, then rows of `a` and columns of `b`."""
    if a.dim() < 2 or b.dim() < 2:
        raise ShapeError(
            f"a product takes tensors of two dimensions or more; found {tuple(a.shape)} and {tuple(b.shape)}: "
            "give a vector a dimension of size 1"
        )
    if b.dim() > 2 and b.shape[:-2] != a.shape[:-2]:
        raise ShapeError(f"batch dimensions differ: {tuple(a.shape)} and {tuple(b.shape)}: expand one to the other's")
    if b.dim() == 2 and a.dim() > 2 and a_axis != -1:
        raise ShapeError(f"{tuple(a.shape)} reduced along axis -2 needs as many batch dimensions in {tuple(b.shape)}")
    rows = a.shape[-2] if a_axis == -1 else a.shape[-1]
    columns = b.shape[-2] if b_axis == -1 else b.shape[-1]
    return [*a.shape[:-2], rows, columns]


def _run_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    shape = product_shape(a, a_axis, b, b_axis)
    a, b = _float32(a), _float32(b)
    out = target = torch.empty(shape, dtype=torch.float32, device="cpu")
    if len(shape) > 2 and b.dim() == 2:
        a, target = a.flatten(0, -2), out.view(prod(shape[:-1]), shape[-1])
    _core.product(
        _core.Floats(a, a_axis, formats[0].core, roundings[0], seed, streams[0]),
        _core.Floats(b, b_axis, formats[1].core, roundings[1], seed, streams[1]),
        target,
        None if bias is None else _float32(bias),
        False,
        torch.get_num_threads(),
    )
    return out


def quick_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
) -> Tensor | None:
    """`product` in one call of the core, told to no recorder; None where anything is not as usual, errors included.

    Not for code that torch.compile traces.
    """
    if _dispatch_modes():
        return None
    left, right = formats
    out: Tensor | None = _core.tensor_product(
        a, a_axis, left.core, roundings[0], streams[0],
        b, b_axis, right.core, roundings[1], streams[1],
        seed, bias, _threads(),
    )  # fmt: skip
    return out


def product_keeping(
    a: Tensor,
    b: Tensor,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    keep: tuple[HBFP, int, int],
    *,
    name: str = "product",
    source: object = None,
) -> tuple[Tensor, Tensor | None]:
    """`product` of a [..., M, K] and b [N, K], which also keeps the codes of `a` along its rows, in the same pass.

    Args:
        keep: format, rounding and stream of the codes that are kept.

    Returns:
        The product, and a uint8 tensor for `kept_product`: about half a byte an element at 4 bits, one at more. None
        where nothing could be kept, or no memory saved: under torch.compile and dispatch modes, for subclasses, wide
        formats, tiles, and tensors of a few columns.
    """
    if not is_compiling() and not _dispatch_modes():
        left, right = formats
        rest = (seed, bias, _threads(), (keep[0].core, keep[1], keep[2]))
        both = _core.tensor_product(
            a, -1, left.core, roundings[0], streams[0], b, -1, right.core, roundings[1], streams[1], *rest
        )
        if both is None and _direct(a, b):
            # Another dtype, or batch dimensions that are no rows of one matrix as they lie.
            dense, wide = _float32(a).contiguous(), _float32(b)
            rest = (seed, None if bias is None else _float32(bias), *rest[2:])
            both = _core.tensor_product(
                dense, -1, left.core, roundings[0], streams[0], wide, -1, right.core, roundings[1], streams[1], *rest
            )
        if both is not None:
            if recorders:
                _record(a, -1, both[0], formats, name, source)
            kept: tuple[Tensor, Tensor | None] = both
            return kept
    return product(a, -1, b, -1, formats, roundings, seed, streams, bias, name=name, source=source), None


def kept_product(
    a: Tensor,
    kept: Tensor,
    columns: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    *,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """aᵀ X, float32 [M, columns], of a [K, M] and what `product_keeping` kept of an X [K, columns].

    The formats, roundings and streams are those of a and X; X's have had their effect when it was kept.
    """
    a = _float32(a)
    out = torch.empty(a.shape[1], columns, dtype=torch.float32, device="cpu")
    floats = _core.Floats(a, -2, formats[0].core, roundings[0], seed, streams[0])
    _core.kept_product(floats, kept, formats[1].core, out, _threads())
    if recorders:
        _record(a, -2, out, formats, name, source)
    return out


def _record(a: Tensor, a_axis: int, out: Tensor, formats: tuple[HBFP, HBFP], name: str, source: object) -> None:
    macs = out.numel() * a.shape[a_axis]
    report = Product(name, source, macs, formats[0], formats[1])
    for recorder in tuple(recorders):
        recorder(report)


def product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int] = (0, 0),
    seed: int = 0,
    streams: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    *,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The product of two tensors, each encoded along its own reduction axis, summed as FORMAT section 5 lays down.

    Shapes:
        a: [..., M, K] with `a_axis` -1, or [..., K, M] with -2.
        b: [..., N, K] with `b_axis` -1, or [..., K, N] with -2; the same batch dimensions as `a`, or none.
        bias: [N], added last in float32.
        result: [..., M, N], float32, contiguous.

    Args:
        roundings: of a and b, as the core numbers them (`Rounding.code`).
        seed, streams: choose the random bits of stochastic rounding; 64-bit words.
        name, source: told to the recorders, no part of the result.

    Raises:
        ShapeError: the shapes do not fit; FormatError: the formats cut the reduction at different places;
        DTypeError: a tensor is not real, dense and on the CPU.
    """
    compiling = is_compiling()
    out = None if compiling else quick_product(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias)
    if out is None and _direct(a, b):
        out = _run_product(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias)
    elif out is None:
        out = torch.ops.hbfp.product(
            a, a_axis, str(formats[0]), roundings[0], _signed(streams[0]),
            b, b_axis, str(formats[1]), roundings[1], _signed(streams[1]),
            _signed(seed), bias,
        )  # fmt: skip
    if recorders and not compiling:
        _record(a, a_axis, out, formats, name, source)
    return out


def reference_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int] = (0, 0),
    seed: int = 0,
    streams: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    *,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The same bits as `product`, computed by the exact-arithmetic oracle: for checking, some 10^5 times slower."""
    # Imported here because nothing but this function needs it.
    from hbfp import reference

    shape = product_shape(a, a_axis, b, b_axis)
    flatten = len(shape) > 2 and b.dim() == 2
    left, right = (
        reference.encode(_to_numpy(x), formats[i], axis, _ROUNDINGS[roundings[i]], seed, streams[i])
        for i, (x, axis) in enumerate(((a.flatten(0, -2) if flatten else a, a_axis), (b, b_axis)))
    )
    result = reference.product(
        left if a_axis == -1 else left.mT,
        right if b_axis == -2 else right.mT,
        None,
        None if bias is None else _to_numpy(bias),
    )
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    out.copy_(torch.from_numpy(result).reshape(shape))
    if recorders:
        _record(a, a_axis, out, formats, name, source)
    return out


_ROUNDINGS = tuple(Rounding)


def _to_numpy(x: Tensor) -> Any:
    # Not `tensor.numpy()`, which would mark the storage of a parameter as not resizable.
    return np.from_dlpack(_float32(x.detach()).contiguous()).copy()


def quantize(x: Tensor, format: HBFP, axis: int = -1, rounding: int = 0, seed: int = 0, stream: int = 0) -> Tensor:
    """decode(encode(x)): `x` rounded to the grid of `format`, float32 in the shape of `x`, contiguous.

    Args:
        axis: the blocked axis; plays no part with tiles.
        rounding: as the core numbers it (`Rounding.code`).

    Raises:
        ShapeError: no such axis; DTypeError: `x` is not real, dense and on the CPU.
    """
    if _direct(x):
        return _run_quantize(x, format, axis, rounding, seed, stream)
    out: Tensor = torch.ops.hbfp.quantize(x, str(format), axis, rounding, _signed(seed), _signed(stream))
    return out


def _run_quantize(x: Tensor, format: HBFP, axis: int, rounding: int, seed: int, stream: int) -> Tensor:
    x = _float32(x)
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _core.quantize(x, out, format.core, axis, rounding, seed, stream, False, torch.get_num_threads())
    return out


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
    if _direct(scores) and (mask is None or _direct(mask)):
        return _run_softmax(scores, scale, causal, mask, reuse)
    out: Tensor = torch.ops.hbfp.softmax(scores, scale, causal, mask)
    return out


def _run_softmax(scores: Tensor, scale: float, causal: bool, mask: Tensor | None, reuse: bool) -> Tensor:
    scores = _float32(scores).contiguous()
    out = scores if reuse else torch.empty(scores.shape, dtype=torch.float32, device="cpu")
    mask = None if mask is None else _float32(mask).contiguous()
    _core.softmax(scores, out, scale, causal, mask, torch.get_num_threads())
    return out


def softmax_backward(p: Tensor, dp: Tensor, scale: float, *, reuse: bool = False) -> Tensor:
    """Gradient of `softmax` for its scores: scale * p * (dp - rowsum(p * dp)).

    Args:
        p, dp: [..., rows, columns], the softmax and the gradient that reaches it.
        reuse: the caller has no more use of `dp`, whose memory may then hold the result.
    """
    if _direct(p, dp):
        return _run_softmax_backward(p, dp, scale, reuse)
    out: Tensor = torch.ops.hbfp.softmax_backward(p, dp, scale)
    return out


def _run_softmax_backward(p: Tensor, dp: Tensor, scale: float, reuse: bool) -> Tensor:
    p, dp = _float32(p).contiguous(), _float32(dp).contiguous()
    out = dp if reuse else torch.empty(dp.shape, dtype=torch.float32, device="cpu")
    _core.softmax_backward(p, dp, out, scale, torch.get_num_threads())
    return out


Formats = tuple[HBFP, HBFP]
"""Of the left and the right operand of a product."""
Roundings = tuple[int, int]


def _codings(formats: Formats, roundings: Roundings, streams: Sequence[int]) -> list[tuple[_core.Format, int, int]]:
    return [(formats[i].core, roundings[i], streams[i]) for i in (0, 1)]


def _record_attention(q: Tensor, k: Tensor, depth: int, formats: Formats, name: str, source: object) -> None:
    """Tells of one product of attention, whose multiply-accumulates are those of all rows with all columns."""
    macs = prod(q.shape[:-1]) * k.shape[-2] * depth
    for recorder in tuple(recorders):
        recorder(Product(name, source, macs, formats[0], formats[1]))


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
        source: told to the recorders, no part of the result.

    Raises:
        ShapeError: the shapes do not fit; FormatError: the formats are others;
        DTypeError: a tensor is not real, dense and on the CPU.
    """
    if _direct(q, k, v) and (mask is None or _direct(mask)):
        out = _run_attention(q, k, v, mask, causal, scale, formats, roundings, seed, streams)
    else:
        out = torch.ops.hbfp.attention(
            q, k, v, mask, causal, scale, [str(format) for format in formats], list(roundings),
            [_signed(stream) for stream in streams], _signed(seed),
        )  # fmt: skip
    if recorders and not is_compiling():
        _record_attention(q, k, q.shape[-1], formats, "scores", source)
        _record_attention(q, k, v.shape[-1], formats, "context", source)
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
) -> Tensor:
    q, k, v = _float32(q), _float32(k), _float32(v)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32, device="cpu")
    scores, context = (_codings(formats, roundings, streams[i : i + 2]) for i in (0, 2))
    _core.attention(
        q, k, v, None if mask is None else _float32(mask), out, causal, scale, scores, context, seed, _threads()
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
    *,
    source: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, as far as `needs` says so, from that of the output; nothing but the inputs is kept.

    Shapes: as for `attention`; do: [..., L, Ev]; results: the shapes of q, k and v, one matrix for each of the batch.

    Args:
        formats, roundings: of the forward products; of dP = dO Vᵀ and dQ = dS K; of dK = dSᵀ Q and of dV = (dOᵀ P)ᵀ.
        seed, streams: of Q, K (scores); dO, V (dP); dS, K (dQ); dS, Q (dK); P, dO (dV).

    Raises: as `attention`.
    """
    if _direct(do, q, k, v) and (mask is None or _direct(mask)):
        out = _run_attention_backward(do, q, k, v, mask, causal, scale, formats, roundings, seed, streams, needs)
    else:
        found = torch.ops.hbfp.attention_backward(
            do, q, k, v, mask, causal, scale, [str(format) for pair in formats for format in pair],
            [rounding for pair in roundings for rounding in pair], [_signed(stream) for stream in streams],
            _signed(seed), list(needs),
        )  # fmt: skip
        dq, dk, dv = (x if needed else None for x, needed in zip(found, needs, strict=True))
        out = dq, dk, dv
    if recorders and not is_compiling():
        _, towards_input, towards_right = formats
        if needs[2]:
            _record_attention(q, k, v.shape[-1], towards_right[::-1], "gradient of V", source)
        if needs[0] or needs[1]:
            _record_attention(q, k, v.shape[-1], towards_input, "gradient of P", source)
        if needs[0]:
            _record_attention(q, k, q.shape[-1], towards_input, "gradient of Q", source)
        if needs[1]:
            _record_attention(q, k, q.shape[-1], towards_right, "gradient of K", source)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    do, q, k, v = _float32(do), _float32(q), _float32(k), _float32(v)
    dq, dk, dv = (
        torch.empty(x.shape, dtype=torch.float32, device="cpu") if needed else None
        for x, needed in zip((q, k, v), needs, strict=True)
    )
    chosen = [(formats[i], roundings[i]) for i in (0, 1, 1, 2)] + [(formats[2][::-1], roundings[2][::-1])]
    scores, weights, queries, keys, values = (
        _codings(*pair, streams[2 * i : 2 * i + 2]) for i, pair in enumerate(chosen)
    )
    _core.attention_backward(
        do, q, k, v, None if mask is None else _float32(mask), dq, dk, dv, causal, scale,
        scores, weights, queries, keys, values, seed, _threads(),
    )  # fmt: skip
    return dq, dk, dv


# --- convolutions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which input pixel p a tap k of the kernel reads for an output pixel o: p = o · stride − before + k · dilation.

    All but `groups` and `flatten` have one entry for each spatial dimension. A transposed convolution has the geometry
    of the ordinary one whose input gradient it is.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Zeros before and after the input pixels."""
    dilation: tuple[int, ...]
    groups: int = 1
    flatten: bool = False
    """Forward blocks run over the patch, taps row-major and then channels, and not over the channels at one tap."""

    @property
    def rank(self) -> int:
        """Spatial dimensions."""
        return len(self.kernel)

    def outputs(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Output pixels that fit the input pixels `spatial`; less than 1 where the kernel is larger than the input."""
        return tuple(
            (size + sum(pad) - d * (k - 1) - 1) // s + 1
            for size, pad, d, k, s in zip(spatial, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )


def _pixels(like: Tensor, channels: int, spatial: Sequence[int]) -> Tensor:
    """Memory for [N, channels, *spatial] of the samples of `like`, the channels of one pixel together."""
    # Strides of its own: autograd would refuse to change a permuted view in place, as activations do.
    strides = [channels]
    for size in reversed(spatial):
        strides.append(strides[-1] * size)
    sample, *inner = reversed(strides)
    return like.new_empty_strided((like.shape[0], channels, *spatial), (sample, 1, *inner), dtype=torch.float32)


def _record_convolution(outputs: Tensor, weight: Sequence[int], formats: Formats, name: str, source: object) -> None:
    """Tells of one product of a convolution with these output pixels and this shape of the kernel.

    All three have the same number: every tap of every output pixel, whether it meets an input pixel or not.
    """
    macs = outputs.shape[0] * prod(outputs.shape[2:]) * prod(weight)
    for recorder in tuple(recorders):
        recorder(Product(name, source, macs, formats[0], formats[1]))


def convolution(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    outputs: Sequence[int] | None = None,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """Y of X and W (docs/spec.md, 6.14 to 6.17), plus a bias.

    Shapes:
        x: [N, C, *S]; weight: [Co, C/g, *kernel]; bias: [Co]; one to three spatial dimensions.
        result: [N, Co, *So], float32, the channels of one pixel together in memory.

    Args:
        formats, roundings: of X and of W; the formats are lines of one length.
        seed, streams: of X and of W; they choose the random bits of stochastic rounding; 64-bit words.
        outputs: So where fewer output pixels are wanted than fit, the first of each dimension.
        name, source: told to the recorders, no part of the result.

    Raises:
        DTypeError: a tensor is not real, dense and on the CPU. Shapes and formats are the caller's to check.
    """
    spatial = tuple(outputs) if outputs is not None else geometry.outputs(x.shape[2:])
    if _direct(x, weight):
        out = _run_convolution(x, weight, formats, roundings, seed, streams, bias, geometry, spatial)
    else:
        out = torch.ops.hbfp.convolution(
            x, weight, bias, *_crossing(formats, roundings, seed, streams, geometry), geometry.flatten, spatial
        )
    if recorders and not is_compiling():
        _record_convolution(out, weight.shape, formats, name, source)
    return out


def convolution_input_gradient(
    dy: Tensor,
    weight: Tensor,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """dX of dY and W (docs/spec.md, 6.14 to 6.17); with a bias, the transposed convolution of an X in dY's place.

    Shapes:
        dy: [N, Co, *So]; weight: [Co, C/g, *kernel]; bias: [C].
        result: [N, C, *spatial], float32, the channels of one pixel together in memory.

    Args: as for `convolution`, of dY and of W.
    """
    if _direct(dy, weight):
        out = _run_convolution_input_gradient(dy, weight, spatial, formats, roundings, seed, streams, bias, geometry)
    else:
        out = torch.ops.hbfp.convolution_input_gradient(
            dy, weight, bias, *_crossing(formats, roundings, seed, streams, geometry), list(spatial)
        )
    if recorders and not is_compiling():
        _record_convolution(dy, weight.shape, formats, name, source)
    return out


def convolution_weight_gradient(
    dy: Tensor,
    x: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """dW of dY and X (docs/spec.md, 6.14 to 6.17).

    Shapes:
        dy: [N, Co, *So]; x: [N, C, *S].
        result: [Co, C/g, *kernel], float32, contiguous.

    Args: as for `convolution`, of dY and of X.
    """
    if _direct(dy, x):
        out = _run_convolution_weight_gradient(dy, x, formats, roundings, seed, streams, geometry)
    else:
        out = torch.ops.hbfp.convolution_weight_gradient(dy, x, *_crossing(formats, roundings, seed, streams, geometry))
    if recorders and not is_compiling():
        _record_convolution(dy, out.shape, formats, name, source)
    return out


def _oracle_convolution(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
    outputs: Sequence[int],
) -> Tensor:
    from hbfp import reference

    y = reference.convolution(
        _to_numpy(x), _to_numpy(weight), None if bias is None else _to_numpy(bias), formats, _named(roundings), seed,
        streams, **_for_oracle(geometry), flatten=geometry.flatten,
    )  # fmt: skip
    wanted = torch.from_numpy(y[tuple(map(slice, (*y.shape[:2], *outputs)))])
    return _pixels(x, weight.shape[0], outputs).copy_(wanted)


def _oracle_input_gradient(
    dy: Tensor,
    weight: Tensor,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    from hbfp import reference

    dx = reference.convolution_input_gradient(
        _to_numpy(dy), _to_numpy(weight), tuple(spatial), formats, _named(roundings), seed, streams,
        **_for_oracle(geometry), bias=None if bias is None else _to_numpy(bias),
    )  # fmt: skip
    return _pixels(dy, weight.shape[1] * geometry.groups, spatial).copy_(torch.from_numpy(dx))


def _oracle_weight_gradient(
    dy: Tensor,
    x: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    from hbfp import reference

    dw = reference.convolution_weight_gradient(
        _to_numpy(dy), _to_numpy(x), geometry.kernel, formats, _named(roundings), seed, streams,
        **_for_oracle(geometry),
    )  # fmt: skip
    return torch.from_numpy(dw)


def _named(roundings: Roundings) -> tuple[Rounding, Rounding]:
    return _ROUNDINGS[roundings[0]], _ROUNDINGS[roundings[1]]


def _for_oracle(geometry: Geometry) -> dict[str, Any]:
    return {name: getattr(geometry, name) for name in ("stride", "padding", "dilation", "groups")}


def reference_convolution(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    outputs: Sequence[int] | None = None,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The same bits as `convolution`, computed by the exact-arithmetic oracle."""
    spatial = tuple(outputs) if outputs is not None else geometry.outputs(x.shape[2:])
    out = _oracle_convolution(x, weight, formats, roundings, seed, streams, bias, geometry, spatial)
    if recorders:
        _record_convolution(out, weight.shape, formats, name, source)
    return out


def reference_convolution_input_gradient(
    dy: Tensor,
    weight: Tensor,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The same bits as `convolution_input_gradient`, computed by the exact-arithmetic oracle."""
    out = _oracle_input_gradient(dy, weight, spatial, formats, roundings, seed, streams, bias, geometry)
    if recorders:
        _record_convolution(dy, weight.shape, formats, name, source)
    return out


def reference_convolution_weight_gradient(
    dy: Tensor,
    x: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The same bits as `convolution_weight_gradient`, computed by the exact-arithmetic oracle."""
    out = _oracle_weight_gradient(dy, x, formats, roundings, seed, streams, geometry)
    if recorders:
        _record_convolution(dy, out.shape, formats, name, source)
    return out


# --- convolutions as the core takes them: images [N, p0, p1, p2, C], three pixel dimensions always -------------------


_TOGETHER = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_together(x: Tensor) -> Tensor:
    """x [N, C, *S] with the channels of one pixel side by side in memory; a copy only where they are not."""
    if x.dim() in _TOGETHER:
        # torch has a faster copy for this than for a permuted tensor. Sizes of 1 make several layouts look alike.
        x = x.contiguous(memory_format=_TOGETHER[x.dim()])
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _image(x: Tensor) -> Tensor:
    """x [N, C, *S] with the channels of one pixel together; a copy only where they are not."""
    image = channels_together(_float32(x)).movedim(1, -1)
    return image[(slice(None), *(None,) * (5 - x.dim()))] if x.dim() < 5 else image


def _threes(sizes: Sequence[int], fill: int) -> tuple[int, int, int]:
    first, second, third = (fill,) * (3 - len(sizes)) + tuple(sizes)
    return first, second, third


def _convolution_sizes(
    geometry: Geometry, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[int, list[tuple[int, int, int]]]:
    before = [pad[0] for pad in geometry.padding]
    sizes = ((inputs, 1), (outputs, 1), (geometry.kernel, 1), (geometry.stride, 1), (before, 0), (geometry.dilation, 1))
    return geometry.groups, [_threes(size, fill) for size, fill in sizes]


def _kernel(weight: Tensor) -> Tensor:
    weight = _float32(weight)
    return weight[(slice(None), slice(None), *(None,) * (5 - weight.dim()))] if weight.dim() < 5 else weight


def _run_convolution(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
    outputs: Sequence[int],
) -> Tensor:
    return _run_convolution_keeping(x, weight, formats, roundings, seed, streams, bias, geometry, outputs, None)[0]


def _run_convolution_keeping(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
    outputs: Sequence[int],
    keep: tuple[HBFP, int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    out = _pixels(x, weight.shape[0], outputs)
    kept = _core.convolution_forward(
        _image(x), _kernel(weight), _image(out), _convolution_sizes(geometry, x.shape[2:], outputs),
        _codings(formats, roundings, streams), geometry.flatten, None if bias is None else _float32(bias).contiguous(),
        seed, _threads(), None if keep is None else (keep[0].core, keep[1], keep[2]),
    )  # fmt: skip
    return out, kept


def _run_convolution_input_gradient(
    dy: Tensor,
    weight: Tensor,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    out = _pixels(dy, weight.shape[1] * geometry.groups, spatial)
    _core.convolution_input_gradient(
        _image(dy), _kernel(weight), _image(out), _convolution_sizes(geometry, spatial, dy.shape[2:]),
        _codings(formats, roundings, streams), None if bias is None else _float32(bias).contiguous(), seed, _threads(),
    )  # fmt: skip
    return out


def _run_convolution_weight_gradient(
    dy: Tensor,
    x: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    return _weight_gradient(dy, _image(x), False, x.shape[1:], formats, roundings, seed, streams, geometry)


def _weight_gradient(
    dy: Tensor,
    x: Tensor,
    kept: bool,
    shape: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    channels, groups, taps = shape[0], geometry.groups, prod(geometry.kernel)
    out = torch.empty(groups, taps, channels // groups, dy.shape[1] // groups, dtype=torch.float32, device="cpu")
    _core.convolution_weight_gradient(
        _image(dy), x, kept, channels, out, _convolution_sizes(geometry, shape[1:], dy.shape[2:]),
        _codings(formats, roundings, streams), seed, _threads(),
    )  # fmt: skip
    return out.permute(0, 3, 2, 1).reshape(dy.shape[1], channels // groups, *geometry.kernel)


def convolution_keeping(
    x: Tensor,
    weight: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    keep: tuple[HBFP, int, int],
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> tuple[Tensor, Tensor | None]:
    """`convolution`, which also keeps the codes of X along the batch.

    Args:
        keep: format, rounding and stream of the codes that are kept.

    Returns:
        Y, and a uint8 tensor for `kept_convolution_weight_gradient`, or None where nothing could be kept.
    """
    if not _direct(x, weight):
        out = convolution(
            x, weight, formats, roundings, seed, streams, bias, geometry=geometry, name=name, source=source
        )
        return out, None
    outputs = geometry.outputs(x.shape[2:])
    out, kept = _run_convolution_keeping(x, weight, formats, roundings, seed, streams, bias, geometry, outputs, keep)
    if recorders:
        _record_convolution(out, weight.shape, formats, name, source)
    return out, kept


def kept_convolution_weight_gradient(
    dy: Tensor,
    kept: Tensor,
    shape: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """`convolution_weight_gradient` from what `convolution_keeping` kept of an X of `shape` [C, *S]."""
    out = _weight_gradient(dy, kept, True, shape, formats, roundings, seed, streams, geometry)
    if recorders:
        _record_convolution(dy, out.shape, formats, name, source)
    return out


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [rows, n] in blocks of 64, the same for any number of threads: [n]."""
    if x.dim() != 2:
        raise ShapeError(f"column sums are taken of a matrix [rows, n]; found shape {tuple(x.shape)}")
    if _direct(x):
        return _run_column_sums(x)
    out: Tensor = torch.ops.hbfp.column_sums(x)
    return out


def _run_column_sums(x: Tensor) -> Tensor:
    x = _float32(x).contiguous()
    out = torch.empty(x.shape[1], dtype=torch.float32, device="cpu")
    _core.column_sums(x, out, torch.get_num_threads())
    return out


# --- operators: the same functions behind torch's dispatcher ---------------------------------------------------------
#
# Formats cross as their written form and 64-bit words as signed integers, because a schema holds nothing else.

_LIBRARY = torch.library.Library("hbfp", "DEF")


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `hbfp::<schema>` and registers the decorated function as its CPU kernel."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        _LIBRARY.impl(schema.split("(", 1)[0], kernel, "CPU")
        return kernel

    return register


@_operator(
    "product(Tensor a, int a_axis, str a_format, int a_rounding, SymInt a_stream, "
    "Tensor b, int b_axis, str b_format, int b_rounding, SymInt b_stream, SymInt seed, Tensor? bias) -> Tensor"
)
def _product_kernel(
    a: Tensor,
    a_axis: int,
    a_format: str,
    a_rounding: int,
    a_stream: int,
    b: Tensor,
    b_axis: int,
    b_format: str,
    b_rounding: int,
    b_stream: int,
    seed: int,
    bias: Tensor | None,
) -> Tensor:
    formats, roundings = (_format(a_format), _format(b_format)), (a_rounding, b_rounding)
    streams = (a_stream & _WORD, b_stream & _WORD)
    return _run_product(a, a_axis, b, b_axis, formats, roundings, seed & _WORD, streams, bias)


@_operator("quantize(Tensor x, str format, int axis, int rounding, SymInt seed, SymInt stream) -> Tensor")
def _quantize_kernel(x: Tensor, format: str, axis: int, rounding: int, seed: int, stream: int) -> Tensor:
    return _run_quantize(x, _format(format), axis, rounding, seed & _WORD, stream & _WORD)


@_operator("softmax(Tensor scores, float scale, bool causal, Tensor? mask) -> Tensor")
def _softmax_kernel(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    return _run_softmax(scores, scale, causal, mask, False)


@_operator("softmax_backward(Tensor p, Tensor dp, float scale) -> Tensor")
def _softmax_backward_kernel(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    return _run_softmax_backward(p, dp, scale, False)


@_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, str[] formats, int[] roundings, "
    "SymInt[] streams, SymInt seed) -> Tensor"
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
) -> Tensor:
    return _run_attention(
        q, k, v, mask, causal, scale, _pairs(map(_format, formats))[0], _pairs(roundings)[0], seed & _WORD,
        [stream & _WORD for stream in streams],
    )  # fmt: skip


@_operator(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "str[] formats, int[] roundings, SymInt[] streams, SymInt seed, bool[] needs) -> (Tensor, Tensor, Tensor)"
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
) -> tuple[Tensor, ...]:
    gradients = _run_attention_backward(
        do, q, k, v, mask, causal, scale, _pairs(map(_format, formats)), _pairs(roundings), seed & _WORD,
        [stream & _WORD for stream in streams], (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    # A schema has no optional results.
    return tuple(torch.empty(0) if x is None else x for x in gradients)


def _pairs(items: Iterable[Any]) -> Any:
    items = iter(items)
    return tuple(zip(items, items, strict=True))


_CODED = (
    "str[] formats, int[] roundings, SymInt[] streams, SymInt seed, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, int groups"
)
"""How the arguments of `_crossing` are declared."""


def _crossing(
    formats: Formats, roundings: Roundings, seed: int, streams: tuple[int, int], geometry: Geometry
) -> tuple[Any, ...]:
    """Formats, random bits and geometry as a schema holds them; paddings before and after lie in one list."""
    return (
        [str(format) for format in formats], list(roundings), [_signed(stream) for stream in streams], _signed(seed),
        list(geometry.kernel), list(geometry.stride), [size for pair in geometry.padding for size in pair],
        list(geometry.dilation), geometry.groups,
    )  # fmt: skip


def _crossed(
    formats: list[str],
    roundings: list[int],
    streams: list[int],
    seed: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    flatten: bool = False,
) -> tuple[Formats, Roundings, int, tuple[int, int], Geometry]:
    """The same on the other side."""
    geometry = Geometry(tuple(kernel), tuple(stride), _pairs(padding), tuple(dilation), groups, flatten)
    words = (streams[0] & _WORD, streams[1] & _WORD)
    return _pairs(map(_format, formats))[0], _pairs(roundings)[0], seed & _WORD, words, geometry


@_operator(f"convolution(Tensor x, Tensor weight, Tensor? bias, {_CODED}, bool flatten, SymInt[] outputs) -> Tensor")
def _convolution_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *coded: Any) -> Tensor:
    formats, roundings, seed, streams, geometry = _crossed(*coded[:-1])
    return _run_convolution(x, weight, formats, roundings, seed, streams, bias, geometry, coded[-1])


@_operator(f"convolution_input_gradient(Tensor dy, Tensor weight, Tensor? bias, {_CODED}, SymInt[] spatial) -> Tensor")
def _convolution_input_gradient_kernel(dy: Tensor, weight: Tensor, bias: Tensor | None, *coded: Any) -> Tensor:
    formats, roundings, seed, streams, geometry = _crossed(*coded[:-1])
    return _run_convolution_input_gradient(dy, weight, coded[-1], formats, roundings, seed, streams, bias, geometry)


@_operator(f"convolution_weight_gradient(Tensor dy, Tensor x, {_CODED}) -> Tensor")
def _convolution_weight_gradient_kernel(dy: Tensor, x: Tensor, *coded: Any) -> Tensor:
    return _run_convolution_weight_gradient(dy, x, *_crossed(*coded))


@_operator("column_sums(Tensor x) -> Tensor")
def _column_sums_kernel(x: Tensor) -> Tensor:
    return _run_column_sums(x)


@torch.library.register_fake("hbfp::product", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _product_fake(
    a: Tensor,
    a_axis: int,
    a_format: str,
    a_rounding: int,
    a_stream: int,
    b: Tensor,
    b_axis: int,
    b_format: str,
    b_rounding: int,
    b_stream: int,
    seed: int,
    bias: Tensor | None,
) -> Tensor:
    return a.new_empty(product_shape(a, a_axis, b, b_axis), dtype=torch.float32)


@torch.library.register_fake("hbfp::quantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _quantize_fake(x: Tensor, format: str, axis: int, rounding: int, seed: int, stream: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::softmax", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _softmax_fake(scores: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::softmax_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _softmax_backward_fake(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    return dp.new_empty(dp.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)


@torch.library.register_fake("hbfp::attention_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _attention_backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    return tuple(
        x.new_empty(x.shape if needed else 0, dtype=torch.float32) for x, needed in zip((q, k, v), needs, strict=True)
    )


@torch.library.register_fake("hbfp::convolution", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _convolution_fake(x: Tensor, weight: Tensor, *coded: Any) -> Tensor:
    return _pixels(x, weight.shape[0], coded[-1])


@torch.library.register_fake("hbfp::convolution_input_gradient", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _convolution_input_gradient_fake(dy: Tensor, weight: Tensor, *coded: Any) -> Tensor:
    groups, spatial = coded[-2:]
    return _pixels(dy, weight.shape[1] * groups, spatial)


@torch.library.register_fake("hbfp::convolution_weight_gradient", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _convolution_weight_gradient_fake(dy: Tensor, x: Tensor, *coded: Any) -> Tensor:
    kernel, groups = coded[4], coded[-1]
    return dy.new_empty((dy.shape[1], x.shape[1] // groups, *kernel), dtype=torch.float32)


@torch.library.register_fake("hbfp::column_sums", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _column_sums_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)
