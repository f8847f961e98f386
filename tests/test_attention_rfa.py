"""RFA: an estimate of softmax(q^ . k^) that improves as m^(-1/2), its random vectors, and what every attention does."""

from __future__ import annotations

import math
from functools import partial

import attention_checks as checks
import pytest
import torch
from attention_checks import heads, relative_error
from torch import Tensor
from torch.nn.functional import normalize

from taylorvit.attention import RFA, check_attention_options
from taylorvit.attention.rfa import SMALLEST_MEAN, rfa_attention


def vectors(m: int, H: int = 2, D: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(H, m, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(q: Tensor, k: Tensor, v: Tensor, m: int = 256, key_mask: Tensor | None = None) -> Tensor:
    return rfa_attention(q, k, v, vectors(m), key_mask=key_mask)


def unit_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with the scores q^ . k^, written out."""
    return (normalize(q, dim=-1) @ normalize(k, dim=-1).mT).softmax(dim=-1) @ v


def test_the_formula_written_out_with_loops() -> None:
    (q, k, v), W = heads(B=1, H=1, N=3), vectors(50, H=1)

    def phi(x: Tensor) -> Tensor:
        return torch.stack([part for w in W[0] for part in (torch.sin(w @ x / x.norm()), torch.cos(w @ x / x.norm()))])

    y = []
    for x in q[0, 0]:
        weights = [phi(x) @ phi(z) for z in k[0, 0]]
        y.append(sum(weight * value for weight, value in zip(weights, v[0, 0])) / sum(weights))
    torch.testing.assert_close(rfa_attention(q, k, v, W)[0, 0], torch.stack(y))


def test_the_error_falls_as_the_root_of_the_features() -> None:
    q, k, v = heads(H=4, N=16, D=8)
    truth = unit_softmax(q, k, v)

    def error(m: int) -> float:
        runs = [rfa_attention(q, k, v, vectors(m, 4, 8, seed)) for seed in range(4)]
        return sum(relative_error(y, truth) ** 2 for y in runs) ** 0.5 / 2

    some, many, most = error(256), error(4096), error(32768)
    assert 3 < some / many < 5.5
    assert 2 < many / most < 4
    assert most < 0.03


def test_independent_draws_for_queries_and_keys_would_be_a_mean() -> None:
    """The property that one shared draw rescues: the weights follow q^ . k^ and not a constant."""
    x, y = torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), torch.tensor([-1.0, 0.0, 0.0, 0.0]).double()
    q = x.expand(1, 1, 1, 4)
    k = torch.stack([x, y])[None, None]
    v = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).double()[None, None]
    near, far = rfa_attention(q.expand(-1, -1, 2, -1), k, v, vectors(100_000, H=1))[0, 0, 0, :2].tolist()
    assert near / far == pytest.approx(math.e**2, rel=0.1)


def test_sigma_is_the_width_of_the_kernel() -> None:
    """exp(-|sigma (q^ - k^)|^2 / 2), per head and dimension."""
    q, k, v = heads(N=6)
    sigma = torch.linspace(0.3, 1.5, 8, dtype=torch.float64).view(2, 1, 4)
    difference = normalize(q, dim=-1).unsqueeze(-2) - normalize(k, dim=-1).unsqueeze(-3)  # (B, H, N, N, D)
    weights = torch.exp(-(sigma.unsqueeze(-2) * difference).square().sum(dim=-1) / 2)
    truth = weights @ v / weights.sum(dim=-1, keepdim=True)
    assert relative_error(rfa_attention(q, k, v, sigma * vectors(100_000)), truth) < 0.03


def test_sigma_learns_head_by_head() -> None:
    attention = checks.build("rfa")
    assert attention.sigma.tolist() == [1.0] * 16
    torch.nn.init.eye_(attention.proj.weight)
    before = attention(checks.tokens())
    with torch.no_grad():
        attention.sigma[4:8] = 3.0
    changed = (attention(checks.tokens()) != before).any(dim=(0, 1))
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 8
    attention(checks.tokens()).square().sum().backward()
    assert (attention.sigma.grad != 0).all()


def test_a_wrong_denominator_is_bounded() -> None:
    """Two features alike, whose cosine makes the kernel of the only key -1."""
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).double().expand(1, 1, 1, 4)
    W = torch.tensor([math.pi / 2, 0.0, 0.0, 0.0]).double().expand(1, 2, 4)
    y = rfa_attention(x, -x, torch.ones_like(x), W)
    torch.testing.assert_close(y, torch.full_like(y, -1 / SMALLEST_MEAN))


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in [*heads(B=1, N=5), vectors(40)]]
    keep = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(rfa_attention, inputs)
    assert torch.autograd.gradcheck(partial(rfa_attention, key_mask=keep), inputs)


def test_a_mask_leaves_keys_out() -> None:
    q, k, v = heads()
    keep = (torch.arange(11) < 7).expand(2, -1)
    wanted = estimate(q, k[:, :, :7], v[:, :, :7])
    torch.testing.assert_close(estimate(q, k, v, key_mask=keep), wanted, rtol=1e-12, atol=1e-12)
    few = vectors(1)  # the bound of the denominator counts the kept keys only
    wanted = rfa_attention(q, k[:, :, :7], v[:, :, :7], few)
    torch.testing.assert_close(rfa_attention(q, k, v, few, key_mask=keep), wanted, rtol=1e-12, atol=1e-12)
    assert (estimate(q, k, v, key_mask=torch.zeros_like(keep)) == 0).all()


def test_training_redraws_and_never_touches_the_buffer() -> None:
    x = checks.tokens()
    fixed, redrawn = checks.build("rfa", redraw=False).train(), checks.build("rfa").train()
    before = redrawn.directions.clone()
    assert torch.equal(fixed(x), fixed(x))
    assert not torch.equal(redrawn(x), redrawn(x))
    assert torch.equal(redrawn.directions, before)
    twice = redrawn(x[:1].expand(2, -1, -1))
    assert torch.equal(twice[0], twice[1])  # one draw for the batch
    assert torch.equal(redrawn.eval()(x), fixed.eval()(x))


def test_the_buffer_is_stored_and_comes_from_the_seed() -> None:
    one, other = checks.build("rfa"), checks.build("rfa", seed=1)
    assert one.state_dict()["directions"].shape == (4, 64, 4)
    assert not torch.equal(one.directions, other.directions)
    assert not torch.equal(one.directions[0], one.directions[1])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(checks.tokens()), other(checks.tokens()))
    assert checks.build("rfa", dtype=torch.bfloat16).directions.dtype == torch.float32


def test_no_weight_decay_on_sigma() -> None:
    """timm takes it for a bias, having one dimension; decay to 0 would make every weight the same."""
    assert checks.build("rfa").sigma.ndim == 1


def test_options_reach_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("taylorvit.attention.rfa.rfa_attention", lambda q, k, v, W, key_mask: given.append(W) or v)
    attention = checks.build("rfa", num_features=7, redraw=False, seed=3)
    with torch.no_grad():
        attention.sigma.copy_(torch.arange(16))
    attention(checks.tokens())
    torch.testing.assert_close(given[0], attention.sigma.view(4, 1, 4) * attention.directions)
    assert attention.directions.shape == (4, 7, 4)
    assert "num_heads=4, num_features=7, redraw=False, seed=3" in repr(attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features must be a whole number of at least 1, got 0"),
        ({"redraw": None}, "redraw must be true or false, got None"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, got 1.5"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options("rfa", options)
    with pytest.raises(ValueError, match=message):
        RFA(16, num_heads=4, **options)


@pytest.mark.parametrize("redraw", [False, True])
def test_samples_do_not_meet(redraw: bool) -> None:
    checks.check_samples_do_not_meet("rfa", redraw=redraw)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    checks.check_half_precision("rfa", dtype, tolerance)


def test_core_is_full_precision() -> None:
    checks.check_core_is_full_precision(estimate)


def test_evaluation_is_deterministic() -> None:
    checks.check_evaluation_is_deterministic("rfa")


def test_building_draws_like_softmax() -> None:
    checks.check_building_draws_like_softmax("rfa")


def test_copies() -> None:
    checks.check_copies("rfa")


def test_compiles() -> None:
    checks.check_compiles("rfa")


def test_a_traced_graph_draws() -> None:
    checks.check_a_traced_graph_draws("rfa")


def test_vision_transformer() -> None:
    checks.check_vision_transformer("rfa")


def test_padding_in_the_sequence_model() -> None:
    checks.check_padding_in_the_sequence_model("rfa", exact=True)


@pytest.mark.parametrize("redraw", [False, True])
def test_resume(redraw: bool) -> None:
    checks.check_resume("rfa", redraw=redraw)
