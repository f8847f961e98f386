"""Measure where the efficient form overtakes the direct one, and write the table that form="auto" decides by.

    python tools/calibrate.py --impl cpu
    python tools/calibrate.py --impl cpu --head_dim 64 --pass forward --out crossovers.json

For every head dimension and pass the two forms are timed against each other at token counts that close in on the crossing.
Near it both are equally fast, so a few percent of noise move it by a few percent and cost nothing. The heads fill --width, and
the images of a batch hold --batch_tokens tokens together, as many small images are what is met in practice. Both forms are
checked against fp64 where the search begins, before anything is timed, and at the crossing, before it is written.

    python tools/calibrate.py --device cuda --seconds 0.2

On a GPU the forms are timed in CUDA graphs, as the device's own time is what counts in a model that keeps it busy; inputs are
views of one tensor, as models make them, and enough to fill it: 65,536 tokens of width 384 are thousands of programs.

The implementation's entry in the file is replaced as a whole, crossing by crossing while the program runs; those of other
implementations stay.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.case import DTYPES, Case, Layout
from taylorvit.benchmark.check import check
from taylorvit.benchmark.crossing import find_crossing
from taylorvit.benchmark.peers import Peer, all_peers
from taylorvit.benchmark.timing import capture_graph, compare
from taylorvit.cli import need_device, positive_float, positive_int, run_program, thread_count
from taylorvit.complexity import flops_crossover
from taylorvit.ops import FASTEST, IMPLEMENTATIONS
from taylorvit.ops.form_table import PATH
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file

PASSES = ("forward", "training")
HEAD_DIMS = (8, 16, 24, 32, 48, 64, 80, 96, 128)
FEWEST, MOST = 16, 65536  # tokens
ON_CPU = {"width": 192, "batch_tokens": 8192, "dtype": "float32", "layout": "separate"}
ON_GPU = {"width": 384, "batch_tokens": 65536, "dtype": "bfloat16", "layout": "packed"}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    known = [name for name, forms in IMPLEMENTATIONS.items() if len(forms) == 2]
    add("--impl", choices=known, help="default: what the operation takes on the device")
    add("--head_dim", type=positive_int, nargs="+", default=HEAD_DIMS, metavar="D")
    add("--pass", dest="passes", choices=PASSES, nargs="+", default=PASSES)
    add("--width", type=positive_int, metavar="C", help="heads times head dimension (default: 192, on a GPU 384)")
    add("--batch_tokens", type=positive_int, help="images x tokens, at least one image (default: 8192, on a GPU 65536)")
    add("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    add("--layout", choices=get_args(Layout), help="of q, k, v, see bench_attention.py (default: separate, on a GPU packed)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=1.0, help="time for each form at each token count (default: %(default)s)")
    add(
        "--tolerance",
        type=positive_float,
        default=0.05,
        help="stop where the crossing is known to this part of it (default: %(default)s)",
    )
    add("--out", type=Path, default=PATH, metavar="FILE", help="default: the table of the package")
    return parser


def measure_crossing(peers: tuple[Peer, Peer], head_dim: int, training: bool, options: argparse.Namespace) -> int | None:
    """Return the token count up to which direct is to be taken, or None if efficient was never ahead.

    Raises:
        RuntimeError: a form is wrong there.
    """

    def case(num_tokens: int) -> Case:
        batch_size, num_heads = max(1, options.batch_tokens // num_tokens), max(1, options.width // head_dim)
        return Case(batch_size, num_heads, num_tokens, head_dim, options.dtype, training, options.device, options.layout)

    def speedups(num_tokens: int) -> list[float]:
        here = case(num_tokens)
        calls = {peer.name: here.bind(peer.build(), peer.truth) for peer in peers}
        direct, efficient = calls
        capture = capture_graph if options.device == "cuda" else None
        comparison = compare(calls, here.make_inputs, seconds=options.seconds, capture=capture)
        print(f"  N = {num_tokens}: efficient is {comparison.speedup(efficient, direct).median:.2f} times as fast", flush=True)
        return [theirs / ours for ours, theirs in zip(comparison.rounds[efficient], comparison.rounds[direct])]

    def refuse_wrong_results(num_tokens: int) -> None:
        here = case(num_tokens)
        for peer in peers:
            verdict = check(here.bind(peer.build(), peer.truth), peer.truth, here)
            if not verdict.passed:
                raise RuntimeError(f"{peer.name} is wrong at {here}: {verdict}")

    guess = flops_crossover(head_dim, "circulant")
    refuse_wrong_results(round(guess))
    crossing = find_crossing(speedups, guess, tolerance=options.tolerance, fewest=FEWEST, most=MOST)
    if crossing.winner == "incumbent":
        return None
    num_tokens = round(crossing.num_tokens or FEWEST)  # efficient is ahead at all token counts, from the fewest on
    refuse_wrong_results(num_tokens)
    if crossing.interval:
        print(f"  95 % interval: {crossing.interval[0]:.0f} to {crossing.interval[1]:.0f}", flush=True)
    return num_tokens


def read_table(path: Path) -> dict[str, Any]:
    """Return the file's content, {} if there is none.

    Raises:
        ValueError: it is not such a table, or it cannot be written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"the folder {path.parent} is missing or cannot be written")
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {path} cannot be used: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--out {path} cannot be used: it is not a table of crossings")
    return content


def read_options() -> argparse.Namespace:
    """Read the command line; what it leaves out depends on the device.

    Raises:
        ValueError: the GPU that it asks for is missing.
    """
    options = build_parser().parse_args()
    for name, value in (ON_GPU if options.device == "cuda" else ON_CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.impl = options.impl or FASTEST[options.device]
    need_device(options.device)
    return options


def main() -> int:
    """Command line -> crossings -> table."""
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    known = all_peers()
    peers = known[f"taylor_direct_{options.impl}"], known[f"taylor_efficient_{options.impl}"]
    if options.device not in peers[0].devices:
        raise ValueError(f"--impl {options.impl} does not run on --device {options.device}")
    table = read_table(options.out)
    kept = ("width", "batch_tokens", "dtype", "layout", "device", "seconds", "tolerance")
    settings = {key: getattr(options, key) for key in kept}
    crossovers: dict[str, dict[str, int | None]] = {}
    table[options.impl] = {"crossovers": crossovers, "provenance": provenance(), "settings": settings}
    for pass_name in options.passes:
        for head_dim in sorted(options.head_dim):
            print(f"{pass_name}, D = {head_dim}", flush=True)
            crossing = measure_crossing(peers, head_dim, pass_name == "training", options)
            n0, packed = flops_crossover(head_dim), flops_crossover(head_dim, "circulant")
            print(f"  -> {crossing or f'not up to {MOST}'} (N0 {n0:.0f}, packed {packed:.0f})", flush=True)
            crossovers.setdefault(pass_name, {})[str(head_dim)] = crossing
            replace_file(options.out, json.dumps(table, indent=2) + "\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    run_program(main)
