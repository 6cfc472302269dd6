"""Hybrid block floating point: training and inference in real fixed-point arithmetic, the same bits on every machine.

The names below work with numpy alone. Those of the torch level (`convert_`, `recipe`, `Booster`, `nn`, ...) are loaded
on first use and then need torch: `pip install hbfp[torch]`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from hbfp._core import __version__
from hbfp.array import (
    BlockArray,
    PackedOperand,
    encode,
    get_num_threads,
    info,
    linear,
    matmul,
    prepack,
    quantize,
    set_num_threads,
)
from hbfp.errors import (
    CodeError,
    ConversionError,
    DTypeError,
    ExportError,
    FileError,
    FormatError,
    HBFPError,
    LevelError,
    NonFiniteError,
    RuleError,
    ScheduleError,
    ShapeError,
)
from hbfp.files import load, save
from hbfp.files import open as open  # not in __all__: a star import must not hide the builtin
from hbfp.format import HBFP, HBFP4, HBFP5, HBFP6, HBFP8, HBFP12, HBFP16, ExponentRule, Rounding

__all__ = [
    "HBFP",
    "HBFP4",
    "HBFP5",
    "HBFP6",
    "HBFP8",
    "HBFP12",
    "HBFP16",
    "BlockArray",
    "CodeError",
    "ConversionError",
    "DTypeError",
    "ExponentRule",
    "ExportError",
    "FileError",
    "FormatError",
    "HBFPError",
    "LevelError",
    "NonFiniteError",
    "PackedOperand",
    "Rounding",
    "RuleError",
    "ScheduleError",
    "ShapeError",
    "__version__",
    "encode",
    "get_num_threads",
    "info",
    "linear",
    "load",
    "matmul",
    "prepack",
    "quantize",
    "save",
    "set_num_threads",
]

# Submodules that need nothing beyond numpy, loaded on first use to keep the import light.
_MODULES = ("reference", "testing")

# Where each name of the torch level lives.
_TORCH = {
    "nn": "hbfp.nn",
    "convert_": "hbfp.nn.conversion",
    "revert_": "hbfp.nn.conversion",
    "MatmulPolicy": "hbfp.policy",
    "OperandPolicy": "hbfp.policy",
    "Recipe": "hbfp.policy",
    "recipe": "hbfp.policy",
    "Booster": "hbfp.schedule",
    "set_step": "hbfp.schedule",
    "wide_weights": "hbfp.optim",
    "Audit": "hbfp.audit",
    "audit": "hbfp.audit",
    "Watch": "hbfp.telemetry",
    "WatchRow": "hbfp.telemetry",
    "watch": "hbfp.telemetry",
    "load_model": "hbfp.checkpoint",
    "save_model": "hbfp.checkpoint",
    "freeze_": "hbfp.freezing",
    "unfreeze_": "hbfp.freezing",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hbfp.{name}")
    if name not in _TORCH:
        raise AttributeError(f"module 'hbfp' has no attribute {name!r}")
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(f"hbfp.{name} needs torch, which is not installed: pip install hbfp[torch]") from error
    module = importlib.import_module(_TORCH[name])
    value = module if name == "nn" else getattr(module, name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Loading a submodule binds its name on the package; `hbfp.audit` must stay the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _TORCH and name != "nn"):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*__all__, "open", *_MODULES, *_TORCH})
