"""Train a grid of cells, each a run of train.py with some settings of its own, and judge each on data that chose nothing.

A study lives in one folder: `runs/CELL/` is an ordinary run folder, `cells/CELL.json` the finished cell's result. A cell that
has a result is never run again, one that was interrupted continues from its last checkpoint, so a study that was stopped or
killed is continued by the same command.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten, load_config
from taylorvit.data import (
    build_dataset,
    check_no_augment,
    check_num_classes,
    check_sequences,
    format_reference_lines,
    holds_sequences,
    share_samples,
)
from taylorvit.distributed import build_accelerator
from taylorvit.evaluation import evaluate_checkpoint
from taylorvit.models import attention_forms, build_model
from taylorvit.provenance import git_state
from taylorvit.run_folder import RunFolder, replace_file
from taylorvit.saving import changed_settings, describe_start
from taylorvit.studies.options import config_arguments
from taylorvit.studies.results import make_folder
from taylorvit.studies.trainings import Trainings
from taylorvit.weights import load_weights

# Prefixes of settings that change nothing in a cell's result: where and how it was computed.
FREE_IN_RESULTS = (
    "run_dir",
    "resume",
    "allow_change",
    "device",
    "timeout_seconds",
    "log.",
    "checkpoint.keep_last",
    "data.num_workers",
    "data.prefetch_factor",
    "data.pin_memory",
    "train.micro_batch_size",
    "train.compile",
    "train.grad_checkpointing",
    "train.channels_last",
)
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


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
    def arguments(self) -> list[str]:
        """What train.py is told behind the configuration files."""
        return [*self.cell.arguments, f"--run_dir={self.config.run_dir}", "--resume=auto"]

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
    per cent and nats, `form` (in training), `parameters`, `temperatures` (a list a layer), `train_seconds` (of the last start),
    `commit` and `config`.

    Args:
        cells: with names that differ.
        configs: YAML files that all cells share; later ones win.
        out: the study's folder.
        launcher: what starts train.py, such as `("accelerate", "launch")`.
        jobs: cells that train at the same time. They share the cores; with GPUs each sees one of them.

    Raises:
        ValueError: no cells, a setting that is not valid, data that cannot be opened, or a result in `out` that belongs to
            other settings; before anything is trained.
        StudyStopped: a signal; the same call continues.
        RuntimeError: a training failed; the message ends with what it said.
    """
    plans = plan_cells(cells, configs=configs, out=out)
    waiting = [plan for plan in plans if not plan.is_finished]
    if done := len(plans) - len(waiting):
        print(f"{done} of {len(plans)} cells are finished already", flush=True)
    for config in {str(plan.config.data) + str(plan.config.augment): plan.config for plan in waiting}.values():
        check_data(config)
    if waiting:
        _run_waiting(waiting, [*launcher, str(TRAIN), *config_arguments(configs)], jobs)
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
        config, _ = load_config([*config_arguments(configs), *settings])
        build_model(config.model, device="meta")
        plan = Plan(cell, config, out / "cells" / f"{cell.name}.json")
        if plan.is_finished:
            _refuse_other_result(plan)
        else:
            describe_start(config, RunFolder(config.run_dir))
        plans.append(plan)
    if len({plan.config.train.mixed_precision for plan in plans}) > 1:
        raise ValueError("train.mixed_precision: all cells of a study must have one, as they are judged in one process")
    make_folder(out)
    (out / "cells").mkdir(exist_ok=True)
    return plans


def check_data(config: Config) -> None:
    """Open every split that a cell will need, so that a wrong one is not met after hours of training.

    Raises:
        ValueError: a split cannot be opened, does not fit the model, or shares samples with another one.
    """
    if holds_sequences(config.data.dataset):
        check_no_augment(config.augment, config.data.dataset)
    data, opened = config.data, {}
    for key in ("train_split", "val_split", "test_split"):
        if (split := getattr(data, key)) is not None:
            dataset = build_dataset(data, split, in_chans=config.model.in_chans, max_length=config.model.max_length)
            check_num_classes(dataset, config.model.num_classes)
            check_sequences(dataset, config.model)
            opened[key] = dataset
    for first, second in itertools.combinations(opened, 2):
        if share_samples(opened[first].source, opened[second].source):
            given = f"data.{first} {getattr(data, first)!r} and data.{second} {getattr(data, second)!r}"
            raise ValueError(f"{given} share samples: what is reported must have chosen nothing; use parts such as train[:90%]")


def refuse_launcher() -> None:
    """Raise a ValueError in one of several processes: a study starts its trainings itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study is one process that launches its trainings: start it with python and name --launcher")


def _refuse_other_result(plan: Plan) -> None:
    try:
        saved = flatten(json.loads(plan.result.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{plan.result}: it is not a cell's result ({error!r}); remove it to run the cell again") from error
    if changed := changed_settings(saved, plan.config, free=FREE_IN_RESULTS):
        shown = "; ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())
        raise ValueError(f"{plan.result} was made with other settings: {shown}; choose another --out, or remove it")


def _run_waiting(plans: Sequence[Plan], command: list[str], jobs: int) -> None:
    """Run the cells on `jobs` threads that each wait for one training process at a time."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    judging = threading.Lock()  # models are judged in this process, one at a time

    with Trainings(jobs) as trainings, ThreadPoolExecutor(jobs) as pool:

        def run(plan: Plan) -> None:
            if plan.is_finished:  # by another program with the same folder
                return
            slot, started = slots.get(), time.monotonic()
            try:
                end = trainings.train([*command, *plan.arguments], plan.config.run_dir, slot)
            finally:
                slots.put(slot)
            if end == "stopped":
                return
            seconds = time.monotonic() - started
            with judging:
                result = judge(plan, diverged=end == "diverged", seconds=seconds)
            replace_file(plan.result, json.dumps(result, indent=1) + "\n")
            print(f"{plan.cell.name}: {_summary(result)} in {seconds:.0f} s", flush=True)

        futures = [pool.submit(run, plan) for plan in plans]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            trainings.stop(signal.SIGTERM)
            raise
        trainings.raise_if_stopped()


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
            judgement = evaluate_checkpoint(state, source, test, accelerator)
            result |= {"test_top1": judgement.evaluation.top1, "test_loss": judgement.evaluation.loss}
            result["reference_lines"] = judgement.reference_lines
        result["temperatures"] = [value.tolist() for name, value in state.items() if name.endswith(".temperature")]
    model = build_model(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if config.device != "cpu" and torch.cuda.is_available():
        model.cuda()
    return result | {
        "form": "+".join(dict.fromkeys(attention_forms(model, training=True))),
        "parameters": parameters,
        "train_seconds": round(seconds, 1),
        "commit": (git_state() or {}).get("commit"),
        "config": config_to_dict(config),
    }


def _summary(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return result["status"]
    test = "" if result["test_top1"] is None else f", test {result['test_top1']:.2f} %"
    lines = f" ({format_reference_lines(known)})" if (known := result.get("reference_lines")) else ""
    return f"validation {result['val_top1']:.2f} %{test}{lines}"
