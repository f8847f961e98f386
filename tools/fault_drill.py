"""Kill trainings at random moments, resume them, and compare their ends with undisturbed runs bit for bit; run all fault tests.

    python tools/fault_drill.py --kills 200 --out results/fault_drill
    python tools/fault_drill.py --sections matrix --out results/fault_drill

`kills` trains a small model on scikit-learn's digits, on one and on two processes, and kills all of it, one process, the
launcher or a loader worker, half of the times while a checkpoint is being written. `matrix` runs the tests that inject a fault,
slow ones too, and sums what they count by row of the table in docs/results/reliability.md. The same command continues a drill
that was interrupted.

Writes kills.jsonl and cases.jsonl as it goes, fault_tests.xml, and at the end fault_drill.json and fault_drill.md into --out.
Needs requirements-dev.txt. Exit code 1 where an end differs, a checkpoint is damaged, a process is left over or a test fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taylorvit.cli import positive_int, run_program
from taylorvit.provenance import provenance
from taylorvit.studies.fault_drill import run_drill, run_fault_tests
from taylorvit.studies.fault_drill_report import read_results, write_files
from taylorvit.studies.results import make_folder


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sections", nargs="+", choices=("kills", "matrix"), default=["kills", "matrix"])
    add("--kills", type=positive_int, default=200, help="at least so many (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first case; the others count on (default: %(default)s)")
    add("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="cases alternate between them")
    add("--out", type=Path, default=Path("results/fault_drill"), metavar="FOLDER")
    return parser


def main() -> int:
    """Parse, drill, report."""
    options = build_parser().parse_args()
    make_folder(options.out)
    if "kills" in options.sections:
        run_drill(options.out, kills=options.kills, seed=options.seed, processes=options.processes)
    if "matrix" in options.sections:
        run_fault_tests(options.out)
    results = read_results(options.out)
    print(write_files(results, provenance(), options.out))
    return 0 if results.passed else 1


if __name__ == "__main__":
    run_program(main)
