"""Results as text: the table of gates, then everything that was measured."""

from collections import Counter
from collections.abc import Iterable, Sequence

from hbfp.benchmark.gates import Outcome, Verdict
from hbfp.benchmark.results import Results, Row

__all__ = ["as_dict", "gate_table", "heading", "row_table"]


def heading(results: Results) -> str:
    """The machine, the level, the versions, and the levels that did not run."""
    lines = [f"{results.cpu}, level {results.level}"]
    lines += [f"  {name:<18}{value}" for name, value in results.environment.items()]
    if results.quick:
        lines.append("  quick run: fewer shapes and rounds")
    return "\n".join(lines)


def gate_table(verdicts: Sequence[Verdict]) -> str:
    """One line per gate and number of threads that was asked for, then how many came out how."""
    left_out = sum(verdict.outcome is Outcome.LEFT_OUT for verdict in verdicts)
    shown = [verdict for verdict in verdicts if verdict.outcome is not Outcome.LEFT_OUT]
    cells: list[tuple[str, ...]] = [("figure", "threads", "measured", "must", "stretch", "")]
    for verdict in shown:
        numbers = [
            "" if number is None else verdict.form.format(number)
            for number in (verdict.figure, verdict.must, verdict.stretch)
        ]
        outcome = verdict.outcome.value + (f": {verdict.reason}" if verdict.reason else "")
        cells.append((verdict.gate, str(verdict.threads), *numbers, outcome))
    numbers_of = Counter(verdict.outcome for verdict in shown)
    counts = "; ".join(f"{outcome.value}: {numbers_of[outcome]}" for outcome in Outcome if numbers_of[outcome])
    more = f"\n{left_out} more were not measured in this run" if left_out else ""
    return f"{_aligned(cells, left=(0, 5))}\n{counts}{more}"


def row_table(results: Results) -> str:
    """Every row; ratios are to torch's FP32 in the same case, where that ran."""
    fp32 = {(row.case, row.shape, row.threads): row for row in results.rows if row.contestant == "torch fp32"}
    rounds: dict[str, int] = {}
    for row in results.rows:
        rounds[row.case] = max(rounds.get(row.case, 0), len(row.rounds))
    cells: list[tuple[str, ...]] = [("case", "shape", "contestant", "threads", "ms", "rate", "", "/ fp32", "")]
    for row in results.rows:
        base = fp32.get((row.case, row.shape, row.threads))
        cells.append(
            (
                row.case,
                row.shape,
                row.contestant,
                str(row.threads),
                "" if row.unit == "MiB" else f"{1e3 * row.seconds:.4g}",
                f"{row.figure:.4g}",
                row.unit,
                f"{row.times_as_fast_as(base):.2f}" if base else "",
                _note(row, rounds[row.case]),
            )
        )
    text = _aligned(cells, left=(0, 1, 2, 6, 8))
    if results.missing:
        gaps = [("case", "contestant", "not run")]
        gaps += [(gap.case, gap.contestant, gap.reason) for gap in results.missing]
        text += f"\n\n{_aligned(gaps, left=(0, 1, 2))}"
    return text


def _note(row: Row, rounds: int) -> str:
    few = f"slow: {len(row.rounds)} of {rounds} rounds" if len(row.rounds) < rounds else ""
    return "; ".join(filter(None, (row.note, few)))


def _aligned(cells: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    left = set(left)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def as_dict(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """The verdicts for JSON."""
    return [
        {
            "gate": verdict.gate,
            "threads": verdict.threads,
            "figure": verdict.figure,
            "must": verdict.must,
            "stretch": verdict.stretch,
            "outcome": verdict.outcome.value,
            "reason": verdict.reason,
        }
        for verdict in verdicts
    ]
