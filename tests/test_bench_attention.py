"""The benchmark's command line: a whole run in a temporary folder, a wrong candidate, and bad inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool
from torch import Tensor

sys.path.insert(0, str(ROOT / "tools"))

import bench_attention

from taylorvit.benchmark import paper
from taylorvit.benchmark.memory import can_measure_on_cpu

QUICK = ["--threads", "1", "--seconds", "0.001", "--min_rounds", "2", "--input_sets", "2"]


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num_tokens", "80", "9", "--head_dim", "4", "2", "--width", "8", "--pass", "forward", "training", "--out"]
    names = ["sdpa", "taylor_direct_reference", "taylor_efficient_reference", "sdpa_cudnn"]
    assert run_tool(monkeypatch, bench_attention.main, *arguments, str(tmp_path / "out"), "--candidates", *names, *QUICK) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "attention.json").read_text())
    rows = content["rows"]
    assert len(rows) == 2 * 2 * 2 * len(names)
    assert {(row["num_heads"], row["head_dim"]) for row in rows} == {(2, 4), (4, 2)}
    assert {row["candidate"] for row in rows if row["status"] == "ok"} == set(names) - {"sdpa_cudnn"}
    assert all(row["seconds"] > 0 and row["error"] <= row["error_budget"] for row in rows if row["status"] == "ok")
    assert all(row["speedup"] == 1 for row in rows if row["candidate"] == "sdpa")
    assert printed.count("| sdpa | ") == 8
    assert printed.count("| sdpa_cudnn | cannot run: runs on cuda only |") == 8
    assert content["settings"]["min_rounds"] == 2
    assert "--head_dim 4 2" in content["provenance"]["command"]
    assert (tmp_path / "out" / "attention.png").stat().st_size > 10_000
    assert len((tmp_path / "out" / "attention.csv").read_text().splitlines()) == 1 + len(rows)


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
def test_memory_is_measured_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--num_tokens", "1200", "--head_dim", "8", "--num_heads", "1", "--candidates", "paper_direct", "--memory"]
    assert run_tool(monkeypatch, bench_attention.main, *arguments, "--out", str(tmp_path), *QUICK) == 0
    (row,) = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert 2 * 4 * 1200**2 < row["peak_bytes"] < 6 * 4 * 1200**2
    assert row["peak_bytes"] < 1.5 * row["estimated_bytes"]


def test_a_wrong_candidate_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = paper.direct

    def wrong(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        return 1.001 * right(q, k, v, temperature)

    monkeypatch.setattr(paper, "direct", wrong)
    arguments = ["--num_tokens", "20", "--num_heads", "1", "--head_dim", "4", "--candidates", "paper_direct", "paper_efficient"]
    assert run_tool(monkeypatch, bench_attention.main, *arguments, "--out", str(tmp_path), *QUICK) == 1
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "attention.json").read_text())["rows"]}
    assert rows["paper_efficient"]["seconds"] > 0
    assert (rows["paper_direct"]["status"], rows["paper_direct"]["seconds"]) == ("wrong", None)
    line = next(line for line in capsys.readouterr().out.splitlines() if "| paper_direct" in line)
    assert "WRONG: error 0.001 of the output" in line
    assert " us" not in line
    assert " ms" not in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--candidates sdpaa sdpa", "'sdpaa'; did you mean 'sdpa'?"),
        ("--head_dim 64 7", "--head_dim 7 does not divide --width 192"),
        ("--num_heads 5 --width 64", "--num_heads 5 does not divide --width 64"),
        ("--num_heads 2 --head_dim 8 --width 32", "--num_heads 2 times --head_dim 8 is not --width 32"),
        ("--num_tokens 0", "a whole number above 0 is needed, got '0'"),
        ("--batch_size 1.5", "a whole number above 0 is needed, got '1.5'"),
        ("--seconds nan", "a number above 0 is needed, got 'nan'"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--layout mixed", "invalid choice: 'mixed'"),
        ("--limits limits.json", "--limits and --deterministic belong to a GPU"),
        ("--deterministic", "--limits and --deterministic belong to a GPU"),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    tiny = ["--num_tokens", "4", *QUICK]  # it takes no time where it is not refused
    assert run_tool(monkeypatch, bench_attention.main, *tiny, "--out", str(tmp_path / "out"), *arguments.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_what_the_command_line_leaves_out_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(sys, "argv", ["program", "--device", device, "--num_tokens", "8"])
        (case,) = bench_attention.build_cases(options := bench_attention.read_options())
        found[device] = (case.dtype, case.layout, options.memory_limit_gib)
    assert found == {"cpu": ("float32", "separate", 8.0), "cuda": ("bfloat16", "packed", 24.0)}
    monkeypatch.setattr(sys, "argv", ["program", "--device", "cuda", "--dtype", "float16", "--layout", "separate"])
    assert {(case.dtype, case.layout) for case in bench_attention.build_cases(bench_attention.read_options())} == {
        ("float16", "separate")
    }


def test_packed_inputs_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--num_tokens", "20", "--num_heads", "2", "--head_dim", "4", "--layout", "packed", "--pass", "training"]
    names = ["sdpa", "taylor_direct_cpu", "taylor_efficient_cpu"]
    assert run_tool(monkeypatch, bench_attention.main, *arguments, "--candidates", *names, "--out", str(tmp_path), *QUICK) == 0
    content = json.loads((tmp_path / "attention.json").read_text())
    assert [(row["layout"], row["status"]) for row in content["rows"]] == [("packed", "ok")] * 3
    assert content["settings"]["layout"] == "packed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_tool(
            monkeypatch, bench_attention.main, "--device", "cuda", "--num_tokens", "4", *QUICK, "--out", str(tmp_path / "out")
        )
        == 2
    )
    assert capsys.readouterr().err == "error: --device cuda: PyTorch sees no GPU here\n"


def test_a_folder_that_is_a_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_tool(monkeypatch, bench_attention.main, "--out", str(tmp_path / "file")) == 2
    assert "file cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "heads"),
    [
        ((None, None, None), [(3, 64)]),
        ((None, [32, 64], None), [(6, 32), (3, 64)]),
        ((2, [32, 32], None), [(2, 32)]),
        ((2, None, None), [(2, 64)]),
        ((12, None, 192), [(12, 16)]),
        ((3, [64], 192), [(3, 64)]),
    ],
)
def test_heads_and_their_dimension_follow_from_what_is_given(
    given: tuple[int | None, list[int] | None, int | None], heads: list[tuple[int, int]]
) -> None:
    assert bench_attention._heads(*given) == heads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_whole_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["sdpa", "sdpa_flash", "sdpa_cudnn", "flex", "taylor_direct_triton", "taylor_efficient_triton", "taylor_auto"]
    arguments = ["--device", "cuda", "--batch_size", "4", "--num_tokens", "197", "--pass", "forward", "training", "--memory"]
    assert run_tool(monkeypatch, bench_attention.main, *arguments, "--candidates", *names, "--out", str(tmp_path), *QUICK) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["candidate"] for row in rows if row["status"] == "ok"] == 2 * names
    for row in rows:
        assert 0 < row["graph_seconds"] < row["seconds"], row["candidate"]
        assert row["peak_bytes"] > 0
        assert row["tflops"] > 0
    assert any("PyTorch takes the backend" in row["note"] for row in rows)
