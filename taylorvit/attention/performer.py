"""Performer: softmax attention estimated with positive random features, in linear time (FAVOR+, arXiv:2009.14794)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taylorvit.attention.multi_head import MultiHeadAttention
from taylorvit.attention.option_checks import check_not_negative, check_switch, check_whole_number
from taylorvit.ops import autocast_off
from taylorvit.ops.reference import widened


def check_options(*, num_features: int = 128, redraw: bool = False, eps: float = 1e-4, seed: int = 0) -> None:
    """Raise ValueError unless these are valid options of `Performer`."""
    check_whole_number("num_features", num_features, 1)
    check_switch("redraw", redraw)
    check_not_negative("eps", eps)
    check_whole_number("seed", seed, 0)


class Performer(MultiHeadAttention):
    """Multi-head self-attention with FAVOR+: (B, N, C) -> (B, N, C).

    About 8 N m D operations per head for m features: less than softmax attention's 4 N^2 D where N > 2 m. Nothing in the
    parameters depends on N. The estimate comes near softmax as m^(-1/2), and only for short queries and keys: see `eps`.

    The random vectors are the buffer `projection` (H, m, D), drawn from `seed` whatever the global generator does, and the same
    in all layers. It is part of the state dict, since without `redraw` a trained model works with no other vectors.

    Args:
        args, kwargs: as for `MultiHeadAttention`.
        num_features: random features m per head; 128 in TaylorShift's comparison (arXiv:2403.02920).
        redraw: draw other vectors in every forward pass of training, from PyTorch's global generator. Evaluation always takes
            the buffer, which no training changes: averaged weights would average it away.
        eps: added to every feature, relative to the largest. It keeps the denominator above 0, and is a bias towards the plain
            mean of v: keys are compared with the longest projection of all, so that the features of most keys are below 1e-4
            once lengths reach about sqrt(D), and more features then do not help. 0 can divide by 0 there.
        seed: of the buffer.

    Raises:
        ValueError: as for `MultiHeadAttention`, or an option is not valid.
    """

    projection: Tensor

    def __init__(
        self,
        *args: Any,
        num_features: int = 128,
        redraw: bool = False,
        eps: float = 1e-4,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_options(num_features=num_features, redraw=redraw, eps=eps, seed=seed)
        super().__init__(*args, **kwargs)
        self.num_features = num_features
        self.redraw = redraw
        self.eps = float(eps)
        self.seed = seed
        weight = self.proj.weight
        shape = (self.num_heads, num_features, self.head_dim)
        self.register_buffer("projection", weight.new_empty(shape, dtype=torch.promote_types(weight.dtype, torch.float32)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the buffer; timm calls this after it has materialised a model made on `meta`."""
        on_cpu = torch.empty(self.num_heads, 1, self.head_dim, device="cpu", dtype=torch.float64)
        self.projection.copy_(draw_projection(on_cpu, self.num_features, torch.Generator().manual_seed(self.seed)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        projection = draw_projection(q, self.num_features) if self.redraw and self.training else self.projection
        return performer_attention(q, k, v, projection, eps=self.eps, key_mask=key_mask)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        options = f"num_features={self.num_features}, redraw={self.redraw}, eps={self.eps}, seed={self.seed}"
        return f"num_heads={self.num_heads}, {options}"


def performer_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, eps: float, key_mask: Tensor | None = None
) -> Tensor:
    """Estimate softmax attention, in fp32 (fp64 for fp64 inputs), whatever autocast says.

    With x' = x / D^(1/4), so that q' . k' is the score q . k / sqrt(D), and w_1 .. w_m the head's random vectors:

        phi(x)_r = exp(w_r . x' - |x'|^2 / 2 - c) + eps
        y_i      = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)

    The mean of phi(q) . phi(k) / m over w ~ N(0, 1) is exp(q' . k') up to the factors exp(-c), which cancel. c keeps exp from
    overflowing: the largest w_r . x' of the query, or of all keys of the head.

    q, k, v: (B, H, N, D); projection: (H, m, D); key_mask: (B, N), true for the keys that count. Returns (B, H, N, D) in the
    dtype of v, NaN where no key counts.
    """
    with autocast_off(q):
        queries, keys, values, projection = widened(q, k, v, projection)
        keep = None if key_mask is None else key_mask[:, None, :, None]  # (B, 1, N, 1)
        phi_q = _features(queries, projection, eps, (-1,))  # (B, H, N, m)
        phi_k = _features(keys, projection, eps, (-2, -1), keep)  # (B, H, N, m)
        numerator = phi_q @ (phi_k.mT @ values)  # (B, H, N, m) @ (B, H, m, D)
        denominator = phi_q @ phi_k.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
        return (numerator / denominator).to(v.dtype)


def _features(x: Tensor, projection: Tensor, eps: float, over: tuple[int, ...], keep: Tensor | None = None) -> Tensor:
    """Return phi (B, H, N, m) of x (B, H, N, D), with c the maximum over these dimensions, and 0 where `keep` is false."""
    x = x * x.shape[-1] ** -0.25
    projected = x @ projection.mT  # (B, H, N, m)
    if keep is not None:
        projected = projected.masked_fill(~keep, float("-inf"))
    # Not detached, as it is elsewhere: beside eps the maximum does not cancel, and this is the gradient of what is computed.
    largest = projected.amax(dim=over, keepdim=True)
    phi = torch.exp(projected - x.square().sum(dim=-1, keepdim=True) / 2 - largest) + eps
    return phi if keep is None else phi.masked_fill(~keep, 0.0)


def draw_projection(like: Tensor, num_features: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw m vectors per head for tokens (..., H, N, D): (H, m, D) in fp32 (fp64 for fp64 tokens).

    They come from the generator given, or else from PyTorch's global one. Up to D of them at a time are orthogonal, which
    lowers the variance; each has the length of a vector of D normal numbers, so that each by itself is N(0, 1).
    """
    H, _, D = like.shape[-3:]
    blocks = -(-num_features // D)
    dtype = torch.promote_types(like.dtype, torch.float32)
    kind: dict[str, Any] = {"generator": generator, "device": like.device, "dtype": dtype}
    q, r = torch.linalg.qr(torch.randn(H, blocks, D, D, **kind))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # QR prefers one sign: without this half of the directions lack
    length = torch.randn(H, num_features, D, **kind).norm(dim=-1, keepdim=True)
    return length * q.mT.flatten(1, 2)[:, :num_features]


# They look at values and shapes that FX tracing does not know: single nodes of a traced graph.
torch.fx.wrap("performer_attention")
torch.fx.wrap("draw_projection")
