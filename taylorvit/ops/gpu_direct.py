"""How the kernels of the direct form are launched on a GPU: block sizes, grids, and the memory for results.

Short sequences take one launch forward. Longer ones take two: unit keys and the sum of the values are prepared once, instead
of by every block of queries. Mathematics: `kernels_direct`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import kernels, kernels_direct
from .kernels import Launch, cdiv
from .operators import empty_like_tokens

Arguments = tuple[Tensor | int | float, ...]

MAX_FUSED_TOKENS = 512  # longer sequences prepare their keys in a launch of its own


def _blocks(num_warps: int, num_stages: int, **blocks: int) -> Launch:
    return Launch({f"BLOCK_{name}": size for name, size in blocks.items()}, num_warps, num_stages)


# How a kernel is launched, by its name here, the padded head dimension, and the bits of a number. Chosen by instruction counts
# and register use of the compiled code (no entry spills), not yet measured.
TABLE: dict[tuple[str, int, int], Launch] = {
    ("prepare_keys", 16, 16): _blocks(4, 1, N=128),
    ("prepare_keys", 32, 16): _blocks(4, 1, N=128),
    ("prepare_keys", 64, 16): _blocks(4, 1, N=64),
    ("prepare_keys", 128, 16): _blocks(4, 1, N=32),
    ("prepare_keys", 16, 32): _blocks(4, 1, N=128),
    ("prepare_keys", 32, 32): _blocks(4, 1, N=64),
    ("prepare_keys", 64, 32): _blocks(4, 1, N=32),
    ("prepare_keys", 128, 32): _blocks(4, 1, N=16),
    ("forward_short", 16, 16): _blocks(4, 2, M=128, N=32),
    ("forward_short", 32, 16): _blocks(4, 2, M=128, N=32),
    ("forward_short", 64, 16): _blocks(8, 2, M=128, N=32),
    ("forward_short", 128, 16): _blocks(8, 2, M=128, N=32),
    ("forward_short", 16, 32): _blocks(4, 2, M=64, N=32),
    ("forward_short", 32, 32): _blocks(4, 2, M=64, N=16),
    ("forward_short", 64, 32): _blocks(4, 1, M=64, N=16),
    ("forward_short", 128, 32): _blocks(4, 2, M=16, N=16),
    ("forward", 16, 16): _blocks(4, 3, M=128, N=64),
    ("forward", 32, 16): _blocks(4, 3, M=128, N=64),
    ("forward", 64, 16): _blocks(8, 2, M=128, N=128),
    ("forward", 128, 16): _blocks(4, 2, M=64, N=64),
    ("forward", 16, 32): _blocks(4, 2, M=64, N=32),
    ("forward", 32, 32): _blocks(4, 2, M=64, N=32),
    ("forward", 64, 32): _blocks(4, 2, M=64, N=16),
    ("forward", 128, 32): _blocks(8, 1, M=32, N=32),
    ("prepare_backward", 16, 16): _blocks(4, 1, M=128),
    ("prepare_backward", 32, 16): _blocks(4, 1, M=128),
    ("prepare_backward", 64, 16): _blocks(4, 1, M=64),
    ("prepare_backward", 128, 16): _blocks(4, 1, M=32),
    ("prepare_backward", 16, 32): _blocks(4, 1, M=128),
    ("prepare_backward", 32, 32): _blocks(4, 1, M=64),
    ("prepare_backward", 64, 32): _blocks(4, 1, M=32),
    ("prepare_backward", 128, 32): _blocks(4, 1, M=16),
    ("backward_queries", 16, 16): _blocks(4, 2, M=128, N=64),
    ("backward_queries", 32, 16): _blocks(4, 2, M=128, N=32),
    ("backward_queries", 64, 16): _blocks(8, 2, M=128, N=64),
    ("backward_queries", 128, 16): _blocks(8, 2, M=64, N=64),
    ("backward_queries", 16, 32): _blocks(4, 2, M=64, N=32),
    ("backward_queries", 32, 32): _blocks(4, 2, M=64, N=16),
    ("backward_queries", 64, 32): _blocks(4, 2, M=16, N=16),
    ("backward_queries", 128, 32): _blocks(8, 1, M=16, N=32),
    ("backward_keys", 16, 16): _blocks(4, 2, M=32, N=128),
    ("backward_keys", 32, 16): _blocks(8, 2, M=64, N=128),
    ("backward_keys", 64, 16): _blocks(8, 2, M=64, N=128),
    ("backward_keys", 128, 16): _blocks(8, 2, M=16, N=128),
    ("backward_keys", 16, 32): _blocks(4, 2, M=32, N=64),
    ("backward_keys", 32, 32): _blocks(4, 2, M=16, N=64),
    ("backward_keys", 64, 32): _blocks(8, 2, M=32, N=32),
    ("backward_keys", 128, 32): _blocks(4, 2, M=16, N=16),
}


def empty_results(q: Tensor, training: bool) -> tuple[Tensor, ...]:
    """Make room for y and what the backward pass needs: deviations, row means of the weights, and the mean of the values."""
    batch, num_heads, num_tokens, head_dim = q.shape
    saved = [
        ((batch, num_heads, num_tokens, head_dim), q.dtype),
        ((batch, num_heads, num_tokens), torch.float32),
        ((batch, num_heads, head_dim), torch.float32),
    ]
    return empty_like_tokens(q), *(q.new_empty(shape if training else 0, dtype=dtype) for shape, dtype in saved)


def forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool) -> tuple[Tensor, ...]:
    """Return `empty_results`, filled. q, k, v: (B, H, N, D) of one dtype, any strides; temperature: (H,) fp32, contiguous."""
    results = empty_results(q, training)
    num_heads, num_tokens, head_dim = q.shape[1:]
    if not q.numel():
        return tuple(x.zero_() for x in results)  # without tokens, what is saved is 0
    is_short = num_tokens <= MAX_FUSED_TOKENS
    # Kernels take no None: for a short sequence what is prepared is any tensor, and not read.
    key_factors, value_sums, num_parts = (temperature, temperature, 0) if is_short else _prepare_keys(k, v)
    launch = _launch("forward_short" if is_short else "forward", q)
    tensors = (q, k, v, temperature, key_factors, value_sums, *results)
    strides = (*q.stride(), *k.stride(), *v.stride())
    numbers = (num_heads, num_tokens, num_parts, math.sqrt(num_tokens / head_dim))
    constants = {"TRAINING": training, "PREPARED": not is_short, **_sizes(q)}
    kernels.launch(
        kernels_direct.forward, _grid(q, launch, "BLOCK_M"), *tensors, *strides, *numbers, config=launch, **constants
    )
    return results


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each like y, and of temperature (H,) fp32, from grad, that of y, of any strides.

    saved: what `forward` returned for training but y.
    """
    dq, dk, dv = (empty_like_tokens(q) for _ in range(3))
    batch, num_heads, num_tokens, head_dim = q.shape
    if not q.numel():
        return dq, dk, dv, torch.zeros_like(temperature)
    queries, keys, g, rows, centres, g_sums, key_sums = _prepare_backward(grad, q, k, temperature, *saved)
    num_parts, factor = g_sums.shape[1], math.sqrt(num_tokens / head_dim) / num_tokens

    launch = _launch("backward_queries", q)
    grid = _grid(q, launch, "BLOCK_M")
    dtemperature = q.new_empty(grid, dtype=torch.float32)
    tensors: tuple[Tensor, ...] = (grad, q, k, v, temperature, saved[1], keys, rows, centres, key_sums, dq, dtemperature)
    strides: tuple[int, ...] = (*grad.stride(), *q.stride(), *k.stride(), *v.stride())
    numbers = (num_heads, num_tokens, num_parts, factor)
    kernels.launch(kernels_direct.backward_queries, grid, *tensors, *strides, *numbers, config=launch, **_sizes(q))

    launch = _launch("backward_keys", q)
    tensors = (k, v, temperature, queries, g, rows, g_sums, dk, dv)
    strides, grid = (*k.stride(), *v.stride()), _grid(q, launch, "BLOCK_N")
    kernels.launch(kernels_direct.backward_keys, grid, *tensors, *strides, *numbers, config=launch, **_sizes(q))
    return dq, dk, dv, dtemperature.view(batch, num_heads, -1).sum(dim=(0, 2))


def _prepare_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return 1 / |k| (B H, N), the sum of the values in parts (B H, parts, WIDTH), both fp32, and how many parts."""
    batch, num_heads, num_tokens, _ = k.shape
    sizes, launch = _sizes(k), _launch("prepare_keys", k)
    grid = _grid(k, launch, "BLOCK_N")
    key_factors = k.new_empty(batch * num_heads, num_tokens, dtype=torch.float32)
    value_sums = k.new_empty(*grid, sizes["WIDTH"], dtype=torch.float32)
    arguments: Arguments = (k, v, key_factors, value_sums, *k.stride(), *v.stride(), num_heads, num_tokens)
    kernels.launch(kernels_direct.prepare_keys, grid, *arguments, config=launch, **sizes)
    return key_factors, value_sums, grid[1]


def _prepare_backward(grad: Tensor, q: Tensor, k: Tensor, temperature: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """Return scaled q, centred k^, g (B H, N, WIDTH), and in fp32 the numbers of a token (B H, 5, N), the centres of k^
    (B H, WIDTH), and the sums of g and k^ in parts (B H, parts, WIDTH).
    """
    batch, num_heads, num_tokens, _ = q.shape
    sizes, launch = _sizes(q), _launch("prepare_backward", q)
    grid = _grid(q, launch, "BLOCK_M")
    heads, width = batch * num_heads, sizes["WIDTH"]
    prepared = [q.new_empty(heads, num_tokens, width) for _ in range(3)]
    shapes = [(heads, kernels_direct.NUM_ROWS.value, num_tokens), (heads, width), (*grid, width), (*grid, width)]
    prepared += [q.new_empty(shape, dtype=torch.float32) for shape in shapes]
    tensors = (grad, q, k, temperature, *saved, *prepared)
    strides = (*grad.stride(), *q.stride(), *k.stride())
    kernels.launch(kernels_direct.prepare_backward, grid, *tensors, *strides, num_heads, num_tokens, config=launch, **sizes)
    return tuple(prepared)


def _grid(q: Tensor, launch: Launch, block: str) -> tuple[int, int]:
    """One program a head and block of tokens. Heads go first: programs that run at a time then read different keys."""
    batch, num_heads, num_tokens, _ = q.shape
    return batch * num_heads, cdiv(num_tokens, launch.blocks[block])


def _sizes(q: Tensor) -> dict[str, int]:
    return {"HEAD_DIM": q.shape[-1], "WIDTH": kernels.padded_width(q.shape[-1])}


def _launch(name: str, q: Tensor) -> Launch:
    return TABLE[name, kernels.padded_width(q.shape[-1]), 8 * q.element_size()]
