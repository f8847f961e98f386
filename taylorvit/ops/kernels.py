"""What the Triton kernels of both forms share: row arithmetic, the temperature, and how a kernel is launched.

Only `gpu_direct` and `gpu_efficient` import this, and they are imported when a kernel is first needed: Triton comes with the
CUDA builds of PyTorch only. With TRITON_INTERPRET=1, Triton's own switch, all kernels run on CPU, in fp32 and fp16.

The kernels divide the polynomial by s^2, s = max(|tau|, 1), which the quotient of the two sums does not notice:

    w(tau x) / s^2 = a u^2 + (b / s) u + c / s^2,     u = (tau / s) x in [-1, 1],     x = cos(q_i, k_j)

so that weights and sums stay in the range of fp16. The temperature itself multiplies fp32 numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from . import reference

A = tl.constexpr(reference.A)
B = tl.constexpr(reference.B)
C = tl.constexpr(reference.C)
ZERO_LENGTH = tl.constexpr(reference.ZERO_LENGTH)
GRADIENT_LENGTH = tl.constexpr(reference.GRADIENT_LENGTH)

INTERPRETED: bool = triton.knobs.runtime.interpret
WIDTHS = (16, 32, 64, 128)  # what head dimensions are padded to: matrix products take powers of two from 16


@dataclass(frozen=True)
class Launch:
    """How one kernel is compiled: its block sizes by constexpr name, warps a program, and stages of the loads' pipeline."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int


def padded_width(head_dim: int) -> int:
    """Return the head dimension as the kernels pad it, one of WIDTHS."""
    return next(width for width in WIDTHS if head_dim <= width)


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient rounded up. `triton.cdiv` is for kernels, and takes 3 us when Python calls it."""
    return -(-numerator // denominator)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, config: Launch, **constexprs: Any) -> None:
    """Run a kernel. All launches go through here, as `kernels.launch`, so that a program can compile them without a GPU."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel[tuple(grid)](*arguments, **constexprs, **config.blocks, **options)


@triton.jit
def bounded_temperature(temperature, head):
    """Return tau / s in [-1, 1] and s = max(|tau|, 1) of a head; NaN for a temperature that is not finite."""
    tau = tl.load(temperature + head)
    s = tl.maximum(tl.abs(tau), 1.0)
    return tau / s, s


@triton.jit
def lengths(x):
    """Return |x| of every row of x (rows, D) fp32: at least ZERO_LENGTH, and NaN where it leaves the range of fp32."""
    length = tl.sqrt(tl.sum(x * x, axis=1))
    return tl.where(length == float("inf"), float("nan"), tl.maximum(length, ZERO_LENGTH))


@triton.jit
def unit_gradient(unit, dunit, length):
    """Return the gradient of x (rows, D) from that of x / |x|, and the part of it along x / |x| (rows,), all fp32."""
    radial = tl.sum(unit * dunit, axis=1)
    return (dunit - unit * radial[:, None]) / tl.maximum(length, GRADIENT_LENGTH)[:, None], radial
