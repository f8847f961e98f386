"""Rows of `model_cost` as files, as a table and as a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from taylorvit.benchmark.memory import RESOLUTION
from taylorvit.run_folder import replace_file
from taylorvit.studies import results
from taylorvit.studies.model_candidates import source_name
from taylorvit.studies.model_cost import Row, Status

FIELDS = [item.name for item in dataclasses.fields(Row)]
OUT: Status = "out of memory"
MEBI = 2**20
LINES, MARKERS = ("-", "--", ":", "-."), "osD^vP"
STRIP = 0.05  # of a panel's height, for the crosses of one candidate
CASE = ["model", "pixels", "tokens", "heads", "pass", "batch", "form"]
FIGURES = ["time of a batch", "samples/s", "x baseline", "10 - 90 %", "peak memory of the pass", "weights", "GFLOP a sample"]
HEADER = CASE + FIGURES


class Panel(NamedTuple):
    """A quantity that is drawn: its axis, its value in a row, and whether "out of memory" lies above all values or below."""

    label: str
    value: Callable[[Row], float | None]
    worst_on_top: bool


class ResultFiles:
    """`model.json`, `model.csv`, `model.md` and `model.png` in one folder, which is made; an earlier run's are replaced.

    Every file is replaced as a whole when rows are added, so that a run that is interrupted keeps what it measured.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.json, self.csv, self.table, self.picture = (folder / f"model.{end}" for end in ("json", "csv", "md", "png"))
        self.header = header
        self.rows: list[Row] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self.picture.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to all files."""
        self.rows += rows
        self._write()
        draw(self.rows, self.picture)

    def written(self) -> list[Path]:
        """Return the files that are there."""
        return [path for path in (self.json, self.csv, self.table, self.picture) if path.exists()]

    def _write(self) -> None:
        records = [dataclasses.asdict(row) for row in self.rows]
        table = io.StringIO()
        writer = csv.DictWriter(table, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        replace_file(self.json, json.dumps({**self.header, "rows": records}, indent=1, allow_nan=False) + "\n")
        replace_file(self.csv, table.getvalue())
        replace_file(self.table, f"`{self.header['provenance']['command']}`\n\n{markdown_table(self.rows)}\n")


def markdown_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table, and below it what is to be said about single rows."""
    notes = [f"{row.candidate}, {row.pass_name}, batch {row.batch_size}: {row.note}" for row in rows if row.note]
    return "\n".join([results.markdown_table(HEADER, map(_cells, rows)), *([""] if notes else []), *notes])


def _cells(row: Row) -> list[str]:
    case = [row.candidate, *map(_count, (row.img_size, row.num_tokens, row.num_heads)), row.pass_name]
    case += [f"{row.batch_size}{' (best)' if row.best_batch else ''}", row.form or "-"]
    speed = [row.status.upper() if row.is_fault else row.status, "", "", ""]
    if row.seconds is not None:
        speed = [_time(row.seconds), f"{row.samples_per_second:.4g}", "", ""]
    if row.speedup is not None:
        speed[2:] = [f"{row.speedup:.2f}", f"{row.speedup_low:.2f} - {row.speedup_high:.2f}"]
    flops = "" if row.flops_per_sample is None else f"{row.flops_per_sample / 1e9:.3g}"
    return [*case, *speed, _mebibytes(row.peak_bytes), _mebibytes(row.weight_bytes), flops]


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _mebibytes(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / MEBI:.4g} MiB" if size >= RESOLUTION else f"< {RESOLUTION / MEBI} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _total_mebibytes(row: Row) -> float | None:
    if row.peak_bytes is None or row.weight_bytes is None:
        return None
    return (row.peak_bytes + row.weight_bytes) / MEBI


PANELS = (
    Panel("throughput [samples/s]", lambda row: row.samples_per_second, worst_on_top=False),
    Panel("peak memory [MiB],\nweights included", _total_mebibytes, worst_on_top=True),
)


def draw(rows: list[Row], output: Path) -> bool:
    """Draw throughput and, where it was measured, peak memory, log-log; return False, and draw nothing, without any figure.

    The abscissa is the number of tokens, or the batch size where there is but one number of tokens. A column of panels for each
    pass and, over tokens, batch size; a line for each candidate, its colour the attention and its dashes the model where both
    vary. A cross in the grey strip is a candidate that ran out of memory.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in PANELS if any(panel.value(row) is not None for row in rows)]
    if not panels:
        return False
    over_tokens = len({row.num_tokens for row in rows}) > 1
    columns: dict[str, list[Row]] = {}
    for row in rows:
        columns.setdefault(_title(row, over_tokens), []).append(row)
    size = (5.0 * len(columns) + 0.5, 3.8 * len(panels) + 1.2)
    with plt.rc_context({"font.size": 12}):
        figure, axes = plt.subplots(len(panels), len(columns), figsize=size, layout="constrained", squeeze=False, sharey="row")
        for line, panel in zip(axes, panels):
            for axis, shown in zip(line, columns.values()):
                _draw_lines(axis, shown, panel, _styles(rows), over_tokens)
            _draw_missing(line, list(columns.values()), panel, _styles(rows), over_tokens)
            line[0].set_ylabel(panel.label)
        for axis, title in zip(axes[0], columns):
            axis.set_title(title)
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(columns))
        _save(figure, output)
    plt.close(figure)
    return True


def _title(row: Row, over_tokens: bool) -> str:
    batch = [("best batch" if row.best_batch else f"batch {row.batch_size}")] if over_tokens else []
    mode = [] if row.mode == "eager" else [row.mode]
    return ", ".join([row.pass_name, *batch, row.device, *mode, "fp32" if row.precision == "no" else row.precision])


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Return colour, dashes and marker of every candidate; the first lines are the widest, so that later ones hide none."""
    sources = {row.candidate: source_name(row.candidate, row.attention) for row in rows}
    attentions = list(dict.fromkeys(row.attention for row in rows))
    models = list(dict.fromkeys(sources.values()))
    styles = {}
    for row in rows:
        color, dash = attentions.index(row.attention), models.index(sources[row.candidate])
        if len(attentions) == 1:
            color, dash = dash, 0
        styles[row.candidate] = {
            "color": f"C{color % 10}",
            "linestyle": LINES[dash % len(LINES)],
            "marker": MARKERS[color % len(MARKERS)],
            "linewidth": max(4.0 - color, 1.2),
            "markersize": max(10.0 - 1.5 * color, 5.0),
        }
    return styles


def _draw_lines(axis: Any, rows: list[Row], panel: Panel, styles: dict[str, dict[str, Any]], over_tokens: bool) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    axis.set(xscale="log", yscale="log", xlabel="tokens N" if over_tokens else "batch size")
    axis.grid(alpha=0.3)
    ticks = {_place(row, over_tokens): _tick(row, over_tokens) for row in rows}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    for name, style in styles.items():
        own = sorted((row for row in rows if row.candidate == name), key=lambda row: _place(row, over_tokens))
        points = [(_place(row, over_tokens), value) for row in own if (value := panel.value(row)) is not None]
        if points:
            axis.plot(*zip(*points), label=name, **style)


def _draw_missing(
    axes: Sequence[Any], columns: list[list[Row]], panel: Panel, styles: dict[str, dict[str, Any]], over_tokens: bool
) -> None:
    """Draw the crosses of what ran out of memory into a strip at the edge, a line of it for each such candidate."""
    names = [name for name in styles if any(row.candidate == name and row.status == OUT for rows in columns for row in rows)]
    if not names:
        return
    low, high = axes[0].get_ylim()
    share = STRIP * len(names) + 0.03
    room = (high / low) ** (share / (1 - share))
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if low <= tick <= high])  # none within the strip
    axes[0].set_ylim((low, high * room) if panel.worst_on_top else (low / room, high))
    bottom = 1 - share if panel.worst_on_top else 0.0
    for axis, rows in zip(axes, columns):
        axis.fill_between([0, 1], bottom, bottom + share, transform=axis.transAxes, color="0.9", zorder=0)
        axis.text(0.02, bottom + share / 2, OUT, transform=axis.transAxes, va="center", color="0.4")
        for number, name in enumerate(names):
            places = [_place(row, over_tokens) for row in rows if row.candidate == name and row.status == OUT]
            heights = [bottom + 0.015 + STRIP * (number + 0.5)] * len(places)
            cross = {"color": styles[name]["color"], "markersize": 7, "markeredgewidth": 2}
            axis.plot(places, heights, "x", transform=axis.get_xaxis_transform(), **cross)


def _place(row: Row, over_tokens: bool) -> int:
    return (row.num_tokens or 0) if over_tokens else row.batch_size


def _tick(row: Row, over_tokens: bool) -> str:
    if not over_tokens:
        return str(row.batch_size)
    return f"{row.num_tokens}\n{row.img_size} px" if row.img_size else str(row.num_tokens)


def _save(figure: Any, output: Path) -> None:
    temporary = output.with_name(f".tmp-{output.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(output)
