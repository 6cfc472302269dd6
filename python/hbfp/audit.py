"""What share of a training step ran in fixed point: every multiply-accumulate counted, none taken on trust.

One forward and one backward pass run under a dispatch mode. Products of the integer core report themselves; products
that torch computes in floating point are seen as operators and counted by torch's own FLOP formulas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hbfp import ops
from hbfp.errors import HBFPError
from hbfp.policy import LayerState, layer_states

__all__ = ["Audit", "AuditRow", "audit"]

FP32 = 32
"""Width under which products in floating point are entered."""


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Multiply-accumulates of one kind of product in one layer."""

    layer: str
    product: str
    """"forward", "input gradient", "weight gradient", …; for floating point the operator's name."""
    formats: str
    bits: int
    """The wider operand's mantissa; 32 for floating point."""
    macs: int
    reason: str = ""
    """Why it stayed in floating point."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The multiply-accumulates (MACs) of one training step."""

    rows: tuple[AuditRow, ...]

    @property
    def macs(self) -> int:
        """All of them."""
        return sum(row.macs for row in self.rows)

    @property
    def by_width(self) -> dict[int, int]:
        """MACs by mantissa width; 32 stands for floating point."""
        return self._totals(lambda row: row.bits)

    @property
    def by_product(self) -> dict[str, int]:
        """MACs by product."""
        return self._totals(lambda row: row.product)

    @property
    def by_layer(self) -> dict[str, int]:
        """MACs by layer."""
        return self._totals(lambda row: row.layer)

    @property
    def fp32(self) -> tuple[AuditRow, ...]:
        """What was computed in floating point, with the reasons."""
        return tuple(row for row in self.rows if row.bits == FP32)

    def share(self, bits: int | None = None) -> float:
        """Fraction of all MACs at `bits` (the wider operand counts), or in fixed point of any width. 0 without MACs."""
        chosen = (row.macs for row in self.rows if (row.bits == bits if bits is not None else row.bits != FP32))
        return sum(chosen) / self.macs if self.macs else 0.0

    def require(self, share: float = 1.0) -> None:
        """Raises HBFPError unless at least this fraction of the MACs ran in fixed point; the message lists the rest."""
        if self.share() < share:
            rest = "; ".join(f"{row.layer}: {row.product}, {row.macs} MACs ({row.reason})" for row in self.fp32)
            raise HBFPError(f"expected {share:.2%} of MACs in fixed point; found {self.share():.2%}: {rest}")

    def _totals(self, key: Callable[[AuditRow], Any]) -> dict[Any, int]:
        totals: dict[Any, int] = defaultdict(int)
        for row in self.rows:
            totals[key(row)] += row.macs
        return dict(sorted(totals.items()))

    def __str__(self) -> str:
        head = ("layer", "product", "formats", "MACs", "share", "reason")
        table = [head] + [
            (row.layer, row.product, row.formats, f"{row.macs:,}", f"{row.macs / self.macs:.2%}", row.reason)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                f"{c:>{w}}" if i in (3, 4) else f"{c:<{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        width = ", ".join(
            f"{'FP32' if bits == FP32 else f'{bits}-bit'} {macs / self.macs:.2%}"
            for bits, macs in self.by_width.items()
        )
        return "\n".join(line.rstrip() for line in [*lines, f"{self.macs:,} MACs: {width or 'none'}"])


class _FloatProducts(TorchDispatchMode):
    """Sees every operator; enters those that have a FLOP formula."""

    def __init__(self, enter: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.enter = enter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.enter(func._overloadpacket.__name__, int(flops) // 2)
        return out


def audit(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None) -> Audit:
    """Counts the MACs of one training step of `model` on `inputs`, and says where they ran.

    One forward and one backward pass are computed; gradients, training modes, buffers, random generators and the step
    of random streams are as before afterwards.

    Args:
        model: any module, converted or not.
        inputs: what its forward takes.
        loss: output -> scalar; the sum of all floating outputs if None.

    Raises:
        HBFPError: the output has nothing to differentiate.
    """
    names: dict[int, str] = {}
    roots = {}
    for name, module, state in layer_states(model):
        names[id(state)] = name or type(module).__name__
        roots[id(state.root)] = state.root
    reasons = {name: reason for root in roots.values() for name, reason in root.left.items()}
    counted: dict[tuple[str, str, str, int, str], int] = defaultdict(int)
    stack: list[str] = []

    def product(entry: ops.Product) -> None:
        layer = (
            names.get(id(entry.source), "functional call")
            if isinstance(entry.source, LayerState)
            else "functional call"
        )
        formats = str(entry.left) if entry.left == entry.right else f"{entry.left} x {entry.right}"
        counted[layer, entry.name, formats, max(entry.left.bits, entry.right.bits), ""] += entry.macs

    def floating(operator: str, macs: int) -> None:
        backward = torch._C._current_graph_task_id() != -1
        layer = "backward" if backward else (stack[-1] if stack else type(model).__name__)
        reason = next((reasons[name] for name in reversed(stack) if reasons.get(name)), "")
        if not reason:
            reason = "of a product in FP32" if backward else "a functional call, or a layer that was not converted"
        counted[layer, operator, "FP32", FP32, reason] += macs

    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    steps = [(root, root.step, root.automatic) for root in roots.values()]
    handles = []
    for name, module in model.named_modules():

        def entered(_module: nn.Module, _args: Any, name: str = name) -> None:
            stack.append(name or type(model).__name__)

        def left(_module: nn.Module, _args: Any, _out: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(entered))
        handles.append(module.register_forward_hook(left, always_call=True))
    ops.recorders.append(product)
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        model.train()
        with torch.random.fork_rng(devices=()), torch.enable_grad(), _FloatProducts(floating):
            out = model(*inputs)
            total = loss(out) if loss is not None else _sum(out)
            if not total.requires_grad:
                raise HBFPError(
                    "expected an output that depends on a parameter or input with requires_grad; found none"
                )
            total.backward()
    finally:
        ops.recorders.remove(product)
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for root, step, automatic in steps:
            root.step, root.automatic = step, automatic
    return Audit(tuple(AuditRow(*key[:4], macs, key[4]) for key, macs in counted.items()))


def _sum(out: Any) -> Tensor:
    tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors:
        raise HBFPError(f"expected a tensor, or a structure of tensors, from the model; found {type(out).__name__}")
    return torch.stack([x.sum() for x in tensors]).sum()
