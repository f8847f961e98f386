"""TaylorShift with a Taylor polynomial of another order: the same module and parameters, another polynomial.

For the study of orders (tools/order_study.py). Order 2 is TaylorShift. The even orders have positive weights, as the even
Taylor polynomials of exp have no real zero (proof: ops/orders.py). The odd ones have negative weights where temperature times
cosine is below -1 (order 1), -1.60 (3) or -2.18 (5), and can divide by nearly 0: they are allowed, because the study has to
show what becomes of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taylorvit.attention import taylorshift
from taylorvit.attention.taylorshift import TaylorShift
from taylorvit.ops.orders import (
    check_features,
    check_form,
    check_order,
    order_attention,
    order_attention_weights,
    output_scale,
)


def check_options(*, order: int = 2, form: str = "direct", temperature_init: float = 1.0) -> None:
    """Raise ValueError unless these are valid options of `TaylorOrder`."""
    check_order(order)
    check_form(form)
    taylorshift.check_options(temperature_init=temperature_init)


class TaylorOrder(TaylorShift):
    """TaylorShift with the weights 1 + x + ... + x^order / order!, in plain PyTorch.

    Args:
        args: as for `TaylorShift`.
        order: of the polynomial, 1 to 6.
        form: "direct" or "efficient"; the latter needs C(D + order, order) features.
        temperature_init: initial temperature of every head.
        kwargs: as for `TaylorShift`, without impl.

    Raises:
        ValueError: as `TaylorShift`, or the efficient form would have too many features.
    """

    def __init__(self, *args: Any, order: int = 2, form: str = "direct", temperature_init: float = 1.0, **kwargs: Any) -> None:
        check_options(order=order, form=form, temperature_init=temperature_init)
        super().__init__(*args, form=form, impl="reference", temperature_init=temperature_init, **kwargs)
        if form == "efficient":
            check_features(self.head_dim, order)
        self.order = order

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        hooks = self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks
        if hooks and self.form == "direct":
            matrix = order_attention_weights(q, k, self.temperature, order=self.order, key_mask=key_mask)  # (B, H, N, N)
            return (output_scale(v, key_mask) * (self.attn_drop(matrix).to(v.dtype) @ v)).to(v.dtype)
        return order_attention(q, k, v, self.temperature, order=self.order, form=self.form, key_mask=key_mask)

    def resolved_form(self, num_tokens: int, *, training: bool, dtype: torch.dtype | None = None) -> str:
        """Return the form that was asked for, whatever the number of tokens."""
        return self.form

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        return f"num_heads={self.num_heads}, order={self.order}, form={self.form}, temperature_init={self.temperature_init}"


# Looks at shapes that FX tracing does not know, so it stays a single node of a traced graph.
torch.fx.wrap("order_attention")
