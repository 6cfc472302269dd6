"""The audit's count: by hand, against torch's own counter, and with everything left as it was."""

import copy
import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")

from test_coverage import ZOO, EncoderDecoder, Taggers, TiedGPT, UNet  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import hbfp  # noqa: E402
from hbfp.training.gpt import GPT, GPTShape  # noqa: E402
from hbfp.training.resnet import ResNet, ResNetShape  # noqa: E402


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


# --- against torch's own counter --------------------------------------------------------------------------------------


class Convolutions(nn.Sequential):
    """Strides, dilations, groups and transposes; `groups` are 1 where torch's counter is to be right."""

    def __init__(self, groups=2):
        super().__init__(
            nn.Conv2d(4, 16, 3, 2, padding=2, dilation=2, groups=groups),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 3, 2, output_padding=1, groups=groups),
            nn.SiLU(),
            nn.Conv2d(8, 16, (1, 3), groups=4 * groups if groups > 1 else 1),
            nn.Flatten(2),
            nn.Conv1d(16, 6, 5, 3),
        )

    @staticmethod
    def inputs():
        return (torch.randn(2, 4, 9, 8),)


class LSTMs(nn.Module):
    """Without a projection, which torch leaves to oneDNN: one operator that its counter does not know."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(19, 12)
        self.rnn = nn.LSTM(12, 10, 2, bidirectional=True)
        self.head = nn.Linear(20, 19)

    def forward(self, codes):
        return self.head(self.rnn(self.embedding(codes))[0])

    @staticmethod
    def inputs():
        return (torch.randint(19, (7, 3)),)


class ResNet20(ResNet):
    def __init__(self):
        super().__init__(ResNetShape())

    @staticmethod
    def inputs():
        return (torch.randn(1, 3, 16, 16),)


class CharacterGPT(GPT):
    def __init__(self):
        super().__init__(GPTShape(vocabulary=23, layers=2, width=64, context=12))

    @staticmethod
    def inputs():
        return (torch.randint(23, (2, 12)),)


def counted_by_torch(model, inputs):
    """MACs of a step of the FP32 model. Attention by its plain products: those that flash attention computes a second
    time in its backward pass are its own. Recurrent layers not by oneDNN, whose operators the counter passes over."""
    plain = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain, torch.backends.mkldnn.flags(enabled=False):
        model(*inputs).sum().backward()
    return counter.get_total_flops() // 2


def overcounted(model, inputs):
    """What torch's counter adds to the weight gradients of grouped convolutions: it takes each for an ungrouped one's,
    groups times as many products as there are."""
    extra = []

    def note(layer, arguments, out):
        pixels = arguments[0] if isinstance(layer, nn.ConvTranspose2d) else out
        products = pixels.shape[0] * pixels[0, 0].numel() * layer.weight.numel()
        extra.append((layer.groups - 1) * products)

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return sum(extra)


RIGHT = [kind for kind in (*ZOO, Convolutions, LSTMs, ResNet20, CharacterGPT) if kind is not Taggers]


@pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:LSTM with projections")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_agrees_with_torchs_counter_on_the_fp32_model(kind):
    """A product that the audit does not see makes its share of the rest look better than it is."""
    torch.manual_seed(0)
    model, inputs = kind(), kind.inputs()
    extra = overcounted(model, inputs) if kind in (Convolutions, UNet) else 0
    assert (extra > 0) == (kind in (Convolutions, UNet))
    expected = counted_by_torch(model, inputs) - extra
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        floats = hbfp.audit(model, *inputs)
    assert floats.by_width == {32: expected}
    assert {row.reason for row in floats.rows} == {"not converted: see hbfp.convert_"}
    hbfp.convert_(model, "booster", example_inputs=inputs)
    found = hbfp.audit(model, *inputs)
    assert found.macs == expected
    assert set(found.by_width) <= {4, 6}
    found.require(1.0)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_ungrouped_convolutions_need_no_correction():
    inputs = Convolutions.inputs()
    model = Convolutions(groups=1)
    assert overcounted(model, inputs) == 0
    expected = counted_by_torch(model, inputs)
    hbfp.convert_(model, "hbfp4")
    assert hbfp.audit(model, *inputs).macs == expected


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_recurrent_layers_agree_and_bilinear_ones_are_counted_by_hand():
    """torch's counter has no formula for `nn.Bilinear`, in which, moreover, fixed point has another order of products:
    two, the first of them with A as it lies, and both once forward and twice backward."""
    model, inputs = Taggers(), Taggers.inputs()
    expected = counted_by_torch(model, inputs)
    rows, first, second, out = 4, 5, 7, 4
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, *inputs)
    assert found.by_layer["pair"] == 3 * (rows * out * first * second + rows * out * first)
    assert found.macs - found.by_layer["pair"] == expected


def test_recurrent_layers_of_onednn_are_counted_by_hand():
    """As torch runs them by default, with one product more than ours: the gradient of a first state."""
    model, inputs = LSTMs(), LSTMs.inputs()
    floats = hbfp.audit(model, *inputs)
    gates, rows, steps = 4 * 10, 3, 7
    layers = 2 * steps * rows * gates * ((12 + 10) + (20 + 10))
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, *inputs)
    assert floats.by_layer["rnn"] == 3 * layers
    assert found.by_layer["rnn"] == 3 * layers - 4 * rows * gates * 10
    assert found.by_layer["head"] == floats.by_layer["head"] == 3 * rows * steps * 20 * 19


# --- what it says -----------------------------------------------------------------------------------------------------


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


def test_the_three_reasons():
    """A product without its right reason sends the user to the wrong remedy."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), Scaled(8, 8), nn.Linear(8, 8))
            self.late = nn.Identity()
            self.own = nn.Parameter(torch.randn(8, 8))  # that it has matrices of its own is no reason

        def forward(self, x):
            y = self.late(self.inner(x))
            return y @ y.T @ x @ self.own, hbfp.nn.functional.matmul(y, y.T, recipe="hbfp6")

    model = Model()
    hbfp.convert_(model, "hbfp4", rules={"inner.0": None})
    model.late = nn.Linear(8, 8)
    found = hbfp.audit(model, torch.randn(4, 8))
    reasons = {}
    for row in found.fp32:
        reasons.setdefault(row.layer, set()).add(row.reason)
    assert reasons == {
        "inner.0": {"rule 'inner.0'"},
        "inner.1": {"subclass of Linear with its own forward"},
        "late": {"not converted: see hbfp.convert_"},
        "Model": {"a functional call outside a layer: see hbfp.nn.functional"},
    }
    assert {row.layer for row in found.rows if row.bits == 6} == {"Model"}  # a functional call that is in fixed point
    with pytest.raises(hbfp.HBFPError) as raised:
        found.require()
    assert all(f"{row.layer}: {row.product}, {row.macs} MACs ({row.reason})" in str(raised.value) for row in found.fp32)


def test_products_of_the_loss_are_not_the_models():
    model, x = mlp(), torch.randn(10, 16)
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, x, loss=lambda y: (y @ y.T).logsumexp(-1).sum())
    assert found.by_layer["(loss)"] == 3 * 10 * 10 * 8
    assert set(found.by_layer) == {"0", "2", "(loss)"}
    assert found.share() == 1 - 2400 / found.macs


def test_keywords_are_the_models():
    class Model(EncoderDecoder):
        def forward(self, source, *, target, scale=1.0):
            return {"logits": super().forward(source, target) * scale}

    model = Model()
    source, target = Model.inputs()
    hbfp.convert_(model, "hbfp4", example_inputs={"source": source, "target": target})
    found = hbfp.audit(model, source, target=target, loss=lambda out: out["logits"].mean())
    assert found == hbfp.audit(model, source=source, target=target, scale=2.0)
    assert found.share(4) == 1.0


def test_gradients_of_keyword_inputs_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, *, values):
            return self.layer(values["x"])

    model, x = Model(), torch.randn(10, 16, requires_grad=True)
    hbfp.convert_(model, "hbfp4")
    assert hbfp.audit(model, values={"x": x}).macs == 3 * 10 * 16 * 4
    assert x.grad is None


def test_values_go_through_json_and_back():
    model = TiedGPT()
    hbfp.convert_(model, "booster", rules={"blocks.1.up": None}, example_inputs=TiedGPT.inputs())
    found = hbfp.audit(model, *TiedGPT.inputs())
    assert hbfp.Audit.of(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert set(found.shares) == {4, 6, 32}
    assert sum(found.shares.values()) == pytest.approx(1.0)  # of sums of floats
    assert all(found.shares[bits] == found.share(bits) for bits in found.shares)


def test_the_tables():
    """Layer by layer in the order of the forward pass, whatever the order of the backward one, then totals."""
    model = mlp()
    hbfp.convert_(model, "hbfp4", rules={"2": hbfp.HBFP(6)})
    assert str(hbfp.audit(model, torch.randn(10, 16))).splitlines() == [
        "layer  product          formats    MACs   share  reason",
        "-----  ---------------  --------  -----  ------  ------",
        "0      forward          hbfp4b64  5,120  28.57%",
        "0      weight gradient  hbfp4b64  5,120  28.57%",
        "2      forward          hbfp6b64  2,560  14.29%",
        "2      input gradient   hbfp6b64  2,560  14.29%",
        "2      weight gradient  hbfp6b64  2,560  14.29%",
        "",
        "product           4-bit  6-bit     all",
        "---------------  ------  -----  ------",
        "forward           5,120  2,560   7,680",
        "weight gradient   5,120  2,560   7,680",
        "input gradient        0  2,560   2,560",
        "all              10,240  7,680  17,920",
        "",
        "17,920 MACs: 4-bit 57.14%, 6-bit 42.86%",
    ]


def test_nothing_to_count():
    """An empty batch: no share is a division by zero."""
    model = nn.Linear(8, 4)
    hbfp.convert_(model, "hbfp4")
    found = hbfp.audit(model, torch.randn(0, 8))
    assert (found.macs, found.share(), set(found.shares.values())) == (0, 0.0, {0.0})
    assert str(found)
    assert str(hbfp.audit(nn.LayerNorm(8), torch.randn(2, 8))).endswith("0 MACs: none")


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_twice_is_counted_twice(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x):
            return checkpoint(self.inner, self.stem(x), use_reentrant=reentrant)

    model, x = Model(), torch.randn(5, 8)
    hbfp.convert_(model, "hbfp4")
    product = 5 * 8 * 8
    found = hbfp.audit(model, x)
    assert (found.by_layer["stem"], found.by_layer["inner.0"]) == (2 * product, 4 * product)
    assert found.share(4) == 1.0


def test_a_compiled_model_is_counted_uncompiled():
    """Products inside of a compiled graph report to nobody: it would look like a model without any."""
    model, x = mlp(), torch.randn(10, 16)
    hbfp.convert_(model, "hbfp4")
    expected = hbfp.audit(model, x)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for _ in range(2):
        assert hbfp.audit(compiled, x) == expected
        compiled(x)
    model[0].compile(backend="eager", fullgraph=True)
    assert hbfp.audit(model, x) == expected


def test_products_in_inference_mode_and_in_place_are_seen():
    """They arrive as other operators than in training: a linear layer as itself, a sum in place under its own name."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.inference_mode():
                fixed = self.frozen(x)
            y = self.layer(fixed.clone())
            with torch.no_grad():
                torch.zeros(5, 5).addmm_(y, y.T)
                torch.zeros(5).addmv_(y, y[0])
            return y

    model, x = Model(), torch.randn(5, 8)
    hbfp.convert_(model, "hbfp4", rules={"frozen": None})
    found = hbfp.audit(model, x)
    assert found.by_layer == {"frozen": 5 * 64, "layer": 2 * 5 * 64, "Model": 5 * 5 * 8 + 5 * 8}
