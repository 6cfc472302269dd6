"""What layers keep between forward and backward: codes along the batch, not floats, and the bits do not change.

Other files compare gradients with their definitions. Here they are compared with those of layers that keep floats:
where somebody watches, products find their operands as tensors.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402
from zoo import leaves  # noqa: E402

import hbfp  # noqa: E402
from hbfp import autograd, ops  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import recipe  # noqa: E402


def saved(run):
    """What autograd saves while `run` runs, but for parameters."""
    tensors = []

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            tensors.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return tensors


def saved_bytes(run):
    return sum(x.numel() * x.element_size() for x in saved(run))


@contextmanager
def watched():
    """Within it layers keep floats."""
    ops.recorders.append(lambda product: None)
    ops.wanted.append(lambda source, stream: True)
    try:
        yield
    finally:
        ops.recorders.clear(), ops.wanted.clear()


@pytest.mark.parametrize(("name", "shrinks"), [("hbfp4", 7.5), ("hbfp6", 3.7), ("hbfp8", 3.7)])
def test_a_linear_layer_saves_codes(name, shrinks):
    # A layer that saved the float tensor would pass every test of its bits.
    layer = torch.nn.Linear(256, 64)
    hbfp.convert_(layer, name)
    x = torch.randn(512, 256)
    assert saved_bytes(lambda: layer(x)) <= 4 * x.numel() / shrinks


@pytest.mark.parametrize("name", ["hbfp4", "hbfp6", "hbfp8", "emulator", "hbfp6b16", "hbfp4b64-e5"])
@pytest.mark.parametrize("shape", [(70, 50), (3, 41, 33), (2, 3, 5, 7)])
@pytest.mark.parametrize("transposed", [False, True])
def test_kept_codes_give_the_gradient_of_the_tensor(name, shape, transposed):
    # Codes of the wrong axis, stream or rounding, or of a tensor whose strides were ignored.
    rules = recipe(name)
    x = torch.randn(shape)
    if transposed:
        x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    weight = torch.randn(24, shape[-1], requires_grad=True)
    dy = torch.randn(*shape[:-1], 24)
    autograd.linear(x, weight, None, rules, 7, 1 << 32).backward(dy)
    policy = rules.weight_gradient
    expected = ops.product(
        dy.flatten(0, -2), -2, x.flatten(0, -2), -2, policy.formats, policy.roundings, 7,
        (1 << 32 | autograd.Role.DY_FOR_DW, 1 << 32 | autograd.Role.X_FOR_DW),
    )  # fmt: skip
    assert torch.equal(weight.grad, expected)


def test_a_nan_survives_being_kept():
    # A kept operand that lost its flags would multiply a NaN block as zeros.
    x = torch.randn(70, 40)
    x[3, 5] = float("nan")
    weight = torch.randn(8, 40, requires_grad=True)
    autograd.linear(x, weight, None, recipe("hbfp4"), 0, 0).sum().backward()
    assert weight.grad[:, 5].isnan().all()
    assert not weight.grad[:, :5].isnan().any()
    assert not weight.grad[:, 6:].isnan().any()


def test_bytes_of_another_size_are_refused():
    # Saved tensors pass through hooks of the user's: nothing they give back may be read out of bounds.
    x, w, dy = torch.randn(64, 32), torch.randn(16, 32), torch.randn(64, 16)
    formats = (hbfp.HBFP4, hbfp.HBFP4)
    _, kept = ops.product_keeping(x, w, -1, formats, (0, 0), 0, (0, 0), None, (hbfp.HBFP4, 0, 0))
    with pytest.raises(hbfp.HBFPError, match="bytes of a kept operand"):
        ops.kept_product(dy, kept[:-1].clone(), 32, formats, (0, 0), 0, (0, 0))
    with pytest.raises(hbfp.HBFPError, match="uint8"):
        ops.kept_product(dy, kept.to(torch.float32), 32, formats, (0, 0), 0, (0, 0))
    ops.kept_product(dy, torch.full_like(kept, 255), 32, formats, (0, 0), 0, (0, 0))


@pytest.mark.parametrize("rows", [40, 64, 65, 400])
def test_bias_gradients_come_with_the_weight_gradient(rows):
    # One pass over dY serves both; dY may be a view with any strides, and be summed by another way.
    generator = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, 32, generator=generator), torch.randn(70, 32, generator=generator)
    wide = torch.randn(rows, 140, generator=generator)
    for block in (16, 64):
        formats = (hbfp.HBFP(4, block=block),) * 2
        _, kept = ops.product_keeping(x, w, -1, formats, (0, 0), 0, (0, 0), None, (formats[1], 0, 0))
        for dy in (wide[:, :70], wide[:, ::2], wide[:, :70].t().contiguous().t()):
            sums = torch.full((70,), float("nan"))
            alone = ops.kept_product(dy, kept, 32, formats, (3, 0), 1, (2, 0))
            assert torch.equal(ops.kept_product(dy, kept, 32, formats, (3, 0), 1, (2, 0), sums=sums), alone)
            assert torch.equal(sums, ops.column_sums(dy))
    with pytest.raises(hbfp.HBFPError, match="sums of lines"):
        ops.kept_product(wide[:, :70], kept, 32, formats, (0, 0), 0, (0, 0), sums=torch.empty(71))


def test_nothing_is_kept_that_is_larger_than_the_floats():
    # Codes of a few columns, or of depthwise channels, are padded to whole strips: keeping them would waste memory.
    layer, convolution = torch.nn.Linear(3, 8), torch.nn.Conv2d(32, 32, 3, groups=32)
    hbfp.convert_(layer, "hbfp4")
    hbfp.convert_(convolution, "hbfp4")
    x, image = torch.randn(256, 3), torch.randn(4, 32, 12, 12)
    assert saved_bytes(lambda: layer(x)) <= 4 * x.numel()
    assert saved_bytes(lambda: convolution(image)) <= 4 * image.numel()
    layer(x).sum().backward()
    convolution(image).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert convolution.weight.grad.abs().sum() > 0


def test_a_convolution_saves_codes():
    convolution = torch.nn.Conv2d(32, 32, 3, padding=1)
    hbfp.convert_(convolution, "hbfp4")
    image = torch.randn(64, 32, 8, 8)
    assert saved_bytes(lambda: convolution(image)) <= 4 * image.numel() / 7


def test_a_product_with_a_matrix_saves_codes():
    a, b = torch.randn(2, 256, 512), torch.randn(512, 64, requires_grad=True)
    size = saved_bytes(lambda: functional.matmul(a, b, recipe="hbfp4"))
    assert size <= 4 * a.numel() / 7.5
    # Matrices of a batch have gradients of their own, each along its own rows.
    batch = torch.randn(2, 512, 64, requires_grad=True)
    assert saved_bytes(lambda: functional.matmul(a, batch, recipe="hbfp4")) == 4 * a.numel()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("name", "shrinks"), [("hbfp4", 7.3), ("hbfp8", 3.5)])
def test_a_transposed_convolution_saves_codes(rank, name, shrinks):
    layer = getattr(nn, f"ConvTranspose{rank}d")(64, 32, 2, stride=2)
    hbfp.convert_(layer, name)
    image = torch.randn(32, 64, *(4,) * rank)
    assert saved_bytes(lambda: layer(image)) <= 4 * image.numel() / shrinks


FLOATS = {"LSTM": 5, "GRU": 4, "RNN": 1}
"""Of the width of the states, for each row: gates and what of them is not cheap to compute again."""


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("directions", [1, 2])
def test_a_recurrent_layer_saves_its_gates_and_codes(kind, directions):
    layer = getattr(nn, kind)(96, 64, bidirectional=directions == 2)
    hbfp.convert_(layer, "hbfp4")
    x = torch.randn(40, 16, 96)
    rows, initial = 40 * 16, 4 * 16 * 64 * (2 if kind == "LSTM" else 1)
    gates = 4 * rows * 64 * FLOATS[kind]
    assert saved_bytes(lambda: layer(x)) <= directions * (gates + initial + 4 * x.numel() / 7.5)


def test_a_projection_saves_codes_of_the_states_that_it_makes():
    layer = nn.LSTM(96, 64, proj_size=32)
    hbfp.convert_(layer, "hbfp4")
    x = torch.randn(40, 16, 96)
    rows = 40 * 16
    assert saved_bytes(lambda: layer(x)) <= 4 * rows * (5 * 64 + (96 + 32) / 7.5) + 4 * 16 * (64 + 32)


def test_a_packed_sequence_saves_codes():
    layer = nn.GRU(96, 64)
    hbfp.convert_(layer, "hbfp4")
    x = pack_sequence([torch.randn(steps, 96) for steps in (90, 83, 80, 3)])
    rows = x.data.shape[0]
    assert saved_bytes(lambda: layer(x)) <= 4 * (rows * (4 * 64 + 96 / 7.3) + 4 * 64)


EMULATOR, NEAREST = recipe("emulator"), recipe("hbfp4")
RECIPES = {
    "hbfp4": NEAREST,
    "hbfp6": recipe("hbfp6"),
    "hbfp8": recipe("hbfp8"),
    "emulator": EMULATOR,
    # Codes of other widths and roundings than those of the forward product.
    "mixed": replace(EMULATOR, weight_gradient=recipe("hbfp8").weight_gradient),
    "12 bits forward": replace(recipe("hbfp12b64"), weight_gradient=NEAREST.weight_gradient),
    "12 bits of dY": replace(
        NEAREST,
        weight_gradient=replace(NEAREST.weight_gradient, left=recipe("hbfp12b64").weight_gradient.left),
    ),
    # What cannot be kept.
    "12 bits": recipe("hbfp12b64"),
    "emulated": replace(EMULATOR, backend="emulate"),
    "one emulated": replace(EMULATOR, weight_gradient=replace(EMULATOR.weight_gradient, backend="emulate")),
    "another emulated": replace(EMULATOR, forward=replace(EMULATOR.forward, backend="emulate")),
}
KEEPING = [name for name in RECIPES if name != "12 bits" and "emulated" not in name]


def image(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


class Product(nn.Module):
    """`functional.matmul` as a layer."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.weight = policy, nn.Parameter(torch.randn(40, 24))

    def forward(self, x):
        return functional.matmul(x, self.weight, recipe=self.policy, seed=3, stream=5 << 32)


LAYERS = {
    "LSTM": (lambda: nn.LSTM(40, 33), lambda: torch.randn(9, 5, 40)),
    "GRU": (lambda: nn.GRU(40, 33, 2, bidirectional=True), lambda: torch.randn(9, 5, 40)),
    "RNN": (lambda: nn.RNN(40, 33, nonlinearity="relu"), lambda: torch.randn(9, 5, 40)),
    "LSTM, projected": (lambda: nn.LSTM(40, 33, 2, proj_size=24, bidirectional=True), lambda: torch.randn(9, 5, 40)),
    "LSTM, packed": (
        lambda: nn.LSTM(40, 33, proj_size=24, bidirectional=True),
        lambda: pack_sequence([torch.randn(steps, 40) for steps in (20, 11, 11, 2, 1)]),
    ),
    "GRU, packed": (
        lambda: nn.GRU(40, 33, bidirectional=True),
        lambda: pack_sequence([torch.randn(steps, 40) for steps in (20, 11, 11, 2, 1)]),
    ),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(33, 20, 3, 2, output_padding=1), lambda: torch.randn(20, 33, 7)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(64, 20, 3, 2, 1), lambda: image(20, 64, 5, 6)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(66, 6, 3, groups=2), lambda: image(70, 66, 3, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(32, 8, 2), lambda: torch.randn(33, 32, 3, 2, 3)),
    "matmul": (None, lambda: torch.randn(3, 30, 40)),
    "matmul, columns": (None, lambda: torch.randn(40, 70).t()),
}


def layer_and_input(name, policy):
    torch.manual_seed(1)
    make, given = LAYERS[name]
    layer = Product(policy) if make is None else make()
    if make is not None:
        hbfp.convert_(layer, policy, seed=3)
        hbfp.set_step(layer, 7)
    return layer, given()


def results(layer, x):
    """The floats that a call gives, and the gradients of its parameters, twice."""
    outputs = [y for y in leaves(layer(x)) if y.is_floating_point()]
    dys = [torch.linspace(-1, 1, y.numel()).reshape(y.shape).sin() for y in outputs]
    found = [*outputs]
    for again in (True, False):
        found += torch.autograd.grad(outputs, list(layer.parameters()), dys, retain_graph=again)
    return [y.detach() for y in found]


@pytest.mark.parametrize("policy", RECIPES)
@pytest.mark.parametrize("name", LAYERS)
def test_kept_codes_give_the_bits_of_kept_floats(name, policy):
    # Hunted: codes of another axis, format, rounding or stream; states computed again in another order; backward that
    # uses up what it needs when it is called again; a backend that is handed codes.
    layer, x = layer_and_input(name, RECIPES[policy])
    with watched():
        expected = results(layer, x)
    found = results(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept = [t.dtype for t in saved(lambda: layer(x))].count(torch.uint8)
    with watched():
        assert all(t.dtype is torch.float32 for t in saved(lambda: layer(x)))
    assert (kept > 0) == (policy in KEEPING)


@pytest.mark.parametrize("name", LAYERS)
def test_nans_survive_being_kept(name):
    layer, x = layer_and_input(name, NEAREST)
    rows = x if isinstance(x, torch.Tensor) else x.data
    rows.select(-1, 0)[::3] = float("nan")
    with watched():
        expected = results(layer, x)
    assert any(t.isnan().any() for t in expected)
    for found, wanted in zip(results(layer, x), expected, strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_states_may_be_changed_in_place_where_they_are_computed_again():
    # As after dropout_: they are saved by nobody.
    for kind in ("LSTM", "GRU"):
        layer, x = layer_and_input(kind, NEAREST)
        weights = list(layer.parameters())
        y = layer(x)[0]
        expected = torch.autograd.grad(y.sum(), weights)
        y = layer(x)[0]
        total = y.sum()
        with torch.no_grad():
            y.zero_()
        assert all(map(torch.equal, torch.autograd.grad(total, weights), expected))


def test_narrow_layers_keep_the_floats():
    # One channel a group, three columns: codes are padded to whole panels.
    transposed = nn.ConvTranspose2d(32, 32, 3, groups=32)
    narrow, projected = nn.RNN(3, 64), nn.LSTM(64, 8, proj_size=3)
    for layer in (transposed, narrow, projected):
        hbfp.convert_(layer, "hbfp4")
    picture, x, wide = torch.randn(4, 32, 12, 12), torch.randn(32, 4, 3), torch.randn(32, 4, 64)
    assert saved_bytes(lambda: transposed(picture)) <= 4 * picture.numel()
    assert saved_bytes(lambda: narrow(x)) <= 4 * (128 * (64 + 3) + 4 * 64)
    assert saved_bytes(lambda: projected(wide)) <= 4 * (128 * (5 * 8 + 3 + 64 / 7.3) + 4 * (8 + 3))
    column = torch.randn(256, 3), torch.randn(3, 8, requires_grad=True)
    assert saved_bytes(lambda: functional.matmul(*column, recipe="hbfp4")) <= 4 * 256 * 3


def test_bytes_that_are_not_those_of_an_image_are_refused():
    # Hooks of the user's may give back anything.
    x, w, dy = torch.randn(8, 32, 4, 4), torch.randn(32, 8, 1, 1), torch.randn(8, 8, 4, 4)
    geometry = ops.Geometry((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    formats = (hbfp.HBFP4, hbfp.HBFP4)
    _, kept = ops.convolution_input_gradient_keeping(
        x, w, (4, 4), formats, (0, 0), 0, (0, 0), None, (hbfp.HBFP4, 0, 0), geometry=geometry
    )

    def gradient(kept, formats=formats):
        shapes = x.shape, dy.shape
        return ops.kept_convolution_weight_gradient(
            kept, dy, shapes, formats, (0, 0), 0, (0, 0), geometry=geometry
        )  # fmt: skip

    expected = ops.convolution_weight_gradient(x, dy, formats, (0, 0), 0, (0, 0), geometry=geometry)
    assert torch.equal(gradient(kept), expected)
    with pytest.raises(hbfp.HBFPError, match="bytes of a kept image"):
        gradient(kept[:-1].clone())
    with pytest.raises(hbfp.HBFPError, match="never kept"):
        gradient(kept, (hbfp.HBFP.parse("hbfp12b64"), hbfp.HBFP4))
    gradient(torch.full_like(kept, 255))
