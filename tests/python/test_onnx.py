"""ONNX: onnxruntime decodes what hbfp decodes, bit for bit, and models of others are read or refused by name."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hbfp
from hbfp import BlockArray, ExportError, FileError
from hbfp.exports import onnx as ours

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx_models import ran, same_bits, sample  # noqa: E402

# --- arrays ----------------------------------------------------------------------------------------------------------

ARRAYS = [
    ("hbfp4b64", (5, 130), 1, "hbfp4b64"),
    ("hbfp4b64", (130, 5), 0, "hbfp4b64"),
    ("hbfp2b1", (3, 5), 1, "hbfp4b1"),
    ("hbfp6b16", (2, 7, 33), 2, "hbfp8b16"),
    ("hbfp8b4", (2, 7, 3), 1, "hbfp8b4"),
    ("hbfp12b7", (3, 20), 1, "hbfp16b7"),
    ("hbfp16b1024", (2, 1030), 1, "hbfp16b1024"),
    ("hbfp4t8", (19, 21), -1, "hbfp4b8"),
    ("hbfp6t4", (2, 9, 6), -1, "hbfp8b4"),
    ("hbfp4t4", (9,), -1, "hbfp4b4"),
    ("hbfp8tensor", (4, 3), -1, "hbfp8tensor"),
    ("hbfp4b64", (130,), 0, "hbfp4b64"),
    ("hbfp4b64", (5,), 0, "hbfp4tensor"),
    ("hbfp4b64", (), 0, "hbfp4tensor"),
    ("hbfp4b64", (0, 7), 1, "hbfp4b64"),
]


@pytest.mark.parametrize(("format", "shape", "axis", "read"), ARRAYS)
def test_onnxruntime_decodes_the_same_values(tmp_path, format, shape, axis, read):
    """Nibbles in the wrong order; a short last block; scales along another axis; a zero with a sign."""
    path = tmp_path / "model.onnx"
    x = sample(shape) * np.exp2(np.random.default_rng(1).integers(-60, 60, shape)).astype(np.float32)
    array = hbfp.encode(x, format, axis=axis)
    ours.save(path, {"w": array})
    assert same_bits(ran(path)["w"], array.decode())
    back = ours.load(path)["w"]
    assert str(back.format) == read
    assert same_bits(back.decode(), array.decode())


def test_every_scale_goes_through(tmp_path):
    """2^-127 is a subnormal float32; the largest values decode to infinity in both."""
    path = tmp_path / "model.onnx"
    codes = np.resize([1, -7, 7, 0, -1], (255, 4))
    array = BlockArray.from_parts(codes, np.arange(255)[:, None], "hbfp4b4", (255, 4))
    ours.save(path, {"w": array})
    assert same_bits(ran(path)["w"], array.decode())
    assert ours.load(path)["w"] == array


def test_a_file_of_many_tensors(tmp_path):
    path = tmp_path / "model.onnx"
    tensors: dict[str, Any] = {
        "w": hbfp.encode(sample((6, 70)), "hbfp6b64"),
        "layer.0.weight": hbfp.encode(sample((6, 70)), "hbfp4b64"),
        "bias": sample((6,)),
        "count": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "half": np.ones((2, 3), np.float16),
    }
    ours.save(path, tensors)
    found, loaded = ran(path), ours.load(path, {"w": "hbfp6b64"})
    assert found.keys() == loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert np.array_equal(found[name], np.asarray(value))
        assert found[name].dtype == np.asarray(value).dtype
        assert np.array_equal(np.asarray(loaded[name]), np.asarray(value))
    assert loaded["w"] == tensors["w"]
    assert loaded["layer.0.weight"] == tensors["layer.0.weight"]


def test_a_nan_block_is_refused_by_name():
    x = sample((3, 70))
    x[1, 69] = np.nan
    with pytest.raises(ExportError, match=r"tensor 'w': block \[1, 1\]: .* found a NaN block"):
        ours.pack(hbfp.encode(x, "hbfp4b64"), "w")


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"w": np.zeros(2, "M8[D]")}, "tensor 'w': dtype: expected one that ONNX has"),
        ({"w": hbfp.encode(np.ones(3), "hbfp4b64"), "w.scales": np.ones(3)}, "tensor 'w.scales': name"),
    ],
)
def test_a_refused_file_leaves_nothing_and_harms_nothing(tmp_path, tensors, named):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what stood there")
    with pytest.raises(ExportError, match=named):
        ours.save(path, tensors)
    assert path.read_bytes() == b"what stood there"
    assert os.listdir(tmp_path) == ["model.onnx"]


# --- models of others ------------------------------------------------------------------------------------------------


def foreign(path: Path, codes: np.ndarray, scales: Any, zero: Any = None, **attributes: int) -> None:
    """A model with one DequantizeLinear."""
    constants = {"c": codes, "s": np.asarray(scales, np.float32), **({} if zero is None else {"z": zero})}
    node = onnx.helper.make_node("DequantizeLinear", list(constants), ["w"], **attributes)
    output = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, codes.shape)
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph([node], "g", [], [output], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def test_zero_points_are_read(tmp_path):
    """Other exporters write UINT4 with the zero point 8."""
    path = tmp_path / "model.onnx"
    codes = np.arange(1, 16).astype(ml_dtypes.uint4).reshape(3, 5)
    scales = np.exp2(np.arange(6.0)).reshape(3, 2)
    foreign(path, codes, scales, np.full((3, 2), 8).astype(ml_dtypes.uint4), axis=1, block_size=3)
    array = ours.load(path)["w"]
    assert array.mantissas.reshape(-1).tolist() == list(range(-7, 8))
    assert same_bits(ran(path)["w"], array.decode())


def test_signs_zeros_and_nan_of_scales_are_those_of_the_values(tmp_path):
    path = tmp_path / "model.onnx"
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    foreign(path, codes, [[-0.5, 2], [0, -0.0], [np.nan, -4]], axis=1, block_size=2)
    found, wanted = ours.load(path)["w"].decode(), ran(path)["w"]
    assert np.array_equal(found, wanted, equal_nan=True)


INT8 = np.ones((3, 6), np.int8)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scales": np.full((3, 2), 0.3)}, "block [0, 0]: scale: expected a power of two, 2^-127 ... 2^127; found 0.3"),
        ({"scales": np.ones((3, 2)), "codes": INT8 * -128}, "block [0, 0]: code: expected codes -127 ... 127"),
        ({"scales": np.full((3, 2), np.inf)}, "block [0, 0]: scale: expected a power of two"),
        ({"scales": np.full((3, 2), -1), "codes": INT8 * -128}, "block [0, 0]: code: expected codes -127 ... 127"),
        ({"scales": np.ones((3, 3))}, "scales: expected shape [3, 2]"),
        ({"scales": np.ones(6), "block_size": 0}, "scales: expected shape []; found [6]"),
        ({"scales": np.ones((3, 2)), "block_size": 4000}, "block_size: expected 1 to 1024; found 4000"),
        ({"scales": np.ones((3, 2)), "codes": INT8.astype(np.int32)}, "type: expected one of int4, "),
        ({"scales": np.ones((3, 2)), "zero": np.int8(1)}, "zero point: expected int8 [3, 2]; found int8 []"),
        ({"scales": np.ones((3, 1)), "zero": np.zeros((3, 1), np.int8)}, "scales: expected shape [3, 2]"),
        ({"scales": np.ones((3, 2)), "axis": 2}, "axis: expected one of shape [3, 6]; found 2"),
    ],
)
def test_what_hbfp_does_not_have_is_refused_by_name(tmp_path, arguments, named):
    path = tmp_path / "model.onnx"
    given = {"codes": INT8, "axis": 1, "block_size": 3, **arguments}
    foreign(path, given.pop("codes"), given.pop("scales"), given.pop("zero", None), **given)
    with pytest.raises(ExportError) as raised:
        ours.load(path)
    assert str(raised.value).startswith(f"{path}: tensor 'w': {named}")


def test_blocks_of_another_size_are_refused():
    parts = ours.pack(hbfp.encode(sample((2, 8)), "hbfp4b4"))
    for format in ("hbfp4b8", "hbfp4t4", "hbfp4tensor"):
        with pytest.raises(ExportError, match="format: expected blocks of 4; found "):
            ours.unpack(parts, format=format)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    ours.save(path, {"w": hbfp.encode(sample((6, 70)), "hbfp4b64")})
    content = path.read_bytes()
    for size in (5, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(FileError, match="expected an ONNX file"):
            ours.load(path)
    path.write_bytes(b"not such a file at all")
    with pytest.raises(FileError, match="expected an ONNX file"):
        ours.load(path)


def test_flipped_bits_give_a_named_error_or_arrays(tmp_path):
    path = tmp_path / "model.onnx"
    ours.save(path, {"w": hbfp.encode(sample((2, 70)), "hbfp4b64"), "b": np.ones(5, np.float32)})
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with suppress(hbfp.HBFPError, FileNotFoundError):  # the latter of a tensor said to lie in another file
            ours.load(path)
