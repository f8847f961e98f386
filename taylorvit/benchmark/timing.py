"""Time several functions fairly against one another: interleaved rounds, rotating inputs, ratios within a round.

Machines drift: clocks change, neighbours come and go. So every candidate is timed once a round, in a new order each round, and
two candidates are compared by the median of their ratios within the rounds, not by the ratio of two medians. Inputs rotate
through several sets of tensors, so that a call does not find its own operands in the cache; on a GPU there are as many sets as
it takes to exceed its second-level cache twice, MOST_SETS at most.

On a GPU a short call made from Python takes as long as its launches. `capture_graph` puts the calls on all sets of inputs into
one CUDA graph: what its replay takes is the device's own time. It is one graph for all of them, as the launch of a graph takes
as long as a small kernel.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
Call = Callable[[], object]
Stopwatch = Callable[[Callable[[], object]], float]  # runs a function and returns the seconds it took
Capture = Callable[[Sequence[Call]], Call]  # returns one function that makes all the calls
Around = Callable[[], AbstractContextManager[object]]

MAX_REPETITIONS = 4096
MOST_SETS = 64


class CandidateError(RuntimeError):
    """A candidate failed while it was timed: `name` says which, `cause` why."""

    def __init__(self, name: str, cause: BaseException) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name
        self.cause = cause


@dataclass(frozen=True)
class Spread:
    """The median of some values, with their 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    `rounds` holds the seconds of one call by candidate, one entry a round and in the order of the rounds; `repetitions` the
    number of calls that were timed together to get such an entry; `input_bytes` the size of all sets of inputs.
    """

    rounds: dict[str, list[float]]
    repetitions: dict[str, int]
    input_bytes: int = 0

    @property
    def num_rounds(self) -> int:
        """How often each candidate was timed."""
        return len(next(iter(self.rounds.values())))

    def seconds(self, name: str) -> Spread:
        """Return the seconds of one call."""
        return spread(self.rounds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """Return how many times faster `name` is than `over`: the spread of the ratios within each round."""
        return spread([theirs / ours for ours, theirs in zip(self.rounds[name], self.rounds[over])])


def spread(values: list[float]) -> Spread:
    """Return median, 10th and 90th percentile, interpolated between the values; at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1])


def compare(
    candidates: Mapping[str, Callable[..., object]],
    make_inputs: Callable[[int], Inputs],
    *,
    seconds: float = 1.0,
    min_rounds: int = 7,
    num_input_sets: int = 8,
    max_input_bytes: int = 2**28,
    min_batch_seconds: float = 2e-3,
    seed: int = 0,
    capture: Capture | None = None,
    around: Mapping[str, Around] | None = None,
    stopwatch: Stopwatch | None = None,
) -> Comparison:
    """Time every candidate on the same inputs.

    Args:
        candidates: functions by name; each is called as `function(*inputs)` and its result dropped.
        make_inputs: `make_inputs(i)` returns the i-th set of inputs.
        seconds: time to spend on each candidate on average, warm-up not counted. There are never fewer than `min_rounds`
            rounds, whatever they take.
        num_input_sets: sets to rotate through, more for a GPU's cache, see above; fewer, but at least one, where they would
            take more than `max_input_bytes`.
        min_batch_seconds: a round repeats a shorter function until the batch takes about this long, so that the clock's own
            error stays small. The time of the repetitions is divided out.
        seed: of the order within the rounds.
        capture: what to make of each candidate's calls before they are timed, such as `capture_graph`; default: nothing.
        around: contexts that candidates run in, by name; entering them is not timed.
        stopwatch: default: CUDA events where the inputs are on a GPU, else `time.perf_counter`.

    Raises:
        CandidateError: a candidate raised.
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError("there is nothing to compare")
    sets = make_input_sets(make_inputs, num_input_sets, max_input_bytes)
    measure = stopwatch or default_stopwatch(sets[0])
    contexts: dict[str, Around] = dict.fromkeys(candidates, contextlib.nullcontext) | dict(around or {})
    runs: dict[str, list[Call]] = {}
    repetitions: dict[str, int] = {}
    for name, function in candidates.items():
        with _blaming(name), contexts[name]():
            calls: list[Call] = [partial(function, *inputs) for inputs in sets]
            runs[name] = [capture(calls)] if capture else calls
            repetitions[name] = _calibrate(runs[name], measure, min_batch_seconds)
    calls_a_run = len(sets) if capture else 1

    shuffle = random.Random(seed).shuffle
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    order, spent, number = list(candidates), 0.0, 0
    with _without_garbage_collection():
        while number < min_rounds or spent < seconds * len(candidates):
            shuffle(order)
            for name in order:
                with _blaming(name), contexts[name]():
                    duration = measure(partial(_repeat, runs[name], number, repetitions[name]))
                rounds[name].append(duration / (repetitions[name] * calls_a_run))
                spent += duration
            number += 1
    made = {name: calls_a_run * count for name, count in repetitions.items()}
    return Comparison(rounds, made, input_bytes=len(sets) * num_bytes(sets[0]))


def make_input_sets(
    make_inputs: Callable[[int], Inputs], wanted: int, max_bytes: int, cache_bytes: int | None = None
) -> list[Inputs]:
    """Make `wanted` sets of inputs, more where twice `cache_bytes` need them, as many as fit into `max_bytes`, at least one.

    `cache_bytes` is by default that of the GPU where the inputs are on one, else 0. It asks for MOST_SETS at most.
    """
    first = make_inputs(0)
    size = num_bytes(first)
    if not size:
        return [first, *(make_inputs(index) for index in range(1, wanted))]
    cache = second_level_cache(first) if cache_bytes is None else cache_bytes
    count = max(wanted, min(math.ceil(2 * cache / size), MOST_SETS))
    return [first, *(make_inputs(index) for index in range(1, min(count, max_bytes // size)))]


def num_bytes(inputs: Inputs) -> int:
    """Return the size of the tensors among the inputs."""
    return sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))


def second_level_cache(inputs: Inputs) -> int:
    """Return the bytes of the cache that the GPU with the inputs has, 0 where they are on none."""
    devices = [x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda]
    return int(torch.cuda.get_device_properties(devices[0]).L2_cache_size) if devices else 0


def default_stopwatch(inputs: Inputs) -> Stopwatch:
    """Return CUDA events where a tensor is on a GPU, else the processor's clock."""
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    return time_on_gpu if on_gpu else time_on_cpu


def time_on_cpu(run: Call) -> float:
    """Return the seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_on_gpu(run: Call) -> float:
    """Return the seconds from the first to the last kernel of `run`, waits for launches included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _repeat(runs: list[Call], first: int, repetitions: int) -> None:
    for index in range(first, first + repetitions):
        runs[index % len(runs)]()


def _calibrate(runs: list[Call], measure: Stopwatch, min_batch_seconds: float) -> int:
    """Warm up, and return the number of calls that take `min_batch_seconds` together."""
    measure(partial(_repeat, runs, 0, 1))
    repetitions = 1
    while (duration := measure(partial(_repeat, runs, 0, repetitions))) < min_batch_seconds and repetitions < MAX_REPETITIONS:
        growth = min_batch_seconds / duration if duration > 0 else math.inf
        repetitions = math.ceil(repetitions * min(max(growth, 1.1), 10))
    return min(repetitions, MAX_REPETITIONS)


def capture_graph(calls: Sequence[Call]) -> Call:
    """Return the replay of one CUDA graph that makes all the calls, one after the other.

    The results are dropped as they come, so that the memory of the graph is that of one call.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must not fall into the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CandidateError(name, error) from error


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
