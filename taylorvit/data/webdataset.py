"""Images inside tar files, read at random: class folders in tars, and webdataset shards.

timm reads webdataset as a stream and caches open tar files across a fork; neither allows a sample to be fetched by its number
in any process, on which our order, augmentation and resume rest. So the headers are scanned once into a small index
(which file, where, how long), kept as JSON beside the data, and an image is one `seek` and one `read`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taylorvit.data.tables import StringTable, total_order

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
INDEX_VERSION = 2
MAX_LABEL_BYTES = 2**20
MAX_CLASSES = 1_000_000  # a label beyond is a slip; so many names of classes would not fit the memory


class TarIndex:
    """Where each of N samples lies.

    Args:
        names: paths in the tar.
        files: number of the tar.
        offsets: of the first byte in that tar.
        sizes: bytes.
        labels: class numbers.
        classes: their names.
    """

    def __init__(
        self,
        names: list[str],
        files: list[int],
        offsets: list[int],
        sizes: list[int],
        labels: list[int],
        classes: list[str],
    ) -> None:
        self.names = StringTable(names)
        self.files = np.array(files, dtype=np.int32)
        self.offsets = np.array(offsets, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int32)
        self.classes = classes

    def to_json(self) -> dict[str, Any]:
        """Return the arguments that rebuild this index, as JSON types."""
        arrays = {key: getattr(self, key).tolist() for key in ("files", "offsets", "sizes", "labels")}
        return {"names": [self.names[number] for number in range(len(self.names))], **arrays, "classes": self.classes}


@dataclass
class Member:
    """A file in a tar: its path (below the tars it is nested in), and where its bytes lie in the outermost tar."""

    path: str
    file: int
    offset: int
    size: int


class TarSource:
    """Samples of tar files by number; opens the tar anew for each image, so that it survives forks and pickling.

    Args:
        tars: the files.
        index: what is where in them.
        signatures: name, size and time of each when it was indexed; in another file the places would mean other bytes.
    """

    def __init__(self, tars: list[Path], index: TarIndex, signatures: list[list[Any]]) -> None:
        self.tars = tars
        self.index = index
        self.signatures = signatures
        self.classes = index.classes

    def __len__(self) -> int:
        return len(self.index.names)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        """Return the encoded image `index` and its label."""
        size = int(self.index.sizes[index])
        number = self.index.files[index]
        with open(self.tars[number], "rb") as file:
            if _signature(self.tars[number], os.fstat(file.fileno())) != self.signatures[number]:
                raise OSError(errno.ESTALE, "the tar is not the one that was indexed when the run started")
            file.seek(self.index.offsets[index])
            content = file.read(size)
        if len(content) != size:
            raise OSError(
                errno.EIO, f"{len(content)} bytes instead of {size}"
            )  # the file has its size still: the storage fails
        return io.BytesIO(content), int(self.index.labels[index])

    def name(self, index: int) -> str:
        """Name image `index` for messages: the tar, then the path in it."""
        return f"{self.tars[self.index.files[index]]}/{self.index.names[index]}"

    def identity(self) -> list[bytes]:
        """Return the tars' names, which sample lies in which, the paths in them and the labels."""
        tars = "\0".join(tar.name for tar in self.tars).encode("utf-8", "surrogateescape")
        arrays = (self.index.files, self.index.names.offsets, self.index.labels)
        return [tars, self.index.names.blob, *(array.tobytes() for array in arrays)]


def build_tar_source(root: Path, split: str) -> TarSource:
    """Open `root/<split>.tar`, or the tars in `root/<split>/` (one a class); tars in a tar are followed.

    An image's class is its folder, or the tar itself where it has none; classes are numbered in natural order, as timm does.
    """
    single = root / f"{split}.tar"
    tars = [single] if single.is_file() else _sorted(root.glob(f"{split}/*.tar"))
    if not tars:
        raise ValueError(f"data.root: neither {single} nor tar files in {root / split} are there")
    return _open_source(root, split, "tar", tars)


def build_shard_source(root: Path, split: str) -> TarSource:
    """Open webdataset shards: `root/<split>/*.tar`, else `root/<split>-*.tar`, else `root/*-<split>-*.tar`.

    A split with a `*` in it is a pattern below root. A sample is an image and a `.cls` (a number) or a `.json` with "label".
    """
    patterns = [split] if "*" in split else [f"{split}/*.tar", f"{split}-*.tar", f"*-{split}-*.tar"]
    tars: list[Path] = next((found for found in (_sorted(root.glob(pattern)) for pattern in patterns) if found), [])
    if not tars:
        raise ValueError(f"data.root {str(root)!r} holds no shards of split {split!r}: looked for {', '.join(patterns)}")
    return _open_source(root, split, "wds", tars)


def _sorted(paths: Iterator[Path]) -> list[Path]:
    return sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: total_order(str(path)))


def _open_source(root: Path, split: str, kind: str, tars: list[Path]) -> TarSource:
    """Load the cached index where it still describes these very files, else scan them and try to cache the index."""
    signatures = [_signature(path, path.stat()) for path in tars]
    head = {"version": INDEX_VERSION, "kind": kind, "tars": signatures}
    cache = root / f".taylorvit-{kind}-{''.join(c if c.isalnum() else '_' for c in split)}.json"
    index = _load_index(cache, head)
    if index is None:
        index = _index_class_folders(tars) if kind == "tar" else _index_shards(tars)
        if len(index.names) == 0:
            raise ValueError(f"data.root {str(root)!r}: no image in the {len(tars)} tar files of split {split!r}")
        _save_index(cache, head, index)
    return TarSource(tars, index, signatures)


def _signature(path: Path, status: os.stat_result) -> list[Any]:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a file")
    return [path.name, status.st_size, status.st_mtime_ns]


def _load_index(cache: Path, head: dict) -> TarIndex | None:
    try:
        content = json.loads(cache.read_text())
        if content["head"] != head or content["sha256"] != _digest(content["index"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none yet, or damaged: it is only a cache
        return None
    return TarIndex(**content["index"])


def _digest(index: Any) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _save_index(cache: Path, head: dict, index: TarIndex) -> None:
    """Write the index under a name of its own and rename it, so that any number of processes may do so at once."""
    temporary = cache.with_name(f"{cache.name}.{secrets.token_hex(8)}")
    try:
        values = index.to_json()
        temporary.write_text(json.dumps({"head": head, "sha256": _digest(values), "index": values}))
        os.replace(temporary, cache)
    except OSError:  # a read-only data folder is usual; the scan is repeated next time
        with suppress(OSError):  # a read-only file system refuses even this
            temporary.unlink(missing_ok=True)


def _index_class_folders(tars: list[Path]) -> TarIndex:
    labelled = []
    for number, path in enumerate(tars):
        for member in _scan(path, number):
            if _is_image(member.path):
                folder = os.path.basename(os.path.dirname(member.path))
                labelled.append((member, folder or (path.stem if len(tars) > 1 else "")))
    for member, name in labelled:
        if not name:
            raise ValueError(f"{tars[member.file]}: {member.path} lies in no class folder")
    classes = sorted({name for _, name in labelled}, key=total_order)
    number_of = {name: number for number, name in enumerate(classes)}
    labelled.sort(key=lambda item: (total_order(item[0].path), item[0].file))
    return _to_index([(member, number_of[name]) for member, name in labelled], classes)


def _index_shards(tars: list[Path]) -> TarIndex:
    labelled = []
    for number, path in enumerate(tars):
        samples: dict[str, dict[str, Member]] = {}
        for member in _scan(path, number):
            folder, base = os.path.split(member.path)
            key, _, suffix = base.partition(".")
            samples.setdefault(os.path.join(folder, key), {})[suffix.lower()] = member
        for key, parts in samples.items():
            images = [member for member in parts.values() if _is_image(member.path)]
            if len(images) != 1:
                raise ValueError(f"{path}: sample {key!r} has {len(images)} images; a webdataset sample needs exactly one")
            labelled.append((images[0], _read_label(path, key, parts)))
    num_classes = 1 + max((label for _, label in labelled), default=-1)
    return _to_index(labelled, [str(label) for label in range(num_classes)])


def _read_label(tar: Path, key: str, parts: dict[str, Member]) -> int:
    part = parts.get("cls") or parts.get("json")
    if part is None:
        raise ValueError(f"{tar}: sample {key!r} has neither a .cls nor a .json file")
    if part.size > MAX_LABEL_BYTES:
        raise ValueError(f"{tar}: {part.path} has {part.size:,} bytes, too many for a label")
    with open(tar, "rb") as file:
        file.seek(part.offset)
        content = file.read(part.size)
    try:
        label = int(content) if "cls" in parts else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{tar}: {part.path} holds no class number ({error!r})") from error
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{tar}: {part.path} gives class {label!r}; a number from 0 to {MAX_CLASSES - 1} is needed")
    return label


def _to_index(labelled: list[tuple[Member, int]], classes: list[str]) -> TarIndex:
    members = [member for member, _ in labelled]
    return TarIndex(
        names=[member.path for member in members],
        files=[member.file for member in members],
        offsets=[member.offset for member in members],
        sizes=[member.size for member in members],
        labels=[label for _, label in labelled],
        classes=classes,
    )


def _scan(path: Path, number: int) -> list[Member]:
    """List the files in a tar, hidden ones left out."""
    try:
        with open(path, "rb") as file:
            return list(_scan_open(file, number, base=0, above=""))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable, uncompressed tar file ({error})") from error


def _scan_open(file: BinaryIO, number: int, base: int, above: str) -> Iterator[Member]:
    """Yield the files of the open tar, whose first byte lies at `base` of the outermost one; `above` is its path there."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in checked_members(tar, file):
            path = os.path.normpath(os.path.join(above, info.name))
            if not info.isfile() or any(part.startswith(".") for part in path.split("/")):
                continue
            if path.endswith(".tar"):
                inner = tar.extractfile(info)
                assert inner is not None
                yield from _scan_open(inner, number, base + info.offset_data, path.removesuffix(".tar"))  # type: ignore[arg-type]
            else:
                yield Member(path, number, base + info.offset_data, info.size)


def checked_members(tar: tarfile.TarFile, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an open tar; Python takes a damaged header for the end, so the end is looked at.

    Raises:
        tarfile.TarError: it is cut or damaged, or a member is not stored as it is.
    """
    end = 0
    for info in tar:
        if info.issparse():
            raise tarfile.TarError(f"{info.name[:100]!r} is stored with gaps; pack it without --sparse")
        end = info.offset_data + (-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if info.isreg() else 0)
        yield info
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.TarError(f"cut or damaged after {end:,} bytes")


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
