"""Files of version 1 load for ever, and files made by the oracle, by the package and by a stranger's reader agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import oracle_files
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings

import hbfp
from hbfp import reference, testing

READER = Path(__file__).resolve().parents[2] / "docs" / "reader.py"
FILES = sorted(oracle_files.GOLDEN.glob("*.safetensors"))


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    """docs/reader.py, as somebody who never heard of this package runs it."""
    spec = importlib.util.spec_from_file_location("reader", READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def test_every_kind_has_its_file():
    assert {path.name for path in FILES} == {f"v1-{kind}.safetensors" for kind in oracle_files.KINDS}
    assert sum(path.stat().st_size for path in FILES) < 150_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files_load(path):
    content = hbfp.load(path, verify=True)
    widths = [name for name in content if isinstance(content[name], hbfp.BlockArray)]
    assert widths == [f"w{bits}" for bits in range(2, 17)]
    for name in widths:
        assert np.array_equal(content[name].mantissas, content[f"{name}.codes"])
        assert np.array_equal(bits(content[name].decode()), bits(content[f"{name}.values"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files_are_written_again_to_the_byte_in_their_planes(path, tmp_path):
    content = hbfp.load(path)
    hbfp.save(tmp_path / "x", content)
    with safetensors.safe_open(path, "np") as old, safetensors.safe_open(tmp_path / "x", "np") as new:
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118
            assert old.get_tensor(name).tobytes() == new.get_tensor(name).tobytes()
        assert json.loads(old.metadata()["hbfp"]) == json.loads(new.metadata()["hbfp"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_page_of_a_reader_reads_golden_files(path, reader):
    content = hbfp.load(path)
    for name, (values, codes, _) in reader.read(path).items():
        assert np.array_equal(codes, content[f"{name}.codes"])
        assert np.array_equal(bits(values), bits(content[f"{name}.values"]))


def test_the_oracle_still_makes_them():
    """A generator that drifted from what it made would hide that the oracle did."""
    made = dict(oracle_files.golden())
    assert {path.name: path.read_bytes() for path in FILES} == made


def test_the_reader_is_one_page_of_numpy_and_the_standard_library():
    text = READER.read_text()
    assert len(text.splitlines()) < 80
    assert "hbfp." not in text.replace(".hbfp_", "")


SHAPES = [(), (1,), (70,), (3, 130), (9, 7), (2, 5, 11), (2, 0), (0, 2), (1, 1, 1)]


@pytest.mark.parametrize("form", ["b1", "b3", "b64", "b1024", "t1", "t2", "t5", "tensor"])
@pytest.mark.parametrize("width", range(2, 17))
def test_every_width_block_axis_and_tail(tmp_path, reader, form, width):
    """Written here and read by the page; the planes are those of the oracle."""
    tensors = {}
    for i, shape in enumerate(SHAPES):
        for axis in range(max(len(shape), 1)):
            tensors[f"{i}.{axis}"] = hbfp.encode(oracle_files.sample(shape, width), f"hbfp{width}{form}", axis)
    hbfp.save(tmp_path / "x", tensors)
    assert hbfp.load(tmp_path / "x", verify=True) == tensors
    found = reader.read(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        values, codes, _ = found[name]
        assert np.array_equal(codes, t.mantissas)
        assert np.array_equal(bits(values), bits(t.decode()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(format=testing.formats(blocks=(1, 20)), x=testing.matrices(nonfinite=True, max_columns=20))
def test_files_of_the_oracle_load_and_ours_are_the_oracles(tmp_path, format, x):
    ours = hbfp.encode(x, format)
    theirs = reference.encode(x, reference.FormatDescription.parse(str(format)))
    path = tmp_path / "x"
    path.write_bytes(oracle_files.oracle_file({"x": (theirs, "nearest_even", ours.axis)}))
    loaded = hbfp.load(path, verify=True)["x"]
    assert loaded == ours
    assert np.array_equal(bits(loaded.decode()), bits(theirs.decode()))
    hbfp.save(path, {"x": ours})
    with safetensors.safe_open(path, "np") as file:
        described = json.loads(file.metadata()["hbfp"])["tensors"]["x"]
        planes = file.get_tensor("x.hbfp_exponents"), file.get_tensor("x.hbfp_mantissas")
    read = reference.Encoded.from_planes(
        *planes, reference.FormatDescription.parse(described["format"]), tuple(described["shape"]), described["axis"]
    )
    assert np.array_equal(bits(read.decode()), bits(ours.decode()))
