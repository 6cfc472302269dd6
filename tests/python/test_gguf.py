"""GGUF: what is exported is what the gguf package reads, bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

import hbfp
from hbfp import BlockArray, CodeError, ExportError, FileError
from hbfp.exports import gguf as ours

gguf = pytest.importorskip("gguf")


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normal numbers whose rows differ in size, with a row of zeros and a run of them."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 9, (*shape[:-1], 1)))
    x.reshape(-1, shape[-1])[-1] = 0
    x[..., 32:64] *= rng.integers(0, 2, (*shape[:-1], 1))
    return x.astype(np.float32)


def dequantized(blocks: ours.Blocks) -> np.ndarray:
    return gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType[blocks.type])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Patterns, after a zero has lost its sign: ggml multiplies, and 0.0 · −1 is −0.0."""
    return np.array_equal((a + np.float32(0)).view(np.uint32), (b + np.float32(0)).view(np.uint32))


def whole(exponent: int, codes: list[int], format: str = "hbfp4b32") -> BlockArray:
    """One block of 32 of the given codes, repeated."""
    parts = np.resize(codes, 32), [exponent + 127]
    return BlockArray.from_parts(*parts, format, (32,))


FORMATS = [
    ("hbfp4b32", "Q4_0"),
    ("hbfp4b64", "Q4_0"),
    ("hbfp4b96", "Q4_0"),
    ("hbfp2b64", "Q4_0"),
    ("hbfp4b64-ceil-e5", "Q4_0"),
    ("hbfp4tensor", "Q4_0"),
    ("hbfp4t32", "Q4_0"),
    ("hbfp5b64", "Q8_0"),
    ("hbfp6b64", "Q8_0"),
    ("hbfp8b32", "Q8_0"),
    ("hbfp8b1024-noclip", "Q8_0"),
]


@pytest.mark.parametrize(("format", "type"), FORMATS)
@pytest.mark.parametrize("shape", [(192,), (7, 192), (70, 64), (2, 3, 64)])
def test_the_gguf_package_reads_the_decoded_values(format, type, shape):
    """Nibbles in the wrong order or half; a scale of a neighbour; 7 for 8; signs."""
    array = hbfp.encode(sample(shape), format)
    blocks = ours.pack(array)
    assert blocks.type == type
    assert same_bits(dequantized(blocks), array.decode())


@pytest.mark.parametrize(("format", "type"), FORMATS)
def test_a_round_trip_keeps_the_codes(format, type):
    array = hbfp.encode(sample((7, 192)), format)
    back = ours.unpack(ours.pack(array))
    assert str(back.format) == {"Q4_0": "hbfp4b32", "Q8_0": "hbfp8b32"}[type]
    assert np.array_equal(back.mantissas, array.mantissas)
    assert same_bits(back.decode(), array.decode())


@pytest.mark.parametrize("format", [format for format, _ in FORMATS if "b" in format[4:]])
def test_a_round_trip_to_the_same_format_keeps_the_planes(format):
    """Blocks put together from groups of 32 must take the exponent of a group that is not zero."""
    array = hbfp.encode(sample((7, 224)), format)
    back = ours.unpack(ours.pack(array), format=format)
    assert np.array_equal(back.exponent_plane, array.exponent_plane)
    assert np.array_equal(back.mantissa_plane, array.mantissa_plane)


@pytest.mark.parametrize("format", ["hbfp4b32", "hbfp8b32"])
@pytest.mark.parametrize("exponent", range(-24, 16))
def test_every_power_of_two_of_float16_goes_through(format, exponent):
    """The ten subnormal ones, which a conversion that flushes would lose."""
    array = whole(exponent, [1, -1, 7, -7, 0], format)
    blocks = ours.pack(array)
    assert same_bits(dequantized(blocks), array.decode())
    assert ours.unpack(blocks) == array


@pytest.mark.parametrize("exponent", [-127, -25, 16, 127])
def test_scales_beyond_float16_are_refused(exponent):
    array = BlockArray.from_parts(np.ones((2, 96), int), [[127, 127], [127, exponent + 127]], "hbfp4b64", (2, 96))
    with pytest.raises(ExportError) as raised:
        ours.pack(array, "blk.weight")
    assert str(raised.value) == (
        f"tensor 'blk.weight': block [1, 1]: scale: expected 2^-24 ... 2^15, exact in GGUF; found 2^{exponent}"
    )


@pytest.mark.parametrize("exponent", [-127, -25, 16, 127])
def test_a_block_of_zeros_needs_no_scale(exponent):
    blocks = ours.pack(whole(exponent, [0]))
    assert not dequantized(blocks).any()
    assert ours.unpack(blocks).exponents == 0


@pytest.mark.parametrize(
    ("format", "shape", "axis", "named"),
    [
        ("hbfp12b64", (2, 64), -1, "codes of 8 bits or fewer"),
        ("hbfp4b16", (2, 64), -1, "blocks of 32 or a multiple"),
        ("hbfp4b48", (2, 96), -1, "blocks of 32 or a multiple"),
        ("hbfp4t8", (8, 64), -1, "blocks of 32 or a multiple"),
        ("hbfp4b64", (64, 64), 0, "the last one of shape [64, 64]"),
        ("hbfp4b64", (2, 70), -1, "rows of a multiple of 32"),
        ("hbfp4b64", (), -1, "the last one of shape []"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(format, shape, axis, named):
    with pytest.raises(ExportError, match="tensor 'w': ") as raised:
        ours.pack(hbfp.encode(np.ones(shape), format, axis=axis), "w")
    assert named in str(raised.value)


def test_a_nan_block_is_refused_and_named():
    x = np.ones((3, 128), np.float32)
    x[2, 70] = np.inf
    with pytest.raises(ExportError, match=r"tensor 'w': block \[2, 1\]: .* found a NaN block"):
        ours.pack(hbfp.encode(x, "hbfp4b64"), "w")


def test_a_refusal_names_the_file_that_the_array_comes_from(tmp_path):
    path = tmp_path / "model.safetensors"
    hbfp.save(path, {"w": hbfp.encode(np.ones((2, 64)) * 2.0**30, "hbfp4b64")})
    with pytest.raises(ExportError) as raised:
        ours.pack(hbfp.load(path)["w"], "w")
    assert str(raised.value).startswith(f"{path}: tensor 'w': block [0, 0]: ")


def test_forbidden_codes_of_a_file_are_not_exported(tmp_path):
    planes = np.array([[127]], np.uint8), np.full((1, 16), 0x88, np.uint8)
    with pytest.raises(CodeError):
        ours.pack(BlockArray(*planes, hbfp.HBFP(4, 32), (1, 32)))


# --- imports ---------------------------------------------------------------------------------------------------------


def q4_0(scale: float, nibbles: list[int]) -> ours.Blocks:
    packed = np.resize(nibbles, 32).astype(np.uint8)
    data = np.concatenate([np.array([scale], "<f2").view(np.uint8), packed[:16] | packed[16:] << 4])
    return ours.Blocks("Q4_0", data)


def test_negative_scales_are_read():
    """ggml's own quantiser makes d negative where the largest element is positive."""
    blocks = q4_0(-0.25, [1, 5, 8, 15])
    array = ours.unpack(blocks)
    assert same_bits(dequantized(blocks), array.decode())
    assert array.mantissas[:4].tolist() == [7, 3, 0, -7]


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        (q4_0(0.3, [9]), "scale: expected a power of two, 2^-127 ... 2^127; found 0.300048828"),
        (q4_0(math.inf, [9]), "scale: expected a power of two, 2^-127 ... 2^127; found inf"),
        (q4_0(0.5, [9, 0]), "code: expected codes -7 ... 7 of hbfp4b32; found -8"),
        (q4_0(-0.5, [9, 0]), "code: expected codes -7 ... 7 of hbfp4b32; found 8"),
    ],
)
def test_blocks_that_hbfp_does_not_have_are_refused(blocks, named):
    good = q4_0(0.5, [9])
    several = ours.Blocks("Q4_0", np.stack([np.concatenate([good.data] * 2), np.concatenate([good.data, blocks.data])]))
    with pytest.raises(ExportError) as raised:
        ours.unpack(several, "w")
    assert str(raised.value) == f"tensor 'w': block [1, 1]: {named}"


def test_the_code_minus_128_is_refused():
    data = np.concatenate([np.array([1.0], "<f2").view(np.uint8), np.full(32, 0x80, np.uint8)])
    with pytest.raises(ExportError, match=r"block \[0\]: code: .* found -128"):
        ours.unpack(ours.Blocks("Q8_0", data))


def test_a_wider_format_takes_minus_8():
    blocks = q4_0(0.5, [9, 0])
    assert same_bits(ours.unpack(blocks, format="hbfp5b32").decode(), dequantized(blocks))


def test_a_scale_of_zero_makes_zeros_whatever_the_codes():
    array = ours.unpack(q4_0(0.0, [0, 3, 15]))
    assert not array.decode().any()
    assert array.exponents == 0


def test_a_nan_scale_is_a_nan_block():
    assert np.isnan(ours.unpack(q4_0(math.nan, [1, 2])).decode()).all()


def test_groups_of_one_block_must_agree():
    row = np.concatenate([q4_0(0.5, [9]).data, q4_0(0.25, [9]).data])
    with pytest.raises(ExportError, match=r"block \[0\]: scale: .* found 2\^-2, 2\^-1"):
        ours.unpack(ours.Blocks("Q4_0", row), format="hbfp4b64")


# --- files -----------------------------------------------------------------------------------------------------------

PLAIN = [np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64]


def test_a_file_holds_what_was_saved(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = {
        "w": hbfp.encode(sample((6, 192)), "hbfp4b64"),
        "v": hbfp.encode(sample((2, 5, 64)), "hbfp6b32"),
        **{np.dtype(dtype).name: np.arange(12).astype(dtype).reshape(3, 4) for dtype in PLAIN},
    }
    ours.save(path, tensors)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "hbfp"
    for tensor in reader.tensors:
        wanted = tensors[tensor.name]
        assert tensor.shape.tolist() == list(wanted.shape)[::-1]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type) if tensor.name in "wv" else tensor.data
        assert np.array_equal(found, np.asarray(wanted))
    loaded = ours.load(path, {"w": "hbfp4b64"})
    assert loaded.keys() == tensors.keys()
    assert loaded["w"] == tensors["w"]
    assert np.array_equal(loaded["v"].decode(), tensors["v"].decode())
    for dtype in map(np.dtype, PLAIN):
        assert loaded[dtype.name].dtype == dtype
        assert np.array_equal(loaded[dtype.name], tensors[dtype.name])


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("w" * 64, np.ones(3, np.float32), "at most 63 bytes; found 64"),
        ("w", np.ones((1, 1, 1, 1, 2), np.float32), "1 to 4 dimensions"),
        ("w", np.float32(1), "1 to 4 dimensions"),
        ("w", np.ones((0, 3), np.float32), "none of them 0"),
        ("w", np.ones(3, bool), "found bool"),
        ("w", np.ones(3, np.complex64), "found complex64"),
        ("w", hbfp.encode(np.ones(60), "hbfp4b32"), "rows of a multiple of 32"),
    ],
)
def test_a_refused_file_leaves_nothing_and_harms_nothing(tmp_path, name, value, named):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what stood there")
    with pytest.raises(ExportError, match="tensor 'w") as raised:
        ours.save(path, {"fits": np.ones(2, np.float32), name: value})
    assert named in str(raised.value)
    assert path.read_bytes() == b"what stood there"
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_write_that_fails_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what stood there")

    def full(writer: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space left"):
        ours.save(path, {"w": np.ones(3, np.float32)})
    assert path.read_bytes() == b"what stood there"
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_types_that_hbfp_does_not_have_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    data = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError) as raised:
        ours.load(path)
    assert str(raised.value) == f"{path}: tensor 'w': type: expected Q4_0, Q8_0, floats or integers; found Q5_1"


def damaged(path: Path) -> list[bytes]:
    ours.save(path, {"w": hbfp.encode(sample((6, 192)), "hbfp4b64"), "b": np.ones(5, np.float32)})
    content = path.read_bytes()
    cut = [content[:size] for size in (3, 4, 8, 20, 50, 100, 200, len(content) - 20)]
    return [b"not such a file at all", *cut, content.replace(b"GGUF", b"GGML", 1)]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    for content in damaged(path):
        path.write_bytes(content)
        with pytest.raises(FileError, match="expected a GGUF file"):
            ours.load(path)


def test_flipped_bits_give_a_named_error_or_an_array(tmp_path):
    """A length that overflows, an offset outside of the file: never an error without a name."""
    path = tmp_path / "model.gguf"
    ours.save(path, {"w": hbfp.encode(sample((2, 64)), "hbfp4b64"), "b": np.ones(5, np.float32)})
    content = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            ours.load(path)
        except hbfp.HBFPError:
            refused += 1
    assert refused > 100


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ours.load(tmp_path / "none.gguf")
