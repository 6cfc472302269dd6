"""What every door from torch to the compiled core shares: the check of tensors, the choice of the way, the recorders.

Formats cross torch's dispatcher as their written form and 64-bit words as signed integers, because a schema holds
nothing else. Streams change at every step, and a graph that holds them as numbers would serve for one: under
torch.compile they are tensors without dimensions (see `hbfp.policy.RootState`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from hbfp import _core
from hbfp.errors import DTypeError
from hbfp.format import HBFP, Rounding

_core.set_tensor_type(torch.Tensor)

# Bound once: a product of a few rows takes less time than looking up a dozen names.
dispatch_modes, threads = torch._C._len_torch_dispatch_stack, torch.get_num_threads


FLOAT32 = torch.float32

CAST = frozenset({torch.float16, torch.bfloat16, torch.float64})

WORD = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as one product encodes it."""

    x: Tensor | None
    """None: it exists as codes only, or inside a fused kernel."""
    format: HBFP
    axis: int
    rounding: int
    """As the core numbers it."""
    seed: int
    stream: int
    order: Callable[[Tensor], Tensor] | None = None
    """Lays `x`, for which the random bits are drawn, as its blocks lie along `axis`; None: so it lies."""


@dataclass(frozen=True, slots=True)
class Product:
    """What a recorder is told of one product."""

    name: str
    """Which product of its layer: "forward", "input gradient", "weight gradient", ..."""
    source: object
    """The layer's state, or None for a functional call."""
    macs: int
    """Multiply-accumulates."""
    left: HBFP
    right: HBFP
    stream: int
    """Of the left operand."""
    operands: Callable[[], tuple[Operand, ...]] = field(compare=False, repr=False)
    """Those that were encoded for this product, left before right: an operand that serves several is told once."""


Recorder = Callable[[Product], None]

recorders: list[Recorder] = []
"""Called for every product, in order; empty but where somebody counts or watches (`hbfp.audit`, `hbfp.watch`)."""

wanted: list[Callable[[object, int], bool]] = []
"""Whether some recorder will read the operands of the products with this source and stream; see `observed`."""


def observed(source: object, stream: int) -> bool:
    """Whether operands must exist as tensors: then nothing is fused that would not have them, with the same bits.

    Ask only where `recorders` is not empty.
    """
    return not is_compiling() and any(wants(source, stream) for wants in wanted)


def tell(product: Product) -> None:
    """Calls the recorders."""
    for recorder in tuple(recorders):
        recorder(product)


def require_real(*tensors: Tensor | None) -> None:
    """Raises DTypeError unless every tensor given is of a floating dtype that the door takes."""
    for x in tensors:
        if x is not None and x.dtype is not FLOAT32 and x.dtype not in CAST:
            raise DTypeError(
                f"expected a float32 tensor (or float16, bfloat16, float64, which are cast); found {x.dtype}: "
                "integers and complex numbers have no block format"
            )


def float32(x: Tensor) -> Tensor:
    """`x` as the core reads it: real, float32, strided, aligned, on the CPU; the same tensor where it is so already."""
    if x.dtype is not torch.float32:
        require_real(x)
        x = x.to(torch.float32)
    if not x.is_cpu or x.layout is not torch.strided:
        raise DTypeError(
            f"expected a dense tensor on the CPU; found layout {x.layout} on device {x.device}: "
            "the integer kernels run on CPUs, move it with .cpu() or .to_dense(), or take a recipe whose backend is "
            "'emulate'"
        )
    # A lazily negated view (the imaginary part of a conjugate) holds the wrong signs in memory.
    x = x.resolve_neg() if x.is_neg() else x
    # What torch.frombuffer makes may begin at any address.
    return x.clone() if x.data_ptr() % 4 else x


def direct(*tensors: Tensor) -> bool:
    """True where `_core` may be called without the dispatcher noticing."""
    if is_compiling() or dispatch_modes():
        return False
    for x in tensors:
        kind = type(x)
        if (kind is not Tensor and kind is not Parameter) or x.is_meta:
            return False
    return True


def signed(word: int) -> int:
    """A 64-bit word as the signed integer that an operator's schema holds."""
    return word - 2**64 if word >= 2**63 else word


def crossing(streams: Sequence[int]) -> tuple[list[int], list[Tensor] | None]:
    """Streams as an operator takes them: numbers, or in their place the tensors that stand for them in a graph."""
    if isinstance(streams[0], Tensor):
        return [0] * len(streams), cast(list[Tensor], list(streams))
    return [signed(stream) for stream in streams], None


def crossed(streams: Sequence[int], drawn: Sequence[Tensor] | None) -> list[int]:
    """The same on the other side."""
    return [int(stream) & WORD for stream in (streams if drawn is None else drawn)]


@lru_cache(maxsize=256)
def format_of(text: str) -> HBFP:
    return HBFP.parse(text)


ROUNDINGS = tuple(Rounding)


def numpy_of(x: Tensor) -> Any:
    # Not `tensor.numpy()`, which would mark the storage of a parameter as not resizable.
    return np.from_dlpack(float32(x.detach()).contiguous()).copy()


Formats = tuple[HBFP, HBFP]
"""Of the left and the right operand of a product."""

Roundings = tuple[int, int]


def codings(formats: Formats, roundings: Roundings, streams: Sequence[int]) -> list[tuple[_core.Format, int, int]]:
    return [(formats[i].core, roundings[i], streams[i]) for i in (0, 1)]


LIBRARY = torch.library.Library("hbfp", "DEF")


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `hbfp::<schema>` and registers the decorated function as its CPU kernel."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(schema)
        LIBRARY.impl(schema.split("(", 1)[0], kernel, "CPU")
        return kernel

    return register


def pairs(items: Iterable[Any]) -> Any:
    items = iter(items)
    return tuple(zip(items, items, strict=True))
