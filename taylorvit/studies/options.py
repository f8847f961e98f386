"""The options that all programs share which train a grid of cells."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from taylorvit.cli import positive_int
from taylorvit.config_loading import load_config


def add_sweep_options(parser: argparse.ArgumentParser, *, out: str, config_required: bool = True) -> None:
    """Add --config, --set, --seeds, --launcher, --jobs and --out."""
    add = parser.add_argument
    add("--config", type=Path, nargs="+", required=config_required, metavar="FILE", help="of all trainings; later files win")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings on top, such as schedule.epochs=10")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    add(
        "--launcher",
        type=shlex.split,
        default=[sys.executable],
        metavar="COMMAND",
        help="what starts each training, such as 'accelerate launch --config_file configs/accelerate/one_node.yaml'",
    )
    add("--jobs", type=positive_int, default=1, help="trainings side by side; they share the cores, each takes one GPU")
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help="the study's folder; a study there is continued")


def settings_of(options: argparse.Namespace, attention: str) -> list[str]:
    """Return the attention and --set as arguments of train.py; the options of another attention are dropped.

    Raises:
        ValueError: a word of --set is no KEY=VALUE, or a configuration file is not valid.
    """
    config, _ = load_config([word for path in options.config for word in ("--config", str(path))])
    chosen = [f"--model.attention={attention}"]
    if attention != config.model.attention:
        chosen.append("--model.attention_options={}")
    for word in options.set:
        if "=" not in word or word.startswith("-"):
            raise ValueError(f"--set {word}: expected KEY=VALUE, such as schedule.epochs=10")
    return [*chosen, *(f"--{word}" for word in options.set)]


def need_matplotlib() -> None:
    """Raise ValueError before any work if the picture cannot be drawn."""
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError("the picture needs matplotlib: pip install -r requirements-dev.txt")
