"""tools/temperature_study.py: the grid, its tables and picture, and what is refused; the trainings are test_sweep's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import temperature_study

from taylorvit.config_loading import load_config
from taylorvit.studies.sweep import Cell

DIGITS = str(ROOT / "configs" / "digits_pixels.yaml")


def fake_results(cells: list[Cell], **_: Any) -> list[dict[str, Any]]:
    """The higher the initial temperature the better, on the training's own word; the test split disagrees."""
    rows = []
    for cell in cells:
        init = cell.labels.get("temperature_init", 3.0)
        values = {"val_top1": 80 + init + cell.labels["seed"], "val_loss": 1.0, "test_top1": 90 - init, "test_loss": 2.0}
        temperatures = [[init, init + 1]] if "temperature_init" in cell.labels else []
        rows.append({**cell.labels, "status": "ok", "temperatures": temperatures, **values})
    return rows


def test_cells_carry_the_settings() -> None:
    arguments = ["--config", DIGITS, "--temperature_init", "1", "5", "--temperature_lr_scale", "1", "10", "--lr", "1e-3"]
    arguments += ["--decay_temperature", "false", "true", "--softmax_lr", "2e-3", "--seeds", "0", "1"]
    cells = temperature_study.build_cells(temperature_study.build_parser().parse_args(arguments))
    assert len(cells) == 2 * 2 * 2 * 2 + 2
    config, _ = load_config(["--config", DIGITS, *cells[-3].arguments])
    assert config.model.attention_options == {"form": "auto", "temperature_init": 5.0}
    assert (config.optim.temperature_lr_scale, config.optim.decay_temperature, config.optim.lr) == (10.0, True, 1e-3)
    twin, _ = load_config(["--config", DIGITS, *cells[-1].arguments])
    assert (twin.model.attention, twin.optim.lr, twin.optim.weight_decay, twin.seed) == ("softmax", 2e-3, 0.05, 1)


def test_a_whole_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(temperature_study, "run_cells", fake_results)
    arguments = ["--config", DIGITS, "--temperature_init", "1", "5", "--lr", "1e-3", "2e-3", "--softmax_lr", "1e-3"]
    assert run_tool(monkeypatch, temperature_study.main, *arguments, "--seeds", "0", "2", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    chosen = "temperature_init 5.0, temperature_lr_scale 1.0, decay_temperature false, form auto, lr 0.001"
    assert f"| taylorshift | 4 | {chosen} | 86.00 ± 1.41 | 85.00 ± 0.00 |" in printed  # by validation, not by the test split
    assert "| softmax | 1 | lr 0.001, weight_decay 0.05 | 84.00 ± 1.41 |" in printed
    rows = json.loads((tmp_path / "temperature_study.json").read_text())["rows"]
    assert [row["temperature"] for row in rows] == [1.5, 1.5, 5.5, 5.5, None]
    assert [row["temperature_high"] for row in rows] == [2, 2, 6, 6, None]
    assert (tmp_path / "temperature_study.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr"], "expected at least one argument"),
        (["--lr", "0"], "a number above 0 is needed, got '0'"),
        (["--lr", "1e-3", "--temperature_init", "nan"], "a number above 0 is needed, got 'nan'"),
        (["--lr", "1e-3", "--form", "fast"], "invalid choice: 'fast'"),
        (["--lr", "1e-3", "--softmax_lr", "1e-3", "--softmax_weight_decay", "-1"], "expected numbers, 0 or more"),
        (["--lr", "1e-3", "--config", "no.yaml"], "no.yaml: No such file or directory"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(temperature_study, "run_cells", lambda *_, **__: pytest.fail("it trains"))
    given = ["--config", DIGITS, "--out", str(tmp_path / "out"), *arguments]
    assert run_tool(monkeypatch, temperature_study.main, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())
