"""GOP/s over the size of square products, under the machine's ceilings."""

from pathlib import Path
from typing import Any

import numpy as np

from hbfp.benchmark import ceilings
from hbfp.benchmark.results import NotRun, Results
from hbfp.training.loop import replacing

__all__ = ["draw"]

# Okabe and Ito's colours, told apart by colour-blind readers; ours filled and solid, others hollow and dashed.
_STYLES: dict[str, dict[str, Any]] = {
    "hbfp4b64": {"label": "HBFP4", "color": "#d55e00", "marker": "o"},
    "hbfp6b64": {"label": "HBFP6", "color": "#0072b2", "marker": "s"},
    "hbfp8b64": {"label": "HBFP8", "color": "#009e73", "marker": "^"},
    "torch int8 dynamic": {"label": "torch int8, dynamic", "color": "#cc79a7", "marker": "D", "dashes": (4, 2)},
    "torch fp32": {"label": "torch FP32", "color": "#404040", "marker": "v", "dashes": (4, 2)},
    "torch bf16": {"label": "torch bf16", "color": "#8c6d1f", "marker": "x", "dashes": (4, 2)},
}


def draw(results: Results, threads: int, path: Path) -> None:
    """Writes the plot of one number of threads as a PNG.

    Raises:
        NotRun: there is no sweep at that number of threads.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in results.rows:
        if row.case == "sweep" and row.threads == threads:
            curves.setdefault(row.contestant, []).append((int(row.shape.split("x")[0]), row.figure))
    if not curves:
        raise NotRun(f"no sweep of sizes at {threads} thread{'s' * (threads > 1)}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    sizes = sorted({size for points in curves.values() for size, _ in points})
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    top = _roofline(results, threads, axes, sizes)
    for name, style in _STYLES.items():
        if name in curves:
            x, y = zip(*sorted(curves[name]), strict=True)
            axes.plot(x, y, linewidth=1.8, markersize=5.5, **style)
    figures = [rate for points in curves.values() for _, rate in points]
    top = max(top, *figures)
    axes.set_ylim(0.7 * min(figures), 1.5 * top)
    axes.set_xlim(sizes[0] / 1.1, sizes[-1] * 1.1)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    ticks = [d * 10**e for e in range(-2, 6) for d in (1, 2, 5) if low <= d * 10.0**e <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("size n of the product n × n × n")
    axes.set_ylabel("GOP/s (2 n³ operations)")
    count = "one thread" if threads == 1 else f"{threads} threads"
    figure.suptitle("Square products: weights packed, activations as they come", x=0.01, ha="left", fontsize=12)
    axes.set_title(f"{results.cpu}, level {results.level}, {count}", loc="left", fontsize=9.5, color="#505050")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9.5)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _roofline(results: Results, threads: int, axes: Any, sizes: list[int]) -> float:
    """Draws the ceilings; the highest, or 0 if they were not measured."""
    try:
        peak = results.find(ceilings.CASE, "", ceilings.PEAK, threads).figure
        stream = results.find(ceilings.CASE, "", ceilings.DRAM, threads).figure
    except NotRun:
        return 0.0
    n = np.geomspace(sizes[0] / 1.1, sizes[-1] * 1.1, 200)
    # x and the product in FP32, the weights in 4.125 bits, each moved once.
    moved = (8 + 4.125 / 8) * n**2
    axes.plot(n, np.full_like(n, peak), color="black", linewidth=1.2, label=f"multiply-add peak\n({peak:.0f} GOP/s)")
    label = f"all operands from memory\n(HBFP4, {stream:.1f} GB/s)"
    axes.plot(n, 2 * n**3 / moved * stream, color="black", linewidth=1.0, linestyle=":", label=label)
    return float(peak)
