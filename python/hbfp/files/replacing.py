"""A file that appears complete or not at all: it is written under another name beside its place, and renamed."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write a new file under, which takes the place of `path` when the block ends.

    It is flushed to the disk before it gets its name, and has the permissions of the file that it replaces, or those
    that any new file gets; a symbolic link stays one. If the block or anything after it fails, the new file vanishes
    and what stood at `path` is untouched; a killed process leaves it behind, hidden, as ".NAME.XXXX.tmp".

    Raises:
        OSError: a file cannot be written there; names `path`.
    """
    target = Path(path).resolve()
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield draft
        with open(draft, "r+b") as file:
            if target.exists():
                os.chmod(draft, stat.S_IMODE(target.stat().st_mode))
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException as error:
        # A full disk is told without a name, and nobody knows the draft's.
        named = isinstance(error, OSError) and error.filename not in (None, draft, os.fspath(draft))
        if isinstance(error, OSError) and error.errno is not None and not named:
            error.filename = os.fspath(target)
        with suppress(OSError):  # a read-only disk refuses to delete even what is not there
            draft.unlink()
        raise
    _flush_folder(target.parent)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The same as a binary file, open for writing."""
    with replaced(path) as draft, open(draft, "xb") as file:
        yield file


def _flush_folder(folder: Path) -> None:
    """Have the operating system put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
