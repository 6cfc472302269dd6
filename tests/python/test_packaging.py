"""What is shipped: the installed extension, the wheel and the sdist in build/dist (`make dist`).

`HBFP_DIST` names another folder to look at: `make dist-check` puts there a wheel made from the sdist alone.
"""

import importlib.machinery
import os
import re
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import hbfp
from hbfp import _core

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / os.environ.get("HBFP_DIST", "build/dist")


def the_only(pattern: str) -> Path:
    found = list(DIST.glob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in {DIST.relative_to(ROOT)}: run `make dist`")
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def wheel() -> dict[str, bytes]:
    """The wheel's files, by name."""
    with zipfile.ZipFile(the_only("*.whl")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist() -> dict[str, bytes]:
    """The sdist's files, by name below its one folder."""
    with tarfile.open(the_only("*.tar.gz")) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        }


def build_paths() -> list[bytes]:
    """Places on this machine that a compiler writes into what it makes, unless told not to."""
    home = Path.home()
    places = {ROOT, Path(os.environ.get("CARGO_HOME") or home / ".cargo")}
    places |= {Path(os.environ.get("RUSTUP_HOME") or home / ".rustup")}
    places |= {home} if home != Path("/") else set()
    return sorted({os.fsencode(each) for place in places for each in (place, place.resolve())})


def leaks(content: bytes) -> list[bytes]:
    """The build paths in a file, each with what follows it."""
    return [
        match.group() for place in build_paths() for match in re.finditer(re.escape(place) + rb"[/\\][\w./-]*", content)
    ]


def test_leaks_are_seen() -> None:
    """The detector itself: without this, a mistake in it would make the tests below pass for ever."""
    assert leaks(b"\x00at " + os.fsencode(ROOT) + b"/rust/hbfp/src/lib.rs:1") != []
    assert leaks(b"/rustc/59807616/library/core/src/str/mod.rs") == []


def test_installed_extension_holds_no_build_paths() -> None:
    assert _core.__file__ is not None
    assert leaks(Path(_core.__file__).read_bytes()) == []


def test_installed_extension_serves_every_python() -> None:
    """An extension named for one version is not found by the next."""
    assert _core.__file__ is not None
    assert _core.__file__.endswith(".abi3.so")
    assert ".abi3.so" in importlib.machinery.EXTENSION_SUFFIXES


def test_version_has_one_source() -> None:
    """Cargo.toml says it; the core, the package and the installed metadata repeat it."""
    stated = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated is not None
    assert hbfp.__version__ == _core.__version__ == version("hbfp") == stated.group(1)


def test_wheel_tag(wheel: dict[str, bytes]) -> None:
    assert "-cp310-abi3-" in the_only("*.whl").name
    (description,) = (content for name, content in wheel.items() if name.endswith(".dist-info/WHEEL"))
    assert b"Tag: cp310-abi3-" in description
    assert b"Root-Is-Purelib: false" in description


def test_wheel_holds_no_build_paths(wheel: dict[str, bytes]) -> None:
    found = {name: leaks(content) for name, content in wheel.items()}
    assert not any(found.values()), {name: paths for name, paths in found.items() if paths}


def test_wheel_is_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    """Hunted: a stale second extension, caches, tests, and a module that is in the checkout but was left out."""
    extension = {name for name in wheel if name.endswith((".so", ".pyd", ".dylib"))}
    assert len(extension) == 1
    shipped = {name for name in wheel if ".dist-info/" not in name} - extension
    written = {
        path.relative_to(ROOT / "python").as_posix()
        for path in (ROOT / "python" / "hbfp").rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    }
    assert shipped == written
    assert {"hbfp/py.typed", "hbfp/_core.pyi"} <= shipped


def test_wheel_carries_the_licence(wheel: dict[str, bytes]) -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    assert [name for name, content in wheel.items() if content == licence]


def test_sdist_holds_every_source(sdist: dict[str, bytes]) -> None:
    """Hunted: a new file that an include list has not heard of."""
    folders = [
        ("python", "**/*.py*"),
        ("rust", "**/*.rs"),
        ("rust", "**/*.toml"),
        ("tests", "**/*.rs"),
        ("tests", "**/*.json"),
    ]
    written = {
        path.relative_to(ROOT).as_posix()
        for folder, pattern in folders
        for path in (ROOT / folder).glob(pattern)
        if path.suffix != ".pyc"
    }
    needed = written | {"Cargo.lock", "Cargo.toml", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"}
    assert not needed - set(sdist)


def test_sdist_holds_nothing_else(sdist: dict[str, bytes]) -> None:
    expected = re.compile(
        r"python/hbfp/.+\.pyi?|python/hbfp/py\.typed|rust/.+\.(rs|toml)|tests/(operands/)?\w+\.rs|tests/vectors/\w+\.json"
        r"|PKG-INFO|Cargo\.(lock|toml)|pyproject\.toml|build_backend\.py|(README|CHANGELOG)\.md|LICENSE"
    )
    assert [name for name in sdist if not expected.fullmatch(name)] == []
    assert [name for name, content in sdist.items() if leaks(content)] == []
