"""What share of a training step ran in fixed point: every multiply-accumulate counted, none taken on trust.

One forward and one backward pass run under a dispatch mode. Products of the integer core report themselves; products
that torch computes in floating point are seen as operators and counted by torch's own FLOP formulas, or by those below
for the operators that torch has none for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
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
from hbfp.nn.conversion import LAYERS
from hbfp.policy import RootState, layer_states
from hbfp.tables import table

__all__ = ["Audit", "AuditRow", "audit"]

FP32 = 32
"""Width under which products in floating point are entered."""

FUNCTIONAL = "a functional call outside a layer: see hbfp.nn.functional"
NOT_CONVERTED = "not converted: see hbfp.convert_"
OF_THE_LOSS = "(loss)"
"""Stands for a layer where the products are those of the loss."""


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Multiply-accumulates of one kind of product in one layer."""

    layer: str
    """Its name in the model; for a functional call that of the module which made it."""
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
    """The multiply-accumulates (MACs) of one training step.

    Prints as a table of its rows, those of a layer together, and one of products by width. Plain values all through:
    `json.dumps(dataclasses.asdict(audit))` writes it, and `Audit.of(json.loads(...))` reads it.
    """

    rows: tuple[AuditRow, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Audit:
        """The audit that `dataclasses.asdict` made `values` of."""
        return cls(tuple(AuditRow(**row) for row in values["rows"]))

    @property
    def macs(self) -> int:
        """All of them."""
        return sum(row.macs for row in self.rows)

    @property
    def by_width(self) -> dict[int, int]:
        """MACs by mantissa width; 32 stands for floating point."""
        return self._totals(lambda row: row.bits)

    @property
    def shares(self) -> dict[int, float]:
        """Fraction of all MACs by mantissa width; 32 stands for floating point."""
        return {bits: self._fraction(macs) for bits, macs in self.by_width.items()}

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
        return self._fraction(sum(chosen))

    def require(self, share: float = 1.0) -> None:
        """Raises HBFPError unless at least this fraction of the MACs ran in fixed point; the message lists the rest."""
        if self.share() < share:
            rest = "; ".join(f"{row.layer}: {row.product}, {row.macs} MACs ({row.reason})" for row in self.fp32)
            raise HBFPError(f"expected {share:.2%} of MACs in fixed point; found {self.share():.2%}: {rest}")

    def _fraction(self, macs: int) -> float:
        return macs / self.macs if self.macs else 0.0

    def _totals(self, key: Callable[[AuditRow], Any]) -> dict[Any, int]:
        totals: dict[Any, int] = defaultdict(int)
        for row in self.rows:
            totals[key(row)] += row.macs
        return dict(sorted(totals.items()))

    def __str__(self) -> str:
        head = ("layer", "product", "formats", "MACs", "share", "reason")
        lines = [
            (row.layer, row.product, row.formats, f"{row.macs:,}", f"{self._fraction(row.macs):.2%}", row.reason)
            for row in self.rows
        ]
        width = ", ".join(f"{_width(bits)} {share:.2%}" for bits, share in self.shares.items())
        return "\n".join(
            [
                table(head, lines, right=(3, 4)),
                "",
                self._products_by_width(),
                "",
                f"{self.macs:,} MACs: {width or 'none'}",
            ]
        )

    def _products_by_width(self) -> str:
        widths = list(self.by_width)
        cells = self._totals(lambda row: (row.product, row.bits))
        order = {product: place for place, product in enumerate(dict.fromkeys(row.product for row in self.rows))}
        lines = [
            (product, *(f"{cells.get((product, bits), 0):,}" for bits in widths), f"{total:,}")
            for product, total in sorted(self.by_product.items(), key=lambda item: order[item[0]])
        ]
        lines.append(("all", *(f"{macs:,}" for macs in self.by_width.values()), f"{self.macs:,}"))
        head = ("product", *(_width(bits) for bits in widths), "all")
        return table(head, lines, right=range(1, len(head)))


def _width(bits: int) -> str:
    return "FP32" if bits == FP32 else f"{bits}-bit"


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


@lru_cache(maxsize=1024)
def _formula(operator: Any) -> Callable[..., int] | None:
    """MACs of an operator's call from its arguments and its result; None if it computes no products."""
    name = str(operator.__name__)
    plain = getattr(_aten, name[:-1], None) if operator is getattr(_aten, name, None) and name[-1:] == "_" else None
    for known in (operator, plain):  # addmm_ is addmm
        if known in _FORMULAS:
            return _FORMULAS[known]
        if known in flop_registry:
            flops = flop_registry[known]
            return lambda *args, **kwargs: int(flops(*args, **kwargs)) // 2
    return None


class _FloatProducts(TorchDispatchMode):
    """Sees every operator; enters those that compute products."""

    def __init__(self, enter: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.enter = enter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if emulating():
            return func(*args, **kwargs)  # told by `ops.recorders`, as the product that it stands for
        operator = func._overloadpacket
        formula = _formula(operator)
        if formula is None:
            # In inference mode operators arrive before torch has taken them apart: a linear layer is no addmm yet.
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        self.enter(operator.__name__, formula(*args, **kwargs, out_val=out))
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


def _reasons(model: nn.Module) -> Callable[[list[str]], str]:
    """A function that says why a product stayed in floating point, given the modules that it was computed in."""
    modules = dict(model.named_modules())
    left: dict[str, str] = {}
    converted = []
    for name, module in modules.items():
        root: RootState | None = module.__dict__.get("hbfp_root")
        if root is not None:
            converted.append(name)
            for inner, reason in root.left.items():
                left[".".join(part for part in (name, inner) if part)] = reason

    def why(inside: list[str]) -> str:
        told = next((left[name] for name in reversed(inside) if left.get(name)), "")
        innermost = inside[-1] if inside else ""
        around = any(not name or f"{innermost}.".startswith(f"{name}.") for name in converted)
        module = modules[innermost]
        passed_over = isinstance(module, tuple(LAYERS)) and module.__dict__.get("hbfp_state") is None
        return told or (FUNCTIONAL if around and not passed_over else NOT_CONVERTED)

    return why


def audit(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **keywords: Any) -> Audit:
    """Counts the MACs of one training step of `model` on `inputs`, and says where they ran.

    One forward and one backward pass are computed, in training mode and uncompiled; gradients (of parameters and of
    inputs), training modes, buffers, random generators and the step of random streams are as before afterwards.

    What ran in floating point is listed with the reason: what conversion said of the layer (a rule, a class that has no
    fixed-point form), a functional call outside a layer, or no conversion at all. Its MACs are counted by torch's FLOP
    formulas, halved, or by exact ones where torch has none or a wrong one.

    Args:
        model: any module, converted or not.
        inputs, keywords: what its forward takes.
        loss: output -> scalar; the sum of all floating outputs if None.

    Raises:
        HBFPError: the output has nothing to differentiate.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    names: dict[int, str] = {}
    roots = {}
    for name, module, state in layer_states(model):
        names[id(state)] = name or type(module).__name__
        roots[id(state.root)] = state.root
    why = _reasons(model)
    counted: dict[tuple[str, str, str, int, str], int] = defaultdict(int)
    whereabouts = _Whereabouts(model)

    def place() -> str:
        inside = whereabouts.now
        if not inside and loss is not None:
            return OF_THE_LOSS
        return (inside[-1] if inside else "") or type(model).__name__

    def product(entry: ops.Product) -> None:
        layer = names.get(id(entry.source)) or place()
        formats = str(entry.left) if entry.left == entry.right else f"{entry.left} × {entry.right}"
        counted[layer, entry.name, formats, max(entry.left.bits, entry.right.bits), ""] += entry.macs

    def floating(operator: str, macs: int) -> None:
        if whereabouts.now is whereabouts.backward:
            operator += ", backward"
        counted[place(), operator, "FP32", FP32, why(whereabouts.now)] += macs

    modes = [(module, module.training) for module in model.modules()]
    leaves = [x for x in tree_leaves((inputs, keywords)) if isinstance(x, Tensor) and x.is_leaf]
    gradients = [(leaf, leaf.grad) for leaf in (*model.parameters(), *leaves)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    steps = [(root, root.step, root.automatic) for root in roots.values()]
    devices = {x.device.index for x in (*model.parameters(), *leaves) if x.is_cuda}
    # This step is no step of training: whoever watches is not told.
    others, ops.recorders[:] = ops.recorders[:], [product]
    try:
        for leaf, _ in gradients:
            leaf.grad = None
        model.train()
        with (
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # a compiled product reports to nobody
            _FloatProducts(floating),
        ):
            out = model(*inputs, **keywords)
            total = loss(out) if loss is not None else _sum(out)
            if not total.requires_grad:
                raise HBFPError(
                    "expected an output that depends on a parameter or input with requires_grad; found none"
                )
            total.backward()
    finally:
        ops.recorders[:] = others
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
    rows = [AuditRow(*key[:4], macs, key[4]) for key, macs in counted.items()]
    order = {layer: place for place, layer in enumerate(dict.fromkeys(row.layer for row in rows))}
    return Audit(tuple(sorted(rows, key=lambda row: order[row.layer])))


def _sum(out: Any) -> Tensor:
    tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors:
        raise HBFPError(f"expected a tensor, or a structure of tensors, from the model; found {type(out).__name__}")
    return torch.stack([x.sum() for x in tensors]).sum()
