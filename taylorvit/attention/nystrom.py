"""Nystrom attention: softmax attention rebuilt from its values at a few landmarks, in linear time (arXiv:2102.03902)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from taylorvit.attention.multi_head import MultiHeadAttention, draw_uniform
from taylorvit.attention.option_checks import check_whole_number
from taylorvit.ops import without_autocast
from taylorvit.ops.reference import widened


def check_options(*, num_landmarks: int = 64, pinv_iterations: int = 6, conv_kernel_size: int | None = None) -> None:
    """Raise ValueError unless these are valid options of `Nystrom`."""
    check_whole_number("num_landmarks", num_landmarks, 1)
    check_whole_number("pinv_iterations", pinv_iterations, 1)
    if conv_kernel_size is not None:
        check_whole_number("conv_kernel_size", conv_kernel_size, 1)
        if conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, got {conv_kernel_size}")


class Nystrom(MultiHeadAttention):
    """Multi-head self-attention by the Nystrom method: (B, N, C) -> (B, N, C).

    About 8 N m D + 8 I m^3 operations per head for m landmarks and I iterations: more than softmax attention's 4 N^2 D at 197
    tokens. No parameter depends on N, but the landmarks do: they are means of m segments of neighbours, N / m tokens each, so
    the order of the tokens matters. Up to m tokens it is softmax attention.

    A key mask gives the attention over the kept tokens as if the others were not there: segments are made of kept tokens only,
    separately for each sample, and a sample that keeps at most m gets softmax attention. Only the convolution sees the gaps:
    with it this holds for masks of padding at the end.

    Args:
        args, kwargs: as for `MultiHeadAttention`.
        num_landmarks: m; 64 as the authors on ImageNet and in "Which Transformer to Favor" (arXiv:2308.09372).
        pinv_iterations: steps of the iteration to the pseudo-inverse. More are not always better: it is often ill-conditioned,
            and stopping early keeps it small.
        conv_kernel_size: add a convolution of the values over the tokens, its own for each head, of this odd size; None: none.

    Raises:
        ValueError: as for `MultiHeadAttention`, or an option is not valid.
    """

    def __init__(
        self,
        *args: Any,
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(num_landmarks=num_landmarks, pinv_iterations=pinv_iterations, conv_kernel_size=conv_kernel_size)
        super().__init__(*args, **kwargs)
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.conv_kernel_size = conv_kernel_size
        self.conv_weight: nn.Parameter | None = None
        if conv_kernel_size is not None:
            self.conv_weight = nn.Parameter(self.proj.weight.new_empty(self.num_heads, 1, conv_kernel_size, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution as PyTorch does; timm calls this after it has materialised a model made on `meta`."""
        if self.conv_weight is not None:
            draw_uniform([self.conv_weight], 1 / math.sqrt(self.conv_weight.shape[-2]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"num_landmarks": self.num_landmarks, "pinv_iterations": self.pinv_iterations}
        return nystrom_attention(q, k, v, **options, conv_weight=self.conv_weight, key_mask=key_mask)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        options = f"num_landmarks={self.num_landmarks}, pinv_iterations={self.pinv_iterations}"
        return f"num_heads={self.num_heads}, {options}, conv_kernel_size={self.conv_kernel_size}"


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_landmarks: int,
    pinv_iterations: int = 6,
    conv_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Compute Nystrom attention, in fp32 (fp64 for fp64 inputs), whatever autocast says.

    With the landmarks Q~ and K~ (m, D), the means of m segments of the tokens, and S(Q, K) = softmax(Q K^T / sqrt(D)):

        Y = S(Q, K~) Z (S(Q~, K) V) + conv(V),     Z the pseudo-inverse of A = S(Q~, K~)
        Z_0 = A^T / (|A|_1 |A|_inf),     Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

    If m does not divide N, the last N mod m segments are one token longer. Up to m tokens, Y = S(Q, K) V + conv(V).

    q, k, v: (B, H, N, D); conv_weight: (H, 1, odd size, 1); key_mask: (B, N), true for the tokens that count, as keys and
    in the landmarks. Returns (B, H, N, D) in the dtype of v, NaN where no token counts.
    """
    attend = functools.partial(_attention, num_landmarks=num_landmarks, pinv_iterations=pinv_iterations, key_mask=key_mask)
    return without_autocast(functools.partial(attend, conv_weight=conv_weight), q, k, v)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int,
    pinv_iterations: int,
    conv_weight: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    queries, keys, values = widened(q, k, v)
    if key_mask is not None:
        keys, values = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (keys, values))
    if q.shape[-2] <= num_landmarks:
        y = _weights(queries, keys, key_mask) @ values
    elif key_mask is None:
        q_landmarks, k_landmarks = _landmarks(queries, num_landmarks), _landmarks(keys, num_landmarks)  # (B, H, m, D)
        inverse = _pseudo_inverse(_weights(q_landmarks, k_landmarks), pinv_iterations)  # (B, H, m, m)
        y = _weights(queries, k_landmarks) @ (inverse @ (_weights(q_landmarks, keys) @ values))
    else:
        y = _masked(queries, keys, values, num_landmarks, pinv_iterations, key_mask)
    if conv_weight is not None:
        padding = (conv_weight.shape[-2] // 2, 0)
        y = y + nn.functional.conv2d(values, conv_weight.to(values.dtype), padding=padding, groups=values.shape[1])
    return y.to(v.dtype)


def _masked(
    queries: Tensor, keys: Tensor, values: Tensor, num_landmarks: int, pinv_iterations: int, key_mask: Tensor
) -> Tensor:
    """Compute the attention over the tokens that count; where these are at most m, each is a landmark and its own value."""
    means = _segment_means(key_mask, num_landmarks, keys.dtype)  # (B, 1, m, N)
    q_landmarks = means @ queries.masked_fill(~key_mask[:, None, :, None], 0)  # (B, H, m, D)
    k_landmarks = means @ keys
    inverse = _pseudo_inverse(_weights(q_landmarks, k_landmarks), pinv_iterations)  # (B, H, m, m)
    summary = inverse @ (_weights(q_landmarks, keys, key_mask) @ values)  # (B, H, m, D)
    few = (key_mask.sum(dim=-1) <= num_landmarks)[:, None, None, None]  # (B, 1, 1, 1)
    used = means[:, 0].sum(dim=-1) > 0  # (B, m): all of them, unless there are few tokens
    return _weights(queries, k_landmarks, used) @ torch.where(few, means @ values, summary)


def _weights(q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) over the keys for which key_mask (B, number of keys) is true."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)


def _landmarks(x: Tensor, num_landmarks: int) -> Tensor:
    """Average m segments of neighbours: (B, H, N, D) -> (B, H, m, D)."""
    size, num_longer = divmod(x.shape[-2], num_landmarks)
    border = (num_landmarks - num_longer) * size
    landmarks = x[..., :border, :].unflatten(-2, (-1, size)).mean(dim=-2)
    if not num_longer:
        return landmarks
    return torch.cat([landmarks, x[..., border:, :].unflatten(-2, (-1, size + 1)).mean(dim=-2)], dim=-2)


def _segment_means(key_mask: Tensor, num_landmarks: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (B, 1, m, N) that averages as `_landmarks` does, over the tokens that count.

    With fewer tokens than landmarks, the first landmarks have none and are 0.
    """
    count = key_mask.sum(dim=-1, keepdim=True)  # (B, 1)
    place = key_mask.cumsum(dim=-1) - 1  # (B, N): 0, 1, ... among the tokens that count
    size, num_longer = count // num_landmarks, count % num_landmarks
    border = (num_landmarks - num_longer) * size
    longer = num_landmarks - num_longer + (place - border) // (size + 1)
    segment = torch.where(place < border, place // size.clamp(min=1), longer)  # (B, N)
    members = segment[:, None, :] == torch.arange(num_landmarks, device=segment.device)[:, None]  # (B, m, N)
    members = (members & key_mask[:, None, :]).to(dtype)
    return (members / members.sum(dim=-1, keepdim=True).clamp(min=1)).unsqueeze(1)


def _pseudo_inverse(A: Tensor, iterations: int) -> Tensor:
    """Approach the pseudo-inverse of matrices (B, H, m, m) whose rows sum to 1, each from a start of its own."""
    Z = A.mT / A.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)  # |A|_inf, the largest sum of a row, is 1
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * identity - AZ @ (15 * identity - AZ @ (7 * identity - AZ))) / 4
    return Z


torch.fx.wrap("nystrom_attention")  # looks at values and shapes that FX tracing does not know: a single node of a traced graph
