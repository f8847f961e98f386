"""Time attentions against one another, and read their peak memory.

    python tools/bench_attention.py --num_tokens 197 1025 4097 --head_dim 32 64 --pass forward training --memory

Every candidate's output, and its gradients for `training`, are checked against fp64 in the very case that is timed. One that
is wrong is reported as WRONG without a time, and the exit code is 1. All candidates run in one process in interleaved rounds
on rotating random inputs; the ratio to `sdpa` is the median of the ratios within the rounds, above 1 where the candidate is
faster.

    python tools/bench_attention.py --device cuda --batch_size 16 --limits results/gpu/limits.json --memory

On a GPU every candidate is also timed in a CUDA graph, without the launches from Python. TFLOP/s are those of the matrix
products alone and by that time; "of the limit" is the part of it that the memory's traffic or the matrix products need at the
rates in --limits, a file of tools/gpu_limits.py (taylorvit/benchmark/limits.py has the formulas). q, k and v are bf16 unless
--dtype says otherwise, and strided views of one tensor, as models make them, unless --layout is separate. Under --deterministic
PyTorch's own backward passes add up in a fixed order, as those of this package always do, and some backends refuse.

`training` is the forward pass and the gradients of q, k, v and (TaylorShift) the temperature for a random upstream gradient.
GFLOP/s count the algorithm's operations, not the machine's: 4 N^2 D for softmax, the formulas of taylorvit/complexity for
both forms (packed for the implementations that pack), for training 3.5 times that for softmax and direct, 3 times for
efficient. Peak memory is what was not there before the call, see taylorvit/benchmark/memory.py; on CPU each figure takes a
fresh process.

Writes attention.json, attention.csv (case by case, while it runs) and attention.png into --out. Needs matplotlib
(requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.case import DTYPES, Case, Layout
from taylorvit.benchmark.limits import read_limits
from taylorvit.benchmark.measure import GIB, Settings, measure
from taylorvit.benchmark.peers import Peer, all_peers
from taylorvit.benchmark.report import ResultFiles, draw, markdown_table
from taylorvit.cli import need_device, need_matplotlib, positive_float, positive_int, run_program, thread_count
from taylorvit.provenance import provenance
from taylorvit.suggest import nearest

PASSES = ("forward", "training")
LAYOUTS = get_args(Layout)
ON_CPU = {"dtype": "float32", "layout": "separate", "memory_limit_gib": 8.0}
ON_GPU = {"dtype": "bfloat16", "layout": "packed", "memory_limit_gib": 24.0}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num_tokens", type=positive_int, nargs="+", default=[197, 1025, 4097], metavar="N")
    add("--head_dim", type=positive_int, nargs="+", metavar="D", help="default: 64, or width / num_heads where both are given")
    add("--num_heads", type=positive_int, metavar="H", help="default: width / head_dim")
    add("--width", type=positive_int, metavar="C", help="heads times head dimension (default: 192, unless num_heads is given)")
    add("--batch_size", type=positive_int, default=1, metavar="B")
    add("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    add("--layout", choices=LAYOUTS, help="of q, k, v: views of one tensor, or three (default: separate, on a GPU packed)")
    add("--pass", dest="passes", choices=PASSES, nargs="+", default=["forward"])
    add("--candidates", nargs="+", metavar="NAME", help=f"default: all for the device, of {', '.join(all_peers())}")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=2.0, help="time for each candidate in each case (default: %(default)s)")
    add("--min_rounds", type=positive_int, default=7, help="at least, whatever they take (default: %(default)s)")
    add("--input_sets", type=positive_int, default=8, help="sets of inputs to rotate through (default: %(default)s)")
    add("--memory", action="store_true", help="measure peak memory too")
    add("--memory_limit_gib", type=positive_float, help="skip what needs more by estimate (default: 8, on a GPU 24)")
    add("--limits", type=Path, metavar="FILE", help="rates of this GPU, from gpu_limits.py (default: shares are not measured)")
    add("--deterministic", action="store_true", help="GPU: only algorithms that give the same bits each time")
    add("--seed", type=int, default=0, help="of inputs and order (default: %(default)s)")
    add("--out", type=Path, default=Path("results/attention"), metavar="FOLDER", help="results; an earlier run's are replaced")
    return parser


def build_cases(options: argparse.Namespace) -> list[Case]:
    """Return every combination, in the order in which they are measured.

    Raises:
        ValueError: heads, head dimension and width do not agree.
    """
    return [
        Case(
            options.batch_size,
            num_heads,
            num_tokens,
            head_dim,
            options.dtype,
            pass_name == "training",
            options.device,
            options.layout,
        )
        for num_heads, head_dim in _heads(options.num_heads, options.head_dim, options.width)
        for pass_name in dict.fromkeys(options.passes)
        for num_tokens in sorted(set(options.num_tokens))
    ]


def choose_peers(names: list[str] | None, device: str) -> dict[str, Peer]:
    """Return the attentions to compare; all for the device where none is named.

    Raises:
        ValueError: a name is unknown.
    """
    known = all_peers()
    if names is None:
        return {name: peer for name, peer in known.items() if device in peer.devices}
    for name in names:
        if name not in known:
            raise ValueError(f"--candidates: there is no {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(names)}


def read_options() -> argparse.Namespace:
    """Read the command line; what it leaves out depends on the device.

    Raises:
        ValueError: the GPU that it asks for is missing, or it asks for a GPU's options on a CPU.
    """
    options = build_parser().parse_args()
    for name, value in (ON_GPU if options.device == "cuda" else ON_CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    need_device(options.device)
    if options.device == "cpu" and (options.limits or options.deterministic):
        raise ValueError("--limits and --deterministic belong to a GPU: give --device cuda")
    return options


def make_deterministic() -> None:
    """Let PyTorch add up in a fixed order; what cannot do so only warns, and new memory is not filled, which costs time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def main() -> int:
    """Command line -> rows -> files, tables and picture."""
    options = read_options()
    need_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        make_deterministic()
    limits = read_limits(options.limits, torch.cuda.get_device_name()) if options.limits else None
    cases, peers = build_cases(options), choose_peers(options.candidates, options.device)
    settings = Settings(
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        num_input_sets=options.input_sets,
        memory=options.memory,
        memory_limit_bytes=int(options.memory_limit_gib * GIB),
        threads=torch.get_num_threads(),
        seed=options.seed,
    )
    described = dataclasses.asdict(settings) | {"layout": options.layout, "deterministic": options.deterministic}
    header = {"provenance": provenance(), "settings": described, "limits": dataclasses.asdict(limits) if limits else None}
    files = ResultFiles(options.out, header)
    for case in cases:
        B, H, N, D = case.shape
        print(f"B = {B}, H = {H}, N = {N}, D = {D}, {case.dtype}, {case.pass_name}, {case.device}\n", flush=True)
        rows = measure(case, peers, settings, limits)
        files.add(rows)
        print(f"{markdown_table(rows)}\n", flush=True)
    if draw(files.rows, files.picture):
        print(files.picture)
    print(files.json)
    return 1 if any(row.is_fault for row in files.rows) else 0


def _heads(num_heads: int | None, head_dims: list[int] | None, width: int | None) -> list[tuple[int, int]]:
    """Return (H, D) for every head dimension; what is not given follows from the rest."""
    if num_heads and width and not head_dims:
        if width % num_heads:
            raise ValueError(f"--num_heads {num_heads} does not divide --width {width}")
        return [(num_heads, width // num_heads)]
    head_dims = list(dict.fromkeys(head_dims or [64]))
    if num_heads and not width:
        return [(num_heads, head_dim) for head_dim in head_dims]
    width = width or 192
    for head_dim in head_dims:
        if width % head_dim:
            raise ValueError(f"--head_dim {head_dim} does not divide --width {width}")
        if num_heads and num_heads * head_dim != width:
            raise ValueError(f"--num_heads {num_heads} times --head_dim {head_dim} is not --width {width}")
    return [(width // head_dim, head_dim) for head_dim in head_dims]


if __name__ == "__main__":
    run_program(main)
