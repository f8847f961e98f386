"""A fingerprint tells one data set from another, and is the same wherever a set is stored."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from test_data_images import write_folder, write_shards

from taylorvit.config import DataConfig
from taylorvit.data import ImageDataset, build_dataset, dataset_fingerprint
from taylorvit.data.images import FolderSource
from taylorvit.data.samples import FashionMnist
from taylorvit.data.tables import StringTable


def fingerprint(root: Path, kind: str = "folder") -> str:
    return dataset_fingerprint(build_dataset(DataConfig(dataset=kind, root=str(root)), "train", in_chans=3))


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_a_moved_data_set_is_the_same(tmp_path, kind):
    write_folder(tmp_path / "a", "train", ["cat", "dog"])
    write_shards(tmp_path / "a", "train", 4)
    first = fingerprint(tmp_path / "a", kind)
    assert len(first) == 64
    assert fingerprint(tmp_path / "a", kind) == first
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert fingerprint(tmp_path / "elsewhere" / "b", kind) == first


def more(root: Path) -> None:
    shutil.copy(root / "cat/0.png", root / "cat/2.png")


def fewer(root: Path) -> None:
    (root / "cat/0.png").unlink()


def renamed(root: Path) -> None:
    (root / "cat/0.png").rename(root / "cat/3.png")


def other_class(root: Path) -> None:
    (root / "dog").rename(root / "cow")


def moved(root: Path) -> None:
    (root / "cat/0.png").rename(root / "dog/2.png")


@pytest.mark.parametrize("change", [more, fewer, renamed, other_class, moved])
def test_other_samples_are_another_data_set(tmp_path, change):
    write_folder(tmp_path, "train", ["cat", "dog"])
    first = fingerprint(tmp_path)
    change(tmp_path / "train")
    assert fingerprint(tmp_path) != first


def test_another_shard_or_label_is_another_data_set(tmp_path):
    for name, count, shift in (("a", 4, 0), ("b", 5, 0), ("c", 4, 1)):
        write_shards(tmp_path / name, "train", count, shift=shift)
    assert len({fingerprint(tmp_path / name, "wds") for name in "abc"}) == 3


def test_labels_tell_sets_without_names_apart():
    source = FashionMnist.__new__(FashionMnist)
    source.stem = "train"
    source.images = np.zeros((4, 2, 2), dtype=np.uint8)
    found = set()
    for labels, source.classes in (([0, 1, 1, 0], ["0", "1"]), ([0, 1, 0, 1], ["0", "1"]), ([0, 1, 0, 1], ["0", "2"])):
        source.labels = np.array(labels, dtype=np.uint8)
        found.add(dataset_fingerprint(ImageDataset(source, in_chans=1)))
    assert len(found) == 3


def test_a_set_of_the_size_of_imagenet_takes_about_a_second():
    source = FolderSource.__new__(FolderSource)
    source.folder, source.classes = "train", [f"n{number:08d}" for number in range(1000)]
    source.paths = StringTable(f"n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(1_280_000))
    source.labels = np.arange(1_280_000, dtype=np.int32) % 1000
    started = time.process_time()
    dataset_fingerprint(ImageDataset(source, in_chans=3))
    assert time.process_time() - started < 2
