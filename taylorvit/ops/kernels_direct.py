"""The Triton kernels of the direct form: tiles of queries by keys whose scores never leave the registers.

For one head with unit vectors q^ and k^, let s = max(|tau|, 1), sigma = 2 a tau / b and x_ij = sigma q^_i . k^_j. Then

    w_ij / s^2 = p_ij + c / s^2,     p = x (alpha + beta x),     alpha = b^2 / (2 a s^2),  beta = alpha / 2
    d w_ij / d cos_ij = b tau (1 + x_ij)

so one multiply-add and one product make a weight, and one multiply-add its derivative times a gradient. There is no maximum, no
exponential and no rescaling. p(0) = 0: rows beyond the last token are zeros and need no mask. The constant c / s^2 is left out
of the matrix product and added from the mean of the values in fp32, so that p alone is rounded to the dtype of the inputs.
sigma q^ is rounded to it too: with fp16, a temperature beyond 65504 gives NaN.

With z_i = c / s^2 + mean_j p_ij and vbar the mean of the values,

    y_i = sqrt(N / D) (vbar + d_i),     d_i = (mean_j p_ij v_j - (z_i - c / s^2) vbar) / z_i

Backward, with g_i = dy_i / (s z_i), delta_i = g_i . (vbar + d_i) and t_ij = g_i . v_j - delta_i:

    dq^_i = tau f sum_j t_ij (1 + x_ij) k^_j         dk^_j = tau f sum_i t_ij (1 + x_ij) q^_i         f = sqrt(N / D) b / (N s)
    dtau  = f sum_i q^_i . (sum_j t_ij (1 + x_ij) k^_j)      dv_j = s sqrt(N / D) / N (sum_i p_ij g_i + c / s^2 sum_i g_i)

No kernel uses atomics, and none transposes an accumulator: dk and dv come from the transposed scores k^ . q^, computed as such.
Tensors of tokens that a caller passes come with their strides; those that the kernels make are contiguous, (B H, N, WIDTH),
with zeros from HEAD_DIM to WIDTH, the next power of two. Derivation: README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference
from .kernels import bounded_temperature, lengths, unit_gradient

B, C = tl.constexpr(reference.B), tl.constexpr(reference.C)
SIGMA = tl.constexpr(2 * reference.A / reference.B)  # sigma / tau
ALPHA = tl.constexpr(reference.B**2 / (2 * reference.A))  # alpha s^2


@triton.jit
def product(a, b, accumulator=None):
    """Return a @ b, plus the accumulator, in fp32. Products of fp32 numbers are made of three of tf32 each."""
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def load_tokens(head, n_stride, d_stride, start, num_tokens, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Return tokens `start` and following of a head, (ROWS, WIDTH), with zeros for what is not there."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = rows < num_tokens - start
    if HEAD_DIM < WIDTH:
        inside = inside & (columns < HEAD_DIM)
    first = head + tl.cast(start, tl.int64) * n_stride
    return tl.load(first + rows * n_stride + columns * d_stride, mask=inside, other=0.0)


@triton.jit
def store_tokens(head, n_stride, start, num_tokens, x, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Write x (ROWS, WIDTH) to tokens `start` and following of a head, as far as there are any."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = rows < num_tokens - start
    if HEAD_DIM < WIDTH:
        inside = inside & (columns < HEAD_DIM)
    first = head + tl.cast(start, tl.int64) * n_stride
    tl.store(first + rows * n_stride + columns, x.to(head.dtype.element_ty), mask=inside)


@triton.jit
def unit_tokens(x):
    """Return the unit vectors of the rows of x in fp32, and their lengths."""
    x = x.to(tl.float32)
    length = lengths(x)
    return x * (1 / length)[:, None], length


@triton.jit
def sum_of_parts(parts, num_parts, WIDTH: tl.constexpr):
    """Add up parts (num_parts, WIDTH) fp32, always in the same order: (WIDTH,)."""
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([16, WIDTH], tl.float32)
    for start in range(0, num_parts, 16):
        rows = start + tl.arange(0, 16)
        total += tl.load(parts + rows[:, None] * WIDTH + columns[None, :], mask=(rows < num_parts)[:, None], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_keys(
    k, v, units, value_sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the unit keys of a block of tokens in the dtype of k, and the sum of its values: (B H, blocks, WIDTH) fp32."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, start = head // num_heads, block * BLOCK_N
    keys = load_tokens(k + batch * k_b + head % num_heads * k_h, k_n, k_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    values = load_tokens(v + batch * v_b + head % num_heads * v_h, v_n, v_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    store_tokens(units + head * num_tokens * WIDTH, WIDTH, start, num_tokens, unit_tokens(keys)[0], WIDTH, WIDTH, BLOCK_N)
    sums = value_sums + (head * tl.num_programs(1) + block) * WIDTH
    tl.store(sums + tl.arange(0, WIDTH), tl.sum(values.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def forward(
    q, k, v, temperature, value_sums, y, deviations, row_means, value_mean,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens, num_parts, scale,
    TRAINING: tl.constexpr, PREPARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y for a block of queries of a head and, for TRAINING, what the backward pass needs.

    PREPARED: k holds the unit keys, and value_sums the parts of the sum of the values, that `prepare_keys` wrote. Else k holds
    the keys as they are given, and every program makes them unit vectors and adds the values up itself.
    """
    head, start_m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_M
    batch = head // num_heads
    q_head = q + batch * q_b + head % num_heads * q_h
    k_head = k + batch * k_b + head % num_heads * k_h
    v_head = v + batch * v_b + head % num_heads * v_h

    t, s = bounded_temperature(temperature, head % num_heads)
    alpha = ALPHA / (s * s)
    beta = alpha * 0.5
    queries = load_tokens(q_head, q_n, q_d, start_m, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    queries = (unit_tokens(queries)[0] * (t * s * SIGMA)).to(v.dtype.element_ty)  # sigma q^

    numerator = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    # Four sums a row, one for each of the threads that share a row of an accumulator: they meet once, after the loop.
    p_sums = tl.zeros([BLOCK_M, 4], tl.float32)
    value_sum = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start_n in range(0, num_tokens, BLOCK_N):
        if PREPARED:
            keys = load_tokens(k_head, WIDTH, 1, start_n, num_tokens, WIDTH, WIDTH, BLOCK_N)
        else:
            keys = load_tokens(k_head, k_n, k_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
            keys = unit_tokens(keys)[0].to(v.dtype.element_ty)
        values = load_tokens(v_head, v_n, v_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
        x = product(queries, tl.trans(keys))  # (BLOCK_M, BLOCK_N)
        p = x * (beta * x + alpha)
        p_sums += tl.sum(tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N // 8, 4, 2)), axis=3), axis=1)
        numerator = product(p.to(values.dtype), values, numerator)
        if not PREPARED:
            value_sum += values.to(tl.float32)

    if PREPARED:
        mean = sum_of_parts(value_sums + head * num_parts * WIDTH, num_parts, WIDTH) / num_tokens
    else:
        mean = tl.sum(value_sum, axis=0) / num_tokens
    mean_p = tl.sum(p_sums, axis=1) / num_tokens
    row_mean = mean_p + C / (s * s)  # z
    deviation = (numerator / num_tokens - mean_p[:, None] * mean[None, :]) / row_mean[:, None]
    y_head = y + (batch * num_tokens * num_heads + head % num_heads) * HEAD_DIM
    result = scale * (mean[None, :] + deviation)
    store_tokens(y_head, num_heads * HEAD_DIM, start_m, num_tokens, result, HEAD_DIM, WIDTH, BLOCK_M)
    if TRAINING:
        head_deviations = deviations + head * num_tokens * HEAD_DIM
        store_tokens(head_deviations, HEAD_DIM, start_m, num_tokens, deviation, HEAD_DIM, WIDTH, BLOCK_M)
        rows = start_m + tl.arange(0, BLOCK_M)
        tl.store(row_means + head * num_tokens + rows, row_mean, mask=rows < num_tokens)
        columns = tl.arange(0, WIDTH)
        tl.store(value_mean + head * HEAD_DIM + columns, mean, mask=(columns < HEAD_DIM) & (start_m == 0))


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_backward(
    grad, q, k, temperature, deviations, row_means, value_mean, queries, keys, g, delta, g_sums,
    g_b, g_h, g_n, g_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write sigma q^, k^, g and delta of a block of tokens, and the sum of its g: (B H, blocks, WIDTH) fp32."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, start = head // num_heads, block * BLOCK_M
    tokens, columns = start + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    t, s = bounded_temperature(temperature, head % num_heads)
    prepared = head * num_tokens * WIDTH

    x = load_tokens(q + batch * q_b + head % num_heads * q_h, q_n, q_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    x = unit_tokens(x)[0] * (t * s * SIGMA)
    store_tokens(queries + prepared, WIDTH, start, num_tokens, x, WIDTH, WIDTH, BLOCK_M)
    x = load_tokens(k + batch * k_b + head % num_heads * k_h, k_n, k_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    store_tokens(keys + prepared, WIDTH, start, num_tokens, unit_tokens(x)[0], WIDTH, WIDTH, BLOCK_M)

    x = load_tokens(grad + batch * g_b + head % num_heads * g_h, g_n, g_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    row_mean = tl.load(row_means + head * num_tokens + tokens, mask=tokens < num_tokens, other=1.0)
    x = x.to(tl.float32) / (s * row_mean)[:, None]
    tl.store(g_sums + (head * tl.num_programs(1) + block) * WIDTH + columns, tl.sum(x, axis=0))
    rounded = x.to(g.dtype.element_ty)
    store_tokens(g + prepared, WIDTH, start, num_tokens, rounded, WIDTH, WIDTH, BLOCK_M)
    mean = tl.load(value_mean + head * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    deviation = load_tokens(deviations + head * num_tokens * HEAD_DIM, HEAD_DIM, 1, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    # From the rounded g, as the matrix products have it: only then does g . v - delta not depend on the mean of the values.
    dot = tl.sum(rounded.to(tl.float32) * (mean[None, :] + deviation.to(tl.float32)), axis=1)
    tl.store(delta + head * num_tokens + tokens, dot, mask=tokens < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def backward_queries(
    q, v, temperature, queries, keys, g, delta, dq, dtemperature,
    q_b, q_h, q_n, q_d, v_b, v_h, v_n, v_d, num_heads, num_tokens, factor,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dq of a block of queries, and its part of the gradient of the temperature: (B H, blocks) fp32.

    factor: sqrt(N / D) / N.
    """
    head, start_m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_M
    batch, prepared = head // num_heads, head * num_tokens * WIDTH
    v_head = v + batch * v_b + head % num_heads * v_h
    tokens = start_m + tl.arange(0, BLOCK_M)
    scaled_queries = load_tokens(queries + prepared, WIDTH, 1, start_m, num_tokens, WIDTH, WIDTH, BLOCK_M)
    gradients = load_tokens(g + prepared, WIDTH, 1, start_m, num_tokens, WIDTH, WIDTH, BLOCK_M)
    deltas = tl.load(delta + head * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)

    dunit = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start_n in range(0, num_tokens, BLOCK_N):
        unit_keys = load_tokens(keys + prepared, WIDTH, 1, start_n, num_tokens, WIDTH, WIDTH, BLOCK_N)
        values = load_tokens(v_head, v_n, v_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
        x = product(scaled_queries, tl.trans(unit_keys))  # (BLOCK_M, BLOCK_N)
        difference = product(gradients, tl.trans(values)) - deltas[:, None]
        dx = tl.fma(x, difference, difference)
        dunit = product(dx.to(unit_keys.dtype), unit_keys, dunit)

    t, s = bounded_temperature(temperature, head % num_heads)
    x = load_tokens(q + batch * q_b + head % num_heads * q_h, q_n, q_d, start_m, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    unit, length = unit_tokens(x)
    gradient, radial = unit_gradient(unit, dunit * (factor * B), length)
    y_head = (batch * num_tokens * num_heads + head % num_heads) * HEAD_DIM
    store_tokens(dq + y_head, num_heads * HEAD_DIM, start_m, num_tokens, gradient * t, HEAD_DIM, WIDTH, BLOCK_M)
    tl.store(dtemperature + head * tl.num_programs(1) + tl.program_id(1), tl.sum(radial, axis=0) / s)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def backward_keys(
    k, v, temperature, queries, keys, g, delta, g_sums, dk, dv,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens, num_parts, factor,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a block of keys. factor: sqrt(N / D) / N."""
    head, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    batch, prepared = head // num_heads, head * num_tokens * WIDTH
    s = bounded_temperature(temperature, head % num_heads)[1]
    alpha = ALPHA / (s * s)
    beta = alpha * 0.5
    unit_keys = load_tokens(keys + prepared, WIDTH, 1, start_n, num_tokens, WIDTH, WIDTH, BLOCK_N)
    v_head = v + batch * v_b + head % num_heads * v_h
    values = load_tokens(v_head, v_n, v_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)

    dunit = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dvalues = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start_m in range(0, num_tokens, BLOCK_M):
        scaled_queries = load_tokens(queries + prepared, WIDTH, 1, start_m, num_tokens, WIDTH, WIDTH, BLOCK_M)
        gradients = load_tokens(g + prepared, WIDTH, 1, start_m, num_tokens, WIDTH, WIDTH, BLOCK_M)
        tokens = start_m + tl.arange(0, BLOCK_M)
        deltas = tl.load(delta + head * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
        x = product(unit_keys, tl.trans(scaled_queries))  # (BLOCK_N, BLOCK_M)
        p = x * (beta * x + alpha)
        dvalues = product(p.to(gradients.dtype), gradients, dvalues)
        difference = product(values, tl.trans(gradients)) - deltas[None, :]
        dx = tl.fma(x, difference, difference)
        dunit = product(dx.to(scaled_queries.dtype), scaled_queries, dunit)

    y_head = (batch * num_tokens * num_heads + head % num_heads) * HEAD_DIM
    g_sum = sum_of_parts(g_sums + head * num_parts * WIDTH, num_parts, WIDTH)
    dvalues = (dvalues + (g_sum * (C / (s * s)))[None, :]) * (factor * s)
    store_tokens(dv + y_head, num_heads * HEAD_DIM, start_n, num_tokens, dvalues, HEAD_DIM, WIDTH, BLOCK_N)
    x = load_tokens(k + batch * k_b + head % num_heads * k_h, k_n, k_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    unit, length = unit_tokens(x)
    # The queries in the sum are sigma q^: of the factor tau, tau / sigma = b / 2a is left.
    gradient = unit_gradient(unit, dunit * (factor * ALPHA / s), length)[0]
    store_tokens(dk + y_head, num_heads * HEAD_DIM, start_n, num_tokens, gradient, HEAD_DIM, WIDTH, BLOCK_N)
