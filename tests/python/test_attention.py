"""Attention: two integer products around the library's own softmax.

The bugs these hunt: a mask applied before the scale, causality off by one, a gradient through the wrong product.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops, reference  # noqa: E402
from hbfp.nn.functional import scaled_dot_product_attention as attention  # noqa: E402
from hbfp.policy import MatmulPolicy, OperandPolicy, Recipe  # noqa: E402

NEAREST = Recipe(*(MatmulPolicy(OperandPolicy(hbfp.HBFP6), OperandPolicy(hbfp.HBFP6)) for _ in range(3)))


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(a, a_axis, b, b_axis):
    """[.., M, N] by the oracle, both operands reduced along the axes given."""
    a, b = (np.from_dlpack(t.detach().contiguous()) for t in (a, b))
    left = reference.encode(a, hbfp.HBFP6, a_axis)
    right = reference.encode(b, hbfp.HBFP6, b_axis)
    left = left if a_axis == -1 else left.mT
    right = right if b_axis == -2 else right.mT
    return torch.from_numpy(reference.matmul(left, right).copy())


@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward_equal_the_products_of_the_oracle(causal):
    q, k, v = (values(2, 5, 12, seed=i).requires_grad_() for i in range(3))
    out = attention(q, k, v, is_causal=causal, recipe=NEAREST)
    scale = 1.0 / math.sqrt(12)
    p = ops.softmax(product(q, -1, k, -1), scale, causal)
    assert torch.equal(out, product(p, -1, v, -2))
    do = values(*out.shape, seed=9)
    out.backward(do)
    ds = ops.softmax_backward(p, product(do, -1, v, -1), scale)
    assert torch.equal(v.grad, product(p, -2, do, -2))
    assert torch.equal(q.grad, product(ds, -1, k, -2))
    assert torch.equal(k.grad, product(ds, -2, q, -2))


@pytest.mark.parametrize("shape", [((2, 3, 7, 16), (2, 3, 11, 16)), ((9, 16), (9, 16))])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_wide_formats_agree_with_torch(shape, kind):
    q, k, v = values(*shape[0]), values(*shape[1], seed=1), values(*shape[1], seed=2)
    rows, columns = q.shape[-2], k.shape[-2]
    mask = {
        "bool": torch.ones(rows, columns, dtype=torch.bool).tril(2),
        "float": values(rows, columns, seed=3),
    }.get(kind)
    ours = attention(q, k, v, mask, is_causal=kind == "causal", recipe="hbfp16b16")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")
    # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_a_row_that_sees_nothing_is_zero():
    q = values(3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    out = attention(q, q, q, mask, recipe="hbfp8")
    assert torch.equal(out[1], torch.zeros(8))


def test_softmax_is_within_two_units_in_the_last_place():
    x = np.array([0.0, -1.0, -2.5, 0.5])
    found = np.from_dlpack(ops.softmax(torch.tensor(x[None], dtype=torch.float32), 1.0)).view(np.uint32).ravel()
    exact = (np.exp(x) / np.exp(x).sum()).astype(np.float32).view(np.uint32)
    assert np.all(np.abs(found.astype(np.int64) - exact.astype(np.int64)) <= 2)


STREAMS = {
    "q": 6,
    "k": 7,
    "p": 8,
    "v": 9,
    "do for dp": 10,
    "do for dv": 11,
    "ds for dq": 12,
    "ds for dk": 13,
    "p for dv": 14,
}
"""Operand roles, FORMAT section 6; 15 is for Q, K and V in the backward pass."""


def test_every_operand_draws_from_the_stream_of_its_role():
    policy = MatmulPolicy(OperandPolicy(hbfp.HBFP4, "stochastic"), OperandPolicy(hbfp.HBFP4, "stochastic"))
    recipe = Recipe(policy, policy, policy)
    base, seed = (7 << 32) | (3 << 12), 5

    def stochastic(a, a_axis, a_role, b, b_axis, b_role):
        left, right = (
            reference.encode(np.from_dlpack(t.detach().contiguous()), hbfp.HBFP4, axis, "stochastic", seed, base | role)
            for t, axis, role in ((a, a_axis, a_role), (b, b_axis, b_role))
        )
        left, right = left if a_axis == -1 else left.mT, right if b_axis == -2 else right.mT
        return torch.from_numpy(reference.matmul(left, right).copy())

    q, k, v = (values(2, 5, 12, seed=i).requires_grad_() for i in range(3))
    out = attention(q, k, v, recipe=recipe, seed=seed, stream=base)
    do = values(*out.shape, seed=9)
    out.backward(do)
    p = ops.softmax(stochastic(q, -1, STREAMS["q"], k, -1, STREAMS["k"]), 1 / math.sqrt(12))
    assert torch.equal(out, stochastic(p, -1, STREAMS["p"], v, -2, STREAMS["v"]))
    dp = stochastic(do, -1, STREAMS["do for dp"], v, -1, 15)
    ds = ops.softmax_backward(p, dp, 1 / math.sqrt(12))
    assert torch.equal(v.grad, stochastic(p, -2, STREAMS["p for dv"], do, -2, STREAMS["do for dv"]))
    assert torch.equal(q.grad, stochastic(ds, -1, STREAMS["ds for dq"], k, -2, 15))
    assert torch.equal(k.grad, stochastic(ds, -2, STREAMS["ds for dk"], q, -2, 15))


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        ("q", ["gradient of P", "gradient of Q"]),
        ("k", ["gradient of P", "gradient of K"]),
        ("v", ["gradient of V"]),
        ("m", ["gradient of P"]),
        ("qkvm", ["gradient of V", "gradient of P", "gradient of Q", "gradient of K"]),
    ],
)
def test_backward_computes_only_what_is_asked_for(needs, products):
    q, k, v, mask = (values(2, 5, 5, seed=i).requires_grad_(name in needs) for i, name in enumerate("qkvm"))
    seen = []
    ops.recorders.append(lambda product: seen.append(product.name))
    try:
        attention(q, k, v, mask, recipe="hbfp4").sum().backward()
    finally:
        ops.recorders.clear()
    assert seen == ["scores", "context", *products]
    assert [t.grad is not None for t in (q, k, v, mask)] == [name in needs for name in "qkvm"]


@pytest.mark.parametrize("backend", ["integer", "reference"])
@pytest.mark.parametrize("share", [0.25, 0.1, 0.9])
def test_dropout_is_that_of_the_oracle_by_a_seed_of_torchs_generator(share, backend):
    q, k, v = (values(4, 6, 8, seed=i).requires_grad_() for i in range(3))
    torch.manual_seed(1)
    torch.rand(3)
    out = attention(q, k, v, dropout_p=share, recipe=replace(NEAREST, backend=backend))
    following = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(3)
    word = torch.empty((), dtype=torch.int64).random_().item()
    assert torch.equal(following, torch.rand(1)), "one draw a call"

    def dropped(x):
        return torch.from_numpy(reference.dropout(np.from_dlpack(x), share, word))

    scale = 1 / math.sqrt(8)
    p = ops.softmax(product(q, -1, k, -1), scale)
    assert torch.equal(out, product(dropped(p), -1, v, -2))
    do = values(*out.shape, seed=3)
    out.backward(do)
    ds = ops.softmax_backward(p, dropped(product(do, -1, v, -1)), scale)
    assert torch.equal(v.grad, product(dropped(p), -2, do, -2))
    assert torch.equal(q.grad, product(ds, -1, k, -2))
    assert torch.equal(k.grad, product(ds, -2, q, -2))


def test_the_gradient_with_dropout_is_that_of_torchs_operations():
    """A factor left out of the gradient of P; by wide formats, and torch's derivative of the same mask."""
    q, k, v = (values(2, 9, 8, seed=i) for i in range(3))
    torch.manual_seed(5)
    word = torch.empty((), dtype=torch.int64).random_()
    factor = ops.dropout(torch.ones(2, 9, 9), round(0.3 * 2**16), word)
    assert set(factor.unique().tolist()) == {0.0, float(np.float32(2**16 / (2**16 - round(0.3 * 2**16))))}

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        function(*leaves).sin().sum().backward()
        return [x.grad for x in leaves]

    torch.manual_seed(5)
    ours = gradients(lambda *x: attention(*x, dropout_p=0.3, recipe="hbfp16b64"))
    theirs = gradients(lambda q, k, v: (q @ k.mT / math.sqrt(8)).softmax(-1) * factor @ v)
    for a, b in zip(ours, theirs, strict=True):
        # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_learned_masks_and_broadcast_heads_get_torchs_gradients():
    q, k = values(2, 4, 5, 8), values(2, 1, 5, 8, seed=1)
    mask = values(4, 5, 5, seed=2)

    def gradients(function):
        inputs = [t.clone().requires_grad_() for t in (q, k, mask)]
        function(inputs[0], inputs[1], inputs[1], inputs[2]).sin().sum().backward()
        return [t.grad for t in inputs]

    ours = gradients(lambda *arguments: attention(*arguments, recipe="hbfp16b64"))
    theirs = gradients(torch.nn.functional.scaled_dot_product_attention)
    for a, b in zip(ours, theirs, strict=True):
        # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True},
        {"dropout_p": 1.5},
        {"dropout_p": -0.1},
        {"dropout_p": float("nan")},
        {"attn_mask": torch.ones(4, 5)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.int32)},
        {"stream": 3},
        {"seed": -1},
    ],
)
def test_what_does_not_fit_is_refused(arguments):
    q = values(2, 5, 8)
    with pytest.raises(hbfp.HBFPError):
        attention(q, q, q, recipe="hbfp4", **arguments)


@pytest.mark.parametrize("columns", [1, 5, 16, 17, 40])
def test_softmax_and_its_derivative_equal_the_oracle(columns):
    """A level, a sum order or an exponential of its own: clause 6.13 of the specification by exact arithmetic."""
    scores = values(4, columns, seed=columns) * torch.tensor([[0.1], [3.0], [40.0], [1.0]])
    scores[3, columns // 2 :] = float("-inf")
    p = ops.softmax(scores, 0.7)
    expected = reference.softmax(np.from_dlpack(scores), 0.7)
    assert np.array_equal(np.from_dlpack(p).view(np.uint32), expected.view(np.uint32))
    dp = values(4, columns, seed=columns + 1)
    ds = np.from_dlpack(ops.softmax_backward(p, dp, 0.7))
    expected = reference.softmax_backward(np.from_dlpack(p), np.from_dlpack(dp), 0.7)
    assert np.array_equal(ds.view(np.uint32), expected.view(np.uint32))


def test_softmax_of_what_is_not_finite():
    scores = torch.tensor([[float("-inf")] * 3, [0.0, float("inf"), 1.0], [0.0, float("nan"), 1.0]])
    expected = reference.softmax(np.from_dlpack(scores))
    assert np.array_equal(np.from_dlpack(ops.softmax(scores, 1.0)).view(np.uint32), expected.view(np.uint32))
