"""What a case cannot be faster than on a GPU: the traffic it needs over the memory's rate, its matrix products over theirs.

    least seconds = max(bytes / copy rate, FLOPs / matmul rate)

Bytes: every tensor once, `itemsize` bytes a number. Forward reads q, k, v and writes y: 4 N D numbers a head, 8 N D bytes in
bf16. Training adds a backward pass that reads q, k, v, y and its gradient and writes three gradients: 12 N D, 24 N D bytes.

FLOPs: matrix products alone, a multiply-add as two. Direct (and softmax): 4 N^2 D a head, backward 10 N^2 D, as the scores are
computed again: two products, then five. Efficient: each token meets a state of F features, and its normaliser D more by way of
the Gram matrix of the keys: 4 N D (F + D), backward twice that. F = D (D + 1) / 2 + D + 1 are the fewest features there are.

Inputs that stay in the second-level cache are read faster than from memory: a small case may beat this limit.

The rates are those that tools/gpu_limits.py has measured on the same GPU (`limits_measure`), not those of a data sheet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..complexity import num_features
from .case import DTYPES, Case

Form = Literal["direct", "efficient"]

FORWARD_TENSORS, TRAINING_TENSORS = 4, 12
TRAINING_FLOPS: dict[Form, float] = {"direct": 3.5, "efficient": 3.0}  # forward and backward over forward
# fp32 inputs: what the matrix units can do with them, whether or not a candidate lets them. There is none for fp64.
MATMUL_RATES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "tfloat32"}


@dataclass(frozen=True)
class Limits:
    """The rates of one GPU: bytes a second that a copy reads and writes, FLOP/s of a large matrix product by dtype."""

    gpu: str
    copy_bytes_per_second: float
    matmul_flops_per_second: dict[str, float]


def read_limits(path: Path, gpu: str) -> Limits:
    """Read the file that tools/gpu_limits.py wrote.

    Raises:
        ValueError: it cannot be read, lacks a rate, or belongs to another GPU.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rates = content["rates"]
        matmul = {name: float(rates[f"matmul_{name}"]["flops_per_second"]) for name in MATMUL_RATES.values()}
        found = Limits(content["gpu"]["name"], float(rates["copy"]["bytes_per_second"]), matmul)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--limits {path} is no file of tools/gpu_limits.py: {type(error).__name__}: {error}") from error
    if found.gpu != gpu:
        raise ValueError(f"--limits {path} belongs to another GPU: {found.gpu!r}, here is {gpu!r}")
    return found


def least_bytes(case: Case) -> int:
    """Count the bytes that every attention has to move in this case, all heads."""
    B, H, N, D = case.shape
    return B * H * N * D * DTYPES[case.dtype].itemsize * (TRAINING_TENSORS if case.training else FORWARD_TENSORS)


def matmul_flops(case: Case, form: Form) -> float:
    """Count the FLOPs of the form's matrix products in this case, all heads."""
    B, H, N, D = case.shape
    width = N if form == "direct" else num_features(D, "symmetric") + D
    return 4.0 * B * H * N * D * width * (TRAINING_FLOPS[form] if case.training else 1)


def least_seconds(case: Case, form: Form, limits: Limits) -> float | None:
    """Return what the case cannot be faster than, or None where no rate is known for its dtype."""
    rate = MATMUL_RATES.get(case.dtype)
    if rate is None:
        return None
    traffic = least_bytes(case) / limits.copy_bytes_per_second
    return max(traffic, matmul_flops(case, form) / limits.matmul_flops_per_second[rate])
