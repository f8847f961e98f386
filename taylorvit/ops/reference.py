"""The paper's equations in plain PyTorch, both forms: the specification that every faster implementation is tested against.

For one head with N tokens of dimension D and its temperature tau (TaylorShift, arXiv:2403.02920):

    x_ij = tau cos(q_i, k_j)
    w(x) = a x^2 + b x + c,                 the Taylor polynomial of exp of order 2, never below 1/2
    y_i  = sqrt(N / D) sum_j w(x_ij) v_j / sum_j w(x_ij)

Everything is computed in fp32, or fp64 for fp64 inputs. Derivation, gradients and numerics: README.md beside this file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Taylor coefficients of exp: w(x) = A x^2 + B x + C.
A, B, C = 0.5, 1.0, 1.0

# Shorter vectors are zero vectors: the square of a shorter one would leave the range of fp32.
ZERO_LENGTH = 1e-18
# The gradient of x / |x| grows as 1 / |x|; below this length it stays at 1 / GRADIENT_LENGTH.
GRADIENT_LENGTH = 1e-2


def unit_vectors(x: Tensor) -> Tensor:
    """Divide each vector of the last dimension by its length, with a gradient that stays bounded as the length falls to 0.

    The value is x / |x|, and 0 for a zero vector. The gradient is that of x / |x| with its factor 1 / |x| replaced by
    1 / max(|x|, GRADIENT_LENGTH): exact for every vector of length 0.01 or more, bounded by 100 for all others.
    A length beyond the range of the dtype gives NaN, never a wrong direction.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(ZERO_LENGTH)
    unit = x / length
    # lerp returns `unit` and passes the share |x| / max(|x|, GRADIENT_LENGTH) of its gradient on.
    share = (length / length.clamp_min(GRADIENT_LENGTH)).detach()
    return torch.lerp(unit.detach(), unit, share)


def taylor_weights(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    """Return w(x_ij), not yet divided by the row sums: (B, H, N, N) in fp32 (fp64 for fp64 inputs)."""
    q, k, temperature = widened(q, k, temperature)
    x = temperature[:, None, None] * unit_vectors(q) @ unit_vectors(k).mT  # (B, H, N, N)
    return A * x.square() + B * x + C


def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the attention as the definition stands, in O(N^2 D) operations.

    q, k, v: (B, H, N, D) of one dtype; temperature: (H,). Returns (B, H, N, D) in the dtype of v.
    """
    N, D = v.shape[-2:]
    w = taylor_weights(q, k, temperature)  # (B, H, N, N)
    numerator = w @ v.to(w.dtype)  # (B, H, N, D)
    denominator = w.sum(dim=-1, keepdim=True)  # (B, H, N, 1)
    return (math.sqrt(N / D) * numerator / denominator).to(v.dtype)


def efficient(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the same attention with the sum over j drawn inside, in O(N D^3) operations.

    Uses (q . k)^2 = [q]2 . [k]2 with the box product [x]2, all D^2 products x_a x_b. Arguments and result as in `direct`.
    """
    N, D = v.shape[-2:]
    q, k, values, temperature = widened(q, k, v, temperature)
    q = temperature[:, None, None] * unit_vectors(q)
    k = unit_vectors(k)
    values = torch.cat([torch.ones_like(values[..., :1]), values], dim=-1)  # V' = [1, V]: (B, H, N, D + 1)

    # The coefficients multiply the states, whose size does not depend on N.
    quadratic = box(q) @ (A * (box(k).mT @ values))  # (B, H, N, D^2) @ (B, H, D^2, D + 1)
    linear = q @ (B * (k.mT @ values))  # (B, H, N, D) @ (B, H, D, D + 1)
    constant = C * values.sum(dim=-2, keepdim=True)  # (B, H, 1, D + 1)
    y = quadratic + linear + constant  # (B, H, N, D + 1)

    denominator, numerator = y[..., :1], y[..., 1:]
    return (math.sqrt(N / D) * numerator / denominator).to(v.dtype)


def box(x: Tensor) -> Tensor:
    """Return the box product [x]2, all products x_a x_b: (..., D) -> (..., D^2)."""
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def widened(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Convert all to the dtype of the sums: fp64 where q is fp64, else fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return [x.to(dtype) for x in (q, *others)]
