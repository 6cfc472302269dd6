"""The cases: each makes its operands, checks every contestant's answer, times them in turn and adds rows.

Shapes are M x N x K: x [M, K] times the transpose of w [N, K]. Random operands are normal, from a fixed seed.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hbfp
from hbfp import _core
from hbfp.benchmark import ceilings
from hbfp.benchmark.checks import WrongAnswer, close, exact
from hbfp.benchmark.peers import BY_NAME, PEERS, Peer, quiet
from hbfp.benchmark.results import NotRun, Results, Row
from hbfp.benchmark.timing import FULL, Call, Effort, interleave, seconds_per_call
from hbfp.format import HBFP

__all__ = [
    "BATCHES",
    "COLD_BYTES",
    "EMPTY",
    "FAR_APART",
    "ORIENTATIONS",
    "Bench",
    "batched",
    "cold_row",
    "encode",
    "few_rows",
    "forward",
    "measure_ceilings",
    "overhead",
    "packed_product",
    "packed_product_far_apart",
    "scaling",
    "sweep",
    "training_step",
]

COLD_BYTES = 190 << 20
"""Weights that a rotation holds together at least: several times the L3 of known CPUs."""

BATCHES = ((96, 64, 64, 64), (384, 32, 32, 64), (48, 128, 128, 64))
"""Matrices, M, N and K of batches as attention makes them: operands and results of 5 to 7 MB."""

ORIENTATIONS = ("left by row", "right by row", "left transposed", "right transposed")

_SEED = 20
_ENCODED_INSIDE = "activations encoded inside"


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the results go, and how hard to measure."""

    results: Results
    threads: int
    effort: Effort = FULL
    quick: bool = False

    def measure(
        self,
        case: str,
        shape: str,
        work: float,
        unit: str,
        contestants: Mapping[str, Call],
        notes: Mapping[str, str],
    ) -> list[Row]:
        """Times the contestants in turn; rows for the results."""
        times = interleave(contestants, self.effort)
        rows = [
            Row(case, shape, name, self.threads, work, unit, times[name], notes.get(name, "")) for name in contestants
        ]
        self.results.rows += rows
        return rows


# --- contestants -----------------------------------------------------------------------------------------------------


def _name(m: int, n: int, k: int) -> str:
    return f"{m}x{n}x{k}"


def _operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)


FAR_APART = ", exponents far apart"
"""Marks the shape of operands whose blocks differ by up to 2^12."""


def _far_apart(lines: int, k: int, block: int = 64) -> Tensor:
    """A power of two for each block: [lines, k]."""
    generator = torch.Generator().manual_seed(_SEED + 1)
    exponents = torch.randint(0, 13, (lines, -(-k // block)), generator=generator)
    return torch.exp2(exponents.float()).repeat_interleave(block, 1)[:, :k]


def _ours(x: Tensor, w: Tensor, format: HBFP, threads: int) -> tuple[Call, Tensor]:
    """Our product, weights packed, activations encoded inside the timing: the call, and what it writes."""
    out = torch.empty(x.shape[0], w.shape[0])
    a, b = _core.Floats(x, -1, format.core), _core.prepack(_core.Floats(w, -1, format.core), threads)
    return lambda: _core.product(a, b, out, None, False, threads), out


class _Contestants:
    """Calls by name, each checked when it is added."""

    def __init__(self, bench: Bench, case: str, x: Tensor, w: Tensor) -> None:
        self.calls: dict[str, Call] = {}
        self.notes: dict[str, str] = {}
        self._bench, self._case, self._x, self._w = bench, case, x, w

    def add_ours(self, formats: Iterable[HBFP]) -> None:
        for format in formats:
            name = str(format)
            call, out = _ours(self._x, self._w, format, self._bench.threads)
            call()
            exact(name, out, (self._x, self._w), (format, format))
            self.calls[name], self.notes[name] = call, _ENCODED_INSIDE

    def add_peers(self, peers: Iterable[Peer]) -> None:
        """Those that run; a peer that does not, or computes something else, is noted with the reason."""
        expected = self._x @ self._w.t()
        for peer in peers:
            if self._bench.quick and not peer.quick:
                self._bench.results.not_run(self._case, peer.name, "left out of the quick run")
                continue
            try:
                self.calls[peer.name] = checked(peer, self._x, self._w, self._bench.threads, expected)
                self.notes[peer.name] = peer.note
            except NotRun as reason:
                self._bench.results.not_run(self._case, peer.name, str(reason))


def checked(peer: Peer, x: Tensor, w: Tensor, threads: int, expected: Tensor) -> Call:
    """The peer's call, once its answer has been found right.

    Raises:
        NotRun: it does not run here, or its answer is wrong; with the reason.
    """
    try:
        with quiet():
            prepared = peer.prepare(x, w, threads)
            result = prepared.call()
        close(peer.name, prepared.read(result), expected, peer.tolerance)
    except WrongAnswer as wrong:
        raise NotRun(f"wrong answer: {wrong}") from wrong
    except NotRun:
        raise
    except Exception as error:  # other people's code: whatever it raises is a reason, not our failure
        lines = str(error).strip().splitlines()
        raise NotRun(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]) from error
    return prepared.call


def _named(*names: str) -> list[Peer]:
    return [BY_NAME[name] for name in names]


# --- products --------------------------------------------------------------------------------------------------------


def packed_product(bench: Bench, size: int = 1024) -> None:
    """Products of operands already packed, for three widths and three blocks, beside torch's FP32."""
    x, w = _operands(size, size, size)
    contestants = _Contestants(bench, "packed", x, w)
    contestants.add_ours([hbfp.HBFP4, hbfp.HBFP6, hbfp.HBFP8, hbfp.HBFP(4, block=32), hbfp.HBFP(4, block=16)])
    contestants.add_peers(_named("torch fp32"))
    bench.measure("packed", _name(size, size, size), 2 * size**3, "GOP/s", contestants.calls, contestants.notes)


def packed_product_far_apart(bench: Bench, size: int = 1024) -> None:
    """The same of blocks that differ by up to 2^12: products of normal values, whose blocks are alike, are faster."""
    x, w = _operands(size, size, size)
    contestants = _Contestants(bench, "packed", x * _far_apart(size, size), w * _far_apart(size, size))
    contestants.add_ours([hbfp.HBFP4])
    contestants.add_peers(_named("torch fp32"))
    name = f"{_name(size, size, size)}{FAR_APART}"
    bench.measure("packed", name, 2 * size**3, "GOP/s", contestants.calls, contestants.notes)


def forward(bench: Bench, m: int, n: int, k: int) -> None:
    """A layer's forward product: weights ready beforehand, activations as they come, beside every peer."""
    x, w = _operands(m, n, k)
    contestants = _Contestants(bench, "forward", x, w)
    contestants.add_ours([hbfp.HBFP4, hbfp.HBFP6, hbfp.HBFP8])
    contestants.add_peers(PEERS)
    bench.measure("forward", _name(m, n, k), 2 * m * n * k, "GOP/s", contestants.calls, contestants.notes)


def few_rows(bench: Bench, m: int, n: int = 4096, k: int = 4096) -> None:
    """Few rows against one large weight, which stays in the caches where it fits."""
    x, w = _operands(m, n, k)
    contestants = _Contestants(bench, "few rows", x, w)
    contestants.add_ours([hbfp.HBFP4])
    contestants.add_peers(peer for peer in PEERS if peer.few_rows)
    bench.measure("few rows", _name(m, n, k), 2 * m * n * k, "GOP/s", contestants.calls, contestants.notes)


def cold_row(bench: Bench, n: int = 4096, k: int = 4096, total: int = COLD_BYTES) -> None:
    """One row against weights that come from memory: a rotation over copies that hold `total` bytes together. The rate
    is in bytes of weights."""
    x, w = _operands(1, n, k)
    expected = x @ w.t()
    rotations: dict[str, tuple[float, Call]] = {}
    out = torch.empty(1, n)
    a, weights = _core.Floats(x, -1, hbfp.HBFP4.core), _core.Floats(w, -1, hbfp.HBFP4.core)
    packed = [_core.prepack(weights, bench.threads)]
    packed += [_core.prepack(weights, bench.threads) for _ in range(total // packed[0].nbytes)]
    for copy in packed:
        out.zero_()
        _core.product(a, copy, out, None, False, bench.threads)
        exact(str(hbfp.HBFP4), out, (x, w), (hbfp.HBFP4, hbfp.HBFP4))
    copies = itertools.cycle(packed)
    rotations[str(hbfp.HBFP4)] = (
        float(packed[0].nbytes),
        lambda: _core.product(a, next(copies), out, None, False, bench.threads),
    )
    for peer in PEERS:
        if not peer.few_rows:
            continue
        if bench.quick and not peer.quick:
            bench.results.not_run("cold row", peer.name, "left out of the quick run")
            continue
        size = n * k * peer.weight_bits / 8
        try:
            calls = [checked(peer, x, w.clone(), bench.threads, expected) for _ in range(int(total / size) + 1)]
            rotations[peer.name] = size, _rotation(calls)
        except NotRun as reason:
            bench.results.not_run("cold row", peer.name, str(reason))
    times = interleave({name: call for name, (_, call) in rotations.items()}, bench.effort)
    bench.results.rows += [
        Row("cold row", _name(1, n, k), name, bench.threads, size, "GB/s", times[name], "bytes of weights")
        for name, (size, _) in rotations.items()
    ]


def batched(bench: Bench, matrices: int, m: int, n: int, k: int) -> None:
    """A batch of small products, a [B, M, K] times b [B, K, N], beside torch's own; both allocate."""
    generator = torch.Generator().manual_seed(_SEED)
    a, b = (torch.randn(matrices, *shape, generator=generator) for shape in ((m, k), (k, n)))
    format, recipe = hbfp.HBFP4, hbfp.recipe("hbfp4")
    contestants: dict[str, Call] = {
        str(format): lambda: hbfp.nn.functional.bmm(a, b, recipe=recipe),
        "torch fp32": lambda: torch.bmm(a, b),
    }
    out = hbfp.nn.functional.bmm(a, b, recipe=recipe)
    for i in sorted({0, matrices // 2, matrices - 1}):
        exact(f"{format}, matrix {i}", out[i], (a[i], b[i]), (format, format), (-1, -2))
    notes = {str(format): "both operands encoded inside"}
    with torch.no_grad():
        work = 2 * matrices * m * n * k
        bench.measure("batched", f"{matrices} of {_name(m, n, k)}", work, "GOP/s", contestants, notes)


def _rotation(calls: Sequence[Call]) -> Call:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def scaling(bench: Bench, size: int, thread_counts: Sequence[int]) -> None:
    """The same packed product on different numbers of threads."""
    x, w = _operands(size, size, size)
    calls: dict[int, Call] = {}
    for threads in thread_counts:
        call, out = _ours(x, w, hbfp.HBFP4, threads)
        call()
        exact(str(hbfp.HBFP4), out, (x, w), (hbfp.HBFP4, hbfp.HBFP4))
        calls[threads] = call
    times = interleave({str(threads): call for threads, call in calls.items()}, bench.effort)
    bench.results.rows += [
        Row(
            "scaling",
            _name(size, size, size),
            str(hbfp.HBFP4),
            threads,
            2 * size**3,
            "GOP/s",
            times[str(threads)],
            _ENCODED_INSIDE,
        )
        for threads in calls
    ]


def sweep(bench: Bench, sizes: Sequence[int], limit: float = 2.5) -> None:
    """Square products over the size, for the plot; a contestant leaves when a call would take longer than `limit`
    seconds."""
    rates: dict[str, float] = {}
    slow: set[str] = set()
    for size in sizes:
        work = 2 * size**3
        x, w = _operands(size, size, size)
        contestants = _Contestants(bench, "sweep", x, w)
        for name in sorted(name for name, rate in rates.items() if work / rate / 1e9 > limit and name not in slow):
            slow.add(name)
            count = f"{bench.threads} thread{'s' * (bench.threads > 1)}"
            bench.results.not_run("sweep", name, f"more than {limit:g} s a call from size {size} up, {count}")
        contestants.add_ours(f for f in (hbfp.HBFP4, hbfp.HBFP6, hbfp.HBFP8) if str(f) not in slow)
        names = ("torch fp32", "torch bf16", "torch int8 dynamic")
        contestants.add_peers(_named(*(name for name in names if name not in slow)))
        if not contestants.calls:
            return
        rows = bench.measure("sweep", _name(size, size, size), work, "GOP/s", contestants.calls, contestants.notes)
        rates.update((row.contestant, row.figure) for row in rows)


# --- encoders --------------------------------------------------------------------------------------------------------


def encode(bench: Bench, size: int = 1024, tensors: int = 2) -> None:
    """Encoding into panels of HBFP4, a rotation over tensors of size² values: two of 1024² lie in L3, not in L2."""
    format = hbfp.HBFP4
    generator = torch.Generator().manual_seed(_SEED)
    inputs = [torch.randn(size, size, generator=generator) for _ in range(tensors)]
    for number, rounding in ((0, "nearest_even"), (3, "stochastic")):
        contestants: dict[str, Call] = {}
        for orientation in ORIENTATIONS:
            left, axis = orientation.startswith("left"), -1 if orientation.endswith("row") else -2
            name = f"{orientation}, {rounding}"
            _check_encoder(name, left, inputs[0], axis, number, rounding, format)
            operands = [_core.Floats(x, axis, format.core, number, _SEED) for x in inputs]
            contestants[name] = _encoder(operands, left, bench.threads)
        bench.measure("encode", f"{size}x{size}", size * size, "Gelem/s", contestants, {})


def _encoder(operands: Sequence[_core.Floats], left: bool, threads: int) -> Call:
    turns = itertools.cycle(operands)
    return lambda: _core.lay_out(next(turns), left, threads)


def _check_encoder(name: str, left: bool, x: Tensor, axis: int, number: int, rounding: str, format: HBFP) -> None:
    """A product of the panels with a few rows of another operand, against the oracle."""
    k, rows = (x.shape[1], x.shape[0]) if axis == -1 else (x.shape[0], x.shape[1])
    other = torch.randn(4, k, generator=torch.Generator().manual_seed(_SEED + 1))
    encoded, plain = _core.Floats(x, axis, format.core, number, _SEED), _core.Floats(other, -1, format.core)
    if left:
        out = torch.empty(rows, 4)
        _core.product(encoded, plain, out, None, False, 1)
        exact(name, out, (x, other), (format, format), (axis, -1), (rounding, "nearest_even"), _SEED)
    else:
        out = torch.empty(4, rows)
        _core.product(plain, encoded, out, None, False, 1)
        exact(name, out, (other, x), (format, format), (-1, axis), ("nearest_even", rounding), _SEED)


# --- layers ----------------------------------------------------------------------------------------------------------


def training_step(bench: Bench, m: int, n: int, k: int) -> None:
    """Forward and backward of one linear layer through autograd, gradients rounded stochastically; all allocate."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(m, k, generator=generator, requires_grad=True)
    dy = torch.randn(m, n, generator=generator)
    plain, converted = torch.nn.Linear(k, n), torch.nn.Linear(k, n)
    converted.load_state_dict(plain.state_dict())
    hbfp.convert_(converted, "hbfp4")

    def step(layer: torch.nn.Module, narrow: bool = False) -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            y = layer(x)
        y.backward(dy.to(y.dtype) if narrow else dy)

    contestants: dict[str, Call] = {
        "hbfp4": lambda: step(converted),
        "torch fp32": lambda: step(plain),
        "torch bf16 autocast": lambda: step(plain, narrow=True),
    }
    expected_dw, expected_dx = dy.t() @ x.detach(), dy @ plain.weight.detach()
    layers = {"hbfp4": converted}
    # Normal values in blocks of 64 have a step of about std/2: an error of std/2/√12 to nearest, std/2/√6
    # stochastically, together a quarter of the product; twice that is a mistake. bf16 keeps 8 bits.
    tolerances = {"hbfp4": 0.5, "torch bf16 autocast": 0.01, "torch fp32": 1e-5}
    for name, call in tuple(contestants.items()):
        seconds = seconds_per_call(call, 1)
        found_dw, found_dx = layers.get(name, plain).weight.grad, x.grad
        if found_dw is None or found_dx is None:
            raise WrongAnswer(f"{name}: a training step left no gradients")
        close(f"{name}, weight gradient", found_dw, expected_dw, tolerances[name])
        close(f"{name}, input gradient", found_dx, expected_dx, tolerances[name])
        if bench.quick and seconds > 0.5 and name == "torch bf16 autocast":
            bench.results.not_run("training step", name, f"left out of the quick run: {seconds:.1f} s a step")
            del contestants[name]
    bench.measure("training step", _name(m, n, k), 6 * m * n * k, "GOP/s", contestants, {})


EMPTY = "torch.empty"
"""What the overhead of a call is counted from."""


def overhead(bench: Bench, m: int, n: int, k: int) -> None:
    """Calls on shapes so small that only their overhead is left, in µs, beside a call that just makes a tensor."""
    x, w = _operands(m, n, k)
    plain, converted = torch.nn.Linear(k, n, bias=False), torch.nn.Linear(k, n, bias=False)
    for layer in (plain, converted):
        layer.weight.data.copy_(w)
    hbfp.convert_(converted, "hbfp4")
    recipe = hbfp.recipe("hbfp4")
    x_array, packed = x.numpy(), hbfp.prepack(hbfp.encode(w.numpy(), hbfp.HBFP4))

    def without_grad(layer: torch.nn.Module) -> Call:
        frozen = layer.requires_grad_(False)
        return lambda: frozen(x)

    needs_grad = torch.nn.Linear(k, n, bias=False)
    needs_grad.weight.data.copy_(w)
    hbfp.convert_(needs_grad, "hbfp4")
    contestants: dict[str, Callable[[], object]] = {
        EMPTY: lambda: torch.empty((m, n)),
        "hbfp.linear": lambda: hbfp.linear(x_array, packed, threads=bench.threads),
        "hbfp.nn.functional.linear": lambda: hbfp.nn.functional.linear(x, w, recipe=recipe),
        "converted Linear, no grad": without_grad(converted),
        "converted Linear, grad": lambda: needs_grad(x),
        "torch Linear, no grad": without_grad(plain),
    }
    for name, call in contestants.items():
        result = call()
        if "hbfp" in name or "converted" in name:
            found = torch.as_tensor(result).detach()
            exact(name, found, (x, w), (hbfp.HBFP4, hbfp.HBFP4))
    bench.measure("overhead", _name(m, n, k), 0, "µs", contestants, {})


def measure_ceilings(bench: Bench, dram_bytes: int | None = None) -> None:
    """The machine's ceilings on this number of threads."""
    sizes = {} if dram_bytes is None else {"dram_bytes": dram_bytes}
    bench.results.rows += ceilings.measure(bench.threads, bench.effort, **sizes)
