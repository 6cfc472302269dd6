"""Single blocks of encoded arrays: where their bits lie in the planes, and which elements they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbfp.array import BlockArray


@dataclass(frozen=True, slots=True)
class Block:
    """One block as it is stored.

    Attributes:
        row, column: of its exponent in the exponent plane.
        first: index in the array of its first element.
        exponent: the byte.
        data: its bytes of the mantissa plane.
        codes: its codes, padding of tiles included, as the two's-complement fields that they are stored in.
    """

    row: int
    column: int
    first: tuple[int, ...]
    exponent: int
    data: bytes
    codes: list[int]


def block_bytes(array: BlockArray) -> int:
    """Bytes of a whole block."""
    return -(-_elements(array) * array.format.bits // 8)


def _elements(array: BlockArray) -> int:
    if array.format.tile is not None:
        return array.format.tile**2
    return array.format.block or max(array.size, 1)


def block(array: BlockArray, row: int, column: int) -> Block:
    """A block by the place of its exponent.

    Raises:
        ShapeError: the exponent plane has no such place.
    """
    from hbfp.errors import ShapeError

    rows, columns = array.exponent_plane.shape
    if not (0 <= row < rows and 0 <= column < columns):
        raise ShapeError(f"expected a row under {rows} and a block under {columns}; found {row} and {column}")
    width, bits = block_bytes(array), array.format.bits
    data = array.mantissa_plane[row, column * width : (column + 1) * width].tobytes()
    count = _elements(array)
    if array.format.block is not None:
        count = min(count, (array.shape or (1,))[array.axis] - column * count)
    stream = int.from_bytes(data, "little")
    codes = [stream >> i * bits & (1 << bits) - 1 for i in range(count)]
    return Block(row, column, first_element(array, row, column), int(array.exponent_plane[row, column]), data, codes)


def first_element(array: BlockArray, row: int, column: int) -> tuple[int, ...]:
    """Index in the array of the first element of a block."""
    shape, tile = array.shape, array.format.tile
    if not shape:
        return ()
    if tile is not None:
        if len(shape) == 1:
            return (column * tile,)
        batch, down = divmod(row, -(-shape[-2] // tile))
        return (*_unravel(batch, shape[:-2]), down * tile, column * tile)
    if array.format.block is None:
        return (0,) * len(shape)
    others = list(_unravel(row, (*shape[: array.axis], *shape[array.axis + 1 :])))
    others.insert(array.axis, column * array.format.block)
    return tuple(others)


def _unravel(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for i in range(len(shape)):
        below = math.prod(shape[i + 1 :])
        index.append(number // below % max(shape[i], 1))
    return tuple(index)


def first_difference(a: BlockArray, b: BlockArray) -> tuple[int, int] | None:
    """Row and column of the first block that two arrays of one description do not share."""
    import numpy as np

    places = []
    for one, other, width in (
        (a.exponent_plane, b.exponent_plane, 1),
        (a.mantissa_plane, b.mantissa_plane, block_bytes(a)),
    ):
        # By runs of rows: a mask of all of a large plane would take as much memory as the plane.
        step = max(2**22 // max(one.shape[1], 1), 1)
        for begin in range(0, one.shape[0], step):
            differs = one[begin : begin + step] != other[begin : begin + step]
            if differs.any():
                row, byte = divmod(int(np.argmax(differs)), one.shape[1])
                places.append((begin + row, byte // width))
                break
    return min(places, default=None)
