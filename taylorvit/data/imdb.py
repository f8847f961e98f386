"""IMDB's film reviews (Maas et al. 2011), read byte by byte: neg is class 0, pos class 1.

The files are the user's: the folder aclImdb as it is published, or its .tar or .tar.gz, which is read as it stands. The bytes
are not decoded and markup such as `<br />` stays, as in Long Range Arena. train/unsup has no labels and is left out.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from timm.utils import natural_key

from taylorvit.data.byte_source import ByteSource
from taylorvit.data.tables import StringTable
from taylorvit.data.webdataset import checked_members

CLASSES = ["neg", "pos"]
SPLITS = ("train", "test")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
MAX_REVIEW_BYTES = 2**24  # the longest has 14,000; a header may claim any number


class Imdb(ByteSource):
    """One split, sorted by class and number of the review, so that `train[90%:]` holds as many of each class.

    Raises:
        ValueError: no such split, folder or archive, a damaged archive, an empty review.
    """

    vocab_size = 257  # the bytes and the padding

    def __init__(self, root: Path, split: str) -> None:
        if split not in SPLITS:
            hint = "to validate, hold out a part: train[:90%] and train[90%:]"
            raise ValueError(f"imdb has no split {split!r}; it has {', '.join(SPLITS)}; {hint}")
        self.root = root
        reviews = dict(_read_folder(root, split) if root.is_dir() else _read_archive(root, split))
        for name in CLASSES:
            if not any(path.startswith(f"{split}/{name}/") for path in reviews):
                raise ValueError(f"data.root: {root} holds no reviews {split}/{name}/*.txt")
        paths = sorted(reviews, key=natural_key)
        if empty := [path for path in paths if not reviews[path]]:
            raise ValueError(f"data.root: the review {root}/{empty[0]} is empty")
        self.paths = StringTable(paths)
        super().__init__(((reviews[path], CLASSES.index(path.split("/")[1])) for path in paths), list(CLASSES))

    def name(self, index: int) -> str:
        """Return the path of review `index`, below that of the archive."""
        return f"{self.root}/{self.paths[index]}"

    def identity(self) -> list[bytes]:
        """Return the paths below the root, the texts and the labels."""
        return [self.paths.blob, *super().identity()]


def _read_folder(root: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """Yield path below the root and bytes of every review."""
    for name in CLASSES:
        folder = root / split / name
        if not folder.is_dir():
            present = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
            raise ValueError(f"data.root: no folder {folder}; {root} must be aclImdb itself, it holds {present}")
        for path in folder.glob("*.txt"):
            if not path.name.startswith(".") and path.is_file():  # a pipe would be waited for
                yield f"{split}/{name}/{path.name}", path.read_bytes()


def _read_archive(path: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and bytes of every review in a tar, in any folder of it."""
    if not path.is_file() or not path.name.endswith(ARCHIVES):
        raise ValueError(f"data.root {str(path)!r} must be the folder aclImdb or a file {', '.join(ARCHIVES)}")
    wanted = re.compile(rf"(?:^|/)({split}/(?:{'|'.join(CLASSES)})/[^/.][^/]*\.txt)$")
    try:
        opener = open if path.name.endswith(".tar") else gzip.open
        with opener(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in checked_members(tar, file):  # type: ignore[arg-type]
                if info.isfile() and (match := wanted.search(info.name)):
                    if info.size > MAX_REVIEW_BYTES:
                        raise ValueError(f"{path}: {info.name[:100]!r} has {info.size:,} bytes, too many for a review")
                    content = tar.extractfile(info)
                    assert content is not None
                    yield match[1], content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable archive ({error})") from error
