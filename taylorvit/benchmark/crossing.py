"""Where a challenger overtakes an incumbent as the tokens grow: a search that keeps every point, and how sure its answer is.

What is measured at a token count is the ratio of the incumbent's cost to the challenger's, once a round, above 1 where the
challenger is ahead. The search doubles or halves the token count until the crossing is enclosed, bisects in its logarithm, and
asks once more at twice as many tokens. Where the challenger has fallen back there, it was a dent, and the search goes on above.

Near the crossing log-ratio over log-tokens is nearly a straight line, and the crossing is the zero of the line through the
medians of the points within a factor of 2. Its 95 % interval comes from the bootstrap: the rounds of each point are drawn again
with replacement, and medians, line and zero taken anew. It covers what scatters from round to round, not what differs from
machine to machine or bends the curve.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["challenger", "incumbent"]

NEAR = 2.0  # points within this factor of the crossing are on the line
FAR = 1.4  # a point that lies above the crossing by this factor confirms it
RESAMPLES = 1000


class OutOfReach(Exception):
    """So many tokens cannot be measured: there is not the memory for them."""


@dataclass(frozen=True)
class Point:
    """The logarithm of the ratio in every round at one token count."""

    num_tokens: int
    log_ratios: tuple[float, ...]

    @property
    def gain(self) -> float:
        """The median, above 0 where the challenger is ahead."""
        return statistics.median(self.log_ratios)


@dataclass(frozen=True)
class Crossing:
    """What `find_crossing` found.

    `num_tokens` is None where there is no crossing within the range; then `winner` is the side that is ahead, if not everywhere
    then at the range's end, or None where nothing could be measured. `interval` is None where the points have one round each,
    as exact quantities have. `unreachable` is the fewest tokens that were out of reach, where that ended the search. Points are
    in order of tokens.
    """

    num_tokens: float | None
    interval: tuple[float, float] | None
    points: tuple[Point, ...]
    winner: Side | None = None
    unreachable: int | None = None


def find_crossing(
    measure: Callable[[int], Sequence[float]], guess: float, *, tolerance: float, fewest: int, most: int
) -> Crossing:
    """Search the token count above which the challenger is ahead.

    Args:
        measure: returns the ratios of all rounds at a token count, or raises `OutOfReach`; what else it raises ends the search.
        guess: where to begin.
        tolerance: stop where the crossing is enclosed to this part of it.
        fewest, most: tokens to try.
    """
    points: dict[int, Point] = {}

    def ahead(num_tokens: int) -> bool:
        if num_tokens not in points:
            points[num_tokens] = Point(num_tokens, tuple(math.log(ratio) for ratio in measure(num_tokens)))
        return points[num_tokens].gain > 0

    start, behind = guess, None
    while True:
        below, above, unreachable = _enclose(ahead, start, behind, tolerance, fewest, most)
        if below is None or above is None:
            side: Side | None = "incumbent" if below is not None else "challenger" if above is not None else None
            return Crossing(None, None, _in_order(points), side, unreachable)
        below, above = _narrow(ahead, below, above, tolerance)
        far = min(2 * above, most)
        if max(points) >= FAR * above or far == above or not _falls_back(ahead, far):
            return _locate(_in_order(points), below, above, fewest, most)
        start, behind = 2 * far, far


def _falls_back(ahead: Callable[[int], bool], num_tokens: int) -> bool:
    try:
        return not ahead(num_tokens)
    except OutOfReach:
        return False


def _narrow(ahead: Callable[[int], bool], below: int, above: int, tolerance: float) -> tuple[int, int]:
    """Halve the bracket in the logarithm until it is narrow enough."""
    with contextlib.suppress(OutOfReach):
        while above > below * (1 + tolerance) and above > below + 1:
            middle = min(max(round(math.sqrt(below * above)), below + 1), above - 1)
            below, above = (below, middle) if ahead(middle) else (middle, above)
    return below, above


def _locate(points: tuple[Point, ...], below: int, above: int, fewest: int, most: int) -> Crossing:
    """Return the crossing: by the line, or for exact quantities between the two nearest points."""
    about = _line_zero([(math.log(point.num_tokens), point.gain) for point in points if point.num_tokens in (below, above)])
    near = [point for point in points if abs(math.log(point.num_tokens) - about) <= math.log(NEAR)]
    if all(len(point.log_ratios) == 1 for point in near):
        return Crossing(math.exp(about), None, points)
    zero = _line_zero([(math.log(point.num_tokens), point.gain) for point in near])
    return Crossing(_clamped(zero, fewest, most), confidence(near, fewest=fewest, most=most), points)


def confidence(points: Sequence[Point], *, fewest: int, most: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the crossing by the bootstrap over rounds, cut at the range that was searched."""
    draw = random.Random(seed).choices
    zeros = [
        _line_zero(
            [
                (math.log(point.num_tokens), statistics.median(draw(point.log_ratios, k=len(point.log_ratios))))
                for point in points
            ]
        )
        for _ in range(RESAMPLES)
    ]
    fortieths = statistics.quantiles([_clamped(zero, fewest, most) for zero in zeros], n=40, method="inclusive")
    return fortieths[0], fortieths[-1]


def _enclose(
    ahead: Callable[[int], bool], guess: float, below: int | None, tolerance: float, fewest: int, most: int
) -> tuple[int | None, int | None, int | None]:
    """Return the most tokens known to be below the crossing, the fewest known above, and the fewest out of reach."""
    above = unreachable = None
    here: int | None = min(max(round(guess), fewest), most)
    while here is not None:
        try:
            if ahead(here):
                above = here
            else:
                below = here
        except OutOfReach:
            unreachable = here
        here = _next_to_try(below, above, unreachable, tolerance, fewest, most)
    return below, above, unreachable


def _next_to_try(
    below: int | None, above: int | None, unreachable: int | None, tolerance: float, fewest: int, most: int
) -> int | None:
    """Return a token count to try while the crossing is not enclosed, or None where it is or there is none left."""
    if below is None:
        end = above if above is not None else unreachable
        assert end is not None
        return None if end == fewest else max(end // 2, fewest)
    if above is not None:
        return None
    if unreachable is None:
        return None if below == most else min(2 * below, most)
    if unreachable <= max(below * (1 + tolerance), below + 1):
        return None
    return min(max(round(math.sqrt(below * unreachable)), below + 1), unreachable - 1)


def _line_zero(points: Sequence[tuple[float, float]]) -> float:
    """Return where the least-squares line is zero; one that does not rise has its zero beyond the losing side's end."""
    x, y = (statistics.fmean(values) for values in zip(*points))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return x - y / slope if slope > 0 else -math.copysign(math.inf, y)


def _clamped(log_tokens: float, fewest: int, most: int) -> float:
    return min(max(math.exp(min(log_tokens, math.log(most))), fewest), most)


def _in_order(points: dict[int, Point]) -> tuple[Point, ...]:
    return tuple(points[num_tokens] for num_tokens in sorted(points))
