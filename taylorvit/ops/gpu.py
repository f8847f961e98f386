"""The GPU implementation, `impl="triton"`: one PyTorch operator for the forward and one for the backward pass of each form.

The operators say what is computed and saved; `gpu_direct` and `gpu_efficient` choose how the kernels are launched, and
`kernels_direct` and `kernels_efficient` hold the kernels. Those four import Triton, which comes with the CUDA builds of PyTorch
only: they are imported when they are first needed.

With TRITON_INTERPRET=1, which is Triton's own switch, the kernels run on CPU tensors as well, slowly and in fp16 and fp32 only.
Mathematics: README.md.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ..complexity import quadratic_features
from .operators import Tensors, empty_like_tokens, refuse_forward_mode, register_gradient, register_operations, wants_gradient

DEVICE_TYPES = ("cuda", "meta")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)  # Ampere: the first with bf16 and asynchronous copies


def obstacle(device_type: str, dtype: torch.dtype | None = None, head_dim: int | None = None) -> str | None:
    """Say what stands against the kernels for such tensors, or return None. What is None is not asked about."""
    if device_type not in DEVICE_TYPES and not (device_type == "cpu" and is_interpreted()):
        return f"runs on {', '.join(DEVICE_TYPES)} only, got tensors on {device_type}"
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        return f"computes in {names} only, got {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"takes head dimensions up to {MAX_HEAD_DIM}, got {head_dim}"
    return _missing() if device_type != "meta" else None


# A compiled graph takes what the two below return for a constant, and does not look inside.
@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton's interpreter is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    """Say what this machine lacks for the kernels, or return None."""
    return _look_for_missing()


@functools.cache
def _look_for_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    for index in range(torch.cuda.device_count()):  # all: a model may be on any of them
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            found = f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}"
            return f"needs GPUs of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or more, but {found}"
    return None


def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the attention in O(N^2 D) operations, tile by tile. Arguments and result as in `reference.direct`."""
    refuse_forward_mode("triton", q, k, v, temperature)
    return _direct(q, k, v, temperature, wants_gradient(q, k, v, temperature))[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the attention in O(N D^3) operations, chunk by chunk. Arguments and result as in `reference.efficient`."""
    refuse_forward_mode("triton", q, k, v, temperature)
    return _efficient(q, k, v, temperature, wants_gradient(q, k, v, temperature))[0]


@functools.cache
def _kernels(form: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.gpu_{form}")


@torch.library.custom_op("taylorvit::triton_direct", mutates_args=())
def _direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and, for training, its deviations from the mean value, the row means of the weights, and the mean value."""
    y, deviations, row_means, value_mean = _forward("direct", q, k, v, temperature, training)
    return y, deviations, row_means, value_mean


@torch.library.custom_op("taylorvit::triton_efficient", mutates_args=())
def _efficient(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y and, for training, its deviations from the mean value, the weights' row means, the moments, and the state."""
    y, deviations, row_means, moments, state = _forward("efficient", q, k, v, temperature, training)
    return y, deviations, row_means, moments, state


@torch.library.custom_op("taylorvit::triton_direct_backward", mutates_args=())
def _direct_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    deviations: Tensor,
    row_means: Tensor,
    value_mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and temperature from that of y."""
    return _backward("direct", grad, q, k, v, temperature, deviations, row_means, value_mean)


@torch.library.custom_op("taylorvit::triton_efficient_backward", mutates_args=())
def _efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    deviations: Tensor,
    row_means: Tensor,
    moments: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and temperature from that of y."""
    return _backward("efficient", grad, q, k, v, temperature, deviations, row_means, moments, state)


@_direct.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool) -> Tensors:
    return _kernels("direct").empty_results(q, training)


@_efficient.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool) -> Tensors:
    return _kernels("efficient").empty_results(q, training)


@_direct_backward.register_fake
@_efficient_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *saved: Tensor) -> Tensors:
    return *(empty_like_tokens(q) for _ in range(3)), torch.empty_like(temperature)


register_gradient(_direct, _direct_backward, "triton")
register_gradient(_efficient, _efficient_backward, "triton")


def _forward(form: str, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool) -> Tensors:
    with torch.cuda.device_of(q):  # kernels run on the current device, which need not be that of the tensors
        return _kernels(form).forward(q, k, v, temperature.float().contiguous(), training)


def _backward(
    form: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        dq, dk, dv, dtemperature = _kernels(form).backward(grad, q, k, v, temperature.float().contiguous(), *saved)
    return dq, dk, dv, dtemperature.to(temperature.dtype)


def _rows(head_dim: int) -> int:
    """Rows of the state and of the Gram matrix: what a token is multiplied with in the efficient form."""
    return quadratic_features(head_dim, "tiles") + 2 * head_dim


# What FlopCounterMode counts: the matrix products over the tokens without those done twice, a multiply-add as two operations.
_OPERATORS = torch.ops.taylorvit
register_operations(_OPERATORS.triton_direct, lambda q: 4 * math.prod(q) * q[-2])
register_operations(_OPERATORS.triton_direct_backward, lambda grad: 10 * math.prod(grad) * grad[-2])
register_operations(_OPERATORS.triton_efficient, lambda q: 4 * math.prod(q) * _rows(q[-1]))
register_operations(_OPERATORS.triton_efficient_backward, lambda grad: 8 * math.prod(grad) * _rows(grad[-1]))
