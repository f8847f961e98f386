"""Measure whole models side by side: samples a second and peak memory, over image sizes and batch sizes.

    python tools/bench_model.py --img_size 224 384 512 1024 --pass inference training
    python tools/bench_model.py --model taylorvit_tiny_patch16_224 --attention taylorshift softmax softmax_unfused --memory
    python tools/bench_model.py --config configs/imagenet_taylorvit_tiny.yaml configs/imagenet_softmax_tiny.yaml --memory

`inference` is the forward pass without gradients, `training` the forward pass, the loss and the backward pass; the optimizer's
step, the same for all, is not in it. All candidates that take the same inputs run in one process in interleaved rounds on
rotating random inputs; the ratio is the median of the ratios within the rounds, above 1 where the candidate is faster than the
last attention of its model, or, with one attention, than the last model. Before TaylorShift is timed, its logits are compared
with those of the plain PyTorch reference with the same weights; a wrong one gets no time, and the exit code is 1.

    python tools/bench_model.py --device cuda --batch_size 64 --pass inference training --mode cuda_graph --memory

Attentions: `taylorshift` (the faster form), `taylorshift_direct`, `taylorshift_efficient`, `softmax` (fused), `softmax_unfused`
(forms the N x N matrix), `softmax_cudnn`, `softmax_flash` and `softmax_efficient` (fused, by that backend instead of PyTorch's
own choice), `config` (the model's own). The modes are explained in taylorvit/studies/model_passes.py. On a GPU the precision is
bf16 unless --precision says otherwise. Batch size `best` doubles from 1 until that gives no 2 % more samples a
second or memory runs out. What does not fit is a row marked "out of memory"; a CPU's limit is --memory_limit_gib beyond what
the process holds before. What peak memory counts is said in taylorvit/studies/model_cost.py.

Writes model.json, model.csv, model.md and model.png into --out, case by case while it runs. Needs matplotlib
(requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.measure import GIB
from taylorvit.cli import need_device, need_matplotlib, positive_float, positive_int, run_program, thread_count
from taylorvit.config import ModelConfig
from taylorvit.config_loading import load_config
from taylorvit.models import SEQUENCE_NAMES, random_inputs
from taylorvit.provenance import provenance
from taylorvit.studies.model_candidates import PRECISIONS, VARIANTS, Candidate, Verdict, source_name
from taylorvit.studies.model_cost import Row, best_batch_size, enter_memory, measure_speed, verify
from taylorvit.studies.model_passes import Mode, Settings
from taylorvit.studies.model_report import ResultFiles, markdown_table
from taylorvit.suggest import nearest

PASSES = ("inference", "training")
DEFAULT_MODEL = "taylorvit_small_patch16_224"
BEST = "best"


def batch_size(text: str) -> int | str:
    """Read a whole number above 0, or "best"."""
    if text == BEST:
        return BEST
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or {BEST!r}") from error


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", nargs="+", metavar="NAME", help=f"models by name (default: {DEFAULT_MODEL})")
    models.add_argument("--config", nargs="+", metavar="FILE", help="YAML files whose model section is measured")
    add = parser.add_argument
    add("--attention", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS)} (default: taylorshift softmax; config)")
    add("--img_size", type=positive_int, nargs="+", metavar="PIXELS", help="default: the models' own")
    add("--num_heads", type=positive_int, metavar="H", help="default: the models' own")
    add("--batch_size", type=batch_size, nargs="+", default=[1], metavar="B", help="sizes, or best (default: 1)")
    add("--max_batch_size", type=positive_int, default=1024, metavar="B", help="limit of best (default: %(default)s)")
    add("--pass", dest="passes", choices=PASSES, nargs="+", default=["inference"])
    add("--precision", choices=PRECISIONS, help="no is fp32, the others are autocast (default: no, on a GPU bf16)")
    add("--mode", choices=get_args(Mode), default="eager", help="how a pass is run (default: %(default)s)")
    add("--memory", action="store_true", help="measure peak memory too; on CPU it takes a fresh process a row")
    add("--memory_limit_gib", type=positive_float, default=8.0, help="CPU: what needs more is out of memory (default: 8)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=5.0, help="time for each candidate in each case (default: %(default)s)")
    add("--min_rounds", type=positive_int, default=5, help="at least, whatever they take (default: %(default)s)")
    add("--out", type=Path, default=Path("results/model"), metavar="FOLDER", help="an earlier run's result is replaced")
    return parser


def load_models(options: argparse.Namespace) -> dict[str, ModelConfig]:
    """Return the models to measure by what they are called: the file's stem, or the model's name.

    Raises:
        ValueError: a file cannot be read or holds something unknown, or two have one name.
    """
    if not options.config:
        if options.model and (sequence := set(options.model) & set(SEQUENCE_NAMES)):
            names = ", ".join(sorted(sequence))
            raise ValueError(f"--model {names}: give a sequence model as --config, with its vocab_size and max_length")
        return {name: ModelConfig(name=name) for name in options.model or [DEFAULT_MODEL]}
    models: dict[str, ModelConfig] = {}
    for file in dict.fromkeys(options.config):
        name = Path(file).stem
        if name in models:
            raise ValueError(f"--config {file}: another file is called {name!r} too; their results would have one name")
        models[name] = load_config(["--config", file])[0].model
    return models


def build_candidates(models: dict[str, ModelConfig], options: argparse.Namespace) -> list[Candidate]:
    """Return every model with every attention, at its own image size; the name is the model's and the attention's.

    A single model is left out of the names, and so is the attention "config".

    Raises:
        ValueError: an attention is unknown.
    """
    attentions = dict.fromkeys(options.attention or (["config"] if options.config else ["taylorshift", "softmax"]))
    for attention in attentions:
        if attention not in VARIANTS:
            raise ValueError(
                f"--attention: there is no {attention!r}{nearest(attention, VARIANTS)}; known: {', '.join(VARIANTS)}"
            )
    candidates = []
    for source, model in models.items():
        if options.num_heads:
            model = dataclasses.replace(model, num_heads=options.num_heads)
        for attention in attentions:
            prefix = [source] if len(models) > 1 or attention == "config" or options.config else []
            name = " ".join([*prefix, *([attention] if attention != "config" else [])])
            candidates.append(Candidate(name, model, attention))
    return candidates


def group_by_inputs(candidates: list[Candidate], img_sizes: list[int] | None) -> list[list[Candidate]]:
    """Return the groups that are timed together, one for each kind of input; every model is built on the meta device.

    Raises:
        ValueError: a model cannot be built, or not with this image size.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        for img_size in dict.fromkeys(img_sizes or [candidate.model.img_size]):
            sized = dataclasses.replace(candidate, model=dataclasses.replace(candidate.model, img_size=img_size))
            sized.build("meta")
            inputs = random_inputs(sized.config, 1, device="meta")
            groups.setdefault(f"{tuple(inputs.shape)} {inputs.dtype}", []).append(sized)
    return list(groups.values())


def choose_baselines(candidates: list[Candidate]) -> dict[str, str]:
    """Return whom to compare each candidate with: the last attention of its model; with one attention, the last model."""
    if len({candidate.attention for candidate in candidates}) == 1:
        return {candidate.name: candidates[-1].name for candidate in candidates}
    models = {candidate.name: source_name(candidate.name, candidate.attention) for candidate in candidates}
    last = {model: name for name, model in models.items()}
    return {name: last[model] for name, model in models.items()}


def measure_case(
    candidates: list[Candidate],
    size: int | str,
    verdicts: dict[str, Verdict],
    settings: Settings,
    *,
    training: bool,
    memory: bool,
    most: int,
) -> list[Row]:
    """Return the rows of one pass at one batch size, or at each candidate's best, which is `most` at most."""
    sizes = {candidate.name: size if isinstance(size, int) else 1 for candidate in candidates}
    reasons: dict[str, str] = {}
    for candidate in candidates:
        if size == BEST and verdicts[candidate.name].passed:
            found = best_batch_size(candidate, training=training, settings=settings, most=most)
            sizes[candidate.name] = found.batch_size or 1
            reasons[candidate.name] = f"best batch: {found.reason}"
    baselines = choose_baselines(candidates)
    rows = measure_speed(candidates, sizes, training=training, settings=settings, baselines=baselines, verdicts=verdicts)
    for row, candidate in zip(rows, candidates):
        row.best_batch = size == BEST
        row.note = "; ".join(filter(None, [row.note, reasons.get(row.candidate, "")]))
        if memory:
            enter_memory(row, candidate, settings)
    return rows


def check_machine(options: argparse.Namespace) -> None:
    """Raise ValueError for a GPU or a package that is asked for and not there."""
    need_device(options.device)
    if options.device == "cpu" and options.mode == "cuda_graph":
        raise ValueError("--mode cuda_graph needs a GPU: give --device cuda")
    need_matplotlib()


def main() -> int:
    """Command line -> rows -> files, tables and picture."""
    options = build_parser().parse_args()
    check_machine(options)
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "no")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        device=options.device,
        precision=options.precision,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        memory_limit_bytes=int(options.memory_limit_gib * GIB),
        mode=options.mode,
    )
    groups = group_by_inputs(build_candidates(load_models(options), options), options.img_size)
    files = ResultFiles(options.out, {"provenance": provenance(), "settings": dataclasses.asdict(settings)})
    for candidates in groups:
        verdicts = {candidate.name: verify(candidate, settings) for candidate in candidates}
        for pass_name in dict.fromkeys(options.passes):
            for size in dict.fromkeys(options.batch_size):
                rows = measure_case(
                    candidates,
                    size,
                    verdicts,
                    settings,
                    training=pass_name == "training",
                    memory=options.memory,
                    most=options.max_batch_size,
                )
                files.add(rows)
                print(f"{markdown_table(rows)}\n", flush=True)
    print(*files.written(), sep="\n")
    return 1 if any(row.is_fault for row in files.rows) else 0


if __name__ == "__main__":
    run_program(main)
