"""The Triton kernels of the direct form: tiles of queries by keys whose scores never leave the registers.

For one head let s = max(|tau|, 1), sigma = 2 a tau / b and x_ij = sigma cos(q_i, k_j). The operands of the scores are q
and k as they are given, rows times a power of two, so nothing is rounded: with kappa the length of such a row and acc_ij
its product with a column of length l_j,

    e_ij = acc_ij sigma / (s l_j) + kappa_i / s = (kappa_i / s)(1 + x_ij)            one multiply-add
    p_ij = e_ij^2 - (kappa_i / s)^2                                                  one multiply-add
    w_ij / s^2 = h p_ij / kappa_i^2 + c / s^2,    h = b^2 / 4a,    d w_ij / d cos_ij = b tau (1 + x_ij)

The row factor h / kappa^2 multiplies sums. There is no maximum, no exponential and no rescaling. Rows beyond the last token are
zeros and need no mask. The constant c / s^2 is left out of the matrix product and added from the mean of the values in fp32, so
that p alone is rounded to the dtype of the inputs. With z_i = c / s^2 + the mean of the rest and vbar the mean of the values,

    y_i = sqrt(N / D) (vbar + d_i),     d_i = sum_j (w_ij - c) v_j / (N s^2 z_i) - (z_i - c / s^2) vbar / z_i

Backward, with g_i = dy_i / (s z_i), delta_i = g_i . (vbar + d_i) and t_ij = g_i . v_j - delta_i:

    dq^_i = tau f sum_j t_ij (1 + x_ij) k^_j         dk^_j = tau f sum_i t_ij (1 + x_ij) q^_i         f = sqrt(N / D) b / (N s)
    dtau  = f sum_ij t_ij (1 + x_ij) cos_ij          dv_j = s sqrt(N / D) / N (sum_i p_ij g_i + c / s^2 sum_i g_i)

As sum_j w_ij t_ij = 0, what keys have in common cancels out of dq. So that its rounding does as well, the product for dq takes
k^ - m, m a vector near their mean, and m times the sum of t (1 + x) is added. That sum and dtau come from two sums over fp32
numbers, of t cos and t cos^2; the same two say what delta, made from rounded numbers, is off by, and it is corrected for.

No kernel uses atomics, and none transposes an accumulator: dk and dv come from the transposed scores k^ . q^, computed as such.
Tensors of tokens that a caller passes come with their strides; those that the kernels make are contiguous, (B H, N, WIDTH),
with zeros from HEAD_DIM to WIDTH, the next power of two. Derivation: README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference
from .kernels import A, B, C, bounded_temperature, lengths, unit_gradient

SIGMA = tl.constexpr(2 * reference.A / reference.B)  # sigma / tau
HALF_ALPHA = tl.constexpr(reference.B**2 / (4 * reference.A))

# Numbers of a token that the backward pass reads, (B H, 5, N) fp32: 1 / |q| of the scaled queries, 1 / |k|, delta, g . d, and
# delta for the rounded g, which `backward_queries` replaces by the final one over |q|.
QUERY_FACTOR, KEY_FACTOR, DELTA, DEVIATION, KEYS_DELTA, NUM_ROWS = (tl.constexpr(i) for i in range(6))


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
def scaled_tokens(x):
    """Return the rows of x times powers of two, in its dtype, and their lengths, fp32: 1 to 2, and so for zero vectors."""
    wide = x.to(tl.float32)
    length = lengths(wide)
    scale = tl.exp2(-tl.floor(tl.log2(length)))
    return (wide * scale[:, None]).to(x.dtype), length * scale


@triton.jit
def add_rows(sums, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the columns of x (ROWS, COLUMNS) to four sums a row (ROWS, 4), one for each of the threads that share a row of x."""
    return sums + tl.sum(tl.sum(tl.reshape(x, (ROWS, COLUMNS // 8, 4, 2)), axis=3), axis=1)


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
    k, v, key_factors, value_sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write 1 / |k| for a block of tokens, (B H, N) fp32, and the sum of its values: (B H, blocks, WIDTH) fp32."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, start = head // num_heads, block * BLOCK_N
    keys = load_tokens(k + batch * k_b + head % num_heads * k_h, k_n, k_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    values = load_tokens(v + batch * v_b + head % num_heads * v_h, v_n, v_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    tokens = start + tl.arange(0, BLOCK_N)
    tl.store(key_factors + head * num_tokens + tokens, 1 / lengths(keys.to(tl.float32)), mask=tokens < num_tokens)
    sums = value_sums + (head * tl.num_programs(1) + block) * WIDTH
    tl.store(sums + tl.arange(0, WIDTH), tl.sum(values.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def forward(
    q, k, v, temperature, key_factors, value_sums, y, deviations, row_means, value_mean,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens, num_parts, scale,
    TRAINING: tl.constexpr, PREPARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y for a block of queries of a head and, for TRAINING, what the backward pass needs.

    PREPARED: key_factors holds 1 / |k|, and value_sums the parts of the sum of the values, that `prepare_keys` wrote. Else
    every program takes the lengths of the keys and adds the values up itself.
    """
    head, start_m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_M
    batch = head // num_heads
    q_head = q + batch * q_b + head % num_heads * q_h
    k_head = k + batch * k_b + head % num_heads * k_h
    v_head = v + batch * v_b + head % num_heads * v_h

    t, s = bounded_temperature(temperature, head % num_heads)
    queries, length = scaled_tokens(load_tokens(q_head, q_n, q_d, start_m, num_tokens, HEAD_DIM, WIDTH, BLOCK_M))
    at_zero = length / s  # e of a score of 0
    minus_square = -at_zero * at_zero

    numerator = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    p_sums = tl.zeros([BLOCK_M, 4], tl.float32)
    value_sum = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start_n in range(0, num_tokens, BLOCK_N):
        keys = load_tokens(k_head, k_n, k_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
        values = load_tokens(v_head, v_n, v_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
        if PREPARED:
            tokens = start_n + tl.arange(0, BLOCK_N)
            factors = tl.load(key_factors + head * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
        else:
            factors = 1 / lengths(keys.to(tl.float32))
        e = tl.fma(product(queries, tl.trans(keys)), (factors * (t * SIGMA))[None, :], at_zero[:, None])
        p = tl.fma(e, e, minus_square[:, None])  # (BLOCK_M, BLOCK_N)
        p_sums = add_rows(p_sums, p, BLOCK_M, BLOCK_N)
        numerator = product(p.to(values.dtype), values, numerator)
        if not PREPARED:
            value_sum += values.to(tl.float32)

    if PREPARED:
        mean = sum_of_parts(value_sums + head * num_parts * WIDTH, num_parts, WIDTH) / num_tokens
    else:
        mean = tl.sum(value_sum, axis=0) / num_tokens
    factor = 1 / (at_zero * at_zero * (s * s) * num_tokens) * HALF_ALPHA  # by the square of the length
    # What rounding leaves of p where the score is 0 is not to count for the rows beyond the last token.
    beyond = tl.cdiv(num_tokens, BLOCK_N) * BLOCK_N - num_tokens
    mean_p = (tl.sum(p_sums, axis=1) - beyond * tl.fma(at_zero, at_zero, minus_square)) * factor
    row_mean = mean_p + C / (s * s)  # z
    deviation = (numerator * factor[:, None] - mean_p[:, None] * mean[None, :]) / row_mean[:, None]
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
    grad, q, k, temperature, deviations, row_means, value_mean, queries, keys, g, rows, centres, g_sums, key_sums,
    g_b, g_h, g_n, g_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write what the loops of the backward pass read of a block of tokens.

    In the inputs' dtype: q times a power of two, k^ less the head's centre m, and g. fp32: rows (B H, 5, N), which see below;
    centres (B H, WIDTH), m; the sums of g and of k^, (B H, blocks, WIDTH) each.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, start = head // num_heads, block * BLOCK_M
    tokens, columns = start + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    inside = tokens < num_tokens
    s = bounded_temperature(temperature, head % num_heads)[1]
    prepared, part = head * num_tokens * WIDTH, (head * tl.num_programs(1) + block) * WIDTH + columns
    rows += head * NUM_ROWS * num_tokens + tokens

    x = load_tokens(q + batch * q_b + head % num_heads * q_h, q_n, q_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    x, length = scaled_tokens(x)
    store_tokens(queries + prepared, WIDTH, start, num_tokens, x, WIDTH, WIDTH, BLOCK_M)
    tl.store(rows + QUERY_FACTOR * num_tokens, 1 / length, mask=inside)

    # m is the mean of BLOCK_M keys from all over the sequence, the same in all programs of a head.
    head_k, sampled = k + batch * k_b + head % num_heads * k_h, tl.minimum(num_tokens, BLOCK_M)
    x = load_tokens(head_k, (num_tokens // sampled) * k_n, k_d, 0, sampled, HEAD_DIM, WIDTH, BLOCK_M).to(tl.float32)
    centre = tl.sum(x * (1 / lengths(x))[:, None], axis=0) / sampled
    tl.store(centres + head * WIDTH + columns, centre, mask=columns < WIDTH * (block == 0))
    x = load_tokens(head_k, k_n, k_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M).to(tl.float32)
    factor = 1 / lengths(x)
    x *= factor[:, None]
    store_tokens(keys + prepared, WIDTH, start, num_tokens, x - centre[None, :], WIDTH, WIDTH, BLOCK_M)
    tl.store(rows + KEY_FACTOR * num_tokens, factor, mask=inside)
    tl.store(key_sums + part, tl.sum(x, axis=0))

    x = load_tokens(grad + batch * g_b + head % num_heads * g_h, g_n, g_d, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    row_mean = tl.load(row_means + head * num_tokens + tokens, mask=inside, other=1.0)
    x = x.to(tl.float32) / (s * row_mean)[:, None]
    tl.store(g_sums + part, tl.sum(x, axis=0))
    rounded = x.to(g.dtype.element_ty)
    store_tokens(g + prepared, WIDTH, start, num_tokens, rounded, WIDTH, WIDTH, BLOCK_M)
    mean = tl.load(value_mean + head * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    deviation = load_tokens(deviations + head * num_tokens * HEAD_DIM, HEAD_DIM, 1, start, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    deviation = deviation.to(tl.float32)
    dot = tl.sum(x * deviation, axis=1)
    tl.store(rows + DEVIATION * num_tokens, dot, mask=inside)
    tl.store(rows + DELTA * num_tokens, dot + tl.sum(x * mean[None, :], axis=1), mask=inside)
    # From the rounded g, as `backward_keys` has it: only then does g . v - delta not depend on the mean of the values.
    dot = tl.sum(rounded.to(tl.float32) * (mean[None, :] + deviation), axis=1)
    tl.store(rows + KEYS_DELTA * num_tokens, dot, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def backward_queries(
    grad, q, k, v, temperature, row_means, keys, rows, centres, key_sums, dq, dtemperature,
    g_b, g_h, g_n, g_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens, num_parts, factor,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dq of a block of queries, its part of the gradient of the temperature, (B H, blocks) fp32, and the final delta.

    keys: k^ - m. factor: sqrt(N / D) / N.
    """
    head, start_m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_M
    batch, columns = head // num_heads, tl.arange(0, WIDTH)
    k_head = k + batch * k_b + head % num_heads * k_h
    v_head = v + batch * v_b + head % num_heads * v_h
    tokens = start_m + tl.arange(0, BLOCK_M)
    inside = tokens < num_tokens
    rows += head * NUM_ROWS * num_tokens
    own_rows = rows + tokens
    t, s = bounded_temperature(temperature, head % num_heads)
    x = load_tokens(q + batch * q_b + head % num_heads * q_h, q_n, q_d, start_m, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    queries, length = scaled_tokens(x)
    gradients = load_tokens(
        grad + batch * g_b + head % num_heads * g_h, g_n, g_d, start_m, num_tokens, HEAD_DIM, WIDTH, BLOCK_M
    )
    share = 1 / (tl.load(row_means + head * num_tokens + tokens, mask=inside, other=1.0) * (s * s))
    slope = t * s * SIGMA / length
    minus_delta = -tl.load(own_rows + DELTA * num_tokens, mask=inside, other=0.0) / s

    dunit = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    sums = tl.zeros([BLOCK_M, 4], tl.float32)
    square_sums = tl.zeros([BLOCK_M, 4], tl.float32)
    for start_n in range(0, num_tokens, BLOCK_N):
        others = start_n + tl.arange(0, BLOCK_N)
        factors = tl.load(rows + KEY_FACTOR * num_tokens + others, mask=others < num_tokens, other=0.0)
        given = load_tokens(k_head, k_n, k_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
        values = load_tokens(v_head, v_n, v_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
        centred = load_tokens(keys + head * num_tokens * WIDTH, WIDTH, 1, start_n, num_tokens, WIDTH, WIDTH, BLOCK_N)
        cosine = product(queries, tl.trans(given)) * factors[None, :]  # times the length; (BLOCK_M, BLOCK_N)
        difference = tl.fma(product(gradients, tl.trans(values)), share[:, None], minus_delta[:, None])  # over s
        weighted = cosine * difference
        dx = tl.fma(weighted, slope[:, None], difference)
        sums = add_rows(sums, weighted, BLOCK_M, BLOCK_N)
        square_sums = add_rows(square_sums, weighted * cosine, BLOCK_M, BLOCK_N)
        dunit = product(dx.to(centred.dtype), centred, dunit)

    # Sums over j of t, t cos and t cos^2, exact but for fp32, and with them what delta is off by: sum_j w_ij t_ij is to be 0.
    # What the loop does not need is read after it: registers are short.
    sigma, tau = t * s * SIGMA, t * s
    query_factor = tl.load(own_rows + QUERY_FACTOR * num_tokens, mask=inside, other=0.0)
    t_sum = -num_tokens * tl.load(own_rows + DEVIATION * num_tokens, mask=inside, other=0.0)
    t_cos = tl.sum(sums, axis=1) * query_factor * s
    t_cos_square = tl.sum(square_sums, axis=1) * query_factor * query_factor * s
    w_sum = tl.load(row_means + head * num_tokens + tokens, mask=inside, other=1.0) * (num_tokens * s * s)
    error = (t_sum * C + t_cos * (B * tau) + t_cos_square * (A * tau * tau)) / w_sum
    key_delta = tl.load(own_rows + KEYS_DELTA * num_tokens, mask=inside, other=0.0)
    tl.store(own_rows + KEYS_DELTA * num_tokens, (key_delta + error) * query_factor, mask=inside)

    x = load_tokens(q + batch * q_b + head % num_heads * q_h, q_n, q_d, start_m, num_tokens, HEAD_DIM, WIDTH, BLOCK_M)
    x = x.to(tl.float32)
    length_q = lengths(x)
    unit = x * (1 / length_q)[:, None]
    key_sum = sum_of_parts(key_sums + head * num_parts * WIDTH, num_parts, WIDTH)
    centre = tl.load(centres + head * WIDTH + columns)
    cos_sum = tl.sum(unit * key_sum[None, :], axis=1)
    dx_sum = t_sum + (t_cos - error * cos_sum) * sigma
    dunit = dunit * s + dx_sum[:, None] * centre[None, :] - error[:, None] * key_sum[None, :]
    gradient = unit_gradient(unit, dunit * (factor * B), length_q)[0]
    y_head = (batch * num_tokens * num_heads + head % num_heads) * HEAD_DIM
    store_tokens(dq + y_head, num_heads * HEAD_DIM, start_m, num_tokens, gradient * t, HEAD_DIM, WIDTH, BLOCK_M)
    # sigma sum_j cos^2, which `error` multiplies: from the sum of w, and left out where the temperature is too small for that
    divisor = tl.where(tl.abs(tau) > 1e-6, tau, float("inf")) * (B / 2)
    cos_squares = (w_sum - cos_sum * (B * tau) - num_tokens * C) / divisor
    radial = t_cos + t_cos_square * sigma - error * (cos_sum + cos_squares)
    radial = tl.sum(tl.where(inside, radial, 0.0), axis=0)
    tl.store(dtemperature + head * tl.num_programs(1) + tl.program_id(1), radial * (factor * B / s))


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def backward_keys(
    k, v, temperature, queries, g, rows, g_sums, dk, dv,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, num_heads, num_tokens, num_parts, factor,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a block of keys. factor: sqrt(N / D) / N."""
    head, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    batch, prepared = head // num_heads, head * num_tokens * WIDTH
    rows += head * NUM_ROWS * num_tokens
    t, s = bounded_temperature(temperature, head % num_heads)
    x = load_tokens(k + batch * k_b + head % num_heads * k_h, k_n, k_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    keys, length = scaled_tokens(x)
    v_head = v + batch * v_b + head % num_heads * v_h
    values = load_tokens(v_head, v_n, v_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    at_zero = length / s
    minus_square = -at_zero * at_zero

    dunit = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dvalues = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start_m in range(0, num_tokens, BLOCK_M):
        scaled_queries = load_tokens(queries + prepared, WIDTH, 1, start_m, num_tokens, WIDTH, WIDTH, BLOCK_M)
        gradients = load_tokens(g + prepared, WIDTH, 1, start_m, num_tokens, WIDTH, WIDTH, BLOCK_M)
        tokens = start_m + tl.arange(0, BLOCK_M)
        factors = tl.load(rows + QUERY_FACTOR * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
        deltas = tl.load(rows + KEYS_DELTA * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
        e = tl.fma(product(keys, tl.trans(scaled_queries)), (factors * (t * SIGMA))[None, :], at_zero[:, None])
        p = tl.fma(e, e, minus_square[:, None])  # (BLOCK_N, BLOCK_M)
        dvalues = product(p.to(gradients.dtype), gradients, dvalues)
        dx = e * tl.fma(product(values, tl.trans(gradients)), factors[None, :], -deltas[None, :])
        dunit = product(dx.to(scaled_queries.dtype), scaled_queries, dunit)

    y_head = (batch * num_tokens * num_heads + head % num_heads) * HEAD_DIM
    g_sum = sum_of_parts(g_sums + head * num_parts * WIDTH, num_parts, WIDTH)
    length = at_zero * s
    dvalues = dvalues * (1 / (length * length) * HALF_ALPHA)[:, None] + (g_sum * (C / (s * s)))[None, :]
    store_tokens(dv + y_head, num_heads * HEAD_DIM, start_n, num_tokens, dvalues * (factor * s), HEAD_DIM, WIDTH, BLOCK_N)
    x = load_tokens(k + batch * k_b + head % num_heads * k_h, k_n, k_d, start_n, num_tokens, HEAD_DIM, WIDTH, BLOCK_N)
    x = x.to(tl.float32)
    length_k = lengths(x)
    unit = x * (1 / length_k)[:, None]
    gradient = unit_gradient(unit, dunit * (t * s / length * (factor * B))[:, None], length_k)[0]
    store_tokens(dk + y_head, num_heads * HEAD_DIM, start_n, num_tokens, gradient, HEAD_DIM, WIDTH, BLOCK_N)
