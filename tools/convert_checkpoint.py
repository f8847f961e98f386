"""Convert a checkpoint of the paper authors' code into an export folder that timm and our programs load.

    python tools/convert_checkpoint.py SRC.tar DEST [--model taylorvit_tiny_patch16_224] [--form direct]

Sizes are read off the tensors; what was found is printed. Image statistics are ImageNet's and the crop ratio 1.0, as in the
authors' evaluation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taylorvit.cli import run_program
from taylorvit.config import DataConfig, ModelConfig
from taylorvit.export import export_model
from taylorvit.models import build_model
from taylorvit.original import infer_model_config
from taylorvit.weights import load_into, load_weights


def convert(source: Path | str, folder: Path | str, *, model: str | None = None, form: str | None = None) -> ModelConfig:
    """Write the export folder and return the configuration that was inferred.

    Raises:
        ValueError: the file is not such a checkpoint, or its tensors do not fit the inferred or named model.
    """
    state, found = load_weights(source)
    try:
        config = found.checked_model_config() if found.model_config else ModelConfig(**infer_model_config(state))
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    if model is not None:
        config.name = model
    if form is not None:
        config.attention_options = {**config.attention_options, "form": form}
    network = build_model(config)
    try:
        load_into(network, state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    data = DataConfig()
    export_model(
        network,
        folder,
        model_config=vars(config),
        mean=data.mean[: config.in_chans],
        std=data.std[: config.in_chans],
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
    )
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> export folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file written by the authors' code")
    parser.add_argument("destination", help="export folder to write")
    parser.add_argument("--model", help="name of the registered model; default: by the width")
    parser.add_argument("--form", choices=("auto", "direct", "efficient"), help="default: by the stored model name, else auto")
    options = parser.parse_args(arguments)
    config = convert(options.source, options.destination, model=options.model, form=options.form)
    for key, value in vars(config).items():
        print(f"{key:18} {value}")
    print(f"written to {options.destination}")
    return 0


if __name__ == "__main__":
    run_program(main)
