"""Reformer: softmax attention within buckets of similar keys, found by hashing (LSH attention, arXiv:2001.04451)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylorvit.attention.multi_head import MultiHeadAttention
from taylorvit.attention.option_checks import check_whole_number
from taylorvit.ops import autocast_off
from taylorvit.ops.reference import unit_vectors, widened

# Scores far below all others, but finite, as a row may have no other: a token attends to itself only where it has no other key
# in reach, and to a key that is left out only where it has not even itself.
SELF_SCORE = -5e4
LEFT_OUT_SCORE = -1e9


def check_options(*, bucket_size: int = 64, num_hashes: int = 8, seed: int = 0) -> None:
    """Raise ValueError unless these are valid options of `Reformer`."""
    check_whole_number("bucket_size", bucket_size, 1)
    check_whole_number("num_hashes", num_hashes, 1)
    check_whole_number("seed", seed, 0)


class SharedQueryKey(nn.Linear):
    """The projection (..., C) -> (..., 3 C) to queries, keys and values whose queries and keys are the same numbers."""

    def __init__(self, dim: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__(dim, 2 * dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Project to what is query and key at once and to the value, and repeat the first."""
        shared, v = super().forward(x).chunk(2, dim=-1)
        return torch.cat([shared, shared, v], dim=-1)


class Reformer(MultiHeadAttention):
    """Multi-head self-attention with LSH attention: (B, N, C) -> (B, N, C).

    8 R N b D operations per head for R rounds and buckets of b tokens, and R N (N / b) D for hashing, which is quadratic in N:
    more than softmax attention's 4 N^2 D where N < 2 R b. Nothing in the parameters depends on N. With at most 2 b tokens every
    round is full attention, and one is computed.

    Queries and keys share one projection, as the paper's do: `qkv.weight` is (2 C, C), first the shared rows and then those of
    the values, so that checkpoints of other attentions do not load. `qk_norm` norms queries and keys apart.

    Training draws other hashes in every forward pass, from PyTorch's global generator. Evaluation takes those of `seed`, the
    same in all layers and heads.

    The paper's reversible layers and chunked MLP change a model's memory and not its function; they are not here.

    Args:
        args, kwargs: as for `MultiHeadAttention`.
        bucket_size: tokens b of a chunk; a token reaches its own chunk and the one before.
        num_hashes: rounds R of hashing, whose results are averaged.
        seed: of the hashes of evaluation.

    Raises:
        ValueError: as for `MultiHeadAttention`, or an option is not valid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *args: Any,
        bucket_size: int = 64,
        num_hashes: int = 8,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_options(bucket_size=bucket_size, num_hashes=num_hashes, seed=seed)
        super().__init__(dim, num_heads, qkv_bias, *args, **kwargs)
        self.bucket_size = bucket_size
        self.num_hashes = num_hashes
        self.seed = seed
        weight = self.proj.weight
        self.qkv = SharedQueryKey(dim, qkv_bias, weight.device, weight.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        seed = None if self.training else self.seed
        rotations = draw_rotations(k, self.bucket_size, self.num_hashes, seed)
        return lsh_attention(q, k, v, rotations, bucket_size=self.bucket_size, key_mask=key_mask)

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        options = f"bucket_size={self.bucket_size}, num_hashes={self.num_hashes}, seed={self.seed}"
        return f"num_heads={self.num_heads}, {options}"


def lsh_attention(
    q: Tensor, k: Tensor, v: Tensor, rotations: Tensor, *, bucket_size: int, key_mask: Tensor | None = None
) -> Tensor:
    """Attend within chunks of similar keys, in fp32 (fp64 for fp64 inputs), whatever autocast says.

    Each round r hashes token j to the bucket argmax [k_j R_r, -k_j R_r] of random rotations R_r, sorts the tokens by bucket,
    those of one bucket by position, and cuts them into chunks. With J_r(i) the tokens of i's chunk and of the chunk before, the
    last one for the first, and k^ = k / |k|:

        s_ij = q_i . k^_j / sqrt(D), -5e4 for j = i
        z_ri = log sum_{j in J_r(i)} exp(s_ij)
        y_i  = sum_r exp(z_ri) (sum_{j in J_r(i)} exp(s_ij - z_ri) v_j) / sum_r exp(z_ri)

    A token that several rounds find counts in each. Tokens that are left out, and those that fill the last chunk, come last and
    are seen by none.

    q, k, v: (B, H, N, D), in Reformer q = k; rotations: (R, D, buckets / 2); key_mask: (B, N), true for the keys that count.
    Returns (B, H, N, D) in the dtype of v.
    """
    with autocast_off(q):
        queries, keys, values, rotations = widened(q, k, v, rotations)
        B, H, N, D = q.shape
        chunks = -(-N // bucket_size)
        if chunks <= 2:  # all rounds are full attention
            rotations = rotations[:1]
        R = rotations.shape[0]
        keep = q.new_ones(B, N, dtype=torch.bool) if key_mask is None else key_mask
        padding = chunks * bucket_size - N
        queries, keys, values = (nn.functional.pad(x, (0, 0, 0, padding)) for x in (queries, unit_vectors(keys), values))
        keep = nn.functional.pad(keep, (0, padding))[:, None, None].expand(B, H, R, -1)  # (B, H, R, N')

        order = _buckets(keys, rotations).masked_fill(~keep, 2 * rotations.shape[-1]).argsort(dim=-1, stable=True)
        place = order.argsort(dim=-1)  # (B, H, R, N'): where a token has been sorted to
        queries, keys, values = (_sorted(x, order).unflatten(3, (chunks, -1)) for x in (queries, keys, values))
        token, keep = order.unflatten(3, (chunks, -1)), keep.gather(3, order).unflatten(3, (chunks, -1))  # (B, H, R, c, b)

        scores = queries @ _with_chunk_before(keys).mT * D**-0.5  # (B, H, R, c, b, 2 b)
        scores = scores.masked_fill(token.unsqueeze(-1) == _with_chunk_before(token).unsqueeze(-2), SELF_SCORE)
        scores = scores.masked_fill(~_with_chunk_before(keep).unsqueeze(-2), LEFT_OUT_SCORE)
        z = scores.logsumexp(dim=-1, keepdim=True)  # (B, H, R, c, b, 1)
        y = scores.softmax(dim=-1) @ _with_chunk_before(values)  # (B, H, R, c, b, D)

        y = _sorted(y.flatten(3, 4), place)  # (B, H, R, N', D), back in the order of the sequence
        z = _sorted(z.flatten(3, 4), place)  # (B, H, R, N', 1)
        return (z.softmax(dim=2) * y).sum(dim=2)[:, :, :N].to(v.dtype)


def draw_rotations(like: Tensor, bucket_size: int, num_hashes: int, seed: int | None) -> Tensor:
    """Draw the rotations of tokens (B, H, N, D): (num_hashes, D, buckets / 2) in fp32 (fp64 for fp64 tokens).

    There are about as many buckets as chunks, at least 2, an even number. With a seed the draw is a function of it and the
    shape; without, it comes from PyTorch's global generator.
    """
    N, D = like.shape[-2:]
    shape = [num_hashes, D, max(1, -(-N // (2 * bucket_size)))]
    dtype = torch.promote_types(like.dtype, torch.float32)
    if seed is None:
        return torch.randn(shape, device=like.device, dtype=dtype)
    return _seeded_normal(like.detach(), shape, seed).to(dtype)


@torch.library.custom_op("taylorvit::seeded_normal", mutates_args=())
def _seeded_normal(like: Tensor, shape: list[int], seed: int) -> Tensor:
    """Draw normal numbers on the CPU, the same for every device; an operator, as compiled graphs take no generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(like.device)


@_seeded_normal.register_fake
def _(like: Tensor, shape: list[int], seed: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _buckets(keys: Tensor, rotations: Tensor) -> Tensor:
    """Hash unit keys (B, H, N, D) to the numbers of their buckets (B, H, R, N)."""
    rotated = keys.detach().unsqueeze(2) @ rotations  # (B, H, R, N, buckets / 2)
    return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    """Bring tokens (B, H, N, D), or (B, H, R, N, D) of every round, into the order (B, H, R, N) of each round."""
    x = x.unsqueeze(2) if x.ndim == 4 else x
    return x.expand(-1, -1, order.shape[2], -1, -1).gather(3, order.unsqueeze(-1).expand(-1, -1, -1, -1, x.shape[-1]))


def _with_chunk_before(x: Tensor) -> Tensor:
    """Append to each chunk the one before in the round, if any: (B, H, R, c, b, ...) -> (B, H, R, c, 2 b, ...)."""
    return x if x.shape[3] == 1 else torch.cat([x, x.roll(1, dims=3)], dim=4)


# They look at values and shapes that FX tracing does not know: single nodes of a traced graph.
torch.fx.wrap("lsh_attention")
torch.fx.wrap("draw_rotations")
