"""Multi-head attention: bit-equal to linear layers and attention put together by hand, forward and backward.

The bugs these hunt: a fused path that goes around the products, a mask read the wrong way round, heads cut along the
wrong dimension, weights asked for that change the output, a projection that shares another's random bits.
"""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402
from hbfp import autograd, ops  # noqa: E402
from hbfp.policy import stream  # noqa: E402

SEED, STEP, WIDTH, HEADS = 11, 5, 24, 3


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.shape == b.shape and torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def converted(recipe="emulator", **keywords):
    torch.manual_seed(1)
    model = nn.MultiheadAttention(WIDTH, HEADS, **keywords)
    for parameter in model.parameters():
        parameter.data.copy_(values(*parameter.shape, seed=parameter.numel()) / 4)  # no bias is 0
    hbfp.convert_(model, recipe, seed=SEED)
    hbfp.set_step(model, STEP)
    return model


def by_definition(model, query, key, value, mask=None, causal=False):
    """The output, by the clause on multi-head attention. Inputs lie as the layer's, or without a batch; mask: added."""
    recipe = model.hbfp_state.recipe
    width, bias = model.embed_dim, model.in_proj_bias

    def linear(x, w, b, site):
        return autograd.linear(x, w, b, recipe, SEED, stream(STEP, site))

    parts = [None] * 3 if bias is None else bias.split(width)
    if model.in_proj_weight is None:
        weights = model.q_proj_weight, model.k_proj_weight, model.v_proj_weight
        q, k, v = (
            linear(x, w, b, i) for i, (x, w, b) in enumerate(zip((query, key, value), weights, parts, strict=True))
        )
    elif query is key and key is value:
        q, k, v = linear(query, model.in_proj_weight, bias, 0).split(width, -1)
    elif key is value:
        first, rest = model.in_proj_weight.split((width, 2 * width))
        q = linear(query, first, parts[0], 0)
        k, v = linear(key, rest, None if bias is None else bias[width:], 1).split(width, -1)
    else:
        weights = model.in_proj_weight.split(width)
        q, k, v = (
            linear(x, w, b, i) for i, (x, w, b) in enumerate(zip((query, key, value), weights, parts, strict=True))
        )

    batched = query.dim() == 3
    batch_first = [x if not batched else x if model.batch_first else x.transpose(0, 1) for x in (q, k, v)]
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for x in batch_first)
    q, k, v = (x if batched else x.unsqueeze(0) for x in (q, k, v))
    if model.bias_k is not None:
        rows = [b.view(1, HEADS, 1, -1).expand(q.shape[0], -1, -1, -1) for b in (model.bias_k, model.bias_v)]
        k, v = (torch.cat((x, row), 2) for x, row in zip((k, v), rows, strict=True))
    if model.add_zero_attn:
        k, v = (torch.cat((x, torch.zeros_like(x[:, :, :1])), 2) for x in (k, v))
    out = autograd.attention(q, k, v, mask, 0.0, causal, None, recipe, SEED, stream(STEP, 3))
    out = out.transpose(1, 2).flatten(2)
    out = out if not batched or model.batch_first else out.transpose(0, 1)
    out = out if batched else out.squeeze(0)
    return linear(out, model.out_proj.weight, model.out_proj.bias, 4)


def inputs(model, batched=True, kind="self"):
    shapes = ((2, 6), (2, 7)) if model.batch_first else ((6, 2), (7, 2))
    shapes = shapes if batched else ((6,), (7,))
    query = values(*shapes[0], WIDTH).requires_grad_()
    if kind == "self":
        return query, query, query
    key = values(*shapes[1], model.kdim, seed=1).requires_grad_()
    if kind == "cross":
        return query, key, key
    return query, key, values(*shapes[1], model.vdim, seed=2).requires_grad_()


def check(model, found, leaves, *arguments, **keywords):
    """Output and every gradient against the definition's."""
    dy = values(*found.shape, seed=8)
    tensors = [*{id(x): x for x in (*leaves, *model.parameters())}.values()]
    gradients = torch.autograd.grad(found, tensors, dy, allow_unused=True)
    expected = by_definition(model, *leaves, *arguments, **keywords)
    assert same(found, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, tensors, dy, allow_unused=True), strict=True):
        assert same(a, b)


VARIANTS = {
    "plain": {},
    "batch first, no bias": {"batch_first": True, "bias": False},
    "other widths": {"kdim": 10, "vdim": 13},
    "bias rows and a zero row": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_the_definition(variant, kind, batched, need_weights):
    if variant == "other widths" and kind != "three":
        kind = "three"
    model = converted(**VARIANTS[variant])
    q, k, v = inputs(model, batched, kind)
    out, weights = model(q, k, v, need_weights=need_weights)
    assert (weights is not None) == need_weights
    check(model, out, (q, k, v))


@pytest.mark.parametrize("recipe", ["hbfp4", "booster", "hbfp6b16", "hbfp4t4"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_other_recipes_equal_the_definition(recipe, need_weights):
    model = converted(recipe, batch_first=True)
    q, k, v = inputs(model)
    check(model, model(q, k, v, need_weights=need_weights)[0], (q, k, v))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extended", [True, False])
def test_masks_are_torchs(need_weights, extended):
    """True in a boolean mask hides an element here, and shows it in `scaled_dot_product_attention`."""
    keywords = {"add_bias_kv": True, "add_zero_attn": True} if extended else {}
    model = converted("hbfp8", batch_first=True, **keywords)
    q, k, v = inputs(model, kind="cross")
    hidden = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    per_head = torch.rand(2 * HEADS, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    cases = [
        {"attn_mask": hidden},
        {"attn_mask": per_head},
        {"key_padding_mask": padding},
        {"attn_mask": hidden, "key_padding_mask": padding},
        {"attn_mask": values(6, 7, seed=4)},
    ]
    for masks in cases:
        total = torch.zeros(2, HEADS, 6, 7)
        for name, mask in masks.items():
            added = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
            shape = {2: (1, 1, 6, 7), 3: (2, HEADS, 6, 7)}[mask.dim()] if name == "attn_mask" else (2, 1, 1, 7)
            total = total + added.view(shape)
        out = model(q, k, v, need_weights=need_weights, **masks)[0]
        check(model, out, (q, k, v), nn.functional.pad(total, (0, 2 * extended)))


def test_a_causal_hint_gives_the_bits_of_its_mask():
    model = converted("hbfp4", batch_first=True)
    q, k, v = inputs(model)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    expected = model(q, k, v, attn_mask=mask, need_weights=False)[0]
    assert same(model(q, k, v, attn_mask=mask, need_weights=False, is_causal=True)[0], expected)
    assert same(model(q, k, v, attn_mask=mask, is_causal=True)[0], expected)
    check(model, expected, (q, k, v), causal=True)
    with pytest.raises(hbfp.HBFPError, match="needs it"):
        model(q, k, v, is_causal=True)


def test_weights_are_the_softmax_and_carry_gradients():
    model = converted("hbfp16b64", batch_first=True)
    q, k, v = inputs(model)
    plain = copy.deepcopy(model)
    hbfp.revert_(plain)
    for average in (True, False):
        found = []
        for m in (plain, model):
            out, weights = m(q, k, v, average_attn_weights=average)
            assert weights.shape == ((2, 6, 6) if average else (2, HEADS, 6, 6))
            found.append((weights, *torch.autograd.grad(weights.square().sum() + out.sum(), [q, m.in_proj_weight])))
        for a, b in zip(*found, strict=True):
            # A comparison with FP32 arithmetic: 16-bit mantissas leave about 2^-15 of the largest value of a block.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


def test_agrees_with_torch():
    """Which half is key and which value, how masks and heads lie: by torch's own numbers, at 16 bits."""
    for variant, keywords in VARIANTS.items():
        model = converted("hbfp16b64", **keywords)
        plain = copy.deepcopy(model)
        hbfp.revert_(plain)
        for kind in ("three",) if variant == "other widths" else ("self", "cross", "three"):
            q, k, v = inputs(model, kind=kind)
            padding = torch.zeros(2, k.shape[1 if model.batch_first else 0], dtype=torch.bool)
            padding[1, -2:] = True
            for need in (True, False):
                found, expected = (m(q, k, v, key_padding_mask=padding, need_weights=need)[0] for m in (model, plain))
                # As above; sums over 24 columns.
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_dropout_only_in_training():
    model = converted("hbfp8", dropout=0.5, batch_first=True)
    q, k, v = inputs(model)
    for need in (True, False):
        model.train()
        assert not same(model(q, k, v, need_weights=need)[0], model(q, k, v, need_weights=need)[0])
        model.eval()
        assert same(model(q, k, v, need_weights=need)[0], by_definition(model, q, k, v))


def test_weights_that_are_asked_for_are_dropped_and_change_no_bit(monkeypatch):
    fused = []
    original = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *x, **y: fused.append(x) or original(*x, **y))
    model = converted("emulator", dropout=0.25, batch_first=True)
    mask = torch.zeros(6, 6).masked_fill_(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
    found = []
    for need in (False, True):
        x = values(2, 6, WIDTH).requires_grad_()
        model.zero_grad()
        torch.manual_seed(3)
        out, weights = model(x, x, x, need_weights=need, attn_mask=mask, average_attn_weights=False)
        out.square().sum().backward()
        found.append([out, x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert len(fused) == 1, "without weights, training is fused"
    seen = weights[(mask == 0).expand_as(weights)]
    assert 0 < (seen == 0).sum() < seen.numel() / 2


@pytest.mark.parametrize("heads", [2, 3])
def test_inference_takes_no_fused_path(heads):
    """torch's is taken for an even number of heads, with the batch first, in evaluation and without gradients."""
    model = nn.MultiheadAttention(WIDTH, heads, batch_first=True).eval()
    hbfp.convert_(model, "hbfp8")
    x = values(2, 6, WIDTH)
    seen = []
    ops.recorders.append(lambda product: seen.append(product.name))
    try:
        with torch.inference_mode():
            quiet = model(x, x, x)[0]
    finally:
        ops.recorders.clear()
    assert seen == ["forward", "scores", "context", "forward"]
    assert same(quiet, model(x, x, x)[0])


def test_every_product_draws_random_bits_of_its_own(monkeypatch):
    model = converted()
    seen = []
    product = ops.product
    monkeypatch.setattr(ops, "product", lambda *a, **k: seen.append(a[7]) or product(*a, **k))
    # Without codes that are kept, a linear layer's three products are three calls.
    monkeypatch.setattr(ops, "product_keeping", lambda x, *rest, **k: (ops.product(x, -1, *rest[:-1], **k), None))
    model(*inputs(model, kind="three"))[0].sum().backward()
    assert len(seen) == 18
    # In attention Q, K and V share a role on the way back, by the table of roles.
    drawn = [number for pair in seen for number in pair if number % 16 != 15]
    assert len(set(drawn)) == len(drawn) == 33


def test_conversion_changes_no_parameter_and_is_taken_back(tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    model.attention = nn.MultiheadAttention(WIDTH, 2)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    x = values(6, 2, WIDTH)
    before = model.attention(x, x, x)[0]
    report = hbfp.convert_(model, "hbfp4")
    assert [row.name for row in report.converted] == ["0", "attention"]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert "hbfp4b64" in repr(model.attention)
    assert not same(model.attention(x, x, x)[0], before)
    hbfp.revert_(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert same(model.attention(x, x, x)[0], before)


def test_a_rule_for_a_part_is_refused_where_the_whole_is_converted():
    """It would be without effect: the part is never called."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    with pytest.raises(hbfp.RuleError, match="name 'a'"):
        hbfp.convert_(model, "hbfp4", rules={"*.out_proj": None})
    hbfp.convert_(model, "hbfp4", rules={"a*": None})
    assert type(model["a"]) is nn.MultiheadAttention


def test_a_subclass_with_its_own_forward_is_left_alone_with_all_that_is_inside():
    class Scaled(nn.MultiheadAttention):
        def forward(self, *arguments, **keywords):
            return super().forward(*arguments, **keywords)

    model = nn.ModuleList([Scaled(8, 2), nn.Linear(8, 8)])
    report = hbfp.convert_(model, "hbfp4")
    assert [row.name for row in report.converted] == ["1"]
    assert "its own forward" in report.left[0].note


def test_a_layer_built_directly_advances_its_step():
    layer = hbfp.nn.MultiheadAttention(WIDTH, HEADS, recipe="emulator", seed=3)
    x = values(6, 2, WIDTH)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([values(3, WIDTH), values(5, WIDTH)])
    with pytest.raises(hbfp.ShapeError, match="nested"):
        converted(batch_first=True)(x, x, x)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, x: m(x, x[..., :5], x), "features"),
        (lambda m, x: m(x, x[:5], x), "query, key and value"),
        (lambda m, x: m(x, x[:, :1], x[:, :1]), "without N"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(6, 5)), "attn_mask"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(6, 2)), "key_padding_mask"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, text):
    with pytest.raises(hbfp.ShapeError, match=text):
        call(converted(), values(6, 2, WIDTH))
