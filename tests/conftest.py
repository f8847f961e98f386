"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it on a GPU
if not torch.cuda.is_available():
    # Triton's own switch: its kernels then run on CPU, step by step. Read when triton is imported, which the next line does.
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import write_digit_folder

torch.set_num_threads(1)  # the suite may share its cores; results do not depend on it

# Fuzzing: the same examples in every run, or, with --hypothesis-profile=thorough --hypothesis-seed=N, many others.
_UNHURRIED = {"deadline": 60_000, "database": None, "suppress_health_check": list(HealthCheck)}  # milliseconds: a hang
_AS_FOUND = (Phase.explicit, Phase.generate)  # no search for a smaller example, which takes minutes
settings.register_profile("repeatable", derandomize=True, max_examples=20, phases=_AS_FOUND, **_UNHURRIED)
settings.register_profile("thorough", max_examples=1000, **_UNHURRIED)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the JUnit report say which rows of the fault matrix a test stands for; `tools/fault_drill.py` counts them."""
    for item in items:
        item.user_properties += [("fault", row) for row in fault_rows(item)]


def fault_rows(item: pytest.Item) -> list[str]:
    """Return the rows of the fault matrix that a test stands for."""
    return [row for mark in item.iter_markers("fault") for row in mark.args]


@pytest.fixture(autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Count what a test of a fault does, for `tools/fault_drill.py`, which sums it by row.

    Tests add to `faults injected`, `inputs tried`, `bytes corrupted` and figures of their own; one that ends in `, most` is a
    maximum. `messages given` counts by itself the errors and warnings that a test catches; in the rows of weights, data,
    settings and numbers (C to F) every message stands for an input, and every test for one at least.
    """
    counted: Counter[str] = Counter()
    rows = fault_rows(request.node)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raises", "warns") if rows else ():
            patch.setattr(pytest, name, counting(getattr(pytest, name), counted))
        yield counted
    if any(row[0] in "CDEF" for row in rows):
        counted["inputs tried"] = max(counted["inputs tried"], counted["messages given"], 1)
    if rows:
        request.node.user_properties += counted.items()


def counting(catch: Callable[..., Any], counted: Counter[str]) -> Callable[..., Any]:
    """Return `pytest.raises` or `pytest.warns` such that its calls are counted: where one catches nothing, the test fails."""

    def counted_catch(*arguments: Any, **keywords: Any) -> Any:
        counted["messages given"] += 1
        return catch(*arguments, **keywords)

    return counted_catch


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 96 training and 41 validation digits."""
    return write_digit_folder(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let a test start accelerate anew, whatever ran in this process before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what `empty` returns with NaN: a number that is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
