"""The paper's table: every system on every task, trained under one budget, and what each costs in passes timed side by side.

A task is a configuration file, a system a small one laid over it (configs/attentions/) that names the attention and its
options. Nothing else differs between the systems of a task: model, initialisation, data, order of the samples, settings.

A comparison is a folder: `TASK/` is a study of `sweep`, `cost/TASK_PASS.json` the measured costs of all systems in one pass.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten, load_config
from taylorvit.models import SEQUENCE_NAMES, random_inputs
from taylorvit.studies import model_cost
from taylorvit.studies.model_candidates import Candidate, Verdict, autocast
from taylorvit.studies.model_passes import Settings, memory_limited
from taylorvit.studies.options import config_arguments
from taylorvit.studies.published import SYSTEMS
from taylorvit.studies.results import read_measurement, store_measurement, stored_rows, summarise
from taylorvit.studies.sweep import FREE_IN_RESULTS, Cell
from taylorvit.suggest import nearest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAYERS = CONFIGS / "attentions"
BASELINE = "softmax"
# What tells the systems of a task apart; all else must agree for their accuracies to stand in one column.
OF_A_SYSTEM = ("model.attention", "model.attention_options", "model.kwargs", "seed")


def find_task(text: str) -> Path:
    """Return the configuration file of a task, which is given by its name in configs/ or by its path.

    Raises:
        ValueError: there is none.
    """
    file = Path(text) if text.endswith(".yaml") else CONFIGS / f"{text}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        raise ValueError(f"there is no task {text!r}{nearest(text, known)} (configs/: {', '.join(known)}; or a path)")
    return file


def system_layer(system: str, task: Path) -> Path:
    """Return the file that puts a system on a task; a system that is set otherwise on sequences has a second file for them.

    Raises:
        ValueError: there is no such system, or the task is not valid.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}{nearest(system, SYSTEMS)}")
    for_sequences = LAYERS / f"{system}_sequence.yaml"
    is_sequence = load_config(config_arguments([task]))[0].model.name in SEQUENCE_NAMES
    return for_sequences if is_sequence and for_sequences.exists() else LAYERS / f"{system}.yaml"


def arguments_of(task: Path, system: str, layers: Sequence[Path], words: Sequence[str]) -> list[str]:
    """Return what train.py is told for a system on a task, in the order in which it wins: task, layers, system, settings.

    Args:
        task: configuration file.
        system: a name in `published.SYSTEMS`.
        layers: configuration files for all systems.
        words: settings as KEY=VALUE; they must leave alone what makes a system, and what the program sets.

    Raises:
        ValueError: see `system_layer`, or a word is not such a setting.
    """
    for word in words:
        key = word.partition("=")[0]
        if "=" not in word or word.startswith("-"):
            raise ValueError(f"--set {word}: expected KEY=VALUE, such as schedule.epochs=10")
        if any(key == own or key.startswith(f"{own}.") for own in (*OF_A_SYSTEM, "run_dir", "resume")):
            raise ValueError(f"--set {word}: {', '.join(OF_A_SYSTEM)}, run_dir and resume belong to systems and program")
    files = config_arguments([task, *layers, system_layer(system, task)])
    return [*files, *(f"--{word}" for word in words)]


def build_cells(
    task: Path, systems: Sequence[str], seeds: Sequence[int], layers: Sequence[Path], words: Sequence[str]
) -> list[Cell]:
    """Return a training for every system and seed, all systems with the first seed first."""
    shared = len(config_arguments([task]))  # what run_cells puts before them itself
    told = {system: arguments_of(task, system, layers, words)[shared:] for system in systems}
    return [
        Cell({"task": task.stem, "system": system, "seed": seed}, (*told[system], f"--seed={seed}"))
        for seed in dict.fromkeys(seeds)
        for system in dict.fromkeys(systems)
    ]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the finished trainings of a task's folder, systems in the order of the table.

    Raises:
        ValueError: one is damaged, or they were not all trained under the same settings.
    """
    results = []
    for file in sorted((folder / "cells").glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            assert result["system"] in SYSTEMS
            assert {"task", "seed", "status", "config", "val_top1", "test_top1"} <= result.keys()
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{file}: it is not a result of this comparison ({error!r})") from error
        results.append(result)
    for result in results[1:]:
        first, second = flatten(results[0]["config"]), flatten(result["config"])
        free = (*FREE_IN_RESULTS, *OF_A_SYSTEM)
        if different := [key for key in first if first[key] != second.get(key) and not key.startswith(free)]:
            shown = "; ".join(f"{key} {first[key]!r} and {second.get(key)!r}" for key in different)
            raise ValueError(f"{folder}: {results[0]['system']} and {result['system']} were not trained alike: {shown}")
    return sorted(results, key=lambda result: (list(SYSTEMS).index(result["system"]), result["seed"]))


def summarise_systems(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread of the seeds for every system, its parameters with them; see `results.summarise`."""
    parameters = {result["system"]: result["parameters"] for result in results}
    return [row | {"parameters": parameters[row["system"]]} for row in summarise(results, ("task", "system"))]


def candidates_of(task: Path, systems: Sequence[str], layers: Sequence[Path], words: Sequence[str]) -> list[Candidate]:
    """Return the systems' models on a task, for `model_cost`."""
    configs: dict[str, Config] = {name: load_config(arguments_of(task, name, layers, words))[0] for name in systems}
    return [Candidate(name, config.model) for name, config in configs.items()]


def measure_costs(
    candidates: Sequence[Candidate], batch_size: int, file: Path, *, training: bool, memory: bool, settings: Settings
) -> list[dict[str, Any]]:
    """Time the systems' passes side by side, then read their memory, and return a row for each; what the file has is kept.

    A row is a `model_cost.Row`. A system gets a time only if its output is finite, and TaylorShift's also is the reference's;
    what cannot run, or needs more memory than allowed, is a row that says so.

    Args:
        candidates: of `candidates_of`.
        batch_size: samples in a pass.
        file: where the rows are kept.
        training: forward and backward pass, else inference.
        memory: measure the peak memory as well, on CPU in a fresh process for each.
        settings: how to measure.

    Raises:
        ValueError: the file is damaged or holds another measurement.
    """
    asked: dict[str, Any] = {
        "models": {candidate.name: config_to_dict(candidate.model) for candidate in candidates},
        "measuring": {**dataclasses.asdict(settings), "batch_size": batch_size, "memory": memory},
    }
    if file.exists():
        rows = [model_cost.Row(**row) for row in stored_rows(file, asked)]
    else:
        rows = _timed(candidates, batch_size, training, settings)
        store_measurement(file, asked, [dataclasses.asdict(row) for row in rows])
    for candidate, row in zip(candidates, rows if memory else ()):
        if row.status == "ok" and row.peak_bytes is None and not row.note.startswith("memory not measured"):
            model_cost.enter_memory(row, candidate, settings)
            store_measurement(file, asked, [dataclasses.asdict(row) for row in rows])
    return [dataclasses.asdict(row) for row in rows]


def _timed(candidates: Sequence[Candidate], batch_size: int, training: bool, settings: Settings) -> list[model_cost.Row]:
    names = [candidate.name for candidate in candidates]
    rows = model_cost.measure_speed(
        candidates,
        batch_size,
        training=training,
        settings=settings,
        verdicts={candidate.name: verify(candidate, settings) for candidate in candidates},
        baselines=dict.fromkeys(names, BASELINE if BASELINE in names else names[-1]),
    )
    for row in rows:
        said = f"{row.samples_per_second:.4g} samples/s" if row.samples_per_second else f"{row.status} {row.note}"
        print(f"{row.model}, {row.pass_name}: {row.candidate} {said}", flush=True)
    return rows


def verify(candidate: Candidate, settings: Settings) -> Verdict:
    """Return whether a model may be timed: its output for one input is finite, and TaylorShift's is the reference's."""
    try:
        with memory_limited(settings), torch.no_grad(), autocast(settings.device, settings.precision):
            generator = torch.Generator(settings.device).manual_seed(settings.seed)
            inputs = random_inputs(candidate.config, 1, device=settings.device, generator=generator)
            finite = bool(candidate.build(settings.device).eval()(inputs).isfinite().all())
    except (MemoryError, RuntimeError):  # said by the measurement itself, which meets it again
        return Verdict(True)
    return model_cost.verify(candidate, settings) if finite else Verdict(False, "the output is not finite")


def read_costs(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what `measure_costs` left in a folder, by task and pass, each with its rows, settings and provenance.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        content = read_measurement(file, ("models", "measuring"))
        task, _, pass_name = file.stem.rpartition("_")
        found[task, pass_name] = content
    return found
