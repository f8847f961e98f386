"""Evaluate checkpoints: `python eval.py runs/quickstart`, or several at once, also under accelerate or torchrun.

A checkpoint is a run folder, a step folder, an export folder, a safetensors file, or a file that torch.save wrote (that of the
paper authors' code included). Model and data are those of its run; any key of `taylorvit.config.Config` overrides them, such as
`--model.img_size 384 --data.crop_pct 0.95 --model.attention_options.form efficient --train.mixed_precision bf16`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

import jsonargparse
import yaml

from taylorvit import report
from taylorvit.cli import run_program
from taylorvit.config import Config
from taylorvit.config_loading import build_parser, load_config
from taylorvit.distributed import build_accelerator
from taylorvit.evaluation import evaluate_checkpoint
from taylorvit.weights import Source, load_weights


def build_eval_parser() -> jsonargparse.ArgumentParser:
    """Return the parser: checkpoints and how to judge them, and every key of the config."""
    parser = build_parser(prog="eval.py", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=str, help="what to evaluate")
    parser.add_argument("--weights", type=Literal["raw", "ema", "both"], default="raw", help="as trained, averaged, or both")
    parser.add_argument("--step", type=str, default="best", help="of a run folder: best, newest, or a number of updates")
    parser.add_argument("--variant", type=str | None, default=None, help="judge as imagenet-real, -v2, -a, -r or -sketch")
    parser.add_argument("--json", type=str | None, default=None, help="write the results as JSON to this file")
    parser.add_argument("--per_class", type=str | None, default=None, help="write one CSV row a class (one checkpoint only)")
    parser.add_argument("--worst", type=int, default=5, help="classes shown with what they are taken for; 0 shows none")
    return parser


def checkpoint_config(source: Source, arguments: list[str]) -> Config:
    """Return the config of the checkpoint's run, or as much of it as the file tells, with the command line's keys on top."""
    known = {"model": source.model_config, "data": source.data_config, "train": {"mixed_precision": "no"}}
    base = source.config or {section: values for section, values in known.items() if values}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.yaml"
        file.write_text(yaml.safe_dump(base), encoding="utf-8")
        return load_config(["--config", str(file), *arguments], build_eval_parser())[0]


def main() -> int:
    """Command line -> weights and config -> evaluation -> table, JSON, CSV."""
    arguments = sys.argv[1:]
    _, options = load_config(arguments, build_eval_parser())
    step = int(options["step"]) if options["step"].isdigit() else options["step"]
    kinds = ["raw", "ema"] if options["weights"] == "both" else [options["weights"]]
    if options["per_class"] and len(options["checkpoints"]) * len(kinds) > 1:
        raise ValueError(
            f"per_class: {options['per_class']!r} holds one evaluation; give one checkpoint and one kind of weights"
        )
    loaded = [load_weights(path, weights=kind, step=step) for path in options["checkpoints"] for kind in kinds]
    configs = [checkpoint_config(source, arguments) for _, source in loaded]
    if len({config.train.mixed_precision for config in configs}) > 1:
        raise ValueError("the checkpoints were trained in different precisions; choose one with --train.mixed_precision")
    accelerator = build_accelerator(
        device=configs[0].device, mixed_precision=configs[0].train.mixed_precision, timeout_seconds=configs[0].timeout_seconds
    )
    rows = []
    for (state, source), config in zip(loaded, configs, strict=True):
        judgement = evaluate_checkpoint(state, source, config, accelerator, variant_name=options["variant"])
        rows.append(report.result_row(judgement))
        classes = report.per_class_rows(judgement.evaluation.confusion, judgement.classes)
        if accelerator.is_main_process:
            for note in judgement.notes:
                print(f"{source.path}: {note}")
            if options["per_class"]:
                report.save_csv(Path(options["per_class"]), classes)
            if options["worst"]:
                print(f"worst classes of {source.path} ({source.weights}):")
                print(report.format_table(report.worst_classes(classes, options["worst"]), list(classes[0])), end="\n\n")
    if accelerator.is_main_process:
        print(report.format_table(rows), flush=True)
        if options["json"]:
            report.save_json(Path(options["json"]), rows)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_program(main)
