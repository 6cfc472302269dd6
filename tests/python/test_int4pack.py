"""torch's int4pack: the kernel multiplies unit vectors by exactly the decoded weight."""

from __future__ import annotations

import numpy as np
import pytest

import hbfp
from hbfp import BlockArray, ExportError
from hbfp.exports import int4pack

torch = pytest.importorskip("torch")

SHAPES = [
    ("hbfp4b64", (32, 192), 64),
    ("hbfp4b64", (16, 96), 32),
    ("hbfp4b32", (48, 64), 32),
    ("hbfp4b128", (16, 256), 128),
    ("hbfp4b1024", (64, 1024), 256),
    ("hbfp4b160", (32, 320), 32),
    ("hbfp3b64-noclip", (16, 128), 64),
    ("hbfp4t32", (64, 64), 32),
    ("hbfp4tensor", (16, 64), 64),
]


def sample(shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(list(shape))
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-100, 101, (shape[0], 1)))
    x[-1] = 0
    return x.astype(np.float32)


def multiplied(parts: int4pack.Int4Pack) -> np.ndarray:
    """The weight, by torch's kernel: sums of one product and zeros, which bfloat16 holds."""
    unit = torch.eye(2 * parts.packed.shape[1], dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(unit, parts.packed, parts.group, parts.scales_and_zeros)
    return product.float().T.numpy()


@pytest.mark.parametrize(("format", "shape", "group"), SHAPES)
def test_the_kernel_multiplies_by_the_decoded_weight(format, shape, group):
    array = hbfp.encode(sample(shape), format)
    parts = int4pack.pack(array)
    assert parts.group == group
    assert np.array_equal(multiplied(parts), array.decode())


@pytest.mark.parametrize(("format", "shape", "group"), SHAPES)
def test_a_round_trip_keeps_the_codes(format, shape, group):
    array = hbfp.encode(sample(shape), format)
    back = int4pack.unpack(int4pack.pack(array))
    assert str(back.format) == f"hbfp4b{group}"
    assert np.array_equal(back.mantissas, array.mantissas)
    assert np.array_equal(back.decode(), array.decode())


def test_a_round_trip_to_the_same_format_keeps_the_planes():
    array = hbfp.encode(sample((32, 192)), "hbfp4b64")
    back = int4pack.unpack(int4pack.pack(array), format="hbfp4b64")
    assert np.array_equal(back.exponent_plane, array.exponent_plane)
    assert np.array_equal(back.mantissa_plane, array.mantissa_plane)


@pytest.mark.parametrize("exponent", [-126, -1, 0, 1, 124])
def test_scales_at_the_ends_of_bfloat16(exponent):
    array = BlockArray.from_parts(
        np.resize([1, -7, 7, 0], (16, 32)), np.full((16, 1), exponent + 127), "hbfp4b32", (16, 32)
    )
    assert np.array_equal(multiplied(int4pack.pack(array)), array.decode())


@pytest.mark.parametrize(
    ("format", "shape", "axis", "named"),
    [
        ("hbfp5b64", (16, 64), -1, "codes of 4 bits or fewer"),
        ("hbfp4b16", (16, 64), -1, "blocks of 32 or a multiple"),
        ("hbfp4b64", (64, 64), 0, "axis: expected the last one"),
        ("hbfp4b64", (16, 70), -1, "rows of a multiple of 32"),
        ("hbfp4b64", (24, 64), -1, "N a multiple of 16"),
        ("hbfp4b64", (64,), -1, "shape: expected [N, K]"),
        ("hbfp4b64", (16, 16, 64), -1, "shape: expected [N, K]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(format, shape, axis, named):
    with pytest.raises(ExportError, match="tensor 'w': ") as raised:
        int4pack.pack(hbfp.encode(np.ones(shape), format, axis=axis), "w")
    assert named in str(raised.value)


def test_a_subnormal_scale_is_refused():
    exponents = np.full((16, 2), 127)
    exponents[3, 1] = 0
    array = BlockArray.from_parts(np.ones((16, 64), int), exponents, "hbfp4b32", (16, 64))
    with pytest.raises(ExportError, match=r"tensor 'w': block \[3, 1\]: scale: .* found 2\^-127"):
        int4pack.pack(array, "w")


def changed(row: int, group: int, part: int, value: float) -> int4pack.Int4Pack:
    parts = int4pack.pack(hbfp.encode(sample((16, 128)), "hbfp4b32"))
    parts.scales_and_zeros[group, row, part] = value
    return parts


def test_weights_of_others_are_refused_by_name():
    with pytest.raises(ExportError, match=r"block \[5, 2\]: scale: .* found 0\.30"):
        int4pack.unpack(changed(5, 2, 0, 0.3))
    with pytest.raises(ExportError, match=r"block \[5, 2\]: zero: expected 0; found 0\.5"):
        int4pack.unpack(changed(5, 2, 1, 0.5))
    nibbles = torch.zeros(16, 32, dtype=torch.int32)
    scales_and_zeros = torch.zeros(1, 16, 2, dtype=torch.bfloat16)
    scales_and_zeros[..., 0] = 1
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    with pytest.raises(ExportError, match=r"block \[0, 0\]: code: .* found -8"):
        int4pack.unpack(int4pack.Int4Pack(packed, 32, scales_and_zeros))
