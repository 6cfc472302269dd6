"""Slices of encoded arrays along their first dimension: the same codes, views of the same bytes, blocks never cut."""

from __future__ import annotations

import numpy as np
import pytest

import hbfp
from hbfp import ShapeError

FORMATS = ["hbfp4b64", "hbfp3b5", "hbfp6b16", "hbfp11b7", "hbfp5t3", "hbfp4t1"]
SHAPES = [(13,), (13, 70), (70, 13), (3, 5, 9), (4, 2, 3, 7), (4, 0), (0, 4), (1, 1)]


def sample(shape):
    return np.random.default_rng([1, *shape]).standard_normal(shape).astype(np.float32)


def cuts(t):
    """Begins and ends that cut no block, found by the specification and not by the code."""
    step = 1
    if t.format.tile is not None and t.ndim <= 2:
        step = t.format.tile
    elif t.format.block is not None and t.axis == 0:
        step = t.format.block
    return [*range(0, t.shape[0], step), t.shape[0]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slice_decodes_as_the_rows_do(format, shape):
    for axis in range(len(shape)):
        t = hbfp.encode(sample(shape), format, axis)
        for view in [t, t.T] if t.ndim == 2 else [t]:
            whole = view.decode()
            for begin in cuts(view)[:6]:
                for end in cuts(view)[-6:]:
                    part = view[begin:end]
                    assert part.shape == (max(end - begin, 0), *view.shape[1:])
                    assert (part.axis, part.format, part.rounding) == (view.axis, view.format, view.rounding)
                    assert np.array_equal(part.decode(), whole[begin:end])
                    assert part == hbfp.encode(whole[begin:end], format, view.axis)


def test_blocks_are_not_cut():
    for format, axis in (("hbfp4b16", 0), ("hbfp4t16", 0)):
        t = hbfp.encode(sample((50, 40)), format, axis)
        for begin, end in ((1, 32), (0, 31), (16, 49)):
            message = rf"cover 16 of the 50 rows .*multiples of 16 or the end; found {begin}:{end}"
            with pytest.raises(ShapeError, match=message):
                t[begin:end]
        assert np.array_equal(t[16:].decode(), t.decode()[16:])
    t = hbfp.encode(sample((5, 4)), "hbfp4tensor")
    assert t[:] == t
    with pytest.raises(ShapeError, match="cover 5 of the 5 rows"):
        t[:4]


@pytest.mark.parametrize("rows", [3, slice(0, 4, 2), slice(None, None, -1), (slice(0, 2), 0), None], ids=str)
def test_only_plain_slices(rows):
    t = hbfp.encode(sample((8, 8)), "hbfp4b64")
    with pytest.raises(ShapeError, match=r"as t\[10:20\]; found .*decode it"):
        t[rows]
    with pytest.raises(ShapeError, match=r"of shape \[\]"):
        hbfp.encode(sample(()), "hbfp4b64")[:]


def test_rows_are_views():
    t = hbfp.encode(sample((100, 70)), "hbfp4b64")
    part = t[20:30]
    assert np.shares_memory(part.exponent_plane, t.exponent_plane)
    assert np.shares_memory(part.mantissa_plane, t.mantissa_plane)


def test_products_of_slices():
    x, t = sample((3, 70)), hbfp.encode(sample((40, 70)), "hbfp4b64")
    assert np.array_equal(hbfp.linear(x, t[10:20]), hbfp.linear(x, t)[:, 10:20])
