"""Names by pattern: what rules for modules and for tensors are written in."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from hbfp.errors import RuleError

Matches = Callable[[str], bool]
"""Whether a pattern matches a name."""


def matcher(pattern: str) -> Matches:
    """Reads a pattern: a glob, or, after "re:", a regular expression that must match all of a name.

    Raises:
        RuleError: it is no regular expression.
    """
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise RuleError(f"rule {pattern!r} is no regular expression: {error}") from None
    return lambda name: expression.fullmatch(name) is not None


def covers(matches: Matches, name: str) -> bool:
    """Whether a pattern speaks of what is called `name`: by its own name, or by that of a module around it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end])) for end in range(len(parts), 0, -1))
