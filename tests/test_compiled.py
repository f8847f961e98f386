"""What compiling without a GPU says of kernels: the reading of machine code, toy kernels with a known fault, and the real ones.

Tests of compilation run in processes of their own, without Triton's interpreter, which the suite switches on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton")

import triton
import triton.language as tl

from taylorvit.benchmark import machine_code
from taylorvit.benchmark.compiled import Compilation, Kernel, compiling_only, example, find_fault, launch_table, merge
from taylorvit.benchmark.machine_code import CHIPS, Instruction
from taylorvit.ops import kernels


@triton.jit(do_not_specialize=["num_tokens"])
def toy_attention(
    q, k, v, y, stride, num_tokens, WIDTH: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    queries = tl.load(q + rows[:, None] * stride + columns[None, :], mask=rows[:, None] < num_tokens, other=0.0)
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        offsets, inside = keys[:, None] * stride + columns[None, :], keys[:, None] < num_tokens
        values = tl.load(v + offsets, mask=inside, other=0.0)
        if PRODUCTS:
            x = tl.dot(queries, tl.trans(tl.load(k + offsets, mask=inside, other=0.0)))
            total = tl.dot((x * (0.5 * x + 1.0)).to(values.dtype), values, total)
        else:
            total += tl.sum(values.to(tl.float32), axis=0)[None, :] * queries
    tl.store(y + rows[:, None] * WIDTH + columns[None, :], total.to(y.dtype.element_ty), mask=rows[:, None] < num_tokens)


@triton.jit
def toy_ieee(x, y, WIDTH: tl.constexpr):
    offsets = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tile = tl.load(x + offsets)
    tl.store(y + offsets, tl.dot(tile, tile, input_precision="ieee"))


TOYS: dict[str, tuple[dict[str, int], int, bool]] = {
    "good": ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, True),
    "spilling": ({"BLOCK_M": 256, "BLOCK_N": 256}, 4, True),
    "without products": ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, False),
}


# Most that an inner loop may cost in bf16: instructions of a thread for a score (direct) or issued for every clock of the
# tensor cores (efficient), by architecture and head dimension: what was compiled when this was written, and a tenth of room.
# Of the direct forward pass' 5.8 for a score at D = 32, p takes two, the row sum one and rounding half; softmax takes 6.9, one
# of them an exponential that counts eightfold. Without `prepared` every block of queries takes the keys' lengths again. The
# efficient loops keep the tensor cores busy at D = 64, below 1; at D = 32 the same features meet half the columns.
BUDGETS = {
    "forward prepared": {90: {16: 6.1, 32: 6.4, 64: 7.1, 128: 11.4}, 80: {16: 6.0, 32: 7.3, 64: 9.6, 128: 17.7}},
    "forward": {90: {16: 7.5, 32: 8.6, 64: 13.2, 128: 20.0}, 80: {16: 7.6, 32: 8.8, 64: 14.5, 128: 24.1}},
    "backward_queries": {90: {16: 10.2, 32: 11.9, 64: 13.1, 128: 31.5}, 80: {16: 10.1, 32: 12.4, 64: 16.2, 128: 37.7}},
    "backward_keys": {90: {16: 9.5, 32: 10.4, 64: 11.3, 128: 26.4}, 80: {16: 9.1, 32: 11.8, 64: 16.0, 128: 28.6}},
    "state": {90: {16: 1.65, 32: 0.91, 64: 0.53, 128: 0.39}, 80: {16: 0.73, 32: 0.54, 64: 0.42, 128: 0.42}},
    "apply": {90: {32: 1.30, 64: 0.73, 128: 0.83}, 80: {32: 1.10, 64: 0.68, 128: 0.93}},
    "apply_backward": {90: {32: 1.40, 64: 0.95, 128: 1.03}, 80: {32: 1.16, 64: 0.80, 128: 0.83}},
}
WARPS_REPEAT = {("backward_queries", 90, 128)}  # their scores are made twice, by eight warps: see docs/results/kernels.md
WITHOUT_PRODUCTS = {"prepare_keys", "prepare_backward", "reduce", "expand"}  # read and write every number once

HOPPER = """
        /*0000*/                   LDL R1, [R2+0x8] ;                                  /* 0x00000a00ff017b82 */
                                                                                       /* 0x000e220000000800 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ; /* 0x00e00000083879f0 */
        /*0020*/                   MUFU.RCP R4, R5 ;                                   /* 0x00e00000083879f0 */
        /*0030*/                   STL [R1+0x10], R4 ;                                 /* 0x00e00000083879f0 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;  /* 0x00e00000083879f0 */
        /*0050*/              @!P1 BRA 0x70 ;                                          /* 0x00e00000083879f0 */
        /*0060*/                   FFMA R2, R3, R4, R5 ;                               /* 0x00e00000083879f0 */
        /*0070*/             @!UP2 BRA.U 0x40 ;                                        /* 0x00e00000083879f0 */
        /*0080*/                   LDL.64 R2, [R1] ;                                   /* 0x00e00000083879f0 */
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;      /* 0x00e00000083879f0 */
        /*00a0*/               @P0 BRA 0x90 ;                                          /* 0x00e00000083879f0 */
        /*00b0*/                   BRA 0x10 ;                                          /* 0x00e00000083879f0 */
        /*00c0*/                   EXIT ;                                              /* 0x00e00000083879f0 */
        /*00d0*/                   BRA 0xd0;                                           /* 0x00e00000083879f0 */
"""

TTIR = """
  tt.func public @toy(%q: !tt.ptr<bf16>) {
    %0 = tt.dot %a, %a, %c, inputPrecision = tf32 : tensor<512x512xbf16> * tensor<512x512xbf16> -> tensor<512x512xf32> loc(#1)
    %1:2 = scf.for %i = %0 to %1 step %2 iter_args(%x = %y) -> (tensor<128x64xf32>)  : i32 {
      %2 = "tt.reduce"(%7) <{axis = 1 : i32}> ({
      ^bb0(%u: f32 loc(#2), %v: f32 loc(#2)):
        tt.reduce.return %w : f32 loc(#2)
      }) : (tensor<128x64xf32>) -> tensor<128xf32> loc(#2)
      %3 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32> loc(#1)
      %4 = scf.for %j = %0 to %1 step %2 iter_args(%x = %y) -> (tensor<16x16xf32>)  : i32 {
        %5 = tt.dot %a, %b, %c : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32> loc(#1)
        scf.yield %5 : tensor<16x16xf32> loc(#3)
      } loc(#3)
      %6 = tt.dot %a, %b, %c : tensor<128x32xbf16> * tensor<32x64xbf16> -> tensor<128x64xf32> loc(#1)
      scf.yield %6 : tensor<128x64xf32> loc(#3)
    } loc(#3)
    tt.return loc(#4)
  } loc(#5)
"""


def compile_toys(arch: int) -> dict[str, dict[str, Any]]:
    """Return what is reported of the toy kernels; runs in a process without the interpreter."""
    what = Compilation("direct", arch, "bfloat16", 64, 197)
    table = {name: kernels.Launch(blocks, num_warps, 2) for name, (blocks, num_warps, _) in TOYS.items()}
    q, k, v, _ = example(what)
    real = kernels.launch
    with compiling_only(what, table) as found:
        for name, launch in table.items():
            arguments = (q, k, v, torch.empty(197, 64, dtype=q.dtype), q.stride(2), 197)
            kernels.launch(toy_attention, (2,), *arguments, config=launch, WIDTH=64, PRODUCTS=TOYS[name][2])
        square = torch.empty(64, 64)
        for width in (32, 48):  # 48: no power of two
            kernels.launch(toy_ieee, (1,), square, square, config=kernels.Launch({}, 4, 1), WIDTH=width)
    assert kernels.launch is real
    return dict(zip([*TOYS, "ieee", "broken"], map(vars, found)))


def run(*command: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter, unless it is asked for."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def inspect_kernels(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the program: exit code, rows, output."""
    done = run("tools/inspect_kernels.py", "--out", str(folder), *arguments)
    assert done.returncode in (0, 1), done.stderr
    content = json.loads((folder / "kernels.json").read_text())
    assert {"commit", "dirty"} <= content["provenance"]["git"].keys()
    assert content["provenance"]["ptxas"].startswith("V")
    return done.returncode, content["rows"], done.stdout


@pytest.fixture(scope="module")
def toys() -> dict[int, dict[str, dict[str, Any]]]:
    done = run("tests/test_compiled.py", "80", "90")
    assert done.returncode == 0, done.stderr
    return {int(arch): rows for arch, rows in json.loads(done.stdout).items()}


def test_the_inner_loop_is_found() -> None:
    code = machine_code.parse_sass(HOPPER)
    assert len(code) == 14
    loop = machine_code.inner_loop(code)
    assert [instruction.opcode for instruction in loop] == ["HGMMA.64x64x16.F32.BF16", "BRA", "FFMA", "BRA.U"]
    assert machine_code.spills(code) == (1, 2)
    assert machine_code.count(code) == {"HGMMA": 2, "MUFU": 1, "FFMA": 1}


def test_of_several_loops_the_one_with_the_most_products_counts() -> None:
    small, large = Instruction(0, "HMMA.1688.F32.TF32"), Instruction(32, "HMMA.16816.F32.BF16")
    code = [small, Instruction(16, "BRA", 0), large, Instruction(48, "BRA", 32), Instruction(64, "BRA", 64)]
    assert machine_code.inner_loop(code) == code[2:4]
    assert machine_code.inner_loop([small, large, Instruction(48, "BRA", 48)]) == []
    assert machine_code.inner_loop([Instruction(0, "FFMA"), Instruction(16, "BRA", 0)]) == []


def test_a_listing_without_code_is_refused() -> None:
    with pytest.raises(ValueError, match="no machine code in the listing 'Fatbin"):
        machine_code.parse_sass("Fatbin elf code:")


@pytest.mark.parametrize(
    ("opcode", "arch", "fma", "clocks"),
    [
        ("HGMMA.64x64x16.F32.BF16", 90, 64 * 64 * 16 / 4, 32),  # of a warpgroup: four warps
        ("HGMMA.64x256x16.F32", 90, 64 * 256 * 16 / 4, 128),
        ("HGMMA.64x64x8.F32.TF32", 90, 64 * 64 * 8 / 4, 32),
        ("HMMA.16816.F32.BF16", 80, 16 * 8 * 16, 8),
        ("HMMA.1688.F32.TF32", 80, 16 * 8 * 8, 8),
        ("HMMA.16816.F32", 89, 16 * 8 * 16, 16),
        ("UTCHMMA", 100, 0, 0),
        ("FFMA", 90, 0, 0),
    ],
)
def test_the_work_of_an_instruction(opcode: str, arch: int, fma: float, clocks: float) -> None:
    assert machine_code.tensor_fma(opcode) == fma
    assert machine_code.tensor_clocks(opcode, arch) == clocks


def test_the_products_of_the_source_are_those_of_its_inner_loop() -> None:
    assert machine_code.source_fma(TTIR) == 2 * 128 * 64 * 32
    assert machine_code.source_fma("\n".join(TTIR.splitlines()[:3])) == 512**3
    assert machine_code.source_fma("tt.return") == 0


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "blocks"),
    [
        (90, 128, 1024, 8, 2),  # registers
        (90, 97, 1024, 4, 4),  # given out by eight
        (90, 32, 113 * 1024, 4, 2),  # shared memory, 1 KiB of each block for the system
        (90, 32, 113 * 1024 + 1, 4, 1),
        (90, 16, 0, 8, 8),  # warps
        (89, 16, 0, 8, 6),
        (89, 16, 99 * 1024, 8, 1),
        (89, 16, 99 * 1024 + 1, 8, 0),
        (80, 16, 99 * 1024 + 1, 8, 1),
    ],
)
def test_blocks_on_an_sm(arch: int, registers: int, shared_bytes: int, num_warps: int, blocks: int) -> None:
    assert machine_code.blocks_per_sm(arch, registers, shared_bytes, num_warps) == blocks


def test_token_counts_with_the_same_code_share_a_row() -> None:
    row = Kernel("direct", 90, "forward", "", "", "bfloat16", 64, "197", "BLOCK_M=64", 4, 2)
    rows = merge([row, replace(row, num_tokens="1025"), row, replace(row, num_tokens="1025", code="other")])
    assert [(item.num_tokens, item.code) for item in rows] == [("197, 1025", ""), ("1025", "other")]


def test_too_much_shared_memory_is_a_fault() -> None:
    row = Kernel("direct", 89, "forward", "", "", "bfloat16", 64, "197", "", 4, 2, shared_bytes=99 * 1024, tensor="HMMA")
    assert find_fault(row, "tt.dot ") == ""
    assert (
        find_fault(replace(row, shared_bytes=99 * 1024 + 1), "tt.dot ") == "101377 bytes of shared memory, 101376 is the limit"
    )
    assert find_fault(replace(row, arch=90, shared_bytes=99 * 1024 + 1), "tt.dot ") == ""


@pytest.mark.parametrize("arch", [80, 90])
def test_toy_kernels_are_seen_as_they_are(toys: dict[int, dict[str, dict[str, Any]]], arch: int) -> None:
    found, tensor = toys[arch], {80: "HMMA", 90: "HGMMA"}[arch]
    good = found["good"]
    assert (good["fault"], good["tensor"], good["spill_stores"], good["entry"]) == ("", tensor, 0, "good")
    assert good["flags"] == "PRODUCTS"
    assert good["redundancy"] == 1
    scores, clocks = 128 * 64, 2 * 128 * 64 * 64 / CHIPS[arch].tensor_rate * 4 / 8
    assert good["loop_tensor_clocks"] == clocks
    assert good["issue_per_tensor"] == good["loop_instructions"] / clocks
    assert good["instructions_per_score"] == good["loop_instructions"] * 8 * 32 / scores
    assert 3 < good["instructions_per_score"] < 10  # at least x, p and its rounding
    assert good["shared_bytes"] >= 2 * 64 * 64 * 2  # k and v
    spilling = found["spilling"]
    assert spilling["fault"].startswith(f"spills ({spilling['spill_stores']} stores, {spilling['spill_loads']} loads)")
    assert spilling["spill_stores"] > 100
    without = found["without products"]
    assert (without["tensor"], without["loop_instructions"], without["fault"]) == ("", None, "")
    assert "its products use no tensor core" in found["ieee"]["fault"]
    assert "does not compile" in found["broken"]["fault"]
    assert "power of 2" in found["broken"]["fault"]


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    done = run("tools/inspect_kernels.py", "--out", str(tmp_path), interpret=True)
    assert done.returncode == 2
    assert done.stderr == "error: TRITON_INTERPRET is set: interpreted kernels are not compiled. Unset it\n"
    assert list(tmp_path.iterdir()) == []
    assert run("tests/test_compiled.py", "90", interpret=True).stderr.strip().endswith("are not compiled. Unset it")


@pytest.fixture(scope="module")
def real_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All kernels of both passes by every entry of the launch tables for 16 bits."""
    return compile_tables(tmp_path_factory.mktemp("kernels"), "bfloat16")


def compile_tables(folder: Path, dtype: str) -> list[dict[str, Any]]:
    """Compile both forms, the direct one with few tokens and with more, and return the rows; every entry is among them."""
    rows, bits = [], {"bfloat16": 16, "float32": 32}[dtype]
    for form, num_tokens in (("direct", ["197", "1025"]), ("efficient", ["1025"])):
        options = ["--form", form, "--arch", "80", "90", "--num_tokens", *num_tokens, "--dtype", dtype, "--jobs", "1"]
        found = inspect_kernels(folder, *options)[1]
        entries = {str(key) for key in launch_table(form) if key[-1] == bits}
        assert entries <= {entry for row in found for entry in row["entry"].split("; ")}
        rows += found
    return rows


def name_of(row: dict[str, Any]) -> str:
    return row["kernel"] + " prepared" * ("PREPARED" in row["flags"].split())


def test_no_kernel_spills_or_leaves_the_tensor_cores(real_kernels: list[dict[str, Any]]) -> None:
    assert [(row["arch"], row["entry"], row["flags"], row["fault"]) for row in real_kernels if row["fault"]] == []
    assert {row["kernel"] for row in real_kernels if not row["tensor"]} == WITHOUT_PRODUCTS
    for row in real_kernels:
        assert 0 < row["registers"] <= 255
        assert row["blocks_per_sm"] > 0


def test_inner_loops_stay_within_their_budgets(real_kernels: list[dict[str, Any]]) -> None:
    seen, over = set(), []
    for row in real_kernels:
        name, arch, head_dim = name_of(row), row["arch"], row["head_dim"]
        cost = row["instructions_per_score"] or row["issue_per_tensor"]
        if name not in BUDGETS or cost is None:
            continue
        seen.add((name, arch, head_dim))
        assert row["tensor"] == {80: "HMMA", 90: "HGMMA"}[arch]
        if (name, arch, head_dim) in WARPS_REPEAT:
            cost *= round(row["redundancy"])  # for each score that is wanted
        else:
            assert row["redundancy"] == 1
        if cost > BUDGETS[name][arch][head_dim]:
            over.append((name, row["flags"], arch, head_dim, cost))
    assert seen == {(name, arch, D) for name, archs in BUDGETS.items() for arch, places in archs.items() for D in places}
    assert over == []


@pytest.mark.slow
def test_no_kernel_for_fp32_spills_or_leaves_the_tensor_cores(tmp_path: Path) -> None:
    test_no_kernel_spills_or_leaves_the_tensor_cores(compile_tables(tmp_path, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["86", "89", "100"])
def test_other_architectures_compile(tmp_path: Path, arch: str) -> None:
    """Their blocks were not chosen for them: a few kernels spill."""
    _, rows, output = inspect_kernels(tmp_path, "--arch", arch, "--dtype", "bfloat16")
    assert not [row for row in rows if row["fault"] and not row["fault"].startswith("spills")], output
    assert {row["form"] for row in rows} == {"direct", "efficient"}


if __name__ == "__main__":
    print(json.dumps({arch: compile_toys(int(arch)) for arch in sys.argv[1:]}))
