"""Causal TaylorShift: token t attends to the tokens up to t. In parallel for training, as a recurrent network for generation.

    x_ti = tau cos(q_t, k_i)
    w(x) = a x^2 + b x + c
    y_t  = sqrt(t / D) sum_(i <= t) w(x_ti) v_i / sum_(i <= t) w(x_ti),     t = 1 ... N

**The factor is sqrt(t / D), t being the tokens seen so far.** sqrt(N / D) would tell every token how long the sequence is going
to be, and one token at a time N is not known. With t the last output is that of `reference.direct` over the same tokens.

**As a recurrent network.** w is a scalar product of features: with k^ of unit length and q^ = tau times unit length,

    phi(k) = [1, k^_a, k^_a k^_b]            a <= b: each product once, F = 1 + D + D (D + 1) / 2 features
    psi(q) = [c, b q^_a, a (2 - [a = b]) q^_a q^_b]          psi(q) . phi(k) = w(x)
    S_t    = S_(t-1) + phi(k_t) [1, v_t]^T,     z_t = psi(q_t) S_t,     y_t = sqrt(t / D) z_t[1:] / z_t[0]

which is the idea of "Transformers are RNNs" (arXiv:2006.16236) with other features. S has F (D + 1) numbers a head, whatever t
is. As w >= 1/2 the denominator z_t[0] is at least t / 2: no epsilon. S is fp32 (fp64 for fp64): plain sums, not running means,
as fp32 has the range for them.

**In parallel.** Chunks of tokens one after the other: the masked N x N definition inside the chunk, S for all chunks before it.
Nothing of size N x N exists. The backward pass keeps S once a chunk and computes the features again: memory N F (D + 1) / chunk
size a head, linear in N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .reference import A, B, C, taylor_weights, unit_vectors, widened
from .taylor_attention import apply_autocast, autocast_off, check_inputs, without_autocast

CHUNK_SIZE = 64


@dataclass(frozen=True)
class Kernel:
    """A weight of a query and a key that is a scalar product of features of each.

    Attributes:
        weights: of queries (..., M, D) and keys (..., N, D), (..., M, N).
        query_features: (..., D) -> (..., F).
        key_features: (..., D) -> (..., F).
    """

    weights: Callable[[Tensor, Tensor], Tensor]
    query_features: Callable[[Tensor], Tensor]
    key_features: Callable[[Tensor], Tensor]


@dataclass
class State:
    """All that later tokens need to know of the earlier ones.

    Attributes:
        sums: S, (B, H, F, D + 1) in fp32 (fp64 for fp64), column 0 that of the denominator.
        num_tokens: t.
    """

    sums: Tensor
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Size for the whole batch."""
        return self.sums.numel() * self.sums.element_size()


def num_features(head_dim: int) -> int:
    """Return F = 1 + D + D (D + 1) / 2."""
    return 1 + head_dim + head_dim * (head_dim + 1) // 2


def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the attention as the definition stands, in O(N^2 D) operations: the oracle of the others.

    q, k, v: (B, H, N, D) of one dtype; temperature: (H,). Returns (B, H, N, D) in the dtype of v.
    """
    w = taylor_weights(q, k, temperature).tril()  # (B, H, N, N)
    numerator = w @ v.to(w.dtype)  # (B, H, N, D)
    denominator = w.sum(dim=-1, keepdim=True)  # (B, H, N, 1)
    return (output_scale(w.shape[-1], v.shape[-1], w) * numerator / denominator).to(v.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Compute the attention in chunks, with gradients.

    Args:
        q: queries (B, H, N, D), fp16, bf16, fp32 or fp64.
        k: keys, with the shape, dtype and device of q.
        v: values, likewise.
        temperature: (H,), any of these dtypes.
        chunk_size: tokens a chunk; changes rounding, memory and time only.

    Returns:
        (B, H, N, D) in the dtype of q, under autocast in that of autocast; sums are fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or chunk_size is not a whole number above 0.
    """
    _check_chunk_size(chunk_size)
    q, k, v = apply_autocast(q, k, v)
    check_inputs(q, k, v, temperature)
    return without_autocast(functools.partial(_parallel, chunk_size=chunk_size), q, k, v, temperature)


@torch.no_grad()
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    state: State | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, State]:
    """Compute the attention of many tokens at once and the state after them, without gradients.

    Arguments as for `causal_attention`; state is that of the tokens before these, None if these are the first. It is left as it
    is. Returns the outputs (B, H, N, D) and the new state.

    Raises:
        ValueError: as `causal_attention`, or the state is one of other shapes.
    """
    _check_chunk_size(chunk_size)
    q, k, v = apply_autocast(q, k, v)
    check_inputs(q, k, v, temperature)
    seen = 0 if state is None else state.num_tokens
    if state is not None:
        _check_state(state, q)
    with autocast_off(q):
        queries, keys, values = _prepared(q, k, v, temperature)
        before = None if state is None else state.sums
        z, sums = chunked(POLYNOMIAL, queries, keys, values, before, chunk_size=chunk_size, wants_sums=True)
        assert sums is not None
        y = output_scale(q.shape[-2], q.shape[-1], z, seen=seen) * z[..., 1:] / z[..., :1]
    return y.to(v.dtype), State(sums, seen + q.shape[-2])


@torch.no_grad()
def step(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, state: State) -> Tensor:
    """Compute the attention of one more token and add it to the state, in place: O(F D) operations, whatever came before.

    q, k, v: (B, H, 1, D); temperature: (H,). Returns (B, H, 1, D) in the dtype of v. No gradients.

    Raises:
        ValueError: as `prefill`, or there is not exactly one token.
    """
    q, k, v = apply_autocast(q, k, v)
    check_inputs(q, k, v, temperature)
    _check_state(state, q)
    if q.shape[-2] != 1:
        raise ValueError(f"a step takes one token, (B, H, 1, D), got q {tuple(q.shape)}")
    with autocast_off(q):
        queries, keys, values = _prepared(q, k, v, temperature)
        state.num_tokens += 1
        z = advance(POLYNOMIAL, queries, keys, values, state.sums)  # (B, H, 1, D + 1)
        return (math.sqrt(state.num_tokens / q.shape[-1]) * z[..., 1:] / z[..., :1]).to(v.dtype)


def chunked(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    sums: Tensor | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
    wants_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the sums over i <= t of weight times value for every t, and over all keys of features times value.

    q, k: (B, H, N, D); values: (B, H, N, E); sums: (B, H, F, E) of earlier tokens. Returns (B, H, N, E), and (B, H, F, E) if
    wants_sums.
    """
    N = q.shape[-2]
    starts = range(0, max(N, 1), chunk_size)
    results = []
    for start in starts:
        tokens = slice(start, start + chunk_size)
        piece = (q[..., tokens, :], k[..., tokens, :], values[..., tokens, :])
        run = functools.partial(_chunk, kernel, wants_sums or start != starts[-1])
        if torch.is_grad_enabled():  # keeps the chunk's inputs only, and computes features and weights again
            result, sums = checkpoint(run, *piece, sums, use_reentrant=False, preserve_rng_state=False)
        else:
            result, sums = run(*piece, sums)
        results.append(result)
    return torch.cat(results, dim=-2), sums


def advance(kernel: Kernel, q: Tensor, k: Tensor, values: Tensor, sums: Tensor) -> Tensor:
    """Add one token to sums (B, H, F, E), in place, and return its query's sums (B, H, 1, E).

    q, k: (B, H, 1, D); values: (B, H, 1, E).
    """
    sums.addcmul_(kernel.key_features(k).mT, values)
    return kernel.query_features(q) @ sums


def with_ones(v: Tensor) -> Tensor:
    """Return V' = [1, V], (..., D + 1), for numerator and denominator in one product."""
    return torch.cat([torch.ones_like(v[..., :1]), v], dim=-1)


def output_scale(num_tokens: int, head_dim: int, like: Tensor, *, seen: int = 0) -> Tensor:
    """Return sqrt(t / D) for t = seen + 1 ... seen + N, (N, 1), with dtype and device of `like`."""
    t = torch.arange(seen + 1, seen + num_tokens + 1, dtype=like.dtype, device=like.device)
    return (t / head_dim).sqrt()[:, None]


def monomials(x: Tensor) -> Tensor:
    """Return phi: 1, the entries of x, and their products, each once, (..., D) -> (..., F).

    The products x_a x_(a + delta mod D) come by delta: delta = 0 are the squares, delta up to D // 2 holds every other pair
    once, but for delta = D / 2, which holds each twice and comes last, so that cutting off its second half leaves one.
    """
    D = x.shape[-1]
    rolled = torch.cat([x, x], dim=-1).unfold(-1, D, 1)[..., : D // 2 + 1, :]  # (..., D // 2 + 1, D): x_(a + delta)
    products = (x.unsqueeze(-2) * rolled).flatten(-2)[..., : D * (D + 1) // 2]
    return torch.cat([torch.ones_like(x[..., :1]), x, products], dim=-1)


def polynomial_features(q: Tensor) -> Tensor:
    """Return psi, (..., D) -> (..., F): the features whose scalar product with `monomials` of a key is w."""
    D = q.shape[-1]
    return monomials(q) * _coefficients(D, q.dtype, q.device)


def polynomial(q: Tensor, k: Tensor) -> Tensor:
    """Return w of all scalar products, (..., M, N), of q (..., M, D) and k (..., N, D)."""
    x = q @ k.mT
    return A * x.square() + B * x + C


POLYNOMIAL = Kernel(polynomial, polynomial_features, monomials)


def _coefficients(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    coefficients = torch.full((num_features(head_dim),), 2 * A, dtype=dtype, device=device)
    coefficients[0] = C
    coefficients[1 : 1 + head_dim] = B
    coefficients[1 + head_dim : 1 + 2 * head_dim] = A  # the squares
    return coefficients


def _chunk(
    kernel: Kernel, wants_sums: bool, q: Tensor, k: Tensor, values: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    result = kernel.weights(q, k).tril() @ values  # (B, H, M, M) @ (B, H, M, E)
    if sums is not None:
        result = result + kernel.query_features(q) @ sums  # (B, H, M, F) @ (B, H, F, E)
    if not wants_sums:
        return result, None
    own = kernel.key_features(k).mT @ values  # (B, H, F, M) @ (B, H, M, E)
    return result, own if sums is None else sums + own


def _prepared(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unit queries times the temperature, the unit keys, and V', in the dtype of the sums."""
    q, k, v, temperature = widened(q, k, v, temperature)
    return temperature[:, None, None] * unit_vectors(q), unit_vectors(k), with_ones(v)


def _parallel(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, chunk_size: int) -> Tensor:
    z, _ = chunked(POLYNOMIAL, *_prepared(q, k, v, temperature), chunk_size=chunk_size)
    return (output_scale(q.shape[-2], q.shape[-1], z) * z[..., 1:] / z[..., :1]).to(v.dtype)


def _check_chunk_size(chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number above 0, got {chunk_size!r}")


def _check_state(state: State, q: Tensor) -> None:
    batch, heads, _, D = q.shape
    wanted = (batch, heads, num_features(D), D + 1)
    if state.sums.shape != wanted:
        raise ValueError(f"the state's sums must be {wanted} for q {tuple(q.shape)}, got {tuple(state.sums.shape)}")
