"""The search for a crossing: found from any guess, with an interval that is right as often as it says, ended cleanly; then
its rows, table and picture."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from taylorvit.benchmark.crossing import Crossing, OutOfReach, Point, confidence, find_crossing
from taylorvit.benchmark.crossing_report import Row, draw, markdown_table
from taylorvit.complexity import flops_crossover, memory_crossover


def noisy(truth: float, noise: float, seed: int, rounds: int = 9, slope: float = 1.0) -> Callable[[int], list[float]]:
    """Return a measurement of a challenger that is ahead above `truth`, with errors that are normal in the logarithm."""
    draw = random.Random(seed)
    return lambda num_tokens: [(num_tokens / truth) ** slope * math.exp(draw.gauss(0, noise)) for _ in range(rounds)]


@pytest.mark.parametrize("truth", [40, 333, 5000])
@pytest.mark.parametrize("guess", [16, 300, 60000.0])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_crossing_is_found_from_any_guess(truth: int, guess: float, rounds: int) -> None:
    asked: list[int] = []

    def measure(num_tokens: int) -> list[float]:
        asked.append(num_tokens)
        return rounds * [num_tokens / truth]

    found = find_crossing(measure, guess, tolerance=0.02, fewest=16, most=65536)
    assert found.num_tokens == pytest.approx(truth, rel=1e-6)
    assert found.interval is None if rounds == 1 else found.interval == pytest.approx((truth, truth))
    assert len(set(asked)) == len(asked) < 25
    assert [point.num_tokens for point in found.points] == sorted(asked)
    assert all(point.log_ratios == pytest.approx(rounds * (math.log(point.num_tokens / truth),)) for point in found.points)
    assert (found.winner, found.unreachable) == (None, None)


def test_an_exact_quantity_is_interpolated_between_the_nearest_points() -> None:
    def curved(num_tokens: int) -> list[float]:
        return [(100 + num_tokens + num_tokens**2 / 50) / (500 + 2 * num_tokens)]

    truth = 25 + math.sqrt(25**2 + 400 * 50)
    assert curved(round(truth)) == pytest.approx([1], abs=0.01)
    assert find_crossing(curved, 100, tolerance=0.05, fewest=16, most=1000).num_tokens == pytest.approx(truth, rel=1e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    found = [find_crossing(noisy(700, 0.1, seed), 500, tolerance=0.1, fewest=16, most=65536) for seed in range(60)]
    intervals = [crossing.interval for crossing in found if crossing.interval]
    assert len(intervals) == 60
    assert sum(low <= 700 <= high for low, high in intervals) >= 51
    widths = [math.log(high / low) for low, high in intervals]
    assert 0.05 < sorted(widths)[30] < 0.4  # 5 or so points of 9 rounds: 2 x 1.96 x 1.25 x 0.1 / sqrt(45) is 0.07


def test_more_noise_and_flatter_curves_make_wider_intervals() -> None:
    def width(noise: float, slope: float) -> float:
        interval = find_crossing(noisy(700, noise, 0, slope=slope), 500, tolerance=0.1, fewest=16, most=65536).interval
        assert interval
        return math.log(interval[1] / interval[0])

    assert width(0.02, 1.0) < width(0.1, 1.0)
    assert width(0.02, 1.0) < width(0.02, 0.3)


def test_the_interval_is_the_same_every_time_and_within_the_range() -> None:
    points = [Point(100, (-0.3, 0.2, -0.2)), Point(120, (0.3, -0.1, 0.1))]
    low, high = confidence(points, fewest=50, most=400)
    assert (low, high) == confidence(points, fewest=50, most=400)
    assert 50 <= low < 110 < high <= 400
    assert confidence(points, fewest=50, most=400, seed=1) != confidence(points, fewest=105, most=115)
    assert confidence(points, fewest=105, most=115) == pytest.approx((105, 115))


@pytest.mark.parametrize(("gains", "end"), [((0.3, 0.1), 50), ((-0.1, -0.3), 400)])
def test_a_line_that_falls_puts_the_crossing_at_the_end_of_the_loser(gains: tuple[float, float], end: int) -> None:
    points = [Point(num_tokens, 3 * (gain,)) for num_tokens, gain in zip((100, 120), gains)]
    assert confidence(points, fewest=50, most=400) == pytest.approx((end, end))


def test_far_points_have_no_say() -> None:
    def bent(num_tokens: int) -> list[float]:
        return 3 * [num_tokens / 500 if num_tokens > 250 else 0.1]

    assert find_crossing(bent, 20, tolerance=0.05, fewest=16, most=65536).num_tokens == pytest.approx(500)


@pytest.mark.parametrize(
    ("dent", "last", "truth"), [((400, 700), 65536, 5000), ((400, 700), 2500, None), ((90, 150), 65536, 5000)]
)
def test_a_dent_is_no_crossing(dent: tuple[int, int], last: int, truth: int | None) -> None:
    def measure(num_tokens: int) -> list[float]:
        return [1.2 if dent[0] <= num_tokens <= dent[1] else num_tokens / 5000] * 3

    found = find_crossing(measure, 100, tolerance=0.05, fewest=16, most=last)
    assert found.num_tokens == (truth and pytest.approx(truth))
    assert found.winner == (None if truth else "incumbent")
    assert any(dent[0] <= point.num_tokens <= dent[1] for point in found.points)


def test_a_crossing_is_confirmed_beyond_unless_memory_ends() -> None:
    def measure(num_tokens: int) -> list[float]:
        if num_tokens > 1100:
            raise OutOfReach
        return [num_tokens / 1000]

    free = find_crossing(lambda num_tokens: [num_tokens / 1000], 990, tolerance=0.05, fewest=16, most=65536)
    assert free.points[-1].num_tokens >= 1400
    assert find_crossing(measure, 990, tolerance=0.05, fewest=16, most=65536).num_tokens == pytest.approx(1000)


@pytest.mark.parametrize(("ratio", "side"), [(0.9, "incumbent"), (1.1, "challenger"), (1.0, "incumbent")])
def test_without_a_crossing_the_winner_is_named(ratio: float, side: str) -> None:
    found = find_crossing(lambda num_tokens: [ratio, ratio], 100, tolerance=0.05, fewest=16, most=1000)
    assert (found.num_tokens, found.interval, found.winner, found.unreachable) == (None, None, side, None)
    assert found.points[-1].num_tokens == (1000 if side == "incumbent" else 100)
    assert found.points[0].num_tokens == (100 if side == "incumbent" else 16)


@pytest.mark.parametrize("guess", [16, 300, 5000])
@pytest.mark.parametrize("limit", [700, 1100])
def test_memory_ends_the_search(guess: int, limit: int) -> None:
    tried: list[int] = []

    def measure(num_tokens: int) -> list[float]:
        tried.append(num_tokens)
        if num_tokens >= limit:
            raise OutOfReach
        return [num_tokens / 1000] * 3

    found = find_crossing(measure, guess, tolerance=0.05, fewest=16, most=65536)
    if limit > 1000:
        assert found.num_tokens == pytest.approx(1000)
        assert found.unreachable is None
    else:
        assert (found.num_tokens, found.winner) == (None, "incumbent")
        assert found.unreachable is not None
        assert limit <= found.unreachable <= 1.06 * found.points[-1].num_tokens
    assert len(set(tried)) == len(tried) < 20


def test_nothing_can_be_measured() -> None:
    def measure(num_tokens: int) -> list[float]:
        raise OutOfReach

    assert find_crossing(measure, 100, tolerance=0.05, fewest=16, most=1000) == Crossing(None, None, (), None, 16)


def test_other_errors_end_the_search() -> None:
    def measure(num_tokens: int) -> list[float]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        find_crossing(measure, 100, tolerance=0.05, fewest=16, most=1000)


def row(**changes: Any) -> Row:
    settings: dict[str, Any] = {
        "quantity": "time",
        "impl": "cpu",
        "rival": "sdpa",
        "pass_name": "forward",
        "head_dim": 32,
        "num_heads": 2,
    }
    return Row(**settings | changes)


def test_a_row_stands_beside_theory() -> None:
    time, memory = row(), row(quantity="memory")
    assert (time.n_paper, time.n_symmetric) == (flops_crossover(32), flops_crossover(32, "symmetric"))
    assert (memory.n_paper, memory.n_circulant) == (memory_crossover(32), memory_crossover(32, "circulant"))


@pytest.mark.parametrize(
    ("crossing", "shown", "status"),
    [
        (Crossing(1234.4, (1100.2, 1300.0), (Point(1000, (0.1,)), Point(2000, (0.2,)))), "1,234 (1,100 - 1,300)", "crossed"),
        (Crossing(1234.4, None, (Point(1000, (0.1,)),)), "1,234", "crossed"),
        (Crossing(None, None, (Point(16, (0.1,)),), "challenger"), "ahead from 16 on", "efficient ahead"),
        (Crossing(None, None, (Point(16, (-0.1,)), Point(4000, (-0.1,))), "incumbent"), "not below 4,000", "rival ahead"),
        (Crossing(None, None, (Point(4000, (-0.1,)),), "incumbent", 5000), "not below 4,000, where memory ends", "rival ahead"),
        (Crossing(None, None, (), None, 16), "memory ends before 16", "out of reach"),
    ],
)
def test_a_row_says_what_was_found(crossing: Crossing, shown: str, status: str) -> None:
    found = row()
    found.enter(crossing)
    assert (str(found), found.status, found.is_fault) == (shown, status, False)
    assert [point["num_tokens"] for point in found.points] == [point.num_tokens for point in crossing.points]


def test_the_table_puts_rivals_and_theory_side_by_side() -> None:
    rows = [row(num_tokens=500.0), row(rival="direct", status="wrong", note="off"), row(head_dim=16, num_tokens=99.0)]
    lines = markdown_table(rows).splitlines()
    assert lines[2] == "| time | cpu | forward | 32 | WRONG: off | 500 | 1,056.746 | 560.746 | 576.746 |"
    assert lines[3] == "| time | cpu | forward | 16 |  | 99 | 272.743 | 152.743 | 160.743 |"


def test_the_picture_has_a_panel_for_each_quantity(tmp_path: Path) -> None:
    rows = [
        row(num_tokens=500.0, low=450.0, high=600.0),
        row(impl="reference", num_tokens=500.0, low=510.0, high=600.0),  # the line's zero may lie outside of its interval
        row(impl="cpu", num_tokens=500.0, low=400.0, high=490.0),
        row(impl="paper", status="rival ahead", last_tokens=4000),
        row(rival="direct", status="efficient ahead", first_tokens=16),
        row(rival="sdpa_math", status="wrong"),
    ]
    draw(rows, tmp_path / "one.png")
    draw([*rows, row(quantity="memory", num_tokens=600.0)], tmp_path / "two.png")
    one, two = (plt.imread(tmp_path / name).shape for name in ("one.png", "two.png"))
    assert two[1] == 2 * one[1]
