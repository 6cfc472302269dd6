"""Weights held as codes: a float32 tensor to torch, an eighth of its size in memory.

A `PackedWeight` stands for the values that its codes decode to. Products of `hbfp` in its own format read the codes,
along its own axis; every other operator is given the decoded values, so the layers of torch compute with it in FP32.
It is read-only but for `copy_` and `load_state_dict`, has no gradient, and lies on the CPU (or on "meta").

In memory it is *panels*, in the order of this machine's kernels, where the format and the axis allow (`ops.packed`);
what was read from a file stays the file's planes until the first product. The panels of a convolution's kernel are
those of its groups, which the first product tells where nobody else did. Between machines, in pickles and state_dicts,
it is planes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hbfp import ops
from hbfp.array import BlockArray
from hbfp.array import encode as _encode
from hbfp.errors import HBFPError, ShapeError
from hbfp.files.container import forget
from hbfp.format import HBFP, Rounding
from hbfp.ops.entrance import dispatch_modes, threads

__all__ = ["PackedWeight"]


class PackedWeight(Tensor):
    """The values of an encoded tensor; see the module. `of` packs floats, `from_block_array` what was encoded before.

    Attributes:
        format: of the codes.
        axis: of the blocks, non-negative.
        groups: of the convolution whose kernel it is; 0: none is known, or it is a matrix.
        codes, exponents: panels and None, or the mantissa and the exponent plane.
    """

    format: HBFP
    axis: int
    groups: int
    _held: tuple[Tensor, Tensor | None]
    _kept: ops.KeptMatrix | None = None
    """What a product reads, once there was one; None: not asked for since `_held` changed."""
    _kernel: ops.KeptKernel | None = None
    """The same of a convolution."""
    _lent: tuple[NDArray[np.uint8], ...] = ()
    """Whose memory the planes share, until they are laid out."""

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        exponents: Tensor | None,
        format: HBFP,
        shape: Sequence[int],
        axis: int,
        dtype: torch.dtype = torch.float32,
        groups: int = 0,
    ) -> PackedWeight:
        """Takes what is held already, unchecked. `dtype` is what the decoded values are rounded to."""
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=codes.device)
        made.format, made.axis, made.groups, made._held = format, axis, groups, (codes, exponents)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    # --- ways in and out -----------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        x: Tensor,
        format: HBFP | str,
        axis: int = -1,
        rounding: str | Rounding = "nearest_even",
        groups: int = 0,
    ) -> PackedWeight:
        """Packs floats.

        Args:
            x: on the CPU, or on "meta", which gives a packed weight without values.
            format: of the codes.
            axis: of the blocks.
            rounding: any but "stochastic".
            groups: of the convolution whose kernel it is; 0: it is no kernel, or the first product tells.

        Raises:
            ShapeError: no such axis. DTypeError: no floats. HBFPError: stochastic rounding.
        """
        format, rounding = HBFP.parse(format), Rounding.parse(rounding)
        if rounding is Rounding.STOCHASTIC:
            raise HBFPError("a weight that is rounded stochastically is encoded anew at each product: it is not packed")
        shape = tuple(x.shape)
        axis = format.blocked_axis(axis, shape)
        x = x.detach()
        if x.is_meta:
            return cls._on_meta(format, shape, axis, groups=groups)
        codes = None
        if _has_panels(format, shape, axis):
            codes = ops.panels_of_floats(x.reshape(prod(shape[:-1]), shape[-1]), format, rounding.code)
        if codes is not None:
            return cls(codes, None, format, shape, axis)
        made = cls.from_block_array(_encode(x, format, axis=axis, rounding=rounding))
        made.lay_out(groups)
        return made

    @classmethod
    def from_block_array(cls, array: BlockArray) -> PackedWeight:
        """What was encoded elsewhere; its memory is shared until the first product, which checks the codes."""
        array = array.canonical()
        planes = array.mantissa_plane, array.exponent_plane
        made = cls(*map(ops.bytes_of, planes), array.format, array.shape, array.axis)
        made._lent = planes
        return made

    @classmethod
    def _on_meta(
        cls, format: HBFP, shape: tuple[int, ...], axis: int, dtype: torch.dtype = torch.float32, groups: int = 0
    ) -> PackedWeight:
        exponents, mantissas = (
            torch.empty(size, dtype=torch.uint8, device="meta") for size in format.plane_shapes(shape, axis)
        )
        return cls(mantissas, exponents, format, shape, axis, dtype, groups)

    def planes(self) -> tuple[Tensor, Tensor]:
        """The exponent and the mantissa plane (docs/spec.md, section 7), uint8. Blocks of zeros have the byte 0."""
        codes, exponents = self._held
        if exponents is not None:
            return exponents, codes
        if self._is_kernel:
            return ops.planes_of_kernel_panels(codes, self.format, self.shape, self.axis, self.groups)
        return ops.planes_of_panels(codes, self.format, *self._matrix)

    def block_array(self) -> BlockArray:
        """The same as the numpy level holds it."""
        exponents, mantissas = (ops.bytes_in(plane) for plane in self.planes())
        return BlockArray(exponents, mantissas, self.format, tuple(self.shape), self.axis)

    def decode(self) -> Tensor:
        """The values, a plain tensor of this one's dtype."""
        values = ops.decode(*self._held, self.format, self.shape, self.axis, self.groups if self._is_kernel else 0)
        return values if self.dtype is torch.float32 else values.to(self.dtype)

    def decode_as_it_lies(self) -> Tensor:
        """The same, in memory along the blocks: of a convolution channels last, as its product reads them."""
        if not (self._is_kernel and self.format.block is not None and self.dtype is torch.float32):
            return self.decode()
        exponents, codes = self.planes()
        lines = [size for dimension, size in enumerate(self.shape) if dimension != self.axis]
        values = ops.decode(codes, exponents, self.format, [*lines, self.shape[self.axis]], -1)
        return values.movedim(-1, self.axis)

    @property
    def codes(self) -> Tensor:
        return self._held[0]

    @property
    def exponents(self) -> Tensor | None:
        return self._held[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes in memory, or of the file's part that stands for them."""
        return sum(x.numel() for x in self._held if x is not None)

    def lay_out(self, groups: int = 0) -> None:
        """Makes panels of planes, where the format has any; the next product would.

        Args:
            groups: of the convolution whose kernel it is; 0: those that it knows of.

        Raises:
            CodeError: the planes hold what no encoder writes.
        """
        codes, exponents = self._held
        if exponents is None:
            return
        self.groups = groups = groups or self.groups
        shape = tuple(self.shape)
        if codes.is_meta:
            return
        panels = None
        if self._is_kernel:
            if ops.has_kernel_panels(self.format, shape, self.axis, groups):
                panels = ops.kernel_panels_of_planes(exponents, codes, self.format, shape, self.axis, groups)
        elif _has_panels(self.format, shape, self.axis):
            panels = ops.panels_of_planes(exponents, codes, self.format, *self._matrix)
        if panels is not None:
            self._hold(panels, None)
            lent, self._lent = self._lent, ()
            for plane in lent:
                forget(plane)

    def _hold(self, codes: Tensor, exponents: Tensor | None) -> None:
        self._held, self._kept, self._kernel = (codes, exponents), None, None

    @property
    def _is_kernel(self) -> bool:
        """Whether its panels, if it has any, are those of a kernel: the blocks do not run along its last axis."""
        return self.axis < len(self.shape) - 1

    @property
    def _matrix(self) -> tuple[int, int]:
        return prod(self.shape[:-1]), self.shape[-1]

    def adopt(self, other: PackedWeight) -> None:
        """Holds what `other` holds, which has the same format, axis and shape, without copying it."""
        self._hold(*other._held)
        self._lent, self.groups = other._lent, other.groups or self.groups

    # --- products --------------------------------------------------------------------------------------------------

    def quick_product(
        self, x: Tensor, formats: tuple[HBFP, HBFP], rounding: int, seed: int, stream: int, bias: Tensor | None
    ) -> Tensor | None:
        """x [..., K] times the transpose of this [N, K]; None where anything is not as usual, errors included.

        Not for code that torch.compile traces.
        """
        matrix = self._kept or self.kept_matrix()
        if dispatch_modes() or matrix is None or (formats[1] is not self.format and formats[1] != self.format):
            return None
        out: Tensor | None = matrix.linear(x, formats[0].core, rounding, seed, stream, bias, threads())
        return out

    def kept_matrix(self) -> ops.KeptMatrix | None:
        """Panels as products of this [N, K] along K read them, laid out where they were not; None: it has none."""
        self.lay_out()
        codes, exponents = self._held
        if exponents is None and self.axis == 1 and not codes.is_meta:
            self._kept = ops.KeptMatrix(codes, self.format.core, self.shape[0], self.shape[1])
        return self._kept

    def kept_kernel(self, axis: int, groups: int) -> ops.KeptKernel | None:
        """Panels as a convolution of so many groups reads them that reduces along `axis`, laid out where they were not;
        None: it has none."""
        if self._kernel is None and self.axis == axis and self._is_kernel:
            self.lay_out(groups)
            codes, exponents = self._held
            if exponents is None:
                shape = ops.kernel_shape(self.shape)
                self._kernel = ops.KeptKernel(codes, self.format.core, shape, axis, self.groups)
        return self._kernel

    # --- what torch asks of a subclass -----------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = ["codes"] if self._held[1] is None else ["codes", "exponents"]
        return names, (str(self.format), tuple(self.shape), self.axis, self.dtype, self.groups)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> PackedWeight:
        format, *rest = context
        return PackedWeight(inner["codes"], inner.get("exponents"), HBFP.parse(format), *rest)

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on: the description, not the codes."""
        names, context = self.__tensor_flatten__()
        sizes = [(name, tuple(getattr(self, name).shape)) for name in names]
        return hashlib.sha256(repr((sizes, context, str(self.device))).encode()).hexdigest()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = _OPERATORS.get(func)
        if own is not None:
            result = own(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, PackedWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                raise HBFPError(
                    f"a packed weight is not changed in place, and {func} would: unfreeze the model first "
                    "(hbfp.unfreeze_), or assign new values with copy_"
                )
        return func(*tree_map(_decoded, args), **tree_map(_decoded, kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        exponents, mantissas = self.planes()
        described = str(self.format), tuple(self.shape), self.axis, self.dtype
        return _rebuilt, (exponents, mantissas, *described, isinstance(self, nn.Parameter), self.groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        if id(self) not in memo:
            memo[id(self)] = _like(self, cast(PackedWeight, self.clone()))
        return cast(PackedWeight, memo[id(self)])

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        held = "planes" if self._held[1] is not None else "panels"
        device = "" if self.device.type == "cpu" else f", device={self.device.type}"
        return f"PackedWeight({list(self.shape)}, {self.format}, axis={self.axis}, {held}{device})"


def _has_panels(format: HBFP, shape: tuple[int, ...], axis: int) -> bool:
    return (
        len(shape) > 1
        and axis == len(shape) - 1
        and format.core.encodes_to_panels
        and 0 not in shape
        and ops.panel_sizes(format, prod(shape[:-1]), shape[-1]) is not None
    )


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, PackedWeight) else value


def _like(old: Tensor, new: PackedWeight) -> PackedWeight:
    """`new`, a parameter if `old` is one."""
    return cast(PackedWeight, nn.Parameter(new, requires_grad=False)) if isinstance(old, nn.Parameter) else new


def _rebuilt(
    exponents: Tensor,
    mantissas: Tensor,
    format: str,
    shape: tuple[int, ...],
    axis: int,
    dtype: torch.dtype,
    parameter: bool,
    groups: int = 0,
) -> Tensor:
    """What a pickle holds."""
    made = PackedWeight(mantissas, exponents, HBFP.parse(format), shape, axis, dtype, groups)
    return nn.Parameter(made, requires_grad=False) if parameter else made


torch.serialization.add_safe_globals([_rebuilt])


# --- operators that know about codes ---------------------------------------------------------------------------------

_OPERATORS: dict[Any, Callable[..., Any]] = {}


def _of(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATORS.update(dict.fromkeys(operators, function))
        return function

    return register


def _with(
    x: PackedWeight,
    change: Callable[[Tensor], Tensor],
    *,
    shape: Sequence[int] | None = None,
    axis: int | None = None,
    dtype: torch.dtype | None = None,
) -> PackedWeight:
    codes, exponents = x._held
    return PackedWeight(
        change(codes),
        None if exponents is None else change(exponents),
        x.format,
        x.shape if shape is None else shape,
        x.axis if axis is None else axis,
        x.dtype if dtype is None else dtype,
        x.groups,
    )


_aten: Any = torch.ops.aten


@_of(_aten.detach.default, _aten.alias.default)
def _detach(func: Any, x: PackedWeight) -> PackedWeight:
    made = _with(x, func)
    made._lent = x._lent
    return made


@_of(_aten.clone.default)
def _clone(func: Any, x: PackedWeight, *, memory_format: Any = None) -> PackedWeight:
    return _with(x, func)


@_of(_aten._to_copy.default)
def _to_copy(func: Any, x: PackedWeight, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    _require_cpu(device)
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    if device is not None and torch.device(device).type == "meta":
        return PackedWeight._on_meta(x.format, tuple(x.shape), x.axis, dtype or x.dtype, x.groups)
    if x.is_meta and device is not None:
        return NotImplemented
    return _with(x, func, dtype=dtype)


@_of(_aten.empty_like.default)
def _empty_like(func: Any, x: PackedWeight, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    _require_cpu(device)
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    # Not uninitialised memory: there are codes that may not be.
    planes = PackedWeight._on_meta(x.format, tuple(x.shape), x.axis, dtype or x.dtype, x.groups)
    to = x.device if device is None else device
    return (
        planes if torch.device(to).type == "meta" else _with(planes, lambda inner: torch.zeros_like(inner, device=to))
    )


def _require_cpu(device: Any) -> None:
    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        raise HBFPError(
            f"expected the CPU; found device {device}: packed weights are read by the CPU's kernels. Unfreeze the "
            "model (hbfp.unfreeze_) before it is moved"
        )


@_of(_aten.copy_.default)
def _copy(func: Any, x: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(x, PackedWeight):
        return NotImplemented
    if x.shape != source.shape:
        raise ShapeError(f"expected values of shape {tuple(x.shape)} for a packed weight; found {tuple(source.shape)}")
    if x.is_meta:
        return x
    if isinstance(source, PackedWeight) and (source.format, source.axis) == (x.format, x.axis):
        codes, exponents = source._held
        if exponents is None and x._is_kernel and source.groups != x.groups:
            exponents, codes = source.planes()
        x._hold(codes.clone(), None if exponents is None else exponents.clone())
        x.lay_out()
    else:
        values = source.decode() if isinstance(source, PackedWeight) else source
        x._hold(*PackedWeight.of(values, x.format, x.axis, groups=x.groups)._held)
    return x


@_of(_aten.is_pinned.default)
def _is_pinned(func: Any, x: PackedWeight, device: Any = None) -> bool:
    return False


@_of(_aten.view.default, _aten._unsafe_view.default)
def _view(func: Any, x: PackedWeight, size: Sequence[int]) -> Any:
    """Views that leave the blocked last dimension alone change nothing but the shape."""
    shape = [*size]
    if x.axis != x.dim() - 1 or x.format.block is None or not shape:
        return NotImplemented
    if -1 in shape:
        shape[shape.index(-1)] = x.numel() // max(1, -prod(shape))
    if prod(shape) != x.numel() or shape[-1] != x.shape[-1]:
        return NotImplemented
    return _with(x, lambda inner: inner, shape=shape, axis=len(shape) - 1)


@_of(_aten.slice.Tensor)
def _slice(
    func: Any, x: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Rows of a matrix that begin where a panel does, as those of one projection of several do."""
    codes, exponents = x._held
    if dim % x.dim() or x.dim() != 2 or step != 1 or x.axis != 1 or x.format.block is None:
        return NotImplemented
    first, last, _ = slice(start, end).indices(x.shape[0])
    last = max(first, last)
    shape = (last - first, x.shape[1])
    if exponents is not None:
        return _with(x, lambda inner: inner[first:last], shape=shape)
    sizes, wanted = (ops.panel_sizes(x.format, lines, x.shape[1]) for lines in (x.shape[0], last - first))
    if sizes is None or wanted is None or first % sizes[2]:
        return NotImplemented
    (panels, size, lines), count = sizes, wanted[0]
    begin = first // lines
    there = min(count, panels - begin)
    parts = []
    for part, each in ((codes[: panels * size], size), (codes[panels * size :], 1)):
        parts.append(part[begin * each : (begin + there) * each])
        if there < count:  # panels are made in fours and more
            parts.append(part.new_zeros((count - there) * each))
    return PackedWeight(torch.cat(parts), None, x.format, shape, 1, x.dtype)


@_of(torch.ops.hbfp.product.default)
def _product(
    func: Any,
    a: Tensor, a_axis: int, a_format: str, a_rounding: int, a_stream: int,
    b: Tensor, b_axis: int, b_format: str, b_rounding: int, b_stream: int,
    seed: int, bias: Tensor | None, streams: Sequence[Tensor] | None = None,
) -> Any:  # fmt: skip
    if not isinstance(b, PackedWeight) or isinstance(a, PackedWeight) or isinstance(bias, PackedWeight):
        return NotImplemented
    fits = a_axis == -1 and b_axis == -1 and b.dim() == 2 and b.axis == 1 and str(b.format) == b_format
    if not fits or b_rounding == Rounding.STOCHASTIC.code or a.dim() < 1 or a.shape[-1] != b.shape[1]:
        return NotImplemented
    if type(b.codes) is Tensor:
        b.lay_out()
    return torch.ops.hbfp.packed_product(
        a, a_format, a_rounding, a_stream, b.codes, b.exponents, b_format, b.shape[0], seed, bias,
        None if streams is None else [*streams][:1],
    )  # fmt: skip


@_of(torch.ops.hbfp.convolution.default, torch.ops.hbfp.convolution_input_gradient.default)
def _convolution(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, formats: list[str], *coded: Any) -> Any:
    if not isinstance(weight, PackedWeight) or isinstance(x, PackedWeight) or isinstance(bias, PackedWeight):
        return NotImplemented
    forward = func is torch.ops.hbfp.convolution.default
    groups = coded[_GROUPS]
    # Whatever the rounding: values of codes are exact in their own format.
    if weight.axis != int(forward) or str(weight.format) != formats[1]:
        return NotImplemented
    if type(weight.codes) is Tensor:
        weight.lay_out(groups)
    if weight.exponents is not None or weight.groups != groups:
        return NotImplemented
    packed = torch.ops.hbfp.packed_convolution if forward else torch.ops.hbfp.packed_convolution_input_gradient
    return packed(x, weight.codes, list(weight.shape), bias, formats, *coded)


_GROUPS = 8
"""Their place behind the formats: roundings, streams, drawn, seed, kernel, stride, padding, dilation, groups."""
