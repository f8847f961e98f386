"""One pass of a model, forward or forward and backward: how it is called, on which inputs, and within which memory.

Three modes: `eager` calls from Python; `compile` lets torch.compile fuse what stands around the attention; `cuda_graph` replays
what eager calls have launched, without Python, and needs a GPU. The latter's memory is that of an eager pass.

A CPU has no limit of its own short of swapping or a killed process, so a measurement may take `memory_limit_bytes` beyond what
the process holds before: an allocation above that fails, as it does on a full GPU (Linux: RLIMIT_DATA).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorvit.benchmark.measure import GIB
from taylorvit.benchmark.memory import STATUS, Prepared
from taylorvit.config import ModelConfig
from taylorvit.models import MODEL_NAMES, random_inputs
from taylorvit.studies.model_candidates import Candidate, Precision, autocast, candidate_from_dict

Mode = Literal["eager", "compile", "cuda_graph"]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        device: "cpu" or "cuda".
        precision: "no" (fp32), or "bf16" or "fp16" through autocast.
        seconds: time for each candidate, see `timing.compare`.
        min_rounds: at least, whatever they take.
        threads: of PyTorch in the fresh process that reads memory on CPU.
        memory_limit_bytes: on CPU, see the head of this file.
        seed: of inputs and order.
        mode: see the head of this file.
    """

    device: str = "cpu"
    precision: Precision = "no"
    seconds: float = 2.0
    min_rounds: int = 5
    threads: int = field(default_factory=torch.get_num_threads)
    memory_limit_bytes: int = 8 * GIB
    seed: int = 0
    mode: Mode = "eager"


@dataclass(frozen=True)
class Pass:
    """One pass over the first `batch_size` of the inputs, which ends without gradients, so that every call begins alike.

    It runs in the context that `around` returns.
    """

    model: nn.Module
    batch_size: int
    training: bool
    device: str
    precision: Precision
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the logits, or the loss of a training pass."""
        with self.around():
            return self._run(inputs, labels)

    def _run(self, inputs: Tensor, labels: Tensor) -> Tensor:
        inputs, labels = inputs[: self.batch_size], labels[: self.batch_size]
        if not self.training:
            with torch.no_grad(), autocast(self.device, self.precision):
                return self.model(inputs)
        with autocast(self.device, self.precision):
            loss = F.cross_entropy(self.model(inputs).float(), labels)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()


def build_pass(candidate: Candidate, batch_size: int, training: bool, settings: Settings) -> Pass:
    """Build the candidate, in training or evaluation mode, and return its pass."""
    model = candidate.build(settings.device).train(training)
    if settings.mode == "compile":
        model.compile(dynamic=False)
    return Pass(model, batch_size, training, settings.device, settings.precision, candidate.around)


def make_inputs(config: ModelConfig, batch_size: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return random inputs and labels."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = random_inputs(config, batch_size, device=device, generator=generator)
    return inputs, torch.randint(config.num_classes, (batch_size,), generator=generator, device=device)


def prepare_pass(
    candidate: dict[str, Any],
    batch_size: int,
    training: bool,
    device: str,
    precision: Precision,
    memory_limit_bytes: int,
    seed: int,
    mode: Mode = "eager",
) -> Prepared:
    """Return a pass for `benchmark.memory`, from JSON types; on CPU this process is limited for good.

    The warm-up is a pass of one sample through one block, of a compiled model the very pass: a compiler's memory is none of the
    model's.
    """
    settings = Settings(device=device, precision=precision, memory_limit_bytes=memory_limit_bytes, seed=seed, mode=mode)
    limit_memory(settings)
    full = candidate_from_dict(candidate)
    is_ours = full.model.name in MODEL_NAMES  # other networks need not know a depth
    shallow = dataclasses.replace(full, model=dataclasses.replace(full.model, depth=1)) if is_ours else full
    inputs = make_inputs(full.config, batch_size, device, seed)
    call = partial(build_pass(full, batch_size, training, settings), *inputs)
    if mode == "compile":
        return Prepared(call, call)
    return Prepared(partial(build_pass(shallow, 1, training, settings), *inputs), call)


def limit_memory(settings: Settings) -> None:
    """Let allocations fail that go `memory_limit_bytes` beyond what this process holds now.

    Does nothing on a GPU, whose memory is its limit, and where the system does not tell what a process holds.
    """
    found = re.search(r"^VmData:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    if settings.device != "cpu" or not found:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(found[1]) * 1024 + settings.memory_limit_bytes
    limits = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


@contextlib.contextmanager
def memory_limited(settings: Settings) -> Iterator[None]:
    """Limit this process's memory inside the `with` block, see `limit_memory`."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_memory(settings)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
