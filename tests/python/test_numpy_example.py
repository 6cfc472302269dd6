"""docs/examples/mlp.py, run as its reader would: in an interpreter where torch can't be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hbfp

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "mlp.py"
BLOCKED = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], None, "__main__")
"""


def run(folder: Path, x: np.ndarray) -> np.ndarray:
    np.save(folder / "x.npy", x)
    paths = [str(folder / name) for name in ("m.safetensors", "x.npy", "y.npy")]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(SCRIPT), *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "y.npy")


def test_the_example_computes_what_the_oracle_does(tmp_path):
    rng = np.random.default_rng(0)
    w, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((30, 70), (5, 30)))
    b, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((30,), (9, 70)))
    w, v = hbfp.encode(w, "hbfp4b64"), hbfp.encode(v, "hbfp6b16")
    hbfp.save(tmp_path / "m.safetensors", {"0.weight": w, "0.bias": b, "2.weight": v})
    oracle = hbfp.reference

    def linear(x, w, bias=None):
        right = oracle.encode(w.decode(), w.format)
        return oracle.product(oracle.encode(x, w.format), right.mT, None, bias)

    expected = linear(np.maximum(linear(x, w, b), 0), v)
    assert np.array_equal(run(tmp_path, x).view(np.uint32), np.asarray(expected, np.float32).view(np.uint32))


@pytest.mark.parametrize("freeze", [False, True])
def test_the_example_has_the_bits_of_torch(freeze, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 96, bias=False), torch.nn.ReLU(),
        torch.nn.Linear(96, 10),
    )  # fmt: skip
    hbfp.convert_(model, "booster")
    frozen = model.eval()
    if freeze:
        hbfp.freeze_(frozen)
    hbfp.save_model(tmp_path / "m.safetensors", model)
    hbfp.freeze_(frozen)
    x = torch.randn(9, 64)
    with torch.no_grad():
        expected = np.from_dlpack(frozen(x))
    assert np.array_equal(run(tmp_path, np.from_dlpack(x)).view(np.uint32), expected.view(np.uint32))
