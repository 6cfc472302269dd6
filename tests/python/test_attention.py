"""Attention: two integer products around the library's own softmax.

The bugs these hunt: a mask applied before the scale, causality off by one, a gradient through the wrong product.
"""

import math

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
