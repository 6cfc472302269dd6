"""What the backend of a product stands for: five functions with one signature each, whoever computes them.

Layers ask here and do not know who answers.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hbfp import emulation, ops
from hbfp.format import HBFP
from hbfp.policy import Backend

__all__ = ["Arithmetic", "arithmetic"]


class Arithmetic(Protocol):
    """The products of a layer and what is computed beside them; see the functions of `hbfp.ops`."""

    def product(
        self,
        a: Tensor,
        a_axis: int,
        b: Tensor,
        b_axis: int,
        formats: tuple[HBFP, HBFP],
        roundings: tuple[int, int] = ...,
        seed: int = ...,
        streams: tuple[int, int] = ...,
        bias: Tensor | None = ...,
        *,
        name: str = ...,
        source: object = ...,
    ) -> Tensor: ...

    def softmax(
        self, scores: Tensor, scale: float, causal: bool = ..., mask: Tensor | None = ..., *, reuse: bool = ...
    ) -> Tensor: ...

    def softmax_backward(self, p: Tensor, dp: Tensor, scale: float, *, reuse: bool = ...) -> Tensor: ...

    def dropout(self, x: Tensor, dropped: int, word: Tensor) -> Tensor: ...

    def column_sums(self, x: Tensor) -> Tensor: ...


class _Oracle:
    """Products by exact arithmetic; the core computes what is no product."""

    product = staticmethod(ops.reference_product)
    softmax = staticmethod(ops.softmax)
    softmax_backward = staticmethod(ops.softmax_backward)
    dropout = staticmethod(ops.dropout)
    column_sums = staticmethod(ops.column_sums)


_ORACLE = _Oracle()


def arithmetic(backend: Backend) -> Arithmetic:
    """Who computes for `backend`."""
    # Compared and not looked up: a member's hash is a call of Python.
    if backend is Backend.INTEGER:
        return ops
    return emulation if backend is Backend.EMULATE else _ORACLE
