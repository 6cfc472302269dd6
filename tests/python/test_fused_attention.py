"""Attention without its L x S matrices gives the bits of the definition, which has them in memory.

The bugs these hunt: a format or a stream handed to the wrong product of the core; a mask or a shared head that is read
as another; dropout of other elements backward than forward, or at another place than before encoding; matrices that
are saved or allocated after all; a call that is fused although the core can't compute it.
`tests/attention.rs` hunts those of the core itself.
"""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import _core, autograd, ops  # noqa: E402
from hbfp.nn.functional import scaled_dot_product_attention as attention  # noqa: E402
from hbfp.policy import MatmulPolicy, OperandPolicy, Recipe  # noqa: E402

STREAM = (7 << 32) | (3 << 12)

# Every operand another width and rounding, blocks as unlike as the products allow.
MIXED = Recipe(
    MatmulPolicy(OperandPolicy("hbfp4b16", "stochastic"), OperandPolicy("hbfp6b16-ceil", "nearest_away")),
    MatmulPolicy(OperandPolicy("hbfp8b48", "toward_zero"), OperandPolicy("hbfp5b48", "stochastic")),
    MatmulPolicy(OperandPolicy("hbfp3b20", "stochastic"), OperandPolicy("hbfp7b20-noclip")),
)
RECIPES = {name: name for name in ("hbfp4", "hbfp6", "hbfp8", "emulator")} | {"mixed": MIXED}


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def results(inputs, **arguments):
    """Output and gradients, the loss weighing every element differently."""
    torch.manual_seed(11)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves, seed=5, stream=STREAM, **arguments)
    out.backward(values(*out.shape, seed=9))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.fixture
def fused(monkeypatch):
    """How often the core was asked for attention as a whole."""
    calls = []

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return original(*arguments, **keywords)

    original = ops.attention
    monkeypatch.setattr(ops, "attention", counted)
    return calls


def unfused(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "_fuses", lambda *_: False)
        return function()


def compare(monkeypatch, fused, inputs, **arguments):
    found = results(inputs, **arguments)
    assert len(fused) == 1, "the call was not fused"
    expected = unfused(monkeypatch, lambda: results(inputs, **arguments))
    assert len(fused) == 1
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert same_bits(a, b), name


MASKS = {
    "none": lambda rows, columns: {},
    "causal": lambda rows, columns: {"is_causal": True},
    "boolean": lambda rows, columns: {"attn_mask": values(rows, columns, seed=3) > -0.5},
    "float": lambda rows, columns: {"attn_mask": values(rows, columns, seed=3)},
    "by head": lambda rows, columns: {"attn_mask": values(3, rows, columns, seed=3)},
    "padding": lambda rows, columns: {"attn_mask": (torch.arange(columns) < columns - 3).expand(2, 1, 1, columns)},
    "nothing seen": lambda rows, columns: {"attn_mask": torch.zeros(rows, 1, dtype=torch.bool)},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("rows", "columns"), [(70, 70), (5, 130), (131, 66)])
def test_equals_the_definition(monkeypatch, fused, recipe, mask, rows, columns):
    inputs = values(2, 3, rows, 20), values(2, 3, columns, 20, seed=1), values(2, 3, columns, 33, seed=2)
    compare(monkeypatch, fused, inputs, recipe=RECIPES[recipe], **MASKS[mask](rows, columns))


@pytest.mark.parametrize("recipe", ["hbfp4", "emulator", "mixed"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("rows", "columns", "share"), [(70, 70, 0.1), (5, 130, 0.5), (131, 66, 0.9)])
def test_dropout_equals_the_definition(monkeypatch, fused, recipe, mask, rows, columns, share):
    inputs = values(2, 3, rows, 20), values(2, 3, columns, 20, seed=1), values(2, 3, columns, 33, seed=2)
    compare(monkeypatch, fused, inputs, recipe=RECIPES[recipe], dropout_p=share, **MASKS[mask](rows, columns))


@pytest.mark.parametrize("share", [1.0, 1 - 2**-18, 65535 / 65536, 2**-16])
def test_the_ends_of_dropout_equal_the_definition(monkeypatch, fused, share):
    inputs = [values(2, 90, 20, seed=i) for i in range(3)]
    compare(monkeypatch, fused, inputs, recipe=MIXED, dropout_p=share, is_causal=True)
    if share > 65535.5 / 65536:
        assert all((x == 0).all() for x in results(inputs, recipe=MIXED, dropout_p=share))


@pytest.mark.parametrize("share", [0.0, 2**-18])
def test_no_dropout_draws_nothing(share):
    inputs = [values(2, 20, 8, seed=i) for i in range(3)]
    found = results(inputs, recipe=MIXED, dropout_p=share)
    following = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(following, torch.rand(1))
    expected = results(inputs, recipe=MIXED)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("recipe", ["hbfp4", "mixed"])
@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize(
    "shape",
    [(66, 70), (3, 66, 70), (1, 3, 66, 70), (2, 3, 66, 70), (2, 1, 66, 70), (1, 70), (70,), (2, 1, 1, 70)],
    ids=str,
)
def test_gradients_of_masks_equal_the_definition(monkeypatch, fused, shape, share, recipe):
    def gradients():
        torch.manual_seed(2)
        q, k, v = (values(2, 3, n, 20, seed=i).requires_grad_() for i, n in enumerate((66, 70, 70)))
        mask = values(*shape, seed=4)
        mask = mask.masked_fill_(mask > 1, float("-inf")).requires_grad_()  # zeros of either sign
        out = attention(q, k, v, mask, share, recipe=RECIPES[recipe], seed=5, stream=STREAM)
        out.backward(values(*out.shape, seed=9))
        return [out.detach(), *(x.grad for x in (q, k, v, mask))]

    found = gradients()
    assert len(fused) == 1, "the call was not fused"
    expected = unfused(monkeypatch, gradients)
    assert found[-1].shape == shape
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_one_mask_of_many_heads_is_summed_in_blocks(monkeypatch, fused):
    def gradient():
        mask = values(5, 7).requires_grad_()
        q = values(3, 50, 5, 8)
        attention(q, *values(2, 3, 50, 7, 8, seed=1), mask, recipe="hbfp4").square().sum().backward()
        return mask.grad

    assert same_bits(gradient(), unfused(monkeypatch, gradient))
    assert len(fused) == 1


@pytest.mark.parametrize("mask", ["of each head", "of all heads"])
def test_gradients_of_masks_of_shared_heads_equal_the_definition(monkeypatch, fused, mask):
    shape = (6, 9, 7) if mask == "of each head" else (9, 7)

    def gradients():
        x = [values(2, 6, 9, 8), *values(2, 2, 2, 7, 8, seed=1), values(*shape, seed=3)]
        leaves = [t.requires_grad_() for t in x]
        attention(*leaves, enable_gqa=True, recipe="emulator", stream=STREAM).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    found, expected = gradients(), unfused(monkeypatch, gradients)
    assert len(fused) == 1
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("needs", ["m", "vm", "qm"])
def test_a_mask_has_a_gradient_beside_those_that_are_asked_for(monkeypatch, fused, needs):
    def gradients():
        leaves = [values(2, 70, 16, seed=i).requires_grad_(name in needs) for i, name in enumerate("qkv")]
        mask = values(70, 70, seed=3).bfloat16().requires_grad_()
        seen = []
        ops.recorders.append(seen.append)
        try:
            attention(*leaves, mask, recipe=MIXED, stream=STREAM).sum().backward()
        finally:
            ops.recorders.clear()
        return seen, [x.grad.float() for x in (*leaves, mask) if x.grad is not None]

    (told, found), (expected_told, expected) = gradients(), unfused(monkeypatch, gradients)
    assert len(fused) == 1
    assert told == expected_told
    assert len(found) == len(needs)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(200, 200), (4, 1, 1, 200)], ids=str)
def test_the_gradient_of_a_broadcast_mask_takes_no_memory_of_the_scores(shape):
    q, k, v = (values(4, 6, 200, 8, seed=i).requires_grad_() for i in range(3))
    mask = torch.zeros(shape).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(q, k, v, mask, 0.1, recipe="hbfp4")
    assert max(x.numel() for x in saved) <= max(q.numel(), mask.numel())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out.backward(torch.ones_like(out))
    # An event's memory is what it and those inside it keep: at most all gradients.
    most = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < most <= 4 * (3 * q.numel() + mask.numel()) < 4 * 4 * 6 * 200 * 200


def kept(share, heads=4, rows=512, seed=0):
    """Which elements of [heads, rows, rows] a call keeps: all scores are equal, and V is the identity."""
    torch.manual_seed(seed)
    q = torch.zeros(heads, rows, 8)
    return attention(q, q, torch.eye(rows).expand(heads, rows, rows), dropout_p=share, recipe="hbfp8") != 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_dropout_keeps_its_share_and_elements_are_independent(share):
    mask = kept(share)
    assert torch.equal(mask, kept(share))
    above = torch.ones_like(mask).triu(1)
    others = {
        "the next column": (mask[..., 1:], mask[..., :-1]),
        "eight columns on, the next counter": (mask[..., 8:], mask[..., :-8]),
        "the next row": (mask[:, 1:], mask[:, :-1]),
        "the next head": (mask[1:], mask[:-1]),
        "the transpose": (mask[above], mask.mT[above]),
        "the next call's": (mask, kept(share, seed=1)),
    }
    # Sums of independent draws lie within five standard deviations but once in two million; the seeds are fixed.
    deviation = (share * (1 - share)) ** 0.5
    assert abs(mask.double().mean() - (1 - share)) < 5 * deviation / mask.numel() ** 0.5
    for dim in (-1, -2):
        means = mask.double().mean(dim)
        assert (means - (1 - share)).abs().max() < 5 * deviation / mask.shape[dim] ** 0.5
    for name, (a, b) in others.items():
        product = ((a.double() - (1 - share)) * (b.double() - (1 - share))).mean()
        assert abs(product) < 5 * deviation**2 / a.numel() ** 0.5, name


@pytest.mark.parametrize(
    "shapes",
    [
        ((9, 8), (7, 8), (7, 8)),
        ((2, 3, 9, 8), (7, 8), (3, 7, 8)),
        ((9, 8), (2, 7, 8), (3, 1, 7, 8)),
        ((0, 9, 8), (0, 7, 8), (0, 7, 8)),
        ((2, 1, 8), (2, 1, 8), (2, 1, 1)),
    ],
)
def test_broadcast_batches_equal_the_definition(monkeypatch, fused, shapes):
    compare(monkeypatch, fused, [values(*shape, seed=i) for i, shape in enumerate(shapes)], recipe=MIXED)


def test_operands_that_are_not_contiguous_are_the_same_numbers(monkeypatch, fused):
    # As a projection to all heads of Q, K and V at once gives them.
    q, k, v = values(2, 70, 3, 4, 16).unbind(2)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    out = attention(*views, is_causal=True, recipe=MIXED, stream=STREAM)
    assert same_bits(out, attention(*(x.contiguous() for x in views), is_causal=True, recipe=MIXED, stream=STREAM))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floats_are_cast(dtype):
    inputs = [values(2, 20, 8, seed=i).to(dtype).requires_grad_() for i in range(3)]
    plain = [x.detach().float().requires_grad_() for x in inputs]
    out, expected = (attention(*x, is_causal=True, recipe="hbfp4") for x in (inputs, plain))
    assert same_bits(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert all(same_bits(x.grad.float(), y.grad.to(dtype).float()) for x, y in zip(inputs, plain, strict=True))


@pytest.mark.parametrize("mask", ["none", "causal", "of all heads", "by head", "by batch", "dropout"])
@pytest.mark.parametrize("recipe", ["hbfp4", "emulator"])
def test_shared_heads_equal_repeated_ones(fused, recipe, mask):
    batch, heads, groups, rows, columns = 2, 6, 2, 70, 40
    q = values(batch, heads, rows, 16)
    k, v = values(batch, groups, columns, 16, seed=1), values(batch, groups, columns, 24, seed=2)
    arguments = {
        "causal": {"is_causal": True},
        "of all heads": {"attn_mask": values(rows, columns, seed=3)},
        "by head": {"attn_mask": values(heads, rows, columns, seed=3)},
        "by batch": {"attn_mask": values(batch, 1, 1, columns, seed=3) > 0},
        "dropout": {"is_causal": True, "dropout_p": 0.2},
    }.get(mask, {})
    out, dq, dk, dv = results((q, k, v), enable_gqa=True, recipe=recipe, **arguments)
    repeated = [x.repeat_interleave(heads // groups, -3) for x in (k, v)]
    expected = results((q, *repeated), recipe=recipe, **arguments)
    assert len(fused) == 2
    # The sum over the heads that share, in their order.
    sums = [sum(x.unflatten(1, (groups, -1)).unbind(2), torch.zeros(())) for x in expected[2:]]
    for a, b in zip((out, dq, dk, dv), (*expected[:2], *sums), strict=True):
        assert same_bits(a, b)


def test_shared_heads_are_those_of_torch():
    q, k = values(2, 6, 9, 16), values(2, 2, 9, 16, seed=1)
    ours = attention(q, k, k, enable_gqa=True, recipe="hbfp16b16")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    module = hbfp.nn.DotProductAttention()
    assert torch.equal(module(q, k, k, enable_gqa=True, scale=0.25), theirs)


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        (((2, 6, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8)), None),
        (((2, 6, 9, 8), (2, 2, 9, 8), (2, 3, 9, 8)), None),
        (((9, 8), (9, 8), (9, 8)), None),
        (((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)), (2, 9, 9)),
    ],
)
def test_heads_that_can_not_be_shared_are_refused(shapes, mask):
    q, k, v = (values(*shape) for shape in shapes)
    with pytest.raises(hbfp.ShapeError):
        attention(q, k, v, None if mask is None else torch.ones(mask), enable_gqa=True, recipe="hbfp4")


def test_a_causal_mask_counts_from_the_first_column_as_torchs(monkeypatch, fused):
    for rows, columns in [(5, 9), (9, 5)]:
        inputs = [values(2, n, 8, seed=i) for i, n in enumerate((rows, columns, columns))]
        visible = torch.ones(rows, columns, dtype=torch.bool).tril()
        expected = results(inputs, attn_mask=visible, recipe=MIXED)
        found = results(inputs, is_causal=True, recipe=MIXED)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "kv"])
def test_each_gradient_alone_is_the_same(monkeypatch, needs, share):
    def gradients():
        torch.manual_seed(3)
        q, k, v = (values(2, 70, 16, seed=i).requires_grad_(name in needs) for i, name in enumerate("qkv"))
        attention(q, k, v, None, share, is_causal=True, recipe=MIXED, stream=STREAM).sum().backward()
        return [x.grad for x in (q, k, v) if x.grad is not None]

    found, expected = gradients(), unfused(monkeypatch, gradients)
    assert len(found) == len(needs)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ({"attn_mask": torch.zeros(8, 1, requires_grad=True)}, "hbfp4"),
        ({"attn_mask": torch.zeros((), requires_grad=True)}, "hbfp4"),
        ({}, "hbfp4t8"),
        ({}, "hbfp4tensor"),
        ({}, "hbfp9b64"),
    ],
)
def test_what_the_core_does_not_fuse_goes_by_the_definition(fused, arguments, recipe):
    q, k, v = (values(2, 8, 8, seed=i).requires_grad_() for i in range(3))
    attention(q, k, v, recipe=recipe, **arguments).sum().backward()
    assert not fused
    assert q.grad is not None


@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 8, 0)])
def test_empty_dimensions_go_by_the_definition(fused, shape):
    x = values(*shape)
    assert attention(x, x, x, recipe="hbfp4").shape == shape
    assert not fused


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_nothing_of_the_size_of_the_scores_is_saved_or_allocated(share):
    rows, depth = 700, 16
    q, k, v = (values(1, 2, rows, depth, seed=i).requires_grad_() for i in range(3))
    mask = torch.ones(rows, dtype=torch.bool)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(q, k, v, mask, share, recipe="hbfp4")
    if share > 0.0:
        assert saved.pop().shape == (), "the seed of dropout"
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (q, k, v, mask)}
    # An event's memory is what it and those inside it keep: at most all three gradients.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention(q, k, v, None, share, is_causal=True, recipe="hbfp4")
        out.backward(torch.ones_like(out))
    allocations = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocations) > 0, "the profiler saw no memory"
    assert max(allocations) <= 3 * 4 * 2 * rows * depth < 4 * 2 * rows * rows / 2


def test_the_cores_buffers_are_strips_and_are_reported():
    rows, columns = 64, 6000
    q, k, v = (values(size, 8) for size in (rows, columns, columns))
    held = []

    def measure():
        # On a thread that has no buffers yet, and with nobody to share the strips with.
        torch.set_num_threads(1)
        held.append(hbfp.info()["workspace_bytes"])
        attention(q, k, v, None, 0.1, recipe="hbfp4")
        held.append(hbfp.info()["workspace_bytes"])

    threads = torch.get_num_threads()
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    torch.set_num_threads(threads)
    before, after = held
    assert after - before > 4 * 32 * columns / 2, "the strip of scores is not counted"
    # 32 rows of scores in float32 and as codes, the random bits of 4, and the panels of K and V.
    assert after - before < 8 * 32 * columns + 64 * columns


@pytest.mark.parametrize("lane", ["eager", "dispatch mode"])
def test_recorders_hear_of_the_same_products(monkeypatch, lane):
    from torch.utils.flop_counter import FlopCounterMode

    def recorded():
        seen = []
        ops.recorders.append(seen.append)
        try:
            q, k, v = (values(2, 3, n, 8, seed=n).requires_grad_() for n in (9, 11, 11))
            if lane == "eager":
                attention(q, k, v, is_causal=True, recipe=MIXED).sum().backward()
            else:
                with FlopCounterMode(display=False):
                    attention(q, k, v, is_causal=True, recipe=MIXED).sum().backward()
        finally:
            ops.recorders.clear()
        return seen

    found = recorded()
    assert len(found) == 6
    assert found == unfused(monkeypatch, recorded)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_both_lanes_give_the_same_bits(share):
    inputs = [values(2, 70, 16, seed=i) for i in range(3)]
    expected = results(inputs, attn_mask=values(70, 70), dropout_p=share, recipe=MIXED)

    class Lane(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen += (str(function),)
            return function(*arguments, **(keywords or {}))

    with Lane() as lane:
        found = results(inputs, attn_mask=values(70, 70), dropout_p=share, recipe=MIXED)
    assert {"hbfp.attention.default", "hbfp.attention_backward.default"} <= set(lane.seen)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


ARGUMENTS = (True, 0.3, ["hbfp4b16", "hbfp6b16"], [3, 0], [2**62, -1, 0, 1], -5)
PAIRS = (True, 0.3, ["hbfp4b16", "hbfp6b16"] * 3, [3, 0] * 3, [-1] * 10, 7)


DROPOUT = (None, 9000, torch.tensor(2**60 + 12345))


@pytest.mark.parametrize("operator", ["attention", "attention_backward", "attention_backward of q and v"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered.*:UserWarning")
def test_opcheck(operator):
    q, k, v, do = (values(2, 9, n, seed=n) for n in (8, 8, 5, 5))
    if operator == "attention":
        torch.library.opcheck(torch.ops.hbfp.attention.default, (q, k, v, values(2, 9, 9), *ARGUMENTS, *DROPOUT))
    else:
        needs = [True, "of q" not in operator, True]
        arguments = (do, q, k, v, None, *PAIRS, needs, *DROPOUT)
        torch.library.opcheck(torch.ops.hbfp.attention_backward.default, arguments)


def test_a_second_derivative_is_refused():
    q = values(2, 9, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, q, q, recipe="hbfp4").square().sum(), q, create_graph=True)
    with pytest.raises(hbfp.HBFPError, match="differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads, share):
    before = torch.get_num_threads()
    for shape in [(1, 130, 16), (5, 66, 16)]:
        inputs = [values(*shape, seed=i) for i in range(3)]
        try:
            torch.set_num_threads(1)
            expected = results(inputs, dropout_p=share, is_causal=True, recipe="emulator")
            torch.set_num_threads(threads)
            found = results(inputs, dropout_p=share, is_causal=True, recipe="emulator")
        finally:
            torch.set_num_threads(before)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_formats_that_the_kernels_cannot_encode_are_not_fused():
    # A narrow exponent needs values clamped before they are rounded: the fused core refuses it, and so must the choice.
    q = 1000 * values(1, 2, 8, 16)
    narrow = Recipe(*(MatmulPolicy(OperandPolicy("hbfp4b64-e3"), OperandPolicy("hbfp4b64-e3")) for _ in range(3)))
    assert not autograd._fuses(q, q, q, None, narrow)
    assert attention(q, q, q, recipe=narrow).isfinite().all()


def test_results_of_the_core_that_overlap_are_refused():
    """Two threads, or one of the compiler's assumptions, would write to one place as if it were two."""
    x, memory = values(2, 9, 8), torch.zeros(300)
    coding = [(hbfp.HBFP4.core, 0, 0)] * 2
    same, other = memory[:144].view(2, 9, 8), memory[143:287].view(2, 9, 8)
    call = x, x, x, None, True, 0.3, None, coding, 0
    for gradients in ((same, same, None), (same, None, other), (None, other, same)):
        with pytest.raises(hbfp.ShapeError, match="overlap"):
            _core.attention_backward(call, x, [coding] * 4, gradients, 1)
    mask = memory[:162].view(2, 9, 9)
    with pytest.raises(hbfp.ShapeError, match="overlap"):
        _core.attention_mask_gradient((x, x, x, mask, False, 0.3, None, coding, 0), x, coding, mask, False, 1)
    assert not memory.any()
