"""Export a checkpoint of a run as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

python tools/export_checkpoint.py RUN_OR_STEP_FOLDER DEST [--weights ema] [--step best|newest|1234]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taylorvit.cli import run_program
from taylorvit.export import export_model
from taylorvit.models import build_model
from taylorvit.weights import Source, Step, load_into, load_weights, parse_step


def export_checkpoint(path: Path | str, folder: Path | str, *, weights: str = "raw", step: Step = "best") -> Source:
    """Write the export folder and return what was exported.

    Raises:
        ValueError: the checkpoint does not say which model it belongs to, or cannot be loaded.
    """
    state, source = load_weights(path, weights=weights, step=step)
    if source.model_config is None or source.data_config is None:
        raise ValueError(f"{path}: it does not say which model and data it belongs to; give a run or step folder")
    config = source.checked_model_config()
    try:
        model = build_model(config)
        load_into(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    export_model(
        model,
        folder,
        model_config=vars(config),
        class_names=source.class_names,
        mean=source.data_config["mean"],
        std=source.data_config["std"],
        crop_pct=source.data_config["crop_pct"],
        interpolation=source.data_config["interpolation"],
    )
    return source


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> export folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder or step folder")
    parser.add_argument("destination", help="export folder to write")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="averaged or raw weights (default: raw)")
    parser.add_argument("--step", default="best", help="best, newest or a number of updates (default: best)")
    options = parser.parse_args(arguments)
    step = parse_step(options.step)
    source = export_checkpoint(options.checkpoint, options.destination, weights=options.weights, step=step)
    print(f"exported {source.path} ({source.weights} weights, update {source.step}) to {options.destination}")
    return 0


if __name__ == "__main__":
    run_program(main)
