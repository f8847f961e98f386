"""The study of the Taylor order: what its measurements claim, its grid of trainings, and whole runs of the program."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import order_study

from taylorvit.attention import TaylorOrder, TaylorShift
from taylorvit.models import build_model
from taylorvit.ops.orders import ORDERS, taylor_polynomial
from taylorvit.studies import order_report, orders
from taylorvit.studies.orders import (
    KEYS,
    Approximation,
    approximate,
    draw_cosines,
    feature_table,
    largest_weight_error,
    summarise,
)
from taylorvit.studies.sweep import plan_cells

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def rows() -> list[Approximation]:
    """Rows of both kinds of keys at two head dimensions, from hardly any attention to almost hard attention."""
    temperatures = (0.5, 2.0, 6.0, 20.0)
    return [row for keys in KEYS for D in (8, 32) for row in approximate(keys, D, 48, temperatures, (0, *ORDERS))]


def result(attention: str, order: int | None, seed: int, top1: float | None, **more: Any) -> dict[str, Any]:
    """Return a result as `run_cells` does, of validation only; without top-1 it diverged."""
    labels = {"attention": attention, "order": order, "temperature_init": 1.0, "seed": seed}
    judged = {"val_top1": top1, "test_top1": None, "train_seconds": 2.0, "status": "diverged" if top1 is None else "ok"}
    temperatures = {} if top1 is None else {"temperatures": [[1.0 + seed, 2.0], [3.0, 0.5]]}
    return {key: value for key, value in labels.items() if value is not None} | judged | temperatures | more


def test_the_largest_error_of_a_weight_is_at_minus_the_temperature() -> None:
    for order in (0, *ORDERS):
        for temperature in (0.5, 3.0, 9.0):
            x = torch.linspace(-temperature, temperature, 2001, dtype=torch.float64)
            w = taylor_polynomial(x, order) if order else torch.ones_like(x)
            largest = (w * (-x).exp() - 1).abs().max().item()
            assert largest_weight_error(order, temperature) == pytest.approx(largest, rel=1e-9)


def test_cosines_are_of_unit_vectors_and_shared_keys_lean_one_way() -> None:
    uniform, shared = (draw_cosines(keys, 16, 200) for keys in KEYS)
    assert max(uniform.abs().max(), shared.abs().max()) <= 1 + 1e-12
    assert uniform.square().mean().item() == pytest.approx(1 / 16, rel=0.05)
    assert uniform.mean(dim=-1).abs().max() < 0.15
    assert shared.mean(dim=-1).abs().max() > 0.4


def test_measured_errors_stay_within_what_can_be_proved(rows: list[Approximation]) -> None:
    """With |w / exp - 1| <= e < 1 for all weights, the total variation is at most e / (2 (1 - e))."""
    for row in rows:
        assert row.weight_error <= row.weight_error_bound * (1 + 1e-9)
        if (e := row.weight_error) < 1:
            assert 0 < row.total_variation <= e / (2 * (1 - e))
        if row.kl is not None:
            assert 2 * row.total_variation**2 <= row.kl + 1e-15  # Pinsker, of the means by Jensen


def test_even_orders_stay_means_and_odd_ones_do_not(rows: list[Approximation]) -> None:
    zeros = {1: -1.0, 3: -1.5960716, 5: -2.1806071}
    for row in rows:
        if row.order % 2 == 0:
            assert row.smallest_weight > 0
            assert row.negative_share == 0
            assert row.kl is not None
            assert row.largest_output <= 1
            assert row.smallest_row_sum >= {0: 1, 2: 0.5, 4: 0.27, 6: 0.149}[row.order]
        elif row.temperature < -zeros[row.order]:
            assert row.smallest_weight > 0
        else:
            assert (row.kl is None) == (row.smallest_weight <= 0) == (row.negative_share > 0)
    blown_up = {row.order for row in rows if row.largest_output > 1}
    assert blown_up == {1, 3, 5}


def test_each_two_orders_come_nearer_to_softmax(rows: list[Approximation]) -> None:
    distance = {(row.keys, row.head_dim, row.temperature, row.order): row.total_variation for row in rows}
    for (keys, head_dim, temperature, order), value in distance.items():
        if order in (2, 4, 6):
            assert value < distance[keys, head_dim, temperature, order - 2]
        if order and temperature <= 0.5:
            assert value < distance[keys, head_dim, temperature, order - 1] / 4


def test_features() -> None:
    (row,) = feature_table([16], [4])
    assert (row["features"], row["state_numbers"], row["allowed"]) == (4845, 4845 * 17, True)
    assert [row["allowed"] for row in feature_table([64], ORDERS)] == [True, True, True, False, False, False]


def test_the_grid_trains_every_order_and_its_twins(tmp_path: Path) -> None:
    arguments = ["--config", str(QUICKSTART), "--order", "1", "4", "--temperature_init", "1", "10", "--seeds", "0", "1"]
    cells = order_study.cells_of(order_study.build_parser().parse_args([*arguments, "--set", "model.depth=2"]))
    assert len(cells) == 2 * (2 * 3 + 1)
    plans = plan_cells(cells, configs=[QUICKSTART], out=tmp_path)
    found = set()
    for plan in plans:
        assert plan.config.model.depth == 2
        attention = build_model(plan.config.model, device="meta").blocks[0].attn
        order = attention.order if isinstance(attention, TaylorOrder) else None
        temperature = attention.temperature_init if isinstance(attention, TaylorShift) else None
        found.add((type(attention).__name__, order, temperature, plan.config.seed))
    assert len(found) == len(cells)
    assert ("TaylorOrder", 4, 10.0, 1) in found
    assert ("TaylorShift", None, 1.0, 0) in found
    assert ("Attention", None, None, 1) in found


def test_the_summary_averages_what_finished_and_counts_the_rest() -> None:
    results = [result("taylor_order", 3, 0, 90.0), result("taylor_order", 3, 1, None), result("taylor_order", 3, 2, 94.0)]
    results += [result("taylor_order", 1, 0, None), result("softmax", None, 0, 97.0, test_top1=96.0)]
    third, first, softmax = summarise(results)
    assert (third["order"], third["runs"], third["diverged"], third["split"], third["top1"]) == (3, 3, 1, "val", 92.0)
    assert third["top1_deviation"] == pytest.approx(math.sqrt(8))
    assert (third["temperature_low"], third["temperature_high"]) == (0.5, 3.0)
    assert (first["runs"], first["diverged"], first["top1"], first["split"]) == (1, 1, None, None)
    assert (softmax["order"], softmax["split"], softmax["top1"], softmax["top1_deviation"]) == (None, "test", 96.0, None)
    table = order_report.training_table([third, first, softmax])
    assert "| taylor_order | 3 | 1.0 | 92.00 ± 2.83 | val | 3 | 1 | 0.50 to 3.00 |" in table
    assert "| taylor_order | 1 | 1.0 |  |  | 1 | 1 |  |" in table


def test_approximation_and_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--head_dim", "4", "6", "--num_tokens", "12", "--temperature", "1", "12", "--order", "1", "2", "3"]
    arguments += ["--seconds", "0.001", "--threads", "1", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, order_study.main, *arguments) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "order_study_approximation.json").read_text())
    assert len(content["rows"]) == 2 * 2 * 2 * 4  # keys, head dimensions, temperatures, orders with 0
    assert "--head_dim 4 6" in content["provenance"]["command"]
    assert content["settings"]["temperature"] == [1.0, 12.0]
    table = list(csv.DictReader((tmp_path / "order_study_approximation.csv").open()))
    assert [float(row["total_variation"]) for row in table] == [row["total_variation"] for row in content["rows"]]
    assert "| uniform | 4 | 12 | 12.0 |" in printed
    cost = json.loads((tmp_path / "order_study_cost.json").read_text())
    assert {row["candidate"] for row in cost["rows"]} == {
        "softmax", "direct_1", "direct_2", "direct_3", "efficient_1", "efficient_2", "efficient_3"
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in cost["rows"])
    assert {(row["head_dim"], row["order"]): row["features"] for row in cost["features"]}[6, 3] == math.comb(9, 3)
    for name in ("approximation", "odd", "cost"):
        assert (tmp_path / f"order_study_{name}.png").stat().st_size > 10_000
    assert "![](order_study_cost.png)" in (tmp_path / "order_study_cost.md").read_text()


def test_a_wrong_form_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = orders.order_attention

    def wrong(*tensors: torch.Tensor, order: int, form: str = "direct") -> torch.Tensor:
        return right(*tensors, order=order, form=form) * (1.001 if form == "efficient" else 1)

    monkeypatch.setattr(orders, "order_attention", wrong)
    arguments = ["--part", "cost", "--head_dim", "4", "--num_tokens", "12", "--seconds", "0.001", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="efficient_2 is 1.0e-03 off fp64 at D = 4, N = 12"):
        run_tool(monkeypatch, order_study.main, *arguments)
    assert not list(tmp_path.iterdir())


def test_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cells reach the sweep, and its results the table, the files and the picture; the sweep has tests of its own."""
    given: dict[str, Any] = {}

    def run_cells(cells, **keywords: Any) -> list[dict[str, Any]]:
        given.update(keywords)
        judged = {
            "status": "ok",
            "val_top1": 95.0,
            "test_top1": 94.0,
            "temperatures": [[1.5]],
            "train_seconds": 1.0,
            "config": {},
        }
        diverged = {"status": "diverged", "val_top1": None, "test_top1": None, "train_seconds": 1.0, "config": {}}
        return [{**cell.labels, **(diverged if cell.labels.get("order") == 3 else judged)} for cell in cells]

    monkeypatch.setattr(order_study, "run_cells", run_cells)
    arguments = ["--part", "training", "--config", str(QUICKSTART), "--order", "2", "3", "--temperature_init", "1", "10"]
    arguments += ["--seeds", "0", "1", "--launcher", "accelerate launch", "--jobs", "2", "--out", str(tmp_path)]
    assert run_tool(monkeypatch, order_study.main, *arguments) == 0
    assert given == {"configs": [QUICKSTART], "out": tmp_path, "launcher": [given["launcher"][0], "launch"], "jobs": 2}
    assert Path(given["launcher"][0]).name == "accelerate"
    assert "| taylor_order | 2 | 10.0 | 94.00 ± 0.00 | test | 2 | 0 | 1.50 to 1.50 |" in capsys.readouterr().out
    content = json.loads((tmp_path / "order_study_training.json").read_text())
    assert len(content["cells"]) == 2 * (2 * 3 + 1)
    assert [row["diverged"] for row in content["rows"] if row["order"] == 3] == [2, 2]
    assert (tmp_path / "order_study_training.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--part everything", "invalid choice: 'everything'"),
        ("--order 7", "invalid choice: 7"),
        ("--temperature 0", "a number above 0 is needed, got '0'"),
        ("--part training", "--part training needs --config: which model is to be trained?"),
        ("--part approximation training --config missing.yaml", "missing.yaml"),
        (f"--part approximation --out {ROOT / 'README.md'}", "README.md cannot be written"),
    ],
)
def test_bad_input_ends_before_any_work(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(order_study, "PARTS", dict.fromkeys(order_study.PARTS, lambda options: pytest.fail("it started")))
    assert run_tool(monkeypatch, order_study.main, "--out", str(tmp_path / "out"), *arguments.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
