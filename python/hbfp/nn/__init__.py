"""Layers whose products run in fixed point, forward and backward.

`convert_` and `revert_` turn a model's own layers into these and back; `functional` has the products as functions.
"""

from __future__ import annotations

from hbfp.nn import functional
from hbfp.nn.attention import DotProductAttention
from hbfp.nn.conversion import convert_, revert_
from hbfp.nn.linear import Linear
from hbfp.nn.report import ConversionReport

__all__ = ["ConversionReport", "DotProductAttention", "Linear", "convert_", "functional", "revert_"]
