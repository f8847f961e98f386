"""Every key of the augment section does what it says, on RGB and grey images of any size; out of range, it is named."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from taylorvit.config import AugmentConfig
from taylorvit.data import build_eval_transform, build_train_transform, check_augment
from taylorvit.data.augment import LimitAspect, RandomBlur
from taylorvit.randomness import seed_all

OFF = {"crop": "none", "hflip": 0.0, "three_augment": False, "color_jitter": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Smooth colours with a little noise, so that any geometric or colour change shows."""
    y, x = np.mgrid[: size[1], : size[0]]
    noise = np.random.default_rng(0).integers(0, 30, (size[1], size[0], 3))
    channels = np.stack([x * 5 % 220, y * 7 % 220, (x + y) * 3 % 220], axis=2) + noise
    return Image.fromarray(channels.astype(np.uint8)).convert(mode)


def transform(augment: AugmentConfig, mode: str = "RGB", img_size: int = 24):
    chans = len(mode)
    options = {"interpolation": "bicubic", "mean": [0.0] * chans, "std": [1.0] * chans, "in_chans": chans}
    return build_train_transform(augment, img_size=img_size, **options)


def views(augment: AugmentConfig, count: int, mode: str = "RGB", image: Image.Image | None = None, img_size: int = 24):
    """Apply a transform under `count` seeds, as the training set does."""
    apply = transform(augment, mode, img_size)
    result = []
    for number in range(count):
        seed_all("test", number)
        result.append(apply(image or photo(mode)))
    return result


def settings(**changes) -> AugmentConfig:
    return AugmentConfig(**(OFF | changes))


EVERYTHING = [
    settings(crop="simple", hflip=0.5, three_augment=True, color_jitter=0.3, random_erasing=0.5),
    settings(crop="random_resized", hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0),
    settings(crop="simple", auto_augment="original", color_jitter=0.4),
    settings(crop="none", auto_augment="augmix-m5-w4-d2"),
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("augment", EVERYTHING)
def test_all_combinations_depend_on_the_seed_alone(augment, mode):
    first, again = views(augment, 6, mode), views(augment, 6, mode)
    for one, other in zip(first, again):
        assert one.shape == (len(mode), 24, 24)
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert torch.equal(one, other)
    assert len({view.sum().item() for view in first}) > 3  # and the seed matters
    apply = transform(augment, mode)
    for twin in (pickle.loads(pickle.dumps(apply)), copy.deepcopy(apply)):  # as a spawned worker receives it
        seed_all("test", 3)
        assert torch.equal(twin(photo(mode)), first[3])


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200), (8, 8), (500, 400)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_any_size_and_aspect_give_a_valid_tensor(size, mode):
    image = photo("RGB", size).convert(mode)
    chans = len(mode)
    options = {"interpolation": "bicubic", "mean": [0.5] * chans, "std": [0.5] * chans}
    evaluation = build_eval_transform(img_size=24, crop_pct=0.9, **options)
    for tensor in [evaluation(image), *views(EVERYTHING[0], 3, mode, image), *views(EVERYTHING[1], 3, mode, image)]:
        assert tensor.shape == (chans, 24, 24)
        assert tensor.isfinite().all()


def test_tiny_img_size_takes_a_padding_larger_than_the_image():
    for view in views(settings(crop="simple", crop_padding=4), 4, img_size=2):
        assert view.shape == (3, 2, 2)


def test_simple_crop_is_a_window_of_the_reflected_resized_image():
    image = photo(size=(24, 24))
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect").transpose(2, 0, 1) / np.float32(255)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (24, 24), axis=(1, 2))
    found = set()
    for view in views(settings(crop="simple"), 30, image=image):
        match = np.argwhere((windows == view.numpy()[:, None, None]).all(axis=(0, 3, 4)))
        assert len(match) == 1
        found.add(tuple(match[0]))
    assert len(found) > 15


def test_flip_probability():
    image = photo(size=(24, 24))
    plain, mirrored = (np.asarray(picture).transpose(2, 0, 1) / np.float32(255) for picture in (image, ImageOps.mirror(image)))
    kinds = [
        0 if np.array_equal(view, plain) else 1 if np.array_equal(view, mirrored) else 2
        for view in views(settings(hflip=0.25), 200, image=image)
    ]
    assert 2 not in kinds
    assert 25 <= kinds.count(1) <= 75


def test_three_augment_applies_exactly_one_of_grey_solarize_and_blur():
    image = photo(size=(24, 24))
    grey = np.asarray(image.convert("L").convert("RGB")).transpose(2, 0, 1) / np.float32(255)
    solarized = np.asarray(ImageOps.solarize(image, 128)).transpose(2, 0, 1) / np.float32(255)
    plain = np.asarray(image).transpose(2, 0, 1) / np.float32(255)
    counts = {"grey": 0, "solarized": 0, "blurred": 0}
    for view in views(settings(three_augment=True), 300, image=image):
        if np.array_equal(view, grey):
            counts["grey"] += 1
        elif np.array_equal(view, solarized):
            counts["solarized"] += 1
        else:
            rough, smooth = (np.abs(np.diff(pixels)).mean() for pixels in (plain, view.numpy()))
            assert smooth < rough or np.abs(view.numpy() - plain).max() < 0.02  # a radius near 0.2 changes next to nothing
            counts["blurred"] += 1
    assert all(70 <= count <= 130 for count in counts.values()), counts


def test_blur_radius_is_within_its_bounds(monkeypatch):
    radii = []
    monkeypatch.setattr("taylorvit.data.augment.ImageFilter.GaussianBlur", lambda radius: radii.append(radius) or 1)
    monkeypatch.setattr(Image.Image, "filter", lambda self, kernel: self)
    random.seed(0)
    for _ in range(200):
        RandomBlur(0.2, 2.0)(photo())
    assert 0.2 <= min(radii) < 0.3
    assert 1.9 < max(radii) <= 2.0


def test_jitter_and_erasing_act_when_on_and_only_then():
    image = photo(size=(24, 24))
    plain = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / np.float32(255))
    assert all(torch.equal(view, plain) for view in views(settings(), 3, image=image))
    assert not any(torch.equal(view, plain) for view in views(settings(color_jitter=0.3), 5, image=image))
    erased = views(settings(random_erasing=0.5), 100, image=image)
    changed = [(view != plain).any(dim=0) for view in erased if not torch.equal(view, plain)]
    assert 30 <= len(changed) <= 70
    for mask in changed:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert mask.sum() == rows * columns  # a full rectangle


def test_evaluation_resizes_crops_the_centre_and_normalises():
    image = photo(size=(60, 40))
    resized = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / np.float32(255)
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([0.5, 0.6, 0.7])
    expected = (resized[:, 4:28, 12:36] - mean[:, None, None]) / std[:, None, None]
    apply = build_eval_transform(img_size=24, crop_pct=0.75, interpolation="bicubic", mean=mean.tolist(), std=std.tolist())
    assert np.allclose(apply(image), expected, atol=1e-6)
    full = build_eval_transform(img_size=32, crop_pct=1.0, interpolation="nearest", mean=[0.0] * 3, std=[1.0] * 3)(image)
    assert np.array_equal(
        full, np.asarray(image.resize((48, 32), Image.Resampling.NEAREST))[:, 8:40].transpose(2, 0, 1) / np.float32(255)
    )


def test_only_extreme_aspects_are_limited():
    ordinary = photo(size=(64, 2))
    assert LimitAspect()(ordinary) is ordinary
    assert LimitAspect()(photo(size=(100, 2))).size == (64, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "centre"}, "augment.crop is 'centre'"),
        ({"crop": "random_window"}, "augment.crop is 'random_window'; it is simple, random_resized or none"),
        ({"crop_scale": (0.5, 0.1)}, r"augment.crop_scale is \[0.5, 0.1\]"),
        ({"crop_scale": (0.5, 1.5)}, "augment.crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "augment.crop_ratio"),
        ({"three_augment": True, "auto_augment": "rand-m9"}, "three_augment and augment.auto_augment .* exclude one another"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_augment(settings(**changes))


def test_defaults_pass():
    check_augment(AugmentConfig())


@pytest.mark.parametrize("augment", [settings(), settings(auto_augment="rand-m5")])
def test_one_mean_stands_for_all_channels(augment):
    """As the config says: `mean: [0.5]` and `mean: [0.5, 0.5, 0.5]` are the same."""
    results = []
    for count in (1, 3):
        values = {"img_size": 24, "interpolation": "bicubic", "mean": [0.4] * count, "std": [0.2] * count}
        for apply in (build_train_transform(augment, in_chans=3, **values), build_eval_transform(crop_pct=1.0, **values)):
            seed_all("test", 0)
            results.append(apply(photo()))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert results[0].shape == (3, 24, 24)


@pytest.mark.parametrize("policy", ["rand-m10-n3-inc1", "rand-m0-n3", "v0", "v0r", "original", "augmix-m10", "3a"])
def test_policies_survive_their_strongest_level_with_this_pillow(policy):
    for view in views(settings(auto_augment=policy), 150, image=photo(size=(24, 24))):
        assert view.isfinite().all()


@pytest.mark.parametrize("policy", ["rand-x9", "nonsense", "", "augmix-q3"])
def test_policies_timm_does_not_know_are_named(policy):
    with pytest.raises(ValueError, match=f"augment.auto_augment is '{policy}'"):
        transform(settings(auto_augment=policy))
