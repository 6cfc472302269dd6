"""CIFAR's files: both versions of both data sets, as folder and as archive; damaged and hostile ones are refused."""

# ruff: noqa: E402, where there is no torch the last imports fail

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cifar_archives import files, folder_name, images, python2_pickle, write_archive, write_folder

from hbfp.errors import FileError, HBFPError
from hbfp.training.cifar import CIFAR
from hbfp.training.images import PADDING, Images

VERSIONS = [(version, classes) for version in ("binary", "python") for classes in (10, 100)]


def small(version="binary", classes=10):
    return files(version, classes, 20, 5)


def expected(classes):
    (train, train_labels), (test, test_labels) = images(20, classes, 1), images(5, classes, 2)
    return train.reshape(-1, 3, 32, 32), train_labels, test.reshape(-1, 3, 32, 32), test_labels


@pytest.mark.parametrize("packed", ["folder", "parent", "archive"])
@pytest.mark.parametrize(("version", "classes"), VERSIONS)
def test_reads_what_was_written(version, classes, packed, tmp_path):
    """Hunts planes in another order, coarse labels for fine ones, batches in another order than their numbers."""
    inside = folder_name(version, classes)
    if packed == "archive":
        path = write_archive(tmp_path / "cifar.tar.gz", inside, small(version, classes))
    else:
        path = write_folder(tmp_path / inside, small(version, classes))
        path = tmp_path if packed == "parent" else path
    before = sorted(tmp_path.rglob("*"))
    read = CIFAR.read(path)
    assert read.classes == classes
    for ours, theirs in zip((*read.train, *read.test), expected(classes), strict=True):
        assert np.array_equal(ours, theirs)
    assert sorted(tmp_path.rglob("*")) == before, "an archive is not unpacked to disk"


def test_data_are_the_same_however_they_are_packed(tmp_path):
    """A run must resume from the archive what it began in the folder, and no other data."""
    digests = {CIFAR.read(write_folder(tmp_path / version, small(version))).sha256 for version in ("binary", "python")}
    assert len(digests) == 1
    assert CIFAR.read(write_folder(tmp_path / "100", small(classes=100))).sha256 not in digests


def damaged(case):
    """A data set's files, one of them wrong, and what the error must name."""
    content = small("python" if case.startswith("pickle") else "binary")
    name = "data_batch_3" + ("" if case.startswith("pickle") else ".bin")
    rest = dict(pickle.loads(content[name], encoding="bytes")) if case.startswith("pickle") else {}
    if case == "missing":
        del content[name]
    elif case == "cut":
        content[name] = content[name][:-1]
    elif case == "an image short":
        content[name] = content[name][3073:]
    elif case == "empty":
        content[name] = b""
    elif case == "label":
        content[name] = b"\x0a" + content[name][1:]
    elif case == "pickle cut":
        content[name] = content[name][: len(content[name]) // 2]
    elif case == "pickle label":
        content[name] = python2_pickle(rest | {b"labels": [0, 1, 10, 3]})
    elif case == "pickle negative":
        content[name] = python2_pickle(rest | {b"labels": [0, -1, 1, 3]})
    elif case == "pickle labels short":
        content[name] = python2_pickle(rest | {b"labels": [0, 1]})
    elif case == "pickle labels of text":
        content[name] = python2_pickle(rest | {b"labels": [b"cat"] * 4})
    elif case == "pickle pixels":
        content[name] = python2_pickle(rest | {b"data": rest[b"data"][:, 1:].copy()})
    elif case == "pickle floats":
        content[name] = python2_pickle(rest | {b"data": rest[b"data"].astype(np.float32)})
    elif case == "pickle no dict":
        content[name] = python2_pickle([1, 2])
    return content, name


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("missing", "without"),
        ("cut", "not a multiple of an image's 3073"),
        ("an image short", "differ in their numbers"),
        ("empty", "truncated"),
        ("label", r"image 0 has 10 among its labels, which are 0…9"),
        ("pickle cut", "not a pickle of"),
        ("pickle label", r"image 2 has 10"),
        ("pickle negative", r"image 1 has -1"),
        ("pickle labels short", "a list 'labels' of 4 numbers"),
        ("pickle labels of text", "a list 'labels' of 4 numbers"),
        ("pickle pixels", r"\[images, 3072\]"),
        ("pickle floats", "not of bytes"),
        ("pickle no dict", "expected a dict, found list"),
    ],
)
@pytest.mark.parametrize("packed", ["folder", "archive"])
def test_damaged_files_are_refused_by_name(case, named, packed, tmp_path):
    content, name = damaged(case)
    path = (
        write_folder(tmp_path / "data", content)
        if packed == "folder"
        else write_archive(tmp_path / "data.tar.gz", "any", content)
    )
    with pytest.raises(FileError, match=named) as caught:
        CIFAR.read(path)
    assert name in str(caught.value)


def test_coarse_labels_are_checked(tmp_path):
    content = small("binary", 100)
    content["train.bin"] = b"\x14" + content["train.bin"][1:]
    with pytest.raises(FileError, match="20 among its coarse_labels"):
        CIFAR.read(write_folder(tmp_path, content))


class _Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused(protocol, tmp_path):
    marker = tmp_path / "ran"
    hostile = pickle.dumps({"data": _Hostile(marker)}, protocol)
    path = write_folder(tmp_path / "data", small("python") | {"data_batch_2": hostile})
    with pytest.raises(FileError, match=r"data_batch_2 .* asks for \w+\.mkdir"):
        CIFAR.read(path)
    assert not marker.exists()
    pickle.loads(hostile)  # the test itself: it does run
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\ndtype\n(S'O8'\ntR.",  # objects
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n(NNNtR(I1\n(I-1\nI-4\ntNI00\nS'abcd'\ntb.",  # negative sizes
        b"cnumpy\ndtype\n}S'__init__'\nI1\nsb.",  # would change the stand-in itself
        b"cnumpy\nndarray\n(I1\ntR.",
        b"Ppersistent\n.",
        b"\x82\x01.",  # an entry of copyreg's table
    ],
)
def test_what_arrays_of_bytes_do_not_need_is_refused(content, tmp_path):
    path = write_folder(tmp_path, small("python") | {"test_batch": content})
    with pytest.raises(FileError, match="test_batch"):
        CIFAR.read(path)
    # Nothing of it stays behind.
    assert CIFAR.read(write_folder(tmp_path / "next", small("python"))).classes == 10


def test_two_data_sets_in_one_place_are_refused(tmp_path):
    write_folder(tmp_path, small("binary", 10))
    write_folder(tmp_path, small("binary", 100))
    with pytest.raises(FileError, match="CIFAR-10, binary version and CIFAR-100, binary version"):
        CIFAR.read(tmp_path)


def test_other_places_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"holds no file of CIFAR.*data_batch_1\.bin"):
        CIFAR.read(tmp_path)
    with pytest.raises(FileError, match=r"no .*absent"):
        CIFAR.read(tmp_path / "absent")
    text = tmp_path / "text"
    text.write_text("no archive")
    with pytest.raises(FileError, match="neither a folder nor a whole tar archive"):
        CIFAR.read(text)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_a_truncated_download_is_refused(share, tmp_path):
    path = write_archive(tmp_path / "whole.tar.gz", "any", small())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"whole\.tar\.gz"):
        CIFAR.read(path)


def test_links_and_doubles_in_an_archive_are_not_followed(tmp_path):
    content = small()
    path = tmp_path / "linked.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            if name == "test_batch.bin":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    with pytest.raises(FileError, match=r"without test_batch\.bin"):
        CIFAR.read(path)
    with tarfile.open(path, "w") as archive:
        for name in ("a/train.bin", "b/train.bin"):
            member = tarfile.TarInfo(name)
            archive.addfile(member, io.BytesIO())
    with pytest.raises(FileError, match=r"more than one train\.bin"):
        CIFAR.read(path)


def test_a_huge_member_is_not_read(tmp_path):
    path = tmp_path / "huge.tar"
    member = tarfile.TarInfo("train.bin")
    member.size = 1 << 40
    path.write_bytes(member.tobuf())
    with pytest.raises(FileError, match="more than any file of CIFAR"):
        CIFAR.read(path)


# --- batches


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return CIFAR.read(write_folder(tmp_path_factory.mktemp("cifar"), small()))


def test_batches_are_a_function_of_seed_and_step(cifar):
    """A generator that remembers, or one stream for order and crops, would give a resumed run other batches."""
    data, again = Images(cifar, 6), Images(cifar, 6)
    _ = again.batch(3, 0), again.batch(4, 7)
    for seed, step in ((0, 0), (3, 11), (2**64 - 1, 1000)):
        for ours, theirs in zip(data.batch(seed, step), again.batch(seed, step), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(data.batch(0, 0)[0], data.batch(0, 1)[0])
    assert not torch.equal(data.batch(0, 0)[0], data.batch(1, 0)[0])


def test_a_training_image_is_a_crop_of_its_frame_mirrored_or_not(cifar):
    """Hunts labels that went to other images, crops off the frame, mirrors upside down, and a choice never made."""
    data = Images(cifar, 20)
    whole = torch.cat([inputs for inputs, _ in Images(CIFAR("", 10, cifar.train, cifar.train), 20).validation()])
    frames = torch.nn.functional.pad(whole, (PADDING,) * 4)
    crops = frames.unfold(2, 32, 1).unfold(3, 32, 1)  # [image, channel, top, left, 32, 32]
    seen = set()
    for step in range(6):
        inputs, targets = data.batch(0, step)
        for image, target in zip(inputs, targets, strict=True):
            found = [
                (top, left, mirrored)
                for row in np.flatnonzero(cifar.train[1] == int(target))
                for mirrored, candidate in enumerate((image, image.flip(-1)))
                for top, left in (crops[row] == candidate[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
            ]
            assert len(found) == 1
            seen |= set(found)
    for place, values in enumerate((range(9), range(9), range(2))):
        assert {crop[place] for crop in seen} == set(values)


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(cifar):
    data = Images(cifar, 6)
    assert data.steps_per_epoch == 3
    targets = [torch.cat([data.batch(0, 3 * epoch + step)[1] for step in range(3)]) for epoch in range(2)]
    assert not torch.equal(*targets)
    whole = Images(cifar, 20).batch(5, 0)[1]
    assert sorted(whole.tolist()) == sorted(cifar.train[1].tolist())


def test_pixels_are_normalised_by_the_training_images(cifar):
    """Statistics of a batch, or of the test images, would differ from run to run, or leak."""
    pixels = cifar.train[0].astype(np.float64)
    mean = pixels.mean((0, 2, 3), keepdims=True)
    deviation = pixels.std((0, 2, 3), keepdims=True)
    validation = torch.cat([inputs for inputs, _ in Images(cifar, 3).validation()])
    # A tolerance: here the sums are taken in another order.
    assert np.allclose(validation.numpy(), (cifar.test[0] - mean) / deviation, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        torch.cat([targets for _, targets in Images(cifar, 3).validation()]), torch.from_numpy(cifar.test[1])
    )


@pytest.mark.parametrize("size", [0, -1, 21])
def test_impossible_batches_are_refused(size, cifar):
    with pytest.raises(HBFPError, match="1 to 20 images"):
        Images(cifar, size)


def test_a_constant_channel_is_no_division_by_zero():
    grey = (np.full((4, 3, 32, 32), 7, np.uint8), np.zeros(4, np.int64))
    assert not Images(CIFAR("", 10, grey, grey), 2).batch(0, 0)[0].any()
