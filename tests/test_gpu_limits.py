"""Limits of a GPU: the formulas, the file, its kernels under Triton's interpreter and compiled for Hopper, the program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool

sys.path.insert(0, str(ROOT / "tools"))

import bench_attention
import bench_model
import calibrate
import gpu_limits

from taylorvit.benchmark import limits_measure
from taylorvit.benchmark.case import Case
from taylorvit.benchmark.limits import Limits, least_bytes, least_seconds, matmul_flops, read_limits

GPU = "GPU of the test"
RATES = {"bfloat16": 8e14, "float16": 7e14, "tfloat32": 4e14}
LIMITS = Limits(GPU, 4e12, RATES)

needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU itself")


def write_limits(path: Path) -> Path:
    rates = {f"matmul_{name}": {"flops_per_second": rate} for name, rate in RATES.items()}
    path.write_text(json.dumps({"gpu": {"name": GPU}, "rates": {**rates, "copy": {"bytes_per_second": 4e12}}}))
    return path


def test_least_traffic_is_that_of_every_tensor_once() -> None:
    tokens = 2 * 3 * 197
    assert least_bytes(Case(2, 3, 197, 64, "bfloat16")) == 8 * tokens * 64
    assert least_bytes(Case(2, 3, 197, 64, "bfloat16", training=True)) == 24 * tokens * 64
    assert least_bytes(Case(2, 3, 197, 64, "float32")) == 16 * tokens * 64


def test_flops_are_those_of_the_matrix_products() -> None:
    forward, training = (Case(2, 3, 500, 16, "bfloat16", training) for training in (False, True))
    assert matmul_flops(forward, "direct") == 6 * 4 * 500**2 * 16
    assert matmul_flops(training, "direct") == 6 * 14 * 500**2 * 16
    assert matmul_flops(forward, "efficient") == 6 * 4 * 500 * 16 * (153 + 16)  # 136 products, 16 linear, 1; Gram matrix
    assert matmul_flops(training, "efficient") == 3 * matmul_flops(forward, "efficient")


def test_the_limit_is_the_slower_of_traffic_and_products() -> None:
    small, large = Case(64, 3, 197, 64, "bfloat16"), Case(4, 3, 4097, 64, "bfloat16")
    assert least_seconds(small, "direct", LIMITS) == least_bytes(small) / 4e12 > matmul_flops(small, "direct") / 8e14
    assert least_seconds(large, "direct", LIMITS) == matmul_flops(large, "direct") / 8e14
    assert least_seconds(large, "efficient", LIMITS) == matmul_flops(large, "efficient") / 8e14
    single = Case(4, 3, 4097, 64, "float32")
    assert least_seconds(single, "direct", LIMITS) == matmul_flops(single, "direct") / 4e14
    assert least_seconds(Case(4, 3, 4097, 64, "float64"), "direct", LIMITS) is None


def test_the_file_is_read_for_its_own_gpu_only(tmp_path: Path) -> None:
    path = write_limits(tmp_path / "limits.json")
    assert read_limits(path, GPU) == LIMITS
    with pytest.raises(ValueError, match="another GPU: 'GPU of the test', here is 'other'"):
        read_limits(path, "other")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"gpu": {"name": "x"}, "rates": {"copy": {}}}', None], ids=str)
def test_another_file_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="limits.json is no file of tools/gpu_limits.py"):
        read_limits(path, GPU)


@needs_interpreter
@pytest.mark.parametrize("programs", [3, 8])
def test_every_block_is_read_equally_often(programs: int) -> None:
    from taylorvit.benchmark.limits_kernels import read_blocks

    source = torch.arange(8 * 16, dtype=torch.float32)
    sums = torch.full((programs * 16,), torch.nan)
    read_blocks[(programs,)](source, sums, 8, 16, BLOCK=16)
    assert torch.equal(sums.view(programs, 16).sum(0), programs * 16 / 8 * source.view(8, 16).sum(0))


@needs_interpreter
@pytest.mark.parametrize("stream", [False, True], ids=["held", "streamed"])
def test_features_times_state_are_added_up(stream: bool) -> None:
    from taylorvit.benchmark.limits_kernels import multiply_features

    torch.manual_seed(0)
    tokens, state, out = torch.randn(32, 32), torch.randn(2, 256, 16), torch.full((32, 16), torch.nan)
    multiply_features[(2,)](tokens, state, out, 3, ROWS=16, WIDTH=16, STREAM=stream)
    features = (tokens[:, :16, None] * tokens[:, None, 16:]).flatten(1)
    weights = 2 * state[0] + state[1] if stream else 3 * state[0]
    torch.testing.assert_close(out, features @ weights, rtol=1e-4, atol=1e-3)


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taylorvit.benchmark import limits_kernels

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def machine_code(kernel, kinds, constants):
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(kinds.values()) if kind[0] == "*"}
    kinds = kinds | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": 8, "num_stages": 3}
    made = triton.compile(ASTSource(kernel, kinds, constants, aligned), GPUTarget("cuda", 90, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return [subprocess.check_output([tool, what, file.name], text=True) for what in ("-sass", "-res-usage")]


dot = {"tokens": "*bf16", "state": "*bf16", "out": "*fp32", "num_steps": "i32"}
for rows in (128, 256):
    for stream in (False, True):
        code, usage = machine_code(limits_kernels.multiply_features, dot, {"ROWS": rows, "WIDTH": 64, "STREAM": stream})
        lines = code.splitlines()
        products = [number for number, line in enumerate(lines) if "HGMMA" in line]
        loop = lines[products[0] : products[-1]]
        assert len(products) == 16 * rows // 128
        assert all(re.search(r"HGMMA\\S+ R\\d+, R\\d+, gdesc", lines[number]) for number in products), "features in registers"
        assert not any("MUL" in line for line in loop), "features are made once"
        assert any("LDGSTS" in line for line in lines) == stream
        assert "STACK:0" in usage, usage
code, usage = machine_code(
    limits_kernels.read_blocks, {"source": "*fp32", "sums": "*fp32", "num_blocks": "i32", "num_steps": "i32"}, {"BLOCK": 4096}
)
loads = [line for line in code.splitlines() if "LDG" in line]
assert len(loads) == 4, loads
assert all("LDG.E.128.STRONG.GPU" in line for line in loads), loads
machine_code(limits_kernels.do_nothing, {"x": "*fp32"}, {})
"""


def test_the_kernels_compile_for_hopper_as_they_are_meant() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_rate_is_an_amount_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.004] * 4 + [0.001, 0.002, 0.004] * 9)
    monkeypatch.setattr(limits_measure, "time_on_gpu", lambda run: run() or next(clock))
    rate = limits_measure.rate_of(lambda: None, 6.0, "bytes", 1e-9)
    assert rate["bytes_per_second"] == 3000
    assert rate["bytes_per_second_low"] < 3000 < rate["bytes_per_second_high"]
    assert rate["seconds"] == 0.002


def test_a_machine_without_nvidia_smi_tells_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert limits_measure.query_gpu(("clocks.sm",)) == {}


def test_clocks_go_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, "1980 MHz, 55\n", "")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: done)
    assert limits_measure.query_gpu(("clocks.sm", "temperature.gpu")) == {"clocks.sm": "1980 MHz", "temperature.gpu": "55"}
    assert limits_measure.query_gpu(("clocks.sm",)) == {}


def test_the_file_that_is_written_is_the_one_that_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(unit: str, value: float) -> limits_measure.Rate:
        return {f"{unit}_per_second{end}": value * size for end, size in (("", 1.0), ("_low", 0.9), ("_high", 1.1))}

    rates = {f"matmul_{name}": rate("flops", value) for name, value in RATES.items()}
    rates |= {"copy": rate("bytes", 4e12), "launch_kernel": rate("launches", 2e5)}
    monkeypatch.setattr(gpu_limits, "check_machine", lambda: None)
    monkeypatch.setattr(gpu_limits, "measure_rates", lambda seconds: rates)
    monkeypatch.setattr(gpu_limits, "describe_gpu", lambda: {"name": GPU})
    out = tmp_path / "new" / "limits.json"
    assert run_tool(monkeypatch, gpu_limits.main, "--out", str(out)) == 0
    assert read_limits(out, GPU) == LIMITS
    assert "commit" in str(json.loads(out.read_text())["provenance"])
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "matmul_bfloat16 800.000 TFLOP/s (720.000 - 880.000)" in printed
    assert "copy 4.000 TB/s (3.600 - 4.400)" in printed
    assert "launch_kernel 5.000 us (4.545 - 5.556)" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(monkeypatch, gpu_limits.main, "--out", str(tmp_path / "new" / "limits.json")) == 2
    assert capsys.readouterr().err == "error: the limits of a GPU cannot be measured: PyTorch sees no GPU here\n"
    assert not list(tmp_path.iterdir())


RECORDER = """\
#!/usr/bin/env bash
echo "$@" >> commands.txt
[ -e works ] || [[ "$*" != *calibrate* ]]
"""


def test_the_report_goes_on_where_a_step_failed_and_its_commands_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    script, recorder, works = tmp_path / "tools" / "gpu_report.sh", tmp_path / "python", tmp_path / "works"
    shutil.copy(ROOT / "tools" / script.name, script)
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)

    def run() -> tuple[int, list[str]]:
        (tmp_path / "commands.txt").unlink(missing_ok=True)
        code = subprocess.run(["bash", script], env={**os.environ, "PYTHON": str(recorder)}, check=False).returncode
        recorded = tmp_path / "commands.txt"
        return code, recorded.read_text().splitlines() if recorded.exists() else []

    code, commands = run()
    assert code == 1
    assert len(commands) > 10
    programs = {
        "bench_attention": bench_attention,
        "bench_model": bench_model,
        "calibrate": calibrate,
        "gpu_limits": gpu_limits,
    }
    folders = []
    for command in commands:
        program, *arguments = command.split()
        if program != "-m":
            options = programs[Path(program).stem].build_parser().parse_args(arguments)
            folders.append(options.out)
            assert getattr(options, "limits", None) in (None, Path("results/gpu/limits.json"))
            if program.endswith("bench_attention.py"):
                assert options.limits
                bench_attention.choose_peers(options.candidates, "cuda")
    assert len(set(folders)) == len(folders)
    works.touch()
    code, commands = run()
    assert (code, len(commands)) == (0, 1)
    assert "calibrate" in commands[0]
    assert run() == (0, [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_rates_of_a_real_gpu_are_plausible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "limits.json"
    assert run_tool(monkeypatch, gpu_limits.main, "--seconds", "0.2", "--out", str(out)) == 0
    content = json.loads(out.read_text())
    rates = content["rates"]
    limits = read_limits(out, torch.cuda.get_device_name())
    assert limits.copy_bytes_per_second < rates["l2_read"]["bytes_per_second"] < 1e14
    assert 1e11 < limits.copy_bytes_per_second < 1e13
    assert 1e13 < limits.matmul_flops_per_second["tfloat32"] < limits.matmul_flops_per_second["bfloat16"] < 3e15
    for name in ("dot_128_held", "dot_256_held", "dot_128_streamed", "dot_256_streamed"):
        assert 1e13 < rates[name]["flops_per_second"] < 1.3 * limits.matmul_flops_per_second["bfloat16"]
    assert rates["launch_in_graph"]["launches_per_second"] > rates["launch_kernel"]["launches_per_second"]
    assert rates["launch_kernel"]["launches_per_second"] > rates["launch_operator"]["launches_per_second"]
