"""Where the efficient form overtakes the direct one: measured token counts from crossovers.json, written by tools/calibrate.py.

The file holds, for each implementation that was measured, a table by pass ("forward", "training") and head dimension, with the
command, commit, hardware and date of the measurement.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..complexity import flops_crossover

PATH = Path(__file__).with_name("crossovers.json")


def load(path: Path = PATH) -> dict[tuple[str, bool], dict[int, float]]:
    """Read the file: (implementation, whether training) -> head dimension -> token count; {} where there is no file."""
    if not path.exists():
        return {}
    measured: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {
        (impl, pass_name == "training"): {int(head_dim): crossover for head_dim, crossover in crossovers.items()}
        for impl, measurement in measured.items()
        for pass_name, crossovers in measurement["crossovers"].items()
    }


CROSSOVERS = load()


def crossover(head_dim: int, impl: str, training: bool) -> float:
    """Return the token count above which the efficient form is faster: as measured, else the paper's N0."""
    return CROSSOVERS.get((impl, training), {}).get(head_dim) or flops_crossover(head_dim)
