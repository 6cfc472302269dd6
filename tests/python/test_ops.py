"""Operators behind torch's dispatcher: opcheck, and the same bits through both lanes."""

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402
from hbfp.packed import PackedWeight  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "product": (values(5, 70), -1, "hbfp4b64", 0, 1, values(6, 70), -1, "hbfp6b64", 3, 2, -5, values(6)),
    "quantize": (values(3, 100), "hbfp4b16", -1, 3, 7, -1),
    "softmax": (values(2, 3, 9), 0.5, True, None),
    "softmax_backward": (values(2, 3, 9).softmax(-1), values(2, 3, 9, seed=1), 0.5),
    "dropout": (values(2, 3, 9), 20000, torch.tensor(2**62 + 5)),
    "column_sums": (values(130, 7),),
    "convolution": (
        values(2, 4, 5, 6), values(6, 2, 3, 2), values(6), ["hbfp4b16", "hbfp6b16"], [0, 3], [1, -2], None, -5,
        [3, 2], [2, 1], [1, 1, 0, 1], [1, 2], 2, True, [3, 5],
    ),
    "convolution_input_gradient": (
        values(2, 6, 3, 5), values(6, 2, 3, 2), None, ["hbfp4b16", "hbfp6b16"], [3, 0], [1, -2], None, -5,
        [3, 2], [2, 1], [1, 1, 0, 1], [1, 2], 2, [5, 6],
    ),
    "convolution_weight_gradient": (
        values(2, 6, 3, 5), values(2, 4, 5, 6), ["hbfp4b16", "hbfp6b16"], [3, 0], [1, -2], None, -5,
        [3, 2], [2, 1], [1, 1, 0, 1], [1, 2], 2,
    ),
}  # fmt: skip


Q, K, V, MASK = values(2, 5, 8), values(2, 7, 8, seed=1), values(2, 7, 4, seed=2), values(5, 7).expand(2, 5, 7)
CASES["attention"] = (Q, K, V, MASK, False, 0.5, ["hbfp4b16", "hbfp6b16"], [0, 3], [1, -2, 3, -4], -5)
CASES["attention_backward"] = (
    values(2, 5, 4), Q, K, V, None, True, 0.5, ["hbfp4b16", "hbfp6b16"] * 3, [0, 3] * 3, list(range(-5, 5)), -5,
    [True, False, True],
)  # fmt: skip
CASES["attention_mask_gradient"] = (
    values(2, 5, 4), Q, K, V, MASK, [5, 7], 0.5, ["hbfp4b16", "hbfp6b16"] * 2, [0, 3] * 2, [1, -2, 3, -4], -5,
)  # fmt: skip
PANELS = PackedWeight.of(values(6, 70), "hbfp4b64")
PLANES = hbfp.encode(values(6, 70), "hbfp6b64")
CASES["packed_product"] = (values(5, 70), "hbfp4b64", 3, 1, PANELS.codes, None, "hbfp4b64", 6, -5, values(6))
KERNEL, TRANSPOSED = (PackedWeight.of(values(32, 32, 3, 2), "hbfp4b16", axis, groups=2) for axis in (1, 0))
CASES["packed_convolution"] = (
    values(2, 64, 5, 6), KERNEL.codes, [32, 32, 3, 2], values(32), ["hbfp6b16", "hbfp4b16"], [3, 0], [1, -2], None, -5,
    [3, 2], [2, 1], [1, 1, 0, 1], [1, 2], 2, False, [3, 5],
)  # fmt: skip
CASES["packed_convolution_input_gradient"] = (
    values(2, 32, 3, 5), TRANSPOSED.codes, [32, 32, 3, 2], None, ["hbfp6b16", "hbfp4b16"], [3, 0], [1, -2], None, -5,
    [3, 2], [2, 1], [1, 1, 0, 1], [1, 2], 2, [5, 6],
)  # fmt: skip
CASES["decode"] = (
    torch.from_numpy(PLANES.mantissa_plane.copy()), torch.from_numpy(PLANES.exponent_plane.copy()), "hbfp6b64",
    [2, 3, 70], 2,
)  # fmt: skip
CASES["next_step"] = (torch.tensor(2**32 - 1),)
CASES["random_word"] = (values(1),)
for _name in ("product", "convolution", "convolution_input_gradient", "convolution_weight_gradient"):
    CASES[f"reference_{_name}"] = CASES[_name]


def test_every_operator_has_a_case():
    found = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "hbfp::" in name}
    assert found == set(CASES)


DRAWN = {
    "product": 2,
    "reference_product": 2,
    "packed_product": 1,
    "quantize": 1,
    "attention": 4,
    "attention_backward": 10,
    "attention_mask_gradient": 4,
}
"""Operators whose streams may be tensors, as the last argument, and how many."""


def in_a_graph(name):
    """A case with streams as torch.compile gives them."""
    return (*CASES[name], [torch.tensor(2**40 * i - 7) for i in range(DRAWN[name])])


@pytest.mark.parametrize("name", DRAWN)
def test_opcheck_of_streams_in_a_graph(name):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.hbfp, name).default, in_a_graph(name), test_utils=checks)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.hbfp, name).default, CASES[name], test_utils=checks)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("reference_")])
def test_the_oracles_operators_give_the_bits_of_the_kernels(name):
    expected = getattr(torch.ops.hbfp, name.removeprefix("reference_"))(*CASES[name])
    found = getattr(torch.ops.hbfp, name)(*CASES[name])
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_compiled_products_are_bit_equal():
    def f(x, w):
        return ops.product(x, -1, w, -1, (hbfp.HBFP4, hbfp.HBFP4), (0, 0), 0, (0, 0), None)

    x, w = values(8, 70), values(5, 70, seed=1)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w), f(x, w))


def test_other_devices_and_layouts_are_refused_by_name():
    with pytest.raises(hbfp.DTypeError, match="move it with"):
        ops.products._run_column_sums(torch.ones(3, 3).to_sparse())


STRIDED = {
    "batched": (values(2, 3, 9, 5).mT, -1, "hbfp4b16", 0, 0, values(2, 3, 7, 9), -1, "hbfp4b16", 3, 2**62, 0, None),
    "expanded": (values(4, 9).expand(2, 4, 9), -2, "hbfp4b16", 3, 0, values(2, 4, 6), -2, "hbfp8b16", 0, 0, 1, None),
    "many rows": (values(2, 3, 9), -1, "hbfp4t4", 0, 0, values(9, 5), -2, "hbfp4t4", 0, 0, 0, values(5)),
    "half": (values(3, 9).bfloat16(), -1, "hbfp4tensor", 0, 0, values(5, 9).double(), -1, "hbfp4tensor", 0, 0, 0, None),
    "gradients": (values(5, 9).requires_grad_(), -1, "hbfp4b64", 0, 0, values(5, 9), -1, "hbfp4b64", 0, 0, 0, None),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered.*:UserWarning")
def test_opcheck_of_products(name):
    torch.library.opcheck(torch.ops.hbfp.product.default, STRIDED[name])


def test_both_lanes_give_the_same_bits():
    x, w = values(2, 3, 70), values(5, 70, seed=1)
    arguments = (x, -1, w, -1, (hbfp.HBFP4, hbfp.HBFP6), (3, 3), 2**64 - 1, (2**63 + 16, 2**64 - 16), values(5))

    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        dispatched = ops.product(*arguments)
    assert seen == ["hbfp.product.default"]
    assert torch.equal(dispatched, ops.product(*arguments))


def test_streams_in_a_graph_are_the_same_words():
    arguments = (values(5, 70), -1, "hbfp4b64", 3), (values(6, 70), -1, "hbfp6b64", 3)
    left, right = 2**64 - 16, 2**63 + 17
    found = [
        torch.ops.hbfp.product(*arguments[0], words[0], *arguments[1], words[1], -5, None, drawn)
        for words, drawn in (
            ((left - 2**64, right - 2**64), None),
            ((0, 0), [torch.tensor(left - 2**64), torch.tensor(right - 2**64)]),
        )
    ]
    assert torch.equal(*found)


def test_meta_tensors_give_shapes():
    model = torch.nn.Linear(8, 5, device="meta")
    hbfp.convert_(model, "hbfp4")
    out = model(torch.empty(2, 3, 8, device="meta"))
    assert (out.shape, out.device.type) == ((2, 3, 5), "meta")


@pytest.mark.parametrize("recipe", ["hbfp4", "emulator"])
def test_compiled_layers_give_the_same_bits_and_gradients(recipe):
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(70, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))
    hbfp.convert_(model, recipe)
    hbfp.set_step(model, 2**31 + 5)  # a stream whose signed form is negative
    attend = hbfp.nn.DotProductAttention(recipe=recipe).eval()

    def step(x):
        h = model(x)
        return attend(h, h, h, is_causal=True).square().sum()

    def gradients(function):
        x = values(2, 6, 70).requires_grad_()
        model.zero_grad()
        function(x).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    eager = gradients(step)
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_a_negated_view_is_read_with_its_sign():
    z = torch.complex(values(3, 8), values(3, 8, seed=1)).conj()
    assert z.imag.is_neg()
    assert torch.equal(ops.quantize(z.imag, hbfp.HBFP8), ops.quantize(-values(3, 8, seed=1), hbfp.HBFP8))
