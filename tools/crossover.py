"""Measure from how many tokens on the efficient form is ahead, in time and in memory, beside the paper's N0 and N1.

    python tools/crossover.py --impl cpu paper --pass forward training
    python tools/crossover.py --impl paper --quantity memory --head_dim 16 --rival direct

The efficient form runs against the direct one, against fused softmax (sdpa) and against unfused softmax (sdpa_math). For every
head dimension and pass the crossing is searched by doubling and bisection over the tokens, see taylorvit/benchmark/crossing.py;
for time with a 95 % interval, while memory has no scatter. Both candidates of a search are checked against fp64 where it begins
and at the crossing. A wrong one is reported as WRONG without a figure, and the exit code is 1.

By default the heads fill a width of 64, or of the head dimension where that is larger, and a batch holds 4,096 tokens but at
least one image: the work grows with the tokens only as far as the form makes it. `training` is forward and backward.

Memory is the peak of one call beyond its inputs. On a GPU the allocator tells it; on a CPU each figure comes from a process of
its own, forked from one that has imported everything, as importing would take most of the time. Token counts that need more
than --memory_limit_gib by estimate are not tried: the search ends there and says so.

Writes crossover.json, crossover.csv and crossover.md search by search, and crossover.png at the end, also of an interruption,
into --out. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark import memory
from taylorvit.benchmark.case import DTYPES, Case
from taylorvit.benchmark.check import check
from taylorvit.benchmark.crossing import OutOfReach, find_crossing
from taylorvit.benchmark.crossing_report import RIVALS, Row, draw, markdown_table
from taylorvit.benchmark.measure import GIB
from taylorvit.benchmark.peers import Peer, all_peers, prepare_call
from taylorvit.benchmark.timing import CandidateError, compare
from taylorvit.cli import need_device, need_matplotlib, one_line, positive_float, positive_int, run_program, thread_count
from taylorvit.ops import IMPLEMENTATIONS
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file

PASSES = ("forward", "training")
QUANTITIES = ("time", "memory")
IMPLS = ("paper", *(name for name, forms in IMPLEMENTATIONS.items() if len(forms) == 2))
FEWEST = 8  # tokens
WIDTH, BATCH_TOKENS = 64, 4096
INPUT_SETS = 4
MAX_TRUTH_BYTES = 2**24  # the check compares 64 queries where all would take more
FIELDS = [field.name for field in dataclasses.fields(Row) if field.name != "points"]


class WrongResult(RuntimeError):
    """A candidate's result is outside of its error budget."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--head_dim", type=positive_int, nargs="+", default=[8, 16, 32, 64], metavar="D", help="default: 8 16 32 64")
    add("--pass", dest="passes", choices=PASSES, nargs="+", default=["forward"])
    add("--impl", choices=IMPLS, nargs="+", default=["cpu"], help="of the efficient form, and of the direct one")
    add("--rival", choices=RIVALS, nargs="+", default=list(RIVALS))
    add("--quantity", choices=QUANTITIES, nargs="+", default=list(QUANTITIES))
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--num_heads", type=positive_int, metavar="H", help="default: width / head_dim")
    heads.add_argument("--width", type=positive_int, metavar="C", help=f"default: {WIDTH}, at least the head dimension")
    add("--batch_size", type=positive_int, metavar="B", help=f"default: what holds {BATCH_TOKENS} tokens, at least 1")
    add("--max_tokens", type=positive_int, default=8192, metavar="N", help="end of every search (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=0.1, help="time for each candidate at each point (default: %(default)s)")
    add("--min_rounds", type=positive_int, default=5, help="at least, whatever they take (default: %(default)s)")
    add("--tolerance", type=positive_float, default=0.1, help="of the last bracket of a search (default: %(default)s)")
    add("--memory_limit_gib", type=positive_float, default=4.0, help="do not try what needs more (default: %(default)s)")
    add("--out", type=Path, default=Path("results/crossover"), metavar="FOLDER", help="results; an earlier run's are replaced")
    return parser


def plan(options: argparse.Namespace) -> list[Row]:
    """Return an empty row for every search, in the order in which they are made.

    Raises:
        ValueError: a head dimension does not divide the width, or the searches have no room.
    """
    if options.max_tokens < FEWEST:
        raise ValueError(f"--max_tokens {options.max_tokens} is less than the {FEWEST} that searches go down to")
    head_dims = sorted(set(options.head_dim))
    for head_dim in head_dims:
        if options.width and options.width % head_dim:
            raise ValueError(f"--head_dim {head_dim} does not divide --width {options.width}")
        if not options.num_heads and not options.width and max(WIDTH, head_dim) % head_dim:
            raise ValueError(f"--head_dim {head_dim} does not divide a width of {WIDTH}: give --width or --num_heads")
    return [
        Row(
            quantity, impl, rival, pass_name, head_dim, options.num_heads or (options.width or max(WIDTH, head_dim)) // head_dim
        )
        for quantity in dict.fromkeys(options.quantity)
        for impl in dict.fromkeys(options.impl)
        for pass_name in dict.fromkeys(options.passes)
        for head_dim in head_dims
        for rival in dict.fromkeys(options.rival)
    ]


def choose_peers(row: Row) -> tuple[Peer, Peer]:
    """Return the efficient form and its rival."""
    family = "paper_{}" if row.impl == "paper" else f"taylor_{{}}_{row.impl}"
    rival = family.format("direct") if row.rival == "direct" else row.rival
    return all_peers()[family.format("efficient")], all_peers()[rival]


class Race:
    """The two candidates of one search, measured against one another at any token count."""

    def __init__(self, row: Row, options: argparse.Namespace) -> None:
        self.row, self.options = row, options
        self.peers = choose_peers(row)
        self.checked = False

    def case(self, num_tokens: int) -> Case:
        """Return the case of so many tokens."""
        row, options = self.row, self.options
        batch_size = options.batch_size or max(1, BATCH_TOKENS // num_tokens)
        return Case(
            batch_size, row.num_heads, num_tokens, row.head_dim, options.dtype, row.pass_name == "training", options.device
        )

    def measure(self, num_tokens: int) -> list[float]:
        """Return the rival's cost over the efficient form's, once a round; the first call checks the candidates before.

        Raises:
            OutOfReach: memory would not do, or did not.
            WrongResult: a candidate is wrong.
        """
        case = self.case(num_tokens)
        if max(peer.needed_bytes(case) for peer in self.peers) > self.options.memory_limit_gib * GIB:
            raise OutOfReach
        with memory_ends():
            if not self.checked:
                self.check(num_tokens)
            ratios = self.time_ratios(case) if self.row.quantity == "time" else [self.memory_ratio(case)]
        times = statistics.median(ratios)
        print(f"  N = {num_tokens}: {self.peers[1].name} takes {times:.3g} times the {self.row.quantity}", flush=True)
        return ratios

    def check(self, num_tokens: int) -> None:
        """Refuse a candidate that is wrong at this token count."""
        for peer in self.peers:
            refuse_wrong_result(peer.name, self.case(num_tokens))
        self.checked = True

    def time_ratios(self, case: Case) -> list[float]:
        """Return the rival's time over the efficient form's in every round."""
        calls = {peer.name: case.bind(peer.build(), peer.truth) for peer in self.peers}
        seconds, least = self.options.seconds, self.options.min_rounds
        rounds = compare(calls, case.make_inputs, seconds=seconds, min_rounds=least, num_input_sets=INPUT_SETS).rounds
        ours, theirs = (rounds[peer.name] for peer in self.peers)
        return [rival / own for own, rival in zip(ours, theirs)]

    def memory_ratio(self, case: Case) -> float:
        """Return the rival's peak over the efficient form's; what is too little to be told counts as the least that can be."""
        own, rival = (max(peak_bytes(peer.name, case), memory.RESOLUTION) for peer in self.peers)
        return rival / own


@cache
def refuse_wrong_result(name: str, case: Case) -> None:
    """Check a candidate, once for all searches that meet in a case.

    Raises:
        WrongResult: it is wrong.
    """
    peer = all_peers()[name]
    verdict = check(case.bind(peer.build(), peer.truth), peer.truth, case, max_truth_bytes=MAX_TRUTH_BYTES)
    if not verdict.passed:
        raise WrongResult(f"{name} at {case.num_tokens} tokens: {verdict}")


@cache
def peak_bytes(name: str, case: Case) -> int:
    """Return the peak extra memory of one call, measured once for all searches that meet in a case.

    Raises:
        MemoryError: there was not enough.
    """
    if case.device == "cuda":
        peer = all_peers()[name]
        return memory.peak_bytes_on_gpu(partial(case.bind(peer.build(), peer.truth), *case.make_inputs(0)))
    target = f"{prepare_call.__module__}:{prepare_call.__name__}"
    arguments = {"name": name, "case": case.as_dict()}
    request = json.dumps({"target": target, "arguments": arguments, "threads": torch.get_num_threads()})
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as process:
            answer = process.submit(answer_request, request).result()
    except BrokenProcessPool as error:  # the kernel ends a process that takes more than there is
        raise MemoryError from error
    if answer == "out of memory":
        raise MemoryError
    return int(answer)


def answer_request(request: str) -> str:
    """Return what `memory.main` prints last; runs in a process of its own."""
    sys.stdin, output = io.StringIO(request), io.StringIO()
    with contextlib.redirect_stdout(output):
        memory.main()
    return output.getvalue().strip().splitlines()[-1]


def start_fork_server() -> None:
    """Start the process whose forks measure memory, with the allocator's settings that `memory` explains."""
    before = dict(os.environ)
    os.environ.update(memory.MALLOC, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    multiprocessing.set_forkserver_preload([prepare_call.__module__])
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


@contextlib.contextmanager
def memory_ends() -> Iterator[None]:
    """Turn running out of memory into the end of a search."""
    try:
        yield
    except (CandidateError, MemoryError, RuntimeError) as error:
        if memory.is_out_of_memory(error.cause if isinstance(error, CandidateError) else error):
            raise OutOfReach from error
        raise


def search(row: Row, guess: float, options: argparse.Namespace) -> None:
    """Find the crossing and enter it into the row, or what kept it from being found."""
    race = Race(row, options)
    obstacles = [f"{peer.name}: {obstacle}" for peer in race.peers if (obstacle := peer.obstacle(race.case(FEWEST)))]
    if obstacles:
        row.status, row.note = "cannot run", obstacles[0]
        return
    try:
        crossing = find_crossing(race.measure, guess, tolerance=options.tolerance, fewest=FEWEST, most=options.max_tokens)
        if crossing.num_tokens:
            race.check(round(crossing.num_tokens))
        row.enter(crossing)
    except WrongResult as error:
        row.status, row.note = "wrong", str(error)
    except RuntimeError as error:
        row.status, row.note = "failed", one_line(error)


class ResultFiles:
    """crossover.json, .csv, .md and .png in one folder, which is made; an earlier run's are replaced."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self.header, self.rows = folder, header, list[Row]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path("png").unlink(missing_ok=True)
            self.write()
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error

    def path(self, ending: str) -> Path:
        """Return one of the files' paths."""
        return self.folder / f"crossover.{ending}"

    def write(self) -> None:
        """Replace JSON, CSV and Markdown by what is there."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        table = io.StringIO()
        writer = csv.DictWriter(table, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.path("json"), json.dumps({**self.header, "rows": rows}, indent=1, allow_nan=False) + "\n")
        replace_file(self.path("csv"), table.getvalue())
        replace_file(self.path("md"), markdown_table(self.rows) + "\n")


def prepare(options: argparse.Namespace) -> None:
    """Set threads and start the fork server.

    Raises:
        ValueError: something that is needed is missing here.
    """
    need_device(options.device)
    need_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu" and "memory" in options.quantity:
        if not memory.can_measure_on_cpu():
            raise ValueError("--quantity memory: this system does not tell the peak of resident memory")
        start_fork_server()


def main() -> int:
    """Command line -> searches -> files, table and picture."""
    options = build_parser().parse_args()
    rows = plan(options)
    prepare(options)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    files = ResultFiles(options.out, {"provenance": provenance(), "settings": settings})
    scales: dict[tuple[str, ...], float] = {}  # the last crossing over theory: where to begin at the next head dimension
    try:
        for row in rows:
            print(f"{row.quantity}, {row.impl}, {row.pass_name}, D = {row.head_dim}: efficient against {row.rival}", flush=True)
            key = (row.quantity, row.impl, row.pass_name, row.rival)
            search(row, scales.get(key, 1.0) * row.n_paper, options)
            if row.num_tokens:
                scales[key] = row.num_tokens / row.n_paper
            print(f"  -> {row}", flush=True)
            files.rows.append(row)
            files.write()
    finally:
        if files.rows:
            draw(files.rows, files.path("png"))
    print(f"\n{markdown_table(files.rows)}\n\n{files.path('png')}\n{files.path('json')}")
    return 1 if any(row.is_fault for row in files.rows) else 0


if __name__ == "__main__":
    run_program(main)
