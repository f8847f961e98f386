"""What the tests of both forms' Triton kernels share: where they run, in which dtypes, with which blocks, and one call of them.

Without a GPU they run in Triton's interpreter, which has fp16 and fp32 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
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


def results_of(form: ModuleType, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return y and the gradients of q, k, v and temperature, on CPU, whichever device computes them. Strides are kept."""
    q, k, v, temperature = (x.to(DEVICE) for x in tensors)
    y, *saved = form.forward(q, k, v, temperature, training=True)
    return [x.cpu() for x in (y, *form.backward(grad.to(DEVICE), q, k, v, temperature, *saved))]
