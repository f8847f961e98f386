"""The options that all programs share which train a grid of cells."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
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
        type=_launcher,
        default=[sys.executable],
        metavar="COMMAND",
        help="what starts each training, such as 'accelerate launch --config_file configs/accelerate/one_node.yaml'",
    )
    add("--jobs", type=positive_int, default=1, help="trainings side by side; they share the cores, each takes one GPU")
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help="the study's folder; a study there is continued")


def settings_of(options: argparse.Namespace, attention: str, *, varied: Sequence[str]) -> list[str]:
    """Return the attention and --set as arguments of train.py; the options of another attention are dropped.

    Args:
        options: the command line.
        attention: of this cell.
        varied: keys that the study sets itself, so that --set must leave them alone.

    Raises:
        ValueError: a word of --set is no KEY=VALUE or sets what the study sets, or a configuration file is not valid.
    """
    own = ("model.attention", "seed", "run_dir", "resume", *varied)
    config, _ = load_config(config_arguments(options.config))
    chosen = [f"--model.attention={attention}"]
    if attention != config.model.attention:
        chosen.append("--model.attention_options={}")
    for word in options.set:
        if "=" not in word or word.startswith("-"):
            raise ValueError(f"--set {word}: expected KEY=VALUE, such as schedule.epochs=10")
        if word.partition("=")[0] in own:
            raise ValueError(f"--set {word}: this study sets {', '.join(own)} itself, by its own options")
    return [*chosen, *(f"--{word}" for word in options.set)]


def config_arguments(configs: Sequence[Path]) -> list[str]:
    """Return configuration files as arguments of train.py."""
    return [word for path in configs for word in ("--config", str(path))]


def _launcher(text: str) -> list[str]:
    """Read the command that starts a training; its program may lie beside Python, as in an environment that is not active."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no command: {error}") from error
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    program = shutil.which(words[0], path=places) if words else None
    if program is None:
        raise argparse.ArgumentTypeError(f"there is no program {words[0] if words else ''!r}")
    return [program, *words[1:]]
