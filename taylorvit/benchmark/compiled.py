"""Every Triton kernel as a real launch would compile it, for a GPU that is not there: registers, spills, loops.

The launchers `ops.gpu_direct` and `ops.gpu_efficient` are called on CPU tensors while `kernels.launch` compiles and does not
run, so that block sizes, constants and what Triton assumes about strides and pointers are those of a real call. No time is
measured. Needs Triton, and not its interpreter.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import TritonError

from ..ops import kernels
from . import machine_code
from .case import DTYPES
from .machine_code import CHIPS, RESERVED_BYTES, TENSOR_OPCODES

Form = Literal["direct", "efficient"]
BATCH_SIZE, NUM_HEADS = 2, 3


@dataclass(frozen=True)
class Compilation:
    """What is to be compiled: all kernels of both passes of a form, for tensors of this kind."""

    form: Form
    arch: int
    dtype: str
    head_dim: int
    num_tokens: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. Counts without `loop_` are of the whole kernel, those with it of one iteration of the inner loop.

    `flags` are the boolean constants that are true, `entry` is the key in the launch table. `loop_tensor_clocks` are those of
    one warp, see `machine_code`. `redundancy` is the multiply-adds of the machine's loop over those of the source's loop: above
    1 where it is unrolled or warps do the same work. `code` tells kernels of one name apart.
    """

    form: str
    arch: int
    kernel: str
    flags: str
    entry: str
    dtype: str
    head_dim: int
    num_tokens: str
    blocks: str
    num_warps: int
    num_stages: int
    registers: int = 0
    stack_bytes: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    tensor: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    loop_counts: dict[str, int] = field(default_factory=dict)
    loop_instructions: int | None = None
    loop_tensor_clocks: float | None = None
    issue_per_tensor: float | None = None
    redundancy: float | None = None
    instructions_per_score: float | None = None
    fault: str = ""
    code: str = ""


FIELDS = [item.name for item in fields(Kernel)]


def compile_form(what: Compilation) -> list[Kernel]:
    """Return the kernels of inference, of the forward pass in training, and of the backward pass.

    Raises:
        ValueError: Triton's interpreter is on.
    """
    module = importlib.import_module(f"taylorvit.ops.gpu_{what.form}")
    q, k, v, temperature = example(what)
    with compiling_only(what, launch_table(what.form)) as found:
        module.forward(q, k, v, temperature, False)
        y, *saved = module.forward(q, k, v, temperature, True)
        module.backward(torch.zeros_like(y), q, k, v, temperature, *saved)
    return merge(found)


def example(what: Compilation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v as a ViT has them, views (B, H, N, D) of one packed (B, N, 3, H, D), and a temperature."""
    packed = torch.zeros(BATCH_SIZE, what.num_tokens, 3, NUM_HEADS, what.head_dim, dtype=DTYPES[what.dtype])
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, torch.ones(NUM_HEADS)


def launch_table(form: Form) -> dict[Any, kernels.Launch]:
    """Return the table of how the kernels of a form are launched."""
    module = importlib.import_module(f"taylorvit.ops.gpu_{form}")
    table = module.table() if hasattr(module, "table") else module.TABLE
    return dict(table)


@contextmanager
def compiling_only(what: Compilation, table: dict[Any, kernels.Launch]) -> Iterator[list[Kernel]]:
    """While the context is open `kernels.launch` compiles for `what.arch`; the list that it gives fills with the kernels.

    Raises:
        ValueError: Triton's interpreter is on.
    """
    if kernels.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels are not compiled. Unset it")
    found: list[Kernel] = []

    def launch(kernel: Any, grid: Any, *arguments: Any, config: kernels.Launch, **constexprs: Any) -> None:
        entry = "; ".join(str(key) for key, value in table.items() if value is config)
        flags = " ".join(name for name, value in constexprs.items() if value is True)
        row = Kernel(
            what.form, what.arch, kernel.__name__, flags, entry, what.dtype, what.head_dim, str(what.num_tokens),
            " ".join(f"{name}={size}" for name, size in config.blocks.items()), config.num_warps, config.num_stages,
        )  # fmt: skip
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        try:
            binary = kernel.warmup(*arguments, grid=tuple(grid), **constexprs, **config.blocks, **options)
        except (TritonError, RuntimeError) as error:
            found.append(replace(row, fault=f"does not compile: {' '.join(str(error).split())[:200]}"))
            return
        found.append(inspect(row, binary, config.blocks))

    real_launch, real_driver = kernels.launch, driver._active
    target = GPUTarget("cuda", what.arch, 32)
    driver.set_active(
        SimpleNamespace(  # the device's number keeps the caches of architectures apart
            get_current_target=lambda: target, get_current_device=lambda: what.arch, get_current_stream=lambda device: 0
        )
    )
    kernels.launch = launch
    try:
        yield found
    finally:
        kernels.launch, driver._active = real_launch, real_driver


def inspect(row: Kernel, binary: Any, blocks: dict[str, int]) -> Kernel:
    """Return the row, filled in from what Triton compiled."""
    usage, listing = disassemble(binary.asm["cubin"])
    code = machine_code.parse_sass(listing)
    loop = machine_code.inner_loop(code)
    counts = machine_code.count(code)
    stores, loads = machine_code.spills(code)
    static = usage["SHARED"] - (RESERVED_BYTES if row.arch >= 90 else 0)
    shared = binary.metadata.shared + max(0, static)
    row = replace(
        row,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        spill_stores=stores,
        spill_loads=loads,
        shared_bytes=shared,
        blocks_per_sm=machine_code.blocks_per_sm(row.arch, usage["REG"], shared, row.num_warps),
        tensor="+".join(name for name in TENSOR_OPCODES if name in counts),
        counts=counts,
        code=binary.metadata.hash[:12],
    )
    ttir = binary.asm["ttir"]
    return replace(_with_loop(row, loop, ttir, blocks), fault=find_fault(row, ttir))


def find_fault(row: Kernel, ttir: str) -> str:
    """Say what is wrong with a kernel: spills, too much shared memory, or products that do not run on tensor cores."""
    limit = CHIPS[row.arch].block_bytes
    faults = {
        f"spills ({row.spill_stores} stores, {row.spill_loads} loads)": row.spill_stores + row.spill_loads > 0,
        f"{row.shared_bytes} bytes of shared memory, {limit} is the limit": row.shared_bytes > limit,
        "its products use no tensor core": "tt.dot " in ttir and not row.tensor,
    }
    return "; ".join(fault for fault, found in faults.items() if found)


def merge(kernels_found: Iterable[Kernel]) -> list[Kernel]:
    """Return one row for those that differ in their token counts alone, with all of these."""
    merged: dict[str, Kernel] = {}
    for row in kernels_found:
        key = repr(replace(row, num_tokens=""))
        numbers = [merged[key].num_tokens] if key in merged else []
        counts = dict.fromkeys(", ".join([*numbers, row.num_tokens]).split(", "))
        merged[key] = replace(row, num_tokens=", ".join(counts))
    return list(merged.values())


@functools.cache  # launches of one kernel with other numbers have one binary
def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Return a cubin's resource usage by name and the listing of its machine code, by Triton's own cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}, listing


def _with_loop(row: Kernel, loop: list[machine_code.Instruction], ttir: str, blocks: dict[str, int]) -> Kernel:
    """Return the row with the figures of the inner loop, if there is one."""
    if not loop:
        return row
    products = 3 if row.dtype == "float32" else 1  # of TF32 each, input_precision="tf32x3"
    needed = products * machine_code.source_fma(ttir) / row.num_warps
    fma = sum(machine_code.tensor_fma(instruction.opcode) for instruction in loop)
    clocks = sum(machine_code.tensor_clocks(instruction.opcode, row.arch) for instruction in loop)
    if not fma:  # the shapes of UTCHMMA are not in the listing: the loop is taken for one of the source's
        fma, clocks = needed, needed / machine_code.warp_rate(row.arch, tf32=products == 3)
    per_score = None
    if row.form == "direct" and {"BLOCK_M", "BLOCK_N"} <= blocks.keys():
        scores = blocks["BLOCK_M"] * blocks["BLOCK_N"] * max(1, round(fma / needed))
        per_score = len(loop) * 32 * row.num_warps / scores
    return replace(
        row,
        loop_counts=machine_code.count(loop),
        loop_instructions=len(loop),
        loop_tensor_clocks=clocks,
        issue_per_tensor=len(loop) / clocks,
        redundancy=fma / needed,
        instructions_per_score=per_score,
    )
