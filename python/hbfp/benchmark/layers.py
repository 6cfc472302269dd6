"""The cases of whole layers and networks: convolutions, attention, recurrent layers, training steps, and their memory.

Each contestant is the same network; ours is converted. Before anything is timed our results are compared with FP32's,
generously, for they are rounded to four bits, and with themselves on another number of threads, bit for bit.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import hbfp
from hbfp import autograd, ops
from hbfp.benchmark import memory
from hbfp.benchmark.cases import Bench
from hbfp.benchmark.checks import WrongAnswer
from hbfp.benchmark.results import NotRun, Row
from hbfp.benchmark.timing import Call
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.resnet import ResNet, ResNetShape

__all__ = [
    "CONVOLUTIONS",
    "GROUPED",
    "attention",
    "convolution",
    "gpt",
    "grouped_convolution",
    "lstm",
    "peak_memory",
    "resnet20",
    "saved_activations",
]

CONVOLUTIONS = ((64, 56), (128, 28), (256, 14))
"""Channels in and out, and pixels each way, of the 3 x 3 convolutions."""

GROUPED = ((128, 28, 128, 3, 32), (96, 56, 96, 7, 8), (128, 28, 32, 3, 32), (128, 28, 16, 3, 32))
"""Convolutions of many groups: channels in and out, pixels each way, groups, the kernel's size each way, the batch."""

_SEED = 20
_OURS, _FP32, _BF16 = "hbfp4", "torch fp32", "torch bf16 autocast"
_TOLERANCE = 0.6
"""Of the distance between our results and FP32's, in their norm: a mistake makes it 1 or more."""


def _measure(
    bench: Bench,
    case: str,
    shape: str,
    work: float,
    results: Callable[[str], Sequence[Tensor]],
    timed: Callable[[str], Callable[[], object]],
    exact: int | None = None,
) -> None:
    """Checks and times the contestants.

    Args:
        results: what a contestant computes, the same at each call.
        timed: a contestant's call.
        exact: how many of our results, from the first on, must have the same bits on other threads; None: all. What
            torch computes in a network, as the gradients of a normalisation, may have others.
    """
    threads = torch.get_num_threads()
    ours = [x.clone() for x in results(_OURS)]
    try:
        torch.set_num_threads(threads + 1)
        if not all(map(torch.equal, ours[:exact], results(_OURS)[:exact])):
            raise WrongAnswer(f"{case} {shape}: {threads} and {threads + 1} threads give different bits")
    finally:
        torch.set_num_threads(threads)
    for found, expected in zip(ours, results(_FP32), strict=True):
        distance = (found - expected).norm() / expected.norm()
        if not distance <= _TOLERANCE:
            raise WrongAnswer(f"{case} {shape}: {distance:.2f} of the norm away from FP32")
    contestants: dict[str, Call] = {name: timed(name) for name in (_OURS, _FP32)}
    if bench.results.level in ("avx512vnni", "amx"):
        contestants[_BF16] = timed(_BF16)
    else:
        bench.results.not_run(case, _BF16, "its bars are those of CPUs with AVX-512; elsewhere bf16 is emulated")
    for call in contestants.values():
        call()
    bench.measure(case, shape, work, "GOP/s", contestants, {})


def _pair(model: nn.Module) -> dict[str, nn.Module]:
    converted = copy.deepcopy(model)
    hbfp.convert_(converted, "hbfp4")
    return {_OURS: converted, _FP32: model, _BF16: model}


def _layer_case(
    bench: Bench, case: str, shape: str, work: float, model: nn.Module, x: Tensor, first: Callable[..., Tensor]
) -> None:
    """Forward and backward of one layer, whose inputs and parameters all want gradients."""
    models = _pair(model)
    with torch.no_grad():
        y = first(model(x))
        dy = torch.empty_like(y).copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(_SEED + 1)))

    def step(name: str) -> tuple[Tensor, ...]:
        layer = models[name]
        leaves = (x, *layer.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == _BF16):
            y = first(layer(x))
        return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

    def results(name: str) -> Sequence[Tensor]:
        if name == _OURS:
            hbfp.set_step(models[name], 1)
        return step(name)

    _measure(bench, case, shape, work, results, lambda name: lambda: step(name))


def convolution(bench: Bench, channels: int, pixels: int, batch: int = 32) -> None:
    """A 3 x 3 convolution, forward and backward."""
    torch.manual_seed(_SEED)
    x = torch.randn(batch, channels, pixels, pixels, requires_grad=True)
    work = 3 * 2 * batch * pixels**2 * 9 * channels**2
    shape = f"{batch}x{channels}x{pixels}x{pixels}"
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    _layer_case(bench, "convolution", shape, work, layer, x, lambda y: y)


def grouped_convolution(bench: Bench, channels: int, pixels: int, groups: int, size: int, batch: int) -> None:
    """A convolution of many groups, forward and backward, on images whose channels lie together: torch's faster way."""
    torch.manual_seed(_SEED)
    x = torch.randn(batch, channels, pixels, pixels).contiguous(memory_format=torch.channels_last).requires_grad_()
    work = 3 * 2 * batch * pixels**2 * size**2 * channels * (channels // groups)
    shape = f"{batch}x{channels}x{pixels}x{pixels}, {groups} groups of {size}x{size}"
    layer = nn.Conv2d(channels, channels, size, padding=size // 2, groups=groups, bias=False)
    _layer_case(bench, "grouped convolution", shape, work, layer.to(memory_format=torch.channels_last), x, lambda y: y)


def lstm(bench: Bench, width: int = 512, steps: int = 100, batch: int = 32) -> None:
    """An LSTM over a sequence, forward and backward."""
    torch.manual_seed(_SEED)
    x = torch.randn(steps, batch, width, requires_grad=True)
    work = 3 * 2 * steps * batch * 2 * width * 4 * width
    _layer_case(bench, "lstm", f"{steps}x{batch}x{width}", work, nn.LSTM(width, width), x, lambda y: y[0])


def attention(
    bench: Bench, context: int, batch: int = 4, heads: int = 8, width: int = 64, *, dropout: float = 0.0
) -> None:
    """Causal attention, forward and backward, against torch's own routine: flash, or with dropout one of matrices."""
    generator = torch.Generator().manual_seed(_SEED)
    q, k, v, dy = (torch.randn(batch, heads, context, width, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

    def step(name: str) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == _BF16):
            if name == _OURS:
                y = hbfp.nn.functional.scaled_dot_product_attention(q, k, v, None, dropout, True, recipe="hbfp4")
            elif name == _BF16:
                narrow = q.bfloat16(), k.bfloat16(), v.bfloat16()
                y = nn.functional.scaled_dot_product_attention(*narrow, None, dropout, True)
            else:
                y = nn.functional.scaled_dot_product_attention(q, k, v, None, dropout, True)
        return gradients(y)

    def results(name: str) -> tuple[Tensor, ...]:
        torch.manual_seed(_SEED)
        if name == _OURS or dropout == 0.0:
            return step(name)
        # torch drops others: its operations, with the elements that ours drops.
        dropped, word = autograd.drawn_dropout(dropout, q)
        assert word is not None
        hidden = torch.ones(context, context, dtype=torch.bool).triu_(1)
        p = (q @ k.mT / width**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return gradients(p * ops.dropout(torch.ones_like(p), dropped, word) @ v)

    # Six products of the lower triangle, and the scores once more backward.
    work = 7 * batch * heads * context**2 * width
    shape = f"{batch}x{heads}x{context}x{width}"
    case = f"attention, dropout {dropout}" if dropout > 0.0 else "attention"
    _measure(bench, case, shape, work, results, lambda name: lambda: step(name))


def _training(
    bench: Bench,
    case: str,
    shape: str,
    work: float,
    model: nn.Module,
    given: Tensor,
    loss: Callable[[Tensor], Tensor],
    exact: int,
) -> None:
    """Whole steps, optimizer included; each contestant trains a network of its own. `loss` is of the scores, which
    with all gradients are what is checked.
    """
    models = _pair(model)
    models[_BF16] = copy.deepcopy(model)
    optimizers = {name: torch.optim.AdamW(network.parameters(), 1e-4) for name, network in models.items()}

    def results(name: str) -> Sequence[Tensor]:
        if name == _OURS:
            hbfp.set_step(models[name], 1)
        # Of a fresh copy, which no optimizer has moved and no normalisation has seen.
        network = copy.deepcopy(models[name])
        scores = network(given)
        loss(scores).backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        return [scores.detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    def step(name: str) -> None:
        optimizers[name].zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == _BF16):
            scores = models[name](given)
        loss(scores.float()).backward()
        optimizers[name].step()

    _measure(bench, case, shape, work, results, lambda name: lambda: step(name), exact)


def _gpt(layers: int, width: int, context: int) -> GPT:
    torch.manual_seed(_SEED)
    return GPT(GPTShape(vocabulary=96, layers=layers, width=width, context=context))


def gpt(bench: Bench, layers: int = 6, width: int = 384, context: int = 256, batch: int = 12) -> None:
    """A step of a character-level GPT with AdamW."""
    model = _gpt(layers, width, context)
    codes = torch.randint(0, 96, (batch, context))
    tokens = batch * context
    work = 3 * (2 * tokens * layers * 12 * width**2 + 2 * layers * tokens * context * width)

    def loss(scores: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores.flatten(0, 1), codes.flatten())

    _training(bench, "gpt", f"{layers}x{width}, {batch}x{context}", work, model, codes, loss, 1)


def resnet20(bench: Bench, batch: int = 128) -> None:
    """A step of ResNet20 on images of 32 x 32."""
    torch.manual_seed(_SEED)
    model, images = ResNet(ResNetShape()), torch.randn(batch, 3, 32, 32)
    classes = torch.randint(0, 10, (batch,))

    def loss(scores: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores, classes)

    _training(bench, "resnet20", f"{batch}x3x32x32", 3 * 2 * batch * 40.8e6, model, images, loss, 0)


def saved_activations(bench: Bench, layers: int = 6, width: int = 384, context: int = 256, batch: int = 12) -> None:
    """MiB that autograd saves between forward and backward, parameters not counted: of layers, and of a GPT."""
    torch.manual_seed(_SEED)
    x = torch.randn(1024, 1024)
    codes = torch.randint(0, 96, (batch, context))
    sequences = torch.randn(100, 32, 512)
    subjects: dict[str, tuple[nn.Module, Tensor]] = {
        "linear 1024": (nn.Linear(1024, 1024), x),
        "transposed convolution 64": (nn.ConvTranspose2d(64, 64, 3, padding=1), torch.randn(32, 64, 28, 28)),
        "lstm 512": (nn.LSTM(512, 512), sequences),
        "gru 512": (nn.GRU(512, 512), sequences),
        "gpt": (_gpt(layers, width, context), codes),
    }
    for shape, (model, given) in subjects.items():
        for name, network in _pair(model).items():
            if name != _BF16:
                size = _saved_bytes(network, given) / 2**20
                bench.results.rows.append(Row("saved activations", shape, name, bench.threads, 0, "MiB", (size,)))


def _saved_bytes(model: nn.Module, given: Tensor) -> int:
    seen: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = model(given)
    del kept
    return sum(seen.values())


def peak_memory(bench: Bench) -> None:
    """Peak memory of a step above its inputs and parameters, each contestant in a process of its own."""
    for shape in memory.STEPS:
        for name in memory.CONTESTANTS:
            try:
                size = memory.peak(shape, name, bench.threads)
            except NotRun as error:
                bench.results.not_run("peak memory", name, f"{shape}: {error}")
            else:
                bench.results.rows.append(Row("peak memory", shape, name, bench.threads, 0, "MiB", (size,)))
