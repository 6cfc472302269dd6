"""The numpy level: encoded arrays, and products between them.

Nothing here computes a number: arrays are checked, converted to float32 where the contract says so, and handed to the
compiled core, which gives the same bits at any number of threads.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp import _core
from hbfp.errors import CodeError, DTypeError, FormatError, HBFPError, ShapeError
from hbfp.format import HBFP, Rounding

__all__ = [
    "BlockArray",
    "PackedOperand",
    "encode",
    "get_num_threads",
    "info",
    "linear",
    "matmul",
    "prepack",
    "quantize",
    "set_num_threads",
]

Float32: TypeAlias = NDArray[np.float32]

_chosen_threads: int | None = None


# --- threads and build -----------------------------------------------------------------------------------------------


def set_num_threads(n: int | None) -> None:
    """Let every following call use up to `n` threads; None goes back to the default. Results never depend on it.

    Raises:
        HBFPError: `n` is under 1.
    """
    global _chosen_threads
    _chosen_threads = None if n is None else _thread_count(n)


def get_num_threads() -> int:
    """Threads a call may use: what was set, else torch's number if torch is loaded, else the CPUs of this process."""
    if _chosen_threads is not None:
        return _chosen_threads
    # Only looked up: the numpy level neither needs nor loads torch, but where it is loaded two settings would fight.
    torch_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if torch_threads is not None:
        return int(torch_threads())
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def info() -> dict[str, Any]:
    """What runs here: version, kernel level in use, every level or why it is not available, CPU, threads, build."""
    return {"version": _core.__version__, **_core.info(), "num_threads": get_num_threads()}


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return get_num_threads()
    return _integer(threads, "threads", 1, 2**31 - 1)


def _integer(value: SupportsIndex, name: str, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise HBFPError(f"{name} must be an integer; found {value!r}") from None
    if not low <= number <= high:
        raise HBFPError(f"{name} must lie in {low} ... {high}; found {number}")
    return number


def _rounding_arguments(rounding: str | Rounding, seed: int, stream: int) -> tuple[int, int, int]:
    limit = 2**64 - 1
    return Rounding.parse(rounding).code, _integer(seed, "seed", 0, limit), _integer(stream, "stream", 0, limit)


# --- the way in: any array of floats becomes float32 -----------------------------------------------------------------

_WHAT_TO_DO = {
    "b": "convert it with x.astype(np.float32)",
    "i": "convert values with x.astype(np.float32); codes made elsewhere enter by BlockArray.from_parts",
    "u": "convert values with x.astype(np.float32); codes made elsewhere enter by BlockArray.from_parts",
    "c": "encode x.real and x.imag one by one",
    "f": "convert it with x.astype(np.float64)",
}


def _float32(x: Any, name: str = "x") -> Float32:
    """`x` as an aligned float32 array of any strides, not copied where it is one already.

    float16 and bfloat16 widen exactly, float64 is rounded to nearest-even, byte-swapped arrays are swapped back.

    Raises:
        DTypeError: `x` holds anything else.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(f"{name} is a masked array and a block has no mask: fill it first with x.filled(value)")
    try:
        # dlpack and not __array__: the latter fixes the storage of a torch tensor, which sharded training must resize.
        array: NDArray[Any] = np.from_dlpack(x) if _offers_dlpack(x) else np.asarray(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise DTypeError(
            f"{name} must be an array of floats on the CPU; numpy cannot read this {type(x).__name__}: {error}"
        ) from error
    dtype = array.dtype
    if dtype.name in ("float32", "float16"):
        array = array.astype(np.float32, copy=False)
    elif dtype.name == "float64":
        array = _round_float64(array)
    elif dtype.name == "bfloat16":
        array = _widen_bfloat16(array.view(np.uint16))
    else:
        advice = _WHAT_TO_DO.get(dtype.kind, "convert it to an array of floats")
        raise DTypeError(f"{name} must hold float32, float64, float16 or bfloat16; found {dtype}: {advice}")
    return array if array.flags.aligned else array.copy()


def _offers_dlpack(x: Any) -> bool:
    return hasattr(x, "__dlpack__") and not isinstance(x, np.ndarray)


def _widen_bfloat16(patterns: NDArray[np.uint16]) -> Float32:
    """The values whose upper halves are `patterns`."""
    wide = patterns.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _round_float64(x: NDArray[np.float64]) -> Float32:
    """float64 rounded once to float32, to nearest-even, also where the caller's mode flushes subnormals to zero."""
    with np.errstate(all="ignore"):  # beyond float32 is infinity, by contract
        rounded = x.astype(np.float32)
    # Under 2^-125 float32 counts in steps of 2^-149 and its bit pattern is that count, so an exact scaling and one
    # rounding to an integer give the pattern without ever holding a subnormal number.
    tiny = np.abs(x) < 2.0**-125
    if tiny.any():
        values = x[tiny]
        steps = np.rint(np.abs(values) * 2.0**149).astype(np.uint32)
        rounded.view(np.uint32)[tiny] = steps | np.signbit(values).astype(np.uint32) << np.uint32(31)
    return rounded


def _output(out: Any, shape: tuple[int, ...]) -> Float32:
    if out is None:
        return np.empty(shape, dtype=np.float32)
    result: Float32 = out
    if not isinstance(out, np.ndarray) or out.dtype != np.float32:
        raise DTypeError(f"out must be a float32 array; found {getattr(out, 'dtype', type(out).__name__)}")
    if out.shape != shape:
        raise ShapeError(f"out must have the result's shape {list(shape)}; found {list(out.shape)}")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise ShapeError("out must be C-contiguous, aligned and writable: give np.empty(shape, np.float32), then copy")
    return result


# --- encoded arrays --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockArray:
    """An array in block floating point: two packed planes and their description. Immutable.

    Made by `encode`, `from_parts` and `load`. The constructor takes planes as they are stored (docs/spec.md
    section 7), without copying them; it checks their shapes at once and the codes when they are first read.

    Attributes:
        exponent_plane: uint8 [rows, blocks per row], read-only.
        mantissa_plane: uint8 [rows, bytes per row], read-only.
        format: how the planes are to be read.
        shape: the logical shape.
        axis: the blocked axis, counted from the front; the last one for tiles and whole tensors.
        rounding: how the codes were made, or None where that is not known.
        transposed: the planes hold the transpose (`T` and `mT` of tiles and whole tensors only).

    Raises:
        FormatError, ShapeError, DTypeError: the description and the planes do not fit together.
    """

    exponent_plane: NDArray[np.uint8]
    mantissa_plane: NDArray[np.uint8]
    format: HBFP
    shape: tuple[int, ...]
    axis: int = -1
    rounding: Rounding | None = None
    transposed: bool = field(default=False, kw_only=True)
    source: str | None = field(default=None, kw_only=True)
    """Where the planes come from, for error messages."""
    _checked: bool = field(default=False, kw_only=True)

    __array_ufunc__ = None  # numpy operators between an array and this one would compute in FP32 without a word
    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        format = HBFP.parse(self.format)
        shape = tuple(_integer(size, "a dimension", 0, 2**63 - 1) for size in self.shape)
        if self.transposed and (format.block is not None or len(shape) < 2):
            raise ShapeError("only tiles and whole tensors of two dimensions or more can be held transposed")
        fields: dict[str, Any] = {
            "format": format,
            "shape": shape,
            "axis": format.blocked_axis(self.axis, shape),
            "rounding": None if self.rounding is None else Rounding.parse(self.rounding),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        expected = format.plane_shapes(*self._held())
        for name, plane_shape in zip(("exponent_plane", "mantissa_plane"), expected, strict=True):
            object.__setattr__(self, name, _read_only_plane(getattr(self, name), name, plane_shape, self))

    @classmethod
    def from_parts(
        cls,
        mantissas: ArrayLike,
        exponents: ArrayLike,
        format: HBFP | str,
        shape: tuple[int, ...],
        axis: int = -1,
    ) -> BlockArray:
        """Codes made elsewhere, validated.

        Args:
            mantissas: integers of the logical `shape`, in -max_code ... max_code.
            exponents: integers 0 ... 255 (s + 127, or 255 for a NaN block) of the logical shape with the blocked axis
                counted in blocks; tiles count both of the last two dimensions, a whole tensor has one.
            format: of the codes.
            shape: the logical shape.
            axis: the blocked axis.

        Raises:
            ShapeError: the parts do not have these shapes.
            DTypeError: the parts are not integers.
            CodeError: a code that the format does not have, or a code that is not 0 in a NaN block.
        """
        format = HBFP.parse(format)
        shape = tuple(shape)
        axis = format.blocked_axis(axis, shape)
        codes = _integers(mantissas, "mantissas", shape, -format.max_code, format.max_code)
        bytes_ = _integers(exponents, "exponents", _exponent_shape(format, shape, axis), 0, 255).astype(np.uint8)
        if format.block is not None and shape:
            bytes_ = np.moveaxis(bytes_, axis, -1)
        plane = np.ascontiguousarray(bytes_).reshape(format.plane_shapes(shape, axis)[0])
        held, held_axis = format.core_layout(shape, axis)
        codes = codes.astype(np.int8 if format.bits <= 8 else np.int16, order="C").reshape(held)
        return cls(*_core.pack(codes, plane, format.core, held_axis), format, shape, axis, _checked=True)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of what the planes hold: the logical one or its transpose, of one dimension at least, two for tiles."""
        return self._held()[0]

    def _held(self) -> tuple[tuple[int, ...], int]:
        """Shape and axis of what the planes hold, as the core takes them."""
        shape = self.shape
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return self.format.core_layout(shape, self.axis)

    def _logical(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of the held shape in the logical shape."""
        if self.transposed:
            array = array.swapaxes(-1, -2)
        return array.reshape(self.shape)

    def check_codes(self) -> None:
        """Read every code now, if none has done so yet: what anything that computes with them does first.

        Raises:
            CodeError: the plane holds a forbidden code, non-zero padding, or codes in a NaN block.
        """
        if not self._checked:
            self._read(_core.check, get_num_threads())

    def _read(self, read: Callable[..., Any], *options: int) -> Any:
        """What a function of the core makes of the planes; it checks every code."""
        try:
            found = read(self.exponent_plane, self.mantissa_plane, self.format.core, *self._held(), *options)
        except CodeError as error:
            if self.source is None:
                raise
            raise CodeError(f"{self.source}: {error}") from None
        object.__setattr__(self, "_checked", True)
        return found

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of both planes."""
        return self.exponent_plane.nbytes + self.mantissa_plane.nbytes

    @property
    def mantissas(self) -> NDArray[Any]:
        """The integer codes, int8 (int16 for bits > 8) of the logical shape; unpacked anew at each call.

        Raises:
            CodeError: as `check_codes`.
        """
        return self._logical(self._read(_core.unpack))

    @property
    def exponents(self) -> NDArray[np.uint8]:
        """The exponent bytes c = s + 127 (255: a NaN block), read-only.

        Shape: the logical one with the blocked axis counted in blocks; tiles count both of the last two dimensions; a
        whole tensor has one element.
        """
        held, axis = self._held()
        shape = _exponent_shape(self.format, held, axis)
        if self.format.block is not None:
            moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
            array = np.moveaxis(self.exponent_plane.reshape(moved), -1, axis)
        else:
            array = self.exponent_plane.reshape(shape)
        if self.transposed:
            array = array.swapaxes(-1, -2)
        return array.reshape(_exponent_shape(self.format, self.shape, self.axis))

    def decode(self) -> Float32:
        """The values, float32 of the logical shape: code · 2^(c - 127), NaN for a NaN block.

        Raises:
            CodeError: as `check_codes`.
        """
        return self._logical(self._read(_core.decode, get_num_threads()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise HBFPError("a BlockArray holds no floats to share, decoding makes a new array: do not give copy=False")
        values = self.decode()
        return values if dtype is None else values.astype(dtype, copy=False)

    @property
    def T(self) -> BlockArray:
        """The transposed logical view of a matrix: the same planes, read the other way round.

        Raises:
            ShapeError: not a matrix; `mT` swaps the last two dimensions of more.
        """
        if self.ndim != 2:
            raise ShapeError(f"T is for matrices; found shape {list(self.shape)}: mT swaps the last two dimensions")
        return self.mT

    @property
    def mT(self) -> BlockArray:
        """The view with the last two dimensions swapped: the same planes, read the other way round.

        Raises:
            ShapeError: fewer than two dimensions, or blocks run along neither of the last two.
        """
        if self.ndim < 2:
            raise ShapeError(f"mT needs two dimensions or more; found shape {list(self.shape)}")
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        if self.format.block is None:
            return self._view(shape, -1, not self.transposed)
        last = self.ndim - 1
        if self.axis < last - 1:
            raise ShapeError(
                f"blocks along axis {self.axis} of shape {list(self.shape)} cannot be read transposed:"
                " decode, swap the axes and encode again"
            )
        return self._view(shape, last - 1 if self.axis == last else last, False)

    def _view(
        self,
        shape: tuple[int, ...],
        axis: int,
        transposed: bool,
        planes: tuple[Any, Any] | None = None,
    ) -> BlockArray:
        exponents, mantissas = planes or (self.exponent_plane, self.mantissa_plane)
        return BlockArray(
            exponents,
            mantissas,
            self.format,
            shape,
            axis,
            self.rounding,
            transposed=transposed,
            source=self.source,
            _checked=self._checked,
        )

    def canonical(self) -> BlockArray:
        """The same array with its planes in the logical order: itself, unless it is `transposed`."""
        if not self.transposed:
            return self
        straight = BlockArray.from_parts(self.mantissas, self.exponents, self.format, self.shape, self.axis)
        object.__setattr__(straight, "rounding", self.rounding)
        return straight

    def __getitem__(self, rows: Any) -> BlockArray:
        """A slice along the first dimension, `t[10:20]`: its planes are views, of nothing but the slice where blocks
        run along another axis. (Where they run along the first one, bytes of the slice are copied.)

        Args:
            rows: a slice, begin and end; no step but 1. Blocks are not cut: along the blocked axis, and with tiles
                over the first two dimensions, both lie at multiples of the block or at the end. A whole tensor is one
                block.

        Raises:
            ShapeError: a block would be cut, or `rows` is no such slice.
        """
        if not isinstance(rows, slice) or rows.step not in (None, 1) or not self.shape:
            raise ShapeError(
                f"an encoded array is cut by slices of its first dimension, as t[10:20]; found {rows!r} of shape"
                f" {list(self.shape)}: decode it for anything else"
            )
        format, length = self.format, self.shape[0]
        # Where the blocks of the first dimension lie side by side in a row of the planes.
        side_by_side = self.axis == 0 if format.tile is None else self.ndim == 1 or (self.ndim == 2 and self.transposed)
        if format.block is None and format.tile is None:
            step = length
        elif side_by_side or (format.tile is not None and self.ndim == 2):
            step = format.tile or format.block or 1
        else:
            step = 1
        begin, end, _ = rows.indices(length)
        end = max(begin, end)
        if any(cut != length and cut % step for cut in (begin, end)):
            raise ShapeError(
                f"blocks of {format} cover {step} of the {length} rows of the first dimension and are not cut: expected"
                f" multiples of {step} or the end; found {begin}:{end}"
            )
        shape = (end - begin, *self.shape[1:])
        held = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        block_bytes = -(-((format.tile or 1) ** 2) * (format.block or 1) * format.bits // 8)

        def cut(plane: NDArray[np.uint8], block_bytes: int, kept: tuple[int, int]) -> NDArray[np.uint8]:
            if begin == end:
                return np.zeros(kept, np.uint8)
            first, last = begin // step, -(-end // step)
            if side_by_side:
                return plane[:, first * block_bytes : last * block_bytes]
            lines = plane.shape[0] // -(-length // step)
            return plane[first * lines : last * lines]

        exponents, mantissas = format.plane_shapes(held, self.axis)
        planes = cut(self.exponent_plane, 1, exponents), cut(self.mantissa_plane, block_bytes, mantissas)
        return self._view(shape, self.axis, self.transposed, planes)

    def __matmul__(self, other: Any) -> Float32:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Float32:
        return matmul(other, self)

    def __eq__(self, other: object) -> bool:
        """Whether description and codes are the same; how they were rounded plays no part."""
        if not isinstance(other, BlockArray):
            return NotImplemented
        if (self.format, self.shape, self.axis) != (other.format, other.shape, other.axis):
            return False
        if self.transposed != other.transposed:
            self, other = self.canonical(), other.canonical()
        return np.array_equal(self.exponent_plane, other.exponent_plane) and np.array_equal(
            self.mantissa_plane, other.mantissa_plane
        )

    def __repr__(self) -> str:
        rounding = "" if self.rounding is None else f", {self.rounding}"
        return f"BlockArray({self.format}, shape={list(self.shape)}, axis={self.axis}{rounding}, {self.nbytes} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Bytes from a pickle are as foreign as those from a file: rebuilt by the constructor, codes checked when read.
        array = self.canonical()
        planes = (array.exponent_plane, array.mantissa_plane)
        return BlockArray, (*planes, self.format, self.shape, self.axis, self.rounding)


def _read_only_plane(plane: Any, name: str, shape: tuple[int, int], array: BlockArray) -> NDArray[np.uint8]:
    if not isinstance(plane, np.ndarray) or plane.dtype != np.uint8:
        raise DTypeError(f"{name} must be a uint8 array; found {getattr(plane, 'dtype', type(plane).__name__)}")
    if plane.shape != tuple(shape):
        raise ShapeError(
            f"{name} of {array.format}, shape {list(array.shape)}, axis {array.axis} must have shape {list(shape)};"
            f" found {list(plane.shape)}"
        )
    view = np.ascontiguousarray(plane).view()
    view.flags.writeable = False
    return view


def _exponent_shape(format: HBFP, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The logical shape counted in blocks."""
    if format.tile is not None:
        return (*shape[:-2], *(-(-size // format.tile) for size in shape[-2:]))
    if format.block is None:
        return tuple(min(size, 1) for size in shape)
    if not shape:
        return ()
    return (*shape[:axis], -(-shape[axis] // format.block), *shape[axis + 1 :])


def _integers(values: ArrayLike, name: str, shape: tuple[int, ...], low: int, high: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{name} must be an array of integers; found {array.dtype}")
    if array.shape != shape:
        raise ShapeError(f"{name} must have shape {list(shape)}; found {list(array.shape)}")
    outside = (array < low) | (array > high)
    if outside.any():
        first = tuple(int(i) for i in np.argwhere(outside)[0])
        raise CodeError(f"{name} must lie in {low} ... {high}; found {int(array[first])} at index {list(first)}")
    return array


def encode(
    x: ArrayLike,
    format: HBFP | str,
    axis: int = -1,
    rounding: str | Rounding = "nearest_even",
    seed: int = 0,
    stream: int = 0,
    check: bool = False,
) -> BlockArray:
    """Encode an array of any shape in blocks along `axis`.

    Args:
        x: float32; float16 and bfloat16 widen, float64 is first rounded to float32 (nearest-even). Any strides.
        format: how wide, and what shares an exponent.
        axis: the blocked axis; plays no part with tiles and whole tensors.
        rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic".
        seed, stream: 0 ... 2^64 - 1, select the random bits of stochastic rounding; the same ones give the same bits.
        check: raise on NaN and infinity instead of encoding their block as a NaN block.

    Raises:
        DTypeError: `x` holds no floats.
        ShapeError: no such axis.
        FormatError: unknown format or rounding.
        NonFiniteError: with `check`, names the first index.
    """
    format = HBFP.parse(format)
    code, seed, stream = _rounding_arguments(rounding, seed, stream)
    values = _float32(x)
    held, held_axis = format.core_layout(values.shape, axis)
    planes = _core.encode(
        values.reshape(held), format.core, held_axis, code, seed, stream, bool(check), get_num_threads()
    )
    return BlockArray(*planes, format, values.shape, axis, Rounding.parse(rounding), _checked=True)


def encoding_error(x: ArrayLike, format: HBFP | str, axis: int = -1) -> tuple[int, float, float, int]:
    """What encoding `x` to nearest even costs it, NaN blocks aside.

    Returns:
        Its elements that are not zero; the sums of x² and of (x - q · 2^s)²; how many elements saturate, having
        |x| > (Q + ½) · 2^s.

    Raises:
        as `encode`.
    """
    format = HBFP.parse(format)
    values = _float32(x)
    held, held_axis = format.core_layout(values.shape, axis)
    found = _core.measure(values.reshape(held), format.core, held_axis, 0, 0, 0, get_num_threads())
    return found[:4]


def quantize(
    x: ArrayLike,
    format: HBFP | str,
    axis: int = -1,
    rounding: str | Rounding = "nearest_even",
    seed: int = 0,
    stream: int = 0,
    check: bool = False,
    *,
    out: Float32 | None = None,
) -> Float32:
    """What `encode(...).decode()` gives, in one pass: float32 of the shape of `x`.

    Args and errors as `encode`; `out` is a C-contiguous float32 array of that shape, and may be `x` itself.
    """
    format = HBFP.parse(format)
    code, seed, stream = _rounding_arguments(rounding, seed, stream)
    values = _float32(x)
    held, held_axis = format.core_layout(values.shape, axis)
    result = _output(out, values.shape)
    if out is not None and values is not out and np.may_share_memory(values, out):
        values = values.copy()
    destination = result.reshape(held)
    # The core tells that it works in place by being given one object twice.
    origin = destination if values is out else values.reshape(held)
    _core.quantize(origin, destination, format.core, held_axis, code, seed, stream, bool(check), get_num_threads())
    return result


# --- products --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackedOperand:
    """A weight [N, K] laid out for this machine's kernels: made by `prepack`, used by `linear`, not for storage."""

    core: _core.Packed = field(repr=False)
    format: HBFP

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape

    @property
    def nbytes(self) -> int:
        return self.core.nbytes

    @property
    def level(self) -> str:
        """The kernel level that the layout belongs to."""
        return self.core.level


def matmul(
    a: ArrayLike | BlockArray,
    b: ArrayLike | BlockArray,
    *,
    format: HBFP | str | None = None,
    out: Float32 | None = None,
    accumulate: bool = False,
    threads: int | None = None,
) -> Float32:
    """The product a b in fixed-point arithmetic, float32.

    Args:
        a: [..., M, K], floats or encoded along -1.
        b: [K, N], or [..., K, N] with the leading dimensions of `a`; floats or encoded along -2 (such as `w.T` of a
            weight [N, K] encoded along its last axis). Blocks of both must end in the same places along K.
        format: encodes the operands that are floats (nearest-even); None takes the format of the other, encoded one.
        out: the result's memory, C-contiguous float32 [..., M, N].
        accumulate: add to what `out` holds.
        threads: upper bound; None is `get_num_threads()`.

    Returns:
        [..., M, N], `out` where given.

    Raises:
        ShapeError: the shapes or the blocks of `a` and `b` do not fit; says how to encode them.
        FormatError: nothing says in which format to encode floats.
    """
    if isinstance(b, PackedOperand):
        raise DTypeError("b is a prepacked weight [N, K]: use hbfp.linear(a, b), which multiplies by its transpose")
    left, right = _operands(a, "a", -1, b, "b", -2, format)
    m_k, k_n = left.values.shape, right.values.shape
    if len(m_k) < 2 or len(k_n) < 2:
        raise ShapeError(
            f"matmul needs a [..., M, K] and b [..., K, N]; found {list(m_k)} and {list(k_n)}:"
            " reshape a vector to one row or one column"
        )
    if m_k[-1] != k_n[-2]:
        raise ShapeError(
            f"the last dimension of a and the last but one of b must be equal; found {list(m_k)} and {list(k_n)}"
        )
    if k_n[:-2] not in ((), m_k[:-2]):
        raise ShapeError(
            f"the leading dimensions of b must be those of a, or none; found {list(m_k)} and {list(k_n)}:"
            " use np.broadcast_to on the floats"
        )
    _same_blocks(left.format, right.format, m_k[-1])
    result = _result(out, (*m_k[:-1], k_n[-1]), accumulate)
    count = _thread_count(threads)
    left, right = left.apart_from(out), right.apart_from(out)
    multiplier = right.core()
    if len(k_n) > 2 or len(m_k) == 2:
        _core.product(left.core(), multiplier, result, None, accumulate, count)
    elif left.format.tile is None or m_k[-2] % left.format.tile == 0:
        rows = result.reshape(math.prod(m_k[:-1]), k_n[-1])
        _core.product(left.as_rows().core(), multiplier, rows, None, accumulate, count)
    else:
        # Tiles start afresh in each matrix of the batch, and a short last one keeps the matrices apart.
        for i, place in enumerate(np.ndindex(m_k[:-2])):
            _core.product(left.matrix(i, place).core(), multiplier, result[place], None, accumulate, count)
    return result


def prepack(weight: BlockArray) -> PackedOperand:
    """Lay a weight out for the kernels, once, so that `linear` need not do so at every call.

    Args:
        weight: [N, K], encoded along its last axis (or in tiles, or as a whole tensor).

    Raises:
        ShapeError: not a matrix, or not blocked along K.
    """
    if not isinstance(weight, BlockArray):
        raise DTypeError(f"prepack takes a BlockArray; found {type(weight).__name__}: encode it with hbfp.encode first")
    if weight.ndim != 2:
        raise ShapeError(f"prepack takes a matrix [N, K]; found shape {list(weight.shape)}")
    operand = _Operand("weight", weight, weight.format, -1)
    return PackedOperand(_core.prepack(operand.core(), get_num_threads()), weight.format)


def linear(
    x: ArrayLike | BlockArray,
    w: ArrayLike | BlockArray | PackedOperand,
    bias: ArrayLike | None = None,
    format: HBFP | str | None = None,
    *,
    rounding: str | Rounding = "nearest_even",
    seed: int = 0,
    stream: int = 0,
    out: Float32 | None = None,
    accumulate: bool = False,
    threads: int | None = None,
) -> Float32:
    """x times the transpose of w, plus bias: what a linear layer computes.

    Args:
        x: [..., K], floats (encoded on the way in) or encoded along -1.
        w: [N, K], prepacked, encoded along -1, or floats (encoded nearest-even).
        bias: [N], added last in float32.
        format: of the activations; None takes the weight's.
        rounding, seed, stream: how floats `x` are encoded, as in `encode`.
        out, accumulate, threads: as in `matmul`.

    Returns:
        float32 [..., N].

    Raises:
        ShapeError: the shapes or the blocks of `x` and `w` do not fit.
        FormatError: neither `w` nor `format` says how to encode floats.
    """
    left, right = _operands(x, "x", -1, w, "w", -1, format)
    x_shape, n_k = left.values.shape, right.values.shape
    if len(x_shape) < 1 or len(n_k) != 2 or x_shape[-1] != n_k[1]:
        raise ShapeError(f"linear needs x [..., K] and w [N, K]; found {list(x_shape)} and {list(n_k)}")
    _same_blocks(left.format, right.format, n_k[1])
    added = None if bias is None else np.ascontiguousarray(_float32(bias, "bias"))
    if added is not None and added.shape != n_k[:1]:
        raise ShapeError(f"bias must have shape [{n_k[0]}]; found {list(added.shape)}")
    if added is not None and out is not None and np.may_share_memory(added, out):
        added = added.copy()
    how = _rounding_arguments(rounding, seed, stream)
    result = _result(out, (*x_shape[:-1], n_k[0]), accumulate)
    # x is one matrix, whatever its leading dimensions: this is what tiles see.
    left = replace(left.apart_from(out).as_rows(), how=how)
    rows = result.reshape(math.prod(x_shape[:-1]), n_k[0])
    multiplier = right.apart_from(out).core()
    _core.product(left.core(), multiplier, rows, added, accumulate, _thread_count(threads))
    return result


@dataclass(frozen=True, slots=True)
class _Operand:
    """One side of a product: what it holds, in which format, and over which axis (-1 or -2) the product sums."""

    name: str
    values: Float32 | BlockArray | PackedOperand
    format: HBFP
    axis: int
    how: tuple[int, int, int] = (0, 0, 0)
    """Rounding, seed and stream of values still to be encoded."""

    def apart_from(self, out: Float32 | None) -> _Operand:
        """Itself, copied if the product would overwrite it while reading."""
        if out is None or not isinstance(self.values, np.ndarray) or not np.may_share_memory(self.values, out):
            return self
        return replace(self, values=self.values.copy())

    def as_rows(self) -> _Operand:
        """Its leading dimensions flattened into one.

        Raises:
            ShapeError: tiles that start afresh in each matrix of a batch, with a short last one in each.
        """
        if isinstance(self.values, PackedOperand):
            return self
        shape = self.values.shape
        if len(shape) == 2:
            return self
        matrix = (math.prod(shape[:-1]), shape[-1])
        if isinstance(self.values, np.ndarray):
            return replace(self, values=self.values.reshape(matrix))
        tile = self.format.tile
        if tile is not None and len(shape) > 1 and shape[-2] % tile:
            raise ShapeError(
                f"{self.name} {list(shape)} is encoded in tiles of {tile} x {tile} that end short in each matrix:"
                " encode it as one matrix, or use hbfp.matmul"
            )
        self.check_axis()
        return replace(self, values=self.values.canonical()._view(matrix, -1, False))

    def matrix(self, number: int, place: tuple[int, ...]) -> _Operand:
        """One matrix of a batch encoded in tiles, or to be encoded so."""
        if isinstance(self.values, np.ndarray):
            return replace(self, values=self.values[place])
        assert isinstance(self.values, BlockArray)
        assert self.format.tile is not None
        array = self.values.canonical()
        shape = array.shape[-2:]
        tiles = -(-shape[0] // self.format.tile)
        band = slice(number * tiles, (number + 1) * tiles)
        planes = array.exponent_plane[band], array.mantissa_plane[band]
        return replace(self, values=BlockArray(*planes, self.format, shape, source=array.source))

    def check_axis(self) -> None:
        array = self.values
        if not isinstance(array, BlockArray) or array.format.block is None or array.axis - array.ndim == self.axis:
            return
        other = -3 - self.axis
        transpose = " (or pass its transpose: .T, .mT)" if array.axis - array.ndim == other else ""
        raise ShapeError(
            f"{self.name} must be blocked along axis {self.axis}, which the product sums over; found shape"
            f" {list(array.shape)} blocked along axis {array.axis}: encode it with axis={self.axis}{transpose}"
        )

    def core(self) -> Any:
        """The core's Floats, Planes or Packed."""
        if isinstance(self.values, PackedOperand):
            return self.values.core
        if isinstance(self.values, np.ndarray):
            return _core.Floats(self.values, self.axis, self.format.core, *self.how)
        self.check_axis()
        array = self.values
        array.check_codes()
        axis = -3 - self.axis if array.transposed else self.axis
        return _core.Planes(array.exponent_plane, array.mantissa_plane, array.format.core, array.held_shape, axis)


def _operands(
    a: Any, a_name: str, a_axis: int, b: Any, b_name: str, b_axis: int, format: HBFP | str | None
) -> tuple[_Operand, _Operand]:
    """Both sides of a product; floats take the format given, else that of the other side.

    Raises:
        DTypeError: neither encoded nor floats.
        FormatError: nothing says in which format to encode floats.
    """
    given = None if format is None else HBFP.parse(format)
    left = a if isinstance(a, BlockArray) else _float32(a, a_name)
    right = b if isinstance(b, (BlockArray, PackedOperand)) else _float32(b, b_name)
    left_format = given if isinstance(left, np.ndarray) else left.format
    right_format = given if isinstance(right, np.ndarray) else right.format
    left_format, right_format = left_format or right_format, right_format or left_format
    if left_format is None or right_format is None:
        raise FormatError(f"{a_name} and {b_name} are both floats, which have no format: give format=, as hbfp.HBFP4")
    return _Operand(a_name, left, left_format, a_axis), _Operand(b_name, right, right_format, b_axis)


def _same_blocks(left: HBFP, right: HBFP, k: int) -> None:
    left_step, right_step = (min(format.tile or format.block or k, k) for format in (left, right))
    if left_step != right_step:
        raise ShapeError(
            f"blocks must end in the same places along the reduction (K = {k}); found blocks of {left_step} ({left})"
            f" and of {right_step} ({right}): encode both with the same block"
        )


def _result(out: Float32 | None, shape: tuple[int, ...], accumulate: bool) -> Float32:
    if accumulate and out is None:
        raise HBFPError("accumulate=True adds to what out holds: give out=")
    return _output(out, shape)
