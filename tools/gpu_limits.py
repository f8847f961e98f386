"""Measure what the GPU at hand can do at most, which bench_attention.py --limits compares attentions with.

    python tools/gpu_limits.py
    python tools/gpu_limits.py --seconds 3 --out results/gpu/limits.json

Rates: copy of a large tensor; reads of 20 MiB from the second-level cache; torch.mm in bf16, fp16 and TF32; tl.dot with one
operand held in registers, which is the inner loop of the efficient form, the other in shared memory or loaded anew each time;
launches of an empty kernel from Python, by way of a PyTorch operator, and in a CUDA graph. Takes about a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.limits_measure import Rate, describe_gpu, measure_rates
from taylorvit.cli import positive_float, run_program
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file

UNITS = {"bytes_per_second": (1e12, "TB/s"), "flops_per_second": (1e12, "TFLOP/s")}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=positive_float, default=1.0, help="time for each rate (default: %(default)s)")
    add("--out", type=Path, default=Path("results/gpu/limits.json"), metavar="FILE", help="default: %(default)s")
    return parser


def describe_rate(name: str, rate: Rate) -> str:
    """Return a rate as one line; of launches the time that one takes."""
    for key, (size, unit) in UNITS.items():
        if key in rate:
            low, high = rate[f"{key}_low"] / size, rate[f"{key}_high"] / size
            return f"{name:<18} {rate[key] / size:8.3f} {unit} ({low:.3f} - {high:.3f})"
    low, high = 1e6 / rate["launches_per_second_high"], 1e6 / rate["launches_per_second_low"]
    return f"{name:<18} {1e6 / rate['launches_per_second']:8.3f} us ({low:.3f} - {high:.3f})"


def check_machine() -> None:
    """Raise ValueError where a GPU or Triton is missing."""
    if not torch.cuda.is_available():
        raise ValueError("the limits of a GPU cannot be measured: PyTorch sees no GPU here")
    if not importlib.util.find_spec("triton"):
        raise ValueError("the limits of a GPU need Triton, which is not installed")


def main() -> int:
    """Measure -> one JSON file and a line for each rate."""
    options = build_parser().parse_args()
    check_machine()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rates = measure_rates(options.seconds)
    for name, rate in rates.items():
        print(describe_rate(name, rate))
    content = {"provenance": provenance(), "gpu": describe_gpu(), "seconds": options.seconds, "rates": rates}
    replace_file(options.out, json.dumps(content, indent=1) + "\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    run_program(main)
