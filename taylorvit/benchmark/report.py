"""Rows of measurements as files, as a table and as a picture; and where the efficient form overtakes the direct one in them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..complexity import Packing, flops_crossover, memory_crossover
from .measure import Row
from .memory import RESOLUTION

FIELDS = [field.name for field in dataclasses.fields(Row)]
QUANTITIES = {"seconds": "time of one call [s]", "peak_bytes": "peak extra memory of one call [bytes]"}
GPU_COLUMNS = ["CUDA graph", "x sdpa", "TFLOP/s", "of the limit"]
PACKINGS: dict[Packing, str] = {"none": "paper", "circulant": "circulant packing"}


class ResultFiles:
    """`attention.json`, `attention.csv` and `attention.png` in one folder, which is made; an earlier run's are replaced.

    Rows are written as they come, so that a run that is interrupted keeps what it measured.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.json, self.csv, self.picture = (folder / f"attention.{ending}" for ending in ("json", "csv", "png"))
        self.header = header
        self.rows: list[Row] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.picture.unlink(missing_ok=True)
            with self.csv.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(FIELDS)
            self._write_json()
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to both files."""
        rows = list(rows)
        self.rows += rows
        with self.csv.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(dataclasses.asdict(row) for row in rows)
        self._write_json()

    def _write_json(self) -> None:
        content = {**self.header, "rows": [dataclasses.asdict(row) for row in self.rows], "crossovers": crossovers(self.rows)}
        temporary = self.json.with_name(f".tmp-{self.json.name}-{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(self.json)


def crossovers(rows: list[Row]) -> list[dict[str, Any]]:
    """Return where efficient overtakes direct of the same kind, in time and in memory, between two measured token counts.

    `num_tokens` is interpolated on the logarithms; of several crossings it is the last. Pairs that do not cross are left out.
    """
    found = []
    for quantity in QUANTITIES:
        curves = _curves(rows, quantity)
        for (head_dim, pass_name, name), direct in curves.items():
            twin = name.replace("direct", "efficient")
            efficient = curves.get((head_dim, pass_name, twin), {})
            if twin != name and (crossing := _last_crossing(direct, efficient)):
                found.append(
                    {
                        "quantity": quantity,
                        "head_dim": head_dim,
                        "pass_name": pass_name,
                        "direct": name,
                        "efficient": twin,
                        "num_tokens": crossing,
                    }
                )
    return found


def _curves(rows: list[Row], quantity: str) -> dict[tuple[int, str, str], dict[int, float]]:
    """Return N -> value by head dimension, pass and candidate, N ascending; memory below what can be told apart is left out."""
    least = RESOLUTION if quantity == "peak_bytes" else 0
    curves: dict[tuple[int, str, str], dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row.num_tokens):
        value = getattr(row, quantity)
        if value is not None and value > least:
            curves.setdefault((row.head_dim, row.pass_name, row.candidate), {})[row.num_tokens] = value
    return curves


def _last_crossing(direct: dict[int, float], efficient: dict[int, float]) -> float | None:
    common = [N for N in direct if N in efficient]
    gains = [math.log(direct[N] / efficient[N]) for N in common]  # above 0 where efficient is ahead
    for index in range(len(common) - 1, 0, -1):
        before, after = gains[index - 1], gains[index]
        if before <= 0 < after:
            low, high = math.log(common[index - 1]), math.log(common[index])
            return math.exp(low + (high - low) * -before / (after - before))
    return None


def markdown_table(rows: list[Row]) -> str:
    """Return one case's rows as a Markdown table; the ratio to sdpa is above 1 where the candidate is faster.

    Rows of a GPU have columns more: the device's own time, its ratio to sdpa's, and by it the rate of the matrix products and
    the part of the time that no attention can do without (`limits`).
    """
    on_gpu = any(row.device == "cuda" for row in rows)
    header = ["candidate", "time", "10 - 90 %", "x sdpa", "10 - 90 %", "GFLOP/s", "peak memory", "error"]
    lines = [header + (GPU_COLUMNS if on_gpu else [])]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in rows:
        cells = _cells(row) + (_gpu_cells(row) if on_gpu else [])
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    notes = [f"{row.candidate}: {row.note}" for row in rows if row.status == "ok" and row.note]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), *notes])


def _cells(row: Row) -> list[str]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.status != "ok":
        verdict = row.status.upper() if row.is_fault else row.status
        return [row.candidate, f"{verdict}: {row.note}" if row.note else verdict, "", "", "", "", "", error]
    return [
        row.candidate,
        _time(row.seconds),
        f"{_time(row.seconds_low)} - {_time(row.seconds_high)}",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        "" if row.speedup is None else f"{row.speedup_low:.2f} - {row.speedup_high:.2f}",
        "" if row.gflops is None else f"{row.gflops:.3g}",
        _mebibytes(row.peak_bytes),
        error,
    ]


def _gpu_cells(row: Row) -> list[str]:
    if row.seconds is None:
        return [""] * len(GPU_COLUMNS)
    return [
        _time(row.graph_seconds),
        "" if row.graph_speedup is None else f"{row.graph_speedup:.2f}",
        "" if row.tflops is None else f"{row.tflops:.3g}",
        "not measured" if row.limit_share is None else f"{row.limit_share:.0%}",
    ]


def _mebibytes(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:.4g} MiB" if size >= RESOLUTION else f"< {RESOLUTION / 2**20} MiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def draw(rows: list[Row], output: Path) -> bool:
    """Draw every measured quantity over N, log-log, a column of panels for each head dimension and pass; False without any.

    A cross at the upper edge is a candidate that ran out of memory or was skipped for its need of it. Dotted lines: where the
    operations (time) or stored numbers (memory) of both forms are equal in theory; dashed ones: where the curves cross.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quantities = [quantity for quantity in QUANTITIES if _curves(rows, quantity)]
    if not quantities:
        return False
    columns = sorted({(row.head_dim, row.pass_name) for row in rows})
    size = (5.5 * len(columns), 4.5 * len(quantities))
    figure, axes = plt.subplots(len(quantities), len(columns), figsize=size, layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row.candidate for row in rows))
    colors = {name: plt.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    for line, quantity in zip(axes, quantities):
        for axis, (head_dim, pass_name) in zip(line, columns):
            shown = [row for row in rows if (row.head_dim, row.pass_name) == (head_dim, pass_name)]
            _draw_panel(axis, shown, quantity, colors)
            axis.set(title=f"D = {head_dim}, {pass_name}", xlabel="tokens N", ylabel=QUANTITIES[quantity])
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(output, dpi=100)
    plt.close(figure)
    return True


def _draw_panel(axis: Any, rows: list[Row], quantity: str, colors: dict[str, Any]) -> None:
    axis.set(xscale="log", yscale="log")
    measured = sorted({row.num_tokens for row in rows})
    axis.set_xticks(measured, map(str, measured))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    for (_, _, name), curve in _curves(rows, quantity).items():
        axis.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=name, color=colors[name])
    for row in rows:
        if row.status in ("out of memory", "skipped"):
            axis.plot(row.num_tokens, 0.97, marker="x", color=colors[row.candidate], transform=axis.get_xaxis_transform())
    theory = flops_crossover if quantity == "seconds" else memory_crossover
    symbol = "N0" if quantity == "seconds" else "N1"
    low, high = min(row.num_tokens for row in rows) / 1.5, max(row.num_tokens for row in rows) * 1.5
    for (packing, label), shade in zip(PACKINGS.items(), ("black", "gray")):
        where = theory(rows[0].head_dim, packing)
        if low < where < high:
            axis.axvline(where, color=shade, linestyle=":", label=f"{symbol} in theory, {label}")
    for crossing in crossovers(rows):
        if crossing["quantity"] == quantity:
            color = colors[crossing["efficient"]]
            axis.axvline(crossing["num_tokens"], color=color, linestyle="--", label=f"{crossing['efficient']} overtakes direct")
