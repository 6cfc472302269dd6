"""A token's way past the modules: the bits of the modules, and the modules themselves wherever somebody is to be heard.

The bugs these hunt: a sum in another order; heads that are cut in other places; a token that a cache takes twice; a
hook, a count or a gradient that nobody hears of; weights of another model.
"""

import copy
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

from test_generation import VOCABULARY, gpt  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from zoo import same  # noqa: E402

import hbfp  # noqa: E402
from hbfp import _core  # noqa: E402
from hbfp.errors import HBFPError  # noqa: E402
from hbfp.nn.residual import Residual  # noqa: E402
from hbfp.training.generation import generate  # noqa: E402
from hbfp.training.gpt import Block  # noqa: E402


def codes(count, seed=0):
    return torch.randint(len(VOCABULARY), (1, count), generator=torch.Generator().manual_seed(seed))


def one_by_one(model, text, caches, prompt=3):
    """Scores of each token behind a prompt."""
    scores = [model.extend(text[:, :prompt], caches)[:, -1]]
    scores += [model.extend(text[:, at : at + 1], caches)[:, -1] for at in range(prompt, text.shape[1])]
    return torch.stack(scores)


@pytest.fixture
def passes(monkeypatch):
    """Calls of blocks since the last look."""
    seen = []
    forward = Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, x, cache=None: seen.append(x.shape[1]) or forward(self, x, cache)
    )

    def look():
        found = list(seen)
        seen.clear()
        return found

    return look


@pytest.mark.parametrize("recipe", ["hbfp4b16", "hbfp6b32", "hbfp4"])
def test_a_token_has_the_bits_of_the_modules(recipe, passes):
    model, text = gpt(recipe, width=128), codes(50)
    with torch.inference_mode():
        found = one_by_one(model, text, model.caches())
        assert passes() == [3, 3]
        expected = one_by_one(model, text, list(model.caches()))
        assert len(passes()) == 2 * 48
    assert same(found, expected)


def test_generate_takes_it_and_a_context_that_is_full_begins_anew(passes, monkeypatch):
    model = gpt(context=16)
    found = list(generate(model, [1, 2, 3], 40, temperature=0))
    assert set(passes()) == {3, 8}  # the prompt, and the last half of a context
    monkeypatch.setattr(Residual, "of", lambda *_: None)
    assert found == list(generate(model, [1, 2, 3], 40, temperature=0))
    assert 1 in passes()


def thawed():
    model = gpt()
    hbfp.unfreeze_(model)
    return model


def hooked(register):
    model = gpt()
    getattr(model.blocks[1].down, register)(lambda *_: None)
    return model


def with_half_a_bias():
    model = gpt()
    model.blocks[0].down.bias = torch.nn.Parameter(model.blocks[0].down.bias.double())
    return model


def of_another_format():
    model = gpt("hbfp4b16")
    state = model.blocks[1].up.hbfp_state
    state.recipe = state.recipe.at("hbfp3b16")
    return model


UNUSUAL = {
    "not frozen": thawed,
    "floats": lambda: gpt(None),
    "wide": lambda: gpt("hbfp12b16"),
    "training": lambda: gpt().train(),
    "hook": lambda: hooked("register_forward_hook"),
    "hook before": lambda: hooked("register_forward_pre_hook"),
    "other bias": with_half_a_bias,
    "other format": of_another_format,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_model_that_is_not_as_usual_goes_through_its_modules(name, passes):
    model = UNUSUAL[name]()
    with torch.inference_mode():
        one_by_one(model, codes(5), model.caches())
    assert passes() == [3, 3, 1, 1, 1, 1]


def test_hooks_of_all_modules_are_called(passes):
    model, heard = gpt(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        with torch.inference_mode():
            one_by_one(model, codes(4), model.caches())
    finally:
        handle.remove()
    assert sum(module is model.blocks[1].up for module in heard) == 2


@contextmanager
def recorded():
    hbfp.ops.recorders.append(lambda _: None)
    try:
        yield
    finally:
        hbfp.ops.recorders.clear()


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("somebody", [torch.enable_grad, recorded, torch.autograd.forward_ad.dual_level, Passing])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward mode's own
def test_who_counts_or_differentiates_has_the_modules(somebody, passes):
    model = gpt()
    for table in (model.characters, model.positions):
        table.requires_grad_(False)  # the norms' parameters are left
    caches = model.caches()
    with torch.no_grad():
        model.extend(codes(3), caches)
        assert passes() == [3, 3]
        with somebody():
            model.extend(codes(1), caches)
        assert passes() == [1, 1]
        model.extend(codes(1), caches)
        assert passes() == []
    assert [cache.length for cache in caches] == [5, 5]


def test_two_texts_at_once_go_through_the_modules(passes):
    model, text = gpt(), torch.cat([codes(5), codes(5, seed=1)])
    caches = model.caches()
    with torch.inference_mode():
        model.extend(text[:, :4], caches)
        model.extend(text[:, 4:], caches)
    assert passes() == [4, 4, 1, 1]


def test_copies_of_caches_go_on_by_themselves(passes):
    model, text = gpt(), codes(20)
    caches = model.caches()
    with torch.inference_mode():
        model.extend(text[:, :10], caches)
        copied = copy.deepcopy(caches)
        expected = model.extend(text[:, 10:11], caches)
        passes()
        assert same(model.extend(text[:, 10:11], copied), expected)
        assert passes() == [1, 1]
        assert [x.length for x in (*caches, *copied)] == [11] * 4
        caches[0] = copied[0]  # another list than was made
        model.extend(text[:, 11:12], caches)
        assert passes() == [1, 1]
        assert [x.length for x in (*caches, *copied)] == [12, 12, 12, 11]


# --- the core's part -------------------------------------------------------------------------------------------------


def matrix(n, k):
    weight = hbfp.packed.PackedWeight.of(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), "hbfp4b16")
    return weight.kept_matrix()


def product(n, k, bias=None):
    return matrix(n, k), bias, hbfp.HBFP.parse("hbfp4b16").core, 0


def attention():
    coding = [(hbfp.HBFP.parse("hbfp4b16").core, 0, 0)] * 2
    return _core.GrownAttention(coding, coding)


X = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(9))


def test_branches_add_up_one_after_the_other():
    steps = [
        [(torch.relu, []), product(64, 64, torch.ones(64))],
        [product(32, 64), (torch.add, [0.5]), product(64, 32)],
    ]
    kept, format = matrix(64, 64), hbfp.HBFP.parse("hbfp4b16").core
    first = X + kept.linear(torch.relu(X), format, 0, 0, 0, torch.ones(64), 1)
    middle = matrix(32, 64).linear(first, format, 0, 0, 0, None, 1) + 0.5
    given = X.clone()
    assert same(_core.Residual(steps, [])(given, 1), first + matrix(64, 32).linear(middle, format, 0, 0, 0, None, 1))
    assert same(given, X)
    assert same(_core.Residual([], [])(X, 1), X)


def test_branches_end_with_a_product():
    for branch in ([], [(torch.relu, [])], [product(64, 64), (torch.relu, [])]):
        with pytest.raises(HBFPError, match="end with a product"):
            _core.Residual([branch], [])


@pytest.mark.parametrize(
    "branch",
    [
        [product(64, 32)],  # another width than x has
        [product(32, 64)],  # another width than the sum has
        [(torch.Tensor.double, []), product(64, 64)],
        [(attention(), 1), product(64, 64)],  # no queries, keys and values
        [product(96, 64), (attention(), 3), product(64, 32)],  # heads of 32 / 3 columns
        [product(96, 64), (attention(), 0), product(64, 32)],
        [product(96, 64, torch.ones(96).double()), (attention(), 1), product(64, 32)],
    ],
)
def test_what_does_not_fit_is_left_to_the_modules(branch):
    assert _core.Residual([branch], [])(X, 1) is None


@pytest.mark.parametrize("x", [X.double(), X[..., ::2].expand(1, 1, 32), X.to("meta"), torch.complex(X, X).conj().imag])
def test_what_is_no_plain_token_is_left_to_the_modules(x):
    assert _core.Residual([[product(64, 64)]], [])(x, 1) is None


def test_a_step_that_fails_behind_an_attention_is_an_error():
    """The cache holds the token by then: the modules would give it to it again."""
    cache = attention()
    steps = [[product(96, 64), (cache, 1), (torch.Tensor.double, []), product(64, 32)]]
    with pytest.raises(HBFPError, match="begin the text anew"):
        _core.Residual(steps, [])(X, 1)
    assert cache.length == 1
