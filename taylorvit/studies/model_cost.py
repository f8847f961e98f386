"""What whole models cost: seconds and samples a second of a pass, peak memory, and the batch size that pays best.

A pass is `inference`, the forward pass without gradients, or `training`, the forward pass, the loss and the backward pass; the
optimizer's step, the same for all, is not in it. Candidates are timed side by side in interleaved rounds on rotating random
inputs (`benchmark.timing`), after their logits were checked.

Memory: `peak_bytes` is what one pass needs beyond weights and inputs: activations, results, scratch space, and in training the
gradients. `weight_bytes` are parameters and buffers; a reading that counts the weights in is the sum of both. On a GPU the
allocator counts; on a CPU it is resident memory in a fresh process (`benchmark.memory`).

On a CPU a measurement may take `memory_limit_bytes`, see `model_passes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from taylorvit.benchmark.measure import refuse_lost_device
from taylorvit.benchmark.memory import is_out_of_memory, peak_bytes_on_cpu, peak_bytes_on_gpu, release_memory
from taylorvit.benchmark.peers import forget_compiled, is_refusal
from taylorvit.benchmark.timing import CandidateError, Capture, Comparison, Spread, capture_graph, compare
from taylorvit.models import random_inputs
from taylorvit.studies.model_candidates import Candidate, Verdict, check_logits, inspect_model
from taylorvit.studies.model_passes import (
    Pass,
    Settings,
    build_pass,
    make_inputs,
    memory_limited,
    prepare_pass,
)

Status = Literal["ok", "wrong", "failed", "cannot run", "out of memory"]
NUM_INPUT_SETS = 4
MIN_GAIN = 1.02  # in samples a second, for which a batch of twice the size is taken


@dataclass
class Row:
    """One candidate in one case; times are of one batch, with 10th and 90th percentile; None is not measured.

    `attention` is the variant's name, `form` what its layers compute. `speedup` is the ratio of the samples a second to the
    baseline's, the median over the rounds. Memory and structure are as in the heads of this file and of `model_candidates`.
    """

    candidate: str
    model: str
    attention: str
    form: str
    embed_dim: int | None
    num_heads: int | None
    head_dim: int | None
    num_tokens: int | None
    img_size: int | None
    batch_size: int
    pass_name: str
    precision: str
    device: str
    status: Status = "ok"
    note: str = ""
    best_batch: bool = False
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    samples_per_second: float | None = None
    samples_per_second_low: float | None = None
    samples_per_second_high: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    rounds: int | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    flops_per_sample: int | None = None
    parameters: int | None = None
    mode: str = "eager"

    @property
    def is_fault(self) -> bool:
        """Whether the candidate is broken, not merely too large."""
        return self.status in ("wrong", "failed")


class BestBatch(NamedTuple):
    """The batch size that pays best, its samples a second, and why the search ended; None if not even the first batch ran."""

    batch_size: int | None
    samples_per_second: float | None
    reason: str


def measure_speed(
    candidates: Sequence[Candidate],
    batch_size: int | Mapping[str, int],
    *,
    training: bool,
    settings: Settings,
    baselines: Mapping[str, str] | None = None,
    verdicts: Mapping[str, Verdict] | None = None,
) -> list[Row]:
    """Time the candidates side by side and return a row for each, whatever becomes of it.

    Args:
        candidates: models that take the same inputs, their names distinct.
        batch_size: of all, or of each by name.
        training: time training passes, else inference.
        settings: how to measure.
        baselines: whom to compare each with, by name; default: all with the last.
        verdicts: what `verify` said of them, where it was asked before; it is asked here of those that are missing.

    Raises:
        ValueError: a network cannot be built, or they do not take the same inputs.
    """
    check_same_inputs(candidates)
    forget_compiled()
    sizes = {c.name: batch_size if isinstance(batch_size, int) else batch_size[c.name] for c in candidates}
    rows = {c.name: new_row(c, sizes[c.name], training=training, settings=settings) for c in candidates}
    for candidate in candidates:
        verdict = (verdicts or {}).get(candidate.name) or verify(candidate, settings)
        rows[candidate.name].note = verdict.note
        if not verdict.passed:
            rows[candidate.name].status = "wrong"
    with memory_limited(settings):
        passes: dict[str, Pass] = {}
        for candidate in candidates:
            row = rows[candidate.name]
            try:
                if row.status == "ok":
                    passes[candidate.name] = build_pass(candidate, row.batch_size, training, settings)
            except (MemoryError, RuntimeError) as error:
                row.status, row.note = _classify(error, candidate.name)
        comparison = _compare(passes, rows, candidates, settings)
    for name in passes if comparison else ():
        assert comparison
        _enter_times(rows[name], comparison, (baselines or {}).get(name, candidates[-1].name), sizes)
    return list(rows.values())


def verify(candidate: Candidate, settings: Settings) -> Verdict:
    """Return whether the candidate's logits are right, see `check_logits`, within the settings' memory."""
    with memory_limited(settings):
        return check_logits(candidate, device=settings.device, precision=settings.precision, seed=settings.seed)


def peak_memory(candidate: Candidate, batch_size: int, *, training: bool, settings: Settings) -> int | None:
    """Return the peak extra memory of one pass in bytes, see the head of this file; None where the system does not tell.

    Raises:
        MemoryError: there was not enough memory.
        RuntimeError: the pass failed.
    """
    arguments: dict[str, Any] = {
        "candidate": dataclasses.asdict(candidate),
        "batch_size": batch_size,
        "training": training,
        "device": settings.device,
        "precision": settings.precision,
        "memory_limit_bytes": settings.memory_limit_bytes,
        "seed": settings.seed,
        "mode": settings.mode,
    }
    try:
        if settings.device == "cuda":
            return peak_bytes_on_gpu(prepare_pass(**arguments).call)
        target = f"{prepare_pass.__module__}:{prepare_pass.__name__}"
        return peak_bytes_on_cpu(target, arguments, threads=settings.threads)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{candidate.name} needs more memory than there is") from error
        raise


def enter_memory(row: Row, candidate: Candidate, settings: Settings) -> None:
    """Measure the peak memory of a row that could be timed, and enter it or why there is none."""
    if row.status != "ok":
        return
    try:
        training = row.pass_name == "training"
        row.peak_bytes = peak_memory(candidate, row.batch_size, training=training, settings=settings)
    except (MemoryError, RuntimeError) as error:
        row.note = f"memory not measured: {_classify(error, row.candidate)[1] or 'out of memory'}"


def best_batch_size(candidate: Candidate, *, training: bool, settings: Settings, start: int = 1, most: int = 1024) -> BestBatch:
    """Double the batch until that no longer gives 2 % more samples a second, memory runs out, or `most` is reached.

    Each step times a batch and its double in interleaved rounds, so a drift of the machine does not end the search; `seconds`
    and `min_rounds` of the settings hold for every step. On CPU memory runs out at `memory_limit_bytes`.

    Raises:
        ValueError: the network cannot be built.
    """
    size, best, tried, obstacle = None, None, [start], ""
    while True:
        try:
            with memory_limited(settings):
                rates = _rates(candidate, tried, training, settings)
        except (MemoryError, RuntimeError) as error:
            status, note = _classify(error, candidate.name)
            obstacle = f"{note or status} at batch size {tried[-1]}"
        if obstacle:
            release_memory()
            return BestBatch(size, best, obstacle)
        if size and rates[-1] < MIN_GAIN * rates[0]:
            gain = rates[-1] / rates[0]
            return BestBatch(size, rates[0], f"batch size {tried[-1]} gives {gain:.2f} times the samples a second")
        size, best = tried[-1], rates[-1]
        if 2 * size > most:
            return BestBatch(size, best, f"the limit of {most} is reached")
        tried = [size, 2 * size]


def new_row(candidate: Candidate, batch_size: int, *, training: bool, settings: Settings) -> Row:
    """Return the candidate's row of this case, nothing measured yet."""
    structure = inspect_model(candidate, training=training, device=settings.device)
    return Row(
        candidate=candidate.name,
        model=candidate.model.name,
        attention=candidate.attention,
        batch_size=batch_size,
        pass_name="training" if training else "inference",
        precision=settings.precision,
        device=settings.device,
        mode=settings.mode,
        **dataclasses.asdict(structure),
    )


def check_same_inputs(candidates: Sequence[Candidate]) -> None:
    """Raise ValueError unless all candidates take inputs of one shape and dtype, and there is one at least."""
    if not candidates:
        raise ValueError("there is no model to measure")
    kinds = {c.name: random_inputs(c.config, 1, device="meta") for c in candidates}
    described = {name: f"{tuple(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}" for name, x in kinds.items()}
    if len(set(described.values())) > 1:
        shown = ", ".join(f"{name}: {kind}" for name, kind in described.items())
        raise ValueError(f"models that are timed side by side must take the same inputs, got {shown}")


def _compare(
    passes: dict[str, Pass], rows: dict[str, Row], candidates: Sequence[Candidate], settings: Settings
) -> Comparison | None:
    """Time the passes; one that fails is entered as such and taken out, and the others begin anew."""
    config = min((c.config for c in candidates), key=lambda config: config.num_classes)  # labels that all of them know
    while passes:
        most = max(call.batch_size for call in passes.values())
        try:
            return compare(
                passes,
                partial(make_inputs, config, most, settings.device),
                seconds=settings.seconds,
                min_rounds=settings.min_rounds,
                num_input_sets=NUM_INPUT_SETS,
                seed=settings.seed,
                capture=_capture(settings),
            )
        except CandidateError as error:
            rows[error.name].status, rows[error.name].note = _classify(error.cause, error.name)
            del passes[error.name]
        except (MemoryError, RuntimeError) as error:  # of the inputs, which the largest batch needs
            for name in [name for name, call in passes.items() if call.batch_size == most]:
                rows[name].status, rows[name].note = _classify(error, name)
                del passes[name]
        release_memory()
    return None


def _capture(settings: Settings) -> Capture | None:
    return capture_graph if settings.mode == "cuda_graph" else None


def _rates(candidate: Candidate, sizes: list[int], training: bool, settings: Settings) -> list[float]:
    """Return the samples a second at each batch size, measured side by side."""
    forget_compiled()
    call = build_pass(candidate, max(sizes), training, settings)
    comparison = compare(
        {str(size): dataclasses.replace(call, batch_size=size) for size in sizes},
        partial(make_inputs, candidate.config, max(sizes), settings.device),
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        num_input_sets=NUM_INPUT_SETS,
        seed=settings.seed,
        capture=_capture(settings),
    )
    return [size / comparison.seconds(str(size)).median for size in sizes]


def _classify(error: BaseException, name: str) -> tuple[Status, str]:
    error = error.cause if isinstance(error, CandidateError) else error
    refuse_lost_device(error, name)
    if is_out_of_memory(error):
        return "out of memory", ""
    lines = str(error).strip().splitlines() or [""]
    return ("cannot run" if is_refusal(error) else "failed"), f"{type(error).__name__}: {lines[0]}"


def _enter_times(row: Row, comparison: Comparison, baseline: str, sizes: Mapping[str, int]) -> None:
    seconds, size = comparison.seconds(row.candidate), row.batch_size
    row.seconds, row.seconds_low, row.seconds_high = dataclasses.astuple(seconds)
    row.samples_per_second, row.rounds = size / seconds.median, comparison.num_rounds
    row.samples_per_second_low, row.samples_per_second_high = size / seconds.high, size / seconds.low
    if baseline in comparison.rounds:
        ratio: Spread = comparison.speedup(row.candidate, over=baseline)
        factor = size / sizes[baseline]
        row.baseline = baseline
        row.speedup, row.speedup_low, row.speedup_high = (factor * value for value in dataclasses.astuple(ratio))
