"""The order of an epoch and the images of a run are functions of position: processes, workers and resuming change nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taylorvit.config import AugmentConfig, DataConfig
from taylorvit.data import build_eval_loader, build_train_loader, epoch_updates
from taylorvit.data.images import ImageDataset
from taylorvit.data.sampling import EpochBatchSampler

NUM_IMAGES, GLOBAL = 53, 12
DATA = DataConfig(num_workers=0, mean=[0.5] * 3, std=[0.5] * 3)
AUGMENT = AugmentConfig(crop="random_resized", three_augment=True, random_erasing=0.5)


class NoiseSource:
    """Images of noise, their number as the label; counts what is read in this process."""

    classes = [str(number) for number in range(NUM_IMAGES)]

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return NUM_IMAGES

    def read(self, index: int) -> tuple[Image.Image, int]:
        self.reads += 1
        pixels = np.random.Generator(np.random.Philox(index)).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index

    def name(self, index: int) -> str:
        return f"noise[{index}]"


def train_loader(*, num_workers=0, seed=0, epoch=0, rank=0, world_size=1, accumulation=1, start_update=0):
    loader = build_train_loader(
        ImageDataset(NoiseSource(), in_chans=3),
        data=replace(DATA, num_workers=num_workers),
        augment=AUGMENT,
        img_size=8,
        seed=seed,
        micro_batch_size=GLOBAL // (world_size * accumulation),
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
    )
    loader.set_position(epoch, start_update)
    return loader


def collect(**options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the epoch's images and labels in the order of the global batches, whatever the division."""
    world_size, accumulation = options.get("world_size", 1), options.get("accumulation", 1)
    loaders = [train_loader(rank=rank, **options) for rank in range(world_size)]
    steps = [batch for step in zip(*loaders, strict=True) for batch in step]
    assert len(steps) == len(loaders[0]) * world_size
    assert len(loaders[0]) % accumulation == 0
    return torch.cat([images for images, _ in steps]), torch.cat([labels for _, labels in steps])


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor]:
    return collect()


@pytest.mark.fault("D9")
def test_an_epoch_holds_whole_updates_and_no_image_twice(reference):
    images, labels = reference
    assert epoch_updates(NUM_IMAGES, GLOBAL) == 4
    assert images.shape == (48, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert len(set(labels.tolist())) == 48
    with pytest.raises(ValueError, match="global_batch_size is 64, but there are only 53"):
        epoch_updates(NUM_IMAGES, 64)


def test_an_epoch_may_have_fewer_updates() -> None:
    assert (epoch_updates(40, 8, 5), epoch_updates(40, 8, 3)) == (5, 3)
    with pytest.raises(ValueError, match="schedule.updates_per_epoch is 6, but 40 training images are 5 batches of 8"):
        epoch_updates(40, 8, 6)
    options = {"seed": 0, "micro_batch_size": 8, "rank": 0, "world_size": 1, "accumulation": 1}
    short, long = EpochBatchSampler(40, updates_per_epoch=3, **options), EpochBatchSampler(40, **options)
    seen = set()
    for epoch in range(20):
        short.set_position(epoch)
        long.set_position(epoch)
        batches = list(short)
        assert batches == list(long)[:3]
        seen |= {index for batch in batches for _, index in batch}
    assert seen == set(range(40))


@pytest.mark.parametrize(
    "division",
    [
        {"world_size": 2},
        {"world_size": 3},
        {"accumulation": 3},
        {"world_size": 2, "accumulation": 2},
        {"num_workers": 1},
        {"num_workers": 2},
        {"world_size": 2, "num_workers": 2},
    ],
)
def test_processes_accumulation_and_workers_see_the_same_images(reference, division):
    assert same(collect(**division), reference)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_has_another_order_and_augmentation(reference, change):
    images, labels = collect(**change)
    assert not torch.equal(labels, reference[1])
    assert len(set(labels.tolist()) ^ set(reference[1].tolist())) > 0  # also others are left out
    number = next(number for number in labels.tolist() if number in reference[1].tolist())
    one, other = images[labels == number], reference[0][reference[1] == number]
    assert not torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"world_size": 2, "accumulation": 2}, {"num_workers": 2}])
def test_resuming_at_any_update_gives_exactly_the_rest(reference, options):
    for update in range(5):
        loader = train_loader(start_update=update)
        assert len(loader) == 4 - update
        if update < 4:
            rest = collect(start_update=update, **options)
            assert same(rest, (reference[0][update * GLOBAL :], reference[1][update * GLOBAL :]))
        else:
            assert list(loader) == []


def test_skipping_ahead_reads_nothing():
    loader = train_loader(start_update=3)
    assert len(list(loader)) == 1
    assert loader.dataset.dataset.source.reads == GLOBAL


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_loader_serves_a_whole_run(reference, num_workers):
    loader = train_loader(num_workers=num_workers)
    next(iter(loader))  # left in the middle
    for epoch, update in ((1, 0), (0, 2), (0, 0)):
        loader.set_position(epoch, update)
        steps = list(loader)
        found = torch.cat([images for images, _ in steps]), torch.cat([labels for _, labels in steps])
        assert same(found, collect(epoch=epoch, start_update=update))
    assert same(found, reference)


def test_batches_are_contiguous_pieces_of_the_keyed_permutation():
    pieces = {}
    for rank in range(2):
        options = {"seed": 3, "micro_batch_size": 4, "rank": rank, "world_size": 2, "accumulation": 2}
        sampler = EpochBatchSampler(40, **options)
        sampler.set_position(5, 1)
        pieces[rank] = [[index for epoch, index in batch if epoch == 5] for batch in sampler]
    whole = EpochBatchSampler(40, seed=3, micro_batch_size=40, rank=0, world_size=1, accumulation=1)
    whole.set_position(5)
    (order,) = [[index for _, index in batch] for batch in whole]
    assert sorted(order) == list(range(40))
    assert pieces[0] == [order[16:20], order[24:28]]  # update 1: micro-steps 0 and 1
    assert pieces[1] == [order[20:24], order[28:32]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_leave_the_global_generator_alone_at_their_start(num_workers):
    loader = train_loader(num_workers=num_workers)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    iterator = iter(loader)
    assert torch.equal(torch.rand(3), expected)
    next(iterator)


def eval_loader(*, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0):
    return build_eval_loader(
        ImageDataset(NoiseSource(), in_chans=3),
        data=replace(DATA, num_workers=num_workers),
        img_size=8,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )


def eval_batches(batch_size: int, world_size: int, num_workers: int = 0) -> list[list[torch.Tensor]]:
    batches = []
    for rank in range(world_size):
        batches += eval_loader(batch_size=batch_size, rank=rank, world_size=world_size, num_workers=num_workers)
    return batches


@pytest.mark.parametrize(("batch_size", "world_size", "num_workers"), [(16, 1, 0), (7, 3, 0), (1, 60, 0), (100, 2, 2)])
def test_evaluation_sees_every_image_once(batch_size, world_size, num_workers):
    batches = eval_batches(batch_size, world_size, num_workers)
    indices = torch.cat([batch[2] for batch in batches])
    assert sorted(indices.tolist()) == list(range(NUM_IMAGES))
    assert torch.equal(torch.cat([batch[1] for batch in batches]), indices)  # the label is the number here
    images = torch.cat([batch[0] for batch in batches])[indices.argsort()]
    assert torch.equal(images, torch.cat([batch[0] for batch in eval_batches(53, 1)]))


def test_what_goes_to_a_spawned_worker_can_be_pickled(reference):
    loader = train_loader()
    copy = pickle.loads(pickle.dumps(loader.dataset))
    key = next(iter(loader.batch_sampler))[0]
    (image, _), problem = copy[key]
    assert torch.equal(image, reference[0][0])
    assert problem is None
    pickle.loads(pickle.dumps(loader.worker_init_fn))


class ProbeSource(NoiseSource):
    """Sends itself the signals that end a run; the label tells the worker's number of threads."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return super().read(index)[0], torch.get_num_threads()


def test_workers_ignore_the_signals_that_end_a_run_and_use_one_thread():
    dataset = ImageDataset(ProbeSource(), in_chans=3)
    data = replace(DATA, num_workers=2)
    loader = build_eval_loader(dataset, data=data, img_size=8, batch_size=20, rank=0, world_size=1)
    labels = torch.cat([batch[1] for batch in loader])
    assert labels.tolist() == [1] * NUM_IMAGES


def run_script(script: Path) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script], env=environment, timeout=60, capture_output=True, check=False)


GARBAGE = "import gc; cycle = [loader, iterator]; cycle.append(cycle); del loader, iterator, cycle; gc.collect()"


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise KeyError", 1), (GARBAGE, 0)])
def test_a_process_with_busy_workers_ends(tmp_path, ending, code):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_data_sampling import train_loader\n"
        "loader = train_loader(num_workers=1)\n"
        "iterator = iter(loader)\n"
        "next(iterator)\n"
        f"{ending}\n"
    )
    assert run_script(script).returncode == code


OPEN_FILES = """
def open_files():
    return len(os.listdir("/proc/self/fd"))

def evaluate(passes):
    for _ in range(passes):
        assert len(list(loader)) == 3

evaluate(3)
before = open_files()
evaluate(7)
interrupted = iter(loader)
next(interrupted)
del interrupted
deadline = time.monotonic() + 10
while open_files() > before and time.monotonic() < deadline:  # threads of torch's close the last two
    time.sleep(0.05)
assert open_files() <= before, (before, open_files())
assert not multiprocessing.active_children()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_evaluations_leave_no_open_files(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_data_sampling import eval_loader\n"
        "loader = eval_loader(batch_size=20, num_workers=2)\n"
        f"{OPEN_FILES}"
    )
    done = run_script(script)
    assert (done.returncode, done.stderr) == (0, b"")
