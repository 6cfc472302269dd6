"""Text from a GPT, one character after the other, and the files that it is loaded from.

A description goes with the weights: the sizes, the vocabulary, and the format of every layer's forward products, which
the attention products, having no weights, would leave nobody else to tell.
"""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hbfp.checkpoint import load_model, save_model
from hbfp.errors import FileError, HBFPError
from hbfp.files import load_metadata
from hbfp.format import HBFP
from hbfp.freezing import freeze_
from hbfp.nn.conversion import convert_
from hbfp.training.data import UNKNOWN, Corpus
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.loop import formats_of, read_checkpoint

METADATA = "gpt"
"""The key of the description in a packed file's header."""


# --- characters ------------------------------------------------------------------------------------------------------


def generate(
    model: GPT,
    prompt: Sequence[int],
    count: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    exact: bool = False,
) -> Generator[int, None, None]:
    """Codes that go on after `prompt`, each as soon as it is known; the same for the same arguments.

    Keys and values of the past are cached, in the formats of the layers: in HBFP an eighth of their size and more.
    When the context is full, the model goes on from the last half of it, read anew.

    Blocks of values reach over tokens, so a token changes the codes, and the states, of those before it in its block
    (docs/spec.md, 9.34). A cache keeps the states that they had when they were read. With one layer, and for the
    prompt, that makes no difference; in deeper models logits are not those of a pass over the whole text.

    Args:
        prompt: at least one code; of a longer one than the context the last half of a context is read.
        count: how many codes.
        temperature: the scores are divided by it; 0 takes the likeliest code.
        top_k: draw among the so many likeliest; None: among all.
        seed: of the draws.
        exact: read the open block anew at each step; the logits are then those of a pass over the whole text so far,
            bit for bit, and a step costs some 32 rows instead of one.

    Raises:
        HBFPError: an argument is out of its range.
    """
    codes = list(prompt)
    vocabulary = model.shape.vocabulary
    if not codes or not all(0 <= code < vocabulary for code in codes):
        raise HBFPError(f"expected a prompt of one code or more, each in 0 … {vocabulary - 1}; found {codes[:8]}")
    if count < 0:
        raise HBFPError(f"expected a number of characters of 0 or more; found {count}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise HBFPError(f"expected a temperature of 0 or more; found {temperature}")
    if top_k is not None and top_k < 1:
        raise HBFPError(f"expected top_k of 1 or more; found {top_k}")
    return _generate(model, codes, count, temperature, top_k, seed, exact)


def _generate(
    model: GPT, codes: list[int], count: int, temperature: float, top_k: int | None, seed: int, exact: bool
) -> Generator[int, None, None]:
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    context = model.shape.context
    half = max(1, context // 2)
    begin = 0 if len(codes) <= context else len(codes) - half
    model.eval()
    caches = model.caches()
    block = math.lcm(*(cache.block for cache in caches)) if exact else 1
    try:
        for _ in range(count):
            if model.training:  # set by who took the last code
                model.eval()
            if len(codes) - begin > context:
                begin = len(codes) - half
                caches = model.caches()
            if exact:
                closed = caches[0].length // block * block
                for cache in caches:
                    cache.truncate(closed)
            new = codes[begin + caches[0].length :]
            with torch.inference_mode():
                scores = model.extend(torch.tensor([new]), caches)[0, -1]
                code = _draw(scores, temperature, top_k, generator)
            codes.append(code)
            yield code
    finally:
        model.train(training)


def _draw(scores: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    if top_k is not None and top_k < scores.numel():
        least = scores.topk(top_k).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    return int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator))


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Writer:
    """A GPT and what its codes stand for."""

    model: GPT
    vocabulary: str

    def encode(self, text: str) -> list[int]:
        """Codes of a text; what is not in the vocabulary becomes U+FFFD."""
        place = {character: code for code, character in enumerate(self.vocabulary)}
        return [place.get(character, place[UNKNOWN]) for character in text]

    def write(self, prompt: str, count: int, **how: Any) -> Generator[str, None, None]:
        """The characters that go on after `prompt`, one by one; see `generate`. An empty prompt is a new line."""
        for code in generate(self.model, self.encode(prompt or "\n"), count, **how):
            yield self.vocabulary[code]

    def save(self, path: Path) -> None:
        """As a packed file that `Writer.load` reads: `hbfp.save_model` with the description in the header."""
        description = {
            "shape": asdict(self.model.shape),
            "vocabulary": self.vocabulary,
            "formats": formats_of(self.model),
        }
        save_model(path, self.model, metadata={METADATA: json.dumps(description)})

    @classmethod
    def load(cls, path: Path) -> "Writer":
        """Reads a checkpoint of `hbfp train` or a packed file, and freezes the model.

        Raises:
            FileError: it is neither, or of another network.
        """
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return cls._of_checkpoint(path) if zipped else cls._of_packed(path)

    @classmethod
    def _of_packed(cls, path: Path) -> "Writer":
        text = load_metadata(path).get(METADATA)
        if text is None:
            raise FileError(
                f"{path}: metadata: expected {METADATA!r}, the description of a GPT; found none: write the file with "
                "`hbfp train`, or hbfp.training.generation.Writer.save"
            )
        try:
            description = json.loads(text)
            shape, vocabulary = GPTShape(**description["shape"]), description["vocabulary"]
            formats = {str(name): HBFP.parse(format) for name, format in description["formats"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{path}: metadata: {METADATA!r}: expected a description of a GPT; {error}") from error
        with torch.device("meta"):
            model = GPT(shape)
        _prepare(path, model, vocabulary, formats)
        load_model(path, model)
        return cls(model, vocabulary)

    @classmethod
    def _of_checkpoint(cls, path: Path) -> "Writer":
        content = read_checkpoint(path)
        settings = content.get("settings")
        if not isinstance(settings, dict) or settings.get("arch") != "gpt":
            found = settings.get("arch") if isinstance(settings, dict) else None
            raise FileError(f"{path}: expected a checkpoint of `hbfp train --arch gpt`; found one of {found!r}")
        vocabulary = settings.get("vocabulary")
        if vocabulary is None:  # of an older release
            vocabulary = Corpus.read(Path(settings["data"])).vocabulary
        sizes = {field.name: settings[field.name] for field in fields(GPTShape) if field.name != "vocabulary"}
        model = GPT(GPTShape(len(vocabulary), **sizes))
        formats = {name: HBFP.parse(format) for name, format in content["formats"].items()}
        if formats:
            convert_(model, "hbfp4", rules=formats)
        model.load_state_dict(content["model"])
        if formats:
            freeze_(model)
        return cls(model.eval(), vocabulary)


def _prepare(path: Path, model: GPT, vocabulary: Any, formats: Mapping[str, HBFP]) -> None:
    if not isinstance(vocabulary, str) or len(vocabulary) != model.shape.vocabulary or UNKNOWN not in vocabulary:
        raise FileError(
            f"{path}: metadata: vocabulary: expected {model.shape.vocabulary} characters with U+FFFD; found "
            f"{vocabulary!r:.80}"
        )
    if formats:
        convert_(model, "hbfp4", rules=dict(formats))
        freeze_(model)
    model.eval()
