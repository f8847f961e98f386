"""Sequence tasks: data sets whose samples are tokens (N,) int64 and a class.

`pixels/NAME` is any image set of small images read as grey pixels, row by row, one token a pixel with its value 0..255 as the
token: `pixels/torch/cifar10` is the pixel task of Long Range Arena (arXiv:2011.04006) with 1,024 tokens,
`pixels/fashion_mnist` has 784 and `pixels/digits` 64.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taylorvit.config import AugmentConfig, DataConfig, ModelConfig
from taylorvit.data.images import ImageDataset, ImageError, build_image_dataset
from taylorvit.data.source import Source

PIXELS = "pixels/"


class PixelDataset(Dataset):
    """An image set as sequences: `dataset[i]` is (tokens (N,) int64, label), all of one length.

    Args:
        images: grey images, all of the first one's size.
    """

    vocab_size = 256

    def __init__(self, images: ImageDataset) -> None:
        self.images = images
        self.classes = images.classes
        first, _ = images[0]
        self.size = first.size
        self.max_length = first.width * first.height

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        if image.size != self.size:
            place = f"{self.sample_name(index)} has {image.width} x {image.height} pixels"
            raise ImageError(f"{place}, the first image {self.size[0]} x {self.size[1]}: a pixel task needs one size")
        return torch.from_numpy(np.asarray(image, dtype=np.int64).reshape(-1)), label

    @property
    def source(self) -> Source:
        """Where the images come from."""
        return self.images.source

    def sample_name(self, index: int) -> str:
        """Name sample `index` for messages."""
        return self.images.sample_name(index)


def build_dataset(config: DataConfig, split: str, *, in_chans: int) -> ImageDataset | PixelDataset:
    """Open one split of the data set that the config names, images or sequences.

    Args:
        config: the data section.
        split: a split of this data set, or a part such as `train[:90%]`, see `subset`.
        in_chans: channels of images; sequences have none.

    Raises:
        ValueError: an unknown set, missing or empty folders, damaged files, a part that is not one.
    """
    if not config.dataset.startswith(PIXELS):
        return build_image_dataset(config, split, in_chans=in_chans)
    images = dataclasses.replace(config, dataset=config.dataset.removeprefix(PIXELS))
    return PixelDataset(build_image_dataset(images, split, in_chans=1))


def check_sequences(dataset: ImageDataset | PixelDataset, model: ModelConfig) -> None:
    """Raise ValueError unless model and data are both of images or both of sequences, and fit one another."""
    takes_tokens = model.vocab_size is not None
    if isinstance(dataset, ImageDataset):
        if takes_tokens:
            raise ValueError(
                f"model.name is {model.name!r}, which reads sequences, but data.dataset holds images (pixels/...?)"
            )
        return
    if not takes_tokens:
        raise ValueError(f"data.dataset holds sequences, which model.name {model.name!r} does not read: use taylorvit_sequence")
    for key in ("vocab_size", "max_length"):
        given, needed = getattr(model, key), getattr(dataset, key)
        if given < needed:
            raise ValueError(f"model.{key} is {given}, but the data needs {needed}")


def check_no_augment(augment: AugmentConfig) -> None:
    """Raise ValueError, naming the key, for an augmentation that is on: sequences have none but label smoothing."""
    off = {
        "crop": "none",
        "hflip": 0,
        "three_augment": False,
        "color_jitter": 0,
        "auto_augment": None,
        "random_erasing": 0,
        "mixup_alpha": 0,
        "cutmix_alpha": 0,
    }
    for key, value in off.items():
        if getattr(augment, key) != value:
            raise ValueError(
                f"augment.{key} is {getattr(augment, key)!r}, but sequences are not augmented: set it to {value!r}"
            )
