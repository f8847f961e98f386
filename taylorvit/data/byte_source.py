"""Samples that are bytes, all of a split in memory: one block, its offsets and the labels, which loader workers share.

ListOps keeps the numbers of its tokens this way, IMDB the bytes of its reviews. See `tables` for why it is not a list.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable

import numpy as np


class ByteSource:
    """A `Source` of samples that are short strings of bytes; what they are called is the subclass's to say.

    Args:
        samples: bytes and class number of each.
        classes: names of the classes.
    """

    def __init__(self, samples: Iterable[tuple[bytes, int]], classes: list[str]) -> None:
        blob, sizes, labels = bytearray(), [], []
        for content, label in samples:
            blob += content
            sizes.append(len(content))
            labels.append(label)
        self.blob = bytes(blob)
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)  # (samples + 1,)
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def longest(self) -> int:
        """Bytes of the longest sample."""
        return int(np.diff(self.offsets).max(initial=0))

    def content(self, index: int) -> bytes:
        """Return the bytes of sample `index`."""
        return self.blob[self.offsets[index] : self.offsets[index + 1]]

    def read(self, index: int) -> tuple[io.BytesIO, int]:
        """Return sample `index` as an open file, and its label."""
        return io.BytesIO(self.content(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        """Name sample `index` for messages."""
        raise NotImplementedError

    def identity(self) -> list[bytes]:
        """Return a digest of all samples, where each begins, and the labels."""
        return [hashlib.sha256(self.blob).digest(), self.offsets.tobytes(), self.labels.tobytes()]
