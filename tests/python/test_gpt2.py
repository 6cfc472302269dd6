"""The demo GPT as a GGUF file of llama.cpp's gpt2: complete, and every weight exact."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest

import hbfp
from hbfp import BlockArray, ExportError
from hbfp.exports import gpt2

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from hbfp.training import gpt  # noqa: E402

VOCABULARY = "\n !abcdefghij\N{LATIN SMALL LETTER E WITH ACUTE}\N{REPLACEMENT CHARACTER}"
LAYERS, WIDTH, CONTEXT = 2, 128, 32


def model(recipe: str = "hbfp4") -> gpt.GPT:
    """Converted, with biases and norms that are not what they start as."""
    torch.manual_seed(0)
    result = gpt.GPT(gpt.GPTShape(len(VOCABULARY), LAYERS, WIDTH, CONTEXT))
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    with redirect_stdout(io.StringIO()):
        hbfp.convert_(result, recipe=recipe)
    return result


@pytest.fixture
def tensors(tmp_path) -> dict[str, Any]:
    hbfp.save_model(tmp_path / "model.safetensors", model())
    return dict(hbfp.load(tmp_path / "model.safetensors"))


def dequantized(reader: Any) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def test_the_reader_has_every_tensor_under_its_name_in_gpt2(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    gpt2.save(path, tensors, VOCABULARY)
    found = dequantized(gguf.GGUFReader(path))
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
    allowed = {
        f"{gguf.TENSOR_NAMES[kind].format(bid=block)}.{part}"
        for kind in known
        for block in range(LAYERS)
        for part in ("weight", "bias")
    }
    assert found.keys() <= allowed
    assert len(found) == len(tensors)
    for ours_, theirs in gpt2.names(tensors).items():
        assert np.array_equal(found[theirs], np.asarray(tensors[ours_])), ours_
    assert isinstance(tensors["blocks.1.qkv.weight"], BlockArray)


def test_the_reader_has_what_gpt2_asks_for(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    gpt2.save(path, tensors, VOCABULARY)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    unknown = VOCABULARY.index("\N{REPLACEMENT CHARACTER}")
    assert {name: fields[name] for name in fields if name.startswith(("gpt2.", "general.arch"))} == {
        "general.architecture": "gpt2",
        "gpt2.context_length": CONTEXT,
        "gpt2.embedding_length": WIDTH,
        "gpt2.block_count": LAYERS,
        "gpt2.feed_forward_length": 4 * WIDTH,
        "gpt2.attention.head_count": WIDTH // gpt.HEAD_WIDTH,
        "gpt2.attention.layer_norm_epsilon": np.float32(gpt2.NORM_EPSILON),
    }
    assert fields["tokenizer.ggml.model"] == "t5"
    assert "".join(fields["tokenizer.ggml.tokens"]).replace("▁", " ") == VOCABULARY
    assert fields["tokenizer.ggml.token_type"] == [1] * unknown + [2]
    for special in ("unknown", "bos", "eos", "padding"):
        assert fields[f"tokenizer.ggml.{special}_token_id"] == unknown
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.add_space_prefix"] is False


def test_constants_are_those_of_the_model():
    assert gpt2.HEAD_WIDTH == gpt.HEAD_WIDTH
    assert model().norm.eps == gpt2.NORM_EPSILON


def test_without_a_vocabulary_there_is_no_tokenizer(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    gpt2.save(path, tensors)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert "tokenizer.ggml.tokens" not in fields


@pytest.mark.parametrize(
    ("vocabulary", "named"),
    [
        (VOCABULARY[1:], rf"{len(VOCABULARY)} different characters; found one of {len(VOCABULARY) - 1}"),
        ("▁" + VOCABULARY[1:], r"holds '▁' \(U\+2581\)"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path, tensors, vocabulary, named):
    with pytest.raises(ExportError, match=named):
        gpt2.save(tmp_path / "model.gguf", tensors, vocabulary)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    "change", [{"extra": np.ones(3)}, {"head.bias": np.ones(3)}, {"blocks.5.qkv.weight": np.ones((3, 3))}]
)
def test_other_models_are_no_gpt(tmp_path, tensors, change):
    assert gpt2.is_gpt(tensors)
    assert not gpt2.is_gpt(tensors | change)
    assert not gpt2.is_gpt({"0.weight": np.ones((3, 3))})
    with pytest.raises(ExportError, match="expected the tensors of a GPT"):
        gpt2.save(tmp_path / "model.gguf", tensors | change)


def test_llama_cpp_continues_the_text_as_torch_does(tmp_path, tensors):
    """Where llama-cpp-python is installed. Its products are others: the likeliest character is compared.

    Token by token: on a CPU with AMX its products of several rows break off for matrices as small as these (0.3.36)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "model.gguf"
    gpt2.save(path, tensors, VOCABULARY)
    plain = gpt.GPT(gpt.GPTShape(len(VOCABULARY), LAYERS, WIDTH, CONTEXT)).eval()
    plain.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in tensors.items()})
    for block in plain.blocks:
        block.gelu = torch.nn.GELU(approximate="tanh")
    text = "a bad cafe,\nahead"
    runtime = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_batch=1, logits_all=True, verbose=False)
    codes = runtime.tokenize(text.encode(), add_bos=False, special=False)
    assert codes == [VOCABULARY.index(c if c in VOCABULARY else "\N{REPLACEMENT CHARACTER}") for c in text]
    runtime.eval(codes)
    with torch.no_grad():
        scores = plain(torch.tensor([codes]))[0]
    assert np.asarray(runtime.scores)[: len(codes)].argmax(1).tolist() == scores.argmax(1).tolist()
