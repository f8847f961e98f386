"""tools/bench_model.py: whole runs in a temporary folder, a wrong attention, memory that runs out, and bad inputs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import bench_model

from taylorvit.ops import IMPLEMENTATIONS
from taylorvit.studies import model_cost, model_report
from taylorvit.studies.model_candidates import Candidate, Verdict
from taylorvit.studies.model_passes import Settings

QUICK = ["--seconds", "0.001", "--min_rounds", "1", "--threads", "1"]
TINY = ["--model", "taylorvit_tiny_patch16_224", "--img_size", "32", *QUICK]
YAML = """\
model:
  name: taylorvit_tiny_patch16_224
  attention: {attention}
  num_classes: 4
  img_size: {img_size}
  patch_size: 4
  embed_dim: 16
  depth: 1
  num_heads: 2
"""


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out, which takes a second."""
    monkeypatch.setattr(model_report, "draw", lambda rows, output: False)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "model.json").read_text())["rows"]


def write_configs(folder: Path, **attentions: str) -> list[str]:
    """Write a tiny model's YAML by that stem for each attention; "softmax 12" is one at 12 pixels."""
    files = []
    for stem, text in attentions.items():
        attention, img_size = (*text.split(), "8")[:2]
        files.append(folder / f"{stem}.yaml")
        files[-1].write_text(YAML.format(attention=attention, img_size=img_size))
    return ["--config", *map(str, files), *QUICK]


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pass", "inference", "training", "--batch_size", "2", "--num_heads", "12", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *TINY, *arguments) == 0
    content, rows = json.loads((tmp_path / "model.json").read_text()), read_rows(tmp_path)
    assert [(row["candidate"], row["pass_name"]) for row in rows] == [
        (attention, pass_name) for pass_name in ("inference", "training") for attention in ("taylorshift", "softmax")
    ]
    assert {(row["num_tokens"], row["batch_size"], row["head_dim"], row["status"]) for row in rows} == {(5, 2, 16, "ok")}
    assert all(row["samples_per_second"] == pytest.approx(2 / row["seconds"]) for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["attention"] == "softmax")
    assert "--num_heads 12" in content["provenance"]["command"]
    assert content["settings"]["min_rounds"] == 1
    line = "| taylorshift | 32 | 5 | 12 | training | 2 | direct | "
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "model.md").read_text()
    with (tmp_path / "model.csv").open(newline="") as file:
        assert [record["candidate"] for record in csv.DictReader(file)] == [row["candidate"] for row in rows]
    assert (tmp_path / "model.png").stat().st_size > 10_000
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.usefixtures("no_picture")
def test_the_logits_are_checked_once_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked: list[tuple[str, int]] = []

    def note(candidate: Candidate, settings: Settings) -> Verdict:
        checked.append((candidate.name, candidate.model.img_size))
        return Verdict(True)

    monkeypatch.setattr(bench_model, "verify", note)
    arguments = ["--img_size", "8", "16", "--pass", "inference", "training", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *write_configs(tmp_path, a="taylorshift"), *arguments) == 0
    assert checked == [("a", 8), ("a", 16)]
    assert len(read_rows(tmp_path)) == 4


@pytest.mark.usefixtures("no_picture")
def test_configs_side_by_side_each_at_its_own_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = write_configs(tmp_path, ours="taylorshift", theirs="softmax", larger="softmax 12")
    assert run_tool(monkeypatch, bench_model.main, *configs, "--out", str(tmp_path / "out")) == 0
    assert [(row["candidate"], row["img_size"], row["baseline"]) for row in read_rows(tmp_path / "out")] == [
        ("ours", 8, "theirs"),
        ("theirs", 8, "theirs"),
        ("larger", 12, "larger"),
    ]


@pytest.mark.usefixtures("no_picture")
def test_each_model_is_compared_with_its_own_last_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = write_configs(tmp_path, a="taylorshift", b="taylorshift")
    arguments = ["--attention", "config", "softmax", "softmax_unfused", "--precision", "bf16", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *configs, *arguments) == 0
    rows = {row["candidate"]: row for row in read_rows(tmp_path)}
    assert {name: row["baseline"] for name, row in rows.items()} == {
        f"{source}{attention}": f"{source} softmax_unfused"
        for source in "ab"
        for attention in ("", " softmax", " softmax_unfused")
    }
    assert {row["precision"] for row in rows.values()} == {"bf16"}


@pytest.mark.usefixtures("no_picture")
def test_the_best_batch_is_measured_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = write_configs(tmp_path, a="taylorshift", b="softmax")
    arguments = ["--batch_size", "best", "--max_batch_size", "2", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *configs, *arguments) == 0
    rows = read_rows(tmp_path)
    assert all(row["best_batch"] and row["note"].startswith("best batch: ") for row in rows)
    assert {row["batch_size"] for row in rows} <= {1, 2}
    assert "(best)" in (tmp_path / "model.md").read_text()


@pytest.mark.usefixtures("no_picture")
def test_memory_is_measured_on_request_and_running_out_of_it_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_cost, "peak_memory", lambda *args, **kwargs: 3 * 2**20)
    arguments = ["--memory", "--pass", "training", "--batch_size", "1", "131072", "--memory_limit_gib", "0.06"]
    assert (
        run_tool(monkeypatch, bench_model.main, *write_configs(tmp_path, a="softmax"), *arguments, "--out", str(tmp_path)) == 0
    )
    small, large = read_rows(tmp_path)
    assert (small["status"], small["peak_bytes"]) == ("ok", 3 * 2**20)
    assert (large["status"], large["seconds"], large["peak_bytes"]) == ("out of memory", None, None)
    table = (tmp_path / "model.md").read_text()
    assert "| training | 131072 | softmax | out of memory |" in table
    assert "| 3 MiB | " in table


@pytest.mark.usefixtures("no_picture")
def test_softmax_by_its_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch has its flash kernel on CPU, not that of cuDNN."""
    arguments = ["--attention", "softmax_cudnn", "softmax_flash", "softmax", "--pass", "training", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *TINY, *arguments) == 0
    rows = {row["attention"]: row for row in read_rows(tmp_path)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "softmax_cudnn": "cannot run",
        "softmax_flash": "ok",
        "softmax": "ok",
    }
    assert rows["softmax_cudnn"]["seconds"] is None
    assert {row["mode"] for row in rows.values()} == {"eager"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
def test_a_compiled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--mode", "compile", "--pass", "training", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *write_configs(tmp_path, a="taylorshift", b="softmax"), *arguments) == 0
    assert [(row["status"], row["mode"]) for row in read_rows(tmp_path)] == [("ok", "compile")] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("mode", ["eager", "compile", "cuda_graph"])
def test_a_whole_run_on_a_gpu(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--device", "cuda", "--mode", mode, "--pass", "inference", "training", "--memory", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, bench_model.main, *TINY, *arguments) == 0
    rows = read_rows(tmp_path)
    assert [(row["status"], row["precision"]) for row in rows] == [("ok", "bf16")] * 4
    assert all(row["peak_bytes"] > 0 for row in rows)


@pytest.mark.usefixtures("no_picture")
def test_wrong_logits_get_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "direct", lambda q, k, v, temperature: v)
    assert run_tool(monkeypatch, bench_model.main, *TINY, "--out", str(tmp_path)) == 1
    wrong, right = read_rows(tmp_path)
    assert (wrong["status"], wrong["seconds"], right["status"]) == ("wrong", None, "ok")
    assert "| direct | WRONG |" in (printed := capsys.readouterr().out)
    assert "taylorshift, inference, batch 1: logits are " in printed


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = bench_model.measure_case

    def interrupted(candidates: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        if size == 2:
            raise KeyboardInterrupt
        return measure(candidates, size, *args, **kwargs)

    monkeypatch.setattr(bench_model, "measure_case", interrupted)
    configs = write_configs(tmp_path, a="softmax")
    with pytest.raises(KeyboardInterrupt):
        run_tool(monkeypatch, bench_model.main, *configs, "--batch_size", "1", "2", "--out", str(tmp_path))
    assert len(read_rows(tmp_path)) == 1
    assert (tmp_path / "model.png").exists()


def test_a_picture_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    assert not model_report.draw([], tmp_path / "model.png")
    assert not (tmp_path / "model.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "a whole number above 0 is needed, got '0'; or 'best'"),
        (["--img_size", "-16"], "a whole number above 0 is needed, got '-16'"),
        (["--img_size", "225"], "img_size must be a positive multiple of patch_size 16, got 225"),
        (["--img_size"], "expected at least one argument"),
        (["--num_heads", "5"], "num_heads must divide the width 384"),
        (["--model", "taylorvit_tiny_patch16_24"], "did you mean 'taylorvit_tiny_patch16_224'?"),
        (["--model", "taylorvit_sequence"], "vocab_size"),
        (["--attention", "sofmax"], "--attention: there is no 'sofmax'; did you mean 'softmax'?"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--mode", "cuda_graph"], "--mode cuda_graph needs a GPU"),
        (["--config", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["--config", "a.yaml", "--model", "vit"], "not allowed with argument"),
        (["--config", "here/a.yaml", "there/a.yaml"], "there/a.yaml: another file is called 'a' too"),
        (["--config", "tokens.yaml", "--img_size", "32"], "model.img_size is 32, but taylorvit_sequence reads no images"),
    ],
)
def test_bad_input_ends_before_anything_is_timed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_configs(tmp_path / folder, a="softmax")
    (tmp_path / "tokens.yaml").write_text("model: {name: taylorvit_sequence, vocab_size: 4, max_length: 8}\n")
    assert run_tool(monkeypatch, bench_model.main, *QUICK, *arguments, "--out", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_tool(monkeypatch, bench_model.main, *TINY, "--out", str(tmp_path / "file")) == 2
    assert "file cannot be written: File exists" in capsys.readouterr().err
