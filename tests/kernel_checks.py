"""What the tests of both forms' Triton kernels share: where they run, in which dtypes, with which blocks, and one call of them.

Without a GPU they run in Triton's interpreter, which has fp16 and fp32 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from test_cpu_ops import inputs
from torch import Tensor

pytest.importorskip("triton")
from taylorvit.ops import kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
DTYPES = (torch.float16, torch.float32) if kernels.INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)

needs_kernels = pytest.mark.skipif(
    not kernels.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def replace_blocks(monkeypatch: pytest.MonkeyPatch, form: ModuleType, **sizes: int) -> None:
    """Give all entries of a form's launch table blocks of these sizes."""
    table = {key: replace(launch, blocks={name: sizes[name] for name in launch.blocks}) for key, launch in form.TABLE.items()}
    monkeypatch.setattr(form, "TABLE", table)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp64 to as many digits as dtype has, whatever the exponent."""
    mantissa, exponent = torch.frexp(x)
    step = torch.finfo(dtype).eps / 2
    return torch.ldexp((mantissa / step).round() * step, exponent)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def greatest(x: Tensor) -> float:
    return x.abs().max().item()


def hard_inputs(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Draw what is hard in 16 bits, at tau = 8: a kind of `inputs`, "opposite keys" or "queries".

    These lie near one vector or its opposite: keys, or queries, with gradients of y whose sum is 0.
    """
    if kind not in ("opposite keys", "queries"):
        return inputs((1, 2, 65, 32), dtype, kind, temperature=8)
    (q, k, v, temperature), grad = inputs((1, 2, 65, 32), torch.float64, temperature=8)
    near, far = q[:, :, :1], k[:, :, :1]
    if kind == "queries":
        q, grad = near + 0.01 * q, grad - grad.mean(dim=2, keepdim=True)
    else:
        k = far * (1 - 2 * (torch.arange(65) % 2))[:, None] + 0.01 * k
    return [*(x.to(dtype) for x in (q, k, v)), temperature.float()], grad.to(dtype)


HARD_KINDS = ("normal", "clustered keys", "large mean", "zero vectors", "opposite keys", "queries")


def results_of(form: ModuleType, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return y and the gradients of q, k, v and temperature, on CPU, whichever device computes them. Strides are kept."""
    q, k, v, temperature = (x.to(DEVICE) for x in tensors)
    y, *saved = form.forward(q, k, v, temperature, training=True)
    return [x.cpu() for x in (y, *form.backward(grad.to(DEVICE), q, k, v, temperature, *saved))]
