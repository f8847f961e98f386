"""The paper's table: every system trained on every task under one budget, with its cost, beside what is published.

    python tools/compare.py train --tasks cifar10_pixels imdb_bytes --seeds 0 1 2 --launcher "accelerate launch"
    python tools/compare.py train --tasks fashion_mnist_pixels --set schedule.epochs=1 --jobs 2
    python tools/compare.py cost --passes inference training --batch_size 8
    python tools/compare.py report

A task is a file of configs/, a system a small one laid over it: configs/attentions/NAME.yaml, or NAME_sequence.yaml on
sequences where there is one; train.py takes them as well. `train` judges every training on data.test_split, the checkpoint
having been chosen on the validation split. `cost` times the systems' passes in interleaved rounds in one process, none before
its output was checked, reads their peak memory, and counts parameters and FLOPs. `report` writes compare.md, .csv and .json:
ours beside the published figures, which are marked as such, with their caveats.

A finished training or measurement is never made twice, an interrupted one continues: repeat the command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.measure import GIB
from taylorvit.cli import need_device, positive_float, positive_int, run_program, thread_count
from taylorvit.studies import comparison, comparison_report
from taylorvit.studies.comparison import build_cells, candidates_of, find_task, measure_costs
from taylorvit.studies.model_candidates import PRECISIONS
from taylorvit.studies.model_passes import Settings
from taylorvit.studies.options import add_sweep_options
from taylorvit.studies.published import SYSTEMS, TASKS
from taylorvit.studies.results import make_folder, write_results
from taylorvit.studies.sweep import plan_cells, run_cells

OUT = "results/compare"
PASSES = ("inference", "training")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and judge what has no result yet")
    add_sweep_options(train, out=OUT, config_required=False)
    cost = commands.add_parser("cost", help="time, memory, parameters and FLOPs of all systems side by side")
    report = commands.add_parser("report", help="write the table of what there is")
    report.add_argument("--out", type=Path, default=Path(OUT), metavar="FOLDER", help="of the comparison")
    _add_cost_options(cost)
    for command in (train, cost):
        add = command.add_argument
        add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="files of configs/, or paths; default: the paper's")
        add("--systems", nargs="+", choices=tuple(SYSTEMS), default=list(SYSTEMS), help="default: all")
    return parser


def _add_cost_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, nargs="+", metavar="FILE", help="laid over every task; later files win")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings on top, such as model.max_length=512")
    add("--passes", choices=PASSES, nargs="+", default=["inference"], help="default: inference")
    add("--batch_size", type=positive_int, default=1, help="samples in a pass (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=PRECISIONS, default="no", help="default: no, fp32")
    add("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=2.0, help="time for each system (default: %(default)s)")
    add("--min_rounds", type=positive_int, default=5, help="at least, whatever they take (default: %(default)s)")
    add("--no_memory", action="store_true", help="leave the peak memory out")
    add("--memory_limit_gib", type=positive_float, default=8.0, help="on CPU, for a measurement (default: %(default)s)")
    add("--out", type=Path, default=Path(OUT), metavar="FOLDER", help="of the comparison; one there is continued")


def train(options: argparse.Namespace) -> None:
    """Check the trainings of every task, then run those without a result."""
    layers = options.config or []
    grids = {
        task: build_cells(task, options.systems, options.seeds, layers, options.set)
        for task in dict.fromkeys(map(find_task, options.tasks))
    }
    for task, cells in grids.items():
        plan_cells(cells, configs=[task], out=options.out / task.stem)
    for task, cells in grids.items():
        run_cells(cells, configs=[task], out=options.out / task.stem, launcher=options.launcher, jobs=options.jobs)


def cost(options: argparse.Namespace) -> None:
    """Measure every task and pass that has no file yet."""
    need_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        device=options.device,
        precision=options.precision,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        memory_limit_bytes=int(options.memory_limit_gib * GIB),
    )
    tasks = dict.fromkeys(map(find_task, options.tasks))
    models = {task: candidates_of(task, options.systems, options.config or [], options.set) for task in tasks}
    folder = options.out / "cost"
    make_folder(folder)
    for pass_name in options.passes:
        for task, candidates in models.items():
            measure_costs(
                candidates,
                options.batch_size,
                folder / f"{task.stem}_{pass_name}.json",
                training=pass_name == "training",
                memory=not options.no_memory,
                settings=settings,
            )


def report(folder: Path) -> None:
    """Write the table of every training and measurement in the folder, and print it.

    Raises:
        ValueError: there is none, or one is not what it should be.
    """
    studies = sorted(path.parent for path in folder.glob("*/cells"))
    trained = {study.name: results for study in studies if (results := comparison.read_results(study))}
    costs = comparison.read_costs(folder / "cost")
    if not trained and not costs:
        raise ValueError(f"--out {folder}: there is neither a finished training nor a measurement")
    rows = comparison_report.table_rows(trained, costs)
    markdown = comparison_report.report(rows, trained, costs)
    write_results(folder, "compare", comparison_report.header(trained, costs), rows, markdown)
    print(f"{markdown}\n\n{folder / 'compare.md'}")


def main() -> int:
    """Command line -> trainings, measurements or the table."""
    options = build_parser().parse_args()
    if options.command == "train":
        train(options)
    elif options.command == "cost":
        cost(options)
    else:
        report(options.out)
    return 0


if __name__ == "__main__":
    run_program(main)
