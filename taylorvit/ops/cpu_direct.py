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

TILE_QUERIES, TILE_KEYS = 512, 1024  # a thread has one such tile at a time
MIN_QUERIES = 64  # fewer to a tile make slow matrix products


def min_heads(head_dim: int) -> int:
    """Return the number of heads that keep all threads busy: one, as its queries can be shared out."""
    return 1


def state_shape(head_dim: int) -> tuple[int, ...]:
    """Return (): this form keeps no state."""
    return ()


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_j p(x_ij) v_j, (n, N, D), and sum_j p(x_ij), (n, N, 1)."""
    num_heads, num_tokens, _ = q.shape
    queries = _lay_out(q)  # (steps, tiles, rows, D)
    numerator, weight_sum = torch.empty_like(queries), queries.new_empty(*queries.shape[:-1], 1)
    storage = _tile_storage(queries, num_heads, num_tokens)
    for steps, heads in _steps(queries, num_heads, num_tokens):
        q_tiles, numerator_tiles, weight_sum_tiles = (x[steps].flatten(0, 1) for x in (queries, numerator, weight_sum))
        for keys in pieces(num_tokens, TILE_KEYS):
            p = _tiles(storage, q_tiles, keys)  # (tiles, rows, keys)
            torch.bmm(q_tiles, _for_tiles(k[heads, keys], q_tiles).mT, out=p)
            p.addcmul_(p, p, value=A)
            _product(p, _for_tiles(v[heads, keys], q_tiles), numerator_tiles, add=keys.start > 0)
            if keys.start == 0:
                torch.sum(p, dim=-1, keepdim=True, out=weight_sum_tiles)
            else:
                weight_sum_tiles.add_(p.sum(dim=-1, keepdim=True))
    return _by_head(numerator, num_heads)[:, :num_tokens], _by_head(weight_sum, num_heads)[:, :num_tokens]


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, (n, N, D) each.

    grad: gradient of the numerator (n, N, D); grad_sum: gradient of the sum of the p (n, N, 1). The constant of the polynomial
    is not in the gradient of v.
    """
    num_heads, num_tokens, _ = q.shape
    queries, grads, grad_sums = _lay_out(q), _lay_out(grad), _lay_out(grad_sum)
    dq, dk, dv = torch.empty_like(queries), torch.empty_like(k), torch.empty_like(v)
    storages = [_tile_storage(queries, num_heads, num_tokens) for _ in range(3)]
    done = slice(0)
    for steps, heads in _steps(queries, num_heads, num_tokens):
        q_tiles, g_tiles, g_sum_tiles, dq_tiles = (x[steps].flatten(0, 1) for x in (queries, grads, grad_sums, dq))
        q_heads, g_heads = (_by_head(x, heads.stop - heads.start) for x in (q_tiles, g_tiles))
        same_heads, done = heads == done, heads
        for keys in pieces(num_tokens, TILE_KEYS):
            x, p, dx = (_tiles(storage, q_tiles, keys) for storage in storages)
            k_tiles = _for_tiles(k[heads, keys], q_tiles)
            torch.bmm(q_tiles, k_tiles.mT, out=x)
            torch.addcmul(x, x, x, value=A, out=p)
            torch.bmm(g_tiles, _for_tiles(v[heads, keys], q_tiles).mT, out=dx).add_(g_sum_tiles)  # dp
            dx.addcmul_(dx, x, value=2 * A)  # p'(x) = 1 + 2 A x
            _product(dx, k_tiles, dq_tiles, add=keys.start > 0)
            _product(_by_head(dx, len(q_heads)).mT, q_heads, dk[heads, keys], add=same_heads)
            _product(_by_head(p, len(q_heads)).mT, g_heads, dv[heads, keys], add=same_heads)
    return _by_head(dq, num_heads)[:, :num_tokens], dk, dv


def _lay_out(x: Tensor) -> Tensor:
    """Lay the queries (n, N, width) out as (steps, tiles, rows, width), filled up with zeros; the steps go head by head."""
    num_heads, num_tokens, width = x.shape
    tiles = _num_tiles(num_heads, num_tokens)
    steps = -(-num_tokens // (tiles * TILE_QUERIES)) if _is_long(num_tokens) else 1
    rows = -(-num_tokens // (tiles * steps))
    missing = steps * tiles * rows - num_tokens
    if missing:  # zero queries, whose scores and gradients are zero
        x = pad(x, (0, 0, 0, missing))
    return x.view(num_heads * steps, tiles, rows, width)


def _is_long(num_tokens: int) -> bool:
    """Whether one head alone gives all threads enough to do."""
    return num_tokens >= 4 * MIN_QUERIES * torch.get_num_threads()


def _num_tiles(num_heads: int, num_tokens: int) -> int:
    """Return the tiles of queries a step takes of a head: for a short sequence only so many as even out the threads' load."""
    threads = torch.get_num_threads()
    if _is_long(num_tokens):
        return threads
    even = num_heads % threads == 0 or num_heads >= 4 * threads
    return 1 if even else max(1, min(threads, num_tokens // (2 * MIN_QUERIES)))


def _heads_at_once(num_tokens: int) -> int:
    if _is_long(num_tokens):
        return 1
    scores = torch.get_num_threads() * TILE_QUERIES * TILE_KEYS
    return max(1, scores // (num_tokens * min(num_tokens, TILE_KEYS)))


def _steps(queries: Tensor, num_heads: int, num_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Go through the queries as `_lay_out` has them: which of them, and which heads they belong to."""
    steps = len(queries) // num_heads
    if steps == 1:
        for heads in pieces(num_heads, _heads_at_once(num_tokens)):
            yield heads, heads
    else:
        for step in range(len(queries)):
            head = step // steps
            yield slice(step, step + 1), slice(head, head + 1)


def _for_tiles(x: Tensor, q_tiles: Tensor) -> Tensor:
    """Give every tile of queries the keys or values of its head: (heads, keys, D) -> (tiles, keys, D), a view if it can be."""
    tiles = len(q_tiles) // len(x)
    return x if tiles == 1 else x.unsqueeze(1).expand(-1, tiles, -1, -1).reshape(len(q_tiles), *x.shape[1:])


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """Join the tiles of a head: (..., rows, width) -> (n, all rows, width)."""
    return x.view(num_heads, -1, x.shape[-1])


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)


def _tile_storage(queries: Tensor, num_heads: int, num_tokens: int) -> Tensor:
    _, tiles, rows, _ = queries.shape
    heads = min(num_heads, _heads_at_once(num_tokens))
    return queries.new_empty(heads * tiles * rows * min(num_tokens, TILE_KEYS))


def _tiles(storage: Tensor, q_tiles: Tensor, keys: slice) -> Tensor:
    tiles, rows, width = *q_tiles.shape[:2], keys.stop - keys.start
    return storage[: tiles * rows * width].view(tiles, rows, width)
