"""What every format shares: blocks taken apart and put together, refusals, powers of two."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hbfp.array import BlockArray
from hbfp.errors import ExportError
from hbfp.format import HBFP

__all__ = [
    "Groups",
    "array_of",
    "check",
    "exponent_bytes",
    "groups_of",
    "place",
    "refuse",
    "required",
    "scaled",
]

Index: TypeAlias = tuple[int, ...]

NAN_BYTE = 255
EXPONENT_BIAS = 127


class Groups(NamedTuple):
    """Runs of consecutive elements of the last dimension, and the scale of each: value = code · scale."""

    codes: NDArray[Any]
    """Integers [..., groups, elements of a group]."""
    scales: NDArray[np.float64]
    """Powers of two [..., groups]; 0 for a group of zeros whose own scale the format does not have."""


def place(array: BlockArray, name: str) -> str:
    """How messages call an array: by the file that it was read from, too, where there is one."""
    return array.source or f"tensor {name!r}"


def refuse(where: str, field: str, expected: str, found: object, block: Index | None = None) -> NoReturn:
    """Raises the ExportError that every format raises; `block` is an index of `BlockArray.exponents`."""
    number = "" if block is None else f"block {[int(index) for index in block]}: "
    raise ExportError(f"{where}: {number}{field}: expected {expected}; found {found}")


def check(array: BlockArray, where: str, bits: int, what: str) -> None:
    """That codes are at most `bits` wide and no block is NaN, which holds for every format.

    Raises:
        ExportError: otherwise.
    """
    if array.format.bits > bits:
        refuse(where, "format", f"codes of {bits} bits or fewer for {what}", array.format)
    nan = array.exponents == NAN_BYTE
    if nan.any():
        refuse(where, "exponent", "a finite block", "a NaN block (c = 255)", tuple(np.argwhere(nan)[0]))


def groups_of(array: BlockArray, where: str, group: int, bits: int, low: int, high: int, what: str) -> Groups:
    """An array cut in groups that each lie in one block: where blocks are longer, the scale is repeated.

    Args:
        array: blocked along its last axis in a multiple of `group`, or in tiles of that side, or as a whole tensor.
        where: the array's name in messages.
        group: elements that share a scale in the other format.
        bits: widest codes.
        low, high: the scale exponents s that the other format's scale has exactly.
        what: the other format, in messages.

    Raises:
        ExportError: the array does not fit.
        CodeError: the array was read from a file that holds forbidden codes.
    """
    check(array, where, bits, what)
    format, shape = array.format, array.shape
    side = format.tile or format.block
    if side is not None and side % group:
        refuse(where, "format", f"blocks of {group} or a multiple, which share one scale in {what}", format)
    if not shape or array.axis != len(shape) - 1:
        refuse(where, "axis", f"the last one of shape {list(shape)}, along which {what} is blocked", array.axis)
    if shape[-1] % group:
        refuse(where, "shape", f"rows of a multiple of {group} elements for {what}", list(shape))
    codes = array.mantissas.reshape(*shape[:-1], shape[-1] // group, group)
    index = _blocks_of_groups(array, group)
    exponents = array.exponents[index].astype(np.int64) - EXPONENT_BIAS
    outside = (exponents < low) | (exponents > high)
    zero = ~codes.any(axis=-1)
    wrong = np.argwhere(outside & ~zero)
    if len(wrong):
        first = tuple(wrong[0])
        block = tuple(part[first] for part in np.broadcast_arrays(*index))
        refuse(where, "scale", f"2^{low} ... 2^{high}, exact in {what}", f"2^{exponents[first]}", block)
    return Groups(codes, np.where(outside, 0.0, np.ldexp(1.0, exponents)))


def _blocks_of_groups(array: BlockArray, group: int) -> tuple[NDArray[np.intp], ...]:
    """For each dimension of `array.exponents` the index of the block that a group lies in, to be broadcast."""
    format, shape = array.format, array.shape
    counts = (*shape[:-1], shape[-1] // group)
    index = list(np.ogrid[tuple(slice(count) for count in counts)])
    if format.tile is not None:
        index[-1] = index[-1] * group // format.tile
        if len(shape) > 1:
            index[-2] = index[-2] // format.tile
    elif format.block is not None:
        index[-1] = index[-1] * group // format.block
    else:
        index = [part * 0 for part in index]
    return tuple(index)


def array_of(groups: Groups, where: str, format: HBFP | str) -> BlockArray:
    """The array that such groups stand for, blocked along the last axis.

    Args:
        groups: codes of any sign; scales that may be negative (then the codes change sign), 0, or NaN (a NaN block).
        where: the array's name in messages.
        format: lines of a multiple of the group; groups of one block must have one scale, groups of zeros apart.

    Raises:
        ExportError: a scale that is no power of two, a code that the format does not have, or groups that do not fit.
    """
    format = HBFP.parse(format)
    codes, scales = groups
    group = codes.shape[-1]
    if format.block is None or format.block % group:
        refuse(where, "format", f"blocks of {group} or a multiple along the last axis", format)
    codes = scaled(codes, scales[..., None])
    bytes_ = exponent_bytes(scales, where, lambda first: _block_of(first, format, group))
    wrong = np.argwhere(np.abs(codes) > format.max_code)
    if len(wrong):
        first = tuple(wrong[0])
        limit = f"codes -{format.max_code} ... {format.max_code} of {format}"
        refuse(where, "code", limit, int(codes[first]), _block_of(first[:-1], format, group))
    shape = (*codes.shape[:-2], codes.shape[-2] * group)
    merged = _merge(bytes_, codes.any(axis=-1) | (bytes_ == NAN_BYTE), format.block // group, where)
    return BlockArray.from_parts(codes.reshape(shape), merged, format, shape)


def scaled(codes: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.int32]:
    """The codes under positive scales: their sign is negative scales', and they are 0 where the scale is 0 or NaN."""
    signs = np.where(np.isnan(scales) | (scales == 0), 0, np.where(scales < 0, -1, 1)).astype(np.int32)
    product: NDArray[np.int32] = codes.astype(np.int32) * signs
    return product


def exponent_bytes(
    scales: NDArray[Any], where: str, block_of: Callable[[Index], Index] = lambda first: first
) -> NDArray[np.int64]:
    """c = s + 127 of scales ±2^s, 0 of 0, 255 of NaN.

    Raises:
        ExportError: a scale that is no power of two, or not in 2^-127 ... 2^127; names the block that `block_of` makes
            of its index.
    """
    nan = np.isnan(scales)
    mantissas, exponents = np.frexp(np.where(nan, 0.0, np.abs(scales)))
    bytes_ = np.where(scales == 0, 0, exponents.astype(np.int64) - 1 + EXPONENT_BIAS)
    wrong = np.argwhere(~nan & ((mantissas != 0.5) & (scales != 0) | (bytes_ < 0) | (bytes_ >= NAN_BYTE)))
    if len(wrong):
        first = tuple(wrong[0])
        refuse(where, "scale", "a power of two, 2^-127 ... 2^127", f"{scales[first]:.9g}", block_of(first))
    return np.where(nan, NAN_BYTE, bytes_)


def _block_of(group: Index, format: HBFP, size: int) -> Index:
    assert format.block is not None
    return (*group[:-1], group[-1] * size // format.block)


def _merge(bytes_: NDArray[Any], used: NDArray[Any], count: int, where: str) -> NDArray[Any]:
    """One exponent byte for each `count` groups: that of the groups that are not zero, which must agree."""
    if count == 1:
        return bytes_
    fill = [(0, 0)] * (bytes_.ndim - 1) + [(0, -bytes_.shape[-1] % count)]
    blocks = np.pad(bytes_, fill).reshape(*bytes_.shape[:-1], -1, count)
    there = np.pad(used, fill).reshape(blocks.shape)
    largest = np.where(there, blocks, -1).max(axis=-1)
    wrong = np.argwhere(there & (blocks != largest[..., None]))
    if len(wrong):
        first = tuple(wrong[0][:-1])
        found = [f"2^{byte - EXPONENT_BIAS}" for byte in np.unique(blocks[first][there[first]])]
        refuse(where, "scale", f"one for all {count} groups of a block", ", ".join(found), first)
    merged: NDArray[Any] = np.where(largest < 0, blocks.max(axis=-1), largest)
    return merged


def required(package: str) -> Any:
    """An optional package, imported when it is needed.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        message = f"{package} is not installed; get it with: pip install 'hbfp[export]'"
        raise ModuleNotFoundError(message, name=package) from None
