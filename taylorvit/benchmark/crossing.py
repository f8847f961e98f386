"""Where a challenger overtakes an incumbent as the tokens grow: a search that keeps every point, and how sure its answer is.

What is measured at a token count is the ratio of the incumbent's cost to the challenger's, once a round, above 1 where the
challenger is ahead. The search doubles or halves the token count until the crossing is enclosed, bisects in its logarithm, and
asks once more at twice as many tokens. Where the challenger has fallen back there, it was a dent, and the search goes on above.

Near the crossing log-ratio over log-tokens is nearly a straight line, and the crossing is the zero of the line through the
medians of the points within a factor of 2. Its 95 % interval comes from the bootstrap: the rounds of each point are drawn again
with replacement, and medians, line and zero taken anew. It covers what scatters from round to round, not what differs from
machine to machine or bends the curve.

`Row` is such an answer for the efficient form against one rival; rows make a table and a picture.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..complexity import Packing, flops_crossover, memory_crossover

Side = Literal["challenger", "incumbent"]
Quantity = Literal["time", "memory"]

NEAR = 2.0  # points within this factor of the crossing are on the line
FAR = 1.4  # a point that lies above the crossing by this factor confirms it
RESAMPLES = 1000
THEORY = {"time": flops_crossover, "memory": memory_crossover}
SYMBOLS = {"time": "N0", "memory": "N1"}
RIVALS = {"direct": "direct form", "sdpa": "fused softmax", "sdpa_math": "unfused softmax"}  # by the names of `peers`
COLORS = {"direct": "tab:blue", "sdpa": "tab:orange", "sdpa_math": "tab:green"}
LINES: dict[Packing, str] = {"none": "-", "symmetric": "--"}
MARKERS = {"forward": "o", "training": "s"}


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


@dataclass
class Row:
    """Where the efficient form of one implementation overtakes one rival, in time or memory, at one head dimension.

    `low` and `high` are the 95 % interval. `first_tokens` and `last_tokens` are the range that was measured, `n_paper`,
    `n_symmetric` and `n_circulant` N0 (time) or N1 (memory) without packing and with either kind. `status` is `crossed`,
    `efficient ahead` or `rival ahead` (everywhere), `out of reach` (nothing measured), or what kept it from being measured.
    """

    quantity: Quantity
    impl: str
    rival: str
    pass_name: str
    head_dim: int
    num_heads: int
    status: str = ""
    note: str = ""
    num_tokens: float | None = None
    low: float | None = None
    high: float | None = None
    first_tokens: int | None = None
    last_tokens: int | None = None
    unreachable: int | None = None
    n_paper: float = math.nan
    n_symmetric: float = math.nan
    n_circulant: float = math.nan
    points: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        packings: tuple[Packing, ...] = ("none", "symmetric", "circulant")
        self.n_paper, self.n_symmetric, self.n_circulant = (THEORY[self.quantity](self.head_dim, one) for one in packings)

    @property
    def is_fault(self) -> bool:
        """Whether a candidate is broken, not merely unsuitable here."""
        return self.status in ("wrong", "failed")

    def enter(self, crossing: Crossing) -> None:
        """Take over what the search found."""
        sides: dict[Side | None, str] = {"challenger": "efficient ahead", "incumbent": "rival ahead", None: "out of reach"}
        self.status = "crossed" if crossing.num_tokens else sides[crossing.winner]
        self.num_tokens, self.unreachable = crossing.num_tokens, crossing.unreachable
        self.low, self.high = crossing.interval or (None, None)
        self.points = [asdict(point) for point in crossing.points]
        if crossing.points:
            self.first_tokens, self.last_tokens = crossing.points[0].num_tokens, crossing.points[-1].num_tokens

    def __str__(self) -> str:
        if self.num_tokens:
            return f"{self.num_tokens:,.0f}" + (f" ({self.low:,.0f} - {self.high:,.0f})" if self.low and self.high else "")
        if self.status == "efficient ahead":
            return f"ahead from {self.first_tokens:,} on"
        if self.status == "rival ahead":
            return f"not below {self.last_tokens:,}" + (", where memory ends" if self.unreachable else "")
        if self.status == "out of reach":
            return f"memory ends before {self.unreachable:,}"
        return f"{self.status.upper() if self.is_fault else self.status}: {self.note}"


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


def markdown_table(rows: Sequence[Row]) -> str:
    """Return a line for each quantity, implementation, pass and head dimension: crossings with their intervals, and theory."""
    rivals = [rival for rival in RIVALS if any(row.rival == rival for row in rows)]
    header = ["quantity", "impl", "pass", "d", *(f"tokens to overtake {RIVALS[rival]}" for rival in rivals)]
    lines = [[*header, "N0 or N1, paper", "symmetric", "circulant"], ["---"] * 3 + ["---:"] * (len(rivals) + 4)]
    cells: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row.quantity, row.impl, row.pass_name, row.head_dim), {})[row.rival] = row
    for key, found in cells.items():
        one = next(iter(found.values()))
        theory = [f"{tokens:,.3f}" for tokens in (one.n_paper, one.n_symmetric, one.n_circulant)]
        lines.append([*map(str, key), *(str(found.get(rival, "")) for rival in rivals), *theory])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[Row], output: Path) -> None:
    """Draw the crossings over the head dimension, log-log, a panel for each quantity, with the paper's curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quantities = list(dict.fromkeys(row.quantity for row in rows))
    with plt.rc_context({"font.size": 15}):
        figure, axes = plt.subplots(1, len(quantities), figsize=(7 * len(quantities), 8), layout="constrained", squeeze=False)
        for axis, quantity in zip(axes.flat, quantities):
            _draw_panel(axis, [row for row in rows if row.quantity == quantity])
        figure.legend(handles=_legend(rows), loc="outside lower center", ncols=2 * len(quantities), frameon=False)
        figure.savefig(output, dpi=100)
        plt.close(figure)


def _draw_panel(axis: Any, rows: list[Row]) -> None:
    quantity = rows[0].quantity
    head_dims = sorted({row.head_dim for row in rows})
    dense = range(math.floor(head_dims[0] / 1.4), math.ceil(head_dims[-1] * 1.4) + 1)
    for packing, style in LINES.items():
        axis.plot(dense, [THEORY[quantity](head_dim, packing) for head_dim in dense], style, color="black", zorder=1)
    series: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row.rival, row.impl, row.pass_name), []).append(row)
    for index, members in enumerate(series.values()):
        _draw_series(axis, members, shift=1.03 ** (index - (len(series) - 1) / 2))  # side by side where they coincide
    axis.set(xscale="log", yscale="log", xlabel="head dimension d", ylabel="crossing N [tokens]")
    axis.set_title(f"less {quantity} than the rival from N tokens on", fontsize="medium")
    axis.set_xticks(head_dims, map(str, head_dims))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.3)


def _draw_series(axis: Any, rows: list[Row], shift: float) -> None:
    for row in rows:
        look, x = _look(COLORS[row.rival], row.impl), row.head_dim * shift
        if row.num_tokens:
            N = row.num_tokens
            bar = [[max(N - (row.low or N), 0)], [max((row.high or N) - N, 0)]]
            axis.errorbar(x, N, bar, marker=MARKERS[row.pass_name], elinewidth=2, capsize=4, **look)
        elif row.status in ("rival ahead", "efficient ahead"):
            marker, end = ("^", row.last_tokens) if row.status == "rival ahead" else ("v", row.first_tokens)
            axis.plot(x, end, marker, **look)


def _look(color: str, impl: str = "") -> dict[str, Any]:
    """Return how a mark is filled: not at all for the paper's way, half for the reference."""
    face, fill = "white" if impl == "paper" else color, "left" if impl == "reference" else "full"
    return {"color": color, "markersize": 9, "markerfacecolor": face, "markerfacecoloralt": "white", "fillstyle": fill}


def _legend(rows: Sequence[Row]) -> list[Any]:
    """Return what colours, shapes, fillings and lines stand for; a triangle points to where no crossing was met."""
    from matplotlib.lines import Line2D

    def mark(label: str, marker: str, impl: str = "") -> Line2D:
        return Line2D([], [], linestyle="none", marker=marker, label=label, **_look("gray", impl))

    return [
        *(Line2D([], [], color=COLORS[rival], linewidth=6, label=f"over {name}") for rival, name in RIVALS.items()),
        *(mark(name, marker) for name, marker in MARKERS.items()),
        mark("not met up to here", "^"),
        *(mark(f"impl {impl}", "D", impl) for impl in dict.fromkeys(row.impl for row in rows)),
        Line2D([], [], color="black", label="N0 | N1, paper"),
        Line2D([], [], color="black", linestyle="--", label="N0 | N1, packed"),
    ]
