"""Every class that is converted: what a user does with modules, done to each, converted and taken back.

The bugs these hunt: a class that keeps something of the conversion, a state_dict that does not fit the model it came
from, a copy that draws other random bits or shares them with its original, an optimizer that holds tensors that nobody
reads any more, and a product whose backend is another than the one it was given.
"""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import hbfp  # noqa: E402
from hbfp import backends, ops  # noqa: E402
from hbfp.nn.conversion import CONTAINERS, LAYERS  # noqa: E402


def randn(*shape):
    return lambda: torch.randn(*shape)


ZOO = {
    "Linear": (lambda: nn.Linear(5, 3), [randn(4, 5)]),
    "Conv1d": (lambda: nn.Conv1d(3, 2, 3, padding=1), [randn(2, 3, 5)]),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 2, groups=2), [randn(2, 4, 3, 3)]),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2, bias=False), [randn(1, 2, 2, 3, 2)]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 2, 2), [randn(2, 3, 4)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 2), [randn(1, 3, 2, 2)]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), [randn(1, 2, 2, 1, 2)]),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 2), [randn(3, 3), randn(3, 4)]),
    "DotProductAttention": (lambda: hbfp.nn.DotProductAttention(), [randn(2, 3, 4)] * 3),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), [randn(3, 2, 4)] * 3),
    "RNN": (lambda: nn.RNN(3, 4), [randn(3, 2, 3)]),
    "GRU": (lambda: nn.GRU(3, 2, bidirectional=True), [randn(3, 2, 3)]),
    "LSTM": (lambda: nn.LSTM(3, 4, 2, proj_size=2), [randn(3, 2, 3)]),
    "RNNCell": (lambda: nn.RNNCell(3, 4), [randn(2, 3), randn(2, 4)]),
    "GRUCell": (lambda: nn.GRUCell(3, 4), [randn(2, 3), randn(2, 4)]),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), [randn(2, 3), lambda: (torch.randn(2, 4), torch.randn(2, 4))]),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0), [randn(3, 2, 4)]),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0), [randn(3, 2, 4)] * 2),
}

each = pytest.mark.parametrize("name", ZOO)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")  # torch's own, in FP32


def make(name, seed=0):
    torch.manual_seed(seed)
    return ZOO[name][0]()


def inputs(name):
    """The same at each call, requiring gradients."""
    torch.manual_seed(7)
    given = [draw() for draw in ZOO[name][1]]
    for x in tree_leaves(given):
        x.requires_grad_()
    return given


def outputs(model, name):
    return [x for x in tree_leaves(model(*inputs(name))) if x is not None]


def step(model, name):
    """Outputs and gradients of one step, which parameters keep; the inputs' come behind the outputs."""
    given = inputs(name)
    out = [x for x in tree_leaves(model(*given)) if x is not None]
    generator = torch.Generator().manual_seed(1)
    # Finite in every encoding and no two alike.
    torch.autograd.backward(out, [torch.randn(x.shape, generator=generator) for x in out])
    return [*(x.detach() for x in out), *(x.grad for x in tree_leaves(given))]


def same(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))
        for a, b in zip(found, expected, strict=True)
    )


def classes(model):
    return [type(module) for module in model.modules()]


def test_the_zoo_has_every_class():
    """A layer that is added later must come here too."""
    torch_classes = {kind for kind in (*LAYERS, *CONTAINERS) if not kind.__module__.startswith("hbfp.")}
    assert {type(make(name)) for name in ZOO} == torch_classes | {hbfp.nn.DotProductAttention}


@each
def test_revert_is_the_exact_inverse(name):
    model = make(name)
    before, kinds = outputs(model, name), classes(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    hbfp.convert_(model, "emulator")
    assert classes(model) != kinds or name == "DotProductAttention"
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not same(outputs(model, name), before)
    hbfp.revert_(model)
    assert classes(model) == kinds
    for module, attribute in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == attribute.keys()
        assert all(vars(module)[key] is value for key, value in attribute.items())
    assert same(outputs(model, name), before)


@each
def test_checkpoints_load_strictly_both_ways(name, tmp_path):
    plain, converted = make(name), make(name, 1)
    hbfp.convert_(converted, "emulator")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    assert not converted.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True), strict=True)[0]
    torch.save(converted.state_dict(), tmp_path / "converted.pt")
    other = make(name, 2)
    other.load_state_dict(torch.load(tmp_path / "converted.pt", weights_only=True), strict=True)
    assert same(list(other.state_dict().values()), list(plain.state_dict().values()))
    assert same(outputs(other, name), outputs(plain, name))
    hbfp.convert_(plain, "emulator")
    assert same(outputs(converted, name), outputs(plain, name))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_compute_the_same_and_go_their_own_way(name, copied):
    model = make(name)
    hbfp.convert_(model, "emulator")
    hbfp.set_step(model, 3)
    other = copied(model)
    assert classes(other) == classes(model)
    assert same(step(other, name), step(model, name))
    hbfp.set_step(other, 4)
    before = outputs(model, name)
    assert not same(outputs(other, name), before)  # and the original's step is its own
    hbfp.revert_(other)
    assert classes(other) == classes(make(name))
    assert same(outputs(model, name), before)
    hbfp.revert_(model)
    again = copied(model)
    assert classes(again) == classes(make(name))
    assert same(outputs(again, name), outputs(other, name))


@pytest.mark.parametrize("name", [name for name in ZOO if name != "DotProductAttention"])  # it has no parameters
def test_optimizers_made_before_and_after(name):
    """Adam keeps state for each parameter, so that one that is held by another identity would show."""

    def train(before):
        model = make(name)
        if before:
            optimizer = torch.optim.Adam(model.parameters(), 0.1)
        hbfp.convert_(model, "emulator")
        if not before:
            optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for converted in (True, True, False):
            if not converted:
                hbfp.revert_(model)
            optimizer.zero_grad()
            step(model, name)
            optimizer.step()
        return model

    early, late, start = train(True), train(False), make(name)
    assert same(list(early.parameters()), list(late.parameters()))
    assert all(not torch.equal(a, b) for a, b in zip(early.parameters(), start.parameters(), strict=True))


# --- a backend for each product --------------------------------------------------------------------------------------

FORWARD = {"forward", "scores", "context"}
OF_INPUT = {"input gradient", "gradient of P", "gradient of Q"}
OF_WEIGHT = {"weight gradient", "gradient of V", "gradient of K"}


@pytest.fixture
def by_oracle(monkeypatch):
    """Names of the products that the oracle computes."""
    names = set()

    def spy(function):
        def noted(*args, name="product", **keywords):
            names.add(name)
            return function(*args, name=name, **keywords)

        return noted

    monkeypatch.setattr(backends._Oracle, "product", staticmethod(spy(ops.reference_product)))
    for product in ("", "_input_gradient", "_weight_gradient"):
        attribute = f"reference_convolution{product}"
        monkeypatch.setattr(ops, attribute, spy(getattr(ops, attribute)))
    return names


@each
@pytest.mark.parametrize(
    ("product", "names"), [("forward", FORWARD), ("input_gradient", OF_INPUT), ("weight_gradient", OF_WEIGHT)]
)
def test_one_product_has_another_backend(name, product, names, by_oracle):
    """The oracle computes these and no others; its bits are those of the kernels."""
    integer, mixed = make(name), make(name)
    hbfp.convert_(integer, "emulator")
    hbfp.convert_(mixed, "emulator", rules={"*": {product: "reference"}})
    for model in (integer, mixed):
        hbfp.set_step(model, 5)
    expected = step(integer, name)
    assert not by_oracle
    assert same(step(mixed, name), expected)
    assert by_oracle
    assert by_oracle <= names
    for found, wanted in zip(mixed.parameters(), integer.parameters(), strict=True):
        assert same([found.grad], [wanted.grad])


@each
def test_one_product_is_taken_from_another_backend(name, by_oracle):
    """The other way round: two by the oracle, and one of the kernels between them."""
    model = make(name)
    hbfp.convert_(model, hbfp.recipe("hbfp4", backend="reference", input_gradient="integer"))
    step(model, name)
    assert not by_oracle & OF_INPUT
    assert by_oracle & FORWARD


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(16, 2), (64, 16)), (lambda: nn.Conv1d(16, 2, 1), (64, 16, 2))]
)
@pytest.mark.parametrize(("product", "names"), [("weight_gradient", OF_WEIGHT), ("forward", FORWARD)])
def test_codes_that_are_kept_go_to_nobody_else(make, shape, product, names, by_oracle):
    """Batches that the layer would keep as codes for the kernels: another backend is to get the floats."""
    found = []
    for recipe in (hbfp.recipe("hbfp4"), hbfp.recipe("hbfp4", **{product: "reference"})):
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        hbfp.convert_(model, recipe)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.dtype) or x, lambda x: x):
            y = model(x)
        y.sum().backward()
        found.append((torch.uint8 in sizes, model.weight.grad))
    assert [kept for kept, _ in found] == [True, False]
    assert by_oracle
    assert by_oracle <= names
    assert same([found[0][1]], [found[1][1]])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(500, 300), (400, 500)),
        (lambda: nn.Conv2d(70, 80, 3), (2, 70, 12, 12)),
        (lambda: nn.ConvTranspose2d(70, 80, 3), (2, 70, 10, 10)),
    ],
)
def test_each_product_has_the_bits_of_its_own_backend(make, shape):
    """Sums that the emulation rounds in other places: Y, dX and dW each tell who computed them."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)

    def products(recipe):
        hbfp.convert_(model, recipe)
        hbfp.set_step(model, 1)
        given = x.clone().requires_grad_()
        model.zero_grad()
        y = model(given)
        y.backward(torch.linspace(-1.0, 1.0, y.numel()).sin().view(y.shape))
        hbfp.revert_(model)
        return [value.detach().clone() for value in (y, given.grad, model.weight.grad)]

    names = "forward", "input_gradient", "weight_gradient"
    whole = {backend: products(hbfp.recipe("hbfp16b64", backend=backend)) for backend in ("integer", "emulate")}
    assert not any(same([a], [b]) for a, b in zip(*whole.values(), strict=True))
    for place, name in enumerate(names):
        mixed = products(hbfp.recipe("hbfp16b64", **{name: "emulate"}))
        expected = [whole["emulate" if other == place else "integer"][other] for other in range(3)]
        assert same(mixed, expected), name
