"""What can be read out of a kernel's machine code without running it: instructions, spills, and what its inner loop costs.

The listing is SASS as `cuobjdump -sass` prints it. The inner loop is the innermost loop with the most tensor-core work. Two
figures say what limits it, both for one warp:

- issue: instructions an iteration. A scheduler issues one a clock, so this is a lower bound in clocks. Branches within the loop
  are counted as if nothing was skipped, and instructions that occupy their unit for longer (MUFU, 8 clocks) as one.
- tensor: clocks that the warp's quarter of the tensor cores needs for the iteration's products, M N K / (rate / 4). A
  HGMMA.64xNxK is shared by the four warps of a warpgroup, so 64x64x16 is 65,536 multiply-adds, 32 clocks at 2,048.

issue / tensor below 1 means that the tensor cores can be the limit. The rates are peak rates. On sm_90 mma.sync (HMMA) stays
well below them (arXiv 2402.13499): there the tensor cores take longer than is written here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KIB = 1024
SCHEDULERS = 4  # of an SM, each with its quarter of the tensor cores
REGISTERS = 65536  # of an SM, on all chips below
RESERVED_BYTES = KIB  # shared memory that the system takes of every block; from sm_90 on it is in the cubin's own count
TENSOR_OPCODES = ("HGMMA", "HMMA", "UTCHMMA")
COUNTED = (*TENSOR_OPCODES, "MUFU", "FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "F2FP", "SHFL", "LDSM", "LDS", "STS")


@dataclass(frozen=True)
class Chip:
    """Limits of an architecture: shared memory of a block and of an SM, warps of an SM, 16-bit multiply-adds a clock and SM.

    From NVIDIA's tables of compute capabilities and the white papers of A100, GA102, AD102, H100 and B200.
    """

    block_bytes: int
    sm_bytes: int
    sm_warps: int
    tensor_rate: int


CHIPS = {
    80: Chip(163 * KIB, 164 * KIB, 64, 1024),
    86: Chip(99 * KIB, 100 * KIB, 48, 512),
    89: Chip(99 * KIB, 100 * KIB, 48, 512),
    90: Chip(227 * KIB, 228 * KIB, 64, 2048),
    100: Chip(227 * KIB, 228 * KIB, 64, 4096),
}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. `target` is where a branch goes."""

    address: int
    opcode: str
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without its modifiers: HGMMA of HGMMA.64x64x16.F32.BF16."""
        return self.opcode.partition(".")[0]


def parse_sass(listing: str) -> list[Instruction]:
    """Return the instructions of a kernel's listing.

    Raises:
        ValueError: there is none in it.
    """
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
    found = []
    for address, opcode, operands in line.findall(listing):
        targets = re.findall(r"\b0x([0-9a-f]+)\b", operands) if opcode.partition(".")[0] == "BRA" else []
        found.append(Instruction(int(address, 16), opcode, int(targets[-1], 16) if targets else None))
    if not found:
        raise ValueError(f"no machine code in the listing {listing[:80]!r}")
    return found


def tensor_fma(opcode: str) -> float:
    """Return the multiply-adds that one warp's share of a tensor-core instruction makes.

    0 for all others, and for UTCHMMA, whose shape stands in a register.
    """
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
        m, n, k = map(int, shape.groups())
        return m * n * k / SCHEDULERS
    if shape := re.match(r"HMMA\.16(8)(\d+)\.", opcode):
        return 16 * int(shape[1]) * int(shape[2])
    return 0


def warp_rate(arch: int, *, tf32: bool) -> float:
    """Return the multiply-adds a clock of the quarter of an SM's tensor cores that a warp works on; TF32 has half the rate."""
    return CHIPS[arch].tensor_rate / SCHEDULERS / (2 if tf32 else 1)


def tensor_clocks(opcode: str, arch: int) -> float:
    """Return the clocks that one warp's share of a tensor-core instruction takes at the peak rate."""
    return tensor_fma(opcode) / warp_rate(arch, tf32=".TF32" in opcode)


def inner_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """Return the innermost loop with the most tensor-core work; [] if no loop has any."""
    loops = [loop for loop in _loops(code) if any(instruction.name in TENSOR_OPCODES for instruction in loop)]
    innermost = [loop for loop in loops if not any(_encloses(loop, other) for other in loops)]

    def work(loop: list[Instruction]) -> tuple[float, int]:
        return sum(tensor_fma(item.opcode) for item in loop), sum(item.name in TENSOR_OPCODES for item in loop)

    return max(innermost, key=work, default=[])


def count(code: Sequence[Instruction]) -> dict[str, int]:
    """Return how often the instructions of COUNTED stand in the code."""
    names = Counter(instruction.name for instruction in code)
    return {name: names[name] for name in COUNTED if names[name]}


def spills(code: Sequence[Instruction]) -> tuple[int, int]:
    """Return the stores to and loads from local memory."""
    names = Counter(instruction.name for instruction in code)
    return names["STL"], names["LDL"]


def blocks_per_sm(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Return how many blocks an SM holds at once; 0 if one is too large. Registers are given out by 8 a thread."""
    chip = CHIPS[arch]
    if shared_bytes > chip.block_bytes:
        return 0
    registers_of_block = -(-registers // 8) * 8 * 32 * num_warps
    by_shared = chip.sm_bytes // (shared_bytes + RESERVED_BYTES)
    return min(REGISTERS // registers_of_block, by_shared, chip.sm_warps // num_warps)


def source_fma(ttir: str) -> int:
    """Return the multiply-adds of all warps in the innermost loop with most of them, read from Triton's first representation.

    The whole kernel's where no loop has a product. Set against the machine code this shows unrolled loops and work done twice.
    """
    sums: Counter[int] = Counter()
    opened: list[tuple[int, int]] = []  # line and indentation of the loops around
    for number, line in enumerate(ttir.splitlines()):
        indentation = len(line) - len(line.lstrip())
        if opened and indentation == opened[-1][1] and line.lstrip().startswith("}") and " do {" not in line:
            opened.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            opened.append((number, indentation))
        if shape := re.search(r"tt\.dot .*tensor<(?:\d+x)??(\d+)x(\d+)x\w+> \* tensor<(?:\d+x)??\d+x(\d+)x\w+>", line):
            m, k, n = map(int, shape.groups())
            sums[opened[-1][0] if opened else -1] += m * k * n
    loops = [total for start, total in sums.items() if start >= 0]
    return max(loops, default=sums[-1])


def _loops(code: Sequence[Instruction]) -> Iterator[list[Instruction]]:
    """Yield the code between every backward branch and its target. The branch to itself behind a kernel's end is none."""
    for position, branch in enumerate(code):
        if branch.target is not None and branch.target < branch.address:
            yield [instruction for instruction in code[: position + 1] if instruction.address >= branch.target]


def _encloses(outer: Sequence[Instruction], inner: Sequence[Instruction]) -> bool:
    start, end = inner[0].address, inner[-1].address
    return outer[0].address <= start and end <= outer[-1].address and len(inner) < len(outer)
