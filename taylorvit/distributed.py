"""Processes and batches: starting accelerate, and splitting the global batch over processes and accumulation.

The user states images per update; how many processes there are changes neither the update nor the schedule.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs


@dataclass(frozen=True)
class BatchSplit:
    """One update's images: global = world_size * accumulation * micro."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    rank: int

    def offset(self, micro_step: int) -> int:
        """Return the position, in the global batch, of this rank's first image of a micro-step."""
        return (micro_step * self.world_size + self.rank) * self.micro_batch_size


def build_accelerator(*, device: str, mixed_precision: str, timeout_seconds: int) -> Accelerator:
    """Start accelerate on the processes that launched us.

    Raises:
        ValueError: the launcher started more processes than accelerate sees, a device or precision is not to be had here, or
            the launcher's own configuration asks for compilation or accumulation, which are settings of the run, or sharding.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' was asked for, but torch sees no GPU; use device: auto or cpu")
    cpu = device == "cpu" or not torch.cuda.is_available()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and local_processes > torch.cuda.device_count():
        raise ValueError(
            f"{local_processes} processes were started on a machine with {torch.cuda.device_count()} GPU(s); start one a GPU, "
            "or use --device cpu"
        )
    if cpu and mixed_precision == "fp16":
        raise ValueError("train.mixed_precision: 'fp16' needs a GPU; use bf16 or no on a CPU")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    check_launch(
        mixed_precision,
        accelerator.num_processes,
        accelerator.gradient_accumulation_steps,
        str(accelerator.state.dynamo_plugin.backend),
        accelerator.distributed_type.value,
    )
    return accelerator


def check_launch(
    mixed_precision: str, num_processes: int, gradient_accumulation_steps: int, dynamo_backend: str, distributed_type: str
) -> None:
    """Raise a ValueError where the launcher's request and what accelerate started differ."""
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected > num_processes:
        raise ValueError(
            f"WORLD_SIZE is {expected} but accelerate started {num_processes} process: every process would train alone and "
            "overwrite the others; on CPU launch with torchrun or `accelerate launch --multi_gpu` and device: cpu"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", mixed_precision):
        raise ValueError(f"the launcher sets mixed_precision to {launched}, but train.mixed_precision is {mixed_precision}")
    if gradient_accumulation_steps != 1:
        raise ValueError(
            f"the launcher sets gradient_accumulation_steps to {gradient_accumulation_steps}; "
            "set train.micro_batch_size instead, accumulation follows from it"
        )
    if not dynamo_backend.endswith("NO"):
        raise ValueError(f"the launcher sets dynamo_backend to {dynamo_backend}; set train.compile instead")
    if distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(f"the launcher sets distributed_type to {distributed_type}; every process holds the whole model here")


def split_batch(global_batch_size: int, micro_batch_size: int | None, *, rank: int, world_size: int) -> BatchSplit:
    """Divide the images of one update over processes and micro-steps.

    Raises:
        ValueError: the division leaves a remainder; the message gives the nearest global batch size that would not.
    """
    micro = micro_batch_size or global_batch_size // world_size
    images = world_size * max(micro, 1)
    if global_batch_size % images:
        nearest = max(images, round(global_batch_size / images) * images)
        raise ValueError(
            f"train.global_batch_size: {global_batch_size} cannot be split over {world_size} process(es) with "
            f"{max(micro, 1)} images each; {nearest} could, or change train.micro_batch_size"
        )
    return BatchSplit(global_batch_size, micro, global_batch_size // images, world_size, rank)
