"""Saves that do not come to their end: killed, on a full disk, in a folder that may not be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import hbfp

OLD = {"w": hbfp.encode(np.linspace(-1, 1, 640, dtype=np.float32).reshape(10, 64), "hbfp4b64"), "b": np.arange(5.0)}

# Runs in a child: `save` with what the test wants to happen on the way.
CHILD = """
import os, resource, signal, sys
import numpy as np
import hbfp
from hbfp.files import Deferred

path, where, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def make():
    if where == "tensor":
        kill()
    return np.ones((1000, 1000), np.float32)

if where in ("fsync", "replace"):
    setattr(os, where, kill)
if where == "replace of the index":
    replace = os.replace
    os.replace = lambda a, b: kill() if str(b).endswith("json") else replace(a, b)
tensors = {"a": np.ones((1000, 1000), np.float32), "z": Deferred("F32", (1000, 1000), make)}
if where == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
try:
    hbfp.save(path, tensors, max_shard_size=limit or None)
except OSError as error:
    print(error.errno, error.filename)
"""


def child(path: Path, where: str, limit: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHILD, str(path), where, str(limit)], capture_output=True, text=True)


def is_old(path: Path) -> bool:
    found = hbfp.load(path, verify=True)
    return found.keys() == OLD.keys() and found["w"] == OLD["w"] and np.array_equal(found["b"], OLD["b"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("where", ["tensor", "fsync", "replace"])
def test_a_killed_save_leaves_the_old_file_whole(path, where):
    """SIGKILL: nothing can be tidied up, so nothing may need to be."""
    hbfp.save(path, OLD)
    assert child(path, where).returncode == -9
    assert is_old(path)
    drafts = [file for file in path.parent.iterdir() if file != path]
    assert len(drafts) == 1
    assert drafts[0].name.startswith(".model.safetensors.")
    assert drafts[0].suffix == ".tmp"
    hbfp.save(path, OLD)  # what was left behind is in nobody's way
    assert is_old(path)


def test_a_killed_first_save_leaves_no_file(path):
    assert child(path, "tensor").returncode == -9
    assert not path.exists()


@pytest.mark.parametrize("where", ["tensor", "replace", "replace of the index"])
def test_a_killed_save_of_shards_leaves_the_old_model(path, where):
    hbfp.save(path, OLD, max_shard_size=100)
    assert child(path, where, 4_000_000).returncode == -9
    assert is_old(path)
    hbfp.save(path, OLD, max_shard_size=100)
    assert is_old(path)


def test_a_file_that_may_not_grow(path):
    """The limit of the process stands for a disk that fills up: EFBIG, from the middle of a write."""
    hbfp.save(path, OLD)
    done = child(path, "limit")
    assert done.stdout.split() == ["27", str(path)], done.stderr
    assert is_old(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_full_disk(tmp_path, capsys):
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs the right to")
    try:
        path = disk / "model.safetensors"
        hbfp.save(path, OLD)
        done = child(path, "none")
        assert done.stdout.split() == ["28", str(path)], done.stderr
        assert is_old(path)
        assert [file.name for file in disk.iterdir()] == [path.name]
        # The command tells it in one line.
        from hbfp.tools.cli import main

        hbfp.save(tmp_path / "x", {"w": np.ones((2000, 2000), np.float32)})
        assert main(["quantize", str(tmp_path / "x"), str(path), "--rule", "*=none"]) == 2
        assert capsys.readouterr().err == f"hbfp quantize: {path}: No space left on device\n"
        assert is_old(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


READ_ONLY = """
import os, sys
import hbfp
import numpy as np
if os.geteuid() == 0:
    os.seteuid(65534)  # root writes everywhere
for limit in (None, 8):
    try:
        hbfp.save(sys.argv[1], {"b": np.arange(5.0), "c": np.arange(5.0)}, max_shard_size=limit)
    except OSError as error:
        print(type(error).__name__, os.path.dirname(error.filename))
print(*hbfp.load(sys.argv[1], verify=True))
"""


def test_a_folder_that_may_not_be_written():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # others may look into it, which they may not into pytest's
    try:
        path = folder / "model.safetensors"
        hbfp.save(path, OLD)
        path.chmod(0o644)
        folder.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", READ_ONLY, str(path)], capture_output=True, text=True)
        assert done.stdout.splitlines() == [f"PermissionError {folder}"] * 2 + ["w b"], done.stderr
        assert os.listdir(folder) == [path.name]
        assert is_old(path)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_disk(tmp_path):
    """Not even a draft that was never made can be deleted there; the error is still that of the write."""
    disk = tmp_path / "disk"
    disk.mkdir()
    path = disk / "model.safetensors"
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs the right to")
    try:
        hbfp.save(path, OLD)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for limit in (None, 100):
            with pytest.raises(OSError, match="Read-only file system") as found:
                hbfp.save(path, OLD, max_shard_size=limit)
            assert not Path(found.value.filename).name.startswith("."), "the name of a draft"
        assert is_old(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
