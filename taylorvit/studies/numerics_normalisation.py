"""What the normalisation of q and k is for: logits, weights, outputs and gradients of the attention with and without it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from taylorvit.benchmark.case import Case
from taylorvit.ops import reference
from taylorvit.studies.numerics import MAX_MATRIX_BYTES, standard_normal
from taylorvit.studies.numerics_sizes import rms_entry

UNIT = "normalised"
INPUT_SCALES = (1.0, 4.0)  # of q and k that are not normalised


@dataclass(frozen=True)
class NormalisationRow:
    """The attention with and without L2-normalised q and k, temperature 1, in fp64 but for the last two.

    `effective_keys`: mean of 1 / sum_j p_ij^2 over N; `largest_weight`: mean of N max_j p_ij; both are 1 for equal weights.
    Outputs and gradients: rms entry, for an upstream gradient of rms 1; the gradients are of the output with sqrt(N/d).
    In fp16, weights divided by their sum first: `zero_rows`: share of the outputs that are all 0; `non_finite`: of the entries.
    """

    variant: str
    num_tokens: int
    head_dim: int
    logit_rms: float
    logit_largest: float
    effective_keys: float
    largest_weight: float
    denominator: float
    output: float
    scaled_output: float
    gradient_q: float
    gradient_k: float
    gradient_v: float
    zero_rows: float
    non_finite: float


def normalisation_rows(case: Case, seed: int) -> list[NormalisationRow]:
    """Compare unit vectors with standard normal q and k, also times 4; none where an N x N matrix is too large."""
    N, D = case.num_tokens, case.head_dim
    if 8 * N**2 > MAX_MATRIX_BYTES:
        return []
    q, k, v, upstream = standard_normal(case, seed, [(N, D)] * 4)
    variants = {UNIT: 1.0} | {f"not normalised, x {scale:g}": scale for scale in INPUT_SCALES}
    return [_normalisation_row(name, scale * q, scale * k, v, upstream) for name, scale in variants.items()]


def _normalisation_row(variant: str, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> NormalisationRow:
    N, D = v.shape
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    x, w, y = _attend(*leaves, unit=variant == UNIT)
    gradients = torch.autograd.grad(math.sqrt(N / D) * y, leaves, upstream)
    x, w, y = x.detach(), w.detach(), y.detach()
    p = w / w.sum(dim=-1, keepdim=True)
    half = _attend(q.half(), k.half(), v.half(), unit=variant == UNIT)[2]
    return NormalisationRow(
        variant,
        N,
        D,
        logit_rms=rms_entry(x),
        logit_largest=float(x.abs().max()),
        effective_keys=float((1 / p.square().sum(dim=-1)).mean()) / N,
        largest_weight=N * float(p.amax(dim=-1).mean()),
        denominator=float(w.sum(dim=-1).mean()),
        output=rms_entry(y),
        scaled_output=math.sqrt(N / D) * rms_entry(y),
        gradient_q=rms_entry(gradients[0]),
        gradient_k=rms_entry(gradients[1]),
        gradient_v=rms_entry(gradients[2]),
        zero_rows=float((half == 0).all(dim=-1).double().mean()),
        non_finite=float((~half.isfinite()).double().mean()),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, *, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits and weights (N, N) and the weighted mean of v, all in the dtype of the inputs, as `paper.direct`."""
    if unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    x = q @ k.mT
    w = reference.A * x.square() + reference.B * x + reference.C
    return x, w, (w / w.sum(dim=-1, keepdim=True)) @ v
