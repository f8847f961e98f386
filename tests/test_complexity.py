"""The cost formulas against every figure the paper publishes, and against counting the root from the formulas themselves; then
the calculator on them: its table, its JSON, and what it refuses."""

import itertools
import json
import math
import subprocess
import sys
from typing import get_args

import pytest
from helpers import ROOT

from taylorvit.complexity import (
    Packing,
    entries_direct,
    entries_efficient,
    entries_mhsa,
    flops_crossover,
    flops_crossover_bound,
    memory_crossover,
    memory_crossover_bound,
    num_features,
    ops_direct,
    ops_efficient,
    ops_mhsa,
    quadratic_features,
)
from taylorvit.complexity.__main__ import attention_costs, main, switch_points

HEAD_DIMS = (1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("head_dim", "n0", "n1"),
    [
        (4, 20.727, 15.142),
        (8, 72.737, 46.671),
        (16, 272.743, 158.250),
        (32, 1056.746, 573.939),
        (64, 4160.748, 2173.740),
        (128, 16512.749, 8445.626),
    ],
)
def test_crossovers_are_the_exact_values(head_dim: int, n0: float, n1: float) -> None:
    assert flops_crossover(head_dim) == pytest.approx(n0, abs=5e-4)
    assert memory_crossover(head_dim) == pytest.approx(n1, abs=5e-4)


def test_published_table_is_the_ceiling() -> None:
    dims = (8, 16, 32, 64, 128)
    assert [math.ceil(flops_crossover(d)) for d in dims] == [73, 273, 1057, 4161, 16513]
    assert [math.ceil(memory_crossover(d)) for d in dims] == [47, 159, 574, 2174, 8446]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bounds(head_dim: int) -> None:
    d = head_dim
    assert flops_crossover_bound(d) == d**2 + d + 3 / 4
    assert memory_crossover_bound(d) == d**2 / 2 + 2 * d + 1 / 2
    assert flops_crossover(d) <= flops_crossover_bound(d)
    assert memory_crossover(d) <= memory_crossover_bound(d)


def test_upper_bound_shown_by_the_project_page() -> None:
    assert int(memory_crossover_bound(32)) == 576
    assert math.ceil(memory_crossover_bound(32)) == 577


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", [0, 1, 197, 4097])
def test_polynomials_of_the_paper(num_tokens: int, head_dim: int) -> None:
    N, d = num_tokens, head_dim
    assert ops_direct(N, d) == 4 * N**2 * d + 6 * N**2
    assert ops_efficient(N, d) == N * (4 * d**3 + 10 * d**2 + 9 * d + 4)
    assert entries_direct(N, d) == d * N + 2 * N**2
    assert entries_efficient(N, d) == d**2 * (d + 1) + 2 * d * N + (d + 1) * N + d**2 * N


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_crossovers_in_closed_form(head_dim: int) -> None:
    d = head_dim
    assert flops_crossover(d) == pytest.approx((4 * d**3 + 10 * d**2 + 9 * d + 4) / (4 * d + 6))
    assert memory_crossover(d) == pytest.approx((d**2 + 2 * d + 1 + math.sqrt(d**4 + 12 * d**3 + 14 * d**2 + 4 * d + 1)) / 4)


@pytest.mark.parametrize("packing", get_args(Packing))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_forms_cost_the_same_at_their_crossover(head_dim: int, packing: str) -> None:
    n0, n1 = flops_crossover(head_dim, packing), memory_crossover(head_dim, packing)
    assert ops_efficient(n0, head_dim, packing) == pytest.approx(ops_direct(n0, head_dim))
    assert entries_efficient(n1, head_dim, packing) == pytest.approx(entries_direct(n1, head_dim))
    assert ops_efficient(math.floor(n0) + 1, head_dim, packing) < ops_direct(math.floor(n0) + 1, head_dim)
    assert entries_efficient(math.floor(n1) + 1, head_dim, packing) < entries_direct(math.floor(n1) + 1, head_dim)


@pytest.mark.parametrize(
    ("head_dim", "full", "symmetric", "circulant"),
    [(8, 73, 45, 49), (16, 273, 153, 161), (32, 1057, 561, 577), (64, 4161, 2145, 2177), (128, 16513, 8385, 8449)],
)
def test_feature_counts_and_packed_crossovers(head_dim: int, full: int, symmetric: int, circulant: int) -> None:
    assert num_features(head_dim) == full
    assert num_features(head_dim, "symmetric") == symmetric
    assert num_features(head_dim, "circulant") == circulant
    # In the paper's count, too, the operations cross where a score row has as many entries as a token has features.
    for packing, features in (("none", full), ("symmetric", symmetric), ("circulant", circulant)):
        assert flops_crossover(head_dim, packing) == pytest.approx(features, rel=0.01)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packings_hold_every_pair(head_dim: int) -> None:
    pairs = {(a, b) for a in range(head_dim) for b in range(a, head_dim)}
    rolled = {tuple(sorted((a, (a + delta) % head_dim))) for delta in range(head_dim // 2 + 1) for a in range(head_dim)}
    assert quadratic_features(head_dim, "symmetric") == len(pairs)
    assert rolled == pairs
    assert quadratic_features(head_dim, "circulant") == head_dim * (head_dim // 2 + 1)
    tiles = {(a // 16, b // 16) for a, b in pairs}
    assert quadratic_features(head_dim, "tiles") == 256 * len(tiles)


def test_mhsa_polynomials_of_the_paper() -> None:
    N, embed_dim = 197, 192
    for h in (1, 2, 3, 4, 6, 12, 24, 48, 96, 192):
        assert ops_mhsa("efficient", N, embed_dim, h) == pytest.approx(
            N * (4 * embed_dim**3 / h**2 + 10 * embed_dim**2 / h + 9 * embed_dim + 4 * h)
        )
        assert entries_mhsa("efficient", N, embed_dim, h) == pytest.approx(
            embed_dim**3 / h**2 + (N + 1) * embed_dim**2 / h + 3 * N * embed_dim + N * h
        )
        assert ops_mhsa("direct", N, embed_dim, h) == 4 * N**2 * embed_dim + 6 * N**2 * h


@pytest.mark.parametrize("count", [ops_mhsa, entries_mhsa])
@pytest.mark.parametrize("num_tokens", [1, 197, 16385])
def test_more_heads_cost_less_in_efficient_form_and_more_in_direct_form(count, num_tokens: int) -> None:
    heads = (1, 2, 3, 4, 6, 12, 24, 48, 96, 192)
    efficient = [count("efficient", num_tokens, 192, h) for h in heads]
    direct = [count("direct", num_tokens, 192, h) for h in heads]
    assert all(after < before for before, after in itertools.pairwise(efficient))
    assert all(after > before for before, after in itertools.pairwise(direct))


@pytest.mark.parametrize("head_dim", [1, 8, 64])
def test_entries_fall_with_the_heads_at_the_corrected_rate(head_dim: int) -> None:
    """d entries / d h = -2 d^3 - (N + 1) d^2 + N; one printed form of it has a typing error."""
    N, h, step = 197, 6.0, 1e-4
    embed_dim = head_dim * h

    def entries(heads: float) -> float:
        return heads * entries_efficient(N, embed_dim / heads)

    slope = (entries(h + step) - entries(h - step)) / (2 * step)
    assert slope == pytest.approx(-2 * head_dim**3 - (N + 1) * head_dim**2 + N, rel=1e-4)


def test_efficient_form_is_linear_in_tokens_and_cubic_in_head_dim() -> None:
    assert ops_efficient(2000, 64) == 2 * ops_efficient(1000, 64)
    assert ops_efficient(1, 2**14) / ops_efficient(1, 2**13) == pytest.approx(8, rel=1e-3)


def test_errors_quote_the_value() -> None:
    with pytest.raises(ValueError, match=r"packing must be .* got 'half'"):
        quadratic_features(8, "half")
    with pytest.raises(ValueError, match=r"must divide the width 192: one of \[1, 2, 3, .*\], got 5"):
        ops_mhsa("direct", 197, 192, 5)
    with pytest.raises(ValueError, match="got 0"):
        entries_mhsa("direct", 197, 192, 0)


def printed_rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """Run the calculator and return the words of every line."""
    main(list(arguments))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_calculator_shows_the_exact_switch_points(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed_rows(capsys, "--embed_dim", "256", "--num_heads", "8", "64")
    assert ["8", "32", "1,057", "(1056.746)", "561", "(560.746)", "577", "(576.746)"] in [row[:8] for row in rows]
    (exact,) = [row[10:16] for row in rows if row[:2] == ["8", "32"] and len(row) == 18]
    assert exact == ["574", "(573.939)", "324", "(323.436)", "332", "(331.571)"]  # the project page has the bound, 577, for 574
    assert ["64", "4"] in [row[:2] for row in rows]


def test_the_calculator_shows_what_every_shape_costs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--embed_dim", "384", "--num_heads", "12", "--img_size", "224", "512", "--depth", "12"]
    rows = printed_rows(capsys, *arguments)
    # 12 layers x 12 heads x (4 N^2 32 + 6 N^2) with N = 32^2 + 1
    assert ["12", "32", "512", "1,025", "20.27", "G", "20.90", "G", "direct", "11.09", "G", "efficient"] in rows
    # 12 heads of one layer x (32 N + 2 N^2) with N = 14^2 + 1
    assert ["12", "32", "224", "197", "1.007", "M", "3.056", "M", "direct", "1.687", "M", "direct"] in rows
    assert sum(row[:2] == ["12", "32"] for row in rows) == 5


def test_the_calculator_prints_json_of_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--embed_dim", "192", "--num_heads", "3", "12", "3", "--num_tokens", "50", "4161", "--depth", "4", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["switch_points"] == [switch_points(192, 3), switch_points(192, 12)]
    assert [(cost["num_heads"], cost["num_tokens"], cost["img_size"]) for cost in content["costs"]] == [
        (3, 50, None),
        (3, 4161, None),
        (12, 50, None),
        (12, 4161, None),
    ]
    assert content["costs"][1] == {"img_size": None, **attention_costs(192, 3, 4161, 4)}


def test_the_cheaper_form_changes_at_the_switch_points() -> None:
    for num_tokens, form in ((573, "direct"), (574, "efficient")):
        assert attention_costs(64, 2, num_tokens)["cheaper"]["entries"] == {"none": form, "symmetric": "efficient"}
    for num_tokens, form in ((560, "direct"), (561, "efficient")):
        assert attention_costs(64, 2, num_tokens)["cheaper"]["operations"] == {"none": "direct", "symmetric": form}


def test_depth_multiplies_operations_but_not_what_is_held_at_once() -> None:
    one, twelve = attention_costs(384, 6, 197), attention_costs(384, 6, 197, 12)
    assert twelve["operations"] == {name: 12 * count for name, count in one["operations"].items()}
    assert one["operations"]["direct"] == ops_mhsa("direct", 197, 384, 6)
    assert twelve["entries"] == one["entries"]
    assert one["entries"]["efficient_symmetric"] == entries_mhsa("efficient", 197, 384, 6, "symmetric")


def test_tokens_follow_from_pixels_patches_and_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed_rows(capsys, "--img_size", "384", "--patch_size", "32", "--num_prefix_tokens", "0")
    assert ["6", "64", "384", "144"] in [row[:4] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_heads 3 5 7", "--num_heads 5, 7 does not divide --embed_dim 384; its divisors are 1, 2, 3, 4, 6, 8, 12, "),
        ("--embed_dim 9 --num_heads 2", "--embed_dim 9; its divisors are 1, 3, 9"),
        ("--num_heads 0", "a whole number from 1 to 1,000,000,000 is needed, got '0'"),
        ("--num_tokens 9999999999", "a whole number from 1 to 1,000,000,000 is needed, got '9999999999'"),
        ("--img_size 224 225", "--img_size 225 is not a multiple of --patch_size 16"),
        ("--num_prefix_tokens -1", "--num_prefix_tokens: a whole number from 0 to 1,000,000,000 is needed, got -1"),
        ("--img_size 224 --num_tokens 5", "not allowed with argument"),
    ],
)
def test_the_calculator_refuses_what_it_cannot_answer(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


def test_the_calculator_runs_without_a_warning() -> None:
    arguments = ["-m", "taylorvit.complexity", "--embed_dim", "64", "--num_heads", "2", "--num_tokens", "574"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "574 (573.939)" in done.stdout
    assert done.stderr == ""
