"""Study the Taylor order: how near orders 1 to 6 come to softmax, what they cost, and how they train.

    python tools/order_study.py --part approximation cost
    python tools/order_study.py --part training --config configs/quickstart.yaml --temperature_init 1 10

`approximation` compares the weights of each order with softmax of the same logits, temperature times cosine, for random unit
vectors (taylorvit/studies/orders.py); no model is involved. `cost` counts features, and times both forms and softmax on one
head in interleaved rounds, each form checked against fp64 first. `training` trains the configured model with attention
taylor_order, and its twins with taylorshift and softmax, for every order, initial temperature and seed; the same command
continues a study that was stopped, and a run whose loss is not finite counts as diverged.

Writes order_study_PART.json, .csv, .md and .png into --out, and order_study_odd.png: how odd orders fail. An earlier run's are
replaced. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.cli import need_matplotlib, positive_float, positive_int, run_program, thread_count
from taylorvit.ops.orders import ORDERS
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file
from taylorvit.studies import order_report
from taylorvit.studies.options import add_sweep_options, settings_of
from taylorvit.studies.orders import (
    KEYS,
    TRAINED,
    Approximation,
    Timing,
    approximate,
    feature_table,
    summarise,
    time_forms,
    training_cells,
)
from taylorvit.studies.results import finite, make_folder
from taylorvit.studies.sweep import Cell, plan_cells, run_cells

VARIED = ("model.attention_options.order", "model.attention_options.temperature_init")
MAX_TEMPERATURE = 700.0  # beyond it exp leaves the range of fp64
TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 14.0, 20.0)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; what is None is each part's own choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sweep_options(parser, out="results/order_study", config_required=False)
    add = parser.add_argument
    add("--part", dest="parts", choices=PARTS, nargs="+", default=["approximation", "cost"])
    add("--order", type=int, choices=ORDERS, nargs="+", help="default: all; 2 4 to time; 1 2 3 4 to train")
    add("--head_dim", type=positive_int, nargs="+", metavar="D", help="default: 8 16 32 64; 8 16 to time")
    add("--num_tokens", type=positive_int, nargs="+", metavar="N", help="default: 256; 256 1024 4096 to time")
    add("--temperature", type=positive_float, nargs="+", default=TEMPERATURES, metavar="T", help="of the approximation")
    add("--seconds", type=positive_float, default=1.0, help="time for each candidate in each case (default: %(default)s)")
    add("--temperature_init", type=positive_float, nargs="+", default=[1.0], metavar="T", help="of the training (default: 1)")
    add("--threads", type=thread_count, help="of PyTorch, not of the trainings (default: its own choice)")
    return parser


def study_approximation(options: argparse.Namespace) -> None:
    """Compare every order with softmax, and order 0 with it."""
    rows: list[Approximation] = []
    orders = [0, *sorted(set(options.order or ORDERS))]
    for keys, head_dim, num_tokens in itertools.product(
        KEYS, options.head_dim or (8, 16, 32, 64), options.num_tokens or (256,)
    ):
        print(f"approximation: {keys} keys, D = {head_dim}, N = {num_tokens}", flush=True)
        rows += approximate(keys, head_dim, num_tokens, sorted(set(options.temperature)), orders)
    files = Files(options, "approximation")
    files.write([dataclasses.asdict(row) for row in rows], order_report.approximation_tables(rows))
    files.draw(order_report.draw_approximation, rows)
    order_report.draw_odd(rows, options.out / "order_study_odd.png")


def study_cost(options: argparse.Namespace) -> None:
    """Count features and operations, and time what is asked for."""
    features = feature_table(options.head_dim or (4, 8, 16, 32, 64, 128), options.order or ORDERS)
    timings: list[Timing] = []
    orders = sorted(set(options.order or (2, 4)))
    for head_dim, num_tokens in itertools.product(options.head_dim or (8, 16), options.num_tokens or (256, 1024, 4096)):
        print(f"cost: D = {head_dim}, N = {num_tokens}", flush=True)
        timings += time_forms(head_dim, num_tokens, orders, seconds=options.seconds)
    files = Files(options, "cost")
    files.write([dataclasses.asdict(row) for row in timings], order_report.cost_tables(features, timings), features=features)
    files.draw(order_report.draw_cost, features, timings)


def study_training(options: argparse.Namespace) -> None:
    """Train what has not been trained yet, and compare."""
    results = run_cells(
        cells_of(options), configs=options.config, out=options.out, launcher=options.launcher, jobs=options.jobs
    )
    rows = summarise(results)
    files = Files(options, "training")
    cells = [{key: value for key, value in result.items() if key != "config"} for result in results]
    files.write(rows, order_report.training_table(rows), cells=cells)
    files.draw(order_report.draw_training, rows)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "approximation": study_approximation,
    "cost": study_cost,
    "training": study_training,
}


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Return the trainings that are asked for."""
    orders, temperatures, seeds = options.order or (1, 2, 3, 4), options.temperature_init, options.seeds
    grid = (list(dict.fromkeys(values)) for values in (orders, temperatures, seeds))
    return training_cells(*grid, shared={name: settings_of(options, name, varied=VARIED) for name in TRAINED})


class Files:
    """One part's files in --out, with where the results come from."""

    def __init__(self, options: argparse.Namespace, part: str) -> None:
        self.stem = options.out / f"order_study_{part}"
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        settings["config"] = [str(path) for path in options.config or []]
        self.header = {"provenance": provenance(), "settings": settings}

    def write(self, rows: Sequence[dict[str, Any]], markdown: str, **more: Any) -> None:
        """Write JSON, CSV and Markdown, and print the last."""
        content = {**self.header, "rows": rows, **more}
        replace_file(self.stem.with_suffix(".json"), json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.stem.with_suffix(".csv"), table.getvalue())
        command = self.header["provenance"]["command"]
        replace_file(self.stem.with_suffix(".md"), f"`{command}`\n\n{markdown}\n\n![]({self.stem.name}.png)\n")
        print(f"\n{markdown}\n", flush=True)

    def draw(self, draw: Callable[..., None], *rows: Any) -> None:
        """Draw the picture."""
        draw(*rows, self.stem.with_suffix(".png"))
        print(self.stem.with_suffix(".png"), flush=True)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what argparse lets through, for an unwritable folder, and for a training that cannot start."""
    need_matplotlib()
    if max(options.temperature) > MAX_TEMPERATURE:
        raise ValueError(f"--temperature {max(options.temperature):g}: at most {MAX_TEMPERATURE:g} is possible")
    if "training" in options.parts and not options.config:
        raise ValueError("--part training needs --config: which model is to be trained?")
    make_folder(options.out)
    if "training" in options.parts:
        plan_cells(cells_of(options), configs=options.config, out=options.out)


def main() -> int:
    """Command line -> parts -> files and tables."""
    options = build_parser().parse_args()
    check_options(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    for part in dict.fromkeys(options.parts):
        PARTS[part](options)
    return 0


if __name__ == "__main__":
    run_program(main)
