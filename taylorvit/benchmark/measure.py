"""Measure one case: check every candidate, time those that are right against one another, read their peak memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from .case import Case
from .check import check
from .limits import Limits, least_seconds, matmul_flops
from .memory import is_out_of_memory, peak_bytes_on_cpu, peak_bytes_on_gpu, release_memory
from .peers import BASELINE, Peer, chosen_backend, forget_compiled, is_refusal, prepare_call
from .timing import CandidateError, Capture, Comparison, capture_graph, compare

Status = Literal["ok", "wrong", "failed", "cannot run", "skipped", "out of memory"]
Call = Callable[..., tuple[Tensor, ...]]
GIB = 2**30
SMALL_TOKENS = 65  # shows a wrong formula at once
# What CUDA says after a kernel has gone wrong: no call of this process works any more, whoever makes it.
LOST = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "unspecified launch failure",
    "device-side assert",
    "launch timed out",
)


@dataclass
class Row:
    """One candidate in one case. Times are in seconds a call, with 10th and 90th percentile; None is not measured.

    `speedup` is the median over the rounds of the baseline's time over the candidate's; `peak_bytes` counts what was not there
    before the call (`memory`), `estimated_bytes` is what decided whether it was tried. `input_bytes` is the size of all sets of
    inputs that were rotated through.

    On a GPU `seconds` is a call from Python and `graph_seconds` what it takes in a CUDA graph, the device's own time; both have
    their ratio to the baseline. `tflops` counts the matrix products (`limits`) of the latter where it was measured, else of the
    former; `limit_seconds` is what the case cannot be faster than, and `limit_share` the part of the time that this is.
    """

    candidate: str
    pass_name: str
    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim: int
    dtype: str
    device: str
    status: Status = "ok"
    note: str = ""
    error: float | None = None
    error_budget: float | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    graph_seconds: float | None = None
    graph_speedup: float | None = None
    tflops: float | None = None
    limit_seconds: float | None = None
    limit_share: float | None = None
    gflops: float | None = None
    rounds: int | None = None
    repetitions: int | None = None
    peak_bytes: int | None = None
    estimated_bytes: int | None = None
    input_bytes: int | None = None
    layout: str = "separate"

    @property
    def is_fault(self) -> bool:
        """Whether the candidate is broken, not merely unsuitable here."""
        return self.status in ("wrong", "failed")


@dataclass(frozen=True)
class Settings:
    """How to measure: see `timing.compare`; `memory` reads peaks, which on CPU takes a fresh process a candidate."""

    seconds: float = 2.0
    min_rounds: int = 7
    num_input_sets: int = 8
    memory: bool = False
    memory_limit_bytes: int = 8 * GIB
    threads: int = 1
    seed: int = 0


def measure(case: Case, peers: Mapping[str, Peer], settings: Settings, limits: Limits | None = None) -> list[Row]:
    """Return one row a candidate. Only a candidate whose result passed `check` in this very case is timed.

    Raises:
        RuntimeError: a candidate has broken the GPU's context; nothing can be measured in this process any more.
    """
    forget_compiled()
    rows = {name: _new_row(peer, case) for name, peer in peers.items()}
    calls: dict[str, Call] = {}
    for name, peer in peers.items():
        call = _admit(peer, case, rows[name], settings)
        if call:
            calls[name] = call
    comparison = _compare(calls, rows, case, settings, peers)
    if comparison:
        for name in calls:
            _enter_times(rows[name], comparison, peers[name].operations(case))
    if case.device == "cuda":
        _enter_graph_times(calls, rows, case, settings, peers)
        if BASELINE in calls:
            note = f"PyTorch takes the backend {chosen_backend(case)}"
            rows[BASELINE].note = "; ".join(filter(None, [rows[BASELINE].note, note]))
    for name in calls:
        _enter_rates(rows[name], peers[name], case, limits)
    if settings.memory:
        for name, call in calls.items():
            with peers[name].around():
                _enter_memory(rows[name], call, case, settings)
    return list(rows.values())


def _new_row(peer: Peer, case: Case) -> Row:
    B, H, N, D = case.shape
    return Row(peer.name, case.pass_name, B, H, N, D, case.dtype, case.device, layout=case.layout)


def _admit(peer: Peer, case: Case, row: Row, settings: Settings) -> Call | None:
    """Return the call if it may be timed; else enter why not."""
    if obstacle := peer.obstacle(case):
        row.status, row.note = "cannot run", obstacle
        return None
    row.estimated_bytes = peer.needed_bytes(case)
    if row.estimated_bytes > settings.memory_limit_bytes:
        row.status, row.note = "skipped", f"needs about {row.estimated_bytes / GIB:.3g} GiB"
        return None
    try:
        call = case.bind(peer.make(), peer.truth)
        for where in _cases_to_check(peer, case):
            with peer.around():
                verdict = check(call, peer.truth, where, seed=settings.seed)
            row.error, row.error_budget = (verdict.error if math.isfinite(verdict.error) else None), verdict.budget
            if not verdict.passed:
                row.status, row.note = "wrong", f"{verdict} at {where.num_tokens} tokens"
                return None
    except Exception as error:
        row.status, row.note = _classify(error, peer.name)
        return None
    return call


def _cases_to_check(peer: Peer, case: Case) -> list[Case]:
    """A small case first, which shows a wrong candidate at once; not for compiled ones, which would be compiled for it."""
    if peer.compiled or case.num_tokens <= SMALL_TOKENS:
        return [case]
    B, H, _, _ = case.shape
    return [dataclasses.replace(case, batch_size=min(B, 2), num_heads=min(H, 2), num_tokens=SMALL_TOKENS), case]


def refuse_lost_device(error: BaseException, name: str) -> None:
    """Raise RuntimeError if the error says that the GPU's context is broken: every candidate after this one would be blamed."""
    if any(words in str(error) for words in LOST):
        raise RuntimeError(f"{name} has broken the GPU's context: nothing can be measured after it") from error


def _classify(error: BaseException, name: str) -> tuple[Status, str]:
    """Return what became of a candidate, and why.

    Raises:
        RuntimeError: it has broken the GPU's context.
    """
    refuse_lost_device(error, name)
    lines = str(error).strip().splitlines() or [""]
    note = f"{type(error).__name__}: {lines[0]}"
    if is_out_of_memory(error):
        return "out of memory", ""
    return ("cannot run" if is_refusal(error) else "failed"), note


def _compare(
    calls: dict[str, Call],
    rows: dict[str, Row],
    case: Case,
    settings: Settings,
    peers: Mapping[str, Peer],
    capture: Capture | None = None,
) -> Comparison | None:
    """Time the calls; one that fails is entered as such and taken out, and the others begin anew."""
    while calls:
        try:
            return compare(
                calls,
                case.make_inputs,
                seconds=settings.seconds,
                min_rounds=settings.min_rounds,
                num_input_sets=settings.num_input_sets,
                seed=settings.seed,
                capture=capture,
                around={name: peers[name].around for name in calls},
            )
        except CandidateError as error:
            status, note = _classify(error.cause, error.name)
            row = rows[error.name]
            if capture:
                row.note = f"no CUDA graph: {note or status}"
            else:
                row.status, row.note = status, note
            del calls[error.name]
        release_memory()
    return None


def _enter_times(row: Row, comparison: Comparison, operations: float) -> None:
    seconds = comparison.seconds(row.candidate)
    row.seconds, row.seconds_low, row.seconds_high = dataclasses.astuple(seconds)
    row.rounds, row.repetitions = comparison.num_rounds, comparison.repetitions[row.candidate]
    row.input_bytes = comparison.input_bytes
    row.gflops = operations / seconds.median / 1e9
    if BASELINE in comparison.rounds:
        row.speedup, row.speedup_low, row.speedup_high = dataclasses.astuple(comparison.speedup(row.candidate, BASELINE))


def _enter_graph_times(
    calls: dict[str, Call], rows: dict[str, Row], case: Case, settings: Settings, peers: Mapping[str, Peer]
) -> None:
    captured = dict(calls)
    comparison = _compare(captured, rows, case, settings, peers, capture_graph)
    release_memory()  # of the graphs
    for name in captured if comparison else ():
        assert comparison
        rows[name].graph_seconds = comparison.seconds(name).median
        if BASELINE in comparison.rounds:
            rows[name].graph_speedup = comparison.speedup(name, BASELINE).median


def _enter_rates(row: Row, peer: Peer, case: Case, limits: Limits | None) -> None:
    """Enter FLOP/s and the share of the limit, by the device's own time where there is one."""
    seconds = row.graph_seconds or row.seconds
    if seconds is None:
        return
    form = peer.form(case)
    row.tflops = matmul_flops(case, form) / seconds / 1e12
    row.limit_seconds = least_seconds(case, form, limits) if limits else None
    row.limit_share = row.limit_seconds / seconds if row.limit_seconds else None


def _enter_memory(row: Row, call: Call, case: Case, settings: Settings) -> None:
    try:
        if case.device == "cuda":
            row.peak_bytes = peak_bytes_on_gpu(partial(call, *case.make_inputs(settings.seed)))
        else:
            arguments: dict[str, Any] = {"name": row.candidate, "case": case.as_dict()}
            target = f"{prepare_call.__module__}:{prepare_call.__name__}"
            row.peak_bytes = peak_bytes_on_cpu(target, arguments, threads=settings.threads)
    except (MemoryError, RuntimeError) as error:
        row.note = f"memory not measured: {_classify(error, row.candidate)[1] or 'out of memory'}"
