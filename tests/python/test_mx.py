"""MXINT8: values by the OCP specification's own formula, and everything HBFP8 does not have refused by name."""

from __future__ import annotations

import numpy as np
import pytest

import hbfp
from hbfp import ExportError, FileError
from hbfp.exports import mx

FORMATS = ["hbfp8b32", "hbfp8b64", "hbfp6b96", "hbfp4b32-ceil", "hbfp2b32"]


def sample(shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(list(shape))
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-100, 101, (*shape[:-1], 1)))
    x.reshape(-1, shape[-1])[-1] = 0
    x[..., :32] *= rng.integers(0, 2, (*shape[:-1], 1))
    return x.astype(np.float32)


def values(parts: mx.MXINT8) -> np.ndarray:
    """OCP MX 1.0: element · 2^-6 · 2^(e - 127), NaN under e = 255."""
    scales = np.ldexp(1.0, parts.scales.astype(int) - 127)
    scales[parts.scales == 255] = np.nan
    elements = parts.elements.astype(np.float64) / 64
    return (elements.reshape(*parts.scales.shape, 32) * scales[..., None]).reshape(elements.shape)


def one(elements: list[int], scale: int) -> mx.MXINT8:
    """A tensor [2, 64] of ones, whose last block holds `elements`, repeated, under the byte `scale`."""
    codes, scales = np.ones((2, 64), np.int8), np.full((2, 2), 127, np.uint8)
    codes[1, 32:] = np.resize(elements, 32)
    scales[1, 1] = scale
    return mx.MXINT8(codes, scales)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(96,), (5, 192), (2, 3, 64)])
def test_the_specification_gives_the_decoded_values(format, shape):
    """A fraction of 7 bits for 6: values of half the size."""
    array = hbfp.encode(sample(shape), format)
    assert np.array_equal(values(mx.pack(array)), array.decode())


@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_keeps_the_planes(format):
    array = hbfp.encode(sample((5, 224)), format)
    back = mx.unpack(mx.pack(array), format=format)
    assert np.array_equal(back.exponent_plane, array.exponent_plane)
    assert np.array_equal(back.mantissa_plane, array.mantissa_plane)


@pytest.mark.parametrize("scale", range(6, 255))
def test_every_scale_that_hbfp8_has(scale):
    parts = one([127, -127, 0, 1], scale)
    array = mx.unpack(parts)
    assert np.array_equal(array.decode(), values(parts))
    assert array.exponents[1, 1] == scale - 6
    again = mx.pack(array)
    assert np.array_equal(again.elements, parts.elements)
    assert np.array_equal(again.scales, parts.scales)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (one([1, -128], 127), "code: expected codes -127 ... 127 of hbfp8b32; found -128"),
        (one([1], 5), "scale: expected a power of two, 2^-127 ... 2^127; found 2.93873588e-39"),
        (one([1], 0), "scale: expected a power of two, 2^-127 ... 2^127; found 9.18354962e-41"),
    ],
)
def test_what_hbfp8_does_not_have_is_refused_by_name(parts, named):
    with pytest.raises(ExportError) as raised:
        mx.unpack(parts, "w")
    assert str(raised.value) == f"tensor 'w': block [1, 1]: {named}"


@pytest.mark.parametrize("scale", [0, 5])
def test_zeros_have_any_scale(scale):
    assert not mx.unpack(one([0], scale)).decode()[1, 32:].any()


@pytest.mark.parametrize("scale", [0, 100, 200])
def test_zeros_leave_the_scale_of_their_block_to_the_others(scale):
    parts = one([0], scale)
    array = mx.unpack(parts, format="hbfp8b64")
    assert np.array_equal(array.decode(), values(parts))
    assert array.exponents[1] == 127 - 6


def test_a_nan_scale_is_a_nan_block_whatever_the_elements():
    array = mx.unpack(one([1, -128, 0], 255))
    assert np.isnan(array.decode()[1, 32:]).all()
    assert not np.isnan(array.decode()[0]).any()


@pytest.mark.parametrize("exponent", [122, 127])
def test_scales_beyond_e8m0_are_refused(exponent):
    array = hbfp.BlockArray.from_parts(np.ones(32, int), [exponent + 127], "hbfp8b32", (32,))
    with pytest.raises(ExportError, match=rf"block \[0\]: scale: expected 2\^-127 ... 2\^121, .* found 2\^{exponent}"):
        mx.pack(array)


@pytest.mark.parametrize(
    "parts",
    [
        mx.MXINT8(np.ones((2, 64), np.int16), np.ones((2, 2), np.uint8)),
        mx.MXINT8(np.ones((2, 60), np.int8), np.ones((2, 2), np.uint8)),
        mx.MXINT8(np.ones((), np.int8), np.ones((), np.uint8)),
        mx.MXINT8(np.ones((2, 64), np.int8), np.ones((2, 1), np.uint8)),
        mx.MXINT8(np.ones((2, 64), np.int8), np.ones((2, 2), np.int8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ExportError, match=r"tensor 'w': (elements|scales): expected "):
        mx.unpack(parts, "w")


def test_a_file_holds_what_was_saved(tmp_path):
    """A plain int8 tensor is not taken for elements, a plain `…_scale` not for scales."""
    path = tmp_path / "model.safetensors"
    tensors = {
        "w": hbfp.encode(sample((5, 192)), "hbfp8b64"),
        "v": hbfp.encode(sample((64,)), "hbfp4b32"),
        "bytes": np.arange(4, dtype=np.int8),
        "norm_scale": np.ones(3, np.uint8),
        "norm": np.ones(3, np.float32),
    }
    mx.save(path, tensors)
    loaded = mx.load(path, {"w": "hbfp8b64"})
    assert loaded.keys() == tensors.keys()
    assert loaded["w"] == tensors["w"]
    assert str(loaded["v"].format) == "hbfp8b32"
    assert np.array_equal(loaded["v"].decode(), tensors["v"].decode())
    for name in ("bytes", "norm_scale", "norm"):
        assert np.array_equal(loaded[name], tensors[name])


def test_a_refusal_on_loading_names_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    hbfp.save(path, {"w": np.full((2, 32), -128, np.int8), "w_scale": np.full((2, 1), 127, np.uint8)})
    with pytest.raises(ExportError) as raised:
        mx.load(path)
    assert str(raised.value).startswith(f"{path}: tensor 'w': block [0, 0]: code: ")


def test_a_file_of_hbfp_is_no_mx_file(tmp_path):
    path = tmp_path / "model.safetensors"
    hbfp.save(path, {"w": hbfp.encode(np.ones(64), "hbfp8b32")})
    with pytest.raises(FileError, match=r"read it with hbfp\.load"):
        mx.load(path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    array = hbfp.encode(np.ones(64), "hbfp8b32")
    for tensors in ({"w": array, "w_scale": np.ones(3)}, {"w_scale": np.ones(3), "w": array}):
        with pytest.raises(ExportError, match="tensor 'w_scale': name: "):
            mx.save(tmp_path / "model.safetensors", tensors)
