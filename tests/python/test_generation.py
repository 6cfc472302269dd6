"""Text from cached keys and values: the bits of a pass over the whole text, streams that stop when told, files.

The bugs these hunt: an open block of values encoded too early, or once too often; a position that starts anew; a cache
that outlives its context; text that waits in a buffer; a description that fits no weights.
"""

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from zoo import same  # noqa: E402

import hbfp  # noqa: E402
from hbfp.errors import FileError, HBFPError  # noqa: E402
from hbfp.nn import DotProductAttention, KeyValueCache  # noqa: E402
from hbfp.tools.cli import main  # noqa: E402
from hbfp.training.data import UNKNOWN  # noqa: E402
from hbfp.training.generation import Writer, generate  # noqa: E402
from hbfp.training.gpt import GPT, GPTShape  # noqa: E402

VOCABULARY = "\n abcdefghijklmnopqrstuvwxyz" + UNKNOWN


def gpt(recipe="hbfp4b16", layers=2, context=64, width=64):
    torch.manual_seed(0)
    model = GPT(GPTShape(len(VOCABULARY), layers, width, context)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # sharper odds, so that a mistake shows
    if recipe is not None:
        hbfp.convert_(model, recipe)
        hbfp.freeze_(model)
    return model


def text(count, seed=0):
    return torch.randint(len(VOCABULARY), (2, count), generator=torch.Generator().manual_seed(seed))


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["hbfp4b16", "hbfp6b32", "hbfp4"])
def test_a_cached_prompt_has_the_bits_of_the_forward_pass(recipe):
    model, codes = gpt(recipe), text(50)
    caches = model.caches()
    with torch.no_grad():
        assert same(model.extend(codes, caches), model(codes))
    assert [cache.length for cache in caches] == [50, 50]


def test_tokens_one_by_one_have_the_bits_of_attention_over_all_so_far():
    """Each attention by itself, whatever becomes of the states: so it is for the logits of a model of one layer."""
    attention = DotProductAttention(recipe="hbfp4b16").eval()
    q, k, v = (torch.randn(2, 3, 50, 40, generator=torch.Generator().manual_seed(i)) for i in range(3))
    cache, bounds = KeyValueCache(attention), [0, 1, 2, 3, 15, 16, 17, 31, 33, 48, 50]
    for begin, end in itertools.pairwise(bounds):
        found = cache(*(x[:, :, begin:end] for x in (q, k, v)))
        expected = attention(*(x[:, :, :end] for x in (q, k, v)), is_causal=True)
        assert same(found.contiguous(), expected[:, :, begin:].contiguous())
    model, codes = gpt(layers=1), text(40)
    caches = model.caches()
    with torch.no_grad():
        for end in range(1, 41):
            assert same(model.extend(codes[:, end - 1 : end], caches)[:, -1], model(codes[:, :end])[:, -1].contiguous())


def test_reading_the_open_block_anew_has_the_bits_of_the_whole_pass_at_any_depth():
    model, codes = gpt(layers=3), text(50)
    caches = model.caches()
    assert {cache.block for cache in caches} == {16}
    with torch.no_grad():
        for end in range(1, 51):
            closed = caches[0].length // 16 * 16
            for cache in caches:
                cache.truncate(closed)
            assert same(model.extend(codes[:, closed:end], caches)[:, -1], model(codes[:, :end])[:, -1].contiguous())


@pytest.mark.parametrize("recipe", ["hbfp12b16", "hbfp4b16"])
def test_a_copy_goes_on_by_itself(recipe):
    """Formats that no kernel holds, too, whose keys and values stay floats."""
    attention = DotProductAttention(recipe=recipe).eval()
    q, k, v = (torch.randn(2, 3, 50, 40, generator=torch.Generator().manual_seed(i)) for i in range(3))
    cache = KeyValueCache(attention)
    cache(*(x[:, :, :30] for x in (q, k, v)))
    copied = copy.deepcopy(cache)
    copied(*(3 * x[:, :, 30:] for x in (q, k, v)))
    for begin, end in ((30, 31), (31, 50)):
        found = cache(*(x[:, :, begin:end] for x in (q, k, v)))
        expected = attention(*(x[:, :, :end] for x in (q, k, v)), is_causal=True)
        assert same(found.contiguous(), expected[:, :, begin:].contiguous())
    assert (cache.length, copied.length) == (50, 50)


def test_inputs_of_other_kinds_are_cast_as_a_layer_casts_them():
    attention = DotProductAttention(recipe="hbfp4b16").eval()
    q, k, v = (torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = KeyValueCache(attention)(*(x.bfloat16().float() for x in (q, k, v)))
    assert same(KeyValueCache(attention)(*(x.bfloat16() for x in (q, k, v))), expected)
    with pytest.raises(hbfp.DTypeError):
        KeyValueCache(attention)(q.int(), k.int(), v.int())
    cache = KeyValueCache(attention)
    cache(q, k, v)
    with pytest.raises(hbfp.ShapeError, match="as before"):
        cache(q[:1], k[:1], v[:1])


def test_floats_are_cached_as_floats():
    model, codes = gpt(None), text(50)
    caches = model.caches()
    with torch.no_grad():
        found = torch.cat([model.extend(codes[:, a:b], caches) for a, b in ((0, 20), (20, 21), (21, 50))], 1)
        assert torch.allclose(found, model(codes), atol=1e-4)


def test_a_cache_takes_what_its_codes_take():
    model, codes = gpt("hbfp4b64", context=128), text(128)
    coded, plain = model.caches(), gpt(None, context=128).caches()
    with torch.no_grad():
        model.extend(codes, coded)
        gpt(None, context=128).extend(codes, plain)
    assert 8 * coded[0].nbytes == 4.125 * 2 * 2 * 128 * 64
    assert plain[0].nbytes == 4 * 2 * 2 * 128 * 64


def test_caches_refuse_what_would_give_other_codes():
    for recipe, reason in (("emulator", "stochastic"), ("hbfp4t8", "lines"), ("hbfp4tensor", "lines")):
        with pytest.raises(HBFPError, match=reason):
            KeyValueCache(DotProductAttention(recipe=recipe))
    with pytest.raises(HBFPError, match="'emulate'"):
        KeyValueCache(DotProductAttention(recipe=hbfp.recipe("hbfp4", backend="emulate")))
    cache = KeyValueCache(DotProductAttention(recipe="hbfp4b16"))
    q = torch.randn(1, 20, 8)
    cache(q, q, q)
    cache.truncate(18)
    for length in (19, 5, -1):
        with pytest.raises(HBFPError, match="expected a length"):
            cache.truncate(length)
    with pytest.raises(hbfp.ShapeError, match="tokens"):
        cache(q, q[:, :3], q)


# --- generating ------------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_text():
    model = gpt()
    first = list(generate(model, [1, 2, 3], 30, seed=7))
    assert first == list(generate(model, [1, 2, 3], 30, seed=7))
    assert first != list(generate(model, [1, 2, 3], 30, seed=8))
    assert all(0 <= code < len(VOCABULARY) for code in first)


def test_exact_text_is_that_of_whole_passes():
    model = gpt(layers=3)
    codes = [1, 2, 3]
    for _ in range(40):
        with torch.no_grad():
            codes.append(int(model(torch.tensor([codes]))[0, -1].argmax()))
    assert list(generate(model, [1, 2, 3], 40, temperature=0, exact=True)) == codes[3:]


def test_a_full_context_goes_on_from_its_last_half():
    model = gpt(None, context=16)
    found = list(generate(model, [1], 40, temperature=0))
    codes, begin = [1], 0
    for _ in range(40):
        if len(codes) - begin > 16:
            begin = len(codes) - 8
        with torch.no_grad():
            codes.append(int(model(torch.tensor([codes[begin:]]))[0, -1].argmax()))
    assert found == codes[1:]
    assert len(list(generate(model, list(range(20)), 3))) == 3  # a prompt beyond the context


def test_top_k_and_temperature():
    model = gpt()
    greedy = list(generate(model, [1], 20, temperature=0))
    assert list(generate(model, [1], 20, top_k=1, temperature=5.0, seed=3)) == greedy
    assert list(generate(model, [1], 20, temperature=100.0, seed=3)) != greedy


def test_generating_leaves_the_model_in_its_mode():
    model = gpt(None).train()
    stream = generate(model, [1], 5)
    next(stream)
    stream.close()
    assert model.training


def test_a_model_that_is_trained_in_between_writes_on_in_evaluation_mode(monkeypatch):
    """Whoever takes the codes may train meanwhile."""
    model = gpt(None)
    expected = list(generate(model, [1], 5, temperature=0))
    modes = []
    extend = GPT.extend
    monkeypatch.setattr(GPT, "extend", lambda self, *x: (modes.append(self.training), extend(self, *x))[1])
    stream = generate(model, [1], 5, temperature=0)
    assert [(model.train(), code)[1] for code in stream] == expected
    assert modes == [False] * 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (([], 3), "prompt of one code"),
        (([99], 3), "prompt of one code"),
        (([1], -1), "0 or more"),
        (([1], 3, {"temperature": -1.0}), "temperature"),
        (([1], 3, {"temperature": math.nan}), "temperature"),
        (([1], 3, {"top_k": 0}), "top_k"),
    ],
)
def test_arguments_out_of_range_are_named_at_once(arguments, reason):
    prompt, count, *how = arguments
    with pytest.raises(HBFPError, match=reason):
        generate(gpt(None), prompt, count, **(how[0] if how else {}))


# --- files and the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of `hbfp train`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 200)
    line = f"train --data {folder / 'book.txt'} --steps 3 --layers 2 --width 64 --context 32 --out {folder} --json"
    assert main(line.split()) == 0
    return folder


@pytest.mark.parametrize("recipe", ["hbfp4b16", "booster", None])
def test_a_packed_writer_writes_the_same(recipe, tmp_path):
    writer = Writer(gpt(recipe), VOCABULARY)
    writer.save(tmp_path / "w.safetensors")
    loaded = Writer.load(tmp_path / "w.safetensors")
    assert loaded.vocabulary == VOCABULARY
    assert "".join(loaded.write("ab", 40)) == "".join(writer.write("ab", 40))
    assert not any(x.is_meta for x in loaded.model.parameters())


def test_a_run_writes_both_files_and_both_write_the_same(trained, capsys):
    texts = []
    for name in ("checkpoint.pt", "model.safetensors"):
        assert main(["generate", str(trained / name), "--prompt", "the ", "--tokens", "30", "--seed", "3"]) == 0
        texts.append(capsys.readouterr().out)
        assert (
            main(["generate", str(trained / name), "--prompt", "the ", "--tokens", "30", "--seed", "3", "--json"]) == 0
        )
        result = json.loads(capsys.readouterr().out)
        assert (result["prompt"] + result["text"] + "\n", result["tokens"]) == (texts[-1], 30)
        assert result["tokens_per_second"] > 0
    assert texts[0] == texts[1]
    assert texts[0].startswith("the ")
    assert len(texts[0]) == 4 + 30 + 1


def test_files_that_are_no_gpt_are_refused(trained, tmp_path, capsys):
    hbfp.save(tmp_path / "other.safetensors", {"x": torch.ones(3)})
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    checkpoint["settings"]["arch"] = "resnet20"
    torch.save(checkpoint, tmp_path / "images.pt")
    (tmp_path / "noise").write_bytes(b"no such file")
    for name, reason in (
        ("other.safetensors", "description of a GPT"),
        ("images.pt", "resnet20"),
        ("noise", "safetensors"),
        ("none", "none"),
    ):
        assert main(["generate", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    for change in ({"vocabulary": "abc"}, {"shape": {"layers": 1}}, {"formats": {"head": "int4"}}):
        writer = Writer(gpt(), VOCABULARY)
        writer.save(tmp_path / "w.safetensors")
        description = json.loads(hbfp.files.load_metadata(tmp_path / "w.safetensors")["gpt"]) | change
        hbfp.save_model(tmp_path / "w.safetensors", writer.model, metadata={"gpt": json.dumps(description)})
        with pytest.raises(FileError, match="metadata"):
            Writer.load(tmp_path / "w.safetensors")
    assert main(["generate", str(trained / "checkpoint.pt"), "--top-k", "0"]) == 2
    assert main(["generate", str(trained / "checkpoint.pt"), "--seed", "-1"]) == 2


def _started(trained, *options, **how):
    command = [sys.executable, "-m", "hbfp", "generate", str(trained / "model.safetensors"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}, **how)


def test_text_comes_as_it_is_made_and_stops_at_ctrl_c(trained):
    process = _started(trained, "--tokens", "100000000", "--prompt", "a")
    assert len(process.stdout.read(5)) == 5  # long before the end, which never comes
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130
    assert error == b""


def test_nobody_reads_on(trained):
    process = _started(trained, "--tokens", "100000000", "--prompt", "a")
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=600) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
