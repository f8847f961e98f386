"""The head-count ablation: what a width split into more, narrower heads does to accuracy, speed and memory of both forms.

More heads of d = C / H make the efficient form cheaper (N d^3 a head) and the direct one dearer (N^2 a head): section 4 of the
TaylorShift paper (arXiv:2403.02920). Here are the measurements and the theory beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from taylorvit.studies import model_cost
from taylorvit.studies.model_candidates import Candidate, inspect_model
from taylorvit.studies.model_cost import best_batch_size, enter_memory, measure_speed, verify
from taylorvit.studies.model_passes import Settings
from taylorvit.studies.results import store_measurement, stored_rows

FORMS: tuple[Form, ...] = ("direct", "efficient")
MEASURED = {"direct": "taylorshift_direct", "efficient": "taylorshift_efficient", "softmax": "softmax"}


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
    with the best batch size, its samples a second and peak memory, and why the search for it ended. Inference, as in the paper.

    Raises:
        ValueError: see `check_measured`.
        RuntimeError: a form failed, or computes something else than the reference.
    """
    check_measured(model, head_counts, measuring, folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for num_heads in head_counts:
        file, asked = _file(folder, num_heads), _asked(model, num_heads, measuring)
        if not file.exists():
            found = _measure(dataclasses.replace(model, num_heads=num_heads), measuring)
            store_measurement(file, asked, found)
        rows += stored_rows(file, asked)
    return rows


def check_measured(model: ModelConfig, head_counts: Sequence[int], measuring: Measuring, folder: Path) -> None:
    """Raise ValueError if a measurement in the folder is damaged, or is of another model or made with other settings."""
    for num_heads in head_counts:
        file = _file(folder, num_heads)
        if file.exists():
            stored_rows(file, _asked(model, num_heads, measuring))


def _file(folder: Path, num_heads: int) -> Path:
    return folder / f"num_heads-{num_heads}.json"


def _asked(model: ModelConfig, num_heads: int, measuring: Measuring) -> dict[str, Any]:
    config = dataclasses.replace(model, num_heads=num_heads)
    return {"model": config_to_dict(config), "measuring": measuring.as_dict()}


def _measure(config: ModelConfig, measuring: Measuring) -> list[dict[str, Any]]:
    settings = measuring.settings
    candidates = [Candidate(run, config, attention) for run, attention in MEASURED.items()]
    verdicts = {candidate.name: verify(candidate, settings) for candidate in candidates}
    measured = measure_speed(candidates, measuring.batch_size, training=False, settings=settings, verdicts=verdicts)
    rows = []
    for candidate, row in zip(candidates, measured):
        if row.is_fault:
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
                "best_peak_bytes": _peak_memory(candidate, best.batch_size, settings),
                "best_reason": best.reason,
            }
        )
    return rows


def _peak_memory(candidate: Candidate, batch_size: int | None, settings: Settings) -> int | None:
    """Return the peak memory at the best batch size; None where there is none, or the system does not tell it."""
    if batch_size is None:
        return None
    try:
        return model_cost.peak_memory(candidate, batch_size, training=False, settings=settings)
    except MemoryError:
        return None


def theory(model: ModelConfig, num_heads: int) -> dict[str, Any]:
    """Return what the paper's formulas say of one head count: N0, N1, and operations and entries of both forms.

    Operations are of the attention cores of all layers for one sample, entries the numbers one layer holds at once; `_packed`
    counts each product x_a x_b once.
    """
    config = dataclasses.replace(model, num_heads=num_heads)
    structure = inspect_model(Candidate("theory", config, "taylorshift"), training=False, device="cpu")
    embed_dim, num_tokens = structure.embed_dim, structure.num_tokens
    depth = len(attention_forms(build_model(config, device="meta")))
    assert embed_dim is not None
    assert num_tokens is not None
    head_dim = embed_dim // num_heads
    found: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "num_tokens": num_tokens, "depth": depth}
    for form in FORMS:
        found[f"ops_{form}"] = depth * ops_mhsa(form, num_tokens, embed_dim, num_heads)
        found[f"entries_{form}"] = entries_mhsa(form, num_tokens, embed_dim, num_heads)
    found["ops_efficient_packed"] = depth * ops_mhsa("efficient", num_tokens, embed_dim, num_heads, "symmetric")
    found["entries_efficient_packed"] = entries_mhsa("efficient", num_tokens, embed_dim, num_heads, "symmetric")
    for name, crossover in (("n0", flops_crossover), ("n1", memory_crossover)):
        found |= {name: crossover(head_dim), f"{name}_packed": crossover(head_dim, "symmetric")}
    return found
