"""Differentiable convolutions, ordinary and transposed, whose backward passes are fixed-point products too.

The three products are those of docs/spec.md, 6.14 to 6.19; a transposed convolution has them with the parts exchanged.
Each operand adds its role to the stream, as in `hbfp.autograd`. Of X an ordinary convolution keeps its codes along the
batch. Tensors may lie in memory as they like; results have the channels of one pixel together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hbfp import emulation, ops
from hbfp.autograd import Role, keeps_codes, once, require_plain, unseen
from hbfp.backends import arithmetic
from hbfp.errors import FormatError, HBFPError, ShapeError
from hbfp.ops import Geometry
from hbfp.packed import PackedWeight
from hbfp.policy import Backend, Recipe

__all__ = [
    "FLATTENED_BELOW",
    "ConvolutionFunction",
    "Paddings",
    "Sizes",
    "TransposedConvolutionFunction",
    "convolution",
    "pad",
    "require_lines",
    "transposed_convolution",
]

Sizes = int | Sequence[int]
"""One number, or one for each spatial dimension."""
Paddings = str | int | Sequence[int]

FLATTENED_BELOW = 16
"""Channels of a group under which forward blocks run over the flattened patch, unless a layer says otherwise."""

# Bound once, and plain numbers, as in `hbfp.autograd`.
_INTEGER = Backend.INTEGER
_X, _W = int(Role.X_FORWARD), int(Role.W_FORWARD)
_DY_X, _W_X = int(Role.DY_FOR_DX), int(Role.W_FOR_DX)
_DY_W, _X_W = int(Role.DY_FOR_DW), int(Role.X_FOR_DW)


def _products(backend: Backend) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """The products that give Y, dX and dW of an ordinary convolution, as `backend` computes them."""
    if backend is Backend.INTEGER:
        return ops.convolution, ops.convolution_input_gradient, ops.convolution_weight_gradient
    if backend is Backend.EMULATE:
        return (
            emulation.convolution,
            emulation.convolution_input_gradient,
            emulation.convolution_weight_gradient,
        )
    return (
        ops.reference_convolution,
        ops.reference_convolution_input_gradient,
        ops.reference_convolution_weight_gradient,
    )


def _bias_gradient(dy: Tensor, recipe: Recipe) -> Tensor:
    """Sums over the rows (sample, pixel) of dY [N, Co, *So]: [Co]."""
    return arithmetic(recipe.backends.weight_gradient).column_sums(dy.movedim(1, -1).flatten(0, -2))


class ConvolutionFunction(torch.autograd.Function):
    """Y of X [N, C, *S], W [Co, C/g, *kernel] and bias [Co] or None; Y [N, Co, *So], float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        recipe: Recipe,
        seed: int,
        stream: int,
        source: object,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.geometry, ctx.spatial = geometry, x.shape[2:]
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        policy = recipe.forward
        streams = (stream | _X, stream | _W)
        kept = None
        if need_weight and keeps_codes(recipe, source, stream):
            later = recipe.weight_gradient
            out, kept = ops.convolution_keeping(
                x, weight, policy.formats, policy.roundings, seed, streams, bias,
                (later.formats[1], later.roundings[1], stream | _X_W),
                geometry=geometry, name="forward", source=source,
            )  # fmt: skip
        elif (quick := _by_codes(x, weight, bias, geometry, recipe, seed, stream)) is not None:
            out = quick
        else:
            out = _products(recipe.backends.forward)[0](
                x, weight, policy.formats, policy.roundings, seed, streams, bias,
                geometry=geometry, name="forward", source=source,
            )  # fmt: skip
        ctx.kept, ctx.shape = kept is not None, x.shape
        ctx.save_for_backward((x if kept is None else kept) if need_weight else None, weight if need_x else None)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        geometry, source = ctx.geometry, ctx.source
        recipe, seed, stream = ctx.recipe, ctx.seed, ctx.stream
        # Once for both products.
        dy = ops.channels_together(dy)
        dx = dweight = dbias = None
        if need_x:
            policy = recipe.input_gradient
            dx = _products(recipe.backends.input_gradient)[1](
                dy, weight, ctx.spatial, policy.formats, policy.roundings, seed, (stream | _DY_X, stream | _W_X),
                geometry=geometry, name="input gradient", source=source,
            )  # fmt: skip
        if need_weight and ctx.kept:
            policy = recipe.weight_gradient
            dweight = ops.kept_convolution_weight_gradient(
                dy, x, (dy.shape, ctx.shape), policy.formats, policy.roundings, seed, (stream | _DY_W, stream | _X_W),
                geometry=geometry, name="weight gradient", source=source,
            )  # fmt: skip
        elif need_weight:
            policy = recipe.weight_gradient
            dweight = _products(recipe.backends.weight_gradient)[2](
                dy, x, policy.formats, policy.roundings, seed, (stream | _DY_W, stream | _X_W),
                geometry=geometry, name="weight gradient", source=source,
            )  # fmt: skip
        if need_bias:
            dbias = _bias_gradient(dy, recipe)
        return dx, dweight, dbias, None, None, None, None, None


class TransposedConvolutionFunction(torch.autograd.Function):
    """Y of X [N, C, *S], W [C, Co/g, *kernel] and bias [Co] or None; Y [N, Co, *spatial], float32.

    The geometry is that of the ordinary convolution that leads from Y back to X. Its dX gives this one's Y, its Y this
    one's dX, and in its dW X and dY change places; formats, roundings and roles stay with the operands.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spatial: Sequence[int],
        geometry: Geometry,
        recipe: Recipe,
        seed: int,
        stream: int,
        source: object,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.geometry, ctx.shape = geometry, x.shape
        ctx.recipe, ctx.seed, ctx.stream, ctx.source = recipe, seed, stream, source
        policy = recipe.forward
        streams = (stream | _X, stream | _W)
        kept = None
        if need_weight and keeps_codes(recipe, source, stream):
            later = recipe.weight_gradient
            out, kept = ops.convolution_input_gradient_keeping(
                x, weight, spatial, policy.formats, policy.roundings, seed, streams, bias,
                (later.formats[1], later.roundings[1], stream | _X_W),
                geometry=geometry, name="forward", source=source,
            )  # fmt: skip
        elif (quick := _by_codes(x, weight, bias, geometry, recipe, seed, stream, spatial)) is not None:
            out = quick
        else:
            out = _products(recipe.backends.forward)[1](
                x, weight, spatial, policy.formats, policy.roundings, seed, streams, bias,
                geometry=geometry, name="forward", source=source,
            )  # fmt: skip
        ctx.kept = kept is not None
        ctx.save_for_backward((x if kept is None else kept) if need_weight else None, weight if need_x else None)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        geometry, source = ctx.geometry, ctx.source
        recipe, seed, stream = ctx.recipe, ctx.seed, ctx.stream
        # Once for both products.
        dy = ops.channels_together(dy)
        dx = dweight = dbias = None
        if need_x:
            policy = recipe.input_gradient
            # An output padding of a stride or more leaves room for pixels that X does not have.
            dx = _products(recipe.backends.input_gradient)[0](
                dy, weight, policy.formats, policy.roundings, seed, (stream | _DY_X, stream | _W_X),
                geometry=geometry, outputs=ctx.shape[2:], name="input gradient", source=source,
            )  # fmt: skip
        if need_weight:
            policy = recipe.weight_gradient
            formats, roundings, streams = policy.formats[::-1], policy.roundings[::-1], (stream | _X_W, stream | _DY_W)
            if ctx.kept:
                dweight = ops.kept_convolution_weight_gradient(
                    x, dy, (ctx.shape, dy.shape), formats, roundings, seed, streams,
                    geometry=geometry, name="weight gradient", source=source,
                )  # fmt: skip
            else:
                dweight = _products(recipe.backends.weight_gradient)[2](
                    x, dy, formats, roundings, seed, streams, geometry=geometry, name="weight gradient", source=source
                )
        if need_bias:
            dbias = _bias_gradient(dy, recipe)
        return dx, dweight, dbias, None, None, None, None, None, None


# --- the same as plain functions, with the checks that autograd's interface has no room for --------------------------


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    stride: Sizes,
    padding: Paddings,
    dilation: Sizes,
    groups: int,
    flatten: bool | None,
    recipe: Recipe,
    seed: int,
    stream: int,
    source: object = None,
) -> Tensor:
    """A convolution over `rank` spatial dimensions; see `hbfp.nn.functional.conv2d`."""
    if _goes_quickly(x, weight, bias, rank, recipe):
        kernel, flat = weight.shape[2:], weight.shape[1] < FLATTENED_BELOW if flatten is None else flatten
        try:
            known = _known_geometry(kernel, rank, stride, padding, dilation, groups, flat)
        except TypeError:  # lists, which have no hash: a layer has none
            sizes = map(_hashable, (stride, padding, dilation))
            known = _known_geometry(kernel, rank, *sizes, groups, flat)
        quick = _quickly(x, weight, bias, known, groups, recipe, seed, stream)
        if quick is not None:
            return quick
    ops.require_real(x, weight, bias)
    require_plain(x, weight, bias)
    require_lines(recipe)
    weight = _as_read(weight, 1, groups)
    _check(x, weight, bias, rank, groups, transposed=False)
    if flatten is None:
        flatten = weight.shape[1] < FLATTENED_BELOW
    geometry = _geometry(weight.shape[2:], rank, stride, padding, dilation, groups, flatten)
    batch = x if x.dim() == rank + 2 else x.unsqueeze(0)
    if min(geometry.outputs(batch.shape[2:])) < 1:
        raise ShapeError(
            f"expected a kernel that fits the padded input; found kernel {geometry.kernel}, dilation "
            f"{geometry.dilation}, padding {geometry.padding} and input {tuple(x.shape)}: pad more"
        )
    out: Tensor = ConvolutionFunction.apply(batch, weight, bias, geometry, recipe, seed, stream, source)
    return out if batch is x else out.squeeze(0)


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    stride: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    groups: int,
    dilation: Sizes,
    recipe: Recipe,
    seed: int,
    stream: int,
    source: object = None,
) -> Tensor:
    """A transposed convolution over `rank` spatial dimensions; see `hbfp.nn.functional.conv_transpose2d`."""
    ops.require_real(x, weight, bias)
    require_plain(x, weight, bias)
    require_lines(recipe)
    _check(x, weight, bias, rank, groups, transposed=True)
    kernel = tuple(weight.shape[2:])
    strides, dilations = _sizes(stride, rank, "stride", 1), _sizes(dilation, rank, "dilation", 1)
    pads, added = _sizes(padding, rank, "padding", 0), _sizes(output_padding, rank, "output_padding", 0)
    if any(size >= max(s, d) for size, s, d in zip(added, strides, dilations, strict=True)):
        raise ShapeError(
            f"expected an output_padding less than the stride or the dilation; found output_padding {added}, stride "
            f"{strides}, dilation {dilations}"
        )
    geometry = Geometry(kernel, strides, tuple((size, size) for size in pads), dilations, groups)
    batch = x if x.dim() == rank + 2 else x.unsqueeze(0)
    spatial = tuple(
        (size - 1) * s - 2 * p + d * (k - 1) + a + 1
        for size, s, p, d, k, a in zip(batch.shape[2:], strides, pads, dilations, kernel, added, strict=True)
    )
    if min(*batch.shape[2:], *spatial) < 1:
        raise ShapeError(
            f"expected pixels in input and output; found input {tuple(x.shape)}, which gives output pixels {spatial} "
            f"with kernel {kernel}, padding {pads}: pad less"
        )
    if _goes_quickly(batch, weight, bias, rank, recipe):
        quick = _quickly(batch, weight, bias, ops.core_geometry(geometry), groups, recipe, seed, stream, spatial)
        if quick is not None:
            return quick if batch is x else quick.squeeze(0)
    weight = _as_read(weight, 0, groups)
    out: Tensor = TransposedConvolutionFunction.apply(
        batch, weight, bias, spatial, geometry, recipe, seed, stream, source
    )
    return out if batch is x else out.squeeze(0)


def _geometry(
    kernel: Sequence[int],
    rank: int,
    stride: Sizes,
    padding: Paddings,
    dilation: Sizes,
    groups: int,
    flatten: bool,
) -> Geometry:
    kernel, strides, dilations = tuple(kernel), _sizes(stride, rank, "stride", 1), _sizes(dilation, rank, "dilation", 1)
    return Geometry(kernel, strides, _paddings(padding, kernel, strides, dilations), dilations, groups, flatten)


@lru_cache(maxsize=1024)
def _known_geometry(*arguments: Any) -> ops.CoreGeometry:
    """`_geometry` as the core takes it: what a layer has is the same at each call."""
    return ops.core_geometry(_geometry(*arguments))


def _hashable(sizes: Paddings) -> Paddings:
    return tuple(sizes) if type(sizes) is list else sizes


def _goes_quickly(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int, recipe: Recipe) -> bool:
    """Whether nobody but the caller sees the product."""
    return (
        recipe.backends.forward is _INTEGER
        and not ops.recorders
        and x.dim() == weight.dim() == rank + 2
        and unseen(x, weight, bias)
    )


def _quickly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ops.CoreGeometry,
    groups: int,
    recipe: Recipe,
    seed: int,
    stream: int,
    spatial: Sequence[int] | None = None,
) -> Tensor | None:
    """The forward product in one call of the core, by the codes of a packed weight as they lie; None where anything is
    not as usual, errors included."""
    policy = recipe.forward
    kernel: Tensor | ops.KeptKernel = weight
    if type(weight) is PackedWeight:
        kept = weight.kept_kernel(1 if spatial is None else 0, groups)
        if kept is None:
            return None
        kernel = kept
    streams = (stream | _X, stream | _W)
    return ops.quick_convolution(x, kernel, policy.formats, policy.roundings, seed, streams, bias, geometry, spatial)


def _by_codes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    recipe: Recipe,
    seed: int,
    stream: int,
    spatial: Sequence[int] | None = None,
) -> Tensor | None:
    """`_quickly` inside a node of autograd, for packed weights, which torch's dispatcher would be asked about twice."""
    if type(weight) is not PackedWeight or not _goes_quickly(x, weight, bias, geometry.rank, recipe):
        return None
    return _quickly(x, weight, bias, ops.core_geometry(geometry), geometry.groups, recipe, seed, stream, spatial)


def pad(x: Tensor, rank: int, padding: Sequence[int], mode: str) -> Tensor:
    """`x` padded by its own values, in float32: what a layer with such a padding takes for X (docs/spec.md, 6.15).

    Args:
        x: with or without a batch.
        padding: before and after the pixels, the last dimension first, as torch's function of the name takes it.
        mode: "reflect", "replicate" or "circular".

    Raises:
        ShapeError: the input has too few pixels, or another number of dimensions.
    """
    ops.require_real(x)
    if x.dim() not in (rank + 1, rank + 2):
        raise ShapeError(f"expected {rank} spatial dimensions after channels; found {tuple(x.shape)}")
    try:
        return torch.nn.functional.pad(x.to(torch.float32), list(padding), mode)
    except RuntimeError as error:
        raise ShapeError(f"padding {list(padding)} by mode {mode!r} does not fit {tuple(x.shape)}: {error}") from None


def require_lines(recipe: Recipe) -> None:
    """Raises FormatError where a format has no meaning for convolutions: tiles and whole tensors know no taps."""
    for product, policy in recipe.products.items():
        for format in policy.formats:
            if format.block is None:
                raise FormatError(
                    f"expected formats whose blocks are lines, as convolutions have no tiles and no whole tensors; "
                    f"found {format} ({product}): choose one such as hbfp{format.bits}b64"
                )


def _as_read(weight: Tensor, axis: int, groups: int) -> Tensor:
    """A weight as the forward product reads it: of codes that it cannot read, their values, made here and not behind
    torch's dispatcher, which is slow."""
    if type(weight) is not PackedWeight or is_compiling() or weight.kept_kernel(axis, groups) is not None:
        return weight
    return weight.decode_as_it_lies()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int, groups: int, *, transposed: bool) -> None:
    """That the tensors fit each other."""
    own = "[C, Co/g, kernel…]" if transposed else "[Co, C/g, kernel…]"
    if weight.dim() != rank + 2 or 0 in weight.shape:
        raise ShapeError(
            f"expected a weight {own} with {rank} spatial dimensions and no empty one; found {tuple(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ShapeError(f"expected groups that divide the weight's {weight.shape[0]} rows; found {groups}")
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if x.dim() not in (rank + 1, rank + 2) or x.shape[-rank - 1] != channels:
        raise ShapeError(
            f"expected an input [N, {channels}, …] or [{channels}, …] with {rank} spatial dimensions, as weight "
            f"{tuple(weight.shape)} with {groups} groups asks for; found {tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ShapeError(f"expected a bias of shape ({outputs},); found {tuple(bias.shape)}")


def _sizes(value: Sizes, rank: int, name: str, least: int) -> tuple[int, ...]:
    """One number for each dimension; as torch does, a sequence of one serves all."""
    sizes: tuple[Any, ...] = (value,) if isinstance(value, int) else tuple(value)
    if len(sizes) == 1:
        sizes *= rank
    if len(sizes) != rank or not all(isinstance(size, int) and size >= least for size in sizes):
        raise ShapeError(f"expected {name} as one number of {least} or more, or {rank} of them; found {value!r}")
    return sizes


def _paddings(
    padding: Paddings, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after the pixels of each dimension."""
    if not isinstance(padding, str):
        return tuple((size, size) for size in _sizes(padding, len(kernel), "padding", 0))
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding != "same":
        raise HBFPError(f"unknown padding {padding!r}: expected numbers, 'same' or 'valid'")
    if prod(stride) != 1:
        raise HBFPError(f"padding 'same' keeps the number of pixels, so the stride must be 1; found {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)
