"""Crossings of the efficient form with its rivals, a row each: what was found beside theory, as table and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..complexity import Packing, flops_crossover, memory_crossover
from .crossing import Crossing, Side

Quantity = Literal["time", "memory"]

THEORY = {"time": flops_crossover, "memory": memory_crossover}
SYMBOLS = {"time": "N0", "memory": "N1"}
RIVALS = {"direct": "direct form", "sdpa": "fused softmax", "sdpa_math": "unfused softmax"}  # by the names of `peers`
COLORS = {"direct": "tab:blue", "sdpa": "tab:orange", "sdpa_math": "tab:green"}
LINES: dict[Packing, str] = {"none": "-", "symmetric": "--"}
MARKERS = {"forward": "o", "training": "s"}


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
    low, high = math.log(head_dims[0] / 1.4), math.log(head_dims[-1] * 1.4)
    dense = sorted({max(1, round(math.exp(low + (high - low) * step / 200))) for step in range(201)})
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
