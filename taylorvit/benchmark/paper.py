"""The paper's way of computing, in plain PyTorch: what the faster implementations are measured against.

Transcribed from the equations of TaylorShift (arXiv:2403.02920), with what its authors' implementation materialises: N x N
weights in the direct form, all N x D^2 box products in the efficient one, everything in the dtype of the inputs, the backward
pass left to autograd. For reading and testing use `ops.reference`, which is the same function without the scaling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.reference import box


def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Normalise the N x N weights by their row sums, then average the values. Arguments as `ops.reference.direct`."""
    N, D = v.shape[-2:]
    x = temperature[:, None, None] * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT  # (B, H, N, N)
    weights = 0.5 * x**2 + x + 1
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return math.sqrt(N / D) * (weights @ v)


def efficient(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Contract the box products: the paper's algorithm with q, k times alpha = D^(1/4) and v times 1/N. Arguments as above."""
    N, D = v.shape[-2:]
    alpha = D**0.25
    q = alpha * temperature[:, None, None] * F.normalize(q, dim=-1)
    k = alpha * F.normalize(k, dim=-1)
    ones = torch.full_like(v[..., :1], math.sqrt(D / N))
    values = torch.cat([ones, v], dim=-1) / N  # (B, H, N, D + 1)

    quadratic = 0.5 * box(q) @ (box(k).mT @ values)  # (B, H, N, D^2) @ (B, H, D^2, D + 1)
    linear = alpha**2 * q @ (k.mT @ values)
    constant = alpha**4 * values.sum(dim=-2, keepdim=True)
    y = quadratic + linear + constant  # (B, H, N, D + 1)
    return y[..., 1:] / y[..., :1]
