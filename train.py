"""Train a model: `python train.py --config configs/quickstart.yaml --run_dir runs/first`, or under accelerate or torchrun.

Any key of `taylorvit.config.Config` can be given on the command line. `--print_config` shows the resolved settings, `--dry_run`
builds everything and says what would happen, `--debug` adds the traceback to an error. `--config RUN/config.yaml --resume auto`
continues a run. Exit codes: 0 done or stopped by a STOP file, 2 a setting or a file is wrong, 5 the loss is not finite, 6
another process of the run was lost, 128 + N stopped by signal N after a checkpoint.
"""

from __future__ import annotations

import sys

from taylorvit import engine
from taylorvit.cli import run_program
from taylorvit.config_loading import build_parser, load_config


def main() -> int:
    """Command line -> config -> engine."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--dry_run"]  # no setting of the run: not in its config
    config, _ = load_config(arguments, build_parser(prog="train.py", description=__doc__))
    if len(arguments) < len(sys.argv[1:]):
        engine.dry_run(config)
        return 0
    return engine.train(config)


if __name__ == "__main__":
    run_program(main)
