"""The head-count ablation as a page of tables and a picture of three panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taylorvit.benchmark.memory import RESOLUTION
from taylorvit.provenance import provenance
from taylorvit.studies.head_count import MEASURED, Measuring
from taylorvit.studies.results import markdown_table, mean_and_spread

MIB = 2**20


def report(
    accuracies: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    theories: Sequence[Mapping[str, Any]],
    measuring: Measuring,
) -> str:
    """Return the page: accuracy, speed and memory as in the paper, and theory beside measurement.

    Args:
        accuracies: rows of `results.summarise` by attention and num_heads; may be empty.
        measured: rows of `measure_head_counts`.
        theories: rows of `theory`, one a head count in the same order.
        measuring: how the latter were measured.
    """
    settings, depth = measuring.settings, theories[0]["depth"]
    how = f"{settings.device}, precision {settings.precision}"
    if settings.device == "cpu":
        how += f", {settings.threads} thread(s)"
    accuracy = [
        "Accuracy: mean and sample deviation of the seeds; the checkpoint was chosen on the validation split.",
        _accuracy(accuracies),
    ]
    parts = [
        f"`{provenance()['command']}`",
        *(accuracy if accuracies else []),
        f"Inference of whole models ({how}), all forms with the same weights. MiB: what a forward pass needs at its peak,\n"
        f"weights included. Best batch: its size doubles, up to {measuring.most}, while that gives 2 % more samples a second.",
        _costs(measured, measuring.batch_size),
        f"Theory: MFLOP of the attention cores of all {depth} layers for one sample, entries of one layer; packed: each\n"
        "product x_a x_b once. The last columns are ratios of speeds, above 1 where the efficient form is ahead.",
        _theory(measured, theories),
    ]
    return "\n\n".join(parts)


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["heads", "attention", "seeds", "diverged", "validation top-1 [%]", "test top-1 [%]", "test loss"]
    return markdown_table(
        header,
        [
            [
                str(row["num_heads"]),
                row["attention"],
                str(row["seeds"]),
                str(row["diverged"]),
                *(mean_and_spread(row, key) for key in ("val_top1", "test_top1", "test_loss")),
            ]
            for row in rows
        ],
    )


def _costs(rows: Sequence[Mapping[str, Any]], batch_size: int) -> str:
    header = ["heads", "d", "form", f"samples/s at {batch_size}", "x softmax", f"MiB at {batch_size}, with weights"]
    header += ["best batch", "samples/s there", "MiB there"]
    lines = []
    for row in rows:
        if row["status"] != "ok":
            speed = [row["status"], "-"]
        else:
            speed = [f"{row['samples_per_second']:.4g}", "-" if row["speedup"] is None else f"{row['speedup']:.2f}"]
        best = ["-", "-"]
        if row["best_batch_size"]:
            best = [str(row["best_batch_size"]), f"{row['best_samples_per_second']:.4g}"]
        stated, there = (_mebibytes(row, key) for key in ("peak_bytes", "best_peak_bytes"))
        lines.append([str(row["num_heads"]), str(row["head_dim"]), row["run"], *speed, stated, *best, there])
    return markdown_table(header, lines)


def _mebibytes(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return "-"
    sign, held = ("", row[key]) if row[key] >= RESOLUTION else ("< ", RESOLUTION)
    return f"{sign}{(held + row['weight_bytes']) / MIB:.4g}"


def _theory(rows: Sequence[Mapping[str, Any]], theories: Sequence[Mapping[str, Any]]) -> str:
    """Set the ratio of the forms in theory beside that measured: above 1 efficient is ahead."""
    header = ["heads", "d", "N", "N0", "N1", "N0 packed", "N1 packed", "MFLOP direct", "MFLOP efficient", "MFLOP packed"]
    header += ["entries direct", "entries efficient", "entries packed"]
    header += ["efficient/direct, theory", "packed/direct, theory", "efficient/direct, whole model at its best batch"]
    lines = []
    for found, direct, efficient in zip(theories, _of(rows, "direct"), _of(rows, "efficient")):
        operations = [found[key] for key in ("ops_direct", "ops_efficient", "ops_efficient_packed")]
        rates = [row["best_samples_per_second"] for row in (efficient, direct)]
        lines.append(
            [
                *(str(found[key]) for key in ("num_heads", "head_dim", "num_tokens")),
                *(f"{found[key]:,.0f}" for key in ("n0", "n1", "n0_packed", "n1_packed")),
                *(f"{value / 1e6:.4g}" for value in operations),
                *(f"{found[key]:,}" for key in ("entries_direct", "entries_efficient", "entries_efficient_packed")),
                *(f"{operations[0] / value:.2f}" for value in operations[1:]),
                f"{rates[0] / rates[1]:.2f}" if all(rates) else "-",
            ]
        )
    return markdown_table(header, lines)


def _of(rows: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["run"] == run]


def draw(accuracies: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], batch_size: int, out: Path) -> None:
    """Draw accuracy, throughput and peak memory over the number of heads; without accuracies the first panel is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    panels = 3 if accuracies else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 4.6), layout="constrained")
    if accuracies:
        _draw_accuracy(axes[0], accuracies)
    _draw_costs(axes[-2], axes[-1], measured, batch_size)
    counts = {row["num_heads"]: row["head_dim"] for row in measured}
    for axis in axes:
        axis.set(xscale="log", xlabel="heads H (head dimension d)")
        axis.set_xticks(list(counts), [f"{heads}\n({dim})" for heads, dim in counts.items()])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _draw_accuracy(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    rows = [row for row in rows if row["val_top1"] is not None]  # all seeds of the others diverged
    key = "test_top1" if all(row["test_top1"] is not None for row in rows) else "val_top1"
    for attention, marker in zip(dict.fromkeys(row["attention"] for row in rows), "os^v"):
        own = [row for row in rows if row["attention"] == attention and row[key] is not None]
        heads, means = [row["num_heads"] for row in own], [row[key] for row in own]
        axis.errorbar(heads, means, [row[f"{key}_sd"] or 0 for row in own], label=attention, marker=marker, capsize=3)
    axis.set(title="accuracy", ylabel=f"{key.partition('_')[0]} top-1 [%], mean and deviation of the seeds")


def _draw_costs(speed: Any, memory: Any, rows: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for run, color in zip(MEASURED, ("tab:blue", "tab:orange", "tab:green")):
        own = _of(rows, run)
        heads = [row["num_heads"] for row in own]
        label = "softmax, fused" if run == "softmax" else f"TaylorShift, {run}"
        speed.plot(
            heads, [row["best_samples_per_second"] for row in own], color=color, marker="o", label=f"{label}: best batch"
        )
        stated = [row["samples_per_second"] for row in own]
        speed.plot(heads, stated, color=color, marker="x", linestyle=":", label=f"{label}: batch {batch_size}")
        held = [None if row["peak_bytes"] is None else (row["peak_bytes"] + row["weight_bytes"]) / MIB for row in own]
        memory.plot(heads, held, color=color, marker="o", label=label)
    speed.set(title="throughput, inference", ylabel="samples a second", yscale="log")
    speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.yaxis.set_minor_locator(NullLocator())
    memory.set(title=f"peak memory, inference, batch {batch_size}", ylabel="MiB, weights included", ylim=(0, None))
