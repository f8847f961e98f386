"""Tables and pictures of the study of the Taylor order: rows of `taylorvit.studies.orders` in, Markdown and PNG out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taylorvit.ops.orders import FORMS, MAX_FEATURES, crossover
from taylorvit.studies.orders import Approximation, Timing
from taylorvit.studies.results import left_table

COLORS = ("gray", "tab:red", "tab:blue", "tab:orange", "tab:green", "tab:brown", "tab:purple")  # by order
KEY_TITLES = {"uniform": "uniform keys", "shared": "keys share a direction"}
ODD_PANELS: tuple[tuple[str, str, Callable[[Approximation], float]], ...] = (
    ("share of negative weights", "linear", lambda row: row.negative_share),
    ("smallest |row sum| / N", "log", lambda row: row.smallest_row_sum),
    ("longest output / longest value", "log", lambda row: row.largest_output),
)
LEAST = 1e-6  # smaller distances are not drawn


def approximation_tables(rows: Sequence[Approximation]) -> str:
    """Return the total-variation distance by temperature and order, and where odd orders fail."""
    orders = sorted({row.order for row in rows})
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        groups.setdefault((row.keys, row.head_dim, row.num_tokens, row.temperature), {})[row.order] = row.total_variation
    lines = [[*map(str, key), *(f"{group[order]:.2g}" for order in orders)] for key, group in groups.items()]
    distances = left_table(["keys", "D", "N", "temperature", *(f"order {order}" for order in orders)], lines)
    return f"Total-variation distance from softmax, mean of the rows:\n\n{distances}\n\n{_failure_table(rows)}"


def _failure_table(rows: Sequence[Approximation]) -> str:
    groups: dict[tuple[Any, ...], list[Approximation]] = {}
    for row in rows:
        if row.order:
            groups.setdefault((row.keys, row.head_dim, row.num_tokens, row.order), []).append(row)
    lines = []
    for key, group in groups.items():
        negative = [row.temperature for row in group if row.smallest_weight < 0]
        outside = [row.temperature for row in group if row.largest_output > 1]
        largest = max(row.largest_output for row in group)
        found = [f"{min(some):g}" if some else "none" for some in (negative, outside)]
        lines.append([*map(str, key), *found, f"{largest:.3g}"])
    header = [
        "keys",
        "D",
        "N",
        "order",
        "negative weights from temperature",
        "outputs longer than any value",
        "longest / value",
    ]
    title = "Lowest temperature of the grid with negative weights, and with outputs no mean can have:"
    return f"{title}\n\n{left_table(header, lines)}"


def cost_tables(features: Sequence[dict[str, Any]], timings: Sequence[Timing]) -> str:
    """Return features and crossover by order and head dimension, and the measured times."""
    header = ["D", "order", "features", "numbers of the state", "fewer operations above N"]
    lines = [
        [str(row["head_dim"]), str(row["order"]), f"{row['features']:,}", f"{row['state_numbers']:,}"]
        + [f"{row['crossover_tokens']:,.0f}" if row["allowed"] else "refused: too many features"]
        for row in features
    ]
    return f"{left_table(header, lines)}\n\nTime of one call, one head, fp32, forward:\n\n{timing_table(timings)}"


def timing_table(timings: Sequence[Timing]) -> str:
    """Return one line a case, with the ratio to softmax in brackets: above 1 where the candidate is faster."""
    names = list(dict.fromkeys(row.candidate for row in timings))
    cases: dict[tuple[int, int], dict[str, Timing]] = {}
    for row in timings:
        cases.setdefault((row.head_dim, row.num_tokens), {})[row.candidate] = row
    lines = [[str(D), str(N), *(_time(case.get(name)) for name in names)] for (D, N), case in cases.items()]
    return left_table(["D", "N", *(name.replace("_", ", order ") for name in names)], lines)


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line for each attention, order and initial temperature."""
    header = ["attention", "order", "initial temperature", "top-1 [%]", "split", "runs", "diverged", "learned temperatures"]
    lines = []
    for row in rows:
        top1 = "" if row["top1"] is None else f"{row['top1']:.2f}"
        deviation = "" if row["top1_deviation"] is None else f" ± {row['top1_deviation']:.2f}"
        learned = "" if row["temperature_low"] is None else f"{row['temperature_low']:.2f} to {row['temperature_high']:.2f}"
        labels = [_text(row[key]) for key in ("attention", "order", "temperature_init")]
        lines.append([*labels, top1 + deviation, _text(row["split"]), str(row["runs"]), str(row["diverged"]), learned])
    return left_table(header, lines)


def draw_approximation(rows: Sequence[Approximation], output: Path) -> None:
    """Draw the total-variation distance over the temperature: a column a head dimension, a line a kind of keys."""
    keys, head_dims = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("keys", "head_dim"))
    num_tokens = rows[0].num_tokens
    with _figure(output, len(keys), len(head_dims), sharey=True) as (figure, axes):
        for (line, key), (column, head_dim) in _product(keys, head_dims):
            axis = axes[line][column]
            for order in sorted({row.order for row in rows}):
                chosen = (key, head_dim, num_tokens, order)
                points = [row for row in rows if (row.keys, row.head_dim, row.num_tokens, row.order) == chosen]
                axis.plot([row.temperature for row in points], [row.total_variation for row in points], **_style(order))
            _log_temperatures(axis, rows)
            axis.set(yscale="log", title="" if line else f"D = {head_dim}", ylim=(LEAST, 30))
            axis.set_ylabel("" if column else KEY_TITLES[key])
        figure.suptitle("total-variation distance from softmax, mean of the rows")
        _legend(figure, axes)


def draw_odd(rows: Sequence[Approximation], output: Path) -> None:
    """Draw how odd orders fail, next to order 2, at the smallest and the largest head dimension."""
    keys = list(dict.fromkeys(row.keys for row in rows))
    ends = sorted({min(row.head_dim for row in rows), max(row.head_dim for row in rows)})
    orders = sorted({row.order for row in rows if row.order % 2 or row.order == 2})
    with _figure(output, len(keys), len(ODD_PANELS), width=5.5) as (figure, axes):
        for (line, key), (column, (title, scale, value)) in _product(keys, ODD_PANELS):
            axis = axes[line][column]
            for order in orders:
                for head_dim, look in zip(ends, ("-", ":")):
                    chosen = (key, head_dim, rows[0].num_tokens, order)
                    points = [row for row in rows if (row.keys, row.head_dim, row.num_tokens, row.order) == chosen]
                    style = {**_style(order), "linestyle": look} | ({} if look == "-" else {"label": None})
                    axis.plot([row.temperature for row in points], [value(row) for row in points], **style)
            _log_temperatures(axis, rows)
            axis.set(yscale=scale, title="" if line else title, ylabel="" if column else KEY_TITLES[key])
        for line in axes:
            line[-1].axhline(1, color="black", linewidth=1, label="no mean is longer")
        for head_dim, look in zip(ends, ("-", ":")):
            axes[0][0].plot([], [], color="gray", linestyle=look, label=f"D = {head_dim}")
        _legend(figure, axes)


def draw_cost(features: Sequence[dict[str, Any]], timings: Sequence[Timing], output: Path) -> None:
    """Draw the features over the head dimension, and the measured times over the tokens for each head dimension."""
    head_dims = list(dict.fromkeys(row.head_dim for row in timings))
    with _figure(output, 1, 1 + len(head_dims), width=5.5, height=5) as (figure, axes):
        first = axes[0][0]
        for order in sorted({row["order"] for row in features}):
            points = [row for row in features if row["order"] == order]
            first.plot([row["head_dim"] for row in points], [row["features"] for row in points], **_style(order))
        first.axhline(MAX_FEATURES, color="black", linewidth=1, linestyle="-.", label="limit of this code")
        first.set(xscale="log", yscale="log", xlabel="head dimension D", title="features F: efficient pays above N = F")
        _ticks(first, [row["head_dim"] for row in features])
        for axis, head_dim in zip(axes[0][1:], head_dims):
            _draw_times(axis, [row for row in timings if row.head_dim == head_dim])
            axis.set(title=f"D = {head_dim}, one head", xlabel="tokens N", ylabel="time of one call [s]")
        _legend(figure, axes)


def _draw_times(axis: Any, timings: Sequence[Timing]) -> None:
    for name in dict.fromkeys(row.candidate for row in timings):
        points = [row for row in timings if row.candidate == name]
        form, _, order = name.partition("_")
        style = {"color": "black", "linestyle": "--", "label": "softmax (SDPA)"}
        if form in FORMS:
            style = {"color": COLORS[int(order)], "linestyle": "-" if form == "efficient" else ":"}
            style["label"] = f"{form}, order {order}"
            where = crossover(points[0].head_dim, int(order))
            if points[0].num_tokens < where < points[-1].num_tokens and form == "efficient":
                label = f"equal operations, order {order}"
                axis.axvline(where, color=style["color"], linewidth=1, linestyle="-.", label=label)
        axis.plot([row.num_tokens for row in points], [row.seconds for row in points], marker="o", **style)
    axis.set(xscale="log", yscale="log")
    _ticks(axis, [row.num_tokens for row in timings])


def draw_training(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Draw top-1 over the order, a line for each initial temperature; a cross at the lower edge stands for diverged runs."""
    with _figure(output, 1, 1, width=10, height=6) as (figure, axes):
        axis = axes[0][0]
        temperatures = sorted({row["temperature_init"] for row in rows if row["temperature_init"] is not None})
        for number, temperature in enumerate(temperatures):
            group = [row for row in rows if row["temperature_init"] == temperature]
            _draw_trained(axis, group, "taylor_order", {"fmt": "o-", "color": f"C{number}"})
            _draw_trained(axis, group, "taylorshift", {"fmt": "*", "color": f"C{number}"}, shift=0.1)
            for row in group:
                if row["diverged"]:
                    _mark_diverged(axis, row, f"C{number}", height=0.04 + 0.07 * number)
        for row in rows:
            if row["attention"] == "softmax" and row["top1"] is not None:
                axis.axhline(row["top1"], color="black", linestyle="--", label="softmax")
        axis.set(xlabel="Taylor order", ylabel="top-1 [%]", xticks=sorted({row["order"] or 2 for row in rows}))
        axis.margins(x=0.15, y=0.25)
        _legend(figure, axes, columns=2)


def _draw_trained(axis: Any, rows: Sequence[dict[str, Any]], attention: str, style: dict[str, Any], shift: float = 0.0) -> None:
    points = sorted(
        ((row["order"] or 2) + shift, row["top1"], row["top1_deviation"] or 0)
        for row in rows
        if row["attention"] == attention and row["top1"] is not None
    )
    if points:
        label = f"{attention}, temperature from {rows[0]['temperature_init']:g}"
        axis.errorbar(*zip(*points), markersize=10, capsize=4, label=label, **style)


def _mark_diverged(axis: Any, row: dict[str, Any], color: str, height: float) -> None:
    edge, order, text = axis.get_xaxis_transform(), row["order"] or 2, f"{row['diverged']} of {row['runs']} diverged"
    axis.plot(order, height, marker="x", markersize=10, markeredgewidth=3, color=color, transform=edge)
    axis.text(order + 0.06, height - 0.02, text, color=color, transform=edge)


@contextmanager
def _figure(
    output: Path, lines: int, columns: int, *, width: float = 4.2, height: float = 3.8, **keywords: Any
) -> Iterator[tuple[Any, Any]]:
    """Make a grid of panels, and save it at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 15, "lines.linewidth": 2.5, "axes.grid": True, "grid.alpha": 0.3}):
        size = (width * columns, height * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, **keywords)
        yield figure, axes
        figure.savefig(output, dpi=100)
        plt.close(figure)


def _legend(figure: Any, axes: Any, *, columns: int = 4) -> None:
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), columns), fontsize="medium"
    )


def _style(order: int) -> dict[str, Any]:
    look = ":" if order == 0 else "--" if order % 2 else "-"
    return {"color": COLORS[order], "linestyle": look, "label": "equal weights" if order == 0 else f"order {order}"}


def _log_temperatures(axis: Any, rows: Sequence[Approximation]) -> None:
    temperatures = sorted({row.temperature for row in rows})
    axis.set(xscale="log", xlabel="temperature")
    _ticks(axis, [temperature for temperature in (0.5, 1, 2, 4, 10, 20) if temperatures[0] <= temperature <= temperatures[-1]])


def _ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axis.minorticks_off()


def _product(lines: Sequence[Any], columns: Sequence[Any]) -> Iterator[tuple[tuple[int, Any], tuple[int, Any]]]:
    for line in enumerate(lines):
        for column in enumerate(columns):
            yield line, column


def _time(row: Timing | None) -> str:
    if row is None:
        return ""
    size, unit = (1e-6, "us") if row.seconds < 1e-3 else (1e-3, "ms") if row.seconds < 1 else (1, "s")
    return f"{row.seconds / size:.3g} {unit}" + ("" if row.candidate == "softmax" else f" ({row.speedup:.2f})")


def _text(value: object) -> str:
    return "" if value is None else str(value)
