"""The script that prints the figures of the torch level: its exact ones are asserted, its times only that they come."""

import pytest

pytest.importorskip("torch")

import torch_figures
from test_coverage import MLP


def test_exact_figures():
    head, _, row = torch_figures.shares((MLP,)).splitlines()
    assert head.split() == ["network", "MACs", "a", "step", "4", "bits", "%", "6", "bits", "%", "FP32", "%"]
    # 7 rows through 12 -> 20 -> 20 -> 5; the first layer's input needs no gradient.
    first, inner, last = 2 * 7 * 12 * 20, 3 * 7 * 20 * 20, 3 * 7 * 20 * 5
    macs = first + inner + last
    shares = (inner / macs, (first + last) / macs, 0)
    assert row.split() == ["MLP", f"{macs:,}", *(f"{100 * share:.2f}" for share in shares)]
    found = torch_figures.compilations("integer", "mlp", steps=3, boosted_from=2)
    assert found == ("mlp", "integer", "aot_eager", "3", "1", "1", "0")


def test_times_of_each_way_to_watch():
    lines = torch_figures.watching(rounds=1, steps=2).splitlines()
    assert lines[2].split()[0] == "off"
    assert lines[2].split()[-1] == "1.000"
    assert [line.split("  ")[0] for line in lines[3:]] == ["open, no step sampled", "every 2 steps", "every step"]
