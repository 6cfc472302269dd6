"""The numpy level where torch is not installed; the rest says what is missing.

Here torch is made impossible to import in a fresh interpreter. CI runs the same suite in an environment that lacks it.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import hbfp

BLOCKED = """
import sys
sys.modules["torch"] = None  # any import of torch, direct or not, now fails
"""


def run_without_torch(script: str) -> str:
    """What a script prints in an interpreter that cannot import torch, warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_numpy_level_works(tmp_path):
    """A forgotten import of torch, at the top of a module or inside a function."""
    path = str(tmp_path / "x.safetensors")
    printed = run_without_torch(f"""
        import numpy as np
        import hbfp
        from hbfp import *

        x = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
        t = hbfp.encode(x, hbfp.HBFP4, rounding="stochastic", seed=1)
        assert np.array_equal(hbfp.quantize(x, hbfp.HBFP4, rounding="stochastic", seed=1), np.asarray(t))
        assert np.array_equal(hbfp.matmul(t, t.T), hbfp.linear(t, hbfp.prepack(t)))
        r = hbfp.reference.encode(x, hbfp.HBFP4, -1, "stochastic", 1)
        assert np.array_equal(hbfp.matmul(t, t.T), hbfp.reference.matmul(r, r.T))
        assert hbfp.BlockArray.from_parts(t.mantissas, t.exponents, t.format, t.shape) == t
        hbfp.save({path!r}, {{"t": t, "x": x}})
        assert hbfp.load({path!r}, verify=True)["t"] == t
        hbfp.set_num_threads(2)
        assert hbfp.get_num_threads() == hbfp.info()["num_threads"] == 2
        hbfp.set_num_threads(None)
        assert hbfp.get_num_threads() >= 1
        import hbfp.testing
        print("done")
    """)
    assert printed == "done\n"


def test_torch_level_names_say_what_to_install():
    """Each name is listed, and its use is an ImportError with the cure, not an AttributeError."""
    printed = run_without_torch("""
        import hbfp

        names = [name for name in dir(hbfp) if name in hbfp._TORCH]
        assert "convert_" in names and "nn" in names
        for name in names:
            try:
                getattr(hbfp, name)
            except ImportError as error:
                print(error)
    """)
    lines = printed.splitlines()
    assert lines == [
        f"hbfp.{name} needs torch, which is not installed: pip install hbfp[torch]" for name in sorted(hbfp._TORCH)
    ]


def test_from_import_says_it_too():
    """`from hbfp import X` turns an AttributeError into a message of its own and loses the cure."""
    with pytest.raises(AssertionError, match=r"ImportError: hbfp\.Booster needs torch.*pip install hbfp\[torch\]"):
        run_without_torch("from hbfp import Booster")


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="module 'hbfp' has no attribute 'no_such_name'"):
        hbfp.no_such_name  # noqa: B018
    assert not hasattr(hbfp, "convert")


def test_the_strategies_say_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['hypothesis'] = None; import hbfp.testing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "ImportError: hbfp.testing needs hypothesis, which is not installed: pip install hbfp[testing]" in done.stderr
    )
