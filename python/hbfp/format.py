"""Formats and roundings: frozen values, made once at the public edge and passed around as they are."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from hbfp import _core
from hbfp.errors import FormatError, ShapeError

__all__ = [
    "HBFP",
    "HBFP4",
    "HBFP5",
    "HBFP6",
    "HBFP8",
    "HBFP12",
    "HBFP16",
    "ExponentRule",
    "Rounding",
]

_E = TypeVar("_E", bound="_Choice")


class _Choice(str, Enum):
    """An enum whose members are the strings that users type."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def parse(cls: type[_E], value: str | _E) -> _E:
        """The member written `value`; a member is returned as it is.

        Raises:
            FormatError: nothing is written so; the message lists what is known.
        """
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(repr(member.value) for member in cls)
            noun = "rounding" if cls.__name__ == "Rounding" else "exponent rule"
            raise FormatError(f"unknown {noun} {value!r}: expected one of {known}") from None


class Rounding(_Choice):
    """How x · 2^-s becomes an integer code."""

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    TOWARD_ZERO = "toward_zero"
    STOCHASTIC = "stochastic"

    @property
    def code(self) -> int:
        """Its number in the compiled core: 0 nearest_even, 1 nearest_away, 2 toward_zero, 3 stochastic."""
        return _ROUNDING_CODES[self]


_ROUNDING_CODES = {rounding: code for code, rounding in enumerate(Rounding)}


class ExponentRule(_Choice):
    """How a block's exponent follows from its largest magnitude."""

    MAX_EXPONENT = "max_exponent"
    CEIL = "ceil"
    NO_CLIP = "no_clip"


@dataclass(frozen=True, slots=True, repr=False)
class HBFP:
    """A hybrid block floating-point format: `bits`-wide integer codes, one shared exponent per block.

    Args:
        bits: mantissa width, 2 to 16, *including* the sign (what some papers call 3 is 4 here).
        block: elements that share an exponent along one axis, 1 to 1024; None shares one over the whole tensor.
        tile: side of square blocks over the last two dimensions, 1 to 32; `block` then plays no part and reads None.
        exponent_rule: "max_exponent" (what hardware does), "ceil" (the published emulators) or "no_clip".
        exponent_bits: width of the exponent, 2 to 8: narrower ones clamp it. One byte is stored whatever the width.
        exponent_bias: added to the exponent to store it in `exponent_bits`; None means 2^(exponent_bits - 1) - 1.

    Attributes hold the same, resolved: `exponent_bias` is always an int, `exponent_rule` an `ExponentRule` (which is a
    str). Equal descriptions are equal and hash alike.

    Raises:
        FormatError: a value is out of range.
    """

    bits: int
    block: int | None = 64
    tile: int | None = field(default=None, kw_only=True)
    exponent_rule: str = field(default="max_exponent", kw_only=True)
    exponent_bits: int = field(default=8, kw_only=True)
    exponent_bias: int | None = field(default=None, kw_only=True)
    core: _core.Format = field(init=False, compare=False)
    """The compiled core's form of the same description."""
    text: str = field(init=False, compare=False)
    """The written form, as `str` gives it."""

    def __post_init__(self) -> None:
        rule = ExponentRule.parse(self.exponent_rule)
        block = self.block if self.tile is None else None
        for name in ("bits", "block", "tile", "exponent_bits", "exponent_bias"):
            value = getattr(self, name)
            if value is None and name not in ("bits", "exponent_bits"):
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise FormatError(f"{name} must be an integer; found {value!r}")
        try:
            core = _core.Format(self.bits, block, self.tile, rule.value, self.exponent_bits, self.exponent_bias)
        except (TypeError, OverflowError) as error:
            raise FormatError(f"{self.bits!r}, block {block!r}, tile {self.tile!r} is no format: {error}") from None
        resolved: dict[str, Any] = {
            "bits": core.bits,
            "block": core.block,
            "tile": core.tile,
            "exponent_rule": rule,
            "exponent_bits": core.exponent_bits,
            "exponent_bias": core.exponent_bias,
            "core": core,
            "text": str(core),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str | HBFP) -> HBFP:
        """The format written `text`, as "hbfp4b64", "hbfp4t8", "hbfp4tensor" or "hbfp6b16-noclip-e5".

        A format is returned as it is, so a function that takes either calls this once.

        Raises:
            FormatError: the text is no format.
        """
        if isinstance(text, HBFP):
            return text
        if not isinstance(text, str):
            raise FormatError(f"expected a format such as hbfp.HBFP4 or 'hbfp4b64'; found {text!r}")
        if not text.isascii():  # half a surrogate pair would not reach the core
            raise FormatError(f"expected a format such as hbfp.HBFP4 or 'hbfp4b64'; found {text!r}")
        core = _core.Format.parse(text)
        return cls(
            core.bits,
            core.block,
            tile=core.tile,
            exponent_rule=core.exponent_rule,
            exponent_bits=core.exponent_bits,
            exponent_bias=core.exponent_bias,
        )

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"HBFP.parse({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The core's object cannot be pickled, and need not be: the written form says everything.
        return HBFP.parse, (str(self),)

    @property
    def max_code(self) -> int:
        """The largest code, 2^(bits - 1) - 1; the smallest is its negative."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def bits_per_element(self) -> float:
        """Bits an element costs in a full block: `bits` and its share of the `exponent_bits` wide exponent.

        For a whole tensor the share is not known and taken as 0. Files spend whole bytes: see `storage_bytes`.
        """
        elements = self.tile * self.tile if self.tile is not None else self.block
        return float(self.bits) if elements is None else self.bits + self.exponent_bits / elements

    def blocked_axis(self, axis: int, shape: tuple[int, ...]) -> int:
        """The blocked axis of a tensor of `shape`, counted from the front.

        Tiles and whole tensors have none: theirs is checked and reads as the last one. A 0-d array is one row.

        Raises:
            ShapeError: `axis` is not an axis of `shape`.
        """
        dimensions = max(len(shape), 1)
        try:
            number = operator.index(axis)
        except TypeError:
            raise ShapeError(f"axis must be an integer; found {axis!r}") from None
        if not -dimensions <= number < dimensions:
            raise ShapeError(
                f"axis must lie in {-dimensions} ... {dimensions - 1} for shape {list(shape)}; found {number}"
            )
        return number % dimensions if self.block is not None else dimensions - 1

    def core_layout(self, shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], int]:
        """Shape and blocked axis as the compiled core takes them: one dimension at least, two for tiles.

        Raises:
            ShapeError: `axis` is not an axis of `shape`.
        """
        missing = max((1 if self.tile is None else 2) - len(shape), 0)
        held = (1,) * missing + tuple(shape)
        number = self.blocked_axis(axis, shape)
        return held, number if self.block is not None else len(held) - 1

    def plane_shapes(self, shape: tuple[int, ...], axis: int = -1) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the exponent plane and the mantissa plane (both bytes) of a tensor of `shape` blocked along `axis`.

        Raises:
            ShapeError: `axis` is not an axis of `shape`, or the sizes do not fit in memory.
        """
        try:
            return self.core.plane_shapes(*self.core_layout(shape, axis))
        except (TypeError, OverflowError):
            raise ShapeError(f"expected a shape of sizes from 0 that fit in memory; found {list(shape)}") from None

    def storage_bytes(self, shape: tuple[int, ...], axis: int = -1) -> int:
        """Bytes of both planes of a tensor of `shape` blocked along `axis`. Raises as `plane_shapes`."""
        return sum(math.prod(plane) for plane in self.plane_shapes(shape, axis))


HBFP4 = HBFP(4)
HBFP5 = HBFP(5)
HBFP6 = HBFP(6)
HBFP8 = HBFP(8)
HBFP12 = HBFP(12)
HBFP16 = HBFP(16)
