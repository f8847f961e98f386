"""The comparison as a page: ours beside what is published and marked so, the costs, and what keeps figures apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taylorvit.benchmark.memory import RESOLUTION
from taylorvit.data import format_reference_lines
from taylorvit.provenance import provenance
from taylorvit.studies.comparison import summarise_systems
from taylorvit.studies.published import CAVEATS, SOURCE, SYSTEMS, TASKS, published
from taylorvit.studies.results import markdown_table, mean_and_spread

MEBI = 2**20
TIMES = ("samples_per_second", "seconds", "seconds_low", "seconds_high", "speedup", "speedup_low", "speedup_high", "rounds")
MEASURED = (*TIMES, "peak_bytes", "weight_bytes", "note")
PUBLISHED = (
    "Published: single runs of others, no deviation given, nothing of it measured here; * had to be trained in full precision"
)

Trained = Mapping[str, Sequence[Mapping[str, Any]]]
Costs = Mapping[tuple[str, str], Mapping[str, Any]]


def table_rows(trained: Trained, costs: Costs) -> list[dict[str, Any]]:
    """Return a row for every system on every task of which there is anything, in the order of the paper.

    A row holds `published_top1` and `published_full_precision` (None where there is no figure), mean and deviation of our
    seeds, parameters, FLOPs of a forward pass, and for each pass the measured figures.

    Args:
        trained: results of `comparison.read_results` by task.
        costs: of `comparison.read_costs`.
    """
    own = {(row["task"], row["system"]): row for results in trained.values() for row in summarise_systems(results)}
    passes = {(task, row["candidate"], name): row for (task, name), found in costs.items() for row in found["rows"]}
    rows = []
    for task in tasks_of(trained, costs):
        for system in SYSTEMS:
            measured = {name: passes[key] for name in ("inference", "training") if (key := (task, system, name)) in passes}
            if (task, system) in own or measured:
                rows.append(_row(task, system, own.get((task, system)), measured))
    return rows


def tasks_of(trained: Trained, costs: Costs) -> list[str]:
    """Return the tasks by name, those of the paper first."""
    found = {*trained, *(task for task, _ in costs)}
    return [*(task for task in TASKS if task in found), *sorted(found - set(TASKS))]


def _row(task: str, system: str, own: Mapping[str, Any] | None, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    printed = published(system, task)
    row: dict[str, Any] = {"task": task, "system": system}
    row |= {"published_top1": printed and printed.top1, "published_full_precision": printed and printed.full_precision}
    row |= {key: value for key, value in (own or {}).items() if key not in row}
    for name, found in measured.items():
        row |= {"parameters": found["parameters"], "flops_per_sample": found["flops_per_sample"]}
        row |= {f"{name}_status": found["status"], f"{name}_batch_size": found["batch_size"]}
        row |= {f"{name}_{key}": found[key] for key in MEASURED}
    return row


def header(trained: Trained, costs: Costs) -> dict[str, Any]:
    """Return what the JSON file holds beside the rows: sources, caveats, reference lines, budgets and settings."""
    return {
        "provenance": provenance(),
        "published": {"source": SOURCE, "note": PUBLISHED, "caveats": [caveat.text for caveat in CAVEATS]},
        "reference_lines": {task: reference_lines_of(results) for task, results in trained.items()},
        "budgets": {task: budget(results) for task, results in trained.items()},
        "measuring": {f"{task}_{name}": found["measuring"] for (task, name), found in costs.items()},
    }


def budget(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of a task's trainings that say how much each was given."""
    config = results[0]["config"]
    return {
        "epochs": config["schedule"]["epochs"],
        "train_split": config["data"]["train_split"],
        "batch": config["train"]["global_batch_size"],
        "optimizer": config["optim"]["name"],
        "lr": config["optim"]["lr"],
        "precision": config["train"]["mixed_precision"],
        "commits": sorted({str(result["commit"])[:7] for result in results}),
    }


def reference_lines_of(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracies that a task's results are to be held against; one that diverged was held against none."""
    return next((lines for result in results if (lines := result.get("reference_lines"))), {})


def report(rows: Sequence[Mapping[str, Any]], trained: Trained, costs: Costs) -> str:
    """Return the page: the paper's table with its caveats, then accuracies, a task each, then costs, a task each."""
    caveats = "\n".join(f"- [{number}] {caveat.text}" for number, caveat in enumerate(CAVEATS, 1))
    explained = f"Accuracy [%], published / ours, - where there is none. {PUBLISHED} ({SOURCE})."
    parts = [f"`{provenance()['command']}`", explained, _overview(rows), caveats]
    for task in tasks_of(trained, {}):
        results = trained[task]
        parts += [f"## {TASKS.get(task, task)}: accuracy", _given(results), _accuracies(_of(rows, task), task)]
        if lines := reference_lines_of(results):
            parts.append(f"On the same test samples, {format_reference_lines(lines)}.")
    for task in tasks_of({}, costs):
        parts += [f"## {TASKS.get(task, task)}: cost", _measured(task, costs), _costs(_of(rows, task))]
    return "\n\n".join(parts)


def _overview(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the paper's table with ours in every cell, a system a row and a task a column."""
    own = {(row["system"], row["task"]): mean_and_spread(row, "test_top1") for row in rows if row.get("seeds")}
    lines = []
    for system, name in SYSTEMS.items():
        cells = [f"{published(system, task) or '-'} / {own.get((system, task), '-')}{_numbers(system, task)}" for task in TASKS]
        lines.append([name, *cells])
    return markdown_table(["system", *TASKS.values()], lines)


def _numbers(system: str, task: str) -> str:
    """Return the numbers of the caveats that hold for a published figure."""
    found = [str(number) for number, caveat in enumerate(CAVEATS, 1) if caveat.holds_for(system, task)]
    return f" [{', '.join(found)}]" if found and published(system, task) else ""


def _of(rows: Sequence[Mapping[str, Any]], task: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["task"] == task]


def _given(results: Sequence[Mapping[str, Any]]) -> str:
    given = budget(results)
    return (
        f"Budget of every training: {given['epochs']} epoch(s) of `{given['train_split']}`, batch {given['batch']}, "
        f"{given['optimizer']} at {given['lr']:g}, precision {given['precision']}; commit {', '.join(given['commits'])}. "
        "Mean and sample deviation of the seeds; the checkpoint was chosen on the validation split."
    )


def _accuracies(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    head = [
        "system",
        *(["published [%]"] if task in TASKS else []),
        "ours: test top-1 [%]",
        "validation [%]",
        "seeds",
        "diverged",
    ]
    lines = []
    for row in rows:
        printed = [str(published(row["system"], task) or "-")] if task in TASKS else []
        if row.get("seeds"):
            own = [mean_and_spread(row, "test_top1"), mean_and_spread(row, "val_top1"), str(row["seeds"]), str(row["diverged"])]
        else:
            own = ["not yet measured", "-", "0", "-"]
        lines.append([SYSTEMS[row["system"]] + _numbers(row["system"], task), *printed, *own])
    return markdown_table([*head, "parameters"], [[*line, f"{row['parameters']:,}"] for line, row in zip(lines, rows)])


def _measured(task: str, costs: Costs) -> str:
    found = [content for (name, _), content in costs.items() if name == task]
    how, row = found[0]["measuring"], found[0]["rows"][0]
    place = f"{how['device']}, {how['threads']} thread(s)" if how["device"] == "cpu" else how["device"]
    tokens = next((row["num_tokens"] for row in found[0]["rows"] if row["num_tokens"]), None)
    shape = f"N = {tokens}, " if tokens else ""
    commit = str((found[0]["provenance"]["git"] or {}).get("commit"))[:7]
    return (
        f"{shape}batch {row['batch_size']}, {place}, precision {how['precision']}, random inputs; commit "
        f"{commit}. GFLOP: matrix products of one sample's forward pass. x: samples/s over softmax's, "
        "median of the rounds (10th - 90th percentile). MiB: what a pass needs at its peak beyond the weights."
    )


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in ("inference", "training") if any(f"{name}_status" in row for row in rows)]
    head = ["system", "parameters", "GFLOP"]
    head += [f"{name}: {what}" for name in names for what in ("samples/s", "x", "MiB")]
    lines = []
    for row in rows:
        if not any(f"{name}_status" in row for name in names):
            continue
        line = [SYSTEMS[row["system"]], f"{row['parameters']:,}", f"{row['flops_per_sample'] / 1e9:.3g}"]
        for name in names:
            line += _figures(row, name)
        lines.append(line)
    return markdown_table(head, lines)


def _figures(row: Mapping[str, Any], name: str) -> list[str]:
    if row.get(f"{name}_status") != "ok":
        return [row.get(f"{name}_status", "-"), "-", "-"]
    ratio, low, high = (row[f"{name}_speedup{end}"] for end in ("", "_low", "_high"))
    ratios = "-" if ratio is None else f"{ratio:.2f} ({low:.2f} - {high:.2f})"
    peak = row[f"{name}_peak_bytes"]
    memory = "-" if peak is None else f"{peak / MEBI:.4g}" if peak >= RESOLUTION else f"< {RESOLUTION / MEBI}"
    return [f"{row[f'{name}_samples_per_second']:.4g}", ratios, memory]
