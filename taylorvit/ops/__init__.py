"""TaylorShift attention as one operation. Knows PyTorch and the cost formulas only: it can be lifted out."""

from .operators import wants_gradient
from .taylor_attention import (
    DEVICE_TYPES,
    FASTEST,
    FORMS,
    IMPLEMENTATIONS,
    autocast_off,
    check_form,
    check_impl,
    obstacle,
    resolve_form,
    resolve_impl,
    taylor_attention,
    taylor_attention_weights,
    without_autocast,
)

__all__ = [
    "DEVICE_TYPES",
    "FASTEST",
    "FORMS",
    "IMPLEMENTATIONS",
    "autocast_off",
    "check_form",
    "check_impl",
    "obstacle",
    "resolve_form",
    "resolve_impl",
    "taylor_attention",
    "taylor_attention_weights",
    "wants_gradient",
    "without_autocast",
]
