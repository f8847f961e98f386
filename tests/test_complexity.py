"""The cost formulas against every figure the paper publishes, and against counting the root from the formulas themselves."""

import itertools
import math

import pytest

from taylorvit.complexity import (
    entries_direct,
    entries_efficient,
    entries_mhsa,
    flops_crossover,
    flops_crossover_bound,
    memory_crossover,
    memory_crossover_bound,
    num_features,
    ops_direct,
    ops_efficient,
    ops_mhsa,
    quadratic_features,
)

HEAD_DIMS = (1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("head_dim", "n0", "n1"),
    [
        (4, 20.727, 15.142),
        (8, 72.737, 46.671),
        (16, 272.743, 158.250),
        (32, 1056.746, 573.939),
        (64, 4160.748, 2173.740),
        (128, 16512.749, 8445.626),
    ],
)
def test_crossovers_are_the_exact_values(head_dim: int, n0: float, n1: float) -> None:
    assert flops_crossover(head_dim) == pytest.approx(n0, abs=5e-4)
    assert memory_crossover(head_dim) == pytest.approx(n1, abs=5e-4)


def test_published_table_is_the_ceiling() -> None:
    dims = (8, 16, 32, 64, 128)
    assert [math.ceil(flops_crossover(d)) for d in dims] == [73, 273, 1057, 4161, 16513]
    assert [math.ceil(memory_crossover(d)) for d in dims] == [47, 159, 574, 2174, 8446]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bounds(head_dim: int) -> None:
    d = head_dim
    assert flops_crossover_bound(d) == d**2 + d + 3 / 4
    assert memory_crossover_bound(d) == d**2 / 2 + 2 * d + 1 / 2
    assert flops_crossover(d) <= flops_crossover_bound(d)
    assert memory_crossover(d) <= memory_crossover_bound(d)


def test_upper_bound_shown_by_the_project_page() -> None:
    assert int(memory_crossover_bound(32)) == 576
    assert math.ceil(memory_crossover_bound(32)) == 577


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", [0, 1, 197, 4097])
def test_polynomials_of_the_paper(num_tokens: int, head_dim: int) -> None:
    N, d = num_tokens, head_dim
    assert ops_direct(N, d) == 4 * N**2 * d + 6 * N**2
    assert ops_efficient(N, d) == N * (4 * d**3 + 10 * d**2 + 9 * d + 4)
    assert entries_direct(N, d) == d * N + 2 * N**2
    assert entries_efficient(N, d) == d**2 * (d + 1) + 2 * d * N + (d + 1) * N + d**2 * N


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_crossovers_in_closed_form(head_dim: int) -> None:
    d = head_dim
    assert flops_crossover(d) == pytest.approx((4 * d**3 + 10 * d**2 + 9 * d + 4) / (4 * d + 6))
    assert memory_crossover(d) == pytest.approx((d**2 + 2 * d + 1 + math.sqrt(d**4 + 12 * d**3 + 14 * d**2 + 4 * d + 1)) / 4)


@pytest.mark.parametrize("packing", ["none", "symmetric", "circulant"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_forms_cost_the_same_at_their_crossover(head_dim: int, packing: str) -> None:
    n0, n1 = flops_crossover(head_dim, packing), memory_crossover(head_dim, packing)
    assert ops_efficient(n0, head_dim, packing) == pytest.approx(ops_direct(n0, head_dim))
    assert entries_efficient(n1, head_dim, packing) == pytest.approx(entries_direct(n1, head_dim))
    assert ops_efficient(math.floor(n0) + 1, head_dim, packing) < ops_direct(math.floor(n0) + 1, head_dim)
    assert entries_efficient(math.floor(n1) + 1, head_dim, packing) < entries_direct(math.floor(n1) + 1, head_dim)


@pytest.mark.parametrize(
    ("head_dim", "full", "symmetric", "circulant"),
    [(8, 73, 45, 49), (16, 273, 153, 161), (32, 1057, 561, 577), (64, 4161, 2145, 2177), (128, 16513, 8385, 8449)],
)
def test_feature_counts_and_packed_crossovers(head_dim: int, full: int, symmetric: int, circulant: int) -> None:
    assert num_features(head_dim) == full
    assert num_features(head_dim, "symmetric") == symmetric
    assert num_features(head_dim, "circulant") == circulant
    # In the paper's count, too, the operations cross where a score row has as many entries as a token has features.
    for packing, features in (("none", full), ("symmetric", symmetric), ("circulant", circulant)):
        assert flops_crossover(head_dim, packing) == pytest.approx(features, rel=0.01)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packings_hold_every_pair(head_dim: int) -> None:
    pairs = {(a, b) for a in range(head_dim) for b in range(a, head_dim)}
    rolled = {tuple(sorted((a, (a + delta) % head_dim))) for delta in range(head_dim // 2 + 1) for a in range(head_dim)}
    assert quadratic_features(head_dim, "symmetric") == len(pairs)
    assert rolled == pairs
    assert quadratic_features(head_dim, "circulant") == head_dim * (head_dim // 2 + 1)


def test_mhsa_polynomials_of_the_paper() -> None:
    N, embed_dim = 197, 192
    for h in (1, 2, 3, 4, 6, 12, 24, 48, 96, 192):
        assert ops_mhsa("efficient", N, embed_dim, h) == pytest.approx(
            N * (4 * embed_dim**3 / h**2 + 10 * embed_dim**2 / h + 9 * embed_dim + 4 * h)
        )
        assert entries_mhsa("efficient", N, embed_dim, h) == pytest.approx(
            embed_dim**3 / h**2 + (N + 1) * embed_dim**2 / h + 3 * N * embed_dim + N * h
        )
        assert ops_mhsa("direct", N, embed_dim, h) == 4 * N**2 * embed_dim + 6 * N**2 * h


@pytest.mark.parametrize("count", [ops_mhsa, entries_mhsa])
@pytest.mark.parametrize("num_tokens", [1, 197, 16385])
def test_more_heads_cost_less_in_efficient_form_and_more_in_direct_form(count, num_tokens: int) -> None:
    heads = (1, 2, 3, 4, 6, 12, 24, 48, 96, 192)
    efficient = [count("efficient", num_tokens, 192, h) for h in heads]
    direct = [count("direct", num_tokens, 192, h) for h in heads]
    assert all(after < before for before, after in itertools.pairwise(efficient))
    assert all(after > before for before, after in itertools.pairwise(direct))


@pytest.mark.parametrize("head_dim", [1, 8, 64])
def test_entries_fall_with_the_heads_at_the_corrected_rate(head_dim: int) -> None:
    """d entries / d h = -2 d^3 - (N + 1) d^2 + N; one printed form of it has a typing error."""
    N, h, step = 197, 6.0, 1e-4
    embed_dim = head_dim * h

    def entries(heads: float) -> float:
        return heads * entries_efficient(N, embed_dim / heads)

    slope = (entries(h + step) - entries(h - step)) / (2 * step)
    assert slope == pytest.approx(-2 * head_dim**3 - (N + 1) * head_dim**2 + N, rel=1e-4)


def test_efficient_form_is_linear_in_tokens_and_cubic_in_head_dim() -> None:
    assert ops_efficient(2000, 64) == 2 * ops_efficient(1000, 64)
    assert ops_efficient(1, 2**14) / ops_efficient(1, 2**13) == pytest.approx(8, rel=1e-3)


def test_errors_quote_the_value() -> None:
    with pytest.raises(ValueError, match=r"packing must be .* got 'half'"):
        quadratic_features(8, "half")
    with pytest.raises(ValueError, match="must divide embed_dim 192, got 5"):
        ops_mhsa("direct", 197, 192, 5)
    with pytest.raises(ValueError, match="got 0"):
        entries_mhsa("direct", 197, 192, 0)
