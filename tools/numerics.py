"""Study the numerics of TaylorShift: errors against fp64, sizes of intermediates, and what the normalisation is for.

    python tools/numerics.py --out results/numerics
    python tools/numerics.py --num_tokens 256 1024 --head_dim 32 --impl reference cpu --dtype bfloat16 --draws 5

Errors: every implementation in both forms, `paper` being the paper's way of computing, over all of --num_tokens, --head_dim,
--temperature, --dtype and --kind; inputs are rounded to the dtype before the fp64 truth is computed, so only the computing is
judged. A result with NaN or infinities has no error, they are counted instead. Temperature 1: sizes, the paper's scaling (up to
65,536 tokens) and its ones column in fp16 over --long_tokens, and without normalisation over --num_tokens up to 5,792.

Writes numerics.json (everything), numerics.csv (the errors), numerics.md (tables), numerics.png (errors) and
numerics_sizes.png (all else) into --out, whose earlier results are replaced. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from taylorvit.benchmark.case import DTYPES, Case
from taylorvit.cli import need_device, need_matplotlib, positive_float, positive_int, run_program
from taylorvit.ops import DEVICE_TYPES
from taylorvit.provenance import provenance
from taylorvit.studies import numerics, numerics_sizes
from taylorvit.studies.numerics import KINDS, ErrorRow
from taylorvit.studies.numerics_normalisation import normalisation_rows
from taylorvit.studies.numerics_pictures import draw_pictures
from taylorvit.studies.numerics_report import Results, markdown, write_files
from taylorvit.studies.numerics_sizes import MOST_SIZE_TOKENS, SCALINGS
from taylorvit.studies.results import make_folder

HALF_TO_FULL = ("float16", "bfloat16", "float32")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num_tokens", type=positive_int, nargs="+", default=[128, 512, 2048], metavar="N")
    add("--head_dim", type=positive_int, nargs="+", default=[16, 32, 64], metavar="D")
    add("--temperature", type=positive_float, nargs="+", default=[1.0, 8.0])
    add("--dtype", nargs="+", default=HALF_TO_FULL, choices=DTYPES)
    add(
        "--kind", nargs="+", default=list(KINDS), choices=KINDS, help="; ".join(f"{key}: {text}" for key, text in KINDS.items())
    )
    add("--long_tokens", type=positive_int, nargs="+", default=[256, 1024, 4096, 16384, 65536, 131072, 262144], metavar="N")
    add("--impl", nargs="+", choices=numerics.IMPLS, help="default: all that run on the device")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--draws", type=positive_int, default=2, help="drawings of the inputs, judged together (default: %(default)s)")
    add("--out", type=Path, default=Path("results/numerics"), metavar="FOLDER")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what argparse lets through, and make the folder; --impl gets its default."""
    need_device(options.device)
    need_matplotlib()
    if options.impl is None:
        options.impl = [impl for impl in numerics.IMPLS if options.device in DEVICE_TYPES.get(impl, (options.device,))]
    numerics.candidates(options.impl, options.device)
    if min(options.num_tokens) < 2:
        raise ValueError(f"--num_tokens {min(options.num_tokens)}: 2 or more are needed, one token has nothing to choose from")
    for num_tokens, head_dim in itertools.product(options.num_tokens, options.head_dim):
        case = Case(1, 1, num_tokens, head_dim, "float64", True, options.device)
        if (size := numerics.truth_of(case).needed_bytes(case)) > numerics.MAX_BYTES:
            need = f"the fp64 truth needs {size / 2**30:.3g} GiB, allowed are {numerics.MAX_BYTES / 2**30:g}"
            raise ValueError(f"--num_tokens {num_tokens} with --head_dim {head_dim}: {need}")
    if min(options.long_tokens) > MOST_SIZE_TOKENS:
        given = ", ".join(map(str, options.long_tokens))
        raise ValueError(f"--long_tokens {given}: one must be {MOST_SIZE_TOKENS} or less, beyond it no sizes are measured")
    make_folder(options.out)


def measure(options: argparse.Namespace) -> Results:
    """Return all rows by study."""
    head_dims, device = sorted(set(options.head_dim)), options.device
    tokens, long = sorted(set(options.num_tokens)), sorted(set(options.long_tokens))
    scaled = [(scaling, "normal") for scaling in SCALINGS] + [("none", "unit")]
    sizes = [
        row
        for D, N, (scaling, values) in itertools.product(head_dims, long, scaled)
        for row in numerics_sizes.size_rows(Case(1, 1, N, D, "float64", device=device), scaling, values)
    ]
    print(f"{len(sizes)} sizes of intermediates", flush=True)
    ones = [numerics_sizes.ones_row(Case(1, 1, N, D, "float16", device=device)) for D, N in itertools.product(head_dims, long)]
    print(f"{len(ones)} ones columns", flush=True)
    normalisation = [
        row
        for D, N in itertools.product(head_dims, tokens)
        for row in normalisation_rows(Case(1, 1, N, D, "float64", device=device), seed=0)
    ]
    print(f"{len(normalisation)} cases with and without normalisation", flush=True)
    return {
        "errors": measure_errors(options),
        "sizes": sizes,
        "claims": numerics_sizes.claim_rows(sizes),
        "fp16_range": numerics_sizes.range_rows(sizes),
        "ones_column": ones,
        "normalisation": normalisation,
    }


def measure_errors(options: argparse.Namespace) -> list[ErrorRow]:
    """Return the errors of all candidates over the whole grid."""
    peers = numerics.candidates(options.impl, options.device)
    rows: list[ErrorRow] = []
    shapes = itertools.product(sorted(set(options.head_dim)), sorted(set(options.num_tokens)))
    for head_dim, num_tokens in shapes:
        for dtype, kind, temperature in itertools.product(
            *map(dict.fromkeys, (options.dtype, options.kind, options.temperature))
        ):
            case = Case(1, 1, num_tokens, head_dim, dtype, True, options.device)
            rows += numerics.error_rows(case, kind, temperature, peers, options.draws)
        print(f"errors: D = {head_dim}, N = {num_tokens}", flush=True)
    return rows


def main() -> int:
    """Command line -> rows -> files and tables."""
    options = build_parser().parse_args()
    check_options(options)
    results = measure(options)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_files(results, {"provenance": provenance(), "settings": settings}, options.out)
    draw_pictures(results, options.out)
    print(f"\n{markdown(results)}\n{options.out / 'numerics.json'}")
    return 0


if __name__ == "__main__":
    run_program(main)
