"""The head-count ablation: what a width split into more, narrower heads does to accuracy, speed and memory of both forms.

More heads of d = C / H make the efficient form cheaper (N d^3 a head) and the direct one dearer (N^2 a head): section 4 of the
TaylorShift paper (arXiv:2403.02920). Here are the measurements, the theory beside them, the tables and the figure.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taylorvit.complexity import (
    Form,
    entries_mhsa,
    flops_crossover,
    memory_crossover,
    ops_mhsa,
)
from taylorvit.config import ModelConfig
from taylorvit.config_loading import config_to_dict
from taylorvit.models import attention_forms, build_model
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file
from taylorvit.studies.model_candidates import Candidate, inspect_model
from taylorvit.studies.model_cost import best_batch_size, enter_memory, measure_speed, verify
from taylorvit.studies.model_passes import Settings
from taylorvit.studies.results import markdown_table, mean_and_spread

FORMS: tuple[Form, ...] = ("direct", "efficient")
MEASURED = {"direct": "taylorshift_direct", "efficient": "taylorshift_efficient", "softmax": "softmax"}
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How the models are measured: at one stated batch size, and at the best one, found by doubling up to `most`."""

    settings: Settings
    batch_size: int = 16
    most: int = 256

    def as_dict(self) -> dict[str, Any]:
        """Return what decides whether a stored measurement is the one that is asked for, as JSON types."""
        return dataclasses.asdict(self)


def measure_head_counts(
    model: ModelConfig, head_counts: Sequence[int], measuring: Measuring, folder: Path
) -> list[dict[str, Any]]:
    """Measure every head count that has no file in the folder yet, and return the rows of all.

    A row is one way of running the attention (`run`: "direct", "efficient" or "softmax") at one head count: a `model_cost.Row`
    with `best_batch_size`, `best_samples_per_second` and `best_reason` added. Inference, as in the paper.

    Raises:
        ValueError: a file holds another model or other settings.
        RuntimeError: a form computes something else than the reference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for num_heads in head_counts:
        file = folder / f"num_heads-{num_heads}.json"
        config = dataclasses.replace(model, num_heads=num_heads)
        asked = {"model": config_to_dict(config), "measuring": measuring.as_dict()}
        if not file.exists():
            found = {**asked, "provenance": provenance(), "rows": _measure(config, measuring)}
            replace_file(file, json.dumps(found, indent=1) + "\n")
        content = json.loads(file.read_text(encoding="utf-8"))
        if any(content[key] != json.loads(json.dumps(value)) for key, value in asked.items()):
            raise ValueError(f"{file} was measured with another model or other settings; choose another --out, or remove it")
        rows += content["rows"]
    return rows


def _measure(config: ModelConfig, measuring: Measuring) -> list[dict[str, Any]]:
    settings = measuring.settings
    candidates = [Candidate(run, config, attention) for run, attention in MEASURED.items()]
    verdicts = {candidate.name: verify(candidate, settings) for candidate in candidates}
    measured = measure_speed(candidates, measuring.batch_size, training=False, settings=settings, verdicts=verdicts)
    rows = []
    for candidate, row in zip(candidates, measured):
        if row.status == "wrong":
            raise RuntimeError(f"{row.candidate} with {row.num_heads} heads: {row.note}")
        enter_memory(row, candidate, settings)
        best = best_batch_size(candidate, training=False, settings=settings, most=measuring.most)
        print(
            f"{row.num_heads} heads, {row.candidate}: {row.status}, {row.samples_per_second or 0:.4g} samples/s at batch "
            f"{row.batch_size}, {best.samples_per_second or 0:.4g} at {best.batch_size} ({best.reason})",
            flush=True,
        )
        rows.append(
            dataclasses.asdict(row)
            | {
                "run": candidate.name,
                "best_batch_size": best.batch_size,
                "best_samples_per_second": best.samples_per_second,
                "best_reason": best.reason,
            }
        )
    return rows


def theory(model: ModelConfig, num_heads: int) -> dict[str, Any]:
    """Return what the paper's formulas say of one head count: N0, N1, and operations and entries of both forms.

    Operations are of the attention cores of all layers for one sample, entries the numbers one layer holds at once; `_packed`
    counts each product x_a x_b once.
    """
    config = dataclasses.replace(model, num_heads=num_heads)
    structure = inspect_model(Candidate("theory", config, "taylorshift"), training=False, device="cpu")
    embed_dim, num_tokens, depth = (
        structure.embed_dim,
        structure.num_tokens,
        len(attention_forms(build_model(config, device="meta"))),
    )
    assert embed_dim is not None
    assert num_tokens is not None
    head_dim = embed_dim // num_heads
    found: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "num_tokens": num_tokens}
    for form in FORMS:
        found[f"ops_{form}"] = depth * ops_mhsa(form, num_tokens, embed_dim, num_heads)
        found[f"entries_{form}"] = entries_mhsa(form, num_tokens, embed_dim, num_heads)
    found["ops_efficient_packed"] = depth * ops_mhsa("efficient", num_tokens, embed_dim, num_heads, "symmetric")
    found["entries_efficient_packed"] = entries_mhsa("efficient", num_tokens, embed_dim, num_heads, "symmetric")
    for name, crossover in (("n0", flops_crossover), ("n1", memory_crossover)):
        found |= {name: crossover(head_dim), f"{name}_packed": crossover(head_dim, "symmetric")}
    return found


def report(
    accuracies: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    theories: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> str:
    """Return the Markdown tables: accuracy, speed and memory as in the paper, and theory beside measurement.

    Args:
        accuracies: rows of `results.summarise` by attention and num_heads; may be empty.
        measured: rows of `measure_head_counts`.
        theories: rows of `theory`, one a head count in the same order.
        batch_size: the stated one.
    """
    tables = _accuracy(accuracies), _costs(measured, batch_size), _theory(measured, theories)
    return "\n\n".join(table for table in tables if table)


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
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
    header += ["best batch", "samples/s there"]
    lines = []
    for row in rows:
        memory = None if row["peak_bytes"] is None else (row["peak_bytes"] + row["weight_bytes"]) / MIB
        if row["status"] != "ok":
            speed = [row["status"], "-"]
        else:
            speed = [f"{row['samples_per_second']:.4g}", "-" if row["speedup"] is None else f"{row['speedup']:.2f}"]
        best = ["-", "-"]
        if row["best_batch_size"]:
            best = [str(row["best_batch_size"]), f"{row['best_samples_per_second']:.4g}"]
        lines.append(
            [str(row["num_heads"]), str(row["head_dim"]), row["run"], *speed, "-" if memory is None else f"{memory:.4g}", *best]
        )
    return markdown_table(header, lines)


def _theory(rows: Sequence[Mapping[str, Any]], theories: Sequence[Mapping[str, Any]]) -> str:
    """Set the ratio of the forms in theory beside that measured: above 1 efficient is ahead."""
    header = ["heads", "d", "N", "N0", "N1", "N0 packed", "N1 packed", "MFLOP direct", "MFLOP efficient", "packed"]
    header += ["entries direct", "entries efficient", "packed", "speed eff./dir. in theory", "packed", "measured (whole model)"]
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

    panels = 3 if accuracies else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 4.6), layout="constrained")
    if accuracies:
        _draw_accuracy(axes[0], accuracies)
    _draw_costs(axes[-2], axes[-1], measured, batch_size)
    counts = {row["num_heads"]: row["head_dim"] for row in measured}
    for axis in axes:
        axis.set(xscale="log", xlabel="heads H (head dimension d)")
        axis.set_xticks(list(counts), [f"{heads}\n({dim})" for heads, dim in counts.items()])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _draw_accuracy(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    key = "test_top1" if all(row["test_top1"] is not None for row in rows) else "val_top1"
    for attention, marker in zip(dict.fromkeys(row["attention"] for row in rows), "os^v"):
        own = [row for row in rows if row["attention"] == attention and row[key] is not None]
        heads, means = [row["num_heads"] for row in own], [row[key] for row in own]
        axis.errorbar(heads, means, [row[f"{key}_sd"] or 0 for row in own], label=attention, marker=marker, capsize=3)
    axis.set(title="accuracy", ylabel=f"{key.partition('_')[0]} top-1 [%], mean and deviation of the seeds")


def _draw_costs(speed: Any, memory: Any, rows: Sequence[Mapping[str, Any]], batch_size: int) -> None:
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
    memory.set(title=f"peak memory, inference, batch {batch_size}", ylabel="MiB, weights included", yscale="log")
