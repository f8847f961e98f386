"""The sums of the direct form on CPU: tiles of queries by keys, small enough that a tile of scores stays in the cache.

x_ij = q_i . k_j and p(x) = x^2 / 2 + x, the polynomial without its constant, which the caller adds. q holds unit vectors times
the temperature, k unit vectors, v values with mean zero: (n, N, D) for n heads, contiguous, fp32 or fp64.

Short sequences are taken many heads at once, long ones head by head in several tiles of queries at once. Either way every thread
has a matrix product of its own and finds the tile in its own cache when it comes to the polynomial.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pieces import pieces
from .reference import A

TILE_QUERIES, TILE_KEYS = 256, 1024
TILES_PER_THREAD = 2
MIN_QUERIES = 64  # smaller tiles make slow matrix products


def heads_at_once(num_tokens: int, head_dim: int) -> int:
    """Return how many heads one call should take: one for a long sequence, for a short one as many as fill the cache."""
    if num_tokens >= MIN_QUERIES * _tiles_at_once():
        return 1
    return max(1, _tiles_at_once() * TILE_QUERIES * TILE_KEYS // (num_tokens * min(num_tokens, TILE_KEYS)))


def state_shape(head_dim: int) -> tuple[int, ...]:
    """Return (): this form keeps no state."""
    return ()


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_j p(x_ij) v_j, (n, N, D), and sum_j p(x_ij), (n, N, 1)."""
    num_tokens = q.shape[1]
    queries = _steps(q)  # (steps, tiles, rows, D)
    numerator, weight_sum = torch.empty_like(queries), queries.new_empty(*queries.shape[:-1], 1)
    storage = _tile_storage(queries, num_tokens)
    for q_step, numerator_step, weight_sum_step in zip(queries, numerator, weight_sum, strict=True):
        for keys in pieces(num_tokens, TILE_KEYS):
            p = _tile(storage, q_step, keys)  # (tiles, rows, keys)
            torch.bmm(q_step, _for_tiles(k, keys, q_step).mT, out=p)
            p.addcmul_(p, p, value=A)
            values = _for_tiles(v, keys, q_step)
            if keys.start == 0:
                torch.bmm(p, values, out=numerator_step)
                torch.sum(p, dim=-1, keepdim=True, out=weight_sum_step)
            else:
                numerator_step.baddbmm_(p, values)
                weight_sum_step.add_(p.sum(dim=-1, keepdim=True))
    return _heads(numerator, q), _heads(weight_sum, q)


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, (n, N, D) each.

    grad: gradient of the numerator (n, N, D); grad_sum: gradient of the sum of the p (n, N, 1). The constant of the polynomial
    is not in the gradient of v.
    """
    num_heads, num_tokens, _ = q.shape
    queries, grads, grad_sums = _steps(q), _steps(grad), _steps(grad_sum)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(k), torch.zeros_like(v)
    x_storage, p_storage, dx_storage = (_tile_storage(queries, num_tokens) for _ in range(3))
    for q_step, g, g_sum, dq_step in zip(queries, grads, grad_sums, dq, strict=True):
        for keys in pieces(num_tokens, TILE_KEYS):
            x, p, dx = (_tile(storage, q_step, keys) for storage in (x_storage, p_storage, dx_storage))
            k_tiles = _for_tiles(k, keys, q_step)
            torch.bmm(q_step, k_tiles.mT, out=x)
            torch.addcmul(x, x, x, value=A, out=p)
            torch.bmm(g, _for_tiles(v, keys, q_step).mT, out=dx).add_(g_sum)  # dp
            dx.addcmul_(dx, x, value=2 * A)  # p'(x) = 1 + 2 A x
            dq_step.baddbmm_(dx, k_tiles)
            dk[:, keys].baddbmm_(_by_head(dx, num_heads).mT, _by_head(q_step, num_heads))
            dv[:, keys].baddbmm_(_by_head(p, num_heads).mT, _by_head(g, num_heads))
    return _heads(dq, q), dk, dv


def _tiles_at_once() -> int:
    return TILES_PER_THREAD * torch.get_num_threads()


def _steps(x: Tensor) -> Tensor:
    """Lay the queries (n, N, D) out as (steps, tiles, rows, D): one head is cut into tiles, of several each one is a tile."""
    num_heads, num_tokens, width = x.shape
    tiles = _tiles_at_once()
    if num_heads > 1 or num_tokens < MIN_QUERIES * tiles:
        return x.unsqueeze(0)
    steps = -(-num_tokens // (tiles * TILE_QUERIES))
    rows = -(-num_tokens // (tiles * steps))
    missing = steps * tiles * rows - num_tokens
    if missing:  # zero queries: their scores and their gradients are zero
        x = pad(x, (0, 0, 0, missing))
    return x.view(steps, tiles, rows, width)


def _heads(steps: Tensor, like: Tensor) -> Tensor:
    """Undo `_steps`."""
    num_heads, num_tokens, _ = like.shape
    return steps.view(num_heads, -1, steps.shape[-1])[:, :num_tokens]


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """Join the tiles of one head, whose gradients meet in the same keys: (tiles, rows, width) -> (n, all rows, width)."""
    return x.reshape(num_heads, -1, x.shape[-1])


def _for_tiles(x: Tensor, keys: slice, q_step: Tensor) -> Tensor:
    """Take a tile of keys or values, (tiles, keys, D): all the tiles of one head share it."""
    return x[:, keys].expand(len(q_step), -1, -1)


def _tile_storage(queries: Tensor, num_tokens: int) -> Tensor:
    tiles, rows = queries.shape[1:3]
    return queries.new_empty(tiles * rows * min(num_tokens, TILE_KEYS))


def _tile(storage: Tensor, q_step: Tensor, keys: slice) -> Tensor:
    tiles, rows, width = *q_step.shape[:2], keys.stop - keys.start
    return storage[: tiles * rows * width].view(tiles, rows, width)
