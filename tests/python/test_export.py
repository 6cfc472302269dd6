"""torch.fx, torch.export and memory formats: converted models pass through torch's tools and keep their bits.

The bugs these hunt: a trace that stops at a shape check or looks into a layer and loses its products, an exported
program that holds float products or the tensors of its tracing, an export that moves the model's step, a layer that
reads channels_last memory as if it were contiguous.
"""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from zoo import LAYERS, MODELS, gradients, leaves, same, values  # noqa: E402

import hbfp  # noqa: E402


class Around(nn.Module):
    """A model with one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


class Around1(Around):
    def forward(self, a):
        return self.layer(a)


class Around2(Around):
    def forward(self, a, b):
        return self.layer(a, b)


class Around3(Around):
    def forward(self, a, b, c):
        return self.layer(a, b, c)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_node_of_a_symbolic_trace(name):
    make, shapes = LAYERS[name]
    torch.manual_seed(0)
    model = (Around1, Around2, Around3)[len(shapes) - 1](make())
    hbfp.convert_(model, "emulator")
    hbfp.set_step(model, 3)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op.startswith("call")] == ["layer"]
    inputs = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert all(same(a, b) for a, b in zip(gradients(model, inputs), gradients(model, inputs, traced), strict=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer"])  # torch's own does not trace
def test_models_are_traced_by_fx(name):
    make, inputs = MODELS[name]
    model = make()
    hbfp.convert_(model, "emulator")
    traced = torch.fx.symbolic_trace(model)
    hbfp.set_step(traced, 4)  # its layers are the model's
    assert same(model(*inputs(0)), traced(*inputs(0)))


def called(program):
    """Names of all operators of an exported program, in the graphs inside its graph too."""
    graphs = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return [str(node.target) for part in graphs for node in part.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODELS), ("mlp", True), ("gpt", True)])
def test_exported_programs_have_integer_products_and_equal_bits(name, strict):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    hbfp.convert_(model, "emulator")
    hbfp.set_step(model, 7)
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model, inputs(0), strict=strict)
        assert any(target.startswith("hbfp.") for target in called(program))
        floats = ("linear", "mm", "conv", "scaled_dot", "lstm", "einsum")
        assert not [target for target in called(program) if target.removeprefix("aten.").startswith(floats)]
        for step in range(2):
            x = inputs(step)
            assert same(program.module()(*x), model(*x))


def test_exporting_a_model_in_training_leaves_its_step_alone():
    model = nn.Linear(20, 6)
    hbfp.convert_(model, "emulator")
    before = model(values(3, 20))
    program = torch.export.export(copy.deepcopy(model), (values(3, 20),))
    torch.export.export(model, (values(3, 20),))
    root = model.hbfp_state.root
    assert root.step == 1
    assert type(root.clock) is torch.Tensor
    with torch.no_grad():
        assert same(program.module()(values(3, 20)), before)  # the step at which it was exported


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.export reads archives with
def test_an_exported_program_survives_its_file():
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    hbfp.convert_(model, "hbfp4")
    model.eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (values(3, 20),)), file)
    file.seek(0)
    with torch.no_grad():
        assert same(torch.export.load(file).module()(values(3, 20)), model(values(3, 20)))


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Conv3d", "ConvTranspose3d"])
def test_channels_last_inputs_keep_their_format_and_the_bits(name):
    make, (shape,) = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    hbfp.convert_(layer, "emulator")
    hbfp.set_step(layer, 3)
    memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = values(*shape)
    expected = gradients(layer, [x])
    found = gradients(layer.to(memory_format=memory), [x.contiguous(memory_format=memory)])
    assert found[0].is_contiguous(memory_format=memory)
    assert found[1].is_contiguous(memory_format=memory)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_a_channels_last_network_stays_so_between_its_layers():
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    hbfp.convert_(model, "hbfp4")
    model[3].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    leaves(model(values(2, 3, 8, 8).to(memory_format=torch.channels_last)))
    assert seen == [True]
