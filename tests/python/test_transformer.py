"""Transformer layers: torch's own wiring around converted parts, and none of torch's fused paths around those.

The bugs these hunt: a fused path in evaluation that computes in FP32 behind the parts' backs, one that stays off after
`revert_`, a part that is skipped in silence.
"""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.shape == b.shape and torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def encoder(layers=2, **keywords):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **{"dropout": 0.0, **keywords})
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not keywords)


def transformer(**keywords):
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 2, 2, 24, **{"dropout": 0.0, "batch_first": True, **keywords})


def names(model):
    return {name for name, module in model.named_modules() if module.__dict__.get("hbfp_state") is not None}


def products(call):
    seen = []
    ops.recorders.append(lambda product: seen.append(product.name))
    try:
        call()
    finally:
        ops.recorders.clear()
    return seen


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_converted_layer_equals_its_parts(norm_first, activation):
    model = nn.TransformerEncoderLayer(
        16, 2, 24, 0.0, activation, batch_first=True, norm_first=norm_first
    )  # fmt: skip
    hbfp.convert_(model, "emulator")
    hbfp.set_step(model, 3)
    x = values(2, 5, 16).requires_grad_()
    act = nn.functional.relu if activation == "relu" else nn.functional.gelu

    def attend(h):
        return model.self_attn(h, h, h, need_weights=False)[0]

    def feed(h):
        return model.linear2(act(model.linear1(h)))

    if norm_first:
        h = x + attend(model.norm1(x))
        expected = h + feed(model.norm2(h))
    else:
        h = model.norm1(x + attend(x))
        expected = model.norm2(h + feed(h))
    tensors = [x, *model.parameters()]
    found = model(x)
    assert same(found, expected)
    dy = values(2, 5, 16, seed=1)
    pairs = zip(torch.autograd.grad(found, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_without_gradients_computes_what_evaluation_with_them_does(padded):
    """Two fused paths wait there: one per layer, and nested tensors in the stack where there is padding."""
    model = encoder()
    hbfp.convert_(model, "hbfp8")
    model.eval()
    x = values(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    expected = model(x, src_key_padding_mask=padding)

    def quiet():
        with torch.inference_mode():
            assert same(model(x, src_key_padding_mask=padding), expected)

    assert products(quiet) == ["forward", "scores", "context", "forward", "forward", "forward"] * 2
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert same(model(x, src_key_padding_mask=padding), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_paths_are_put_back():
    """And taken: torch's operator for a whole layer must be seen again."""
    model = encoder().eval()
    x, padding = values(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
    nested = model.use_nested_tensor
    keys, parameters = list(model.state_dict()), list(model.parameters())
    hbfp.convert_(model, "hbfp4")
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    hbfp.revert_(model)
    assert {type(layer) for layer in model.layers} == {nn.TransformerEncoderLayer}
    assert model.use_nested_tensor is nested is True
    assert not [key for module in model.modules() for key in module.__dict__ if key.startswith("hbfp")]
    with torch.profiler.profile() as profile, torch.no_grad():
        after = model(x, src_key_padding_mask=padding)
    assert same(after, before)
    assert "aten::_transformer_encoder_layer_fwd" in {event.name for event in profile.events()}


def test_encoder_and_decoder_agree_with_torch():
    """At 16 bits, with all their masks: the wiring is torch's."""
    model = transformer()
    plain = copy.deepcopy(model)
    hbfp.convert_(model, "hbfp16b64")
    source, target = values(2, 6, 16), values(2, 5, 16, seed=1)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": torch.zeros(2, 6).masked_fill(torch.arange(6) >= 4, -torch.inf),
        "memory_key_padding_mask": torch.zeros(2, 6).masked_fill(torch.arange(6) >= 4, -torch.inf),
    }
    found = []
    for m in (model, plain):
        out = m(source, target, **masks)
        out.sin().sum().backward()
        found.append([out, *(p.grad for p in m.parameters())])
    for a, b in zip(*found, strict=True):
        # A comparison with FP32 arithmetic: some twenty products, each about 2^-15 of its blocks' largest values off.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)


def test_every_product_of_an_encoder_decoder_is_converted():
    model = transformer()
    report = hbfp.convert_(model, "hbfp4")
    parts = [f"encoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "linear1", "linear2")]
    parts += [
        f"decoder.layers.{i}.{p}" for i in range(2) for p in ("self_attn", "multihead_attn", "linear1", "linear2")
    ]
    assert names(model) == {row.name for row in report.converted} == set(parts)
    assert not report.left
    found = hbfp.audit(model, values(2, 6, 16), values(2, 5, 16, seed=1))
    assert found.share() == 1.0
    assert set(found.by_layer) == set(parts)


def test_audit_counts_what_torchs_counter_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = transformer()
    source, target = values(2, 6, 16).requires_grad_(), values(2, 5, 16, seed=1).requires_grad_()
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(source, target).sum().backward()
    hbfp.convert_(model, "hbfp4")
    assert hbfp.audit(model, source, target).macs == counter.get_total_flops() // 2


def test_rules_reach_the_parts():
    model = encoder()
    hbfp.convert_(model, "hbfp4", rules={"layers.0.linear1": hbfp.HBFP8, "layers.0.linear2": None, "layers.1": None})
    assert names(model) == {"layers.0.self_attn", "layers.0.linear1"}
    assert type(model.layers[1]) is nn.TransformerEncoderLayer
    model.eval()
    x = values(3, 5, 16)
    with torch.no_grad():
        quiet = model(x, src_key_padding_mask=torch.arange(5).expand(3, 5) >= 4)
    assert quiet.shape == x.shape


def test_a_layer_with_its_own_forward_stays_with_all_that_is_inside():
    """Its forward may hand the parts' weights to anything; to convert the parts would be to hope."""

    class Gated(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) * 0.5

    stack = nn.TransformerEncoder(Gated(16, 2, 24, batch_first=True), 2)
    model = nn.Sequential(stack, nn.Linear(16, 4))
    report = hbfp.convert_(model, "hbfp4")
    assert names(model) == {"1"}
    assert [row.name for row in report.left] == ["0.layers.0", "0.layers.1"]
    assert "its own _ff_block" in str(report)
    replaced = encoder(1)
    replaced.layers[0].forward = lambda x, **_: x
    with pytest.raises(hbfp.ConversionError, match="replaced on the instance"):
        hbfp.convert_(replaced, "hbfp4")


def test_copies_and_pickles_keep_the_paths_off():
    model = encoder()
    hbfp.convert_(model, "hbfp4")
    model.eval()
    x = values(3, 5, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert same(other(x), model(x))
        hbfp.revert_(other)
        assert type(other.layers[0]) is nn.TransformerEncoderLayer
        assert other.use_nested_tensor is True


def test_a_part_that_is_converted_and_taken_back_by_itself():
    model = encoder()
    hbfp.convert_(model.layers[0], "hbfp4")
    hbfp.convert_(model, "hbfp6", rules={"layers.0": None})
    assert names(model) == {f"layers.{i}.{part}" for i in range(2) for part in ("self_attn", "linear1", "linear2")}
    hbfp.revert_(model)
    assert not names(model)
    assert {type(layer) for layer in model.layers} == {nn.TransformerEncoderLayer}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layers_built_directly(kind):
    make = hbfp.nn.TransformerEncoderLayer if kind == "encoder" else hbfp.nn.TransformerDecoderLayer
    layer = make(16, 2, 24, 0.0, batch_first=True, recipe="emulator", seed=3, site=2)
    x = values(2, 5, 16)
    call = (lambda: layer(x)) if kind == "encoder" else (lambda: layer(x, values(2, 6, 16, seed=1)))
    assert not torch.equal(call(), call())
    sites = [module.hbfp_state.site for module in layer.children() if hasattr(module, "hbfp_state")]
    assert sites == ([2, 7, 8] if kind == "encoder" else [2, 7, 12, 13])
    assert len({id(module.hbfp_state.root) for module in layer.children() if hasattr(module, "hbfp_state")}) == 1
    layer.eval()
    with torch.inference_mode():
        quiet = call()
    assert same(quiet, call())
    own = hbfp.nn.Linear(16, 4)
    model = nn.Sequential(layer, own)
    hbfp.convert_(model, "hbfp4")
    hbfp.revert_(model)
    assert type(layer) is make
    assert layer.linear1.hbfp_state.solo is False
    with pytest.raises(hbfp.HBFPError, match="site"):
        make(16, 2, site=2**20 - 3)


def test_first_and_last_are_found_by_execution():
    model = nn.ModuleDict({"head": nn.Linear(16, 4), "stack": encoder()})

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner["head"](self.inner["stack"](x))

    run = Run()
    report = hbfp.convert_(run, "booster", example_inputs=values(2, 5, 16))
    place = {row.name: str(row.position) for row in report.converted}
    assert place["inner.stack.layers.0.self_attn"] == "first"
    assert place["inner.head"] == "last"
    assert not report.notes
