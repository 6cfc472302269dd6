"""`hbfp demo`: FP32, HBFP4, HBFP6 and Accuracy Booster side by side on real data."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

NAME = "demo"
HELP = "train small networks in FP32, HBFP4, HBFP6 and with Accuracy Booster, and compare"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("digits", "text", "all"), default="all", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer steps: half a minute in all")
    parser.add_argument("--steps", type=int, help="steps of each run, in place of the task's own number")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="where the report goes (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from hbfp.training import demo
    from hbfp.training.report import EXPLAINED, table

    names = demo.TASKS if arguments.task == "all" else (arguments.task,)
    try:
        report = demo.demo(names, arguments.out, quick=arguments.quick, steps=arguments.steps, seed=arguments.seed)
    except KeyboardInterrupt:
        print("hbfp demo: stopped; no report was written. A shorter one: hbfp demo --quick", file=sys.stderr)
        raise
    different = [task.task for task in report.tasks for run in task.runs if run.logits_identical is False]
    if arguments.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        for task in report.tasks:
            console.print(table(task))
        for line in EXPLAINED:
            console.print(line, style="dim")
        console.print(f"\ncurves and details: {arguments.out / 'report.html'}")
    return 1 if different else 0
