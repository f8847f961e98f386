"""Small real image sets that need no download: scikit-learn's digits, and Fashion-MNIST from its idx.gz files.

The digits are written once as an image folder, so that the quick start reads them through the same path as ImageNet.
Fashion-MNIST is read straight from the four files its authors (and Debian) publish.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_MNIST_SPLITS = {"train": "train", "val": "t10k", "validation": "t10k", "test": "t10k", "t10k": "t10k"}
IMAGES_MAGIC = 0x0803  # unsigned bytes, three dimensions
LABELS_MAGIC = 0x0801  # unsigned bytes, one dimension


def prepare_digits(root: Path) -> None:
    """Write scikit-learn's 1797 digits as `root/{train,val}/<digit>/<number>.png` unless they are there.

    Of every class, each fifth image in the set's own order goes to val: 1442 train and 355 val images, always the same.
    (The set does not name its writers, so both splits hold digits of the same people.) Two processes may do this at once:
    each writes a folder of its own and renames it; the second finds the name taken and drops its copy.

    Raises:
        ValueError: root holds something else, or cannot be written.
    """
    if _holds_digits(root):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise ValueError(f"data.root {str(root)!r}: the digits cannot be written there ({error})") from error
    try:
        _write_digits(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, root)  # also replaces an empty folder
    except OSError as error:
        if not _holds_digits(root):
            message = f"data.root {str(root)!r} holds other files or cannot be written; give the digits a new folder ({error})"
            raise ValueError(message) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _holds_digits(root: Path) -> bool:
    return all((root / split / "9").is_dir() for split in ("train", "val"))


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits  # only here: scikit-learn takes a second to import

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), counted 0..16
    seen = np.zeros(10, dtype=int)
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        split = "val" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        path = folder / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


class FashionMnist:
    """Fashion-MNIST (60,000 train and 10,000 test images, 28 x 28, grey) from the idx files in `root`, gzipped or not."""

    def __init__(self, root: Path, split: str) -> None:
        if split not in FASHION_MNIST_SPLITS:
            raise ValueError(f"fashion_mnist has no split {split!r}; it has {', '.join(FASHION_MNIST_SPLITS)}")
        self.stem = FASHION_MNIST_SPLITS[split]
        self.classes = list(FASHION_MNIST_CLASSES)
        self.images = load_idx(root / f"{self.stem}-images-idx3-ubyte", IMAGES_MAGIC)
        self.labels = load_idx(root / f"{self.stem}-labels-idx1-ubyte", LABELS_MAGIC)
        if len(self.images) != len(self.labels):
            raise ValueError(f"{root}: {len(self.images)} {self.stem} images but {len(self.labels)} labels")
        if len(self.labels) and self.labels.max() >= len(self.classes):
            raise ValueError(f"{root}: {self.stem} labels reach {self.labels.max()}; Fashion-MNIST has classes 0..9")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return image `index` and its label."""
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def name(self, index: int) -> str:
        """Name image `index` for messages."""
        return f"{self.stem}-images-idx3-ubyte[{index}]"

    def identity(self) -> list[bytes]:
        """Return the split and the labels."""
        return [self.stem.encode(), self.labels.tobytes()]


def load_idx(path: Path, magic: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, `path` itself or `path.gz`; the result is read-only.

    Raises:
        ValueError: no such file, a broken gzip stream, another magic number, or a length that contradicts the header.
    """
    content, path = _read_idx_bytes(path)
    num_dims = magic & 0xFF
    header = np.frombuffer(content[: 4 + 4 * num_dims], dtype=">u4") if len(content) >= 4 + 4 * num_dims else np.zeros(1)
    if header[0] != magic:
        raise ValueError(f"{path}: not an idx file of {num_dims}-dimensional bytes (magic number 0x{magic:04x} expected)")
    shape = tuple(int(size) for size in header[1:])
    expected = 4 + 4 * num_dims + math.prod(shape)
    if len(content) != expected:
        raise ValueError(f"{path}: {len(content)} bytes, but its header {shape} makes {expected}: cut or damaged")
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def _read_idx_bytes(path: Path) -> tuple[bytes, Path]:
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        return path.read_bytes(), path
    if not packed.is_file():
        raise ValueError(f"data.root: neither {path} nor {packed.name} is there")
    try:
        with gzip.open(packed) as file:
            return file.read(), packed
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{packed}: broken gzip file ({error})") from error
