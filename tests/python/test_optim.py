"""Wide weights: on the grid after every step, and nothing else touched."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402


def trained(wide, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 20), nn.Linear(20, 3))
    hbfp.convert_(model, "hbfp4", rules={"1": None})
    optimizer = make(model.parameters())
    handle = hbfp.wide_weights(optimizer, model, bits=8) if wide else None
    model(torch.randn(5, 70)).sum().backward()
    optimizer.step()
    return model, optimizer, handle


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.1)],
    ids=["SGD", "AdamW"],
)
def test_weights_are_on_the_grid_and_the_rest_is_untouched(make):
    wide, optimizer, handle = trained(True, make)
    plain, other, _ = trained(False, make)
    expected = hbfp.quantize(np.from_dlpack(plain[0].weight.detach()), hbfp.HBFP8)
    assert np.array_equal(np.from_dlpack(wide[0].weight.detach()), expected)
    assert torch.equal(wide[0].bias, plain[0].bias)
    assert torch.equal(wide[1].weight, plain[1].weight)
    for ours, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k])) for k in theirs)
    handle.remove()
    optimizer.step()
    weight = np.from_dlpack(wide[0].weight.detach())
    assert not np.array_equal(weight, hbfp.quantize(weight, hbfp.HBFP8))


def test_a_model_that_was_not_converted_is_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(hbfp.ConversionError):
        hbfp.wide_weights(torch.optim.SGD(model.parameters(), 0.1), model)


def test_an_optimizer_of_another_model_is_refused():
    """It would round nothing, in silence."""
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    hbfp.convert_(model, "hbfp4")
    with pytest.raises(hbfp.ConversionError, match="none of the 1 weights"):
        hbfp.wide_weights(torch.optim.SGD(other.parameters(), 0.1), model)
