"""Fixed-point products as functions, for networks that multiply outside any module.

Each has torch's signature and a few keywords more: `recipe` says in which formats (a name, a format or a
`hbfp.Recipe`), `seed` and `stream` choose the random bits of stochastic rounding. Give each call site and each training
step a stream of its own, made by `hbfp.policy.stream(step, site)`; the same numbers give the same bits. Inputs in
float16, bfloat16 and float64 are cast; results are float32. Integers and complex numbers raise `DTypeError`, tensors
that do not fit raise `ShapeError`. Gradients are fixed-point products too; they cannot be differentiated a second time.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from hbfp import autograd, convolution, ops
from hbfp.convolution import Paddings, Sizes
from hbfp.errors import HBFPError, ShapeError
from hbfp.format import HBFP
from hbfp.policy import INDICES, ROLES, Recipe
from hbfp.policy import recipe as _recipe

__all__ = [
    "baddbmm",
    "bilinear",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "einsum",
    "linear",
    "matmul",
    "scaled_dot_product_attention",
]

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


def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """beta · input + alpha · batch1 · batch2: the product in fixed point, the rest in float32.

    Shapes: input broadcasts to [B, M, N], batch1 [B, M, K], batch2 [B, K, N]; result [B, M, N]. With beta 0 `input` is
    not read.
    """
    product = bmm(batch1, batch2, recipe=recipe, seed=seed, stream=stream)
    if alpha != 1.0:
        product = product * alpha
    if beta == 0.0:
        return product
    ops.require_real(input)
    added = input.to(torch.float32)
    if torch.broadcast_shapes(added.shape, product.shape) != product.shape:
        raise ShapeError(f"input must broadcast to {tuple(product.shape)}; found {tuple(input.shape)}")
    return product + (added if beta == 1.0 else added * beta)


def bilinear(
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """y_o = input1 · A_o · input2 + bias_o, as two products.

    First T = input2 · Aᵀ, a linear layer whose weight is `weight` seen as [out · in1, in2]; then, for each row,
    y = T · input1, a batched product with in1 as its reduction. Their gradients are those of a linear layer and of a
    batched product. The bias is added in float32.

    Shapes: input1 [..., in1], input2 [..., in2], weight [out, in1, in2], bias [out]; result [..., out].
    """
    _words(seed, stream)
    return bilinear_products(input1, input2, weight, bias, _recipe(recipe), seed, stream)


SECOND = 8
"""What the roles of a bilinear layer's second product have more than those of its first."""


def bilinear_products(
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    seed: int,
    stream: int,
    source: object = None,
) -> Tensor:
    """`bilinear` for a layer, which names itself as the source of the products."""
    if (
        weight.dim() != 3
        or input1.dim() == 0
        or input1.shape[:-1] != input2.shape[:-1]
        or (input1.shape[-1], input2.shape[-1]) != tuple(weight.shape[1:])
    ):
        raise ShapeError(
            "bilinear takes input1 [..., in1], input2 [..., in2] and weight [out, in1, in2]; found "
            f"{tuple(input1.shape)}, {tuple(input2.shape)} and {tuple(weight.shape)}"
        )
    ops.require_real(input1, input2, weight, bias)
    outputs, in1, _ = weight.shape
    batch = input1.shape[:-1]
    rows = prod(batch)
    x1, x2 = input1.reshape(rows, 1, in1), input2.reshape(rows, input2.shape[-1])
    per_row = autograd.linear(x2, weight.flatten(0, 1), None, recipe, seed, stream, source)
    tables = per_row.view(rows, outputs, in1).transpose(1, 2)
    out = autograd.matmul(x1, tables, recipe, seed, stream | SECOND, source).view(*batch, outputs)
    return out if bias is None else out + bias


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Paddings = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    flatten: bool | None = None,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """A convolution, with the meaning that torch gives to its arguments.

    Shapes: input [N, C, H, W] or [C, H, W], weight [Co, C/groups, kh, kw], bias [Co]; result [N, Co, Ho, Wo] or
    [Co, Ho, Wo], the channels of one pixel together in memory (torch's channels_last), whichever way the input lies.

    Args:
        stride, dilation: one number, or one for each spatial dimension.
        padding: the same, or "same" (stride 1: as many output pixels as input pixels, an odd zero after the pixels) or
            "valid" (none).
        flatten: how forward blocks lie: True, over the flattened patch (kh, kw, C/groups); False, along the channels
            at one tap of the kernel; None, over the patch where a group has fewer than 16 channels.

    Raises:
        FormatError: the recipe has tiles or whole tensors, which convolutions do not.
    """
    _words(seed, stream)
    return convolution.convolution(
        input, weight, bias, 2, stride, padding, dilation, groups, flatten, _recipe(recipe), seed, stream
    )


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Paddings = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    flatten: bool | None = None,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """`conv2d` with one spatial dimension: input [N, C, L], weight [Co, C/groups, kl]."""
    _words(seed, stream)
    return convolution.convolution(
        input, weight, bias, 1, stride, padding, dilation, groups, flatten, _recipe(recipe), seed, stream
    )


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Paddings = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    flatten: bool | None = None,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """`conv2d` with three spatial dimensions: input [N, C, D, H, W], weight [Co, C/groups, kd, kh, kw]."""
    _words(seed, stream)
    return convolution.convolution(
        input, weight, bias, 3, stride, padding, dilation, groups, flatten, _recipe(recipe), seed, stream
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """A transposed convolution, with the meaning that torch gives to its arguments.

    Its products are those of the ordinary convolution whose gradient it is; none is flattened.

    Shapes: input [N, C, H, W] or [C, H, W], weight [C, Co/groups, kh, kw], bias [Co]; result [N, Co, Ho, Wo] or
    [Co, Ho, Wo], the channels of one pixel together in memory.

    Args:
        stride, padding, output_padding, dilation: one number, or one for each spatial dimension. An output padding is
            less than the stride or the dilation.

    Raises:
        FormatError: the recipe has tiles or whole tensors, which convolutions do not.
    """
    _words(seed, stream)
    return convolution.transposed_convolution(
        input, weight, bias, 2, stride, padding, output_padding, groups, dilation, _recipe(recipe), seed, stream
    )


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """`conv_transpose2d` with one spatial dimension: input [N, C, L]."""
    _words(seed, stream)
    return convolution.transposed_convolution(
        input, weight, bias, 1, stride, padding, output_padding, groups, dilation, _recipe(recipe), seed, stream
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    recipe: RecipeLike,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """`conv_transpose2d` with three spatial dimensions: input [N, C, D, H, W]."""
    _words(seed, stream)
    return convolution.transposed_convolution(
        input, weight, bias, 3, stride, padding, output_padding, groups, dilation, _recipe(recipe), seed, stream
    )


def einsum(equation: str, *operands: Tensor, recipe: RecipeLike, seed: int = 0, stream: int = 0) -> Tensor:
    """`torch.einsum` with its products in fixed point.

    Two operands are brought into the form [batch, M, K] · [batch, K, N] and multiplied as by `matmul`: the batch are
    the indices of both operands that the result keeps, in its order; K those of both that it does not keep, in the
    left operand's order; M and N those of one operand, in its own order. An index twice in one operand takes the
    diagonal, and one that only a single operand has and the result does not is summed in float32 first. If no index
    would be summed, neither here nor in a gradient (every index in both operands and in the result), it is an
    elementwise product in float32.

    More than two operands are multiplied from left to right, the stream's index one higher for each further product.

    Args:
        equation: as in torch, with "..." and with or without "->"; upper and lower case letters.
        operands: one or more. One alone is no product, and is computed by torch.

    Raises:
        ShapeError: equation and operands do not fit.
    """
    _words(seed, stream)
    chosen = _recipe(recipe)
    ops.require_real(*operands)
    inputs, output = _parse(equation, operands)
    left, labels = operands[0].to(torch.float32), inputs[0]
    if len(operands) == 1:
        return _arrange(*_reduce(left, labels, output), output)
    for place, right in enumerate(operands[1:], 1):
        wanted = "".join(dict.fromkeys(output + "".join(inputs[place + 1 :])))
        right, found = right.to(torch.float32), inputs[place]
        left, labels = _pair(left, labels, right, found, wanted, chosen, seed, _indexed(stream, place - 1))
    return _arrange(left, labels, output)


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
    backward; except for formats of tiles, of whole tensors or of more than 8 bits, and for a mask with a gradient but
    only one value a row. The bits are the same either way.

    Args:
        query, key, value: [..., L, E], [..., S, E], [..., S, Ev]; batch dimensions broadcast.
        attn_mask: broadcasts to [..., L, S]; boolean (True takes part) or floats that are added to the scores. A float
            mask may require a gradient, which is summed on the fly where the mask was broadcast.
        dropout_p: share of the softmax's elements set to 0, in steps of 2^-16; the others are multiplied by the inverse
            of the share that is kept. Which ones says a seed that each call draws from torch's generator of the CPU, so
            `torch.manual_seed` repeats them, on every device. As in torch it applies whenever it is not 0: pass 0.0 in
            evaluation.
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


# --- einsum ----------------------------------------------------------------------------------------------------------

_BROADCAST = [chr(code) for code in range(0x3B1, 0x3C9)]
"""Labels for the dimensions of "...", which the user cannot type as indices."""


def _parse(equation: str, operands: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """One letter for each dimension of each operand, and those of the result."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    shapes = ", ".join(str(tuple(x.shape)) for x in operands)
    if not operands or len(terms) != len(operands):
        raise ShapeError(f"einsum {equation!r} has {len(terms)} operands; found {len(operands)}: {shapes}")
    inputs = []
    for term, operand in zip(terms, operands, strict=True):
        named = term.replace("...", "", 1)
        hidden = operand.dim() - len(named)
        if not all(c.isascii() and c.isalpha() for c in named) or hidden < 0 or (hidden and "..." not in term):
            raise ShapeError(
                f"einsum {equation!r}: {term!r} does not describe an operand of shape {tuple(operand.shape)}"
            )
        # The dots of operands with fewer dimensions are aligned to the right.
        inputs.append(term.replace("...", "".join(_BROADCAST[-hidden:] if hidden else "")))
    known = "".join(inputs)
    dots = "".join(label for label in _BROADCAST if label in known)
    if arrow:
        output = right.replace("...", dots, 1)
    else:
        output = dots + "".join(sorted(c for c in set(known) - set(dots) if known.count(c) == 1))
    if len(set(output)) != len(output) or not set(output) <= set(known):
        raise ShapeError(f"einsum {equation!r}: the result repeats an index or names one that no operand has")
    sizes: dict[str, int] = {}
    for labels, operand in zip(inputs, operands, strict=True):
        for label, size in zip(labels, operand.shape, strict=True):
            if size != 1 and sizes.setdefault(label, size) != size:
                raise ShapeError(f"einsum {equation!r}: one index has the sizes {sizes[label]} and {size} in {shapes}")
    return inputs, output


def _indexed(stream: int, further: int) -> int:
    """The stream with its index `further` higher, modulo 256."""
    index = (stream >> 4) + further & INDICES - 1
    return stream & ~((INDICES - 1) << 4) | index << 4


def _reduce(x: Tensor, labels: str, wanted: str) -> tuple[Tensor, str]:
    """Diagonals taken of indices that come twice, and those summed that nobody wants."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            first = labels.index(label)
            second = labels.index(label, first + 1)
            if x.shape[first] != x.shape[second]:
                raise ShapeError(
                    f"einsum: an index repeated in one operand has sizes {x.shape[first]}, {x.shape[second]}"
                )
            x = x.diagonal(0, first, second)
            labels = labels[:first] + labels[first + 1 : second] + labels[second + 1 :] + label
    summed = [place for place, label in enumerate(labels) if label not in wanted]
    if summed:
        x = x.sum(summed)
        labels = "".join(label for label in labels if label in wanted)
    return x, labels


def _pair(
    a: Tensor, a_labels: str, b: Tensor, b_labels: str, wanted: str, recipe: Recipe, seed: int, stream: int
) -> tuple[Tensor, str]:
    """The product of two operands with the indices `wanted` later, and the indices of its dimensions."""
    a, a_labels = _reduce(a, a_labels, wanted + b_labels)
    b, b_labels = _reduce(b, b_labels, wanted + a_labels)
    # A size of 1 opposite a larger one is broadcast: an index to contract is then the other operand's alone.
    sizes_a, sizes_b = dict(zip(a_labels, a.shape, strict=True)), dict(zip(b_labels, b.shape, strict=True))
    stretched = [label for label in a_labels if label in sizes_b and sizes_a[label] != sizes_b[label]]
    for label in stretched:
        if sizes_a[label] == 1:
            a = a.squeeze(a_labels.index(label))
            a_labels = a_labels.replace(label, "")
        else:
            b = b.squeeze(b_labels.index(label))
            b_labels = b_labels.replace(label, "")
    if stretched:
        a, a_labels = _reduce(a, a_labels, wanted + b_labels)
        b, b_labels = _reduce(b, b_labels, wanted + a_labels)

    both = [label for label in a_labels if label in b_labels]
    batch = [label for label in wanted if label in both]
    contracted = [label for label in both if label not in wanted]
    left = [label for label in a_labels if label not in both]
    right = [label for label in b_labels if label not in both]
    if not contracted and not left and not right:
        return _arrange(a, a_labels, "".join(batch)) * _arrange(b, b_labels, "".join(batch)), "".join(batch)
    size = {**dict(zip(a_labels, a.shape, strict=True)), **dict(zip(b_labels, b.shape, strict=True))}
    many, m, k, n = (prod(size[label] for label in group) for group in (batch, left, contracted, right))
    stacked = [many] if batch else []
    a = _arrange(a, a_labels, "".join(batch + left + contracted)).reshape(*stacked, m, k)
    b = _arrange(b, b_labels, "".join(batch + contracted + right)).reshape(*stacked, k, n)
    labels = "".join(batch + left + right)
    out = autograd.matmul(a, b, recipe, seed, stream)
    return out.reshape([size[label] for label in labels]), labels


def _arrange(x: Tensor, labels: str, wanted: str) -> Tensor:
    """The dimensions in the order wanted."""
    return x.permute([labels.index(label) for label in wanted])
