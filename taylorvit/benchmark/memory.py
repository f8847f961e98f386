"""Peak extra memory of one call: everything that was not there before it.

Results, gradients, tensors saved for the backward pass and scratch space count; the inputs do not, they exist already.

On a GPU the allocator counts. On a CPU nobody does, so the call is made in a fresh process and the kernel's high-water mark of
resident memory is read (Linux: VmHWM, which writing 5 to /proc/self/clear_refs resets). On other systems the answer is None.
glibc is told to return every freed block of 64 KiB or more at once, so that nothing freed before hides what the call needs;
smaller blocks may lie in memory that was resident before, so figures below RESOLUTION mean no more than that.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
RESOLUTION = 2**18  # bytes
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}


class Prepared(NamedTuple):
    """A call whose memory is wanted, with its inputs already made, and one that brings the libraries up before."""

    warm_up: Callable[[], object]
    call: Callable[[], object]


def peak_bytes_on_gpu(call: Callable[[], object]) -> int:
    """Return how far the allocator's peak during the call lies above what was allocated before."""
    call()  # libraries keep workspaces after their first call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def peak_bytes_on_cpu(target: str, arguments: dict[str, Any], *, threads: int = 1, timeout: float | None = None) -> int | None:
    """Return the peak extra memory of a call that a fresh process prepares, or None where the system does not tell.

    Args:
        target: "module:function" of a function that returns a `Prepared`. Its inputs are to be made before it returns.
        arguments: keywords for it, of JSON types.
        threads: of PyTorch in that process.
        timeout: seconds until it is ended.

    Raises:
        MemoryError: there was not enough memory.
        RuntimeError: the process failed.
    """
    if not can_measure_on_cpu():
        return None
    environment = os.environ | MALLOC | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import main; main()"],
        input=json.dumps({"target": target, "arguments": arguments, "threads": threads}),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    last_line = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == -signal.SIGKILL or last_line == "out of memory":
        raise MemoryError(f"{target} needs more memory than there is")
    if done.returncode:
        raise RuntimeError(f"the process that measures memory ended with code {done.returncode}: {_reason(done.stderr)}")
    return int(last_line)


def can_measure_on_cpu() -> bool:
    """Whether this system keeps a high-water mark of resident memory that can be reset."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        return "VmHWM" in STATUS.read_text()
    except OSError:
        return False


def release_memory() -> None:
    """Give back what a failed call left; call it when its exception, which holds the tensors, is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out; PyTorch's CPU allocator raises a plain RuntimeError."""
    told = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)


def _reason(stderr: str) -> str:
    """Return the line of a traceback that names the exception."""
    lines = stderr.strip().splitlines() or ["no message"]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (named or lines)[-1]


def _resident_bytes(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert match, f"{key} is not in {STATUS}"
    return int(match[1]) * 1024


def _peak_extra(call: Callable[[], object]) -> int:
    gc.collect()
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _resident_bytes("VmRSS")
    result = call()
    peak = _resident_bytes("VmHWM")
    del result
    return peak - before


def main() -> None:
    """Measure what standard input asks for; the last line of the output is the answer."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    module, _, function = request["target"].partition(":")
    prepared: Prepared = getattr(importlib.import_module(module), function)(**request["arguments"])
    torch.mm(*torch.ones(2, 256, 256).unbind())  # threads and the buffers of the matrix library
    prepared.warm_up()
    try:
        print(_peak_extra(prepared.call))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("out of memory")
