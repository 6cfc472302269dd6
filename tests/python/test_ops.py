"""Operators behind torch's dispatcher: opcheck, and the same bits through both lanes."""

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import ops  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "product": (values(5, 70), -1, "hbfp4b64", 0, 1, values(6, 70), -1, "hbfp6b64", 3, 2, -5, values(6)),
    "quantize": (values(3, 100), "hbfp4b16", -1, 3, 7, -1),
    "softmax": (values(2, 3, 9), 0.5, True, None),
    "softmax_backward": (values(2, 3, 9).softmax(-1), values(2, 3, 9, seed=1), 0.5),
    "column_sums": (values(130, 7),),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.hbfp, name).default, CASES[name], test_utils=checks)


def test_compiled_products_are_bit_equal():
    def f(x, w):
        return ops.product(x, -1, w, -1, (hbfp.HBFP4, hbfp.HBFP4), (0, 0), 0, (0, 0), None)

    x, w = values(8, 70), values(5, 70, seed=1)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w), f(x, w))


def test_other_devices_and_layouts_are_refused_by_name():
    with pytest.raises(hbfp.DTypeError, match="move it with"):
        ops._run_column_sums(torch.ones(3, 3).to_sparse())
