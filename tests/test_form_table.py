"""form="auto" follows the measured table, and the paper's count where nothing was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from taylorvit.complexity import flops_crossover
from taylorvit.ops import IMPLEMENTATIONS, form_table, resolve_form, taylor_attention

MEASURED = {
    "cpu": {"crossovers": {"forward": {"8": 100, "2": 25}, "training": {"8": 50}}, "provenance": {}, "settings": {}},
    "other": {"crossovers": {"forward": {"8": 7, "16": None}}},
}


@pytest.fixture
def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "crossovers.json"
    path.write_text(json.dumps(MEASURED))
    monkeypatch.setattr(form_table, "CROSSOVERS", form_table.load(path))


@pytest.mark.usefixtures("_table")
def test_the_measured_count_decides() -> None:
    for training, last_direct in ((False, 100), (True, 50)):
        assert resolve_form(last_direct, 8, impl="cpu", training=training) == "direct"
        assert resolve_form(last_direct + 1, 8, impl="cpu", training=training) == "efficient"
    assert resolve_form(8, 8, impl="other") == "efficient"
    assert resolve_form(8, 8, "direct", impl="other") == "direct"


@pytest.mark.usefixtures("_table")
@pytest.mark.parametrize(
    ("head_dim", "impl", "training"), [(16, "cpu", False), (1, "cpu", False), (4, "cpu", True), (8, "reference", False)]
)
def test_what_was_not_measured_switches_at_n0(head_dim: int, impl: str, training: bool) -> None:
    n0 = flops_crossover(head_dim)
    assert resolve_form(math.floor(n0), head_dim, impl=impl, training=training) == "direct"
    assert resolve_form(math.floor(n0) + 1, head_dim, impl=impl, training=training) == "efficient"


@pytest.mark.usefixtures("_table")
def test_between_two_head_dimensions_it_is_interpolated() -> None:
    assert form_table.crossover(4, "cpu", False) == pytest.approx(50)


@pytest.mark.usefixtures("_table")
def test_a_crossing_that_was_not_met_means_never() -> None:
    assert resolve_form(10**9, 16, impl="other") == "direct"


@pytest.mark.usefixtures("_table")
def test_training_is_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("direct", "efficient"):
        monkeypatch.setitem(IMPLEMENTATIONS["cpu"], name, lambda q, k, v, t, name=name: called.append(name) or v)
    q, k, v = (torch.randn(1, 2, 70, 8) for _ in range(3))  # between 50, training, and 100, forward
    taylor_attention(q, k, v, torch.ones(2))
    taylor_attention(q, k, v, torch.ones(2, requires_grad=True))
    with torch.no_grad():
        taylor_attention(q, k, v, torch.ones(2, requires_grad=True))
    assert called == ["direct", "efficient", "direct"]


def test_no_file_is_an_empty_table(tmp_path: Path) -> None:
    assert form_table.load(tmp_path / "missing.json") == {}


def test_the_shipped_table_says_where_it_comes_from() -> None:
    for impl, entry in json.loads(form_table.PATH.read_text()).items():
        assert impl in IMPLEMENTATIONS
        measured = {"command", "git", "date", "cpu", "threads", "torch"} <= entry["provenance"].keys()
        assert measured or entry["provenance"]["basis"].startswith("counted, not measured")
        assert entry["crossovers"].keys() == {"forward", "training"}
        for crossings in entry["crossovers"].values():
            counts = [crossings[head_dim] for head_dim in sorted(crossings, key=int)]
            assert counts == sorted(counts)  # wider heads make the efficient form dearer
            assert min(counts) >= 1
