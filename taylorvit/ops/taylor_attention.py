"""The public operation: checks its inputs, chooses the form and the implementation, and calls it.

`form` is mathematics (direct or efficient: one function, two orders of summation), `impl` is machinery. What is asked for by
name is given or refused; only "auto" chooses, from shapes, device type and whether gradients are wanted.

To add an implementation, write one function a form with the signature of `reference.direct` and enter it in
IMPLEMENTATIONS. It is called with checked inputs: q, k, v (B, H, N, D) of one floating dtype and any strides, N may be 0,
temperature (H,) of any floating dtype, autocast switched off. It returns (B, H, N, D) in the dtype of v.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from . import cpu, form_table, gpu, reference
from .operators import wants_gradient
from .padding import attend_to_some

Form = Literal["auto", "direct", "efficient"]
Implementation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FORMS: tuple[str, ...] = get_args(Form)
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "reference": {"direct": reference.direct, "efficient": reference.efficient},
    "cpu": {"direct": cpu.direct, "efficient": cpu.efficient},
    "triton": {"direct": gpu.direct, "efficient": gpu.efficient},
}
# Of the implementations that do not run everywhere. Triton's interpreter, for tests, adds the CPU to the last (`gpu`).
DEVICE_TYPES: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "meta"), "triton": gpu.DEVICE_TYPES}
# Implementation by device type, if nothing stands against it (`obstacle`); "reference" for all others.
FASTEST: dict[str, str] = {"cpu": "cpu", "cuda": "triton"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

logger = logging.getLogger(__name__)


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    form: str = "auto",
    impl: str = "auto",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Compute TaylorShift attention: each output is the weighted mean of v with the weights 1 + x + x^2/2, times sqrt(N / D).

    x = temperature * cos(q_i, k_j), one temperature per head; see `reference` for the equations.

    Args:
        q: queries (B, H, N, D), fp16, bf16, fp32 or fp64, any strides.
        k: keys, with the shape, dtype and device of q.
        v: values, likewise.
        temperature: (H,), any of these dtypes: parameters stay fp32 while activations are bf16.
        form: "direct" costs O(N^2 D), "efficient" O(N D^3); "auto" is `resolve_form`.
        impl: a key of IMPLEMENTATIONS; "auto" is `resolve_impl`.
        key_mask: (B, N) bool, false for tokens that none attends to, such as padding; N in sqrt(N / D) then counts the others.
            A sample without any other gives NaN. See `padding`.

    Returns:
        (B, H, N, D) in the dtype of q. Sums are fp32 (fp64 for fp64). Under autocast q, k, v are first converted to the
        autocast dtype (fp64 stays), which is also the output's, as for F.scaled_dot_product_attention.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, D = 0, form or impl is unknown, impl lacks the form or cannot
            compute with this device, dtype or D.
    """
    q, k, v = apply_autocast(q, k, v)
    check_inputs(q, k, v, temperature)
    num_tokens, head_dim = q.shape[-2:]
    training = wants_gradient(q, k, v, temperature)
    impl = resolve_impl(q.device.type, impl, dtype=q.dtype, head_dim=head_dim)
    form = resolve_form(num_tokens, head_dim, form, impl=impl, training=training)
    forms = IMPLEMENTATIONS[impl]
    if form not in forms:
        raise ValueError(f"impl {impl!r} has form {', '.join(forms)} only, got {form!r}")
    if not torch.compiler.is_compiling():  # a compiled graph can neither log nor look a number up that it does not know
        _log_choice_once(form, impl, num_tokens, head_dim)
    if key_mask is None:
        return without_autocast(forms[form], q, k, v, temperature)
    check_key_mask(key_mask, q)
    return without_autocast(functools.partial(attend_to_some, forms[form]), q, k, v, temperature, key_mask)


def taylor_attention_weights(q: Tensor, k: Tensor, temperature: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Return the attention matrix of the direct form for pictures: (B, H, N, N), fp32 (fp64 for fp64), rows sum to 1.

    The attention itself is sqrt(N / D) times this matrix times v, where N does not count the keys that are left out. Arguments
    and errors as in `taylor_attention`.
    """
    q, k = apply_autocast(q, k)
    check_inputs(q, k, k, temperature)
    w = without_autocast(reference.taylor_weights, q, k, temperature)
    if key_mask is not None:
        check_key_mask(key_mask, q)
        w = w * key_mask[:, None, None, :]
    return w / w.sum(dim=-1, keepdim=True)


def resolve_form(num_tokens: int, head_dim: int, form: str = "auto", *, impl: str, training: bool = False) -> str:
    """Return "direct" or "efficient"; "auto" takes the faster one for this many tokens.

    The switch is where the efficient form was measured to overtake the direct one (on GPU, counted until it is measured), for
    the head dimension, the implementation and forward or training, between two head dimensions interpolated (`form_table`).
    Elsewhere it is the paper's N0, where the operations are equal (`complexity.flops_crossover`). The choice depends on
    nothing but the arguments.

    Args:
        num_tokens: N.
        head_dim: D.
        form: "auto", "direct" or "efficient".
        impl: name of an implementation, as `resolve_impl` returns it.
        training: whether the backward pass follows.

    Raises:
        ValueError: form is unknown.
    """
    check_form(form)
    if form != "auto":
        return form
    return "efficient" if num_tokens > form_table.crossover(head_dim, impl, training) else "direct"


def resolve_impl(device_type: str, impl: str = "auto", *, dtype: torch.dtype | None = None, head_dim: int | None = None) -> str:
    """Return the implementation's name; "auto" takes the device type's in FASTEST, or "reference" if that cannot do it.

    Args:
        device_type: of the tensors.
        impl: "auto" or a key of IMPLEMENTATIONS.
        dtype: of q, k and v; None: any that the implementation takes.
        head_dim: D; None likewise.

    Raises:
        ValueError: impl is unknown, or cannot compute this.
    """
    check_impl(impl)
    if impl == "auto":
        fastest = FASTEST.get(device_type, "reference")
        return "reference" if obstacle(fastest, device_type, dtype, head_dim) else fastest
    if reason := obstacle(impl, device_type, dtype, head_dim):
        raise ValueError(f"impl {impl!r} {reason}")
    return impl


def obstacle(impl: str, device_type: str, dtype: torch.dtype | None = None, head_dim: int | None = None) -> str | None:
    """Say why an implementation cannot compute with such tensors, or return None. What is None is not asked about."""
    if impl == "triton":
        return gpu.obstacle(device_type, dtype, head_dim)
    allowed = DEVICE_TYPES.get(impl, (device_type,))
    return None if device_type in allowed else f"runs on {', '.join(allowed)} only, got tensors on {device_type}"


def check_form(form: str) -> None:
    """Raise ValueError unless this is a form's name or "auto"."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def check_impl(impl: str) -> None:
    """Raise ValueError unless this is an implementation's name or "auto"."""
    if impl not in (known := ["auto", *IMPLEMENTATIONS]):
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")


@functools.cache
def _log_choice_once(form: str, impl: str, num_tokens: int, head_dim: int) -> None:
    logger.info("taylor_attention: form %s, impl %s for %d tokens of head dimension %d", form, impl, num_tokens, head_dim)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or q.shape[-1] == 0:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"q, k and v must have one shape (B, H, N, D) with D > 0, got {shapes}")
    if tuple(temperature.shape) != (q.shape[1],):
        raise ValueError(f"temperature must have shape ({q.shape[1]},), one per head, got {tuple(temperature.shape)}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one dtype of {_names(DTYPES)}, got {_names((q.dtype, k.dtype, v.dtype))}")
    if temperature.dtype not in DTYPES:
        raise ValueError(f"temperature must have a dtype of {_names(DTYPES)}, got {_names((temperature.dtype,))}")
    devices = [x.device for x in (q, k, v, temperature)]
    if any(device != q.device for device in devices):
        raise ValueError(f"q, k, v and temperature must be on one device, got {', '.join(map(str, devices))}")


def check_key_mask(key_mask: Tensor, q: Tensor) -> None:
    B, _, N, _ = q.shape
    if key_mask.shape != (B, N) or key_mask.dtype != torch.bool or key_mask.device != q.device:
        given = f"{key_mask.dtype} {tuple(key_mask.shape)} on {key_mask.device}"
        raise ValueError(f"key_mask must be torch.bool {(B, N)} on {q.device}, got {given}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _autocast_enabled(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # meta knows no autocast


def apply_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert to the autocast dtype where autocast is on, as PyTorch's own matrix products do."""
    if not _autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """Return a context with autocast off for tensors on the device of x, so that what is fp32 inside stays fp32."""
    return torch.autocast(x.device.type, enabled=False) if _autocast_enabled(x) else nullcontext()


def without_autocast(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call with autocast off, so that what is fp32 inside stays fp32."""
    with autocast_off(tensors[0]):
        return function(*tensors)
