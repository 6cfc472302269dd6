"""Convolution layers on the emulating backend: the codes of the integer one, sums that differ in their last bits."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402
from hbfp.nn import functional as F  # noqa: E402


@pytest.mark.parametrize("name", ["hbfp4", "hbfp8", "emulator"])
@pytest.mark.parametrize(
    ("call", "shape", "kernel", "arguments"),
    [
        ("conv2d", (3, 20, 7, 6), (8, 20, 3, 3), {"stride": 2, "padding": 1}),
        ("conv2d", (2, 3, 7, 6), (8, 3, 3, 2), {"padding": 1}),
        ("conv2d", (2, 32, 5, 6), (8, 16, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
        ("conv1d", (2, 16, 9), (4, 16, 4), {"padding": "same"}),
        ("conv_transpose2d", (2, 18, 4, 3), (18, 5, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        ("conv_transpose1d", (2, 4, 5), (4, 3, 2), {"stride": 1, "dilation": 3, "output_padding": 2}),
    ],
)
def test_a_step_is_the_integer_one_but_for_the_order_of_sums(name, call, shape, kernel, arguments, monkeypatch):
    # A block, a stream or a role of another operand would change codes, far beyond the last bits of a sum.
    def step(backend):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(shape, generator=generator).requires_grad_()
        w = torch.randn(kernel, generator=generator).requires_grad_()
        y = getattr(F, call)(
            x, w, recipe=replace(hbfp.recipe(name), backend=backend), seed=4, stream=5 << 32, **arguments
        )
        y.backward(torch.randn(y.shape, generator=generator))
        return y.detach(), x.grad, w.grad

    exact = step("integer")
    for door in (ops.products, ops.softmax_attention, ops.convolutions):
        monkeypatch.setattr(door, "_core", None)  # nothing here may reach the compiled core
    for found, expected in zip(step("emulate"), exact, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
