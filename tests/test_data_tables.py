"""Samples kept in arrays: the same strings come back, and no Python object is kept per sample."""

from __future__ import annotations

import gc
import io
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from taylorvit.config import DataConfig
from taylorvit.data import build_dataset
from taylorvit.data.tables import StringTable

STRINGS = ["a/b.png", "", "\u00e9/\u96ea.png", "x" * 1000, "latin \udce9.jpg"]


def test_strings_come_back_as_they_went_in():
    table = StringTable(iter(STRINGS))
    assert [table[index] for index in range(len(table))] == STRINGS
    assert table[-1] == STRINGS[-1]
    assert list(table) == STRINGS
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"{index} is outside of a table of 5"):
            table[index]
    assert list(pickle.loads(pickle.dumps(table))) == STRINGS
    assert list(StringTable([])) == []


def write_samples(root: Path, count: int) -> None:
    """Write the same `count` images as a folder, as a tar of class folders and as a shard."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG")
    with tarfile.open(root / "train.tar", "w") as folders, tarfile.open(root / "train-0.tar", "w") as shard:
        for number in range(count):
            path = root / "train" / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
            folders.add(path, f"{number % 2}/{number}.png")
            shard.add(path, f"{number}.png")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(str(number % 2).encode()))


def count_objects(root: object) -> int:
    """Count the Python objects that can be reached from an object, classes and modules left out."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen and not isinstance(item, type | type(sys)):
            seen.add(id(item))
            waiting += gc.get_referents(item)
    return len(seen)


@pytest.mark.parametrize("kind", ["folder", "tar", "wds"])
def test_no_object_is_kept_for_a_sample(tmp_path, kind):
    """Reading a reference-counted object copies its memory page into the worker that does."""
    counts = []
    for number in (10, 60):
        (tmp_path / str(number)).mkdir()
        write_samples(tmp_path / str(number), number)
        dataset = build_dataset(DataConfig(dataset=kind, root=str(tmp_path / str(number))), "train", in_chans=1)
        assert len(dataset) == number
        for index in range(number):
            image, label = dataset[index]
            assert image.size == (2, 2)
            assert type(label) is int
            assert int(Path(dataset.sample_name(index)).stem) % 2 == label
        counts.append(count_objects(dataset))
    assert counts[0] == counts[1]
