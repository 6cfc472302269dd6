"""The audit's count: by hand, against torch's own counter, and with everything left as it was."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import hbfp  # noqa: E402


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.attention = hbfp.nn.DotProductAttention()
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.attention(q, k, v, is_causal=True))


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def test_counted_by_hand():
    model = mlp()
    hbfp.convert_(model, "booster", rules={"2": hbfp.HBFP4})
    found = hbfp.audit(model, torch.randn(10, 16))
    first, second = 10 * 16 * 32, 10 * 32 * 8
    # The first layer's input needs no gradient; it is alone in what a schedule may change, so first and last.
    assert found.macs == 2 * first + 3 * second
    assert found.by_layer == {"0": 2 * first, "2": 3 * second}
    assert found.by_product == {
        "forward": first + second,
        "input gradient": second,
        "weight gradient": first + second,
    }
    assert found.share(4) == 3 * second / found.macs
    assert found.share() == 1.0
    found.require()


@pytest.mark.parametrize(("make", "shape"), [(mlp, (10, 16)), (Attention, (2, 6, 32))])
def test_agrees_with_torchs_counter_on_the_fp32_model(make, shape):
    model, x = make(), torch.randn(*shape)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(x).sum().backward()
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, x)
    assert found.macs == counter.get_total_flops() // 2
    assert found.share(4) == 1.0


def test_what_stays_fp32_is_listed_with_the_reason():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 16)
            self.layer = nn.Linear(16, 16)
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x):
            h = self.layer(self.embedding(x))
            h = self.conv(h.transpose(1, 2)).transpose(1, 2)
            return h @ self.embedding.weight.t()

    model = Tied()
    hbfp.convert_(model, "hbfp4", rules={"conv": None})
    found = hbfp.audit(model, torch.arange(8).reshape(2, 4))
    assert 0.0 < found.share() < 1.0
    assert any("rule 'conv'" in row.reason for row in found.fp32 if row.layer == "conv")
    assert any("functional call" in row.reason for row in found.fp32)
    with pytest.raises(hbfp.HBFPError, match="rule 'conv'"):
        found.require(1.0)
    assert "FP32" in str(found)


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).eval()
    hbfp.convert_(model, "hbfp4")
    x = torch.randn(6, 8)
    model(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    state, step = torch.get_rng_state(), model[0].hbfp_state.root.step
    hbfp.audit(model, x)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].hbfp_state.root.step == step
    assert not model.training
    assert not model[0]._forward_hooks


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 6)
        self.pair = nn.Bilinear(6, 6, 3)

    def forward(self, x):
        h = self.head(x)
        return self.pair(h, h)


@pytest.mark.parametrize(
    ("make", "shape", "forward", "backward"),
    [
        (Recurrent, (5, 2, 8), 5 * 2 * 4 * 16 * (8 + 16), 2),
        (Bilinear, (7, 8), 7 * 3 * 6 * 6, 3),
    ],
)
def test_products_without_a_formula_in_torchs_counter_are_seen(make, shape, forward, backward):
    """They would leave an audit that says 100 % of a network that is mostly LSTM."""
    model = make()
    layer = "rnn" if make is Recurrent else "pair"
    hbfp.convert_(model, "hbfp4", rules={layer: None})
    found = hbfp.audit(model, torch.randn(*shape))
    assert found.by_layer[layer] == (1 + backward) * forward
    assert {row.reason for row in found.fp32} == {f"rule {layer!r}"}
    with pytest.raises(hbfp.HBFPError, match=layer):
        found.require(1.0)


def test_recurrent_layers_are_counted_by_hand():
    model, x = Recurrent(), torch.randn(5, 2, 8)
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, x)
    of_input, step = 10 * 64 * 8, 2 * 64 * 16
    # Neither the input nor the first state needs a gradient.
    assert found.by_layer["rnn"] == 2 * of_input + (5 + 4 + 5) * step
    x.requires_grad_()
    assert hbfp.audit(model, x).by_layer["rnn"] == 3 * of_input + (5 + 4 + 5) * step
    assert found.share(4) == 1.0


def test_vectors_are_products_too():
    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            y = self.layer(x)
            with torch.no_grad():
                y[0].dot(y[1])
                y.mv(y[0])
            return y

    model = Vectors()
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, torch.randn(5, 8))
    assert sum(row.macs for row in found.fp32) == 8 + 40


def test_backward_is_entered_where_it_belongs():
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(48, 2), nn.Linear(2, 2)
    )
    hbfp.convert_(model, "hbfp4", rules={"[025]": None})
    x = torch.randn(3, 4, 8)
    found = hbfp.audit(model, x)
    first, second, last = 3 * 6 * 4 * 8 * 3, 3 * 6 * 8 * 8, 3 * 2 * 2
    assert {name: found.by_layer[name] for name in "025"} == {"0": 2 * first, "2": 3 * second, "5": 3 * last}
    assert {row.reason for row in found.fp32 if row.layer == "5"} == {"rule '[025]'"}
    outer = nn.Sequential(model)  # a converted model inside another: the reasons go with it
    assert {row.reason for row in hbfp.audit(outer, x).fp32} == {"rule '[025]'"}
    hbfp.revert_(model)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert found.macs == hbfp.audit(model, x).macs == counter.get_total_flops() // 2


def test_gradients_of_inputs_are_left_alone():
    model, x = mlp(), torch.randn(10, 16, requires_grad=True)
    hbfp.convert_(model, "hbfp4")
    assert hbfp.audit(model, x).by_layer["0"] == 3 * 10 * 16 * 32
    assert x.grad is None
