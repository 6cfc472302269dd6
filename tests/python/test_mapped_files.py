"""Opened files: what is not used is not read, what is used is not copied, and the file may go away under it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hbfp
from hbfp import BlockArray, HBFPError
from hbfp.files.container import header_of
from hbfp.files.description import Description, written

MIB = 2**20


def sample(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([2, *shape]).standard_normal(shape).astype(np.float32)


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


@pytest.fixture
def gigabyte(tmp_path):
    """A sparse file: `w` [2^21, 992] in hbfp4b64, 1.0 GB of zero codes, which are valid, beside a plain array."""
    path = tmp_path / "large.safetensors"
    w = Description(hbfp.HBFP4, (2**21, 992), 1, None, None)
    exponents, mantissas = w.plane_shapes
    entries = {
        "w.hbfp_exponents": ("U8", exponents, exponents[0] * exponents[1]),
        "w.hbfp_mantissas": ("U8", mantissas, mantissas[0] * mantissas[1]),
        "b": ("U8", (MIB,), MIB),
    }
    text = written({"w": w}).replace(',"sha256":null', "")
    header = header_of(entries, {"hbfp": text})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes for _, _, nbytes in entries.values()))
    assert path.stat().st_size > 10**9
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs /proc/self/smaps")
def test_opening_a_gigabyte_touches_its_header(gigabyte):
    with hbfp.open(gigabyte) as file:
        w = file["w"]
        assert w.shape == (2**21, 992)
        assert resident(gigabyte) == 0  # the header is read, not mapped
        rows = w[10**6 : 10**6 + 10]
        assert resident(gigabyte) == 0
        assert not rows.decode().any()
        # The pages of ten rows in each plane, and what the system maps around a page on its own accord.
        assert 0 < resident(gigabyte) <= MIB
        assert hbfp.load(gigabyte)["b"].shape == (MIB,)
        assert resident(gigabyte) <= MIB


def test_arrays_are_views_of_the_file(tmp_path):
    path = tmp_path / "x"
    hbfp.save(path, {"w": hbfp.encode(sample((6, 70)), "hbfp4b64"), "b": sample((6,))})
    with hbfp.open(path) as file:
        first, second = file["w"], file["w"]
        assert isinstance(first, BlockArray)
        assert np.shares_memory(first.mantissa_plane, second.mantissa_plane)
        assert np.shares_memory(file["b"], file["b"])
        assert not first.mantissa_plane.flags.writeable


def test_a_plain_array_may_be_written_into_and_the_file_stays(tmp_path):
    path = tmp_path / "x"
    hbfp.save(path, {"b": sample((6,))})
    before = path.read_bytes()
    b = hbfp.load(path)["b"]
    b += 1
    assert np.array_equal(b, sample((6,)) + 1)
    assert path.read_bytes() == before


def test_a_file_as_a_mapping(tmp_path):
    path = tmp_path / "x"
    tensors = {"w": hbfp.encode(sample((6, 70)), "hbfp4b64"), "b": sample((6,)), "a": sample((2,))}
    hbfp.save(path, tensors, {"made by": "me"})
    with hbfp.open(path) as file:
        assert list(file) == ["w", "a", "b"]
        assert (len(file), "w" in file, "v" in file) == (3, True, False)
        assert file.metadata == {"made by": "me"}
        assert file["w"] == tensors["w"]
        assert file["w"][2:4] == tensors["w"][2:4]
        described = file.description("w")
        assert described is not None
        assert (described.format, described.shape, described.axis) == (hbfp.HBFP4, (6, 70), 1)
        assert file.description("b") is None
        assert (file.nbytes("w"), file.nbytes("b")) == (tensors["w"].nbytes, 24)
        for ask in (file.__getitem__, file.description, file.nbytes, file.verify):
            with pytest.raises(KeyError, match="'v'"):
                ask("v")
        assert repr(file) == f"<hbfp file {str(path)!r}, 3 tensors>"
        w, b = file["w"], file["b"]
    path.unlink()
    assert w == tensors["w"]
    assert np.array_equal(b, tensors["b"])
    with pytest.raises(HBFPError, match="is closed: open it again"):
        file["w"]


def test_data_that_lie_askew_are_copied(tmp_path):
    """Files of others need not be aligned; arrays that are handed on must be."""
    header = b'{"b":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}} '
    header += b" " * (3 - len(header) % 4)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + sample((3,)).tobytes())
    b = hbfp.load(tmp_path / "x")["b"]
    assert b.flags.aligned
    assert np.array_equal(b, sample((3,)))


def test_bfloat16_needs_its_package(tmp_path):
    """As it is stored it can be read without."""
    path = tmp_path / "x"
    path.write_bytes(header_of({"b": ("BF16", (2,), 4)}, {}) + bytes.fromhex("803f0040"))
    code = f"""
import hbfp
with hbfp.open({str(path)!r}) as file:
    entry, data = file.stored("b")
    assert (entry.dtype, entry.shape, data.tobytes().hex()) == ("BF16", (2,), "803f0040")
    try:
        file["b"]
    except hbfp.FileError as error:
        assert "tensor 'b': dtype: expected one that numpy has; found BF16" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    import ml_dtypes

    assert np.array_equal(hbfp.load(path)["b"], np.array([1, 2], ml_dtypes.bfloat16))


def test_two_processes_load_at_once(tmp_path):
    path = tmp_path / "x"
    t = hbfp.encode(sample((300, 700)), "hbfp4b64")
    hbfp.save(path, {"w": t})
    code = f"import hbfp, sys; sys.stdin.read(1); print(hbfp.load({str(path)!r}, verify=True)['w'].decode().sum())"
    readers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for reader in readers:  # both are there before either reads
        reader.stdin.write("x")
        reader.stdin.flush()
    hbfp.save(path, {"w": t})  # replaced under them
    assert [float(reader.communicate()[0]) for reader in readers] == [float(t.decode().sum())] * 2
    assert [reader.returncode for reader in readers] == [0, 0]
