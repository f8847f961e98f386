"""Image data sets by name: every one a map from a number to a PIL image in mode "RGB" or "L" and a class number.

Folders and Hugging Face sets come through timm's readers, torchvision's through timm's factory, the rest from `samples` and
`webdataset`. Images are always decoded here, because timm replaces a broken image by its neighbour without stopping: here it
ends the run and names the file. Nothing is ever downloaded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import create_dataset, create_reader
from torch.utils.data import Dataset

from taylorvit.config import DataConfig
from taylorvit.data.samples import FashionMnist, prepare_digits
from taylorvit.data.source import Source
from taylorvit.data.subset import Subset, parse_split
from taylorvit.data.tables import StringTable
from taylorvit.data.webdataset import IMAGE_SUFFIXES, build_shard_source, build_tar_source
from taylorvit.suggest import nearest

DATASETS = ["folder", "tar", "wds", "fashion_mnist", "digits", "torch/NAME", "hfds/NAME", "pixels/NAME", "listops", "imdb"]
TORCH_DATASETS = ["cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "places365", "inaturalist", "imagenet"]
TORCH_EVAL_SPLITS = ["val", "valid", "validation", "eval", "evaluation", "test"]
IMAGE_MODES = {1: "L", 3: "RGB"}
MAX_PIXELS = 100_000_000  # ImageNet's largest has 61 million; beyond this a small file is meant to exhaust the memory
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """An image cannot be used; the message names it."""


class ImageDataset(Dataset):
    """A source's images, decoded and converted to `in_chans` channels, with their labels.

    Args:
        source: where the images come from.
        in_chans: 1 for mode "L", 3 for mode "RGB".
    """

    def __init__(self, source: Source, *, in_chans: int) -> None:
        self.source = source
        self.in_chans = in_chans
        self.mode = IMAGE_MODES[in_chans]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            content, label = self.source.read(index)
            image = content if isinstance(content, Image.Image) else _decode(content)
            return convert_image(image, self.mode), label
        except DECODE_ERRORS as error:
            raise ImageError(f"cannot read image {self.sample_name(index)}: {_first_line(error)}") from error

    def sample_name(self, index: int) -> str:
        """Name sample `index` for messages: its path where it has one."""
        return self.source.name(index)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _decode(file: BinaryIO) -> Image.Image:
    with file:
        image = Image.open(file)
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


class FolderSource:
    """An image folder as timm reads it: class = leaf folder, classes in natural order; hidden files and folders ignored."""

    def __init__(self, folder: Path) -> None:
        try:
            reader = create_reader("", root=str(folder), input_key=";".join(IMAGE_SUFFIXES))
        except RuntimeError as error:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"data.root: no images ({suffixes}) in the class folders of {folder}") from error
        names = {number: name for name, number in reader.class_to_idx.items()}
        below = ((path[len(str(folder)) :].lstrip(os.sep), names[number]) for path, number in reader.samples)
        visible = [(path, name) for path, name in below if not _is_hidden(path)]
        if not visible:
            raise ValueError(f"data.root: no images in the class folders of {folder}")
        for path, name in visible:
            if not name:
                raise ValueError(f"data.root: {folder / path} lies in no class folder")
        used = {name for _, name in visible}
        self.classes = [name for name in reader.class_to_idx if name in used]
        number_of = {name: number for number, name in enumerate(self.classes)}
        self.folder = str(folder)
        self.paths = StringTable(path for path, _ in visible)
        self.labels = np.array([number_of[name] for _, name in visible], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        """Open image `index`."""
        return open(self.name(index), "rb"), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.folder, self.paths[index])

    def identity(self) -> list[bytes]:
        """Return the paths below the folder and the labels."""
        return [self.paths.blob, self.paths.offsets.tobytes(), self.labels.tobytes()]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split(os.sep))


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
    return ImageDataset(Subset(source, *part) if part else source, in_chans=in_chans)


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
        return FolderSource(_split_folder(Path(root), split))
    builders: dict[str, Callable[[Path, str], Source]] = {
        "tar": build_tar_source,
        "wds": build_shard_source,
        "fashion_mnist": FashionMnist,
    }
    return builders[dataset](Path(root), split)


def _split_folder(root: Path, split: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        present = sorted(path.name for path in root.iterdir() if path.is_dir())[:5]
        raise ValueError(f"data.root {str(root)!r} has no folder {split!r}; it holds {', '.join(present) or 'no folders'}")
    return folder
