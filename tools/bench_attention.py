"""Time attentions against one another, and read their peak memory.

    python tools/bench_attention.py --num_tokens 197 1025 4097 --head_dim 32 64 --pass forward training --memory

Every candidate's output, and its gradients for `training`, are checked against fp64 in the very case that is timed. One that
is wrong is reported as WRONG without a time, and the exit code is 1. All candidates run in one process in interleaved rounds
on rotating random inputs; the ratio to `sdpa` is the median of the ratios within the rounds, above 1 where the candidate is
faster.

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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.case import DTYPES, Case
from taylorvit.benchmark.measure import GIB, Settings, measure
from taylorvit.benchmark.peers import Peer, all_peers
from taylorvit.benchmark.report import ResultFiles, draw, markdown_table
from taylorvit.cli import need_matplotlib, positive_float, positive_int, run_program, thread_count
from taylorvit.provenance import provenance
from taylorvit.suggest import nearest

PASSES = ("forward", "training")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num_tokens", type=positive_int, nargs="+", default=[197, 1025, 4097], metavar="N")
    add("--head_dim", type=positive_int, nargs="+", metavar="D", help="default: 64, or width / num_heads where both are given")
    add("--num_heads", type=positive_int, metavar="H", help="default: width / head_dim")
    add("--width", type=positive_int, metavar="C", help="heads times head dimension (default: 192, unless num_heads is given)")
    add("--batch_size", type=positive_int, default=1, metavar="B")
    add("--dtype", choices=DTYPES, default="float32")
    add("--pass", dest="passes", choices=PASSES, nargs="+", default=["forward"])
    add("--candidates", nargs="+", metavar="NAME", help=f"default: all for the device, of {', '.join(all_peers())}")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=2.0, help="time for each candidate in each case (default: %(default)s)")
    add("--min_rounds", type=positive_int, default=7, help="at least, whatever they take (default: %(default)s)")
    add("--input_sets", type=positive_int, default=8, help="sets of inputs to rotate through (default: %(default)s)")
    add("--memory", action="store_true", help="measure peak memory too")
    add("--memory_limit_gib", type=positive_float, default=8.0, help="skip what needs more by estimate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of inputs and order (default: %(default)s)")
    add("--out", type=Path, default=Path("results/attention"), metavar="FOLDER", help="results; an earlier run's are replaced")
    return parser


def build_cases(options: argparse.Namespace) -> list[Case]:
    """Return every combination, in the order in which they are measured.

    Raises:
        ValueError: heads, head dimension and width do not agree.
    """
    return [
        Case(options.batch_size, num_heads, num_tokens, head_dim, options.dtype, pass_name == "training", options.device)
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


def main() -> int:
    """Command line -> rows -> files, tables and picture."""
    options = build_parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    need_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
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
    files = ResultFiles(options.out, {"provenance": provenance(), "settings": dataclasses.asdict(settings)})
    for case in cases:
        B, H, N, D = case.shape
        print(f"B = {B}, H = {H}, N = {N}, D = {D}, {case.dtype}, {case.pass_name}, {case.device}\n", flush=True)
        rows = measure(case, peers, settings)
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
