"""The committed vectors: up to date with the oracle, explained, and reproduced bit for bit by the numpy level.

Whoever writes another implementation of docs/spec.md checks it against the same files.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hbfp
from hbfp import _core, reference
from hbfp.tools import vectors

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "vectors"
SPECIFICATION = ROOT / "docs" / "spec.md"

Case = dict[str, Any]


@lru_cache
def topic(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str, *, having: str = "name", lacking: str = "nothing") -> Any:
    """Test parameters: the cases of a file that have the one field and lack the other."""
    chosen = [case for case in topic(name)["cases"] if having in case and lacking not in case]
    return pytest.mark.parametrize("case", chosen, ids=[case["name"] for case in chosen])


def patterns(array: np.ndarray) -> str:
    """float32 in the form of the files."""
    assert array.dtype == np.float32
    return " ".join(f"{word:08x}" for word in np.ascontiguousarray(array).reshape(-1).view(np.uint32).tolist())


def floats(words: str, shape: list[int]) -> np.ndarray:
    return np.array([int(word, 16) for word in words.split()], np.uint32).view(np.float32).reshape(shape)


def planes(case: Case, field: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(case[field]), np.uint8).reshape(case[f"{field}_shape"])


def from_parts(case: Case) -> hbfp.BlockArray:
    """An operand given as codes and exponent bytes."""
    fmt, shape, axis = hbfp.HBFP.parse(case["format"]), tuple(case["shape"]), case["axis"]
    # The shape of the exponents is the format's business, not the file's: it is read off an array of zeros.
    exponents = np.array(case["exponents"], np.uint8)
    places = hbfp.encode(np.zeros(shape, np.float32), fmt, axis).exponents.shape
    codes = np.array(case["codes"], np.int16).reshape(shape)
    return hbfp.BlockArray.from_parts(codes, exponents.reshape(places), fmt, shape, axis)


# ---------------------------------------------------------------------------------------------------- the files as such


def test_the_vectors_are_not_stale():
    """A change of the oracle or of the generator that was committed without its vectors."""
    stale = vectors.check(FOLDER)
    assert not stale, f"{', '.join(stale)}: not what the oracle makes; run `make vectors` and read the difference"


def test_a_changed_a_missing_and_a_strange_file_are_found(tmp_path):
    """The guard itself: a check that is never red guards nothing."""
    assert len(vectors.generate(tmp_path)) == 9
    assert vectors.check(tmp_path) == []
    philox = tmp_path / "philox.json"
    philox.write_text(philox.read_text(encoding="utf-8").replace("6627e8d5", "6627e8d6"), encoding="utf-8")
    (tmp_path / "decode.json").unlink()
    (tmp_path / "old.json").write_text("{}", encoding="utf-8")
    assert vectors.check(tmp_path) == ["decode.json", "philox.json", "old.json"]
    assert vectors.main(["check", str(tmp_path)]) == 1
    assert vectors.main(["gen", str(tmp_path)]) == 0
    assert vectors.main(["check", str(tmp_path)]) == 0
    assert not (tmp_path / "old.json").exists()


def test_every_flag_is_explained_and_used():
    """A flag nobody explains, or one whose cases were dropped."""
    used = set()
    for path in FOLDER.glob("*.json"):
        content = topic(path.stem)
        of_file = {flag for case in content["cases"] for flag in case["flags"]}
        assert of_file == set(content["flags"]), path.name
        used |= of_file
    assert used == set(vectors.FLAGS)


def test_every_flag_points_at_clauses_that_exist():
    """The table of flags in the specification and the clauses that the flags name."""
    text = SPECIFICATION.read_text(encoding="utf-8")
    clauses = set(re.findall(r"^\*\*(\d+\.\d+)\*\*", text, flags=re.MULTILINE))
    assert len(clauses) > 40
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d., ]+) \|", text, flags=re.MULTILINE))
    assert set(rows) == set(vectors.FLAGS)
    for flag, sentence in vectors.FLAGS.items():
        named = re.findall(r"\d+\.\d+", re.search(r"\(([\d., ]+)\)\.$", sentence)[1])
        assert named == re.findall(r"\d+\.\d+", rows[flag]), flag
        assert set(named) <= clauses, flag


def test_every_width_is_encoded_and_packed():
    """A width that is only ever tested in one direction."""
    for name in ("encode", "pack", "decode"):
        formats = {case["format"] for case in topic(name)["cases"]}
        assert {reference.FormatDescription.parse(text).bits for text in formats} == set(range(2, 17)), name


def test_formats_are_written_canonically():
    """A format that is printed otherwise than it is read."""
    texts = {case["format"] for name in ("encode", "pack", "decode") for case in topic(name)["cases"]}
    for text in sorted(texts):
        assert str(reference.FormatDescription.parse(text)) == text
        assert str(hbfp.HBFP.parse(text)) == text


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 600_000


# --------------------------------------------------------------------------------------------------- the numpy level


@cases("philox", having="counter")
def test_philox(case):
    counter, key = (tuple(int(word, 16) for word in case[field]) for field in ("counter", "key"))
    assert [f"{word:08x}" for word in _core.philox4x32(counter, key)] == case["words"]


@cases("encode")
def test_encode(case):
    x = floats(case["input"], case["shape"])
    seed, stream = (int(case.get(field, "0x0"), 16) for field in ("seed", "stream"))
    encoded = hbfp.encode(x, case["format"], case["axis"], case["rounding"], seed, stream)
    assert encoded.exponents.reshape(-1).tolist() == case["exponents"]
    assert encoded.mantissas.reshape(-1).tolist() == case["codes"]
    assert list(encoded.exponents.shape) == case["exponents_shape"]
    assert list(encoded.mantissas.shape) == case["shape"]
    assert patterns(encoded.decode()) == case["decoded"]
    quantized = hbfp.quantize(x, case["format"], case["axis"], case["rounding"], seed, stream)
    assert patterns(quantized) == case["decoded"]
    if {"NaNBlock", "InfBlock"} & set(case["flags"]):
        with pytest.raises(hbfp.NonFiniteError):
            hbfp.encode(x, case["format"], case["axis"], check=True)


@cases("encode")
def test_encode_with_other_strides(case):
    """Steps instead of neighbours in memory: the same bits, random ones too."""
    x = floats(case["input"], case["shape"])
    if x.ndim == 0:
        pytest.skip("a scalar has no strides")
    spread = np.full([2 * size + 1 for size in x.shape], np.nan, np.float32)[tuple(slice(1, None, 2) for _ in x.shape)]
    spread[...] = x
    seed, stream = (int(case.get(field, "0x0"), 16) for field in ("seed", "stream"))
    encoded = hbfp.encode(spread, case["format"], case["axis"], case["rounding"], seed, stream)
    assert encoded.exponents.reshape(-1).tolist() == case["exponents"]
    assert encoded.mantissas.reshape(-1).tolist() == case["codes"]


@cases("pack")
def test_pack(case):
    array = from_parts(case)
    for plane, field in ((array.exponent_plane, "exponent_plane"), (array.mantissa_plane, "mantissa_plane")):
        assert list(plane.shape) == case[f"{field}_shape"]
        assert plane.tobytes().hex() == case[field]


@cases("pack")
def test_unpack(case):
    array = hbfp.BlockArray(
        planes(case, "exponent_plane"),
        planes(case, "mantissa_plane"),
        hbfp.HBFP.parse(case["format"]),
        tuple(case["shape"]),
        case["axis"],
    )
    assert array.mantissas.reshape(-1).tolist() == case["codes"]
    assert array.exponents.reshape(-1).tolist() == case["exponents"]
    assert list(array.exponents.shape) == case["exponents_shape"]


@cases("decode", having="decoded")
def test_decode(case):
    assert patterns(from_parts(case).decode()) == case["decoded"]


@cases("decode", having="error")
def test_refused_planes(case):
    array = hbfp.BlockArray(
        planes(case, "exponent_plane"),
        planes(case, "mantissa_plane"),
        hbfp.HBFP.parse(case["format"]),
        tuple(case["shape"]),
        case["axis"],
    )
    with pytest.raises(getattr(hbfp, case["error"])):
        array.decode()


@cases("matmul", lacking="bias")
def test_matmul(case):
    a, b = from_parts(case["a"]), from_parts(case["b"])
    if "c" in case:
        out = floats(case["c"], case["shape"]).copy()
        assert hbfp.matmul(a, b, out=out, accumulate=True) is out
    else:
        out = hbfp.matmul(a, b)
    assert list(out.shape) == case["shape"]
    assert patterns(out) == case["output"]


@cases("matmul", having="bias")
def test_matmul_with_bias(case):
    """The numpy level adds a bias in `linear`, whose weight is the transpose."""
    a, b = from_parts(case["a"]), from_parts(case["b"])
    bias = floats(case["bias"], case["shape"][-1:])
    out = floats(case["c"], case["shape"]).copy() if "c" in case else None
    result = hbfp.linear(a, b.T, bias, out=out, accumulate=out is not None)
    assert patterns(result) == case["output"]


@cases("matmul", lacking="bias")
def test_matmul_prepacked(case):
    """The kernel's layout of the right operand, where it is a matrix."""
    a, b = from_parts(case["a"]), from_parts(case["b"])
    if b.ndim != 2 or a.ndim != 2:
        pytest.skip("prepack takes matrices")
    out = floats(case["c"], case["shape"]).copy() if "c" in case else None
    result = hbfp.linear(a, hbfp.prepack(b.T), out=out, accumulate=out is not None)
    assert patterns(result) == case["output"]


@cases("matmul", lacking="bias")
def test_matmul_with_other_threads(case):
    a, b = from_parts(case["a"]), from_parts(case["b"])
    out = floats(case["c"], case["shape"]).copy() if "c" in case else None
    result = hbfp.matmul(a, b, out=out, accumulate=out is not None, threads=3)
    assert patterns(result) == case["output"]


def _operands(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and dy of a training case, the leading dimensions of x and dy flattened."""
    rows = int(np.prod(case["batch"]))
    x, dy = floats(case["x"], [rows, case["in"]]), floats(case["dy"], [rows, case["out"]])
    return x, floats(case["w"], [case["out"], case["in"]]), dy


@cases("training", having="dx")
def test_linear_step(case):
    """Each operand encoded along its own product's reduction, from the tensor as it is held, in its own stream."""
    x, w, dy = _operands(case)

    def operand(tensor: np.ndarray, axis: int, role: int) -> hbfp.BlockArray:
        stream = int(case["streams"][role], 16)
        seed = int(case["seed"], 16)
        return hbfp.encode(tensor, case["formats"][role], axis, case["roundings"][role], seed, stream)

    y = hbfp.linear(operand(x, -1, 0), operand(w, -1, 1), floats(case["bias"], [case["out"]]))
    dx = hbfp.matmul(operand(dy, -1, 2), operand(w, -2, 3))
    dw = hbfp.matmul(operand(dy, -2, 4).T, operand(x, -2, 5))
    assert patterns(y) == case["y"]
    assert patterns(dx) == case["dx"]
    assert patterns(dw) == case["dw"]


@cases("training", having="dx")
def test_linear_encodes_on_the_way_in(case):
    """The fused forward pass: leading dimensions, activations still in float32, weight prepacked."""
    _, w, _ = _operands(case)
    x = floats(case["x"], [*case["batch"], case["in"]])
    seed, streams = int(case["seed"], 16), [int(stream, 16) for stream in case["streams"]]
    weight = hbfp.encode(w, case["formats"][1], -1, case["roundings"][1], seed, streams[1])
    y = hbfp.linear(
        x,
        hbfp.prepack(weight),
        floats(case["bias"], [case["out"]]),
        case["formats"][0],
        rounding=case["roundings"][0],
        seed=seed,
        stream=streams[0],
    )
    assert list(y.shape) == [*case["batch"], case["out"]]
    assert patterns(y) == case["y"]


@cases("training", having="db")
def test_bias_gradient(case):
    shape = case.get("shape") or [int(np.prod(case["batch"])), case["out"]]
    out = np.full(shape[1], np.nan, np.float32)
    _core.column_sums(floats(case["dy"], shape), out, 1)
    assert patterns(out) == case["db"]
    _core.column_sums(floats(case["dy"], shape), out, 3)
    assert patterns(out) == case["db"]


@cases("convolution")
def test_convolution(case):
    """The torch level's step: output and all gradients; the geometry and the roles are the file's."""
    torch = pytest.importorskip("torch")
    from hbfp.nn import functional
    from hbfp.policy import MatmulPolicy, OperandPolicy, Recipe

    rank = len(case["x_shape"]) - 2
    convolve = getattr(functional, f"conv{'_transpose' * case['transposed']}{rank}d")
    operands = [OperandPolicy(*pair) for pair in zip(case["formats"], case["roundings"], strict=True)]
    recipe = Recipe(*(MatmulPolicy(*operands[i : i + 2]) for i in (0, 2, 4)))
    shapes = {"x": case["x_shape"], "w": case["w_shape"], "bias": case["y_shape"][1:2], "dy": case["y_shape"]}
    x, w, bias, dy = (torch.from_numpy(floats(case[name], shape)) for name, shape in shapes.items())
    geometry = {name: case[name] for name in ("stride", "padding", "dilation", "groups")}
    if case["transposed"]:
        geometry["output_padding"] = case["output_padding"]
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    y = convolve(*leaves, **geometry, recipe=recipe, seed=int(case["seed"], 16), stream=int(case["streams"][0], 16))
    assert list(y.shape) == case["y_shape"]
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    assert [patterns(t.detach().numpy()) for t in results] == [case[name] for name in ("y", "dx", "dw", "db")]


@cases("softmax")
def test_softmax(case):
    scores, (scale,) = floats(case["scores"], case["shape"]), floats(case["scale"], [1])
    p = np.empty_like(scores)
    _core.softmax(scores, p, float(scale), False, None, 1)
    assert patterns(p) == case["p"]
    if "ds" in case:
        ds = np.empty_like(scores)
        _core.softmax_backward(p, floats(case["dp"], case["shape"]), ds, float(scale), 1)
        assert patterns(ds) == case["ds"]


@cases("dropout")
def test_dropout(case):
    x, seed = floats(case["x"], case["shape"]), int(case["seed"], 16)
    for threads in (1, 3):
        out = np.empty_like(x)
        _core.dropout(x, out, case["t"], seed, threads)
        assert patterns(out) == case["output"]
    _core.dropout(x, x, case["t"], seed, 1)
    assert patterns(x) == case["output"]
