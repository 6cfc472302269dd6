"""The cases of inference: frozen linear layers, a frozen ResNet, text from a GPT, and the loading of a packed file.

Answers are checked before anything is timed: a frozen layer against the oracle, compiled or not, bit for bit; a ResNet
against the same one converted and not frozen, bit for bit; a GPT's logits from its cache against those of its whole
forward pass.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import hbfp
from hbfp.benchmark import loading
from hbfp.benchmark.cases import Bench
from hbfp.benchmark.checks import WrongAnswer, close, exact
from hbfp.benchmark.peers import BY_NAME, quiet
from hbfp.benchmark.results import NotRun, Row
from hbfp.benchmark.timing import Call
from hbfp.training.generation import generate
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.resnet import ResNet, ResNetShape

__all__ = ["GPTS", "frozen_linear", "frozen_resnet20", "generation", "load"]

GPTS = {"demo": GPTShape(96), "100 M": GPTShape(96, layers=14, width=768, context=512)}
"""Layers and widths: the demo's 3 M parameters, and 100 M random ones."""

_SEED = 20
_OURS, _FP32 = "hbfp4, frozen", "torch fp32"
_FP32_TOGETHER = "torch fp32, channels last"


def _quietly(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Call:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return call(x)

    return run


def frozen_linear(bench: Bench, m: int, n: int = 4096, k: int = 4096) -> None:
    """A linear layer, frozen, as a module and as torch.compile's graph, against torch's FP32 and dynamic int8."""
    case, shape = "frozen linear", f"{m}x{n}x{k}"
    torch.manual_seed(_SEED)
    plain, x = nn.Linear(k, n, bias=False), torch.randn(m, k)
    layer = copy.deepcopy(plain)
    hbfp.freeze_(layer, "hbfp4")
    contestants: dict[str, Call] = {}
    compiled = {_OURS: layer, _FP32: plain}
    for name, module in compiled.items():
        contestants[name] = _quietly(module, x)
        graph = torch.compile(module, fullgraph=True)
        try:
            with quiet():
                call = _quietly(graph, x)
                found = call()
        except Exception as error:  # inductor needs a C++ compiler, which users may lack
            bench.results.not_run(case, f"{name}, compiled", f"{type(error).__name__}"[:200])
            continue
        if name == _OURS and not torch.equal(found, contestants[name]()):  # type: ignore[arg-type]
            raise WrongAnswer(f"{case} {shape}: compiled and not, the layer gives different bits")
        contestants[f"{name}, compiled"] = call
    with torch.no_grad():
        exact(f"{case} {shape}", layer(x), (x, plain.weight.detach()), (hbfp.HBFP4, hbfp.HBFP4))
    int8 = BY_NAME["torch int8 dynamic"]
    try:
        with quiet():
            contestants[int8.name] = int8.prepare(x, plain.weight.detach(), bench.threads).call
    except (NotRun, RuntimeError) as reason:
        bench.results.not_run(case, int8.name, str(reason))
    for call in contestants.values():
        call()
    bench.measure(case, shape, 2 * m * n * k, "GOP/s", contestants, {})


def frozen_resnet20(bench: Bench, batch: int) -> None:
    """Scores of ResNet-20 for images of 32 x 32: ours frozen, torch's FP32 in its default layout and, images and
    kernels both, with the channels of a pixel together, which is the faster one on some machines."""
    case, shape = "frozen resnet20", f"{batch}x3x32x32"
    torch.manual_seed(_SEED)
    plain, images = ResNet(ResNetShape()).eval(), torch.randn(batch, 3, 32, 32)
    together = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    converted = copy.deepcopy(plain)
    hbfp.convert_(converted, "hbfp4")
    frozen = copy.deepcopy(converted)
    hbfp.freeze_(frozen)
    contestants = {
        _OURS: _quietly(frozen, images),
        _FP32: _quietly(plain, images),
        _FP32_TOGETHER: _quietly(together, images.contiguous(memory_format=torch.channels_last)),
    }
    with torch.no_grad():
        scores, expected = frozen(images), plain(images)
        if not torch.equal(scores, converted(images)):
            raise WrongAnswer(f"{case} {shape}: frozen and not, the network gives different bits")
        # Ours generously, for twenty layers round to four bits: a mistake makes it 1 or more.
        close(f"{case} {shape}, {_OURS}", scores, expected, 0.6)
        close(f"{case} {shape}, {_FP32_TOGETHER}", together(images), expected, 1e-4)
    for call in contestants.values():
        call()
    bench.measure(case, shape, batch, "images/s", contestants, {})


def generation(bench: Bench, name: str, shape: GPTShape, tokens: int = 64, prompt: int = 16) -> None:
    """Text from a GPT, with keys and values cached: each contestant the same network, ours frozen."""
    torch.manual_seed(_SEED)
    plain = GPT(shape).eval()
    frozen = copy.deepcopy(plain)
    hbfp.freeze_(frozen, "hbfp4")
    codes = torch.randint(shape.vocabulary, (1, prompt + 8))
    with torch.inference_mode():
        for model in (plain, frozen):
            whole, caches = model(codes), model.caches()
            model.extend(codes[:, :-1], caches)
            last = model.extend(codes[:, -1:], caches)[:, -1]
            error = float((last - whole[:, -1]).norm() / whole[:, -1].norm())
            # Ours only roughly: what came before is as it was read then (docs/spec.md, 9.34).
            if not error <= (1e-3 if model is plain else 0.5):
                raise WrongAnswer(f"generation {name}: cached logits are off by {error:.3g}")
            caches = model.caches()
            if model is frozen and not torch.equal(model.extend(codes, caches), whole):
                raise WrongAnswer(f"generation {name}: a prompt that is cached gives other bits")
    start = codes[0, :prompt].tolist()

    def write(model: GPT) -> Call:
        return lambda: list(itertools.islice(generate(model, start, tokens, temperature=0), tokens))

    contestants = {_OURS: write(frozen), _FP32: write(plain)}
    for call in contestants.values():
        call()
    bench.measure("generation", name, tokens, "tokens/s", contestants, {})


def load(bench: Bench, megabytes: int = 500) -> None:
    """A packed file of 4096 x 4096 layers, in a process of its own: until the model is loaded, until its weights are
    laid out for the kernels, and the most memory that this took."""
    shape = f"{megabytes} MB"
    parts = {"loaded": "load_model", "laid_out": "load_model and layout"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        layers = loading.write(path, megabytes)
        size = path.stat().st_size
        try:
            found = [loading.measure(path, layers, bench.threads) for _ in range(max(1, bench.effort.slow_rounds))]
        except NotRun as reason:
            for name in (*parts.values(), "peak memory", "file"):
                bench.results.not_run("loading", name, str(reason))
            return
    for part, name in parts.items():
        rounds = tuple(getattr(one, part) for one in found)
        bench.results.rows.append(Row("loading", shape, name, bench.threads, size, "GB/s", rounds))
    peaks = tuple(one.peak / 2**20 for one in found)
    bench.results.rows.append(Row("loading", shape, "peak memory", bench.threads, 0, "MiB", peaks))
    bench.results.rows.append(Row("loading", shape, "file", bench.threads, 0, "MiB", (size / 2**20,)))
