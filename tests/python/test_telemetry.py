"""Watching a model: the figures against the definition, every product seen, and training not changed by a bit.

The bugs these hunt: figures of codes that no product read (another axis, stream or rounding); a product or an operand
that is silently absent; a watch that changes what it looks at, counts a pass twice, or stays behind when it is closed.
"""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import hbfp  # noqa: E402
from hbfp import emulation, ops, reference  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import stream as stream_of  # noqa: E402

ROUNDINGS = tuple(hbfp.Rounding)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rough(*shape, seed=0):
    """Magnitudes of many orders, zeros of both signs, subnormals."""
    x = values(*shape, seed=seed) * torch.exp(4 * values(*shape, seed=seed + 1))
    flat = x.view(-1)
    flat[::17], flat[1::29], flat[2::31] = 0.0, -0.0, 3e-42
    return x


def by_definition(x, format, axis, rounding, seed=0, stream=0):
    """The oracle's codes, compared with x element by element: non-zero, signal, noise, saturated, zeroed, exponents."""
    x = np.asarray(x, dtype=np.float32)
    encoded = reference.encode(x, format, axis, rounding, seed, stream)
    exponents = np.bincount(np.asarray(encoded.exponents).ravel(), minlength=256)
    signal, noise, counts = [], [], {"nonzero": 0, "saturated": 0, "zeroed": 0}
    for index in np.ndindex(x.shape):
        c = int(encoded.exponents[encoded.block_of(index)])
        if c == 255:
            continue
        value, q = float(x[index]), int(encoded.mantissas[index])
        step = 2.0 ** (c - 127)
        signal.append(value * value)
        noise.append((value - q * step) ** 2)
        counts["nonzero"] += value != 0.0
        counts["saturated"] += abs(value) > (format.max_code + 0.5) * step
        counts["zeroed"] += value != 0.0 and q == 0
    return counts, math.fsum(signal), math.fsum(noise), exponents.tolist()


def agrees(found, expected):
    counts, signal, noise, exponents = expected
    assert {name: getattr(found, name) for name in counts} == counts
    listed = found.exponents
    if isinstance(listed, dict):
        listed = [listed.get(c, 0) for c in range(256)]
    assert list(listed) == exponents
    # Sums of float64 in another order.
    assert found.signal == pytest.approx(signal, rel=1e-12)
    assert found.noise == pytest.approx(noise, rel=1e-12)


# --- the figures -----------------------------------------------------------------------------------------------------

FORMATS = ("hbfp4b16", "hbfp4b64-ceil", "hbfp6b7-noclip", "hbfp4t4", "hbfp6tensor", "hbfp12b32", "hbfp4b16-e4")


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_measured_as_the_oracle_encodes(text, rounding):
    x, format = rough(2, 9, 21), hbfp.HBFP.parse(text)
    for axis in (0, 1, 2):
        found = ops.measure(x, format, axis, rounding.code, 5, 77)
        agrees(found, by_definition(x, format, axis, rounding, 5, 77))


def test_measured_whatever_the_strides_and_threads():
    """A task's part of a sum, a line of a transposed or expanded tensor."""
    x, format = rough(70, 130), hbfp.HBFP4
    expected = ops.measure(x.t().contiguous(), format, 0, 3, 1, 2)
    assert ops.measure(x.t(), format, 0, 3, 1, 2) == expected
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            many = rough(400, 300)
            assert ops.measure(many, format, 1, 3) == ops.measure(many.clone(), format, 1, 3)
            if threads == 1:
                alone = ops.measure(many, format, 1, 3)
            assert ops.measure(many, format, 1, 3) == alone
    finally:
        torch.set_num_threads(before)
    row = rough(1, 64)
    assert ops.measure(row.expand(5, 64), format) == ops.measure(row.repeat(5, 1), format)


def test_nan_blocks_are_counted_and_nothing_else_of_them():
    x = values(4, 64)
    x[1, 3], x[2, 5] = math.nan, math.inf
    found = ops.measure(x, hbfp.HBFP4)
    clean = ops.measure(x[[0, 3]], hbfp.HBFP4)
    assert found.exponents[255] == 2
    assert (found.nonzero, found.saturated, found.zeroed) == (clean.nonzero, clean.saturated, clean.zeroed)
    assert found.signal == pytest.approx(clean.signal, rel=1e-12)
    assert ops.measure(torch.empty(0, 64), hbfp.HBFP4).nonzero == 0


@pytest.mark.parametrize("text", ["hbfp4b64", "hbfp4b64-ceil", "hbfp4b64-noclip"])
def test_what_saturates_depends_on_the_rule(text):
    """amax = 7.9 steps, 8 steps (a power of two), and so that nearest rounding fits."""
    format = hbfp.HBFP.parse(text)
    for amax, rounds_up in ((7.9, True), (8.0, False), (7.4, False)):
        x = torch.ones(1, 64)
        x[0, 0] = amax
        saturates = (text != "hbfp4b64-noclip" and rounds_up) or (text == "hbfp4b64-ceil" and amax == 8.0)
        assert ops.measure(x, format).saturated == int(saturates), amax


def test_zeroed_share_of_a_block_with_one_huge_value():
    model = converted(nn.Linear(64, 3))
    x = torch.full((1, 64), 0.01)
    x[0, 7] = 100.0
    x[0, 9] = 0.0
    with hbfp.watch(model) as watch:
        model(x)
    row = find(watch.rows, product="forward", operand="activations")
    assert (row.nonzero, row.zeroed, row.zeroed_share) == (63, 62, 62 / 63)
    assert row.exponent_range == (7, 7)  # 100 < 2^7


def test_rows_of_what_is_exact_and_of_nothing():
    model = converted(nn.Linear(64, 64))
    with hbfp.watch(model) as watch:
        model(torch.zeros(2, 64))
    row = find(watch.rows, product="forward", operand="activations")
    assert (row.sqnr, row.saturated_share, row.zeroed_share, row.exponent_range) == (math.inf, 0.0, 0.0, None)
    assert row.exponents == {0: 2}
    hash(row)


# --- what is watched -------------------------------------------------------------------------------------------------


def converted(model, recipe="hbfp4", **keywords):
    hbfp.convert_(model, recipe, **keywords)
    return model


def find(rows, **wanted):
    (row,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row


def names(rows, layer=None):
    return {(row.product, row.operand) for row in rows if layer is None or row.layer == layer}


THREE = {
    ("forward", "activations"),
    ("forward", "weights"),
    ("input gradient", "output gradients"),
    ("input gradient", "weights"),
    ("weight gradient", "output gradients"),
    ("weight gradient", "activations"),
}
ATTENTION = {
    ("scores", "queries"),
    ("scores", "keys"),
    ("context", "probabilities"),
    ("context", "values"),
    ("gradient of V", "probabilities"),
    ("gradient of V", "output gradients"),
    ("gradient of P", "output gradients"),
    ("gradient of P", "values"),
    ("gradient of Q", "score gradients"),
    ("gradient of Q", "keys"),
    ("gradient of K", "score gradients"),
    ("gradient of K", "queries"),
}


def test_linear_operands_are_those_of_the_specification():
    """Axis, role and stream of each of the six, with every one rounded stochastically; two leading dimensions."""
    model = nn.Sequential(nn.Linear(40, 24))
    hbfp.convert_(model, "emulator")
    x = values(3, 5, 40).requires_grad_()
    hbfp.set_step(model, 12)
    with hbfp.watch(model) as watch:
        y = model(x)
        dy = values(*y.shape, seed=3)
        y.backward(dy)
    rows_x, rows_dy, w = x.detach().reshape(15, 40), dy.reshape(15, 24), model[0].weight.detach()
    state = model[0].hbfp_state
    for product, operand, tensor, axis, role in (
        ("forward", "activations", rows_x, 1, 0),
        ("forward", "weights", w, 1, 1),
        ("input gradient", "output gradients", rows_dy, 1, 2),
        ("input gradient", "weights", w, 0, 3),
        ("weight gradient", "output gradients", rows_dy, 0, 4),
        ("weight gradient", "activations", rows_x, 0, 5),
    ):
        row = find(watch.rows, product=product, operand=operand)
        assert (row.step, row.layer, row.encodings, row.rounding) == (12, "0", 1, hbfp.Rounding.STOCHASTIC)
        stream = stream_of(12, state.site, 0, role)
        agrees(row, by_definition(tensor, row.format, axis, row.rounding, state.root.seed, stream))
    assert len(watch.rows) == 6


def laid(operand):
    """What the operand's codes stand for, as its blocks lie."""
    x = operand.x.detach()
    random = emulation.random_bits(x.shape, operand.seed, operand.stream)
    if operand.order is not None:
        x, random = operand.order(x), operand.order(random)
    return emulation.quantize(x, operand.format, operand.axis, operand.rounding, bits=random).double()


CONVOLUTIONS = {
    "flattened": ((2, 3, 6, 5), (4, 3, 3, 2), {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}, True),
    "flattened groups": ((2, 6, 5, 5), (4, 3, 2, 3), {"groups": 2, "padding": 1}, True),
    "channels": ((3, 18, 4, 5), (5, 18, 3, 3), {"padding": 1, "stride": 2}, False),
    "groups": ((2, 32, 4, 4), (6, 16, 3, 1), {"groups": 2, "dilation": 1}, False),
}


@pytest.mark.parametrize("backend", ["integer", "emulate"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_operands_of_a_convolution_multiply_to_its_results(name, backend):
    """Blocks, groups, patches and random bits in their places: sums so short that float64 and the product agree."""
    shape, kernel, arguments, flatten = CONVOLUTIONS[name]
    recipe = replace(hbfp.recipe("emulator"), backend=backend)
    groups = arguments.get("groups", 1)

    def binade(*shape, seed, axis):
        """Magnitudes of one binade in each group, so that no sum needs more than 24 bits; the groups' differ."""
        x = values(*shape, seed=seed).sign() * (0.5 + 0.49 * values(*shape, seed=seed + 1).abs().clamp(max=1))
        x.unflatten(axis, (groups, -1)).select(axis, groups - 1).mul_(8.0)
        return x

    x = binade(*shape, seed=0, axis=1).requires_grad_()
    w = binade(*kernel, seed=2, axis=0).requires_grad_()
    heard = []

    def hear(product):
        heard.append((product.name, product.operands()))

    ops.recorders.append(hear)
    ops.wanted.append(lambda source, stream: True)
    try:
        y = functional.conv2d(x, w, **arguments, recipe=recipe, seed=3, stream=9 << 32)
        dy = binade(*y.shape, seed=4, axis=1)
        y.backward(dy)
    finally:
        ops.recorders.clear(), ops.wanted.clear()
    told = {product: [laid(operand) for operand in operands] for product, operands in heard}
    assert list(told) == ["forward", "input gradient", "weight gradient"]

    left, right = told["forward"]
    if flatten:
        per_group = right.unflatten(0, (groups, -1))  # [g, Co/g, K]
        expected = torch.einsum("ng...k,gok->ngo...", left, per_group).reshape(y.shape)
    else:
        expected = F.conv2d(left.reshape(shape), right.reshape(kernel), **arguments)
    assert torch.equal(y.detach().double(), expected)

    def convolve(x, w):
        return F.conv2d(x, w, **arguments)

    left, right = told["input gradient"]
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(convolve(zero, right.reshape(kernel)), zero, left.reshape(dy.shape))
    assert torch.equal(x.grad.double(), dx)
    left, right = told["weight gradient"]
    zero = torch.zeros(kernel, dtype=torch.float64, requires_grad=True)
    (dw,) = torch.autograd.grad(convolve(right.reshape(shape), zero), zero, left.reshape(dy.shape))
    assert torch.equal(w.grad.double(), dw)


def test_a_flattened_convolutions_weight_is_cut_as_the_patch_and_draws_its_own_bits():
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2)))
    hbfp.convert_(model, "emulator")
    hbfp.set_step(model, 4)
    with hbfp.watch(model) as watch:
        model(values(2, 3, 5, 5))
    row = find(watch.rows, operand="weights")
    state, w = model[0].hbfp_state, model[0].weight.detach()
    drawn = emulation.random_bits(w.shape, state.root.seed, stream_of(4, state.site, 0, 1))
    order = [(o, c, i, j) for o in range(4) for i in range(3) for j in range(2) for c in range(3)]
    expected = [0, 0.0]

    def exact(x):
        return reference.float32_value(int(np.float32(x).view(np.uint32)))

    for out in range(4):
        places = [place for place in order if place[0] == out]  # 18 elements: one block
        s = reference.scale_exponent(max(abs(exact(w[place].item())) for place in places), row.format)
        for place in places:
            value = exact(w[place].item())
            q = reference.round_to_code(value, s, 4, "stochastic", int(drawn[place]))
            expected[0] += q == 0
            expected[1] += float(value - q * Fraction(2) ** s) ** 2
    assert row.zeroed == expected[0]
    assert row.noise == pytest.approx(expected[1], rel=1e-12)


class Sequence(nn.Module):
    """Tokens through one layer and a head."""

    def __init__(self, layer, width):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(8, 16), layer, nn.Linear(width, 4)

    def forward(self, x):
        h = self.first(x)
        kind = type(self.layer)
        if issubclass(kind, nn.MultiheadAttention):
            h, _ = self.layer(h, h, h, need_weights=self.training)
        elif issubclass(kind, hbfp.nn.DotProductAttention):
            h = self.layer(h, h, h, is_causal=True)
        elif issubclass(kind, nn.Bilinear):
            h = self.layer(h, h)
        elif issubclass(kind, nn.RNNBase):
            h, _ = self.layer(h)
        elif issubclass(kind, nn.LSTMCell):
            state = (torch.zeros(x.shape[1], 16), torch.zeros(x.shape[1], 16))
            for t, row in enumerate(h):
                state = self.layer(row, state, index=t)
            h = state[0]
        elif issubclass(kind, nn.RNNCellBase):
            state = torch.zeros(x.shape[1], 16)
            for t, row in enumerate(h):
                state = self.layer(row, state, index=t)
            h = state
        elif issubclass(kind, nn.Linear):
            h = self.layer(h)
        else:
            image = h.transpose(1, 2) if h.dim() == 3 else h
            for _ in range(self.layer.weight.dim() - 3):
                image = image.unsqueeze(-1)
            h = self.layer(image).flatten(2).mean(-1)
        return self.head(h)


TWICE = {(name, product, operand) for name in ("{}.ih", "{}.hh") for product, operand in THREE}
LAYERS = {
    "Linear": (lambda: nn.Linear(16, 16), {("layer", *pair) for pair in THREE}),
    **{
        f"{kind}{rank}d": (
            lambda kind=kind, rank=rank: getattr(nn, f"{kind}{rank}d")(16, 16, 1),
            {("layer", *pair) for pair in THREE},
        )
        for kind in ("Conv", "ConvTranspose")
        for rank in (1, 2, 3)
    },
    "DotProductAttention": (hbfp.nn.DotProductAttention, {("layer", *pair) for pair in ATTENTION}),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(16, 2),
        {("layer.attention", *pair) for pair in ATTENTION}
        | {(f"layer.{part}", *pair) for part in ("in_proj", "out_proj") for pair in THREE},
    ),
    "Bilinear": (
        lambda: nn.Bilinear(16, 16, 16),
        {("layer", *pair) for pair in THREE}
        | {("layer.second", product, operand.replace("weights", "first product")) for product, operand in THREE},
    ),
    **{
        kind: (
            lambda kind=kind: getattr(nn, kind)(16, 16),
            {(f"layer.{part}_l0", *pair) for part in ("ih", "hh") for pair in THREE},
        )
        for kind in ("RNN", "GRU", "LSTM")
    },
    "LSTM, projected": (
        lambda: nn.LSTM(16, 24, 2, bidirectional=True, proj_size=8),
        {
            (f"layer.{part}_l{n}{way}", *pair)
            for part in ("ih", "hh", "hr")
            for n in (0, 1)
            for way in ("", "_reverse")
            for pair in THREE
        },
    ),
    **{
        kind: (
            lambda kind=kind: getattr(nn, kind)(16, 16),
            {(f"layer.{part}", *pair) for part in ("ih", "hh") for pair in THREE},
        )
        for kind in ("RNNCell", "GRUCell", "LSTMCell")
    },
}


def steps(model, count=2, shape=(5, 3, 8), optimizer=True):
    """Losses and weights of some steps of training."""
    descent = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for i in range(count):
        descent.zero_grad()
        loss = model(values(*shape, seed=i)).square().mean()
        loss.backward()
        descent.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


def same_bits(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, expected, strict=True))


def model_of(name, recipe="hbfp4", seed=7):
    torch.manual_seed(seed)
    make, _ = LAYERS[name]
    width = 16
    return converted(Sequence(make(), width), recipe)


def test_every_layer_class_is_here():
    from hbfp.nn.conversion import LAYERS as known

    assert {cls.__name__ for cls in known} <= {name.split(",")[0] for name in LAYERS}


@pytest.mark.parametrize("recipe", ["hbfp4", "emulator", "emulated"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_product_is_seen_and_no_bit_changes(name, recipe):
    if recipe == "emulated":
        recipe = replace(hbfp.recipe("hbfp4"), backend="emulate")
    expected = steps(model_of(name, recipe))
    model = model_of(name, recipe)
    with hbfp.watch(model) as watch:
        same_bits(steps(model), expected)
    assert watch.steps == (1, 2)
    assert watch.unobserved == {}
    for rows in watch.history.values():
        seen = {(row.layer, row.product, row.operand) for row in rows if row.layer.startswith("layer")}
        assert seen == LAYERS[name][1]
        assert names(rows, "head") == THREE
        # The first layer's input needs no gradient, and so there is no such product.
        assert names(rows, "first") == {pair for pair in THREE if pair[0] != "input gradient"}
        assert all(row.nonzero > 0 and row.signal > 0 for row in rows if "reverse" not in row.layer)


def test_attention_without_weights_is_unfused_only_where_it_is_sampled():
    expected = steps(model_of("DotProductAttention"), 4)
    model = model_of("DotProductAttention")
    kept = []
    original = ops.attention
    try:
        ops.attention = lambda *arguments, **keywords: kept.append(1) or original(*arguments, **keywords)
        with hbfp.watch(model, every=2) as watch:
            same_bits(steps(model, 4), expected)
    finally:
        ops.attention = original
    assert len(kept) == 2
    assert watch.steps == (2, 4)


def test_recurrent_steps_are_added_up_and_a_weight_that_stays_is_counted_once():
    model = model_of("LSTM")
    with hbfp.watch(model) as watch:
        steps(model, 1)
    forward = {row.operand: row for row in watch.rows if (row.layer, row.product) == ("layer.hh_l0", "forward")}
    assert (forward["activations"].encodings, forward["weights"].encodings) == (5, 1)
    assert forward["weights"].nonzero == 64 * 16
    # With a stochastic weight every step encodes it anew.
    model = model_of("LSTM", "emulator")
    with hbfp.watch(model) as watch:
        steps(model, 1)
    assert find(watch.rows, layer="layer.hh_l0", product="forward", operand="weights").encodings == 5


def test_parts_of_a_multihead_layer_with_weights_of_its_own():
    layer = nn.MultiheadAttention(16, 2, kdim=12, vdim=10)
    model = converted(nn.ModuleList([layer]))
    with hbfp.watch(model) as watch:
        model[0](values(5, 2, 16), values(4, 2, 12), values(4, 2, 10))
    parts = {"q_proj", "k_proj", "v_proj", "attention", "out_proj"}
    assert {row.layer for row in watch.rows} == {f"0.{part}" for part in parts}


def test_the_layer_with_an_outlier_channel_is_the_worst():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    hbfp.convert_(model, hbfp.HBFP4)
    with torch.no_grad():
        model[3].weight[:, 17] *= 12.0
    with hbfp.watch(model) as watch:
        y = model(values(32, 64))
        (worst,) = watch.worst(1)
        assert (worst.layer, worst.product, worst.operand) == ("3", "forward", "weights")
        assert worst.sqnr < watch.worst(2)[1].sqnr - 5
        assert watch.table().splitlines()[2].split()[:4] == ["3", "forward", "weights", "hbfp4b64"]
        y.sum().backward()
        # Along the other axis the channel is blocks of its own.
        assert find(watch.rows, layer="3", product="input gradient", operand="weights").sqnr > 15
        with torch.no_grad():
            model[3].weight[:, 17] *= 30.0
        model(values(32, 64))
    # Now it is most of the signal, and what it drowns is gone.
    (worst,) = watch.worst(1, by="zeroed")
    assert (worst.layer, worst.product, worst.operand) == ("3", "forward", "weights")
    assert worst.zeroed_share > 0.9
    assert watch.table(by="zeroed").splitlines()[2].split()[:3] == ["3", "forward", "weights"]
    with pytest.raises(hbfp.HBFPError, match="'sqnr', 'zeroed', 'saturated'"):
        watch.worst(by="noise")


def test_nan_blocks_stand_first():
    model = converted(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with hbfp.watch(model) as watch:
        model(values(3, 64))
    (worst,) = watch.worst(1)
    assert (worst.layer, worst.operand, worst.nan_blocks) == ("1", "weights", 1)
    assert watch.table().splitlines()[2].endswith(" 1")


# --- when it is watched ----------------------------------------------------------------------------------------------


def test_period_and_bounded_history():
    model = model_of("Linear")
    with hbfp.watch(model, every=3, keep=2) as watch:
        steps(model, 2)
        assert watch.rows == ()
        assert "no step was sampled yet" in watch.table()
        assert "the last was 2, and every=3" in watch.unobserved["layer"]
        steps(model, 8)
    assert watch.steps == (6, 9)
    assert set(watch.history) == {6, 9}
    assert watch.at(6)[0].step == 6
    assert watch.rows == watch.at(9)
    with pytest.raises(hbfp.HBFPError, match="step 3 was not sampled"):
        watch.at(3)


def test_the_step_is_the_schedules():
    model = model_of("Linear", "booster")
    booster = hbfp.Booster(model, total_steps=4, last_fraction=0.5)
    with hbfp.watch(model) as watch:
        for step in range(4):
            booster.step(step)
            for micro in range(2):
                model(values(5, 3, 8, seed=micro)).sum().backward()
    assert watch.steps == (0, 1, 2, 3)
    for step, format in ((1, hbfp.HBFP4), (2, hbfp.HBFP6)):
        row = find(watch.at(step), layer="layer", product="forward", operand="activations")
        assert (row.format, row.encodings) == (format, 2)  # both micro-batches


def test_two_watches_see_the_same_and_leave_one_by_one():
    model = model_of("GRU")
    with hbfp.watch(model) as outer:
        with hbfp.watch(model, every=2) as inner:
            steps(model, 2)
        steps(model, 2)
        assert outer.steps == (1, 2, 3, 4)
        assert inner.steps == (2,)
        assert outer.at(2) == inner.at(2)
    inner.close()
    assert (ops.recorders, ops.wanted) == ([], [])


def test_a_part_of_a_model_may_be_watched():
    model = model_of("MultiheadAttention")
    with hbfp.watch(model.head) as watch:
        steps(model, 1)
    assert {row.layer for row in watch.rows} == {"Linear"}


def test_nothing_is_left_behind():
    model = model_of("Linear")
    watch = hbfp.watch(model)
    with pytest.raises(hbfp.ShapeError), watch:
        model(values(2, 9))
    assert (ops.recorders, ops.wanted) == ([], [])
    rows = watch.rows
    steps(model, 1)
    watch.close()
    assert watch.rows == rows
    forgotten = hbfp.watch(model)
    assert len(ops.recorders) == 1
    del forgotten
    gc.collect()
    assert (ops.recorders, ops.wanted) == ([], [])


def test_an_exception_in_forward_passes_through():
    model = model_of("DotProductAttention")
    with hbfp.watch(model) as watch:
        with pytest.raises(hbfp.ShapeError):
            model(values(5, 3, 9))
        steps(model, 1)
    assert watch.steps[-1] == 2
    assert watch.unobserved == {}


def test_nobody_watching_costs_no_call():
    """Every call of Python in the package during a step, before any watch and after it is closed."""
    package = str(Path(hbfp.__file__).parent)

    def calls(model):
        found = []

        def profile(frame, event, _):
            if event == "call" and frame.f_code.co_filename.startswith(package):
                found.append((frame.f_code.co_filename, frame.f_code.co_name))

        out = model(values(5, 3, 8))
        sys.setprofile(profile)
        try:
            model(values(5, 3, 8)).sum()
            out.sum().backward()
        finally:
            sys.setprofile(None)
        return found

    for name in ("Linear", "Conv2d", "DotProductAttention", "LSTM"):
        model = model_of(name)
        before = calls(model)
        told = {"observed", "tell", "_tell", "_wants", "operands", "product_operands", "forward_operands"}
        assert not told & {function for _, function in before}
        with hbfp.watch(model):
            assert told & {function for _, function in calls(model)}
        assert calls(model) == before


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "DotProductAttention", "LSTM"])
def test_checkpointed_forward_passes_are_counted_once(name, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of(name)

        def forward(self, x):
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    plain, model = model_of(name), Checkpointed()
    hbfp.set_step(plain, 1), hbfp.set_step(model, 1)
    with hbfp.watch(plain) as expected, hbfp.watch(model.inner) as watch:
        plain(values(5, 3, 8).requires_grad_()).square().mean().backward()
        model(values(5, 3, 8)).square().mean().backward()
    assert sorted(map(repr, watch.rows)) == sorted(map(repr, expected.rows))
    same_bits([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_evaluation_is_read_on_request():
    model = model_of("Linear")
    with hbfp.watch(model) as watch, hbfp.watch(model, evaluation=True) as both:
        steps(model, 1)
        rows = watch.rows
        model.eval()
        with torch.no_grad():
            model(values(5, 3, 8))
    assert watch.rows == rows
    assert find(both.rows, layer="layer", product="forward", operand="weights").encodings == 2
    with hbfp.watch(model) as watch:
        model(values(5, 3, 8))
    assert watch.rows == ()
    assert all("evaluation" in reason for reason in watch.unobserved.values())


def test_audit_in_between_is_no_step_of_training():
    model, alone = model_of("DotProductAttention"), model_of("DotProductAttention")
    expected = hbfp.audit(alone, values(5, 3, 8))
    with hbfp.watch(alone) as watch:
        steps(alone, 1)
    with hbfp.watch(model) as watched:
        assert hbfp.audit(model, values(5, 3, 8)).rows == expected.rows
        steps(model, 1)
    assert watched.rows == watch.rows
    assert len(ops.recorders) == 0


def test_a_watch_opened_after_the_forward_pass_says_what_it_missed():
    model = model_of("DotProductAttention")
    loss = model(values(5, 3, 8)).square().mean()
    with hbfp.watch(model) as watch:
        loss.backward()
    missing = {what for what, reason in watch.unobserved.items() if "before the watch" in reason}
    assert {
        "head, weight gradient, activations",
        "layer, gradient of Q, score gradients",
        "layer, gradient of V, probabilities",
    } <= missing
    assert "not observed: head, weight gradient, activations: the forward pass" in watch.table()
    assert ("weight gradient", "output gradients") in names(watch.rows, "head")


def test_functional_calls_are_named():
    model = converted(nn.Linear(8, 8))
    with hbfp.watch(model) as watch:
        functional.linear(model(values(2, 8)), values(3, 8), recipe="hbfp4")
    assert "no layer" in watch.unobserved["functional calls"]


def test_under_compile_it_says_that_it_sees_nothing():
    plain, model = model_of("Linear"), model_of("Linear")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = plain(values(5, 3, 8))
    with hbfp.watch(model) as watch, hbfp.watch(compiled) as other:
        same_bits([compiled(values(5, 3, 8)).detach()], [expected.detach()])
        assert "torch.compile" in watch.unobserved["layer"]
        assert set(other.unobserved) == {"first", "layer", "head"}
        assert all(reason.startswith("inside torch.compile") for reason in other.unobserved.values())
        with torch.compiler.set_stance("force_eager"):
            compiled(values(5, 3, 8))
        assert watch.unobserved == {}
        assert names(watch.rows, "layer") == {pair for pair in THREE if pair[0] == "forward"}
    torch._dynamo.reset()


def test_other_dtypes_are_read_as_the_products_read_them():
    model = converted(nn.Linear(64, 8)).double()
    x = rough(4, 64).double() * (1 + 1e-9)
    with hbfp.watch(model) as watch:
        model(x)
    row = find(watch.rows, operand="activations")
    agrees(row, by_definition(x.float(), row.format, 1, row.rounding))


def test_bad_arguments_are_named():
    model = model_of("Linear")
    for keywords in ({"every": 0}, {"every": 1.5}, {"keep": 0}, {"every": True}):
        with pytest.raises(hbfp.HBFPError, match="number of steps"):
            hbfp.watch(model, **keywords)
    with pytest.raises(hbfp.ConversionError, match="convert"):
        hbfp.watch(nn.Linear(3, 3))
    assert ops.recorders == []
    with hbfp.watch(model) as watch:
        for what in ({"by": "noise"}, {"kind": "gradient"}, {"product": "weights"}):
            (value,) = what.values()
            with pytest.raises(hbfp.HBFPError, match=f"unknown .* {value!r}: expected one of"):
                watch.worst(**what)
            with pytest.raises(hbfp.HBFPError, match=r"unknown (order|kind|product)"):
                watch.table(**what)


# --- how it is told --------------------------------------------------------------------------------------------------


def watched(count=3):
    model = model_of("DotProductAttention", "booster")
    with hbfp.watch(model) as watch:
        steps(model, count)
    return watch


def test_table_and_worst():
    watch = watched()
    lines = watch.table().splitlines()
    head = ["layer", "product", "operand", "format", "SQNR", "dB", "saturated", "%", "zeroed", "%", "exponents", "E"]
    assert lines[0].split() == [*head, "NaN"]
    assert str(watch) == watch.table()
    figures = [row.sqnr for row in watch.worst(1000)]
    assert figures == sorted(figures)
    assert len(figures) == len(watch.rows) == len(lines) - 3
    worst = watch.worst(1)[0]
    assert lines[2].startswith(worst.layer)
    assert f"{worst.sqnr:.1f}" in lines[2]
    assert f"hbfp4b64{' stochastic' * (worst.rounding is hbfp.Rounding.STOCHASTIC)}" in lines[2].replace("6b", "4b")
    short = watch.table(4, step=2).splitlines()
    assert len(short) == 7
    assert short[-1] == f"step 2: {len(figures)} operands, the worst first; {len(figures) - 4} more"


def test_only_a_kind_or_a_product():
    with hbfp.watch(model := model_of("MultiheadAttention")) as watch:
        steps(model, 1)
    kinds = {}
    for kind in ("activations", "weights", "gradients"):
        rows = watch.worst(1000, kind=kind)
        assert rows == tuple(row for row in watch.worst(1000) if row.kind == kind)
        kinds[kind] = {row.operand for row in rows}
    assert kinds == {
        "activations": {"activations", "queries", "keys", "values", "probabilities"},
        "weights": {"weights"},
        "gradients": {"output gradients", "score gradients"},
    }
    assert sum(len(watch.worst(1000, kind=kind)) for kind in kinds) == len(watch.rows)
    assert {row.product for row in watch.worst(1000, kind="weights")} == {"forward", "input gradient"}
    rows = watch.worst(1000, kind="gradients", product="gradient of K", by="zeroed")
    assert {(row.operand, row.product) for row in rows} == {("score gradients", "gradient of K")}
    lines = watch.table(kind="gradients", product="gradient of K", by="zeroed").splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [row.layer for row in rows]
    assert lines[-1] == f"step 1: {len(rows)} of {len(watch.rows)} operands, the worst first"
    of_weights = len(watch.worst(1000, kind="weights"))
    end = f"step 1: {of_weights} of {len(watch.rows)} operands, the worst first; {of_weights - 1} more"
    assert watch.table(1, kind="weights").splitlines()[-1] == end
    assert watch.worst(kind="weights", product="weight gradient") == ()
    assert watch.table(kind="weights", product="weight gradient").endswith("operands, the worst first")


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_scalars_for_tensorboard():
    model, writer = model_of("Linear"), Writer()
    with hbfp.watch(model) as watch:
        steps(model, 2)
        watch.to_tensorboard(writer)
        assert {step for _, _, step in writer.scalars} == {1, 2}
        row = find(watch.rows, layer="layer", product="weight gradient", operand="output gradients")
        where = "layer/weight_gradient/output_gradients"
        for kind, value in (("sqnr", row.sqnr), ("saturated", row.saturated_share), ("zeroed", row.zeroed_share)):
            assert (f"hbfp/{kind}/{where}", value, 2) in writer.scalars
        assert (f"hbfp/nan_blocks/{where}", 0, 2) in writer.scalars
        written = len(writer.scalars)
        watch.to_tensorboard(writer)
        assert len(writer.scalars) == written
        steps(model, 1)
        watch.to_tensorboard(writer)
        assert {step for _, _, step in writer.scalars[written:]} == {3}
        watch.to_tensorboard(writer, step=1)
        assert writer.scalars[-1][2] == 1
        assert all(math.isfinite(value) for _, value, _ in writer.scalars)


def test_scalars_in_a_file_of_events(tmp_path):
    """A tag or a value that the real writer takes otherwise than the one above."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model = model_of("Linear")
    with hbfp.watch(model) as watch, SummaryWriter(str(tmp_path)) as writer:
        steps(model, 2)
        watch.to_tensorboard(writer)
    log = accumulator.EventAccumulator(str(tmp_path))
    log.Reload()
    found = {(tag, event.step): event.value for tag in log.Tags()["scalars"] for event in log.Scalars(tag)}
    expected = {}
    for row in (*watch.at(1), *watch.at(2)):
        figures = {
            "sqnr": row.sqnr,
            "saturated": row.saturated_share,
            "zeroed": row.zeroed_share,
            "nan_blocks": row.nan_blocks,
        }
        where = f"{row.layer}/{row.product}/{row.operand}".replace(" ", "_")
        for kind, value in figures.items():
            expected[f"hbfp/{kind}/{where}", row.step] = float(np.float32(value))  # as events hold it
    assert found == expected
    assert len(found) == 4 * len(watch.at(1)) * 2


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    watch = watched()
    watch.plot(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(hbfp.HBFPError, match="nothing to draw"), hbfp.watch(model_of("Linear")) as empty:
        empty.plot(tmp_path / "none.png")
