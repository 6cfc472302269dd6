"""The three products of a convolution (clauses 6.6 and 6.14 to 6.19), for any number of spatial dimensions.

Each is written as one product of two matrices: its operands are encoded once, as whole tensors, and then laid out as
lines along the reduction, a block of zeros wherever a kernel tap meets no pixel. The sums are those of every product.

Tensors are float32, X [N, C, *S], W [Co, C/g, *k] and dY [N, Co, *So]. `formats`, `roundings` and `streams` are pairs,
of the left operand and of the right one. `stride`, `padding`, `dilation` are one number, or one for each spatial
dimension; a padding may also be a pair, before and after. A transposed convolution of X [N, Ci, *S] with
W [Ci, Co/g, *k] is the same three products: its forward is `convolution_input_gradient` of X and W, its dX is
`convolution` of dY and W with `flatten=False`, and its dW is `convolution_weight_gradient` of X (as the left operand)
and dY.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp.reference.arithmetic import (
    BlockFormat,
    Encoded,
    Index,
    Lines,
    bias_gradient,
    encode,
    encode_with,
    product_of_lines,
    random_bits,
    row_and_column,
)

__all__ = [
    "convolution",
    "convolution_bias_gradient",
    "convolution_input_gradient",
    "convolution_weight_gradient",
]

Sizes: TypeAlias = int | Sequence[int]
Paddings: TypeAlias = int | Sequence[int | tuple[int, int]]
Formats: TypeAlias = tuple[BlockFormat, BlockFormat]
Roundings: TypeAlias = tuple[object, object]
Streams: TypeAlias = tuple[int, int]

FLATTENED_BELOW = 16
"""Channels of a group under which the forward blocks run over the flattened patch (6.6)."""


# ------------------------------------------------------------------------------------------------------------- geometry


class _Geometry:
    """Which input pixel each kernel tap of each output pixel reads."""

    def __init__(
        self, spatial: Index, kernel: Index, out: Index | None, stride: Sizes, padding: Paddings, dilation: Sizes
    ) -> None:
        """`out` None: as many output pixels as fit."""
        rank = len(spatial)
        strides, dilations = _for_each(stride, rank, "stride", 1), _for_each(dilation, rank, "dilation", 1)
        paddings = _paddings(padding, rank)
        spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        fitting = tuple(
            (size + sum(pad) - span) // s + 1
            for size, pad, span, s in zip(spatial, paddings, spans, strides, strict=True)
        )
        if min(fitting) < 1:
            raise ValueError(f"expected a kernel that fits the padded input; found kernel {kernel} and input {spatial}")
        if out is not None and any(size > most for size, most in zip(out, fitting, strict=True)):
            raise ValueError(f"expected at most {fitting} output pixels of input {spatial}; found {out}")
        self.spatial, self.kernel = spatial, kernel
        self.out: Index = fitting if out is None else out
        self.pixels, self.taps, self.out_pixels = math.prod(spatial), math.prod(kernel), math.prod(self.out)
        # Numbers of the input pixels, row-major; `pixels` itself stands for a place that is none.
        self.input_of = np.full((self.out_pixels, self.taps), self.pixels)
        # The same relation read from the input: the output pixel that a tap connects, if there is one.
        self.output_of = np.full((self.pixels, self.taps), self.out_pixels)
        for o, pixel in enumerate(np.ndindex(self.out)):
            for t, tap in enumerate(np.ndindex(kernel)):
                place = tuple(
                    i * s - pad[0] + k * d
                    for i, s, pad, k, d in zip(pixel, strides, paddings, tap, dilations, strict=True)
                )
                if all(0 <= p < size for p, size in zip(place, spatial, strict=True)):
                    number, _ = row_and_column((*place, 0), (*spatial, 1))
                    self.input_of[o, t] = number
                    self.output_of[number, t] = o


def _for_each(value: Sizes, rank: int, name: str, least: int) -> list[int]:
    sizes = [value] * rank if isinstance(value, int) else list(value)
    if len(sizes) != rank or any(size < least for size in sizes):
        raise ValueError(f"expected {name} as {rank} numbers of {least} or more; found {value}")
    return sizes


def _paddings(value: Paddings, rank: int) -> list[tuple[int, int]]:
    """Zeros before and after the pixels of each dimension."""
    each = [value] * rank if isinstance(value, int) else list(value)
    pairs = [(pad, pad) if isinstance(pad, int) else pad for pad in each]
    if len(pairs) != rank or any(pad < 0 for pair in pairs for pad in pair):
        raise ValueError(f"expected padding as {rank} numbers of 0 or more, or pairs of them; found {value}")
    return pairs


def _tensor(x: ArrayLike, name: str) -> NDArray[np.float32]:
    array: NDArray[Any] = np.asarray(x)
    if array.dtype != np.float32 or not 3 <= array.ndim <= 5:
        raise ValueError(
            f"expected {name} as float32 with 1 to 3 spatial dimensions after two others; "
            f"found {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array)


def _check_channels(w: NDArray[Any], groups: int, **tensors: tuple[NDArray[Any], int]) -> None:
    """That tensors have the channels and the number of dimensions that the weight says: name=(tensor, channels)."""
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(f"expected groups that divide the weight's {w.shape[0]} rows; found {groups}")
    for name, (tensor, channels) in tensors.items():
        if tensor.ndim != w.ndim or tensor.shape[1] != channels:
            raise ValueError(
                f"expected {name} with {channels} channels and {w.ndim - 2} spatial dimensions, as weight {w.shape} "
                f"with {groups} groups asks for; found {tensor.shape}"
            )


def _block(formats: Formats) -> int:
    """Elements of a block, of both operands."""
    for fmt in formats:
        if fmt.tile is not None or fmt.block is None:
            raise ValueError(
                f"expected formats whose blocks are lines, as convolutions have no tiles and no whole tensors; "
                f"found {fmt}: choose one such as hbfp{fmt.bits}b64"
            )
    left, right = (fmt.block for fmt in formats)
    if left is None or left != right:
        raise ValueError(f"expected two formats with one size of blocks; found {formats[0]} and {formats[1]}")
    return left


# --------------------------------------------------------------------------------------------------------------- layout


def _starts(segments: int, length: int, block: int) -> list[int]:
    """Where blocks begin along a reduction of segments of equal length, in each of which they begin anew."""
    return [segment * length + first for segment in range(segments) for first in range(0, length, block)]


def _grouped(x: NDArray[np.float32], axis: int, groups: int) -> NDArray[np.float32]:
    """The channels at `axis` as [groups, channels of a group]. Rows and columns of random bits stay what they were."""
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _flat_pixels(plane: NDArray[Any], spatial_dimensions: int) -> NDArray[Any]:
    """The spatial dimensions as one."""
    kept = plane.shape[: plane.ndim - spatial_dimensions]
    return plane.reshape(*kept, math.prod(plane.shape[len(kept) :]))


def _at_pixels(plane: NDArray[Any], spatial_dimensions: int, pixels: NDArray[Any]) -> NDArray[Any]:
    """The elements of the pixels numbered `pixels` [A, B], in [.., A, B]; the number after the last one reads zeros."""
    flat = _flat_pixels(plane, spatial_dimensions)
    return np.concatenate([flat, np.zeros((*flat.shape[:-1], 1), flat.dtype)], axis=-1)[..., pixels]


def _planes(operand: Encoded) -> tuple[NDArray[Any], NDArray[Any]]:
    return operand.mantissas, operand.exponents


def _pixel_lines(operand: Encoded, pixels: NDArray[Any]) -> Lines:
    """[N, g, channels, *spatial] as lines [g, N · A, (tap, channel)] for the pixels [A, taps]."""

    def lines(plane: NDArray[Any]) -> NDArray[Any]:
        n, g, channels = plane.shape[:3]
        met = _at_pixels(plane, plane.ndim - 3, pixels).transpose(1, 0, 3, 4, 2)
        return met.reshape(g, n * len(pixels), pixels.shape[1] * channels)

    return Lines(*map(lines, _planes(operand)))


def _batch_lines(operand: Encoded, groups: int, pixels: NDArray[Any]) -> Lines:
    """[N, channels, *spatial], blocked along N, as lines [g, (channel, tap), (pixel, n)] for the pixels [A, taps]."""

    def lines(plane: NDArray[Any]) -> NDArray[Any]:
        n, channels = plane.shape[:2]
        met = _at_pixels(plane, plane.ndim - 2, pixels).transpose(1, 3, 2, 0)
        return met.reshape(groups, channels // groups * pixels.shape[1], len(pixels) * n)

    return Lines(*map(lines, _planes(operand)))


# --------------------------------------------------------------------------------------------------------- the products


def convolution(
    x: ArrayLike,
    w: ArrayLike,
    bias: ArrayLike | None,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: Streams,
    *,
    stride: Sizes = 1,
    padding: Paddings = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    flatten: bool | None = None,
) -> NDArray[np.float32]:
    """Y [N, Co, *So] of X [N, C, *S] (left) and W [Co, C/g, *k] (right), plus bias [Co].

    Args:
        flatten: whether blocks run over the flattened patch (taps row-major, then channels) instead of the channels at
            one tap; None: where a group has fewer than 16 channels.
    """
    x, w = _tensor(x, "X"), _tensor(w, "W")
    _check_channels(w, groups, X=(x, w.shape[1] * groups))
    block, channels = _block(formats), w.shape[1]
    spatial, kernel = x.shape[2:], w.shape[2:]
    geometry = _Geometry(spatial, kernel, None, stride, padding, dilation)
    offset = None if bias is None else _bias(bias, w.shape[0])
    if channels < FLATTENED_BELOW if flatten is None else flatten:
        left = _patches(x, groups, geometry, formats[0], roundings[0], seed, streams[0])
        right = _flattened_weight(w, groups, formats[1], roundings[1], seed, streams[1])
        starts = _starts(1, geometry.taps * channels, block)
    else:
        encoded = encode(_grouped(x, 1, groups), formats[0], 2, roundings[0], seed, streams[0])
        left = _pixel_lines(encoded, geometry.input_of)
        taps = encode(w, formats[1], 1, roundings[1], seed, streams[1])

        def lines(plane: NDArray[Any]) -> NDArray[Any]:
            tapwise = _flat_pixels(plane, len(kernel)).swapaxes(1, 2)
            return tapwise.reshape(groups, w.shape[0] // groups, geometry.taps * plane.shape[1])

        right = Lines(*map(lines, _planes(taps)))
        starts = _starts(geometry.taps, channels, block)
    return _pixel_product(left, right, starts, offset, x.shape[0], geometry.out)


def _bias(bias: ArrayLike, channels: int) -> NDArray[np.float32]:
    array: NDArray[Any] = np.asarray(bias)
    if array.dtype != np.float32 or array.shape != (channels,):
        raise ValueError(f"expected the bias as float32 {(channels,)}; found {array.dtype} {array.shape}")
    return array


def _pixel_product(
    left: Lines, right: Lines, starts: list[int], bias: NDArray[np.float32] | None, n: int, spatial: Index
) -> NDArray[np.float32]:
    """The products of all groups, [g, N · pixels, channels], as [N, g · channels, *spatial]."""
    groups, channels = right.codes.shape[:2]
    y = np.zeros((groups, n * math.prod(spatial), channels), np.float32)
    for g in range(groups):
        offset = None if bias is None else bias[g * channels : (g + 1) * channels]
        y[g] = product_of_lines(Lines(*(p[g] for p in left)), Lines(*(p[g] for p in right)), starts, None, offset)
    parted = y.reshape(groups, n, math.prod(spatial), channels).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(parted).reshape(n, groups * channels, *spatial)


def _patches(
    x: NDArray[np.float32],
    groups: int,
    geometry: _Geometry,
    fmt: BlockFormat,
    rounding: object,
    seed: int,
    stream: int,
) -> Lines:
    """The patches as a tensor [N, g, *So, taps · C/g], encoded as such, in lines [g, N · pixels, ..]."""
    n, channels = x.shape[0], x.shape[1] // groups
    met = _at_pixels(_grouped(x, 1, groups), len(geometry.spatial), geometry.input_of).transpose(0, 1, 3, 4, 2)
    tensor = met.reshape(n, groups, *geometry.out, geometry.taps * channels)
    encoded = encode(tensor, fmt, -1, rounding, seed, stream)

    def lines(plane: NDArray[Any]) -> NDArray[Any]:
        return plane.swapaxes(0, 1).reshape(groups, n * geometry.out_pixels, plane.shape[-1])

    return Lines(*map(lines, _planes(encoded)))


def _flattened_weight(
    w: NDArray[np.float32], groups: int, fmt: BlockFormat, rounding: object, seed: int, stream: int
) -> Lines:
    """W in lines [g, Co/g, (tap, channel)], blocked across taps. Its random bits are those of W as it is held."""
    channels, kernel = w.shape[1], w.shape[2:]
    logical = list(np.ndindex(kernel))
    permuted = _flat_pixels(w, len(kernel)).swapaxes(1, 2).reshape(w.shape[0], len(logical) * channels)

    def random(index: Index) -> int:
        tap, channel = divmod(index[1], channels)
        return random_bits(*row_and_column((index[0], channel, *logical[tap]), w.shape), seed, stream)

    encoded = encode_with(permuted, fmt, -1, rounding, random)
    return Lines(*(plane.reshape(groups, w.shape[0] // groups, plane.shape[-1]) for plane in _planes(encoded)))


def convolution_input_gradient(
    dy: ArrayLike,
    w: ArrayLike,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: Streams,
    *,
    stride: Sizes = 1,
    padding: Paddings = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """dX [N, C, *spatial] of dY [N, Co, *So] (left) and W [Co, C/g, *k] (right), plus bias [C].

    A bias is for the transposed convolution, whose forward product this is; a gradient has none.
    """
    dy, w = _tensor(dy, "dY"), _tensor(w, "W")
    _check_channels(w, groups, dY=(dy, w.shape[0]))
    block, channels, taps = _block(formats), w.shape[0] // groups, math.prod(w.shape[2:])
    geometry = _Geometry(tuple(spatial), w.shape[2:], dy.shape[2:], stride, padding, dilation)
    encoded = encode(_grouped(dy, 1, groups), formats[0], 2, roundings[0], seed, streams[0])
    left = _pixel_lines(encoded, geometry.output_of)
    grouped = encode(_grouped(w, 0, groups), formats[1], 1, roundings[1], seed, streams[1])

    def lines(plane: NDArray[Any]) -> NDArray[Any]:
        tapwise = _flat_pixels(plane, w.ndim - 2).transpose(0, 2, 3, 1)
        return tapwise.reshape(groups, w.shape[1], taps * plane.shape[1])

    right = Lines(*map(lines, _planes(grouped)))
    offset = None if bias is None else _bias(bias, w.shape[1] * groups)
    return _pixel_product(left, right, _starts(taps, channels, block), offset, dy.shape[0], tuple(spatial))


def convolution_weight_gradient(
    dy: ArrayLike,
    x: ArrayLike,
    kernel: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: Streams,
    *,
    stride: Sizes = 1,
    padding: Paddings = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> NDArray[np.float32]:
    """dW [Co, C/g, *kernel] of dY [N, Co, *So] (left) and X [N, C, *S] (right)."""
    dy, x = _tensor(dy, "dY"), _tensor(x, "X")
    if dy.ndim != x.ndim or dy.shape[0] != x.shape[0]:
        raise ValueError(f"expected dY and X of one batch and one number of dimensions; found {dy.shape} and {x.shape}")
    if groups < 1 or dy.shape[1] % groups or x.shape[1] % groups:
        raise ValueError(f"expected groups that divide the channels of dY {dy.shape} and X {x.shape}; found {groups}")
    block, n = _block(formats), x.shape[0]
    geometry = _Geometry(x.shape[2:], tuple(kernel), dy.shape[2:], stride, padding, dilation)
    left = _batch_lines(
        encode(dy, formats[0], 0, roundings[0], seed, streams[0]), groups, np.arange(geometry.out_pixels)[:, None]
    )
    right = _batch_lines(encode(x, formats[1], 0, roundings[1], seed, streams[1]), groups, geometry.input_of)
    dw = product_of_lines(left, right, _starts(geometry.out_pixels, n, block))
    return dw.reshape(dy.shape[1], x.shape[1] // groups, *kernel)


def convolution_bias_gradient(dy: ArrayLike) -> NDArray[np.float32]:
    """[Co] of dY [N, Co, *So]: the column sums of its rows (n, pixel), in blocks of 64 rows."""
    dy = _tensor(dy, "dY")
    return bias_gradient(np.moveaxis(dy, 1, -1))
