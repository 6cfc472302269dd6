"""Recurrent layers: bit-equal to a slow definition, step by step, forward and backward.

The bugs these hunt: an input product cut by steps, a gradient of W_hh summed step by step, a step that draws another
step's random bits, directions or layers that share theirs, a state carried into the wrong sequence where lengths
differ, a state in place of the one before it.

The definition calls sigmoid and tanh on tensors that lie in memory as the layer's do: torch's give other last bits
where a vector of the CPU begins elsewhere.
"""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence  # noqa: E402

import hbfp  # noqa: E402
from hbfp import ops, reference  # noqa: E402
from hbfp.policy import stream  # noqa: E402

SEED, STEP = 11, 5


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.shape == b.shape and torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


class Definition:
    """One layer in one direction, by the clause on recurrent layers, one product at a time: the exact oracle's where
    `exact`, else the core's, of which other files say that they are the same.

    `x` is a list of steps, each [sequences of that step, in]; so are all lists here.
    """

    def __init__(self, mode, recipe, sites, weights, reverse, exact):
        self.mode, self.recipe, self.sites, self.reverse, self.exact = mode, recipe, sites, reverse, exact
        self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr = weights

    def product(self, policy, a, a_axis, b, b_axis, part, index, roles, bias=None):
        streams = [stream(STEP, self.sites[part], index, role) for role in roles]
        if not self.exact:
            return ops.product(a, a_axis, b, b_axis, policy.formats, policy.roundings, SEED, streams, bias)
        sides = [
            reference.encode(np.from_dlpack(x.contiguous()), side.format, axis, side.rounding, SEED, number)
            for x, axis, side, number in zip(
                (a, b), (a_axis, b_axis), (policy.left, policy.right), streams, strict=True
            )
        ]
        left = sides[0] if a_axis == -1 else sides[0].mT
        right = sides[1] if b_axis == -2 else sides[1].mT
        return torch.from_numpy(reference.product(left, right, None, None if bias is None else bias.numpy()))

    def forward(self, x, h0, c0):
        self.sizes = [len(rows) for rows in x]
        self.order = list(range(len(x)))[:: -1 if self.reverse else 1]
        self.x, policy = torch.cat(x), self.recipe.forward
        of_input = self.product(policy, self.x, -1, self.w_ih, -1, 0, 0, (0, 1), self.b_ih).split(self.sizes)
        h, c = h0.clone(), None if c0 is None else c0.clone()
        y, self.seen = [None] * len(x), [None] * len(x)
        for t in self.order:
            n = self.sizes[t]
            before, c_before = h[:n].clone(), None if c is None else c[:n].clone()
            of_state = self.product(policy, before, -1, self.w_hh, -1, 1, t, (0, 1), self.b_hh)
            if self.mode == "LSTM":
                gates = of_input[t] + of_state
                w = gates.shape[1] // 4
                i, f = gates[:, : 2 * w].sigmoid().chunk(2, 1)
                g, o = gates[:, 2 * w : 3 * w].tanh(), gates[:, 3 * w :].sigmoid()
                c[:n] = f * c_before + i * g
                tanh = c[:n].tanh()
                out = hidden = o * tanh
                if self.w_hr is not None:
                    out = self.product(policy, hidden, -1, self.w_hr, -1, 2, t, (0, 1))
                self.seen[t] = before, c_before, i, f, g, o, tanh, hidden
            elif self.mode == "GRU":
                gates, w = of_input[t] + of_state, of_state.shape[1] // 3
                r, z = gates[:, : 2 * w].sigmoid().chunk(2, 1)
                hn = of_state[:, 2 * w :]
                n_ = (of_input[t][:, 2 * w :] + r * hn).tanh()
                out = (before - n_) * z + n_
                self.seen[t] = before, r, z, n_, hn
            else:
                out = of_input[t] + of_state
                out = out.tanh() if self.mode == "RNN_TANH" else out.relu()
                self.seen[t] = before, out
            h[:n] = out
            y[t] = out
        return y, h, c

    def backward(self, dy, dh, dc):
        """Gradients of x (a list), h_0, c_0 and the weights that exist."""
        dh, dc = dh.clone(), None if dc is None else dc.clone()
        policy = self.recipe.input_gradient
        dgates, dproducts, projected = ([None] * len(dy) for _ in range(3))
        for t in self.order[::-1]:
            n = self.sizes[t]
            d = projected[t] = dh[:n] + dy[t]
            carried = None
            if self.mode == "LSTM":
                _, c_before, i, f, g, o, tanh, _ = self.seen[t]
                if self.w_hr is not None:
                    d = self.product(policy, d, -1, self.w_hr, -2, 2, t, (2, 3))
                through = dc[:n] + d * ((1 - tanh * tanh) * o)
                parts = ((1 - i) * i * g, (1 - f) * f * c_before, (1 - g * g) * i)
                dgates[t] = dproducts[t] = torch.cat([part * through for part in parts] + [(1 - o) * o * tanh * d], 1)
                dc[:n] = through * f
            elif self.mode == "GRU":
                before, r, z, n_, hn = self.seen[t]
                dz = (1 - z) * z * (before - n_) * d
                dn = (1 - n_ * n_) * (1 - z) * d
                dr = (1 - r) * r * hn * dn
                dgates[t], dproducts[t] = torch.cat((dr, dz, dn), 1), torch.cat((dr, dz, dn * r), 1)
                carried = d * z
            else:
                out = self.seen[t][1]
                slope = 1 - out * out if self.mode == "RNN_TANH" else (out > 0).float()
                dgates[t] = dproducts[t] = slope * d
            product = self.product(policy, dproducts[t], -1, self.w_hh, -2, 1, t, (2, 3))
            dh[:n] = product if carried is None else carried + product
        rows, of_states = torch.cat(dgates), torch.cat(dproducts)
        before = torch.cat([seen[0] for seen in self.seen])
        gradient = self.recipe.weight_gradient
        dx = self.product(policy, rows, -1, self.w_ih, -2, 0, 0, (2, 3))
        weights = [
            self.product(gradient, rows, -2, self.x, -2, 0, 0, (4, 5)),
            self.product(gradient, of_states, -2, before, -2, 1, 0, (4, 5)),
        ]
        if self.b_ih is not None:
            weights += [ops.column_sums(rows), ops.column_sums(of_states)]
        if self.w_hr is not None:
            hidden = torch.cat([seen[7] for seen in self.seen])
            weights.append(self.product(gradient, torch.cat(projected), -2, hidden, -2, 2, 0, (4, 5)))
        return list(dx.split(self.sizes)), dh, dc, weights


def by_definition(model, steps, initial, dys, dfinal, exact=False):
    """The stack: outputs, final states, gradients of input, of initial states and of parameters by name."""
    state = model.hbfp_state
    directions, parts = 2 if model.bidirectional else 1, 3 if model.proj_size else 2
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    layers, finals = [], []
    for layer in range(model.num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            suffix = f"_l{layer}" + "_reverse" * direction
            weights = [getattr(model, name + suffix, None) for name in names]
            weights = [None if w is None else w.detach() for w in weights]
            sites = [place * parts + part for part in range(3)]
            definition = Definition(model.mode, state.recipe, sites, weights, bool(direction), exact)
            y, *final = definition.forward(steps, initial[0][place], initial[1][place] if len(initial) > 1 else None)
            outputs.append(y)
            finals.append(final[: len(initial)])
            layers.append((place, suffix, definition))
        steps = [torch.cat(y, 1) for y in zip(*outputs, strict=True)]
    gradients, dinitial = {}, [torch.empty_like(x) for x in initial]
    d = dys
    for layer in reversed(range(model.num_layers)):
        total = None
        for place, suffix, definition in layers[layer * directions : (layer + 1) * directions]:
            part = [rows.chunk(directions, 1)[place % directions] for rows in d]
            dc = dfinal[1][place] if len(dfinal) > 1 else None
            dx, dh, dc, weights = definition.backward(part, dfinal[0][place], dc)
            for into, value in zip(dinitial, (dh, dc), strict=False):
                into[place] = value
            present = [name + suffix for name in names if hasattr(model, name + suffix)]
            gradients.update(zip(present, weights, strict=True))
            total = dx if total is None else [a + b for a, b in zip(total, dx, strict=True)]
        d = total
    return steps, [torch.stack(x) for x in zip(*finals, strict=True)], d, dinitial, gradients


MODULES = {
    "lstm": lambda **k: nn.LSTM(5, 7, **k),
    "gru": lambda **k: nn.GRU(5, 7, **k),
    "tanh": lambda **k: nn.RNN(5, 7, **k),
    "relu": lambda **k: nn.RNN(5, 7, nonlinearity="relu", **k),
    "projected": lambda **k: nn.LSTM(5, 7, proj_size=3, **k),
}
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False, "bidirectional": True},
]


def converted(make, recipe="emulator", **keywords):
    torch.manual_seed(1)
    model = make(**keywords)
    hbfp.convert_(model, recipe, seed=SEED)
    hbfp.set_step(model, STEP)
    return model


def states_of(model, sequences):
    layers = model.num_layers * (2 if model.bidirectional else 1)
    widths = [model.proj_size or model.hidden_size, model.hidden_size][: 2 if model.mode == "LSTM" else 1]
    return [values(layers, sequences, width, seed=3 + i) for i, width in enumerate(widths)]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 4])
def test_padded_sequences_equal_the_definition(kind, shape, steps):
    model = converted(MODULES[kind], **shape)
    x = values(3, steps, 5) if model.batch_first else values(steps, 3, 5)
    x.requires_grad_()
    initial = [t.requires_grad_() for t in states_of(model, 3)]
    out, final = model(x, tuple(initial) if model.mode == "LSTM" else initial[0])
    final = final if model.mode == "LSTM" else (final,)
    dy, dfinal = values(*out.shape, seed=8), [values(*t.shape, seed=9) for t in final]
    torch.autograd.backward([out, *final], [dy, *dfinal])

    time_major = (lambda t: t.transpose(0, 1)) if model.batch_first else (lambda t: t)
    split = lambda t: list(time_major(t.detach()).unbind(0))  # noqa: E731
    expected = by_definition(model, split(x), [t.detach() for t in initial], split(dy), dfinal, exact=not shape)
    y, states, dx, dinitial, gradients = expected
    assert same(time_major(out), torch.stack(y))
    assert all(same(a, b) for a, b in zip(final, states, strict=True))
    assert same(time_major(x.grad), torch.stack(dx))
    assert all(same(a.grad, b) for a, b in zip(initial, dinitial, strict=True))
    assert {name: same(p.grad, gradients[name]) for name, p in model.named_parameters()} == dict.fromkeys(
        gradients, True
    )


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("recipe", ["hbfp4", "hbfp6b16", "hbfp12b64", "hbfp4t4", "hbfp8tensor"])
def test_other_formats_equal_the_definition(kind, recipe):
    """Weights rounded to nearest are encoded once for all steps; tiles, 12 bits and tails take other roads."""
    torch.manual_seed(1)
    model = {"lstm": nn.LSTM, "projected": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    keywords = {"proj_size": 17} if kind == "projected" else {"nonlinearity": "relu"} if kind == "relu" else {}
    model = model(9, 18, **keywords)
    hbfp.convert_(model, recipe, seed=SEED)
    hbfp.set_step(model, STEP)
    x = values(3, 2, 9).requires_grad_()
    out, final = model(x)
    final = final if model.mode == "LSTM" else (final,)
    dy, dfinal = values(*out.shape, seed=8), [torch.zeros_like(t) for t in final]
    out.backward(dy)
    initial = [torch.zeros_like(t) for t in final]
    y, _, dx, _, gradients = by_definition(model, list(x.detach().unbind(0)), initial, list(dy.unbind(0)), dfinal)
    assert same(out, torch.stack(y))
    assert same(x.grad, torch.stack(dx))
    assert {name: same(p.grad, gradients[name]) for name, p in model.named_parameters()} == dict.fromkeys(
        gradients, True
    )


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_equal_the_definition(kind, in_order):
    model = converted(MODULES[kind], num_layers=2, bidirectional=True)
    lengths = torch.tensor([4, 3, 3, 1] if in_order else [3, 1, 4, 3])
    padded = values(4, 4, 5).requires_grad_()  # [steps, sequences, in]
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=in_order)
    initial = [t.requires_grad_() for t in states_of(model, 4)]
    out, final = model(packed, tuple(initial) if model.mode == "LSTM" else initial[0])
    final = final if model.mode == "LSTM" else (final,)
    dy, dfinal = values(*out.data.shape, seed=8), [values(*t.shape, seed=9) for t in final]
    torch.autograd.backward([out.data, *final], [dy, *dfinal])

    by_length = torch.arange(4) if packed.sorted_indices is None else packed.sorted_indices
    back = torch.arange(4) if packed.unsorted_indices is None else packed.unsorted_indices
    sizes = packed.batch_sizes.tolist()
    y, states, dx, dinitial, gradients = by_definition(
        model,
        list(packed.data.detach().split(sizes)),
        [t.detach()[:, by_length] for t in initial],
        list(dy.split(sizes)),
        [t[:, by_length] for t in dfinal],
    )
    assert same(out.data, torch.cat(y))
    assert torch.equal(out.batch_sizes, packed.batch_sizes)
    assert all(same(a, b[:, back]) for a, b in zip(final, states, strict=True))
    assert all(same(a.grad, b[:, back]) for a, b in zip(initial, dinitial, strict=True))
    assert {name: same(p.grad, gradients[name]) for name, p in model.named_parameters()} == dict.fromkeys(
        gradients, True
    )
    gradient, _ = pad_packed_sequence(PackedSequence(torch.cat(dx), packed.batch_sizes, by_length, back))
    assert same(padded.grad, gradient)


@pytest.mark.parametrize("kind", MODULES)
def test_one_sequence_without_a_batch_is_a_batch_of_one(kind):
    model = converted(MODULES[kind], bidirectional=True)
    x = values(4, 5)
    out, final = model(x)
    batch_out, batch_final = model(x.unsqueeze(1))
    finals = zip(final, batch_final, strict=True) if model.mode == "LSTM" else [(final, batch_final)]
    assert same(out, batch_out.squeeze(1))
    assert all(same(a, b.squeeze(1)) for a, b in finals)
    given = states_of(model, 1)
    pair = [tuple(given), tuple(t.squeeze(1) for t in given)]
    pair = pair if model.mode == "LSTM" else [p[0] for p in pair]
    assert same(model(x, pair[1])[0], model(x.unsqueeze(1), pair[0])[0].squeeze(1))


@pytest.mark.parametrize("kind", MODULES)
def test_inference_gives_the_bits_of_training(kind):
    """Without gradients the steps share memory, which must not change what they compute."""
    model = converted(MODULES[kind], num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(values(4, 3, 5), torch.tensor([4, 2, 1]))
    for x in (values(4, 3, 5), packed):
        with torch.no_grad():
            quick, quick_final = model(x)
        full, final = model(x)
        pair = (quick, full) if x is not packed else (quick.data, full.data)
        assert same(*pair)
        assert all(same(a, b) for a, b in zip(quick_final, final, strict=True))


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_cells_are_steps(kind):
    """A cell given the step as its index computes what the layer computes at that step, but for the input's product."""
    make = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(kind, nn.RNNCell)
    keywords = {"nonlinearity": "relu"} if kind == "relu" else {}
    torch.manual_seed(1)
    cell = make(5, 7, **keywords)
    model = MODULES[kind]()
    for name, parameter in cell.named_parameters():
        getattr(model, f"{name}_l0").data.copy_(parameter.data)
    recipe = hbfp.recipe("hbfp6")  # nearest forward: the input's product is the same in one piece and in several
    for m in (cell, model):
        hbfp.convert_(m, recipe, seed=SEED)
        hbfp.set_step(m, STEP)
    x = values(4, 3, 5)
    h = c = torch.zeros(3, 7)
    ys = []
    for t in range(4):
        if kind == "lstm":
            h, c = cell(x[t], (h, c), index=t)
        else:
            h = cell(x[t], h, index=t)
        ys.append(h)
    assert same(torch.stack(ys), model(x)[0])
    alone, batch = cell(x[0, 0]), cell(x[0, :1])
    assert all(
        same(a, b.squeeze(0)) for a, b in zip(*((t,) if kind != "lstm" else t for t in (alone, batch)), strict=True)
    )


def test_a_cells_products_are_linear_layers():
    from hbfp.nn import functional

    cell = converted(lambda: nn.LSTMCell(5, 7))
    x, h = values(3, 5), values(3, 7, seed=1)
    found = cell(x, (h, torch.zeros(3, 7)), index=2)[0]
    keywords = {"recipe": "emulator", "seed": SEED}
    gates = functional.linear(x, cell.weight_ih, cell.bias_ih, **keywords, stream=stream(STEP, 0, 2))
    gates = gates + functional.linear(h, cell.weight_hh, cell.bias_hh, **keywords, stream=stream(STEP, 1, 2))
    i, g, o = gates[:, :14].sigmoid()[:, :7], gates[:, 14:21].tanh(), gates[:, 21:].sigmoid()
    assert same(found, o * (i * g).tanh())
    assert not same(found, cell(x, (h, torch.zeros(3, 7)))[0])


def test_every_product_draws_random_bits_of_its_own():
    """Two operands on one stream share their bits; those of two steps or directions must not."""
    model = converted(MODULES["projected"], num_layers=2, bidirectional=True)
    seen = []
    ops.recorders.append(lambda product: seen.extend(operand.stream for operand in product.operands()))
    try:
        out, _ = model(values(3, 2, 5).requires_grad_(), tuple(t.requires_grad_() for t in states_of(model, 2)))
        out.sum().backward()
    finally:
        ops.recorders.clear()
    products = 4 * (1 + 3 + 3) + 4 * (3 + 3) + 4 * (1 + 3)
    assert len(seen) == 2 * products
    assert len(set(seen)) == len(seen)


def test_consecutive_modules_take_consecutive_sites():
    model = nn.ModuleList(
        [nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), nn.GRU(4, 4, 3), nn.LSTMCell(4, 4), nn.Linear(4, 4)]
    )
    hbfp.convert_(model, "hbfp4")
    assert [m.hbfp_state.site for m in model] == [0, 12, 18, 20]


def test_gradients_through_one_result_alone():
    """The other result then has no gradient, which must count as zeros."""
    model = converted(MODULES["lstm"])
    found = []
    for pick in (lambda out, final: out[-1], lambda out, final: final[0][0]):
        model.zero_grad()
        pick(*model(values(4, 3, 5))).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_backward_computes_only_what_is_asked_for():
    model = converted(MODULES["lstm"])
    model.weight_ih_l0.requires_grad_(False)
    seen = []
    ops.recorders.append(lambda product: seen.append((product.name, product.macs)))
    try:
        model(values(4, 3, 5))[0].sum().backward()
    finally:
        ops.recorders.clear()
    step = 3 * 28 * 7
    assert seen == (
        [("forward", 12 * 28 * 5)] + [("forward", step)] * 4 + [("input gradient", step)] * 3
        + [("weight gradient", 12 * 28 * 7)]
    )  # fmt: skip


def test_dropout_stands_between_the_layers_and_draws_from_torchs_generator():
    model = converted(MODULES["gru"], num_layers=2, dropout=0.5)
    x = values(4, 3, 5)
    torch.manual_seed(3)
    first = model(x)[0]
    torch.manual_seed(3)
    assert same(first, model(x)[0])
    assert not same(first, model(x)[0])
    model.eval()
    assert same(model(x)[0], model(x)[0])
    alone = converted(MODULES["gru"], num_layers=2)
    assert same(alone(x)[0], model(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floats_are_cast(dtype):
    model = converted(MODULES["lstm"], "hbfp8").to(dtype)
    x = values(4, 3, 5).to(dtype).requires_grad_()
    out, _ = model(x)
    assert out.dtype is (torch.float32 if dtype is torch.float64 else dtype)
    out.sum().backward()
    assert {p.grad.dtype for p in (x, *model.parameters())} == {dtype}
    wide = copy.deepcopy(model).float()(x.detach().float())[0]
    assert torch.equal(out, wide.to(out.dtype))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_conversion_changes_no_parameter_and_is_taken_back(kind):
    model = MODULES[kind](num_layers=2)
    keys, parameters, x = list(model.state_dict()), list(model.parameters()), values(4, 3, 5)
    before = model(x)[0]
    hbfp.convert_(model, "hbfp4")
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not same(model(x)[0], before)
    hbfp.set_step(model, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other(x)[0], model(x)[0])
    hbfp.revert_(model)
    assert type(model).__module__ == "torch.nn.modules.rnn"
    assert same(model(x)[0], before)


def test_layers_built_directly_advance_their_step():
    for make in (hbfp.nn.LSTM, hbfp.nn.GRU, hbfp.nn.RNN, hbfp.nn.LSTMCell, hbfp.nn.GRUCell, hbfp.nn.RNNCell):
        layer = make(5, 7, recipe="emulator", seed=3)
        x = values(4, 3, 5) if isinstance(layer, nn.RNNBase) else values(3, 5)
        first, second = layer(x)[0], layer(x)[0]
        assert not torch.equal(first, second)
        assert "hbfp4b64-ceil" in repr(layer)
    with pytest.raises(hbfp.HBFPError, match="site"):
        hbfp.nn.LSTM(5, 7, site=2**20 - 1)


def test_bits_do_not_depend_on_threads():
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        model = nn.GRU(64, 64)
        for parameter in model.parameters():
            parameter.data.copy_(values(*parameter.shape) / 8)
        hbfp.convert_(model, "emulator")
        x = values(6, 16, 64).requires_grad_()
        model(x)[0].square().sum().backward()
        found.append([p.grad for p in (x, *model.parameters())])
    torch.set_num_threads(before)
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_reference_backend_gives_the_same_bits():
    from dataclasses import replace

    found = []
    for backend in ("integer", "reference"):
        model = converted(MODULES["projected"], replace(hbfp.recipe("hbfp4"), backend=backend))
        x = values(2, 2, 5).requires_grad_()
        model(x)[0].square().sum().backward()
        found.append([p.grad for p in (x, *model.parameters())])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_gradients_agree_with_torchs_own():
    """The formulas of the way back, against torch's autograd: with 16 bits only rounding tells them apart."""
    for kind, make in MODULES.items():
        if kind == "relu":  # its slope jumps
            continue
        torch.manual_seed(1)
        model = make(num_layers=2, bidirectional=True)
        found = []
        for convert in (False, True):
            if convert:
                hbfp.convert_(model, "hbfp16b64")
            model.zero_grad()
            x = values(4, 3, 5).requires_grad_()
            out, final = model(x)
            (out.sin().sum() + (final[1] if model.mode == "LSTM" else final).cos().sum()).backward()
            found.append([p.grad for p in (x, *model.parameters())])
        for a, b in zip(*found, strict=True):
            # 16-bit mantissas leave about 2^-15 of the largest value of a block at each of some ten steps.
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_no_sequences_and_no_steps():
    model = converted(MODULES["lstm"])
    out, _ = model(values(4, 0, 5))
    assert out.shape == (4, 0, 7)
    out.sum().backward()
    assert not model.weight_hh_l0.grad.any()
    with pytest.raises(hbfp.ShapeError, match="one step or more"):
        model(values(0, 3, 5))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m(values(4, 3, 6)), hbfp.ShapeError, "5 features"),
        (lambda m: m(values(4)), hbfp.ShapeError, "batch of these"),
        (lambda m: m(values(4, 3, 5), (values(1, 2, 7), values(1, 3, 7))), hbfp.ShapeError, "initial states"),
        (lambda m: m(torch.ones(4, 3, 5, dtype=torch.int32)), hbfp.DTypeError, "int32"),
        (lambda m: hbfp.nn.LSTMCell(5, 7)(values(3, 5), (values(3, 7), values(2, 7))), hbfp.ShapeError, "states"),
        (lambda m: hbfp.nn.GRUCell(5, 7)(values(2, 3, 5)), hbfp.ShapeError, "GRUCell takes"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(converted(MODULES["lstm"]))


def test_double_backward_is_refused():
    model = converted(MODULES["tanh"])
    x = values(2, 3, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        gradient.sum().backward()


def test_backward_twice_over_one_graph():
    """The way back writes in place, but not into what forward kept."""
    model = converted(MODULES["gru"])
    x = values(4, 3, 5).requires_grad_()
    loss = model(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *model.parameters()])
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
