"""Image data sets by name: every one a map from a number to a PIL image in mode "RGB" or "L" and a class number.

Hugging Face sets come through timm's reader, torchvision's through timm's factory, the rest from `folder`, `samples` and
`webdataset`. Images are always decoded here, because timm replaces a broken image by its neighbour without a word: here it is
an error that names the file. Nothing is ever downloaded.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import create_dataset, create_reader
from torch.utils.data import Dataset

from taylorvit.config import DataConfig
from taylorvit.data.folder import FolderSource
from taylorvit.data.samples import FashionMnist, prepare_digits
from taylorvit.data.source import Source
from taylorvit.data.subset import Subset, parse_split
from taylorvit.data.webdataset import build_shard_source, build_tar_source
from taylorvit.suggest import nearest

DATASETS = ["folder", "tar", "wds", "fashion_mnist", "digits", "torch/NAME", "hfds/NAME", "pixels/NAME", "listops", "imdb"]
TORCH_DATASETS = ["cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "places365", "inaturalist", "imagenet"]
TORCH_EVAL_SPLITS = ["val", "valid", "validation", "eval", "evaluation", "test"]
IMAGE_MODES = {1: "L", 3: "RGB"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # of Pillow's others one runs a program: Ghostscript for EPS
MAX_PIXELS = 100_000_000  # ImageNet's largest has 61 million; beyond this a small file is meant to exhaust the memory
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0  # before an image is read again; each wait is twice the one before


class ImageError(ValueError):
    """An image cannot be used; the message names it."""


class StorageError(ImageError):
    """The system could not read an image's bytes; as that may pass, the image is never left out: a resumed run would differ."""


class ImageDataset(Dataset):
    """A source's images, decoded and converted to `in_chans` channels, with their labels.

    Args:
        source: where the images come from.
        in_chans: 1 for mode "L", 3 for mode "RGB".
        io_retries: how often an image is read again where the system reports an error; each time is said on stderr.
    """

    def __init__(self, source: Source, *, in_chans: int, io_retries: int = 0) -> None:
        self.source = source
        self.in_chans = in_chans
        self.io_retries = io_retries
        self.mode = IMAGE_MODES[in_chans]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return image `index` and its label.

        Raises:
            StorageError: the system cannot read its bytes, however often it was asked.
            ImageError: they are no image that can be used, or its label is none of the classes.
        """
        for retries_left in range(self.io_retries, -1, -1):
            try:
                image, label = self._read(index)
                break
            except DECODE_ERRORS as error:
                message = f"cannot read image {self.sample_name(index)}: {_first_line(error)}"
                if not _is_storage_error(error):
                    raise ImageError(message) from error
                if not retries_left:
                    raise StorageError(message) from error
                wait = min(FIRST_WAIT_SECONDS * 2 ** (self.io_retries - retries_left), LONGEST_WAIT_SECONDS)
                print(f"warning: {message}; reading it again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)
        if not 0 <= label < len(self.classes):
            raise ImageError(f"image {self.sample_name(index)} has label {label}; the classes are 0 to {len(self.classes) - 1}")
        return image, label

    def _read(self, index: int) -> tuple[Image.Image, int]:
        content, label = self.source.read(index)
        image = content if isinstance(content, Image.Image) else _decode(content)
        return convert_image(image, self.mode), label

    def sample_name(self, index: int) -> str:
        """Name sample `index` for messages: its path where it has one."""
        return self.source.name(index)


def _is_storage_error(error: Exception) -> bool:
    """Whether the system failed to deliver the bytes; an OSError of Pillow's about their content has no number."""
    return isinstance(error, OSError) and error.errno is not None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _decode(file: BinaryIO) -> Image.Image:
    """Decode an image, of an animation the first; one that is too large is refused after its header."""
    with file:
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
        image.load()
    return image


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in mode "RGB" or "L"; 16-bit grey is scaled to 8 bits.

    Pillow would clip 16-bit, 32-bit and float pixels to 0..255, that is, to almost all white or black. The range of the
    latter two is unknown, so they raise ValueError. As in torchvision and timm, alpha is dropped and EXIF rotation ignored.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # older Pillow: "I"
    if is_16_bit:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no known range; convert the file to 8 or 16 bits")
    return image.convert(mode)


class HuggingFaceSource:
    """A map-style Hugging Face data set, through timm's reader."""

    def __init__(self, dataset: str, root: str, split: str) -> None:
        self.title = f"{dataset} split {split}"
        try:
            self.reader = create_reader(dataset, root=root or None, split=split)
        except ImportError as error:
            raise ValueError(f"data.dataset {dataset!r} needs the package datasets: pip install datasets") from error
        except (OSError, ValueError) as error:
            place = f"data.dataset {dataset!r}, split {split!r}, cannot be opened below {root!r}"
            raise ValueError(f"{place}: {_first_line(error)}") from error
        names = {number: name for name, number in self.reader.class_to_idx.items()}
        if not names:  # plain integer labels without names
            names = {number: str(number) for number in range(1 + max(self.reader.iter_targets(), default=-1))}
        self.classes = [names[number] for number in sorted(names)]

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        """Return the encoded image `index` and its label."""
        file, label = self.reader[index]
        return file, int(label)

    def name(self, index: int) -> str:
        """Name image `index` by the set and its number."""
        return f"{self.title}[{index}]"

    def identity(self) -> list[bytes]:
        """Return the set's name and split."""
        return [self.title.encode()]


class TorchvisionSource:
    """A torchvision data set by timm's name for it; it decodes its images itself."""

    def __init__(self, dataset: str, root: str, split: str) -> None:
        name = dataset.removeprefix("torch/")
        _check_torchvision(name, split)
        try:
            self.dataset: Any = create_dataset(f"torch/{name}", root=root, split=split, download=False)
        except (RuntimeError, OSError, ValueError) as error:
            place = f"data.dataset {dataset!r}, split {split!r}: its files are not in {root!r}"
            raise ValueError(f"{place} ({_first_line(error)})") from error
        self.title = f"{dataset} split {split}"
        found = next(getattr(self.dataset, key) for key in ("wnids", "classes", "all_categories") if hasattr(self.dataset, key))
        self.classes = [str(item) for item in found]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return image `index` and its label."""
        image, label = self.dataset[index]
        return image, int(label)

    def name(self, index: int) -> str:
        """Name image `index` by the set and its number."""
        return f"{self.title}[{index}]"

    def identity(self) -> list[bytes]:
        """Return the set's name and split."""
        return [self.title.encode()]


def _check_torchvision(name: str, split: str) -> None:
    if name not in TORCH_DATASETS:
        known = ", ".join(TORCH_DATASETS)
        raise ValueError(f"data.dataset: unknown torchvision set {name!r}{nearest(name, TORCH_DATASETS)} (known: {known})")
    # For the small sets timm takes every word but "train" and "training" as the test split.
    splits = ["train", "training", *TORCH_EVAL_SPLITS]
    if name not in ("places365", "inaturalist", "imagenet") and split not in splits:
        raise ValueError(f"torch/{name} has no split {split!r}{nearest(split, splits)} (known: {', '.join(splits)})")


def build_image_dataset(config: DataConfig, split: str, *, in_chans: int) -> ImageDataset:
    """Open one split of the data set that the config names.

    Args:
        config: the data section.
        split: a split of this data set, or a part such as `train[:90%]`, see `subset`.
        in_chans: 1 or 3 channels.

    Raises:
        ValueError: an unknown set, one that can only be streamed, missing or empty folders, damaged files.
    """
    name, part = parse_split(split)
    source = _build_source(config.dataset, config.root, name)
    return ImageDataset(Subset(source, *part) if part else source, in_chans=in_chans, io_retries=config.io_retries)


def _build_source(dataset: str, root: str, split: str) -> Source:
    if dataset == "digits":
        prepare_digits(Path(root))
    if dataset.startswith("hfds/"):
        return HuggingFaceSource(dataset, root, split)
    if dataset.startswith(("tfds/", "hfids/")):
        message = "can only be streamed, so its order and augmentation cannot be keyed by sample and resumed exactly"
        raise ValueError(f"data.dataset {dataset!r} {message}; use {', '.join(DATASETS)}")
    if not dataset.startswith("torch/") and dataset not in DATASETS:
        raise ValueError(
            f"data.dataset: unknown data set {dataset!r}{nearest(dataset, DATASETS)} (known: {', '.join(DATASETS)})"
        )
    if not Path(root).is_dir():
        raise ValueError(f"data.root {root!r} is not a folder")
    if dataset.startswith("torch/"):
        return TorchvisionSource(dataset, root, split)
    if dataset in ("folder", "digits"):
        return FolderSource(Path(root), split)
    builders: dict[str, Callable[[Path, str], Source]] = {
        "tar": build_tar_source,
        "wds": build_shard_source,
        "fashion_mnist": FashionMnist,
    }
    return builders[dataset](Path(root), split)
