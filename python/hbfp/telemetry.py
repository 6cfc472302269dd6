"""Which layer hurts: what encoding costs every operand of every product of a model, while it trains.

The operands are read as the products read them: the same axis, format, rounding, seed and stream, so the codes that are
measured are the codes that are used. In a sampled step nothing is fused that would leave an operand in pieces (the
probabilities of attention, what a layer keeps for backward as codes): the products are computed one by one, with the
same bits and with more memory. Between sampled steps all runs as if nobody watched.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, log10
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hbfp import emulation, ops
from hbfp.errors import HBFPError
from hbfp.format import HBFP, Rounding
from hbfp.policy import ROLES, SITES, LayerState, layer_states, root_states
from hbfp.tables import table

__all__ = ["Watch", "WatchRow", "watch"]

_ROUNDINGS = tuple(Rounding)

# --- names of operands -----------------------------------------------------------------------------------------------

_ACTIVATIONS, _WEIGHTS, _OUTPUT_GRADIENTS = "activations", "weights", "output gradients"

_BY_ROLE = (_ACTIVATIONS, _WEIGHTS, _OUTPUT_GRADIENTS, _WEIGHTS, _OUTPUT_GRADIENTS, _ACTIVATIONS)
"""Of forward, input gradient and weight gradient, by the operand's role (`hbfp.autograd.Role`)."""

_BY_SIDE = {
    "scores": ("queries", "keys"),
    "context": ("probabilities", "values"),
    "gradient of V": ("probabilities", _OUTPUT_GRADIENTS),
    "gradient of P": (_OUTPUT_GRADIENTS, "values"),
    "gradient of Q": ("score gradients", "keys"),
    "gradient of K": ("score gradients", "queries"),
}
"""Left and right of the products of attention."""

_KINDS = {
    "activations": (_ACTIVATIONS, "queries", "keys", "values", "probabilities", "first product"),
    "weights": (_WEIGHTS,),
    "gradients": (_OUTPUT_GRADIENTS, "score gradients"),
}
"""Operands that are of a kind: chosen together, and drawn together."""

_KIND_OF = {operand: kind for kind, operands in _KINDS.items() for operand in operands}

_PRODUCTS = ("forward", "input gradient", "weight gradient", *_BY_SIDE)

_FORWARD = ("forward", "scores", "context")
"""Products that a backward pass computes only to repeat a forward pass."""

_SECOND = 8
"""What the roles of a bilinear layer's second product have more; its right operand is the first one's result."""


# --- what is known of one operand ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WatchRow:
    """One operand of one product of one layer in one step.

    All counts are sums over the times that it was encoded in the step. Elements in NaN blocks count nowhere but there.
    """

    step: int
    """As the random streams count (`hbfp.set_step`, `hbfp.Booster`)."""
    layer: str
    """Its name in the watched model; for a layer of several parts with the part's name behind a dot ("rnn.hh_l0")."""
    product: str
    """"forward", "input gradient", "weight gradient"; of attention "scores", "context", "gradient of V", …"""
    operand: str
    """"activations", "weights", "output gradients"; of attention "queries", "keys", "values", "probabilities", …"""
    format: HBFP
    rounding: Rounding
    encodings: int
    """How often it was encoded."""
    nonzero: int
    """Elements that are not zero."""
    signal: float
    """Sum of x²."""
    noise: float
    """Sum of (x − q · 2^(c − 127))²."""
    saturated: int
    """Elements with |x| > (Q + ½) · 2^(c − 127): the code is ±Q, and more than half a step short of them."""
    zeroed: int
    """Elements that are not zero and have the code 0."""
    exponents: dict[int, int] = field(hash=False)
    """Blocks by their exponent byte c; 0: blocks of zeros and of less than 2^−127, 255: NaN blocks."""

    @property
    def kind(self) -> str:
        """What the operand is, in short: "activations", "weights" or "gradients"."""
        return _KIND_OF[self.operand]

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in dB, 10 log10(signal / noise); infinite where nothing is lost."""
        return 10.0 * (log10(self.signal) - log10(self.noise)) if self.noise else inf

    @property
    def saturated_share(self) -> float:
        """Of the elements that are not zero."""
        return self.saturated / self.nonzero if self.nonzero else 0.0

    @property
    def zeroed_share(self) -> float:
        """Of the elements that are not zero."""
        return self.zeroed / self.nonzero if self.nonzero else 0.0

    @property
    def nan_blocks(self) -> int:
        """Blocks with a NaN or an infinity in them."""
        return self.exponents.get(255, 0)

    @property
    def exponent_range(self) -> tuple[int, int] | None:
        """Smallest and largest block exponent E, magnitudes being under 2^E; None where no block has one (c = 0, 255).

        E = c − 127 + (m − 1) for mantissas of m bits (docs/spec.md, section 1).
        """
        found = [c for c in self.exponents if 0 < c < 255]
        return (self._exponent(min(found)), self._exponent(max(found))) if found else None

    def _exponent(self, c: int) -> int:
        return c - 127 + self.format.bits - 1


def _worst_first(row: WatchRow) -> tuple[bool, float, str, str, str]:
    """NaN blocks are worse than any noise."""
    return row.nan_blocks == 0, row.sqnr, row.layer, row.product, row.operand


_ORDERS: dict[str, Callable[[WatchRow], Any]] = {
    "sqnr": _worst_first,
    "zeroed": lambda row: (-row.zeroed_share, *_worst_first(row)),
    "saturated": lambda row: (-row.saturated_share, *_worst_first(row)),
}


def _chosen(rows: Sequence[WatchRow], by: str, kind: str | None, product: str | None) -> list[WatchRow]:
    """Those of the kind and the product (None: of all), in order."""
    for what, value, known in (("order", by, _ORDERS), ("kind", kind, _KINDS), ("product", product, _PRODUCTS)):
        if value is not None and value not in known:
            raise HBFPError(f"unknown {what} {value!r}: expected one of {', '.join(map(repr, known))}")
    found = [row for row in rows if kind in (None, row.kind) and product in (None, row.product)]
    return sorted(found, key=_ORDERS[by])


class _Sums:
    """What a row grows from."""

    def __init__(self) -> None:
        self.encodings = self.nonzero = self.saturated = self.zeroed = 0
        self.signal = self.noise = 0.0
        self.exponents = [0] * 256

    def add(self, found: ops.Measured) -> None:
        self.encodings += 1
        self.nonzero += found.nonzero
        self.signal += found.signal
        self.noise += found.noise
        self.saturated += found.saturated
        self.zeroed += found.zeroed
        self.exponents = [a + b for a, b in zip(self.exponents, found.exponents, strict=True)]

    def row(self, step: int, key: _Key) -> WatchRow:
        counts = {c: count for c, count in enumerate(self.exponents) if count}
        return WatchRow(
            step, *key, self.encodings, self.nonzero, self.signal, self.noise, self.saturated, self.zeroed, counts
        )


_Key = tuple[str, str, str, HBFP, Rounding]
"""Layer, product, operand and how it is encoded: a width that changes within a step makes another row."""


def _readable(x: Tensor) -> bool:
    """Whether the elements lie in memory as they look; those of subclasses may not."""
    kind: type = type(x)
    return kind in (Tensor, nn.Parameter) and not x.is_meta


def _measure(operand: ops.Operand, x: Tensor) -> ops.Measured:
    """Measures the encoding of `x`, the operand's tensor."""
    x = x.detach().cpu()
    format, axis, rounding = operand.format, operand.axis, operand.rounding
    if operand.order is None:
        return ops.measure(x, format, axis, rounding, operand.seed, operand.stream)
    laid = operand.order(x)
    if _ROUNDINGS[rounding] is not Rounding.STOCHASTIC:
        return ops.measure(laid, format, axis, rounding)
    # The core draws for a tensor as it is given. Neither exponents nor what saturates depend on the rounding.
    found = ops.measure(laid, format, axis)
    bits = operand.order(emulation.random_bits(x.shape, operand.seed, operand.stream))
    q = emulation.quantize(laid, format, axis, rounding, bits=bits).to(torch.float64)
    laid = laid.to(torch.float64)
    inside = q.isnan().logical_not_()
    noise = (laid - q)[inside].square().sum().item()
    zeroed = (inside & (q == 0) & (laid != 0)).sum().item()
    return found._replace(noise=noise, zeroed=int(zeroed))


# --- the watch -------------------------------------------------------------------------------------------------------


class _Writer(Protocol):
    """What `Watch.to_tensorboard` needs of a `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...


class _Step:
    """What was seen in one sampled step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.sums: dict[_Key, _Sums] = {}

    def rows(self) -> tuple[WatchRow, ...]:
        return tuple(sums.row(self.step, key) for key, sums in self.sums.items())


class Watch:
    """Watches a converted model from its making until `close`; a context manager. See `watch`."""

    def __init__(self, model: nn.Module, every: int = 1, *, keep: int = 100, evaluation: bool = False) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if type(value) is not int or value < 1:
                raise HBFPError(f"{name} must be a number of steps, 1 or more; found {value!r}")
        root_states(model)  # raises for a model that was not converted
        plain: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile
        self.model, self.every, self.keep, self.evaluation = model, every, keep, evaluation
        # The states are held, so that their ids stay theirs.
        self._layers: dict[int, tuple[str, nn.Module, LayerState]] = {
            id(state): (name or type(module).__name__, module, state) for name, module, state in layer_states(plain)
        }
        self._lock = Lock()
        self._steps: deque[_Step] = deque(maxlen=keep)
        self._seen: set[str] = set()
        self._passed: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._written: int | None = None
        # Held weakly: a watch that nobody has any more ends.
        reference = weakref.ref(self)

        def tell(product: ops.Product) -> None:
            watch = reference()
            if watch is not None:
                watch._tell(product)

        def wants(source: object, stream: int) -> bool:
            watch = reference()
            return watch is not None and watch._wants(source, stream)

        ops.recorders.append(tell)
        ops.wanted.append(wants)
        self._finalizer = weakref.finalize(self, _withdraw, tell, wants)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Ends the watch; what it saw can still be read. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- being told --------------------------------------------------------------------------------------------------

    def _wants(self, source: object, stream: int) -> bool:
        found = self._layers.get(id(source))
        return found is not None and (stream >> 32) % self.every == 0 and (self.evaluation or found[1].training)

    def _tell(self, product: ops.Product) -> None:
        found = self._layers.get(id(product.source))
        if found is None:
            if product.source is None:
                self._missing["functional calls"] = "they belong to no layer"
            return
        name, module, state = found
        step = product.stream >> 32
        if not self._wants(product.source, product.stream):
            if module.training or self.evaluation:
                self._passed[name] = f"in no sampled step yet: the last was {step}, and every={self.every}"
            else:
                self._passed.setdefault(name, "in evaluation mode only, which evaluation=True takes in")
            return
        if product.name in _FORWARD and torch._C._current_graph_task_id() != -1:
            return  # checkpointing repeats what was told in the forward pass
        self._seen.add(name)
        for side, operand in enumerate(product.operands()):
            self._add(step, name, module, state, product.name, side, operand)

    def _add(
        self, step: int, name: str, module: nn.Module, state: LayerState, product: str, side: int, operand: ops.Operand
    ) -> None:
        role = operand.stream % ROLES
        parts: Any = getattr(module, "hbfp_parts", None)
        layer = name if parts is None else f"{name}.{parts()[(operand.stream >> 12) % SITES - state.site]}"
        if product in _BY_SIDE:
            called = _BY_SIDE[product][side]
        elif role < _SECOND:
            called = _BY_ROLE[role]
        else:
            layer += ".second"
            called = _BY_ROLE[role - _SECOND]
            called = "first product" if called is _WEIGHTS else called
        x = operand.x
        if x is None:
            reason = "the forward pass had begun before the watch, and left codes only"
        elif not _readable(x):
            reason = f"a {type(x).__name__} on {x.device}, whose elements are not read"
        else:
            key = (layer, product, called, operand.format, _ROUNDINGS[operand.rounding])
            measured = _measure(operand, x)
            with self._lock:
                self._at(step).sums.setdefault(key, _Sums()).add(measured)
            return
        self._missing[f"{layer}, {product}, {called}"] = reason

    def _at(self, step: int) -> _Step:
        """The record of a step: mostly the last; the oldest goes when there are too many."""
        for record in reversed(self._steps):
            if record.step == step:
                return record
        self._steps.append(_Step(step))
        return self._steps[-1]

    # --- telling -----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[int, ...]:
        """The sampled steps that are kept, in the order in which they were seen."""
        with self._lock:
            return tuple(record.step for record in self._steps)

    @property
    def rows(self) -> tuple[WatchRow, ...]:
        """What the last sampled step showed, in the order in which it was seen; empty before the first."""
        with self._lock:
            return self._steps[-1].rows() if self._steps else ()

    @property
    def history(self) -> dict[int, tuple[WatchRow, ...]]:
        """The rows of each sampled step that is kept, the last `keep` of them."""
        with self._lock:
            return {record.step: record.rows() for record in self._steps}

    @property
    def unobserved(self) -> dict[str, str]:
        """Layers, and operands of layers, of which nothing is known, each with the reason."""
        found = {}
        for name, _, _ in self._layers.values():
            if name not in self._seen:
                found[name] = self._passed.get(name) or self._silence()
        return {**found, **self._missing}

    def _silence(self) -> str:
        compiled = any(
            hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
            for part in self.model.modules()
        )
        if compiled:
            return "inside torch.compile, whose graphs tell nothing: run sampled steps eagerly, the bits are the same"
        return "computed nothing since the watch was opened, unless inside torch.compile, whose graphs tell nothing"

    def at(self, step: int | None = None) -> tuple[WatchRow, ...]:
        """The rows of one sampled step, the last one if None.

        Raises:
            HBFPError: the step was not sampled, or is no longer kept.
        """
        if step is None:
            return self.rows
        history = self.history
        if step not in history:
            kept = ", ".join(map(str, history)) or "none"
            raise HBFPError(f"step {step} was not sampled (every={self.every}) or is not kept; found {kept}")
        return history[step]

    def worst(
        self,
        n: int = 5,
        step: int | None = None,
        *,
        by: str = "sqnr",
        kind: str | None = None,
        product: str | None = None,
    ) -> tuple[WatchRow, ...]:
        """The `n` operands of one sampled step (the last one if None) that encoding costs most, the worst first.

            watch.worst(3, kind="gradients", product="weight gradient")

        Args:
            by: "sqnr", the lowest first, those with NaN blocks before all others; "zeroed" or "saturated", the highest
                share first. An outlier so large that it is most of the signal leaves the SQNR high and the rest of its
                block zeroed.
            kind: only "activations", "weights" or "gradients"; None: all.
            product: only the operands of this product, such as "forward" (see `WatchRow.product`); None: of all.

        Raises: as `at`; HBFPError for another order, kind or product.
        """
        return tuple(_chosen(self.at(step), by, kind, product)[:n])

    def table(
        self,
        n: int | None = None,
        step: int | None = None,
        *,
        by: str = "sqnr",
        kind: str | None = None,
        product: str | None = None,
    ) -> str:
        """One line for each operand of one sampled step (the last one if None), the worst first; what is not known.

        Args:
            n: so many lines at most; all if None.
            by, kind, product: as for `worst`.

        Raises: as `worst`.
        """
        seen = self.at(step)
        rows = _chosen(seen, by, kind, product)
        head = ("layer", "product", "operand", "format", "SQNR dB", "saturated %", "zeroed %", "exponents E", "NaN")
        lines = []
        for row in rows[:n]:
            ends = row.exponent_range
            lines.append(
                (
                    row.layer,
                    row.product,
                    row.operand,
                    str(row.format) if row.rounding is Rounding.NEAREST_EVEN else f"{row.format} {row.rounding}",
                    f"{row.sqnr:.1f}",
                    f"{100 * row.saturated_share:.2f}",
                    f"{100 * row.zeroed_share:.2f}",
                    "" if ends is None else f"{ends[0]} … {ends[1]}",
                    str(row.nan_blocks or ""),
                )
            )
        of = f" of {len(seen)}" if len(rows) < len(seen) else ""
        found = f"step {seen[0].step}: {len(rows)}{of} operands, the worst first" if seen else "no step was sampled yet"
        if len(lines) < len(rows):
            found += f"; {len(rows) - len(lines)} more"
        missing = [f"not observed: {what}: {reason}" for what, reason in self.unobserved.items()]
        return "\n".join([table(head, lines, right=(4, 5, 6, 7, 8)), found, *missing])

    def __str__(self) -> str:
        return self.table()

    def to_tensorboard(self, writer: _Writer, step: int | None = None) -> None:
        """Writes scalars: `hbfp/sqnr/<layer>/<product>/<operand>`, and the same for saturated, zeroed and nan_blocks.

        Shares are fractions. Spaces become underscores. An infinite SQNR is left out.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or whatever has its `add_scalar`.
            step: which sampled step; None: those kept that came after the last one written so.

        Raises: as `at`.
        """
        if step is not None:
            rows: Sequence[WatchRow] = self.at(step)
        else:
            history = self.history
            steps = list(history)
            if self._written in history:
                steps = steps[steps.index(self._written) + 1 :]
            rows = [row for number in steps for row in history[number]]
            self._written = rows[-1].step if rows else self._written
        for row in rows:
            where = f"{row.layer}/{row.product}/{row.operand}".replace(" ", "_")
            if row.sqnr != inf:
                writer.add_scalar(f"hbfp/sqnr/{where}", row.sqnr, row.step)
            writer.add_scalar(f"hbfp/saturated/{where}", row.saturated_share, row.step)
            writer.add_scalar(f"hbfp/zeroed/{where}", row.zeroed_share, row.step)
            writer.add_scalar(f"hbfp/nan_blocks/{where}", row.nan_blocks, row.step)

    def plot(self, path: str | Path) -> None:
        """Draws the lowest SQNR of each layer over the sampled steps, and the exponents of the last one, as a PNG.

        Raises:
            HBFPError: no step was sampled. ImportError: matplotlib is not installed.
        """
        history = self.history
        if not history:
            raise HBFPError(f"nothing to draw: no step was sampled yet (every={self.every})")
        _draw(history, Path(path))


def _withdraw(tell: ops.Recorder, wants: Callable[[object, int], bool]) -> None:
    if tell in ops.recorders:
        ops.recorders.remove(tell)
    if wants in ops.wanted:
        ops.wanted.remove(wants)


def watch(model: nn.Module, every: int = 1, *, keep: int = 100, evaluation: bool = False) -> Watch:
    """Measures what encoding costs each operand of each product of a converted model: which layer hurts?

        with hbfp.watch(model, every=100) as watch:
            train(model)
        print(watch.table(10))

    Results of training do not change by a bit, with any number of watches. A step in which operands are read costs
    more time and, as nothing is fused then, more memory; flattened convolutions lay out their patches.

    Read are the products of layers in training mode, in forward and backward, in the steps that `every` divides: the
    step is that of the random streams, set by the schedule or by `hbfp.set_step`, else counted by the model itself from
    1. Forward passes that activation checkpointing repeats are counted once. Not read: functional calls outside layers,
    and graphs of torch.compile (`torch.compiler.set_stance("force_eager")` in sampled steps gives the same bits);
    `Watch.unobserved` and the table name what was not seen, and why.

    Args:
        model: converted; what is converted later is not seen.
        every: sample the steps that this number divides.
        keep: sampled steps whose figures are kept.
        evaluation: read layers in evaluation mode too; they belong to the step that training has reached.

    Raises:
        HBFPError: `every` or `keep` is no number of steps.
        ConversionError: the model has no converted layer.
    """
    return Watch(model, every, keep=keep, evaluation=evaluation)


# --- the picture -----------------------------------------------------------------------------------------------------


def _draw(history: dict[int, tuple[WatchRow, ...]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("Watch.plot needs matplotlib, which is not installed: pip install hbfp[demo]") from error
    import numpy as np

    steps = sorted(history)
    last = history[steps[-1]]
    layers = list(dict.fromkeys(row.layer for step in steps for row in history[step]))
    place = {layer: i for i, layer in enumerate(layers)}
    lowest = np.full((len(layers), len(steps)), np.nan)
    for column, step in enumerate(steps):
        for row in sorted(history[step], key=lambda row: -row.sqnr):
            if row.sqnr != inf:
                lowest[place[row.layer], column] = row.sqnr

    height = max(3.2, 1.6 + 0.26 * len(layers))
    figure = Figure(figsize=(15, height), dpi=120, layout="constrained")
    first, names, *others = figure.subplots(1, 2 + len(_KINDS), sharey=True, width_ratios=[1.6, 1.1, 1, 1, 1])
    image = first.imshow(lowest, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=first, label="dB", pad=0.02)
    first.set_title("SQNR of each layer's worst operand", loc="left", fontsize=10)
    names.set_title(f"which, at step {steps[-1]}", loc="left", fontsize=10)
    names.set_axis_off()
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), 8))})
    first.set_xticks(shown, [str(steps[i]) for i in shown])
    first.set_xlabel("step")
    first.set_yticks(range(len(layers)), layers, fontsize=8)
    worst = {row.layer: row for row in sorted(last, key=_worst_first, reverse=True)}
    for layer, row in worst.items():
        figures = "NaN" if row.nan_blocks else f"{row.sqnr:.1f}"
        names.text(0.0, place[layer], f"{figures}  {row.product}, {row.operand}", va="center", fontsize=8)
    for axes, kind in zip(others, _KINDS, strict=True):
        _draw_exponents(axes, kind, [row for row in last if row.kind == kind], place)
    figure.suptitle(
        f"What encoding costs each layer; right: share of blocks by exponent at step {steps[-1]}",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def _draw_exponents(axes: Any, title: str, rows: Sequence[WatchRow], place: dict[str, int]) -> None:
    """Share of each layer's blocks by exponent E, blocks of zeros left out."""
    import numpy as np

    axes.set_title(f"block exponents, {title}", loc="left", fontsize=10)
    axes.set_xlabel("E (magnitudes under 2^E)")
    counts: dict[tuple[str, int], int] = {}
    for row in rows:
        for c, count in row.exponents.items():
            if 0 < c < 255:
                key = row.layer, row._exponent(c)
                counts[key] = counts.get(key, 0) + count
    if not counts:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="#808080")
        return
    least, most = (choose(e for _, e in counts) for choose in (min, max))
    shares = np.zeros((len(place), most - least + 1))
    for (layer, exponent), count in counts.items():
        shares[place[layer], exponent - least] = count
    totals = shares.sum(1, keepdims=True)
    shares = np.divide(shares, totals, out=np.full_like(shares, np.nan), where=totals > 0)
    shares[shares == 0] = np.nan
    axes.imshow(
        shares, aspect="auto", cmap="Blues", vmin=-0.15, vmax=1, interpolation="nearest",
        extent=(least - 0.5, most + 0.5, len(place) - 0.5, -0.5),
    )  # fmt: skip
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
