"""Compile every Triton kernel for a GPU that need not be there, and read out of the machine code what limits it.

    python tools/inspect_kernels.py
    python tools/inspect_kernels.py --arch 90 --form direct --head_dim 64 --dtype bfloat16 --num_tokens 197 4097

The launchers are called as a training and an inference call would, on q, k, v that are views of one packed projection, and each
kernel that they launch is compiled for the architecture instead of run. By default every entry of the launch tables is reached.
No time is measured. Columns:

- registers of a thread, bytes of shared memory of a block, blocks that an SM holds at once;
- tensor: the tensor-core instructions of the inner loop, of the whole kernel where it has none, "-" where it has no product;
- loop: instructions of one warp in an iteration; issue / tensor: the same over the clocks of its share of the tensor cores.
  Below 1 the tensor cores can be the limit;
- a score: instructions of a thread for one entry of the N x N matrix (direct form).

The exit code is 1 if a kernel spills registers, needs more shared memory than a block can have, has products that do not run on
tensor cores, or does not compile, or if an entry of a launch table was never used. Writes kernels.json, kernels.csv and
kernels.md into --out. Compiled kernels stay in Triton's cache, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import chain, groupby, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.machine_code import CHIPS, COUNTED
from taylorvit.cli import positive_int, run_program, thread_count
from taylorvit.provenance import provenance
from taylorvit.studies.results import left_table, make_folder, write_results

FORMS = ("direct", "efficient")
DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (16, 32, 64, 128)  # the widths of the launch tables
HEADER = (
    "kernel", "dtype", "D", "N", "blocks", "warps", "stages", "registers", "spills", "shared", "blocks / SM",
    "tensor", "loop", "issue / tensor", "a score", "fault",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=CHIPS, default=[80, 90, 100], help="compute capability, times ten")
    add("--form", choices=FORMS, nargs="+", default=FORMS)
    add("--head_dim", type=positive_int, nargs="+", default=HEAD_DIMS, metavar="D")
    add("--dtype", choices=DTYPES, nargs="+", default=("bfloat16", "float32"))
    add("--num_tokens", type=positive_int, nargs="+", default=(197, 1025, 4097), metavar="N")
    add("--jobs", type=thread_count, default=os.cpu_count(), metavar="J", help="processes that compile (default: one a core)")
    add("--out", type=Path, default=Path("results/kernels"), metavar="FOLDER", help="results; an earlier run's are replaced")
    return parser


def refuse_unfit_process() -> None:
    """Raise ValueError if kernels cannot be compiled here."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("this needs the package triton, which is not installed")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels are not compiled. Unset it")


def compile_kernels(form: str, arch: int, dtype: str, head_dim: int, num_tokens: Sequence[int]) -> list[Any]:
    """Return the kernels of one kind of tensors."""
    from taylorvit.benchmark.compiled import Compilation, compile_form, merge

    torch.set_num_threads(1)
    return merge(row for N in num_tokens for row in compile_form(Compilation(form, arch, dtype, head_dim, N)))  # type: ignore[arg-type]


def compile_all(options: argparse.Namespace) -> Iterator[Any]:
    """Yield the kernels in the order of the options, with `--jobs` processes at work; one is this process."""
    kinds = list(product(options.form, options.arch, options.dtype, sorted(set(options.head_dim))))
    arguments = [*zip(*kinds), [sorted(set(options.num_tokens))] * len(kinds)]
    if options.jobs == 1:
        yield from chain.from_iterable(map(compile_kernels, *arguments))
        return
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(compile_kernels, *arguments))


def table_of(rows: Sequence[Any]) -> str:
    """Return one form's kernels on one architecture as a Markdown table."""
    return left_table(HEADER, [_cells(row) for row in rows])


def unused_entries(form: str, rows: Sequence[Any]) -> list[str]:
    """Return the entries of a form's launch table that no kernel was launched with."""
    from taylorvit.benchmark.compiled import launch_table

    used = {entry for row in rows for entry in row.entry.split("; ")}
    return [str(key) for key in launch_table(form) if str(key) not in used]  # type: ignore[arg-type]


def versions() -> dict[str, str]:
    """Return the versions of Triton and of the assemblers that it brings."""
    import triton

    found = {"triton": triton.__version__}
    for name in ("ptxas", "ptxas_blackwell"):
        said = subprocess.run(
            [getattr(triton.knobs.nvidia, name).path, "--version"], capture_output=True, text=True, check=True
        )
        found[name] = said.stdout.rstrip().splitlines()[-2].rpartition(", ")[2]
    return found


def main() -> int:
    """Command line -> compiled kernels -> tables and files."""
    options = build_parser().parse_args()
    refuse_unfit_process()
    make_folder(options.out)
    rows, tables, faults = [], [], []
    for (form, arch), group in groupby(compile_all(options), key=lambda row: (row.form, row.arch)):
        members = list(group)
        rows += members
        tables.append(f"{form}, sm_{arch}\n\n{table_of(members)}\n")
        print(tables[-1], flush=True)
        faults += [
            f"{form}, sm_{arch}: {row.kernel}, D = {row.head_dim}, {row.dtype}: {row.fault}" for row in members if row.fault
        ]
    if options.head_dim is HEAD_DIMS:
        used = {form: [row for row in rows if row.form == form] for form in options.form}
        faults += [
            f"{form}: no kernel was launched with {entry}" for form in used for entry in unused_entries(form, used[form])
        ]
    header = {"provenance": provenance() | versions(), "faults": faults}
    write_results(options.out, "kernels", header, [_flat(row) for row in rows], "\n".join(tables))
    print("\n".join([*faults, f"{len(rows)} kernels, {len(faults)} faults", str(options.out / "kernels.json")]))
    return 1 if faults else 0


def _flat(row: Any) -> dict[str, Any]:
    """Return the row with a column for every instruction that is counted, in the whole kernel and in its inner loop."""
    plain = asdict(row)
    counts, loop = plain.pop("counts"), plain.pop("loop_counts")
    columns = {name.lower(): counts.get(name, 0) for name in COUNTED}
    return plain | columns | {f"loop_{name.lower()}": loop.get(name, 0) for name in COUNTED}


def _cells(row: Any) -> list[str]:
    counts = row.loop_counts or row.counts
    tensor = ", ".join(f"{counts.get(name, 0)} {name}" for name in row.tensor.split("+")) if row.tensor else "-"
    return [
        f"{row.kernel} {row.flags.lower()}".strip(), row.dtype, str(row.head_dim), row.num_tokens, row.blocks,
        str(row.num_warps), str(row.num_stages), str(row.registers), str(row.spill_stores + row.spill_loads),
        str(row.shared_bytes), str(row.blocks_per_sm), tensor, _number(row.loop_instructions, 0),
        _number(row.issue_per_tensor, 2), _number(row.instructions_per_score, 2), row.fault,
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    run_program(main)
