"""The GPT of `hbfp train` as a GGUF file: llama.cpp's architecture gpt2, whose blocks are the same.

Weights are exact. One thing is not gpt2's: our GELU is the exact one, llama.cpp's the tanh approximation, so that
outputs differ (llama.cpp's products are no fixed-point ones either).

The vocabulary is a tokenizer of the kind "t5" (SentencePiece's unigram model) whose pieces are single characters, so
that text is cut into characters; a space is written "▁" there. Characters that are not in it become U+FFFD, as in
training, but a run of them a single one. (The kind "llama" would look for byte tokens in their place.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hbfp.array import BlockArray
from hbfp.errors import ExportError
from hbfp.exports import gguf

__all__ = ["HEAD_WIDTH", "is_gpt", "names", "save"]

HEAD_WIDTH = 64
"""Columns of an attention head, in every model of `hbfp.training.gpt`."""

NORM_EPSILON = 1e-5
"""Of torch's LayerNorm."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_OUTSIDE = {
    "characters.weight": "token_embd.weight",
    "positions.weight": "position_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
_IN_A_BLOCK = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in (
        ("attention_norm", "attn_norm"),
        ("qkv", "attn_qkv"),
        ("proj", "attn_output"),
        ("mlp_norm", "ffn_norm"),
        ("up", "ffn_up"),
        ("down", "ffn_down"),
    )
    for kind in ("weight", "bias")
}


def names(tensors: Mapping[str, object]) -> dict[str, str]:
    """Names of a GPT with the blocks that `tensors` has, and those that gpt2 gives its tensors."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,6})\.", name))]
    blocks = {
        f"blocks.{number}.{ours}": f"blk.{number}.{theirs}"
        for number in sorted(set(numbers))
        for ours, theirs in _IN_A_BLOCK.items()
    }
    return _OUTSIDE | blocks


def is_gpt(tensors: Mapping[str, object]) -> bool:
    """Whether these are the tensors of a GPT of `hbfp train`, by their names."""
    return "blocks.0.qkv.weight" in tensors and names(tensors).keys() == tensors.keys()


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, BlockArray | ArrayLike], vocabulary: str | None = None
) -> None:
    """Writes the tensors of a GPT (`hbfp.load` of a file of `save_model`), what gpt2 asks for, and the tokenizer.

    Args:
        path: of the file, which appears complete or not at all; one that exists is replaced.
        tensors: by the names that `hbfp.training.gpt.GPT` gives them.
        vocabulary: character number i at place i; without it the file has no tokenizer.

    Raises:
        ExportError: a tensor does not fit (`gguf.pack`); these are not the tensors of a GPT; the vocabulary has another
            size, or holds "▁", which stands for a space. Nothing is written.
        ModuleNotFoundError: the package gguf is not installed.
        OSError: the file cannot be written.
    """
    if not is_gpt(tensors):
        raise ExportError(f"expected the tensors of a GPT of `hbfp train`; found {sorted(tensors)[:5]} and so on")
    shapes = {
        name: np.shape(value) if not isinstance(value, BlockArray) else value.shape for name, value in tensors.items()
    }
    (characters, width), context = shapes["characters.weight"], shapes["positions.weight"][0]
    if vocabulary is not None:
        _check_vocabulary(vocabulary, characters)

    def describe(writer: Any) -> None:
        writer.add_description("Character-level GPT. Its GELU is the exact one, which gpt2's is not.")
        writer.add_quantization_version(2)
        writer.add_context_length(context)
        writer.add_embedding_length(width)
        writer.add_block_count(sum(name.endswith(".qkv.weight") for name in tensors))
        writer.add_feed_forward_length(shapes["blocks.0.up.weight"][0])
        writer.add_head_count(width // HEAD_WIDTH)
        writer.add_layer_norm_eps(NORM_EPSILON)
        _describe_tokenizer(writer, vocabulary)

    gguf.save(path, {theirs: tensors[ours] for ours, theirs in names(tensors).items()}, "gpt2", describe)


def _check_vocabulary(vocabulary: str, characters: int) -> None:
    if len(vocabulary) != characters:
        raise ExportError(
            f"expected the text that the GPT was trained on, of {characters} different characters; "
            f"found one of {len(vocabulary)}"
        )
    if SPACE in vocabulary:
        raise ExportError(f"the vocabulary holds {SPACE!r} (U+2581), which stands for a space in the file's tokenizer")


def _describe_tokenizer(writer: Any, vocabulary: str | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    normal, unknown = 1, 2
    writer.add_tokenizer_model("t5")
    writer.add_token_list([character.replace(" ", SPACE) for character in vocabulary])
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_token_types([unknown if character == UNKNOWN else normal for character in vocabulary])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if UNKNOWN in vocabulary:
        # Left out, these would be tokens 0 to 2, which are characters here.
        unknown_id = vocabulary.index(UNKNOWN)
        writer.add_unk_token_id(unknown_id)
        writer.add_bos_token_id(unknown_id)
        writer.add_eos_token_id(unknown_id)
        writer.add_pad_token_id(unknown_id)
