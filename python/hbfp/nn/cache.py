"""Keys and values of past tokens, held as codes: attention over a text that grows.

Keys are blocked along the head's columns, so a token is whole blocks and is encoded once, when it comes. Values are
blocked along the text: a block is encoded when its last token has come, and until then its tokens are kept as floats,
from which every step encodes the open block anew. So a step gives the bits of an attention over the whole text so far
(docs/spec.md, 9.34).
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from hbfp import ops
from hbfp.errors import HBFPError, ShapeError
from hbfp.nn.attention import DotProductAttention
from hbfp.policy import Backend, MatmulPolicy

__all__ = ["KeyValueCache"]

_GROWTH = 64
"""Tokens that floats grow by, at least."""


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
        wide = policy is not None and not all(x.format.core.encodes_to_panels for x in (policy.left, policy.right))
        self._held: _Floats | _Codes = _Floats(policy) if policy is None or wide else _Codes(policy)

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

    @property
    def grown(self) -> ops.GrownAttention | None:
        """The core's part of it; None where floats are held."""
        return self._held.grown if isinstance(self._held, _Codes) else None

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

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the next tokens to all so far, themselves included: [..., tokens, Ev], float32.

        Shapes: query, key [..., tokens, E]; value [..., tokens, Ev]; the same batch dimensions at each call.

        Raises:
            ShapeError: the shapes do not fit each other.
        """
        return self._held.attend(query, key, value)


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
    """Of an attention in FP32; and of one whose formats no kernel holds, which are encoded anew at each call."""

    def __init__(self, policy: MatmulPolicy | None) -> None:
        self.policy = policy
        self.block = 1
        self.length = 0
        self.keys = self.values = torch.empty(0)
        """[..., room, E] and [..., room, Ev]."""

    @property
    def nbytes(self) -> int:
        return sum(4 * x[..., : self.length, :].numel() for x in (self.keys, self.values) if x.dim() > 1)

    def truncate(self, length: int) -> None:
        self.length = length

    @torch.no_grad()
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape != k.shape or v.shape[:-1] != k.shape[:-1] or q.dim() < 2:
            raise ShapeError(
                "expected query and key [..., tokens, E] and value [..., tokens, Ev]; found "
                f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        tokens = k.shape[-2]
        begin, end = self.length, self.length + tokens
        if begin == 0 or end > self.keys.shape[-2]:
            room = max(_GROWTH, 2 * end)
            self.keys, self.values = _grown(self.keys, k, begin, room), _grown(self.values, v, begin, room)
        self.keys.narrow(-2, begin, tokens).copy_(k)
        self.values.narrow(-2, begin, tokens).copy_(v)
        self.length = end
        keys, values = self.keys.narrow(-2, 0, end), self.values.narrow(-2, 0, end)
        mask = None if tokens in (1, end) else _hides(tokens, end)
        causal = mask is None and tokens > 1
        if self.policy is None:
            return torch_attention(q, keys, values, mask, is_causal=causal)
        formats, roundings = self.policy.formats, self.policy.roundings
        scores = ops.product(q, -1, keys, -1, formats, roundings, 0, (0, 0), None)
        mask = None if mask is None else mask.expand(scores.shape)
        p = ops.softmax(scores, 1 / sqrt(q.shape[-1]), causal, mask, reuse=True)
        return ops.product(p, -1, values, -2, formats, roundings, 0, (0, 0), None)


def _grown(old: Tensor, like: Tensor, kept: int, room: int) -> Tensor:
    new = like.new_zeros((*like.shape[:-2], room, like.shape[-1]))
    if kept:
        new[..., :kept, :] = old[..., :kept, :]
    return new


class _Codes:
    """Of an attention whose formats the kernels hold: all of it is one call of the core."""

    def __init__(self, policy: MatmulPolicy) -> None:
        self.block = policy.right.format.block or 1
        self.grown = ops.grown_attention(policy.formats, policy.roundings)

    @property
    def length(self) -> int:
        return self.grown.length

    @property
    def nbytes(self) -> int:
        return self.grown.nbytes

    def truncate(self, length: int) -> None:
        self.grown.truncate(length)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(self.grown, q, k, v)
