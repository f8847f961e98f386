"""Is the result right? Asked of every candidate before its time is taken.

The budget is relative: the error against fp64 may be twice that of plain PyTorch in the dtype of the inputs, plus rounding.
Where the fp64 truth for all pairs of tokens would be too large, a random subset of the queries is computed instead, still
exactly: the rows of the direct form are independent of one another. The gradients then belong to an upstream gradient that is
zero for all other queries, which makes those of every key and value exact too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import reference
from .case import Attention, Case, Truth

MAX_TRUTH_BYTES = 2**28  # of one N x N matrix in fp64, all heads
NUM_QUERIES = 64
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of temperature")


@dataclass(frozen=True)
class Verdict:
    """The error of the tensor that comes nearest to its budget or exceeds it most, relative to the tensor's largest entry."""

    error: float
    budget: float
    tensor: str
    num_queries: int  # how many of the queries were compared

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget; NaN is not."""
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"error {self.error:.2g} of the {self.tensor} against a budget of {self.budget:.2g}"


def check(
    call: Callable[..., tuple[Tensor, ...]], truth: Truth, case: Case, *, seed: int = 0, max_truth_bytes: int = MAX_TRUTH_BYTES
) -> Verdict:
    """Compare what `call`, made by `Case.bind`, returns with the truth in fp64."""
    inputs = case.make_inputs(seed)
    queries = torch.arange(case.num_tokens, device=case.device)
    if 8 * case.batch_size * case.num_heads * case.num_tokens**2 > max_truth_bytes:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(case.num_tokens, generator=generator)[:NUM_QUERIES]
        queries = order.sort().values.to(case.device)
        if case.training:
            inputs = *inputs[:-1], _only_rows(inputs[-1], queries)
    computed = call(*inputs)
    exact = _evaluate(truth, case, inputs, queries, torch.float64)
    plain = _evaluate(truth, case, inputs, queries, inputs[0].dtype)
    finite = all(bool(x.isfinite().all()) for x in computed)
    rows = [x[:, :, queries] if index < 2 else x for index, x in enumerate(computed)]  # y and dq have a row a query
    return _judge(rows, exact, plain, case, len(queries), finite)


def softmax(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Softmax attention in plain PyTorch."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


TRUTHS: dict[Truth, Attention] = {"taylor": reference.direct, "softmax": softmax}


def _only_rows(x: Tensor, rows: Tensor) -> Tensor:
    kept = torch.zeros_like(x)
    kept[:, :, rows] = x[:, :, rows]
    return kept


def _evaluate(truth: Truth, case: Case, inputs: tuple[Tensor, ...], queries: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the plain result for some of the queries, and its gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, temperature, *upstream = (x.detach().to(wide if x.ndim == 1 else dtype) for x in inputs)
    q, upstream = q[:, :, queries], [x[:, :, queries] for x in upstream]
    leaves = [x.requires_grad_(case.training) for x in (q, k, v, temperature)]
    return list(case.bind(TRUTHS[truth], truth)(*leaves, *upstream))


def _judge(
    computed: list[Tensor], exact: list[Tensor], plain: list[Tensor], case: Case, num_queries: int, finite: bool
) -> Verdict:
    """Return the worst tensor's verdict."""
    assert len(computed) == len(exact) == len(plain)
    largest = max(float(x.abs().max()) for x in exact)
    verdicts = []
    for index, name in enumerate(NAMES[: len(exact)]):
        scale = max(float(exact[index].abs().max()), 1e-3 * largest)  # one token: q and k have no influence
        error, own = (float((x[index].double() - exact[index]).abs().max()) / scale for x in (computed, plain))
        budget = 2 * own + _rounding(case, plain[0].dtype, index)
        verdicts.append(Verdict(error if finite else math.nan, budget, name, num_queries))
    return max(verdicts, key=lambda verdict: math.inf if math.isnan(verdict.error) else verdict.error / verdict.budget)


def _rounding(case: Case, dtype: torch.dtype, index: int) -> float:
    """Allow half a unit of the result's dtype and some of the sums', whose terms cancel: sqrt(N) units for N of random sign.

    The gradient of the temperature is one number a head, the sum of terms of both signs over all pairs of tokens. A kernel for
    half precision rounds the terms to that dtype before it multiplies matrices with them; the terms cancel, their roundings do
    not, so two units of the dtype are allowed, where plain PyTorch in fp32 sums needs none.
    """
    units = (32 if index == 0 else 128) + math.sqrt(case.num_tokens)
    if NAMES[index] == "gradient of temperature":  # one number for all pairs of tokens
        units += 4 * math.sqrt(case.batch_size * case.num_tokens)
        if dtype.itemsize < 4:
            return 2 * torch.finfo(dtype).eps + units * torch.finfo(torch.float32).eps
    return torch.finfo(dtype).eps / 2 * 1.01 + units * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
