"""Evaluate checkpoints: `python eval.py runs/quickstart`, or several at once, also under accelerate or torchrun.

A checkpoint is a run folder, a step folder, an export folder, a safetensors file, or a file that torch.save wrote (that of the
paper authors' code included). Model and data are those of its run. The keys of the configuration that an evaluation uses
override them, such as `--model.img_size 384 --data.crop_pct 0.95 --model.attention_options.form efficient
--train.mixed_precision bf16`; `--config FILE` gives them where a file knows neither model nor data. Any other key is refused.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from taylorvit import report
from taylorvit.cli import run_program
from taylorvit.config import Config
from taylorvit.config_loading import build_parser, flatten, load_config
from taylorvit.data import format_reference_lines
from taylorvit.distributed import build_accelerator
from taylorvit.evaluation import Judgement, evaluate_checkpoint
from taylorvit.suggest import nearest
from taylorvit.weights import Source, load_weights, parse_step

OWN = ("help", "weights", "step", "variant", "json", "per_class", "worst")
UNUSED = ("model.drop_path_rate", "model.drop_rate", "data.train_split", "data.test_split")
USED = [key for key in flatten(Config()) if key.startswith(("model.", "data.")) and key not in UNUSED]
USED += ["evaluate.batch_size", "train.mixed_precision", "train.compile", "device", "timeout_seconds"]
OPEN = ("model.attention_options.", "model.kwargs.")  # dictionaries: the model checks what is in them


def build_eval_parser() -> jsonargparse.ArgumentParser:
    """Return the parser: checkpoints, how to judge them, and every key of the config, of which the help shows those in use."""
    parser = build_parser(prog="eval.py", description=__doc__, usage="eval.py CHECKPOINT [CHECKPOINT ...] [options]")
    for action in parser._actions:
        if action.dest not in (*USED, "help", "config"):
            action.help = argparse.SUPPRESS
    parser.add_argument("checkpoints", nargs="+", type=str, help="what to evaluate")
    parser.add_argument("--weights", type=Literal["raw", "ema", "both"], default="raw", help="as trained, averaged, or both")
    parser.add_argument("--step", type=str, default="best", help="of a run folder: best, newest, or a number of updates")
    parser.add_argument("--variant", type=str | None, default=None, help="judge as imagenet-real, -v2, -a, -r or -sketch")
    parser.add_argument("--json", type=str | None, default=None, help="write the results as JSON to this file")
    parser.add_argument("--per_class", type=str | None, default=None, help="write one CSV row a class (one checkpoint only)")
    parser.add_argument("--worst", type=int, default=5, help="classes shown with what they are taken for; 0 shows none")
    return parser


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into this program's own arguments and keys of the config; every option takes one value.

    The two are read apart because a key can be checked only together with the checkpoint's other settings.

    Raises:
        ValueError: a key that is unknown or would change nothing.
    """
    checkpoints: list[str] = []
    own: list[str] = []
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            checkpoints.append(word)
            continue
        key, equals, _ = word.removeprefix("--").partition("=")
        _check_key(key)
        value = [] if equals or key == "help" else itertools.islice(words, 1)
        (own if key in OWN else overrides).extend([word, *value])
    return [*checkpoints, *own], overrides


def _check_key(key: str) -> None:
    if key in (*OWN, *USED, "config") or key.startswith(OPEN):
        return
    if key in flatten(Config()):
        raise ValueError(f"{key}: an evaluation does not use this setting; --help shows those that it does")
    raise ValueError(f"unknown key {key!r}{nearest(key, [*OWN, *USED, 'config'])}")


def read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the program's own options, checked, with `kinds` of weights and a `step` as `load_weights` takes it."""
    _, options = load_config(arguments, build_eval_parser())
    options["kinds"] = ["raw", "ema"] if options["weights"] == "both" else [options["weights"]]
    options["step"] = parse_step(options["step"])
    if options["worst"] < 0:
        raise ValueError(f"--worst {options['worst']}: expected 0 or more classes")
    for key in ("json", "per_class"):
        if options[key] and Path(options[key]).is_dir():
            raise ValueError(f"--{key} {options[key]}: expected a file's path, this is a folder")
    if options["per_class"] and len(options["checkpoints"]) * len(options["kinds"]) > 1:
        raise ValueError(
            f"per_class: {options['per_class']!r} holds one evaluation; give one checkpoint and one kind of weights"
        )
    return options


def checkpoint_config(source: Source, overrides: Sequence[str]) -> Config:
    """Return the config of the checkpoint's run, or as much of it as the file tells, with the command line's keys on top."""
    known = {"model": source.model_config, "data": source.data_config, "train": {"mixed_precision": "no"}}
    base = source.config or {section: values for section, values in known.items() if values}
    told = {word.partition("=")[0] for word in overrides} & {"--data.root", "--data.dataset", "--config"}
    if "root" not in base.get("data", {}) and not told:
        raise ValueError(
            f"{source.path} does not say which data it belongs to; give --data.dataset and --data.root, or --config"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.yaml"
        file.write_text(yaml.safe_dump(base), encoding="utf-8")
        try:
            return load_config(["--config", str(file), *overrides])[0]
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), source.path)) from error


def show(judgement: Judgement, options: dict[str, Any]) -> None:
    """Print notes and the worst classes of one evaluation, and write its rows by class."""
    source, confusion = judgement.source, judgement.evaluation.confusion
    assert confusion is not None
    classes = report.per_class_rows(confusion, judgement.classes)
    for note in judgement.notes:
        print(f"{source.path}: {note}")
    if judgement.reference_lines:
        print(f"{source.path}: {format_reference_lines(judgement.reference_lines)}")
    if options["per_class"]:
        report.save_csv(Path(options["per_class"]), classes)
    if options["worst"]:
        print(f"worst classes of {source.path} ({source.weights}):")
        print(report.format_table(report.worst_classes(classes, options["worst"]), list(classes[0])), end="\n\n")


def main() -> int:
    """Command line -> weights and config -> evaluation -> table, JSON, CSV."""
    own, overrides = split_arguments(sys.argv[1:])
    options = read_options(own)
    loaded = [
        load_weights(path, weights=kind, step=options["step"]) for path in options["checkpoints"] for kind in options["kinds"]
    ]
    configs = [checkpoint_config(source, overrides) for _, source in loaded]
    if len({config.train.mixed_precision for config in configs}) > 1:
        raise ValueError("the checkpoints were trained in different precisions; choose one with --train.mixed_precision")
    accelerator = build_accelerator(
        device=configs[0].device, mixed_precision=configs[0].train.mixed_precision, timeout_seconds=configs[0].timeout_seconds
    )
    rows = []
    for (state, source), config in zip(loaded, configs, strict=True):
        judgement = evaluate_checkpoint(state, source, config, accelerator, variant_name=options["variant"])
        rows.append(report.result_row(judgement))
        if accelerator.is_main_process:
            show(judgement, options)
    if accelerator.is_main_process:
        print(report.format_table(rows), flush=True)
        if options["json"]:
            report.save_json(Path(options["json"]), rows)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_program(main)
