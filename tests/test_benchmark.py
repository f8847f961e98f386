"""The measuring package: paired times on a drifting clock, memory of a known size, right peers, and wrong ones refused."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taylorvit.benchmark import paper
from taylorvit.benchmark.case import Case
from taylorvit.benchmark.check import check
from taylorvit.benchmark.limits import Limits, matmul_flops
from taylorvit.benchmark.measure import Row, Settings, _enter_rates, measure
from taylorvit.benchmark.memory import _reason, can_measure_on_cpu, is_out_of_memory, peak_bytes_on_cpu
from taylorvit.benchmark.peers import Peer, all_peers, chosen_backend
from taylorvit.benchmark.report import ResultFiles, crossovers, draw, markdown_table
from taylorvit.benchmark.timing import CandidateError, compare, default_stopwatch, make_input_sets, spread, time_on_cpu
from taylorvit.complexity import entries_direct, ops_direct, ops_efficient
from taylorvit.ops import IMPLEMENTATIONS, reference

QUICK = Settings(seconds=1e-3, min_rounds=2, num_input_sets=2)


class Machine:
    """A clock on which only calls take time: `cost` seconds, times a factor that changes every `period` measurements."""

    def __init__(self, *, period: int = 1, drift: float = 1.0) -> None:
        self.now, self.factor, self.measured = 0.0, 1.0, 0
        self.period, self.drift = period, drift
        self.calls: list[tuple[str, object]] = []

    def candidate(self, name: str, cost: float) -> Callable[[object], None]:
        def call(inputs: object) -> None:
            self.calls.append((name, inputs))
            self.now += cost * self.factor

        return call

    def stopwatch(self, run: Callable[[], None]) -> float:
        self.factor = self.drift ** (self.measured // self.period)
        self.measured += 1
        start = self.now
        run()
        return self.now - start


def test_a_ratio_is_taken_within_the_rounds() -> None:
    machine = Machine(period=2, drift=3.0)  # each round takes three times as long as the one before
    candidates = {"slow": machine.candidate("slow", 2.0), "fast": machine.candidate("fast", 0.5)}
    result = compare(candidates, lambda i: (i,), min_batch_seconds=0, min_rounds=5, seconds=1e-9, stopwatch=machine.stopwatch)
    assert result.num_rounds == 5
    assert result.seconds("fast").high > 3 * result.seconds("fast").median
    ratio = result.speedup("fast", over="slow")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((4.0, 4.0, 4.0))


def test_every_candidate_is_called_once_a_round_on_the_same_inputs_in_changing_order() -> None:
    machine = Machine()
    names = ["a", "b", "c"]
    candidates = {name: machine.candidate(name, 1.0) for name in names}
    compare(
        candidates, lambda i: (i,), num_input_sets=4, min_batch_seconds=0, min_rounds=12, seconds=1, stopwatch=machine.stopwatch
    )
    timed = machine.calls[-3 * 12 :]
    rounds = [timed[start : start + 3] for start in range(0, len(timed), 3)]
    assert all(sorted(name for name, _ in calls) == names for calls in rounds)
    assert [{inputs for _, inputs in calls} for calls in rounds] == [{number % 4} for number in range(12)]
    assert len({tuple(name for name, _ in calls) for calls in rounds}) > 1


def test_short_calls_are_repeated_over_rotating_inputs_and_divided_out() -> None:
    machine = Machine()
    result = compare(
        {"short": machine.candidate("short", 1e-4), "long": machine.candidate("long", 1.0)},
        lambda i: (i,),
        num_input_sets=3,
        min_batch_seconds=2e-3,
        min_rounds=2,
        stopwatch=machine.stopwatch,
    )
    assert result.repetitions["long"] == 1
    assert 20 <= result.repetitions["short"] < 30
    assert result.seconds("short").median == pytest.approx(1e-4)
    inputs = [inputs for name, inputs in machine.calls if name == "short"][-result.repetitions["short"] :]
    assert all((after - before) % 3 == 1 for before, after in itertools.pairwise(inputs))


def test_the_budget_is_shared_and_the_least_number_of_rounds_kept() -> None:
    for seconds, rounds in ((10.0, 8), (0.01, 5)):
        machine = Machine()
        candidates = {"a": machine.candidate("a", 2.0), "b": machine.candidate("b", 0.5)}
        result = compare(candidates, lambda i: (i,), seconds=seconds, min_rounds=5, stopwatch=machine.stopwatch)
        assert result.num_rounds == rounds


def test_the_number_of_input_sets_stays_within_the_memory_given() -> None:
    def make(index: int) -> tuple[Tensor, int]:
        return torch.full((256,), float(index)), index

    assert [index for _, index in make_input_sets(make, 8, 2**20)] == list(range(8))
    assert len(make_input_sets(make, 8, 3 * 1024 + 5)) == 3
    assert len(make_input_sets(make, 8, 10)) == 1


def test_a_cache_is_exceeded_twice_where_few_sets_would_fit_into_it() -> None:
    def count(numbers: int, cache_bytes: int, most_bytes: int = 2**20) -> int:
        return len(make_input_sets(lambda index: (torch.zeros(numbers),), 8, most_bytes, cache_bytes))

    assert count(256, cache_bytes=0) == 8
    assert count(256, cache_bytes=10 * 1024) == 20
    assert count(1, cache_bytes=10 * 1024) == 64
    assert count(256, cache_bytes=10 * 1024, most_bytes=12 * 1024) == 12


def test_a_capture_makes_the_calls_on_all_inputs_at_once_and_their_time_is_divided() -> None:
    machine = Machine()
    captured: list[int] = []

    def capture(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        captured.append(len(calls))
        return lambda: [call() for call in calls]

    candidates = {"a": machine.candidate("a", 1.0), "b": machine.candidate("b", 1e-4)}
    result = compare(
        candidates,
        lambda i: (torch.full((4,), float(i)),),
        num_input_sets=3,
        min_rounds=2,
        stopwatch=machine.stopwatch,
        capture=capture,
    )
    assert captured == [3, 3]
    assert result.seconds("a").median == pytest.approx(1.0)
    assert result.seconds("b").median == pytest.approx(1e-4)
    assert result.repetitions["a"] == 3
    assert result.repetitions["b"] % 3 == 0
    assert result.input_bytes == 3 * 16
    assert [float(inputs[0]) for name, inputs in machine.calls if name == "a"][-3:] == [0.0, 1.0, 2.0]


def test_every_call_is_made_within_its_context_and_entering_it_is_not_timed() -> None:
    machine, inside = Machine(), []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        machine.now += 1000.0
        inside.append(True)
        yield
        inside.pop()

    def call(inputs: object) -> None:
        assert inside
        machine.candidate("a", 1.0)(inputs)

    result = compare({"a": call}, lambda i: (i,), min_rounds=3, stopwatch=machine.stopwatch, around={"a": around})
    assert result.seconds("a").high == pytest.approx(1.0)
    assert not inside


def test_a_candidate_that_fails_is_named() -> None:
    def broken(x: Tensor) -> None:
        raise KeyError("odd")

    with pytest.raises(CandidateError, match="odd") as caught:
        compare({"good": torch.sin, "bad": broken}, lambda i: (torch.ones(3),), seconds=1e-4)
    assert caught.value.name == "bad"
    assert isinstance(caught.value.cause, KeyError)
    with pytest.raises(ValueError, match="nothing"):
        compare({}, lambda i: (torch.ones(3),))


def test_real_time_on_cpu_tells_a_long_call_from_a_short_one() -> None:
    candidates = {"long": lambda x: [x.sin() for _ in range(40)], "short": lambda x: x.sin()}
    result = compare(candidates, lambda i: (torch.randn(10_000),), seconds=0.05, min_rounds=25)
    assert default_stopwatch((torch.ones(1),)) is time_on_cpu
    assert 4 < result.speedup("short", over="long").median < 400  # 40 on a quiet machine


def test_the_spread_is_median_and_outer_tenths() -> None:
    found = spread([float(x) for x in range(11)])
    assert (found.median, found.low, found.high) == pytest.approx((5.0, 1.0, 9.0))
    assert spread([3.0]).high == 3.0


ALLOCATION = """
import torch
from taylorvit.benchmark.memory import Prepared

MIB = 2**18  # of fp32

def prepare(scratch, result):
    inputs = torch.ones(16 * MIB)

    def call():
        torch.ones(scratch * MIB).sum()
        return torch.ones(result * MIB) + inputs[0], torch.ones(result * MIB)

    return Prepared(lambda: torch.ones(90 * MIB).sum(), call)  # what this frees must not hide what the call needs
"""


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
def test_the_peak_of_a_known_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "allocation.py").write_text(ALLOCATION)
    monkeypatch.syspath_prepend(tmp_path)
    peak = peak_bytes_on_cpu("allocation:prepare", {"scratch": 60, "result": 20})
    assert peak == pytest.approx(60 * 2**20, rel=0.2)


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
@pytest.mark.parametrize(
    ("code", "stdout", "error"),
    [
        (-9, "", MemoryError),
        (0, "a warning\nout of memory\n", MemoryError),
        (1, "", RuntimeError),
    ],
    ids=["killed", "refused", "failed"],
)
def test_a_process_that_could_not_measure(
    monkeypatch: pytest.MonkeyPatch, code: int, stdout: str, error: type[Exception]
) -> None:
    done = subprocess.CompletedProcess([], code, stdout, "x.y.BadError: too odd")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(error, match="too odd" if error is RuntimeError else "memory"):
        peak_bytes_on_cpu("module:function", {})


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("taylorvit.benchmark.memory.CLEAR_REFS", tmp_path / "no" / "such")
    assert peak_bytes_on_cpu("anything:at_all", {}) is None


def test_what_a_process_died_of() -> None:
    assert _reason("Traceback\n  File x\nmy.module.BadError: too odd\n\nhint: set THIS") == "my.module.BadError: too odd"
    assert _reason("") == "no message"
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_there_is_a_peer_for_every_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    known = all_peers()
    assert {f"taylor_{form}_{impl}" for impl, forms in IMPLEMENTATIONS.items() for form in forms} <= known.keys()
    assert {"sdpa", "sdpa_math", "flex", "paper_direct", "paper_efficient", "taylor_auto"} <= known.keys()
    assert all(name == peer.name for name, peer in known.items())
    seen = []
    for form in ("direct", "efficient"):
        monkeypatch.setitem(IMPLEMENTATIONS["reference"], form, lambda *tensors, form=form: seen.append(form) or tensors[2])
        known[f"taylor_{form}_reference"].build()(*Case(1, 1, 4, 2).make_inputs(0))
    assert seen == ["direct", "efficient"]


@pytest.mark.parametrize("form", ["direct", "efficient"])
@pytest.mark.parametrize("shape", [(2, 3, 50, 8), (1, 1, 1, 4), (1, 2, 80, 16)], ids=str)
def test_the_papers_way_of_computing_is_the_same_function(form: str, shape: tuple[int, int, int, int]) -> None:
    case = Case(*shape, dtype="float64", training=True)
    inputs = case.make_inputs(3)
    computed = case.bind(getattr(paper, form), "taylor")(*inputs)
    for ours, theirs in zip(computed, case.bind(reference.direct, "taylor")(*inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_peer_is_right(dtype: str, training: bool) -> None:
    case = Case(1, 2, 150, 8, dtype, training)
    checked = 0
    for peer in all_peers().values():
        if peer.compiled or peer.obstacle(case):
            continue
        call = case.bind(peer.build(), peer.truth)
        for limit in (2**28, 1000):
            verdict = check(call, peer.truth, case, max_truth_bytes=limit)
            assert verdict.passed, f"{peer.name}: {verdict}"
            assert verdict.num_queries == (150 if limit > 1000 else 64)
        checked += 1
    assert checked >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flex", "compiled_reference_direct", "compiled_reference_efficient"])
def test_a_compiled_peer_is_right(name: str) -> None:
    peer = all_peers()[name]
    for training in (False, True):
        case = Case(1, 2, 70, 16, training=training)
        if reason := peer.obstacle(case):
            assert name == "flex", reason
            assert "backward" in reason
            continue
        verdict = check(case.bind(peer.build(), peer.truth), peer.truth, case)
        assert verdict.passed, verdict


def forgets_the_half(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    x = temperature[:, None, None] * reference.unit_vectors(q) @ reference.unit_vectors(k).mT
    w = x.square() + x + 1
    N, D = v.shape[-2:]
    return math.sqrt(N / D) * (w @ v) / w.sum(-1, keepdim=True)


def forgets_the_last_token(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    N = v.shape[-2]
    return reference.direct(q, k[..., :-1, :], v[..., :-1, :], temperature) * math.sqrt(N / (N - 1))


def one_number_is_nan(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    y = reference.direct(q, k, v, temperature)
    hole = torch.zeros_like(y)
    hole[0, 0, 0, 0] = math.nan
    return y + hole


def confuses_the_heads(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return reference.direct(q, k, v, temperature.flip(0))


def wrong_gradient_of(index: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def attention(*tensors: Tensor) -> Tensor:
        x = tensors[index]
        scaled = torch.lerp(x.detach(), x, 1.001)  # the value of x, a thousandth too much of its gradient
        return reference.direct(*tensors[:index], scaled, *tensors[index + 1 :])

    return attention


@pytest.mark.parametrize("limit", [2**28, 1000], ids=["all queries", "some queries"])
@pytest.mark.parametrize(
    "attention",
    [forgets_the_half, forgets_the_last_token, one_number_is_nan, confuses_the_heads, *map(wrong_gradient_of, range(4))],
    ids=lambda f: f.__qualname__,
)
def test_a_wrong_result_is_refused(attention: Callable[..., Tensor], limit: int) -> None:
    case = Case(1, 2, 300, 8, training=True)
    assert check(case.bind(reference.direct, "taylor"), "taylor", case, max_truth_bytes=limit).passed
    assert not check(case.bind(attention, "taylor"), "taylor", case, max_truth_bytes=limit).passed


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_packed_inputs_are_views_of_one_tensor_and_the_output_is_as_it_is_passed_on(training: bool) -> None:
    case = Case(2, 3, 20, 4, "float64", training, layout="packed")
    q, k, v, *_ = case.make_inputs(0)
    assert q.shape == k.shape == v.shape == (2, 3, 20, 4)
    assert q.stride() == (20 * 36, 4, 36, 1)
    assert [x.data_ptr() - q.data_ptr() for x in (k, v)] == [8 * 12, 8 * 24]
    assert q.is_leaf
    assert q.requires_grad == training
    packed = case.bind(reference.direct, "taylor")(*case.make_inputs(0))
    plain = dataclasses.replace(case, layout="separate").bind(reference.direct, "taylor")(*case.make_inputs(0))
    assert packed[0].stride() == (20 * 12, 4, 12, 1)
    for ours, theirs in zip(packed, plain, strict=True):
        assert torch.equal(ours, theirs)
    if training:
        assert case.make_inputs(0)[4].stride() == (20 * 12, 4, 12, 1)
    assert check(case.bind(reference.direct, "taylor"), "taylor", case).passed
    assert not check(case.bind(forgets_the_half, "taylor"), "taylor", case).passed


def test_half_precision_may_round_every_pair_before_the_temperatures_gradient_is_summed() -> None:
    """Not in fp32; and a gradient that is a few percent off is refused in half precision too."""

    def scaled_gradient(factor: float) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
            return reference.direct(q, k, v, torch.lerp(temperature.detach(), temperature, factor))

        return attention

    for dtype, factor, passes in (("bfloat16", 1.008, True), ("bfloat16", 1.04, False), ("float32", 1.0005, False)):
        case = Case(1, 2, 150, 8, dtype, training=True)
        assert check(case.bind(scaled_gradient(factor), "taylor"), "taylor", case).passed == passes


def test_softmax_and_taylor_are_not_taken_for_one_another() -> None:
    case = Case(1, 1, 30, 8)
    peers = all_peers()
    assert not check(case.bind(peers["sdpa"].build(), "softmax"), "taylor", case).passed
    assert not check(case.bind(reference.direct, "taylor"), "softmax", case).passed


def test_costs_are_those_of_the_formulas() -> None:
    peers = all_peers()
    forward, training = (Case(2, 3, 100, 16, training=training) for training in (False, True))
    assert peers["sdpa"].operations(forward) == 6 * 4 * 100**2 * 16
    assert peers["paper_direct"].operations(training) == 3.5 * 6 * ops_direct(100, 16)
    assert peers["paper_efficient"].operations(training) == 3.0 * 6 * ops_efficient(100, 16)
    long = Case(1, 3, 100_000, 16)
    assert peers["taylor_auto"].operations(long) == peers["taylor_auto"].resolve(long).operations(long) < 1e12
    assert peers["paper_direct"].needed_bytes(long) > 3 * 4 * entries_direct(100_000, 16)
    assert peers["sdpa"].needed_bytes(long) < 2**28
    assert peers["paper_direct"].needed_bytes(dataclasses.replace(long, dtype="float64")) == 2 * peers[
        "paper_direct"
    ].needed_bytes(long)


def test_what_cannot_run_says_why() -> None:
    peers = all_peers()
    assert "cuda only" in str(peers["sdpa_cudnn"].obstacle(Case(1, 1, 4, 4)))
    assert "float64" in str(peers["paper_efficient"].obstacle(Case(1, 1, 4, 4, "bfloat16")))
    refused = dataclasses.replace(peers["sdpa_efficient"], devices=("cpu",))
    assert "refuses" in str(refused.obstacle(Case(1, 1, 4, 4)))


def test_what_a_gpu_alone_restricts() -> None:
    peers = all_peers()
    small = Case(1, 1, 4, 8, "bfloat16", device="cuda")
    assert "from 16 on" in str(peers["flex"].obstacle(small))
    assert peers["flex"].obstacle(dataclasses.replace(small, head_dim=16)) is None
    assert peers["paper_direct_fp32"].obstacle(small) is None
    assert "float16, bfloat16" in str(peers["paper_direct_fp32"].obstacle(dataclasses.replace(small, dtype="float32")))
    assert "float64" in str(peers["taylor_direct_triton"].obstacle(dataclasses.replace(small, dtype="float64")))
    assert "128" in str(peers["taylor_direct_triton"].obstacle(dataclasses.replace(small, head_dim=256)))
    assert "cuda" in str(peers["taylor_direct_triton"].obstacle(Case(1, 1, 4, 8, "bfloat16")))


@pytest.mark.parametrize("name", ["paper_direct_fp32", "paper_efficient_fp32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_papers_way_is_right_for_half_precision_in_fp32(name: str, dtype: str) -> None:
    case = Case(2, 3, 150, 8, dtype, training=True)
    assert check(case.bind(all_peers()[name].build(), "taylor"), "taylor", case).passed


def test_a_forced_backend_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 1, 4, 8)
    forced = all_peers()["sdpa_math"]
    seen = []
    monkeypatch.setattr("taylorvit.benchmark.peers.sdpa", lambda *tensors: seen.append(chosen_backend(case)) or tensors[2])
    forced.build()(*case.make_inputs(0))
    forced.make()(*case.make_inputs(0))
    with forced.around():
        forced.make()(*case.make_inputs(0))
    assert seen == ["math", "flash", "math"]


def test_whatever_is_measured_of_a_forced_backend_runs_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 1, 4, 8)
    seen = set()

    def noting(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        seen.add(chosen_backend(case))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("taylorvit.benchmark.peers.sdpa", noting)
    (measured,) = measure(case, {"sdpa_math": all_peers()["sdpa_math"]}, QUICK)
    assert measured.seconds
    assert seen == {"math"}


def test_the_form_that_a_peer_computes() -> None:
    peers, case = all_peers(), Case(1, 1, 10, 8)
    forms = {
        name: peers[name].form(case) for name in ("sdpa", "flex", "paper_efficient", "taylor_efficient_cpu", "taylor_auto")
    }
    assert forms == {
        "sdpa": "direct",
        "flex": "direct",
        "paper_efficient": "efficient",
        "taylor_efficient_cpu": "efficient",
        "taylor_auto": "direct",
    }
    assert peers["taylor_auto"].form(dataclasses.replace(case, num_tokens=10_000)) == "efficient"


def test_rates_are_by_the_devices_own_time() -> None:
    peers, case = all_peers(), Case(1, 3, 1000, 64, "bfloat16")
    limits = Limits("x", 1e12, {"bfloat16": 1e14, "float16": 1e14, "tfloat32": 1e14})
    least = max(8 * 3 * 1000 * 64 / 1e12, 4 * 3 * 1000**2 * 64 / 1e14)
    for graph, seconds in ((None, 2e-3), (1e-3, 1e-3)):
        entered = row("taylor_direct_triton", 1000, 2e-3, graph_seconds=graph)
        _enter_rates(entered, peers["taylor_direct_triton"], case, limits)
        assert entered.tflops == pytest.approx(4 * 3 * 1000**2 * 64 / seconds / 1e12)
        assert (entered.limit_seconds, entered.limit_share) == pytest.approx((least, least / seconds))
    efficient = row("taylor_efficient_triton", 1000, 1e-3)
    _enter_rates(efficient, peers["taylor_efficient_triton"], case, None)
    assert efficient.tflops == pytest.approx(matmul_flops(case, "efficient") / 1e-3 / 1e12)
    assert efficient.limit_share is None


def test_a_table_of_a_gpu_shows_the_devices_time_and_the_share_of_the_limit() -> None:
    known = row("sdpa", 10, 4e-3, graph_seconds=2e-3, graph_speedup=1.0, tflops=321.4, limit_share=0.456)
    unknown = row("flex", 10, 4e-3, tflops=12.0)
    for shown in (known, unknown):
        shown.device = "cuda"
    lines = markdown_table([known, unknown, row("skipped", 10, None, status="skipped")]).splitlines()
    assert lines[0].endswith("| error | CUDA graph | x sdpa | TFLOP/s | of the limit |")
    assert lines[2].endswith("| 2 ms | 1.00 | 321 | 46% |")
    assert lines[3].endswith("|  |  | 12 | not measured |")
    assert len({line.count("|") for line in lines}) == 1
    assert "limit" not in markdown_table([row("sdpa", 10, 4e-3, tflops=1.0)])


def raising(error: Exception) -> Callable[..., Tensor]:
    def attention(*tensors: Tensor) -> Tensor:
        raise error

    return attention


def test_only_what_is_right_gets_a_time() -> None:
    calls = []

    def fails_later(*tensors: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:  # after the checks
            raise RuntimeError("worn out")
        return reference.direct(*tensors)

    functions = {
        "wrong": forgets_the_half,
        "failed": raising(RuntimeError("a fault\nwith a tail")),
        "worn": fails_later,
        "cannot run": raising(NotImplementedError("D must be 64")),
        "out of memory": raising(MemoryError()),
    }
    peers = {name: Peer(name, lambda f=f: f) for name, f in functions.items()}
    peers["skipped"] = Peer("skipped", lambda: paper.direct, materialises=True)
    peers |= {name: all_peers()[name] for name in ("sdpa", "taylor_efficient_reference", "sdpa_cudnn")}
    settings = dataclasses.replace(QUICK, memory_limit_bytes=500_000)
    rows = {row.candidate: row for row in measure(Case(1, 1, 200, 4), peers, settings)}
    assert list(rows) == list(peers)
    assert {name for name, row in rows.items() if row.seconds is not None} == {"sdpa", "taylor_efficient_reference"}
    assert {name for name, row in rows.items() if row.is_fault} == {"wrong", "failed", "worn"}
    for name in ("wrong", "failed", "cannot run", "out of memory", "skipped"):
        assert rows[name].status == name
    assert rows["failed"].note == "RuntimeError: a fault"
    assert rows["worn"].note == "RuntimeError: worn out"
    assert rows["wrong"].error > rows["wrong"].error_budget
    assert "GiB" in rows["skipped"].note
    assert rows["sdpa_cudnn"].status == "cannot run"
    timed = rows["taylor_efficient_reference"]
    assert 0.02 < timed.speedup / (rows["sdpa"].seconds / timed.seconds) < 50  # two rounds, busy; upside down it is 1 in 1,000
    assert timed.gflops == pytest.approx(ops_efficient(200, 4) / timed.seconds / 1e9)
    table = markdown_table(list(rows.values()))
    assert "| wrong | WRONG: error" in table
    assert all(cell == "" for cell in next(line for line in table.splitlines() if "WRONG" in line).split(" | ")[2:-1])


def test_a_broken_gpu_ends_the_measurement_and_names_who_broke_it() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    peers = {"culprit": Peer("culprit", lambda: raising(error)), "sdpa": all_peers()["sdpa"]}
    with pytest.raises(RuntimeError, match="culprit has broken the GPU's context"):
        measure(Case(1, 1, 8, 4), peers, QUICK)


def test_a_forced_backend_that_refuses_is_no_fault() -> None:
    refusing = Peer("refusing", lambda: raising(RuntimeError("No available kernel. Aborting execution.")))
    (refused,) = measure(Case(1, 1, 8, 4), {"refusing": refusing}, QUICK)
    assert (refused.status, refused.is_fault) == ("cannot run", False)


def row(candidate: str, num_tokens: int, seconds: float | None, **more: object) -> Row:
    return Row(candidate, "forward", 1, 1, num_tokens, 16, "float32", "cpu", seconds=seconds, **more)


def test_the_crossing_of_two_curves_is_interpolated() -> None:
    rows = [row("paper_direct", N, 1e-9 * N**2) for N in (100, 200, 400, 800)]
    rows += [row("paper_efficient", N, 1e-9 * 300 * N) for N in (100, 200, 400, 800)]
    never = {100: 3.0, 200: 2.0}  # comes nearer, but stays behind
    rows += [row("taylor_direct_cpu", N, 1.0) for N in never] + [row("taylor_efficient_cpu", *point) for point in never.items()]
    (found,) = crossovers(rows)
    assert (found["direct"], found["efficient"], found["quantity"]) == ("paper_direct", "paper_efficient", "seconds")
    assert found["num_tokens"] == pytest.approx(300)


def test_memory_too_small_to_be_told_apart_makes_no_crossing() -> None:
    for size, number in ((2**20, 1), (2**10, 0)):
        rows = [row("paper_direct", N, None, peak_bytes=N * size) for N in (1, 3)]
        rows += [row("paper_efficient", N, None, peak_bytes=2 * size) for N in (1, 3)]
        assert len(crossovers(rows)) == number


def test_rows_are_on_disk_as_they_come(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path / "new" / "folder", {"provenance": {"torch": "x"}})
    for count in (1, 2, 3):
        files.add([row("sdpa", 10 * count, 0.1, note="a, b", peak_bytes=5_000_000)])
        content = json.loads(files.json.read_text())
        assert [entry["num_tokens"] for entry in content["rows"]] == [10, 20, 30][:count]
        with files.csv.open() as file:
            assert [entry["note"] for entry in csv.DictReader(file)] == ["a, b"] * count
    assert content["provenance"] == {"torch": "x"}
    assert draw([*files.rows, row("x", 10, None, status="out of memory")], files.picture)
    assert files.picture.read_bytes().startswith(b"\x89PNG")
    assert not draw([row("sdpa", 10, None, status="skipped")], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    ResultFiles(tmp_path / "new" / "folder", {})
    assert not files.picture.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out .* cannot be written"):
        ResultFiles(tmp_path / "file", {})
