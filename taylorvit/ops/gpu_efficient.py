"""How the kernels of the efficient form are launched: block sizes, splits of the tokens, grids, and memory for results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import kernels, kernels_efficient
from .kernels import Launch, cdiv
from .operators import empty_like_tokens

TILE, FEATURES = 16, 256  # columns of a tile, products of a pair of tiles

MIN_PROGRAMS = 264  # two for each of 132 multiprocessors
MIN_SPLIT_TOKENS = 512
MAX_MOMENT_SPLITS = 32  # every program of `state` sums them

Sizes = dict[str, Any]


def _table() -> dict[tuple[str, int, int], Launch]:
    """Return the launch of every kernel by name, width and bits of the inputs' dtype.

    Chosen by registers, spills and instructions of the compiled code for compute capabilities 8.0 and 9.0; not yet measured.
    """
    table = {}
    for width in kernels.WIDTHS:
        wide, warps = width == 128, 8 if width >= 64 else 4
        tokens = {16: 64, 32: 64, 64: 32, 128: 16}[width]
        table["moments", width, 16] = Launch({"BLOCK_N": tokens, "ROWS": min(width, 64)}, warps, 2)
        table["moments", width, 32] = Launch({"BLOCK_N": 16, "ROWS": 32 if wide else width}, warps, 1)
        table["state", width, 16] = Launch({"BLOCK_N": 64, "LEFT": 16}, 8 if wide else 4, 3)
        table["state", width, 32] = Launch({"BLOCK_N": 32, "LEFT": 4 if wide else 8}, 8, 1)
        single = {"BLOCK_M": 32 if width >= 64 else 64, "LEFT": 2 if wide else 4, "STEP": 16}
        table["apply", width, 16] = Launch({"BLOCK_M": 128, "LEFT": 4 if wide else 16, "STEP": min(width, 32)}, 8, 2)
        table["apply_backward", width, 16] = Launch(
            {"BLOCK_M": 64 if wide else 128, "LEFT": 8 if width >= 64 else 16, "STEP": 32 if width == 32 else 16}, 8, 2
        )
        table["apply", width, 32] = table["apply_backward", width, 32] = Launch(single, 8, 1)
        for bits in (16, 32):
            table["reduce", width, bits] = Launch({"BLOCK_ROWS": 32 if width >= 64 else 64}, 8 if wide else 4, 1)
            table["expand", width, bits] = Launch({}, 8 if wide else 4, 1)
    return table


TABLE = _table()


def empty_results(q: Tensor, training: bool) -> tuple[Tensor, ...]:
    """Make room for y and what the backward pass needs.

    That is: deviations of y / scale from the mean value (B, H, N, D), row means of the weights (B, H, N) fp32, means of the
    keys' and values' moments (B, H, width + 5, width) fp32, and the state (B, H, rows, width); all of size 0 without training.
    """
    sizes = [(q.shape, q.dtype), (q.shape[:-1], torch.float32)] if training else [((0,), q.dtype), ((0,), torch.float32)]
    means, state = _empty_means(q, training)
    return empty_like_tokens(q), *(q.new_empty(shape, dtype=dtype) for shape, dtype in sizes), means, state


def forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, training: bool) -> tuple[Tensor, ...]:
    """Return y and what is saved, filled; q, k, v: (B, H, N, D) of one dtype and any strides, temperature: (H,) fp32."""
    results = empty_results(q, training)
    if not q.numel():
        return tuple(x.zero_() for x in results)  # without tokens, what is saved is 0
    y, deviations, row_means, means, state = results
    if not training:
        means, state = _empty_means(q, True)
    _collect(k, v, means, state)
    _apply(q, temperature, means, state, y, deviations, row_means, FORWARD=True, TRAINING=training)
    return results


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    deviations: Tensor,
    row_means: Tensor,
    means: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, (B, H, N, D) in their dtype, and of temperature, (H,) fp32."""
    dq, dk, dv = (empty_like_tokens(q) for _ in range(3))
    if not q.numel():
        return dq, dk, dv, torch.zeros_like(temperature)
    g, delta = torch.empty_like(deviations), torch.empty_like(row_means)
    query_means, query_state = _empty_means(q, True)
    _collect(q, grad, query_means, query_state, (row_means, deviations, means, g, delta))
    dtemperature = _apply_backward(q, g, delta, state, means, means, temperature, dq, KEYS=False)
    _apply_backward(k, v, delta, query_state, query_means, means, temperature, dk, KEYS=True)
    _apply(k, temperature, query_means, query_state, dv, deviations, row_means, FORWARD=False, TRAINING=False)
    return dq, dk, dv, dtemperature


def _empty_means(q: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
    """Make room for the means and the states that `_collect` writes."""
    heads, width = q.shape[:2], kernels.padded_width(q.shape[-1])
    rows = _pairs(q) * FEATURES + width
    means = q.new_empty((*heads, width + kernels_efficient.NUM_VECTORS.value, width) if needed else (0,), dtype=torch.float32)
    return means, q.new_empty((*heads, rows, width) if needed else (0,))


def _collect(x: Tensor, w: Tensor, means: Tensor, state: Tensor, backward: tuple[Tensor, ...] = ()) -> None:
    """Sum over the tokens: of keys and values, or of queries and the gradient of y, with what `backward` holds for that."""
    batch, num_heads, num_tokens, _ = x.shape
    heads, width, sizes = batch * num_heads, kernels.padded_width(x.shape[-1]), _sizes(x)
    launch, state_launch = _launch("moments", x), _launch("state", x)
    block = max(launch.blocks["BLOCK_N"], state_launch.blocks["BLOCK_N"])
    padded_tokens = cdiv(num_tokens, block) * block
    splits, split_tokens = _splits(num_tokens, heads, block, MAX_MOMENT_SPLITS)
    sums = x.new_empty(heads, splits, 2 * width + kernels_efficient.NUM_SUMS.value, width, dtype=torch.float32)
    residuals = x.new_empty(heads, sizes["TILES"] * TILE, padded_tokens)
    others = backward or (sums,) * 5  # not used
    kernels.launch(
        kernels_efficient.moments,
        (heads * splits * width // launch.blocks["ROWS"],),
        *(x, w, residuals, sums, *others, x.stride(), w.stride(), num_heads, num_tokens, splits, split_tokens, padded_tokens),
        config=launch,
        BACKWARD=bool(backward),
        **sizes,
    )
    w = backward[3] if backward else w
    blocks = _pairs(x) * TILE // state_launch.blocks["LEFT"]
    state_splits, split_tokens = _splits(num_tokens, heads * blocks, block)
    partials = x.new_empty(heads, state_splits, _pairs(x) * FEATURES, width, dtype=torch.float32)
    kernels.launch(
        kernels_efficient.state,
        (heads * state_splits * blocks,),
        *(residuals, w, sums, partials, w.stride(), num_heads, num_tokens, splits, state_splits, split_tokens, padded_tokens),
        config=state_launch,
        CENTRED=not backward,
        **sizes,
    )
    launch = _launch("reduce", x)
    kernels.launch(
        kernels_efficient.reduce,
        (heads * (_pairs(x) * FEATURES // launch.blocks["BLOCK_ROWS"] + 1),),
        *(partials, sums, state, means, num_tokens, state_splits, splits),
        config=launch,
        WIDTH=width,
        TILES=sizes["TILES"],
        SCALE=_scale(width),
        CENTRED=not backward,
    )


def _apply(
    x: Tensor,
    temperature: Tensor,
    means: Tensor,
    state: Tensor,
    y: Tensor,
    deviations: Tensor,
    row_means: Tensor,
    **options: bool,
) -> None:
    """Compute y from the queries, or dv from the keys."""
    batch, num_heads, num_tokens, head_dim = x.shape
    launch = _launch("apply", x)
    kernels.launch(
        kernels_efficient.apply,
        (batch * num_heads * cdiv(num_tokens, launch.blocks["BLOCK_M"]),),
        *(x, state, means, temperature, y, deviations, row_means, x.stride(), y.stride(), num_heads, num_tokens),
        math.sqrt(num_tokens / head_dim),
        config=launch,
        SCALE=_scale(kernels.padded_width(x.shape[-1])),
        **_sizes(x),
        **options,
    )


def _apply_backward(
    x: Tensor,
    w: Tensor,
    delta: Tensor,
    state: Tensor,
    means: Tensor,
    centres: Tensor,
    temperature: Tensor,
    dx: Tensor,
    KEYS: bool,
) -> Tensor:
    """Compute dq, or dk for KEYS, and return dtemperature (H,), for queries only."""
    batch, num_heads, num_tokens, head_dim = x.shape
    heads, width, sizes = batch * num_heads, kernels.padded_width(x.shape[-1]), _sizes(x)
    tiles = sizes["TILES"]
    expanded = x.new_empty(heads, tiles**2 * FEATURES, width)
    expand = _launch("expand", x)
    kernels.launch(kernels_efficient.expand, (heads * tiles**2,), state, expanded, config=expand, WIDTH=width, TILES=tiles)
    launch = _launch("apply_backward", x)
    blocks = cdiv(num_tokens, launch.blocks["BLOCK_M"])
    dtemperature = x.new_empty(batch, num_heads, blocks, dtype=torch.float32)
    kernels.launch(
        kernels_efficient.apply_backward,
        (heads * blocks,),
        *(x, w, delta, expanded, state, means, centres, temperature, dx, dtemperature),
        *(x.stride(), w.stride(), dx.stride(), num_heads, num_tokens, math.sqrt(num_tokens / head_dim)),
        config=launch,
        SCALE=_scale(width),
        KEYS=KEYS,
        **sizes,
    )
    return dtemperature.sum(dim=(0, 2))


def _splits(num_tokens: int, programs: int, block: int, most: int = 2**30) -> tuple[int, int]:
    """Return into how many parts the tokens are cut, and the tokens of one, so that there are MIN_PROGRAMS where N allows."""
    wanted = min(cdiv(MIN_PROGRAMS, programs), cdiv(num_tokens, MIN_SPLIT_TOKENS), most)
    split_tokens = cdiv(cdiv(num_tokens, wanted), block) * block
    return cdiv(num_tokens, split_tokens), split_tokens


def _launch(kernel: str, x: Tensor) -> Launch:
    return TABLE[kernel, kernels.padded_width(x.shape[-1]), 8 * x.element_size()]


def _sizes(x: Tensor) -> Sizes:
    """Return what a kernel is compiled for. TF32 would be too coarse for fp32 inputs; three products of it are not."""
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    return {
        "HEAD_DIM": x.shape[-1],
        "WIDTH": kernels.padded_width(x.shape[-1]),
        "TILES": cdiv(x.shape[-1], TILE),
        "PRECISION": precision,
    }


def _pairs(x: Tensor) -> int:
    tiles = cdiv(x.shape[-1], TILE)
    return tiles * (tiles + 1) // 2


def _scale(width: int) -> int:
    """Return what multiplies a state: its entries are about 1 / D, which is small for fp16; a power of two, which is exact."""
    return 4 * width
