"""Train a model: `python train.py --config configs/quickstart.yaml --run_dir runs/first`, or under accelerate or torchrun.

Any key of `taylorvit.config.Config` can be given on the command line; `--print_config` shows the resolved settings, `--dry_run`
builds everything and says what would happen. Exit codes: 0 done, 2 a setting or a file is wrong, 5 the loss is not finite,
128 + N stopped by signal N after a checkpoint.
"""

from __future__ import annotations

import sys

from taylorvit import engine
from taylorvit.cli import run_program
from taylorvit.config_loading import build_parser, load_config


def main() -> int:
    """Command line -> config -> engine."""
    parser = build_parser(prog="train.py", description=__doc__)
    parser.add_argument("--dry_run", action="store_true", help="build everything, say what would happen, and leave")
    config, options = load_config(sys.argv[1:], parser)
    if options["dry_run"]:
        engine.dry_run(config)
        return 0
    return engine.train(config)


if __name__ == "__main__":
    run_program(main)
