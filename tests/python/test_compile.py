"""torch.compile of converted models: whole graphs, the bits of eager code, and no compilation per step.

The bugs these hunt: a step that became a constant of the graph (one compilation a step, until torch gives up, or the
random bits of the first step for ever), a forward that draws another step's bits than eager code, a backward graph that
draws those of the step that was set in between, a phase of the schedule that compiles more than once.
"""

import copy
import pickle
import shutil

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters  # noqa: E402
from zoo import LAYERS, MODELS, Dropping, gradients, leaves, same, values  # noqa: E402

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Nothing compiled before; and torch's own switch for recurrent layers, which it otherwise leaves to eager code."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


IN_MODELS = {"Linear", "Conv2d", "DotProductAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"}
"""Layers that the models below have; those of a transformer do not return the weights of their attention."""


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - IN_MODELS))
def test_every_layer_compiles_whole_and_gives_eagers_bits(name):
    make, shapes = LAYERS[name]
    torch.manual_seed(0)
    eager = make()
    hbfp.convert_(eager, "emulator")  # stochastic rounding everywhere: every stream counts
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(3):
        inputs = [values(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]
        expected, found = gradients(eager, inputs), gradients(twin, inputs, compiled)
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))
        if step == 0:
            first = graphs()
    assert graphs() == first


def train(model, call, inputs, *, steps=10, boosted_from=6):
    """Losses of ten steps under a schedule that changes the widths in the seventh, and how many graphs each had."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = hbfp.Booster(model, steps, last_fraction=1 - boosted_from / steps)
    assert schedule.boosted_from == boosted_from
    losses, compiled = [], []
    for step in range(steps):
        schedule.step(step)
        optimizer.zero_grad()
        loss = sum(result.square().mean() for result in leaves(call(*inputs(step))))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        compiled.append(graphs())
    return losses, compiled


def compare(name, backend):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    eager = make()
    hbfp.convert_(eager, "booster", example_inputs=inputs(0))
    twin = copy.deepcopy(eager)
    expected, _ = train(eager, eager, inputs)
    found, compiled = train(twin, torch.compile(twin, backend=backend, fullgraph=True), inputs)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert all(same(a, b) for a, b in zip(eager.state_dict().values(), twin.state_dict().values(), strict=True))
    assert compiled == [1] * 6 + [2] * 4


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_with_a_change_of_phase_have_eagers_bits_and_two_graphs(name):
    compare(name, "aot_eager")


@pytest.mark.parametrize("backend", ["integer", "emulate"])
def test_dropout_of_attention_draws_anew_at_each_call_and_as_eager_code(backend):
    torch.manual_seed(0)
    eager = Dropping()
    hbfp.convert_(eager, hbfp.recipe("hbfp4", backend=backend))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = values(3, 5, 8)
    found = []
    for model, call in ((eager, eager), (twin, compiled)):
        torch.manual_seed(7)
        results = [gradients(model, [x], call)]
        first = graphs()
        results += [gradients(model, [x], call) for _ in range(2)]
        found.append(results)
    assert graphs() == first
    for expected, drawn in zip(*found, strict=True):
        assert all(same(a, b) for a, b in zip(expected, drawn, strict=True))
    assert not same(found[1][0][0], found[1][1][0])


class Mixed(torch.nn.Module):
    """One product of each kind: of matrices, of attention, convolutions ordinary and flattened."""

    def __init__(self):
        super().__init__()
        self.patches, self.mixed = torch.nn.Conv2d(2, 16, 2, 2), torch.nn.Conv2d(16, 8, 2)
        self.attention, self.head = hbfp.nn.DotProductAttention(), torch.nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.mixed(self.patches(x).relu()).flatten(2).mT
        return self.head(self.attention(tokens, tokens, tokens, is_causal=True))


def narrow():
    """Small: of an emulated product all arithmetic becomes part of the graph, which takes torch long to compile."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


@pytest.mark.parametrize(("backend", "make"), [("emulate", narrow), ("reference", Mixed)])
def test_the_other_backends_compile_whole_and_have_eagers_bits(backend, make):
    torch.manual_seed(0)
    eager = make()
    hbfp.convert_(eager, hbfp.recipe("booster", backend=backend), example_inputs=values(2, 2, 6, 6))
    twin = copy.deepcopy(eager)

    def inputs(step):
        return (values(2, 2, 6, 6, seed=step),)

    expected, _ = train(eager, eager, inputs, steps=3, boosted_from=2)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    found, count = train(twin, compiled, inputs, steps=3, boosted_from=2)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert all(same(a, b) for a, b in zip(eager.state_dict().values(), twin.state_dict().values(), strict=True))
    assert count == [1, 1, 2 if make is Mixed else 1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_has_eagers_bits():
    # Of operators in float32 it makes its own code: those of this model round as torch's.
    compare("mlp", "inductor")


class DroppingBlock(torch.nn.Module):
    """A transformer's, without what inductor rounds otherwise than eager code: [batch, length, 8] -> the same."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.attention = hbfp.nn.DotProductAttention()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attention(q, k, v, None, 0.25, True).mT.flatten(1, 2).mT)
        return x + self.down(self.up(x).relu())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("recipe", ["hbfp4", "emulator"])
def test_inductor_draws_attentions_dropout_as_eager_code(recipe):
    # A word that is drawn twice, never, or backward anew; and torch's generator is left where eager code leaves it.
    torch.manual_seed(0)
    eager = DroppingBlock()
    hbfp.convert_(eager, recipe)
    twin = copy.deepcopy(eager)
    found = []
    for model, call in ((eager, eager), (twin, torch.compile(twin, backend="inductor", fullgraph=True))):
        torch.manual_seed(7)
        results = [gradients(model, [values(3, 5, 8)], call) for _ in range(3)]
        found.append([*results, [torch.rand(1)]])
    for expected, drawn in zip(*found, strict=True):
        assert all(same(a, b) for a, b in zip(expected, drawn, strict=True))
    assert not same(found[1][0][0], found[1][1][0])


def test_a_model_that_counts_its_steps_itself_goes_on_counting_when_compiled():
    model = torch.nn.Linear(20, 6)
    hbfp.convert_(model, "emulator")
    state, x = model.hbfp_state, values(3, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    drawn = [compiled(x) for _ in range(3)]
    assert state.root.step == 3
    drawn.append(model(x))  # eager code goes on where the graph was
    assert state.root.step == 4
    assert not any(same(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    hbfp.set_step(model, 2)
    assert same(model(x), drawn[1])
    assert same(compiled(x), drawn[1])
    assert state.root.step == 2


def test_backward_draws_the_bits_of_its_own_forward():
    # Two forwards and then their backwards: the second step must not reach the first's gradients.
    found = []
    for backend in (None, "aot_eager"):
        model = torch.nn.Linear(20, 6, bias=False)
        model.weight.data.copy_(values(6, 20))
        hbfp.convert_(model, "hbfp4")
        call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        losses = []
        for step in (5, 2**31 + 7):  # a stream whose signed form is negative
            hbfp.set_step(model, step)
            losses.append(call(values(70, 20, seed=1)).square().sum())
        hbfp.set_step(model, 9)
        for loss in losses:
            model.zero_grad()
            loss.backward()
            found.append(model.weight.grad)
    assert same(found[0], found[2])
    assert same(found[1], found[3])
    assert not same(found[0], found[1])


def test_the_step_survives_copies_after_a_compiled_forward():
    model = torch.nn.Linear(20, 6)
    hbfp.convert_(model, "emulator")
    torch.compile(model, backend="aot_eager", fullgraph=True)(values(3, 20))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.hbfp_state.root.step == 1
        assert same(other(values(3, 20)), copy.deepcopy(model)(values(3, 20)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_a_graph_break_leaves_the_bits_as_they_are():
    # What stands after a break runs on the stream that a graph computed, a tensor and not a number.
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.LSTM(20, 6))
    hbfp.convert_(model, "emulator")
    twin = copy.deepcopy(model)
    with torch._dynamo.config.patch(allow_rnn=False):
        compiled = torch.compile(twin, backend="aot_eager")
        for step in range(12):
            hbfp.set_step(model, step)
            hbfp.set_step(twin, step)
            x = values(3, 2, 20)
            expected, found = gradients(model, [x]), gradients(twin, [x], compiled)
            assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_the_next_step_is_the_same_within_a_backward_pass():
    # A recomputation that is compiled can't ask by itself.
    seen = []
    x = torch.ones(3, requires_grad=True)
    step = torch.tensor(2**32 - 1)
    x.register_hook(lambda gradient: seen.append(ops.next_step(step).item()))
    seen.append(ops.next_step(step).item())
    x.sum().backward()
    assert seen == [0, 2**32 - 1]
    assert step.item() == 2**32 - 1
