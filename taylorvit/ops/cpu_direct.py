"""The sums of the direct form on CPU: tiles of queries by keys, small enough that a tile of scores stays in the cache.

x_ij = q_i . k_j and p(x) = x^2 / 2 + x, the polynomial without its constant, which the caller adds. q holds unit vectors times
the temperature, k unit vectors, v values with mean zero: (n, N, D) for n heads, contiguous, fp32 or fp64.

Short sequences are taken many heads at once, long ones head by head with several tiles of queries at once. Either way every
thread has a matrix product of its own and finds the tile in its own cache when it comes to the polynomial.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pieces import pieces
from .reference import A

TILE_QUERIES, TILE_KEYS = 256, 1024
MIN_QUERIES = 128  # fewer to a tile make slow matrix products
TILES_PER_THREAD = 2

Step = tuple[int | slice, slice]  # queries as `_lay_out` has them, and the heads whose keys they meet


def state_shape(head_dim: int) -> tuple[int, ...]:
    """Return (): this form keeps no state."""
    return ()


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_j p(x_ij) v_j, (n, N, D), and sum_j p(x_ij), (n, N, 1)."""
    num_heads, num_tokens, _ = q.shape
    queries = _lay_out(q)
    numerator, weight_sum = torch.empty_like(queries), queries.new_empty(*queries.shape[:-1], 1)
    storage = _tile_storage(queries, num_tokens)
    for step, heads in _steps(queries, num_heads):
        q_step, numerator_step, weight_sum_step = queries[step], numerator[step], weight_sum[step]
        for keys in pieces(num_tokens, TILE_KEYS):
            p = _tile(storage, q_step, keys)  # (tiles, rows, keys)
            torch.bmm(q_step, _for_tiles(k, heads, keys, q_step).mT, out=p)
            p.addcmul_(p, p, value=A)
            _product(p, _for_tiles(v, heads, keys, q_step), numerator_step, add=keys.start > 0)
            if keys.start == 0:
                torch.sum(p, dim=-1, keepdim=True, out=weight_sum_step)
            else:
                weight_sum_step.add_(p.sum(dim=-1, keepdim=True))
    return _by_head(numerator, num_heads)[:, :num_tokens], _by_head(weight_sum, num_heads)[:, :num_tokens]


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, (n, N, D) each.

    grad: gradient of the numerator (n, N, D); grad_sum: gradient of the sum of the p (n, N, 1). The constant of the polynomial
    is not in the gradient of v.
    """
    num_heads, num_tokens, _ = q.shape
    queries, grads, grad_sums = _lay_out(q), _lay_out(grad), _lay_out(grad_sum)
    dq, dk, dv = torch.empty_like(queries), torch.empty_like(k), torch.empty_like(v)
    x_storage, p_storage, dx_storage = (_tile_storage(queries, num_tokens) for _ in range(3))
    done = slice(0)
    for step, heads in _steps(queries, num_heads):
        q_step, g_step = queries[step], grads[step]
        same_heads, done = heads == done, heads
        for keys in pieces(num_tokens, TILE_KEYS):
            x, p, dx = (_tile(storage, q_step, keys) for storage in (x_storage, p_storage, dx_storage))
            k_tiles = _for_tiles(k, heads, keys, q_step)
            torch.bmm(q_step, k_tiles.mT, out=x)
            torch.addcmul(x, x, x, value=A, out=p)
            torch.bmm(g_step, _for_tiles(v, heads, keys, q_step).mT, out=dx).add_(grad_sums[step])  # dp
            dx.addcmul_(dx, x, value=2 * A)  # p'(x) = 1 + 2 A x
            _product(dx, k_tiles, dq[step], add=keys.start > 0)
            q_heads, g_heads, dx_heads, p_heads = (_by_head(y, heads.stop - heads.start) for y in (q_step, g_step, dx, p))
            _product(dx_heads.mT, q_heads, dk[heads, keys], add=same_heads)
            _product(p_heads.mT, g_heads, dv[heads, keys], add=same_heads)
    return _by_head(dq, num_heads)[:, :num_tokens], dk, dv


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)


def _lay_out(x: Tensor) -> Tensor:
    """Lay the queries (n, N, width) of long sequences out as (steps, tiles, rows, width); leave short ones as they are."""
    num_heads, num_tokens, width = x.shape
    tiles = TILES_PER_THREAD * torch.get_num_threads()
    if num_tokens < tiles * MIN_QUERIES:
        return x
    steps = -(-num_tokens // (tiles * TILE_QUERIES))
    rows = -(-num_tokens // (tiles * steps))
    missing = steps * tiles * rows - num_tokens
    if missing:  # zero queries, whose scores and gradients are zero
        x = pad(x, (0, 0, 0, missing))
    return x.view(num_heads * steps, tiles, rows, width)


def _steps(queries: Tensor, num_heads: int) -> Iterator[Step]:
    """Go through the queries: several tiles of one head at a time, or several heads."""
    if queries.ndim == 4:
        steps = len(queries) // num_heads
        for step in range(len(queries)):
            head = step // steps
            yield step, slice(head, head + 1)
    else:
        for heads in pieces(num_heads, _heads_at_once(queries.shape[1])):
            yield heads, heads


def _heads_at_once(num_tokens: int) -> int:
    scores = TILES_PER_THREAD * torch.get_num_threads() * TILE_QUERIES * TILE_KEYS
    return max(1, scores // (num_tokens * min(num_tokens, TILE_KEYS)))


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """Join the tiles of a head: (..., rows, width) -> (n, all rows, width)."""
    return x.view(num_heads, -1, x.shape[-1])


def _for_tiles(x: Tensor, heads: slice, keys: slice, q_step: Tensor) -> Tensor:
    """Take a tile of keys or values for each tile of queries, (tiles, keys, D); those of one head share it."""
    return x[heads, keys].expand(len(q_step), -1, -1)


def _tile_storage(queries: Tensor, num_tokens: int) -> Tensor:
    rows = queries.shape[-2]
    tiles = queries.shape[1] if queries.ndim == 4 else min(len(queries), _heads_at_once(num_tokens))
    return queries.new_empty(tiles * rows * min(num_tokens, TILE_KEYS))


def _tile(storage: Tensor, q_step: Tensor, keys: slice) -> Tensor:
    tiles, rows, width = *q_step.shape[:2], keys.stop - keys.start
    return storage[: tiles * rows * width].view(tiles, rows, width)
