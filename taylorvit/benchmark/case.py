"""One point of a measurement: shape, dtype, pass, device and layout, with its inputs and the call that is made on them.

A model's projection writes q, k and v of a token side by side, and its next layer reads the heads' outputs of a token side by
side. Layout `packed` is that: q, k, v are strided views of one (B, N, 3, H, D), and the call ends with the output as (B, N, C),
so that an attention which writes another order pays for its copy as it does in a model. `separate` is one contiguous
(B, H, N, D) each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, N, D), temperature (H,) -> (B, H, N, D)
Truth = Literal["taylor", "softmax"]
Layout = Literal["separate", "packed"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """A shape (B, H, N, D), a dtype, forward or training, a device, and how q, k and v lie in memory."""

    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim: int
    dtype: str = "float32"
    training: bool = False
    device: str = "cpu"
    layout: Layout = "separate"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, D)."""
        return self.batch_size, self.num_heads, self.num_tokens, self.head_dim

    @property
    def pass_name(self) -> str:
        """`training` is forward and backward."""
        return "training" if self.training else "forward"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    def make_inputs(self, seed: int) -> tuple[Tensor, ...]:
        """Draw q, k, v, temperature and, for training, the gradient of the output.

        All standard normal in the case's dtype, but the temperature: one a head between 0.5 and 2, in fp32 (fp64 for fp64), as
        parameters are while activations are bf16.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = DTYPES[self.dtype]
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

        B, H, N, D = self.shape
        if self.layout == "packed":
            q, k, v = normal(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
        else:
            q, k, v = (normal(B, H, N, D) for _ in range(3))
        temperature = 0.5 + 1.5 * torch.rand(self.num_heads, generator=generator, device=self.device, dtype=wide)
        if not self.training:
            return q, k, v, temperature
        upstream = normal(B, N, H, D).transpose(1, 2) if self.layout == "packed" else normal(B, H, N, D)
        return *(x.requires_grad_() for x in (q, k, v, temperature)), upstream

    def bind(self, attention: Attention, truth: Truth) -> Callable[..., tuple[Tensor, ...]]:
        """Return the call to measure on `make_inputs`.

        It returns the output and, for training, the gradients of q, k, v and of the temperature where the attention has one.
        """

        def forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
            return (self._as_passed_on(attention(q, k, v, temperature)),)

        def training(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
            y = self._as_passed_on(attention(q, k, v, temperature))
            leaves = (q, k, v, temperature) if truth == "taylor" else (q, k, v)
            return y.detach(), *torch.autograd.grad(y, leaves, upstream)

        return training if self.training else forward

    def _as_passed_on(self, y: Tensor) -> Tensor:
        """Return y (B, H, N, D) in the memory order of what comes next: a view, or a copy where it lies in another order."""
        if self.layout == "separate":
            return y
        B, H, N, D = self.shape
        joint = y.transpose(1, 2).reshape(B, N, H * D)  # what the model's last projection reads
        return joint.view(B, N, H, D).transpose(1, 2)
