"""Convolutions and their gradients; what a kernel meets is told by a `Geometry`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

from hbfp import _core
from hbfp.format import HBFP, Rounding
from hbfp.ops.entrance import (
    LIBRARY,
    ROUNDINGS,
    WORD,
    Formats,
    Operand,
    Product,
    Roundings,
    codings,
    crossed,
    crossing,
    direct,
    dispatch_modes,
    float32,
    format_of,
    numpy_of,
    operator,
    pairs,
    recorders,
    signed,
    tell,
    threads,
)
from hbfp.ops.packed import KeptKernel, decode_here, kernel_shape


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


CoreGeometry = _core.Geometry


@lru_cache(maxsize=1024)
def core_geometry(geometry: Geometry) -> CoreGeometry:
    """The same as the core takes it."""
    return _core.Geometry(
        geometry.groups, geometry.flatten, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation
    )


def _pixels(like: Tensor, channels: int, spatial: Sequence[int]) -> Tensor:
    """Memory for [N, channels, *spatial] of the samples of `like`, the channels of one pixel together."""
    # Strides of its own: autograd would refuse to change a permuted view in place, as activations do.
    strides = [channels]
    for size in reversed(spatial):
        strides.append(strides[-1] * size)
    sample, *inner = reversed(strides)
    return like.new_empty_strided((like.shape[0], channels, *spatial), (sample, 1, *inner), dtype=torch.float32)


# --- what recorders are told -----------------------------------------------------------------------------------------


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """What flattened forward blocks run over: [N, g, *So, K] of x [N, C, *S], K taps row-major, channels in each."""
    rank = len(geometry.kernel)
    taken: Tensor = pad(x, [size for pair in reversed(geometry.padding) for size in pair])
    for d in range(rank):
        span = geometry.dilation[d] * (geometry.kernel[d] - 1) + 1
        taken = taken.unfold(d + 2, span, geometry.stride[d])[..., :: geometry.dilation[d]]
    # [N, g, C/g, *So, *kernel] to [N, g, *So, (kernel, C/g)].
    taken = taken.unflatten(1, (geometry.groups, x.shape[1] // geometry.groups))
    return taken.movedim(2, -1).flatten(-rank - 1)


def _as_patches(weight: Tensor) -> Tensor:
    """W [Co, C/g, *kernel] in the order of patches: [Co, K]."""
    return weight.movedim(1, -1).flatten(1)


Operands = Callable[[], tuple[Operand, ...]]


def forward_operands(
    x: Tensor,
    w: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Operands:
    """X and W as the product that gives Y encodes them."""

    def operands() -> tuple[Operand, ...]:
        if geometry.flatten:
            taken = patches(x.detach().to(torch.float32), geometry)
            return (
                Operand(taken, formats[0], -1, roundings[0], seed, streams[0]),
                Operand(w, formats[1], -1, roundings[1], seed, streams[1], _as_patches),
            )
        return (
            Operand(_in_groups(x, 1, geometry), formats[0], 2, roundings[0], seed, streams[0]),
            Operand(w, formats[1], 1, roundings[1], seed, streams[1]),
        )

    return operands


def input_gradient_operands(
    dy: Tensor,
    w: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Operands:
    """dY and W as the product that gives dX encodes them."""

    def operands() -> tuple[Operand, ...]:
        return (
            Operand(_in_groups(dy, 1, geometry), formats[0], 2, roundings[0], seed, streams[0]),
            Operand(_in_groups(w, 0, geometry), formats[1], 1, roundings[1], seed, streams[1]),
        )

    return operands


def weight_gradient_operands(
    dy: Tensor | None, x: Tensor | None, formats: Formats, roundings: Roundings, seed: int, streams: tuple[int, int]
) -> Operands:
    """dY and X as the product that gives dW encodes them; None for one of which only its codes were kept."""

    def operands() -> tuple[Operand, ...]:
        return (
            Operand(dy, formats[0], 0, roundings[0], seed, streams[0]),
            Operand(x, formats[1], 0, roundings[1], seed, streams[1]),
        )

    return operands


def _in_groups(x: Tensor, axis: int, geometry: Geometry) -> Tensor:
    """`x` with the channels of `axis` in groups, in which blocks begin anew; the rows of random bits stay the same."""
    grouped: Tensor = x.unflatten(axis, (geometry.groups, x.shape[axis] // geometry.groups))
    return grouped


def _record_convolution(
    outputs: Sequence[int],
    weight: Sequence[int],
    formats: Formats,
    name: str,
    source: object,
    stream: int,
    operands: Operands,
) -> None:
    """Tells of one product of a convolution with these shapes, of Y and of the kernel.

    All three have the same number: every tap of every output pixel, whether it meets an input pixel or not.
    """
    macs = outputs[0] * prod(outputs[2:]) * prod(weight)
    tell(Product(name, source, macs, formats[0], formats[1], stream, operands))


# --- the products ----------------------------------------------------------------------------------------------------


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
    if direct(x, weight):
        out = _run_convolution(x, weight, formats, roundings, seed, streams, bias, geometry, spatial)
    else:
        out = torch.ops.hbfp.convolution(
            x, weight, bias, *_crossing(formats, roundings, seed, streams, geometry), geometry.flatten, spatial
        )
    if recorders and not is_compiling():
        operands = forward_operands(x, weight, formats, roundings, seed, streams, geometry)
        _record_convolution(out.shape, weight.shape, formats, name, source, streams[0], operands)
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
    if direct(dy, weight):
        out = _run_convolution_input_gradient(dy, weight, spatial, formats, roundings, seed, streams, bias, geometry)
    else:
        out = torch.ops.hbfp.convolution_input_gradient(
            dy, weight, bias, *_crossing(formats, roundings, seed, streams, geometry), list(spatial)
        )
    if recorders and not is_compiling():
        operands = input_gradient_operands(dy, weight, formats, roundings, seed, streams, geometry)
        _record_convolution(dy.shape, weight.shape, formats, name, source, streams[0], operands)
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
    if direct(dy, x):
        out = _run_convolution_weight_gradient(dy, x, formats, roundings, seed, streams, geometry)
    else:
        out = torch.ops.hbfp.convolution_weight_gradient(dy, x, *_crossing(formats, roundings, seed, streams, geometry))
    if recorders and not is_compiling():
        operands = weight_gradient_operands(dy, x, formats, roundings, seed, streams)
        _record_convolution(dy.shape, out.shape, formats, name, source, streams[0], operands)
    return out


def quick_convolution(
    x: Tensor,
    weight: Tensor | KeptKernel,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: CoreGeometry,
    spatial: Sequence[int] | None = None,
) -> Tensor | None:
    """`convolution`, or with `spatial` `convolution_input_gradient`, in one call of the core, told to no recorder; None
    where anything is not as usual, errors included.

    Not for code that torch.compile traces.
    """
    if dispatch_modes() or x.layout is not torch.strided:
        return None
    left, right = formats
    coded = (left.core, roundings[0], streams[0]), (right.core, roundings[1], streams[1])
    image = channels_together(x)
    out: Tensor | None = _core.tensor_convolution(image, weight, coded, geometry, spatial, bias, seed, threads())
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
        numpy_of(x), numpy_of(weight), None if bias is None else numpy_of(bias), formats, _named(roundings), seed,
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
        numpy_of(dy), numpy_of(weight), tuple(spatial), formats, _named(roundings), seed, streams,
        **_for_oracle(geometry), bias=None if bias is None else numpy_of(bias),
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
        numpy_of(dy), numpy_of(x), geometry.kernel, formats, _named(roundings), seed, streams,
        **_for_oracle(geometry),
    )  # fmt: skip
    return torch.from_numpy(dw)


def _named(roundings: Roundings) -> tuple[Rounding, Rounding]:
    return ROUNDINGS[roundings[0]], ROUNDINGS[roundings[1]]


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
    if direct(x, weight):
        out = _oracle_convolution(x, weight, formats, roundings, seed, streams, bias, geometry, spatial)
    else:
        out = torch.ops.hbfp.reference_convolution(
            x, weight, bias, *_crossing(formats, roundings, seed, streams, geometry), geometry.flatten, spatial
        )
    if recorders and not is_compiling():
        operands = forward_operands(x, weight, formats, roundings, seed, streams, geometry)
        _record_convolution(out.shape, weight.shape, formats, name, source, streams[0], operands)
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
    if direct(dy, weight):
        out = _oracle_input_gradient(dy, weight, spatial, formats, roundings, seed, streams, bias, geometry)
    else:
        out = torch.ops.hbfp.reference_convolution_input_gradient(
            dy, weight, bias, *_crossing(formats, roundings, seed, streams, geometry), spatial
        )
    if recorders and not is_compiling():
        operands = input_gradient_operands(dy, weight, formats, roundings, seed, streams, geometry)
        _record_convolution(dy.shape, weight.shape, formats, name, source, streams[0], operands)
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
    if direct(dy, x):
        out = _oracle_weight_gradient(dy, x, formats, roundings, seed, streams, geometry)
    else:
        out = torch.ops.hbfp.reference_convolution_weight_gradient(
            dy, x, *_crossing(formats, roundings, seed, streams, geometry)
        )
    if recorders and not is_compiling():
        operands = weight_gradient_operands(dy, x, formats, roundings, seed, streams)
        _record_convolution(dy.shape, out.shape, formats, name, source, streams[0], operands)
    return out


# --- convolutions as the core takes them: images [N, p0, p1, p2, C], three pixel dimensions always -------------------


_TOGETHER = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_together(x: Tensor) -> Tensor:
    """x [N, C, *S] with the channels of one pixel side by side in memory; a copy only where they are not."""
    together = _TOGETHER.get(x.dim())
    if together is not None:  # a faster copy than that of a permuted tensor
        return x.contiguous(memory_format=together)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _image(x: Tensor) -> Tensor:
    """x [N, C, *S] with the channels of one pixel together; a copy only where they are not."""
    image = channels_together(float32(x)).movedim(1, -1)
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
    weight = float32(weight)
    return weight[(slice(None), slice(None), *(None,) * (5 - weight.dim()))] if weight.dim() < 5 else weight


def _in_one_call(
    x: Tensor,
    weight: Tensor | KeptKernel,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
    spatial: Sequence[int] | None = None,
) -> Tensor | None:
    """`quick_convolution` of tensors of any dtype and layout in memory, whatever mode of dispatch there is."""
    out: Tensor | None = _core.tensor_convolution(
        channels_together(float32(x)), weight if isinstance(weight, KeptKernel) else float32(weight),
        codings(formats, roundings, streams), core_geometry(geometry), spatial,
        None if bias is None else float32(bias).contiguous(), seed, threads(),
    )  # fmt: skip
    return out


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
    if tuple(outputs) == geometry.outputs(x.shape[2:]):
        quick = _in_one_call(x, weight, formats, roundings, seed, streams, bias, geometry)
        if quick is not None:
            return quick
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
        codings(formats, roundings, streams), geometry.flatten, None if bias is None else float32(bias).contiguous(),
        seed, threads(), None if keep is None else (keep[0].core, keep[1], keep[2]),
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
    quick = _in_one_call(dy, weight, formats, roundings, seed, streams, bias, geometry, spatial)
    if quick is not None:
        return quick
    return _run_input_gradient_keeping(dy, weight, spatial, formats, roundings, seed, streams, bias, geometry, None)[0]


def _run_input_gradient_keeping(
    dy: Tensor,
    weight: Tensor,
    spatial: Sequence[int],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    geometry: Geometry,
    keep: tuple[HBFP, int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    out = _pixels(dy, weight.shape[1] * geometry.groups, spatial)
    kept = _core.convolution_input_gradient(
        _image(dy), _kernel(weight), _image(out), _convolution_sizes(geometry, spatial, dy.shape[2:]),
        codings(formats, roundings, streams), None if bias is None else float32(bias).contiguous(), seed, threads(),
        None if keep is None else (keep[0].core, keep[1], keep[2]),
    )  # fmt: skip
    return out, kept


def _run_convolution_weight_gradient(
    dy: Tensor,
    x: Tensor,
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    return _weight_gradient(dy, x, (dy.shape, x.shape), formats, roundings, seed, streams, geometry)


def _weight_gradient(
    dy: Tensor,
    x: Tensor,
    shapes: tuple[Sequence[int], Sequence[int]],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    """`shapes`: of dY and X, of which a uint8 tensor holds what was kept."""
    (batch, outs, *outputs), (_, channels, *inputs) = shapes
    groups, taps = geometry.groups, prod(geometry.kernel)
    kept = [image.dtype is torch.uint8 for image in (dy, x)]
    left, right = (image if codes else _image(image) for image, codes in zip((dy, x), kept, strict=True))
    out = torch.empty(groups, taps, channels // groups, outs // groups, dtype=torch.float32, device="cpu")
    _core.convolution_weight_gradient(
        left, right, kept, batch, [outs, channels], out, _convolution_sizes(geometry, inputs, outputs),
        codings(formats, roundings, streams), seed, threads(),
    )  # fmt: skip
    return out.permute(0, 3, 2, 1).reshape(outs, channels // groups, *geometry.kernel)


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
    if not direct(x, weight):
        out = convolution(
            x, weight, formats, roundings, seed, streams, bias, geometry=geometry, name=name, source=source
        )
        return out, None
    outputs = geometry.outputs(x.shape[2:])
    out, kept = _run_convolution_keeping(x, weight, formats, roundings, seed, streams, bias, geometry, outputs, keep)
    if recorders:
        operands = forward_operands(x, weight, formats, roundings, seed, streams, geometry)
        _record_convolution(out.shape, weight.shape, formats, name, source, streams[0], operands)
    return out, kept


def convolution_input_gradient_keeping(
    dy: Tensor,
    weight: Tensor,
    spatial: Sequence[int],
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
    """`convolution_input_gradient`, which also keeps the codes along the batch of what stands in the place of dY.

    Args, returns: as for `convolution_keeping`.
    """
    arguments = dy, weight, spatial, formats, roundings, seed, streams, bias
    if not direct(dy, weight):
        return convolution_input_gradient(*arguments, geometry=geometry, name=name, source=source), None
    out, kept = _run_input_gradient_keeping(*arguments, geometry, keep)
    if recorders:
        operands = input_gradient_operands(dy, weight, formats, roundings, seed, streams, geometry)
        _record_convolution(dy.shape, weight.shape, formats, name, source, streams[0], operands)
    return out, kept


def kept_convolution_weight_gradient(
    dy: Tensor,
    x: Tensor,
    shapes: tuple[Sequence[int], Sequence[int]],
    formats: Formats,
    roundings: Roundings,
    seed: int,
    streams: tuple[int, int],
    *,
    geometry: Geometry,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """`convolution_weight_gradient` of what was kept.

    Args:
        dy, x: an image, or in place of x what `convolution_keeping` kept, in place of dy what
            `convolution_input_gradient_keeping` did.
        shapes: of dY [N, Co, *So] and of X [N, C, *S].
    """
    out = _weight_gradient(dy, x, shapes, formats, roundings, seed, streams, geometry)
    if recorders:
        left, right = (None if image.dtype is torch.uint8 else image for image in (dy, x))
        operands = weight_gradient_operands(left, right, formats, roundings, seed, streams)
        _record_convolution(shapes[0], out.shape, formats, name, source, streams[0], operands)
    return out


# --- behind torch's dispatcher ---------------------------------------------------------------------------------------


_CODED = (
    "str[] formats, int[] roundings, SymInt[] streams, Tensor[]? drawn, SymInt seed, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups"
)
"""How the arguments of `_crossing` are declared."""


def _crossing(
    formats: Formats, roundings: Roundings, seed: int, streams: tuple[int, int], geometry: Geometry
) -> tuple[Any, ...]:
    """Formats, random bits and geometry as a schema holds them; paddings before and after lie in one list."""
    return (
        [str(format) for format in formats], list(roundings), *crossing(streams), signed(seed),
        list(geometry.kernel), list(geometry.stride), [size for pair in geometry.padding for size in pair],
        list(geometry.dilation), geometry.groups,
    )  # fmt: skip


def _crossed(
    formats: list[str],
    roundings: list[int],
    streams: list[int],
    drawn: list[Tensor] | None,
    seed: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    flatten: bool = False,
) -> tuple[Formats, Roundings, int, tuple[int, int], Geometry]:
    """The same on the other side."""
    geometry = Geometry(tuple(kernel), tuple(stride), pairs(padding), tuple(dilation), groups, flatten)
    left, right = crossed(streams, drawn)
    return pairs(map(format_of, formats))[0], pairs(roundings)[0], seed & WORD, (left, right), geometry


def _behind_the_dispatcher(
    prefix: str,
    forward: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    weight_gradient: Callable[..., Tensor],
) -> None:
    """Registers three products, called like `_run_convolution` and its neighbours, as `hbfp::<prefix>convolution`, …"""

    @operator(
        f"{prefix}convolution(Tensor x, Tensor weight, Tensor? bias, {_CODED}, bool flatten, SymInt[] outputs) "
        "-> Tensor"
    )
    def forward_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *coded: Any) -> Tensor:
        formats, roundings, seed, streams, geometry = _crossed(*coded[:-1])
        return forward(x, weight, formats, roundings, seed, streams, bias, geometry, coded[-1])

    @operator(
        f"{prefix}convolution_input_gradient(Tensor dy, Tensor weight, Tensor? bias, {_CODED}, SymInt[] spatial) "
        "-> Tensor"
    )
    def input_gradient_kernel(dy: Tensor, weight: Tensor, bias: Tensor | None, *coded: Any) -> Tensor:
        formats, roundings, seed, streams, geometry = _crossed(*coded[:-1])
        return input_gradient(dy, weight, coded[-1], formats, roundings, seed, streams, bias, geometry)

    @operator(f"{prefix}convolution_weight_gradient(Tensor dy, Tensor x, {_CODED}) -> Tensor")
    def weight_gradient_kernel(dy: Tensor, x: Tensor, *coded: Any) -> Tensor:
        return weight_gradient(dy, x, *_crossed(*coded))

    @torch.library.register_fake(f"hbfp::{prefix}convolution", lib=LIBRARY)  # type: ignore[untyped-decorator]
    def forward_fake(x: Tensor, weight: Tensor, *coded: Any) -> Tensor:
        return _pixels(x, weight.shape[0], coded[-1])

    @torch.library.register_fake(f"hbfp::{prefix}convolution_input_gradient", lib=LIBRARY)  # type: ignore[untyped-decorator]
    def input_gradient_fake(dy: Tensor, weight: Tensor, *coded: Any) -> Tensor:
        groups, spatial = coded[-2:]
        return _pixels(dy, weight.shape[1] * groups, spatial)

    @torch.library.register_fake(f"hbfp::{prefix}convolution_weight_gradient", lib=LIBRARY)  # type: ignore[untyped-decorator]
    def weight_gradient_fake(dy: Tensor, x: Tensor, *coded: Any) -> Tensor:
        kernel, groups = coded[5], coded[-1]
        return dy.new_empty((dy.shape[1], x.shape[1] // groups, *kernel), dtype=torch.float32)


@operator(
    f"packed_convolution(Tensor x, Tensor codes, SymInt[] shape, Tensor? bias, {_CODED}, bool flatten, "
    "SymInt[] outputs) -> Tensor"
)
def _packed_convolution_kernel(
    x: Tensor, codes: Tensor, shape: Sequence[int], bias: Tensor | None, *coded: Any
) -> Tensor:
    formats, roundings, seed, streams, geometry = _crossed(*coded[:-1])
    outputs = tuple(coded[-1])
    kept = KeptKernel(codes, formats[1].core, kernel_shape(shape), 1, geometry.groups)
    if outputs == geometry.outputs(x.shape[2:]):
        quick = _in_one_call(x, kept, formats, roundings, seed, streams, bias, geometry)
        if quick is not None:
            return quick
    weight = decode_here(codes, None, str(formats[1]), shape, 1, geometry.groups)
    return _run_convolution(x, weight, formats, roundings, seed, streams, bias, geometry, outputs)


@operator(
    f"packed_convolution_input_gradient(Tensor dy, Tensor codes, SymInt[] shape, Tensor? bias, {_CODED}, "
    "SymInt[] spatial) -> Tensor"
)
def _packed_input_gradient_kernel(
    dy: Tensor, codes: Tensor, shape: Sequence[int], bias: Tensor | None, *coded: Any
) -> Tensor:
    formats, roundings, seed, streams, geometry = _crossed(*coded[:-1])
    kept = KeptKernel(codes, formats[1].core, kernel_shape(shape), 0, geometry.groups)
    quick = _in_one_call(dy, kept, formats, roundings, seed, streams, bias, geometry, coded[-1])
    if quick is not None:
        return quick
    weight = decode_here(codes, None, str(formats[1]), shape, 0, geometry.groups)
    return _run_convolution_input_gradient(dy, weight, coded[-1], formats, roundings, seed, streams, bias, geometry)


@torch.library.register_fake("hbfp::packed_convolution", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _packed_convolution_fake(x: Tensor, codes: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    return _pixels(x, shape[0], rest[-1])


@torch.library.register_fake("hbfp::packed_convolution_input_gradient", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _packed_input_gradient_fake(dy: Tensor, codes: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    *_, groups, spatial = rest
    return _pixels(dy, shape[1] * groups, spatial)


_behind_the_dispatcher("", _run_convolution, _run_convolution_input_gradient, _run_convolution_weight_gradient)
_behind_the_dispatcher("reference_", _oracle_convolution, _oracle_input_gradient, _oracle_weight_gradient)
