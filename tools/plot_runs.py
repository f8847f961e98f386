"""Draw the training curves of runs side by side: `python tools/plot_runs.py runs/a runs/b --output curves.png`.

Reads metrics.jsonl only, so a run can be drawn while it trains. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taylorvit.cli import run_program
from taylorvit.run_folder import RunFolder

PANELS = (("train", "loss", "training loss"), ("evaluate", "top1", "top-1 [%]"), ("train", "lr", "learning rate"))


def read_curve(records: list[dict[str, Any]], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Return updates and values of one quantity; a loss that was not finite is a gap."""
    points = [(record["update"], float(record[key])) for record in records if record["kind"] == kind and key in record]
    return [update for update, _ in points], [value for _, value in points]


def draw(folders: list[Path], output: Path) -> None:
    """Draw one panel a quantity with one line a run, and save it as an image.

    Raises:
        ValueError: a folder without metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
    for folder in folders:
        records = RunFolder(folder).read_metrics()
        if not records:
            raise ValueError(f"{folder}: there are no metrics in it")
        for axis, (kind, key, title) in zip(axes, PANELS, strict=True):
            updates, values = read_curve(records, kind, key)
            axis.plot(updates, values, label=folder.name, marker="o" if kind == "evaluate" else None)
            axis.set(title=title, xlabel="update")
            axis.grid(alpha=0.3)
    axes[0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


def main() -> int:
    """Command line -> picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="image to write")
    options = parser.parse_args()
    draw(options.runs, options.output)
    print(options.output)
    return 0


if __name__ == "__main__":
    run_program(main)
