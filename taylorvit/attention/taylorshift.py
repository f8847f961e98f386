"""TaylorShift as an attention module with the constructor, attributes and forward signature of timm's `Attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from taylorvit.attention.multi_head import MultiHeadAttention
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


class TaylorShift(MultiHeadAttention):
    """Multi-head self-attention with Taylor weights: (B, N, C) -> (B, N, C).

    Attention maps: with `form="direct"` (or "auto" where that resolves to direct) a hook on `attn_drop` receives the
    (B, H, N, N) matrix, as timm's `AttentionExtract(model, method="hook")` expects. The matrix is formed only while such a
    hook is there. The efficient form has no matrix, and its hook is not called.

    Args:
        args, kwargs: as for `MultiHeadAttention`. attn_drop could not be the same function in both forms.
        form: "auto", "direct" or "efficient", see `taylor_attention`.
        impl: "auto" or an implementation's name, see `taylor_attention`.
        temperature_init: initial temperature of every head, 1 in the paper.

    Raises:
        ValueError: as for `MultiHeadAttention`, or an option is not valid.
    """

    def __init__(
        self, *args: Any, form: str = "auto", impl: str = "auto", temperature_init: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_options(form=form, impl=impl, temperature_init=temperature_init)
        self.form = form
        self.impl = impl
        self.temperature_init = float(temperature_init)
        self.temperature = nn.Parameter(self.proj.weight.new_empty(self.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the temperatures to temperature_init; timm calls this after it has materialised a model made on `meta`."""
        nn.init.constant_(self.temperature, self.temperature_init)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        hooks = self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks
        if hooks and self._resolved_form(q, k, v) == "direct":
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

    def _resolved_form(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        training = wants_gradient(q, k, v, self.temperature)
        return self.resolved_form(q.shape[-2], training=training, dtype=q.dtype)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        return f"num_heads={self.num_heads}, form={self.form}, impl={self.impl}, temperature_init={self.temperature_init}"


torch.fx.wrap("taylor_attention")  # looks at values and shapes that FX tracing does not know: a single node of a traced graph
