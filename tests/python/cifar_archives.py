"""Makes data sets in the file formats of CIFAR, with classes that can be learnt; real ones cannot be had everywhere.

As a script, for longer runs than tests are:

    python tests/python/cifar_archives.py FOLDER --classes 10 --version binary --train 5000 --test 1000
"""

from __future__ import annotations

import argparse
import io
import pickle
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np

SIDE = 32


def images(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [count, 3072] and labels: each class a smooth coloured pattern, moved, dimmed and under noise."""
    patterns = np.random.default_rng(0).standard_normal((classes, 3, 4, 4))  # of every seed: the classes themselves
    smooth = np.kron(patterns, np.ones((1, 1, SIDE // 4, SIDE // 4)))
    for axis in (2, 3):
        for _ in range(4):
            smooth = (np.roll(smooth, 1, axis) + smooth + np.roll(smooth, -1, axis)) / 3
    random = np.random.default_rng((seed, count))
    labels = random.integers(classes, size=count)
    shifts = random.integers(-4, 5, size=(count, 2))
    contrast = random.uniform(0.1, 0.5, size=(count, 1, 1, 1))
    moved = np.stack([np.roll(smooth[label], shift, (1, 2)) for label, shift in zip(labels, shifts, strict=True)])
    noisy = moved * contrast + random.standard_normal(moved.shape)
    return np.clip(128 + 50 * noisy, 0, 255).astype(np.uint8).reshape(count, -1), labels


class _Python2Pickler(pickle._Pickler):
    """Bytes as Python 2 wrote its strings, which is what CIFAR's files hold."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def python2_pickle(content: object) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def files(version: str, classes: int, train: int, test: int) -> dict[str, bytes]:
    """The data set's files by name; `train` is a multiple of 5 for 10 classes."""
    suffix = ".bin" if version == "binary" else ""
    if classes == 10:
        names = [f"data_batch_{number}{suffix}" for number in range(1, 6)]
        last = f"test_batch{suffix}"
    else:
        names, last = [f"train{suffix}"], f"test{suffix}"
    pixels, labels = images(train, classes, 1)
    parts = dict(zip(names, zip(np.split(pixels, len(names)), np.split(labels, len(names)), strict=True), strict=True))
    parts[last] = images(test, classes, 2)
    return {name: _file(version, classes, name, *part) for name, part in parts.items()}


def _file(version: str, classes: int, name: str, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    coarse = labels // 5
    if version == "binary":
        columns = [labels] if classes == 10 else [coarse, labels]
        return np.concatenate([np.stack(columns, 1).astype(np.uint8), pixels], 1).tobytes()
    content = {
        b"batch_label": name.encode(),
        b"data": pixels,
        b"filenames": [b"%d.png" % row for row in range(len(labels))],
    }
    if classes == 10:
        content[b"labels"] = labels.tolist()
    else:
        content |= {b"coarse_labels": coarse.tolist(), b"fine_labels": labels.tolist()}
    return python2_pickle(content)


def folder_name(version: str, classes: int) -> str:
    if classes == 10:
        return "cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py"
    return "cifar-100-binary" if version == "binary" else "cifar-100-python"


def write_folder(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path: Path, inside: str, content: dict[str, bytes]) -> Path:
    """A .tar.gz with a file beside the data, as the published ones have."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {"readme.html": b"<html>", **content}.items():
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, choices=(10, 100), default=10)
    parser.add_argument("--version", choices=("binary", "python"), default="binary")
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=1000)
    typed = parser.parse_args()
    content = files(typed.version, typed.classes, typed.train, typed.test)
    print(write_folder(typed.folder / folder_name(typed.version, typed.classes), content))


if __name__ == "__main__":
    main()
