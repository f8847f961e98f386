"""The digits are written once, whole and always the same; Fashion-MNIST's files are checked before they are believed."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from taylorvit.config import DataConfig
from taylorvit.data import build_dataset, check_classes
from taylorvit.data.samples import FASHION_MNIST_CLASSES, prepare_digits

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def folder_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.png")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_digits_are_the_real_ones_split_once_and_for_all(tmp_path):
    config = DataConfig(dataset="digits", root=str(tmp_path / "new/digits"))
    train, val = (build_dataset(config, split, in_chans=1) for split in ("train", "val"))
    assert (len(train), len(val)) == (1442, 355)
    check_classes(train, val)
    assert train.classes == [str(digit) for digit in range(10)]
    numbers = [{int(Path(split.sample_name(index)).stem) for index in range(len(split))} for split in (train, val)]
    assert sorted(numbers[0] | numbers[1]) == list(range(1797))
    shares = np.bincount([val[index][1] for index in range(len(val))]) / np.bincount(load_digits().target)
    assert abs(shares - 0.2).max() < 0.01
    digits = load_digits()
    for index in (0, 700, 1441):
        image, label = train[index]
        number = int(Path(train.sample_name(index)).stem)
        assert label == digits.target[number]
        assert np.array_equal(np.asarray(image), np.rint(digits.images[number] * 255 / 16))
    prepare_digits(tmp_path / "other")
    assert folder_hash(tmp_path / "other") == folder_hash(tmp_path / "new/digits")


def test_two_processes_may_write_the_digits_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare_digits, args=(tmp_path / "digits",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.rglob("*.png"))) == 1797
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_digits_never_overwrite_other_files(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other files"):
        build_dataset(DataConfig(dataset="digits", root=str(tmp_path)), "train", in_chans=1)
    assert (tmp_path / "photo.png").read_bytes() == b"mine"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written"):
        build_dataset(DataConfig(dataset="digits", root=str(tmp_path / "file/digits")), "train", in_chans=1)


def idx(magic: int, pixels: np.ndarray) -> bytes:
    return magic.to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in pixels.shape) + pixels.tobytes()


IMAGES = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
LABELS = np.array([9, 0, 3, 3, 1], dtype=np.uint8)
GOOD = {
    "t10k-images-idx3-ubyte.gz": gzip.compress(idx(0x0803, IMAGES), mtime=0),
    "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(0x0801, LABELS), mtime=0),
}


def open_fashion_mnist(root: Path, files: dict[str, bytes]):
    for name, content in files.items():
        (root / name).write_bytes(content)
    return build_dataset(DataConfig(dataset="fashion_mnist", root=str(root)), "val", in_chans=1)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, packed):
    files = GOOD if packed else {name.removesuffix(".gz"): gzip.decompress(content) for name, content in GOOD.items()}
    dataset = open_fashion_mnist(tmp_path, files)
    assert dataset.classes == FASHION_MNIST_CLASSES
    assert [dataset[index][1] for index in range(5)] == LABELS.tolist()
    assert np.array_equal(np.stack([np.asarray(dataset[index][0]) for index in range(5)]), IMAGES)
    assert dataset.sample_name(4) == "t10k-images-idx3-ubyte[4]"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-images-idx3-ubyte.gz", b"no gzip", "broken gzip"),
        ("t10k-images-idx3-ubyte.gz", GOOD["t10k-images-idx3-ubyte.gz"][:-30], "broken gzip"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(b"", mtime=0), "not an idx file"),
        ("t10k-images-idx3-ubyte.gz", GOOD["t10k-labels-idx1-ubyte.gz"], "not an idx file of 3-dimensional"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(0x0803, IMAGES)[:-1], mtime=0), "cut or damaged"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(0x0803, IMAGES[:4]), mtime=0), "4 t10k images but 5 labels"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(0x0801, LABELS + 1), mtime=0), "labels reach 10"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        open_fashion_mnist(tmp_path, GOOD | {name: content})


def test_fashion_mnist_knows_its_splits(tmp_path):
    with pytest.raises(ValueError, match="no split 'tset'"):
        build_dataset(DataConfig(dataset="fashion_mnist", root=str(tmp_path)), "tset", in_chans=1)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="package dataset-fashion-mnist is not installed")
def test_the_whole_fashion_mnist():
    config = DataConfig(dataset="fashion_mnist", root=str(DEBIAN_FASHION_MNIST))
    train, val = (build_dataset(config, split, in_chans=1) for split in ("train", "val"))
    assert (len(train), len(val)) == (60_000, 10_000)
    assert train[0][0].size == (28, 28)
    assert np.bincount(train.source.labels).tolist() == [6000] * 10
