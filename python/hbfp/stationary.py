"""Products that share their right operand: a weight that stays while step after step of a sequence meets it.

Where the codes of the weight do not depend on the step, that is, unless it is rounded stochastically, it is encoded and
laid out once. The bits are those of the backend's `product` either way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from hbfp import _core, emulation, ops
from hbfp.backends import arithmetic
from hbfp.format import Rounding
from hbfp.policy import Backend, MatmulPolicy

__all__ = ["StationaryWeight"]


class StationaryWeight:
    """The right operand of one product at each of many steps.

    Args:
        weight: [N, K], reduced along -1, or [K, N], reduced along -2.
        axis: which.
        policy: formats and roundings of the product.
        backend: who computes it.
        seed: of stochastic rounding.
        streams: of the left and of the right operand at index 0.
        name, source: told to the recorders, as by `ops.product`.
    """

    def __init__(
        self,
        weight: Tensor,
        axis: int,
        policy: MatmulPolicy,
        backend: Backend,
        seed: int,
        streams: tuple[int, int],
        *,
        name: str,
        source: object,
    ) -> None:
        self.weight, self.axis, self.policy, self.backend = weight, axis, policy, backend
        self.seed, self.streams, self.name, self.source = seed, streams, name, source
        self.threads = 0 if is_compiling() else torch.get_num_threads()
        self.packed = self._lay_out()
        self.decoded = self._decode()
        self.told = False

    def _lay_out(self) -> _core.Packed | None:
        """None: every step goes through `ops.product`, which knows about all that is not as usual."""
        weight, right = self.weight, self.policy.right
        usual = type(weight) in (Tensor, Parameter) and weight.is_cpu and weight.dtype is torch.float32
        if (
            not usual
            or weight.numel() == 0
            or weight.is_meta
            or right.rounding is Rounding.STOCHASTIC
            or self.backend is not Backend.INTEGER
            or is_compiling()
            or torch._C._len_torch_dispatch_stack()
        ):
            return None
        operand = _core.Floats(weight.resolve_neg(), self.axis, right.format.core, right.rounding.code)
        return _core.prepack(operand, self.threads)

    def _decode(self) -> Tensor | None:
        """[K, N], what the codes stand for, where the emulation multiplies; None: every step encodes anew."""
        right = self.policy.right
        if self.backend is not Backend.EMULATE or right.rounding is Rounding.STOCHASTIC:
            return None
        decoded = emulation.quantize(self.weight, right.format, self.axis, right.rounding.code)
        return decoded.mT if self.axis == -1 else decoded

    def multiply(self, x: Tensor, index: int, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times the weight, plus bias [N], into `out`, contiguous, [M, N], at step `index`.

        `x` and `bias` are float32, and plain tensors if the weight is one.
        """
        step = (index & 0xFF) << 4
        left, right = self.streams
        formats, roundings = self.policy.formats, self.policy.roundings
        if self.decoded is not None:
            coded = emulation.quantize(x, formats[0], -1, roundings[0], self.seed, left | step)
            emulation.multiply(coded, self.decoded, bias, out=out)
        elif self.packed is None:
            result = arithmetic(self.backend).product(
                x, -1, self.weight, self.axis, formats, roundings, self.seed, (left | step, right | step), bias,
                name=self.name, source=self.source,
            )  # fmt: skip
            return out.copy_(result)
        else:
            operand = _core.Floats(x, -1, formats[0].core, roundings[0], self.seed, left | step)
            _core.product(operand, self.packed, out, bias, False, self.threads)
        if ops.recorders:
            self._tell(x, left | step, out.numel() * x.shape[-1])
        return out

    def _tell(self, x: Tensor, stream: int, macs: int) -> None:
        """Tells of one step, whose left operand was encoded for it; the weight was for the first step that is told."""
        (left, right), roundings = self.policy.formats, self.policy.roundings
        told, self.told = self.told, True

        def operands() -> tuple[ops.Operand, ...]:
            step = ops.Operand(x, left, -1, roundings[0], self.seed, stream)
            weight = ops.Operand(self.weight, right, self.axis, roundings[1], self.seed, self.streams[1])
            return (step,) if told else (step, weight)

        ops.tell(ops.Product(self.name, self.source, macs, left, right, stream, operands))
