"""The layers of the package, held by reading its imports: each module may use only what stands before it.

The bug these hunt is the import that works today and turns the picture in the README into a net: a numpy-level module
that needs torch, a second door to the compiled core, an oracle that leans on what it is to judge.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "hbfp"

# In dependency order. "hbfp" is the public surface, `hbfp/__init__.py`: what stands after it is written like a user's
# code. Inside a folder the order is its own.
CHAIN = (
    "_core",
    "errors",
    "tables",
    "patterns",
    "format",
    "reference",
    "array",
    "files",
    "ops",
    "packed",
    "emulation",
    "policy",
    "backends",
    "stationary",
    "autograd",
    "attention",
    "recurrence",
    "convolution",
    "nn",
    "optim",
    "schedule",
    "audit",
    "telemetry",
    "checkpoint",
    "freezing",
    "exports",
    "hbfp",
    "training",
    "benchmark",
    "tools",
    "testing",
    "__main__",
)
NUMPY_LEVEL = CHAIN[: CHAIN.index("ops")]
# "hbfp" for its version; "benchmark" because the core is what it times.
USERS_OF_THE_CORE = {"errors", "format", "array", "ops", "stationary", "hbfp", "benchmark"}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "hbfp" if first == "__init__.py" else first.removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import of a file, those inside functions too; `from a import b` gives a.b."""
    package = ("hbfp", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def layers_used(path: Path) -> Iterator[tuple[int, str]]:
    """Line and layer of every import from the package itself."""
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] == "hbfp":
            yield line, parts[1] if len(parts) > 1 and parts[1] in CHAIN else "hbfp"


def where(path: Path, line: int) -> str:
    return f"python/hbfp/{path.relative_to(PACKAGE)}:{line}"


def test_every_module_has_its_place() -> None:
    strangers = {layer_of(path) for path in SOURCES} - set(CHAIN)
    assert not strangers, f"give each its place in CHAIN: {sorted(strangers)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_uses_only_the_layers_before_it(path: Path) -> None:
    own = layer_of(path)
    wrong = [
        f"{where(path, line)}: {own} uses {used}, which stands after it"
        for line, used in layers_used(path)
        if used != own and CHAIN.index(used) > CHAIN.index(own)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    used = {used for path in (PACKAGE / "reference").glob("*.py") for _, used in layers_used(path)}
    assert used == {"reference"}


def test_doors_to_the_core_are_counted() -> None:
    wrong = [
        where(path, line)
        for path in SOURCES
        for line, used in layers_used(path)
        if used == "_core" and layer_of(path) not in USERS_OF_THE_CORE
    ]
    assert not wrong, f"only {sorted(USERS_OF_THE_CORE)} may use the compiled core: {wrong}"


def test_numpy_level_names_no_torch() -> None:
    wrong = [
        where(path, line)
        for path in SOURCES
        if layer_of(path) in NUMPY_LEVEL
        for line, name in imported(path)
        if name.split(".")[0] == "torch"
    ]
    assert not wrong, f"these modules must work without torch, and so must not import it even late: {wrong}"


def test_importing_the_package_imports_no_torch() -> None:
    """A torch import costs seconds and hundreds of megabytes; it also hides that the numpy level needs it."""
    code = "import sys, hbfp; hbfp.encode, hbfp.HBFP4; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of imports itself: a relative import must not slip through as a name of its own."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "nn").mkdir()
    path = tmp_path / "nn" / "linear.py"
    path.write_text("from ..tools import cli\ndef f():\n    from . import functional\n    import torch.nn\n")
    assert [name for _, name in imported(path)] == ["hbfp.tools.cli", "hbfp.nn.functional", "torch.nn"]
    assert [used for _, used in layers_used(path)] == ["tools", "nn"]
