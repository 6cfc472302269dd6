"""Convolution layers: the functions under torch's names, and what a layer is beside its products.

The bugs these hunt: an argument that conversion loses, a padding applied twice, a stream or a step that differs from
the function's, a weight packed along another axis than its product reads.
"""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import hbfp  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import stream  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.shape == b.shape and torch.equal(
        a.detach().contiguous().view(torch.int32), b.detach().contiguous().view(torch.int32)
    )


def converted(model, recipe="emulator", step=5, **options):
    """The model, its random streams those of one step."""
    hbfp.convert_(model, recipe, **options)
    hbfp.set_step(model, step)
    return model


def gradients(model, x, function=None):
    """Output, dX and the gradients of the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (function or model)(x)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], values(*y.shape, seed=9))]


def network():
    """An RGB stem, in-place activations, a strided layer in groups and a way back up."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 34, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(34, 6, 3, 2, 1, groups=2),
        nn.LeakyReLU(inplace=True), nn.ConvTranspose2d(6, 4, 2, 2),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- the layer is the function

LAYERS = {
    "1d": (lambda: nn.Conv1d(18, 4, 3, 2, 1, bias=False), (2, 18, 7), {"stride": 2, "padding": 1}),
    "2d": (
        lambda: nn.Conv2d(18, 6, (3, 2), (1, 2), (0, 1), (2, 1), groups=3),
        (2, 18, 6, 5),
        {"stride": (1, 2), "padding": (0, 1), "dilation": (2, 1), "groups": 3},
    ),
    "2d, keeping its size": (lambda: nn.Conv2d(3, 4, (1, 3), padding="same"), (1, 3, 4, 5), {"padding": "same"}),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 3, 2), {"padding": 1}),
    "transposed, 1d": (
        lambda: nn.ConvTranspose1d(17, 4, 3, 2, 1, 1),
        (2, 17, 4),
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "transposed, 2d": (
        lambda: nn.ConvTranspose2d(6, 4, (2, 3), groups=2, dilation=2, bias=False),
        (2, 6, 3, 4),
        {"groups": 2, "dilation": 2},
    ),
    "transposed, 3d": (lambda: nn.ConvTranspose3d(3, 2, 2, 2), (1, 3, 2, 2, 2), {"stride": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_the_function(name):
    make, shape, geometry = LAYERS[name]
    torch.manual_seed(1)
    layer = make()
    function = getattr(functional, f"conv{'_transpose' * layer.transposed}{len(layer.kernel_size)}d")
    converted(layer, seed=11)
    words = {"recipe": "emulator", "seed": 11, "stream": stream(5, 0)}
    expected = gradients(
        layer, values(*shape), lambda x: function(x, layer.weight, layer.bias, **geometry, **words)
    )  # fmt: skip
    assert all(same(a, b) for a, b in zip(gradients(layer, values(*shape)), expected, strict=True))
    assert layer(values(*shape)[0]).shape == expected[0].shape[1:]
    assert expected[0].movedim(1, -1).is_contiguous()  # as the next layer reads it fastest


@pytest.mark.parametrize("name", LAYERS)
def test_built_directly_it_is_the_same_layer(name):
    """Same parameters and initialisation as torch's; each training forward draws new random bits."""
    make, shape, _ = LAYERS[name]
    torch.manual_seed(1)
    theirs = make()
    kind = getattr(hbfp.nn, type(theirs).__name__)
    torch.manual_seed(1)
    arguments = theirs.in_channels, theirs.out_channels, theirs.kernel_size
    ours = kind(
        *arguments, stride=theirs.stride, padding=theirs.padding, dilation=theirs.dilation, groups=theirs.groups,
        bias=theirs.bias is not None, recipe="emulator",
        **({"output_padding": theirs.output_padding} if theirs.transposed else {}),
    )  # fmt: skip
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    assert ours(values(*shape)).shape == theirs(values(*shape)).shape
    first, second = ours(values(*shape)), ours(values(*shape))
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(values(*shape)), ours(values(*shape)))
    assert "ceil" in repr(ours)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_padding_by_other_values_comes_first(mode, padding):
    """X is then the padded tensor: its blocks and random bits are those of the larger one."""
    layer = nn.Conv2d(17, 3, (4, 3), padding=padding, padding_mode=mode)
    converted(layer, seed=11)
    pads = [1, 1, 1, 2] if padding == "same" else [1, 1, 2, 2]
    words = {"recipe": "emulator", "seed": 11, "stream": stream(5, 0)}

    def definition(x):
        return functional.conv2d(nn.functional.pad(x, pads, mode), layer.weight, layer.bias, **words)

    x = values(2, 17, 4, 5)
    assert all(same(a, b) for a, b in zip(gradients(layer, x), gradients(layer, x, definition), strict=True))
    assert same(layer(x[0]), layer(x[:1])[0])


@pytest.mark.parametrize(("channels", "kernel"), [(3, 3), (16, 3), (20, 1), (80, 2)])
def test_flattening_is_part_of_the_layer(channels, kernel):
    """The rule decides by the channels of a group unless the layer says; only the forward product changes."""
    weight = {"recipe": "hbfp4", "stream": stream(0, 0)}
    found = {}
    for flatten in (None, True, False):
        torch.manual_seed(0)
        layer = hbfp.nn.Conv2d(channels, 2, kernel, flatten=flatten).eval()
        assert ("flatten" in repr(layer)) == (flatten is not None)
        found[flatten] = gradients(layer, values(1, channels, 4, 4))
        expected = functional.conv2d(values(1, channels, 4, 4), layer.weight, layer.bias, flatten=flatten, **weight)
        assert same(found[flatten][0], expected)
    assert same(found[None][0], found[channels < 16][0])
    assert same(found[True][0], found[False][0]) == (kernel == 1)
    assert all(same(a, b) for a, b in zip(found[True][1:], found[False][1:], strict=True))


def test_a_converted_layer_may_be_told_to_flatten():
    layer = converted(nn.Conv2d(20, 3, 3), "hbfp4")
    x = values(1, 20, 4, 4)
    before = layer(x)
    layer.flatten = True
    assert not torch.equal(layer(x), before)
    assert same(copy.deepcopy(layer)(x), layer(x))


def test_an_output_size_chooses_the_output_padding():
    layer = converted(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1))
    x = values(1, 3, 3, 3)
    assert layer(x).shape[2:] == (5, 5)
    larger = layer(x, output_size=[6, 5])
    words = {"recipe": "emulator", "stream": stream(5, 0)}
    assert same(
        larger,
        functional.conv_transpose2d(x, layer.weight, layer.bias, 2, 1, output_padding=(1, 0), **words),
    )
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[9, 9])


# ------------------------------------------------------------------------------------------------------- conversion


def test_conversion_and_back():
    model, x = network().eval(), values(2, 3, 4, 4)
    keys, parameters, kinds = list(model.state_dict()), list(model.parameters()), [type(part) for part in model]
    before = model(x)
    report = hbfp.convert_(model, "hbfp4")
    assert [row.name for row in report.converted] == ["0", "2", "4"]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not torch.equal(model(x), before)
    hbfp.revert_(model)
    assert [type(part) for part in model] == kinds
    assert torch.equal(model(x), before)


def test_copies_compute_the_same():
    model, x = converted(network()), values(2, 3, 4, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(same(a, b) for a, b in zip(gradients(other, x), gradients(model, x), strict=True))
        hbfp.set_step(other, 6)
        assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    "norm",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
    ids=["weight", "spectral", "spectral by a hook"],
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_layers_that_compute_their_weights_read_what_comes_of_it(kind, norm):
    """Hooks and parametrisations alike; the weight of before conversion would be another in every one."""
    torch.manual_seed(0)
    model, plain, x = norm(kind(3, 4, 3)), kind(3, 4, 3), values(2, 3, 5, 5)
    hbfp.convert_(model, "hbfp8")
    hbfp.convert_(plain, "hbfp8")
    out = model.eval()(x)
    with torch.no_grad():
        plain.weight.copy_(model.weight)
        plain.bias.copy_(model.bias)
    assert same(out, plain(x))


@pytest.mark.parametrize("kind", [nn.LazyConv1d, nn.LazyConv2d, nn.LazyConvTranspose3d])
def test_a_lazy_layer_is_refused(kind):
    with pytest.raises(hbfp.ConversionError, match="no shape yet"):
        hbfp.convert_(nn.Sequential(kind(4, 3)), "hbfp4")


def test_a_lazy_layer_that_has_its_shape_converts():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(values(1, 3, 4, 4))
    assert [row.name for row in hbfp.convert_(model, "hbfp4").converted] == ["0"]


def test_a_subclass_with_a_product_of_its_own_is_left_alone():
    """Weight standardisation and the like override what computes the product: never in silence."""

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    model = nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 4, 1))
    report = hbfp.convert_(model, "hbfp4")
    assert type(model[0]) is Standardised
    assert "subclass of Conv2d with its own _conv_forward" in str(report)


@pytest.mark.parametrize("recipe", ["hbfp4t4", "hbfp4tensor"])
def test_blocks_that_know_no_taps_are_refused_at_conversion(recipe):
    """Not at the first forward pass; and the model is as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 3))
    with pytest.raises(hbfp.FormatError, match=r"'1'.*lines.*hbfp4b64"):
        hbfp.convert_(model, recipe)
    assert type(model[0]) is nn.Linear
    with pytest.raises(hbfp.FormatError, match="lines"):
        hbfp.nn.Conv2d(3, 4, 3, recipe=recipe)
    hbfp.convert_(model, recipe, rules={"1": hbfp.HBFP4})


def test_inputs_that_do_not_fit_are_named():
    layer = converted(nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"))
    for x in (values(1, 3, 2, 2), values(2, 2), values(1, 1, 3, 5, 5)):
        with pytest.raises(hbfp.ShapeError):
            layer(x)
    with pytest.raises(hbfp.ShapeError, match="3 spatial dimensions"):
        converted(nn.Conv3d(3, 4, 3))(values(3, 4, 4))
    with pytest.raises(hbfp.ShapeError, match="pad less"):
        converted(nn.ConvTranspose2d(3, 4, 2, padding=2))(values(1, 3, 2, 2))
    with pytest.raises(hbfp.DTypeError):
        layer(torch.ones(1, 3, 5, 5, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------- around the layer


def test_compiled_layers_give_the_same_bits_and_gradients():
    torch._dynamo.reset()
    model, x = converted(network(), step=2**31 + 5), values(2, 3, 4, 4)  # a stream whose signed form is negative
    eager = gradients(model, x)
    compiled = gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(same(a, b) for a, b in zip(eager, compiled, strict=True))


def test_recomputation_draws_the_same_bits():
    """Activation checkpointing runs the forward pass again, inside backward."""
    model, x = network(), values(2, 3, 4, 4)
    hbfp.convert_(model, "emulator")
    model.__dict__["hbfp_root"].step = 7
    whole = gradients(model, x)
    model.__dict__["hbfp_root"].step = 7
    parts = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


def test_memory_formats_do_not_show_in_the_bits():
    model, x = converted(network()), values(2, 3, 4, 4)
    plain = gradients(model, x)
    model.to(memory_format=torch.channels_last)
    turned = gradients(model, x.contiguous(memory_format=torch.channels_last))
    assert all(same(a, b) for a, b in zip(plain, turned, strict=True))


def test_an_activation_may_change_the_output_in_place():
    """It must be no view: autograd refuses those."""
    for layer in (nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 4, 1)):
        converted(layer)
        for x in (values(2, 3, 3, 3), values(3, 3, 3)):
            gradients(layer, x, lambda x, layer=layer: layer(x).relu_())


def test_meta_tensors_give_shapes():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, device="meta"), nn.ConvTranspose2d(4, 6, 3, 2, groups=2, device="meta")
    )
    out = converted(model)(torch.empty(2, 3, 9, 7, device="meta"))
    assert (out.shape, out.device.type) == ((2, 6, 9, 7), "meta")


# -------------------------------------------------------------------------------------------------- files and weights

PACKED = {
    "channels at each tap": (lambda: nn.Conv2d(20, 4, 3), (1, 20, 4, 4), True),
    "channels at each tap, in groups": (lambda: nn.Conv1d(36, 4, 3, groups=2), (1, 36, 5), True),
    "a flattened patch": (lambda: nn.Conv2d(3, 4, 3), (1, 3, 4, 4), False),
    "a flattened patch of one tap": (lambda: nn.Conv2d(3, 4, 1), (1, 3, 4, 4), True),
    "transposed": (lambda: nn.ConvTranspose2d(20, 3, 3), (1, 20, 3, 3), True),
    "transposed, groups end within a block": (lambda: nn.ConvTranspose2d(20, 4, 2, groups=2), (1, 20, 3, 3), False),
    "transposed, groups end with a block": (lambda: nn.ConvTranspose1d(32, 4, 2, groups=2), (1, 32, 3), True),
}


@pytest.mark.parametrize("name", PACKED)
def test_files_give_back_the_same_bits(name, tmp_path):
    """A weight is packed along the axis that its forward product reads; where none is, it is stored as it is."""
    make, shape, packs = PACKED[name]
    saved, loaded = (converted(nn.Sequential(make()), "hbfp4b16").eval() for _ in range(2))
    hbfp.save_model(tmp_path / "m", saved)
    hbfp.load_model(tmp_path / "m", loaded)
    assert same(loaded(values(*shape)), saved(values(*shape)))
    assert isinstance(hbfp.load(tmp_path / "m")["0.weight"], hbfp.BlockArray) == packs


def test_a_weight_that_two_products_read_in_two_ways_is_not_packed(tmp_path):
    def tied():
        model = nn.Sequential(nn.Conv2d(20, 20, 3, bias=False), nn.ConvTranspose2d(20, 20, 3, bias=False))
        model[1].weight = model[0].weight
        return converted(model, "hbfp4").eval()

    saved, loaded, x = tied(), tied(), values(1, 20, 4, 4)
    hbfp.save_model(tmp_path / "m", saved)
    hbfp.load_model(tmp_path / "m", loaded)
    assert loaded[1].weight is loaded[0].weight
    assert same(loaded(x), saved(x))


@pytest.mark.parametrize(("kind", "axis"), [(nn.Conv2d, 1), (nn.ConvTranspose2d, 0)])
@pytest.mark.parametrize("channels", [3, 70])
def test_wide_weights_are_blocked_as_the_product_is(kind, axis, channels):
    """Flattened or not; along the last axis, 3 elements would share an exponent."""
    layer = converted(kind(channels, 5, 3), "hbfp4")
    plain = copy.deepcopy(layer)
    for wide, model in ((True, layer), (False, plain)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if wide:
            hbfp.wide_weights(optimizer, model, bits=6)
        for parameter in model.parameters():
            parameter.grad = values(*parameter.shape, seed=1)
        optimizer.step()
    expected = hbfp.quantize(plain.weight.detach().numpy(), hbfp.HBFP6, axis)
    assert same(layer.weight, torch.from_numpy(expected))
    assert same(layer.bias, plain.bias)


# -------------------------------------------------------------------------------------------------------------- counts


def test_agrees_with_torchs_counter_on_the_fp32_model():
    model, x = nn.Sequential(
        nn.Conv2d(3, 20, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(20, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 5, 2, dilation=2)
    ), values(2, 3, 5, 6)  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, x)
    assert found.macs == counter.get_total_flops() // 2
    assert found.share(4) == 1.0


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_are_counted_by_hand(kind):
    """In fixed point and in FP32, where torch's own formula for the weight gradient forgets them."""
    layer, x = kind(8, 12, 3, groups=4, bias=False), values(2, 8, 5, 5).requires_grad_()
    pixels = 25 if layer.transposed else 9
    macs = 2 * pixels * 8 * 12 * 9 // 4
    assert hbfp.audit(layer, x).macs == 3 * macs
    hbfp.convert_(layer, "hbfp4")
    assert hbfp.audit(layer, x).by_product == {
        "forward": macs, "input gradient": macs, "weight gradient": macs,
    }  # fmt: skip
