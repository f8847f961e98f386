"""Image transforms: what happens to a decoded image before it becomes a normalised tensor, one line a setting.

torchvision's and timm's transforms, composed here so that every key of the `augment` section maps to one of them.
All of them draw from Python's and PyTorch's global generators, which `sampling.KeyedDataset` seeds per sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageFilter
from timm.data.auto_augment import AugmentOp, augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from taylorvit.config import AugmentConfig

MAX_ASPECT = 32  # a 1 x 5000 image, its short side resized to 224, would have 250 million pixels
Transform = Callable[[Image.Image], Tensor]


def build_train_transform(
    augment: AugmentConfig,
    *,
    img_size: int,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    in_chans: int,
    crop_pct: float = 1.0,
) -> Transform:
    """Build the training transform: PIL image in mode "RGB" or "L" -> float32 (in_chans, img_size, img_size).

    The recipe's default is 3-Augment with the simple random crop (DeiT III, arXiv:2204.07118): resize, padded random crop,
    flip, exactly one of grey, solarize and blur, colour jitter, normalise. `mean` and `std` have one value for all channels, or
    one for each.
    """
    check_augment(augment)
    steps: list[Callable] = [LimitAspect(), *_crop(augment, img_size, interpolation, crop_pct)]
    if augment.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(augment.hflip))
    if augment.auto_augment is not None:
        steps.append(_auto_augment(augment.auto_augment, img_size, interpolation, mean))
    if augment.three_augment:
        grey = transforms.Grayscale(num_output_channels=in_chans)
        steps.append(transforms.RandomChoice([grey, transforms.RandomSolarize(threshold=128, p=1.0), RandomBlur(0.2, 2.0)]))
    if augment.color_jitter > 0:
        steps.append(transforms.ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
    steps += _to_normalised(mean, std)
    if augment.random_erasing > 0:
        steps.append(RandomErasing(augment.random_erasing, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def build_eval_transform(
    *, img_size: int, crop_pct: float, interpolation: str, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """Build the evaluation transform: shorter side to floor(img_size / crop_pct) as timm does, centre crop, normalise."""
    steps = [LimitAspect(), *_centre_crop(img_size, crop_pct, interpolation), *_to_normalised(mean, std)]
    return transforms.Compose(steps)


def _crop(augment: AugmentConfig, img_size: int, interpolation: str, crop_pct: float) -> list[Callable]:
    mode = InterpolationMode(interpolation)
    if augment.crop == "simple":
        crop = transforms.RandomCrop(img_size, padding=augment.crop_padding or None, padding_mode="reflect")
        return [transforms.Resize(img_size, mode), crop]
    if augment.crop == "random_resized":
        return [transforms.RandomResizedCrop(img_size, tuple(augment.crop_scale), tuple(augment.crop_ratio), mode)]
    return _centre_crop(img_size, crop_pct, interpolation)


def _centre_crop(img_size: int, crop_pct: float, interpolation: str) -> list[Callable]:
    resized = math.floor(img_size / crop_pct)
    return [transforms.Resize(resized, InterpolationMode(interpolation)), transforms.CenterCrop(img_size)]


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]


def _auto_augment(policy: str, img_size: int, interpolation: str, mean: Sequence[float]) -> Callable:
    """Build timm's AutoAugment, RandAugment or AugMix from its policy string; they know RGB images only."""
    builders = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    build = builders.get(policy.split("-")[0], auto_augment_transform)
    fill = tuple(min(255, round(255 * value)) for value in (mean if len(mean) == 3 else [*mean] * 3))
    pil_interpolation = getattr(Image.Resampling, interpolation.upper())
    options = {"translate_const": int(img_size * 0.45), "img_mean": fill, "interpolation": pil_interpolation}
    if build is augment_and_mix_transform:
        options["translate_pct"] = 0.3
    try:
        transform = build(policy, options)
    except (AssertionError, KeyError, ValueError) as error:  # timm checks the string with assertions
        raise ValueError(f"augment.auto_augment is {policy!r}, which timm does not understand: {error!r}") from error
    for op in _ops(transform):
        if op.aug_fn is timm_posterize:
            op.aug_fn = posterize
    return InRGB(transform)


def _ops(transform: Any) -> list[AugmentOp]:
    """Return the single operations of a timm policy."""
    if hasattr(transform, "policy"):
        return [op for sub_policy in transform.policy for op in sub_policy]
    return transform.ops


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Posterize to at least one bit: timm's strongest level keeps none, which recent versions of Pillow refuse."""
    return timm_posterize(image, max(1, bits_to_keep), **options)


class InRGB:
    """Apply a transform that needs RGB images to an image of any mode, and return to that mode."""

    def __init__(self, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform(image.convert("RGB")).convert(image.mode)


class LimitAspect:
    """Crop the middle of an image whose long side is over MAX_ASPECT times the short one; leave all others alone."""

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = MAX_ASPECT * min(image.size)
        if max(image.size) <= longest:
            return image
        width, height = (min(side, longest) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


class RandomBlur:
    """Blur with a Gaussian whose radius in pixels is uniform between the two bounds."""

    def __init__(self, smallest: float, largest: float) -> None:
        self.smallest = smallest
        self.largest = largest

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.smallest, self.largest)))


def check_augment(config: AugmentConfig) -> None:
    """Raise ValueError, naming the key, for settings that contradict one another; ranges are checked with the config.

    An unknown crop would otherwise pass as the evaluation geometry.
    """
    if config.crop not in ("simple", "random_resized", "none"):
        raise ValueError(f"augment.crop is {config.crop!r}; it is simple, random_resized or none")
    _check_order("crop_scale", config.crop_scale, 1.0)
    _check_order("crop_ratio", config.crop_ratio, math.inf)
    if config.three_augment and config.auto_augment is not None:
        raise ValueError(
            f"augment.three_augment and augment.auto_augment ({config.auto_augment!r}) exclude one another; turn one off"
        )


def _check_order(key: str, bounds: Sequence[float], largest: float) -> None:
    if len(bounds) != 2 or not (0 < bounds[0] <= bounds[1] <= largest and math.isfinite(bounds[1])):
        limit = f" <= {largest:g}" if math.isfinite(largest) else ""
        raise ValueError(f"augment.{key} is {list(bounds)}; it must be [smallest, largest] with 0 < smallest <= largest{limit}")
