"""Activation checkpointing: a recomputed forward draws the bits of the one that it repeats.

The bugs these hunt: a recomputation that counts as a step, a recomputed layer on the streams of another step, a graph
that cannot tell a recomputation from a forward.
"""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402
from zoo import LAYERS, MODELS, Dropping, gradients, leaves, same, values  # noqa: E402

import hbfp  # noqa: E402


def whole(layer, *x):
    return layer(*x)


def reentrant(layer, *x):
    return checkpoint(layer, *x, use_reentrant=True)


def by_hooks(layer, *x):
    return checkpoint(layer, *x, use_reentrant=False)


KINDS = [reentrant, by_hooks]


class Blocks(nn.Module):
    """Three blocks, each called as `call` says, between two layers that are always kept."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, 24), nn.Linear(24, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(3))
        self.call = whole

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + self.call(block, x)
        return self.last(x)


def train(call, control, *, compiled=False):
    """Weights after four steps: with the model's own count of steps, with `set_step`, or with a schedule."""
    torch.manual_seed(0)
    model = Blocks()
    hbfp.convert_(model, "emulator" if control != "booster" else "booster", example_inputs=values(2, 10))
    model.call = call
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    booster = hbfp.Booster(model, 4, last_fraction=0.5) if control == "booster" else None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        if control == "set_step":
            hbfp.set_step(model, 10 + step)
        elif booster is not None:
            booster.step(step)
        optimizer.zero_grad()
        run(values(9, 10, seed=step)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], model.first.hbfp_state.root.step


def nested(layer, *x):
    return checkpoint(lambda *x: checkpoint(layer, *x, use_reentrant=False), *x, use_reentrant=False)


@pytest.mark.parametrize("control", ["automatic", "set_step", "booster"])
@pytest.mark.parametrize("kind", [*KINDS, nested])
def test_checkpointed_blocks_change_no_bit_of_training(kind, control):
    weights, step = train(whole, control)
    found, found_step = train(kind, control)
    assert all(same(a, b) for a, b in zip(weights, found, strict=True))
    assert step == found_step


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_checkpointed_blocks_in_a_compiled_model():
    torch._dynamo.reset()
    weights, step = train(whole, "automatic")
    found, found_step = train(by_hooks, "automatic", compiled=True)
    assert all(same(a, b) for a, b in zip(weights, found, strict=True))
    assert step == found_step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_by_itself(kind, name):
    # The whole converted model in one checkpoint: its own count of steps is inside.
    make, shapes = LAYERS[name]
    found = []
    for call in (whole, kind):
        torch.manual_seed(0)
        layer = make()
        hbfp.convert_(layer, "emulator")
        inputs = [values(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        # torch's own: a re-entrant checkpoint sees no tensors in tuples of tuples.
        flat = lambda *x, layer=layer: tuple(leaves(layer(*x)))  # noqa: E731
        for _ in range(2):
            results = call(flat, *inputs)
            sum(result.square().sum() for result in results).backward()
        found.append([*results, *(x.grad for x in inputs), *(p.grad for p in layer.parameters())])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gpt", "lstm")])
def test_models_by_themselves(name):
    make, inputs = MODELS[name]
    found = []
    for call in (whole, by_hooks):
        torch.manual_seed(0)
        model = make()
        if name == "resnet":
            model.eval()  # a batch norm in training would count its batch twice
        hbfp.convert_(model, "emulator")
        call(model, *inputs(0)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_sequential_segments(use_reentrant):
    found = []
    for segments in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
        hbfp.convert_(model, "emulator")
        hbfp.set_step(model, 5)
        x = values(9, 16).requires_grad_()
        checkpoint_sequential(model, segments, x, use_reentrant=use_reentrant).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_a_compiled_layer_in_a_checkpoint_of_eager_code():
    # The graph runs a second time within backward, and counts the step only the first.
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = hbfp.nn.Linear(20, 6, recipe="emulator")
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        for _ in range(2):
            by_hooks(call, values(70, 20).requires_grad_()).square().sum().backward()
        found.append([layer.weight.grad, torch.tensor(layer.hbfp_state.root.step)])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_is_repeated_drops_the_same_elements(kind):
    torch.manual_seed(0)
    model = Dropping()
    hbfp.convert_(model, "emulator")
    found = []
    for call in (whole, kind):
        hbfp.set_step(model, 4)
        torch.manual_seed(7)
        found.append([gradients(model, [values(3, 5, 8, seed=i)], lambda x, call=call: call(model, x)) for i in (0, 1)])
        found[-1].append([torch.rand(3)])  # the generator goes on where it would
    for expected, repeated in zip(*found, strict=True):
        assert all(same(a, b) for a, b in zip(expected, repeated, strict=True))
