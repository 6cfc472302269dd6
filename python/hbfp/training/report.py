"""What the demo found: as JSON for programs, as one HTML page for people, as a table for the terminal."""

import html
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import hbfp
from hbfp.training.loop import replacing

# Okabe and Ito's colours, told apart by colour-blind readers, darkened a little to show on white as well as on black.
COLOURS = {"fp32": "#808080", "hbfp4": "#d9730d", "hbfp6": "#2f86d1", "booster": "#119a72"}


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run. Losses are in nats, shares and the accuracy fractions, times medians per step in seconds."""

    name: str
    final_loss: float
    accuracy: float
    seconds_per_step: float
    ratio_to_fp32: float
    share_4bit: float
    share_4bit_paper: float
    """The same count under the paper's schedule: one boosted epoch in 160."""
    file_bytes: int
    logits_identical: bool | None
    """The model, packed and loaded back, gives the same bits; None for FP32, which is not packed."""
    losses: list[float]


@dataclass(frozen=True, slots=True)
class Packed:
    """The HBFP4 model's file against the FP32 model's."""

    file_bytes: int
    fp32_bytes: int
    logits_identical: bool


@dataclass(frozen=True, slots=True)
class TaskReport:
    task: str
    title: str
    model: str
    data: str
    steps: int
    first_boosted_step: int
    seconds: float
    """Everything, from loading the data to comparing the packed models."""
    runs: list[RunReport]
    packed: Packed


@dataclass(frozen=True, slots=True)
class DemoReport:
    seed: int
    environment: dict[str, str]
    tasks: list[TaskReport]

    def write(self, folder: Path) -> None:
        """`report.json` and `report.html`; each appears whole or not at all."""
        with replacing(folder / "report.json") as file:
            file.write(json.dumps(asdict(self), indent=1, allow_nan=False).encode())
        with replacing(folder / "report.html") as file:
            file.write(page(self).encode())


def environment() -> dict[str, str]:
    """What the times depend on."""
    core = hbfp.info()
    return {
        "CPU": _processor(),
        "kernels": str(core["level"]),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "versions": f"hbfp {hbfp.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


_HEADINGS = ("run", "loss", "accuracy", "ms/step", "× fp32", "4-bit MACs", "by paper", "file", "reloaded")
EXPLAINED = (
    "loss, accuracy: validation set, after the last step, in the last phase's formats",
    "ms/step: median of forward + backward + optimizer; × fp32: the same relative to the FP32 run",
    "4-bit MACs: share of all multiply-accumulates of this run; by paper: of a schedule with 1 boosted epoch in 160 "
    "(what is missing to 99 % is the first and the last layer, a larger part of a network this small)",
    "reloaded: logits of the packed file, loaded into another model, against the trained model's, bit for bit",
)


def rows(task: TaskReport) -> list[tuple[str, ...]]:
    """The table's cells, under `_HEADINGS`."""
    return [
        (
            run.name,
            f"{run.final_loss:.4f}",
            f"{run.accuracy:.2%}",
            f"{1000 * run.seconds_per_step:.1f}",
            f"{run.ratio_to_fp32:.2f}",
            f"{run.share_4bit:.2%}",
            f"{run.share_4bit_paper:.2%}",
            f"{run.file_bytes / 1000:,.0f} kB",
            {None: "", True: "identical", False: "DIFFERENT"}[run.logits_identical],
        )
        for run in task.runs
    ]


def table(task: TaskReport) -> Table:
    """The task's results for a terminal."""
    result = Table(title=f"{task.title}: {task.model}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for index, heading in enumerate(_HEADINGS):
        result.add_column(heading, justify="left" if index == 0 else "right")
    for cells in rows(task):
        result.add_row(*cells)
    return result


def page(report: DemoReport) -> str:
    """One HTML page without a single reference to anything outside of it."""
    sections = "\n".join(_section(task) for task in report.tasks)
    explained = "".join(f"<li>{html.escape(line)}</li>" for line in EXPLAINED)
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in report.environment.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>HBFP demo</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Training in hybrid block floating point</h1>
<p>The same network, from the same initial weights, on the same batches in the same order, trained four times:
in FP32; with every product of the forward pass, of the input gradient and of the weight gradient computed on 4-bit or
on 6-bit integers; and with Accuracy Booster, which computes on 4 bits but spends 6 on the first and the last layer and,
in the last tenth of the steps, on all layers. The runs took turns, so their times are comparable.</p>
{sections}
<h2>How to read it</h2>
<ul>{explained}</ul>
<h2>Where it ran</h2>
<dl>{facts}<dt>seed</dt><dd>{report.seed}</dd></dl>
</body>
</html>
"""


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #6a7078; --rule: #d8dce0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #15181b; --faint: #98a0a8; --rule: #363c42; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p { max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.35rem 0.8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.wrong { color: #d0342c; font-weight: 600; }
svg { width: 100%; height: auto; margin-top: 1.2rem; } svg text { font-family: system-ui, sans-serif; }
ul { padding-left: 1.2rem; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.5em; }
.note { color: var(--faint); font-size: 0.9rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0.2rem 1.2rem; }
dt { color: var(--faint); } dd { margin: 0; }
"""


def _section(task: TaskReport) -> str:
    heads = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
    body = ""
    for run, cells in zip(task.runs, rows(task), strict=True):
        swatch = f'<span class="swatch" style="background: {COLOURS[run.name]}"></span>'
        tail = "".join(f"<td{' class=wrong' if cell == 'DIFFERENT' else ''}>{cell}</td>" for cell in cells[1:])
        body += f"<tr><td>{swatch}{cells[0]}</td>{tail}</tr>\n"
    return f"""<h2>{html.escape(task.title)}</h2>
<p>{html.escape(task.model)}; {html.escape(task.data)}.</p>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>
{body}</tbody></table></div>
{_curves(task)}
<p class="note">Training loss, averaged over {_window(task.steps)} steps, and its distance from the FP32 run's. Shaded:
Booster's last phase, from step {task.first_boosted_step} of {task.steps}.</p>"""


def _window(steps: int) -> int:
    return max(1, steps // 25)


def smooth(losses: Sequence[float], window: int) -> Any:
    """Means of the last `window` losses at each step from the first where there are that many."""
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def _curves(task: TaskReport) -> str:
    """Both panels as an inline SVG that takes the page's text colour."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    ink = "#010203"  # stands for the page's own colour, which matplotlib cannot name
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": task.task,
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    window = _window(task.steps)
    smoothed = {run.name: smooth(run.losses, window) for run in task.runs}
    steps = np.arange(window, task.steps + 1)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, losses in smoothed.items():
            left.plot(steps, losses, color=COLOURS[name], linewidth=1.6, label=name)
            if name != "fp32":
                right.plot(steps, losses - smoothed["fp32"], color=COLOURS[name], linewidth=1.6)
        if task.task == "digits":
            left.set_yscale("log")
            left.yaxis.set_major_formatter("{x:g}")
            left.yaxis.set_minor_formatter(NullFormatter())
        right.axhline(0, color=COLOURS["fp32"], linewidth=1.6)
        for axes, label in ((left, "training loss (nats)"), (right, "above FP32 (nats)")):
            axes.axvspan(task.first_boosted_step, task.steps, color=COLOURS["booster"], alpha=0.12, linewidth=0)
            axes.set_xlim(0, task.steps)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            axes.grid(alpha=0.25, linewidth=0.6)
        left.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(ink, "currentColor")
    return drawing.replace("<svg", f'<svg role="img" aria-label="Training loss of {html.escape(task.title)}"', 1)
