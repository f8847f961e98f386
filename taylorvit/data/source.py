"""What every kind of data set provides; decoding, sequences and parts of a split stand on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO, Protocol

from PIL import Image


class Source(Protocol):
    """What a kind of data set provides: encoded or decoded images by number."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[BinaryIO | Image.Image, int]:
        """Return image `index`, encoded or decoded, and its label."""

    def name(self, index: int) -> str:
        """Name image `index` for messages."""

    def identity(self) -> Iterable[bytes]:
        """Return what tells this set from another, wherever it is stored: sample names and labels."""
