"""Recurrent layers and cells whose products run in fixed point; their gates are torch's formulas in FP32.

A layer numbers its products with consecutive sites: for each layer of the stack, for each direction, one for the
products of the input, one for the recurrent ones and, with projections, one for those. A cell has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from hbfp import autograd, ops
from hbfp.errors import ShapeError
from hbfp.format import HBFP
from hbfp.nn.functional import RecipeLike
from hbfp.nn.precision import as_wide_as
from hbfp.nn.tracing import Proxy, node
from hbfp.policy import LayerState, Weight, solo_state
from hbfp.recurrence import Run, SequenceFunction

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Recurrent(nn.RNNBase):
    """What RNN, GRU and LSTM share: all of it but the formula, which `mode` names."""

    hbfp_state: LayerState | None = None
    """None: the layer computes in FP32, as torch's does."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_state = solo_state(recipe, seed, site, self.hbfp_sites())

    def hbfp_sites(self) -> int:
        """How many numbers the layer takes."""
        return self.num_layers * (2 if self.bidirectional else 1) * (3 if self.proj_size else 2)

    def hbfp_parts(self) -> list[str]:
        """What each number stands for, as the weights are called."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        parts = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        return [f"{part}_l{n}{way}" for n in range(self.num_layers) for way in directions for part in parts]

    def hbfp_weights(self, format: HBFP) -> list[Weight]:
        """The weights of all products."""
        return [Weight(self, name) for name in self._flat_weights_names if name.startswith("weight")]

    def forward(self, input: Any, hx: Any = None) -> Any:
        state = self.hbfp_state
        if state is None:
            return super().forward(input, hx)
        if isinstance(input, Proxy):
            return node(self, input, hx)
        if state.solo and self.training:
            state.root.advance()
        given = None if hx is None else tuple(hx) if self.mode == "LSTM" else (hx,)
        if isinstance(input, PackedSequence):
            rows, sizes = input.data, tuple(input.batch_sizes.tolist())
            initial = self._initial(given, rows, sizes[0], batched=True)
            if input.sorted_indices is not None:
                initial = tuple(x.index_select(1, input.sorted_indices) for x in initial)
            rows, final = self._layers(state, rows, sizes, initial)
            if input.unsorted_indices is not None:
                final = tuple(x.index_select(1, input.unsorted_indices) for x in final)
            data, final = as_wide_as(input.data, rows), tuple(as_wide_as(input.data, x) for x in final)
            packed = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, final if self.mode == "LSTM" else final[0]

        batched = input.dim() == 3
        if input.dim() not in (2, 3):
            raise ShapeError(f"{type(self).__name__} takes [steps, in] or a batch of these; found {tuple(input.shape)}")
        x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
        steps, sequences = x.shape[:2]
        initial = self._initial(given, x, sequences, batched)
        rows, final = self._layers(state, x.reshape(steps * sequences, x.shape[2]), (sequences,) * steps, initial)
        out = rows.unflatten(0, (steps, sequences))
        if not batched:
            out, final = out.squeeze(1), tuple(x.squeeze(1) for x in final)
        elif self.batch_first:
            out = out.transpose(0, 1)
        out, final = as_wide_as(input, out), tuple(as_wide_as(input, x) for x in final)
        return out, final if self.mode == "LSTM" else final[0]

    def _initial(
        self, given: tuple[Tensor, ...] | None, x: Tensor, sequences: int, batched: bool
    ) -> tuple[Tensor, ...]:
        """h_0, and c_0 of an LSTM: [layers · directions, sequences, width], checked; zeros where x is if none are."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        widths = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        shapes = [(layers, sequences, width) if batched else (layers, width) for width in widths]
        if given is None:
            given = tuple(torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes)
        if [tuple(x.shape) for x in given] != shapes:
            raise ShapeError(
                f"initial states of {type(self).__name__}: expected {' and '.join(map(str, shapes))}; found "
                f"{' and '.join(str(tuple(x.shape)) for x in given)}"
            )
        ops.require_real(*given)
        return given if batched else tuple(x.unsqueeze(1) for x in given)

    def _layers(
        self, state: LayerState, rows: Tensor, sizes: tuple[int, ...], initial: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The whole stack on rows [rows, in]: the last layer's [rows, directions · out], and the final states."""
        if rows.dim() != 2 or rows.shape[1] != self.input_size or not sizes:
            raise ShapeError(
                f"{type(self).__name__} takes one step or more of {self.input_size} features; found "
                f"{len(sizes)} steps and rows {tuple(rows.shape)}"
            )
        ops.require_real(rows)
        autograd.require_plain(rows, *initial)
        directions, parts = 2 if self.bidirectional else 1, 3 if self.proj_size else 2
        final: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                weights = [
                    getattr(self, name + suffix, None)
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
                ]
                streams = tuple(state.stream(0, place * parts + part) for part in range(3))
                run = Run(
                    self.mode, sizes, bool(direction), state.recipe, state.root.seed,
                    cast(tuple[int, int, int], streams), state,
                )  # fmt: skip
                c0 = initial[1][place] if len(initial) > 1 else None
                y, *states = SequenceFunction.apply(rows, initial[0][place], c0, *weights, run)
                outputs.append(y)
                final.append(tuple(states[: len(initial)]))
            rows = outputs[0] if directions == 1 else torch.cat(outputs, 1)
            if self.training and self.dropout > 0.0 and layer < self.num_layers - 1:
                rows = dropout(rows, self.dropout)
        return rows, tuple(torch.stack(states) for states in zip(*final, strict=True))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'FP32' if self.hbfp_state is None else self.hbfp_state.recipe.formats}"


class RNN(_Recurrent, nn.RNN):
    """`torch.nn.RNN` in fixed point: same parameters, same state_dict, same initialisation, same results' shapes.

    Args:
        args, keywords: as in `torch.nn.RNN`.
        recipe: a name, a format or a `hbfp.Recipe`.
        seed: of stochastic rounding.
        site: the first of the layer's numbers, which tell its random bits from those of other layers with the same
            seed; it takes two for each layer of the stack and direction (three with `proj_size`).

    Shapes: as in torch, packed sequences and unbatched input included; any real floating dtype in; results and
    states float32, or in the input's dtype if that is bfloat16 or float16, unless autocasting.
    """


class GRU(_Recurrent, nn.GRU):
    """`torch.nn.GRU` in fixed point; as `hbfp.nn.RNN`."""


class LSTM(_Recurrent, nn.LSTM):
    """`torch.nn.LSTM` in fixed point, projections included; as `hbfp.nn.RNN`."""


# --- cells -----------------------------------------------------------------------------------------------------------


class _Cell(nn.RNNCellBase):
    """What the cells share: two products, of the input and of the state, each with a number of its own."""

    hbfp_state: LayerState | None = None
    """None: the cell computes in FP32, as torch's does."""

    def __init__(self, *args: Any, recipe: RecipeLike = "hbfp4", seed: int = 0, site: int = 0, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.hbfp_state = solo_state(recipe, seed, site, self.hbfp_sites())

    def hbfp_sites(self) -> int:
        """How many numbers the cell takes."""
        return 2

    def hbfp_parts(self) -> list[str]:
        """What each number stands for, as the weights are called."""
        return ["ih", "hh"]

    def hbfp_weights(self, format: HBFP) -> list[Weight]:
        """The weights of both products."""
        return [Weight(self, "weight_ih"), Weight(self, "weight_hh")]

    def _products(self, state: LayerState, x: Tensor, states: Sequence[Tensor], index: int) -> tuple[Tensor, Tensor]:
        """x W_ihᵀ + b_ih and h W_hhᵀ + b_hh, the shapes checked; states: h and, for an LSTM, c."""
        if state.solo and self.training:
            state.root.advance()
        expected = (*x.shape[:-1], self.hidden_size)
        wrong = [tuple(h.shape) for h in states if tuple(h.shape) != expected]
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size or wrong:
            raise ShapeError(
                f"{type(self).__name__} takes [{self.input_size}] or [batch, {self.input_size}] and states "
                f"[..., {self.hidden_size}] of as many rows; found {tuple(x.shape)} and {wrong or expected}"
            )
        recipe, seed = state.recipe, state.root.seed
        b_ih, b_hh = self.bias_ih, self.bias_hh
        of_input = autograd.linear(x, self.weight_ih, b_ih, recipe, seed, state.stream(index), state)
        return of_input, autograd.linear(states[0], self.weight_hh, b_hh, recipe, seed, state.stream(index, 1), state)

    def _zeros(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.hidden_size, dtype=torch.float32, device=x.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'FP32' if self.hbfp_state is None else self.hbfp_state.recipe.formats}"


class RNNCell(_Cell, nn.RNNCell):
    """`torch.nn.RNNCell` in fixed point: same parameters, same state_dict, same initialisation.

    Called several times in one training step it draws the same random bits each time, unless each call is given an
    `index` of its own, 0 to 255: the time step, say.

    Args:
        args, keywords: as in torch.
        recipe: a name, a format or a `hbfp.Recipe`.
        seed: of stochastic rounding.
        site: the first of the two numbers that tell the cell's random bits from others' with the same seed.

    Shapes: input [batch, in] or [in], states [batch, hidden] or [hidden] of any real floating dtype; results
    as those of `RNN`.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None, *, index: int = 0) -> Tensor:
        state = self.hbfp_state
        if state is None:
            return super().forward(input, hx)
        if isinstance(input, Proxy):
            return cast(Tensor, node(self, input, hx, index=index))
        hx = self._zeros(input) if hx is None else hx
        of_input, of_state = self._products(state, input, (hx,), index)
        total = of_input + of_state
        return as_wide_as(input, total.relu() if self.nonlinearity == "relu" else total.tanh())


class GRUCell(_Cell, nn.GRUCell):
    """`torch.nn.GRUCell` in fixed point; as `hbfp.nn.RNNCell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None, *, index: int = 0) -> Tensor:
        state = self.hbfp_state
        if state is None:
            return super().forward(input, hx)
        if isinstance(input, Proxy):
            return cast(Tensor, node(self, input, hx, index=index))
        # Once, so that the gradient of a state in 16 bits is rounded once and not at each of its uses.
        hx = self._zeros(input) if hx is None else hx.to(torch.float32)
        of_input, of_state = self._products(state, input, (hx,), index)
        width = self.hidden_size
        r, z = (of_input + of_state)[..., : 2 * width].sigmoid().chunk(2, -1)
        n = (of_input[..., 2 * width :] + r * of_state[..., 2 * width :]).tanh()
        return as_wide_as(input, (hx - n) * z + n)


class LSTMCell(_Cell, nn.LSTMCell):
    """`torch.nn.LSTMCell` in fixed point; as `hbfp.nn.RNNCell`."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, index: int = 0
    ) -> tuple[Tensor, Tensor]:
        state = self.hbfp_state
        if state is None:
            return super().forward(input, hx)
        if isinstance(input, Proxy):
            return cast(Tensor, node(self, input, hx, index=index))
        h, c = (self._zeros(input), self._zeros(input)) if hx is None else hx
        of_input, of_state = self._products(state, input, (h, c), index)
        gates, width = of_input + of_state, self.hidden_size
        i, f = gates[..., : 2 * width].sigmoid().chunk(2, -1)
        g, o = gates[..., 2 * width : 3 * width].tanh(), gates[..., 3 * width :].sigmoid()
        c = f * c + i * g
        return as_wide_as(input, o * c.tanh()), as_wide_as(input, c)
