"""The numerical study: errors that are known beforehand, sizes that follow from the definition, and tools/numerics.py."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool
from torch import Tensor

from taylorvit.benchmark.case import Case
from taylorvit.ops import IMPLEMENTATIONS, reference
from taylorvit.studies import numerics, numerics_sizes
from taylorvit.studies.numerics_normalisation import normalisation_rows
from taylorvit.studies.numerics_report import error_table

sys.path.insert(0, str(ROOT / "tools"))

import numerics as tool

SMALL = Case(1, 1, 48, 4, "float16", True)
TINY = ["--num_tokens", "16", "32", "--head_dim", "2", "4", "--long_tokens", "64", "128", "--draws", "1"]


def errors_of(
    monkeypatch: pytest.MonkeyPatch, attention: object, case: Case = SMALL, kind: str = "normal"
) -> dict[str, numerics.ErrorRow]:
    """Return the rows of an attention in the place of the reference's efficient form, by tensor."""
    monkeypatch.setitem(IMPLEMENTATIONS["reference"], "efficient", attention)
    peers = {"taylor_efficient_reference": numerics.candidates(["reference"], "cpu")["taylor_efficient_reference"]}
    monkeypatch.setattr(numerics, "truth_of", lambda case: numerics.candidates(["reference"], "cpu")["taylor_direct_reference"])
    return {row.tensor: row for row in numerics.error_rows(case, kind, 2.0, peers, 2)}


@pytest.mark.parametrize("kind", numerics.KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_the_computing_is_judged(dtype: str, kind: str) -> None:
    """Sums in fp32 of inputs that are rounded already miss the truth by the rounding of the result."""
    case = Case(1, 1, 48, 4, dtype, True)
    rows = list(numerics.error_rows(case, kind, 2.0, numerics.candidates(["reference", "cpu"], "cpu"), 2))
    assert len(rows) == 4 * 5
    for row in rows:
        if "temperature" not in row.tensor:
            assert row.rms == pytest.approx(row.rounding, rel=0.02)
            assert row.num_entries == 2 * 48 * 4


def test_a_known_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = errors_of(monkeypatch, lambda *inputs: 1.03125 * reference.direct(*inputs), Case(1, 1, 48, 4, "float32", True))
    for row in rows.values():
        assert (row.rms, row.largest) == pytest.approx((0.03125, 0.03125), rel=1e-3)
    assert rows["output"].rounding is not None
    assert rows["output"].rounding < 1e-7


def test_what_is_not_finite_is_counted_and_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        change = torch.zeros_like(v)
        change[0, 0, 0, 0], change[0, 0, 1, :2] = math.nan, math.inf
        return reference.direct(q, k, v, temperature) + change

    rows = errors_of(monkeypatch, broken)
    output, gradient = rows["output"], rows["gradient of v"]
    assert (output.num_nan, output.num_inf, output.rms, output.largest) == (2, 4, None, None)  # two seeds
    assert (gradient.num_nan, gradient.rms is not None) == (0, True)
    assert "**NaN/Inf in 1 of 1**" in error_table(list(rows.values()), ("dtype", "tensor"))


def test_what_needs_too_much_memory_is_said_to_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "MAX_BYTES", 1000)
    rows = list(numerics.error_rows(SMALL, "normal", 1.0, numerics.candidates(["cpu"], "cpu"), 1))
    assert {row.note for row in rows} == {"skipped: needs 0.0 GiB"}
    assert "skipped" in error_table(rows, ("dtype", "tensor"))


def test_candidates() -> None:
    assert list(numerics.candidates(["cpu", "paper"], "cpu")) == [
        "taylor_direct_cpu",
        "taylor_efficient_cpu",
        "paper_direct",
        "paper_efficient",
    ]
    with pytest.raises(ValueError, match="--impl cpu runs on cpu.* only, got --device cuda"):
        numerics.candidates(["cpu"], "cuda")
    with pytest.raises(ValueError, match="--impl must be of reference, cpu, .*, got 'fast'"):
        numerics.candidates(["fast"], "cpu")


def test_a_form_that_an_implementation_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", {"direct": reference.direct})
    assert list(numerics.candidates(["cpu"], "cpu")) == ["taylor_direct_cpu"]


def test_scaling_cancels_in_the_output_only() -> None:
    case = Case(1, 1, 300, 4, "float64")
    sizes = {
        scaling: {row.quantity: row for row in numerics_sizes.size_rows(case, scaling, "normal")}
        for scaling in numerics_sizes.SCALINGS
    }
    assert sizes["paper"]["Y"].norm == pytest.approx(sizes["none"]["Y"].norm, rel=1e-9)
    assert sizes["code"]["Y"].norm == pytest.approx(sizes["none"]["Y"].norm * math.sqrt(300 / 4), rel=1e-9)
    assert sizes["none"]["Y_denom"].norm == pytest.approx(300 * (1 + 1 / 8), rel=0.03)
    assert sizes["paper"]["Y_denom"].norm == pytest.approx(sizes["none"]["Y_denom"].norm * 4 / 300, rel=1e-9)
    assert sizes["code"]["ones"].rms == pytest.approx(math.sqrt(4 / 300) / 300, rel=1e-9)
    assert sizes["none"][numerics_sizes.STATE].norm == pytest.approx(300 / 2, rel=0.1)


def test_the_state_and_the_squares_agree_where_all_cosines_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics_sizes, "NUM_DRAWS", 1)
    monkeypatch.setattr(numerics_sizes, "KEYS_AT_A_TIME", 7)
    sizes = {row.quantity: row for row in numerics_sizes.size_rows(Case(1, 1, 50, 1, "float64"), "none", "unit")}
    assert sizes[numerics_sizes.STATE].norm == pytest.approx(sizes["(Q K^T)^(.2) V'"].norm, rel=1e-12)
    assert sizes[numerics_sizes.STATE].largest == 50


def test_longer_sequences_than_are_measured_have_no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics_sizes, "MOST_SIZE_TOKENS", 63)
    assert numerics_sizes.size_rows(Case(1, 1, 64, 2, "float64"), "none", "normal") == []


def test_exponents_are_found_and_not_invented() -> None:
    points = [(N, d, 3 * N**1.5 / d) for N in (10, 100, 1000) for d in (2, 8)]
    assert numerics_sizes.fit_exponents(points) == pytest.approx((1.5, -1.0))
    assert numerics_sizes.fit_exponents([point for point in points if point[0] == 10]) is None


def test_claims_are_held_against_sizes_beyond_the_crossing() -> None:
    rows = [
        numerics_sizes.SizeRow("none", "normal", "Y_denom", N, d, 0.5 * N * (2 + 1 / d) if N > 100 else 1.0, 1.0, 1.0)
        for N, d in ((20, 8), (200, 8), (2000, 8), (200, 4), (2000, 4))
    ]
    claims = [row for row in numerics_sizes.claim_rows(rows) if row.measure == "norm"]
    assert [(row.quantity, row.values) for row in claims] == [("Y_denom", "normal")]
    assert (claims[0].low, claims[0].high) == pytest.approx((0.5, 0.5))
    assert claims[0].exponents == pytest.approx(claims[0].claimed_exponents)


def test_where_a_size_leaves_a_range() -> None:
    falling = [(64, 8 / 64), (16, 1.0), (256, 8 / 256)]  # only the last two lie on 8 / N
    assert numerics_sizes.reach(falling, 2.0**-14, -1) == pytest.approx(8 * 2**14)
    assert numerics_sizes.reach(falling, 65504.0, 1) is None  # moves away
    assert numerics_sizes.reach(falling, 2.0**-25, -1) is None  # beyond MOST_TOKENS
    assert numerics_sizes.reach([(N, 2 * N) for N in (16, 64)], 65504.0, 1) == pytest.approx(32752)
    assert numerics_sizes.reach(falling[:1], 2.0**-14, -1) is None


def test_the_ones_column_of_the_papers_way_rounds_in_fp16() -> None:
    exact, column = numerics_sizes.ones_column(65536, 32)
    assert exact / column - 1 == pytest.approx(-0.0572, abs=1e-4)
    row = numerics_sizes.ones_row(Case(1, 1, 65536, 8, "float16"))
    assert (row.expected, row.measured) == (pytest.approx(-0.0572, abs=1e-4), pytest.approx(-0.0572, abs=5e-4))
    assert row.num_nan + row.num_inf == 0


def test_the_ones_column_of_the_papers_way_vanishes_in_fp16() -> None:
    assert numerics_sizes.ones_column(262144, 16)[1] == 0
    lost = numerics_sizes.ones_row(Case(1, 1, 131072, 2, "float16"))
    assert (lost.column, lost.expected, lost.measured) == (0.0, None, None)
    assert lost.num_nan + lost.num_inf == lost.num_entries
    assert numerics_sizes.ones_row(Case(1, 1, 262144, 64, "float16")).num_entries == 0  # too large, said so


def test_normalisation_rows_are_those_of_the_operation() -> None:
    rows = {row.variant: row for row in normalisation_rows(Case(1, 1, 40, 4, "float64"), seed=3)}
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 40, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    y = reference.direct(q, k, v, torch.ones(1, dtype=torch.float64))
    assert rows["normalised"].scaled_output == pytest.approx(float(y.square().mean().sqrt()))
    assert rows["normalised"].output == pytest.approx(rows["normalised"].scaled_output * math.sqrt(4 / 40))
    assert rows["normalised"].logit_largest <= 1
    assert rows["not normalised, x 4"].logit_rms == pytest.approx(16 * rows["not normalised, x 1"].logit_rms)
    assert rows["normalised"].effective_keys > rows["not normalised, x 1"].effective_keys


def test_overflow_without_normalisation_is_seen() -> None:
    rows = {row.variant: row for row in normalisation_rows(Case(1, 1, 1024, 128, "float64"), seed=0)}
    assert rows["normalised"].zero_rows == rows["normalised"].non_finite == 0
    assert rows["not normalised, x 1"].zero_rows > 0.3  # row sums beyond 65504: all weights become 0, silently
    assert rows["not normalised, x 4"].non_finite > 0.9


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert run_tool(monkeypatch, tool.main, *TINY, "--out", str(out)) == 0
    result = json.loads((out / "numerics.json").read_text())
    assert {"command", "git", "cpu", "torch"} <= result["provenance"].keys()
    assert result["settings"]["num_tokens"] == [16, 32]
    with (out / "numerics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["errors"]) == 2 * 2 * 2 * 3 * 3 * 5 * 2 * len({*numerics.IMPLS} - {"triton"})  # on CPU
    assert {row["candidate"] for row in rows} >= {"paper_direct", "taylor_efficient_cpu"}
    tables = (out / "numerics.md").read_text()
    assert tables in capsys.readouterr().out
    assert tables.count("| float16 |") == 3 * 5 + 2 * 2 * 2
    for picture in ("numerics.png", "numerics_sizes.png"):
        assert (out / picture).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_tokens", "0"], "a whole number above 0 is needed, got '0'"),
        (["--num_tokens"], "expected at least one argument"),
        (["--head_dim", "-4"], "a whole number above 0 is needed, got '-4'"),
        (["--temperature", "nan"], "a number above 0 is needed, got 'nan'"),
        (["--draws", "0"], "a whole number above 0 is needed, got '0'"),
        (["--impl", "fast"], "invalid choice: 'fast'"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--num_tokens", "10000000", "--head_dim", "64"], "--num_tokens 10000000 with --head_dim 64: the fp64 truth needs"),
        (["--long_tokens", "131072"], "--long_tokens 131072: one must be 65536 or less, beyond it no sizes are measured"),
        (["--out", "README.md/x"], "--out README.md/x cannot be written"),
    ],
)
def test_bad_input_ends_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tool, "measure", lambda options: pytest.fail("something was measured"))
    assert run_tool(monkeypatch, tool.main, "--out", str(tmp_path / "out"), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(monkeypatch, tool.main, "--device", "cuda", "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err == "error: --device cuda: PyTorch sees no GPU here\n"
