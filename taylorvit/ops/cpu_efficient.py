"""The sums of the efficient form on CPU: circulant features of a chunk of tokens, one matrix product a chunk.

The features of x are the blocks x * roll(x, -delta) for delta = D - D // 2 ... D, each D wide: every product x_a x_b is there,
so (q . k)^2 = sum over features of coefficient * feature(q) * feature(k). They lie as (features, tokens): with x twice in
a row, every block is one contiguous piece of storage and all of them are one multiplication. x itself stands before them and
carries the linear term. The state has D columns and (D // 2 + 2) D rows, whatever N is.

q holds unit vectors times the temperature, k unit vectors, v values with mean zero: (n, N, D) for n heads, contiguous, fp32 or
fp64. The polynomial is p(x) = x^2 / 2 + x, without its constant, which the caller adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import pieces
from .reference import A

CHUNK_TOKENS = 256
FEATURES_PER_THREAD = 640_000  # numbers of one chunk's features, of all heads, that a thread should have in hand


def min_heads(head_dim: int) -> int:
    """Return the number of heads that keep all threads busy; a step takes as many."""
    return max(1, FEATURES_PER_THREAD * torch.get_num_threads() // (_num_rows(head_dim) * CHUNK_TOKENS))


def state_shape(head_dim: int) -> tuple[int, ...]:
    """Return the shape of the state that `forward` returns for each head."""
    return _num_rows(head_dim), head_dim


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum_j p(x_ij) v_j, (n, N, D), sum_j p(x_ij), (n, N, 1), and the state for `backward`, (n, rows, D)."""
    num_heads, num_tokens, head_dim = q.shape
    storage = _storage(q)
    state, numerator = q.new_zeros(num_heads, *state_shape(head_dim)), torch.empty_like(q)
    for heads in pieces(num_heads, min_heads(head_dim)):
        for chunk in pieces(num_tokens, CHUNK_TOKENS):
            _, features = _features(k[heads, chunk], storage)
            state[heads].baddbmm_(features, v[heads, chunk])
        state[heads].mul_(_coefficients(state))
        for chunk in pieces(num_tokens, CHUNK_TOKENS):
            _, features = _features(q[heads, chunk], storage)
            torch.bmm(features.mT, state[heads], out=numerator[heads, chunk])
    gram, key_sum = k.mT @ k, k.sum(dim=1, keepdim=True)
    weight_sum = torch.baddbmm(key_sum, q, gram, alpha=A).mul_(q).sum(dim=-1, keepdim=True)
    return numerator, weight_sum, state


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_sum: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, (n, N, D) each.

    grad: gradient of the numerator (n, N, D); grad_sum: gradient of the sum of the p (n, N, 1); state: from `forward`.
    The constant of the polynomial is not in the gradient of v.
    """
    num_heads, num_tokens, head_dim = q.shape
    # The sum of the p, through the Gram matrix.
    weighted = grad_sum * q
    dq = torch.baddbmm(k.sum(dim=1, keepdim=True), q, k.mT @ k, alpha=2 * A).mul_(grad_sum)
    dk = torch.baddbmm(weighted.sum(dim=1, keepdim=True), k, weighted.mT @ q, alpha=2 * A)
    dv = torch.empty_like(v)
    # The numerator, through the features and the state.
    storage, grad_storage = _storage(q), _storage(q)
    dstate = torch.zeros_like(state)
    for heads in pieces(num_heads, min_heads(head_dim)):
        for chunk in pieces(num_tokens, CHUNK_TOKENS):
            doubled, features = _features(q[heads, chunk], storage)
            g = grad[heads, chunk]
            dstate[heads].baddbmm_(features, g)
            dfeatures = torch.bmm(state[heads], g.mT, out=_view(grad_storage, features))
            dq[heads, chunk] += _fold(dfeatures, doubled).mT
        dstate[heads].mul_(_coefficients(dstate))
        for chunk in pieces(num_tokens, CHUNK_TOKENS):
            doubled, features = _features(k[heads, chunk], storage)
            torch.bmm(features.mT, dstate[heads], out=dv[heads, chunk])
            dfeatures = torch.bmm(dstate[heads], v[heads, chunk].mT, out=_view(grad_storage, features))
            dk[heads, chunk] += _fold(dfeatures, doubled).mT
    return dq, dk, dv


def _features(x: Tensor, storage: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (n, tokens, D) transposed and twice in a row, (n, 2 D, tokens), and its features, (n, rows, tokens)."""
    num_heads, tokens, head_dim = x.shape
    blocks, block = head_dim // 2 + 1, head_dim * tokens
    size = (blocks + 2) * block
    everything = storage[: num_heads * size].view(num_heads, -1, tokens)
    doubled = everything[:, : 2 * head_dim]
    doubled[:, :head_dim] = x.mT
    doubled[:, head_dim:] = doubled[:, :head_dim]
    first = (head_dim - head_dim // 2) * tokens  # delta = D - D // 2 ... D, the squares last: block delta starts at row delta
    rolled = storage.as_strided((num_heads, blocks, block), (size, tokens, 1), first)
    products = storage.as_strided((num_heads, blocks, block), (size, block, 1), 2 * block)
    torch.mul(rolled[:, -1:], rolled, out=products)
    return doubled, everything[:, head_dim:]


def _fold(dfeatures: Tensor, doubled: Tensor) -> Tensor:
    """Return the gradient of x, (n, D, tokens), from that of its features: d(x_a x_b) = x_b dx_a + x_a dx_b."""
    num_heads, _, tokens = doubled.shape
    head_dim = doubled.shape[1] // 2
    blocks = dfeatures.view(num_heads, -1, head_dim, tokens)
    dx = torch.zeros_like(doubled)
    first, x = dx[:, :head_dim], doubled[:, :head_dim]
    first.copy_(blocks[:, 0])  # the linear term
    for delta, block in enumerate(blocks.unbind(1)[1:], start=head_dim - head_dim // 2):
        rolled = slice(delta, delta + head_dim)
        first.addcmul_(block, doubled[:, rolled])
        dx[:, rolled].addcmul_(block, x)
    return first.add_(dx[:, head_dim:])


def _coefficients(state: Tensor) -> Tensor:
    """Return what multiplies the features: 1 for x; A, and for each product that stands for two, 2 A: (rows, 1)."""
    head_dim = state.shape[-1]
    coefficients = state.new_full((head_dim // 2 + 2, head_dim, 1), 2 * A)
    coefficients[0] = 1
    coefficients[-1] = A  # x_a x_a
    if head_dim % 2 == 0:
        coefficients[1] = A  # delta = D / 2 visits every pair twice
    return coefficients.view(-1, 1)


def _num_rows(head_dim: int) -> int:
    return (head_dim // 2 + 2) * head_dim


def _storage(x: Tensor) -> Tensor:
    num_heads, num_tokens, head_dim = x.shape
    heads, tokens = min(num_heads, min_heads(head_dim)), min(num_tokens, CHUNK_TOKENS)
    return x.new_empty(heads * (_num_rows(head_dim) + head_dim) * tokens)


def _view(storage: Tensor, like: Tensor) -> Tensor:
    return storage[: like.numel()].view(like.shape)
