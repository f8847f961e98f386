"""What the attentions of our own share: timm's constructor, attributes and forward signature around an operation on heads.

A subclass gives `_attend`, the operation on (B, H, N, D), and adds its options to the constructor. The parameters keep timm's
names, so that a checkpoint of one attention loads into another.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taylorvit.complexity import head_dimension


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention without its operation: (B, N, C) -> (B, N, C).

    Args:
        dim: width C.
        num_heads: heads H, a divisor of dim.
        qkv_bias: bias of the q, k, v projection.
        qk_norm: apply norm_layer to each query and key before the attention.
        scale_norm: apply norm_layer to the heads' joint output before the last projection.
        proj_bias: bias of the last projection.
        attn_drop: must be 0: what has no matrix of weights cannot drop some, and comparisons change nothing but the attention.
        proj_drop: dropout after the last projection.
        norm_layer: needed by qk_norm and scale_norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: num_heads does not divide dim, attn_drop is not 0, or norm_layer is missing.
    """

    takes_key_mask: ClassVar[bool] = True  # whether keys can be left out exactly

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if attn_drop:
            raise ValueError(f"{name} has no dropout on attention weights: attn_drop must be 0, got {attn_drop}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer, got None")
        self.num_heads = num_heads
        self.head_dim = head_dimension(dim, num_heads)

        def norm(size: int, wanted: bool) -> nn.Module:
            return norm_layer(size, device=device, dtype=dtype) if wanted and norm_layer else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = norm(self.head_dim, qk_norm)
        self.k_norm = norm(self.head_dim, qk_norm)
        self.attn_drop = nn.Dropout(0.0)
        self.norm = norm(dim, scale_norm)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend every token to every token, or to those that attn_mask (B, 1, 1, N) bool is true for.

        Raises:
            ValueError: a mask that this attention does not have, or is_causal.
        """
        key_mask = read_key_mask(x, attn_mask, is_causal, type(self).__name__, self.takes_key_mask)
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv.unbind(0)
        x = self._attend(self.q_norm(q), self.k_norm(k), v, key_mask)  # (B, H, N, D)
        x = self.norm(x.transpose(1, 2).reshape(B, N, C))
        return self.proj_drop(self.proj(x))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Compute the attention (B, H, N, D) of q, k, v (B, H, N, D) over the keys for which key_mask (B, N) is true."""
        raise NotImplementedError


def read_key_mask(
    x: Tensor, attn_mask: Tensor | None, is_causal: bool, name: str, takes_key_mask: bool = True
) -> Tensor | None:
    """Return the mask of the keys (B, N) from what timm passes on, or None.

    Raises:
        ValueError: a mask that is not the same for all heads and queries, any mask where there is none, or causal attention.
    """
    if is_causal:
        raise ValueError(f"{name} is not causal: is_causal must be False, got True")
    if attn_mask is None:
        return None
    B, N, _ = x.shape
    given = f"{attn_mask.dtype} {tuple(attn_mask.shape)}"
    if not takes_key_mask:
        raise ValueError(f"{name} cannot leave out keys: attn_mask must be None, got {given}")
    if attn_mask.dtype != torch.bool or attn_mask.shape != (B, 1, 1, N):
        raise ValueError(f"{name} masks keys only: attn_mask must be None or torch.bool {(B, 1, 1, N)}, got {given}")
    return attn_mask[:, 0, 0]


@torch.no_grad()
def draw_uniform(parameters: list[nn.Parameter], bound: float) -> None:
    """Fill parameters from U(-bound, bound), seeded by PyTorch's global CPU generator but without moving that on."""
    with torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2**62, (), device="cpu"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))


torch.fx.wrap("read_key_mask")  # looks at values and shapes that FX tracing does not know: a single node of a traced graph
