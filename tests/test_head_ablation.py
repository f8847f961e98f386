"""tools/head_ablation.py: cells, measurements that are made once, theory beside them, tables, picture, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import head_ablation

from taylorvit.complexity import memory_crossover, ops_mhsa
from taylorvit.config import ModelConfig
from taylorvit.studies import head_count, model_cost
from taylorvit.studies.head_count import Measuring, check_measured, measure_head_counts, theory
from taylorvit.studies.model_passes import Settings
from taylorvit.studies.sweep import Cell

DIGITS = str(ROOT / "configs" / "digits_pixels.yaml")
MODEL = ModelConfig(name="taylorvit_sequence", vocab_size=256, max_length=15, num_classes=10, embed_dim=16, depth=2)
QUICK = Measuring(Settings(seconds=0.001, min_rounds=1), batch_size=2, most=4)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Peak memory without a fresh process for each; the list holds what was asked for."""
    asked: list[tuple[str, int]] = []

    def peak_memory(candidate: Any, batch_size: int, *, training: bool, settings: Settings) -> int:
        asked.append((candidate.attention, batch_size))
        return 2**20

    monkeypatch.setattr(model_cost, "peak_memory", peak_memory)
    return asked


def test_theory_is_that_of_the_model() -> None:
    found = theory(MODEL, 4)
    assert (found["num_heads"], found["head_dim"], found["num_tokens"]) == (4, 4, 16)
    assert found["ops_direct"] == 2 * ops_mhsa("direct", 16, 16, 4)  # two layers
    assert found["ops_efficient_packed"] < found["ops_efficient"] == 2 * ops_mhsa("efficient", 16, 16, 4)
    assert (found["n0"], found["n1"]) == (pytest.approx(20.727, abs=1e-3), pytest.approx(memory_crossover(4)))
    assert theory(ModelConfig(), 12)["num_tokens"] == 197


def test_both_forms_and_softmax_are_measured_once(tmp_path: Path, memory: list[tuple[str, int]]) -> None:
    rows = measure_head_counts(MODEL, [1, 8], QUICK, tmp_path)
    assert [(row["num_heads"], row["run"], row["form"]) for row in rows] == [
        (heads, run, run) for heads in (1, 8) for run in ("direct", "efficient", "softmax")
    ]
    assert {(row["batch_size"], row["pass_name"], row["status"]) for row in rows} == {(2, "inference", "ok")}
    assert all(row["samples_per_second"] > 0 and row["best_samples_per_second"] > 0 for row in rows)
    assert {row["best_batch_size"] for row in rows} <= {1, 2, 4}
    assert {row["peak_bytes"] for row in rows} == {2**20}
    assert {row["best_peak_bytes"] for row in rows} == {2**20}
    attentions = ("taylorshift_direct", "taylorshift_efficient", "softmax")
    assert {(attention, 2) for attention in attentions} <= set(memory)
    again = measure_head_counts(MODEL, [1, 8], QUICK, tmp_path)
    assert again == rows
    assert len(memory) == 2 * 6
    measure_head_counts(MODEL, [8, 2], QUICK, tmp_path)
    assert len(memory) == 2 * 9


def test_a_measurement_with_other_settings_is_refused(tmp_path: Path) -> None:
    measure_head_counts(MODEL, [1], QUICK, tmp_path)
    with pytest.raises(ValueError, match=r"num_heads-1.json was measured with other settings: measuring.batch_size 2 -> 3;"):
        check_measured(MODEL, [1, 2], Measuring(QUICK.settings, batch_size=3, most=4), tmp_path)
    with pytest.raises(ValueError, match=r"other settings: model.depth 2 -> 1;"):
        measure_head_counts(dataclasses.replace(MODEL, depth=1), [1], QUICK, tmp_path)
    check_measured(MODEL, [1, 2], QUICK, tmp_path)
    (tmp_path / "num_heads-1.json").write_text("{")
    with pytest.raises(ValueError, match=r"num_heads-1.json: it is not a measurement"):
        check_measured(MODEL, [1], QUICK, tmp_path)


def fake_results(cells: list[Cell], **_: Any) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        top1 = 50.0 + cell.labels["num_heads"] + cell.labels["seed"]
        values = {"val_top1": top1, "val_loss": 1.0, "test_top1": top1 - 2, "test_loss": 1.5}
        rows.append({**cell.labels, "status": "ok", **values})
    return rows


def test_a_whole_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(head_ablation, "run_cells", fake_results)
    arguments = [
        "--config",
        DIGITS,
        "--num_heads",
        "2",
        "8",
        "--seeds",
        "0",
        "1",
        "--seconds",
        "0.001",
        "--max_batch_size",
        "2",
    ]
    arguments += ["--set", "model.depth=1", "--batch_size", "2", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, head_ablation.main, *arguments) == 0
    printed = capsys.readouterr().out
    assert "| 8 | taylorshift | 2 | 0 | 58.50 ± 0.71 | 56.50 ± 0.71 | 1.50 ± 0.00 |" in printed
    assert (tmp_path / "head_ablation.md").read_text().strip() in printed
    content = json.loads((tmp_path / "head_ablation.json").read_text())
    assert len(content["rows"]) == 6
    assert [(row["attention"], row["num_heads"]) for row in content["accuracies"]] == [
        (attention, heads) for heads in (2, 8) for attention in ("taylorshift", "softmax")
    ]
    assert [row["head_dim"] for row in content["theory"]] == [32, 8]
    with (tmp_path / "head_ablation.csv").open() as file:
        assert [row["num_heads"] for row in csv.DictReader(file)] == ["2"] * 3 + ["8"] * 3
    assert (tmp_path / "head_ablation.png").stat().st_size > 10_000


def test_measuring_alone_trains_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(head_ablation, "run_cells", lambda *_, **__: pytest.fail("it trains"))
    config = str(ROOT / "configs" / "imagenet_taylorvit_tiny.yaml")
    small = ["--set", "model.depth=1", "model.embed_dim=24", "model.img_size=32", "--seconds", "0.001", "--max_batch_size", "1"]
    arguments = ["--config", config, "--num_heads", "2", *small, "--measure_only", "--batch_size", "1", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, head_ablation.main, *arguments) == 0
    assert json.loads((tmp_path / "head_ablation.json").read_text())["accuracies"] == []


def test_cells_are_every_combination() -> None:
    options = head_ablation.build_parser().parse_args(
        ["--config", DIGITS, "--num_heads", "2", "8", "2", "--seeds", "0", "1", "--attention", "taylorshift"]
    )
    cells = head_ablation.build_cells(options)
    assert [cell.name for cell in cells] == [
        f"attention-taylorshift_num_heads-{heads}_seed-{seed}" for seed in (0, 1) for heads in (2, 8)
    ]
    assert cells[1].arguments == ("--model.attention=taylorshift", "--model.num_heads=8", "--seed=0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_heads", "2", "7"], "num_heads must divide the width 64: one of [1, 2, 4, 8, 16, 32, 64], got 7"),
        (["--num_heads"], "expected at least one argument"),
        (["--num_heads", "0"], "a whole number above 0 is needed, got '0'"),
        (["--num_heads", "2", "--attention", "sofmax"], "invalid choice: 'sofmax'"),
        (["--num_heads", "2", "--set", "model.attention=softmax"], "--set model.attention=softmax: this study sets"),
        (["--num_heads", "2", "--launcher", "no-such-program x"], "there is no program 'no-such-program'"),
        (["--num_heads", "2", "--threads", "1000000"], "at most 1024 threads are possible, got '1000000'"),
        (["--num_heads", "2", "--set", "model.dept=1"], "unknown key 'model.dept'; did you mean 'model.depth'"),
        (["--num_heads", "2", "--config", "no.yaml"], "no.yaml: No such file or directory"),
        (["--num_heads", "2", "--out", "/proc/study"], "--out /proc/study cannot be written"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head_ablation, "run_cells", lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setattr(head_count, "measure_speed", lambda *_, **__: pytest.fail("it measures"))
    given = ["--config", DIGITS, "--out", str(tmp_path / "out"), *arguments]
    assert run_tool(monkeypatch, head_ablation.main, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
