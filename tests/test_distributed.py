"""Splitting the global batch, and refusing launches that would train something else than what was asked for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from taylorvit.distributed import build_accelerator, check_launch, split_batch

LAUNCHER_VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run as one process that no launcher started; accelerate keeps its state per process, so it is dropped afterwards."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- the global batch


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), list(itertools.product((1, 2, 3, 8), (1, 2, 5, 16), (1, 2, 3, 7)))
)
def test_micro_batches_tile_the_global_batch(world_size: int, micro: int, accumulation: int) -> None:
    total = world_size * micro * accumulation
    seen: list[int] = []
    for step, rank in itertools.product(range(accumulation), range(world_size)):
        split = split_batch(total, micro, rank=rank, world_size=world_size)
        assert (split.accumulation, split.micro_batch_size, split.global_batch_size) == (accumulation, micro, total)
        seen += range(split.offset(step), split.offset(step) + split.micro_batch_size)
    assert seen == list(range(total))


def test_no_micro_batch_size_takes_a_process_share_at_once() -> None:
    split = split_batch(96, None, rank=2, world_size=4)
    assert (split.micro_batch_size, split.accumulation, split.offset(0)) == (24, 1, 48)


@pytest.mark.parametrize(
    ("total", "micro", "world_size"),
    [
        (10, None, 4),
        (2, None, 4),
        (1000, None, 3),
        (2048, 100, 8),
        (64, 128, 1),
        (7, 2, 1),
        (1, 3, 5),
        (33, 16, 2),
        (48, 32, 1),
    ],
)
def test_an_impossible_split_names_a_size_that_works(total: int, micro: int | None, world_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^train\.global_batch_size: {total} cannot be split over {world_size} process"
    ) as caught:
        split_batch(total, micro, rank=0, world_size=world_size)
    proposed = int(re.search(r"(\d+) could", str(caught.value))[1])  # type: ignore[index]
    split = split_batch(proposed, micro, rank=0, world_size=world_size)
    assert split.accumulation * split.micro_batch_size * world_size == proposed
    unit = world_size * (micro or max(total // world_size, 1))
    assert proposed == unit or abs(proposed - total) <= unit / 2


# ---- launches


def test_more_processes_than_accelerate_sees_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: two launched processes that each believe to be alone, and write the same folder."""
    check_launch(1, 1, "NO", "NO")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE is 2 but accelerate started 1 process: .*torchrun"):
        check_launch(1, 1, "NO", "NO")
    check_launch(2, 1, "NO", "MULTI_CPU")


@pytest.mark.parametrize(
    ("accumulation", "dynamo", "kind", "message"),
    [
        (4, "NO", "NO", "gradient_accumulation_steps to 4; set train.micro_batch_size instead"),
        (1, "INDUCTOR", "NO", "dynamo_backend to INDUCTOR; set train.compile instead"),
        (1, "NO", "FSDP", "distributed_type to FSDP"),
        (1, "NO", "DEEPSPEED", "distributed_type to DEEPSPEED"),
    ],
)
def test_settings_of_the_run_that_the_launcher_makes_are_refused(
    accumulation: int, dynamo: str, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^the launcher sets {message}"):
        check_launch(1, accumulation, dynamo, kind)


def test_one_process_on_the_cpu() -> None:
    accelerator = build_accelerator(device="cpu", mixed_precision="bf16", timeout_seconds=5)
    assert (accelerator.device, accelerator.num_processes, accelerator.mixed_precision) == (torch.device("cpu"), 1, "bf16")
    assert accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "gradient_accumulation_steps to 3"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend to INDUCTOR"),
    ],
)
def test_the_launcher_speaks_through_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=5)


def test_the_config_decides_the_precision_not_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=5).mixed_precision == "no"


def test_fp16_without_a_gpu_is_refused() -> None:
    """accelerate takes it and then computes in fp32 without a word."""
    with pytest.raises(ValueError, match=r"^train.mixed_precision: 'fp16' needs a GPU; use bf16 or no"):
        build_accelerator(device="cpu", mixed_precision="fp16", timeout_seconds=5)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: 'cuda' was asked for, but torch sees no GPU"):
        build_accelerator(device="cuda", mixed_precision="no", timeout_seconds=5)
    with pytest.raises(ValueError, match="needs a GPU"):
        build_accelerator(device="auto", mixed_precision="fp16", timeout_seconds=5)
    assert build_accelerator(device="auto", mixed_precision="no", timeout_seconds=5).device.type == "cpu"
