"""tools/compare.py: what a system on a task is, costs measured once, results under one budget, ours beside the published."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import compare

from taylorvit.config_loading import config_to_dict, load_config
from taylorvit.studies import comparison, comparison_report, model_cost
from taylorvit.studies.comparison import (
    arguments_of,
    build_cells,
    candidates_of,
    find_task,
    measure_costs,
    read_costs,
    read_results,
    system_layer,
)
from taylorvit.studies.model_candidates import Candidate
from taylorvit.studies.model_passes import Settings
from taylorvit.studies.published import CAVEATS, SYSTEMS, TASKS, published

DIGITS = find_task("digits_pixels")
SMALL = ["model.max_length=12", "model.embed_dim=16", "model.depth=1"]
QUICK = Settings(seconds=0.001, min_rounds=1)
# The last column of the paper's table; in brackets there, where a row has gaps.
AVERAGES = {
    "linformer": 57.0,
    "rfa": 55.4,
    "performer": 52.9,
    "reformer": 61.2,
    "nystrom": 62.6,
    "eva": 61.4,
    "softmax": 62.2,
    "taylorshift": 62.8,
}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Peak memory without a fresh process for each; the list holds whose was asked for."""
    asked: list[str] = []

    def peak_memory(candidate: Candidate, batch_size: int, *, training: bool, settings: Settings) -> int:
        asked.append(candidate.name)
        return 3 * 2**20

    monkeypatch.setattr(model_cost, "peak_memory", peak_memory)
    return asked


def write_result(
    folder: Path, system: str, seed: int = 0, *, task: str = "listops", words: tuple[str, ...] = (), **more: Any
) -> Path:
    """Write a finished training of a system into a task's folder, with the configuration that it would have had."""
    config, _ = load_config([*arguments_of(find_task(task), system, [], []), f"--seed={seed}", *words])
    values = {"status": "ok", "val_top1": 51.0, "val_loss": 1.0, "test_top1": 50.0 + seed, "test_loss": 1.5}
    labels = {"task": task, "system": system, "seed": seed}
    result = labels | values | {"parameters": 1234, "commit": "0123456789", "config": config_to_dict(config)} | more
    file = folder / "cells" / f"task-{task}_system-{system}_seed-{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    return file


@pytest.mark.parametrize("system", AVERAGES)
def test_published_rows_have_the_published_averages(system: str) -> None:
    figures = [figure.top1 for task in TASKS if (figure := published(system, task))]
    assert statistics.fmean(figures) == pytest.approx(AVERAGES[system], abs=0.051)


def test_published_marks_are_kept() -> None:
    starred = {(system, task) for system in SYSTEMS for task in TASKS if (f := published(system, task)) and f.full_precision}
    small = {("reformer", "imagenet_taylorvit_small"), ("nystrom", "imagenet_taylorvit_small")}
    assert starred == small | {("performer", task) for task in TASKS}
    gaps = {(system, task) for system in SYSTEMS for task in TASKS if published(system, task) is None}
    without = {("rfa", task) for task in list(TASKS)[2:]} | {("linear", task) for task in TASKS}
    assert gaps == without | {("linformer", "listops")}
    assert published("softmax", "digits_pixels") is None
    assert str(published("performer", "listops")) == "35.4*"


def test_only_what_makes_a_system_differs_between_systems() -> None:
    configs = {system: load_config(arguments_of(find_task("imdb_bytes"), system, [], []))[0] for system in SYSTEMS}
    plain = config_to_dict(configs["softmax"])
    for system, config in configs.items():
        values = config_to_dict(config)
        assert values["model"]["attention"] == system
        assert values["model"]["kwargs"] == ({"fill_idx": 0} if system == "linformer" else {"padding_idx": 0})
        values["model"] |= {key: plain["model"][key] for key in ("attention", "attention_options", "kwargs")}
        assert values == plain
    assert configs["performer"].model.attention_options == {"num_features": 266}
    assert configs["reformer"].model.attention_options == {"bucket_size": 64, "num_hashes": 8}


@pytest.mark.parametrize(
    ("system", "task", "name"),
    [
        ("performer", "listops", "performer_sequence"),
        ("performer", "imagenet_taylorvit_tiny", "performer"),
        ("linformer", "cifar10_pixels", "linformer_sequence"),
        ("linformer", "imagenet_taylorvit_small", "linformer"),
        ("eva", "listops", "eva"),
    ],
)
def test_a_system_may_be_set_otherwise_on_sequences(system: str, task: str, name: str) -> None:
    assert system_layer(system, find_task(task)) == ROOT / "configs" / "attentions" / f"{name}.yaml"


def test_options_of_another_system_do_not_stay(tmp_path: Path) -> None:
    task = tmp_path / "own.yaml"
    task.write_text(
        DIGITS.read_text().replace("attention: taylorshift", "attention: nystrom\n  attention_options: {num_landmarks: 8}")
    )
    config, _ = load_config(arguments_of(task, "softmax", [], []))
    assert (config.model.attention, config.model.attention_options) == ("softmax", {})


def test_settings_win_over_layers_and_layers_over_the_task(tmp_path: Path) -> None:
    layer = tmp_path / "budget.yaml"
    layer.write_text("schedule: {epochs: 7}\noptim: {lr: 0.5}\n")
    config, _ = load_config(arguments_of(DIGITS, "eva", [layer], ["optim.lr=0.25"]))
    assert (config.schedule.epochs, config.optim.lr, config.model.attention) == (7, 0.25, "eva")


def test_cells_are_every_system_and_seed() -> None:
    cells = build_cells(DIGITS, ["softmax", "eva", "softmax"], [1, 0], [], ["schedule.epochs=4"])
    assert [cell.name for cell in cells] == [
        f"task-digits_pixels_system-{system}_seed-{seed}" for seed in (1, 0) for system in ("softmax", "eva")
    ]
    layer = str(ROOT / "configs" / "attentions" / "eva.yaml")
    assert cells[1].arguments == ("--config", layer, "--schedule.epochs=4", "--seed=1")


def test_results_are_read_in_the_order_of_the_table(tmp_path: Path) -> None:
    for system, seed in (("taylorshift", 1), ("taylorshift", 0), ("linformer", 0), ("linear", 0)):
        write_result(tmp_path, system, seed)
    assert [(row["system"], row["seed"]) for row in read_results(tmp_path)] == [
        ("linformer", 0),
        ("taylorshift", 0),
        ("taylorshift", 1),
        ("linear", 0),
    ]


def test_results_of_two_budgets_are_refused(tmp_path: Path) -> None:
    write_result(tmp_path, "eva", words=("--train.micro_batch_size=8", "--data.num_workers=0"))  # changes no result
    write_result(tmp_path, "softmax")
    assert len(read_results(tmp_path)) == 2
    write_result(tmp_path, "taylorshift", words=("--schedule.epochs=3",))
    with pytest.raises(ValueError, match=r"eva and taylorshift were not trained alike: schedule.epochs 2 and 3"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"system": "eva"}', '{"system": "no"}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    write_result(tmp_path, "eva").write_text(text)
    with pytest.raises(ValueError, match=r"system-eva_seed-0.json: it is not a result of this comparison"):
        read_results(tmp_path)


def test_costs_are_measured_once(tmp_path: Path, memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, file = (
        candidates_of(DIGITS, ["linear", "softmax", "taylorshift"], [], SMALL),
        tmp_path / "digits_inference.json",
    )

    def measure(batch_size: int = 2, measured: list[Candidate] = candidates) -> list[dict[str, Any]]:
        return measure_costs(measured, batch_size, file, training=False, memory=True, settings=QUICK)

    rows = measure()
    assert [(row["candidate"], row["status"], row["peak_bytes"]) for row in rows] == [
        (name, "ok", 3 * 2**20) for name in ("linear", "softmax", "taylorshift")
    ]
    assert {row["baseline"] for row in rows} == {"softmax"}
    assert rows[1]["speedup"] == 1.0
    assert all(row["samples_per_second"] > 0 and row["flops_per_sample"] > 0 for row in rows)
    assert rows[2]["parameters"] == rows[1]["parameters"] + 4  # a temperature a head
    assert memory == ["linear", "softmax", "taylorshift"]
    monkeypatch.setattr(model_cost, "measure_speed", lambda *_, **__: pytest.fail("it measures again"))
    assert measure() == rows
    assert read_costs(tmp_path)["digits", "inference"]["rows"] == rows
    with pytest.raises(ValueError, match=r"measured with other settings: measuring.batch_size 2 -> 3; choose another --out"):
        measure(batch_size=3)
    with pytest.raises(ValueError, match=r"measured with other settings: models.linear.name"):
        measure(measured=candidates[1:])
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"digits_inference.json: it is not a measurement"):
        measure()


def test_memory_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, file = candidates_of(DIGITS, ["linear", "softmax", "rfa"], [], SMALL), tmp_path / "a_inference.json"
    asked: list[str] = []

    def peak_memory(candidate: Candidate, batch_size: int, **_: Any) -> int:
        asked.append(candidate.name)
        if asked == ["linear", "softmax"]:
            raise KeyboardInterrupt
        return 2**20

    monkeypatch.setattr(model_cost, "peak_memory", peak_memory)
    with pytest.raises(KeyboardInterrupt):
        measure_costs(candidates, 1, file, training=False, memory=True, settings=QUICK)
    timed = [row["seconds"] for row in json.loads(file.read_text())["rows"]]
    rows = measure_costs(candidates, 1, file, training=False, memory=True, settings=QUICK)
    assert asked == ["linear", "softmax", "softmax", "rfa"]
    assert [row["seconds"] for row in rows] == timed
    assert [row["peak_bytes"] for row in rows] == [2**20] * 3


def test_an_output_that_is_not_finite_gets_no_time(tmp_path: Path, memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build = Candidate.build

    def broken(candidate: Candidate, device: torch.device | str = "cpu") -> torch.nn.Module:
        model = build(candidate, device)
        if candidate.name == "linear" and str(device) != "meta":
            model.blocks[0].attn.qkv.bias.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(Candidate, "build", broken)
    candidates = candidates_of(DIGITS, ["linear", "softmax"], [], SMALL)
    rows = measure_costs(candidates, 1, tmp_path / "a_training.json", training=True, memory=True, settings=QUICK)
    assert [(row["candidate"], row["status"], row["pass_name"]) for row in rows] == [
        ("linear", "wrong", "training"),
        ("softmax", "ok", "training"),
    ]
    assert (rows[0]["seconds"], rows[0]["note"]) == (None, "the output is not finite")
    assert memory == ["softmax"]


def test_page_sets_ours_beside_the_published(tmp_path: Path, memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"majority class": 17.0, "root operator": 36.0, "visible digits": 48.0}
    failed = dict.fromkeys(("val_top1", "test_top1"))
    write_result(tmp_path / "listops", "eva", status="diverged", **failed)  # was not judged, so has no lines either
    for seed in (0, 1):
        write_result(tmp_path / "listops", "performer", seed, reference_lines=lines)
    write_result(tmp_path / "listops", "linformer", reference_lines=lines)
    write_result(tmp_path / "listops", "taylorshift", status="diverged", **failed)
    write_result(tmp_path / "digits_pixels", "softmax", task="digits_pixels")
    costs = ["cost", "--tasks", str(DIGITS), "--systems", "softmax", "rfa", "linear", "--set", *SMALL, "--seconds", "0.001"]
    monkeypatch.setattr(comparison, "verify", lambda *_: comparison.Verdict(True))
    monkeypatch.setattr(model_cost, "new_row", new_row_without_structure)
    costs += ["--passes", "inference", "training", "--min_rounds", "1"]
    assert run_tool(monkeypatch, compare.main, *costs, "--out", str(tmp_path)) == 0
    measured = {pass_name: found["rows"] for (_, pass_name), found in read_costs(tmp_path / "cost").items()}
    assert {name: {row["pass_name"] for row in rows} for name, rows in measured.items()} == {
        "inference": {"inference"},
        "training": {"training"},
    }
    assert run_tool(monkeypatch, compare.main, "report", "--out", str(tmp_path)) == 0
    page = (tmp_path / "compare.md").read_text()
    assert "| Performer [2, 3, 5] | 35.4* | 50.50 ± 0.71 | 51.00 ± 0.00 | 2 | 0 | 1,234 |" in page
    assert "| Linformer | - | 50.00 | 51.00 | 1 | 0 | 1,234 |" in page
    assert "| TaylorShift [2, 3, 7] | 46.1 | - | - | 1 | 1 | 1,234 |" in page
    assert "| Transformer | 50.00 | 51.00 | 1 | 0 |" in page  # digits are not in the paper: no such column
    assert "| RFA | not yet measured | - | 0 | - |" in page
    assert "without looking inside: majority class 17.0 %, root operator 36.0 %, visible digits 48.0 %." in page
    assert "Published: single runs of others" in page
    assert page.index("## ListOps: accuracy") < page.index("## digits_pixels: accuracy")  # the paper's tasks first
    (line,) = [line for line in page.splitlines() if line.startswith("| RFA | 10 | 2 | ")]
    assert line.split(" | ")[5] == "3"  # MiB of inference
    assert line.endswith("| 3 |")
    assert (
        "Budget of every training: 2 epoch(s) of `train`, batch 32, adamw at 0.0015811, precision bf16; commit 0123456." in page
    )
    assert all(f"- [{number}] {caveat.text}" in page for number, caveat in enumerate(CAVEATS, 1))
    assert "| system | CIFAR (Pixel) | IMDB (Byte) | ListOps | ImageNet (Ti) | ImageNet (S) |" in page
    cells = "34.2* / - [3, 5] | 65.6* / - [3, 5] | 35.4* / 50.50 ± 0.71 [2, 3, 5] | 62.0* / - | 67.1* / -"
    assert f"| Performer | {cells} |" in page
    assert "| RFA | 44.9 / - [1, 3] | 65.8 / - [1, 3] | - / - | - / - | - / - |" in page
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["published"]["source"].startswith("TaylorShift paper, arXiv:2403.02920")
    assert content["budgets"]["listops"]["epochs"] == 2
    assert content["reference_lines"] == {"digits_pixels": {}, "listops": lines}
    with (tmp_path / "compare.csv").open() as file:
        rows = {(row["task"], row["system"]): row for row in csv.DictReader(file)}
    assert [system for task, system in rows if task == "listops"] == ["linformer", "performer", "eva", "taylorshift"]
    performer = rows["listops", "performer"]
    assert (performer["published_top1"], performer["published_full_precision"], performer["test_top1"]) == (
        "35.4",
        "True",
        "50.5",
    )
    assert float(rows["digits_pixels", "linear"]["inference_samples_per_second"]) > 0
    assert rows["digits_pixels", "linear"]["inference_peak_bytes"] == str(3 * 2**20)


def new_row_without_structure(candidate: Candidate, batch_size: int, *, training: bool, settings: Settings) -> model_cost.Row:
    """Stand in for a row of a model that nothing was asked about."""
    none = dict.fromkeys(("embed_dim", "num_heads", "head_dim", "num_tokens", "img_size"))
    name = "training" if training else "inference"
    kind = {"pass_name": name, "precision": settings.precision, "device": settings.device, "form": ""}
    counted = {"parameters": 10, "flops_per_sample": 2 * 10**9, "weight_bytes": 40}
    return model_cost.Row(
        candidate.name, candidate.model.name, candidate.attention, batch_size=batch_size, **none, **kind, **counted
    )


def test_every_task_is_checked_before_any_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = []

    def run_cells(cells: list[Any], *, configs: list[Path], out: Path, **more: Any) -> None:
        trained.append((out.name, [path.stem for path in configs], len(cells), more["jobs"]))

    monkeypatch.setattr(compare, "run_cells", run_cells)
    words = ["train", "--tasks", "digits_pixels", "cifar10_pixels", "--systems", "eva", "rfa", "--seeds", "0", "--jobs", "2"]
    assert run_tool(monkeypatch, compare.main, *words, "--out", str(tmp_path)) == 0
    assert trained == [("digits_pixels", ["digits_pixels"], 2, 2), ("cifar10_pixels", ["cifar10_pixels"], 2, 2)]
    trained.clear()
    assert run_tool(monkeypatch, compare.main, *words, "--set", "model.num_heads=4096", "--out", str(tmp_path / "b")) == 2
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--tasks", "cifar10_pixel"], "there is no task 'cifar10_pixel'; did you mean 'cifar10_pixels'"),
        (["train", "--systems", "nystroem"], "invalid choice: 'nystroem'"),
        (["train", "--set", "model.attention_options.k=4"], "--set model.attention_options.k=4: model.attention,"),
        (["train", "--set", "seed=4"], "--set seed=4: model.attention,"),
        (["train", "--set", "schedule.epochs"], "--set schedule.epochs: expected KEY=VALUE"),
        (["train", "--set", "schedule.epoch=3"], "unknown key 'schedule.epoch'; did you mean 'schedule.epochs'"),
        (["cost", "--tasks", "digits_pixels", "--set", "model.attention=rfa"], "--set model.attention=rfa: model.attention,"),
        (["cost", "--batch_size", "0"], "a whole number above 0 is needed, got '0'"),
        (["report"], "there is neither a finished training nor a measurement"),
        (["train", "--tasks", "digits_pixels", "--out", "/proc/study"], "--out /proc/study/digits_pixels cannot be written"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "run_cells", lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setattr(model_cost, "measure_speed", lambda *_, **__: pytest.fail("it measures"))
    given = [arguments[0], "--out", str(tmp_path / "out"), *arguments[1:]]
    assert run_tool(monkeypatch, compare.main, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_figures_that_are_missing_are_dashes() -> None:
    names = ("speedup", "speedup_low", "speedup_high", "peak_bytes")
    row: dict[str, Any] = {"inference_status": "ok", "inference_samples_per_second": 12.3456}
    row |= dict.fromkeys(f"inference_{name}" for name in names)
    assert comparison_report._figures(row, "inference") == ["12.35", "-", "-"]
    assert comparison_report._figures({"training_status": "out of memory"}, "training") == ["out of memory", "-", "-"]
    row |= dict(zip((f"inference_{name}" for name in names), (1.5, 1.25, 2.0, 100)))
    assert comparison_report._figures(row, "inference") == ["12.35", "1.50 (1.25 - 2.00)", "< 0.25"]
