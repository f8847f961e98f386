"""TaylorShift attention as one operation. Knows PyTorch and the cost formulas only: it can be lifted out."""

from .taylor_attention import FORMS, IMPLEMENTATIONS, resolve_form, resolve_impl, taylor_attention, taylor_attention_weights

__all__ = ["FORMS", "IMPLEMENTATIONS", "resolve_form", "resolve_impl", "taylor_attention", "taylor_attention_weights"]
