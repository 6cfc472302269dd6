"""What share of a training step ran in fixed point: every multiply-accumulate counted, none taken on trust.

One forward and one backward pass run under a dispatch mode. Products of the integer core report themselves; products
that torch computes in floating point are seen as operators and counted by torch's own FLOP formulas, or by those below
for the operators that torch has none for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hbfp import ops
from hbfp.emulation import emulating
from hbfp.errors import HBFPError
from hbfp.nn.report import table
from hbfp.policy import RootState, layer_states

__all__ = ["Audit", "AuditRow", "audit"]

FP32 = 32
"""Width under which products in floating point are entered."""

UNCONVERTED = "a functional call, or a layer that was not converted"


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Multiply-accumulates of one kind of product in one layer."""

    layer: str
    product: str
    """"forward", "input gradient", "weight gradient", …; in floating point the operator, and whether backward."""
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
        lines = [
            (row.layer, row.product, row.formats, f"{row.macs:,}", f"{row.macs / self.macs:.2%}", row.reason)
            for row in self.rows
        ]
        width = ", ".join(
            f"{'FP32' if bits == FP32 else f'{bits}-bit'} {macs / self.macs:.2%}"
            for bits, macs in self.by_width.items()
        )
        return "\n".join([table(head, lines, right=(3, 4)), f"{self.macs:,} MACs: {width or 'none'}"])


def _recurrent(*args: Any, **_: Any) -> int:
    """One layer and direction: both weight matrices meet every row of every step."""
    x, input_weight, hidden_weight = args[:3]
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return int(rows * (input_weight.numel() + hidden_weight.numel()))


def _trilinear(*args: Any, **_: Any) -> int:
    tensors, expanded = args[:3], args[3:6]
    shapes = []
    for x, dimensions in zip(tensors, expanded, strict=True):
        shape = list(x.shape)
        for dimension in sorted(dimensions):
            shape.insert(dimension, 1)
        shapes.append(shape)
    return prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _convolution_in_time(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return out_val.numel() * weight.shape[0] * weight.shape[1]


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    """For each product every tap of every output pixel; torch's formula takes no notice of groups in the second one."""
    transposed, wanted = rest[4], rest[7]
    pixels = x if transposed else dy
    return int(sum(wanted[:2]) * pixels.shape[0] * prod(pixels.shape[2:]) * weight.numel())


_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda a, x, **_: a.numel(),
    _aten.addmv: lambda y, a, x, **_: a.numel(),
    _aten.dot: lambda x, y, **_: x.numel(),
    _aten.vdot: lambda x, y, **_: x.numel(),
    _aten.addr: lambda c, x, y, **_: x.numel() * y.numel(),
    _aten.addbmm: lambda c, a, b, **_: a.numel() * b.shape[-1],
    _aten._addmm_activation: lambda c, a, b, **_: a.numel() * b.shape[-1],
    _aten._trilinear: _trilinear,
    _aten.mkldnn_rnn_layer: _recurrent,
    _aten.mkldnn_rnn_layer_backward: lambda *args, **_: 2 * _recurrent(*args),
    _aten.convolution_backward: _convolution_backward,
    _aten.conv_tbc: _convolution_in_time,
    _aten.conv_tbc_backward: lambda dy, x, w, *_, **__: 2 * dy.numel() * w.shape[0] * w.shape[1],
}
"""MACs of the products that torch's counter has no right formula for; one that is missing here would go unseen."""


class _FloatProducts(TorchDispatchMode):
    """Sees every operator; enters those that compute products."""

    def __init__(self, enter: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.enter = enter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if emulating():
            return out  # told by `ops.recorders`, as the product that it stands for
        operator = func._overloadpacket
        if operator in _FORMULAS:
            self.enter(operator.__name__, _FORMULAS[operator](*args, **kwargs, out_val=out))
        elif operator in flop_registry:
            self.enter(operator.__name__, int(flop_registry[operator](*args, **kwargs, out_val=out)) // 2)
        return out


class _Whereabouts:
    """Which module is computing, forward or backward: the innermost last.

    A module's backward begins when the gradients of its outputs are known and ends when those of its inputs are; one
    whose inputs need no gradient stays open until another begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self.handles.append(module.register_forward_hook(partial(self._leave, name), always_call=True))

    @property
    def now(self) -> list[str]:
        return self.backward if torch._C._current_graph_task_id() != -1 else self.forward

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str, _module: nn.Module, inputs: Any) -> None:
        self.now.append(name)
        self._when_known(inputs, partial(self._close, name))

    def _leave(self, name: str, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        if self.now and self.now[-1] == name:
            self.now.pop()
        self._when_known(outputs, partial(self._open, name))

    def _when_known(self, values: Any, action: Callable[..., None]) -> None:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.requires_grad]
        if tensors:
            self.handles.append(register_multi_grad_hook(tensors, action))

    def _open(self, name: str, _gradients: Any) -> None:
        # A module and the one around it may return the same tensor, whose hooks run innermost first.
        place = len(self.backward)
        while place and (not name or self.backward[place - 1].startswith(f"{name}.")):
            place -= 1
        self.backward.insert(place, name)

    def _close(self, name: str, _gradients: Any) -> None:
        if name in self.backward:
            # Only itself: the module whose output this input was is open by now.
            del self.backward[len(self.backward) - 1 - self.backward[::-1].index(name)]


def audit(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None) -> Audit:
    """Counts the MACs of one training step of `model` on `inputs`, and says where they ran.

    One forward and one backward pass are computed, in training mode; gradients (of parameters and of inputs), training
    modes, buffers, random generators and the step of random streams are as before afterwards.

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
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        root: RootState | None = module.__dict__.get("hbfp_root")
        for left, reason in (root.left if root is not None else {}).items():
            reasons[".".join(part for part in (name, left) if part)] = reason
    counted: dict[tuple[str, str, str, int, str], int] = defaultdict(int)
    whereabouts = _Whereabouts(model)

    def product(entry: ops.Product) -> None:
        layer = names.get(id(entry.source), "functional call")
        formats = str(entry.left) if entry.left == entry.right else f"{entry.left} × {entry.right}"
        counted[layer, entry.name, formats, max(entry.left.bits, entry.right.bits), ""] += entry.macs

    def floating(operator: str, macs: int) -> None:
        inside = whereabouts.now
        layer = (inside[-1] if inside else "") or type(model).__name__
        reason = next((reasons[name] for name in reversed(inside) if reasons.get(name)), "")
        if whereabouts.now is whereabouts.backward:
            operator += ", backward"
        counted[layer, operator, "FP32", FP32, reason or UNCONVERTED] += macs

    modes = [(module, module.training) for module in model.modules()]
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_leaf]
    gradients = [(leaf, leaf.grad) for leaf in (*model.parameters(), *leaves)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    steps = [(root, root.step, root.automatic) for root in roots.values()]
    ops.recorders.append(product)
    try:
        for leaf, _ in gradients:
            leaf.grad = None
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
        whereabouts.remove()
        for module, training in modes:
            module.training = training
        for leaf, gradient in gradients:
            leaf.grad = gradient
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
