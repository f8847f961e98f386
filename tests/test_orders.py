"""Taylor polynomials of other orders: both forms against each other and the reference, and what their docstring claims."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from taylorvit.complexity import ops_direct
from taylorvit.ops import orders, reference
from taylorvit.ops.orders import ORDERS, direct, efficient, inverse_factorials, monomials, num_features, taylor_polynomial

each_order = pytest.mark.parametrize("order", ORDERS)
EVEN, ODD = ORDERS[1::2], ORDERS[::2]
# The zero of e_(k-1), where e_k of even k is smallest and e_(k-1) of odd k - 1 changes its sign.
ZEROS = {1: -1.0, 3: -1.5960716, 5: -2.1806071}


def inputs(B: int = 2, H: int = 3, N: int = 11, D: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw q, k, v of one dtype and a temperature per head below 1, so that odd orders are far from dividing by 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return [q, k, v, torch.linspace(0.3, 0.9, H, dtype=torch.float64).to(dtype)]


@each_order
@pytest.mark.parametrize("shape", [(2, 3, 11, 5), (1, 1, 1, 4), (1, 2, 4, 1), (1, 1, 30, 8)], ids=str)
def test_both_forms_are_one_function(order: int, shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    torch.testing.assert_close(efficient(*tensors, order), direct(*tensors, order), rtol=1e-12, atol=1e-12)


@each_order
def test_equals_the_definition(order: int) -> None:
    q, k, v, temperature = inputs(1, 1, 7, 3)
    x = temperature * torch.nn.functional.cosine_similarity(q[0, 0, :, None], k[0, 0, None], dim=-1)
    w = sum(x**m / math.factorial(m) for m in range(order + 1))
    torch.testing.assert_close(direct(q, k, v, temperature, order)[0, 0], math.sqrt(7 / 3) * (w @ v[0, 0]) / w.sum(-1)[:, None])


@pytest.mark.parametrize("form", ["direct", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_order_2_is_taylorshift(form: str, dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    y = orders.order_attention(*tensors, order=2, form=form)
    assert y.dtype == dtype
    torch.testing.assert_close(y, getattr(reference, form)(*tensors))


@pytest.mark.parametrize("form", [direct, efficient])
@each_order
def test_gradients(form, order: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 2, 4, 3)]
    assert torch.autograd.gradcheck(lambda *given: form(*given, order), tensors)


@each_order
@pytest.mark.parametrize("head_dim", [1, 2, 5])
def test_monomials_make_powers_of_the_scalar_product(head_dim: int, order: int) -> None:
    q, k = torch.randn(2, 6, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = list(zip(monomials(q, order), monomials(k, order)))
    assert len(products) == order
    for degree, (of_q, of_k) in enumerate(products, start=1):
        weights = math.factorial(degree) * torch.tensor(inverse_factorials(head_dim, degree), dtype=torch.float64)
        assert of_q.shape == (6, math.comb(head_dim + degree - 1, degree))
        torch.testing.assert_close((weights * of_q) @ of_k.mT, (q @ k.mT) ** degree)
    assert 1 + sum(of_q.shape[-1] for of_q, _ in products) == num_features(head_dim, order)


def test_monomials_come_in_the_order_of_combinations() -> None:
    x = torch.tensor([2.0, 3.0, 5.0, 7.0])
    for degree, products in enumerate(monomials(x, 4), start=1):
        entries = itertools.combinations_with_replacement(x.tolist(), degree)
        assert products.tolist() == [math.prod(some) for some in entries]


@pytest.mark.parametrize("order", EVEN)
def test_even_orders_are_positive_and_smallest_where_the_order_below_is_zero(order: int) -> None:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    w = taylor_polynomial(x, order)
    zero = ZEROS[order - 1]
    assert x[w.argmin()] == pytest.approx(zero, abs=1e-3)
    assert w.min().item() == pytest.approx(zero**order / math.factorial(order), rel=1e-6)


@pytest.mark.parametrize("order", ODD)
def test_odd_orders_rise_through_one_zero(order: int) -> None:
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    w = taylor_polynomial(x, order)
    assert (w.diff() > 0).all()
    assert torch.equal(w > 0, x > ZEROS[order])


def test_higher_orders_approach_softmax() -> None:
    q, k, v, temperature = inputs(N=30)
    x = temperature[:, None, None] * reference.unit_vectors(q) @ reference.unit_vectors(k).mT
    wanted = math.sqrt(30 / 5) * x.softmax(dim=-1) @ v
    errors = [(direct(q, k, v, temperature, order) - wanted).abs().max().item() for order in ORDERS]
    assert all(after < before / 3 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-4


@each_order
def test_rows_of_the_matrix_sum_to_one(order: int) -> None:
    q, k, v, temperature = inputs()
    matrix = orders.order_attention_weights(q, k, temperature, order=order)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix.sum(-1)))
    torch.testing.assert_close(math.sqrt(11 / 5) * matrix @ v, direct(q, k, v, temperature, order))


@pytest.mark.parametrize("form", [direct, efficient])
@each_order
def test_a_key_mask_leaves_keys_out(form, order: int) -> None:
    """Each sample attends to the keys it keeps as if there were no others."""
    q, k, v, temperature = inputs()
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    y = form(q, k, v, temperature, order, mask)
    for b in range(2):
        kept = mask[b]
        x = temperature[:, None, None] * reference.unit_vectors(q[b]) @ reference.unit_vectors(k[b, :, kept]).mT
        w = taylor_polynomial(x, order)
        wanted = math.sqrt(int(kept.sum()) / 5) * (w @ v[b, :, kept]) / w.sum(-1, keepdim=True)
        torch.testing.assert_close(y[b], wanted)


def test_single_precision_keeps_to_its_budget() -> None:
    single = inputs(N=200, D=8, dtype=torch.float32)
    exact = direct(*(x.double() for x in single), 4)
    budget = 2 * (direct(*single, 4) - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (efficient(*single, 4) - exact).abs().max() <= budget


def test_operations() -> None:
    assert [orders.ops_direct(N, 64, 2) for N in (197, 1000)] == [ops_direct(N, 64) for N in (197, 1000)]
    assert [num_features(16, order) for order in ORDERS] == [17, 153, 969, 4845, 20349, 74613]
    for order, head_dim in itertools.product(ORDERS, (4, 16, 64)):
        where = orders.crossover(head_dim, order)
        for num_tokens, ahead in ((math.floor(where), False), (math.floor(where) + 1, True)):
            operations = orders.ops_efficient(num_tokens, head_dim, order)
            assert (operations < orders.ops_direct(num_tokens, head_dim, order)) is ahead


@pytest.mark.parametrize("form", [direct, efficient])
@pytest.mark.parametrize("order", [0, 7, -2, 2.0, True, "2", None])
def test_unknown_orders_are_refused(form, order: object) -> None:
    with pytest.raises(ValueError, match="order must be one of 1, 2, 3, 4, 5, 6, got"):
        form(*inputs(), order)


def test_too_many_features_and_unknown_forms_are_refused() -> None:
    q = torch.zeros(1, 1, 2, 64)
    with pytest.raises(ValueError, match="order 4 has 814,385 features at head dimension 64, more than 65,536: take form 'dir"):
        efficient(q, q, q, torch.ones(1), 4)
    with pytest.raises(ValueError, match="form must be one of direct, efficient, got 'auto'"):
        orders.order_attention(q, q, q, torch.ones(1), order=2, form="auto")
    with pytest.raises(ValueError, match=r"temperature must have shape \(1,\)"):
        orders.order_attention(q, q, q, torch.ones(2), order=2)
    with pytest.raises(ValueError, match="key_mask must be torch.bool"):
        orders.order_attention(q, q, q, torch.ones(1), order=2, key_mask=torch.ones(1, 2))
