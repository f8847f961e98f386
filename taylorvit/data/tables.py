"""Tables of samples that loader workers share with their parent.

A forked worker shares its parent's memory until one of them writes to it, and Python writes a reference count into every object
it so much as looks at: a list of a million paths is copied page by page into every worker. So what is kept per sample lies in a
few arrays here, and a Python object is made only for the sample that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from timm.utils import natural_key


class StringTable:
    """A read-only sequence of strings: one block of bytes, and N + 1 offsets into it."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]  # so file names need not be UTF-8
        self.blob = b"".join(encoded)
        self.offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), out=self.offsets[1:])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is outside of a table of {len(self)} strings")
        index %= len(self)
        return self.blob[self.offsets[index] : self.offsets[index + 1]].decode("utf-8", "surrogateescape")


def total_order(name: str) -> tuple[list[int | str], str]:
    """Return the sort key of timm's natural order (2 before 10), in which also names that it takes for equal have an order."""
    return natural_key(name), name
