"""Real data that every machine already has: handwritten digits and source text.

A batch is a pure function of (seed, step): nothing is drawn from a generator that remembers, so a resumed run sees the
batches that the uncut one would have seen, and runs in different arithmetic see the same ones.
"""

import hashlib
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbfp.errors import HBFPError

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and target classes (int64)."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"

_LIBRARY_BYTES = 4_000_000
# Tests quote odd bytes and the code pages are tables: neither reads like source code.
_NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


class Data(Protocol):
    """What the loop and the demo ask of a data set."""

    def batch(self, seed: int, step: int) -> Batch:
        """The training batch of one step, the same whenever it is asked for."""

    def validation(self) -> Iterable[Batch]:
        """The fixed validation set, none of it ever in a training batch."""


@dataclass(frozen=True, slots=True)
class Digits:
    """The 1,797 handwritten digits of 8 by 8 pixels that scikit-learn ships (UCI, E. Alpaydin and C. Kaynak, 1998).

    Inputs are float32 [batch, 64] in 0…1, targets 0…9. A third, the same one for every seed, is kept for validation.
    """

    size: int
    train: Batch = field(repr=False)
    held_out: Batch = field(repr=False)

    @classmethod
    def load(cls, size: int = 64) -> "Digits":
        """Raises ImportError when scikit-learn is not installed."""
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        pixels, classes = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(pixels))
        inputs = torch.tensor(pixels[order] / 16.0, dtype=torch.float32)
        targets = torch.tensor(classes[order], dtype=torch.int64)
        cut = len(order) * 2 // 3
        return cls(size, (inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:]))

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.train[0]) // self.size)

    def batch(self, seed: int, step: int) -> Batch:
        """One slice of the epoch's own permutation; the epoch's last, incomplete batch is left out."""
        epoch, part = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.train[0]))
        rows = torch.from_numpy(order[part * self.size : (part + 1) * self.size])
        return self.train[0][rows], self.train[1][rows]

    def validation(self) -> list[Batch]:
        return [self.held_out]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as numbers: `codes` (int64, one per character) index `vocabulary`; what is not in it becomes U+FFFD."""

    source: str
    vocabulary: str
    codes: NDArray[np.int64] = field(repr=False)
    sha256: str

    @classmethod
    def of(cls, text: str, source: str) -> "Corpus":
        """A character needs one occurrence in a hundred thousand for a place in the vocabulary."""
        least = max(1, len(text) // 100_000)
        frequent = {character for character, count in Counter(text).items() if count >= least}
        vocabulary = "".join(sorted(frequent | {UNKNOWN}))
        points, inverse = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        place = {character: code for code, character in enumerate(vocabulary)}
        codes = np.array([place.get(chr(point), place[UNKNOWN]) for point in points], np.int64)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(source, vocabulary, codes[inverse], digest)

    @classmethod
    def read(cls, path: Path) -> "Corpus":
        """A user's UTF-8 text; bytes that are not UTF-8 become U+FFFD. Raises HBFPError if there is nothing to read."""
        try:
            text = path.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise HBFPError(f"cannot read {path}: {error.strerror}; --data takes a text file") from error
        if not text:
            raise HBFPError(f"{path} is empty; --data takes a text file of some thousand characters or more")
        return cls.of(text, str(path))

    @classmethod
    def library(cls, limit: int = _LIBRARY_BYTES) -> "Corpus":
        """The running Python's own standard library, up to `limit` bytes of it.

        Files come in the order of a checksum of their names, so that neither the cut at `limit` nor the validation
        tail favours one end of the alphabet.
        """
        root = Path(sysconfig.get_path("stdlib"))
        names = sorted(
            (
                path.relative_to(root)
                for path in root.rglob("*.py")
                if not _NOT_PROSE & set(path.relative_to(root).parts)
            ),
            key=lambda name: (zlib.crc32(name.as_posix().encode()), name.as_posix()),
        )
        parts: list[str] = []
        room = limit
        for name in names:
            content = (root / name).read_bytes()
            if len(content) <= room:
                parts.append(content.decode("utf-8", "replace").replace("\r\n", "\n"))
                room -= len(content)
        if not parts:
            raise HBFPError(f"no Python sources under {root}; `hbfp train --data FILE` trains on a text of your own")
        return cls.of("".join(parts), f"Python's standard library, {len(parts)} files")

    def encode(self, text: str) -> list[int]:
        place = {character: code for code, character in enumerate(self.vocabulary)}
        return [place.get(character, place[UNKNOWN]) for character in text]

    def decode(self, codes: Sequence[int]) -> str:
        return "".join(self.vocabulary[code] for code in codes)


@dataclass(frozen=True, slots=True)
class Windows:
    """Training windows of a corpus: inputs [size, context] and, as targets, the same characters shifted by one.

    The last tenth of the text is for validation: `held_out` windows at even distances in it.
    """

    corpus: Corpus
    size: int
    context: int
    held_out: int = 128

    def __post_init__(self) -> None:
        if self.size < 1:
            raise HBFPError(f"a batch has at least one window of text, not {self.size}")
        length = len(self.corpus.codes)
        if length - self._cut <= self.context:
            raise HBFPError(
                f"{self.corpus.source} has {length} characters; a context of {self.context} needs more than "
                f"{10 * (self.context + 1)}: give a longer text or a smaller --context"
            )

    @property
    def steps_per_epoch(self) -> int:
        """As many windows as cover the training text once; they are drawn at random, with gaps and overlaps."""
        return max(1, self._cut // (self.size * self.context))

    @property
    def _cut(self) -> int:
        return len(self.corpus.codes) * 9 // 10

    def batch(self, seed: int, step: int) -> Batch:
        starts = np.random.default_rng((seed, step)).integers(self._cut - self.context, size=self.size)
        return self._at(starts)

    def validation(self) -> list[Batch]:
        room = len(self.corpus.codes) - self._cut - self.context
        count = min(self.held_out, room)
        starts = self._cut + np.arange(count, dtype=np.int64) * room // count
        return [self._at(starts[first : first + self.size]) for first in range(0, count, self.size)]

    def _at(self, starts: NDArray[np.int64]) -> Batch:
        rows = self.corpus.codes[starts[:, None] + np.arange(self.context + 1)]
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
