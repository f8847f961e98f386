"""Results of the numerical study as files and tables: rows by study in, JSON, CSV and Markdown out."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taylorvit.benchmark.check import NAMES
from taylorvit.run_folder import replace_file
from taylorvit.studies.numerics import ErrorRow
from taylorvit.studies.numerics_sizes import ClaimRow
from taylorvit.studies.results import left_table

TENSORS = {"output": NAMES[:1], "gradients of q, k, v": NAMES[1:4], "gradient of temperature": NAMES[4:]}
READING_NAMES = {"norm": "mean norm of a row", "rms": "rms entry"}
Results = dict[str, list[Any]]


def write_files(results: Results, header: Mapping[str, Any], folder: Path) -> None:
    """Write numerics.json (header and all rows), numerics.csv (the errors) and numerics.md (all tables) into the folder."""
    rows = {study: [dataclasses.asdict(row) for row in rows] for study, rows in results.items()}
    content = {**header, **rows}
    replace_file(folder / "numerics.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(ErrorRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _short(value) for key, value in row.items()} for row in rows["errors"])
    replace_file(folder / "numerics.csv", table.getvalue())
    replace_file(folder / "numerics.md", markdown(results))


def _short(value: Any) -> Any:
    """Return a float with four digits; the JSON file has them all."""
    return f"{value:.4g}" if isinstance(value, float) else value


def markdown(results: Results) -> str:
    """Return all tables."""
    errors = results["errors"]
    leaving = [row for row in results["fp16_range"] if row.overflows or row.subnormal or row.vanishes]
    parts = [
        "## Errors against fp64",
        "Relative rms / largest error over largest entry; the worst of all N, d and temperatures. "
        "`rounding`: rms of the exact result rounded to the dtype.",
        error_table(errors, ("dtype", "kind", "tensor")),
        f"Relative rms, {errors[0].kind} inputs: output; the worst of the gradients of q, k, v; gradient of the temperature.",
        _grid_table([row for row in errors if row.kind == errors[0].kind]),
        "## Sizes of intermediates",
        "Measured over claimed size, for N from N0(d) on; exponents of N and d, fitted.",
        _claim_table(results["claims"]),
        "N from which on fp16 cannot hold an intermediate: its largest entry exceeds 65504, its rms entry falls below 2^-14 "
        "and 2^-25. Those that stay within the range are left out.",
        _field_table(leaving),
        "## The ones column of the paper's way in fp16",
        _field_table(results["ones_column"]),
        "## Without normalisation",
        _field_table(results["normalisation"]),
    ]
    return "\n\n".join(parts) + "\n"


def _number(value: Any) -> str:
    """Return a cell; None is a dash."""
    if isinstance(value, float):
        if 1e4 <= abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _field_table(rows: list[Any]) -> str:
    """Return rows with their fields as columns."""
    names = [field.name for field in dataclasses.fields(rows[0])] if rows else ["none"]
    return left_table(names, [[_number(getattr(row, name)) for name in names] for row in rows])


def group(rows: Iterable[ErrorRow], fields: Sequence[str]) -> dict[tuple[Any, ...], list[ErrorRow]]:
    """Return the rows by the values of these fields."""
    groups: dict[tuple[Any, ...], list[ErrorRow]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
    return groups


def _worst(rows: Iterable[ErrorRow], measure: Callable[[ErrorRow], float | None]) -> str:
    """Return the largest error, or in how many cases there is none: a case that is not finite is never left out."""
    done = [row for row in rows if not row.note]
    broken = [row for row in done if row.num_nan + row.num_inf]
    if broken:
        return f"**NaN/Inf in {len(broken)} of {len(done)}**"
    return _number(max(measure(row) or 0.0 for row in done)) if done else "skipped"


def error_table(rows: list[ErrorRow], fields: Sequence[str]) -> str:
    """Return the worst error of each candidate by these fields."""
    names = list(dict.fromkeys(row.candidate for row in rows))
    lines = []
    for key, members in group(rows, fields).items():
        cells = []
        for name in names:
            own = [row for row in members if row.candidate == name]
            rms, largest = _worst(own, lambda row: row.rms), _worst(own, lambda row: row.largest)
            cells.append(rms if rms == largest else f"{rms} / {largest}")
        lines.append([*map(str, key), *cells, _number(max((row.rounding or 0.0 for row in members), default=None))])
    return left_table([*fields, *names, "rounding"], lines)


def _grid_table(rows: list[ErrorRow]) -> str:
    """Return the rms errors of output, gradients and temperature's gradient, a line for every case."""
    names = list(dict.fromkeys(row.candidate for row in rows))
    lines = []
    for key, members in group(rows, ("dtype", "head_dim", "num_tokens", "temperature")).items():
        cells = []
        for name in names:
            own = [row for row in members if row.candidate == name]
            parts = [[row for row in own if row.tensor in tensors] for tensors in TENSORS.values()]
            cells.append("; ".join(_worst(part, lambda row: row.rms) for part in parts))
        lines.append([*map(str, key), *cells])
    return left_table(["dtype", "d", "N", "temperature", *names], lines)


def _claim_table(rows: list[ClaimRow]) -> str:
    """Return the claims with their readings."""
    header = ["quantity", "claimed", "reading of size", "measured / claimed", "exponents measured", "exponents claimed"]
    lines = []
    for row in rows:
        reading = f"{READING_NAMES[row.measure]}, values {row.values}"
        fits = [f"N^{fit[0]:.2f} d^{fit[1]:.2f}" if fit else "-" for fit in (row.exponents, row.claimed_exponents)]
        lines.append([row.quantity, row.claim, reading, f"{row.low:.3f} to {row.high:.3f}", *fits])
    return left_table(header, lines)
