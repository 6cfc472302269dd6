"""Models in shards: each a file of its own, found through an index that is written last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import hbfp
from hbfp import FileError
from hbfp.files import load_metadata


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([3, seed, *shape]).standard_normal(shape).astype(np.float32)


def model(seed: int = 0) -> dict[str, Any]:
    encoded = {f"layer{i}.weight": hbfp.encode(sample((8, 64), seed + i), "hbfp4b64") for i in range(4)}
    return {**encoded, "bias": sample((9,), seed)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(a[k] == b[k] if isinstance(a[k], hbfp.BlockArray) else np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def index(path):
    """Of the model in three shards."""
    hbfp.save(path, model(), {"made by": "me"}, max_shard_size=540)
    return path.with_name("model.safetensors.index.json")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_layout(path, index):
    """Names and index as other loaders of such models expect them; each shard can be read alone."""
    assert names(path.parent) == sorted([*SHARDS, index.name])
    whole = json.loads(index.read_text())
    stored = {}
    for shard in SHARDS:
        with safetensors.safe_open(path.with_name(shard), framework="np") as file:
            stored |= dict.fromkeys(file.keys(), shard)
            assert file.metadata()["made by"] == "me"
    assert whole["weight_map"] == stored
    assert whole["metadata"] == {"total_size": 4 * 8 * 33 + 36}
    assert list(hbfp.load(path.with_name(SHARDS[1]), verify=True)) == ["layer2.weight", "layer3.weight"]


def test_round_trip(path, index):
    assert same(hbfp.load(index, verify=True), model())
    assert same(hbfp.load(path, verify=True), model())  # by the name that save was given
    assert load_metadata(index) == {"made by": "me"}
    with hbfp.open(index) as file:
        assert file["layer2.weight"][2:4] == model()["layer2.weight"][2:4]


def test_what_fits_is_one_file(path):
    hbfp.save(path, model(), max_shard_size=10**6)
    assert names(path.parent) == [path.name]
    hbfp.save(path, {}, max_shard_size=1)
    assert hbfp.load(path) == {}


def test_a_tensor_is_not_divided(path):
    hbfp.save(path, model(), max_shard_size=1)
    assert len(names(path.parent)) == 6
    assert same(hbfp.load(path), model())


def test_replacing_leaves_nothing_behind(path, index):
    strangers = [path.with_name("model-extra.safetensors"), path.with_name("other-00001-of-00003.safetensors")]
    for stranger in strangers:
        stranger.write_text("somebody else's")
    for seed in (1, 2):
        hbfp.save(path, model(seed), max_shard_size=540)
        assert same(hbfp.load(path, verify=True), model(seed))
        assert len(names(path.parent)) == 4 + len(strangers)
    hbfp.save(path.with_name("m"), model(), max_shard_size=540)
    assert names(path.parent)[:4] == ["m-00001-of-00003", "m-00002-of-00003", "m-00003-of-00003", "m.index.json"]


def test_shards_take_the_place_of_a_file(path):
    """Left beside the shards, the old file would be what everybody goes on loading."""
    hbfp.save(path, model(1))
    hbfp.save(path, model(2), max_shard_size=540)
    assert not path.exists()
    assert same(hbfp.load(path), model(2))


def test_an_old_index_removes_nothing_but_shards(path, index):
    """What an index says is no reason to remove somebody's files."""
    precious = path.with_name("precious.safetensors")
    precious.write_bytes(path.with_name(SHARDS[0]).read_bytes())
    whole = json.loads(index.read_text())
    whole["weight_map"] = dict.fromkeys(whole["weight_map"], precious.name)
    index.write_text(json.dumps(whole))
    hbfp.save(path, model(1), max_shard_size=540)
    assert precious.exists()


@pytest.mark.parametrize("fails_at", range(1, 5))
def test_a_failed_save_leaves_the_old_model(path, index, monkeypatch, fails_at):
    """At each of the shards and at the index."""
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    replace, calls = hbfp.files.replacing.os.replace, []

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        hbfp.save(path, model(1), max_shard_size=540)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_failure_after_the_index_keeps_its_shards(path, index, monkeypatch):
    """The index has been renamed and leads to the new shards: tidying them up would leave nothing at all."""
    flush, calls = hbfp.files.replacing._flush_folder, []

    def fail(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        flush(folder)

    monkeypatch.setattr("hbfp.files.replacing._flush_folder", fail)
    with pytest.raises(OSError, match="Input/output"):
        hbfp.save(path, model(1), max_shard_size=540)
    assert same(hbfp.load(index, verify=True), model(1))


def edited(index: Path, edit: Any) -> None:
    whole = json.loads(index.read_text())
    edit(whole)
    index.write_text(json.dumps(whole))


PLANE = "layer0.weight.hbfp_mantissas"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("weight_map"), "weight_map: expected a JSON object; found None"),
        (lambda w: w["weight_map"].update({PLANE: "../x"}), f"tensor '{PLANE}': weight_map: .*found '../x'"),
        (lambda w: w["weight_map"].update({PLANE: "/etc/passwd"}), "found '/etc/passwd'"),
        (lambda w: w["weight_map"].update({PLANE: ".."}), "found '..'"),
        (lambda w: w["weight_map"].update({PLANE: ""}), "found ''"),
        (lambda w: w["weight_map"].update({PLANE: 3}), "found 3"),
        (lambda w: w["weight_map"].update({PLANE: "a\0b"}), "name of a file in the folder of the index"),
        (lambda w: w["weight_map"].update({"\ud800": SHARDS[0]}), "half a surrogate pair"),
        (
            lambda w: w["weight_map"].update({PLANE: SHARDS[1]}),
            f"tensor '{PLANE}': weight_map: expected a tensor that {SHARDS[1]} holds; found none",
        ),
        (lambda w: w["weight_map"].pop(PLANE), f"tensor '{PLANE}': weight_map: expected {SHARDS[0]}.*; found none"),
        (lambda w: w["weight_map"].update(x=SHARDS[0]), "tensor 'x': weight_map: expected a tensor that"),
    ],
)
def test_damaged_index(index, edit, message):
    edited(index, edit)
    with pytest.raises(FileError, match=message) as caught:
        hbfp.load(index)
    assert str(caught.value).startswith(f"{index}: ")


def test_index_that_is_none(path, index):
    index.write_text('{"weight_map": {}, "weight_map": {}}')
    with pytest.raises(FileError, match="index: expected every name once; found the name 'weight_map' twice"):
        hbfp.load(index)
    index.write_bytes(b"\xff")
    with pytest.raises(FileError, match="index: expected JSON"):
        hbfp.load(index)
    index.unlink()
    index.mkdir()
    with pytest.raises(FileError, match="expected an index of shards; found no regular file"):
        hbfp.load(index)


def test_a_missing_shard_is_the_systems_error(path, index):
    path.with_name(SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=SHARDS[1]):
        hbfp.load(index)


def test_one_array_in_two_shards(path, index):
    shard = path.with_name("model-00004-of-00003.safetensors")
    hbfp.save(shard, {"layer0.weight.x": sample((3,))})
    edited(index, lambda w: w["weight_map"].update({"layer0.weight.x": shard.name}))
    assert "layer0.weight.x" in hbfp.load(index)
    hbfp.save(shard, {"layer0.weight": sample((3,))})
    edited(index, lambda w: w["weight_map"].update({"layer0.weight": shard.name}))
    edited(index, lambda w: w["weight_map"].pop("layer0.weight.x"))
    with pytest.raises(FileError, match=r"tensor 'layer0.weight': planes: expected one array of this name"):
        hbfp.load(index)


def test_a_tensor_in_two_shards(index):
    """The index names one of them; which one is right, nobody knows."""
    first, second = (index.with_name(name) for name in SHARDS[:2])
    second.write_bytes(first.read_bytes())
    edited(index, lambda w: [w["weight_map"].pop(n) for n, file in [*w["weight_map"].items()] if file == SHARDS[1]])
    edited(index, lambda w: w["weight_map"].update({PLANE: SHARDS[1]}))
    message = (
        f"tensor '{PLANE}': weight_map: expected {SHARDS[0]}, which holds a tensor of that name; found '{SHARDS[1]}'"
    )
    with pytest.raises(FileError, match=message):
        hbfp.load(index)


@pytest.mark.parametrize("size", [0, -1, 1.5, "5GB", True])
def test_shard_sizes_are_bytes(path, size):
    with pytest.raises(FileError, match="max_shard_size must be a number of bytes from 1"):
        hbfp.save(path, model(), max_shard_size=size)
