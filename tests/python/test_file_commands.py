"""hbfp quantize, inspect, diff and verify: what they do to files, what they print, and how they end."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import hbfp
from hbfp import BlockArray
from hbfp.files.container import header_of
from hbfp.tools.blocks import block, first_element
from hbfp.tools.cli import main


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([5, seed, *shape]).standard_normal(shape).astype(np.float32)


MODEL = {
    "embedding.weight": sample((40, 32)),
    "blocks.0.mlp.weight": sample((24, 70)),
    "blocks.0.mlp.bias": sample((24,)),
    "blocks.0.norm.weight": sample((70,)),
    "conv.weight": sample((8, 32, 3, 3)),
    "stem.weight": sample((8, 3, 3, 3)),
    "half": sample((20, 20)).astype(np.float16),
    "double": sample((20, 20)).astype(np.float64),
    "count": np.arange(6).reshape(2, 3),
    "mask": np.ones((16, 16), bool),
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path, {"format": "pt"})
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "packed.safetensors"


def formats(path: Path) -> dict[str, tuple[str, int] | None]:
    with hbfp.open(path) as file:
        told = {name: file.description(name) for name in file}
    return {name: None if d is None else (str(d.format), d.axis) for name, d in told.items()}


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# --- quantize --------------------------------------------------------------------------------------------------------


def test_quantize_packs_what_is_worth_it(source, target, capsys):
    assert main(["quantize", str(source), str(target)]) == 0
    assert "5 of 10 tensors packed" in capsys.readouterr().out
    packed = {
        "embedding.weight": ("hbfp4b64", 1),
        "blocks.0.mlp.weight": ("hbfp4b64", 1),
        "conv.weight": ("hbfp4b64", 1),
        "half": ("hbfp4b64", 1),
        "double": ("hbfp4b64", 1),
    }
    assert formats(target) == {name: packed.get(name) for name in MODEL}
    with hbfp.open(target) as file:
        assert file.metadata == {"format": "pt"}
        for name, x in MODEL.items():
            if name in packed:
                assert file[name] == hbfp.encode(x, *packed[name])
                file.verify(name)
            else:
                assert file[name].dtype == x.dtype
                assert np.array_equal(file[name], x)


def test_rules(source, target):
    rules = ["blocks.*.bias=hbfp8b16", "blocks=hbfp6b16@0", "re:.*onv.*=none", "stem.weight=hbfp4t3", "*=hbfp12b7"]
    arguments = [word for rule in rules for word in ("--rule", rule)]
    assert main(["quantize", str(source), str(target), *arguments]) == 0
    assert formats(target) == {
        "embedding.weight": ("hbfp12b7", 1),
        "blocks.0.mlp.weight": ("hbfp6b16", 0),
        "blocks.0.mlp.bias": ("hbfp8b16", 0),
        "blocks.0.norm.weight": ("hbfp6b16", 0),
        "conv.weight": None,
        "stem.weight": ("hbfp4t3", 3),
        "half": ("hbfp12b7", 1),
        "double": ("hbfp12b7", 1),
        "count": None,
        "mask": None,
    }


def test_the_format_of_the_rest(source, target):
    assert main(["quantize", str(source), str(target), "--format", "hbfp6b16"]) == 0
    assert formats(target)["embedding.weight"] == ("hbfp6b16", 1)


def test_bfloat16_is_widened_and_what_stays_keeps_its_bytes(tmp_path, target):
    x = sample((20, 32))
    patterns = (x.view(np.uint32) >> 16).astype(np.uint16)
    entries = {"w": ("BF16", (20, 32), 1280), "b": ("BF16", (3,), 6)}
    (tmp_path / "x").write_bytes(header_of(entries, {}) + patterns.tobytes() + b"abcdef")
    assert main(["quantize", str(tmp_path / "x"), str(target)]) == 0
    with hbfp.open(target) as file:
        assert file["w"] == hbfp.encode((patterns.astype(np.uint32) << 16).view(np.float32), "hbfp4b64")
        entry, data = file.stored("b")
        assert (entry.dtype, data.tobytes()) == ("BF16", b"abcdef")


def test_what_is_packed_already_stays(source, target, tmp_path):
    again = tmp_path / "again"
    assert main(["quantize", str(source), str(target)]) == 0
    assert main(["quantize", str(target), str(again), "--rule", "*=hbfp8b64"]) == 0
    assert formats(again)["embedding.weight"] == ("hbfp4b64", 1)
    assert formats(again)["stem.weight"] == ("hbfp8b64", 1)


def test_a_file_may_replace_itself(source):
    assert main(["quantize", str(source), str(source)]) == 0
    assert formats(source)["embedding.weight"] == ("hbfp4b64", 1)


def test_shards_in_and_out(source, target, tmp_path, capsys):
    assert main(["quantize", str(source), str(target), "--max-shard-size", "1KB"]) == 0
    index = f"{target}.index.json"
    assert json.loads(Path(index).read_text())["weight_map"]
    once = tmp_path / "once"
    assert main(["quantize", index, str(once)]) == 0
    capsys.readouterr()
    assert main(["diff", index, str(once)]) == 0
    assert main(["verify", index]) == 0


def test_a_dry_run_writes_nothing_and_tells_the_errors(source, capsys):
    before = set(source.parent.iterdir())
    assert main(["quantize", str(source), "--dry-run", "--json"]) == 0
    assert set(source.parent.iterdir()) == before
    whole = printed(capsys)
    rows = {row["name"]: row for row in whole["tensors"]}
    assert rows.keys() == MODEL.keys()
    for name, x in MODEL.items():
        row = rows[name]
        assert (row["bytes"], tuple(row["shape"])) == (x.nbytes, x.shape)
        if row["format"] is None:
            assert row["packed_bytes"] == x.nbytes
            assert row["sqnr"] is None
            continue
        t = hbfp.encode(x, row["format"], row["axis"])
        assert row["packed_bytes"] == t.nbytes
        y = x.astype(np.float32).astype(np.float64)
        noise = np.square(y - t.decode()).sum()
        # A sum's order is not defined; the decibels are.
        assert row["sqnr"] == pytest.approx(10 * np.log10(np.square(y).sum() / noise), rel=1e-6)
    assert whole["bytes"] == sum(x.nbytes for x in MODEL.values())
    assert main(["quantize", str(source), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in MODEL)
    assert "SQNR" in table


def test_an_exact_encoding_has_no_decibels(tmp_path, capsys):
    hbfp.save(tmp_path / "x", {"w": np.ones((4, 64), np.float32), "z": np.zeros((4, 64), np.float32)})
    assert main(["quantize", str(tmp_path / "x"), "--dry-run", "--json"]) == 0
    assert [row["sqnr"] for row in printed(capsys)["tensors"]] == [None, None]
    assert main(["quantize", str(tmp_path / "x"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("exact") == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["OUT", "--format", "fp8"], "fp8"),
        (["OUT", "--rule", "nothing*=hbfp6b64"], "covers no tensor"),
        (["OUT", "--rule", "hbfp6b64"], "expected PATTERN=FORMAT"),
        (["OUT", "--rule", "*=hbfp99b64"], "99"),
        (["OUT", "--rule", "re:(=none"], "no regular expression"),
        (["OUT", "--rule", "*=hbfp4b64@x"], "'*=hbfp4b64@x'"),
        (["OUT", "--rule", "*=hbfp4b64@7"], "tensor 'blocks.0.mlp.bias': axis must lie in"),
        (["OUT", "--max-shard-size", "many"], "such as 5GB"),
        (["OUT", "--dry-run"], "IN and --dry-run"),
        ([], "IN and OUT"),
    ],
)
def test_bad_usage_takes_one_line_and_leaves_nothing(source, target, capsys, arguments, named):
    words = [str(target) if word == "OUT" else word for word in arguments]
    assert main(["quantize", str(source), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02 no pickle", b"text"], ids=str)
def test_what_is_no_checkpoint_takes_one_line(tmp_path, capsys, content):
    if content[:1] in (b"P", b"\x80"):
        pytest.importorskip("torch")
    (tmp_path / "x").write_bytes(content)
    assert main(["quantize", str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "x") in err
    assert err.count("\n") == 1


def test_nothing_non_finite_is_packed_unasked(tmp_path, target, capsys):
    w = sample((4, 64))
    w[2, 3] = -np.inf
    hbfp.save(tmp_path / "x", {"mask": w})
    assert main(["quantize", str(tmp_path / "x"), str(target)]) == 2
    assert "tensor 'mask'" in (err := capsys.readouterr().err)
    assert "--rule 'mask=none'" in err
    assert not target.exists()
    assert main(["quantize", str(tmp_path / "x"), str(target), "--rule", "mask=none"]) == 0


def test_checkpoints_of_torch(tmp_path, target, source):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(x.copy()) for name, x in MODEL.items()}
    state |= {"bf16": torch.from_numpy(sample((4, 64))).bfloat16(), "across": torch.from_numpy(sample((64, 4))).T}
    expected = {name: hbfp.encode(x, "hbfp4b64", 1) for name, x in MODEL.items() if name == "embedding.weight"}
    expected["bf16"] = hbfp.encode(state["bf16"].float(), "hbfp4b64", 1)
    expected["across"] = hbfp.encode(sample((64, 4)).T, "hbfp4b64", 1)
    for i, content in enumerate([state, {"state_dict": state, "epoch": 3}, {"model": state}]):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=i != 1)
        assert main(["quantize", str(tmp_path / "m.pt"), str(target)]) == 0
        with hbfp.open(target) as file:
            assert set(file) == set(state)
            for name, t in expected.items():
                assert file[name] == t
            assert np.array_equal(file["mask"], MODEL["mask"])
            assert np.array_equal(file["count"], MODEL["count"])


def test_a_pickle_that_runs_code_does_not(tmp_path, target, capsys):
    """weights_only: a checkpoint of strangers must not be a program."""
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"w": Evil()}, tmp_path / "m.pt")
    assert main(["quantize", str(tmp_path / "m.pt"), str(target)]) == 2
    assert "torch.load(weights_only=True)" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"w": "text"}], ids=str)
def test_a_pickle_of_something_else(tmp_path, target, capsys, content):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "m.pt")
    assert main(["quantize", str(tmp_path / "m.pt"), str(target)]) == 2
    assert "expected" in capsys.readouterr().err


ANONYMOUS = """
import sys
from hbfp.tools import progress
from hbfp.tools.cli import main

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

seen = []
progress.Progress.add = lambda self, name, nbytes: seen.append(anonymous())
assert main(["quantize", *sys.argv[1:]]) == 0
print(max(seen) - min(seen))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc/self/smaps_rollup")
def test_memory_is_that_of_one_tensor(tmp_path, target):
    """32 tensors of 4 MiB: held until the end, their codes alone would take 17 MiB, their floats 128."""
    path = tmp_path / "x"
    hbfp.save(path, dict.fromkeys((f"w{i}" for i in range(32)), sample((1024, 1024))))
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, str(path), str(target)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 8 * 2**20


def test_progress_is_for_terminals(source, target):
    command = [sys.executable, "-m", "hbfp", "quantize", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    master, slave = pty.openpty()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, text=True, check=True)
        os.close(slave)
        assert b"%" in os.read(master, 10_000)
    finally:
        os.close(master)
    assert "%" not in done.stdout


def test_ctrl_c_leaves_nothing(tmp_path, target):
    """Pressed while the first tensor is being written."""
    hbfp.save(tmp_path / "x", {"w": sample((256, 256)), "v": sample((256, 256))})
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from hbfp.tools import progress
from hbfp.tools.cli import main
progress.Progress.add = lambda self, name, nbytes: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main(["quantize", *sys.argv[1:]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x"), str(target)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(target):
    """A file with every kind of block."""
    x = sample((7, 20))
    x[3, 18] = np.nan
    tensors = {
        "lines": hbfp.encode(x, "hbfp4b16"),
        "columns": hbfp.encode(x, "hbfp6b5", 0),
        "middle": hbfp.encode(sample((2, 9, 3)), "hbfp12b4", 1),
        "tiles": hbfp.encode(sample((2, 5, 8)), "hbfp5t3"),
        "row": hbfp.encode(x[0], "hbfp4t3"),
        "tensor": hbfp.encode(sample((3, 4)), "hbfp8tensor"),
        "one": hbfp.encode(sample(()), "hbfp4b64"),
        "plain": sample((3,)),
        "empty": np.zeros((0, 3), np.float32),
    }
    hbfp.save(target, tensors, {"made by": "me"})
    return target


def test_inspect_lists_what_a_file_has(packed, capsys):
    assert main(["inspect", str(packed), "--json"]) == 0
    whole = printed(capsys)
    content = hbfp.load(packed)
    assert whole["metadata"] == {"made by": "me"}
    assert [row["name"] for row in whole["tensors"]] == list(content)
    for row in whole["tensors"]:
        value = content[row["name"]]
        assert row["shape"] == list(value.shape)
        assert row["bytes"] == value.nbytes
        assert row["format"] == (str(value.format) if isinstance(value, BlockArray) else "F32")
    assert main(["inspect", str(packed)]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in content)
    assert "9 tensors, 7 of them encoded" in table


def test_every_block_is_shown_as_it_is(packed, capsys):
    """Codes, exponents and places of `--block` are those that the array has there."""
    for name, t in hbfp.load(packed).items():
        if not isinstance(t, BlockArray):
            continue
        seen = np.zeros(t.shape, bool)
        rows, columns = t.exponent_plane.shape
        for row in range(rows):
            for column in range(columns):
                assert main(["inspect", str(packed), "--block", name, str(row), str(column), "--json"]) == 0
                found = printed(capsys)
                first = tuple(found["first_element"])
                assert first == first_element(t, row, column)
                tile = t.format.tile
                if tile is not None:
                    down, across = [1] * (t.ndim - 2) + [tile], tile
                    cut = (*(slice(f, f + n) for f, n in zip(first, [*down, across][-t.ndim :], strict=True)),)
                    codes = np.zeros((tile, tile), int)
                    part = t.mantissas[cut].reshape(-1, t.mantissas[cut].shape[-1])
                    codes[: part.shape[0], : part.shape[1]] = part
                elif t.format.block is None:
                    cut, codes = (slice(None),) * t.ndim, t.mantissas
                else:
                    cut = tuple(
                        slice(f, f + t.format.block) if i == t.axis else slice(f, f + 1) for i, f in enumerate(first)
                    )
                    codes = t.mantissas[cut]
                assert found["codes"] == codes.reshape(-1).tolist()
                assert not seen[cut].any()
                seen[cut] = True
                assert found["exponent_byte"] == t.exponent_plane[row, column]
                mask = (1 << t.format.bits) - 1
                assert found["fields"] == [format(q & mask, f"0{t.format.bits}b") for q in found["codes"]]
                if found["exponent_byte"] == 255:
                    assert set(found["values"]) == {"nan"}
                elif tile is None:
                    assert found["values"] == t.decode()[cut].reshape(-1).tolist()
        assert seen.all()


def test_a_block_as_text(packed, capsys):
    assert main(["inspect", str(packed), "--block", "lines", "3", "1"]) == 0
    assert "a NaN block" in capsys.readouterr().out
    assert main(["inspect", str(packed), "--block", "lines", "2", "0"]) == 0
    text = capsys.readouterr().out
    assert "row 2, block 0, from element [2, 0]" in text
    assert len(text.splitlines()) == 3 + 2 + 16


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["lines", "7", "0"], "a row under 7"),
        (["lines", "0", "2"], "a block under 2"),
        (["lines", "-1", "0"], "found -1"),
        (["lines", "a", "0"], "two numbers"),
        (["plain", "0", "0"], "not encoded"),
        (["nothing", "0", "0"], "no tensor 'nothing'"),
    ],
)
def test_blocks_that_are_not_there(packed, capsys, words, named):
    assert main(["inspect", str(packed), "--block", *words]) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_a_pipe_that_ends_early(tmp_path):
    """`hbfp inspect FILE | head -1` must not end in a traceback."""
    path = tmp_path / "x"
    hbfp.save(path, {f"tensor number {i}": sample((1,)) for i in range(5000)})
    script = f"{sys.executable} -m hbfp inspect {path} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
    assert done.stdout.startswith("tensor")


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_of_equal_files(packed, tmp_path, capsys):
    hbfp.save(tmp_path / "again", hbfp.load(packed))
    assert main(["diff", str(packed), str(tmp_path / "again"), "--json"]) == 0
    whole = printed(capsys)
    assert whole["equal"]
    assert all(row["difference"] is None for row in whole["tensors"])
    assert main(["diff", str(packed), str(packed), "--all"]) == 0
    assert "9 tensors, all equal" in capsys.readouterr().out


def test_diff_names_the_first_block(packed, tmp_path, capsys):
    content = hbfp.load(packed)
    codes = content["middle"].mantissas.copy()
    codes[1, 5, 2] += 1
    codes[1, 8, 2] += 1
    content["middle"] = BlockArray.from_parts(
        codes, content["middle"].exponents, content["middle"].format, content["middle"].shape, 1
    )
    exponents = content["tiles"].exponents.copy()
    exponents[1, 1, 2] += 1
    content["tiles"] = BlockArray.from_parts(
        content["tiles"].mantissas, exponents, content["tiles"].format, content["tiles"].shape
    )
    content["plain"] = content["plain"] * 2
    hbfp.save(tmp_path / "other", content)
    assert main(["diff", str(packed), str(tmp_path / "other"), "--json"]) == 1
    rows = {row["name"]: row for row in printed(capsys)["tensors"]}
    assert {name for name, row in rows.items() if row["difference"]} == {"middle", "tiles", "plain"}
    assert (rows["middle"]["block"], rows["middle"]["first_element"]) == ([5, 1], [1, 4, 2])
    assert (rows["tiles"]["block"], rows["tiles"]["first_element"]) == ([3, 2], [1, 3, 6])
    assert rows["plain"]["sqnr"] == pytest.approx(0)  # the difference is the signal itself
    assert rows["middle"]["sqnr"] > 20
    assert main(["diff", str(packed), str(tmp_path / "other")]) == 1
    assert "row 5, block 1" in capsys.readouterr().out


def test_diff_with_the_original(source, target, capsys):
    main(["quantize", str(source), str(target)])
    capsys.readouterr()
    assert main(["diff", str(source), str(target), "--json"]) == 1
    rows = {row["name"]: row for row in printed(capsys)["tensors"]}
    x = MODEL["embedding.weight"].astype(np.float64)
    noise = np.square(x - hbfp.encode(MODEL["embedding.weight"], "hbfp4b64").decode()).sum()
    assert rows["embedding.weight"]["difference"] == "F32 [40, 32] and hbfp4b64 [40, 32], axis 1"
    assert rows["embedding.weight"]["sqnr"] == pytest.approx(10 * np.log10(np.square(x).sum() / noise))
    assert rows["mask"]["difference"] is None


def test_diff_of_other_tensors(tmp_path, capsys):
    hbfp.save(tmp_path / "a", {"x": sample((3,)), "only a": sample((3,)), "n": np.arange(3)})
    hbfp.save(tmp_path / "b", {"x": sample((4,)), "only b": sample((3,)), "n": np.arange(3) + 1})
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    rows = {row["name"]: (row["difference"], row["sqnr"]) for row in printed(capsys)["tensors"]}
    assert rows == {
        "x": ("F32 [3] and F32 [4]", None),
        "only a": ("only in A", None),
        "only b": ("only in B", None),
        "n": ("values", None),
    }


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_of_a_good_file(packed, capsys):
    assert main(["verify", str(packed)]) == 0
    assert "9 tensors, all good" in capsys.readouterr().out
    assert main(["verify", str(packed), "--json"]) == 0
    assert printed(capsys)["good"]


def test_verify_names_every_fault(packed, capsys):
    content = bytearray(packed.read_bytes())
    with hbfp.open(packed) as file:
        container = file._containers["lines"]
        for name in ("lines.hbfp_mantissas", "tiles.hbfp_exponents"):
            content[container._start + container.entries[name].start] ^= 1
    packed.write_bytes(content)
    assert main(["verify", str(packed), "--json"]) == 1
    whole = printed(capsys)
    assert not whole["good"]
    assert len(whole["faults"]) == 2
    assert all(str(packed) in fault and "sha256: expected" in fault for fault in whole["faults"])
    assert main(["verify", str(packed)]) == 1
    assert "2 of the checks failed" in capsys.readouterr().out


def test_verify_of_a_broken_structure(packed, capsys):
    packed.write_bytes(packed.read_bytes()[:-1])
    assert main(["verify", str(packed)]) == 1
    assert "bytes of data by its header" in capsys.readouterr().out


def test_verify_without_digests_reads_the_codes(packed, capsys):
    content = packed.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    told = json.loads(header["__metadata__"]["hbfp"])
    for entry in told["tensors"].values():
        del entry["sha256"]
    header["__metadata__"]["hbfp"] = json.dumps(told)
    text = json.dumps(header).encode()
    packed.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    assert main(["verify", str(packed)]) == 0
    assert "lines: codes; the file has no sha256 of it" in capsys.readouterr().out
    at = content[8 + length :].index(hbfp.load(packed)["one"].mantissa_plane.tobytes()[:1])
    assert at >= 0
    with hbfp.open(packed) as file:
        container = file._containers["one"]
        at = container._start + container.entries["one.hbfp_mantissas"].start
    changed = bytearray(packed.read_bytes())
    changed[at] = 0x08
    packed.write_bytes(changed)
    assert main(["verify", str(packed)]) == 1
    assert "the forbidden code" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "diff"])
def test_a_missing_file_is_named(tmp_path, capsys, command):
    missing = str(tmp_path / "missing")
    extra = {"quantize": ["--dry-run"], "diff": [missing]}.get(command, [])
    assert main([command, missing, *extra]) == 2
    assert capsys.readouterr().err == f"hbfp {command}: {missing}: No such file or directory\n"


@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "diff"])
def test_no_command_needs_torch(packed, command, tmp_path):
    extra = {"quantize": [str(tmp_path / "y")], "diff": [str(packed)]}.get(command, [])
    code = "import sys; sys.modules['torch'] = None; from hbfp.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, command, str(packed), *extra], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_block_of_the_module_agrees():
    t = hbfp.encode(sample((2, 70)), "hbfp4b64")
    assert block(t, 1, 1).codes == [int(q) & 15 for q in t.mantissas[1, 64:]]
