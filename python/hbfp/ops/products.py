"""Products of matrices, encoding, and sums over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hbfp import _core
from hbfp.errors import ShapeError
from hbfp.format import HBFP
from hbfp.ops.entrance import (
    LIBRARY,
    ROUNDINGS,
    WORD,
    Operand,
    Product,
    crossed,
    crossing,
    direct,
    dispatch_modes,
    float32,
    format_of,
    numpy_of,
    operator,
    recorders,
    signed,
    tell,
    threads,
)


def product_shape(a: Tensor, a_axis: int, b: Tensor, b_axis: int) -> list[int]:
    """Shape of the product: batch dimensions of `a`, then rows of `a` and columns of `b`."""
    if a.dim() < 2 or b.dim() < 2:
        raise ShapeError(
            f"a product takes tensors of two dimensions or more; found {tuple(a.shape)} and {tuple(b.shape)}: "
            "give a vector a dimension of size 1"
        )
    if b.dim() > 2 and b.shape[:-2] != a.shape[:-2]:
        raise ShapeError(f"batch dimensions differ: {tuple(a.shape)} and {tuple(b.shape)}: expand one to the other's")
    if b.dim() == 2 and a.dim() > 2 and a_axis != -1:
        raise ShapeError(f"{tuple(a.shape)} reduced along axis -2 needs as many batch dimensions in {tuple(b.shape)}")
    rows = a.shape[-2] if a_axis == -1 else a.shape[-1]
    columns = b.shape[-2] if b_axis == -1 else b.shape[-1]
    return [*a.shape[:-2], rows, columns]


def _run_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    shape = product_shape(a, a_axis, b, b_axis)
    a, b = float32(a), float32(b)
    out = target = torch.empty(shape, dtype=torch.float32, device="cpu")
    if len(shape) > 2 and b.dim() == 2:
        a, target = a.flatten(0, -2), out.view(prod(shape[:-1]), shape[-1])
    _core.product(
        _core.Floats(a, a_axis, formats[0].core, roundings[0], seed, streams[0]),
        _core.Floats(b, b_axis, formats[1].core, roundings[1], seed, streams[1]),
        target,
        None if bias is None else float32(bias),
        False,
        threads(),
    )
    return out


def quick_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
) -> Tensor | None:
    """`product` in one call of the core, told to no recorder; None where anything is not as usual, errors included.

    Not for code that torch.compile traces.
    """
    if dispatch_modes():
        return None
    left, right = formats
    out: Tensor | None = _core.tensor_product(
        a, a_axis, left.core, roundings[0], streams[0],
        b, b_axis, right.core, roundings[1], streams[1],
        seed, bias, threads(),
    )  # fmt: skip
    return out


def product_keeping(
    a: Tensor,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
    keep: tuple[HBFP, int, int],
    *,
    name: str = "product",
    source: object = None,
) -> tuple[Tensor, Tensor | None]:
    """`product` of a [..., M, K] and a matrix b, which also keeps the codes of `a` along its rows, in the same pass.

    Args:
        b_axis: -1 for b [N, K], -2 for b [K, N].
        keep: format, rounding and stream of the codes that are kept.

    Returns:
        The product, and a uint8 tensor for `kept_product`: about half a byte an element at 4 bits, one at more. None
        where nothing could be kept, or no memory saved: under torch.compile and dispatch modes, for subclasses, wide
        formats, tiles, and tensors of a few columns.
    """
    if not is_compiling() and not dispatch_modes():
        left, right = formats
        rest = (seed, bias, threads(), (keep[0].core, keep[1], keep[2]))
        both = _core.tensor_product(
            a, -1, left.core, roundings[0], streams[0], b, b_axis, right.core, roundings[1], streams[1], *rest
        )
        if both is None and direct(a, b):
            # Another dtype, or batch dimensions that are no rows of one matrix as they lie.
            dense, wide = float32(a).contiguous(), float32(b)
            rest = (seed, None if bias is None else float32(bias), *rest[2:])
            both = _core.tensor_product(
                dense,
                -1,
                left.core,
                roundings[0],
                streams[0],
                wide,
                b_axis,
                right.core,
                roundings[1],
                streams[1],
                *rest,
            )
        if both is not None:
            if recorders:
                _record(a, -1, b, b_axis, both[0], formats, roundings, seed, streams, name, source)
            kept: tuple[Tensor, Tensor | None] = both
            return kept
    return product(a, -1, b, b_axis, formats, roundings, seed, streams, bias, name=name, source=source), None


def keep(x: Tensor, format: HBFP, rounding: int, stream: int, seed: int) -> Tensor | None:
    """The codes of x [rows, columns] along its rows, for `kept_product`: what `product_keeping` keeps, by itself.

    None for the reasons that it has.
    """
    if not direct(x):
        return None
    operand = _core.Floats(float32(x), -2, format.core, rounding, seed, stream)
    kept: Tensor | None = _core.keep(operand, threads(), 4 * x.numel())
    return kept


def kept_product(
    a: Tensor,
    kept: Tensor,
    columns: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    *,
    sums: Tensor | None = None,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """aᵀ X, float32 [M, columns], of a [K, M] and what `product_keeping` kept of an X [K, columns].

    The formats, roundings and streams are those of a and X; X's have had their effect when it was kept.

    Args:
        sums: float32 [M], where `column_sums` of a are written, taken in the same pass over it.
    """
    a = float32(a)
    out = torch.empty(a.shape[1], columns, dtype=torch.float32, device="cpu")
    floats = _core.Floats(a, -2, formats[0].core, roundings[0], seed, streams[0])
    _core.kept_product(floats, kept, formats[1].core, out, threads(), None, sums)
    if recorders:
        _record(a, -2, None, -2, out, formats, roundings, seed, streams, name, source)
    return out


def product_operands(
    a: Tensor,
    a_axis: int,
    b: Tensor | None,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
) -> Callable[[], tuple[Operand, ...]]:
    """The operands of `product` as it encodes them; b: None where only its codes were kept."""

    def operands() -> tuple[Operand, ...]:
        # The rows of a batch that one matrix serves are those of one matrix.
        rows = a.flatten(0, -2) if a.dim() > 2 and b is not None and b.dim() == 2 else a
        return (
            Operand(rows, formats[0], a_axis, roundings[0], seed, streams[0]),
            Operand(b, formats[1], b_axis, roundings[1], seed, streams[1]),
        )

    return operands


def _record(
    a: Tensor,
    a_axis: int,
    b: Tensor | None,
    b_axis: int,
    out: Tensor,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    name: str,
    source: object,
) -> None:
    """Tells of a product; b: None where it was encoded before."""
    operands = product_operands(a, a_axis, b, b_axis, formats, roundings, seed, streams)
    macs = out.numel() * a.shape[a_axis]
    tell(Product(name, source, macs, formats[0], formats[1], streams[0], operands))


def product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int] = (0, 0),
    seed: int = 0,
    streams: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    *,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The product of two tensors, each encoded along its own reduction axis, summed as FORMAT section 5 lays down.

    Shapes:
        a: [..., M, K] with `a_axis` -1, or [..., K, M] with -2.
        b: [..., N, K] with `b_axis` -1, or [..., K, N] with -2; the same batch dimensions as `a`, or none.
        bias: [N], added last in float32.
        result: [..., M, N], float32, contiguous.

    Args:
        roundings: of a and b, as the core numbers them (`Rounding.code`).
        seed, streams: choose the random bits of stochastic rounding; 64-bit words.
        name, source: told to the recorders, no part of the result.

    Raises:
        ShapeError: the shapes do not fit; FormatError: the formats cut the reduction at different places;
        DTypeError: a tensor is not real, dense and on the CPU.
    """
    compiling = is_compiling()
    out = None if compiling else quick_product(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias)
    if out is None and direct(a, b):
        out = _run_product(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias)
    elif out is None:
        out = torch.ops.hbfp.product(*_crossing(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias))
    if recorders and not compiling:
        _record(a, a_axis, b, b_axis, out, formats, roundings, seed, streams, name, source)
    return out


def reference_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int] = (0, 0),
    seed: int = 0,
    streams: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    *,
    name: str = "product",
    source: object = None,
) -> Tensor:
    """The same bits as `product`, computed by the exact-arithmetic oracle: for checking, some 10^5 times slower."""
    if direct(a, b):
        out = _run_reference_product(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias)
    else:
        out = torch.ops.hbfp.reference_product(
            *_crossing(a, a_axis, b, b_axis, formats, roundings, seed, streams, bias)
        )
    if recorders and not is_compiling():
        _record(a, a_axis, b, b_axis, out, formats, roundings, seed, streams, name, source)
    return out


def _run_reference_product(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    # Imported here because nothing but this function needs it.
    from hbfp import reference

    shape = product_shape(a, a_axis, b, b_axis)
    flatten = len(shape) > 2 and b.dim() == 2
    left, right = (
        reference.encode(numpy_of(x), formats[i], axis, ROUNDINGS[roundings[i]], seed, streams[i])
        for i, (x, axis) in enumerate(((a.flatten(0, -2) if flatten else a, a_axis), (b, b_axis)))
    )
    result = reference.product(
        left if a_axis == -1 else left.mT,
        right if b_axis == -2 else right.mT,
        None,
        None if bias is None else numpy_of(bias),
    )
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    return out.copy_(torch.from_numpy(result).reshape(shape))


def quantize(x: Tensor, format: HBFP, axis: int = -1, rounding: int = 0, seed: int = 0, stream: int = 0) -> Tensor:
    """decode(encode(x)): `x` rounded to the grid of `format`, float32 in the shape of `x`, contiguous.

    Args:
        axis: the blocked axis; plays no part with tiles.
        rounding: as the core numbers it (`Rounding.code`).

    Raises:
        ShapeError: no such axis; DTypeError: `x` is not real, dense and on the CPU.
    """
    if direct(x):
        return _run_quantize(x, format, axis, rounding, seed, stream)
    numbers, drawn = crossing((stream,))
    out: Tensor = torch.ops.hbfp.quantize(x, str(format), axis, rounding, signed(seed), numbers[0], drawn)
    return out


def _run_quantize(x: Tensor, format: HBFP, axis: int, rounding: int, seed: int, stream: int) -> Tensor:
    x = float32(x)
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _core.quantize(x, out, format.core, axis, rounding, seed, stream, False, threads())
    return out


class Measured(NamedTuple):
    """What encoding a tensor costs it. NaN blocks count in `exponents` only."""

    nonzero: int
    """Elements that are not zero."""
    signal: float
    """Sum of x²."""
    noise: float
    """Sum of (x − q · 2^(c − 127))²."""
    saturated: int
    """Elements with |x| > (Q + ½) · 2^(c − 127): the code is ±Q, and more than half a step short."""
    zeroed: int
    """Elements that are not zero and have the code 0."""
    exponents: Sequence[int]
    """256 numbers of blocks, by c."""


def measure(x: Tensor, format: HBFP, axis: int = -1, rounding: int = 0, seed: int = 0, stream: int = 0) -> Measured:
    """Measures the encoding of `x`; args and errors are those of `quantize`. Not for code that torch.compile traces."""
    return Measured(*_core.measure(float32(x.detach()), format.core, axis, rounding, seed, stream, threads()))


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [rows, n] in blocks of 64, the same for any number of threads: [n]."""
    if x.dim() != 2:
        raise ShapeError(f"column sums are taken of a matrix [rows, n]; found shape {tuple(x.shape)}")
    if direct(x):
        return _run_column_sums(x)
    out: Tensor = torch.ops.hbfp.column_sums(x)
    return out


def _run_column_sums(x: Tensor) -> Tensor:
    x = float32(x).contiguous()
    out = torch.empty(x.shape[1], dtype=torch.float32, device="cpu")
    _core.column_sums(x, out, threads())
    return out


def next_step(step: Tensor) -> Tensor:
    """The step after `step`, int64 without dimensions, modulo 2^32; the same within a backward pass.

    For graphs, which cannot ask whether they run within one.
    """
    out: Tensor = torch.ops.hbfp.next_step(step)
    return out


# --- behind torch's dispatcher ---------------------------------------------------------------------------------------


def _crossing(
    a: Tensor,
    a_axis: int,
    b: Tensor,
    b_axis: int,
    formats: tuple[HBFP, HBFP],
    roundings: tuple[int, int],
    seed: int,
    streams: tuple[int, int],
    bias: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of a product as its schema holds them."""
    numbers, drawn = crossing(streams)
    return (
        a, a_axis, str(formats[0]), roundings[0], numbers[0],
        b, b_axis, str(formats[1]), roundings[1], numbers[1],
        signed(seed), bias, drawn,
    )  # fmt: skip


def _behind_the_dispatcher(name: str, run: Callable[..., Tensor]) -> None:
    """Registers `run`, a product with the arguments of `_run_product`, as `hbfp::<name>`."""

    @operator(
        f"{name}(Tensor a, int a_axis, str a_format, int a_rounding, SymInt a_stream, "
        "Tensor b, int b_axis, str b_format, int b_rounding, SymInt b_stream, SymInt seed, Tensor? bias, "
        "Tensor[]? streams=None) -> Tensor"
    )
    def kernel(
        a: Tensor,
        a_axis: int,
        a_format: str,
        a_rounding: int,
        a_stream: int,
        b: Tensor,
        b_axis: int,
        b_format: str,
        b_rounding: int,
        b_stream: int,
        seed: int,
        bias: Tensor | None,
        streams: list[Tensor] | None = None,
    ) -> Tensor:
        formats, roundings = (format_of(a_format), format_of(b_format)), (a_rounding, b_rounding)
        left, right = crossed((a_stream, b_stream), streams)
        return run(a, a_axis, b, b_axis, formats, roundings, seed & WORD, (left, right), bias)

    @torch.library.register_fake(f"hbfp::{name}", lib=LIBRARY)  # type: ignore[untyped-decorator]
    def fake(a: Tensor, a_axis: int, _f: str, _r: int, _s: int, b: Tensor, b_axis: int, *_: object) -> Tensor:
        return a.new_empty(product_shape(a, a_axis, b, b_axis), dtype=torch.float32)


_behind_the_dispatcher("product", _run_product)
_behind_the_dispatcher("reference_product", _run_reference_product)


@operator(
    "quantize(Tensor x, str format, int axis, int rounding, SymInt seed, SymInt stream, Tensor[]? streams=None) "
    "-> Tensor"
)
def _quantize_kernel(
    x: Tensor, format: str, axis: int, rounding: int, seed: int, stream: int, streams: list[Tensor] | None = None
) -> Tensor:
    return _run_quantize(x, format_of(format), axis, rounding, seed & WORD, *crossed((stream,), streams))


@operator("next_step(Tensor step) -> Tensor")
def _next_step_kernel(step: Tensor) -> Tensor:
    # Within a backward pass a forward is a recomputation, which must draw the bits of the one that it repeats.
    recomputes = torch._C._current_graph_task_id() != -1
    return step.clone() if recomputes else (step + 1).bitwise_and_(2**32 - 1)


@operator("column_sums(Tensor x) -> Tensor")
def _column_sums_kernel(x: Tensor) -> Tensor:
    return _run_column_sums(x)


@torch.library.register_fake("hbfp::quantize", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _quantize_fake(
    x: Tensor, format: str, axis: int, rounding: int, seed: int, stream: int, streams: list[Tensor] | None = None
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("hbfp::next_step", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _next_step_fake(step: Tensor) -> Tensor:
    return torch.empty_like(step)


@torch.library.register_fake("hbfp::column_sums", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _column_sums_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)
