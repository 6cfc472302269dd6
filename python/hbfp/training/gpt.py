"""A character-level GPT: the decoder-only transformer of Radford et al. 2019 (pre-norm, GELU, learned positions).

Every product with a weight is an `nn.Linear` and both products of attention sit in `hbfp.nn.DotProductAttention`, so
`hbfp.convert_` turns all of them into integer products; looking up an embedding is not a product. The output layer has
weights of its own: a tied one would put one parameter under two formats. It has no bias, as theirs has none.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hbfp.errors import HBFPError
from hbfp.nn import DotProductAttention, KeyValueCache
from hbfp.nn.residual import Residual, Step, hooked

HEAD_WIDTH = 64


@dataclass(frozen=True, slots=True)
class GPTShape:
    """Sizes of the model; `width` is a multiple of the 64 columns of a head."""

    vocabulary: int
    layers: int = 4
    width: int = 256
    context: int = 128

    def __post_init__(self) -> None:
        if self.width < HEAD_WIDTH or self.width % HEAD_WIDTH:
            raise HBFPError(f"the width is a multiple of {HEAD_WIDTH} (heads of {HEAD_WIDTH}), not {self.width}")
        for name in ("vocabulary", "layers", "context"):
            if getattr(self, name) < 1:
                raise HBFPError(f"{name} is at least 1, not {getattr(self, name)}")

    @property
    def heads(self) -> int:
        return self.width // HEAD_WIDTH


class Norm(nn.LayerNorm):
    """`torch.nn.LayerNorm` without the detours of its forward, which cost a token as much as the sums themselves."""

    def forward(self, input: Tensor) -> Tensor:
        parameters = self._parameters
        return torch.layer_norm(input, self.normalized_shape, parameters["weight"], parameters["bias"], self.eps)

    def step(self) -> Step:
        """The same, for `hbfp.nn.residual`."""
        return torch.layer_norm, (self.normalized_shape, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Attention and a four times wider perceptron, each normed before and added after: [batch, time, width] to same."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = Norm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention = DotProductAttention()
        self.proj = nn.Linear(shape.width, shape.width)
        self.mlp_norm = Norm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, HEAD_WIDTH)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = self.attention(query, key, value, is_causal=True) if cache is None else cache(query, key, value)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        mlp: Tensor = self.down(self.gelu(self.up(self.mlp_norm(x))))
        return x + mlp

    def branches(self, cache: KeyValueCache) -> list[list[Step]]:
        """The same for one token, as `hbfp.nn.residual.Residual` takes it."""
        return [
            [self.attention_norm.step(), self.qkv, (cache, self.heads), self.proj],
            [self.mlp_norm.step(), self.up, (nn.functional.gelu, ()), self.down],
        ]


class Caches(list[KeyValueCache]):
    """The past of a text: a cache for each block, and the way of a single token through all of them to its scores."""

    def __init__(self, caches: Iterable[KeyValueCache] = (), residual: Residual | None = None) -> None:
        super().__init__(caches)
        # A copy of the list has caches of its own, and goes the long way.
        self._residual = residual
        self._of = list(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Caches":
        return Caches(copy.deepcopy(list(self), memo))

    def scores(self, x: Tensor) -> Tensor | None:
        """Of a token x [1, 1, width], in one call; None where it has to go through the modules."""
        return None if self._residual is None or self._of != self else self._residual(x)


class GPT(nn.Module):
    """Codes [batch, time], int64, time up to the context -> scores of the next character [batch, time, vocabulary]."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.shape = shape
        self.characters = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        # Radford et al. 2019: 0.02 everywhere, and each branch thinner by the square root of how many are added up.
        branch = 0.02 / (2 * self.shape.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=branch if name.endswith(("proj.weight", "down.weight")) else 0.02)

    def caches(self) -> Caches:
        """An empty cache for each block, in the formats in force.

        Those of a frozen model in evaluation lead its tokens past the modules: change weights, formats or hooks, and
        ask for new ones.
        """
        blocks = [cast(Block, block) for block in self.blocks]
        caches = [KeyValueCache(block.attention) for block in blocks]
        passed = [*self.blocks.modules(), self.norm, self.head]
        if any(module.training or hooked(module) for module in passed):
            return Caches(caches)
        branches = [branch for block, cache in zip(blocks, caches, strict=True) for branch in block.branches(cache)]
        return Caches(caches, Residual.of(branches, [self.norm.step(), self.head]))

    def forward(self, codes: Tensor) -> Tensor:
        return self._scores(codes, 0, None)

    def extend(self, codes: Tensor, caches: Sequence[KeyValueCache]) -> Tensor:
        """Scores of the codes that come next in each text: `caches`, of `self.caches()`, hold those before."""
        return self._scores(codes, caches[0].length, caches)

    def _scores(self, codes: Tensor, past: int, caches: Sequence[KeyValueCache] | None) -> Tensor:
        x = self.characters(codes) + self.positions.weight[past : past + codes.shape[-1]]
        if isinstance(caches, Caches) and x.shape[:2] == (1, 1):
            quick = caches.scores(x)
            if quick is not None:
                return quick
        for number, block in enumerate(self.blocks):
            x = block(x) if caches is None else block(x, caches[number])
        scores: Tensor = self.head(self.norm(x))
        return scores
