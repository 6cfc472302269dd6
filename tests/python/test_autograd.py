"""Products in autograd: bit-equal to the three products of the exact oracle, and no more of them than asked for.

The bugs these hunt: an operand encoded along the wrong reduction, a random stream used twice, a gradient nobody asked
for, bits that depend on threads or on recomputation.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops, reference  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import MatmulPolicy, OperandPolicy, Recipe, stream  # noqa: E402

STOCHASTIC = hbfp.Rounding.STOCHASTIC


def bits(x):
    return np.from_dlpack(x.detach().contiguous()).view(np.uint32)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("recipe", ["hbfp4", "hbfp6", "emulator"])
@pytest.mark.parametrize("shape", [((7,), 5, 3), ((2, 9), 70, 33), ((66,), 16, 20), ((1, 1), 1, 1)])
def test_linear_equals_the_oracle(recipe, shape):
    batch, inputs, outputs = shape
    x, w, bias = values(*batch, inputs), values(outputs, inputs, seed=1), values(outputs, seed=2)
    dy = values(*batch, outputs, seed=3)
    for t in (x, w, bias):
        t.requires_grad_()
    chosen = hbfp.recipe(recipe)
    y = functional.linear(x, w, bias, recipe=chosen, seed=11, stream=stream(5, 3))
    y.backward(dy)
    policies = [p for policy in chosen.products.values() for p in (policy.left, policy.right)]
    arrays = [np.from_dlpack(t.detach()) for t in (x, w, dy, bias)]
    expected = reference.linear_step(
        *arrays[:3],
        [p.format for p in policies],
        [p.rounding.value for p in policies],
        bias=arrays[3],
        seed=11,
        step=5,
        site=3,
    )
    for ours, theirs in ((y, expected.y), (x.grad, expected.dx), (w.grad, expected.dw), (bias.grad, expected.db)):
        assert np.array_equal(bits(ours), theirs.view(np.uint32))


def test_operands_that_are_not_contiguous_are_the_same_numbers():
    x, w = values(20, 12).t(), values(12, 40, seed=1)[:, ::2]
    plain = functional.linear(x.contiguous(), w.contiguous(), recipe="hbfp4")
    assert torch.equal(functional.linear(x, w, recipe="hbfp4"), plain)


@pytest.mark.parametrize("shapes", [((5, 20), (20, 7)), ((2, 3, 5, 20), (2, 3, 20, 7)), ((4, 5, 20), (20, 7))])
def test_matmul_equals_the_oracle(shapes):
    a, b = values(*shapes[0]).requires_grad_(), values(*shapes[1], seed=1).requires_grad_()
    c = functional.matmul(a, b, recipe="hbfp4")
    fmt = hbfp.HBFP4
    left, right = np.from_dlpack(a.detach()), np.from_dlpack(b.detach())
    assert np.array_equal(bits(c), hbfp.matmul(left, right, format=fmt).view(np.uint32))
    if a.dim() == b.dim():
        expected = reference.matmul(reference.encode(left, fmt, -1), reference.encode(right, fmt, -2))
        assert np.array_equal(bits(c), expected.view(np.uint32))
    # Gradients with nearest rounding, against the products written out.
    nearest = OperandPolicy(fmt)
    recipe = Recipe(*(MatmulPolicy(nearest, nearest) for _ in range(3)))
    dc = values(*c.shape, seed=2)
    functional.matmul(a, b, recipe=recipe).backward(dc)
    grad = np.from_dlpack(dc)
    da = hbfp.matmul(grad, np.swapaxes(right, -1, -2), format=fmt)
    assert np.array_equal(bits(a.grad), da.view(np.uint32))
    flat = a.dim() > b.dim()
    rows, grads = (left.reshape(-1, 20), grad.reshape(-1, 7)) if flat else (left, grad)
    db = hbfp.matmul(np.swapaxes(rows, -1, -2), grads, format=fmt)
    assert np.array_equal(bits(b.grad), db.view(np.uint32))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False), (True, True)])
def test_backward_computes_only_what_is_asked_for(needs):
    x, w = values(6, 8).requires_grad_(needs[0]), values(4, 8, seed=1).requires_grad_(needs[1])
    bias = values(4).requires_grad_()
    seen = []
    ops.recorders.append(lambda product: seen.append(product.name))
    try:
        functional.linear(x, w, bias, recipe="hbfp4").sum().backward()
    finally:
        ops.recorders.clear()
    assert seen == ["forward"] + ["input gradient"] * needs[0] + ["weight gradient"] * needs[1]
    assert (x.grad is not None, w.grad is not None) == needs


def test_double_backward_is_refused():
    x, w = values(6, 8).requires_grad_(), values(4, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(functional.linear(x, w, recipe="hbfp4").square().sum(), x, create_graph=True)
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_integers_and_complex_numbers_are_refused(dtype):
    with pytest.raises(hbfp.DTypeError):
        functional.linear(torch.ones(2, 8, dtype=dtype), values(4, 8), recipe="hbfp4")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()

    def step():
        x, w = values(300, 256).requires_grad_(), values(200, 256, seed=1).requires_grad_()
        y = functional.linear(x, w, recipe="emulator", seed=3, stream=stream(1, 2))
        y.square().sum().backward()
        return [bits(t) for t in (y, x.grad, w.grad)]

    torch.set_num_threads(1)
    expected = step()
    torch.set_num_threads(threads)
    found = step()
    torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_bits(reentrant):
    from torch.utils.checkpoint import checkpoint

    def gradients(recompute):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        hbfp.convert_(model, "emulator", example_inputs=values(2, 40))
        x = values(32, 40).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        return [bits(p.grad) for p in (x, *model.parameters())]

    assert all(np.array_equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_each_training_forward_draws_new_bits_and_a_set_step_repeats_them():
    model = torch.nn.Linear(64, 64)
    hbfp.convert_(model, "emulator")
    x = values(16, 64)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    hbfp.set_step(model, 7)
    repeated = [model(x) for _ in range(2)]
    assert torch.equal(*repeated)


def test_the_reference_backend_gives_the_same_bits():
    from dataclasses import replace

    def step(backend):
        x, w, b = values(2, 5, 20).requires_grad_(), values(7, 20, seed=1).requires_grad_(), values(7).requires_grad_()
        recipe = replace(hbfp.recipe("emulator"), backend=backend)
        functional.linear(x, w, b, recipe=recipe, seed=3, stream=stream(1, 2)).square().sum().backward()
        return [bits(t.grad) for t in (x, w, b)]

    assert all(np.array_equal(a, b) for a, b in zip(step("integer"), step("reference"), strict=True))


@pytest.mark.parametrize(
    "shapes", [((5, 20), (2, 3, 20, 7)), ((2, 1, 5, 20), (3, 20, 7)), ((20,), (20, 7)), ((20,), (20,))]
)
def test_matmul_broadcasts_as_torchs(shapes):
    a, b = (values(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    functional.matmul(a, b, recipe="hbfp16b64").sin().sum().backward()
    ours = a.grad, b.grad
    a.grad = b.grad = None
    torch.matmul(a, b).sin().sum().backward()
    for found, expected in zip(ours, (a.grad, b.grad), strict=True):
        # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_cast_and_their_gradients_cast_back(dtype):
    x, w = values(3, 8).to(dtype).requires_grad_(), values(4, 8, seed=1).to(dtype).requires_grad_()
    y = functional.linear(x, w, recipe="hbfp8")
    assert torch.equal(y, functional.linear(x.float(), w.float(), recipe="hbfp8"))
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.float32, dtype, dtype)


def test_results_are_no_views_and_may_be_changed_in_place():
    """A view made inside a custom function must not be changed in place, and ReLU(inplace=True) does."""
    w = values(4, 8).requires_grad_()
    y = functional.linear(values(2, 3, 8), w, recipe="hbfp8")
    assert not y._is_view()
    torch.relu_(y).sum().backward()


@pytest.mark.parametrize("batch", [(0,), (), (2, 0)])
def test_empty_batches_and_single_vectors(batch):
    x, w, b = values(*batch, 8).requires_grad_(), values(4, 8).requires_grad_(), values(4).requires_grad_()
    y = functional.linear(x, w, b, recipe="hbfp8")
    assert y.shape == (*batch, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if 0 in batch:
        assert not w.grad.any()
        assert not b.grad.any()


def test_a_frozen_weight_keeps_no_activations():
    x, w = values(3, 8).requires_grad_(), values(4, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        functional.linear(x, w, recipe="hbfp8").sum()
    assert kept == [(4, 8)]


FORKED = """
import os, signal
import numpy as np
import torch
torch.set_num_threads(2)
torch.mm(torch.randn(800, 800), torch.randn(800, 800))  # torch's threads exist, hbfp has used none yet
import hbfp.nn.functional
x, w = torch.ones(512, 1024), torch.ones(512, 1024)
child = os.fork()
if child == 0:
    signal.alarm(30)
    y = hbfp.nn.functional.linear(x, w, recipe="hbfp4")
    os._exit(0 if (np.from_dlpack(y) == 1024).all() else 1)  # by numpy: torch's own threads do hang here
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    """The first product in a child, after torch's OpenMP threads were started in the parent, hung."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
