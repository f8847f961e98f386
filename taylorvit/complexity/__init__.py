"""What the attention costs: operations and stored numbers of both forms, and the token counts where one overtakes the other.

The formulas are those of the TaylorShift paper (arXiv:2403.02920, section 4). They count one head with N tokens of head
dimension d, every multiplication and every addition as one operation, and the largest set of numbers alive at one time as
memory. With H heads a model of width C has d = C / H; the `*_mhsa` functions sum over the heads.

The efficient form of the paper stores all d^2 products x_a * x_b. As x_a x_b = x_b x_a, d(d + 1)/2 of them are enough; the
argument `packing` counts an implementation that uses this.

`python -m taylorvit.complexity` is a calculator: see `__main__`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Form = Literal["direct", "efficient"]
Packing = Literal["none", "symmetric", "circulant", "tiles"]

TILE = 16  # width of the tiles of matrix units


def quadratic_features(head_dim: int, packing: Packing = "none") -> int:
    """Count the products x_a * x_b that the efficient form holds per token.

    `none` holds all d^2, `symmetric` one of each pair, `circulant` the d // 2 + 1 blocks x * roll(x, delta): whole rows of
    d numbers, at the price of d/2 doubled products where d is even. `tiles` holds one of each pair of tiles of 16 numbers:
    whole blocks of 16 x 16 products, which is how the GPU kernels feed matrix units.

    Raises:
        ValueError: packing is unknown.
    """
    if packing == "none":
        return head_dim**2
    if packing == "symmetric":
        return head_dim * (head_dim + 1) // 2
    if packing == "circulant":
        return head_dim * (head_dim // 2 + 1)
    if packing == "tiles":
        tiles = -(-head_dim // TILE)
        return TILE**2 * tiles * (tiles + 1) // 2
    raise ValueError(f"packing must be one of {', '.join(get_args(Packing))}, got {packing!r}")


def num_features(head_dim: int, packing: Packing = "none") -> int:
    """Count all features of a token: quadratic, linear and the constant one."""
    return quadratic_features(head_dim, packing) + head_dim + 1


def ops_direct(num_tokens: int, head_dim: int) -> int:
    """Count the operations of the direct form for one head: 4 N^2 d + 6 N^2."""
    return 4 * num_tokens**2 * head_dim + 6 * num_tokens**2


def ops_efficient(num_tokens: int, head_dim: int, packing: Packing = "none") -> int:
    """Count the operations of the efficient form for one head: N (4 d^3 + 10 d^2 + 9 d + 4) without packing."""
    products = quadratic_features(head_dim, packing)
    quadratic = 4 * products * (head_dim + 1) + 2 * products  # two contractions with V' (d + 1 columns), two box products
    linear = 4 * head_dim * (head_dim + 1)
    rest = 5 * head_dim + 4  # the constant term, the sum of the three terms, the division
    return num_tokens * (quadratic + linear + rest)


def entries_direct(num_tokens: int, head_dim: int) -> int:
    """Count the numbers the direct form holds at once for one head: d N + 2 N^2."""
    return head_dim * num_tokens + 2 * num_tokens**2


def entries_efficient(num_tokens: int, head_dim: int, packing: Packing = "none") -> int:
    """Count the numbers the efficient form holds at once for one head: d^2 (d + 1) + 2 d N + (d + 1) N + d^2 N unpacked."""
    products = quadratic_features(head_dim, packing)
    state = products * (head_dim + 1)
    return state + 2 * head_dim * num_tokens + (head_dim + 1) * num_tokens + products * num_tokens


def flops_crossover(head_dim: int, packing: Packing = "none") -> float:
    """Return N0, the token count above which the efficient form takes fewer operations than the direct one."""
    return ops_efficient(1, head_dim, packing) / (4 * head_dim + 6)


def flops_crossover_bound(head_dim: int) -> float:
    """Return the paper's upper bound of N0 without packing: d^2 + d + 3/4."""
    return head_dim**2 + head_dim + 0.75


def memory_crossover(head_dim: int, packing: Packing = "none") -> float:
    """Return N1, the token count above which the efficient form holds fewer numbers than the direct one."""
    products = quadratic_features(head_dim, packing)
    # The positive root of 2 N^2 - (products + 2 d + 1) N - products (d + 1) = 0.
    linear = products + 2 * head_dim + 1
    return (linear + math.sqrt(linear**2 + 8 * products * (head_dim + 1))) / 4


def memory_crossover_bound(head_dim: int) -> float:
    """Return the paper's upper bound of N1 without packing: d^2/2 + 2 d + 1/2."""
    return head_dim**2 / 2 + 2 * head_dim + 0.5


def ops_mhsa(form: Form, num_tokens: int, embed_dim: int, num_heads: int, packing: Packing = "none") -> int:
    """Count the operations of one attention layer's core, all heads, forward only.

    Use it for model FLOP/s: one training step costs three times the forward pass by the usual convention. The projections
    around the core (qkv and output) are not in it.
    """
    head_dim = head_dimension(embed_dim, num_heads)
    if form == "direct":
        return num_heads * ops_direct(num_tokens, head_dim)
    return num_heads * ops_efficient(num_tokens, head_dim, packing)


def entries_mhsa(form: Form, num_tokens: int, embed_dim: int, num_heads: int, packing: Packing = "none") -> int:
    """Count the numbers one attention layer's core holds at once, all heads."""
    head_dim = head_dimension(embed_dim, num_heads)
    if form == "direct":
        return num_heads * entries_direct(num_tokens, head_dim)
    return num_heads * entries_efficient(num_tokens, head_dim, packing)


def head_dimension(embed_dim: int, num_heads: int) -> int:
    """Return d = C / H.

    Raises:
        ValueError: it is no whole number; the message names those that would do.
    """
    if num_heads < 1 or embed_dim % num_heads:
        divisors = [n for n in range(1, embed_dim + 1) if embed_dim % n == 0]
        raise ValueError(f"num_heads must divide the width {embed_dim}: one of {divisors}, got {num_heads}")
    return embed_dim // num_heads
