"""Files by somebody who means harm, or whose disk does: refused by name, whatever is wrong, and never anything else."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hbfp
from hbfp import BlockArray, CodeError, FileError
from hbfp.files import load_metadata

FILES = sorted(hostile_files.HOSTILE.iterdir())


def read_all(path: Path) -> dict[str, Any]:
    """Everything a file has: codes and values of what is encoded, its digest where it has one, and some rows."""
    with hbfp.open(path) as file:
        for name in file:
            described = file.description(name)
            if described is not None and described.sha256 is not None:
                file.verify(name)
            array = file[name]
            if isinstance(array, BlockArray):
                array.check_codes()
                assert np.array_equal(array.mantissas.shape, array.shape)
                with contextlib.suppress(hbfp.ShapeError):  # a block would be cut
                    array[: array.shape[0] // 2 if array.shape else 0].decode()
                array.decode()
            else:
                array.tobytes()  # no arithmetic: a float may be a NaN that signals
        return dict(file)


# --- the corpus ------------------------------------------------------------------------------------------------------


def test_the_corpus_is_what_its_script_makes():
    assert {path.name: path.read_bytes() for path in FILES} == hostile_files.build_all()
    assert sum(path.stat().st_size for path in FILES) < 100_000


def test_a_healthy_file_loads(tmp_path):
    """The corpus would be refused for nothing if what it damages were not whole."""
    (tmp_path / "x").write_bytes(hostile_files.build(hostile_files.text()))
    content = read_all(tmp_path / "x")
    assert content["b"].tolist() == [1, 2]
    assert content["w"].mantissas.tolist() == [[4, -2, 1, 0, 7, 1, 2, 0, 3], [1, -1, 7, -7, 3, 0, 0, 0, 1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_refused_by_name(path):
    with pytest.raises((FileError, CodeError)) as caught:
        read_all(path)
    _, message = hostile_files.CASES[path.stem]
    assert str(caught.value).removeprefix(f"{path}: ")[: len(message)] == message
    assert len(str(caught.value)) < 500 + len(str(path))  # what a file says is not repeated at any length


# --- what does not fit into a corpus ---------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(("begin", "end"), [('{"a":', "}"), ('{"a":[', "]}")])
def test_deep_json(path, begin, end):
    """A parser that recurses runs out of stack; it must not take the process along."""
    deep = begin * 200_000 + "1" + end * 200_000
    for content in (hostile_files.build(deep), hostile_files.build(hostile_files.text(description=deep))):
        path.write_bytes(content)
        with pytest.raises(FileError, match="expected JSON; found brackets nested too deeply"):
            hbfp.load(path)


def test_a_huge_header_is_not_read(path):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(2 * 10**8)  # sparse
    with pytest.raises(FileError, match="a header of at most 100000000 bytes; found one of 100000001"):
        hbfp.load(path)


def test_many_tensors(path):
    """A header of megabytes is no reason for a quadratic check."""
    n = 20_000
    header = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(n)}
    path.write_bytes(hostile_files.build(json.dumps(header), bytes(n)))
    assert len(hbfp.open(path)) == n


def test_dimensions_of_zero_elements_are_not_counted_to(path):
    """2^50 empty rows are a plane of no bytes: nothing may loop over them."""
    for shape in ([2**50, 0], [0, 2**50], [2**25, 0, 2**25]):
        for format in ("hbfp4b64", "hbfp16b1", "hbfp4t8", "hbfp16t32", "hbfp4tensor"):
            for axis in range(len(shape)) if "b" in format[3:6] else [len(shape) - 1]:
                planes = hbfp.HBFP.parse(format).plane_shapes(tuple(shape), axis)
                header = {
                    "w.hbfp_exponents": {"dtype": "U8", "shape": list(planes[0]), "data_offsets": [0, 0]},
                    "w.hbfp_mantissas": {"dtype": "U8", "shape": list(planes[1]), "data_offsets": [0, 0]},
                }
                told = {"version": 1, "tensors": {"w": {"format": format, "shape": shape, "axis": axis}}}
                path.write_bytes(hostile_files.build(hostile_files.text(header, told), b""))
                w = read_all(path)["w"]
                assert w.shape == tuple(shape)
                assert w.decode().shape == tuple(shape)
    told["tensors"]["w"] |= {"shape": [2**61, 0], "axis": 1}  # no array of float32 could have it
    path.write_bytes(hostile_files.build(hostile_files.text(header, told), b""))
    with pytest.raises(FileError, match="'w': shape: expected a shape whose elements can be counted"):
        hbfp.load(path)


def test_no_regular_file(tmp_path):
    """A pipe without a writer would be waited for; a folder is the system's EISDIR at best."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place, found in ((pipe, "a pipe, a socket or a device"), (tmp_path, "a folder"), (Path(os.devnull), "a pipe")):
        for read in (hbfp.load, hbfp.open, load_metadata):
            with pytest.raises(FileError, match=f"{place}: expected a safetensors file; found {found}"):
                read(place)


def test_a_file_that_may_not_be_read(path):
    hbfp.save(path, {})
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(PermissionError):
        hbfp.load(path)


# --- fuzzing ---------------------------------------------------------------------------------------------------------

_NUMBERS = [0, 1, 2, -1, 7, 64, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**40, 0.0, 1.0, float("inf"), True, False]
_TEXTS = [
    "",
    "w",
    "hbfp4b64",
    "hbfp4b5",
    "hbfp6b5",
    "hbfp4t3",
    "hbfp4tensor",
    "U8",
    "F32",
    "BF16",
    "F4",
    "\ud800",
    "\0",
]
_TREES = [None, [], [0], [1, 1], [2, 9], [9, 2], [0, 2**62], {}, {"a": 1}, [[[]]]]
EVIL = st.sampled_from([*_NUMBERS, *_TEXTS, *_TREES])


def healthy() -> bytes:
    """A file with every kind of block, and digests."""
    x = np.random.default_rng(4).standard_normal((4, 9)).astype(np.float32)
    formats = ["hbfp4b4", "hbfp6b5", "hbfp8b64", "hbfp5t3", "hbfp12tensor"]
    tensors = {f"w{i}": hbfp.encode(x, format, i % 2) for i, format in enumerate(formats)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "healthy"
        hbfp.save(path, {**tensors, "plain": x, "count": np.arange(3), "nothing": x[:0]}, {"made by": "me"})
        return path.read_bytes()


HEALTHY = healthy()


def split(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, description and data."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["hbfp"]), content[8 + length :]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of JSON."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """The healthy file with some fields of its JSON, or some of its bytes, changed."""
    header, description, data = split(HEALTHY)
    header, description = copy.deepcopy(header), copy.deepcopy(description)
    for _ in range(draw(st.integers(0, 3))):
        tree = draw(st.sampled_from([header, description]))
        if not tree:
            continue
        container, key = draw(st.sampled_from(places(tree)))
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "copy"]))
        if what == "replace":
            container[key] = copy.deepcopy(draw(EVIL))
        elif what == "remove":
            del container[key]
        elif isinstance(container, dict):
            other = draw(st.sampled_from([str(k) for c, k in places(tree)]))
            container[other] = copy.deepcopy(container[key])
            if what == "rename":
                del container[key]
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "hbfp" in metadata and isinstance(metadata["hbfp"], str):
        metadata["hbfp"] = json.dumps(description)
    text = json.dumps(header).encode()
    if draw(st.integers(0, 9)) == 0:  # a name twice
        text = text.replace(b"{", b'{"count": 1, ', 1)
    content = bytearray(struct.pack("<Q", len(text)) + text + data)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 4]))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        what = draw(st.sampled_from(["flip", "set", "insert", "cut", "cut off"]))
        if what == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set" and content:
            content[at] = draw(st.sampled_from([0x00, 0x80, 0x88, 0xFF, 0x7B, 0x22]))
        elif what == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif what == "cut":
            del content[at : at + draw(st.integers(1, 9))]
        else:
            del content[at:]
    return bytes(content)


def planes_of(content: dict[str, Any]) -> set[tuple[bytes, bytes]]:
    return {
        (t.exponent_plane.tobytes(), t.mantissa_plane.tobytes()) for t in content.values() if isinstance(t, BlockArray)
    }


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=settings.default.max_examples * 5,
)
@given(content=mutants())
def test_a_mutant_loads_equal_planes_or_is_refused(tmp_path, content):
    """Never another error, never a warning; under their digests the planes are those that were written."""
    path = tmp_path / "healthy"
    path.write_bytes(HEALTHY)
    known = planes_of(hbfp.load(path))
    path = tmp_path / "mutant"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(FileError, CodeError):
            read_all(path)
        with contextlib.suppress(FileError, CodeError):
            loaded = hbfp.load(path, verify=True)
            assert planes_of(loaded) <= known
            hbfp.save(tmp_path / "again", loaded)
            assert planes_of(hbfp.load(tmp_path / "again", verify=True)) == planes_of(loaded)
