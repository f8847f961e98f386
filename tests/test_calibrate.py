"""tools/calibrate.py: the file it writes, and what it makes of the search's answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import calibrate

from taylorvit.benchmark.crossing import Crossing, Side


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    out = tmp_path / "crossovers.json"
    out.write_text(json.dumps({"cpu": {"crossovers": {"forward": {"8": 1}}}, "other": {"crossovers": {}}}))
    options = ["--head_dim", "2", "--pass", "forward", "--width", "4", "--batch_tokens", "256", "--threads", "1"]
    assert run_tool(monkeypatch, calibrate.main, *options, "--seconds", "0.01", "--tolerance", "0.5", "--out", str(out)) == 0
    assert "forward, D = 2" in capsys.readouterr().out
    table = json.loads(out.read_text())
    assert table["other"] == {"crossovers": {}}
    entry = table["cpu"]
    assert entry["crossovers"].keys() == {"forward"}
    assert entry["crossovers"]["forward"].keys() == {"2"}  # of another run, its 8 is gone
    assert entry["crossovers"]["forward"]["2"] >= 16
    assert "commit" in str(entry["provenance"])
    assert entry["settings"]["batch_tokens"] == 256
    assert (entry["settings"]["dtype"], entry["settings"]["layout"]) == ("float32", "separate")


def test_what_the_command_line_leaves_out_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["program", "--device", "cuda", "--width", "192"])
    options = calibrate.read_options()
    assert (options.impl, options.width, options.batch_tokens) == (calibrate.FASTEST["cuda"], 192, 65536)
    assert (options.dtype, options.layout) == ("bfloat16", "packed")


def test_a_wrong_form_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(calibrate.IMPLEMENTATIONS["cpu"], "direct", lambda q, k, v, temperature: v)
    options = ["--head_dim", "2", "--pass", "forward", "--width", "4", "--batch_tokens", "64", "--seconds", "0.01"]
    out = tmp_path / "crossovers.json"
    with pytest.raises(RuntimeError, match="taylor_direct_cpu is wrong at .*: error"):
        run_tool(monkeypatch, calibrate.main, *options, "--out", str(out))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("side", "written"), [("incumbent", None), ("challenger", calibrate.FEWEST)])
def test_a_crossing_that_is_not_met(side: Side, written: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibrate, "find_crossing", lambda *args, **keywords: Crossing(None, None, (), side))
    out = tmp_path / "crossovers.json"
    options = ["--head_dim", "2", "--pass", "training", "--width", "2", "--batch_tokens", "64", "--out", str(out)]
    assert run_tool(monkeypatch, calibrate.main, *options) == 0
    assert json.loads(out.read_text())["cpu"]["crossovers"] == {"training": {"2": written}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head_dim", "0"], "a whole number above 0 is needed, got '0'"),
        (["--seconds", "inf"], "a number above 0 is needed, got 'inf'"),
        (["--tolerance", "-1"], "a number above 0 is needed, got '-1'"),
        (["--threads", "-1"], "a whole number above 0 is needed, got '-1'"),
        (["--out", "missing/folder/table.json"], "--out missing/folder/table.json cannot be used"),
        (["--out", "."], "--out . cannot be used"),
        (["--out", str(ROOT / "README.md")], "README.md cannot be used"),
        (["--impl", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_bad_input_ends_before_anything_is_timed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, calibrate.main, *arguments) == 2
    assert message in capsys.readouterr().err
