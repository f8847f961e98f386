"""Train a grid of cells, each a run of train.py with some settings of its own, and judge each on data that chose nothing.

A study lives in one folder: `runs/CELL/` is an ordinary run folder, `cells/CELL.json` the finished cell's result. A cell that
has a result is never run again, one that was interrupted continues from its last checkpoint, so a study that was stopped or
killed is continued by the same command.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from taylorvit.cli import NON_FINITE_EXIT_CODE
from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten, load_config
from taylorvit.distributed import build_accelerator
from taylorvit.evaluation import evaluate_checkpoint
from taylorvit.models import attention_forms, build_model
from taylorvit.provenance import git_state
from taylorvit.run_folder import RunFolder, replace_file
from taylorvit.saving import changed_settings
from taylorvit.weights import load_weights

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
STOPPED = {130: signal.SIGINT, 143: signal.SIGTERM}  # exit codes of a training that saved and left


class StudyStopped(SystemExit):
    """The study was asked to stop, and every cell has saved; `code` is the exit code of the program."""


@dataclass(frozen=True)
class Cell:
    """One training: `labels` name it in tables and give its folder's name, `arguments` follow the configuration files."""

    labels: dict[str, Any]
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The cell's folder, such as `num_heads-8_seed-0`."""
        return "_".join(f"{key}-{value}" for key, value in self.labels.items())


@dataclass(frozen=True)
class Plan:
    """A cell with its checked configuration and its places on disk."""

    cell: Cell
    config: Config
    result: Path

    @property
    def is_finished(self) -> bool:
        """Whether the cell has a result."""
        return self.result.exists()


def run_cells(
    cells: Sequence[Cell], *, configs: Sequence[Path], out: Path, launcher: Sequence[str] = (sys.executable,), jobs: int = 1
) -> list[dict[str, Any]]:
    """Train and judge every cell that has no result yet; return all results in the order of the cells.

    A result holds the labels, `status` ("ok", or "diverged" where the loss was not finite), `val_top1` and `val_loss` of the
    checkpoint that validation chose, `test_top1` and `test_loss` of the same on `data.test_split` (None without one), all in
    per cent and nats, `form`, `parameters`, `temperatures` (a list a layer), `train_seconds`, `commit` and `config`.

    Args:
        cells: with names that differ.
        configs: YAML files that all cells share; later ones win.
        out: the study's folder.
        launcher: what starts train.py, such as `("accelerate", "launch")`.
        jobs: cells that train at the same time. They share the cores; with GPUs each sees one of them.

    Raises:
        ValueError: no cells, a setting that is not valid, or a result in `out` that belongs to other settings; before anything
            is trained.
        StudyStopped: a signal; the same call continues.
        RuntimeError: a training failed; the message ends with what it said.
    """
    plans = plan_cells(cells, configs=configs, out=out)
    waiting = [plan for plan in plans if not plan.is_finished]
    if done := len(plans) - len(waiting):
        print(f"{done} of {len(plans)} cells are finished already", flush=True)
    if waiting:
        _run_waiting(waiting, [*launcher, str(TRAIN), *_config_arguments(configs)], jobs)
    return [json.loads(plan.result.read_text(encoding="utf-8")) for plan in plans]


def plan_cells(cells: Sequence[Cell], *, configs: Sequence[Path], out: Path) -> list[Plan]:
    """Check every cell without training any: its settings, its model, and that a finished result belongs to these settings.

    Raises:
        ValueError: see `run_cells`.
    """
    refuse_launcher()
    if not cells:
        raise ValueError("there is nothing to train: the grid is empty")
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the grid holds {twice} twice")
    plans = []
    for cell in cells:
        settings = [*cell.arguments, f"--run_dir={out / 'runs' / cell.name}", "--resume=auto"]
        config, _ = load_config([*_config_arguments(configs), *settings])
        build_model(config.model, device="meta")
        plan = Plan(cell, config, out / "cells" / f"{cell.name}.json")
        _refuse_other_result(plan)
        plans.append(plan)
    make_folder(out)
    (out / "cells").mkdir(exist_ok=True)
    return plans


def refuse_launcher() -> None:
    """Raise a ValueError in one of several processes: a study starts its trainings itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study is one process that launches its trainings: start it with python and name --launcher")


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error


def _config_arguments(configs: Sequence[Path]) -> list[str]:
    return [word for path in configs for word in ("--config", str(path))]


def _refuse_other_result(plan: Plan) -> None:
    if not plan.is_finished:
        return
    try:
        saved = flatten(json.loads(plan.result.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{plan.result}: it is not a cell's result ({error!r}); remove it to run the cell again") from error
    if changed := changed_settings(saved, plan.config):
        shown = "; ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())
        raise ValueError(f"{plan.result} was made with other settings: {shown}; choose another --out, or remove it")


def _run_waiting(plans: Sequence[Plan], command: list[str], jobs: int) -> None:
    """Run the cells on `jobs` threads that each wait for one training process at a time."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    judging = threading.Lock()  # models are judged in this process, one at a time

    with _Trainings() as trainings, ThreadPoolExecutor(jobs) as pool:

        def run(plan: Plan) -> None:
            slot = slots.get()
            try:
                code, seconds = trainings.train(plan, command, slot, jobs)
            finally:
                slots.put(slot)
            if code is None:
                return
            with judging:
                result = judge(plan, diverged=code == NON_FINITE_EXIT_CODE, seconds=seconds)
            replace_file(plan.result, json.dumps(result, indent=1) + "\n")
            print(f"{plan.cell.name}: {_summary(result)} in {seconds:.0f} s", flush=True)

        futures = [pool.submit(run, plan) for plan in plans]
        for future in futures:
            try:
                future.result()
            except BaseException:
                trainings.stop(signal.SIGTERM)
                raise
        trainings.raise_if_stopped()


class _Trainings:
    """The training processes that run now; a signal to the study is passed on to them, and no new one starts after it."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Trainings:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._on_signal) for number in STOPPED.values()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop(number)

    def stop(self, number: int) -> None:
        """Pass a signal on to every training, which then saves and leaves."""
        self.stopped = number
        for process in list(self.running):
            process.send_signal(number)

    def raise_if_stopped(self) -> None:
        """Raise StudyStopped after a signal."""
        if self.stopped is not None:
            raise StudyStopped(128 + self.stopped)

    def train(self, plan: Plan, command: list[str], slot: int, jobs: int) -> tuple[int | None, float]:
        """Run one training to its end; return its exit code and seconds, code None where it was stopped before."""
        if self.stopped is not None:
            return None, 0.0
        run = RunFolder(plan.config.run_dir)
        run.path.mkdir(parents=True, exist_ok=True)
        arguments = [*command, *plan.cell.arguments, f"--run_dir={run.path}", "--resume=auto"]
        log, started = run.path / "train.log", time.monotonic()
        with log.open("ab") as file, self._process(arguments, file, slot, jobs) as process:
            code = process.wait()
        if code in STOPPED or (code == 0 and run.read_status().get("state") != "finished"):
            self.stopped = self.stopped or STOPPED.get(code, signal.SIGTERM)
            return None, 0.0
        if code not in (0, NON_FINITE_EXIT_CODE):
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"{plan.cell.name}: {shlex.join(arguments)} ended with code {code}: {last}")
        return code, time.monotonic() - started

    @contextmanager
    def _process(self, arguments: list[str], log: Any, slot: int, jobs: int) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(arguments, stdout=log, stderr=log, env=_environment(slot, jobs)) as process:
            self.running.add(process)
            try:
                yield process
            finally:
                self.running.discard(process)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Share cores, and GPUs where there are some, between the cells that train at the same time."""
    if jobs == 1:
        return dict(os.environ)
    shared = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    if torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        shared["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return os.environ | shared


def judge(plan: Plan, *, diverged: bool, seconds: float) -> dict[str, Any]:
    """Return a cell's result: what validation said of the checkpoint it chose, and what the test split says of the same."""
    result: dict[str, Any] = {
        **plan.cell.labels,
        "status": "diverged" if diverged else "ok",
        "val_top1": None,
        "val_loss": None,
        "test_top1": None,
        "test_loss": None,
    }
    config = plan.config
    if not diverged:
        state, source = load_weights(config.run_dir, weights="best")
        prefix = "ema_" if source.weights == "ema" else ""
        result |= {"val_top1": source.metrics[f"{prefix}top1"], "val_loss": source.metrics[f"{prefix}loss"]}
        if config.data.test_split is not None:
            accelerator = build_accelerator(
                device=config.device, mixed_precision=config.train.mixed_precision, timeout_seconds=config.timeout_seconds
            )
            test = replace(config, data=replace(config.data, val_split=config.data.test_split))
            evaluation = evaluate_checkpoint(state, source, test, accelerator).evaluation
            result |= {"test_top1": evaluation.top1, "test_loss": evaluation.loss}
        result["temperatures"] = [value.tolist() for name, value in state.items() if name.endswith(".temperature")]
    model = build_model(config.model, device="meta")
    return result | {
        "form": "+".join(dict.fromkeys(attention_forms(model))),
        "parameters": _count(model),
        "train_seconds": round(seconds, 1),
        "commit": (git_state() or {}).get("commit"),
        "config": config_to_dict(config),
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _summary(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return result["status"]
    test = "" if result["test_top1"] is None else f", test {result['test_top1']:.2f} %"
    return f"validation {result['val_top1']:.2f} %{test}"
