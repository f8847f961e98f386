"""Which image goes where: the order of an epoch, its division over updates, micro-steps and processes, and the loaders.

Everything is a function of (seed, epoch, position). The order is a permutation keyed by ("order", seed, epoch); update u takes
positions [u G, (u + 1) G) of it, G the global batch size; in it micro-step a of process r takes the b positions from
(a world_size + r) b. Each image is fetched by the key (epoch, index) and augmented under the seed ("sample", seed, epoch,
index). So workers, processes and resuming change nothing, and skipping ahead loads nothing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from taylorvit.config import AugmentConfig, DataConfig
from taylorvit.data.augment import build_eval_transform, build_train_transform
from taylorvit.data.images import ImageDataset
from taylorvit.data.sequences import AnyDataset, TokenDataset, pad_batch
from taylorvit.randomness import numpy_generator, seed_all

WORKER_NAME = "image loader"

Transform = Callable[[Any], Tensor]  # of an image, or of tokens


def epoch_updates(dataset_len: int, global_batch_size: int) -> int:
    """Return the whole updates in an epoch; the images left over differ each epoch.

    Raises:
        ValueError: there are fewer images than one global batch.
    """
    if dataset_len < global_batch_size:
        raise ValueError(f"train.global_batch_size is {global_batch_size}, but there are only {dataset_len} training images")
    return dataset_len // global_batch_size


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yield one process's micro batches of an epoch, each a list of keys (epoch, index).

    Args:
        dataset_len: number of training images.
        seed: of the run.
        micro_batch_size: images per micro-step and process.
        rank: of this process, below `world_size`.
        world_size: number of processes.
        accumulation: micro-steps per update.
    """

    def __init__(
        self, dataset_len: int, *, seed: int, micro_batch_size: int, rank: int, world_size: int, accumulation: int
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.dataset_len = dataset_len
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.num_updates = epoch_updates(dataset_len, world_size * accumulation * micro_batch_size)
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


class KeyedDataset(Dataset):
    """A training set fetched by (epoch, index); images are augmented under a seed of these and the run's seed alone.

    Fetching reseeds the global generators of the process it happens in. With `num_workers=0` that is the training process:
    whoever draws there must seed first, as the engine does before each forward pass.
    """

    def __init__(self, dataset: AnyDataset, transform: Transform, *, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        sample, label = self.dataset[index]
        seed_all("sample", self.seed, epoch, index)
        return self.transform(sample), label


class IndexedDataset(Dataset):
    """An evaluation set of (tensor, label, index)."""

    def __init__(self, dataset: AnyDataset, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        sample, label = self.dataset[index]
        return self.transform(sample), label, index


class Loader(DataLoader):
    """A DataLoader whose workers are ended when the process exits, see `_end_workers`."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            _ITERATORS.add(iterator)
            for worker in iterator._workers:
                worker.name = WORKER_NAME
        return iterator


def _end_workers(iterators: weakref.WeakSet[_MultiProcessingDataLoaderIter]) -> None:
    """Ask all workers to leave, and kill those left over, as by an iterator that was garbage in a reference cycle.

    At exit Python sends SIGTERM to child processes and waits for them, for ever if they ignore it, as ours do.
    """
    for iterator in list(iterators):
        iterator._shutdown_workers()
    for process in multiprocessing.active_children():
        if process.name == WORKER_NAME:
            process.kill()


# Weak references: a finished iterator must not keep the pipes of its workers open.
_ITERATORS: weakref.WeakSet[_MultiProcessingDataLoaderIter] = weakref.WeakSet()
atexit.register(_end_workers, _ITERATORS)  # multiprocessing was imported above, so this runs before it waits at exit


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
    sampler = EpochBatchSampler(
        len(dataset),
        seed=seed,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
    )
    sampler.set_position(epoch)
    keyed = KeyedDataset(dataset, transform, seed=seed)
    return TrainLoader(keyed, batch_sampler=sampler, **_loader_options(dataset, data, persistent=True))


def build_eval_loader(
    dataset: AnyDataset, *, data: DataConfig, img_size: int, batch_size: int, rank: int, world_size: int
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
    share = range(rank, len(dataset), world_size)
    options = _loader_options(dataset, data, persistent=False)
    return Loader(IndexedDataset(dataset, transform), batch_size=batch_size, sampler=share, **options)


def _as_it_is(tokens: Tensor) -> Tensor:
    return tokens


def _loader_options(dataset: AnyDataset, data: DataConfig, *, persistent: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_workers": data.num_workers,
        "collate_fn": pad_batch if isinstance(dataset, TokenDataset) else None,  # None is PyTorch's own
        "pin_memory": data.pin_memory and torch.cuda.is_available(),
        "generator": torch.Generator(),  # else every iter() would draw from the global generator
    }
    if data.num_workers > 0:
        options |= {"prefetch_factor": data.prefetch_factor, "persistent_workers": persistent, "worker_init_fn": init_worker}
    return options


def init_worker(worker_id: int) -> None:
    """Prepare a loader worker: one thread, and the signals that end a run ignored, for the training process answers them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
