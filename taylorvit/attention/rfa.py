"""RFA: random feature attention with sines and cosines, in linear time (arXiv:2103.02143), without its gate for causal use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylorvit.attention.multi_head import MultiHeadAttention
from taylorvit.attention.option_checks import check_switch, check_whole_number
from taylorvit.ops import autocast_off
from taylorvit.ops.reference import unit_vectors, widened

# Least mean of the kernel over the keys, which is never above 1: what is smaller, or negative, is an estimate gone wrong.
SMALLEST_MEAN = 1e-3


def check_options(*, num_features: int = 64, redraw: bool = True, seed: int = 0) -> None:
    """Raise ValueError unless these are valid options of `RFA`."""
    check_whole_number("num_features", num_features, 1)
    check_switch("redraw", redraw)
    check_whole_number("seed", seed, 0)


class RFA(MultiHeadAttention):
    """Multi-head self-attention with random Fourier features: (B, N, C) -> (B, N, C).

    About 12 N m D operations per head for m random vectors, linear in N. Nothing in the parameters depends on N.

    Queries and keys are unit vectors, so the weights lie within a factor of e^2 at sigma = 1, and the estimate needs many
    features to differ from a plain mean: with 64, as in the comparison of TaylorShift (arXiv:2403.02920), its error is about as
    large as that of the mean. That comparison also draws the vectors of the queries and those of the keys independently, which
    makes the expected weight the same for every pair of tokens: it measured a mean with noise. Here both share one draw.

    The random vectors of evaluation are the buffer `directions` (H, m, D), drawn from `seed` and the same in all layers.

    Args:
        args, kwargs: as for `MultiHeadAttention`.
        num_features: random vectors m per head, each giving a sine and a cosine.
        redraw: draw other vectors in every forward pass of training, from PyTorch's global generator. Evaluation always takes
            the buffer, which no training changes: averaged weights would average it away.
        seed: of the buffer.

    Raises:
        ValueError: as for `MultiHeadAttention`, or an option is not valid.
    """

    directions: Tensor

    def __init__(self, *args: Any, num_features: int = 64, redraw: bool = True, seed: int = 0, **kwargs: Any) -> None:
        check_options(num_features=num_features, redraw=redraw, seed=seed)
        super().__init__(*args, **kwargs)
        self.num_features = num_features
        self.redraw = redraw
        self.seed = seed
        weight = self.proj.weight
        # The widths of the kernel, head after head: one vector, as what has one dimension gets no weight decay.
        self.sigma = nn.Parameter(weight.new_empty(self.num_heads * self.head_dim))
        shape = (self.num_heads, num_features, self.head_dim)
        self.register_buffer("directions", weight.new_empty(shape, dtype=torch.promote_types(weight.dtype, torch.float32)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set sigma to 1 and draw the buffer; timm calls this after it has materialised a model made on `meta`."""
        nn.init.ones_(self.sigma)
        on_cpu = torch.empty(self.num_heads, 1, self.head_dim, device="cpu", dtype=torch.float64)
        self.directions.copy_(draw_directions(on_cpu, self.num_features, torch.Generator().manual_seed(self.seed)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        directions = draw_directions(q, self.num_features) if self.redraw and self.training else self.directions
        sigma = self.sigma.view(self.num_heads, 1, self.head_dim)
        return rfa_attention(q, k, v, sigma * directions, key_mask=key_mask)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        return f"num_heads={self.num_heads}, num_features={self.num_features}, redraw={self.redraw}, seed={self.seed}"


def rfa_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Estimate attention with a Gaussian kernel of unit vectors, in fp32 (fp64 for fp64 inputs), whatever autocast says.

    With q^ = q / |q|, k^ = k / |k| and the head's random vectors w_r = sigma * g_r, g_r ~ N(0, 1), the same for q and k:

        phi(x) = m^(-1/2) [sin(w_1 . x), cos(w_1 . x), ..., sin(w_m . x), cos(w_m . x)]
        y_i    = mean_j (phi(q^_i) . phi(k^_j)) v_j / max(mean_j phi(q^_i) . phi(k^_j), 1e-3)

    The mean of phi(q^) . phi(k^) over the draws is exp(-|sigma * (q^ - k^)|^2 / 2). At sigma = 1 that is exp(q^ . k^) / e, so y
    is softmax attention with the scores q^ . k^ once m is large. A few features can make the estimate negative, which no true
    denominator is: hence its lower bound.

    q, k, v: (B, H, N, D); projection: (H, m, D); key_mask: (B, N), true for the keys that count. Returns (B, H, N, D) in the
    dtype of v, 0 where no key counts.
    """
    with autocast_off(q):
        queries, keys, values, projection = widened(q, k, v, projection)
        phi_q, phi_k = _features(queries, projection), _features(keys, projection)  # (B, H, N, 2 m)
        if key_mask is None:
            phi_k = phi_k / k.shape[-2]
        else:
            num_kept = key_mask.sum(dim=-1).clamp_min(1)[:, None, None, None]  # (B, 1, 1, 1)
            phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0) / num_kept
        numerator = phi_q @ (phi_k.mT @ values)  # (B, H, N, 2 m) @ (B, H, 2 m, D)
        denominator = phi_q @ phi_k.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
        return (numerator / denominator.clamp_min(SMALLEST_MEAN)).to(v.dtype)


def _features(x: Tensor, projection: Tensor) -> Tensor:
    """Return phi (B, H, N, 2 m) of the directions of x (B, H, N, D)."""
    angle = unit_vectors(x) @ projection.mT  # (B, H, N, m)
    return torch.cat([angle.sin(), angle.cos()], dim=-1) * projection.shape[-2] ** -0.5


def draw_directions(like: Tensor, num_features: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw m normal vectors per head for tokens (..., H, N, D): (H, m, D) in fp32 (fp64 for fp64 tokens).

    They come from the generator given, or else from PyTorch's global one.
    """
    H, _, D = like.shape[-3:]
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(H, num_features, D, generator=generator, device=like.device, dtype=dtype)


# They look at values and shapes that FX tracing does not know: single nodes of a traced graph.
torch.fx.wrap("rfa_attention")
torch.fx.wrap("draw_directions")
