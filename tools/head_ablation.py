"""The head-count ablation: train a configuration with several numbers of heads, and measure both forms of each.

    python tools/head_ablation.py --config configs/digits_pixels.yaml --num_heads 1 2 4 8 16 --seeds 0 1 2
    python tools/head_ablation.py --config configs/imagenet_taylorvit_tiny.yaml --num_heads 3 6 12 24 --measure_only
    python tools/head_ablation.py --config configs/imagenet_taylorvit_tiny.yaml --num_heads 3 6 12 24 \\
        --launcher "accelerate launch --config_file configs/accelerate/one_node.yaml"

Every number of heads is trained with every seed and attention and evaluated on data.test_split, the checkpoint having been
chosen on the validation split. Then its inference is measured: samples a second and peak memory of the direct and the
efficient form and of fused softmax attention at --batch_size, and samples a second at the best batch size, found by doubling.
Theory stands beside it: operations, stored numbers, N0 and N1.

Writes head_ablation.json, .csv, .md and .png into --out, beside the runs. A finished training or measurement is never made
twice, an interrupted one continues: repeat the command. Heads that do not divide the width are refused before anything runs.
Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.attention import ATTENTIONS
from taylorvit.benchmark.measure import GIB
from taylorvit.cli import need_device, need_matplotlib, positive_float, positive_int, run_program, thread_count
from taylorvit.config import ModelConfig
from taylorvit.config_loading import config_to_dict, load_config
from taylorvit.provenance import provenance
from taylorvit.studies import head_count_report
from taylorvit.studies.head_count import Measuring, check_measured, measure_head_counts, theory
from taylorvit.studies.model_candidates import PRECISIONS
from taylorvit.studies.model_passes import Settings
from taylorvit.studies.options import add_sweep_options, config_arguments, settings_of
from taylorvit.studies.results import summarise, write_results
from taylorvit.studies.sweep import Cell, plan_cells, run_cells

VARIED = ("model.num_heads",)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sweep_options(parser, out="results/head_ablation")
    add = parser.add_argument
    add("--num_heads", type=positive_int, nargs="+", required=True, metavar="H", help="divisors of the width")
    add("--attention", choices=ATTENTIONS, nargs="+", default=["taylorshift", "softmax"], help="which are trained")
    add("--measure_only", action="store_true", help="train nothing")
    add("--batch_size", type=positive_int, default=16, metavar="B", help="stated batch size of speed and memory (default: 16)")
    add("--max_batch_size", type=positive_int, default=256, help="largest one tried for the best (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="of the measurements")
    add("--precision", choices=PRECISIONS, default="no", help="of the measurements; the paper's are fp16 (default: no, fp32)")
    add("--threads", type=thread_count, help="of PyTorch in the measurements (default: its own choice)")
    add("--seconds", type=positive_float, default=2.0, help="time for each measured speed (default: %(default)s)")
    add(
        "--memory_limit_gib",
        type=positive_float,
        default=8.0,
        help="on CPU, what a measurement may take (default: %(default)s)",
    )
    return parser


def build_cells(options: argparse.Namespace) -> list[Cell]:
    """Return a cell for every number of heads, attention and seed; all heads with the first seed come first."""
    return [
        Cell(
            {"attention": attention, "num_heads": num_heads, "seed": seed},
            (*settings_of(options, attention, varied=VARIED), f"--model.num_heads={num_heads}", f"--seed={seed}"),
        )
        for seed in dict.fromkeys(options.seeds)
        for num_heads in dict.fromkeys(options.num_heads)
        for attention in dict.fromkeys(options.attention)
    ]


def measured_model(options: argparse.Namespace) -> ModelConfig:
    """Return the configured model with TaylorShift, whose options are those of the configuration where it has that."""
    return load_config([*config_arguments(options.config), *settings_of(options, "taylorshift", varied=VARIED)])[0].model


def main() -> int:
    """Command line -> trainings and measurements -> tables and picture."""
    options = build_parser().parse_args()
    need_matplotlib()
    need_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    cells = build_cells(options)
    plan_cells(cells, configs=options.config, out=options.out)
    model, counts = measured_model(options), list(dict.fromkeys(options.num_heads))
    settings = Settings(
        device=options.device,
        precision=options.precision,
        seconds=options.seconds,
        memory_limit_bytes=int(options.memory_limit_gib * GIB),
    )
    measuring = Measuring(settings, options.batch_size, options.max_batch_size)
    check_measured(model, counts, measuring, options.out / "measured")
    accuracies: list[dict[str, Any]] = []
    if not options.measure_only:
        results = run_cells(cells, configs=options.config, out=options.out, launcher=options.launcher, jobs=options.jobs)
        accuracies = summarise(results, ("attention", "num_heads"))
    measured = measure_head_counts(model, counts, measuring, options.out / "measured")
    theories = [theory(model, num_heads) for num_heads in counts]
    markdown = head_count_report.report(accuracies, measured, theories, measuring)
    header = {
        "provenance": provenance(),
        "model": config_to_dict(model),
        "measuring": measuring.as_dict(),
        "accuracies": accuracies,
        "theory": theories,
    }
    write_results(options.out, "head_ablation", header, measured, markdown)
    print(f"\n{markdown}\n")
    head_count_report.draw(accuracies, measured, options.batch_size, options.out / "head_ablation.png")
    print(options.out / "head_ablation.png")
    return 0


if __name__ == "__main__":
    run_program(main)
