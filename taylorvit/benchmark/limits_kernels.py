"""Small Triton kernels that measure a GPU: reads from its second-level cache, its matrix units, the cost of a launch.

`limits_measure` launches them. Imported only where Triton is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def do_nothing(x):
    """Show what a launch costs."""


@triton.jit
def read_blocks(source, sums, num_blocks, num_steps, BLOCK: tl.constexpr):
    """Add up blocks of BLOCK fp32 numbers, so that all programs together read the source again and again.

    Program p adds the blocks p, p + P, p + 2 P, ..., modulo num_blocks, into sums[p] (BLOCK,). They pass by the first-level
    cache.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(num_steps):
        block = (program + step * tl.num_programs(0)) % num_blocks
        total += tl.load(source + block * BLOCK + columns, cache_modifier=".cg")
    tl.store(sums + program * BLOCK + columns, total)


@triton.jit
def multiply_features(tokens, state, out, num_steps, ROWS: tl.constexpr, WIDTH: tl.constexpr, STREAM: tl.constexpr):
    """Multiply the products of token vectors, held in registers, with a state: the inner loop of the efficient form's query.

    tokens (programs * ROWS, 32): the features of a row are the products of its first 16 numbers and its last 16. state
    (2, 256, WIDTH): block 0 is multiplied num_steps times; with STREAM both blocks in turn, each loaded anew. out
    (programs * ROWS, WIDTH) fp32 is the sum of the products.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    half, features, columns = tl.arange(0, 16), tl.arange(0, 256), tl.arange(0, WIDTH)
    left = tl.load(tokens + rows[:, None] * 32 + half[None, :])  # (ROWS, 16)
    right = tl.load(tokens + rows[:, None] * 32 + 16 + half[None, :])
    products = tl.reshape(left[:, :, None] * right[:, None, :], (ROWS, 256))
    block = state + features[:, None] * WIDTH + columns[None, :]  # (256, WIDTH)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    if STREAM:
        for step in range(num_steps):
            total = tl.dot(products, tl.load(block + (step % 2) * (256 * WIDTH)), total)
    else:
        held = tl.load(block)
        for _ in range(num_steps):
            total = tl.dot(products, held, total)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], total)
