"""Sequences of pixels, and parts of a split: what is in them, that they never overlap, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from taylorvit.config import AugmentConfig, DataConfig, ModelConfig
from taylorvit.config_loading import load_config
from taylorvit.data import (
    ImageError,
    PixelDataset,
    build_dataset,
    build_eval_loader,
    build_train_loader,
    check_no_augment,
    check_sequences,
    dataset_fingerprint,
    share_samples,
)
from taylorvit.data.subset import Subset, parse_split

SEQUENCE = ModelConfig(name="taylorvit_sequence", vocab_size=256, max_length=64)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(dataset="pixels/digits", root=str(tmp_path_factory.mktemp("data") / "digits"), num_workers=0)


def test_pixels_are_the_image_row_by_row(digits: DataConfig) -> None:
    dataset = build_dataset(digits, "val", in_chans=3)
    assert isinstance(dataset, PixelDataset)
    assert (len(dataset), dataset.max_length, dataset.vocab_size) == (355, 64, 256)
    tokens, label = dataset[100]
    number = int(Path(dataset.sample_name(100)).stem)
    assert label == load_digits().target[number]
    expected = np.rint(load_digits().images[number] * 255 / 16).astype(int).reshape(-1)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected.tolist()


def test_loaders_stack_them(digits: DataConfig) -> None:
    dataset = build_dataset(digits, "train[:90%]", in_chans=1)
    options = {"data": digits, "img_size": 224, "rank": 0, "world_size": 1}
    loader = build_train_loader(dataset, augment=AugmentConfig(), seed=0, micro_batch_size=8, accumulation=1, **options)
    tokens, labels = next(iter(loader))
    assert (tokens.shape, tokens.dtype, labels.shape) == ((8, 64), torch.int64, (8,))
    tokens, labels, indices = next(iter(build_eval_loader(dataset, batch_size=5, **options)))
    assert tokens.tolist() == [dataset[index][0].tolist() for index in indices]


def test_parts_of_a_split_are_disjoint_complete_and_have_all_classes(digits: DataConfig) -> None:
    whole, fit, held = (build_dataset(digits, split, in_chans=1) for split in ("train", "train[:90%]", "train[90%:]"))
    names = [{dataset.sample_name(index) for index in range(len(dataset))} for dataset in (whole, fit, held)]
    assert (len(whole), len(fit), len(held)) == (1442, 1302, 140)
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    assert {held[index][1] for index in range(len(held))} == set(range(10))
    assert len({dataset_fingerprint(dataset) for dataset in (whole, fit, held)}) == 3


@pytest.mark.parametrize("size", [50_000, 60_000])
def test_of_round_sets_exactly_a_tenth_is_held_out(size: int) -> None:
    class Numbers:
        classes = ["a"]

        def __len__(self) -> int:
            return size

    assert len(Subset(Numbers(), *parse_split("train[:90%]")[1])) == size * 9 // 10


@pytest.mark.parametrize(
    ("split", "parsed"),
    [
        ("train", ("train", None)),
        ("train[:90%]", ("train", (0, 90))),
        ("train[90%:]", ("train", (90, 100))),
        ("a b[10%:20%]", ("a b", (10, 20))),
    ],
)
def test_split_names(split: str, parsed: object) -> None:
    assert parse_split(split) == parsed


@pytest.mark.parametrize(
    "split", ["train[90%]", "train[:0%]", "train[90:]", "train[50%:20%]", "train[:101%]", "[:90%]", "train["]
)
def test_bad_parts_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"expected NAME\[LOW%:HIGH%\]"):
        parse_split(split)


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"the part \[90%:100%\] of 1 samples is empty"):
        build_dataset(DataConfig(root=str(tmp_path)), "train[90%:]", in_chans=1)


@pytest.mark.parametrize("size", [(3, 2), (2, 3)])
def test_an_image_of_another_size_is_named(size: tuple[int, int], tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "0.png")
    Image.new("L", size).save(folder / "1.png")
    dataset = build_dataset(DataConfig(dataset="pixels/folder", root=str(tmp_path)), "train", in_chans=1)
    with pytest.raises(ImageError, match=rf"1.png has {size[0]} x {size[1]} pixels, the first image 2 x 2"):
        dataset[1]


def test_parts_of_sets_that_have_no_names_differ_in_their_fingerprint() -> None:
    class Numbers:
        classes = ["a"]

        def __len__(self) -> int:
            return 100

        def identity(self) -> list[bytes]:
            return [b"title"]

    first, second = Subset(Numbers(), 0, 10), Subset(Numbers(), 10, 20)
    assert list(first.identity()) != list(second.identity())
    assert not share_samples(first, second)
    assert share_samples(first, Numbers())
    assert share_samples(first, Subset(Numbers(), 9, 11))


def test_folders_share_samples_only_with_themselves(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (2, 2)).save(tmp_path / split / "a" / "0.png")
    train, val = (build_dataset(DataConfig(root=str(tmp_path)), split, in_chans=1).source for split in ("train", "val"))
    assert not share_samples(train, val)
    assert share_samples(train, train)


def test_an_unknown_image_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'digit'; did you mean 'digits'"):
        build_dataset(DataConfig(dataset="pixels/digit", root=str(tmp_path)), "train", in_chans=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(), "data.dataset holds sequences, which model.name 'taylorvit_tiny_patch16_224' does not read"),
        (
            ModelConfig(name="taylorvit_sequence", vocab_size=17, max_length=64),
            "model.vocab_size is 17, but the data needs 256",
        ),
        (
            ModelConfig(name="taylorvit_sequence", vocab_size=256, max_length=63),
            "model.max_length is 63, but the data needs 64",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(digits: DataConfig, model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sequences(build_dataset(digits, "val", in_chans=1), model)
    check_sequences(build_dataset(digits, "val", in_chans=1), dataclasses.replace(SEQUENCE, max_length=100))


def test_images_for_a_sequence_model_are_refused(digits: DataConfig) -> None:
    images = build_dataset(DataConfig(dataset="digits", root=digits.root), "val", in_chans=1)
    check_sequences(images, ModelConfig())
    with pytest.raises(
        ValueError, match="model.name is 'taylorvit_sequence', which reads sequences, but data.dataset holds images"
    ):
        check_sequences(images, SEQUENCE)


def test_augmentation_is_refused() -> None:
    off = load_config(["--config", str(ROOT / "configs" / "digits_pixels.yaml")])[0].augment
    check_no_augment(off, "listops")
    off.label_smoothing = 0.1
    check_no_augment(off, "imdb")
    windows = dataclasses.replace(off, crop="random_window")
    check_no_augment(windows, "imdb")
    for dataset in ("listops", "pixels/digits"):
        with pytest.raises(
            ValueError, match="augment.crop is 'random_window', but sequences are not augmented: set it to 'none'"
        ):
            check_no_augment(windows, dataset)
    with pytest.raises(ValueError, match="augment.hflip is 0.5"):
        check_no_augment(dataclasses.replace(windows, hflip=0.5), "imdb")
    changes = {"crop": "simple", "hflip": 0.5, "three_augment": True, "color_jitter": 0.1, "auto_augment": "rand-m5"}
    for key, value in (changes | {"random_erasing": 0.1, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}).items():
        with pytest.raises(ValueError, match=f"augment.{key} is {value!r}, but sequences are not augmented: set it to "):
            check_no_augment(dataclasses.replace(off, **{key: value}), "imdb")
