"""Block floating point on any device that torch knows: the backend "emulate".

Two halves, of which only the first is under the contract of docs/spec.md:

- `encode`, `decode` and `quantize` give *the bits of the compiled core*, on every device: they compute on the patterns
  of float32 numbers in integers, so that neither rounding modes nor flushed subnormals nor a device's idea of a
  logarithm can show.
- products multiply the decoded operands in float32 by the device's own routines. *The codes that enter are exact; the
  sums are the device's*: close to those of the integer kernels and not bit-identical with them, nor between devices,
  versions of torch or sizes of a batch. What a code decodes to beyond float32 is infinite here, where the integer
  product may still be finite. Reduced precision is off while such a product runs: autocasting, and TF32 or bfloat16
  inside float32 products (`torch.backends.*.fp32_precision`, which is one setting for all threads and put back
  afterwards). Under torch.compile that setting is the caller's to make.

`product`, `softmax`, `softmax_backward`, `dropout` and `column_sums` take what those of `hbfp.ops` take and tell the
same recorders; the convolutions take what those of `hbfp.reference` take, as torch tensors. Nothing here calls the
compiled core or leaves the device of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d, pad

from hbfp import ops
from hbfp.errors import DTypeError, FormatError, HBFPError, ShapeError
from hbfp.format import HBFP, ExponentRule, Rounding
from hbfp.ops import Geometry

__all__ = [
    "Encoded",
    "Geometry",
    "column_sums",
    "convolution",
    "convolution_input_gradient",
    "convolution_weight_gradient",
    "decode",
    "dropout",
    "emulating",
    "encode",
    "multiply",
    "product",
    "quantize",
    "random_bits",
    "softmax",
    "softmax_backward",
]

Formats = tuple[HBFP, HBFP]
"""Of the left and the right operand of a product."""
Pair = tuple[int, int]
"""Roundings, as `Rounding.code` numbers them, or streams, of the same."""

_INFINITY, _NAN = 0x7F800000, 0x7FC00000
_NAN_BLOCK = 255
_WORD = 2**32 - 1
_EVEN, _AWAY, _TO_ZERO, _STOCHASTIC = (rounding.code for rounding in Rounding)


# --- the patterns of float32 -----------------------------------------------------------------------------------------


def _float32(x: Tensor) -> Tensor:
    """`x` as the emulation reads it: real, float32, contiguous, without history, wherever it is."""
    ops.require_real(x)
    if not is_compiling() and x.layout is not torch.strided:  # which a trace cannot ask for
        raise DTypeError(f"expected a dense tensor; found layout {x.layout}: make it one with .to_dense()")
    return x.detach().to(torch.float32).resolve_neg().contiguous()


def _parts(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Integers n < 2^24 and e of |x| = n · 2^e, from patterns without their sign; subnormals are read as they are."""
    field = magnitudes >> 23
    return (magnitudes & 0x7FFFFF) | (field > 0).to(torch.int32) << 23, field.clamp(min=1) - 150


# --- blocks ----------------------------------------------------------------------------------------------------------


def _cuts(format: HBFP, axis: int, dimensions: int) -> list[tuple[int, int]]:
    """Which axes are cut, and into how many elements each; none for a whole tensor."""
    if format.tile is not None:
        return [(dimensions - 2, format.tile), (dimensions - 1, format.tile)]
    return [] if format.block is None else [(axis, format.block)]


def _largest(magnitudes: Tensor, cuts: Sequence[tuple[int, int]]) -> Tensor:
    """The largest magnitude of each block."""
    if not cuts:
        shape = [min(size, 1) for size in magnitudes.shape]
        return magnitudes.new_zeros(shape) if 0 in shape else magnitudes.amax().reshape(shape)
    for axis, length in cuts:
        size = magnitudes.shape[axis]
        blocks = -(-size // length)
        # Zeros behind the end change no maximum.
        behind = (0, 0) * (magnitudes.dim() - 1 - axis)
        whole = magnitudes if size == blocks * length else pad(magnitudes, (*behind, 0, blocks * length - size))
        magnitudes = whole.unflatten(axis, (blocks, length)).amax(axis + 1)
    return magnitudes


def _spread(exponents: Tensor, cuts: Sequence[tuple[int, int]], shape: Sequence[int]) -> Tensor:
    """What each block has, for each of its elements: `shape`, or what broadcasts to it."""
    for axis, length in cuts:
        repeated = exponents.unsqueeze(axis + 1).expand(
            *exponents.shape[: axis + 1], length, *exponents.shape[axis + 1 :]
        )
        exponents = repeated.flatten(axis, axis + 1).narrow(axis, 0, shape[axis])
    return exponents


def _exponents(amax: Tensor, format: HBFP) -> Tensor:
    """The stored exponent c of blocks whose largest magnitudes have the patterns `amax` (spec 1.5, 1.6, section 2)."""
    n, e = _parts(amax)
    # A conversion of 24 bits is exact, and its exponent field is the place of the leading 1.
    top = ((n.to(torch.float32).view(torch.int32) >> 23) - 127).clamp(min=0)
    exponent = top + e + 1
    if format.exponent_rule == ExponentRule.CEIL:
        exponent = exponent - ((n & (n - 1)) == 0).to(torch.int32)
    elif format.exponent_rule == ExponentRule.NO_CLIP:
        leading = (n << (23 - top)) >> (24 - format.bits)
        exponent = exponent + (leading == 2**format.bits - 1).to(torch.int32)
    assert format.exponent_bias is not None
    least = max(-format.exponent_bias, -127)
    most = min(2**format.exponent_bits - 2 - format.exponent_bias, 127)
    c = (exponent - (format.bits - 1)).clamp(least, most) + 127
    return c.masked_fill(amax == 0, 0).masked_fill(amax >= _INFINITY, _NAN_BLOCK)


def _codes(patterns: Tensor, c: Tensor, format: HBFP, rounding: int, r: Tensor | None) -> Tensor:
    """The codes, as int32 or int64, of numbers in blocks with the exponents `c` (section 3); r: random bits."""
    n, e = _parts(patterns & 0x7FFFFFFF)
    negative = patterns < 0
    shift = (c - 127) - e  # |y| = n · 2^-shift
    largest = format.max_code
    if rounding == _STOCHASTIC:
        assert r is not None
        scaled = _nearest_even(n.to(torch.int64) << 17, (shift + 1).clamp_(1, 43).to(torch.int64))
        scaled = scaled.clamp_(max=largest << 16)
        q = (torch.where(negative, -scaled, scaled) + r) >> 16
    else:
        # One bit more than |y| has, so that there is always one to drop. Beyond 27 nothing is left of 24 bits, and
        # under 1 the code is far beyond the largest.
        doubled, shift = n << 1, (shift + 1).clamp_(1, 27)
        if rounding == _EVEN:
            q = _nearest_even(doubled, shift)
        elif rounding == _AWAY:
            q = (doubled + (1 << (shift - 1))) >> shift
        else:
            q = doubled >> shift
        q = q.clamp_(max=largest)
        q = torch.where(negative, -q, q)
    return q.masked_fill(c == _NAN_BLOCK, 0)


def _nearest_even(n: Tensor, shift: Tensor) -> Tensor:
    """n · 2^-shift to the nearest integer, ties to even; n ≥ 0, shift ≥ 1."""
    return (n + ((1 << (shift - 1)) - 1) + ((n >> shift) & 1)) >> shift


def _values(codes: Tensor, c: Tensor) -> Tensor:
    """q · 2^(c - 127) as float32 (1.8), made of patterns: a multiplication might flush subnormals."""
    q = codes.to(torch.int32)
    number = q.abs().to(torch.float32).view(torch.int32)
    fraction, field = number & 0x7FFFFF, (number >> 23) + (c - 127)
    # The field of a code is 127 or more, so that a subnormal value is one place below the normal ones, and exact.
    pattern = torch.where(field > 0, fraction | field << 23, (fraction | 0x800000) >> 1)
    pattern = pattern.masked_fill(field >= 255, _INFINITY).masked_fill(q == 0, 0) | (q & -(2**31))
    return pattern.masked_fill(c == _NAN_BLOCK, _NAN).view(torch.float32)


# --- random bits -----------------------------------------------------------------------------------------------------


def random_bits(
    shape: Sequence[int], seed: int | Tensor, stream: int | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """The 16 random bits of each element of a tensor of `shape`, as int64: Philox4x32-10 (spec 3.8, 3.9).

    J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Raises:
        HBFPError: seed or stream is no 64-bit word. ShapeError: more than 2^32 rows.
    """
    for name, word in (("seed", seed), ("stream", stream)):
        if not isinstance(word, Tensor) and not 0 <= word < 2**64:
            raise HBFPError(f"{name} must lie in 0 ... {2**64 - 1}; found {word}")
    # Tensors are those of a graph, in whose place a number would serve for one step.
    seed, stream = (word.to(device) if isinstance(word, Tensor) else word for word in (seed, stream))
    columns = shape[-1] if len(shape) else 1
    rows = prod(shape[:-1])
    if rows > 2**32:
        raise ShapeError(f"random bits are defined for up to 2^32 rows; found {rows} in shape {tuple(shape)}")
    # A counter's words are broadcast only as far as they differ: the first is the column's, the second the row's.
    c0: Tensor | int = torch.arange(-(-columns // 8), device=device)
    c1: Tensor | int = torch.arange(rows, device=device).unsqueeze(1)
    c2: Tensor | int = stream & _WORD
    c3: Tensor | int = stream >> 32 & _WORD
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # Products of 32 bits wrap round in int64, which loses none of their 64 bits.
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (q >> 32) & _WORD ^ c1 ^ k0, q & _WORD
        c2, c3 = (p >> 32) & _WORD ^ c3 ^ k1, p & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)
    return halves.flatten(1)[:, :columns].reshape(tuple(shape))


# --- encoding --------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A tensor in blocks, on the device where it was."""

    mantissas: Tensor
    """The codes, int8 (int16 for more than 8 bits), in the tensor's shape."""
    exponents: Tensor
    """uint8: c of each block, 255 for a NaN block; the tensor's shape with the blocked axis counted in blocks."""
    format: HBFP
    axis: int


def encode(x: Tensor, format: HBFP, axis: int = -1, rounding: int = 0, seed: int = 0, stream: int = 0) -> Encoded:
    """`x` in blocks: the bits of `hbfp.encode`, on the device of `x`.

    Args:
        x: float32; float16, bfloat16 and float64 are cast, the last to nearest-even.
        axis: the blocked axis; plays no part with tiles and whole tensors.
        rounding: as the core numbers it (`Rounding.code`).
        seed, stream: choose the random bits of stochastic rounding; 64-bit words.

    Raises:
        ShapeError: no such axis; DTypeError: `x` is not real and dense; HBFPError: seed or stream is no such word.
    """
    x = _float32(x)
    c, cuts, held = _block_exponents(x, format, axis)
    r = random_bits(x.shape, seed, stream, x.device) if rounding == _STOCHASTIC else None
    q = _quantized(x, c, cuts, held, format, rounding, r)
    missing = len(held) - x.dim()
    return Encoded(
        q.to(torch.int8 if format.bits <= 8 else torch.int16).reshape(x.shape),
        c.to(torch.uint8).reshape(c.shape[missing:]),
        format,
        axis,
    )


def _block_exponents(x: Tensor, format: HBFP, axis: int) -> tuple[Tensor, list[tuple[int, int]], tuple[int, ...]]:
    """Exponents, the cuts that made the blocks, and the shape in which they were made: a dimension or two at least."""
    held, number = format.core_layout(tuple(x.shape), axis)
    cuts = _cuts(format, number, len(held))
    magnitudes = x.view(torch.int32).reshape(held) & 0x7FFFFFFF
    return _exponents(_largest(magnitudes, cuts), format), cuts, held


def _quantized(
    x: Tensor,
    c: Tensor,
    cuts: Sequence[tuple[int, int]],
    held: Sequence[int],
    format: HBFP,
    rounding: int,
    r: Tensor | None,
) -> Tensor:
    spread = _spread(c, cuts, held)
    return _codes(x.view(torch.int32).reshape(held), spread, format, rounding, None if r is None else r.reshape(held))


def decode(encoded: Encoded) -> Tensor:
    """The values, float32 in the tensor's shape: the bits of `BlockArray.decode`."""
    mantissas, exponents, format, axis = encoded
    held, number = format.core_layout(tuple(mantissas.shape), axis)
    c = exponents.to(torch.int32).reshape((1,) * (len(held) - mantissas.dim()) + tuple(exponents.shape))
    spread = _spread(c, _cuts(format, number, len(held)), held)
    return _values(mantissas.reshape(held), spread).reshape(mantissas.shape)


def quantize(
    x: Tensor,
    format: HBFP,
    axis: int = -1,
    rounding: int = 0,
    seed: int = 0,
    stream: int = 0,
    *,
    bits: Tensor | None = None,
) -> Tensor:
    """decode(encode(x)): the bits of `ops.quantize`, on the device of `x`. Args and errors: those of `encode`.

    `bits`: random bits in the shape of `x`, in place of those that seed and stream choose.
    """
    x = _float32(x)
    c, cuts, held = _block_exponents(x, format, axis)
    if rounding == _STOCHASTIC and bits is None:
        bits = random_bits(x.shape, seed, stream, x.device)
    q = _quantized(x, c, cuts, held, format, rounding, bits)
    return _values(q, _spread(c, cuts, held)).reshape(x.shape)


# --- products --------------------------------------------------------------------------------------------------------

_EMULATING = ContextVar("hbfp_emulating", default=False)


def emulating() -> bool:
    """Whether an emulated product is being computed here: its float operators are that product and no others."""
    return _EMULATING.get()


@contextmanager
def _in_float32(device: torch.device) -> Iterator[None]:
    """float32 products in float32: without autocasting, TF32 and bfloat16 (see the top of this file)."""
    if is_compiling():
        yield
        return
    token = _EMULATING.set(True)
    backends = torch.backends
    settings = (
        backends.cuda.matmul,
        backends.cudnn.conv,  # type: ignore[attr-defined]
        backends.mkldnn.matmul,  # type: ignore[attr-defined]
        backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    before = [(setting, setting.fp32_precision) for setting in settings]
    reduced = [pair for pair in before if pair[1] not in ("ieee", "none")]
    try:
        for setting, _ in reduced:
            setting.fp32_precision = "ieee"
        with ExitStack() as stack:
            if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            yield
    finally:
        for setting, precision in reduced:
            setting.fp32_precision = precision
        _EMULATING.reset(token)


def _record(
    macs: int,
    formats: Formats,
    name: str,
    source: object,
    stream: int,
    operands: Callable[[], tuple[ops.Operand, ...]],
) -> None:
    if ops.recorders and not is_compiling():
        ops.tell(ops.Product(name, source, macs, *formats, stream, operands))


def _one_device(*tensors: Tensor | None) -> None:
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        raise DTypeError(f"expected the operands of a product on one device; found {found}: move one with .to(device)")


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """left [..., M, K] times right [..., K, N], decoded operands, plus bias [N], all in float32 on their device.

    Told to no recorder. `out`: where the result is to stand.
    """
    with _in_float32(left.device):
        out = torch.matmul(left, right, out=out)
    return out if bias is None else out.add_(_float32(bias))


def product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: Formats,
    roundings: Pair = (0, 0),
    seed: int = 0,
    streams: Pair = (0, 0),
    bias: Tensor | None = None,
    *,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The product of two tensors, each encoded along its own reduction axis, summed in float32 by the device.

    Shapes, args and result: those of `ops.product`. The codes are the same, the sums are not bound to be.

    Raises:
        ShapeError: the shapes do not fit; FormatError: the formats cut the reduction at different places;
        DTypeError: a tensor is not real and dense, or they are on several devices.
    """
    shape = ops.product_shape(a, a_axis, b, b_axis)
    depth = a.shape[a_axis]
    if depth != b.shape[b_axis] or (bias is not None and tuple(bias.shape) != (shape[-1],)):
        found = "" if bias is None else f" and bias {tuple(bias.shape)}"
        raise ShapeError(
            f"expected operands of one reduction and a bias of one number a column; found {tuple(a.shape)} reduced "
            f"along {a_axis}, {tuple(b.shape)} along {b_axis}{found}"
        )
    _one_device(a, b, bias)
    _check_cuts(formats, depth)
    # The rows of a batch that one matrix serves are those of one matrix, as in `ops.product`.
    rows = a.flatten(0, -2) if a.dim() > 2 and b.dim() == 2 else a
    left = quantize(rows, formats[0], a_axis, roundings[0], seed, streams[0]).reshape(a.shape)
    right = quantize(b, formats[1], b_axis, roundings[1], seed, streams[1])
    out = multiply(left if a_axis == -1 else left.mT, right if b_axis == -2 else right.mT, bias)
    operands = ops.product_operands(a, a_axis, b, b_axis, formats, roundings, seed, streams)
    _record(out.numel() * depth, formats, name, source, streams[0], operands)
    return out


def _check_cuts(formats: Formats, depth: int) -> None:
    left, right = (min(format.tile or format.block or depth, depth) for format in formats)
    if left != right:
        raise FormatError(
            f"the operands of a product must be cut alike along its reduction; found {formats[0]} and {formats[1]} "
            f"for {depth} elements: give both the same block or tile"
        )


# --- what stands between products ------------------------------------------------------------------------------------


def softmax(
    scores: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None, *, reuse: bool = False
) -> Tensor:
    """Row softmax of scale * scores (+ mask) by the device's exponential; see `ops.softmax`."""
    x = scores.to(torch.float32) * scale
    if mask is not None:
        x = x.add_(mask)
    if causal:
        rows, columns = x.shape[-2:]
        x = x.masked_fill_(torch.ones(rows, columns, dtype=torch.bool, device=x.device).triu_(1), float("-inf"))
    if x.shape[-1] == 0:
        return x
    p = torch.softmax(x, -1)
    # torch divides 0 by 0 where a row is masked everywhere.
    return p.masked_fill_(x.amax(-1, keepdim=True) == float("-inf"), 0.0)


def softmax_backward(p: Tensor, dp: Tensor, scale: float, *, reuse: bool = False) -> Tensor:
    """Gradient of `softmax` for its scores: scale * p * (dp - rowsum(p * dp))."""
    p, dp = p.to(torch.float32), dp.to(torch.float32)
    return (dp - (p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)


def dropout(x: Tensor, dropped: int, word: Tensor) -> Tensor:
    """The bits of `ops.dropout`, on the tensor's device."""
    x = x.to(torch.float32)
    kept = random_bits(x.shape, word, 0, x.device) >= dropped
    return torch.where(kept, x * (2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0), 0.0)


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [rows, n], in the device's order: [n]."""
    if x.dim() != 2:
        raise ShapeError(f"column sums are taken of a matrix [rows, n]; found shape {tuple(x.shape)}")
    return _float32(x).sum(0)


# --- convolutions ----------------------------------------------------------------------------------------------------


_CONV = conv1d, conv2d, conv3d
_CONV_TRANSPOSE = conv_transpose1d, conv_transpose2d, conv_transpose3d


def convolution(
    x: Tensor,
    w: Tensor,
    formats: Formats,
    roundings: Pair,
    seed: int,
    streams: Pair,
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    outputs: Sequence[int] | None = None,
    name: str = "forward",
    source: object = None,
) -> Tensor:
    """Y [N, Co, *So] of X [N, C, *S] (left) and W [Co, C/g, *k] (right), plus bias [Co], in float32 by the device.

    With `outputs`, only the first so many pixels of each dimension. The codes are those of spec 6.14 or, with
    `geometry.flatten`, of 6.16; the sums are the device's. A NaN block that meets padding alone shows as far as the
    device multiplies it.

    Raises:
        FormatError: blocks are no lines, or not of one length; ShapeError: the shapes do not fit;
        DTypeError: a tensor is not real and dense, or they are on several devices.
    """
    _check_convolution(x, "X", 1, w.shape[1] * geometry.groups, w, formats, geometry)
    _one_device(x, w, bias)
    if geometry.flatten:
        out = _patches_product(x, w, formats, roundings, seed, streams, geometry)
    else:
        # Padding is of zeros, which encode to zeros; the blocks' places and the random bits are the tensor's own.
        left = pad(_channels(x, formats[0], roundings[0], seed, streams[0], geometry.groups), _around(geometry))
        right = quantize(w, formats[1], 1, roundings[1], seed, streams[1])
        with _in_float32(x.device):
            out = _CONV[w.dim() - 3](left, right, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    if outputs is not None:
        for d, size in enumerate(outputs):
            out = out.narrow(d + 2, 0, size)
    operands = ops.forward_operands(x, w, formats, roundings, seed, streams, geometry)
    _record(out.numel() * w.shape[1] * prod(geometry.kernel), formats, name, source, streams[0], operands)
    return out if bias is None else out.add_(_float32(bias).view(-1, *(1,) * (w.dim() - 2)))


def convolution_input_gradient(
    dy: Tensor,
    w: Tensor,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Pair,
    seed: int,
    streams: Pair,
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    name: str = "input gradient",
    source: object = None,
) -> Tensor:
    """dX [N, C, *spatial] of dY [N, Co, *So] (left) and W [Co, C/g, *k] (right), plus bias [C].

    Raises: as `convolution`.
    """
    groups = geometry.groups
    _check_convolution(dy, "dY", 1, w.shape[0], w, formats, geometry)
    _one_device(dy, w, bias)
    left = _channels(dy, formats[0], roundings[0], seed, streams[0], groups)
    grouped = w.unflatten(0, (groups, w.shape[0] // groups))
    right = quantize(grouped, formats[1], 1, roundings[1], seed, streams[1]).reshape(w.shape)
    with _in_float32(dy.device):
        met = _CONV_TRANSPOSE[w.dim() - 3](left, right, None, geometry.stride, 0, 0, groups, geometry.dilation)
    # From the pixels that some tap meets to those that there are: no padding, but what lies behind the last tap.
    edges = []
    for size, natural, (before, _) in zip(spatial, met.shape[2:], geometry.padding, strict=True):
        edges.append((-before, size + before - natural))
    out = pad(met, [edge for pair in reversed(edges) for edge in pair])
    operands = ops.input_gradient_operands(dy, w, formats, roundings, seed, streams, geometry)
    _record(dy.numel() * w.shape[1] * prod(geometry.kernel), formats, name, source, streams[0], operands)
    return out if bias is None else out.add_(_float32(bias).view(-1, *(1,) * (w.dim() - 2)))


def convolution_weight_gradient(
    dy: Tensor,
    x: Tensor,
    formats: Formats,
    roundings: Pair,
    seed: int,
    streams: Pair,
    *,
    geometry: Geometry,
    name: str = "weight gradient",
    source: object = None,
) -> Tensor:
    """dW [Co, C/g, *k] of dY [N, Co, *So] (left) and X [N, C, *S] (right), each blocked along the batch.

    Raises: as `convolution`.
    """
    rank, groups = len(geometry.kernel), geometry.groups
    if dy.dim() != rank + 2 or x.dim() != rank + 2 or dy.shape[0] != x.shape[0]:
        raise ShapeError(
            f"expected dY and X of one batch with {rank} spatial dimensions; found {tuple(dy.shape)} and "
            f"{tuple(x.shape)}"
        )
    _one_device(dy, x)
    _check_lines(formats)
    left = quantize(dy, formats[0], 0, roundings[0], seed, streams[0])
    right = pad(quantize(x, formats[1], 0, roundings[1], seed, streams[1]), _around(geometry))
    for d in range(rank):
        # Some routines insist on no more pixels than the taps of dY reach.
        reach = (dy.shape[d + 2] - 1) * geometry.stride[d] + geometry.dilation[d] * (geometry.kernel[d] - 1) + 1
        right = right.narrow(d + 2, 0, reach)
    like = right.new_empty(()).expand(dy.shape[1], x.shape[1] // groups, *geometry.kernel)
    with _in_float32(dy.device):
        _, dw, _ = torch.ops.aten.convolution_backward(
            left, right, like, None, geometry.stride, [0] * rank, geometry.dilation, False, [0] * rank, groups,
            [False, True, False],
        )  # fmt: skip
    operands = ops.weight_gradient_operands(dy, x, formats, roundings, seed, streams)
    _record(dy.numel() * like.shape[1] * prod(geometry.kernel), formats, name, source, streams[0], operands)
    out: Tensor = dw
    return out


def _check_lines(formats: Formats) -> None:
    if any(format.block is None for format in formats) or formats[0].block != formats[1].block:
        raise FormatError(
            "convolutions take formats whose blocks are lines of one length, for neither tiles nor whole tensors "
            f"begin anew at a tap; found {formats[0]} and {formats[1]}: choose such as hbfp4b64"
        )


def _check_convolution(
    x: Tensor, called: str, axis: int, channels: int, w: Tensor, formats: Formats, geometry: Geometry
) -> None:
    _check_lines(formats)
    rank = len(geometry.kernel)
    fits = w.dim() == rank + 2 == x.dim() and tuple(w.shape[2:]) == tuple(geometry.kernel)
    if not fits or x.shape[axis] != channels or w.shape[0] % geometry.groups:
        raise ShapeError(
            f"expected {called} with {channels} channels and {rank} spatial dimensions and a weight with a kernel "
            f"{geometry.kernel} whose rows {geometry.groups} groups divide; found {tuple(x.shape)} and {tuple(w.shape)}"
        )


def _around(geometry: Geometry) -> list[int]:
    """The padding as `pad` takes it: the last dimension first."""
    return [size for pair in reversed(geometry.padding) for size in pair]


def _channels(x: Tensor, format: HBFP, rounding: int, seed: int, stream: int, groups: int) -> Tensor:
    """x [N, C, ...] on the grid of blocks along the channels of each group."""
    grouped = x.unflatten(1, (groups, x.shape[1] // groups))
    return quantize(grouped, format, 2, rounding, seed, stream).reshape(x.shape)


def _patches_product(
    x: Tensor, w: Tensor, formats: Formats, roundings: Pair, seed: int, streams: Pair, geometry: Geometry
) -> Tensor:
    """Y where blocks run over the patch, taps row-major and in each the channels of the group (6.16)."""
    groups = geometry.groups
    patches = ops.patches(_float32(x), geometry)
    left = quantize(patches, formats[0], -1, roundings[0], seed, streams[0])
    # The weight is cut in the order of the patch, and draws the bits of its own.
    r = random_bits(w.shape, seed, streams[1], w.device) if roundings[1] == _STOCHASTIC else None
    rows, drawn = (None if t is None else t.movedim(1, -1).flatten(1) for t in (w, r))
    assert rows is not None
    right = quantize(rows, formats[1], -1, roundings[1], seed, streams[1], bits=drawn)
    right = right.unflatten(0, (groups, w.shape[0] // groups))
    of_groups = multiply(left.flatten(2, -2), right.mT)  # [N, g, pixels, Co/g]
    return of_groups.mT.reshape(x.shape[0], w.shape[0], *patches.shape[2:-1])
