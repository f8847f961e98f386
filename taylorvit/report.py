"""Results of evaluations for people and programs: a table, JSON, and one row a class as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylorvit.evaluation import Judgement

COLUMNS = (
    "checkpoint",
    "weights",
    "step",
    "attention",
    "form",
    "img_size",
    "precision",
    "images",
    "top1",
    "top5",
    "loss",
    "logged_top1",
)


def result_row(judgement: Judgement) -> dict[str, Any]:
    """Return one evaluation as plain JSON values; `logged_top1` is what training recorded for these weights, if it did."""
    source, config, evaluation = judgement.source, judgement.config, judgement.evaluation
    logged = source.metrics.get("ema_top1" if source.weights == "ema" else "top1")
    return {
        "checkpoint": source.path,
        "kind": source.kind,
        "weights": source.weights,
        "step": source.step,
        "model": config.model.name,
        "attention": config.model.attention,
        "form": "+".join(judgement.forms),
        "parameters": judgement.parameters,
        "dataset": config.data.dataset,
        "root": config.data.root,
        "split": config.data.val_split,
        "img_size": None if config.model.max_length else config.model.img_size,
        "crop_pct": config.data.crop_pct,
        "precision": config.train.mixed_precision,
        "compile": config.train.compile,
        "images": evaluation.samples,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "loss": None if math.isnan(evaluation.loss) else evaluation.loss,
        "logged_top1": logged,
        "reference_lines": judgement.reference_lines,
        "notes": judgement.notes,
        "seconds": round(judgement.seconds, 2),
        "device": judgement.device,
        "world_size": judgement.world_size,
        "torch": torch.__version__,
    }


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return the rows as an aligned text table; numbers are rounded, null is a dash."""
    cells = [list(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def per_class_rows(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each class its images, correct ones, top-1 in per cent, and the class it is most often taken for.

    Args:
        confusion: (K, K) counts, rows are labels and columns predictions.
        classes: K names.
    """
    rows = []
    for label, name in enumerate(classes):
        row = confusion[label].clone()
        images, correct = int(row.sum()), int(row[label])
        row[label] = 0
        confused = int(row.max())
        rows.append(
            {
                "class": name,
                "images": images,
                "correct": correct,
                "top1": 100 * correct / images if images else None,
                "most_confused_with": classes[int(row.argmax())] if confused else None,
                "confused_images": confused,
            }
        )
    return rows


def worst_classes(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the classes with the lowest top-1, worst first; classes without images are left out."""
    return sorted((row for row in rows if row["images"]), key=lambda row: row["top1"])[:count]


def save_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as a JSON list, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def save_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as CSV with a header, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
