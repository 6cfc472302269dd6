"""What layers keep between forward and backward: codes along the batch, not floats, and the bits do not change."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import autograd, ops  # noqa: E402
from hbfp.policy import recipe  # noqa: E402


def saved_bytes(run):
    """Bytes of what autograd saves while `run` runs, parameters not counted."""
    sizes = []

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            sizes.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(sizes)


@pytest.mark.parametrize(("name", "shrinks"), [("hbfp4", 7.5), ("hbfp6", 3.7), ("hbfp8", 3.7)])
def test_a_linear_layer_saves_codes(name, shrinks):
    # A layer that saved the float tensor would pass every test of its bits.
    layer = torch.nn.Linear(256, 64)
    hbfp.convert_(layer, name)
    x = torch.randn(512, 256)
    assert saved_bytes(lambda: layer(x)) <= 4 * x.numel() / shrinks


@pytest.mark.parametrize("name", ["hbfp4", "hbfp6", "hbfp8", "emulator", "hbfp6b16", "hbfp4b64-e5"])
@pytest.mark.parametrize("shape", [(70, 50), (3, 41, 33), (2, 3, 5, 7)])
@pytest.mark.parametrize("transposed", [False, True])
def test_kept_codes_give_the_gradient_of_the_tensor(name, shape, transposed):
    # Codes of the wrong axis, stream or rounding, or of a tensor whose strides were ignored.
    rules = recipe(name)
    x = torch.randn(shape)
    if transposed:
        x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    weight = torch.randn(24, shape[-1], requires_grad=True)
    dy = torch.randn(*shape[:-1], 24)
    autograd.linear(x, weight, None, rules, 7, 1 << 32).backward(dy)
    policy = rules.weight_gradient
    expected = ops.product(
        dy.flatten(0, -2), -2, x.flatten(0, -2), -2, policy.formats, policy.roundings, 7,
        (1 << 32 | autograd.Role.DY_FOR_DW, 1 << 32 | autograd.Role.X_FOR_DW),
    )  # fmt: skip
    assert torch.equal(weight.grad, expected)


def test_a_nan_survives_being_kept():
    # A kept operand that lost its flags would multiply a NaN block as zeros.
    x = torch.randn(70, 40)
    x[3, 5] = float("nan")
    weight = torch.randn(8, 40, requires_grad=True)
    autograd.linear(x, weight, None, recipe("hbfp4"), 0, 0).sum().backward()
    assert weight.grad[:, 5].isnan().all()
    assert not weight.grad[:, :5].isnan().any()
    assert not weight.grad[:, 6:].isnan().any()


def test_bytes_of_another_size_are_refused():
    # Saved tensors pass through hooks of the user's: nothing they give back may be read out of bounds.
    x, w, dy = torch.randn(64, 32), torch.randn(16, 32), torch.randn(64, 16)
    formats = (hbfp.HBFP4, hbfp.HBFP4)
    _, kept = ops.product_keeping(x, w, -1, formats, (0, 0), 0, (0, 0), None, (hbfp.HBFP4, 0, 0))
    with pytest.raises(hbfp.HBFPError, match="bytes of a kept operand"):
        ops.kept_product(dy, kept[:-1].clone(), 32, formats, (0, 0), 0, (0, 0))
    with pytest.raises(hbfp.HBFPError, match="uint8"):
        ops.kept_product(dy, kept.to(torch.float32), 32, formats, (0, 0), 0, (0, 0))
    ops.kept_product(dy, torch.full_like(kept, 255), 32, formats, (0, 0), 0, (0, 0))


def test_nothing_is_kept_that_is_larger_than_the_floats():
    # Codes of a few columns, or of depthwise channels, are padded to whole strips: keeping them would waste memory.
    layer, convolution = torch.nn.Linear(3, 8), torch.nn.Conv2d(32, 32, 3, groups=32)
    hbfp.convert_(layer, "hbfp4")
    hbfp.convert_(convolution, "hbfp4")
    x, image = torch.randn(256, 3), torch.randn(4, 32, 12, 12)
    assert saved_bytes(lambda: layer(x)) <= 4 * x.numel()
    assert saved_bytes(lambda: convolution(image)) <= 4 * image.numel()
    layer(x).sum().backward()
    convolution(image).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert convolution.weight.grad.abs().sum() > 0


def test_a_convolution_saves_codes():
    convolution = torch.nn.Conv2d(32, 32, 3, padding=1)
    hbfp.convert_(convolution, "hbfp4")
    image = torch.randn(64, 32, 8, 8)
    assert saved_bytes(lambda: convolution(image)) <= 4 * image.numel() / 7
