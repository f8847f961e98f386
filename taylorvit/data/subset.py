"""A part of a split, written behind its name: `train[:90%]` to train on, `train[90%:]` to choose by.

Percentages count within each hundred samples: `[:90%]` are those whose number ends in 00 to 89. So of 50,000 samples exactly
45,000 and 5,000 remain, and a set that is sorted by class keeps all its classes in both parts if each has a hundred samples.
Hugging Face's own way of writing such parts looks the same, but takes the first samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from PIL import Image

from taylorvit.data.source import Source


def parse_split(split: str) -> tuple[str, tuple[int, int] | None]:
    """Return the name of a split and the percentages [low, high) that are taken of it, or None for the whole.

    Raises:
        ValueError: a bracket that holds no such range.
    """
    name, bracket, inside = split.partition("[")
    if not bracket:
        return split, None
    match = re.fullmatch(r"(?:([0-9]+)%)?:(?:([0-9]+)%)?\]", inside)
    low, high = (int(match[1] or 0), int(match[2] or 100)) if match else (0, 0)
    if not name or not 0 <= low < high <= 100:
        raise ValueError(f"split {split!r}: expected NAME[LOW%:HIGH%] with whole percentages, such as train[:90%]")
    return name, (low, high)


class Subset:
    """The samples of a source whose number, modulo 100, lies in [low, high).

    Raises:
        ValueError: there are none.
    """

    def __init__(self, source: Source, low: int, high: int) -> None:
        numbers = np.arange(len(source))
        self.numbers = numbers[(numbers % 100 >= low) & (numbers % 100 < high)]
        if not len(self.numbers):
            raise ValueError(f"the part [{low}%:{high}%] of {len(source)} samples is empty")
        self.source = source
        self.part = f"[{low}%:{high}%]"
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> tuple[BinaryIO | Image.Image, int]:
        """Return sample `index` of the part."""
        return self.source.read(int(self.numbers[index]))

    def name(self, index: int) -> str:
        """Name sample `index` of the part as the whole set does."""
        return self.source.name(int(self.numbers[index]))

    def identity(self) -> Iterable[bytes]:
        """Return the whole set's identity and the part."""
        return [*self.source.identity(), self.part.encode()]


def share_samples(first: Source, second: Source) -> bool:
    """Whether two sources, or parts of them, are of one set and have a sample in common.

    Sets of image folders are told apart by their folders, others by their identity: two folders may hold files of equal names.
    """
    (one, numbers), (other, others) = _whole(first), _whole(second)
    folders = getattr(one, "folder", None), getattr(other, "folder", None)
    same = folders[0] == folders[1] if any(folders) else list(one.identity()) == list(other.identity())
    return same and len(np.intersect1d(numbers, others)) > 0


def _whole(source: Source) -> tuple[Source, np.ndarray]:
    """Return the whole set, and the numbers of the samples that are taken of it."""
    return (source.source, source.numbers) if isinstance(source, Subset) else (source, np.arange(len(source)))
