"""Measure the rates of the GPU at hand that bound an attention: what tools/gpu_limits.py writes and `limits` reads.

All data are random: a matrix unit that multiplies zeros draws less power and runs faster than it can with anything else. Each
figure is the median over rounds of at least 2 ms, with its 10th and 90th percentile.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import DTYPES
from .timing import Call, capture_graph, compare, time_on_gpu

COPIED_BYTES = 2**31  # far more than any second-level cache holds
READ_BYTES = 20 * 2**20  # that the cache does hold
READ_STEPS, READ_WARPS, PROGRAMS_A_PROCESSOR = 512, 8, 4
READ_BLOCK = 4096  # fp32
MATMUL_SIZE = 8192
FEATURES, WIDTH, DOT_STEPS = 256, 64, 2000
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")
LAUNCHES_A_GRAPH = 64

Rate = dict[str, float]


def measure_rates(seconds: float) -> dict[str, Rate]:
    """Return every rate by name; `seconds` are spent on each. Needs a GPU and Triton."""
    rates = {"copy": copy_rate(seconds), "l2_read": read_rate(seconds)}
    for name in ("bfloat16", "float16", "tfloat32"):
        rates[f"matmul_{name}"] = matmul_rate(name, seconds)
    for rows in (128, 256):
        for stream in (False, True):
            rates[f"dot_{rows}_{'streamed' if stream else 'held'}"] = dot_rate(rows, stream, seconds)
    return rates | launch_times(seconds)


def rate_of(call: Call, amount: float, unit: str, seconds: float) -> Rate:
    """Time a call that does so much of something, and return that by the second, and the seconds of a call."""
    comparison = compare({"it": call}, lambda index: (), seconds=seconds, num_input_sets=1, stopwatch=time_on_gpu)
    took = comparison.seconds("it")
    return {
        f"{unit}_per_second": amount / took.median,
        f"{unit}_per_second_low": amount / took.high,
        f"{unit}_per_second_high": amount / took.low,
        "seconds": took.median,
    }


def copy_rate(seconds: float) -> Rate:
    """Copy a large tensor; what is read and what is written both count."""
    source = torch.randn(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return rate_of(lambda: target.copy_(source), 2 * COPIED_BYTES, "bytes", seconds)


def read_rate(seconds: float) -> Rate:
    """Read a working set that the second-level cache holds, from all processors, again and again."""
    from .limits_kernels import read_blocks

    num_blocks = READ_BYTES // (4 * READ_BLOCK)
    source = torch.randn(num_blocks * READ_BLOCK, device="cuda")
    programs = PROGRAMS_A_PROCESSOR * num_processors()
    sums = torch.empty(programs * READ_BLOCK, device="cuda")

    def call() -> None:
        read_blocks[(programs,)](source, sums, num_blocks, READ_STEPS, BLOCK=READ_BLOCK, num_warps=READ_WARPS)

    return rate_of(call, programs * READ_STEPS * READ_BLOCK * 4, "bytes", seconds)


def matmul_rate(name: str, seconds: float) -> Rate:
    """Multiply two square matrices with torch.mm; `tfloat32` is fp32 rounded to TF32 in the matrix units."""
    dtype = torch.float32 if name == "tfloat32" else DTYPES[name]
    a, b, c = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=dtype) for _ in range(3))
    with _tf32(name == "tfloat32"):
        return rate_of(lambda: torch.mm(a, b, out=c), 2 * MATMUL_SIZE**3, "flops", seconds)


def dot_rate(rows: int, stream: bool, seconds: float) -> Rate:
    """Multiply features held in registers with a state: how fast the efficient form's query can be in Triton.

    Of a loop over tl.dot of (rows, 256) by (256, 64), in bf16. The state is held in shared memory, or, with `stream`, loaded
    anew for every product, from the second-level cache.
    """
    from .limits_kernels import multiply_features

    programs = 2 * num_processors()
    tokens = torch.randn(programs * rows, 32, device="cuda", dtype=torch.bfloat16)
    state = torch.randn(2, FEATURES, WIDTH, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(programs * rows, WIDTH, device="cuda")

    def call() -> None:
        multiply_features[(programs,)](
            tokens, state, out, DOT_STEPS, ROWS=rows, WIDTH=WIDTH, STREAM=stream, num_warps=8, num_stages=3
        )

    return rate_of(call, 2.0 * programs * rows * FEATURES * WIDTH * DOT_STEPS, "flops", seconds)


def launch_times(seconds: float) -> dict[str, Rate]:
    """Launch a kernel that does nothing: from Python, by way of a PyTorch operator, and in a CUDA graph."""
    from .limits_kernels import do_nothing

    x = torch.empty(1, device="cuda")

    def launch() -> None:
        do_nothing[(1,)](x)

    operator = register_operator(launch)
    graph = capture_graph([launch] * LAUNCHES_A_GRAPH)
    return {
        "launch_kernel": rate_of(launch, 1, "launches", seconds),
        "launch_operator": rate_of(lambda: operator(x), 1, "launches", seconds),
        "launch_in_graph": rate_of(graph, LAUNCHES_A_GRAPH, "launches", seconds),
    }


def register_operator(launch: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    """Return a PyTorch operator that launches and makes a tensor, as an attention does."""

    @torch.library.custom_op("taylorvit_benchmark::launch", mutates_args=())
    def operator(x: Tensor) -> Tensor:
        launch()
        return torch.empty_like(x)

    return operator


def num_processors() -> int:
    """Return the number of streaming multiprocessors."""
    return int(torch.cuda.get_device_properties().multi_processor_count)


def describe_gpu() -> dict[str, Any]:
    """Return name, memory, cache and capability of the GPU, its driver and its clocks under a matrix product's load."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": query_gpu(("driver_version",)).get("driver_version"),
        "idle": query_gpu(CLOCKS),
        "under_load": query_under_load(),
    }


def query_under_load(seconds: float = 1.0) -> dict[str, str]:
    """Ask for the clocks while the GPU multiplies matrices, once it has for about so many seconds."""
    a, b, c = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    one = max(time_on_gpu(lambda: torch.mm(a, b, out=c)), time_on_gpu(lambda: torch.mm(a, b, out=c)))
    count = min(round(seconds / one) + 1, 900)  # the queue of launches holds about a thousand
    for _ in range(count):
        torch.mm(a, b, out=c)
    torch.cuda.synchronize()
    for _ in range(count):
        torch.mm(a, b, out=c)
    clocks = query_gpu(CLOCKS)
    torch.cuda.synchronize()
    return clocks


def query_gpu(fields: tuple[str, ...]) -> dict[str, str]:
    """Ask nvidia-smi, and return its answers with their units; {} where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    answers = [answer.strip() for answer in done.stdout.strip().split(",")]
    return dict(zip(fields, answers)) if len(answers) == len(fields) else {}


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
