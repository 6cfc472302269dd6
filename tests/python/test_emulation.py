"""The backend "emulate": the core's codes by integer operations of torch, products in float32 where the tensors are.

The bugs these hunt: an exponent off by one at a power of two or a subnormal, a tie rounded the other way, random bits
of another element, a block that reaches over an edge, an operand encoded along another axis than the integer
product's, a silent trip to the CPU or to the compiled core, float32 products in reduced precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import hbfp  # noqa: E402
from hbfp import emulation, ops, reference, testing  # noqa: E402
from hbfp.backends import arithmetic  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import Backend, stream  # noqa: E402

ROUNDINGS = tuple(hbfp.Rounding)
SEED, STREAM = 2**63 + 5, 2**64 - 3


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    return np.from_dlpack(x.detach().contiguous()).view(np.uint32)


def tensor(array):
    return torch.from_numpy(np.array(array, np.float32))


def assert_same_codes(x, format, axis, rounding, seed=SEED, stream=STREAM):
    """Codes, exponents, their types and shapes, and the decoded values, against the core's."""
    expected = hbfp.encode(x, format, axis=axis, rounding=rounding, seed=seed, stream=stream)
    found = emulation.encode(tensor(x), format, axis, rounding.code, seed, stream)
    for ours, theirs in ((found.mantissas, expected.mantissas), (found.exponents, expected.exponents)):
        ours = np.from_dlpack(ours)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(ours, theirs)
    assert np.array_equal(bits(emulation.decode(found)), expected.decode().view(np.uint32))
    quantized = emulation.quantize(tensor(x), format, axis, rounding.code, seed, stream)
    assert np.array_equal(bits(quantized), bits(ops.quantize(tensor(x), format, axis, rounding.code, seed, stream)))


# --- codes -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_format_has_the_codes_of_the_core(data):
    format, rounding = data.draw(testing.formats()), data.draw(testing.roundings())
    shapes = st.lists(st.integers(0, 20), max_size=4).map(tuple)
    x = data.draw(testing.arrays(shapes, nonfinite=data.draw(st.booleans())))
    dimensions = max(x.ndim, 1)
    axis = data.draw(st.integers(-dimensions, dimensions - 1))
    assert_same_codes(x, format, axis, rounding, data.draw(testing.seeds()), data.draw(testing.seeds()))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", ["max_exponent", "ceil", "no_clip"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_extremes_and_ties_of_every_width(bits, rule, rounding):
    """Every exponent of float32 with fractions around ties and powers of two, in blocks of few neighbours."""
    exponents = np.arange(256, dtype=np.uint32)[:-1, None] << 23
    places = [0, 1, 22, 23 - bits, 22 - bits if bits < 22 else 0, 24 - bits]
    fractions = {0, 0x7FFFFF, 0x400000, 0x7FFFFE}
    for place in places:
        fractions |= {1 << min(place, 22), (1 << min(place, 22)) - 1, (0x7FFFFF << place) & 0x7FFFFF}
    patterns = exponents | np.array(sorted(fractions), np.uint32)
    patterns[:, ::2] |= 0x80000000
    assert_same_codes(patterns.view(np.float32), hbfp.HBFP(bits, 3, exponent_rule=rule), -1, rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", ["hbfp4b16-e3", "hbfp8b5-e5-bias20", "hbfp16b64-noclip-e2", "hbfp4b64-e8-bias250"])
def test_narrow_exponents_clamp_at_both_ends(format, rounding):
    scales = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    x = np.from_dlpack(values(len(scales), 20)) * scales[:, None]
    x[100] = 0.0  # c = 0 whatever the field
    assert_same_codes(np.clip(x, -3e38, 3e38), hbfp.HBFP.parse(format), -1, rounding)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("format", ["hbfp4b64", "hbfp6b7", "hbfp4t4", "hbfp8t7", "hbfp4tensor", "hbfp12b1"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_axes_tiles_and_tails(axis, format, rounding):
    x = np.from_dlpack(values(3, 70, 19)) * np.float32(1e-3)
    assert_same_codes(x, hbfp.HBFP.parse(format), axis, hbfp.Rounding(rounding))


@pytest.mark.parametrize("format", ["hbfp4b4", "hbfp4t4", "hbfp4tensor"])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)])
def test_few_dimensions_and_no_elements(format, shape):
    x = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)
    for rounding in ROUNDINGS:
        assert_same_codes(x, hbfp.HBFP.parse(format), -1, rounding)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["hbfp4b4", "hbfp16t3", "hbfp6tensor"])
def test_a_block_with_a_number_that_is_none_is_a_nan_block(special, format):
    x = np.ones((7, 10), np.float32)
    x[3, 5] = special
    for rounding in ROUNDINGS:
        assert_same_codes(x, hbfp.HBFP.parse(format), -1, rounding)


@pytest.mark.parametrize("width", [2, 4, 8, 9, 16])
def test_every_code_under_every_exponent_decodes_as_the_cores(width):
    """Values that no encoder makes: infinite ones that are no power of two."""
    format, exponents = hbfp.HBFP(width, 1), np.arange(255, dtype=np.uint8)[:, None]
    codes = sorted({sign * c for c in (0, 1, 2, 3, 5, 2 ** (width - 2), format.max_code) for sign in (1, -1)})
    codes = [c for c in codes if abs(c) <= format.max_code]
    mantissas = np.tile(np.array(codes, np.int8 if width <= 8 else np.int16), (255, 1))
    exponents = np.repeat(exponents, len(codes), axis=1)
    expected = hbfp.BlockArray.from_parts(mantissas, exponents, format, mantissas.shape, 1).decode()
    given_ = emulation.Encoded(torch.from_numpy(mantissas), torch.from_numpy(exponents), format, 1)
    assert np.array_equal(bits(emulation.decode(given_)), expected.view(np.uint32))


def test_random_bits_equal_the_oracles():
    """Words in another order, a half taken for the other, a row that goes on where the last one ended."""
    found = emulation.random_bits((2, 3, 11), SEED, STREAM)
    for row in range(6):
        expected = [reference.arithmetic.random_bits(row, column, SEED, STREAM) for column in range(11)]
        assert found.flatten(0, 1)[row].tolist() == expected


def test_subnormals_are_read_and_written_where_the_processor_flushes_them():
    x = np.ldexp(np.float32(1) + np.arange(60, dtype=np.float32) / 64, -np.arange(100, 160)).astype(np.float32)
    x = np.concatenate([x, np.arange(1, 5, dtype=np.uint32).view(np.float32)]).reshape(16, 4)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        for format in ("hbfp4b1", "hbfp16b4-noclip"):
            for rounding in ROUNDINGS:
                assert_same_codes(x, hbfp.HBFP.parse(format), -1, rounding)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_cast(dtype):
    x = values(5, 30).to(dtype)
    assert torch.equal(emulation.quantize(x, hbfp.HBFP6), ops.quantize(x, hbfp.HBFP6))


def test_views_are_the_numbers_that_they_show():
    x = values(6, 20)
    negated = torch.complex(values(3, 8), values(3, 8, seed=1)).conj().imag
    for view in (x.t(), x[:, ::3], x[:1].expand(4, 20), negated):
        assert torch.equal(emulation.quantize(view, hbfp.HBFP4), ops.quantize(view, hbfp.HBFP4))


def test_bad_input_is_refused_by_name():
    x = values(4, 8)
    with pytest.raises(hbfp.DTypeError, match="int32"):
        emulation.encode(x.int(), hbfp.HBFP4)
    with pytest.raises(hbfp.DTypeError, match="to_dense"):
        emulation.encode(x.to_sparse(), hbfp.HBFP4)
    with pytest.raises(hbfp.ShapeError, match="axis"):
        emulation.encode(x, hbfp.HBFP4, 2)
    with pytest.raises(hbfp.HBFPError, match="seed"):
        emulation.encode(x, hbfp.HBFP4, rounding=3, seed=-1)
    with pytest.raises(hbfp.HBFPError, match="stream"):
        emulation.encode(x, hbfp.HBFP4, rounding=3, stream=2**64)
    with pytest.raises(hbfp.FormatError, match="cut alike"):
        emulation.product(x, -1, x, -1, (hbfp.HBFP(4, 3), hbfp.HBFP(4, 4)))
    with pytest.raises(hbfp.ShapeError, match="one reduction"):
        emulation.product(x, -1, values(4, 7), -1, (hbfp.HBFP4, hbfp.HBFP4))
    with pytest.raises(hbfp.DTypeError, match="one device"):
        emulation.product(x, -1, x.to("meta"), -1, (hbfp.HBFP4, hbfp.HBFP4))


# --- products --------------------------------------------------------------------------------------------------------

PRODUCTS = {
    "rows": ((5, 70), -1, (6, 70), -1),
    "across": ((70, 5), -2, (70, 6), -2),
    "a matrix for a batch": ((2, 3, 70), -1, (70, 4), -2),
    "batches": ((2, 3, 70, 5), -2, (2, 3, 4, 70), -1),
    "no reduction": ((3, 0), -1, (4, 0), -1),
    "no rows": ((0, 9), -1, (4, 9), -1),
}


def error_bound(a, a_axis, b, b_axis):
    """How far float32 sums in two orders may be apart: 2^-23 of the sum of magnitudes for each of K additions."""
    a, b = a.abs().double(), b.abs().double()
    total = (a if a_axis == -1 else a.mT) @ (b if b_axis == -2 else b.mT)
    return total * ((a.shape[a_axis] + 2) * 2.0**-23) + 1e-30


@pytest.mark.parametrize("format", ["hbfp4b64", "hbfp6b16", "hbfp4t8", "hbfp4tensor", "hbfp16b64"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_differ_from_the_integer_ones_by_their_sums_alone(case, format):
    a_shape, a_axis, b_shape, b_axis = PRODUCTS[case]
    a, b, bias = values(*a_shape), values(*b_shape, seed=1), values(4 if 4 in b_shape else 6, seed=2)
    fmt = hbfp.HBFP.parse(format)
    rest = ((fmt, fmt), (3, 0), SEED, (STREAM, 7))
    found, expected = (f(a, a_axis, b, b_axis, *rest, bias) for f in (emulation.product, ops.product))
    assert found.shape == expected.shape
    coded = [emulation.quantize(t.flatten(0, -2) if t.dim() > b.dim() else t, fmt, axis, r, SEED, s).reshape(t.shape)
             for t, axis, r, s in ((a, a_axis, 3, STREAM), (b, b_axis, 0, 7))]  # fmt: skip
    bound = error_bound(coded[0], a_axis, coded[1], b_axis) + (bias.abs() + 1) * 2.0**-22
    assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_equal_where_float32_is_exact(case):
    """Small integers: every sum in every order is exact, so an operand of another block or axis would show."""
    a_shape, a_axis, b_shape, b_axis = PRODUCTS[case]
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-7, 8, shape, generator=generator).float() for shape in (a_shape, b_shape))
    a[..., :1] *= 2.0**6  # blocks of several exponents, so that small numbers beside it round
    for name in ("hbfp4b16", "hbfp4t5", "hbfp4tensor"):
        formats = (hbfp.HBFP.parse(name),) * 2
        found, expected = (f(a, a_axis, b, b_axis, formats) for f in (emulation.product, ops.product))
        assert torch.equal(found, expected)


def test_a_nan_block_poisons_what_reads_it_and_nothing_else():
    a, b = values(3, 20), values(4, 20, seed=1)
    a[1, 17] = float("inf")
    formats = (hbfp.HBFP(4, 8), hbfp.HBFP(4, 8))
    found = emulation.product(a, -1, b, -1, formats)
    assert torch.equal(found.isnan(), ops.product(a, -1, b, -1, formats).isnan())


class Watch(TorchDispatchMode):
    """Notes the precision in force at every float product, and fails on any operator that leaves the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.convolution):
            backends = torch.backends
            settings = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
            self.seen.append(({s.fp32_precision for s in settings}, args[0].dtype, emulation.emulating()))
        return func(*args, **(kwargs or {}))


def test_reduced_precision_is_off_inside_and_as_before_outside():
    x, w = values(3, 8).requires_grad_(), values(4, 8, seed=1).requires_grad_()
    recipe = replace(hbfp.recipe("hbfp8"), backend="emulate")
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
            functional.linear(x, w, recipe=recipe).sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.backends.mkldnn.matmul.fp32_precision in (matmul, "ieee")
    assert len(watch.seen) == 3
    for precisions, dtype, emulating in watch.seen:
        assert precisions <= {"ieee", "none"}
        assert dtype == torch.float32
        assert emulating
    assert not emulation.emulating()


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_and_its_gradient_are_near_the_librarys(causal):
    scores, mask = values(2, 5, 7) * 8, values(2, 5, 7, seed=1)
    mask[0, 3] = float("-inf")
    p = emulation.softmax(scores, 0.3, causal, mask)
    # Both are float32 evaluations of one formula, a few units in the last place apart.
    torch.testing.assert_close(p, ops.softmax(scores, 0.3, causal, mask), rtol=2e-6, atol=1e-7)
    assert not p[0, 3].any()
    dp = values(2, 5, 7, seed=2)
    found, expected = (f(p, dp, 0.3) for f in (emulation.softmax_backward, ops.softmax_backward))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


# --- layers ----------------------------------------------------------------------------------------------------------


class Recurrent(torch.nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(torch.nn, kind)(12, 16, **options)

    def forward(self, x):
        return self.layer(x)[0]


class Attentive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x)[0] + self.layer(x, x, x, need_weights=False)[0]


class Bilinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Bilinear(12, 12, 5)

    def forward(self, x):
        return self.layer(x, x)


class Cells(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = (getattr(torch.nn, f"{kind}Cell")(12, 12) for kind in ("LSTM", "GRU", "RNN"))

    def forward(self, x):
        rows = x.flatten(0, 1)
        return self.rnn(self.gru(self.lstm(rows)[0]))


MODELS = {
    "cells": Cells,
    "perceptron": lambda: torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)),
    "bilinear": Bilinear,
    "attention": Attentive,
    "transformer": lambda: torch.nn.TransformerEncoderLayer(12, 2, 20, 0.0, batch_first=True),
    "lstm": lambda: Recurrent("LSTM", num_layers=2, bidirectional=True),
    "lstm with projections": lambda: Recurrent("LSTM", proj_size=6),
    "gru": lambda: Recurrent("GRU"),
    "rnn": lambda: Recurrent("RNN", batch_first=True),
}


def converted(name, recipe, backend):
    torch.manual_seed(0)
    model = MODELS[name]()
    hbfp.convert_(model, replace(hbfp.recipe(recipe), backend=backend))
    hbfp.set_step(model, 3)
    return model


def training_step(model, device="cpu"):
    x = values(4, 5, 12, seed=5).to(device).requires_grad_()
    y = model(x)
    y.backward(values(*y.shape, seed=6).to(device))
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["hbfp16b64", "emulator"])
def test_a_training_step_is_near_the_integer_one(name, recipe):
    found, expected = (training_step(converted(name, recipe, backend)) for backend in ("emulate", "integer"))
    # float32 sums in other orders. A code of a later operand may therefore differ by one: 2^-15 of a block's largest
    # value for 16 bits, a seventh of it for 4, with stochastic rounding rarely and with 16 random bits.
    relative = 1e-3 if recipe == "hbfp16b64" else 0.25
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm()) <= relative * float(theirs.norm()) + 1e-6


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"the compiled core was asked for {name}")


@pytest.mark.parametrize("name", MODELS)
def test_nothing_asks_the_compiled_core(name, monkeypatch):
    """A tensor of another device would be refused there, or, worse, read."""
    from hbfp import stationary

    model = converted(name, "emulator", "emulate")
    for door in (ops.products, ops.softmax_attention, ops.convolutions):
        monkeypatch.setattr(door, "_core", Untouchable())
    monkeypatch.setattr(stationary, "_core", Untouchable())
    training_step(model)


# torch computes shapes in Python on this device, slowly: the second recipe only where it takes another way.
@pytest.mark.parametrize(("name", "recipe"), [*((name, "emulator") for name in MODELS), ("gru", "hbfp4")])
def test_a_step_stays_on_the_device_of_its_tensors(name, recipe):
    """On the device "meta" whatever moved to the CPU, or came from there, would raise or show."""
    model = converted(name, recipe, "emulate").to("meta")
    for found in training_step(model, "meta"):
        assert found.device.type == "meta"


def test_functions_stay_on_the_device_of_their_tensors():
    recipe = replace(hbfp.recipe("emulator"), backend="emulate")
    with torch.device("meta"):
        q, mask = torch.ones(2, 4, 5, 8), torch.ones(5, 5)
        out = functional.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True, recipe=recipe)
        masked = functional.scaled_dot_product_attention(q, q, q, mask, recipe=recipe)
        product = functional.einsum("bhle,bhse->bhls", q, q, recipe=recipe)
        encoded = emulation.encode(q, hbfp.HBFP(4, tile=4), rounding=3)
    for found, shape in ((out, (2, 4, 5, 8)), (masked, (2, 4, 5, 8)), (product, (2, 4, 5, 5))):
        assert (found.device.type, tuple(found.shape)) == ("meta", shape)
    assert tuple(encoded.exponents.shape) == (2, 4, 2, 2)
    assert emulation.decode(encoded).is_meta


@pytest.mark.parametrize("dropped", [1, 6554, 65535, 65536])
@pytest.mark.parametrize("shape", [(9,), (2, 3, 5, 21)])
def test_dropout_is_the_cores(shape, dropped):
    x = values(*shape)
    for word in (0, 2**63 - 1, 2**40 + 12345):
        found, expected = (by.dropout(x, dropped, torch.tensor(word)) for by in (emulation, ops))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("column", [0, 8, 15, 16, 20])
def test_an_element_whose_random_bits_are_the_bound_is_kept(column):
    """In a register and behind the last whole one; by chance it is one of 65,536 elements."""
    word = torch.tensor(77)
    dropped = emulation.random_bits((2, 21), word, 0)[1, column].item()
    for by in (emulation, ops):
        assert by.dropout(torch.ones(2, 21), dropped, word)[1, column] > 0
        assert by.dropout(torch.ones(2, 21), dropped + 1, word)[1, column] == 0


def test_dropout_and_the_gradient_of_a_mask():
    recipe = replace(hbfp.recipe("hbfp16b16"), backend="emulate")
    gradients = []
    for backend in ("emulate", "integer"):
        q, mask = values(2, 6, 8).requires_grad_(), values(6, 6, seed=1).requires_grad_()
        torch.manual_seed(2)
        out = functional.scaled_dot_product_attention(
            q, q, q, mask, dropout_p=0.25, recipe=replace(recipe, backend=backend)
        )
        out.square().sum().backward()
        gradients.append((q.grad, mask.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)  # 16-bit codes and float32 sums


@pytest.mark.parametrize("name", ["lstm with projections", "gru"])
def test_a_weight_that_stays_is_encoded_once_and_no_bit_differs_for_it(name, monkeypatch):
    """A step that draws the random bits of another, or a weight left along the wrong axis."""
    from hbfp.stationary import StationaryWeight

    once = training_step(converted(name, "hbfp4", "emulate"))
    monkeypatch.setattr(StationaryWeight, "_decode", lambda _: None)
    each_time = training_step(converted(name, "hbfp4", "emulate"))
    assert all(torch.equal(a, b) for a, b in zip(once, each_time, strict=True))


def test_wide_weights_have_the_same_bits_on_every_device():
    """`ops.quantize` would refuse a parameter that is not on the CPU."""
    weight = values(7, 100)
    assert torch.equal(emulation.quantize(weight, hbfp.HBFP16), ops.quantize(weight, hbfp.HBFP16))
    model = torch.nn.Linear(8, 3, device="meta")
    hbfp.convert_(model, "hbfp4")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hbfp.wide_weights(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_audit_counts_an_emulated_product_once():
    """The float operator that computes it is the product itself, and none that was left in FP32."""
    counts = [hbfp.audit(converted("transformer", "hbfp4", b), values(2, 5, 12)) for b in ("emulate", "integer")]
    rows = [{(row.layer, row.product, row.bits): row.macs for row in audit.rows} for audit in counts]
    assert rows[0] == rows[1]


def test_compiled_layers_have_the_codes_of_eager_ones():
    torch._dynamo.reset()
    recipe = replace(hbfp.recipe("emulator"), backend="emulate")
    x, w = values(6, 20), values(4, 20, seed=1)

    def f(x, w):
        return functional.linear(x, w, recipe=recipe, seed=3, stream=stream(1, 2))

    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x, w), f(x, w))


def test_every_backend_has_its_arithmetic():
    assert arithmetic(Backend.INTEGER) is ops
    assert arithmetic(Backend.EMULATE) is emulation
    x = values(3, 9)
    found = arithmetic(Backend.REFERENCE).product(x, -1, x, -1, (hbfp.HBFP4, hbfp.HBFP4))
    assert torch.equal(found, ops.product(x, -1, x, -1, (hbfp.HBFP4, hbfp.HBFP4)))


# --- convolutions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taps:
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    flatten: bool

    @property
    def keywords(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


CONVOLUTIONS = {
    "channels": ((2, 20, 5, 6), 4, Taps((3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1), 1, False)),
    "strides and dilations": ((3, 6, 8, 9), 4, Taps((3, 2), (2, 3), ((2, 1), (0, 0)), (1, 2), 2, False)),
    "depthwise": ((2, 4, 6), 8, Taps((3,), (1,), ((1, 1),), (2,), 4, True)),
    "stem": ((2, 3, 7, 7), 5, Taps((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1, True)),
    "volumes": ((2, 4, 3, 4, 4), 4, Taps((2, 2, 3), (1, 2, 1), ((0, 0), (1, 0), (1, 1)), (1, 1, 1), 2, True)),
    "a stride beyond the kernel": ((5, 17, 9), 3, Taps((2,), (4,), ((0, 0),), (1,), 1, False)),
}


def integers(*shape, seed):
    """Of few bits: every sum of their products is exact in float32; and few enough that codes of 4 bits round them."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("roundings", [(0, 0), (3, 3), (1, 2)])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_the_oracle_where_float32_is_exact(case, roundings):
    shape, outputs, taps = CONVOLUTIONS[case]
    formats = (hbfp.HBFP(4, 5), hbfp.HBFP(3, 5))
    w, bias = integers(outputs, shape[1] // taps.groups, *taps.kernel, seed=1), integers(outputs, seed=2)
    x = integers(*shape, seed=3)
    names = tuple(ROUNDINGS[r].value for r in roundings)
    policy, numbers = (formats, roundings, SEED, (STREAM, 9)), (formats, names, SEED, (STREAM, 9))
    nx, nw, nb = (np.from_dlpack(t) for t in (x, w, bias))

    y = emulation.convolution(x, w, *policy, bias, geometry=taps)
    expected = reference.convolution(nx, nw, nb, *numbers, **taps.keywords, flatten=taps.flatten)
    assert np.array_equal(bits(y), expected.view(np.uint32))

    dy = integers(*y.shape, seed=4)
    dx = emulation.convolution_input_gradient(dy, w, shape[2:], *policy, geometry=taps)
    expected = reference.convolution_input_gradient(np.from_dlpack(dy), nw, shape[2:], *numbers, **taps.keywords)
    # A sum that is 0 may be -0.0 where the device adds in another way.
    assert np.array_equal(bits(dx + 0.0), expected.view(np.uint32))

    dw = emulation.convolution_weight_gradient(dy, x, *policy, geometry=taps)
    expected = reference.convolution_weight_gradient(np.from_dlpack(dy), nx, taps.kernel, *numbers, **taps.keywords)
    assert np.array_equal(bits(dw + 0.0), expected.view(np.uint32))


def test_a_transposed_convolution_larger_than_its_input_asks_for():
    """With an output padding the pixels behind the last tap are of zeros; then dY has more pixels than X needs."""
    taps = Taps((2,), (3,), ((1, 0),), (1,), 1, False)
    formats, x, w = (hbfp.HBFP(4, 5),) * 2, integers(2, 6, 4, seed=0), integers(6, 4, 2, seed=1)
    bias = integers(4, seed=2)
    y = emulation.convolution_input_gradient(x, w, (12,), formats, (0, 0), 0, (0, 0), bias, geometry=taps)
    rest = (formats, ("nearest_even",) * 2, 0, (0, 0))
    expected = reference.convolution_input_gradient(
        *(np.from_dlpack(t) for t in (x, w)), (12,), *rest, **taps.keywords, bias=np.from_dlpack(bias)
    )
    assert np.array_equal(bits(y + 0.0), expected.view(np.uint32))
    dy = integers(*y.shape, seed=3)
    dw = emulation.convolution_weight_gradient(x, dy, formats, (0, 0), 0, (0, 0), geometry=taps)
    expected = reference.convolution_weight_gradient(
        np.from_dlpack(x), np.from_dlpack(dy), (2,), *rest, **taps.keywords
    )
    assert np.array_equal(bits(dw + 0.0), expected.view(np.uint32))


def test_convolutions_stay_on_the_device_of_their_tensors_and_count_their_work():
    shape, outputs, taps = CONVOLUTIONS["stem"]
    seen = []
    ops.recorders.append(lambda entry: seen.append((entry.name, entry.macs)))
    rest = ((hbfp.HBFP4, hbfp.HBFP4), (3, 3), 0, (0, 0))
    try:
        with torch.device("meta"):
            x, w = torch.ones(shape), torch.ones(outputs, 3, 3, 3)
            y = emulation.convolution(x, w, *rest, geometry=taps)
            dx = emulation.convolution_input_gradient(y, w, shape[2:], *rest, geometry=taps)
            dw = emulation.convolution_weight_gradient(y, x, *rest, geometry=taps)
    finally:
        ops.recorders.clear()
    assert all(t.is_meta for t in (y, dx, dw))
    assert (y.shape[2:], dx.shape, dw.shape) == ((4, 4), x.shape, w.shape)
    macs = 2 * 5 * 16 * 27
    assert seen == [("forward", macs), ("input gradient", macs), ("weight gradient", macs)]


def test_convolutions_refuse_tiles_and_shapes_that_do_not_fit():
    shape, outputs, taps = CONVOLUTIONS["stem"]
    x, w = torch.ones(shape), torch.ones(outputs, 3, 3, 3)
    with pytest.raises(hbfp.FormatError, match="lines"):
        emulation.convolution(x, w, (hbfp.HBFP(4, tile=4),) * 2, (0, 0), 0, (0, 0), geometry=taps)
    for bad in (x[:, :2], x[..., 0]):
        with pytest.raises(hbfp.ShapeError, match="expected X"):
            emulation.convolution(bad, w, (hbfp.HBFP4, hbfp.HBFP4), (0, 0), 0, (0, 0), geometry=taps)


# --- a second device, where there is one -----------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: codes are checked on the CPU alone")
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", ["hbfp4b64", "hbfp6b7-ceil", "hbfp16t5-noclip", "hbfp8tensor-e5"])
def test_codes_on_a_gpu_are_the_cpus(format, rounding):
    x = values(3, 70, 50) * torch.tensor([1e-40, 1.0, 1e30]).view(3, 1, 1)
    fmt = hbfp.HBFP.parse(format)
    here, there = (emulation.encode(t, fmt, 1, rounding.code, SEED, STREAM) for t in (x, x.cuda()))
    for name in ("mantissas", "exponents"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())
    assert torch.equal(emulation.decode(here), emulation.decode(there).cpu())
