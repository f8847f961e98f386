"""Make ListOps as Long Range Arena defines it: basic_train.tsv, basic_val.tsv and basic_test.tsv.

    python tools/make_listops.py --out data/listops --jobs 2
    python tools/make_listops.py --out data/listops_short --min_length 20 --max_length 96 --num_train 12000 --num_val 1000 \
        --num_test 1000

The files are a function of the options but --out and --jobs: every block of samples has a seed of its own, and no sample is
there twice. They are written without the round brackets of Long Range Arena's own files, which readers drop anyway. Beside
them listops.json holds the options, sizes and SHA-256 of the files, and what one scores without looking inside the expressions
(taylorvit/data/listops.py): a result belongs beside these lines. Files that are there are never replaced: the same command
again checks them and says so, another one is refused.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from taylorvit.cli import positive_int, run_program
from taylorvit.data.listops import BLOCK_ATTEMPTS, ListOps, ReferenceLines, Shape, generate_block, to_text

SPLITS = ("train", "val", "test")
MANIFEST = "listops.json"
VERSION = 1  # of the way from a seed to the files
BLOCKS_PER_JOB = 4  # before the jobs wait for one another
MOST_FRUITLESS = 100  # blocks in a row that bring nothing new, before it is given up

Sample = tuple[bytes, int]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; the defaults are Long Range Arena's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--num_train", type=positive_int, default=96_000, help="default: %(default)s")
    add("--num_val", type=positive_int, default=2_000, help="default: %(default)s")
    add("--num_test", type=positive_int, default=2_000, help="default: %(default)s")
    add("--min_length", type=int, default=Shape.min_length, help="samples have more tokens (default: %(default)s)")
    add("--max_length", type=positive_int, default=Shape.max_length, help="samples have fewer tokens (default: %(default)s)")
    add("--max_depth", type=positive_int, default=Shape.max_depth, help="default: %(default)s")
    add("--max_args", type=positive_int, default=Shape.max_args, help="of an operator (default: %(default)s)")
    add("--jobs", type=positive_int, default=1, help="processes (default: %(default)s)")
    return parser


def draw_samples(seed: int, shape: Shape, *, jobs: int) -> Iterator[Sample]:
    """Yield different samples for ever, the same whatever `jobs` is.

    Raises:
        ValueError: hardly any are left, or there is none of this length.
    """
    draw = functools.partial(generate_block, seed, shape=shape)
    seen: set[bytes] = set()  # digests: 100,000 samples are 16 MB
    fruitless = 0
    for samples in _blocks(draw, jobs):
        before = len(seen)
        for tokens, value in samples:
            digest = hashlib.blake2b(tokens, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield tokens, value
        fruitless = fruitless + 1 if len(seen) == before else 0
        if fruitless == MOST_FRUITLESS:
            attempts = f"{MOST_FRUITLESS * BLOCK_ATTEMPTS:,} attempts brought no new sample after {before:,}"
            raise ValueError(f"{attempts}: ask for fewer, or for other lengths than {shape.min_length} to {shape.max_length}")


def _blocks(draw: Callable[[int], list[Sample]], jobs: int) -> Iterator[list[Sample]]:
    """Yield block 0, 1, ... in this order, drawn by `jobs` processes."""
    with ExitStack() as stack:
        run = stack.enter_context(multiprocessing.Pool(jobs)).map if jobs > 1 else map
        first = 0
        while True:
            yield from run(draw, range(first, first + jobs * BLOCKS_PER_JOB))
            first += jobs * BLOCKS_PER_JOB


def write_split(path: Path, samples: Iterable[Sample], count: int) -> None:
    """Write the next `count` samples as TSV.

    Raises:
        ValueError: see `draw_samples`.
    """
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write("Source\tTarget\n")
        for _, (tokens, value) in zip(range(count), samples):
            file.write(f"{to_text(tokens)}\t{value}\n")


def describe_files(folder: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Read the files as a training does, and return the manifest."""
    splits = {split: ListOps(folder, split) for split in SPLITS}
    lines = ReferenceLines(splits["train"])
    files = {}
    for samples in splits.values():
        lengths = np.diff(samples.offsets)
        files[samples.path.name] = {
            "samples": len(samples),
            "tokens": {"min": int(lengths.min()), "mean": round(float(lengths.mean()), 2), "max": int(lengths.max())},
            "sha256": file_digest(samples.path),
            "reference_lines": {name: round(value, 2) for name, value in lines.accuracy(samples).items()},
        }
    return {"version": VERSION, "parameters": parameters, "files": files}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_earlier(folder: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of these very files if they are there, None if none of them is.

    Raises:
        ValueError: there are others, or they are not what their manifest says.
    """
    names = [*(f"basic_{split}.tsv" for split in SPLITS), MANIFEST]
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return None
    if MANIFEST not in present:
        raise ValueError(f"--out {folder} holds {', '.join(present)} without {MANIFEST}, which is not replaced: name another")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, found = manifest["version"], manifest["parameters"]
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: not a manifest of this tool ({error!r})") from error
    if (version, found) != (VERSION, parameters):
        raise ValueError(f"--out {folder} holds files of other options ({found}), which are not replaced: name another folder")
    for name, digest in digests.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing or is not what {MANIFEST} says: remove the set to make it again")
    return manifest


def make_files(options: argparse.Namespace, shape: Shape, parameters: dict[str, Any]) -> dict[str, Any]:
    """Write the set beside its place, then move it there, the manifest last; return the manifest."""
    options.out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".listops-", dir=options.out))
    try:
        samples = draw_samples(options.seed, shape, jobs=options.jobs)
        for split in SPLITS:
            write_split(temporary / f"basic_{split}.tsv", samples, getattr(options, f"num_{split}"))
        manifest = describe_files(temporary, parameters)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (*manifest["files"], MANIFEST):
            if (options.out / name).exists():
                raise ValueError(f"{options.out / name} has appeared meanwhile and is not replaced")
            os.rename(temporary / name, options.out / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def format_manifest(manifest: dict[str, Any]) -> str:
    """Return sizes, lengths and reference lines as a table, a row a split."""
    rows = [["split", "samples", "tokens", "mean", *ReferenceLines.NAMES]]
    for name, entry in manifest["files"].items():
        lengths = entry["tokens"]
        scores = [f"{entry['reference_lines'][line]:.2f} %" for line in ReferenceLines.NAMES]
        split = name.removeprefix("basic_").removesuffix(".tsv")
        rows.append(
            [split, f"{entry['samples']:,}", f"{lengths['min']} to {lengths['max']}", f"{lengths['mean']:.1f}", *scores]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    """Command line -> files and manifest -> table."""
    options = build_parser().parse_args()
    shape = Shape(options.min_length, options.max_length, options.max_depth, options.max_args)
    counts = {f"num_{split}": getattr(options, f"num_{split}") for split in SPLITS}
    parameters = {"seed": options.seed, **counts, **asdict(shape)}
    manifest = find_earlier(options.out, parameters)
    done = "was already in" if manifest else "written to"
    manifest = manifest or make_files(options, shape, parameters)
    print(f"ListOps, seed {options.seed}, {done} {options.out}; the lines are learned from the training samples")
    print(format_manifest(manifest))
    return 0


if __name__ == "__main__":
    run_program(main)
