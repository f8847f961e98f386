"""Results of a study: seeds summarised to mean and spread; one stem in three files, JSON for programs, CSV and Markdown; and
measurements that are kept in a file each, with what was asked for, so that none is made twice or mixed up with another."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from taylorvit.config_loading import flatten
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file

MEASURES = ("val_top1", "val_loss", "test_top1", "test_loss")


def summarise(results: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for every combination of the labels `by`, in the order of their first results.

    A row holds the labels, `seeds` (results in it), `diverged` (those without an accuracy), and for each of MEASURES its mean
    and its sample standard deviation (`_sd`), None where there are none.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result.get(key) for key in by), []).append(result)
    rows = []
    for labels, members in groups.items():
        row: dict[str, Any] = dict(zip(by, labels))
        row |= {"seeds": len(members), "diverged": sum(member["status"] == "diverged" for member in members)}
        for key in MEASURES:
            values = [member[key] for member in members if member[key] is not None]
            row |= {key: statistics.fmean(values) if values else None, f"{key}_sd": _deviation(values)}
        rows.append(row)
    return rows


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row that validation prefers, None without any; one in which a seed diverged is not taken."""
    usable = [row for row in rows if row["val_top1"] is not None and not row["diverged"]]
    return max(usable, key=lambda row: row["val_top1"], default=None)


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error


def write_results(out: Path, stem: str, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], markdown: str) -> None:
    """Write `stem.json` (header and rows), `stem.csv` (rows) and `stem.md` into the folder, each replaced atomically."""
    replace_file(out / f"{stem}.json", json.dumps(finite({**header, "rows": rows}), indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(out / f"{stem}.csv", text.getvalue())
    replace_file(out / f"{stem}.md", markdown + "\n")


def store_measurement(file: Path, asked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (JSON types) with what was asked for, a mapping of mappings, and where they come from."""
    replace_file(file, json.dumps({**asked, "provenance": provenance(), "rows": rows}, indent=1) + "\n")


def read_measurement(file: Path, asked: Iterable[str]) -> dict[str, Any]:
    """Return what `store_measurement` wrote, `asked` naming the keys of what was asked for.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(content["rows"], list)
        assert content["rows"]
        assert all(isinstance(row, dict) for row in content["rows"])
        assert all(isinstance(content[key], dict) for key in (*asked, "provenance"))
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: it is not a measurement ({reason}); remove it to measure again") from error
    return content


def stored_rows(file: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file of `store_measurement`.

    Raises:
        ValueError: the file is damaged, or other things were asked for.
    """
    content = read_measurement(file, asked)
    before, now = (flatten({key: values[key] for key in asked}) for values in (content, asked))
    if different := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        shown = "; ".join(f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in different)
        raise ValueError(f"{file} was measured with other settings: {shown}; choose another --out, or remove it")
    return list(content["rows"])


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, rule: str = "---:") -> str:
    """Return a Markdown table; its columns but the first are numbers, aligned to the right, unless `rule` is "---"."""
    rules = ["---", *[rule] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rules, *lines])


left_table = partial(markdown_table, rule="---")  # all columns to the left


def mean_and_spread(row: Mapping[str, Any], key: str) -> str:
    """Return "91.2 ± 0.3", or a dash where nothing was measured."""
    mean, deviation = row[key], row[f"{key}_sd"]
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def finite(value: Any) -> Any:
    """Return the value with None for NaN and infinities, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
