"""MixUp (arXiv:1710.09412), CutMix (arXiv:1905.04899) and label smoothing on whole batches.

Neighbours in the global batch, positions 2j and 2j + 1, are mixed with one another, each pair with a lambda and a box of its
own. The parameters of the whole global batch are drawn from a generator keyed by (seed, epoch, update), and a process takes
its slice: so the mixed images do not depend on the number of processes or on accumulation, and no two processes share a draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taylorvit.config import AugmentConfig
from taylorvit.randomness import numpy_generator


@dataclass
class PairParameters:
    """What is drawn for each of P pairs, all (P,): kind of mixing, lambda, and the box centre as a share of the sides."""

    use_cutmix: np.ndarray
    use_mixup: np.ndarray
    lam: np.ndarray
    center_y: np.ndarray
    center_x: np.ndarray


def is_mixing(config: AugmentConfig) -> bool:
    """Tell whether any pair can be mixed at all."""
    return config.mix_prob > 0 and (config.mixup_alpha > 0 or config.cutmix_alpha > 0)


def check_mixing(config: AugmentConfig, micro_batch_size: int) -> None:
    """Raise ValueError if mixing is on and a micro batch does not hold whole pairs."""
    if is_mixing(config) and micro_batch_size % 2:
        raise ValueError(
            f"train.micro_batch_size is {micro_batch_size}, but CutMix and MixUp mix neighbouring pairs, so it must be even"
            " (or set augment.cutmix_alpha and augment.mixup_alpha to 0)"
        )


class Mixer:
    """Mix images and turn labels into soft targets; with neither CutMix nor MixUp on, only smooth the labels.

    Args:
        config: the augment section.
        num_classes: K.
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, *, num_classes: int, seed: int) -> None:
        self.config = config
        self.num_classes = num_classes
        self.seed = seed

    def __call__(
        self, images: Tensor, labels: Tensor, *, epoch: int, update: int, offset: int, global_batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return new images (b, C, H, W) of the same dtype and soft targets (b, K) in float32.

        Args:
            images: (b, C, H, W), left untouched.
            labels: (b,) int64.
            epoch: of the run, from 0.
            update: of the epoch, from 0.
            offset: position of the first image in the global batch.
            global_batch_size: images per update over all processes and micro-steps.
        """
        targets = self.smooth(labels)
        if not is_mixing(self.config):
            return images, targets
        check_mixing(self.config, len(images))
        assert offset % 2 == 0, offset
        assert offset + len(images) <= global_batch_size, (offset, len(images), global_batch_size)
        drawn = self._draw(epoch, update, global_batch_size // 2)
        pairs = slice(offset // 2, (offset + len(images)) // 2)
        box, lam = _box_and_lam(drawn, pairs, *images.shape[-2:])
        box, lam = box.to(images.device), lam.to(images.device)
        partner = torch.arange(len(images), device=images.device) ^ 1  # 1, 0, 3, 2, ...
        mixed = torch.where(_inside(box, images), images[partner], images)
        if self.config.mixup_alpha > 0:
            use_mixup = torch.from_numpy(np.repeat(drawn.use_mixup[pairs], 2)).to(images.device)
            share = lam.to(images.dtype)[:, None, None, None]
            blended = images * share + images[partner] * (1 - share)
            mixed = torch.where(use_mixup[:, None, None, None], blended, mixed)
        return mixed, targets * lam[:, None] + targets[partner] * (1 - lam[:, None])

    def smooth(self, labels: Tensor) -> Tensor:
        """Return smoothed one-hot targets (b, K): smoothing / K everywhere, and 1 - smoothing more at the label."""
        smoothing = self.config.label_smoothing
        off_value = smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off_value, dtype=torch.float32, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - smoothing + off_value)

    def _draw(self, epoch: int, update: int, num_pairs: int) -> PairParameters:
        """Draw the parameters of a whole global batch."""
        config = self.config
        generator = numpy_generator("mix", self.seed, epoch, update)
        is_mixed = generator.random(num_pairs) < config.mix_prob
        prefers_cutmix = generator.random(num_pairs) < config.mix_switch_prob
        center_y, center_x = generator.random(num_pairs), generator.random(num_pairs)
        if config.mixup_alpha == 0 or config.cutmix_alpha == 0:
            prefers_cutmix = np.full(num_pairs, config.cutmix_alpha > 0)
        alpha = np.where(prefers_cutmix, config.cutmix_alpha, config.mixup_alpha)
        lam = np.where(is_mixed, generator.beta(alpha, alpha), 1.0)
        return PairParameters(is_mixed & prefers_cutmix, is_mixed & ~prefers_cutmix, lam, center_y, center_x)


def _box_and_lam(drawn: PairParameters, pairs: slice, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return per image the CutMix box (b, 4) as top, bottom, left, right, and lambda (b,) float32.

    A box has the share 1 - lambda of the image and is clipped at its border; lambda is then set to the share really kept.
    Pairs without CutMix have an empty box.
    """
    ratio = np.where(drawn.use_cutmix[pairs], np.sqrt(1 - drawn.lam[pairs]), 0.0)
    top, bottom = _interval(drawn.center_y[pairs], ratio, height)
    left, right = _interval(drawn.center_x[pairs], ratio, width)
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    lam = np.where(drawn.use_cutmix[pairs], kept, drawn.lam[pairs])
    box = np.stack([top, bottom, left, right], axis=1)
    return torch.from_numpy(np.repeat(box, 2, axis=0)), torch.from_numpy(np.repeat(lam, 2).astype(np.float32))


def _interval(center: np.ndarray, ratio: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    length = (side * ratio).astype(np.int64)
    middle = (side * center).astype(np.int64)
    return np.clip(middle - length // 2, 0, side), np.clip(middle + (length + 1) // 2, 0, side)


def _inside(box: Tensor, images: Tensor) -> Tensor:
    """Return (b, 1, H, W), true within each image's box."""
    rows = torch.arange(images.shape[-2], device=images.device)[None, :, None]
    columns = torch.arange(images.shape[-1], device=images.device)[None, None, :]
    top, bottom, left, right = (side[:, None, None] for side in box.unbind(1))
    return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))[:, None]
