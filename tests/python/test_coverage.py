"""A zoo of whole networks, converted: not one product of their training steps may run on floats.

The bug this hunts is the product that nobody thought of: in a gradient, in a fused operator of torch, in a layer that
was passed over in silence. A mode sees every operator that torch dispatches and fails at the first that multiplies
matrices of floats; that it would is tested on the same networks before their conversion.
"""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import hbfp  # noqa: E402

PRODUCTS = {
    "mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addbmm", "matmul", "mv", "addmv", "dot", "vdot", "inner",
    "outer", "ger", "addr", "kron", "chain_matmul", "linalg_multi_dot", "tensordot", "einsum", "linear",
    "linear_backward", "mkldnn_linear", "bilinear", "_trilinear", "grouped_mm", "_grouped_mm", "_scaled_mm",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc",
    "conv_depthwise3d", "_conv_depthwise2d", "im2col", "col2im", "slow_conv3d_forward", "_slow_conv2d_forward",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "quantized_lstm",
    "_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_transform_bias_rescale_qkv", "cdist",
    "_cdist_forward", "_euclidean_dist",
}  # fmt: skip
PARTS = ("convolution", "scaled_dot_product", "mkldnn_rnn", "_thnn_fused", "flash_attention", "efficient_attention")


class NoFloatProducts(TorchDispatchMode):
    """Raises at an operator that multiplies matrices of floats."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith("hbfp::") and (name in PRODUCTS or any(part in name for part in PARTS)):
            floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            assert not floats, f"aten::{name} on {[tuple(x.shape) for x in floats]}"
        return func(*args, **(kwargs or {}))


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 5))

    @staticmethod
    def inputs():
        return (torch.randn(7, 12),)


class EncoderDecoder(nn.Module):
    """Embeddings, `nn.Transformer` with all its masks, and an output layer."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(11, 16), nn.Embedding(13, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 13)

    def forward(self, source, target):
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.transformer(self.source(source), self.target(target), tgt_mask=causal, tgt_is_causal=True)
        return self.head(out)

    @staticmethod
    def inputs():
        return torch.randint(11, (3, 6)), torch.randint(13, (3, 5))


class LSTMLanguageModel(nn.Module):
    """Merity et al.'s shape: stacked layers with dropout between, the output layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(19, 12)
        self.rnn = nn.LSTM(12, 18, 2, dropout=0.2, proj_size=12)
        self.head = nn.Linear(12, 19)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        return self.head(self.rnn(self.embedding(codes))[0])

    @staticmethod
    def inputs():
        return (torch.randint(19, (8, 3)),)


class Taggers(nn.Module):
    """The other recurrent layers, cells and `nn.Bilinear`, on sequences of several lengths."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(10, 9, bidirectional=True)
        self.rnn = nn.RNN(18, 8, nonlinearity="relu", batch_first=True)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(8, 7), nn.GRUCell(7, 6), nn.RNNCell(6, 5)
        self.pair = nn.Bilinear(5, 7, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0])
        _, state = self.rnn(padded.transpose(0, 1))
        h, _ = self.lstm_cell(state[0])
        return self.pair(self.rnn_cell(self.gru_cell(h)), h)

    @staticmethod
    def inputs():
        return torch.randn(6, 4, 10), torch.tensor([3, 6, 1, 4])


class TiedGPT(nn.Module):
    """A decoder whose attention is a module and whose output layer is tied to the embedding."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
            self.attention = hbfp.nn.DotProductAttention()

        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            x = x + self.out(self.attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    def __init__(self):
        super().__init__()
        self.embedding, self.place = nn.Embedding(17, 16), nn.Embedding(9, 16)
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.head = nn.Linear(16, 17, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        return self.head(self.blocks(self.embedding(codes) + self.place.weight[: codes.shape[1]]))

    @staticmethod
    def inputs():
        return (torch.randint(17, (3, 9)),)


class ResNet(nn.Module):
    """He et al.'s for small images: an RGB stem, a block, a strided block with a projection, the mean of the pixels."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU(inplace=True)
            self.shortcut = nn.Identity()
            if stride > 1:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(out + self.shortcut(x))

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(self.Block(16, 16, 1), self.Block(16, 18, 2))
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        return self.head(self.blocks(self.relu(self.norm(self.stem(x)))).mean((2, 3)))

    @staticmethod
    def inputs():
        return (torch.randn(2, 3, 4, 4),)


class DenseBlock(nn.Module):
    """Huang et al.'s, with bottlenecks and a transition: layers that read all those before them."""

    class Layer(nn.Sequential):
        def __init__(self, inputs, growth):
            super().__init__(
                nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, 2 * growth, 1, bias=False),
                nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True), nn.Conv2d(2 * growth, growth, 3, padding="same"),
            )  # fmt: skip

        def forward(self, x):
            return torch.cat([x, super().forward(x)], 1)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(self.Layer(16, 8), self.Layer(24, 8))
        self.transition = nn.Conv2d(32, 10, 1)

    def forward(self, x):
        return nn.functional.avg_pool2d(self.transition(self.layers(x)), 2)

    @staticmethod
    def inputs():
        return (torch.randn(2, 16, 4, 4),)


class UNet(nn.Module):
    """Ronneberger et al.'s, of two levels: strided down, transposed up, joined across; one layer is depthwise."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect")
        self.bottom = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Conv2d(16, 20, 1), nn.SiLU(inplace=True))
        self.up = nn.ConvTranspose2d(20, 16, 2, 2)
        self.joined = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x):
        high = nn.functional.gelu(self.down(x))
        return self.joined(torch.cat([self.up(self.bottom(high)), high], 1))

    @staticmethod
    def inputs():
        return (torch.randn(2, 3, 4, 6),)


ZOO = [MLP, EncoderDecoder, LSTMLanguageModel, Taggers, TiedGPT, ResNet, DenseBlock, UNet]
CONVOLUTIONAL = {ResNet, DenseBlock, UNet}


@pytest.mark.parametrize("kind", ZOO)
def test_no_product_of_a_training_step_runs_on_floats(kind):
    torch.manual_seed(0)
    model = kind()
    inputs = kind.inputs()
    with pytest.raises(AssertionError, match="aten::"), NoFloatProducts():
        model(*inputs)
    report = hbfp.convert_(model, "hbfp4", example_inputs=inputs)
    assert not report.left
    assert not report.notes
    with NoFloatProducts():
        model(*inputs).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    found = hbfp.audit(model, *inputs)
    assert found.share() == 1.0
    assert not found.fp32


@pytest.mark.parametrize("kind", ZOO)
def test_neither_does_inference(kind):
    torch.manual_seed(0)
    model = kind()
    inputs = kind.inputs()
    hbfp.convert_(model, "hbfp4", example_inputs=inputs)
    model.eval()
    with torch.no_grad(), NoFloatProducts():
        model(*inputs)


@pytest.mark.parametrize("kind", ZOO)
def test_files_give_back_the_same_bits(kind, tmp_path):
    """Every weight of a layer that reads several is packed as its products read it, or stored as it is."""
    inputs = kind.inputs()
    outputs = []
    for recipe in ("hbfp4", "hbfp6b16", "hbfp4t4")[: 2 if kind in CONVOLUTIONAL else 3]:
        saved, loaded = kind(), kind()
        for model in (saved, loaded):
            hbfp.convert_(model, recipe, example_inputs=inputs)
            model.eval()
        hbfp.save_model(tmp_path / recipe, saved)
        hbfp.load_model(tmp_path / recipe, loaded)
        outputs.append((saved(*inputs), loaded(*inputs)))
        packed = [name for name, value in hbfp.load(tmp_path / recipe).items() if isinstance(value, hbfp.BlockArray)]
        expected = {
            MLP: 3,
            EncoderDecoder: 2 * (2 + 2) + 2 * (4 + 2) + 1,
            LSTMLanguageModel: 6,
            Taggers: 4 + 2 + 6 + 1,
            TiedGPT: 8,
            ResNet: 6,  # the stem's patch is flattened
            DenseBlock: 5,
            UNet: 3,  # so are the first layer's and the depthwise one's
        }[kind]
        if recipe == "hbfp4t4":  # tiles of a part are not those of the whole
            expected -= {EncoderDecoder: 6, Taggers: 1}.get(kind, 0)
        assert len(packed) == expected
    for found, wanted in outputs:
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("kind", ZOO)
def test_conversion_is_taken_back(kind):
    torch.manual_seed(0)
    model = kind().eval()
    inputs = kind.inputs()
    kinds = [type(module) for module in model.modules()]
    before, keys, parameters = model(*inputs), list(model.state_dict()), list(model.parameters())
    hbfp.convert_(model, "hbfp4", example_inputs=inputs)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not torch.equal(model(*inputs), before)
    hbfp.revert_(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(*inputs), before)


def test_tied_layers_stay_tied():
    """One parameter under two names, looked up in FP32 and multiplied in fixed point, with one gradient."""
    for kind in (LSTMLanguageModel, TiedGPT):
        model = kind()
        hbfp.convert_(model, "hbfp4", example_inputs=kind.inputs())
        assert model.head.weight is model.embedding.weight
        assert model.head.hbfp_state is not None
        assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = model.embedding.weight.clone()
        model(*kind.inputs()).square().mean().backward()
        optimizer.step()
        assert model.head.weight is model.embedding.weight
        assert not torch.equal(model.embedding.weight, before)


def test_wide_weights_reach_every_weight():
    model = LSTMLanguageModel()
    hbfp.convert_(model, "hbfp4")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hbfp.wide_weights(optimizer, model, bits=4)
    model(*LSTMLanguageModel.inputs()).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        rounded = torch.from_numpy(hbfp.quantize(parameter.detach().numpy(), hbfp.HBFP4))
        assert torch.equal(parameter, rounded) == ("weight" in name), name
