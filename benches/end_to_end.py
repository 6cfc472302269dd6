"""Products and training steps against torch, interleaved in one process: ratios within a run, as machines are noisy.

Every case asserts its answer before it is timed. A round takes the best of several calls of each contestant in turn;
the figure is the median of the rounds. Results go to the terminal, to build/bench/end_to_end.json and to
benches/record/<cpu>/<date>.csv (`--record`).

The gate: HBFP4 at 1024³ on this machine's SIMD level is at least 1.5 times as fast as torch's FP32; exit code 1 if not.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hbfp
from hbfp import _core, ops

ROOT = Path(__file__).resolve().parents[1]
GATE = 1.5

Contestants = dict[str, Callable[[], object]]


class Row(NamedTuple):
    case: str
    contestant: str
    threads: int
    milliseconds: float
    gops: float
    ratio_to_fp32: float


def best_of(call: Callable[[], object], calls: int) -> float:
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def compare(case: str, operations: int, contestants: Contestants, rounds: int, calls: int) -> list[Row]:
    """Times the contestants in turn; "fp32" is among them."""
    for call in contestants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            times[name].append(best_of(call, calls))
    ratios = {
        name: statistics.median(fp32 / own for fp32, own in zip(times["fp32"], seconds, strict=True))
        for name, seconds in times.items()
    }
    threads = torch.get_num_threads()
    rows = []
    for name in contestants:
        seconds = statistics.median(times[name])
        rows.append(Row(case, name, threads, 1e3 * seconds, operations / seconds / 1e9, ratios[name]))
    return rows


def check_product(x: torch.Tensor, w: torch.Tensor, format: hbfp.HBFP, out: torch.Tensor) -> None:
    """The first and last rows against the exact-arithmetic oracle."""
    rows, columns = [0, x.shape[0] - 1], [0, 1, w.shape[0] - 1]
    left = hbfp.reference.encode(np.from_dlpack(x[rows]), format, -1)
    right = hbfp.reference.encode(np.from_dlpack(w[columns]), format, -1)
    expected = hbfp.reference.matmul(left, right.T)
    found = np.from_dlpack(out[rows][:, columns].contiguous())
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), f"{format}: not the oracle's result"


def products(m: int, n: int, k: int, rounds: int, calls: int) -> list[Row]:
    """The packed product, and the product with both operands encoded inside the timing, for three widths."""
    x, w, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
    threads = torch.get_num_threads()
    transposed = w.t()
    contestants: Contestants = {
        "fp32": lambda: torch.mm(x, transposed, out=out),
    }
    bf16 = x.bfloat16(), w.bfloat16().t()
    contestants["bf16"] = lambda: torch.mm(*bf16)
    for format in (hbfp.HBFP4, hbfp.HBFP6, hbfp.HBFP8):
        activations = _core.Floats(x, -1, format.core)
        weights = _core.Floats(w, -1, format.core)
        packed = _core.prepack(weights, threads)

        def run_packed(a: _core.Floats = activations, b: _core.Packed = packed) -> None:
            _core.product(a, b, out, None, False, threads)

        def run_encoding(a: _core.Floats = activations, b: _core.Floats = weights) -> None:
            _core.product(a, b, out, None, False, threads)

        run_packed()
        check_product(x, w, format, out)
        contestants[f"{format} packed weights"] = run_packed
        contestants[f"{format} both encoded"] = run_encoding
    return compare(f"product {m}x{n}x{k}", 2 * m * n * k, contestants, rounds, calls)


def training_step(m: int, n: int, k: int, rounds: int, calls: int) -> list[Row]:
    """Forward and backward of one linear layer through autograd; gradients rounded stochastically."""
    x = torch.randn(m, k, requires_grad=True)
    dy = torch.randn(m, n)
    plain, converted = torch.nn.Linear(k, n), torch.nn.Linear(k, n)
    hbfp.convert_(converted, "hbfp4")

    def step(layer: torch.nn.Module) -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)

    step(converted)
    expected = ops.product(dy.t(), -1, x.detach(), -2, (hbfp.HBFP16, hbfp.HBFP16), (0, 0), 0, (0, 0), None)
    error = (converted.weight.grad - expected).norm() / expected.norm()
    # Blocks of 64 normal values have a step of about std/2: an error of std/2/√12 to nearest, of std/2/√6
    # stochastically, together a quarter of the product; twice that is a mistake.
    assert error < 0.5, f"the weight gradient is off by {error:.2f}"
    contestants = {"fp32": lambda: step(plain), "hbfp4": lambda: step(converted)}
    return compare(f"training step {m}x{n}x{k}", 6 * m * n * k, contestants, rounds, calls)


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"model name\s*:\s*(.*)", text)
        name = found[1] if found else platform.processor()
    except OSError:
        name = platform.processor()
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds, under 90 s")
    parser.add_argument("--record", action="store_true", help="add to benches/record/<cpu>/<date>.csv")
    options = parser.parse_args()
    rounds, calls = (5, 3) if options.quick else (9, 5)
    shapes = [(1024, 1024, 1024)] if options.quick else [(1024, 1024, 1024), (256, 4096, 4096), (32, 4096, 4096)]
    torch.manual_seed(0)
    info = hbfp.info()
    print(f"level {info['level']}, threading {info['threading']}, {cpu_name()}, torch {torch.__version__}")
    for name, state in info["levels"].items():
        if name != info["level"]:
            print(f"level {name}: not run ({state})")
    rows: list[Row] = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for shape in shapes:
            rows += products(*shape, rounds, calls)
        rows += training_step(1024, 1024, 1024, rounds, calls)
    print(f"{'case':<30}{'contestant':<28}{'threads':>8}{'ms':>10}{'GOP/s':>9}{'/ fp32':>8}")
    for row in rows:
        figures = f"{row.milliseconds:>10.2f}{row.gops:>9.1f}{row.ratio_to_fp32:>8.2f}"
        print(f"{row.case:<30}{row.contestant:<28}{row.threads:>8}{figures}")
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    result = {"cpu": cpu_name(), "info": {k: str(v) for k, v in info.items()}, "rows": [row._asdict() for row in rows]}
    (folder / "end_to_end.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if options.record:
        record = ROOT / "benches" / "record" / cpu_name()
        record.mkdir(parents=True, exist_ok=True)
        with open(record / f"{datetime.date.today()}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["level", *Row._fields])
            writer.writerows([info["level"], *row] for row in rows)
    gated = [row for row in rows if row.case == "product 1024x1024x1024" and row.contestant.startswith("hbfp4b64")]
    failed = [row for row in gated if row.ratio_to_fp32 < GATE]
    if info["level"] != "scalar" and failed:
        print(f"below the gate of {GATE} x FP32: {', '.join(row.contestant for row in failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
