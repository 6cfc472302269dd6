"""`hbfp bench`: products, encoders and training steps against others', beside the machine's ceilings."""

import argparse
import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hbfp.benchmark import CASES

if TYPE_CHECKING:
    from hbfp.benchmark.results import Results

NAME = "bench"
HELP = "time products and training steps against torch, torchao and ggml, and say which bars are reached"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer shapes and rounds, under 90 s; exit code 1 if HBFP4 is not twice as fast as FP32",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar that must be reached is missed")
    parser.add_argument(
        "--only",
        choices=CASES,
        action="append",
        default=[],
        metavar="CASE",
        help=f"may be repeated: {', '.join(CASES)}",
    )
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: 1, and all cores")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: bench.json in --out")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder of results and plots (default: %(default)s)"
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="also write benches/record/<cpu>/<date>-<level>.csv below the current folder",
    )


def run(arguments: argparse.Namespace) -> int:
    from hbfp.benchmark import suite
    from hbfp.benchmark.checks import WrongAnswer
    from hbfp.benchmark.gates import Outcome, evaluate, quick_failure
    from hbfp.benchmark.report import as_dict, gate_table, heading, row_table
    from hbfp.benchmark.results import write
    from hbfp.errors import HBFPError

    threads = tuple(sorted(set(arguments.threads or suite.default_threads())))
    if threads[0] < 1:
        raise HBFPError(f"--threads are at least 1, not {threads[0]}")
    results = suite.new_results(arguments.quick)
    progress = suite.show_progress if sys.stderr.isatty() else None
    print(heading(results), end="\n\n", flush=True)
    stopped: BaseException | None = None
    try:
        suite.run(results, suite.plan(threads, quick=arguments.quick, only=arguments.only), progress)
    except (KeyboardInterrupt, WrongAnswer) as reason:
        stopped = reason
    if progress is not None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    verdicts = evaluate(results, threads)
    print(gate_table(verdicts), row_table(results), sep="\n\n", end="\n\n")
    files = [arguments.json or arguments.out / "bench.json", arguments.out / "bench.csv"]
    if arguments.record and stopped is None:
        files.append(Path("benches/record") / results.cpu / f"{datetime.date.today()}-{results.level}.csv")
    for path in files:
        csv = path.suffix == ".csv"
        write(path, results.to_csv() if csv else results.to_json({"gates": as_dict(verdicts)}))
        print(f"written: {path}")
    for line in _plots(results, threads, arguments.out):
        print(line)
    if isinstance(stopped, KeyboardInterrupt):
        print("hbfp bench: stopped; the figures are of what had been measured", file=sys.stderr)
        raise stopped
    if stopped is not None:
        print(f"hbfp bench: stopped at a wrong answer: {stopped}", file=sys.stderr)
        return 1
    failure = quick_failure(results) if arguments.quick else None
    if failure is not None:
        print(f"hbfp bench: {failure}", file=sys.stderr)
    missed = arguments.strict and any(verdict.outcome is Outcome.MISS for verdict in verdicts)
    return 1 if missed or failure is not None else 0


def _plots(results: "Results", threads: tuple[int, ...], folder: Path) -> list[str]:
    from hbfp.benchmark import plot
    from hbfp.benchmark.results import NotRun

    lines = []
    for count in threads:
        path = folder / f"gops-{count}-thread{'s' * (count > 1)}.png"
        try:
            plot.draw(results, count, path)
            lines.append(f"written: {path}")
        except NotRun:
            continue
        except ModuleNotFoundError as error:
            lines.append(f"no plot: {error.name} is not installed; get it with: pip install 'hbfp[demo]'")
            break
    return lines
