"""The Triton kernels of the efficient form, each used in the forward and in the backward pass.

The quadratic term is a matrix product over the features of a vector x: tiles of 16 columns, and for every pair of tiles (m, n),
n <= m, the 256 products x[16 m + i] x[16 n + j] in row 16 i + j. Pairs of different tiles stand for two and count double in the
state. Features are built in registers, rounded to the inputs' dtype, and never stored.

    moments         k, v -> r; sums of r v^T, r r^T, r, v                            q, g -> the same, and g, delta
    state           k, v -> sums of features(r) (v - m)^T                            q, g -> the same with g for v - m
    reduce          fixed-order sums of both over the splits of the tokens
    apply           q -> y                                                           k -> dv
    expand          the state of features as one of all D x D x D sums
    apply_backward  q, g -> dq, dtau                                                 k, v -> dk

What is summed are not unit vectors x^ but r = x^ - u, u a vector near their mean: what they have in common is not rounded. With
e = q^ . u the score of a query is x = e + q^ . r, so that sums of r and of its features are all that the polynomial needs:

    a x^2 + b x = a (q^ . r)^2 + (b + 2 a e) q^ . r + a e^2 + b e

Features are without the temperature, which multiplies fp32 sums later, and states are means over the tokens: what is rounded to
fp16 stays in its range. m is the mean of the values, rounded to a multiple of the spacing of their dtype at
the largest value. So v - m is exact for large values, and its errors at small ones have no common sign: v minus the very mean
would be off by the same amount for all values of a binade. Formulas: README.md. WIDTH: D padded to a power of two, at least 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import A, B, C, bounded_temperature, lengths, unit_gradient

TILE = tl.constexpr(16)
FEATURES = tl.constexpr(256)  # of a pair of tiles

# Rows of the means of a head, each WIDTH wide, after those of the Gram matrix: the mean of omega r, m, the mean of w less m, u,
# and the mean of omega, the same in all columns.
SUM, CENTRE, OFFSET, ORIGIN, OMEGA, NUM_VECTORS = (tl.constexpr(i) for i in range(6))
# Rows of the sums of a split, after those of r w^T and omega r r^T: sums of omega r and w, max |w|, u, and the sum of omega.
R_SUM, W_SUM, LARGEST, SPLIT_ORIGIN, OMEGA_SUM, NUM_SUMS = (tl.constexpr(i) for i in range(6))


@triton.jit
def of_head(pointer, head, num_heads, strides):
    """Return the start of a head, counted through the batch, of a tensor (B, H, N, D)."""
    return pointer + (head // num_heads).to(tl.int64) * strides[0] + (head % num_heads).to(tl.int64) * strides[1]


@triton.jit
def load_tokens(pointer, tokens, columns, num_tokens, strides, HEAD_DIM: tl.constexpr):
    """Return (tokens, columns) of a head in its dtype, 0 beyond its end."""
    inside = (tokens < num_tokens)[:, None] & (columns < HEAD_DIM)[None, :]
    addresses = pointer + tokens.to(tl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]
    return tl.load(addresses, mask=inside, other=0.0)


@triton.jit
def load_scaled(pointer, factor, centres, tokens, columns, num_tokens, strides, HEAD_DIM: tl.constexpr, CENTRED: tl.constexpr):
    """Return (tokens, columns) of a head, CENTRED: less a vector, times a factor (tokens,) fp32, in its dtype."""
    rows = load_tokens(pointer, tokens, columns, num_tokens, strides, HEAD_DIM)
    if CENTRED:
        rows = rows - tl.load(centres + columns).to(rows.dtype)[None, :]
    return (rows.to(tl.float32) * factor[:, None]).to(rows.dtype)


@triton.jit
def add_product(
    total, pointer, factor, centres, weight, matrix, tokens, num_tokens, strides,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Add to total (tokens, WIDTH) what `load_scaled` gives, times weight (tokens,) if not None, by a matrix (WIDTH, WIDTH)."""
    columns = tl.arange(0, WIDTH)[None, :]
    for start in range(0, WIDTH, STEP):
        inner = start + tl.arange(0, STEP)
        rows = load_scaled(pointer, factor, centres, tokens, inner, num_tokens, strides, HEAD_DIM, CENTRED)
        if weight is not None:
            rows = rows.to(tl.float32) * weight[:, None]
        part = tl.load(matrix + (columns * WIDTH + inner[:, None] if TRANSPOSED else inner[:, None] * WIDTH + columns))
        total = tl.dot(rows.to(part.dtype), part, total, input_precision=PRECISION)
    return total


@triton.jit
def pair_of(index, TILES: tl.constexpr):
    """Return the tiles (m, n), n <= m, of a pair: (0, 0), (1, 0), (1, 1), (2, 0) ..."""
    m = index * 0
    for i in tl.static_range(1, TILES):
        m += tl.where(index >= i * (i + 1) // 2, 1, 0)
    return m, index - m * (m + 1) // 2


@triton.jit
def power_of_two(x):
    """Return a power of two for each row of x (rows, columns) that brings its largest number near 1."""
    largest = tl.minimum(tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30), 1e30)
    return tl.exp2(-tl.floor(tl.log2(largest)))


@triton.jit
def mean_unit_vector(x, tokens, factor, columns, num_tokens, strides, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr):
    """Return the mean (columns,) fp32 of x of a head times a factor (tokens,), over SIZE tokens."""
    rows = load_tokens(x, tokens, columns, num_tokens, strides, HEAD_DIM).to(tl.float32)
    return tl.sum(rows * factor[:, None], axis=0) / SIZE


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def moments(
    x, w, residuals, partials, row_means, deviations, means, g, delta, x_strides, w_strides, num_heads, num_tokens, num_splits,
    tokens_per_split, padded_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write r = x^ - u, and for every split the sums of r w^T, omega r r^T and what NUM_SUMS counts, fp32.

    Forward: x = k, w = v, omega = 1. Backward: x = q, w = g = dy / z, omega = delta = g . (y / scale - m); both are written.
    A program writes ROWS rows of the matrices, and those rows of r; the first of them writes all that is not a matrix.
    residuals: (heads, 16 TILES, padded tokens), 0 beyond the last token. partials: (heads, splits, 2 WIDTH + NUM_SUMS, WIDTH).
    Grid: (heads * splits * WIDTH / ROWS,).
    """
    program, part = tl.program_id(0) // (WIDTH // ROWS), tl.program_id(0) % (WIDTH // ROWS)
    head = (program // num_splits).to(tl.int64)
    x, w = of_head(x, head, num_heads, x_strides), of_head(w, head, num_heads, w_strides)
    columns = tl.arange(0, WIDTH)
    own_columns = part * ROWS + tl.arange(0, ROWS)
    linear = tl.zeros([ROWS, WIDTH], tl.float32)
    gram = tl.zeros([ROWS, WIDTH], tl.float32)
    r_sum = tl.zeros([BLOCK_N, WIDTH], tl.float32)  # summed over the rows once, at the end
    w_sum = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    omega_sum = tl.zeros([BLOCK_N], tl.float32)
    largest = tl.zeros([BLOCK_N, WIDTH], w.dtype.element_ty)
    if BACKWARD:
        offset = tl.load(means + (head * (WIDTH + NUM_VECTORS) + WIDTH + OFFSET) * WIDTH + columns)
    sample = (tl.arange(0, BLOCK_N).to(tl.int64) * num_tokens // BLOCK_N).to(tl.int32)
    factor = 1.0 / lengths(load_tokens(x, sample, columns, num_tokens, x_strides, HEAD_DIM).to(tl.float32))
    origin = mean_unit_vector(x, sample, factor, columns, num_tokens, x_strides, HEAD_DIM, BLOCK_N)
    own_origin = mean_unit_vector(x, sample, factor, own_columns, num_tokens, x_strides, HEAD_DIM, BLOCK_N)
    first = (program % num_splits) * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, padded_tokens), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens < num_tokens
        rows = load_tokens(x, tokens, columns, num_tokens, x_strides, HEAD_DIM)  # (BLOCK_N, WIDTH)
        other = load_tokens(w, tokens, columns, num_tokens, w_strides, HEAD_DIM)  # (BLOCK_N, WIDTH)
        factor = 1.0 / lengths(rows.to(tl.float32))
        residual = tl.where(inside[:, None], rows.to(tl.float32) * factor[:, None] - origin[None, :], 0.0).to(rows.dtype)
        own = residual  # (BLOCK_N, ROWS)
        if ROWS < WIDTH:
            own_rows = load_tokens(x, tokens, own_columns, num_tokens, x_strides, HEAD_DIM).to(tl.float32)
            own = tl.where(inside[:, None], own_rows * factor[:, None] - own_origin[None, :], 0.0).to(rows.dtype)
        transposed = head * TILES * TILE * padded_tokens + own_columns.to(tl.int64)[:, None] * padded_tokens + tokens[None, :]
        tl.store(residuals + transposed, tl.trans(own), mask=(own_columns < TILES * TILE)[:, None])
        if BACKWARD:
            z = tl.load(row_means + head * num_tokens + tokens, mask=inside, other=1.0)
            exact = other.to(tl.float32) / z[:, None]
            other = exact.to(rows.dtype)
            matrix = tokens.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
            kept = inside[:, None] & (columns < HEAD_DIM)[None, :]
            deviation = tl.load(deviations + head * num_tokens * HEAD_DIM + matrix, mask=kept, other=0.0).to(tl.float32)
            omega = tl.sum(exact * (deviation + offset[None, :]), axis=1)
            tl.store(g + head * num_tokens * HEAD_DIM + matrix, other, mask=kept & (part == 0))
            tl.store(delta + head * num_tokens + tokens, omega, mask=inside & (part == 0))
            # omega may be tiny: its products keep the exponents of fp32
            weighted = residual.to(tl.float32) * omega[:, None]
            gram = tl.dot(tl.trans(own.to(tl.float32)), weighted, gram, input_precision=PRECISION)
            r_sum += weighted
            omega_sum += omega
            w_sum += exact
        else:
            largest = tl.maximum(largest, tl.abs(other)).to(other.dtype)  # which makes fp32 of bf16
            gram = tl.dot(tl.trans(own), residual, gram, input_precision=PRECISION)
            r_sum += residual.to(tl.float32)
            omega_sum += inside.to(tl.float32)
            w_sum += other.to(tl.float32)
        linear = tl.dot(tl.trans(own), other, linear, input_precision=PRECISION)
    partials += (head * num_splits + program % num_splits) * (2 * WIDTH + NUM_SUMS) * WIDTH
    matrix = own_columns[:, None] * WIDTH + columns[None, :]
    tl.store(partials + matrix, linear)
    tl.store(partials + WIDTH * WIDTH + matrix, gram)
    partials += 2 * WIDTH * WIDTH + columns
    is_first = columns < WIDTH * (part == 0)
    tl.store(partials + R_SUM * WIDTH, tl.sum(r_sum, axis=0), mask=is_first)
    tl.store(partials + W_SUM * WIDTH, tl.sum(w_sum, axis=0), mask=is_first)
    tl.store(partials + LARGEST * WIDTH, tl.max(largest.to(tl.float32), axis=0), mask=is_first)
    tl.store(partials + SPLIT_ORIGIN * WIDTH, origin, mask=is_first)
    tl.store(partials + OMEGA_SUM * WIDTH, tl.full([WIDTH], 0.0, tl.float32) + tl.sum(omega_sum, axis=0), mask=is_first)


@triton.jit
def sum_of_splits(partials, offsets, num_splits, stride):
    """Return sum over splits of partials[split, offsets], in the order of the splits."""
    total = tl.zeros(offsets.shape, tl.float32)
    for _ in range(num_splits):
        total += tl.load(partials + offsets)
        partials += stride
    return total


@triton.jit
def mean_and_centre(partials, num_splits, num_tokens, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Return the mean of w and the centre m, (WIDTH,) fp32 both; partials: those of `moments`, of one head."""
    columns = tl.arange(0, WIDTH)
    size: tl.constexpr = (2 * WIDTH + NUM_SUMS) * WIDTH
    mean = sum_of_splits(partials, columns + (2 * WIDTH + W_SUM) * WIDTH, num_splits, size) / num_tokens
    largest = tl.full([WIDTH], 1e-30, tl.float32)
    for _ in range(num_splits):
        largest = tl.maximum(largest, tl.load(partials + columns + (2 * WIDTH + LARGEST) * WIDTH))
        partials += size
    spacing = tl.exp2(tl.floor(tl.log2(largest)) - dtype.fp_mantissa_width)
    return mean, (tl.floor(mean / spacing + 0.5) * spacing).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_moment_splits"])
def state(
    residuals, w, moment_partials, partials, w_strides, num_heads, num_tokens, num_moment_splits, num_splits, tokens_per_split,
    padded_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Write the sums of features(r) w^T of a split, fp32; CENTRED: of w less the centre m.

    A program has LEFT columns of a pair's first tile, so 16 LEFT features, on the M side of its product.
    partials: (heads, splits, pairs * 256, WIDTH). Grid: (heads * splits * pairs * 16 / LEFT,).
    """
    num_blocks: tl.constexpr = TILES * (TILES + 1) // 2 * (TILE // LEFT)
    program = tl.program_id(0)
    block, part = program % num_blocks, program // num_blocks
    head, split = (part // num_splits).to(tl.int64), part % num_splits
    m, n = pair_of(block // (TILE // LEFT), TILES)
    first_columns = m * TILE + block % (TILE // LEFT) * LEFT + tl.arange(0, LEFT)
    second_columns = n * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, WIDTH)
    residuals += head * TILES * TILE * padded_tokens
    w = of_head(w, head, num_heads, w_strides)
    if CENTRED:
        moment_partials += head * num_moment_splits * (2 * WIDTH + NUM_SUMS) * WIDTH
        _, centre = mean_and_centre(moment_partials, num_moment_splits, num_tokens, WIDTH, w.dtype.element_ty)
    total = tl.zeros([LEFT * TILE, WIDTH], tl.float32)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, padded_tokens), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        left = tl.load(residuals + first_columns.to(tl.int64)[:, None] * padded_tokens + tokens[None, :])  # (LEFT, BLOCK_N)
        right = tl.load(residuals + second_columns.to(tl.int64)[:, None] * padded_tokens + tokens[None, :])  # (16, BLOCK_N)
        values = load_tokens(w, tokens, columns, num_tokens, w_strides, HEAD_DIM)  # (BLOCK_N, WIDTH)
        features = tl.reshape(left[:, None, :] * right[None, :, :], [LEFT * TILE, BLOCK_N])
        if CENTRED:
            values = values - centre.to(values.dtype)[None, :]  # beyond the last token features are 0
        total = tl.dot(features, values, total, input_precision=PRECISION)
    rows = block * LEFT * TILE + tl.arange(0, LEFT * TILE)
    partials += (head * num_splits + split) * num_blocks * LEFT * TILE * WIDTH
    tl.store(partials + rows[:, None] * WIDTH + columns[None, :], total)


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_moment_splits"])
def reduce(
    partials, moment_partials, states, means, num_tokens, num_splits, num_moment_splits,
    WIDTH: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, CENTRED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the splits, in their order, into the states and the means of the moments.

    states: (heads, pairs * 256 + WIDTH, WIDTH) in the inputs' dtype: SCALE / N times the state, with pairs of different tiles
    doubled, and times the sum of r w^T, of the same w. means: (heads, WIDTH + NUM_VECTORS, WIDTH) fp32: the mean of omega r r^T
    and what NUM_VECTORS counts; where not CENTRED, m is the mean of w.
    Grid: (heads * (pairs * 256 / BLOCK_ROWS + 1),); the last program of a head does the moments.
    """
    num_rows: tl.constexpr = TILES * (TILES + 1) // 2 * FEATURES
    num_blocks: tl.constexpr = num_rows // BLOCK_ROWS
    program = tl.program_id(0)
    head, block = (program // (num_blocks + 1)).to(tl.int64), program % (num_blocks + 1)
    columns = tl.arange(0, WIDTH)
    states += head * (num_rows + WIDTH) * WIDTH
    if block < num_blocks:
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        total = sum_of_splits(partials + head * num_splits * num_rows * WIDTH, offsets, num_splits, num_rows * WIDTH)
        m, n = pair_of(block * BLOCK_ROWS // FEATURES, TILES)
        multiplicity = tl.where(m == n, 1.0, 2.0)
        tl.store(states + offsets, (total * (multiplicity * SCALE / num_tokens)).to(states.dtype.element_ty))
    else:
        size: tl.constexpr = (2 * WIDTH + NUM_SUMS) * WIDTH
        moment_partials += head * num_moment_splits * size
        means += head * (WIDTH + NUM_VECTORS) * WIDTH
        mean, centre = mean_and_centre(moment_partials, num_moment_splits, num_tokens, WIDTH, states.dtype.element_ty)
        if not CENTRED:
            centre = mean
        tl.store(means + (WIDTH + CENTRE) * WIDTH + columns, centre)
        tl.store(means + (WIDTH + OFFSET) * WIDTH + columns, mean - centre)
        r_sum = sum_of_splits(moment_partials, columns + (2 * WIDTH + R_SUM) * WIDTH, num_moment_splits, size) / num_tokens
        tl.store(means + (WIDTH + SUM) * WIDTH + columns, r_sum)
        omega = sum_of_splits(moment_partials, columns + (2 * WIDTH + OMEGA_SUM) * WIDTH, num_moment_splits, size) / num_tokens
        tl.store(means + (WIDTH + OMEGA) * WIDTH + columns, omega)
        origin = tl.load(moment_partials + columns + (2 * WIDTH + SPLIT_ORIGIN) * WIDTH)  # that of all splits
        tl.store(means + (WIDTH + ORIGIN) * WIDTH + columns, origin)
        for start in range(0, WIDTH, TILE):
            rows = start + tl.arange(0, TILE)
            offsets = rows[:, None] * WIDTH + columns[None, :]
            gram = sum_of_splits(moment_partials + WIDTH * WIDTH, offsets, num_moment_splits, size) / num_tokens
            tl.store(means + offsets, gram)
            linear = sum_of_splits(moment_partials, offsets, num_moment_splits, size) / num_tokens
            if CENTRED:
                r_part = (
                    sum_of_splits(moment_partials, rows + (2 * WIDTH + R_SUM) * WIDTH, num_moment_splits, size) / num_tokens
                )
                linear -= r_part[:, None] * centre[None, :]
            tl.store(states + num_rows * WIDTH + offsets, (linear * SCALE).to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["num_tokens"])
def apply(
    x, states, means, temperature, y, deviations, row_means, x_strides, y_strides, num_heads, num_tokens, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, FORWARD: tl.constexpr,
    TRAINING: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Multiply features(x^) with a state. FORWARD: write y and, TRAINING, its deviations and row means. Else: write dv.

    Forward: x = q, the state of k and v. Backward: x = k, the state of q and g. Grid: (heads * blocks of tokens,).
    """
    num_rows: tl.constexpr = TILES * (TILES + 1) // 2 * FEATURES
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    tokens = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
    x = of_head(x, head, num_heads, x_strides)
    states += head * (num_rows + WIDTH) * WIDTH
    means += head * (WIDTH + NUM_VECTORS) * WIDTH
    t, s = bounded_temperature(temperature, head % num_heads)
    dtype = states.dtype.element_ty

    unit = load_tokens(x, tokens, columns, num_tokens, x_strides, HEAD_DIM).to(tl.float32)
    factor = 1.0 / lengths(unit)
    unit *= factor[:, None]
    common = tl.sum(unit * tl.load(means + (WIDTH + ORIGIN) * WIDTH + columns)[None, :], axis=1)  # e
    slope = 2 * A * t * common + B / s  # of the weights at e
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if FORWARD:  # the mean of the weights less the weight of e, over t
        products = add_product(
            total, x, factor, means, None, means, tokens, num_tokens, x_strides,
            HEAD_DIM, WIDTH, False, True, PRECISION, STEP,
        )  # fmt: skip
        products = A * t * products + tl.load(means + (WIDTH + SUM) * WIDTH + columns)[None, :] * slope[:, None]
        p_mean = tl.sum(unit * products, axis=1)
    block_offsets = tl.arange(0, LEFT * TILE)[:, None] * WIDTH + columns[None, :]
    for row in range(0, num_rows, LEFT * TILE):
        pair = row // FEATURES
        m, n = pair_of(pair, TILES)
        first_columns = m * TILE + (row - pair * FEATURES) // TILE + tl.arange(0, LEFT)
        second_columns = n * TILE + tl.arange(0, TILE)
        left = load_scaled(x, factor, means, tokens, first_columns, num_tokens, x_strides, HEAD_DIM, False)
        right = load_scaled(x, factor, means, tokens, second_columns, num_tokens, x_strides, HEAD_DIM, False)
        features = tl.reshape(left[:, :, None] * right[:, None, :], [BLOCK_M, LEFT * TILE])
        part = tl.load(states + row * WIDTH + block_offsets)
        total = tl.dot(features, part, total, input_precision=PRECISION)

    # a t^2 quadratic + (b1 + 2 a t e) t linear, over t: the linear term goes into the same accumulator
    total = add_product(
        total * (A * t), x, factor * slope, means, None, states + num_rows * WIDTH, tokens, num_tokens, x_strides,
        HEAD_DIM, WIDTH, False, False, PRECISION, STEP,
    ) * (t / SCALE)  # fmt: skip
    common_weight = (slope - B / s) * (slope + B / s) / (4 * A) + C / (s * s)  # a (t e)^2 + (b / s) t e + c / s^2
    offset = tl.load(means + (WIDTH + OFFSET) * WIDTH + columns)
    mean = tl.load(means + (WIDTH + CENTRE) * WIDTH + columns) + offset
    inside = (tokens < num_tokens)[:, None] & (columns < HEAD_DIM)[None, :]
    if FORWARD:
        p_mean *= t
        z = p_mean + common_weight
        total = (total - p_mean[:, None] * offset[None, :]) / z[:, None]
        if TRAINING:
            matrix = (head * num_tokens + tokens)[:, None] * HEAD_DIM + columns[None, :]
            tl.store(deviations + matrix, total.to(dtype), mask=inside)
            tl.store(row_means + head * num_tokens + tokens, z, mask=tokens < num_tokens)
        total += mean[None, :]
    else:
        total += common_weight[:, None] * mean[None, :]
    y = of_head(y, head, num_heads, y_strides)
    y += tokens.to(tl.int64)[:, None] * y_strides[2] + columns[None, :] * y_strides[3]
    tl.store(y, (scale * total).to(dtype), mask=inside)


@triton.jit
def expand(states, expanded, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """Write the state of products (b, c) by columns a from that of features (a, b) by columns c: sums of x_a x_b w_c.

    expanded: (heads, TILES^2 * 256, WIDTH), the 256 products of tiles m of b and n of c in the place m TILES + n.
    Grid: (heads * TILES^2,).
    """
    num_rows: tl.constexpr = TILES * (TILES + 1) // 2 * FEATURES
    program = tl.program_id(0)
    head, block = (program // (TILES * TILES)).to(tl.int64), program % (TILES * TILES)
    rows, columns = tl.arange(0, FEATURES)[:, None], tl.arange(0, WIDTH)[None, :]
    b, c = block // TILES * TILE + rows // TILE, block % TILES * TILE + rows % TILE
    first, second = tl.maximum(columns, b), tl.minimum(columns, b)
    m, n = first // TILE, second // TILE
    feature = (m * (m + 1) // 2 + n) * FEATURES + first % TILE * TILE + second % TILE
    value = tl.load(states + head * (num_rows + WIDTH) * WIDTH + feature * WIDTH + c, mask=columns < TILES * TILE, other=0.0)
    value = tl.where(m == n, value, 0.5 * value)
    tl.store(expanded + (head * TILES * TILES + block) * FEATURES * WIDTH + rows * WIDTH + columns, value)


@triton.jit(do_not_specialize=["num_tokens"])
def apply_backward(
    x, w, delta, expanded, states, means, centres, temperature, dx, dtemperature, x_strides, w_strides, dx_strides, num_heads,
    num_tokens, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write dq and, for every block of tokens, its part of dtau; KEYS: write dk.

    Queries: x = q, w = g, the state and means of k and v. KEYS: x = k, w = v - m with m in `centres`, the state and means of q
    and g, delta = 1. The gradient of a score is (g . (v - m) - delta) (2 a x + b). Its sum by the unit vectors r + u of the
    others is that by r, which takes the state, and that by u, which all have in common.
    dtemperature: (heads, blocks) fp32. Grid: (heads * blocks of tokens,).
    """
    num_rows: tl.constexpr = TILES * (TILES + 1) // 2 * FEATURES
    num_products: tl.constexpr = TILES * TILES * FEATURES
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    tokens = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
    x, w = of_head(x, head, num_heads, x_strides), of_head(w, head, num_heads, w_strides)
    states += head * (num_rows + WIDTH) * WIDTH
    expanded += head * num_products * WIDTH
    means += head * (WIDTH + NUM_VECTORS) * WIDTH
    centres += (head * (WIDTH + NUM_VECTORS) + WIDTH + CENTRE) * WIDTH
    t, s = bounded_temperature(temperature, head % num_heads)
    dtype = states.dtype.element_ty

    rows = load_tokens(x, tokens, columns, num_tokens, x_strides, HEAD_DIM)
    factor = 1.0 / lengths(rows.to(tl.float32))
    values = load_tokens(w, tokens, columns, num_tokens, w_strides, HEAD_DIM)
    if KEYS:
        values = values - tl.load(centres + columns).to(dtype)[None, :]
        own_delta = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        own_delta = tl.load(delta + head * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
    shrink = power_of_two(values.to(tl.float32))  # exact, for the range of fp16
    unit = rows.to(tl.float32) * factor[:, None]
    vectors = means + WIDTH * WIDTH + columns
    curve = 2 * A * t
    slope = curve * tl.sum(unit * tl.load(vectors + ORIGIN * WIDTH)[None, :], axis=1) + B / s  # 2 a e + b
    # The mean of the scores' gradients, but for what needs `linear`
    score_mean = slope * tl.sum(
        values.to(tl.float32) * tl.load(vectors + (CENTRE if KEYS else OFFSET) * WIDTH)[None, :], axis=1
    )
    score_mean -= own_delta * slope * tl.load(means + (WIDTH + OMEGA) * WIDTH)
    score_mean -= own_delta * curve * tl.sum(unit * tl.load(vectors + SUM * WIDTH)[None, :], axis=1)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    block_offsets = tl.arange(0, LEFT * TILE)[:, None] * WIDTH + columns[None, :]
    for row in range(0, num_products, LEFT * TILE):
        pair = row // FEATURES
        m = pair // TILES
        first_columns = m * TILE + (row - pair * FEATURES) // TILE + tl.arange(0, LEFT)
        second_columns = (pair - m * TILES) * TILE + tl.arange(0, TILE)
        left = load_scaled(x, factor, means, tokens, first_columns, num_tokens, x_strides, HEAD_DIM, False)
        right = load_scaled(w, shrink, centres, tokens, second_columns, num_tokens, w_strides, HEAD_DIM, KEYS)
        products = tl.reshape(left[:, :, None] * right[:, None, :], [BLOCK_M, LEFT * TILE])
        part = tl.load(expanded + row * WIDTH + block_offsets)
        total = tl.dot(products, part, total, input_precision=PRECISION)

    linear = add_product(
        tl.zeros([BLOCK_M, WIDTH], tl.float32), w, shrink, centres, None, states + num_rows * WIDTH, tokens, num_tokens,
        w_strides, HEAD_DIM, WIDTH, KEYS, True, PRECISION, STEP,
    )  # fmt: skip
    linear /= (shrink * SCALE)[:, None]
    total = total * (curve / (shrink * SCALE))[:, None] + linear * slope[:, None]
    total -= (own_delta * slope)[:, None] * tl.load(vectors + SUM * WIDTH)[None, :]
    total = add_product(
        total, x, factor, means, own_delta * -curve, means, tokens, num_tokens, x_strides,
        HEAD_DIM, WIDTH, False, False, PRECISION, STEP,
    )  # fmt: skip
    unit = load_tokens(x, tokens, columns, num_tokens, x_strides, HEAD_DIM).to(tl.float32) * factor[:, None]
    score_mean += curve * tl.sum(unit * linear, axis=1)
    total = (total + score_mean[:, None] * tl.load(vectors + ORIGIN * WIDTH)[None, :]) * scale
    gradient, radial = unit_gradient(unit, total, 1.0 / factor)
    if not KEYS:
        tl.store(dtemperature + tl.program_id(0), tl.sum(radial, axis=0) / s)
    dx = of_head(dx, head, num_heads, dx_strides)
    dx += tokens.to(tl.int64)[:, None] * dx_strides[2] + columns[None, :] * dx_strides[3]
    inside = (tokens < num_tokens)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(dx, (t * gradient).to(dtype), mask=inside)
