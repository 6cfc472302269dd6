"""The residual stream of a frozen transformer for the next token of a text: one call of the core.

A product of one row takes a few microseconds, and so does the way from one module to the next. Here the core goes it:
it multiplies and attends as the modules would, calls torch's own functions for what stands between, and adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, is_grad_enabled, nn

from hbfp import autograd, ops
from hbfp.nn.cache import KeyValueCache
from hbfp.nn.linear import Linear
from hbfp.ops.entrance import direct, dispatch_modes, threads
from hbfp.packed import PackedWeight
from hbfp.policy import Backend

__all__ = ["Residual", "Step", "hooked"]

Step = nn.Linear | tuple[KeyValueCache, int] | tuple[Callable[..., Tensor], Sequence[Any]]
"""What a branch does next: a layer; attention, with so many heads, to queries, keys and values side by side; or
a function, which is given the tensor and these arguments."""


class Residual:
    """x + f(x), branch after branch, for one token x [1, 1, width], and the steps of an end: the bits of the modules.

    Parameters, formats and modules are those of the time when it was made.
    """

    def __init__(self, core: ops.ResidualStream) -> None:
        self._core = core

    @staticmethod
    def of(branches: Sequence[Sequence[Step]], end: Sequence[Step] = ()) -> Residual | None:
        """Of branches that each end with a layer, and an end that does, too, or is none. Functions among the steps keep
        nothing of what they are given.

        None: a layer is not frozen, rounds stochastically, or has a bias of another dtype; or a cache holds floats.
        """
        made: list[list[tuple[Any, ...]]] = []
        for branch in (*branches, end):
            steps = [_core_step(step) for step in branch]
            if None in steps:
                return None
            made.append([step for step in steps if step is not None])
        return Residual(ops.ResidualStream(made[:-1], made[-1]))

    def __call__(self, x: Tensor) -> Tensor | None:
        """None, and nothing done, where somebody counts, traces or differentiates, and where x is not as usual."""
        if ops.recorders or is_grad_enabled() or dispatch_modes() or not autograd.unseen(x, x, None):
            return None
        out: Tensor | None = self._core(x, threads())
        return out


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module calls somebody else, too."""
    everywhere = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )


def _core_step(step: Step) -> tuple[Any, ...] | None:
    if isinstance(step, nn.Module):
        return _product(step)
    first = step[0]
    if isinstance(first, KeyValueCache):
        return None if first.grown is None else (first.grown, step[1])
    return first, list(cast(Sequence[Any], step[1]))


def _product(layer: nn.Linear) -> tuple[Any, ...] | None:
    state = layer.hbfp_state if type(layer) is Linear else None
    weight: Tensor | None = layer._parameters.get("weight")
    bias = layer._parameters.get("bias")
    if state is None or layer.training or type(weight) is not PackedWeight:
        return None
    policy = state.recipe.forward
    if state.recipe.backends.forward is not Backend.INTEGER or policy.left.rounding.code == 3:
        return None
    if bias is not None and not (direct(bias) and bias.dtype is torch.float32 and bias.is_cpu):
        return None
    matrix = weight.kept_matrix()
    if matrix is None or policy.right.format != weight.format:
        return None
    return matrix, bias, policy.left.format.core, policy.left.rounding.code
