"""Linformer: softmax attention to k learned mixtures of the keys and values instead of N of them (arXiv:2006.04768)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taylorvit.attention.multi_head import MultiHeadAttention, draw_uniform
from taylorvit.attention.option_checks import check_switch, check_whole_number
from taylorvit.ops import without_autocast
from taylorvit.ops.reference import widened


def check_options(*, k: int = 256, share_kv: bool = False) -> None:
    """Raise ValueError unless these are valid options of `Linformer`."""
    check_whole_number("k", k, 1)
    check_switch("share_kv", share_kv)


class Linformer(MultiHeadAttention):
    """Multi-head self-attention to k mixtures of the tokens: (B, N, C) -> (B, N, C), N at most num_tokens.

    About 8 N k D operations per head: less than softmax attention's 4 N^2 D where N > 2 k, more below. Its mixtures belong to
    places in the sequence: their parameters grow with num_tokens, the order of the tokens matters, and no keys can be left out,
    so it takes no mask. Fewer tokens than num_tokens use the first N rows of E and F, as in the Long Range Arena's code.

    E and F, `key_projection` and `value_projection` (num_tokens, k), are shared by the heads but not by the layers. They start
    uniform within 1 / sqrt(k), from a generator of their own, so that all else starts from the weights it would have anyway.

    Args:
        args, kwargs: as for `MultiHeadAttention`.
        num_tokens: the most tokens it will see, class and register tokens included; the models fill it in.
        k: mixtures. 256 in TaylorShift's comparison (arXiv:2403.02920), more than the 197 tokens of a 224 px image.
        share_kv: mix the values as the keys, F = E.

    Raises:
        ValueError: as for `MultiHeadAttention`, an option is not valid, or the input has more than num_tokens tokens.
    """

    takes_key_mask: ClassVar[bool] = False

    def __init__(self, *args: Any, num_tokens: int, k: int = 256, share_kv: bool = False, **kwargs: Any) -> None:
        check_options(k=k, share_kv=share_kv)
        check_whole_number("num_tokens", num_tokens, 1)
        super().__init__(*args, **kwargs)
        self.num_tokens = num_tokens
        self.k = k
        self.share_kv = share_kv
        self.key_projection = nn.Parameter(self.proj.weight.new_empty(num_tokens, k))
        self.value_projection = None if share_kv else nn.Parameter(self.proj.weight.new_empty(num_tokens, k))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw E and F; timm calls this after it has materialised a model made on `meta`."""
        projections = (self.key_projection, self.value_projection)
        draw_uniform([x for x in projections if x is not None], 1 / math.sqrt(self.k))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return linformer_attention(q, k, v, self.key_projection, self.value_projection)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        return f"num_heads={self.num_heads}, num_tokens={self.num_tokens}, k={self.k}, share_kv={self.share_kv}"


def linformer_attention(
    q: Tensor, k: Tensor, v: Tensor, key_projection: Tensor, value_projection: Tensor | None = None
) -> Tensor:
    """Compute Linformer's attention, in fp32 (fp64 for fp64 inputs), whatever autocast says.

        Y = softmax(Q (E^T K)^T / sqrt(D)) (F^T V)

    q, k, v: (B, H, N, D); key_projection E and value_projection F: (at least N, k), of which the first N rows are used; without
    F it is E. Returns (B, H, N, D) in the dtype of v.

    Raises:
        ValueError: there are more tokens than rows.
    """
    N, num_tokens = q.shape[-2], key_projection.shape[0]
    if num_tokens < N:
        raise ValueError(f"Linformer was built for num_tokens {num_tokens}: it takes at most that many tokens, got {N}")
    value_projection = key_projection if value_projection is None else value_projection
    return without_autocast(_attention, q, k, v, key_projection[:N], value_projection[:N])


def _attention(q: Tensor, k: Tensor, v: Tensor, key_projection: Tensor, value_projection: Tensor) -> Tensor:
    queries, keys, values, E, F = widened(q, k, v, key_projection, value_projection)
    keys, values = E.mT @ keys, F.mT @ values  # (B, H, k, D)
    scores = queries @ keys.mT / math.sqrt(q.shape[-1])  # (B, H, N, k)
    return (scores.softmax(dim=-1) @ values).to(v.dtype)


torch.fx.wrap("linformer_attention")  # looks at shapes that FX tracing does not know: a single node of a traced graph
