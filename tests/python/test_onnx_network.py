"""ONNX networks: onnxruntime computes the bits of the layers, where float32 adds the products of a block exactly."""

from __future__ import annotations

import io
import itertools
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hbfp
from hbfp import HBFP, BlockArray, ExportError, FormatError
from hbfp.exports import onnx as onnx_
from hbfp.exports import onnx_network as ours

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx_models import ran, same_bits, sample  # noqa: E402

# --- the encoding of activations -------------------------------------------------------------------------------------

ROUNDINGS = ["nearest_even", "nearest_away", "toward_zero"]
ENCODINGS = [
    "hbfp4b64",
    "hbfp6b64",
    "hbfp8b64",
    "hbfp2b16",
    "hbfp4b64-ceil",
    "hbfp4b64-noclip",
    "hbfp4b64-e5",
    "hbfp8b7-noclip-e4-bias3",
    "hbfp16b64",
]


def awkward(format: HBFP) -> np.ndarray:
    """Rows whose rounding, exponent or sign is on an edge: ties, powers of two and their neighbours, the ends of
    float32, zeros of both signs, blocks with NaN and infinities."""
    rng = np.random.default_rng(3)
    width = 70
    exponents = np.arange(-149, 128)
    powers = np.ldexp(np.float32(1), exponents)
    rows = [np.resize([power, -power / 2, power / 3], width) for power in powers]
    edges = np.concatenate([np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))])
    rows += [np.resize([edge, -edge, edge / 5], width) for edge in edges]
    # Every half step, under an amax that is the largest code, and one that is nearly the next power of two.
    q = format.max_code
    halves = np.resize(np.arange(-2 * q - 1, 2 * q + 2) / 2, (8 * q // width + 2) * width).reshape(-1, width)
    rows += [*halves, *(halves * np.float32(2.0**-140)), *(halves * np.float32(2.0**100))]
    rows += [np.zeros(width), np.full(width, -0.0)]
    for bad in (np.nan, np.inf, -np.inf):
        row = rng.standard_normal(width)
        row[3] = bad
        rows.append(row)
    rows += list(rng.standard_normal((50, width)) * np.exp2(rng.integers(-140, 120, (50, 1))))
    return np.array(rows, np.float32)


def encoder_model(path: Path, format: HBFP, rounding: str, width: int) -> None:
    """A model that only encodes: what a layer does to its input."""
    graph = onnx_.Graph()
    graph.function(ours._lines(format))
    encoder = graph.function(ours._encoder(format, hbfp.Rounding(rounding)))
    graph.input("x", ("rows", width))
    graph.node(encoder, ["x"], "blocks")
    graph.output("blocks", ("rows", -(-width // format.block), format.block))
    graph.write(path)


@pytest.mark.parametrize("text", ENCODINGS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_local_function_encodes_as_the_specification_says(tmp_path, text, rounding):
    """A logarithm that is off by one next to a power of two; a subnormal; an optimiser that takes 1 − 2^-53 for 1."""
    path = tmp_path / "model.onnx"
    format = HBFP.parse(text)
    x = awkward(format)
    encoder_model(path, format, rounding, x.shape[1])
    wanted = hbfp.quantize(x, format, rounding=rounding)
    for optimised in (True, False):
        blocks = ran(path, optimised, x=x)["blocks"]
        found = blocks.reshape(len(x), -1)
        assert same_bits(np.ascontiguousarray(found[:, : x.shape[1]]), wanted)
        assert not found[:, x.shape[1] :][np.isfinite(found[:, x.shape[1] :])].any()


def test_the_local_functions_are_standard_operators(tmp_path):
    """No operator of anybody's own: each runtime of opset 21 can run them."""
    path = tmp_path / "model.onnx"
    ours.save(path, network("hbfp4b64"), LAYERS)
    model = onnx.load(path)
    own = {function.name for function in model.functions}
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            assert node.op_type in own if node.domain == "hbfp" else not node.domain
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21), ("hbfp", 1)]


# --- networks --------------------------------------------------------------------------------------------------------

LAYERS = ["0", "2", "4"]
SIZES = [130, 70, 64, 10]


def network(format: str, sizes: list[int] | None = None, bias: bool = True) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    sizes = sizes or SIZES
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        weight = sample((outputs, inputs), number) * np.float32(inputs**-0.5)
        tensors[f"{2 * number}.weight"] = hbfp.encode(weight, format)
        if bias:
            tensors[f"{2 * number}.bias"] = sample((outputs,), number)
    return tensors


def computed(tensors: dict[str, Any], layers: list[str], x: np.ndarray, format: str | None = None) -> np.ndarray:
    for layer in layers:
        weight = tensors[f"{layer}.weight"]
        x = hbfp.linear(x, weight, tensors.get(f"{layer}.bias"), format or weight.format)
        if layer != layers[-1]:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("hbfp4b64", None),
        ("hbfp6b64", None),
        ("hbfp8b64", None),
        ("hbfp4b16-ceil", None),
        ("hbfp8b1024", None),
        ("hbfp4b64", "hbfp8b64-noclip"),
        ("hbfp4b7", "hbfp6b7"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_network_computes_the_same_bits(tmp_path, weights, activations, bias):
    """Sums of blocks in another order; a bias added first; a short last block; the layout of a weight."""
    path = tmp_path / "model.onnx"
    tensors = network(weights, bias=bias)
    ours.save(path, tensors, LAYERS, activations=activations)
    for rows in (1, 33):
        x = sample((rows, SIZES[0])) * np.exp2(np.random.default_rng(1).integers(-9, 9, (rows, 1))).astype(np.float32)
        assert same_bits(ran(path, x=x)["y"], computed(tensors, LAYERS, x, activations))


def test_a_network_of_one_block_needs_no_order(tmp_path):
    """With K of one block even one MatMul has the bits, whatever the order of its sums."""
    path = tmp_path / "model.onnx"
    tensors = network("hbfp8b64", [64, 50, 20])
    ours.save(path, tensors, ["0", "2"], exact=False)
    x = sample((33, 64))
    assert same_bits(ran(path, x=x)["y"], computed(tensors, ["0", "2"], x))


def test_any_order_stays_within_the_stated_bound(tmp_path):
    path = tmp_path / "model.onnx"
    tensors = network("hbfp8b64", [1000, 40], bias=False)
    ours.save(path, tensors, ["0"], exact=False)
    x = sample((33, 1000))
    weight = tensors["0.weight"]
    terms = sum(
        abs(hbfp.linear(x[:, k : k + 64], hbfp.encode(weight.decode()[:, k : k + 64], "hbfp8b64")))
        for k in range(0, 1000, 64)
    )
    found, wanted = ran(path, x=x)["y"], computed(tensors, ["0"], x)
    # 16 sums and at most as many roundings of partial sums on either side.
    assert (abs(found - wanted) <= 16 * 2.0**-23 * terms).all()


@pytest.mark.parametrize(("left", "right"), [(-75, -74), (-126, -23), (-30, -119), (60, 50), (118, -120)])
def test_products_at_the_ends_of_float32(tmp_path, left, right):
    """Terms that are subnormal, down to scale exponents that sum to −149."""
    path = tmp_path / "model.onnx"
    codes = np.random.default_rng(0).integers(-7, 8, (12, 150))
    codes[:, ::64] = 7  # so that encoding finds the exponent again
    scales = np.full((12, 3), 127)
    x = BlockArray.from_parts(codes[:7], scales[:7] + left, "hbfp4b64", (7, 150)).decode()
    weight = BlockArray.from_parts(codes[7:], scales[7:] + right, "hbfp4b64", (5, 150))
    ours.save(path, {"0.weight": weight}, ["0"])
    wanted = hbfp.linear(x, weight)
    assert np.isfinite(wanted).all()
    assert wanted.all()
    assert same_bits(ran(path, x=x)["y"], wanted)


def test_bad_inputs_are_nan_and_spoil_no_other_row(tmp_path):
    path = tmp_path / "model.onnx"
    tensors = network("hbfp4b64", [130, 20, 4])
    ours.save(path, tensors, ["0", "2"])
    x = sample((6, 130))
    x[1, 129], x[3, 0], x[4, 64] = np.nan, np.inf, -np.inf
    found = ran(path, x=x)["y"]
    assert same_bits(found, computed(tensors, ["0", "2"], x))
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False, True, True, False]


def test_a_file_beyond_two_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_, "LARGEST_TENSORS", 5000)
    with pytest.raises(ExportError, match=r"model.onnx: size: expected at most 5000 bytes .* found 9\d{3}"):
        ours.save(tmp_path / "model.onnx", network("hbfp4b64"), LAYERS)


def test_the_weights_of_a_network_are_read_back(tmp_path):
    path = tmp_path / "model.onnx"
    tensors = network("hbfp4b64")
    ours.save(path, tensors, LAYERS)
    loaded = onnx_.load(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name] == value if isinstance(value, BlockArray) else np.array_equal(loaded[name], value)


def changed(**tensors: Any) -> dict[str, Any]:
    return network("hbfp4b64") | {name.replace("_", ".", 1): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "layers", "options", "named"),
    [
        (changed(), ["0", "1"], {}, "tensor '1.weight': layer: expected an encoded weight; found no such tensor"),
        (
            changed(),
            ["0", "4"],
            {},
            "tensor '4.weight': inputs: expected 70, the outputs of the layer before",
        ),
        (changed(), [], {}, "layers: expected the names of its linear layers"),
        (changed(), ["0", "0"], {}, "tensor '0.weight': inputs"),
        (changed(), LAYERS, {"rounding": "stochastic"}, "rounding: expected a deterministic one; found 'stochastic'"),
        (changed(), LAYERS, {"activations": "hbfp4b32"}, "blocks: expected those of the activations, hbfp4b32"),
        (changed(), LAYERS, {"activations": "hbfp4t64"}, None),
        (network("hbfp12b64"), LAYERS, {}, "sum of a block: expected at most 2^24"),
        (changed(**{"2_weight": sample((64, 70))}), LAYERS, {}, "expected an encoded weight; found a plain one"),
        (
            changed(**{"2_weight": hbfp.encode(sample((64, 70)), "hbfp4b64", axis=0)}),
            LAYERS,
            {},
            "in lines along its inputs; found [64, 70] in hbfp4b64 along axis 0",
        ),
        (changed(**{"2_weight": hbfp.encode(sample((64, 70)), "hbfp4t8")}), LAYERS, {}, "in lines along its inputs"),
        (changed(**{"2_bias": sample((63,))}), LAYERS, {}, "tensor '2.bias': bias: expected float32 [64]"),
        (changed(**{"2_bias": sample((64,)).astype(np.float64)}), LAYERS, {}, "found float64 [64]"),
    ],
)
def test_networks_that_cannot_be_exact_are_refused_by_name(tmp_path, tensors, layers, options, named):
    if named is None:
        with pytest.raises(FormatError):
            ours.save(tmp_path / "model.onnx", tensors, layers, **options)
        return
    with pytest.raises(ExportError) as raised:
        ours.save(tmp_path / "model.onnx", tensors, layers, **options)
    assert named in str(raised.value)
    assert not os.listdir(tmp_path)


def test_wide_products_run_in_any_order(tmp_path):
    path = tmp_path / "model.onnx"
    tensors = network("hbfp12b64", [64, 8])
    ours.save(path, tensors, ["0"], exact=False)
    x = sample((4, 64))
    assert np.allclose(ran(path, x=x)["y"], computed(tensors, ["0"], x), rtol=1e-5, atol=1e-5)  # FP32 sums


@pytest.mark.parametrize("recipe", ["hbfp4", "hbfp6", "hbfp8"])
def test_a_saved_model_of_torch_computes_the_same_bits(tmp_path, recipe):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(130, 70), nn.ReLU(), nn.Linear(70, 64), nn.ReLU(), nn.Linear(64, 10, bias=False))
    with redirect_stdout(io.StringIO()):
        hbfp.convert_(model, recipe=recipe)
    hbfp.save_model(tmp_path / "model.safetensors", model)
    path = tmp_path / "model.onnx"
    ours.save(path, hbfp.load(tmp_path / "model.safetensors"), LAYERS)
    x = sample((33, 130))
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(x))
    assert same_bits(ran(path, x=x)["y"], np.from_dlpack(wanted))
