"""Training processes of a study: started with a share of the machine, told to stop by one signal, judged by what they leave.

A launcher such as `accelerate launch` may end with a code of its own, so how a training ended is read from its status.json.
Each training has a process group, so that a signal to the study reaches the launcher and what it launched.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from taylorvit.cli import NON_FINITE_EXIT_CODE
from taylorvit.run_folder import RunFolder

End = Literal["finished", "diverged", "stopped"]
STOPPED = {130: signal.SIGINT, 143: signal.SIGTERM}  # exit codes of a training that saved and left
SAVING_SECONDS = 60.0  # what a training that was told to stop may take after its launcher has gone


class StudyStopped(SystemExit):
    """The study was asked to stop, and every training has saved; `code` is the exit code of the program."""


class Trainings:
    """The trainings that run now; as a context manager it passes SIGINT and SIGTERM on to them, and no new one starts after.

    Args:
        jobs: how many run at the same time; they share cores and GPUs.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Trainings:
        if threading.current_thread() is threading.main_thread():
            signals = (*STOPPED.values(), signal.SIGHUP)  # a closed terminal does not reach the process groups by itself
            self._before = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop(signal.SIGTERM if number == signal.SIGHUP else number)

    def stop(self, number: int) -> None:
        """Pass a signal on to every training, which then saves and leaves."""
        self.stopped = number
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def raise_if_stopped(self) -> None:
        """Raise StudyStopped after a signal, or after a training was stopped by somebody else."""
        if self.stopped is not None:
            raise StudyStopped(128 + self.stopped)

    def train(self, command: Sequence[str], run_dir: str, slot: int) -> End:
        """Run one training to its end and say how it ended; its output goes to train.log in its run folder.

        Args:
            command: starts train.py, with all settings.
            run_dir: its run folder.
            slot: which of the jobs it is, from 0.

        Raises:
            ValueError: the training refused its settings or data.
            RuntimeError: it failed; the message says what it said last.
        """
        if self.stopped is not None:
            return "stopped"
        run = RunFolder(run_dir)
        run.path.mkdir(parents=True, exist_ok=True)
        before, log = run.read_status(), run.path / "train.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment(slot, self.jobs), start_new_session=True
            )
            self.running.add(process)
            if self.stopped is not None:  # the signal came while the process was being started
                self.stop(self.stopped)
            try:
                code = process.wait()
                if self.stopped is not None:
                    _wait_for_group(process.pid, SAVING_SECONDS)
            finally:
                self.running.discard(process)
        status = run.read_status()
        return self._judge(code, status if status != before else {}, command, log)

    def _judge(self, code: int, status: dict[str, Any], command: Sequence[str], log: Path) -> End:
        """Say how a training ended, from its exit code and what it wrote into status.json."""
        if status.get("state") == "finished":
            return "finished"
        if self.stopped is not None or status.get("state") == "preempted" or code in STOPPED:
            self.stopped = self.stopped or STOPPED.get(code, signal.SIGTERM)
            return "stopped"
        if code == NON_FINITE_EXIT_CODE or "NonFiniteError" in status.get("message", ""):
            return "diverged"
        said = status["message"] if status.get("state") == "failed" else _last_words(log)
        if code == 2:
            raise ValueError(f"{shlex.join(command)}: {said}")
        raise RuntimeError(f"{shlex.join(command)} ended with code {code}: {said} (all of it: {log})")


def environment(slot: int, jobs: int) -> dict[str, str]:
    """Share cores, and GPUs where there are some, between the trainings that run at the same time."""
    if jobs == 1:
        return dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        shared["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return os.environ | shared


def _last_words(log: Path) -> str:
    """Return the last line that names an error, else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
    return next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1])


def _wait_for_group(group: int, seconds: float) -> None:
    """Wait until no process of the group is left, as a launcher may leave before what it launched."""
    until = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.1)
