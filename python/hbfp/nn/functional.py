"""Fixed-point products as functions, for networks that multiply outside any module.

Each has torch's signature and a few keywords more: `recipe` says in which formats (a name, a format or a
`hbfp.Recipe`), `seed` and `stream` choose the random bits of stochastic rounding. Give each call site and each training
step a stream of its own, made by `hbfp.policy.stream(step, site)`; the same numbers give the same bits. Inputs in
float16, bfloat16 and float64 are cast; results are float32. Integers and complex numbers raise `DTypeError`, tensors
that do not fit raise `ShapeError`. Gradients are fixed-point products too; they cannot be differentiated a second time.
"""

from __future__ import annotations

from torch import Tensor

from hbfp import autograd
from hbfp.errors import HBFPError, ShapeError
from hbfp.format import HBFP
from hbfp.policy import ROLES, Recipe
from hbfp.policy import recipe as _recipe

__all__ = ["bmm", "linear", "matmul", "scaled_dot_product_attention"]

RecipeLike = str | HBFP | Recipe


def _words(seed: int, stream: int) -> None:
    if not 0 <= seed < 2**64 or not 0 <= stream < 2**64:
        raise HBFPError(f"seed and stream are unsigned 64-bit numbers; found {seed} and {stream}")
    if stream % ROLES:
        raise HBFPError(
            f"the low four bits of a stream tell operands apart and must be 0 here; found {stream}: "
            "make streams with hbfp.policy.stream(step, site)"
        )


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """input · weightᵀ + bias.

    Shapes: input [..., in], weight [out, in], bias [out]; result [..., out].
    """
    _words(seed, stream)
    return autograd.linear(input, weight, bias, _recipe(recipe), seed, stream)


def matmul(input: Tensor, other: Tensor, *, recipe: RecipeLike, seed: int = 0, stream: int = 0) -> Tensor:
    """input · other, with the meaning `torch.matmul` gives to vectors and to batch dimensions.

    Shapes: input [..., M, K] or [K], other [..., K, N] or [K]; result [..., M, N] less the dimension that a vector
    lacks. Where `other` is a matrix, the batch dimensions of `input` count as rows of one matrix.
    """
    _words(seed, stream)
    left = input.unsqueeze(0) if input.dim() == 1 else input
    right = other.unsqueeze(1) if other.dim() == 1 else other
    out = autograd.matmul(left, right, _recipe(recipe), seed, stream)
    if input.dim() == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if other.dim() == 1 else out


def bmm(input: Tensor, mat2: Tensor, *, recipe: RecipeLike, seed: int = 0, stream: int = 0) -> Tensor:
    """Batched product. Shapes: input [B, M, K], mat2 [B, K, N]; result [B, M, N]."""
    if input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0]:
        raise ShapeError(
            f"bmm takes [B, M, K] and [B, K, N]; found {tuple(input.shape)} and {tuple(mat2.shape)}: matmul broadcasts"
        )
    _words(seed, stream)
    return autograd.matmul(input, mat2, _recipe(recipe), seed, stream)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """softmax(scale · query · keyᵀ + mask) · value: both products in fixed point, the softmax in float32.

    The scores [..., L, S] are never in memory as a whole, forward or backward, and nothing but the inputs is kept for
    backward; except with dropout, where the mask requires a gradient, and for formats of tiles, of whole tensors or of
    more than 8 bits. The bits are the same either way.

    Args:
        query, key, value: [..., L, E], [..., S, E], [..., S, Ev]; batch dimensions broadcast.
        attn_mask: broadcasts to [..., L, S]; boolean (True takes part) or floats that are added to the scores. A float
            mask may require a gradient.
        dropout_p: share of the softmax's elements set to 0, drawn from torch's generator. As in torch it applies
            whenever it is not 0: pass 0.0 in evaluation.
        is_causal: row i sees columns 0 … i. Not together with a mask.
        scale: 1/√E if None.
        enable_gqa: key and value [..., G, S, …] have fewer heads than query [..., H, L, E]; each serves H / G heads of
            query in a row, H a multiple of G. Nothing is copied. The bits are those of key and value repeated
            (`repeat_interleave` along dimension -3); their gradients are sums over the heads that they serve.

    Returns:
        [..., L, Ev]. A row whose every column is masked gives 0.
    """
    _words(seed, stream)
    return autograd.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, _recipe(recipe), seed, stream, enable_gqa=enable_gqa
    )
