"""Leave some keys out of the attention, exactly and for every form and implementation, without a mask inside of them.

A key and a value of zeros give x = 0, so such a key adds w(0) = C to the denominator and nothing to the numerator. With n of N
keys left, the attention over these n is therefore

    y_i = y0_i (d_i + C (N - n)) / d_i sqrt(n / N),     d_i = sum over the n of w(x_ij)

where y0 is the attention over all N with the others zeroed. The row sum needs no N x N matrix, as w is a polynomial:

    d_i = C n + B q_i . (sum_j k_j) + A q_i^T (sum_j k_j k_j^T) q_i,     q_i, k_j of unit length, q_i times the temperature

which is O(N D^2). Rounding grows with the share that is left out: y0 is small by n / N and comes out with N / n of its error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import A, B, C, unit_vectors


def attend_to_some(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    key_mask: Tensor,
) -> Tensor:
    """Return `attend(q, k, v, temperature)` over the keys where key_mask (B, N) is true, (B, H, N, D) in the dtype of v.

    A sample whose keys are all left out gives NaN.
    """
    left_out = ~key_mask[:, None, :, None]  # (B, 1, N, 1)
    k, v = k.masked_fill(left_out, 0), v.masked_fill(left_out, 0)  # not times 0: there may be infinities
    num_kept = key_mask.sum(dim=-1)[:, None, None, None]  # (B, 1, 1, 1)
    num_tokens = k.shape[-2]
    sums = row_sums(q, k, temperature, num_kept)  # (B, H, N, 1)
    share = num_kept.to(sums.dtype) / num_tokens
    correction = (sums + C * (num_tokens - num_kept)) / sums * share.sqrt()
    return (attend(q, k, v, temperature) * correction).to(v.dtype)


def row_sums(q: Tensor, k: Tensor, temperature: Tensor, num_kept: Tensor) -> Tensor:
    """Return the sum of w(x_ij) over the keys that are not zero, (B, H, N, 1) in fp32 (fp64 for fp64), in O(N D^2).

    num_kept counts them, (B, 1, 1, 1).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = temperature.to(dtype)[:, None, None] * unit_vectors(q.to(dtype))
    k = unit_vectors(k.to(dtype))
    linear = q @ k.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
    quadratic = (q @ (k.mT @ k) * q).sum(dim=-1, keepdim=True)
    return A * quadratic + B * linear + C * num_kept
