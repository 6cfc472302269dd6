"""The names that users type, with the signatures that the documentation gives: renaming one breaks their code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys

import numpy as np
import pytest

import hbfp

FUNCTIONS = {
    "encode": "(x, format, axis=-1, rounding='nearest_even', seed=0, stream=0, check=False)",
    "quantize": "(x, format, axis=-1, rounding='nearest_even', seed=0, stream=0, check=False, *, out=None)",
    "matmul": "(a, b, *, format=None, out=None, accumulate=False, threads=None)",
    "prepack": "(weight)",
    "linear": (
        "(x, w, bias=None, format=None, *, rounding='nearest_even', seed=0, stream=0, out=None, accumulate=False,"
        " threads=None)"
    ),
    "save": "(path, tensors, metadata=None, *, max_shard_size=None)",
    "load": "(path, *, verify=False)",
    "open": "(path)",
    "set_num_threads": "(n)",
    "get_num_threads": "()",
    "info": "()",
    "HBFP": ("(bits, block=64, *, tile=None, exponent_rule='max_exponent', exponent_bits=8, exponent_bias=None)"),
    "HBFP.parse": "(text)",
    "HBFP.storage_bytes": "(self, shape, axis=-1)",
    "BlockArray.from_parts": "(mantissas, exponents, format, shape, axis=-1)",
    "BlockArray.decode": "(self)",
}


def find(name: str) -> object:
    value: object = hbfp
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name):
    signature = inspect.signature(find(name))
    bare = signature.replace(
        parameters=[
            parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == FUNCTIONS[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documented_and_typed(name):
    value = find(name)
    assert value.__doc__
    parameters = inspect.signature(value).parameters.values()
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters if p.name != "self")


def test_attributes():
    t = hbfp.encode(np.ones((3, 70)), hbfp.HBFP4)
    for name in ("shape", "axis", "format", "nbytes", "mantissas", "exponents", "T", "rounding"):
        assert hasattr(t, name)
    assert t.mantissas.dtype == np.int8
    assert hbfp.encode(np.ones(3), hbfp.HBFP12).mantissas.dtype == np.int16
    assert t.exponents.dtype == np.uint8
    for name in (
        "bits",
        "block",
        "tile",
        "exponent_rule",
        "exponent_bits",
        "exponent_bias",
        "bits_per_element",
        "max_code",
    ):
        assert hasattr(hbfp.HBFP4, name)


def test_oracle_has_the_same_signatures():
    """`hbfp.reference.encode` stands in for `hbfp.encode` where a user wants to see why."""
    for name in ("encode", "quantize", "matmul", "linear"):
        public = list(inspect.signature(getattr(hbfp, name)).parameters)
        oracle = list(inspect.signature(getattr(hbfp.reference, name)).parameters)
        renamed = ["format" if parameter == "fmt" else parameter for parameter in oracle]
        assert [parameter for parameter in public if parameter in renamed] == renamed


def test_dir_and_all():
    """`from hbfp import *` and completion: everything named is there, nothing that is not public."""
    assert sorted(hbfp.__all__) == sorted(set(hbfp.__all__))
    assert all(hasattr(hbfp, name) for name in hbfp.__all__)
    assert {*hbfp.__all__, "reference", "testing", "nn", "convert_"} <= set(dir(hbfp))
    assert not [name for name in dir(hbfp) if name.startswith("_") and name != "__version__"]
    assert not {"importlib", "Any", "annotations"} & set(dir(hbfp))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", sorted(hbfp._TORCH))
def test_torch_level_names_load(name):
    value = getattr(hbfp, name)
    home = importlib.import_module(hbfp._TORCH[name])
    assert value is (home if name == "nn" else getattr(home, name))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", sorted({*hbfp.__all__, *hbfp._TORCH} - {"nn"}))
def test_no_submodule_hides_a_public_name(name):
    """`import hbfp.audit` binds the name on the package, where the function of that name belongs."""
    if importlib.util.find_spec(f"hbfp.{name}") is None:
        return
    script = f"import hbfp.{name}, sys; sys.exit(hbfp.{name} is sys.modules['hbfp.{name}'])"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
