"""tools/crossover.py: whole runs in a temporary folder, known crossings, wrong candidates, the end of memory, interruption."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_tool
from torch import Tensor

sys.path.insert(0, str(ROOT / "tools"))

import crossover

from taylorvit.benchmark import paper
from taylorvit.benchmark.check import Verdict
from taylorvit.benchmark.crossing_report import Row
from taylorvit.benchmark.memory import RESOLUTION, can_measure_on_cpu
from taylorvit.benchmark.timing import CandidateError, Comparison

QUICK = ["--threads", "1", "--seconds", "0.001", "--min_rounds", "2", "--tolerance", "0.9", "--max_tokens", "64"]
ONE = ["--impl", "paper", "--head_dim", "4", "--rival", "direct", *QUICK]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    crossover.refuse_wrong_result.cache_clear()
    crossover.peak_bytes.cache_clear()
    yield
    crossover.refuse_wrong_result.cache_clear()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "crossover.json").read_text())["rows"]


def crossing_at(truth: float) -> Callable[..., Comparison]:
    """Return a `compare` by which the first candidate's time is linear in N, the second's quadratic; they meet at `truth`."""

    def compare(candidates: Mapping[str, Any], make_inputs: Callable[[int], tuple[Tensor, ...]], **settings: Any) -> Comparison:
        N = make_inputs(0)[0].shape[2]
        efficient, rival = candidates
        return Comparison({efficient: 3 * [truth * N], rival: 3 * [float(N**2)]}, {efficient: 1, rival: 1})

    return compare


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--impl", "cpu", "paper", "--head_dim", "8", "4", "--pass", "training", "--quantity", "time", "--width", "8"]
    arguments += ["--rival", "direct", "sdpa_math"]
    assert run_tool(monkeypatch, crossover.main, *arguments, *QUICK, "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert [(row["impl"], row["head_dim"], row["num_heads"], row["rival"]) for row in rows] == [
        (impl, head_dim, 8 // head_dim, rival)
        for impl in ("cpu", "paper")
        for head_dim in (4, 8)
        for rival in ("direct", "sdpa_math")
    ]
    assert {row["status"] for row in rows} <= {"crossed", "efficient ahead", "rival ahead"}
    assert all((row["num_tokens"] is None) == (row["status"] != "crossed") for row in rows)
    assert all(8 <= point["num_tokens"] <= 64 and len(point["log_ratios"]) >= 2 for row in rows for point in row["points"])
    content = json.loads((tmp_path / "out" / "crossover.json").read_text())
    assert content["settings"]["tolerance"] == 0.9
    assert "--head_dim 8 4" in content["provenance"]["command"]
    table = list(csv.DictReader((tmp_path / "out" / "crossover.csv").open()))
    assert [row["status"] for row in table] == [row["status"] for row in rows]
    markdown = (tmp_path / "out" / "crossover.md").read_text()
    assert len(markdown.splitlines()) == 2 + 4
    assert markdown.strip() in printed
    assert (tmp_path / "out" / "crossover.png").stat().st_size > 10_000


def test_a_known_crossing_is_found_and_serves_the_next_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crossover, "compare", crossing_at(300))
    arguments = ["--impl", "cpu", "--head_dim", "2", "4", "--rival", "direct", "--quantity", "time", "--max_tokens", "4096"]
    assert run_tool(monkeypatch, crossover.main, *arguments, "--out", str(tmp_path)) == 0
    first, second = rows_of(tmp_path)
    assert [first["num_tokens"], first["low"], first["high"]] == pytest.approx([300, 300, 300])
    assert second["num_tokens"] == pytest.approx(300)
    tried = {point["num_tokens"] for point in second["points"]}
    assert round(300 * second["n_paper"] / first["n_paper"]) in tried


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
def test_the_crossing_in_memory_is_met_where_both_forms_materialise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--impl", "paper", "--head_dim", "16", "--rival", "direct", "--quantity", "memory", "--threads", "1"]
    assert run_tool(monkeypatch, crossover.main, *arguments, "--max_tokens", "256", "--out", str(tmp_path)) == 0
    (row,) = rows_of(tmp_path)
    assert row["num_tokens"] == pytest.approx(row["n_paper"], rel=0.4)  # what PyTorch holds at once differs from the count
    assert row["low"] is None
    assert {len(point["log_ratios"]) for point in row["points"]} == {1}


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
def test_a_fork_measures_what_a_fresh_process_does() -> None:
    case = crossover.Case(4, 4, 300, 16)
    crossover.start_fork_server()
    fresh = crossover.memory.peak_bytes_on_cpu(
        "taylorvit.benchmark.peers:prepare_call", {"name": "paper_efficient", "case": case.as_dict()}
    )
    assert crossover.peak_bytes("paper_efficient", case) == pytest.approx(fresh, abs=2 * RESOLUTION)


def test_a_candidate_that_is_wrong_has_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = paper.direct
    monkeypatch.setattr(paper, "direct", lambda q, k, v, temperature: 1.001 * right(q, k, v, temperature))
    arguments = [*ONE, "--rival", "direct", "sdpa", "--quantity", "time", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, crossover.main, *arguments) == 1
    wrong, well = rows_of(tmp_path)
    assert (wrong["status"], wrong["num_tokens"], wrong["points"]) == ("wrong", None, [])
    assert "paper_direct at" in wrong["note"]
    assert well["status"] != "wrong"
    assert "WRONG: paper_direct at" in capsys.readouterr().out


def test_a_candidate_that_is_wrong_at_the_crossing_only_has_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crossover, "compare", crossing_at(100))
    monkeypatch.setattr(
        crossover, "check", lambda call, truth, case, **_: Verdict(float(case.num_tokens == 100), 0.5, "output", 1)
    )
    arguments = [*ONE, "--max_tokens", "4096", "--quantity", "time", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, crossover.main, *arguments) == 1
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["num_tokens"], row["low"]) == ("wrong", None, None)
    assert "at 100 tokens" in row["note"]


def test_one_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compare(*args: Any, **settings: Any) -> Comparison:
        raise CandidateError("paper_direct", RuntimeError("odd"))

    monkeypatch.setattr(crossover, "compare", compare)
    assert run_tool(monkeypatch, crossover.main, *ONE, "--quantity", "time", "--out", str(tmp_path)) == 1
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["note"], row["num_tokens"]) == ("failed", "paper_direct: odd", None)


def test_the_memory_limit_ends_the_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crossover, "compare", crossing_at(1e9))
    limit = ["--max_tokens", "4096", "--memory_limit_gib", "0.03"]
    assert run_tool(monkeypatch, crossover.main, *ONE, *limit, "--quantity", "time", "--out", str(tmp_path)) == 0
    (row,) = rows_of(tmp_path)
    assert row["status"] == "rival ahead"
    assert row["last_tokens"] < row["unreachable"] < 4096
    options = crossover.build_parser().parse_args([*ONE, *limit])
    race = crossover.Race(Row("time", "paper", "direct", "forward", 4, 16), options)
    needed = [max(peer.needed_bytes(race.case(row[key])) for peer in race.peers) for key in ("last_tokens", "unreachable")]
    assert needed[0] <= 0.03 * 2**30 < needed[1]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_ends_the_search(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enough = crossing_at(1e9)

    def compare(candidates: Any, make_inputs: Any, **settings: Any) -> Comparison:
        if make_inputs(0)[0].shape[2] > 60:
            raise CandidateError("paper_direct", error)
        return enough(candidates, make_inputs)

    monkeypatch.setattr(crossover, "compare", compare)
    assert run_tool(monkeypatch, crossover.main, *ONE, "--quantity", "time", "--out", str(tmp_path)) == 0
    assert "where memory ends" in (tmp_path / "crossover.md").read_text()


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def search(row: Row, guess: float, options: argparse.Namespace) -> None:
        if row.rival == "sdpa_math":
            raise KeyboardInterrupt
        row.status, row.num_tokens = "crossed", 50.0

    monkeypatch.setattr(crossover, "search", search)
    with pytest.raises(KeyboardInterrupt):
        run_tool(monkeypatch, crossover.main, "--head_dim", "4", "--quantity", "time", "--out", str(tmp_path))
    assert [row["rival"] for row in rows_of(tmp_path)] == ["direct", "sdpa"]
    assert len((tmp_path / "crossover.csv").read_text().splitlines()) == 3
    assert (tmp_path / "crossover.png").stat().st_size > 10_000


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [*ONE, "--dtype", "float16", "--quantity", "time", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, crossover.main, *arguments) == 0
    assert rows_of(tmp_path)[0]["note"] == "paper_efficient: computes in float32, float64 only"


@pytest.mark.parametrize(
    ("arguments", "heads", "images"),
    [
        ([], 8, 40),
        (["--width", "32"], 4, 40),
        (["--num_heads", "3"], 3, 40),
        (["--batch_size", "2"], 8, 2),
        (["--head_dim", "128"], 1, 40),
    ],
)
def test_heads_and_images_fill_what_is_given(arguments: list[str], heads: int, images: int) -> None:
    options = crossover.build_parser().parse_args(["--head_dim", "8", *arguments])
    row = crossover.plan(options)[0]
    assert row.num_heads == heads
    race = crossover.Race(row, options)
    assert race.case(100).shape == (images, heads, 100, row.head_dim)
    assert race.case(10**5).batch_size == (2 if "--batch_size" in arguments else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--head_dim 7", "--head_dim 7 does not divide a width of 64: give --width or --num_heads"),
        ("--head_dim 8 7 --width 32", "--head_dim 7 does not divide --width 32"),
        ("--width 32 --num_heads 2", "not allowed with argument"),
        ("--max_tokens 7", "--max_tokens 7 is less than the 8 that searches go down to"),
        ("--impl fast", "invalid choice: 'fast'"),
        ("--rival flex", "invalid choice: 'flex'"),
        ("--seconds 0", "a number above 0 is needed, got '0'"),
        ("--batch_size 0", "a whole number above 0 is needed, got '0'"),
    ],
)
def test_bad_input_ends_before_anything_is_measured(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, crossover.main, *arguments.split(), "--out", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_tool(monkeypatch, crossover.main, "--quantity", "time", "--out", str(tmp_path / "file")) == 2
    assert "file cannot be written: File exists" in capsys.readouterr().err
