"""Convolution layers whose three products run in fixed point."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hbfp.convolution import FLATTENED_BELOW, Paddings, convolution, pad, require_lines, transposed_convolution
from hbfp.format import HBFP
from hbfp.nn.functional import RecipeLike
from hbfp.nn.precision import as_wide_as
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, Weight, solo_state

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


class _Convolution(_ConvNd):
    """What Conv1d, Conv2d and Conv3d share: all of it."""

    hbfp_state: LayerState | None = None
    """None: the layer computes in FP32, as torch's does."""

    hbfp_accepts = staticmethod(require_lines)
    """Raises for a recipe that the layer has no products for."""

    flatten: bool | None = None
    """Whether forward blocks run over the flattened patch; None: where a group has fewer than 16 channels."""

    def __init__(
        self,
        *args: Any,
        flatten: bool | None = None,
        recipe: RecipeLike = "hbfp4",
        seed: int = 0,
        site: int = 0,
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self.flatten = flatten
        self.hbfp_state = solo_state(recipe, seed, site)
        require_lines(self.hbfp_state.recipe)

    def hbfp_weights(self, format: HBFP) -> list[Weight]:
        """The weight, blocked along the channels at each tap; a flattened patch has blocks that no axis has."""
        channels, taps = self.in_channels // self.groups, prod(self.kernel_size)
        flat = channels < FLATTENED_BELOW if self.flatten is None else self.flatten
        return [Weight(self, "weight", 1, format.block is not None and (not flat or taps == 1), self.groups)]

    def forward(self, input: Tensor) -> Tensor:
        state = self.hbfp_state
        if state is None:
            out: Tensor = super().forward(input)
            return out
        if isinstance(input, Proxy):
            return cast(Tensor, node(self, input))
        if state.solo and self.training:
            state.root.advance()
        given, rank, padding = input, len(self.kernel_size), cast(Paddings, self.padding)
        if self.padding_mode != "zeros":
            input, padding = pad(input, rank, self._reversed_padding_repeated_twice, self.padding_mode), 0
        try:  # as in Linear
            weight: Any = self._parameters["weight"]
            bias: Tensor | None = self._parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        out = convolution(
            input, weight, bias, rank, self.stride, padding, self.dilation, self.groups, self.flatten,
            state.recipe, state.root.seed, state.stream(), state,
        )  # fmt: skip
        return out if given.dtype is torch.float32 else as_wide_as(given, out)

    def extra_repr(self) -> str:
        flatten = "" if self.flatten is None else f", flatten={self.flatten}"
        state = self.hbfp_state
        shape: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shape}{flatten}, {'FP32' if state is None else state.recipe.formats}"


class _TransposedConvolution(_ConvTransposeNd):
    """What ConvTranspose1d, ConvTranspose2d and ConvTranspose3d share: all of it."""

    hbfp_state: LayerState | None = None
    """None: the layer computes in FP32, as torch's does."""

    hbfp_accepts = staticmethod(require_lines)
    """Raises for a recipe that the layer has no products for."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_state = solo_state(recipe, seed, site)
        require_lines(self.hbfp_state.recipe)

    def hbfp_weights(self, format: HBFP) -> list[Weight]:
        """The weight, blocked along the channels of the input at each tap: as the axis is, where groups end blocks."""
        whole = format.block is not None and (self.groups == 1 or self.in_channels // self.groups % format.block == 0)
        return [Weight(self, "weight", 0, whole, self.groups)]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        state = self.hbfp_state
        if state is None:
            out: Tensor = super().forward(input, output_size)
            return out
        if isinstance(input, Proxy):
            return cast(Tensor, node(self, input, output_size))
        if state.solo and self.training:
            state.root.advance()
        rank, padding = len(self.kernel_size), cast(tuple[int, ...], self.padding)
        stride, kernel, dilation = list(self.stride), list(self.kernel_size), list(self.dilation)
        output_padding = self._output_padding(input, output_size, stride, list(padding), kernel, rank, dilation)
        out = transposed_convolution(
            input, self.weight, self.bias, rank, self.stride, padding, output_padding, self.groups, self.dilation,
            state.recipe, state.root.seed, state.stream(), state,
        )  # fmt: skip
        return as_wide_as(input, out)

    def extra_repr(self) -> str:
        shape: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shape}, {'FP32' if self.hbfp_state is None else self.hbfp_state.recipe.formats}"


class Conv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` in fixed point; see `Conv2d`. Shapes: input [N, C, L]; output [N, Co, Lo]."""


class Conv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` in fixed point: same parameters, same state_dict, same initialisation.

    The products are those of `hbfp.nn.functional.conv2d`. A padding by other values than zeros is applied first, in
    float32.

    Args:
        args, keywords: as in `torch.nn.Conv2d`.
        flatten: whether forward blocks run over the flattened patch (True) or along the channels at one tap of the
            kernel (False); None: over the patch where a group has fewer than 16 channels. Also an attribute, which a
            converted layer may be given.
        recipe: a name, a format or a `hbfp.Recipe`, whose blocks are lines.
        seed: of stochastic rounding.
        site: tells the random bits of this layer from those of other layers with the same seed, 0 … 2^20 − 1.

    Shapes: input [N, C, H, W] or [C, H, W] of any real floating dtype; output [N, Co, Ho, Wo] or [Co, Ho, Wo], float32,
    or in the input's dtype if that is bfloat16 or float16, unless autocasting.
    """


class Conv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` in fixed point; see `Conv2d`. Shapes: input [N, C, D, H, W]; output [N, Co, Do, Ho, Wo]."""


class ConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` in fixed point; see `ConvTranspose2d`. Shapes: input [N, C, L]; output [N, Co, Lo]."""


class ConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` in fixed point: same parameters, same state_dict, same initialisation.

    The products are those of `hbfp.nn.functional.conv_transpose2d`.

    Args:
        args, keywords: as in `torch.nn.ConvTranspose2d`.
        recipe, seed, site: as in `Conv2d`.

    Shapes: input [N, C, H, W] or [C, H, W] of any real floating dtype; output [N, Co, Ho, Wo] or [Co, Ho, Wo], float32,
    or in the input's dtype if that is bfloat16 or float16, unless autocasting.
    """


class ConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` in fixed point; see `ConvTranspose2d`.

    Shapes: input [N, C, D, H, W]; output [N, Co, Do, Ho, Wo].
    """
