"""Frozen models: weights in memory as codes, with the bits of the converted model wherever they are read.

The bugs these hunt: a path of torch that copies, stores or traces a weight and comes back with other bits, or with
floats; a layer that is quietly left unpacked, or decoded where it could be read; a state_dict that loads into the wrong
place without a word.
"""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from zoo import LAYERS, MODELS, leaves, same, values  # noqa: E402

import hbfp  # noqa: E402
from hbfp.packed import PackedWeight  # noqa: E402

FORMATS = ("hbfp4", "hbfp6b16")


def run(model, inputs):
    with torch.no_grad():
        return [x.clone() for x in leaves(model(*inputs))]


def alike(model, inputs, expected):
    return all(map(same, run(model, inputs), expected)) and all(map(same, leaves(model(*inputs)), expected))


def converted(make, inputs, recipe="hbfp4"):
    torch.manual_seed(0)
    model = make()
    hbfp.convert_(model, recipe)
    model.eval()
    return model, run(model, inputs)


def frozen_mlp(recipe="hbfp4"):
    make, inputs = MODELS["mlp"]
    model, expected = converted(make, inputs(0), recipe)
    hbfp.freeze_(model)
    return model, inputs(0), expected


def packed(model):
    return {name: x for name, x in model.named_parameters() if isinstance(x, PackedWeight)}


CASES = {
    **{name: (make, lambda _, shapes=shapes: tuple(values(*s, seed=i) for i, s in enumerate(shapes)))
       for name, (make, shapes) in LAYERS.items() if name not in ("DotProductAttention", "Conv1d", "Conv3d")},
    **MODELS,
}  # fmt: skip
"""Every layer that has a weight to pack, and the models. (The two convolutions of few channels have none.)"""


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_frozen_models_have_the_bits_of_converted_ones_and_survive_what_torch_does_to_them(name, recipe, tmp_path):
    make, inputs = CASES[name]
    x = inputs(0)
    model, expected = converted(make, x, recipe)
    keys = model.state_dict().keys()
    report = hbfp.freeze_(model)
    assert {row.name for row in report.packed} == packed(model).keys()
    assert all(row.note for row in report.left)
    assert alike(model, x, expected)
    assert alike(copy.deepcopy(model), x, expected)
    assert alike(pickle.loads(pickle.dumps(model)), x, expected)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = make()
    hbfp.convert_(other, recipe)
    hbfp.freeze_(other)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert alike(other, x, expected)

    path = tmp_path / "m.safetensors"
    hbfp.save_model(path, model)
    torch.manual_seed(2)
    unfrozen = make()
    hbfp.convert_(unfrozen, recipe)
    hbfp.load_model(path, unfrozen)
    assert alike(unfrozen.eval(), x, expected)

    hbfp.unfreeze_(model)
    assert alike(model, x, expected)
    assert model.state_dict().keys() == keys
    hbfp.revert_(model)
    assert not packed(model)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["mlp", "Conv2d", "TransformerDecoderLayer"])
def test_frozen_models_compile_whole(name, backend):
    make, inputs = CASES[name]
    x = inputs(0)
    model, expected = converted(make, x)
    hbfp.freeze_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = leaves(compiled(*x))
    if backend == "aot_eager" or name != "TransformerDecoderLayer":
        assert all(map(same, found, expected))
    else:  # inductor writes its own normalisation, in FP32
        assert all(map(torch.allclose, found, expected))


def test_frozen_models_are_exported_and_stored(tmp_path):
    model, x, expected = frozen_mlp()
    program = torch.export.export(model, x, strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    with torch.no_grad():
        assert same(program.module()(*x), expected[0])
        assert same(loaded(*x), expected[0])
    assert (tmp_path / "m.pt2").stat().st_size > 0


def test_a_packed_weight_takes_what_its_codes_take():
    layer = nn.Linear(256, 512, bias=False)
    hbfp.freeze_(layer, "hbfp4")
    # One byte for each panel of lines more.
    assert 0 <= layer.weight.packed_bytes - 4.125 * 512 * 256 / 8 <= 512 / 4
    assert (layer.weight.numel(), layer.weight.shape, layer.weight.dtype) == (512 * 256, (512, 256), torch.float32)
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    gc.collect()
    floats = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.shape == (512, 256)]
    assert not floats


def test_state_dicts_hold_planes_under_the_names_of_files():
    model, _, _ = frozen_mlp()
    state = model.state_dict()
    assert [key for key in state if key.startswith("2.")] == [
        "2.bias", "2.weight.hbfp_exponents", "2.weight.hbfp_mantissas",
    ]  # fmt: skip
    array = hbfp.encode(MODELS["mlp"][0]()[0].weight.detach(), hbfp.HBFP4)
    assert state["0.weight.hbfp_mantissas"].shape == array.mantissa_plane.shape
    assert state["0.weight.hbfp_exponents"].dtype is torch.uint8
    assert not any(isinstance(x, PackedWeight) for x in state.values())


def test_planes_are_those_of_the_encoder():
    torch.manual_seed(0)
    weight = torch.randn(70, 131)
    weight[3], weight[4, :5] = 0.0, float("nan")
    for format in ("hbfp4b64", "hbfp4b33", "hbfp4b7", "hbfp3b16", "hbfp6b64", "hbfp8b16", "hbfp4b1"):
        array = hbfp.encode(weight, format)
        held = PackedWeight.of(weight, format)
        assert held.exponents is None
        assert held.block_array() == array
        again = PackedWeight.from_block_array(array)
        again.lay_out()
        assert torch.equal(again.codes, held.codes)
        assert torch.equal(held.decode().view(torch.int32), torch.from_numpy(array.decode()).view(torch.int32))


def test_planes_that_no_encoder_writes_are_refused_when_they_are_laid_out():
    array = hbfp.encode(torch.randn(9, 65), hbfp.HBFP4)
    for place, byte in ((0, 0x18), (32, 0x10)):  # the code -8; padding behind the 65th code
        mantissas = array.mantissa_plane.copy()
        mantissas[2, place] = byte
        bad = hbfp.BlockArray(array.exponent_plane, mantissas, hbfp.HBFP4, (9, 65))
        with pytest.raises(hbfp.CodeError, match="row 2"):
            PackedWeight.from_block_array(bad).lay_out()
    exponents = array.exponent_plane.copy()
    exponents[1, 0] = 255
    with pytest.raises(hbfp.CodeError, match="row 1"):
        PackedWeight.from_block_array(hbfp.BlockArray(exponents, array.mantissa_plane, hbfp.HBFP4, (9, 65))).lay_out()


def test_floats_load_into_frozen_models_and_are_encoded():
    make, inputs = MODELS["mlp"]
    model, expected = converted(make, inputs(0))
    state = model.state_dict()
    torch.manual_seed(5)
    other = make()
    hbfp.freeze_(other, "hbfp4")
    other.load_state_dict(state)
    assert alike(other, inputs(0), expected)


def test_a_product_reads_the_weights_that_were_loaded_last(tmp_path):
    """A product remembers where panels lie: not those of weights that are gone."""
    model, x, first = frozen_mlp()
    other, _ = converted(*MODELS["mlp"][:1], MODELS["mlp"][1](0))
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-1.5)
    expected = run(other, x)
    assert not any(map(same, first, expected))
    hbfp.freeze_(other)
    hbfp.save_model(tmp_path / "other.safetensors", other)
    for load in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: _copied(other, model),
        lambda: hbfp.load_model(tmp_path / "other.safetensors", model),
    ):
        restored = copy.deepcopy(model)
        assert alike(model, x, first)
        load()
        assert alike(model, x, expected)
        _copied(restored, model)


def _copied(source, target):
    with torch.no_grad():
        for to, x in zip(target.parameters(), source.parameters(), strict=True):
            to.copy_(x)


def test_an_input_of_another_width_is_named_by_a_layer_that_has_multiplied():
    layer = hbfp.nn.Linear(60, 8).eval()
    hbfp.freeze_(layer)
    with torch.no_grad():
        layer(torch.ones(2, 60))
        for columns in (64, 59, 1):  # 64: as many blocks, and so as many bytes
            with pytest.raises(hbfp.ShapeError, match="in"):
                layer(torch.ones(2, columns))


def test_models_are_frozen_in_inference_mode_too():
    model, x, expected = frozen_mlp()
    hbfp.unfreeze_(model)
    with torch.inference_mode():
        hbfp.freeze_(model)
        hbfp.unfreeze_(model)
        hbfp.freeze_(model)
    assert packed(model)
    assert alike(model, x, expected)


def test_state_dicts_that_do_not_fit_are_refused_by_name():
    model, _, _ = frozen_mlp()
    state = model.state_dict()
    wrong = {**state, "2.weight.hbfp_mantissas": state["2.weight.hbfp_mantissas"][:, :-1]}
    with pytest.raises(RuntimeError, match=r"2\.weight: expected uint8 planes"):
        model.load_state_dict(wrong)
    half = {key: x for key, x in state.items() if key != "2.weight.hbfp_exponents"}
    with pytest.raises(RuntimeError, match=r"2\.weight: expected uint8 planes"):
        model.load_state_dict(half)
    without = {key: x for key, x in state.items() if not key.startswith("2.weight")}
    with pytest.raises(RuntimeError, match=r"[Mm]issing.*2\.weight"):
        model.load_state_dict(without)


def test_weights_of_a_frozen_model_load_with_weights_only():
    model, x, expected = frozen_mlp()
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded["0.weight"], nn.Parameter)
    assert same(torch.func.functional_call(model, loaded, x), expected[0])


@pytest.mark.parametrize("name", ["mlp", "gpt", "transformer", "resnet"])
def test_weights_alone(name):
    make, inputs = MODELS[name]
    model, _ = converted(make, inputs(0))
    plain = copy.deepcopy(model)
    hbfp.freeze_(model, activations="float32")
    hbfp.freeze_(plain)
    hbfp.unfreeze_(plain)
    hbfp.revert_(plain)
    assert packed(model)
    assert not any("hbfp_state" in module.__dict__ for module in model.modules())
    found, expected = run(model, inputs(0)), run(plain, inputs(0))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert "hbfp_exponents" in "".join(model.state_dict())
    assert all(map(same, run(pickle.loads(pickle.dumps(model)), inputs(0)), found))
    hbfp.unfreeze_(model)
    assert all(map(same, run(model, inputs(0)), expected))


def test_a_model_that_is_not_converted_is_converted_first():
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    hbfp.convert_(one, "hbfp6")
    hbfp.freeze_(two, "hbfp6")
    x = torch.randn(3, 64)
    assert same(two(x), one.eval()(x).detach())
    with pytest.raises(hbfp.ConversionError, match="leave out format="):
        hbfp.freeze_(one, "hbfp6")
    with pytest.raises(hbfp.ConversionError, match="leave out format="):
        hbfp.freeze_(two, "hbfp6")
    hbfp.freeze_(two)
    assert same(two(x), one(x).detach())
    assert not two.training


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        return self.head(self.embedding(codes).cumsum(-1))


def test_a_tied_weight_is_packed_for_the_layer_and_kept_for_the_look_up(tmp_path):
    x = (torch.arange(12).reshape(3, 4),)
    model, expected = converted(Tied, x)
    untouched = copy.deepcopy(model)
    report = hbfp.freeze_(model)
    assert "tied" in report.rows[0].note
    assert type(model.embedding.weight) is nn.Parameter
    assert isinstance(model.head.weight, PackedWeight)
    assert alike(model, x, expected)
    assert alike(copy.deepcopy(model), x, expected)
    # The file is that of the model before, and loads into either, with memory or without.
    for saved in (model, untouched):
        hbfp.save_model(tmp_path / "t.safetensors", saved)
        assert len(hbfp.load(tmp_path / "t.safetensors")) == 1
        with torch.device("meta"):
            empty = Tied()
        torch.manual_seed(3)
        for loaded in (Tied(), empty):
            hbfp.freeze_(loaded, "hbfp4")
            hbfp.load_model(tmp_path / "t.safetensors", loaded)
            assert alike(loaded, x, expected)
            hbfp.unfreeze_(loaded)
            assert loaded.head.weight is loaded.embedding.weight
            assert alike(loaded, x, expected)
    hbfp.unfreeze_(model)
    assert model.head.weight is model.embedding.weight
    assert alike(model, x, expected)


def test_layers_that_share_a_weight_share_its_codes():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    hbfp.freeze_(model, "hbfp4")
    assert model[0].weight is model[1].weight
    hbfp.unfreeze_(model)
    assert model[0].weight is model[1].weight
    assert type(model[0].weight) is nn.Parameter
    assert model[0].weight.requires_grad


def test_a_model_on_meta_is_loaded_without_its_floats(tmp_path):
    make, inputs = MODELS["gpt"]
    model, expected = converted(make, inputs(0))
    hbfp.save_model(tmp_path / "g.safetensors", model)
    with torch.device("meta"):
        empty = make()
    hbfp.convert_(empty, "hbfp4")
    hbfp.freeze_(empty)
    assert all(x.is_meta for x in empty.parameters())
    hbfp.load_model(tmp_path / "g.safetensors", empty)
    assert not any(x.is_meta for x in empty.parameters())
    weights = packed(empty)
    assert len(weights) == 5
    assert all(x.exponents is not None for x in weights.values())  # the file's planes, until somebody multiplies
    assert alike(empty, inputs(0), expected)
    assert all(x.exponents is None for x in weights.values())


def test_a_buffer_that_no_file_holds_is_named(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(64, 64))
        model.register_buffer("mask", torch.ones(3), persistent=False)
        return model

    model, _ = converted(make, (torch.zeros(1, 64),))
    hbfp.save_model(tmp_path / "m.safetensors", model)
    with torch.device("meta"):
        empty = make()
    hbfp.freeze_(empty, "hbfp4")
    with pytest.raises(hbfp.FileError, match="mask"):
        hbfp.load_model(tmp_path / "m.safetensors", empty)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_codes_of_a_file_along_another_axis_are_decoded_and_encoded(device, tmp_path):
    """Their planes may be as large as those that the layer reads, and stand for other values."""
    weight, bias = values(64, 64), values(64, seed=1)
    stored = hbfp.encode(weight.numpy(), "hbfp4b64", axis=0)
    hbfp.save(tmp_path / "m.safetensors", {"weight": stored, "bias": bias.numpy()})
    with torch.device(device):
        layer = nn.Linear(64, 64)
    hbfp.freeze_(layer, "hbfp4")
    hbfp.load_model(tmp_path / "m.safetensors", layer)
    assert layer.weight.axis == 1
    assert same(layer.weight.decode(), PackedWeight.of(torch.from_numpy(stored.decode()), "hbfp4b64").decode())


def test_unfrozen_weights_want_the_gradients_that_they_wanted_before():
    """One that was held still would begin to train, or one that trained would stand still."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model[0].weight.requires_grad_(False)
    hbfp.freeze_(model, "hbfp4")
    assert not any(layer.weight.requires_grad for layer in model)
    hbfp.unfreeze_(model)
    assert [layer.weight.requires_grad for layer in model] == [False, True]


@pytest.mark.parametrize("held", ["codes", "floats"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loaded_weight_keeps_the_dtype_of_the_model(device, held, tmp_path):
    weight, bias = values(64, 64), values(64, seed=1)
    stored = hbfp.encode(weight.numpy(), "hbfp4b64") if held == "codes" else weight.numpy()
    hbfp.save(tmp_path / "m.safetensors", {"weight": stored, "bias": bias.numpy()})
    with torch.device(device):
        layer = nn.Linear(64, 64).bfloat16()
    hbfp.freeze_(layer, "hbfp4")
    hbfp.load_model(tmp_path / "m.safetensors", layer)
    assert layer.weight.dtype is layer.bias.dtype is layer.weight.decode().dtype is torch.bfloat16
    assert same(layer.weight.decode(), PackedWeight.of(weight, "hbfp4b64").decode().bfloat16())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pages_of_a_file_are_given_back_when_its_planes_are_laid_out(device, tmp_path, monkeypatch):
    """Else a process that has used every weight holds the model twice."""
    model, inputs, expected = frozen_mlp()
    hbfp.save_model(tmp_path / "m.safetensors", model)
    with torch.device(device):
        loaded = MODELS["mlp"][0]()
    hbfp.freeze_(loaded)
    hbfp.load_model(tmp_path / "m.safetensors", loaded)
    given_back = []
    monkeypatch.setattr("hbfp.packed.forget", lambda plane: given_back.append(plane.nbytes))
    held = sorted(x.numel() for weight in packed(loaded).values() for x in weight.planes())
    assert all(map(same, run(loaded, inputs), expected))
    assert sorted(given_back) == held
    assert all(map(same, run(loaded, inputs), expected))
    assert sorted(given_back) == held


def test_freezing_again_lays_out_what_a_file_left_as_planes(tmp_path):
    model, x, expected = frozen_mlp()
    hbfp.save_model(tmp_path / "m.safetensors", model)
    hbfp.load_model(tmp_path / "m.safetensors", model)
    assert all(w.exponents is not None for w in packed(model).values())
    hbfp.freeze_(model)
    assert all(w.exponents is None for w in packed(model).values())
    assert alike(model, x, expected)


def test_files_in_other_formats_are_refused_by_frozen_models(tmp_path):
    model, _, _ = frozen_mlp()
    hbfp.save_model(tmp_path / "m.safetensors", model)
    other = MODELS["mlp"][0]()
    hbfp.freeze_(other, "hbfp6")
    with pytest.raises(hbfp.FileError, match="expected hbfp6b64"):
        hbfp.load_model(tmp_path / "m.safetensors", other)
    hbfp.load_model(tmp_path / "m.safetensors", other, any_format=True)
    assert torch.equal(other[0].weight.decode(), model[0].weight.decode())
    assert str(other[0].weight.format) == "hbfp6b64"


def test_what_cannot_be_packed_is_refused_or_told():
    with pytest.raises(hbfp.ConversionError, match=r"no weight that can be packed.*stochastic"):
        hbfp.freeze_(nn.Sequential(nn.Linear(8, 8)), "emulator")
    emulated = nn.Sequential(nn.Linear(8, 8))
    hbfp.convert_(emulated, hbfp.recipe("hbfp4", backend="emulate"))
    with pytest.raises(hbfp.ConversionError, match=r"0: .*'emulate'"):
        hbfp.freeze_(emulated)
    with pytest.raises(hbfp.HBFPError, match="'float32'"):
        hbfp.freeze_(nn.Linear(8, 8), activations="int8")
    with pytest.raises(hbfp.ConversionError, match="nothing to take back"):
        hbfp.unfreeze_(nn.Linear(8, 8))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    report = hbfp.freeze_(normed, "hbfp4")
    assert [row.note for row in report.left] == ["computed from other parameters"]
    assert "computed from other parameters" in str(report)


def test_a_frozen_model_is_not_reverted():
    model, _, _ = frozen_mlp()
    with pytest.raises(hbfp.ConversionError, match="unfreeze_"):
        hbfp.revert_(model)


def test_packed_weights_do_not_change_in_place():
    model, _, _ = frozen_mlp()
    with torch.no_grad():
        for change in (lambda w: w.add_(1), lambda w: w.zero_(), lambda w: w.mul_(2.0), lambda w: w.normal_()):
            with pytest.raises(hbfp.HBFPError, match="unfreeze_"):
                change(model[0].weight)


def test_dtype_and_device():
    model, x, expected = frozen_mlp()
    model.to("cpu").double()
    assert model[0].weight.dtype is torch.float64
    assert model[0].weight.decode().dtype is torch.float64
    model.float()
    assert alike(model, x, expected)
    with pytest.raises(hbfp.HBFPError, match="expected the CPU"):
        torch.ops.aten._to_copy.default(model[0].weight, device="cuda")
    half = model.to(torch.bfloat16)(x[0].bfloat16())
    assert half.dtype is torch.bfloat16


def test_gradients_pass_through_a_frozen_layer():
    make, inputs = LAYERS["Linear"][0], (values(3, 20),)
    model, _ = converted(make, inputs)
    hbfp.freeze_(model)
    thawed = copy.deepcopy(model)
    hbfp.unfreeze_(thawed)
    found = []
    for layer in (model, thawed):
        x = inputs[0].clone().requires_grad_()
        layer(x).square().sum().backward()
        found.append(x.grad)
    assert same(*found)


@pytest.mark.parametrize("recipe", ["hbfp4b16", "hbfp12b16"])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_kernels_are_decoded_in_the_order_of_their_blocks(make, recipe):
    layer = make(20, 24, 3)
    hbfp.freeze_(layer, recipe)
    weight = layer.weight
    assert torch.equal(weight.decode_as_it_lies(), weight.decode())
    assert weight.decode_as_it_lies().stride(weight.axis) == 1
    assert weight.decode().is_contiguous()


def test_a_mode_of_dispatch_sees_the_product_of_a_frozen_layer():
    """One that wants to replace it, as fake tensors and tracers do, would be given the result of real memory."""
    seen = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer, x = hbfp.nn.Linear(64, 32), values(3, 64)
    hbfp.freeze_(layer)
    with torch.no_grad():
        expected = layer(x)
        with Noting():
            assert torch.equal(layer(x), expected)
    assert any(func.namespace == "hbfp" for func in seen)


def test_rows_of_a_packed_matrix():
    weight = torch.randn(256, 96)
    held = PackedWeight.of(weight, hbfp.HBFP4)
    for first, last in ((0, 64), (64, 128), (128, 256), (64, 256), (192, 250), (5, 20), (0, 0)):
        part = held[first:last]
        expected = held.decode()[first:last]
        assert torch.equal(part.decode() if isinstance(part, PackedWeight) else part, expected)
        x, recipe = torch.randn(2, 96), hbfp.recipe("hbfp4")
        if first < last:
            found = hbfp.nn.functional.linear(x, part, recipe=recipe)
            assert same(found, hbfp.nn.functional.linear(x, expected, recipe=recipe))
    assert isinstance(held[64:128], PackedWeight)


def test_audit_and_watch_see_frozen_layers():
    model, x, _ = frozen_mlp()
    assert hbfp.audit(model, *x).share(4) == 1.0
    with hbfp.watch(model, evaluation=True) as watch:
        model(*x)
    # Codes lost what they lost when they were made: there is nothing to see in them, and the watch says so.
    assert [row.operand for row in watch.rows] == ["activations"] * 3
    assert all("PackedWeight" in reason for reason in watch.unobserved.values())


@pytest.mark.parametrize("format", ["hbfp6b64", "hbfp3b64", "hbfp4b16"])  # wider; other codes; other blocks
def test_a_schedule_that_goes_on_reads_decoded_values(format):
    model, x, _ = frozen_mlp()
    for _, _, state in hbfp.policy.layer_states(model):
        state.recipe = state.recipe.at(format)
    thawed = copy.deepcopy(model)
    hbfp.unfreeze_(thawed)
    assert alike(model, x, run(thawed, x))


def test_another_level_reads_what_this_one_stored(tmp_path):
    model, x, expected = frozen_mlp()
    torch.save((model, x, expected), tmp_path / "m.pt")
    code = (
        "import sys, torch, hbfp\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.equal(model(*x), expected[0])\n"
        "print(hbfp.info()['level'])"
    )
    for level in ("scalar", "avx2"):
        if hbfp.info()["levels"].get(level) != "available" and hbfp.info()["level"] != level:
            continue
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "m.pt")],
            env={**os.environ, "HBFP_LEVEL": level}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout.strip()) == (0, level), done.stderr
