"""The attention with a Taylor polynomial of exp of order k instead of 2, in plain PyTorch, both forms: for study, not speed.

    x_ij = tau cos(q_i, k_j)
    w(x) = 1 + x + x^2 / 2! + ... + x^k / k!
    y_i  = sqrt(N / D) sum_j w(x_ij) v_j / sum_j w(x_ij)

**Which orders are weights.** Write e_k for the polynomial; e_k' = e_(k-1) and e_k = e_(k-1) + x^k / k!. An even e_k has a
smallest value, and there e_(k-1) = e_k' = 0, so that this value is x^k / k!. It is positive, as x = 0 is no zero of e_(k-1).
Hence the even polynomials have no real zero: every weight is positive, every row sum too, and each output is a mean of v
(smallest weights: 1/2 at x = -1 for k = 2, 0.270 at -1.60 for k = 4, 0.149 at -2.18 for k = 6). An odd e_k has the derivative
e_(k-1) > 0 and rises from minus to plus infinity through one zero, at -1, -1.60 and -2.18 for k = 1, 3, 5: below it weights are
negative, and a row sum can come near 0, where the output blows up. Odd orders are here because a study has to show that.

**What they cost.** `efficient` needs (q . k)^m as a scalar product of features. The products of m of the D entries, each once,
are C(D + m - 1, m); with n_a the exponents of a product, the multinomial theorem says

    (q . k)^m / m! = sum_n  q^n k^n / (n_1! n_2! ... n_D!)

All degrees up to k together are F = sum_m C(D + m - 1, m) = C(D + k, k) features, about D^k / k!. A head takes

    direct     N^2 (4 D + 2 k + 2)     temperature, k products and k sums for a weight, its row sum; the weights times v
    efficient  N F (4 D + 6)           about 4 N F (D + 1) for states and outputs, 2 N F for the features

operations (k = 2 is the paper's count for direct), equal at N = F (4 D + 6) / (4 D + 2 k + 2), so for about as many tokens as
features: D = 16 turns at 153 tokens with k = 2 and 4,583 with k = 4, D = 64 at 2,145 and 802,000. In the direct form a higher
order costs next to nothing, but there softmax itself costs the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import unit_vectors, widened
from .taylor_attention import apply_autocast, check_inputs, check_key_mask, without_autocast

ORDERS = (1, 2, 3, 4, 5, 6)
FORMS = ("direct", "efficient")
MAX_FEATURES = 2**16  # more than any order up to 4 has at D = 32; the features of 1,024 tokens of a head take 256 MiB


def order_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    order: int,
    form: str = "direct",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Compute the attention with the Taylor polynomial of this order; dtypes, autocast and result as in `taylor_attention`.

    key_mask: (B, N) bool, false for tokens that none attends to, such as padding; N in sqrt(N / D) then counts the others.

    Raises:
        ValueError: order or form is unknown, the efficient form has too many features, or as in `taylor_attention`.
    """
    check_form(form)
    q, k, v = apply_autocast(q, k, v)
    check_inputs(q, k, v, temperature)
    if key_mask is not None:
        check_key_mask(key_mask, q)
    function = direct if form == "direct" else efficient
    return without_autocast(functools.partial(function, order=order, key_mask=key_mask), q, k, v, temperature)


def order_attention_weights(q: Tensor, k: Tensor, temperature: Tensor, *, order: int, key_mask: Tensor | None = None) -> Tensor:
    """Return the attention matrix: (B, H, N, N), fp32 (fp64 for fp64); rows sum to 1, entries of odd orders may be negative.

    The attention is `output_scale` times this matrix times v.
    """
    q, k = apply_autocast(q, k)
    check_inputs(q, k, k, temperature)
    if key_mask is not None:
        check_key_mask(key_mask, q)
    w = without_autocast(functools.partial(weights, order=order, key_mask=key_mask), q, k, temperature)
    return w / w.sum(dim=-1, keepdim=True)


def taylor_polynomial(x: Tensor, order: int) -> Tensor:
    """Return 1 + x + ... + x^order / order!, by Horner's rule."""
    one = torch.ones((), dtype=x.dtype, device=x.device)
    w = 1 + x / order
    for degree in range(order - 1, 0, -1):
        w = torch.addcmul(one, x, w, value=1 / degree)
    return w


def weights(q: Tensor, k: Tensor, temperature: Tensor, order: int, key_mask: Tensor | None = None) -> Tensor:
    """Return w(x_ij), 0 for keys left out, not yet divided by the row sums: (B, H, N, N) in fp32 (fp64 for fp64 inputs)."""
    check_order(order)
    q, k, temperature = widened(q, k, temperature)
    x = temperature[:, None, None] * unit_vectors(q) @ unit_vectors(k).mT  # (B, H, N, N)
    w = taylor_polynomial(x, order)
    return w if key_mask is None else w * key_mask[:, None, None, :]


def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, order: int, key_mask: Tensor | None = None) -> Tensor:
    """Compute the attention as the definition stands, in O(N^2 D) operations.

    q, k, v: (B, H, N, D) of one dtype; temperature: (H,); key_mask: (B, N) or None. Returns (B, H, N, D) in the dtype of v.
    """
    w = weights(q, k, temperature, order, key_mask)  # (B, H, N, N)
    numerator = w @ v.to(w.dtype)  # (B, H, N, D)
    denominator = w.sum(dim=-1, keepdim=True)  # (B, H, N, 1)
    return (output_scale(v, key_mask) * numerator / denominator).to(v.dtype)


def efficient(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, order: int, key_mask: Tensor | None = None) -> Tensor:
    """Compute the same attention with the sum over j drawn inside, in O(N D^(order + 1)) operations.

    Arguments and result as in `direct`.

    Raises:
        ValueError: there are more than MAX_FEATURES features.
    """
    D = v.shape[-1]
    check_features(D, order)
    q, k, values, temperature = widened(q, k, v, temperature)
    q = temperature[:, None, None] * unit_vectors(q)
    k = unit_vectors(k)
    values = torch.cat([torch.ones_like(values[..., :1]), values], dim=-1)  # V' = [1, V]: (B, H, N, D + 1)
    if key_mask is not None:
        values = values * key_mask[:, None, :, None]

    y = values.sum(dim=-2, keepdim=True)  # degree 0: (B, H, 1, D + 1)
    for degree, (of_q, of_k) in enumerate(zip(monomials(q, order), monomials(k, order)), start=1):
        # The coefficients multiply the state, whose size does not depend on N.
        coefficients = torch.tensor(inverse_factorials(D, degree), dtype=q.dtype, device=q.device)
        y = y + of_q @ (coefficients[:, None] * (of_k.mT @ values))  # (B, H, N, F_m) @ (B, H, F_m, D + 1)

    denominator, numerator = y[..., :1], y[..., 1:]
    return (output_scale(v, key_mask) * numerator / denominator).to(v.dtype)


def output_scale(v: Tensor, key_mask: Tensor | None = None) -> float | Tensor:
    """Return sqrt(N / D); with a mask for each sample, (B, 1, 1, 1), N being the keys that it keeps."""
    N, D = v.shape[-2:]
    if key_mask is None:
        return math.sqrt(N / D)
    num_kept = key_mask.sum(dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))
    return (num_kept / D).sqrt()[:, None, None, None]


def monomials(x: Tensor, order: int) -> Iterator[Tensor]:
    """Yield, for each degree m from 1 to order, all products of m entries of x, each once: (..., D) -> (..., C(D + m - 1, m)).

    They come in the order of `itertools.combinations_with_replacement`: those that begin with entry a are x_a times the
    products of one degree less that hold no entry before a, and these are the last ones there.
    """
    D = x.shape[-1]
    products = x
    yield products
    for degree in range(2, order + 1):
        sizes = [math.comb(D - a + degree - 2, degree - 1) for a in range(D)]  # of the products without an entry before a
        products = torch.cat([x[..., a : a + 1] * products[..., sizes[0] - size :] for a, size in enumerate(sizes)], dim=-1)
        yield products


@functools.cache
def inverse_factorials(head_dim: int, degree: int) -> tuple[float, ...]:
    """Return 1 / (n_1! ... n_D!) of every product that `monomials` yields for this degree, n_a being its exponents."""
    return tuple(
        1 / math.prod(map(math.factorial, Counter(entries).values()))
        for entries in itertools.combinations_with_replacement(range(head_dim), degree)
    )


def num_features(head_dim: int, order: int) -> int:
    """Return F = C(D + k, k), the products of all degrees from 0 to the order."""
    return math.comb(head_dim + order, order)


def ops_direct(num_tokens: int, head_dim: int, order: int) -> int:
    """Return the operations of the direct form of one head."""
    return num_tokens**2 * (4 * head_dim + 2 * order + 2)


def ops_efficient(num_tokens: int, head_dim: int, order: int) -> int:
    """Return the operations of the efficient form of one head."""
    return num_tokens * num_features(head_dim, order) * (4 * head_dim + 6)


def crossover(head_dim: int, order: int) -> float:
    """Return the number of tokens above which the efficient form takes fewer operations."""
    return num_features(head_dim, order) * (4 * head_dim + 6) / (4 * head_dim + 2 * order + 2)


def check_order(order: int) -> None:
    """Raise ValueError unless this is one of ORDERS."""
    if isinstance(order, bool) or not isinstance(order, int) or order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(str, ORDERS))}, got {order!r}")


def check_form(form: str) -> None:
    """Raise ValueError unless this is "direct" or "efficient"."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def check_features(head_dim: int, order: int) -> None:
    """Raise ValueError where the efficient form of this order has more than MAX_FEATURES features."""
    check_order(order)
    if (features := num_features(head_dim, order)) > MAX_FEATURES:
        raise ValueError(
            f"the efficient form of order {order} has {features:,} features at head dimension {head_dim}, more than "
            f"{MAX_FEATURES:,}: take form 'direct', a lower order, or smaller heads"
        )
