"""Layers whose products run in fixed point, forward and backward.

`convert_` and `revert_` turn a model's own layers into these and back; `functional` has the products as functions.
"""

from __future__ import annotations

from hbfp.nn import functional
from hbfp.nn.attention import DotProductAttention
from hbfp.nn.bilinear import Bilinear
from hbfp.nn.cache import KeyValueCache
from hbfp.nn.conversion import convert_, revert_
from hbfp.nn.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from hbfp.nn.linear import Linear
from hbfp.nn.multihead import MultiheadAttention
from hbfp.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from hbfp.nn.report import ConversionReport
from hbfp.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConversionReport",
    "DotProductAttention",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "convert_",
    "functional",
    "revert_",
]
