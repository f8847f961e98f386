"""Processes and batches: starting accelerate, splitting the global batch, and naming the process that was lost.

The user states images per update; how many processes there are changes neither the update nor the schedule.
"""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch.distributed import DistError, PrefixStore, TCPStore

from taylorvit.cli import one_line

# What gloo, which has no exception of its own, says where the other end of a connection is gone or silent.
GLOO_LOST = re.compile(
    r"gloo.*(connect|closed|reset|timed out|timeout|(read|write) error|broken pipe)", re.IGNORECASE | re.DOTALL
)

STORE_SECONDS = 10  # within which the launcher's store answers


class LostProcessError(ConnectionError):
    """Another process of the run died or did not answer."""


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
        LostProcessError: the launcher is gone, or the processes did not find each other within `timeout_seconds`.
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
    _find_launcher()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise LostProcessError(f"the processes of the run did not find each other: {_reason(error)}") from error
    check_launch(
        mixed_precision,
        accelerator.num_processes,
        accelerator.gradient_accumulation_steps,
        str(accelerator.state.dynamo_plugin.backend),
        accelerator.distributed_type.value,
    )
    return accelerator


def _find_launcher() -> None:
    """Raise a LostProcessError where the launcher died while this process started.

    The processes meet in its store, which PyTorch would try to reach for longer than the run's timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    deadline = time.monotonic() + STORE_SECONDS
    while True:
        try:
            socket.create_connection(address, timeout=STORE_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostProcessError(f"lost the launcher at {address[0]}, port {address[1]}: {one_line(error)}") from error
        time.sleep(0.5)


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


class Peers:
    """Where each process of the run stands, told in the launcher's store, so that survivors can say whom they lost and where.

    A note is one message without an answer to the launcher, or to the first machine; a note that cannot be sent ends the notes
    and not the run. A run of one process keeps none.
    """

    SETTLE_SECONDS = 2.0  # between giving up and judging the others, who give up when they notice, as this process did
    GAVE_UP = "gave up: "

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.where = "the start"
        self.cut_off = False  # whether the launcher no longer takes notes: it is gone
        self._store: PrefixStore | None = None
        if self.world_size > 1:
            start = broadcast_object_list([f"{os.getpid()}-{time.time_ns()}"])[0]  # a launcher that restarts keeps its store
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS), wait_for_workers=False)
            self._store = PrefixStore(f"taylorvit/{start}", store)
            self._tell(self.where)

    def note(self, where: str) -> None:
        """Say what this process does now, such as "update 7, computing"."""
        self.where = where
        self._tell(where)

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to report: a LostProcessError where another process was lost, else `error` itself.

        Either way the others can read from now on that this process has left, and why.
        """
        if isinstance(error, LostProcessError):  # explained already
            return error
        if not _is_lost(error):
            self._tell(f"{self.where}: {type(error).__name__}: {one_line(error)}")
            return error
        self._tell(self.GAVE_UP + self.where)
        time.sleep(self.SETTLE_SECONDS)
        return LostProcessError(f"lost {self._describe_lost()}; process {self.rank} waited in {self.where}: {_reason(error)}")

    def is_first_to_say(self, error: BaseException) -> bool:
        """Whether no other process has reported this error, or, where it is a LostProcessError, any error."""
        if self._store is None:
            return True
        try:
            same, any_error = (self._store.add(key, 1) for key in (f"said {one_line(error)}", "said"))
        except RuntimeError:
            return True  # the launcher is gone
        return (any_error if isinstance(error, LostProcessError) else same) == 1

    def _describe_lost(self) -> str:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            assert self._store is not None
            notes = [note.decode() for note in self._store.multi_get([str(rank) for rank in others])]
        except (RuntimeError, AssertionError):
            return "another process, and the launcher, which knew where it stood"
        lost = [f"process {rank} ({note})" for rank, note in zip(others, notes) if not note.startswith(self.GAVE_UP)]
        return " and ".join(lost) or "every other process, none of which left on its own"

    def _tell(self, text: str) -> None:
        try:
            if self._store is not None:
                self._store.set(str(self.rank), text)
        except RuntimeError:
            self.cut_off = True


def _is_lost(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone or silent."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(GLOO_LOST.search(str(error))))


def _reason(error: BaseException) -> str:
    """Return what a collective operation said, without the place in its source and without its advice."""
    return re.sub(r"^\[\S+\] ", "", one_line(error)).partition(". This is typically")[0]
