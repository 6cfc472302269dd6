"""Files: what is written is what is read, what is damaged is refused with a name, and a failed save harms nothing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings

import hbfp
from hbfp import BlockArray, CodeError, DTypeError, FileError, files, testing
from hbfp.files import load_metadata

FORMATS = ["hbfp4b64", "hbfp6b16-noclip-e5", "hbfp12b7-ceil", "hbfp4t8", "hbfp5tensor"]


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def parts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A file as any safetensors reader sees it."""
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def description(path: Path) -> dict[str, Any]:
    return json.loads(parts(path)[1]["hbfp"])


def rewrite(path: Path, tensors: dict[str, np.ndarray], text: str | None) -> None:
    """A file made by somebody else."""
    safetensors.numpy.save_file(tensors, path, {} if text is None else {"hbfp": text})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path):
    """A file of one encoded array `w` and one plain array `b`."""
    hbfp.save(path, {"w": hbfp.encode(sample((6, 70)), hbfp.HBFP4), "b": sample((6,))})
    return path


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(), (70,), (9, 70), (2, 3, 20), (0, 4), (4, 0)], ids=str)
def test_round_trip(path, format, shape):
    x = sample(shape)
    for axis in {0, max(len(shape), 1) - 1}:
        t = hbfp.encode(x, format, axis, "stochastic", seed=1)
        hbfp.save(path, {"layer.weight": t})
        for verify in (False, True):
            loaded = hbfp.load(path, verify=verify)
            assert list(loaded) == ["layer.weight"]
            assert loaded["layer.weight"] == t
            assert loaded["layer.weight"].rounding == "stochastic"
            assert np.array_equal(loaded["layer.weight"].mantissas, t.mantissas)
            assert np.array_equal(loaded["layer.weight"].decode(), t.decode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(format=testing.formats(), x=testing.matrices(nonfinite=True, max_columns=70))
def test_round_trip_of_anything(tmp_path, format, x):
    t = hbfp.encode(x, format)
    hbfp.save(tmp_path / "x", {"x": t})
    assert hbfp.load(tmp_path / "x", verify=True)["x"] == t


def test_a_transposed_view_is_written_straight(path):
    """The planes of a transposed view are those of the transpose: written as they are they would load as nonsense."""
    for format in ("hbfp4t8", "hbfp5tensor", "hbfp4b16"):
        t = hbfp.encode(sample((9, 20)), format).T
        hbfp.save(path, {"t": t})
        assert hbfp.load(path, verify=True)["t"] == t
        assert np.array_equal(hbfp.load(path)["t"].mantissas, t.mantissas)


def test_plain_arrays_stand_beside(path):
    plain = {
        "float64": sample((3, 4)).astype(np.float64),
        "float16": sample((3,)).astype(np.float16),
        "int64": np.arange(5),
        "bool": np.array([True, False]),
        "complex64": np.array([1 + 2j], np.complex64),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    held_otherwise = {
        "fortran": np.asfortranarray(sample((3, 4))),
        "view": sample((6, 8))[::2, ::-2],
        "big-endian": sample((3, 4)).astype(">f4"),
    }
    hbfp.save(path, {**plain, **held_otherwise, "list": [1.0, 2.0]})
    loaded = hbfp.load(path)
    for name, value in plain.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert np.array_equal(loaded[name], value)
    for name, value in held_otherwise.items():
        assert loaded[name].dtype == np.float32
        assert np.array_equal(loaded[name], value)
    assert loaded["list"].tolist() == [1.0, 2.0]


def test_a_file_of_others_loads(path):
    """Any safetensors file is one of plain arrays."""
    safetensors.numpy.save_file({"x": sample((3,))}, path)
    assert np.array_equal(hbfp.load(path)["x"], sample((3,)))
    hbfp.save(path, {})
    assert hbfp.load(path) == {}


def test_layout_on_disk(saved):
    """The file as the specification describes it to other readers."""
    t = hbfp.encode(sample((6, 70)), hbfp.HBFP4)
    tensors, metadata = parts(saved)
    assert set(tensors) == {"w.hbfp_exponents", "w.hbfp_mantissas", "b"}
    assert tensors["w.hbfp_exponents"].shape == (6, 2)
    assert tensors["w.hbfp_mantissas"].shape == (6, 35)
    assert np.array_equal(tensors["w.hbfp_exponents"], t.exponent_plane)
    assert np.array_equal(tensors["w.hbfp_mantissas"], t.mantissa_plane)
    assert set(metadata) == {"hbfp"}
    digest = hashlib.sha256(t.exponent_plane.tobytes() + t.mantissa_plane.tobytes()).hexdigest()
    assert json.loads(metadata["hbfp"]) == {
        "version": 1,
        "tensors": {
            "w": {"format": "hbfp4b64", "shape": [6, 70], "axis": 1, "rounding": "nearest_even", "sha256": digest}
        },
    }


def test_optional_fields_may_be_absent(saved):
    tensors, _ = parts(saved)
    entry = {"format": "hbfp4b64", "shape": [6, 70], "axis": 1, "a later field": 3}
    rewrite(saved, tensors, json.dumps({"version": 1, "tensors": {"w": entry}}))
    w = hbfp.load(saved)["w"]
    assert w == hbfp.encode(sample((6, 70)), hbfp.HBFP4)
    assert w.rounding is None
    with pytest.raises(FileError, match="'w': sha256: expected one to verify"):
        hbfp.load(saved, verify=True)
    hbfp.save(saved, {"w": w})
    assert "rounding" not in description(saved)["tensors"]["w"]
    assert hbfp.load(saved, verify=True)["w"] == w


def test_metadata(path):
    hbfp.save(path, {"x": sample((3,))}, {"made by": "me", "näme": "→"})
    assert load_metadata(path) == {"made by": "me", "näme": "→"}
    assert parts(path)[1]["made by"] == "me"
    hbfp.save(path, {"x": sample((3,))})
    assert load_metadata(path) == {}


def test_files_are_the_same_for_the_same_arrays(tmp_path):
    """A timestamp or a set's order in a file makes every build differ."""
    tensors = {name: hbfp.encode(sample((5, 70)), hbfp.HBFP4) for name in ("b", "a", "c")}
    for name in ("one", "two"):
        hbfp.save(tmp_path / name, tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# --- saving whole or not at all --------------------------------------------------------------------------------------


def only_file(folder: Path) -> bytes:
    """The content of the one file of a folder: no draft was left beside it."""
    (file,) = folder.iterdir()
    return file.read_bytes()


@pytest.mark.parametrize("step", ["digest", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, step, error):
    old = saved.read_bytes()

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(files.description if step == "digest" else os, step, fail)
    with pytest.raises(type(error)):
        hbfp.save(saved, {"w": hbfp.encode(sample((3,)), hbfp.HBFP4)})
    monkeypatch.undo()
    assert only_file(saved.parent) == old


def test_a_refused_save_leaves_the_old_file(saved):
    old = saved.read_bytes()
    with pytest.raises(DTypeError):
        hbfp.save(saved, {"a": sample((3,)), "x": np.array(["text"])})
    assert only_file(saved.parent) == old


def test_the_file_is_on_disk_before_it_has_its_name(saved, monkeypatch):
    """Renamed first and flushed later, a power cut leaves an empty file under the good name."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("flush"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    hbfp.save(saved, {"w": sample((3,))})
    assert calls == ["flush", "rename", "flush"]
    assert np.array_equal(hbfp.load(saved)["w"], sample((3,)))


def test_a_new_file_has_the_usual_permissions(path):
    """Temporary files are private; a model saved through one must not be."""
    before = os.umask(0o027)
    try:
        hbfp.save(path, {"x": sample((3,))})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_replaced_file_keeps_its_permissions(saved):
    saved.chmod(0o604)
    hbfp.save(saved, {"x": sample((3,))})
    assert stat.S_IMODE(saved.stat().st_mode) == 0o604


def test_a_symbolic_link_stays_one(saved):
    link = saved.with_name("link")
    link.symlink_to(saved)
    hbfp.save(link, {"x": sample((3,))})
    assert link.is_symlink()
    assert list(hbfp.load(saved)) == ["x"]


def test_paths_may_be_strings(saved):
    assert hbfp.load(str(saved)).keys() == hbfp.load(saved).keys()
    hbfp.save(str(saved), {"x": sample((3,))})
    assert list(hbfp.load(saved)) == ["x"]


def test_saving_what_was_loaded_from_the_same_file(saved):
    """Planes that are still a view of the file being replaced."""
    loaded = hbfp.load(saved)
    hbfp.save(saved, loaded)
    again = hbfp.load(saved, verify=True)
    assert again["w"] == loaded["w"]
    assert np.array_equal(again["b"], loaded["b"])


# --- what save refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.hbfp_exponents", "w.hbfp_mantissas", ".hbfp_mantissas", "__metadata__"])
def test_reserved_names(path, name):
    with pytest.raises(FileError, match=f"{path}: tensor '{name}': .*keeps this name for itself: use another"):
        hbfp.save(path, {name: sample((3,))})
    assert not path.exists()


def test_names_and_metadata_must_be_strings(path):
    with pytest.raises(FileError, match="names of tensors must be strings; found 3"):
        hbfp.save(path, {3: sample((3,))})
    with pytest.raises(FileError, match="metadata must map strings to strings; found 'epoch': 3"):
        hbfp.save(path, {}, {"epoch": 3})


def test_the_metadata_key_is_reserved(path):
    with pytest.raises(FileError, match="metadata key 'hbfp' holds the description of the tensors: use another"):
        hbfp.save(path, {}, {"hbfp": "{}"})


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.zeros(2, np.complex128)], ids=str)
def test_arrays_that_the_container_does_not_have(path, value):
    with pytest.raises(DTypeError, match=f"{path}: tensor 'x': arrays of .* cannot be stored: convert"):
        hbfp.save(path, {"x": value})


def test_damaged_codes_are_not_written_on(saved):
    """An unread array copied from file to file would carry its damage along, with a fresh checksum."""
    damage_codes(saved)
    with pytest.raises(CodeError, match="tensor 'w'"):
        hbfp.save(saved.with_name("copy"), hbfp.load(saved))
    assert list(saved.parent.iterdir()) == [saved]


# --- what load refuses -----------------------------------------------------------------------------------------------


def change(saved: Path, edit: Any) -> None:
    """The saved file with its tensors and its description edited."""
    tensors, metadata = parts(saved)
    whole = json.loads(metadata["hbfp"])
    edit(tensors, whole)
    rewrite(saved, tensors, json.dumps(whole))


def damage_codes(saved: Path) -> None:
    """The forbidden code -8 in the first block of `w`, under a correct checksum."""

    def edit(tensors: dict[str, np.ndarray], whole: dict[str, Any]) -> None:
        tensors["w.hbfp_mantissas"][0, 0] = 0x88
        planes = tensors["w.hbfp_exponents"].tobytes() + tensors["w.hbfp_mantissas"].tobytes()
        whole["tensors"]["w"]["sha256"] = hashlib.sha256(planes).hexdigest()

    change(saved, edit)


def set_field(field: str, value: Any) -> Any:
    return lambda tensors, whole: whole["tensors"]["w"].__setitem__(field, value)


DAMAGE = {
    "version of the future": (lambda t, w: w.update(version=2), "version: expected 1.*; found 2"),
    "version as text": (lambda t, w: w.update(version="1"), "version: expected 1.*; found '1'"),
    "version as bool": (lambda t, w: w.update(version=True), "version: expected 1.*; found True"),
    "no version": (lambda t, w: w.pop("version"), "version: expected 1.*; found None"),
    "no tensors": (lambda t, w: w.pop("tensors"), "tensors: expected a JSON object; found None"),
    "tensors as list": (lambda t, w: w.update(tensors=[]), r"tensors: expected a JSON object; found \[\]"),
    "entry as text": (
        lambda t, w: w["tensors"].update(w="hbfp4b64"),
        "tensor 'w': description: expected a JSON object; found 'hbfp4b64'",
    ),
    "no exponents": (
        lambda t, w: t.pop("w.hbfp_exponents"),
        "tensor 'w': planes: expected a plane 'w.hbfp_exponents'; found none",
    ),
    "no mantissas": (
        lambda t, w: t.pop("w.hbfp_mantissas"),
        "tensor 'w': planes: expected a plane 'w.hbfp_mantissas'; found none",
    ),
    "no description": (
        lambda t, w: w["tensors"].clear(),
        "tensor 'w': description: expected one for the plane 'w.hbfp_exponents'; found none",
    ),
    "a plain twin": (
        lambda t, w: t.update(w=np.zeros(3, np.float32)),
        "tensor 'w': planes: expected an encoded array only; found a plain array of the same name",
    ),
    "exponents of another shape": (
        lambda t, w: t.update({"w.hbfp_exponents": np.zeros((6, 3), np.uint8)}),
        r"tensor 'w': hbfp_exponents: expected U8 \[6, 2\]; found U8 \[6, 3\]",
    ),
    "mantissas of another shape": (
        lambda t, w: t.update({"w.hbfp_mantissas": np.zeros((6 * 35,), np.uint8)}),
        r"tensor 'w': hbfp_mantissas: expected U8 \[6, 35\]; found U8 \[210\]",
    ),
    "planes of another type": (
        lambda t, w: t.update({"w.hbfp_mantissas": np.zeros((6, 35), np.int8)}),
        r"tensor 'w': hbfp_mantissas: expected U8 \[6, 35\]; found I8",
    ),
    "no format": (set_field("format", None), "tensor 'w': format: expected"),
    "unknown format": (set_field("format", "hbfp99b64"), "tensor 'w': format: expected.*found.*99"),
    "another format": (set_field("format", "hbfp5b64"), "tensor 'w': hbfp_mantissas: expected U8"),
    "shape as number": (set_field("shape", 420), "tensor 'w': shape: expected a list of sizes.*found 420"),
    "negative size": (set_field("shape", [-6, 70]), r"tensor 'w': shape: expected.*found \[-6, 70\]"),
    "size as bool": (set_field("shape", [True, 70]), r"tensor 'w': shape: expected.*found \[True, 70\]"),
    "size as float": (set_field("shape", [6.0, 70]), r"tensor 'w': shape: expected.*found \[6.0, 70\]"),
    "huge size": (set_field("shape", [2**70]), r"tensor 'w': shape: expected.*found \[1180591620717411303424\]"),
    "overflow": (set_field("shape", [2**33, 2**33]), "tensor 'w': shape: expected at most 2.63 - 1 elements"),
    "hidden overflow": (set_field("shape", [2**40, 2**22, 2]), "tensor 'w': "),
    "shape of another size": (set_field("shape", [7, 70]), r"tensor 'w': hbfp_exponents: expected U8 \[7, 2\]"),
    "negative axis": (set_field("axis", -1), "tensor 'w': axis: expected.*counted from 0; found -1"),
    "axis outside": (set_field("axis", 2), "tensor 'w': axis: expected.*found 2"),
    "axis as bool": (set_field("axis", True), "tensor 'w': axis: expected.*found True"),
    "no axis": (set_field("axis", None), "tensor 'w': axis: expected.*found None"),
    "another axis": (set_field("axis", 0), r"tensor 'w': hbfp_exponents: expected U8 \[70, 1\]; found U8 \[6, 2\]"),
    "unknown rounding": (set_field("rounding", "up"), "tensor 'w': rounding: expected one of nearest_even.*found 'up'"),
    "rounding as list": (set_field("rounding", []), r"tensor 'w': rounding: expected one of.*found \[\]"),
    "checksum as number": (set_field("sha256", 3), "tensor 'w': sha256: expected 64 hexadecimal digits; found 3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_structure(saved, kind):
    """Each is refused before anything is used, by a message that names file, tensor, field, expectation and finding."""
    edit, message = DAMAGE[kind]
    change(saved, edit)
    with pytest.raises(FileError, match=message) as caught:
        hbfp.load(saved)
    assert str(caught.value).startswith(f"{saved}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "description: expected JSON"),
        ("{", "description: expected JSON"),
        ("[1]", r"description: expected a JSON object; found \[1\]"),
        ("[" * 100000, "description: expected JSON"),
        ('{"version": 1, "version": 1, "tensors": {}}', "description: expected every name once"),
    ],
)
def test_description_that_is_no_json_object(saved, text, message):
    tensors, _ = parts(saved)
    rewrite(saved, tensors, text)
    with pytest.raises(FileError, match=message):
        hbfp.load(saved)


def test_planes_without_any_description(saved):
    tensors, _ = parts(saved)
    rewrite(saved, tensors, None)
    with pytest.raises(FileError, match="tensor 'w': description: expected one"):
        hbfp.load(saved)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"\xff" * 64], ids=["empty", "text", "ones"])
def test_not_a_safetensors_file(path, content):
    path.write_bytes(content)
    for read in (hbfp.load, load_metadata):
        with pytest.raises(FileError, match=f"{path}: expected a safetensors file"):
            read(path)


def test_a_file_cut_short(saved):
    content = saved.read_bytes()
    for length in range(0, len(content), 7):
        saved.write_bytes(content[:length])
        with pytest.raises(FileError, match="expected a safetensors file"):
            hbfp.load(saved)


def test_a_missing_file_is_the_systems_error(path):
    with pytest.raises(FileNotFoundError):
        hbfp.load(path)
    with pytest.raises(FileNotFoundError):
        hbfp.save(path / "no folder" / "x", {})


def test_a_plain_array_that_numpy_has_not(path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(FileError, match="tensor 'x': dtype: expected one that numpy has; found F4"):
        hbfp.load(path)


def test_codes_are_checked_when_they_are_first_read(saved):
    """The structure of a large file is checked at once, its codes only where they are used."""
    damage_codes(saved)
    uses = [
        lambda w: w.mantissas,
        lambda w: w.decode(),
        lambda w: np.asarray(w),
        lambda w: w.check_codes(),
        lambda w: hbfp.linear(sample((2, 70)), w),
        lambda w: hbfp.matmul(sample((2, 70)), w.T),
        lambda w: hbfp.matmul(w, sample((70, 2))),
        lambda w: hbfp.prepack(w),
        lambda w: w.T.mantissas,
    ]
    for use in uses:
        w = hbfp.load(saved)["w"]
        assert isinstance(w, BlockArray)
        with pytest.raises(CodeError, match=f"{saved}: tensor 'w': expected.*found"):
            use(w)


def test_verify_reads_the_codes(saved):
    damage_codes(saved)
    with pytest.raises(CodeError, match="tensor 'w'"):
        hbfp.load(saved, verify=True)


@pytest.mark.parametrize("plane", ["w.hbfp_exponents", "w.hbfp_mantissas"])
def test_verify_finds_one_flipped_bit(saved, plane):
    """A bit that leaves a valid code behind: only the checksum can tell."""

    def edit(tensors: dict[str, np.ndarray], whole: dict[str, Any]) -> None:
        tensors[plane][3, 1] ^= 0x01

    change(saved, edit)
    hbfp.load(saved)
    with pytest.raises(FileError, match=r"tensor 'w': sha256: expected [0-9a-f]{64}; found [0-9a-f]{64}"):
        hbfp.load(saved, verify=True)
