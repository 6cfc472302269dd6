"""Right operands that are encoded once and held as codes: laid out for the kernels, or as the two planes of a file.

*Panels* are one uint8 tensor in the order of this machine's kernels, which read 4-bit codes from it as they are; they
serve matrices blocked along their last axis, and the kernels of convolutions, in lines of at most 8 bits. Everything
else is held as planes (docs/spec.md, section 7), which a product lays out at each call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.compiler import is_compiling

from hbfp import _core
from hbfp.format import HBFP
from hbfp.ops.entrance import (
    LIBRARY,
    WORD,
    crossed,
    crossing,
    dispatch_modes,
    float32,
    format_of,
    operator,
    signed,
    threads,
)

KeptMatrix = _core.KeptMatrix
"""Panels of a matrix [lines, k], and what they are: `KeptMatrix(panels, format.core, lines, k)`."""


KeptKernel = _core.KeptKernel
"""Panels of a kernel, and what they are: `KeptKernel(panels, format.core, kernel_shape(shape), axis, groups)`."""


ResidualStream = _core.Residual
"""What `hbfp.nn.residual.Residual` calls."""


def bytes_of(plane: NDArray[np.uint8]) -> Tensor:
    """A plane as a tensor that shares its memory, which nobody may write to: it may be that of a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(plane)


def bytes_in(x: Tensor) -> NDArray[np.uint8]:
    """A plane as an array that shares the tensor's memory."""
    # Not `tensor.numpy()`, which would mark the storage as not resizable.
    array: Any = np.from_dlpack(x)
    return cast(NDArray[np.uint8], array)


def panel_sizes(format: HBFP, lines: int, k: int) -> tuple[int, int, int] | None:
    """Panels of a matrix [lines, k], bytes of a panel and lines of a panel. None: the format has none.

    A tensor of panels has one byte more for each panel, behind all of them.
    """
    sizes = _core.kept_panels(format.core, lines, k)
    return None if sizes is None else (sizes[0], sizes[1], sizes[2])


def panels_of_floats(x: Tensor, format: HBFP, rounding: int) -> Tensor | None:
    """Panels of a matrix [N, K], encoded along K; None: the format has none. Rounding as the core numbers it."""
    panels: Tensor | None = _core.keep(_core.Floats(float32(x), -1, format.core, rounding), threads())
    return panels


def panels_of_planes(exponents: Tensor, mantissas: Tensor, format: HBFP, lines: int, k: int) -> Tensor | None:
    """Panels of a matrix [lines, k], blocked along k; None: the format has none.

    Raises:
        CodeError: a plane holds what no encoder writes.
    """
    planes = _core.Planes(bytes_in(exponents), bytes_in(mantissas), format.core, (lines, k), -1)
    panels: Tensor | None = _core.keep(planes, threads())
    return panels


def planes_of_panels(panels: Tensor, format: HBFP, lines: int, k: int) -> tuple[Tensor, Tensor]:
    """Exponent and mantissa plane of a matrix [lines, k] in panels. Blocks of zeros get the exponent byte 0."""
    exponents, mantissas = _core.kept_planes(panels, format.core, lines, k)
    return torch.from_numpy(exponents), torch.from_numpy(mantissas)


def kernel_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """A kernel's shape [Co, C/g, *kernel] as the core takes it: [Co, C/g, taps]."""
    return shape[0], shape[1], prod(shape[2:])


def has_kernel_panels(format: HBFP, shape: Sequence[int], axis: int, groups: int) -> bool:
    """Whether a kernel of this shape has panels, for products of a convolution with so many groups along `axis`.

    None have those of fewer than 16 channels along the axis, and those along axis 0 whose blocks reach over the end of
    a group.
    """
    fits = axis in (0, 1) and 2 < len(shape) < 6 and groups > 0
    return fits and _core.kept_kernel_bytes(format.core, kernel_shape(shape), axis, groups) is not None


def kernel_panels_of_planes(
    exponents: Tensor, mantissas: Tensor, format: HBFP, shape: Sequence[int], axis: int, groups: int
) -> Tensor | None:
    """Panels of a kernel [Co, C/g, *kernel]; None: it has none. Arguments as of `has_kernel_panels`.

    Raises:
        CodeError: a plane holds what no encoder writes.
    """
    planes = bytes_in(exponents), bytes_in(mantissas)
    panels: Tensor | None = _core.keep_kernel(*planes, format.core, kernel_shape(shape), axis, groups, threads())
    return panels


def planes_of_kernel_panels(
    panels: Tensor, format: HBFP, shape: Sequence[int], axis: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Exponent and mantissa plane of a kernel in panels. Blocks of zeros get the exponent byte 0."""
    exponents, mantissas = KeptKernel(panels, format.core, kernel_shape(shape), axis, groups).planes()
    return torch.from_numpy(exponents), torch.from_numpy(mantissas)


def packed_product(
    x: Tensor,
    formats: tuple[HBFP, HBFP],
    rounding: int,
    seed: int,
    stream: int,
    codes: Tensor,
    exponents: Tensor | None,
    lines: int,
    bias: Tensor | None,
) -> Tensor:
    """x [..., K] times the transpose of a packed [lines, K], plus bias: the bits of `product` with what was packed.

    Args:
        formats: of x and of the codes.
        rounding, seed, stream: how x is encoded.
        codes, exponents: panels and None, or the mantissa and the exponent plane.
    """
    numbers, drawn = crossing((stream,))
    out: Tensor = torch.ops.hbfp.packed_product(
        x, str(formats[0]), rounding, numbers[0], codes, exponents, str(formats[1]), lines, signed(seed), bias, drawn
    )
    return out


def decode(
    codes: Tensor, exponents: Tensor | None, format: HBFP, shape: Sequence[int], axis: int, groups: int = 0
) -> Tensor:
    """What packed codes stand for, float32 of `shape`.

    Args:
        codes, exponents: as of `packed_product`.
        axis: of the blocks.
        groups: of the convolution whose kernel lies in the panels; 0: a matrix does.
    """
    if is_compiling() or dispatch_modes() or type(codes) is not Tensor or codes.is_meta:
        out: Tensor = torch.ops.hbfp.decode(codes, exponents, str(format), list(shape), axis, groups)
        return out
    return cast(Tensor, decode_here(codes, exponents, str(format), shape, axis, groups))


# --- behind torch's dispatcher ---------------------------------------------------------------------------------------


@operator(
    "packed_product(Tensor x, str x_format, int x_rounding, SymInt x_stream, Tensor codes, Tensor? exponents, "
    "str format, SymInt lines, SymInt seed, Tensor? bias, Tensor[]? streams=None) -> Tensor"
)
def _packed_product_kernel(
    x: Tensor,
    x_format: str,
    x_rounding: int,
    x_stream: int,
    codes: Tensor,
    exponents: Tensor | None,
    format: str,
    lines: int,
    seed: int,
    bias: Tensor | None,
    streams: list[Tensor] | None = None,
) -> Tensor:
    (stream,) = crossed((x_stream,), streams)
    if exponents is None:
        matrix = KeptMatrix(codes, format_of(format).core, lines, x.shape[-1])
        quick: Tensor | None = matrix.linear(
            x, format_of(x_format).core, x_rounding, seed & WORD, stream, bias, threads()
        )
        if quick is not None:
            return quick
    rows = float32(x).reshape(prod(x.shape[:-1]), x.shape[-1])
    out = torch.empty(*x.shape[:-1], lines, dtype=torch.float32, device="cpu")
    target = out.view(rows.shape[0], lines)
    left = _core.Floats(rows, -1, format_of(x_format).core, x_rounding, seed & WORD, stream)
    added = None if bias is None else float32(bias).contiguous()
    core = format_of(format).core
    if exponents is None:
        _core.kept_product(left, codes, core, target, threads(), added)
    else:
        right = _core.Planes(bytes_in(exponents), bytes_in(codes), core, (lines, x.shape[-1]), -1)
        _core.product(left, right, target, added, False, threads())
    return out


@operator("decode(Tensor codes, Tensor? exponents, str format, SymInt[] shape, int axis, int groups=0) -> Tensor")
def decode_here(
    codes: Tensor, exponents: Tensor | None, format: str, shape: Sequence[int], axis: int, groups: int = 0
) -> Tensor:
    """`decode` of tensors that nobody traces."""
    known = format_of(format)
    if exponents is None and groups == 0:
        lines = prod(shape[:-1])
        planes = _core.kept_planes(codes, known.core, lines, shape[-1])
        held: tuple[int, ...] = (lines, shape[-1])
        axis = 1
    else:
        if exponents is None:
            planes = KeptKernel(codes, known.core, kernel_shape(shape), axis, groups).planes()
        else:
            planes = bytes_in(exponents), bytes_in(codes)
        held, axis = known.core_layout(tuple(shape), axis)
    values: NDArray[Any] = _core.decode(*planes, known.core, held, axis, threads())
    return torch.from_numpy(values.reshape(tuple(shape)))


@torch.library.register_fake("hbfp::packed_product", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _packed_product_fake(
    x: Tensor,
    x_format: str,
    x_rounding: int,
    x_stream: int,
    codes: Tensor,
    exponents: Tensor | None,
    format: str,
    lines: int,
    seed: int,
    bias: Tensor | None,
    streams: list[Tensor] | None = None,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], lines], dtype=torch.float32)


@torch.library.register_fake("hbfp::decode", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _decode_fake(
    codes: Tensor, exponents: Tensor | None, format: str, shape: Sequence[int], axis: int, groups: int = 0
) -> Tensor:
    return codes.new_empty(list(shape), dtype=torch.float32)
