"""Keys and values of past tokens, held as codes: attention over a text that grows.

Keys are blocked along the head's columns, so a token is whole blocks and is encoded once, when it comes. Values are
blocked along the text: a block is encoded when its last token has come, and until then its tokens are kept as floats,
from which every step encodes the open block anew. So a step gives the bits of an attention over the whole text so far
(docs/spec.md, 9.34).
"""

from __future__ import annotations

from math import prod, sqrt
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from hbfp import ops
from hbfp.errors import HBFPError, ShapeError
from hbfp.nn.attention import DotProductAttention
from hbfp.policy import Backend, MatmulPolicy

__all__ = ["KeyValueCache"]

_GROWTH = 64
"""Tokens that the planes of keys grow by."""


class KeyValueCache:
    """The keys and values that one `hbfp.nn.DotProductAttention` has seen, for inference.

    Called in place of it, with the queries, keys and values of the next tokens of each text, it gives what causal
    attention over all tokens so far gives for them. An attention that computes in FP32 gets a cache of floats.

    Args:
        attention: whose formats are used, as they are now.

    Attributes:
        length: tokens so far.
        block: tokens that share an exponent of the values; 1 for floats.

    Raises:
        HBFPError: its forward products round stochastically, share exponents beyond lines, or are not computed by the
            integer kernels.
    """

    def __init__(self, attention: DotProductAttention) -> None:
        state = attention.hbfp_state
        policy = None if state is None else state.recipe.forward
        if state is not None:
            _check(state.recipe.forward, state.recipe.backends.forward)
        self._held: _Floats | _Codes = _Floats() if policy is None else _Codes(policy)

    @property
    def length(self) -> int:
        return self._held.length

    @property
    def block(self) -> int:
        return self._held.block

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return self._held.nbytes

    def truncate(self, length: int) -> None:
        """Forgets all tokens from number `length` on.

        Raises:
            HBFPError: `length` lies inside a block of values whose floats are gone, or behind the last token.
        """
        if not 0 <= length <= self.length or (length % self.block and length < self.length // self.block * self.block):
            raise HBFPError(
                f"expected a length of 0 to {self.length}, a multiple of {self.block} unless it is in the open block; "
                f"found {length}"
            )
        self._held.truncate(length)

    @torch.no_grad()
    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the next tokens to all so far, themselves included: [..., tokens, Ev], float32.

        Shapes: query, key [..., tokens, E]; value [..., tokens, Ev]; the same batch dimensions at each call.

        Raises:
            ShapeError: the shapes do not fit each other.
        """
        batch = query.shape[:-2]
        if query.shape != key.shape or value.shape[:-1] != key.shape[:-1] or query.dim() < 2:
            raise ShapeError(
                "expected query and key [..., tokens, E] and value [..., tokens, Ev]; found "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        q, k, v = (x.reshape(prod(batch), *x.shape[-2:]) for x in (query, key, value))
        return self._held.attend(q, k, v).view(*batch, *value.shape[-2:])


def _check(policy: MatmulPolicy, backend: Backend) -> None:
    if backend is not Backend.INTEGER:
        raise HBFPError(f"expected an attention of the integer kernels; found the backend {str(backend)!r}")
    for operand in (policy.left, policy.right):
        if operand.format.block is None or operand.rounding.code == 3:
            raise HBFPError(
                "expected an attention whose forward operands are rounded deterministically, in lines; found "
                f"{operand}: tokens that come one by one would get other codes than all at once"
            )


def _hides(rows: int, columns: int) -> Tensor:
    """What is added to the scores [rows, columns] of the last `rows` of `columns` tokens: later tokens are hidden."""
    hidden = torch.full((rows, columns), float("-inf"))
    return hidden.triu_(columns - rows + 1)


class _Floats:
    block = 1

    def __init__(self) -> None:
        self.length = 0
        self.keys = self.values = torch.empty(0, 0, 0)

    @property
    def nbytes(self) -> int:
        return 4 * (self.keys[:, : self.length].numel() + self.values[:, : self.length].numel())

    def truncate(self, length: int) -> None:
        self.length = length

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin, end = self.length, self.length + k.shape[1]
        if end > self.keys.shape[1]:
            room = max(_GROWTH, 2 * end)
            self.keys = _grown(self.keys, (k.shape[0], room, k.shape[2]), begin, k)
            self.values = _grown(self.values, (v.shape[0], room, v.shape[2]), begin, v)
        self.keys[:, begin:end], self.values[:, begin:end] = k, v
        self.length = end
        keys, values = self.keys[:, :end], self.values[:, :end]
        mask = None if q.shape[1] in (1, end) else _hides(q.shape[1], end)
        return torch_attention(q, keys, values, mask, is_causal=mask is None and q.shape[1] > 1)


def _grown(old: Tensor, shape: tuple[int, int, int], kept: int, like: Tensor) -> Tensor:
    new = like.new_zeros(shape)
    if kept:
        new[:, :kept] = old[:, :kept]
    return new


class _Codes:
    """Planes as docs/spec.md has them, but for rows of keys that no token has filled yet."""

    def __init__(self, policy: MatmulPolicy) -> None:
        self.policy = policy
        self.block = cast(int, policy.right.format.block)
        self.length = 0
        empty = torch.empty(0, 0, 0, dtype=torch.uint8)
        self.key_exponents = self.key_mantissas = empty
        """[G, room, …]: one row of planes for each token."""
        self.value_exponents = self.value_mantissas = empty
        """[G, Ev, …]: one row for each column of the values, along the closed blocks."""
        self.open = torch.empty(0, 0, 0)
        """[G, tokens of the open block, Ev]."""

    @property
    def nbytes(self) -> int:
        keys = self.key_exponents[:, : self.length].numel() + self.key_mantissas[:, : self.length].numel()
        return keys + self.value_exponents.numel() + self.value_mantissas.numel() + 4 * self.open.numel()

    def truncate(self, length: int) -> None:
        closed = self.length // self.block
        if length // self.block < closed:
            kept = length // self.block
            each = self.value_mantissas.shape[2] // closed
            self.value_exponents = self.value_exponents[:, :, :kept].contiguous()
            self.value_mantissas = self.value_mantissas[:, :, : kept * each].contiguous()
            self.open = self.open[:, :0]
        else:
            self.open = self.open[:, : length - closed * self.block]
        self.length = length

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin, end = self.length, self.length + k.shape[1]
        self._take_keys(k, begin, end)
        self._take_values(v)
        self.length = end
        rows, closed = q.shape[1], end // self.block * self.block
        left, right = self.policy.left, self.policy.right
        scores = ops.coded_product(
            q, left.format, left.rounding.code, self.key_exponents, self.key_mantissas, right.format,
            (k.shape[0], self.key_exponents.shape[1], k.shape[2]), -1,
        )  # fmt: skip
        mask = None if rows in (1, end) else _hides(rows, end).expand(q.shape[0], rows, end)
        p = ops.softmax(
            scores[:, :, :end].contiguous(), 1 / sqrt(q.shape[2]), mask is None and rows > 1, mask, reuse=True
        )
        out: Tensor | None = None
        if closed:
            out = ops.coded_product(
                p[:, :, :closed], left.format, left.rounding.code, self.value_exponents, self.value_mantissas,
                right.format, (v.shape[0], closed, v.shape[2]), -2,
            )  # fmt: skip
        if end == closed:
            return cast(Tensor, out)
        return ops.sum_of_products(p[:, :, closed:], self.open, self.policy.formats, self.policy.roundings, out)

    def _take_keys(self, k: Tensor, begin: int, end: int) -> None:
        right = self.policy.right
        exponents, mantissas = ops.encode(k, right.format, -1, right.rounding.code)
        if end > self.key_exponents.shape[1]:
            room = -(-end // _GROWTH) * _GROWTH
            self.key_exponents = _grown(self.key_exponents, (k.shape[0], room, exponents.shape[1]), begin, exponents)
            self.key_mantissas = _grown(self.key_mantissas, (k.shape[0], room, mantissas.shape[1]), begin, mantissas)
        self.key_exponents[:, begin:end] = exponents.view(*k.shape[:2], -1)
        self.key_mantissas[:, begin:end] = mantissas.view(*k.shape[:2], -1)

    def _take_values(self, v: Tensor) -> None:
        right = self.policy.right
        tokens = v if not self.open.shape[1:2].numel() else torch.cat([self.open, v], 1)
        if (closing := tokens.shape[1] // self.block * self.block) == 0:
            self.open = tokens
            return
        exponents, mantissas = (
            plane.view(v.shape[0], v.shape[2], -1)
            for plane in ops.encode(tokens[:, :closing], right.format, 1, right.rounding.code)
        )
        first = self.value_exponents.numel() == 0
        self.value_exponents = exponents if first else torch.cat([self.value_exponents, exponents], 2)
        self.value_mantissas = mantissas if first else torch.cat([self.value_mantissas, mantissas], 2)
        self.open = tokens[:, closing:].clone()
