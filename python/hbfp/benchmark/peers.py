"""The products of others: torch in FP32, bf16, int8 and int4, torchao, ggml.

A peer makes ready to compute x wᵀ: weights are prepared once, activations are quantised inside the timing where the
peer works on quantised ones. What a machine or an installation lacks raises `NotRun` with the reason.
"""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbfp.benchmark import ggml
from hbfp.benchmark.results import NotRun
from hbfp.benchmark.timing import Call

__all__ = ["BY_NAME", "PEERS", "Peer", "Prepared", "quiet"]

GROUP = 64  # values that share a scale in int4, as many as in a block of HBFP4


@dataclass(frozen=True, slots=True)
class Prepared:
    """A product ready to run."""

    call: Call
    read: Callable[[object], Tensor]
    """The product [M, N] in float from what `call` returned."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A contestant that is not ours."""

    name: str
    prepare: Callable[[Tensor, Tensor, int], Prepared]
    """From x [M, K], w [N, K] and the number of threads."""
    weight_bits: float
    """A weight's share of memory, scales included."""
    tolerance: float
    """Largest relative error (Frobenius norm) against FP32 on normal values: about twice what the format gives."""
    note: str = ""
    quick: bool = True
    """Part of the quick run."""
    few_rows: bool = True
    """Made for few rows, too."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, from Python or a library's logger: those of peers tell users of this package nothing."""
    with warnings.catch_warnings(), _stderr_to_null():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _stderr_to_null() -> Iterator[None]:
    # The file descriptor itself: compiled libraries write to it past sys.stderr.
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _as_float(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result.float()


def _fp32(x: Tensor, w: Tensor, threads: int) -> Prepared:
    out, transposed = torch.empty(x.shape[0], w.shape[0]), w.t()
    return Prepared(lambda: torch.mm(x, transposed, out=out), _as_float)


def _bf16(x: Tensor, w: Tensor, threads: int) -> Prepared:
    narrow, transposed = x.bfloat16(), w.bfloat16().t()
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16)
    return Prepared(lambda: torch.mm(narrow, transposed, out=out), _as_float)


def _linear(w: Tensor) -> torch.nn.Sequential:
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    return torch.nn.Sequential(layer).eval()


def _dynamic_int8(x: Tensor, w: Tensor, threads: int) -> Prepared:
    quantize: Any = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None:
        raise NotRun(f"torch {torch.__version__} has no torch.ao.quantization.quantize_dynamic")
    model = quantize(_linear(w), {torch.nn.Linear}, dtype=torch.qint8)
    return Prepared(lambda: model(x), _as_float)


def _int_mm(x: Tensor, w: Tensor, threads: int) -> Prepared:
    scales = [v.abs().amax(1, keepdim=True) / 127 for v in (x, w)]
    left, right = ((v / scale).round().to(torch.int8) for v, scale in zip((x, w), scales, strict=True))
    transposed = right.t()
    return Prepared(
        lambda: torch._int_mm(left, transposed), lambda codes: _as_float(codes) * (scales[0] * scales[1].t())
    )


def _int4(x: Tensor, w: Tensor, threads: int) -> Prepared:
    operators: Any = torch.ops.aten
    n, k = w.shape
    if k % GROUP:
        raise NotRun(f"its groups of {GROUP} do not divide K = {k}")
    groups = w.view(n, k // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(n, k)
    packed = operators._convert_weight_to_int4pack_for_cpu(codes, 1)
    # The operator's zero point is the value of code 8.
    constants = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).contiguous().bfloat16()
    narrow = x.bfloat16()
    return Prepared(lambda: operators._weight_int4pack_mm_for_cpu(narrow, packed, GROUP, constants), _as_float)


def _torchao(configuration: str, dtype: torch.dtype, **options: object) -> Callable[[Tensor, Tensor, int], Prepared]:
    def prepare(x: Tensor, w: Tensor, threads: int) -> Prepared:
        try:
            quantization: Any = importlib.import_module("torchao.quantization")
        except ImportError as error:
            raise NotRun(f"torchao is not installed ({error}): make bench-peers, or pip install torchao") from error
        model, narrow = _linear(w).to(dtype), x.to(dtype)
        quantization.quantize_(model, getattr(quantization, configuration)(**options))

        def call() -> Tensor:
            with torch.inference_mode():
                result: Tensor = model(narrow)
                return result

        return Prepared(call, _as_float)

    return prepare


def _ggml(packed: bool) -> Callable[[Tensor, Tensor, int], Prepared]:
    def prepare(x: Tensor, w: Tensor, threads: int) -> Prepared:
        product = ggml.Product(x.numpy(), w.numpy(), threads, repack=packed)
        return Prepared(product.run, lambda _: torch.from_numpy(product.result()))

    return prepare


PEERS = (
    Peer("torch fp32", _fp32, 32, 1e-5),
    Peer("torch bf16", _bf16, 16, 0.006, "both operands bf16 beforehand"),
    Peer("torch int8 dynamic", _dynamic_int8, 8, 0.05, "activations quantised inside"),
    Peer(
        "torch _int_mm",
        _int_mm,
        8,
        0.03,
        "int8 codes in, int32 out: neither quantised nor scaled inside",
        quick=False,
        few_rows=False,
    ),
    Peer("torch int4 weights", _int4, 4 + 32 / GROUP, 0.18, "activations bf16", quick=False),
    Peer(
        "torchao int8",
        _torchao("Int8DynamicActivationInt8WeightConfig", torch.float32),
        8,
        0.03,
        "activations quantised inside",
        quick=False,
        few_rows=False,
    ),
    Peer("torchao int4", _torchao("Int4WeightOnlyConfig", torch.bfloat16, group_size=GROUP), 4.5, 0.18, quick=False),
    Peer("ggml Q4_0", _ggml(False), 4.5, 0.18, "activations quantised inside", quick=False),
    Peer("ggml Q4_0 repacked", _ggml(True), 4.5, 0.18, "activations quantised inside"),
)
BY_NAME = {peer.name: peer for peer in PEERS}
