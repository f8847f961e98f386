"""Does TaylorShift's initial temperature matter, and how should the temperature be trained?

    python tools/temperature_study.py --config configs/digits_pixels.yaml --temperature_init 1 2 5 10 --lr 1e-3 2e-3

Trains every combination of the temperature's initial value, its factor on the learning rate, its weight decay, the form and the
learning rate, with every seed; beside it the softmax twin over its own learning rates and weight decays. The checkpoint of each
run and the setting of each attention are chosen on the validation split; the test split (data.test_split) says what they are
worth. The table tells how many settings each attention was given, as more tries find better ones.

Writes temperature_study.json, .csv, .md and .png into --out, beside the runs; a study that was
stopped is continued by the same command, and a larger grid adds to it. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taylorvit.cli import need_matplotlib, positive_float, run_program
from taylorvit.ops import FORMS
from taylorvit.provenance import provenance
from taylorvit.studies.options import add_sweep_options, settings_of
from taylorvit.studies.results import best_row, markdown_table, mean_and_spread, summarise, write_results
from taylorvit.studies.sweep import Cell, run_cells

TAYLORSHIFT_LABELS = ("temperature_init", "temperature_lr_scale", "decay_temperature", "form", "lr")
SOFTMAX_LABELS = ("lr", "weight_decay")
VARIED = (
    "model.attention_options.form",
    "model.attention_options.temperature_init",
    "optim.temperature_lr_scale",
    "optim.decay_temperature",
    "optim.lr",
    "optim.weight_decay",
)
LABELS = ("attention", *dict.fromkeys([*TAYLORSHIFT_LABELS, *SOFTMAX_LABELS]))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sweep_options(parser, out="results/temperature")
    add = parser.add_argument
    add("--temperature_init", type=positive_float, nargs="+", default=[1.0, 2.0, 5.0, 10.0], metavar="T")
    add("--temperature_lr_scale", type=positive_float, nargs="+", default=[1.0], metavar="X", help="default: 1")
    add("--decay_temperature", choices=("false", "true"), nargs="+", default=["false"], help="default: false")
    add("--form", choices=FORMS, nargs="+", default=["auto"])
    add("--lr", type=positive_float, nargs="+", required=True, help="learning rates of TaylorShift")
    add("--softmax_lr", type=positive_float, nargs="*", default=[], metavar="LR", help="default: no softmax twin")
    add("--softmax_weight_decay", type=float, nargs="+", default=[0.05], metavar="WD", help="default: 0.05")
    return parser


def build_cells(options: argparse.Namespace) -> list[Cell]:
    """Return a cell for every combination and seed, TaylorShift first."""
    shared = settings_of(options, "taylorshift", varied=VARIED)
    cells = []
    for init, scale, decay, form, lr, seed in itertools.product(
        *(dict.fromkeys(getattr(options, key)) for key in TAYLORSHIFT_LABELS), dict.fromkeys(options.seeds)
    ):
        labels = dict(zip(TAYLORSHIFT_LABELS, (init, scale, decay, form, lr)))
        settings = [
            f"--model.attention_options.form={form}",
            f"--model.attention_options.temperature_init={init}",
            f"--optim.temperature_lr_scale={scale}",
            f"--optim.decay_temperature={decay}",
            f"--optim.lr={lr}",
            f"--seed={seed}",
        ]
        cells.append(Cell({"attention": "taylorshift", **labels, "seed": seed}, (*shared, *settings)))
    shared = settings_of(options, "softmax", varied=VARIED)
    for lr, weight_decay, seed in itertools.product(
        *map(dict.fromkeys, (options.softmax_lr, options.softmax_weight_decay, options.seeds))
    ):
        settings = [f"--optim.lr={lr}", f"--optim.weight_decay={weight_decay}", f"--seed={seed}"]
        cells.append(Cell({"attention": "softmax", "lr": lr, "weight_decay": weight_decay, "seed": seed}, (*shared, *settings)))
    return cells


def add_temperatures(rows: list[dict[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
    """Add to each row what its seeds' temperatures became: the mean, lowest and highest over layers and heads."""
    for row in rows:
        members = [result for result in results if all(result.get(key) == row[key] for key in LABELS)]
        values = [value for result in members for layer in result.get("temperatures") or [] for value in layer]
        row["temperature"] = statistics.fmean(values) if values else None
        row["temperature_low"], row["temperature_high"] = (min(values), max(values)) if values else (None, None)


def report(rows: list[dict[str, Any]]) -> str:
    """Return the tables: what validation chose of each attention, then everything."""
    lines = []
    for attention in dict.fromkeys(row["attention"] for row in rows):
        own = [row for row in rows if row["attention"] == attention]
        if best := best_row(own):
            setting = ", ".join(f"{key} {best[key]}" for key in LABELS[1:] if best[key] is not None)
            accuracies = [mean_and_spread(best, "val_top1"), mean_and_spread(best, "test_top1")]
            lines.append([attention, str(len(own)), setting, *accuracies])
    chosen = markdown_table(["attention", "settings tried", "best on validation", "validation top-1", "test top-1"], lines)
    names = ["attention", "T init", "x lr", "decay", "form", "lr", "weight decay"]
    header = [*names, "seeds", "diverged", "validation top-1", "test top-1", "test loss", "T after training"]
    notes = [
        f"`{provenance()['command']}`",
        "Mean and sample deviation of the seeds. Checkpoint and setting were chosen on the validation split.",
        "T init, x lr and decay: the temperature's initial value, its factor on the learning rate, its weight decay; T after "
        "training: mean (lowest to highest) over layers, heads and seeds.",
    ]
    everything = markdown_table(header, [_cells(row) for row in rows])
    return "\n\n".join([notes[0], notes[1], chosen, notes[2], everything])


def _cells(row: Mapping[str, Any]) -> list[str]:
    after = "-"
    if row["temperature"] is not None:
        after = f"{row['temperature']:.2f} ({row['temperature_low']:.2f} to {row['temperature_high']:.2f})"
    labels = ["" if row[key] is None else f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in LABELS]
    figures = [mean_and_spread(row, key) for key in ("val_top1", "test_top1", "test_loss")]
    return [*labels, str(row["seeds"]), str(row["diverged"]), *figures, after]


def draw(rows: list[dict[str, Any]], output: Path) -> bool:
    """Draw accuracy and final temperature over the initial one, a line for every other setting; False where all diverged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    taylorshift = [row for row in rows if row["attention"] == "taylorshift" and row["val_top1"] is not None]
    if not taylorshift:
        return False
    figure, (accuracy, final) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    key = "val_top1" if any(row["test_top1"] is None for row in taylorshift) else "test_top1"
    for label, line in _lines(taylorshift).items():
        inits, style = [row["temperature_init"] for row in line], {"label": label, "marker": "o", "capsize": 3}
        accuracy.errorbar(inits, [row[key] for row in line], [row[f"{key}_sd"] or 0 for row in line], **style)
        means = [row["temperature"] for row in line]
        below = [row["temperature"] - row["temperature_low"] for row in line]
        above = [row["temperature_high"] - row["temperature"] for row in line]
        final.errorbar(inits, means, [below, above], **style)
    if softmax := best_row([row for row in rows if row["attention"] == "softmax"]):
        deviation = softmax[f"{key}_sd"] or 0
        accuracy.axhspan(softmax[key] - deviation, softmax[key] + deviation, color="gray", alpha=0.25)
        accuracy.axhline(softmax[key], color="black", linestyle="--", label="softmax, its best setting on validation")
    ticks = sorted({row["temperature_init"] for row in taylorshift})
    final.plot(ticks, ticks, color="gray", linestyle=":", label="unchanged")
    for axis in (accuracy, final):
        axis.set(xlabel="initial temperature", xscale="log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    accuracy.set(ylabel=f"{'test' if key == 'test_top1' else 'validation'} top-1 [%], mean and deviation of the seeds")
    final.set(ylabel="temperature after training: mean and range of all heads")
    figure.savefig(output, dpi=100)
    plt.close(figure)
    return True


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows by all settings but the initial temperature, named by those that differ, each in order of the latter."""
    others = TAYLORSHIFT_LABELS[1:]
    varied = [name for name in others if len({row[name] for row in rows}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["temperature_init"]):
        label = ", ".join(f"{name.replace('temperature_', 'T ')} {row[name]}" for name in varied)
        lines.setdefault(label or "TaylorShift", []).append(row)
    return lines


def main() -> int:
    """Command line -> trainings -> table and picture."""
    options = build_parser().parse_args()
    need_matplotlib()
    if not all(math.isfinite(value) and value >= 0 for value in options.softmax_weight_decay):
        raise ValueError(f"--softmax_weight_decay {options.softmax_weight_decay}: expected numbers, 0 or more")
    results = run_cells(
        build_cells(options), configs=options.config, out=options.out, launcher=options.launcher, jobs=options.jobs
    )
    rows = summarise(results, LABELS)
    add_temperatures(rows, results)
    markdown = report(rows)
    header = {"provenance": provenance(), "base": [str(path) for path in options.config], "set": options.set}
    write_results(options.out, "temperature_study", header, rows, markdown)
    print(f"\n{markdown}\n")
    if draw(rows, options.out / "temperature_study.png"):
        print(options.out / "temperature_study.png")
    return 0


if __name__ == "__main__":
    run_program(main)
