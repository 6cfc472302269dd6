"""What a conversion changed and what it left, as values and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from hbfp.policy import Backend, Position
from hbfp.tables import table

__all__ = ["ConversionReport", "ReportRow"]


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One module that computes products."""

    name: str
    """As in `named_modules`; further names of a shared module follow, separated by commas."""
    kind: str
    """The class before conversion."""
    formats: str | None
    """In force after conversion; None: the module stayed in FP32."""
    position: Position | None = None
    note: str = ""
    """Why it stayed in FP32, or which rule decided."""
    computed_by: str | None = None
    """The backend, or those of the three products; None: the module stayed in FP32."""


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """Every module that computes products, in the order of registration. Prints as a table."""

    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[ReportRow, ...]:
        """The modules that now compute in fixed point."""
        return tuple(row for row in self.rows if row.formats is not None)

    @property
    def left(self) -> tuple[ReportRow, ...]:
        """The modules that stayed in FP32, each with the reason in `note`."""
        return tuple(row for row in self.rows if row.formats is None)

    def __str__(self) -> str:
        columns = {
            "module": [row.name or "(root)" for row in self.rows],
            "class": [row.kind for row in self.rows],
            "formats": [row.formats or "FP32" for row in self.rows],
            "computed by": [row.computed_by or "" for row in self.rows],
            "place": [str(row.position or "") for row in self.rows],
            "note": [row.note for row in self.rows],
        }
        if {row.computed_by for row in self.converted} == {str(Backend.INTEGER)}:
            del columns["computed by"]
        summary = f"{len(self.converted)} in fixed point, {len(self.left)} left in FP32"
        rows = list(zip(*columns.values(), strict=True))
        return "\n".join([table(tuple(columns), rows), summary, *self.notes])
