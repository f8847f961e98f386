"""Performer: an estimate of softmax attention that improves as m^(-1/2), its random vectors, and what every attention does."""

from __future__ import annotations

from functools import partial

import attention_checks as checks
import pytest
import torch
from attention_checks import heads, relative_error, softmax_attention
from torch import Tensor

from taylorvit.attention import Performer, check_attention_options
from taylorvit.attention.performer import draw_projection, performer_attention


def vectors(m: int, H: int = 2, D: int = 4, seed: int = 0) -> Tensor:
    return draw_projection(torch.empty(H, 1, D, dtype=torch.float64), m, torch.Generator().manual_seed(seed))


def estimate(q: Tensor, k: Tensor, v: Tensor, m: int = 32, eps: float = 1e-4, key_mask: Tensor | None = None) -> Tensor:
    return performer_attention(q, k, v, vectors(m), eps=eps, key_mask=key_mask)


def test_the_formula_written_out_with_loops() -> None:
    """As the FAVOR+ paper's code computes it, feature by feature."""
    (q, k, v), W, eps = heads(B=1, H=1, N=3), vectors(5, H=1), 1e-3
    scaled_q, scaled_k = q[0, 0] / 4**0.25, k[0, 0] / 4**0.25
    largest = max(float(w @ x) for w in W[0] for x in scaled_k)
    y = []
    for x in scaled_q:
        own = max(float(w @ x) for w in W[0])
        phi = [torch.exp(w @ x - x @ x / 2 - own) + eps for w in W[0]]
        weights = [sum(f * (torch.exp(w @ z - z @ z / 2 - largest) + eps) for f, w in zip(phi, W[0])) for z in scaled_k]
        y.append(sum(weight * value for weight, value in zip(weights, v[0, 0])) / sum(weights))
    louder = torch.cat([k, 5 * k], dim=1)  # another head, whose keys have nothing to do with this one's maximum
    y_of_two = performer_attention(q.expand_as(louder), louder, v.expand_as(louder), W.expand(2, -1, -1), eps=eps)
    torch.testing.assert_close(y_of_two[0, 0], torch.stack(y))


def test_the_error_falls_as_the_root_of_the_features() -> None:
    """Short inputs: for long ones a correct estimate has a floor."""
    q, k, v = heads(H=4, N=64, D=16, scale=0.3)
    truth = softmax_attention(q, k, v)

    def error(m: int) -> float:
        runs = [performer_attention(q, k, v, vectors(m, 4, 16, seed), eps=1e-6) for seed in range(4)]
        return sum(relative_error(y, truth) ** 2 for y in runs) ** 0.5 / 2

    few, some, many = error(16), error(256), error(4096)
    assert 3 < few / some < 5.5
    assert 3 < some / many < 5.5
    assert many < 0.02


def test_eps_is_a_bias_towards_the_mean() -> None:
    q, k, v = heads(N=64, D=16, scale=2.0)
    mean = v.mean(dim=-2, keepdim=True).expand_as(v)
    W = vectors(256, 2, 16)
    distance = [relative_error(performer_attention(q, k, v, W, eps=eps), mean) for eps in (1e-6, 1e-3, 10.0)]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 0.01


def test_the_estimate_of_the_kernel_has_no_bias() -> None:
    """exp(x . y) is the mean over the draws: needs directions without preference and lengths of Gaussian vectors."""
    x, y = torch.tensor([0.9, -0.3, 0.4]).double(), torch.tensor([0.5, 0.6, -0.2]).double()
    W = vectors(3 * 60_000, H=1, D=3)[0]
    for left, right in ((x, y), (-x, y), (-x, -y), (x, -y)):
        exponents = W @ (left + right) - (left @ left + right @ right) / 2
        torch.testing.assert_close(exponents.exp().mean(), (left @ right).exp(), rtol=0.02, atol=0)
    assert W.mean(dim=0).abs().max() < 0.01
    torch.testing.assert_close(W.T.cov(), torch.eye(3).double(), rtol=0, atol=0.02)


def test_vectors_are_orthogonal_in_blocks_and_differ_between_heads() -> None:
    W = vectors(10)
    assert W.shape == (2, 10, 4)
    for start in (0, 4, 8):
        block = W[:, start : start + 4]
        gram = block @ block.mT
        torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-12)
    assert not torch.allclose(W[0], W[1])
    assert not torch.allclose(W[:, :4], W[:, 4:8])


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in heads(B=1, N=5)]
    keep = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(partial(estimate, m=6, eps=1e-2), inputs)
    assert torch.autograd.gradcheck(partial(estimate, m=6, eps=1e-2, key_mask=keep), inputs)


def test_a_mask_leaves_keys_out_of_the_sums_and_of_the_maximum() -> None:
    q, k, v = heads()
    k[:, :, 7:] *= 20  # would be the maximum, and push all other features below eps
    keep = (torch.arange(11) < 7).expand(2, -1)
    wanted = estimate(q, k[:, :, :7], v[:, :, :7], eps=1e-2)
    torch.testing.assert_close(estimate(q, k, v, eps=1e-2, key_mask=keep), wanted, rtol=1e-12, atol=1e-12)


def test_long_inputs_stay_finite() -> None:
    q, k, v = (x.float().requires_grad_() for x in heads(scale=100.0))
    y = estimate(q, k, v)
    y.sum().backward()
    assert all(x.isfinite().all() for x in (y, q.grad, k.grad, v.grad))


def test_training_draws_only_when_asked_and_never_touches_the_buffer() -> None:
    x = checks.tokens()
    fixed, redrawn = checks.build("performer").train(), checks.build("performer", redraw=True).train()
    before = redrawn.projection.clone()
    assert torch.equal(fixed(x), fixed(x))
    assert torch.equal(fixed(x), fixed.eval()(x))
    assert not torch.equal(redrawn(x), redrawn(x))
    assert torch.equal(redrawn.projection, before)
    assert torch.equal(redrawn.eval()(x), fixed(x))


def test_the_buffer_is_stored_and_comes_from_the_seed() -> None:
    one, other = checks.build("performer"), checks.build("performer", seed=1)
    assert one.state_dict()["projection"].shape == (4, 128, 4)
    assert not torch.equal(one.projection, other.projection)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(checks.tokens()), other(checks.tokens()))
    assert checks.build("performer", dtype=torch.bfloat16).projection.dtype == torch.float32


def test_options_reach_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def operation(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, **rest: object) -> Tensor:
        given.update(rest, m=projection.shape[1])
        return v

    monkeypatch.setattr("taylorvit.attention.performer.performer_attention", operation)
    attention = checks.build("performer", num_features=7, eps=0.5)
    attention(checks.tokens())
    assert given == {"m": 7, "eps": 0.5, "key_mask": None}
    assert "num_heads=4, num_features=7, redraw=False, eps=0.5, seed=0" in repr(attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features must be a whole number of at least 1, got 0"),
        ({"num_features": 2.5}, "num_features must be a whole number of at least 1, got 2.5"),
        ({"num_features": True}, "got True"),
        ({"redraw": 1}, "redraw must be true or false, got 1"),
        ({"eps": -1e-4}, "eps must be a finite number, 0 or more, got -0.0001"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": "0"}, "got '0'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options("performer", options)
    with pytest.raises(ValueError, match=message):
        Performer(16, num_heads=4, **options)


@pytest.mark.parametrize("redraw", [False, True])
def test_samples_do_not_meet(redraw: bool) -> None:
    checks.check_samples_do_not_meet("performer", redraw=redraw)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    checks.check_half_precision("performer", dtype, tolerance)


def test_core_is_full_precision() -> None:
    checks.check_core_is_full_precision(estimate)


def test_evaluation_is_deterministic() -> None:
    checks.check_evaluation_is_deterministic("performer", redraw=True)


def test_building_draws_like_softmax() -> None:
    checks.check_building_draws_like_softmax("performer")


def test_copies() -> None:
    checks.check_copies("performer")


@pytest.mark.parametrize("redraw", [False, True])
def test_compiles(redraw: bool) -> None:
    checks.check_compiles("performer", redraw=redraw)


def test_a_traced_graph_draws() -> None:
    checks.check_a_traced_graph_draws("performer", redraw=True)


@pytest.mark.parametrize("redraw", [False, True])
def test_vision_transformer(redraw: bool) -> None:
    checks.check_vision_transformer("performer", redraw=redraw)


def test_padding_in_the_sequence_model() -> None:
    checks.check_padding_in_the_sequence_model("performer", exact=True)


@pytest.mark.parametrize("redraw", [False, True])
def test_resume(redraw: bool) -> None:
    checks.check_resume("performer", redraw=redraw)


def test_agrees_with_the_package() -> None:
    """performer-pytorch, where it is installed: the same vectors for all heads."""
    package = pytest.importorskip("performer_pytorch.performer_pytorch")
    q, k, v = heads()
    W = vectors(32)[:1]
    features = partial(package.softmax_kernel, projection_matrix=W[0])
    wanted = package.linear_attention(features(q, is_query=True), features(k, is_query=False), v)
    torch.testing.assert_close(performer_attention(q, k, v, W, eps=1e-4), wanted, rtol=1e-6, atol=1e-6)
