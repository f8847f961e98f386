"""tools/bench_model.py: a whole run in a temporary folder, a wrong attention, and bad inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import bench_model

from taylorvit.ops import IMPLEMENTATIONS

TINY = ["--model", "taylorvit_tiny_patch16_224", "--img_size", "32", "--seconds", "0.001", "--min_rounds", "1"]


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pass", "inference", "training", "--batch_size", "2", "--num_heads", "12", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *TINY, *arguments) == 0
    content = json.loads((tmp_path / "model.json").read_text())
    rows = content["rows"]
    assert [(row["attention"], row["pass_name"]) for row in rows] == [
        (attention, pass_name) for pass_name in ("inference", "training") for attention in ("taylorshift", "softmax")
    ]
    assert {(row["num_tokens"], row["batch_size"]) for row in rows} == {(5, 2)}
    assert all(row["images_per_second"] == pytest.approx(2 / row["seconds"]) for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["attention"] == "softmax")
    assert "--num_heads 12" in content["provenance"]["command"]
    assert capsys.readouterr().out.count("| 32 | 5 | training | taylorshift | direct | 2 | ") == 2


def test_wrong_logits_get_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "direct", lambda q, k, v, temperature: v)
    with pytest.raises(RuntimeError, match="taylorshift's logits are .* off the reference's at 32 pixels"):
        run_tool(monkeypatch, bench_model.main, *TINY, "--out", str(tmp_path))
    assert " s | " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "a whole number above 0 is needed, got '0'"),
        (["--img_size", "-16"], "a whole number above 0 is needed, got '-16'"),
        (["--num_heads", "5"], "5"),
        (["--model", "vit_big"], "invalid choice: 'vit_big'"),
        (["--attention", "sofmax"], "invalid choice: 'sofmax'"),
    ],
)
def test_bad_input_ends_before_anything_is_timed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, bench_model.main, *arguments, "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
