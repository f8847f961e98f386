"""Sequence tasks: data sets whose samples are tokens (N,) int64 and a class.

`pixels/NAME` is any image set of small images read as grey pixels, row by row, one token a pixel with its value 0..255 as the
token: `pixels/torch/cifar10` is the pixel task of Long Range Arena (arXiv:2011.04006) with 1,024 tokens,
`pixels/fashion_mnist` has 784 and `pixels/digits` 64. `listops` and `imdb`, two more tasks of that benchmark, have sequences of
unequal length, which are filled up to the longest of each batch; the model must leave the padding out (`padding_idx`), or fill
every sequence up to one length (`fill_idx`), so that the rest of its batch changes no sample's output.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from taylorvit.config import AugmentConfig, DataConfig, ModelConfig
from taylorvit.data.images import ImageDataset, ImageError, build_image_dataset
from taylorvit.data.imdb import Imdb
from taylorvit.data.listops import ListOps, ReferenceLines
from taylorvit.data.source import Source
from taylorvit.data.subset import Subset, parse_split

PIXELS = "pixels/"
TOKEN_SETS: dict[str, type[ListOps] | type[Imdb]] = {"listops": ListOps, "imdb": Imdb}
PADDING = 0


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


class TokenDataset(Dataset):
    """Samples of bytes as sequences of unequal length: `dataset[i]` is (tokens (N,) int64, label).

    A token is its byte plus one; 0, PADDING, fills the shorter sequences of a batch up, see `pad_batch`.

    Args:
        source: the samples.
        vocab_size: tokens that exist, the padding among them.
        max_length: longer samples are cut off here.
    """

    def __init__(self, source: Source, *, vocab_size: int, max_length: int) -> None:
        self.source = source
        self.classes = source.classes
        self.vocab_size = vocab_size
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.source.read(index)
        assert not isinstance(file, Image.Image)
        content = np.frombuffer(file.read(self.max_length), dtype=np.uint8)
        return torch.from_numpy(content.astype(np.int64) + 1), label

    def sample_name(self, index: int) -> str:
        """Name sample `index` for messages."""
        return self.source.name(index)

    def whole(self) -> TokenDataset:
        """Return the same samples, none cut off."""
        return TokenDataset(self.source, vocab_size=self.vocab_size, max_length=sys.maxsize)


class RandomWindow:
    """Cut tokens (N,) to `length` consecutive ones, from anywhere with equal probability; shorter ones stay as they are."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, tokens: Tensor) -> Tensor:
        start = random.randint(0, max(0, len(tokens) - self.length))
        return tokens[start : start + self.length]


SequenceDataset = PixelDataset | TokenDataset
AnyDataset = ImageDataset | SequenceDataset


def pad_batch(samples: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Stack samples (tokens (N_i,), number, ...) to tokens (B, N), N that of the longest, and numbers (B,), ... int64."""
    tokens, *numbers = zip(*samples)
    padded = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True, padding_value=PADDING)  # (B, N)
    return [padded, *(torch.tensor(column) for column in numbers)]


def holds_sequences(dataset: str) -> bool:
    """Whether data.dataset names a set of sequences."""
    return dataset.startswith(PIXELS) or dataset in TOKEN_SETS


def build_dataset(config: DataConfig, split: str, *, in_chans: int, max_length: int | None = None) -> AnyDataset:
    """Open one split of the data set that the config names, images or sequences.

    Args:
        config: the data section.
        split: a split of this data set, or a part such as `train[:90%]`, see `subset`.
        in_chans: channels of images; sequences have none.
        max_length: tokens after which a text is cut off; None leaves it whole. Other sequences are never cut.

    Raises:
        ValueError: an unknown set, missing or empty folders, damaged files, a part that is not one.
    """
    if config.dataset in TOKEN_SETS:
        return _build_token_dataset(config, split, max_length)
    if not config.dataset.startswith(PIXELS):
        return build_image_dataset(config, split, in_chans=in_chans)
    images = dataclasses.replace(config, dataset=config.dataset.removeprefix(PIXELS))
    return PixelDataset(build_image_dataset(images, split, in_chans=1))


def _build_token_dataset(config: DataConfig, split: str, max_length: int | None) -> TokenDataset:
    name, part = parse_split(split)
    source = TOKEN_SETS[config.dataset](Path(config.root), name)
    longest = source.longest
    if max_length is not None and isinstance(source, Imdb):
        longest = min(longest, max_length)
    return TokenDataset(Subset(source, *part) if part else source, vocab_size=source.vocab_size, max_length=longest)


def reference_lines(judged: AnyDataset, train: Callable[[], AnyDataset]) -> dict[str, float]:
    """Return what one scores on ListOps without looking inside, in per cent: see `ReferenceLines`; empty for other sets.

    Args:
        judged: the samples that a result to be held against them was measured on.
        train: gives the samples that the lines are learned from; called for ListOps only.
    """
    whole = judged.source.source if isinstance(judged.source, Subset) else judged.source
    return ReferenceLines(train().source).accuracy(judged.source) if isinstance(whole, ListOps) else {}


def format_reference_lines(lines: dict[str, float]) -> str:
    """Return what is scored on a task without looking inside, in a line for people."""
    return "without looking inside: " + ", ".join(f"{name} {value:.1f} %" for name, value in lines.items())


def check_sequences(dataset: AnyDataset, model: ModelConfig) -> None:
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
    padding, fill = model.kwargs.get("padding_idx"), model.kwargs.get("fill_idx")
    if isinstance(dataset, TokenDataset) and PADDING not in (padding, fill):
        raise ValueError(
            f"model.kwargs.padding_idx is {padding}, but short sequences are filled up with {PADDING}: set it to that, "
            "or fill_idx where the attention takes no mask"
        )


def check_no_augment(augment: AugmentConfig, dataset: str) -> None:
    """Raise ValueError, naming the key, for an augmentation that is on.

    Sequences of this data.dataset have none but label smoothing, and `imdb` the crop `random_window`.
    """
    if dataset == "imdb" and augment.crop == "random_window":
        augment = dataclasses.replace(augment, crop="none")
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
