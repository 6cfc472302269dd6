"""Frozen convolutions: kernels held as codes in the order of the products, and the call that reads them.

The bugs these hunt: a tap, a group or a block that lies elsewhere in the panels than the product looks for it; zeros of
a margin that meet a NaN; a way around the panels that decodes at each call, unseen; a round trip that loses the groups.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from zoo import same, values  # noqa: E402

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402
from hbfp.packed import PackedWeight  # noqa: E402


@dataclass(frozen=True)
class Case:
    kind: Any
    channels: tuple[int, int]
    pixels: tuple[int, ...]
    kernel: Any = 3
    kept: bool = True
    """Whether products read panels."""
    flatten: bool | None = None
    layer: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        torch.manual_seed(len(str(self)))
        layer = self.kind(*self.channels, self.kernel, **self.layer)
        hbfp.convert_(layer, "hbfp4")
        if self.flatten is not None:
            layer.flatten = self.flatten
        return layer.eval()


def case(kind: Any, channels: tuple[int, int], pixels: tuple[int, ...], kernel: Any = 3, **rest: Any) -> Case:
    own = {name: rest.pop(name) for name in ("kept", "flatten") if name in rest}
    return Case(kind, channels, pixels, kernel, layer=rest, **own)


CASES = {
    "plain": case(nn.Conv2d, (32, 64), (7, 6), padding=1),
    "one panel": case(nn.Conv2d, (32, 32), (18, 20), padding=1, bias=False),
    "narrow": case(nn.Conv2d, (20, 13), (18, 16), padding=1),
    "strides": case(nn.Conv2d, (16, 70), (9, 8), (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilation": case(nn.Conv2d, (48, 33), (9, 10), dilation=(2, 3), padding=3, bias=False),
    "groups": case(nn.Conv2d, (72, 120), (5, 6), groups=3, padding=1),
    "groups of panels": case(nn.Conv2d, (64, 128), (5, 6), groups=2, stride=2),
    "narrow groups": case(nn.Conv2d, (8, 8), (5, 6), groups=2, flatten=False, kept=False),
    "patches of one tap": case(nn.Conv2d, (40, 24), (5, 6), 1, flatten=True),
    "one tap": case(nn.Conv2d, (40, 24), (5, 6), 1, stride=2),
    "padding alone under taps": case(nn.Conv2d, (32, 32), (1, 2), padding=1),
    "far more margin than image": case(nn.Conv2d, (16, 32), (2, 2), 2, dilation=40, padding=40),
    "line": case(nn.Conv1d, (24, 40), (11,), 4, padding="same"),
    "reflected": case(nn.Conv2d, (32, 16), (5, 6), padding=1, padding_mode="reflect"),
    "volume": case(nn.Conv3d, (16, 32), (3, 4, 5), 2, padding=1),
    "transposed": case(nn.ConvTranspose2d, (32, 48), (4, 5), padding=1),
    "transposed strides": case(nn.ConvTranspose2d, (24, 16), (4, 5), stride=2, padding=1, output_padding=1),
    "transposed gaps": case(nn.ConvTranspose2d, (32, 40), (3, 4), 2, stride=(3, 2), dilation=2),
    "transposed groups": case(nn.ConvTranspose2d, (128, 96), (4, 5), groups=2, stride=2),
    "transposed line": case(nn.ConvTranspose1d, (32, 48), (7,), stride=2),
}
FORMATS = ("hbfp4b64", "hbfp4b16", "hbfp3b20", "hbfp6b16", "hbfp8b64")


def convolve_by_floats(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """With a gradient to come, which takes the way of training; of the weights as they are."""
    with torch.enable_grad():
        return layer(x.clone().requires_grad_()).detach()


def check(name: str, format: str) -> None:
    of = CASES[name]
    layer = of.make()
    layer.hbfp_state.recipe = layer.hbfp_state.recipe.at(format)
    for samples in (1, 3):
        x = values(samples, of.channels[0], *of.pixels, seed=samples)
        expected = convolve_by_floats(layer, x)
        frozen = copy.deepcopy(layer)
        if name == "transposed groups" and hbfp.HBFP.parse(format).block == 20:
            with pytest.raises(hbfp.ConversionError, match="groups, which no axis has"):
                hbfp.freeze_(frozen)
            continue
        hbfp.freeze_(frozen)
        assert isinstance(frozen.weight, PackedWeight)
        assert (frozen.weight.exponents is None) == of.kept
        together = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
        with torch.no_grad():
            for image in (x, x.contiguous(memory_format=together)):
                assert same(layer(image), expected)
                assert same(frozen(image), expected)
        assert same(convolve_by_floats(frozen, x), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_frozen_layers_have_the_bits_of_converted_ones(name: str, format: str) -> None:
    check(name, format)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512vnni", "amx"])
def test_at_all_levels(level: str) -> None:
    if hbfp.info()["level"] == level or hbfp.info()["levels"].get(level) != "available":
        pytest.skip("the level of this run, or none of this CPU's")
    formats = FORMATS[0], FORMATS[2], FORMATS[4]
    code = f"import test_frozen_convolutions as t; [t.check(name, format) for name in t.CASES for format in {formats}]"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "HBFP_LEVEL": level, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def frozen(name: str = "groups", format: str = "hbfp4b64") -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    of = CASES[name]
    layer = of.make()
    layer.hbfp_state.recipe = layer.hbfp_state.recipe.at(format)
    x = values(2, of.channels[0], *of.pixels)
    with torch.no_grad():
        expected = layer(x)
    hbfp.freeze_(layer)
    return layer, x, expected


@pytest.mark.parametrize("name", ["groups", "transposed strides", "far more margin than image"])
def test_no_number_that_a_weight_holds_is_lost_to_taps_that_are_left_out(name: str) -> None:
    of = CASES[name]
    layer = of.make()
    with torch.no_grad():
        layer.weight[1, 3].flatten()[-1] = float("nan")
        layer.weight[5, 2] *= 2.0**-100
        layer.weight[6] = 0.0
        x = values(2, of.channels[0], *of.pixels)
        expected = layer(x)
        hbfp.freeze_(layer)
        assert same(layer(x), expected)
        assert expected.isnan().any()


def test_a_tap_that_meets_only_padding_still_meets_a_nan() -> None:
    layer = nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        layer.weight[7, 3, 0, 0] = float("nan")
        hbfp.convert_(layer, "hbfp4")
        x = values(2, 32, 1, 1)
        expected = layer.eval()(x)
        hbfp.freeze_(layer)
        assert layer.weight.exponents is None
        assert expected[:, 7].isnan().all()
        assert same(layer(x), expected)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The image `x` [N, C, *S] as it may lie in memory."""
    together = x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = x.new_zeros(x.shape[0], x.shape[1] + 3, *(2 * size + 1 for size in x.shape[2:]))
    inside = wide[(slice(None), slice(1, -2), *(slice(1, None, 2),) * (x.dim() - 2))].copy_(x)
    turned = x.transpose(2, -1).contiguous().transpose(2, -1)
    return {
        "dense": x.contiguous(),
        "channels together": together,
        "channels cut from more": torch.cat([together] * 2, 1)
        .movedim(1, -1)
        .contiguous()
        .movedim(-1, 1)[:, : x.shape[1]],
        "every second of a larger one": inside,
        "pixels turned": turned,
        "samples last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded": x[:1].expand_as(x),
    }


@pytest.mark.parametrize("name", [name for name, of in CASES.items() if of.kept])
def test_nothing_is_decoded_where_codes_are_read_however_the_image_lies(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    layer, x, expected = frozen(name)
    with torch.no_grad():
        twice = layer(x[:1].repeat(2, *(1,) * (x.dim() - 1)))
    monkeypatch.setattr(ops.packed._core, "decode", refuse)
    for lies, image in layouts(x).items():
        wanted = twice if lies == "expanded" else expected
        with torch.no_grad():
            assert same(layer(image), wanted), lies
        assert same(layer(image), wanted), lies  # with a node of autograd, where the bias has a gradient


@pytest.mark.parametrize(
    ("format", "outputs", "bits"), [("hbfp4b64", 64, 4.125), ("hbfp4b64", 16, 8.5), ("hbfp8b64", 64, 8.5)]
)
def test_a_frozen_kernel_takes_what_its_codes_take(format: str, outputs: int, bits: float) -> None:
    layer = nn.Conv2d(64, outputs, 3)
    hbfp.freeze_(layer, format)
    count = layer.weight.numel()
    # Where registers are narrow, so are panels: the nibbles of sixteen outputs fill one.
    widths = {"scalar": 16, "avx2": 16}.get(hbfp.info()["level"], 32)
    expected = 4.125 if format == "hbfp4b64" and outputs >= widths else 8.5
    assert expected <= bits
    assert 0 <= layer.weight.packed_bytes - expected * count / 8 <= outputs
    layer(values(1, 64, 5, 5))
    assert sum(x.numel() for x in layer.weight._held if x is not None) == layer.weight.packed_bytes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["groups", "volume", "transposed strides", "transposed groups"])
def test_panels_give_the_planes_of_the_encoder(name: str, format: str) -> None:
    layer = CASES[name].make()
    weight = layer.weight.detach().clone()
    weight[3], weight[4, :5] = 0.0, float("nan")
    axis, groups = int(not layer.transposed), layer.groups
    held = PackedWeight.of(weight, format, axis, groups=groups)
    crossing = axis == 0 and groups > 1 and weight.shape[0] // groups % hbfp.HBFP.parse(format).block != 0
    assert (held.exponents is None) != crossing
    assert held.block_array() == hbfp.encode(weight, format, axis=axis)
    assert same(held.decode(), PackedWeight.of(weight, format, axis).decode())
    assert same(held.decode_as_it_lies(), held.decode())


@pytest.mark.parametrize("name", ["groups", "transposed strides"])
def test_what_torch_does_to_weights(name: str) -> None:
    layer, x, expected = frozen(name)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, _, _ = frozen(name)
    with torch.no_grad():
        other.weight.copy_(torch.zeros(other.weight.shape))
        assert not same(other(x), expected)
        other.load_state_dict(torch.load(file, weights_only=True))
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other, layer.to("cpu")):
            assert one.weight.groups == layer.groups
            assert same(one(x), expected)
            assert (one.weight.exponents, one.weight.groups) == (None, layer.groups)
        layer.double().float()
        assert same(layer(x), expected)
        assert layer.weight.exponents is None
        assert same(layer(x[0]), expected[0])
    hbfp.unfreeze_(layer)
    with torch.no_grad():
        assert same(layer(x), expected)


@pytest.mark.parametrize("name", ["groups", "transposed strides"])
def test_compiled_and_exported_layers_read_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, expected = frozen(name)
    torch._dynamo.reset()
    graphs = []

    def noting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=noting))
        assert same(compiled(x), expected)
    names = [str(node.target) for node in graphs[0].graph.nodes if "hbfp" in str(node.target)]
    assert names == [f"hbfp.packed_convolution{'' if not layer.transposed else '_input_gradient'}.default"]
    program = torch.export.export(layer, (x,), strict=False)
    with torch.no_grad():
        assert same(program.module()(x), expected)


def test_planes_are_laid_out_by_the_first_product_which_tells_the_groups() -> None:
    layer, x, expected = frozen("groups")
    array = layer.weight.block_array()
    weight = PackedWeight.from_block_array(array)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    assert (layer.weight.groups, layer.weight.exponents is None) == (0, False)
    with torch.no_grad():
        assert same(layer(x), expected)
    assert (layer.weight.groups, layer.weight.exponents) == (3, None)


@pytest.mark.parametrize("name", ["groups", "transposed strides"])
def test_freezing_again_lays_out_what_a_file_left_as_planes(name: str, tmp_path: Path) -> None:
    """Before torch.compile traces over planes, which it would lay out at each call."""
    layer, x, expected = frozen(name)
    hbfp.save_model(tmp_path / "m.safetensors", layer)
    with torch.device("meta"):
        loaded = CASES[name].make()
    hbfp.freeze_(loaded)
    hbfp.load_model(tmp_path / "m.safetensors", loaded)
    assert loaded.weight.exponents is not None
    hbfp.freeze_(loaded)
    assert (loaded.weight.exponents, loaded.weight.groups) == (None, layer.groups)
    with torch.no_grad():
        assert same(loaded(x), expected)


def test_other_groups_than_those_of_the_panels_read_values() -> None:
    """One weight [Co, C/g, 3, 3] serves convolutions of any groups that divide Co, by functional calls."""
    weight = values(24, 32, 3, 3)
    packed = PackedWeight.of(weight, "hbfp4b64", 1, groups=2)
    plain = packed.decode()
    for groups in (1, 2, 3, 2):
        x = values(2, 32 * groups, 4, 5)
        found = hbfp.nn.functional.conv2d(x, packed, groups=groups, recipe="hbfp4")
        assert same(found, hbfp.nn.functional.conv2d(x, plain, groups=groups, recipe="hbfp4"))


def test_a_kernel_takes_the_values_of_one_with_other_groups() -> None:
    weight, other = (PackedWeight.of(values(24, 32, 3, 3, seed=i), "hbfp4b64", 1, groups=i) for i in (1, 2))
    expected = other.decode()
    weight.copy_(other)
    assert (weight.groups, weight.exponents) == (1, None)
    assert same(weight.decode(), expected)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest_away"])
def test_values_of_codes_are_exact_under_any_rounding(rounding: str) -> None:
    layer, x, expected = frozen("groups")
    right = hbfp.OperandPolicy("hbfp4b64", rounding)
    layer.hbfp_state.recipe = hbfp.recipe("hbfp4b64", forward=(layer.hbfp_state.recipe.forward.left, right))
    thawed = copy.deepcopy(layer)
    hbfp.unfreeze_(thawed)
    with torch.no_grad():
        assert same(layer(x), expected)
        assert same(thawed(x), expected)


@pytest.mark.parametrize("format", ["hbfp6b64", "hbfp3b64", "hbfp4b16", "hbfp12b64"])
@pytest.mark.parametrize("name", ["groups", "transposed"])
def test_a_schedule_that_goes_on_reads_decoded_values(name: str, format: str) -> None:
    layer, x, _ = frozen(name)
    layer.hbfp_state.recipe = layer.hbfp_state.recipe.at(format)
    thawed = copy.deepcopy(layer)
    hbfp.unfreeze_(thawed)
    with torch.no_grad():
        assert same(layer(x), thawed(x))


def test_gradients_pass_through() -> None:
    for name in ("groups", "transposed strides"):
        layer, x, _ = frozen(name)
        thawed = copy.deepcopy(layer)
        hbfp.unfreeze_(thawed)
        found = []
        for one in (layer, thawed):
            given = x.clone().requires_grad_()
            one(given).square().sum().backward()
            found.append((given.grad, one.bias.grad))
        assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_codes_that_no_encoder_writes_are_refused_when_they_are_laid_out() -> None:
    array = hbfp.encode(values(8, 16, 3, 3), "hbfp4b16", axis=1)
    mantissas = array.mantissa_plane.copy()
    mantissas[5, 0] = 0x18  # the code -8
    bad = hbfp.BlockArray(array.exponent_plane, mantissas, array.format, array.shape, axis=1)
    with pytest.raises(hbfp.CodeError, match="row 5"):
        PackedWeight.from_block_array(bad).lay_out(1)


def test_weights_alone_stay_as_a_file_holds_them() -> None:
    """torch's own layers decode at each call, which is faster from planes."""
    layer = CASES["plain"].make()
    hbfp.freeze_(layer, activations="float32")
    assert layer.weight.exponents is not None


def test_recorders_are_told_of_frozen_convolutions() -> None:
    layer, x, _ = frozen("plain")
    assert hbfp.audit(layer, x).share(4) == 1.0
    with hbfp.watch(layer, evaluation=True) as watch, torch.no_grad():
        layer(x)
    assert [row.operand for row in watch.rows] == ["activations"]
    assert all("PackedWeight" in reason for reason in watch.unobserved.values())
