"""Runs that are to be disturbed: started as users start them, killed in part or whole, compared bit for bit afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from taylorvit.checkpoint import load_checkpoint
from taylorvit.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"]
    + ["--dynamo_backend=no", "--main_process_port=0"],  # for --multi_gpu it starts several processes, on a CPU too
}
TIMED = {"images_per_second", "data_wait_share", "peak_memory_bytes", "mfu", "seconds"}  # differ between equal runs

# A model that trains in seconds with workers, augmentation, mixing, drop path, LAMB and averaged weights on.
SMALL_RUN: dict[str, Any] = {
    "device": "cpu",
    "timeout_seconds": 60,
    "model.num_classes": 10,
    "model.img_size": 16,
    "model.patch_size": 4,
    "model.embed_dim": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.drop_path_rate": 0.3,
    "data.num_workers": 2,
    "augment.three_augment": False,
    "augment.auto_augment": "rand-m5-mstd0.5-inc1",
    "augment.random_erasing": 0.3,
    "augment.mixup_alpha": 0.8,
    "augment.cutmix_alpha": 1.0,
    "schedule.warmup_epochs": 1.0,
    "train.mixed_precision": "no",
    "train.ema_decay": 0.9,
    "log.every_updates": 1,
    "log.tensorboard": False,
    "log.image_grid": 0,
}


def start_run(
    program: Path | str,
    arguments: Sequence[str],
    *,
    processes: int = 1,
    launcher: str = "torchrun",
    launcher_options: Sequence[str] = (),
    log: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start a program of ours on the CPU in a process group of its own.

    A launcher starts it where there are several processes, or options for the launcher.

    Args:
        program: its path, or its name in the repository's root.
        arguments: its command line.
        processes: how many the launcher starts.
        launcher: one of LAUNCHERS.
        launcher_options: more options of the launcher.
        log: file that its output is appended to; without it the output is a pipe.
        environment: more environment variables.
    """
    command = [sys.executable]
    if processes > 1 or launcher_options:
        count = "--nproc_per_node" if launcher == "torchrun" else "--num_processes"
        command += [*LAUNCHERS[launcher], f"{count}={processes}", *launcher_options]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("a")) if log else subprocess.PIPE
        return subprocess.Popen(
            [*command, str(ROOT / program), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environment or {}),
            text=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def process_tree(launch: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of a launch that live now: the first one, its children, theirs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(launch.pid)
        return [first, *first.children(recursive=True)]  # torchrun gives its processes sessions of their own
    return []


def parts(launch: subprocess.Popen[str], *, processes: int) -> dict[str, list[psutil.Process]]:
    """Return the living processes of a launch by what they are: launcher, ranks (in no order), loader workers, all."""
    tree = process_tree(launch)
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = tree[:1] if processes > 1 else []
        ranks = tree[0].children() if processes > 1 and tree else tree[:1]
        workers = [child for rank in ranks for child in rank.children()]
        return {"launcher": launcher, "ranks": ranks, "workers": workers, "all": tree}
    return {"launcher": [], "ranks": [], "workers": [], "all": tree}


def kill(victims: Sequence[psutil.Process]) -> None:
    """SIGKILL processes, those that are gone already excepted."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def seconds_until_gone(processes: Sequence[psutil.Process], *, limit: float) -> float | None:
    """Wait until none of the processes lives and return the seconds that took; None if `limit` passed, and kill those left."""
    started = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=limit)
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    kill(alive)
    return None if alive else time.monotonic() - started


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Return all of metrics.jsonl but what depends on the machine's speed."""
    return [{key: record[key] for key in record.keys() - TIMED} for record in RunFolder(run_dir).read_metrics()]


def differences(first: Path, second: Path) -> list[str]:
    """Compare two checkpoints bit for bit and return the names of what differs.

    Compared are weights, averaged weights, every optimizer tensor, parameter groups, counters and loss sums.
    """
    left, right = load_checkpoint(first), load_checkpoint(second)
    names = sorted(left.tensors.keys() | right.tensors.keys())
    shared = left.tensors.keys() & right.tensors.keys()
    differing = [name for name in names if name not in shared or not torch.equal(left.tensors[name], right.tensors[name])]
    return differing + [name for name in ("progress", "state") if left.meta[name] != right.meta[name]]
