"""The build backend: maturin, told to keep build paths out of the compiled extension.

Panic messages of dependencies name their source files by absolute path: the builder's home directory, and with it the
user's name. Cargo's own remedy, `trim-paths`, is not stable, and a static setting cannot know the paths. So they are
remapped here, where every route to the extension passes: `make setup`, `pip install`, and a wheel made from an sdist.
(`maturin build` by hand does not pass here: its wheels are for the builder's own use.)
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import maturin
from maturin import (  # the hooks that compile nothing are maturin's own
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

SEPARATOR = "\x1f"  # what CARGO_ENCODED_RUSTFLAGS puts between flags, since paths may hold spaces


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    remap_build_paths()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    remap_build_paths()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


def remap_build_paths() -> None:
    """Add one `--remap-path-prefix` per place that a source file can come from to the caller's own flags."""
    places = {str(Path.cwd()): "hbfp", str(Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")): "cargo"}
    if shutil.which("rustc"):
        sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True)
        places[sysroot.stdout.strip()] = "rust"
    flags = [f"--remap-path-prefix={place}={name}" for place, name in places.items()]
    if encoded := os.environ.get("CARGO_ENCODED_RUSTFLAGS"):
        flags = [*encoded.split(SEPARATOR), *flags]
    else:
        flags = [*os.environ.get("RUSTFLAGS", "").split(), *flags]
    os.environ["CARGO_ENCODED_RUSTFLAGS"] = SEPARATOR.join(flags)
