"""Image folders: class = leaf folder, as timm has it, but listed here.

timm's own listing follows links in circles, takes hidden folders for classes, and leaves the order of classes whose names
differ only in case or leading zeros to chance, so that two processes could number them differently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from taylorvit.data.tables import StringTable, total_order
from taylorvit.data.webdataset import IMAGE_SUFFIXES


class FolderSource:
    """The images in the class folders of `root/split`; hidden files and folders are ignored.

    Raises:
        ValueError: no such folder, no images, a class folder without any, an image in none, links that go in circles.
    """

    def __init__(self, root: Path, split: str) -> None:
        folder = _split_folder(root, split)
        found = [(path, os.path.basename(os.path.dirname(path))) for path in _list_images(str(folder))]
        if not found:
            raise ValueError(f"data.root: no images ({', '.join(IMAGE_SUFFIXES)}) in the class folders of {folder}")
        found.sort(key=lambda item: total_order(item[0]))
        for path, name in found:
            if not name:
                raise ValueError(f"data.root: {folder / path} lies in no class folder")
        _check_no_empty_class(folder, {path.split(os.sep)[0] for path, _ in found})
        self.classes = sorted({name for _, name in found}, key=total_order)
        number_of = {name: number for number, name in enumerate(self.classes)}
        self.folder = str(folder)
        self.paths = StringTable(path for path, _ in found)
        self.labels = np.array([number_of[name] for _, name in found], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        """Open image `index`."""
        return open(self.name(index), "rb", opener=_open_at_once), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.folder, self.paths[index])

    def identity(self) -> list[bytes]:
        """Return the paths below the folder and the labels."""
        return [self.paths.blob, self.paths.offsets.tobytes(), self.labels.tobytes()]


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: to open a named pipe would last until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _split_folder(root: Path, split: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        present = sorted(path.name for path in root.iterdir() if path.is_dir())[:5]
        raise ValueError(f"data.root {str(root)!r} has no folder {split!r}; it holds {', '.join(present) or 'no folders'}")
    return folder


def _list_images(folder: str) -> Iterator[str]:
    """Yield the paths, below the folder, of all files with an image's suffix, in no order."""
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            _check_no_circle(place, name)
        below = os.path.relpath(place, folder) if place != folder else ""
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(below, name)


def _refuse(error: OSError) -> None:
    """Stop at a folder that cannot be listed, which os.walk would leave out without a word."""
    raise ValueError(f"data.root: {error.filename} cannot be listed: {error.strerror}") from error


def _check_no_circle(place: str, name: str) -> None:
    path = os.path.join(place, name)
    if os.path.islink(path) and f"{os.path.realpath(place)}{os.sep}".startswith(f"{os.path.realpath(path)}{os.sep}"):
        raise ValueError(f"data.root: {path} is a link to a folder that it lies in")


def _check_no_empty_class(folder: Path, filled: set[str]) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in filled:
            raise ValueError(f"data.root: there is no image in {entry.path}: fill this class folder, or remove it")
