"""TaylorShift as an attention module with the constructor, attributes and forward signature of timm's `Attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from taylorvit.complexity import head_dimension
from taylorvit.ops import (
    check_form,
    check_impl,
    resolve_form,
    resolve_impl,
    taylor_attention,
    taylor_attention_weights,
    wants_gradient,
)


def check_options(*, form: str = "auto", impl: str = "auto", temperature_init: float = 1.0) -> None:
    """Raise ValueError unless these are valid options of `TaylorShift`."""
    check_form(form)
    check_impl(impl)
    if isinstance(temperature_init, bool) or not isinstance(temperature_init, (int, float)):
        raise ValueError(f"temperature_init must be a number, got {temperature_init!r}")
    if not math.isfinite(temperature_init):
        raise ValueError(f"temperature_init must be finite, got {temperature_init!r}")


class TaylorShift(nn.Module):
    """Multi-head self-attention with Taylor weights: (B, N, C) -> (B, N, C).

    Attention maps: with `form="direct"` (or "auto" where that resolves to direct) a hook on `attn_drop` receives the
    (B, H, N, N) matrix, as timm's `AttentionExtract(model, method="hook")` expects. The matrix is formed only while such a
    hook is there. The efficient form has no matrix, and its hook is not called.

    Args:
        dim: width C.
        num_heads: heads H, a divisor of dim.
        qkv_bias: bias of the q, k, v projection.
        qk_norm: apply norm_layer to each query and key before the attention.
        scale_norm: apply norm_layer to the heads' joint output before the last projection.
        proj_bias: bias of the last projection.
        attn_drop: must be 0: dropout on the weights cannot be the same function in both forms.
        proj_drop: dropout after the last projection.
        norm_layer: needed by qk_norm and scale_norm.
        device: of the parameters.
        dtype: of the parameters.
        form: "auto", "direct" or "efficient", see `taylor_attention`.
        impl: "auto" or an implementation's name, see `taylor_attention`.
        temperature_init: initial temperature of every head, 1 in the paper.

    Raises:
        ValueError: num_heads does not divide dim, attn_drop is not 0, norm_layer is missing, or an option is not valid.
    """

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
        *,
        form: str = "auto",
        impl: str = "auto",
        temperature_init: float = 1.0,
    ) -> None:
        super().__init__()
        if attn_drop:
            raise ValueError(f"TaylorShift has no dropout on attention weights: attn_drop must be 0, got {attn_drop}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer, got None")
        check_options(form=form, impl=impl, temperature_init=temperature_init)
        self.num_heads = num_heads
        self.head_dim = head_dimension(dim, num_heads)
        self.form = form
        self.impl = impl
        self.temperature_init = float(temperature_init)

        def norm(size: int, wanted: bool) -> nn.Module:
            return norm_layer(size, device=device, dtype=dtype) if wanted and norm_layer else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = norm(self.head_dim, qk_norm)
        self.k_norm = norm(self.head_dim, qk_norm)
        self.temperature = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.attn_drop = nn.Dropout(0.0)
        self.norm = norm(dim, scale_norm)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the temperatures to temperature_init; timm calls this after it has materialised a model made on `meta`."""
        nn.init.constant_(self.temperature, self.temperature_init)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend every token to every token, or to those that attn_mask (B, 1, 1, N) bool is true for.

        Raises:
            ValueError: another mask or is_causal is asked for; neither exists for this attention.
        """
        key_mask = read_key_mask(x, attn_mask, is_causal)
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv.unbind(0)
        x = self._attend(self.q_norm(q), self.k_norm(k), v, key_mask)  # (B, H, N, D)
        x = self.norm(x.transpose(1, 2).reshape(B, N, C))
        return self.proj_drop(self.proj(x))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        hooks = self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks
        training = wants_gradient(q, k, v, self.temperature)
        if hooks and self.resolved_form(q.shape[-2], training=training, dtype=q.dtype) == "direct":
            weights = self.attn_drop(taylor_attention_weights(q, k, self.temperature, key_mask=key_mask))  # (B, H, N, N)
            mean = weights.to(v.dtype) @ v
            if key_mask is None:
                return math.sqrt(q.shape[-2] / self.head_dim) * mean
            num_kept = key_mask.sum(dim=-1, dtype=weights.dtype)[:, None, None, None]  # (B, 1, 1, 1)
            return (num_kept / self.head_dim).sqrt().to(v.dtype) * mean
        return taylor_attention(q, k, v, self.temperature, form=self.form, impl=self.impl, key_mask=key_mask)

    def resolved_form(self, num_tokens: int, *, training: bool, dtype: torch.dtype | None = None) -> str:
        """Return the form for this many tokens (of this dtype) on the parameters' device: "direct" or "efficient"."""
        impl = resolve_impl(self.temperature.device.type, self.impl, dtype=dtype, head_dim=self.head_dim)
        return resolve_form(num_tokens, self.head_dim, self.form, impl=impl, training=training)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        return f"num_heads={self.num_heads}, form={self.form}, impl={self.impl}, temperature_init={self.temperature_init}"


def read_key_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Return the mask of the keys (B, N) from what timm passes on, or None.

    Raises:
        ValueError: a mask that is not the same for all heads and queries, or causal attention.
    """
    if is_causal:
        raise ValueError("TaylorShift is not causal: is_causal must be False, got True")
    if attn_mask is None:
        return None
    B, N, _ = x.shape
    if attn_mask.dtype != torch.bool or attn_mask.shape != (B, 1, 1, N):
        given = f"{attn_mask.dtype} {tuple(attn_mask.shape)}"
        raise ValueError(f"TaylorShift masks keys only: attn_mask must be None or torch.bool {(B, 1, 1, N)}, got {given}")
    return attn_mask[:, 0, 0]


# Both look at values or shapes that FX tracing does not know, so they stay single nodes of a traced graph.
torch.fx.wrap("read_key_mask")
torch.fx.wrap("taylor_attention")
