"""einsum and baddbmm: bit-equal to the matmul that each is brought into the form of.

The bugs these hunt: an index summed twice or not at all, dimensions in another order than asked for, an elementwise
product that hides a contraction on floats in its gradient.
"""

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402
from hbfp.nn import functional  # noqa: E402
from hbfp.policy import stream  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.shape == b.shape and torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


# Equation, shapes, and the same by matmul.
LOWERED = {
    "ik,kj->ij": ([(5, 20), (20, 7)], lambda mm, a, b: mm(a, b)),
    "ki,jk->ji": ([(20, 5), (7, 20)], lambda mm, a, b: mm(a.T, b.T).T),
    "bik,bkj->bij": ([(2, 5, 20), (2, 20, 7)], lambda mm, a, b: mm(a, b)),
    "bhlk,bhsk->bhls": (
        [(2, 3, 4, 20), (2, 3, 5, 20)],
        lambda mm, a, b: mm(a.flatten(0, 1), b.flatten(0, 1).mT).view(2, 3, 4, 5),
    ),
    "blhk,bshk->bhls": (
        [(2, 4, 3, 20), (2, 5, 3, 20)],
        lambda mm, a, b: mm(a.transpose(1, 2).reshape(6, 4, 20), b.permute(0, 2, 3, 1).reshape(6, 20, 5)).view(
            2, 3, 4, 5
        ),
    ),
    "abik,bakj->baij": (
        [(2, 3, 4, 20), (3, 2, 20, 5)],
        lambda mm, a, b: mm(a.transpose(0, 1).flatten(0, 1), b.flatten(0, 1)).view(3, 2, 4, 5),
    ),
    "btk,kd->btd": ([(2, 5, 20), (20, 7)], lambda mm, a, b: mm(a.reshape(10, 20), b).view(2, 5, 7)),
    "abc,bcd->ad": ([(3, 4, 5), (4, 5, 6)], lambda mm, a, b: mm(a.reshape(3, 20), b.reshape(20, 6))),
    "i,i->": ([(20,), (20,)], lambda mm, a, b: mm(a[None], b[:, None])[0, 0]),
    "i,i": ([(20,), (20,)], lambda mm, a, b: mm(a[None], b[:, None])[0, 0]),
    "i,j->ji": ([(5,), (7,)], lambda mm, a, b: mm(a[:, None], b[None]).T),
    "bi,bi->b": ([(3, 20), (3, 20)], lambda mm, a, b: mm(a[:, None], b[:, :, None])[:, 0, 0]),
    "...ik,...kj": (
        [(2, 3, 5, 20), (2, 3, 20, 7)],
        lambda mm, a, b: mm(a.flatten(0, 1), b.flatten(0, 1)).view(2, 3, 5, 7),
    ),
    "...k,kj->...j": ([(2, 5, 20), (20, 7)], lambda mm, a, b: mm(a.reshape(10, 20), b).view(2, 5, 7)),
    "ii,ij->ij": ([(6, 6), (6, 7)], lambda mm, a, b: mm(a.diagonal()[:, None, None], b[:, None])[:, 0]),
    "ijk,jl->il": ([(3, 4, 5), (4, 7)], lambda mm, a, b: mm(a.sum(2), b)),
    "bik,bkj->ij": (
        [(2, 5, 20), (2, 20, 7)],
        lambda mm, a, b: mm(a.transpose(0, 1).reshape(5, 40), b.reshape(40, 7)),
    ),
    "Ba, aB -> Ba": ([(3, 4), (4, 3)], None),
}


@pytest.mark.parametrize("equation", LOWERED)
@pytest.mark.parametrize("recipe", ["emulator", "hbfp4"])
def test_two_operands_are_a_matmul(equation, recipe):
    shapes, lowered = LOWERED[equation]
    a, b = (values(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    keywords = {"recipe": recipe, "seed": 11, "stream": stream(5, 3)}
    found = functional.einsum(equation, a, b, **keywords)
    if lowered is None:  # nothing is summed, forward or backward
        expected = torch.einsum(equation, a, b)
    else:
        expected = lowered(lambda x, y: functional.matmul(x, y, **keywords), a, b)
    assert same(found, expected)
    dy = values(*found.shape, seed=8)
    ours, theirs = (torch.autograd.grad(y, (a, b), dy) for y in (found, expected))
    assert all(same(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        *((equation, shapes) for equation, (shapes, _) in LOWERED.items()),
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 6)]),
        ("bi,bj,bk->bijk", [(2, 3), (2, 4), (2, 5)]),
        ("ij,ij,j->i", [(3, 4), (3, 4), (4,)]),
        ("ii->i", [(4, 4)]),
        ("ij->", [(4, 5)]),
        ("iji->j", [(4, 5, 4)]),
        ("b...->...b", [(2, 3, 4)]),
        ("ik,jk->ij", [(5, 20), (7, 1)]),
        ("...ij,...jk->...ik", [(2, 1, 3, 4), (5, 4, 6)]),
        ("ij,ij->ij", [(3, 1), (3, 4)]),
    ],
)
def test_means_what_torchs_means(equation, shapes):
    tensors = [values(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    found = functional.einsum(equation, *tensors, recipe="hbfp16b64")
    expected = torch.einsum(equation, *tensors)
    pairs = [(found, expected)]
    dy = values(*found.shape, seed=8)
    pairs += zip(*(torch.autograd.grad(y, tensors, dy) for y in (found, expected)), strict=True)
    for a, b in pairs:
        # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


def test_further_operands_take_further_indices():
    a, b, c = values(3, 20), values(20, 20, seed=1), values(20, 6, seed=2)
    keywords = {"recipe": "emulator", "seed": 11}
    found = functional.einsum("ij,jk,kl->il", a, b, c, **keywords, stream=stream(5, 3, 255))
    first = functional.matmul(a, b, **keywords, stream=stream(5, 3, 255))
    assert same(found, functional.matmul(first, c, **keywords, stream=stream(5, 3, 0)))


def test_no_product_runs_on_floats():
    """An outer product sums nothing, but its gradients do."""
    from torch.utils.flop_counter import FlopCounterMode

    for equation, shapes in (("i,j->ij", [(5,), (7,)]), ("bij,bj->bi", [(2, 3, 4), (2, 4)])):
        tensors = [values(*shape).requires_grad_() for shape in shapes]
        seen = []
        ops.recorders.append(lambda product, seen=seen: seen.append(product.name))
        try:
            with FlopCounterMode(display=False) as counter:
                functional.einsum(equation, *tensors, recipe="hbfp4").sum().backward()
        finally:
            ops.recorders.clear()
        assert seen == ["forward", "input gradient", "weight gradient"]
        assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("equation", "shapes", "text"),
    [
        ("ij,jk->ik", [(3, 4)], "2 operands"),
        ("ij,jk->ik", [(3, 4), (5, 6)], "sizes 4 and 5"),
        ("ij,jk->ii", [(3, 4), (4, 6)], "repeats"),
        ("ij,jk->iz", [(3, 4), (4, 6)], "no operand has"),
        ("ij,jkl->ik", [(3, 4), (4, 6)], "does not describe"),
        ("i2,jk->ik", [(3, 4), (4, 6)], "does not describe"),
        ("ii,ij->ij", [(1, 3), (3, 3)], "repeated in one operand"),
    ],
)
def test_equations_that_do_not_fit_are_named(equation, shapes, text):
    with pytest.raises(hbfp.ShapeError, match=text):
        functional.einsum(equation, *(values(*shape) for shape in shapes), recipe="hbfp4")


def test_integers_are_refused():
    with pytest.raises(hbfp.DTypeError):
        functional.einsum("ij,jk->ik", torch.ones(3, 4, dtype=torch.int32), values(4, 5), recipe="hbfp4")


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("shape", [(2, 5, 7), (7,), (5, 1)])
def test_baddbmm_is_a_bmm_and_an_addition(beta, alpha, shape):
    c = torch.full(shape, torch.nan) if beta == 0.0 else values(*shape)
    a, b = values(2, 5, 20, seed=1).requires_grad_(), values(2, 20, 7, seed=2).requires_grad_()
    keywords = {"recipe": "emulator", "seed": 11, "stream": stream(5, 3)}
    found = functional.baddbmm(c, a, b, beta=beta, alpha=alpha, **keywords)
    product = functional.bmm(a, b, **keywords)
    expected = product * alpha + (c * beta if beta else 0.0)
    assert same(found, expected)
    dy = values(2, 5, 7, seed=3)
    ours, theirs = (torch.autograd.grad(y, (a, b), dy) for y in (found, expected))
    assert all(same(x, y) for x, y in zip(ours, theirs, strict=True))
    with pytest.raises(hbfp.ShapeError, match="broadcast"):
        functional.baddbmm(values(3, 2, 5, 7), a, b, recipe="hbfp4")
