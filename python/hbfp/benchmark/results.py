"""What was measured: rows, contestants that were not run, and their forms as JSON and CSV."""

import csv
import io
import json
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hbfp.benchmark.timing import ratio
from hbfp.errors import FileError
from hbfp.training.loop import replacing

__all__ = ["Missing", "NotMeasured", "NotRun", "Results", "Row", "cpu_name", "rows_from_csv", "write"]


class NotRun(Exception):
    """A contestant or a figure that this machine or build does not have; the message says why."""


class NotMeasured(NotRun):
    """The run left it out: it was quick, or asked for other cases."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant in one case."""

    case: str
    shape: str
    contestant: str
    threads: int
    work: float
    """Of one call: operations (two per multiply-accumulate), elements, bytes, tokens or images, as `unit` says; 0 for
    µs."""
    unit: str
    """GOP/s, Gelem/s, GB/s, tokens/s or images/s; µs for a time; MiB for an amount of memory."""
    rounds: tuple[float, ...]
    """Seconds of the best call of each round, or MiB."""
    note: str = ""
    """What is inside the timing, where the name does not say it."""

    @property
    def seconds(self) -> float:
        """Median of the rounds."""
        return median(self.rounds)

    @property
    def figure(self) -> float:
        """In `unit`."""
        if self.unit == "MiB":
            return median(self.rounds)
        if self.unit in ("tokens/s", "images/s"):
            return self.work / self.seconds
        return 1e6 * self.seconds if self.unit == "µs" else self.work / self.seconds / 1e9

    @property
    def best(self) -> float:
        """The figure of the best round."""
        return self.work / min(self.rounds) / 1e9

    def times_as_fast_as(self, other: "Row") -> float:
        """Ratio of the two rows' speeds."""
        return ratio(self.rounds, other.rounds)


@dataclass(frozen=True, slots=True)
class Missing:
    """A contestant that did not run, and why."""

    case: str
    contestant: str
    reason: str


_COLUMNS = (
    "level",
    "case",
    "shape",
    "contestant",
    "threads",
    "milliseconds",
    "figure",
    "unit",
    "work",
    "rounds",
    "note",
)


@dataclass(slots=True)
class Results:
    """Everything one run measured."""

    level: str
    cpu: str
    environment: dict[str, str] = field(default_factory=dict)
    quick: bool = False
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def find(self, case: str, shape: str, contestant: str, threads: int) -> Row:
        """The row of a contestant.

        Raises:
            NotRun: it did not run, for the reason given.
            NotMeasured: nobody asked for it.
        """
        for row in self.rows:
            if (row.case, row.shape, row.contestant, row.threads) == (case, shape, contestant, threads):
                return row
        for gap in self.missing:
            if gap.case == case and gap.contestant == contestant:
                raise NotRun(f"{contestant}: {gap.reason}")
        raise NotMeasured(f"{contestant} in {case} {shape} at {threads} thread{'s' * (threads > 1)} was not measured")

    def not_run(self, case: str, contestant: str, reason: str) -> None:
        """Notes a contestant that did not run, once."""
        gap = Missing(case, contestant, reason)
        if gap not in self.missing:
            self.missing.append(gap)

    def to_json(self, extra: dict[str, Any] | None = None) -> str:
        """All of it, with `extra` entries beside it."""
        rows = [{**asdict(row), "seconds": row.seconds, "figure": row.figure} for row in self.rows]
        whole = {
            "level": self.level,
            "cpu": self.cpu,
            "quick": self.quick,
            "environment": self.environment,
            "rows": rows,
            "missing": [asdict(gap) for gap in self.missing],
            **(extra or {}),
        }
        return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """What `to_json` wrote, without the extra entries."""
        whole = json.loads(text)
        names = ("case", "shape", "contestant", "threads", "work", "unit", "note")
        rows = [Row(rounds=tuple(row["rounds"]), **{name: row[name] for name in names}) for row in whole["rows"]]
        missing = [Missing(**gap) for gap in whole["missing"]]
        return cls(whole["level"], whole["cpu"], whole["environment"], whole["quick"], rows, missing)

    def to_csv(self) -> str:
        """The rows; `rounds` in seconds, separated by spaces."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in self.rows:
            rounds = " ".join(repr(seconds) for seconds in row.rounds)
            figures = (f"{1e3 * row.seconds:.6g}", f"{row.figure:.6g}", row.unit, repr(row.work), rounds, row.note)
            writer.writerow((self.level, row.case, row.shape, row.contestant, row.threads, *figures))
        return buffer.getvalue()


def rows_from_csv(text: str) -> list[Row]:
    """The rows that `Results.to_csv` wrote.

    Raises:
        FileError: the columns are not those of this version.
    """
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != _COLUMNS:
        raise FileError(f"expected the columns {', '.join(_COLUMNS)}; found {reader.fieldnames}")
    return [
        Row(
            line["case"],
            line["shape"],
            line["contestant"],
            int(line["threads"]),
            float(line["work"]),
            line["unit"],
            tuple(float(seconds) for seconds in line["rounds"].split()),
            line["note"],
        )
        for line in reader
    ]


def write(path: Path, text: str) -> None:
    """A text file that appears whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def cpu_name(cpuinfo: str | None = None) -> str:
    """The CPU as a folder's name: the model, with family and model numbers where its name has no number of its own.

    `cpuinfo` is text in the form of /proc/cpuinfo; None reads that file.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            cpuinfo = ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*?)\s*$", cpuinfo, re.MULTILINE))
    name = facts.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor)\b", " ", name, flags=re.IGNORECASE)
    if not re.search(r"\d", name) and "cpu family" in facts and "model" in facts:
        name += f" family {facts['cpu family']} model {facts['model']}"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unknown"
