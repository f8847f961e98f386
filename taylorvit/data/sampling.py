"""Which image goes where: the order of an epoch, its division over updates, micro-steps and processes, and the loaders.

Everything is a function of (seed, epoch, position). The order is a permutation keyed by ("order", seed, epoch); update u takes
positions [u G, (u + 1) G) of it, G the global batch size; in it micro-step a of process r takes the b positions from
(a world_size + r) b. Each image is fetched by the key (epoch, index) and augmented under the seed ("sample", seed, epoch,
index). So workers, processes and resuming change nothing, and skipping ahead loads nothing.

With data.on_error skip an image that is damaged has the next readable one of the set in its place, under its own seed: that too
is a function of (seed, epoch, index).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from taylorvit.config import AugmentConfig, DataConfig
from taylorvit.data.augment import build_eval_transform, build_train_transform
from taylorvit.data.images import ImageDataset, ImageError, StorageError
from taylorvit.data.loader import Loader, Unreadable
from taylorvit.data.sequences import AnyDataset, RandomWindow, TokenDataset, pad_batch
from taylorvit.randomness import numpy_generator, seed_all

Transform = Callable[[Any], Tensor]  # of an image, or of tokens


def epoch_updates(dataset_len: int, global_batch_size: int, updates_per_epoch: int | None = None) -> int:
    """Return the updates of an epoch, by default all that are whole; the images left over differ each epoch.

    Raises:
        ValueError: there are fewer images than one global batch, or than `updates_per_epoch` of them.
    """
    if dataset_len < global_batch_size:
        raise ValueError(f"train.global_batch_size is {global_batch_size}, but there are only {dataset_len} training images")
    whole = dataset_len // global_batch_size
    if updates_per_epoch is not None and updates_per_epoch > whole:
        given = f"{dataset_len} training images are {whole} batches of {global_batch_size}"
        raise ValueError(f"schedule.updates_per_epoch is {updates_per_epoch}, but {given}")
    return updates_per_epoch or whole


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yield one process's micro batches of an epoch, each a list of keys (epoch, index).

    Args:
        dataset_len: number of training images.
        seed: of the run.
        micro_batch_size: images per micro-step and process.
        rank: of this process, below `world_size`.
        world_size: number of processes.
        accumulation: micro-steps per update.
        updates_per_epoch: see `epoch_updates`.
    """

    def __init__(
        self,
        dataset_len: int,
        *,
        seed: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        accumulation: int,
        updates_per_epoch: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.dataset_len = dataset_len
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.num_updates = epoch_updates(dataset_len, world_size * accumulation * micro_batch_size, updates_per_epoch)
        self.epoch = 0
        self.start_update = 0

    def set_position(self, epoch: int, start_update: int = 0) -> None:
        """Choose what the next iteration yields: this epoch, from this update on."""
        assert 0 <= start_update <= self.num_updates, (start_update, self.num_updates)
        self.epoch = epoch
        self.start_update = start_update

    def __len__(self) -> int:
        return (self.num_updates - self.start_update) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = numpy_generator("order", self.seed, epoch).permutation(self.dataset_len)
        first_step, last_step = self.start_update * self.accumulation, self.num_updates * self.accumulation
        for step in range(first_step, last_step):
            start = (step * self.world_size + self.rank) * self.micro_batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.micro_batch_size]]


def most_unreadable(dataset_len: int, data: DataConfig) -> int:
    """Return how many samples of a set may be left out."""
    share = data.max_bad_share if data.on_error == "skip" else 0.0
    return math.ceil(round(share * dataset_len, 6))  # 0.07 * 100 is a little more than 7


def _with_advice(error: ImageError) -> ImageError:
    return ImageError(f"{error}; repair it, or let data.on_error skip leave it out")


class KeyedDataset(Dataset):
    """A training set fetched by (epoch, index); images are augmented under a seed of these and the run's seed alone.

    Fetching reseeds the global generators of the process it happens in. With `num_workers=0` that is the training process:
    whoever draws there must seed first, as the engine does before each forward pass.

    Args:
        dataset: the samples.
        transform: of one.
        seed: of the run.
        most_unreadable: samples that may be replaced by the next one in the set that can be read; 0 stops at the first.
    """

    def __init__(self, dataset: AnyDataset, transform: Transform, *, seed: int, most_unreadable: int = 0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.most_unreadable = most_unreadable

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[Tensor, int], Unreadable | None]:
        epoch, index = key
        (sample, label), problem = self._read(index)
        seed_all("sample", self.seed, epoch, index)
        return (self.transform(sample), label), problem

    def _read(self, index: int) -> tuple[tuple[Any, int], Unreadable | None]:
        """Return sample `index`, or the next one that can be read and what is wrong with this one."""
        problem: Unreadable | None = None
        for step in range(self.most_unreadable + 1):
            try:
                return self.dataset[(index + step) % len(self.dataset)], problem
            except StorageError:
                raise
            except ImageError as error:
                if not self.most_unreadable:
                    raise _with_advice(error) from error
                problem = problem or Unreadable(index, str(error))
        assert problem is not None
        count = f"{self.most_unreadable + 1} samples in a row cannot be read, more than data.max_bad_share allows"
        raise ImageError(f"{count}; the first: {problem.message}")


class IndexedDataset(Dataset):
    """An evaluation set of (tensor, label, index); with `skip` a sample that cannot be read is missing."""

    def __init__(self, dataset: AnyDataset, transform: Transform, *, skip: bool = False) -> None:
        self.dataset = dataset
        self.transform = transform
        self.skip = skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, int, int] | None, Unreadable | None]:
        try:
            sample, label = self.dataset[index]
        except ImageError as error:
            if isinstance(error, StorageError):
                raise
            if not self.skip:
                raise _with_advice(error) from error
            return None, Unreadable(index, str(error))
        return (self.transform(sample), label, index), None


class TrainLoader(Loader):
    """The training loader of a whole run: told where to start before each iteration, its workers stay alive between."""

    batch_sampler: EpochBatchSampler

    def set_position(self, epoch: int, start_update: int = 0) -> None:
        """Let the next `iter` start at this update of this epoch."""
        self.batch_sampler.set_position(epoch, start_update)


def build_train_loader(
    dataset: AnyDataset,
    *,
    data: DataConfig,
    augment: AugmentConfig,
    img_size: int,
    seed: int,
    epoch: int = 0,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    accumulation: int,
    updates_per_epoch: int | None = None,
    timeout_seconds: float = 1800,
) -> TrainLoader:
    """Build the loader of one process's images (b, C, H, W) float32, normalised, or tokens (b, N) int64, and labels (b,) int64.

    It starts at `epoch`; `loader.set_position` before `iter(loader)` moves it to another epoch and update.
    """
    transform: Transform = _as_it_is
    if isinstance(dataset, ImageDataset):
        transform = build_train_transform(
            augment,
            img_size=img_size,
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            in_chans=dataset.in_chans,
            crop_pct=data.crop_pct,
        )
    elif isinstance(dataset, TokenDataset) and augment.crop == "random_window":
        dataset, transform = dataset.whole(), RandomWindow(dataset.max_length)
    sampler = EpochBatchSampler(
        len(dataset),
        seed=seed,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        updates_per_epoch=updates_per_epoch,
    )
    sampler.set_position(epoch)
    keyed = KeyedDataset(dataset, transform, seed=seed, most_unreadable=most_unreadable(len(dataset), data))
    return TrainLoader(
        keyed,
        batch_sampler=sampler,
        data=data,
        collate=_collate(dataset),
        timeout_seconds=timeout_seconds,
        persistent=True,
    )


def build_eval_loader(
    dataset: AnyDataset,
    *,
    data: DataConfig,
    img_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    timeout_seconds: float = 1800,
) -> Loader:
    """Build the loader of one process's share: images (b, C, H, W) or tokens (b, N), labels (b,), indices (b,).

    Process r evaluates images r, r + world_size, ...: over all processes each exactly once, without padding, so the number of
    batches can differ between processes and the last batch has any size.
    """
    transform: Transform = _as_it_is
    if isinstance(dataset, ImageDataset):
        transform = build_eval_transform(
            img_size=img_size, crop_pct=data.crop_pct, interpolation=data.interpolation, mean=data.mean, std=data.std
        )
    return Loader(
        IndexedDataset(dataset, transform, skip=data.on_error == "skip"),
        batch_size=batch_size,
        sampler=range(rank, len(dataset), world_size),
        data=data,
        collate=_collate(dataset),
        timeout_seconds=timeout_seconds,
        persistent=False,
    )


def _as_it_is(tokens: Tensor) -> Tensor:
    return tokens


def _collate(dataset: AnyDataset) -> Any:
    return pad_batch if isinstance(dataset, TokenDataset) else None  # None is PyTorch's own
