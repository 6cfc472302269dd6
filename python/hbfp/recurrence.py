"""All steps of one recurrent layer in one direction, as one differentiable function.

Rows are pairs (step, sequence), time-major: the steps in order, in each the sequences that last so long, the longest
first, as in a `PackedSequence`. The products (docs/spec.md, recurrent layers):

    X W_ihᵀ      over all rows at once, and so are its two gradients
    h W_hhᵀ      at each step, with the step as the index of its stream, and so is the gradient of h
    dW_hh        over all rows at once
    h W_hrᵀ      for LSTMs with projections, as h W_hhᵀ

Everything between the products is float32 by torch, in place in tensors that hold all rows: a step makes no node of
autograd and allocates next to nothing. (torch's sigmoid and tanh give other last bits where a vector of the CPU begins
elsewhere, so the cells in `hbfp.nn` call them on tensors that lie alike.) Backward begins by writing the local
derivatives of all gates, for all rows at once, where their gradients are to stand; going back through the steps then is
a matter of multiplying in place.

Between the two passes lie the gates, as floats. X, and the states where a projection made them, are kept as the codes
of their weight gradients; other states are computed again from the gates, by the operations that made them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hbfp import ops
from hbfp.autograd import Role, keeps_codes, once
from hbfp.backends import arithmetic
from hbfp.format import HBFP
from hbfp.policy import Backend, MatmulPolicy, Recipe
from hbfp.stationary import StationaryWeight

__all__ = ["Run", "SequenceFunction"]


@dataclass(frozen=True, slots=True)
class Run:
    """What `SequenceFunction` needs to know beside its tensors."""

    mode: str
    """ "LSTM", "GRU", "RNN_TANH" or "RNN_RELU", as torch's modules name it."""
    sizes: tuple[int, ...]
    """How many sequences take part in each step: one step or more, never rising."""
    reverse: bool
    """From the last step to the first."""
    recipe: Recipe
    seed: int
    streams: tuple[int, int, int]
    """Of the input's, the recurrent and the projection's products: role 0, index 0."""
    source: object
    """Told to the recorders."""

    @property
    def order(self) -> list[int]:
        """The steps as they are computed."""
        steps = list(range(len(self.sizes)))
        return steps[::-1] if self.reverse else steps

    def streams_of(self, part: int, roles: tuple[Role, Role]) -> tuple[int, int]:
        """Those of a product's operands at index 0; part: 0 the input's, 1 the recurrent, 2 the projection's."""
        left, right = (self.streams[part] | int(role) for role in roles)
        return left, right

    def keeping(self, part: int) -> tuple[HBFP, int, int]:
        """Format, rounding and stream of the right operand of a weight gradient."""
        policy = self.recipe.weight_gradient
        return policy.formats[1], policy.roundings[1], self.streams[part] | int(Role.X_FOR_DW)


class SequenceFunction(torch.autograd.Function):
    """(Y, h_n, c_n) of a whole sequence.

    Shapes: X [rows, in]; h_0 [sequences, hidden or projected]; c_0 [sequences, hidden], None but for LSTMs; W_ih, W_hh,
    W_hr and the biases as in torch's modules, None where there is none. Y [rows, hidden or projected] and the states
    after the last step are float32; c_n is None but for LSTMs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        run: Run,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        h0 = _real(h0)
        c0, b_hh = (None if given is None else _real(given) for given in (c0, b_hh))
        keep = any(ctx.needs_input_grad)
        need_ih, need_hh = ctx.needs_input_grad[3:5]
        codes = keeps_codes(run.recipe, run.source, run.streams[0])
        policy, by = run.recipe.forward, run.recipe.backends.forward
        roles = Role.X_FORWARD, Role.W_FORWARD
        kept_x = None
        if need_ih and codes:
            gates, kept_x = ops.product_keeping(
                x, w_ih, -1, policy.formats, policy.roundings, run.seed, run.streams_of(0, roles), b_ih, run.keeping(0),
                name="forward", source=run.source,
            )  # fmt: skip
        else:
            gates = _over_rows(run, "forward", policy, by, 0, x, -1, w_ih, -1, roles, b_ih)
        recurrent = _at_steps(run, "forward", policy, by, 1, w_hh, -1, roles)
        projection = _at_steps(run, "forward", policy, by, 2, w_hr, -1, roles)

        y = gates.new_empty(gates.shape[0], h0.shape[1])
        ys, sizes = _split(y, run.sizes), run.sizes
        products = gates.new_empty(sizes[0], gates.shape[1])
        hidden = gates.new_empty(sizes[0], w_hr.shape[1]) if w_hr is not None else None
        cell = _CELLS[run.mode][0](gates, c0, run, keep)
        h = h0[:0]
        for t in run.order:
            n = sizes[t]
            entering = _entering(h, h0, n)
            h = ys[t]
            product = recurrent.multiply(entering, t, products[:n], b_hh)
            if hidden is None:
                cell.step(t, entering, product, h)
            else:
                cell.step(t, entering, product, hidden[:n])
                projection.multiply(hidden[:n], t, h)
        if keep:
            # Who has no projection computes its states again.
            states = y if need_hh and w_hr is not None else None
            kept_states = None
            if states is not None and codes:
                kept_states = ops.keep(_all_entering(y, h0, run), *run.keeping(1), run.seed)
            ctx.kept = kept_x is not None, kept_states is not None
            ctx.save_for_backward(
                (x if kept_x is None else kept_x) if need_ih else None,
                states if kept_states is None else kept_states,
                h0, c0, w_ih, w_hh, w_hr, *cell.kept(y),
            )  # fmt: skip
        ctx.run = run
        ctx.set_materialize_grads(False)
        return y, _leaving([ys[t] for t in run.order]), cell.final()

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> tuple[Tensor | None, ...]:
        x, states, h0, c0, w_ih, w_hh, w_hr, *kept = ctx.saved_tensors
        need_x, need_h0, need_c0, need_ih, need_hh, need_b_ih, need_b_hh, need_hr = ctx.needs_input_grad[:8]
        run: Run = ctx.run
        sizes, back = run.sizes, run.order[::-1]
        policy, by = run.recipe.input_gradient, run.recipe.backends.input_gradient
        cell = _CELLS[run.mode][1](kept, h0, c0, dc_n, run)
        toward_x = Role.DY_FOR_DX, Role.W_FOR_DX
        recurrent = _at_steps(run, "input gradient", policy, by, 1, w_hh, -2, toward_x)
        projection = _at_steps(run, "input gradient", policy, by, 2, w_hr, -2, toward_x)

        state = h0.new_zeros(h0.shape) if dh_n is None else dh_n.clone(memory_format=torch.contiguous_format)
        dys = None if dy is None else _split(dy, sizes)
        projected = cell.d.new_empty(cell.d.shape[0], w_hr.shape[0]) if w_hr is not None else None
        dprojected = None if projected is None else _split(projected, sizes)
        wide = cell.d.new_empty(sizes[0], w_hr.shape[1]) if w_hr is not None else None
        scratch = torch.empty_like(state)
        for t in back:
            n = sizes[t]
            dh = state[:n]
            if dys is not None:
                dh.add_(dys[t])
            if dprojected is None or wide is None:
                toward = cell.step(t, dh)
            else:
                toward = cell.step(t, projection.multiply(dprojected[t].copy_(dh), t, wide[:n]))
            if need_h0 or t != back[-1]:
                carried = cell.carry(t, dh)
                if carried is None:
                    recurrent.multiply(toward, t, dh)
                else:
                    carried.add_(recurrent.multiply(toward, t, scratch[:n]))

        dgates, dproducts = cell.d, cell.dproducts
        dx = dw_ih = dw_hh = db_ih = db_hh = dw_hr = None
        if need_x:
            dx = _over_rows(run, "input gradient", policy, by, 0, dgates, -1, w_ih, -2, toward_x)
        if need_ih:
            dw_ih = _weight_gradient(run, 0, dgates, x, w_ih.shape[1] if ctx.kept[0] else None)
        if need_hh and ctx.kept[1]:
            dw_hh = _weight_gradient(run, 1, dproducts, states, w_hh.shape[1])
        elif need_hh:
            y = cell.states() if states is None else states
            dw_hh = _weight_gradient(run, 1, dproducts, _all_entering(y, h0, run))
        if need_hr:
            assert projected is not None
            dw_hr = _weight_gradient(run, 2, projected, cell.states())
        column_sums = arithmetic(run.recipe.backends.weight_gradient).column_sums
        if need_b_ih:
            db_ih = column_sums(dgates)
        if need_b_hh:
            db_hh = db_ih.clone() if db_ih is not None and dproducts is dgates else column_sums(dproducts)
        dh0 = state if need_h0 else None
        return dx, dh0, cell.dc if need_c0 else None, dw_ih, dw_hh, db_ih, db_hh, dw_hr, None


# --- products --------------------------------------------------------------------------------------------------------


def _over_rows(
    run: Run,
    name: str,
    policy: MatmulPolicy,
    backend: Backend,
    part: int,
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    roles: tuple[Role, Role],
    bias: Tensor | None = None,
) -> Tensor:
    """One product over the rows of all steps, at index 0."""
    return arithmetic(backend).product(
        a, a_axis, b, b_axis, policy.formats, policy.roundings, run.seed, run.streams_of(part, roles), bias,
        name=name, source=run.source,
    )  # fmt: skip


def _weight_gradient(run: Run, part: int, d: Tensor, x: Tensor, columns: int | None = None) -> Tensor:
    """dᵀ X over the rows of all steps; x: X [rows, columns], or its codes where `columns` says how many it had."""
    name, policy, roles = "weight gradient", run.recipe.weight_gradient, (Role.DY_FOR_DW, Role.X_FOR_DW)
    if columns is None:
        return _over_rows(run, name, policy, run.recipe.backends.weight_gradient, part, d, -2, x, -2, roles)
    return ops.kept_product(
        d, x, columns, policy.formats, policy.roundings, run.seed, run.streams_of(part, roles),
        name=name, source=run.source,
    )  # fmt: skip


def _at_steps(
    run: Run,
    name: str,
    policy: MatmulPolicy,
    backend: Backend,
    part: int,
    weight: Tensor | None,
    axis: int,
    roles: tuple[Role, Role],
) -> Any:
    """The product with `weight` that is computed at every step; None without a weight."""
    if weight is None:
        return None
    streams = run.streams_of(part, roles)
    return StationaryWeight(weight, axis, policy, backend, run.seed, streams, name=name, source=run.source)


def _real(x: Tensor) -> Tensor:
    """As the core reads it; the layer around has seen to its dtype."""
    return x.detach().to(torch.float32).resolve_neg()


# --- states ----------------------------------------------------------------------------------------------------------


def _entering(before: Tensor, initial: Tensor, n: int) -> Tensor:
    """The states of the first `n` sequences: those that the step before left, initial ones for who begins here."""
    present = before.shape[0]
    if present == n:
        return before
    return before[:n] if present > n else torch.cat((before, initial[present:n]))


def _leaving(states: Sequence[Tensor]) -> Tensor:
    """The last state of each sequence, of the states after each step in the order of computation."""
    parts: list[Tensor] = []
    present = 0
    for state in reversed(states):
        if state.shape[0] > present:
            parts.append(state[present:])
            present = state.shape[0]
    return torch.cat(parts) if parts else states[0].clone()


def _all_entering(states: Tensor, initial: Tensor, run: Run) -> Tensor:
    """The states that each row began with: [rows, width]."""
    after = _split(states, run.sizes)
    found: dict[int, Tensor] = {}
    before = initial[:0]
    for t in run.order:
        found[t] = _entering(before, initial, run.sizes[t])
        before = after[t]
    return torch.cat([found[t] for t in range(len(run.sizes))])


# --- what stands between the products: torch's formulas --------------------------------------------------------------
#
# `_split` gives each step's rows of a tensor, in its memory.


def _split(x: Tensor, sizes: int | Sequence[int], axis: int = 0) -> Sequence[Tensor]:
    """Views of the parts of `x` along an axis; `sizes` as `torch.split` takes it."""
    if not is_compiling():
        return x.split(sizes, axis)  # type: ignore[no-any-return]
    # torch.export lets nothing write into several views that one call made.
    if isinstance(sizes, int):
        sizes = [sizes] * (x.shape[axis] // sizes)
    starts = list(accumulate(sizes, initial=0))
    return [x.narrow(axis, start, size) for start, size in zip(starts, sizes, strict=False)]


class _Forward(ABC):
    """The pointwise part of a layer, step after step."""

    def __init__(self, gates: Tensor, c0: Tensor | None, run: Run, keep: bool) -> None:
        """`gates` [rows, gates of the mode] holds the input's products and is overwritten; keep: for `_Backward`."""
        self.sizes = list(run.sizes)
        self.order = run.order
        self.keep = keep

    @abstractmethod
    def step(self, t: int, h: Tensor, product: Tensor, out: Tensor) -> None:
        """Writes the hidden state after step t into `out`. h: the state before; product: h W_hhᵀ + b_hh."""

    @abstractmethod
    def kept(self, y: Tensor) -> list[Tensor]:
        """What `_Backward` is to be given. y: the states after each row's step, [rows, hidden or projected]."""

    def final(self) -> Tensor | None:
        """c_n."""
        return None

    def _rows(self, like: Tensor, width: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Memory of `width` columns for all rows, and each step's part; all share one where nothing is to be kept."""
        if self.keep:
            buffer = like.new_empty(like.shape[0], width)
            return buffer, _split(buffer, self.sizes)
        buffer = like.new_empty(self.sizes[0], width)
        return buffer, [buffer[:n] for n in self.sizes]


class _Backward(ABC):
    """The way back through the pointwise part."""

    d: Tensor
    """Gradients of the input's products, [rows, gates of the mode]; before a step's turn, its local derivatives."""
    dc: Tensor | None = None
    """Gradient of the cell state; that of c_0 after the last step back."""

    @abstractmethod
    def __init__(self, kept: list[Tensor], h0: Tensor, c0: Tensor | None, dc_n: Tensor | None, run: Run) -> None: ...

    @abstractmethod
    def step(self, t: int, dh: Tensor) -> Tensor:
        """From the gradient of the hidden state after step t to that of the recurrent product."""

    def carry(self, t: int, dh: Tensor) -> Tensor | None:
        """What of `dh` reaches the state before step t without the recurrent product, in its place; None: nothing."""
        return None

    @property
    def dproducts(self) -> Tensor:
        """Gradients of the recurrent products, [rows, gates of the mode]."""
        return self.d

    @abstractmethod
    def states(self) -> Tensor:
        """The hidden states after each row's step, [rows, hidden], before a projection."""


def _write(function: Callable[..., Tensor], *operands: Tensor, out: Tensor) -> Tensor:
    """`function` of the operands, into `out`."""
    if is_compiling():  # which takes no `out` with gaps in memory
        return out.copy_(function(*operands))
    return function(*operands, out=out)


def _one_less(x: Tensor, out: Tensor) -> Tensor:
    """1 − x."""
    return _write(torch.sub, x.new_ones(()), x, out=out)


def _slope_of_sigmoid(s: Tensor, out: Tensor) -> Tensor:
    """(1 − s) · s."""
    return _one_less(s, out).mul_(s)


def _slope_of_tanh(s: Tensor, out: Tensor) -> Tensor:
    """1 − s · s."""
    return _one_less(_write(torch.mul, s, s, out=out), out)


class _LSTMForward(_Forward):
    """Gates i, f, o: sigmoid, g: tanh, each of the input's product plus the recurrent one;
    c' = f · c + i · g, h' = o · tanh c'.
    """

    def __init__(self, gates: Tensor, c0: Tensor | None, run: Run, keep: bool) -> None:
        super().__init__(gates, c0, run, keep)
        assert c0 is not None
        width = c0.shape[1]
        self.gates, self.c0 = gates, c0
        self.all = _split(gates, self.sizes)
        self.i, self.f, self.g, self.o = (_split(part, self.sizes) for part in _split(gates, width, 1))
        self.i_and_f = _split(gates[:, : 2 * width], self.sizes)
        cells = gates.new_empty(self.sizes[0], width)
        self.c = [cells[:n] for n in self.sizes]
        self.all_tanh, self.tanh = self._rows(gates, width)
        self.scratch = gates.new_empty(self.sizes[0], width)
        self.before = c0[:0]

    def step(self, t: int, h: Tensor, product: Tensor, out: Tensor) -> None:
        self.all[t].add_(product)
        self.i_and_f[t].sigmoid_()
        g, o, c, n = self.g[t].tanh_(), self.o[t].sigmoid_(), self.c[t], self.sizes[t]
        _write(torch.mul, self.f[t], _entering(self.before, self.c0, n), out=c)
        c.add_(_write(torch.mul, self.i[t], g, out=self.scratch[:n]))
        _write(torch.mul, o, _write(torch.tanh, c, out=self.tanh[t]), out=out)
        self.before = c

    def kept(self, y: Tensor) -> list[Tensor]:
        return [self.gates, self.all_tanh]

    def final(self) -> Tensor:
        return _leaving([self.c[t] for t in self.order])


class _LSTMBackward(_Backward):
    all: Sequence[Tensor]

    def __init__(self, kept: list[Tensor], h0: Tensor, c0: Tensor | None, dc_n: Tensor | None, run: Run) -> None:
        assert c0 is not None
        self.gates, self.tanh = kept
        width = c0.shape[1]
        sizes = self.sizes = list(run.sizes)
        i, f, g, o = _split(self.gates, width, 1)
        self.d = torch.empty_like(self.gates)
        di, df, dg, do = _split(self.d, width, 1)
        _slope_of_sigmoid(self.gates[:, : 2 * width], self.d[:, : 2 * width])
        di.mul_(g)
        df.mul_(_all_entering(self._cells(i, f, g, c0, run), c0, run))
        _slope_of_tanh(g, dg).mul_(i)
        _slope_of_sigmoid(o, do).mul_(self.tanh)
        through = _slope_of_tanh(self.tanh, torch.empty_like(self.tanh)).mul_(o)
        self.all, self.f, self.do, self.through = (_split(x, sizes) for x in (self.d, f, do, through))
        self.ifg = _split(self.d[:, : 3 * width].unflatten(1, (3, width)), sizes)
        self.scratch = torch.empty_like(c0)
        self.dc = torch.zeros_like(c0) if dc_n is None else dc_n.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def _cells(i: Tensor, f: Tensor, g: Tensor, c0: Tensor, run: Run) -> Tensor:
        """c' = f · c + i · g, step after step as forward computed it: the states after each row's step."""
        c, scratch = i * g, torch.empty_like(c0)
        cs, fs = (_split(x, list(run.sizes)) for x in (c, f))
        before = c0[:0]
        for t in run.order:
            entering, before = _entering(before, c0, run.sizes[t]), cs[t]
            before.add_(_write(torch.mul, fs[t], entering, out=scratch[: run.sizes[t]]))
        return c

    def step(self, t: int, dh: Tensor) -> Tensor:
        assert self.dc is not None
        n = self.sizes[t]
        dc = self.dc[:n].add_(_write(torch.mul, dh, self.through[t], out=self.scratch[:n]))
        self.ifg[t].mul_(dc.unsqueeze(1))
        self.do[t].mul_(dh)
        dc.mul_(self.f[t])
        return self.all[t]

    def states(self) -> Tensor:
        width = self.tanh.shape[1]
        return self.gates[:, 3 * width :] * self.tanh


class _GRUForward(_Forward):
    """Gates r, z: sigmoid of the input's product plus the recurrent one; n = tanh(input's + r · recurrent);
    h' = (h − n) · z + n.
    """

    def __init__(self, gates: Tensor, c0: Tensor | None, run: Run, keep: bool) -> None:
        super().__init__(gates, c0, run, keep)
        width = self.width = gates.shape[1] // 3
        self.gates = gates
        self.r_and_z = _split(gates[:, : 2 * width], self.sizes)
        self.r, self.z, self.third = (_split(part, self.sizes) for part in _split(gates, width, 1))
        self.all_n, self.n = self._rows(gates, width)
        self.scratch = gates.new_empty(self.sizes[0], width)

    def step(self, t: int, h: Tensor, product: Tensor, out: Tensor) -> None:
        self.r_and_z[t].add_(product[:, : 2 * self.width]).sigmoid_()
        recurrent, third = product[:, 2 * self.width :], self.third[t]
        n = _write(torch.mul, self.r[t], recurrent, out=self.scratch[: self.sizes[t]]).add_(third)
        n = _write(torch.tanh, n, out=self.n[t])
        _write(torch.sub, h, n, out=out).mul_(self.z[t]).add_(n)
        if self.keep:
            third.copy_(recurrent)  # the input's share has served

    def kept(self, y: Tensor) -> list[Tensor]:
        return [self.gates, self.all_n]


class _GRUBackward(_Backward):
    z: Sequence[Tensor]
    products: Sequence[Tensor]

    def __init__(self, kept: list[Tensor], h0: Tensor, c0: Tensor | None, dc_n: Tensor | None, run: Run) -> None:
        gates, n = kept
        width = n.shape[1]
        sizes = list(run.sizes)
        r, z, recurrent = _split(gates, width, 1)
        self.d = torch.empty_like(gates)
        dr, dz, dn = _split(self.d, width, 1)
        _slope_of_sigmoid(gates[:, : 2 * width], self.d[:, : 2 * width])
        dr.mul_(recurrent)
        self.y = self._states(z, n, h0, run)
        dz.mul_(_all_entering(self.y, h0, run).sub_(n))
        _slope_of_tanh(n, dn).mul_(1.0 - z)
        self.all_products = torch.empty_like(self.d)
        self.r, self.z, self.dr, self.dn = (_split(x, sizes) for x in (r, z, dr, dn))
        self.dr_and_dz = _split(self.d[:, : 2 * width], sizes)
        self.dz_and_dn = _split(self.d[:, width:].unflatten(1, (2, width)), sizes)
        self.products = _split(self.all_products, sizes)
        self.products_r_and_z = _split(self.all_products[:, : 2 * width], sizes)
        self.products_n = _split(self.all_products[:, 2 * width :], sizes)

    @staticmethod
    def _states(z: Tensor, n: Tensor, h0: Tensor, run: Run) -> Tensor:
        """h' = (h − n) · z + n, step after step as forward computed it: the states after each row's step."""
        y = torch.empty_like(n)
        ys, zs, ns = (_split(x, list(run.sizes)) for x in (y, z, n))
        h = h0[:0]
        for t in run.order:
            entering, h = _entering(h, h0, run.sizes[t]), ys[t]
            _write(torch.sub, entering, ns[t], out=h).mul_(zs[t]).add_(ns[t])
        return y

    def states(self) -> Tensor:
        return self.y

    def step(self, t: int, dh: Tensor) -> Tensor:
        self.dz_and_dn[t].mul_(dh.unsqueeze(1))
        dn = self.dn[t]
        self.dr[t].mul_(dn)
        self.products_r_and_z[t].copy_(self.dr_and_dz[t])
        _write(torch.mul, dn, self.r[t], out=self.products_n[t])
        return self.products[t]

    def carry(self, t: int, dh: Tensor) -> Tensor:
        return dh.mul_(self.z[t])

    @property
    def dproducts(self) -> Tensor:
        return self.all_products


class _RNNForward(_Forward):
    """h' = tanh(·) or max(·, 0) of the input's product plus the recurrent one."""

    def __init__(self, gates: Tensor, c0: Tensor | None, run: Run, keep: bool) -> None:
        super().__init__(gates, c0, run, keep)
        self.all = _split(gates, self.sizes)
        self.relu = run.mode == "RNN_RELU"

    def step(self, t: int, h: Tensor, product: Tensor, out: Tensor) -> None:
        _write(torch.add, self.all[t], product, out=out)
        if self.relu:
            out.relu_()
        else:
            out.tanh_()

    def kept(self, y: Tensor) -> list[Tensor]:
        return [y]


class _RNNBackward(_Backward):
    all: Sequence[Tensor]

    def __init__(self, kept: list[Tensor], h0: Tensor, c0: Tensor | None, dc_n: Tensor | None, run: Run) -> None:
        (y,) = kept
        self.y = y
        if run.mode == "RNN_RELU":
            self.d = y.le(0.0).logical_not_().to(torch.float32)
        else:
            self.d = _slope_of_tanh(y, torch.empty_like(y))
        self.all = _split(self.d, list(run.sizes))

    def states(self) -> Tensor:
        return self.y

    def step(self, t: int, dh: Tensor) -> Tensor:
        return self.all[t].mul_(dh)


_CELLS: dict[str, tuple[type[_Forward], type[_Backward]]] = {
    "LSTM": (_LSTMForward, _LSTMBackward),
    "GRU": (_GRUForward, _GRUBackward),
    "RNN_TANH": (_RNNForward, _RNNBackward),
    "RNN_RELU": (_RNNForward, _RNNBackward),
}
