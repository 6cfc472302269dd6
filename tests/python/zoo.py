"""What the tests of torch's machinery run on: one small layer of every class, and small models of every kind."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402
from hbfp.training.gpt import GPT, GPTShape  # noqa: E402
from hbfp.training.resnet import ResNet, ResNetShape  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "Linear": (lambda: nn.Linear(20, 6), [(3, 20)]),
    "Bilinear": (lambda: nn.Bilinear(5, 6, 4), [(3, 5), (3, 6)]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), [(2, 4, 7)]),
    "Conv2d": (lambda: nn.Conv2d(16, 6, 3, 2, 1), [(2, 16, 6, 5)]),
    "Conv3d": (lambda: nn.Conv3d(3, 4, 2), [(2, 3, 3, 4, 3)]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), [(2, 4, 5)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), [(2, 4, 3, 4)]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 4, 2), [(2, 3, 2, 3, 2)]),
    "DotProductAttention": (hbfp.nn.DotProductAttention, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), [(2, 5, 8), (2, 6, 8), (2, 6, 8)]),
    "RNN": (lambda: nn.RNN(5, 6), [(4, 3, 5)]),
    "GRU": (lambda: nn.GRU(5, 6), [(4, 3, 5)]),
    "LSTM": (lambda: nn.LSTM(5, 6, proj_size=3), [(4, 3, 5)]),
    "RNNCell": (lambda: nn.RNNCell(5, 6), [(3, 5), (3, 6)]),
    "GRUCell": (lambda: nn.GRUCell(5, 6), [(3, 5), (3, 6)]),
    "LSTMCell": (lambda: nn.LSTMCell(5, 6), [(3, 5)]),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), [(2, 5, 8)]),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), [(2, 5, 8), (2, 4, 8)],
    ),
}  # fmt: skip
"""Name of the class in `hbfp.nn` -> how to make torch's, and the shapes of its inputs."""


class Dropping(nn.Module):
    """All that drops elements of a softmax: [batch, length, 8] -> the same."""

    def __init__(self):
        super().__init__()
        self.functional = hbfp.nn.DotProductAttention()
        self.plain = nn.MultiheadAttention(8, 2, 0.25, batch_first=True)
        self.with_weights = nn.MultiheadAttention(8, 2, 0.25, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)

    def forward(self, x):
        x = self.functional(x, x, x, None, 0.25, True)
        x = self.plain(x, x, x, need_weights=False)[0]
        x, weights = self.with_weights(x, x, x)
        return self.layer(x) + weights.sum((1, 2), keepdim=True)


class LSTMModel(nn.Module):
    """Scores of the next of 11 codes: codes [time, batch] -> [time, batch, 11]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.narrow = nn.Linear(8, 6)
        self.lstm = nn.LSTM(6, 12)
        self.head = nn.Linear(12, 11)

    def forward(self, codes):
        return self.head(self.lstm(self.narrow(self.embed(codes)))[0])


def codes(*shape, seed=0):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 4)),
        lambda step: (values(9, 20, seed=step),),
    ),
    "resnet": (
        lambda: ResNet(ResNetShape(widths=(4, 16), blocks=1)),
        lambda step: (values(3, 3, 6, 6, seed=step),),
    ),
    "gpt": (lambda: GPT(GPTShape(11, layers=1, width=64, context=8)), lambda step: (codes(2, 8, seed=step),)),
    "lstm": (LSTMModel, lambda step: (codes(3, 4, seed=step),)),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        lambda step: (values(2, 5, 8, seed=step), values(2, 4, 8, seed=step + 50)),
    ),
}
"""Name -> how to make the model, and its inputs at a step."""


def leaves(result):
    """The tensors of a layer's result, one after the other."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result if part is not None for x in leaves(part)]


def same(a, b):
    """Whether two tensors, or both None, have the same bits."""
    if a is None or b is None:
        return a is b
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.detach().view(wide), b.detach().view(wide))


def gradients(layer, inputs, call=None):
    """Results of the layer, then the gradients of its inputs and parameters under a loss of all results."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    layer.zero_grad()
    results = leaves((layer if call is None else call)(*inputs))
    sum(result.float().square().sum() for result in results).backward()
    return [*results, *(x.grad for x in inputs), *(parameter.grad for parameter in layer.parameters())]
