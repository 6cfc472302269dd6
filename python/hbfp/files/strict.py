"""JSON that others wrote: read once, believed nowhere. And the one form that every refusal has."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, NoReturn

from hbfp.errors import FileError

LARGEST = 2**63 - 1
"""The largest size, offset or number of elements that a file may speak of."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 16, 16, 4


def shown(value: object) -> str:
    """`value` for a message, cut short however long or deep it is."""
    return _SHORT.repr(value)


def refuse(path: str, tensor: str | None, field: str, expected: str, found: str) -> NoReturn:
    """Raise the FileError that names file, tensor, field, what was expected and what was found."""
    place = path if tensor is None else f"{path}: tensor {shown(tensor)}"
    raise FileError(f"{place}: {field}: expected {expected}; found {found}")


class _Repeated(ValueError):
    """A name twice in one JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _Repeated(f"the name {shown(name)} twice")
        result[name] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which JSON does not have")


def parse_object(path: str, field: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` is. Names are unique at every level.

    Raises:
        FileError: it is not UTF-8, no JSON, nested too deeply to read, no object, or repeats a name.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, object_pairs_hook=_once, parse_constant=_no_constant)
    except _Repeated as error:
        refuse(path, None, field, "every name once", str(error))
    except RecursionError:
        refuse(path, None, field, "JSON", "brackets nested too deeply")
    except ValueError as error:  # also of UTF-8, and of numbers with thousands of digits
        refuse(path, None, field, "JSON", str(error)[:200])
    if not isinstance(value, dict):
        refuse(path, None, field, "a JSON object", shown(value))
    return value


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can spell halves of surrogate pairs, which are no characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def check_shape(path: str, tensor: str, sizes: Any) -> tuple[int, ...]:
    """A shape that numpy could hold, one byte an element.

    Raises:
        FileError: it is not a list of up to 64 integers from 0, or their product, zeros aside, is beyond 2^63 - 1.
    """
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= LARGEST for size in sizes):
        refuse(path, tensor, "shape", "a list of sizes from 0 to 2^63 - 1", shown(sizes))
    if len(sizes) > 64:
        refuse(path, tensor, "shape", "at most 64 dimensions", f"{len(sizes)}")
    if math.prod(size for size in sizes if size) > LARGEST:
        refuse(path, tensor, "shape", "at most 2^63 - 1 elements", shown(sizes))
    return tuple(sizes)
