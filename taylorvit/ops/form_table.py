"""Where the efficient form overtakes the direct one: token counts from crossovers.json, written by tools/calibrate.py.

The file holds, for each implementation, a table by pass ("forward", "training") and head dimension, and where it comes from:
the command, commit, hardware and date of the measurement, or, until there is one, what was counted instead. null stands for a
crossing that was not met.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..complexity import flops_crossover

PATH = Path(__file__).with_name("crossovers.json")


def load(path: Path = PATH) -> dict[tuple[str, bool], dict[int, float]]:
    """Read the file: (implementation, whether training) -> head dimension -> token count; {} where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        measured: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {
            (impl, pass_name == "training"): {
                int(head_dim): math.inf if crossover is None else float(crossover) for head_dim, crossover in crossovers.items()
            }
            for impl, measurement in measured.items()
            for pass_name, crossovers in measurement["crossovers"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: it is no table of crossings ({type(error).__name__}: {error})") from error


CROSSOVERS = load()


def crossover(head_dim: int, impl: str, training: bool) -> float:
    """Return the token count above which the efficient form is faster: as measured, else the paper's N0.

    Between two measured head dimensions it is interpolated, as a power of the head dimension. Infinity: it never is.
    """
    measured = CROSSOVERS.get((impl, training), {})
    if head_dim in measured:
        return measured[head_dim]
    below, above = [D for D in measured if head_dim > D], [D for D in measured if head_dim < D]
    if not below or not above:
        return flops_crossover(head_dim)
    low, high = max(below), min(above)
    share = math.log(head_dim / low) / math.log(high / low)
    return measured[low] ** (1 - share) * measured[high] ** share
