"""torch's own 4-bit weights on the CPU: what `torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies by.

An element is (n - 8) · scale + zero, n an unsigned nibble, scale and zero bfloat16 for each group of 32, 64, 128 or 256
elements of a row (aten/src/ATen/native/cpu/int4mm_kernel.cpp, github.com/pytorch/pytorch). HBFP4 is that with scale =
2^s, -126 ≤ s ≤ 127, and zero = 0. The packed bytes are laid out for the CPU that packs them: they are no format to
store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hbfp.array import BlockArray
from hbfp.exports.lossless import Groups, array_of, groups_of, place, refuse
from hbfp.format import HBFP

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Int4Pack", "pack", "unpack"]

GROUPS = (256, 128, 64, 32)
ROWS = 16
LOWEST, HIGHEST = -126, 127  # normal bfloat16


class Int4Pack(NamedTuple):
    """A weight [N, K]; x @ weight.T is `torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)`
    with x bfloat16 [M, K]."""

    packed: Tensor
    """uint8 [N, K / 2], in an order that depends on the CPU."""
    group: int
    """Elements that share a scale: 32, 64, 128 or 256."""
    scales_and_zeros: Tensor
    """bfloat16 [K / group, N, 2]."""


def pack(array: BlockArray, name: str = "array") -> Int4Pack:
    """A weight for torch's CPU kernel, in the largest group that divides its blocks.

    Args:
        array: [N, K] of 2 to 4 bits, N a multiple of 16, blocked along K in a multiple of 32 (or one exponent for all
            of it), K a multiple of 32, every scale exponent s at least -126 where codes are not all zero.
        name: of the tensor, for messages.

    Raises:
        ExportError: the array does not fit.
        CodeError: the array was read from a file that holds forbidden codes.
    """
    import torch

    where = place(array, name)
    if array.ndim != 2 or not array.size or array.shape[0] % ROWS:
        refuse(where, "shape", f"[N, K] with N a multiple of {ROWS}", list(array.shape))
    columns = array.shape[1]
    block = array.format.tile or array.format.block or columns
    group = next((size for size in GROUPS if block % size == 0 and columns % size == 0), GROUPS[-1])
    codes, scales = groups_of(array, where, group, 4, LOWEST, HIGHEST, "int4pack")
    nibbles = torch.from_numpy((codes + 8).astype(np.int32).reshape(array.shape))
    scales_and_zeros = torch.zeros(columns // group, array.shape[0], 2, dtype=torch.bfloat16)
    scales_and_zeros[..., 0] = torch.from_numpy(scales.T.copy())
    return Int4Pack(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1), group, scales_and_zeros)


def unpack(parts: Int4Pack, name: str = "array", format: HBFP | str | None = None) -> BlockArray:
    """The weight that torch's kernel multiplies by, read by multiplying with unit vectors: K · K · N steps.

    Args:
        parts: packed on this kind of CPU.
        name: of the tensor, for messages.
        format: of the result, HBFP4 in blocks of the group if None. Another one must have all codes, and blocks of a
            multiple of the group whose scales agree.

    Raises:
        ExportError: a scale that is no power of two, a zero other than 0, the code -8.
    """
    import torch

    packed, group, scales_and_zeros = parts
    where = f"tensor {name!r}"
    zeros = scales_and_zeros[..., 1].T
    if zeros.any():
        row, number = zeros.nonzero()[0].tolist()
        refuse(where, "zero", "0", zeros[row, number].item(), (row, number))
    # With all scales 1 the products are the codes themselves.
    ones = torch.zeros_like(scales_and_zeros)
    ones[..., 0] = 1
    unit = torch.eye(2 * packed.shape[1], dtype=torch.bfloat16)
    codes = torch.ops.aten._weight_int4pack_mm_for_cpu(unit, packed, group, ones).T
    scales = np.from_dlpack(scales_and_zeros[..., 0].float().T.contiguous()).astype(np.float64)
    groups = Groups(np.from_dlpack(codes.int().reshape(*scales.shape, group)), scales)
    return array_of(groups, where, format or f"hbfp4b{group}")
