"""Every error the package raises on purpose is an `HBFPError`, and `HBFPError` is a `ValueError`.

The message of each says what was expected, what was found, and what to do. The first seven are raised by the compiled
core as well; the others exist in Python only.
"""

from __future__ import annotations

from hbfp._core import (
    CodeError,
    DTypeError,
    FormatError,
    HBFPError,
    LevelError,
    NonFiniteError,
    ShapeError,
)

__all__ = [
    "CodeError",
    "ConversionError",
    "DTypeError",
    "ExportError",
    "FileError",
    "FormatError",
    "HBFPError",
    "LevelError",
    "NonFiniteError",
    "RuleError",
    "ScheduleError",
    "ShapeError",
]


class FileError(HBFPError):
    """A file does not hold what its description says, or cannot be written as asked."""


class ExportError(HBFPError):
    """Something cannot pass to another runtime's format, or from it, without a change."""


class RuleError(HBFPError):
    """A conversion rule matches nothing, or cannot be read."""


class ConversionError(HBFPError):
    """A module cannot be converted, or is not in the state the call needs."""


class ScheduleError(HBFPError):
    """A schedule was given steps or epochs that do not fit together."""
