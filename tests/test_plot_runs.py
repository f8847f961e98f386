"""The picture of runs: every record is on it, and a folder without records is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import ROOT

from taylorvit.run_folder import RunFolder

sys.path.insert(0, str(ROOT / "tools"))

from plot_runs import draw, read_curve


def test_curves_hold_every_record_and_the_picture_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for update in (1, 2, 3):
        run.append_metrics({"kind": "train", "update": update, "loss": float("nan") if update == 2 else 1 / update, "lr": 0.1})
    run.append_metrics({"kind": "evaluate", "update": 3, "epoch": 1, "top1": 50.0})
    updates, values = read_curve(run.read_metrics(), "train", "loss")
    assert updates == [1, 2, 3]
    assert (values[0], values[2]) == (1.0, 1 / 3)
    draw([tmp_path / "run"], tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics"):
        draw([tmp_path], tmp_path / "curves.png")
