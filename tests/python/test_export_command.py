"""`hbfp export`: exit codes, one-line errors, and files that read back to the same values."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import hbfp
from hbfp import BlockArray
from hbfp.exports import gguf as gguf_
from hbfp.exports import onnx as onnx_
from hbfp.tools.cli import main

gguf = pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")


def sample(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def packed(tmp_path) -> Path:
    """An MLP of two layers."""
    path = tmp_path / "model.safetensors"
    hbfp.save(
        path,
        {
            "0.weight": hbfp.encode(sample((64, 128)), "hbfp4b64"),
            "0.bias": sample((64,)),
            "2.weight": hbfp.encode(sample((10, 64)), "hbfp6b64"),
        },
    )
    return path


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command of exit code 2 prints."""
    assert main(["export", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_gguf(packed, capsys):
    assert main(["export", str(packed), "--to", "gguf"]) == 0
    out = packed.with_suffix(".gguf")
    printed = capsys.readouterr().out
    assert printed.splitlines()[:-1] == [
        "0.weight  64 × 128       hbfp4b64     → Q4_0",
        "2.weight  10 × 64        hbfp6b64     → Q8_0",
        "0.bias    64             float32      → float32",
    ]
    assert printed.splitlines()[-1] == f"written: {out}, {out.stat().st_size:,} bytes"
    for name, value in hbfp.load(packed).items():
        assert np.array_equal(np.asarray(gguf_.load(out)[name]), np.asarray(value))


def test_onnx_tensors_as_json(packed, tmp_path, capsys):
    out = tmp_path / "other.onnx"
    assert main(["export", str(packed), "--to", "onnx", "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(out)
    assert printed["bytes"] == out.stat().st_size
    assert {row["name"]: (row["from"], row["to"], row["same"]) for row in printed["tensors"]} == {
        "0.weight": ("hbfp4b64", "INT4", True),
        "2.weight": ("hbfp6b64", "INT8", True),
        "0.bias": ("float32", "float32", True),
    }


@pytest.mark.parametrize("options", [[], ["--any-order"], ["--activations", "hbfp6b64"]])
def test_onnx_network(packed, options):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(packed), "--to", "onnx", "--layers", "0", "2", *options]) == 0
    session = onnxruntime.InferenceSession(packed.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    x = sample((5, 128))
    tensors = hbfp.load(packed)
    given = options[1] if len(options) == 2 else None
    hidden = np.maximum(hbfp.linear(x, tensors["0.weight"], tensors["0.bias"], given or "hbfp4b64"), 0)
    wanted = hbfp.linear(hidden, tensors["2.weight"], None, given or "hbfp6b64")
    found = session.run(None, {"x": x})[0]
    # Two blocks are one sum, which has no order; the second layer has one block.
    assert np.array_equal(found, wanted)


def test_a_difference_is_exit_code_1(packed, capsys, monkeypatch):
    real = gguf_.load

    def read(path: Path) -> dict[str, object]:
        return real(path) | {"0.bias": sample((64,)) + 1}

    monkeypatch.setattr(gguf_, "load", read)
    assert main(["export", str(packed), "--to", "gguf"]) == 1
    captured = capsys.readouterr()
    assert "other values read back from 0.bias" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--to", "gguf", "--layers", "0"], "--layers is an option of --to onnx"),
        (["--to", "onnx", "--data", "text"], "--data is an option of --to gguf"),
        (["--to", "onnx", "--any-order"], "name the layers with --layers"),
        (["--to", "onnx", "--activations", "hbfp4b64"], "name the layers with --layers"),
        (["--to", "onnx", "--layers", "0", "2", "--activations", "hbfp4"], "hbfp4"),
        (["--to", "onnx", "--layers", "0", "3"], "tensor '3.weight': layer: expected an encoded weight"),
    ],
)
def test_wrong_options_are_exit_code_2(packed, capsys, words, named):
    assert named in failure(capsys, packed, *words)
    assert list(packed.parent.iterdir()) == [packed]


def test_the_file_itself_is_not_overwritten(packed, capsys):
    content = packed.read_bytes()
    assert "is the file itself" in failure(capsys, packed, "--to", "gguf", "-o", packed)
    assert packed.read_bytes() == content


def test_a_refusal_names_the_file_once(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    hbfp.save(path, {"w": hbfp.encode(sample((2, 64)) * 2.0**40, "hbfp4b64")})
    printed = failure(capsys, path, "--to", "gguf")
    assert printed.startswith(f"hbfp export: {path}: tensor 'w': block [0, 0]: scale: expected ")
    hbfp.save(path, {"flags": np.array([True])})
    printed = failure(capsys, path, "--to", "gguf")
    assert printed.startswith(f"hbfp export: {path}: tensor 'flags': dtype: expected one of ")


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs/exports.md"
    examples = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(compile(example, str(page), "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "model.onnx"}


def test_a_missing_and_a_foreign_file(tmp_path, capsys):
    assert "No such file" in failure(capsys, tmp_path / "none.safetensors", "--to", "gguf")
    (tmp_path / "text").write_text("not a model")
    assert str(tmp_path / "text") in failure(capsys, tmp_path / "text", "--to", "onnx")


@pytest.mark.parametrize(("package", "to"), [("gguf", "gguf"), ("onnx", "onnx")])
def test_a_missing_package_says_how_to_get_it(packed, capsys, monkeypatch, package, to):
    monkeypatch.setitem(sys.modules, package, None)
    assert failure(capsys, packed, "--to", to) == (
        f"hbfp export: {package} is not installed; get it with: pip install 'hbfp[export]'\n"
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hbfp\[export\]'"):
        {"gguf": gguf_, "onnx": onnx_}[to].load(packed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of `hbfp train` on a text: its first checkpoint."""
    pytest.importorskip("torch")
    pytest.importorskip("rich")
    from hbfp.training.loop import save_checkpoint
    from hbfp.training.train import CHECKPOINT, Settings, Training

    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 40)
    given = {"data": str(folder / "book.txt"), "layers": 2, "width": 64, "context": 16, "batch": 2}
    training = Training.start(Settings.of(given))
    save_checkpoint(folder / CHECKPOINT, training.run, training.remembered)
    return folder


def test_a_checkpoint_becomes_a_complete_gguf_file(trained, tmp_path):
    out = tmp_path / "model.gguf"
    assert main(["export", str(trained / "checkpoint.pt"), "--to", "gguf", "-o", str(out)]) == 0
    fields = {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.context_length"] == 16
    characters = sorted({*(trained / "book.txt").read_text(), "\N{REPLACEMENT CHARACTER}"})
    assert "".join(fields["tokenizer.ggml.tokens"]).replace("▁", " ") == "".join(characters)
    formats = {name: str(value.format) for name, value in gguf_.load(out).items() if isinstance(value, BlockArray)}
    assert formats.pop("output.weight") == formats.pop("blk.0.attn_qkv.weight") == "hbfp8b32"  # the recipe's HBFP6
    assert set(formats.values()) == {"hbfp4b32"}


def test_a_text_that_moved_is_given_with_data(trained, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(trained, folder)
    book = folder / "book.txt"
    other = folder / "other.txt"
    other.write_text("another text " * 200)
    assert main(["export", str(folder / "checkpoint.pt"), "--to", "gguf", "--data", str(book)]) == 0
    capsys.readouterr()
    assert "does not hold the data" in failure(capsys, folder / "checkpoint.pt", "--to", "gguf", "--data", other)


def test_a_packed_gpt_takes_its_text_from_data(trained, tmp_path, capsys):
    from hbfp.checkpoint import save_model
    from hbfp.training.train import Training

    path = tmp_path / "gpt.safetensors"
    save_model(path, Training.resume(trained / "checkpoint.pt", {}).run.model)
    assert main(["export", str(path), "--to", "gguf"]) == 0
    assert "tokenizer.ggml.tokens" not in gguf.GGUFReader(path.with_suffix(".gguf")).fields
    assert main(["export", str(path), "--to", "gguf", "--data", str(trained / "book.txt")]) == 0
    assert "tokenizer.ggml.tokens" in gguf.GGUFReader(path.with_suffix(".gguf")).fields
    capsys.readouterr()
    (tmp_path / "short.txt").write_text("abc")
    assert "different characters; found" in failure(capsys, path, "--to", "gguf", "--data", tmp_path / "short.txt")


def test_a_text_is_only_for_a_gpt(packed, tmp_path, capsys):
    pytest.importorskip("torch")
    (tmp_path / "book.txt").write_text("abc")
    assert "leave it out" in failure(capsys, packed, "--to", "gguf", "--data", tmp_path / "book.txt")
