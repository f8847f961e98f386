"""EVA: windows and summaries as defined, softmax attention in the limit, and what every attention does."""

from __future__ import annotations

from functools import partial

import attention_checks as checks
import pytest
import torch
from attention_checks import heads, softmax_attention
from torch import Tensor

from taylorvit.attention import EVA, check_attention_options
from taylorvit.attention.eva import Landmarks, eva_attention


def landmarks(D: int = 4, seed: int = 7) -> Landmarks:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((D, D), (D,), (D, D), (D,))
    a, b, c, d = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return a, b, c, d


small = partial(eva_attention, landmarks=landmarks(), window_size=3, overlap=1, num_landmarks=3)


def members(N: int, size: int, overlap: int) -> list[list[int]]:
    """The tokens of each window or chunk, those of the overlap with them."""
    return [[j for j in range(N) if start - overlap <= j < start + size + overlap] for start in range(0, N, size)]


def attention_token_by_token(q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int, int], keep: list[bool]) -> Tensor:
    """The definition for one head (N, D), in lists; `size` is of windows, overlap and chunks."""
    (N, D), (window, overlap, chunk) = q.shape, size
    A_q, b_q, A_k, b_k = landmarks(D)
    summaries = []
    for all_of_it in members(N, chunk, overlap):
        E = [j for j in all_of_it if keep[j]]
        if E:
            key = A_k @ k[E].mean(dim=0) + b_k
            omega = (A_q @ q[E].mean(dim=0) + b_q + key) / 2
            weights = ((k[E] @ omega - k[E].square().sum(dim=-1) / 2) / D**0.5).softmax(dim=0)
            summaries.append((key, weights @ v[E]))
    y = []
    for i in range(N):
        J = [j for j in members(N, window, overlap)[i // window] if keep[j]]
        others = torch.stack([*k[J], *(key for key, _ in summaries)])
        weights = (others @ q[i] / D**0.5).softmax(dim=0)
        y.append(weights @ torch.stack([*v[J], *(value for _, value in summaries)]))
    return torch.stack(y)


@pytest.mark.parametrize("num_tokens", [12, 11, 5, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_token_by_token(num_tokens: int, masked: bool) -> None:
    q, k, v = heads(N=num_tokens)
    keep = torch.ones(2, num_tokens, dtype=torch.bool)
    if masked:
        keep[0, 1::3] = False
        keep[1, 4:] = False
    y = small(q, k, v, key_mask=keep if masked else None)
    size = (3, 1, max(1, num_tokens // 3))
    for sample in range(2):
        for head in range(2):
            wanted = attention_token_by_token(q[sample, head], k[sample, head], v[sample, head], size, keep[sample].tolist())
            torch.testing.assert_close(y[sample, head], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("window_size", "overlap"), [(11, 0), (16, 0), (11, 3), (1, 10)])
def test_a_window_over_all_tokens_without_landmarks_is_softmax(window_size: int, overlap: int) -> None:
    q, k, v = heads()
    settings = {"window_size": window_size, "overlap": overlap, "num_landmarks": 0}
    torch.testing.assert_close(eva_attention(q, k, v, None, **settings), softmax_attention(q, k, v))
    keep = torch.arange(11).expand(2, -1) % 3 != 0
    y = eva_attention(q, k, v, None, **settings, key_mask=keep)
    torch.testing.assert_close(y, softmax_attention(q, k, v, keep))
    kept = keep[0]
    torch.testing.assert_close(y[:, :, kept], softmax_attention(q[:, :, kept], k[:, :, kept], v[:, :, kept]))


def test_landmarks_reach_beyond_the_window() -> None:
    q, k, v = heads(N=12)
    far = v.clone()
    far[:, :, 11] += 100.0
    assert not torch.allclose(small(q, k, far)[:, :, 0], small(q, k, v)[:, :, 0])
    without = partial(eva_attention, landmarks=None, window_size=3, overlap=1, num_landmarks=0)
    assert torch.equal(without(q, k, far)[:, :, 0], without(q, k, v)[:, :, 0])


def test_a_sample_is_a_normal_step_away_from_the_mean() -> None:
    """The keys of the chunk are a basis: the log-weights of a summary give omega back."""
    N = D = 4
    k = torch.eye(N, dtype=torch.float64).expand(500, 2, N, D) * 3
    identity = (
        torch.zeros(D, D).double(),
        torch.full((D,), -20.0).double(),
        torch.zeros(D, D).double(),
        torch.full((D,), 20.0).double(),
    )
    v = torch.eye(N, dtype=torch.float64).expand_as(k)
    far = torch.ones_like(k) * 10  # all weight to the summary, whose key is 20 everywhere
    torch.manual_seed(0)
    y = eva_attention(far, k, v, identity, window_size=1, overlap=0, num_landmarks=1, sample=True)
    steps = y[:, :, 0].log() * D**0.5 / 3  # (500, 2, D): omega up to what its softmax hides
    contrasts = steps[..., 1:] - steps[..., :1]
    assert contrasts.mean().abs() < 0.1
    assert abs(float(contrasts.var()) - 2) < 0.2


def test_training_samples_and_evaluation_does_not() -> None:
    attention, x = checks.build("eva", num_landmarks=3), checks.tokens()
    assert torch.equal(attention(x), attention(x))
    assert not torch.equal(attention.train()(x), attention(x))
    local = checks.build("eva", num_landmarks=0).train()
    assert torch.equal(local(x), local(x))


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in [*heads(B=1, N=7), *landmarks()]]

    def operation(q: Tensor, k: Tensor, v: Tensor, *maps: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return eva_attention(q, k, v, maps, window_size=3, overlap=1, num_landmarks=3, key_mask=key_mask)

    assert torch.autograd.gradcheck(operation, inputs)
    assert torch.autograd.gradcheck(partial(operation, key_mask=torch.arange(7)[None] % 4 != 1), inputs)


def test_no_key_at_all_is_finite() -> None:
    q, k, v = heads()
    assert small(q, k, v, key_mask=torch.zeros(2, 11, dtype=torch.bool)).isfinite().all()


def test_parameters() -> None:
    attention = checks.build("eva")
    extra = attention.state_dict().keys() - checks.build("softmax").state_dict().keys()
    assert extra == {f"landmark_{x}_{part}" for x in "qk" for part in ("weight", "bias")}
    assert not torch.equal(attention.landmark_q_weight, attention.landmark_k_weight)
    assert 0.01 < attention.landmark_k_weight.std() < 0.03
    assert (attention.landmark_k_bias == 0).all()
    assert not torch.equal(checks.build("eva", seed=1).landmark_q_weight, attention.landmark_q_weight)
    attention(checks.tokens()).square().sum().backward()
    assert all((attention.get_parameter(name).grad != 0).any() for name in extra)
    without = checks.build("eva", num_landmarks=0)
    assert without.state_dict().keys() == checks.build("softmax").state_dict().keys()
    assert without(checks.tokens()).isfinite().all()


def test_options_reach_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def operation(q: Tensor, k: Tensor, v: Tensor, maps: Landmarks, **rest: object) -> Tensor:
        given.update(rest)
        return v

    monkeypatch.setattr("taylorvit.attention.eva.eva_attention", operation)
    attention = checks.build("eva", window_size=5, overlap=2, num_landmarks=7, seed=1)
    attention(checks.tokens())
    assert given == {"window_size": 5, "overlap": 2, "num_landmarks": 7, "sample": False, "key_mask": None}
    assert "num_heads=4, window_size=5, overlap=2, num_landmarks=7, seed=1" in repr(attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size must be a whole number of at least 1, got 0"),
        ({"overlap": -1}, "overlap must be a whole number of at least 0, got -1"),
        ({"num_landmarks": 4.0}, "num_landmarks must be a whole number of at least 0, got 4.0"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options("eva", options)
    with pytest.raises(ValueError, match=message):
        EVA(16, num_heads=4, **options)


def test_samples_do_not_meet() -> None:
    checks.check_samples_do_not_meet("eva", num_landmarks=3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    checks.check_half_precision("eva", dtype, tolerance, num_landmarks=3)


def test_core_is_full_precision() -> None:
    checks.check_core_is_full_precision(small)


def test_evaluation_is_deterministic() -> None:
    checks.check_evaluation_is_deterministic("eva")


def test_building_draws_like_softmax() -> None:
    checks.check_building_draws_like_softmax("eva")


def test_copies() -> None:
    checks.check_copies("eva")


def test_compiles() -> None:
    checks.check_compiles("eva", num_landmarks=3)


def test_a_traced_graph_draws() -> None:
    checks.check_a_traced_graph_draws("eva", num_landmarks=3)


def test_vision_transformer() -> None:
    checks.check_vision_transformer("eva", num_landmarks=3)


def test_padding_in_the_sequence_model() -> None:
    checks.check_padding_in_the_sequence_model("eva", exact=False, num_landmarks=3)
    checks.check_padding_in_the_sequence_model("eva", exact=True, num_landmarks=0)


def test_resume() -> None:
    checks.check_resume("eva", num_landmarks=3)
