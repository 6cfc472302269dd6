"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009) as their authors publish them: the binary and the python version, as a
folder or as the tar archive that was downloaded. Nothing is written to disk.

The python version consists of pickles, and a pickle can run any code. These are read by an unpickler that knows dicts,
lists, bytes and numbers, and a stand-in of its own for numpy's arrays; a file that asks for anything else is refused.
"""

import hashlib
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hbfp.errors import FileError

SIDE = 32
"""Pixels of an image's side."""

Labelled: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images [n, 3, 32, 32], red, green and blue, and their classes [n]."""

_PIXELS = 3 * SIDE * SIDE
# Larger than any file of the data sets (154 MB): what is more is not read into memory.
_LARGEST = 1 << 28


@dataclass(frozen=True, slots=True)
class _Layout:
    """The files of one version of one data set. `labels` are the classes that stand with each image, ours last."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: tuple[tuple[str, int], ...]
    binary: bool

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEN = (("labels", 10),)
_HUNDRED = (("coarse_labels", 20), ("fine_labels", 100))
_LAYOUTS = (
    _Layout(
        "CIFAR-10, binary version",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        "test_batch.bin",
        _TEN,
        True,
    ),
    _Layout("CIFAR-10, python version", "cifar-10-batches-py", _BATCHES, "test_batch", _TEN, False),
    _Layout("CIFAR-100, binary version", "cifar-100-binary", ("train.bin",), "test.bin", _HUNDRED, True),
    _Layout("CIFAR-100, python version", "cifar-100-python", ("train",), "test", _HUNDRED, False),
)
_KNOWN = {name for layout in _LAYOUTS for name in layout.files}
_EXPECTED = "; ".join(f"{layout.name} ({layout.files[0]}, …, {layout.test})" for layout in _LAYOUTS)


@dataclass(frozen=True, slots=True)
class CIFAR:
    """One of the two data sets."""

    source: str
    classes: int
    train: Labelled = field(repr=False)
    test: Labelled = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "CIFAR":
        """From a folder that holds the files, or the folder of that name; or from a tar archive, compressed or not.

        Raises:
            FileError: there are none of the known files, or of two versions; one is missing, truncated, too large,
                holds labels that the data set has not, or is a pickle of something else.
        """
        files = _from_folder(path) if path.is_dir() else _from_archive(path)
        found = [layout for layout in _LAYOUTS if not files.keys().isdisjoint(layout.files)]
        if not found:
            raise FileError(f"{path} holds no file of CIFAR; expected those of one of: {_EXPECTED}")
        if len(found) > 1:
            names = " and ".join(layout.name for layout in found)
            raise FileError(f"{path} holds files of {names}: give the folder or the archive of one")
        (layout,) = found
        missing = [name for name in layout.files if name not in files]
        if missing:
            raise FileError(f"{path}: {layout.name} without {', '.join(missing)}: get the whole archive again")
        parts = {name: _labelled(layout, name, files.pop(name)) for name in layout.files}
        sizes = {name: len(parts[name][1]) for name in layout.train}
        if len(set(sizes.values())) > 1:
            raise FileError(f"{path}: the training files differ in their numbers of images, a part is missing: {sizes}")
        train = [parts[name] for name in layout.train]
        return cls(
            f"{layout.name}, {path}",
            layout.labels[-1][1],
            (np.concatenate([images for images, _ in train]), np.concatenate([labels for _, labels in train])),
            parts[layout.test],
        )

    @property
    def sha256(self) -> str:
        """Of the pixels and classes: the same for both versions, packed or not."""
        digest = hashlib.sha256(str(self.classes).encode())
        for images, labels in (self.train, self.test):
            digest.update(np.ascontiguousarray(images).data)
            digest.update(labels.astype("<i8").data)
        return digest.hexdigest()


def _from_folder(path: Path) -> dict[str, bytes]:
    inside = [path, *(path / layout.folder for layout in _LAYOUTS)]
    files: dict[str, bytes] = {}
    for folder in inside:
        for name in sorted(_KNOWN):
            file = folder / name
            if file.is_file():
                _take(files, name, file.stat().st_size, str(file))
                files[name] = file.read_bytes()
        if files and folder == path:  # what lies in the folder itself comes before what lies below it
            break
    return files


def _from_archive(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in _KNOWN:
                    _take(files, name, member.size, f"{path}, {member.name}")
                    content = archive.extractfile(member)
                    files[name] = content.read() if content is not None else b""
                    if len(files[name]) != member.size:
                        raise FileError(f"{path} ends within {member.name}: get the archive again")
    except FileNotFoundError as error:
        raise FileError(f"no {path}; --data takes a folder or an archive of CIFAR") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # tarfile lists all that it tried
        raise FileError(
            f"{path} is neither a folder nor a whole tar archive ({reason}); --data takes CIFAR as it is published"
        ) from error
    return files


def _take(files: dict[str, bytes], name: str, size: int, where: str) -> None:
    """Before a file is read."""
    if name in files:
        raise FileError(f"{where}: there is more than one {name}; give the folder or the archive of one data set")
    if size > _LARGEST:
        raise FileError(f"{where} has {size} bytes, more than any file of CIFAR")


def _labelled(layout: _Layout, name: str, content: bytes) -> Labelled:
    return _from_binary(layout, name, content) if layout.binary else _from_pickle(layout, name, content)


def _from_binary(layout: _Layout, name: str, content: bytes) -> Labelled:
    """Records of one byte for each label and 3,072 of pixels: all red, all green, all blue, row by row."""
    size = len(layout.labels) + _PIXELS
    if not content or len(content) % size:
        raise FileError(
            f"{name} of {layout.name} has {len(content)} bytes, not a multiple of an image's {size}: it is truncated"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    for column, (kind, classes) in enumerate(layout.labels):
        _check_labels(name, kind, classes, records[:, column])
    images = records[:, len(layout.labels) :].reshape(-1, 3, SIDE, SIDE)
    return images, records[:, len(layout.labels) - 1].astype(np.int64)


def _from_pickle(layout: _Layout, name: str, content: bytes) -> Labelled:
    """A dict of the pixels, uint8 [n, 3072], and a list of labels of each kind."""
    loaded = _loads(name, content)
    if not isinstance(loaded, dict):
        raise FileError(f"{name} of {layout.name}: expected a dict, found {type(loaded).__name__}")
    array = loaded.get(b"data")
    pixels = array.pixels if isinstance(array, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        raise FileError(f"{name} of {layout.name}: expected an array 'data' of bytes, [images, {_PIXELS}]")
    labels = np.empty(0, np.int64)
    for kind, classes in layout.labels:
        found = loaded.get(kind.encode())
        if (
            not isinstance(found, list)
            or len(found) != len(pixels)
            or not all(type(label) is int and abs(label) < 1 << 31 for label in found)
        ):
            raise FileError(f"{name} of {layout.name}: expected a list {kind!r} of {len(pixels)} numbers")
        labels = np.array(found, np.int64)
        _check_labels(name, kind, classes, labels)
    return pixels.reshape(-1, 3, SIDE, SIDE), labels


def _check_labels(name: str, kind: str, classes: int, labels: NDArray[Any]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise FileError(
            f"{name}: image {wrong[0]} has {labels[wrong[0]]} among its {kind}, which are 0…{classes - 1}: "
            "the file is damaged, or of another data set"
        )


class _DType:
    """Stands for numpy.dtype; bytes are the only kind."""

    __slots__ = ()

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order, and fields that bytes do not have."""


class _Array:
    """Stands for numpy.ndarray: an array that the file describes, its sizes checked."""

    __slots__ = ("pixels",)

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.pixels: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[object, tuple[int, ...], object, object, object]) -> None:
        _, shape, dtype, columns_first, content = state
        if not isinstance(dtype, _DType) or not isinstance(content, bytes) or any(size < 0 for size in shape):
            raise pickle.UnpicklingError("an array that is none of bytes")
        flat = np.frombuffer(content, np.uint8)
        self.pixels = flat.reshape(shape[::-1]).T if columns_first else flat.reshape(shape)


_STAND_INS: dict[tuple[str, str], Any] = {
    (module, name): stand_in
    for module, name, stand_in in (
        ("numpy.core.multiarray", "_reconstruct", _Array),
        ("numpy._core.multiarray", "_reconstruct", _Array),
        ("numpy", "ndarray", object()),  # an argument of the first, never called
        ("numpy", "dtype", _DType),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """In place of an import: one of the stand-ins, or the end."""
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")
        return _STAND_INS[module, name]


def _loads(name: str, content: bytes) -> object:
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error) or type(error).__name__
        raise FileError(f"{name} is not a pickle of CIFAR's python version, and was not loaded: {reason}") from error
