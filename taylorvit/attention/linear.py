"""Linear attention: weights phi(q) . phi(k) with phi(x) = elu(x) + 1, in linear time (arXiv:2006.16236)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from taylorvit.attention.multi_head import MultiHeadAttention
from taylorvit.ops import without_autocast
from taylorvit.ops.reference import widened

EPS = 1e-6  # of the authors' code, pytorch-fast-transformers; their paper has none


def check_options() -> None:
    """Accept no options: phi and EPS are the authors'."""


class LinearAttention(MultiHeadAttention):
    """Multi-head self-attention with the weights phi(q) . phi(k): (B, N, C) -> (B, N, C).

    About 4 N D^2 operations per head, less than softmax attention's 4 N^2 D where N > D. Nothing depends on N, and permuting
    the tokens permutes the output. No options and no parameters of its own; arguments and errors as for
    `MultiHeadAttention`.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return linear_attention(q, k, v, key_mask)

    def extra_repr(self) -> str:
        """Name the heads in the module's printed form."""
        return f"num_heads={self.num_heads}"


def linear_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Compute linear attention, in fp32 (fp64 for fp64 inputs), whatever autocast says.

        y_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + EPS),     phi(x) = elu(x) + 1

    The features are positive but not bounded from below: where all of them are small, so that the sum is not far above EPS, the
    output is not a mean of v but falls to 0. In fp16 the sum would leave the range for N D of some 65,000: hence fp32.

    q, k, v: (B, H, N, D); key_mask: (B, N), true for the keys that count. Returns (B, H, N, D) in the dtype of v, 0 where no
    key counts.
    """
    return without_autocast(functools.partial(_attention, key_mask=key_mask), q, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    queries, keys, values = widened(q, k, v)
    phi_q, phi_k = elu_features(queries), elu_features(keys)  # (B, H, N, D)
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
    numerator = phi_q @ (phi_k.mT @ values)  # (B, H, N, D) @ (B, H, D, D)
    denominator = phi_q @ phi_k.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
    return (numerator / (denominator + EPS)).to(v.dtype)


def elu_features(x: Tensor) -> Tensor:
    """Return elu(x) + 1: x + 1 from 0 on and exp(x) below, where elu(x) + 1 itself would round exp(x) off."""
    above = x > 0
    return torch.where(above, x + 1, x.masked_fill(above, 0).exp())  # the exp that is not taken may not overflow either


torch.fx.wrap("linear_attention")  # looks at values and shapes that FX tracing does not know: a single node of a traced graph
