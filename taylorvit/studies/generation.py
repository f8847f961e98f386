"""Train small causal pixel models that differ in their attention only, judge them on held-out images, and draw from them.

The trainings are short and equal: same images in the same order, same initial weights where the shapes agree, same schedule.
They show that what an attention was trained to in parallel, it generates step by step; they rank no attention.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taylorvit.attention.causal import check_causal_attention
from taylorvit.checkpoint import (
    find_newest,
    find_newest_valid,
    load_checkpoint,
    pack_state,
    prune_checkpoints,
    save_checkpoint,
    unpack_state,
)
from taylorvit.config import DataConfig
from taylorvit.data.sequences import PIXELS, PixelDataset, build_dataset
from taylorvit.models.pixels import PixelModel, bits_per_pixel
from taylorvit.randomness import derive_seed, numpy_generator, seed_all

DIGITS = "pixels/digits"
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Pixels:
    """Images of one size as levels.

    Attributes:
        levels: (M, N) int64, 0 ... K - 1.
        grey: the value 0 ... 255 of each level, (K,) uint8.
        width: of an image.
    """

    levels: Tensor
    grey: Tensor
    width: int


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training.

    Args:
        dataset: `pixels/NAME`, see `taylorvit.data.sequences`.
        root: its folder.
        train_split: to train on; `train[:10%]` is a part.
        val_split: held out.
        attention: see `taylorvit.attention.causal`.
        embed_dim: width C.
        depth: blocks.
        num_heads: heads.
        num_steps: optimizer updates.
        warmup_steps: of them with a rising learning rate; then it falls to 0 as a half cosine.
        batch_size: images an update.
        lr: highest learning rate, of AdamW.
        seed: of weights and order.
    """

    dataset: str = DIGITS
    root: str = "data/digits"
    train_split: str = "train"
    val_split: str = "val"
    attention: str = "taylorshift"
    embed_dim: int = 64
    depth: int = 2
    num_heads: int = 4
    num_steps: int = 500
    warmup_steps: int = 50
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0


def load_pixels(dataset: str, root: str, split: str) -> Pixels:
    """Read one split of an image set as levels: 17 for the digits, which were counted 0 to 16, else 256.

    Raises:
        ValueError: it is not a set of pixels, is empty, or see `build_dataset`.
    """
    if not dataset.startswith(PIXELS):
        raise ValueError(f"dataset must be pixels/NAME, got {dataset!r}")
    images = build_dataset(DataConfig(dataset=dataset, root=root), split, in_chans=1)
    assert isinstance(images, PixelDataset)
    values = torch.stack([images[index][0] for index in range(len(images))])  # (M, N)
    counted = torch.arange(17).mul(255 / 16).round() if dataset == DIGITS else torch.arange(256)
    grey = counted.to(torch.uint8)
    levels = torch.searchsorted(grey.long(), values)
    if not torch.equal(grey.long()[levels.clamp_max(len(grey) - 1)], values):
        raise ValueError(f"{dataset} {split}: its pixels have other values than the {len(grey)} levels")
    return Pixels(levels, grey, images.size[0])


def build_pixel_model(settings: Settings, pixels: Pixels) -> PixelModel:
    """Return a new model with weights drawn from the seed."""
    seed_all("pixel model", settings.seed)
    return PixelModel(
        len(pixels.grey),
        pixels.levels.shape[1],
        attention=settings.attention,
        embed_dim=settings.embed_dim,
        depth=settings.depth,
        num_heads=settings.num_heads,
    )


def train_pixel_model(
    settings: Settings,
    pixels: Pixels,
    folder: Path,
    *,
    save_every: int = 100,
    report: Callable[[str], None] = print,
) -> PixelModel:
    """Train, or continue the training in `folder/checkpoints`, and return the model.

    A step draws its images by the seed and its number, so that a continued training is the uninterrupted one, bit for bit.

    Raises:
        ValueError: the folder holds a training with other settings.
        FloatingPointError: the loss is not finite.
    """
    check_settings(settings)
    model = build_pixel_model(settings, pixels).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=WEIGHT_DECAY)
    first = _resume(settings, folder, model, optimizer)
    for step in range(first, settings.num_steps):
        loss = _update(settings, pixels, model, optimizer, step)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step + 1} is {loss}")
        if (step + 1) % save_every == 0 or step + 1 == settings.num_steps:
            _save(settings, pixels, folder, model, optimizer, step + 1)
            report(f"{settings.attention}: step {step + 1} of {settings.num_steps}, {loss:.3f} bits per pixel in training")
    return model.eval()


def load_pixel_model(folder: Path) -> tuple[PixelModel, Settings, Pixels]:
    """Return the newest model of a training, its settings, and an image set without images that tells size and levels.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = find_newest_valid(folder / "checkpoints")
    if path is None:
        raise ValueError(f"{folder} holds no training: {folder / 'checkpoints'} has no valid step folder")
    checkpoint = load_checkpoint(path)
    settings, images = Settings(**checkpoint.meta["settings"]), checkpoint.meta["images"]
    pixels = Pixels(
        torch.empty(0, images["num_pixels"], dtype=torch.int64),
        torch.tensor(images["grey"], dtype=torch.uint8),
        images["width"],
    )
    model = build_pixel_model(settings, pixels)
    model.load_state_dict(
        {name.removeprefix("model."): x for name, x in checkpoint.tensors.items() if name.startswith("model.")}
    )
    return model.eval(), settings, pixels


@torch.no_grad()
def held_out_bits(model: PixelModel, levels: Tensor, batch_size: int = 64) -> float:
    """Return the bits per pixel of all images (M, N)."""
    model.eval()
    total = sum(bits_per_pixel(model, part).item() * len(part) for part in levels.split(batch_size))
    return total / len(levels)


def independent_bits(train: Tensor, held_out: Tensor, num_levels: int) -> float:
    """Return the bits per pixel of a model that knows how often each place has each level, and nothing of the other pixels.

    train, held_out: (M, N) levels. One is added to every count.
    """
    counts = torch.stack([place.bincount(minlength=num_levels) for place in train.T]) + 1  # (N, K)
    probabilities = counts / counts.sum(dim=1, keepdim=True)
    chosen = probabilities.T.double().gather(0, held_out)  # (M, N)
    return float(-chosen.log2().mean())


def draw_grid(levels: Tensor, pixels: Pixels, path: Path, *, columns: int, zoom: int = 4) -> None:
    """Write images (M, N) as a PNG of so many columns, row by row."""
    height = levels.shape[1] // pixels.width
    grey = pixels.grey[levels].view(-1, height, pixels.width).numpy()
    rows = -(-len(grey) // columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (pixels.width + 1) + 1), 128, dtype=np.uint8)
    for number, image in enumerate(grey):
        top, left = (number // columns) * (height + 1) + 1, (number % columns) * (pixels.width + 1) + 1
        sheet[top : top + height, left : left + pixels.width] = image
    picture = Image.fromarray(sheet)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)


def sampling_generator(seed: int) -> torch.Generator:
    """Return the random numbers of a sampling."""
    return torch.Generator().manual_seed(derive_seed("pixel sample", seed) % 2**63)


def check_settings(settings: Settings) -> None:
    """Raise ValueError for settings that make no training."""
    check_causal_attention(settings.attention)
    if settings.embed_dim % settings.num_heads:
        raise ValueError(f"num_heads must divide embed_dim {settings.embed_dim}, got {settings.num_heads}")


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of update `step`, counted from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(settings.num_steps - settings.warmup_steps, 1)
    return settings.lr * (1 + math.cos(math.pi * share)) / 2


def _update(settings: Settings, pixels: Pixels, model: PixelModel, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Make one update and return its loss, bits per pixel."""
    size = min(settings.batch_size, len(pixels.levels))
    chosen = numpy_generator("pixel batch", settings.seed, step).choice(len(pixels.levels), size, replace=False)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    loss = bits_per_pixel(model, pixels.levels[torch.from_numpy(chosen)])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return loss.item()


def _resume(settings: Settings, folder: Path, model: PixelModel, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint's state in place and return the number of updates done."""
    found = find_newest(folder / "checkpoints")
    if found is None:
        return 0
    checkpoint = load_checkpoint(found)
    if changed := _changed(checkpoint.meta["settings"], asdict(settings)):
        raise ValueError(f"{folder} holds a training with other settings ({changed}): name another folder")
    unpack_state(checkpoint.tensors, checkpoint.meta["state"], model, None, optimizer, None)
    return checkpoint.step


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in now if before.get(key) != now[key] and key != "root"]
    return ", ".join(f"{key} {json.dumps(before.get(key))} -> {json.dumps(now[key])}" for key in keys)


def _save(
    settings: Settings, pixels: Pixels, folder: Path, model: PixelModel, optimizer: torch.optim.Optimizer, step: int
) -> None:
    tensors, state = pack_state(model, None, optimizer, None)
    images = {"num_pixels": pixels.levels.shape[1], "grey": pixels.grey.tolist(), "width": pixels.width}
    save_checkpoint(folder / "checkpoints", step, tensors, {"settings": asdict(settings), "images": images, "state": state})
    prune_checkpoints(folder / "checkpoints", keep_last=2, keep_best=0, metric="")
