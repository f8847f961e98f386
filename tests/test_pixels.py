"""The causal pixel model: parallel and recurrent logits are one function, and sampling draws from what training learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from taylorvit.attention.causal import CAUSAL_ATTENTIONS
from taylorvit.models.pixels import PixelModel, bits_per_pixel, sample

each_kind = pytest.mark.parametrize("kind", CAUSAL_ATTENTIONS)
N, K = 20, 6


def build(kind: str = "taylorshift", seed: int = 0, **sizes: int) -> PixelModel:
    """A model whose logits are not the zeros that a new one starts with, and whose attention has work to do."""
    torch.manual_seed(seed)
    model = PixelModel(K, N, attention=kind, **{"embed_dim": 24, "depth": 2, "num_heads": 3, **sizes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(B: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(K, (B, N), generator=torch.Generator().manual_seed(seed))


@each_kind
@pytest.mark.parametrize("given", [0, 1, 11, N - 1])
def test_recurrent_logits_are_the_parallel_ones(kind: str, given: int) -> None:
    model, levels = build(kind), images()
    parallel = model(levels)
    logits, state = model.prefill(levels[:, :given])
    assert parallel.std() > 0.3
    assert (logits - parallel[:, given]).abs().max() < 1e-4
    for t in range(given, N - 1):
        logits = model.step(levels[:, t], state)
        assert (logits - parallel[:, t + 1]).abs().max() < 1e-4


@each_kind
def test_a_pixel_changes_the_logits_of_later_pixels_only(kind: str) -> None:
    model, levels = build(kind), images()
    before = model(levels)
    for t in (0, 7, N - 1):
        changed = levels.clone()
        changed[:, t] = (levels[:, t] + 1) % K
        after = model(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert (after[:, t + 1 :] != before[:, t + 1 :]).any(dim=-1).all()


def test_a_new_model_knows_nothing() -> None:
    model = PixelModel(K, N, embed_dim=24, num_heads=3)
    assert bits_per_pixel(model, images()).item() == pytest.approx(math.log2(K), abs=1e-6)


def test_bits_are_those_of_the_chain_rule() -> None:
    model, levels = build(), images(2)
    total = 0.0
    for t in range(N):
        logits, _ = model.prefill(levels[:, :t])
        total -= logits.log_softmax(-1).gather(1, levels[:, t : t + 1]).sum().item() / math.log(2)
    assert bits_per_pixel(model, levels).item() == pytest.approx(total / (2 * N), rel=1e-5)


@each_kind
def test_it_learns(kind: str) -> None:
    """Images that count upwards from a random first level: log2(6) bits for the first pixel and none for the others."""
    torch.manual_seed(0)
    model = PixelModel(K, N, attention=kind, embed_dim=24, depth=1, num_heads=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in range(60):
        levels = (images(16, seed=number)[:, :1] + torch.arange(N)) % K
        loss = bits_per_pixel(model, levels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2 * math.log2(K) / N
    drawn = sample(model, torch.empty(8, 0, dtype=torch.int64), temperature=0.1)
    assert ((drawn[:, 1:] - drawn[:, :-1]) % K == 1).float().mean() > 0.95


@each_kind
def test_the_seed_decides_the_images(kind: str) -> None:
    model, given = build(kind), torch.empty(4, 0, dtype=torch.int64)
    first, again, other = (sample(model, given, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, N)
    assert first.min() >= 0
    assert first.max() < K


@each_kind
def test_samples_follow_the_probabilities(kind: str) -> None:
    """2,000 draws of the pixel after three given ones: each level as often as its logit says, within 4 deviations."""
    model, given = build(kind), images(1)[:, :3].expand(2000, -1)
    for temperature in (1.0, 2.5):
        probabilities = (model.prefill(given[:1])[0][0] / temperature).softmax(-1)
        drawn = sample(model, given, temperature=temperature, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn[:, :3], given)
        share = drawn[:, 3].bincount(minlength=K) / 2000
        assert ((share - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 2000).sqrt()).all()


def test_cold_sampling_takes_the_most_probable_level_every_time() -> None:
    model, given = build(), images(2)[:, :4]
    drawn = sample(model, given, temperature=1e-4)
    assert torch.equal(model(drawn).argmax(-1)[:, 4:], drawn[:, 4:])


@pytest.mark.parametrize(("kind", "grows"), [("taylorshift", False), ("linear", False), ("softmax", True)])
def test_only_the_cache_of_softmax_grows(kind: str, grows: bool) -> None:
    model, levels = build(kind), images()
    _, state = model.prefill(levels[:, :2])
    size = state.num_bytes
    for t in range(2, N - 1):
        model.step(levels[:, t], state)
    assert state.num_bytes == (size * N // 3 if grows else size)


def test_errors_quote_what_was_given() -> None:
    model, levels = build(), images()
    with pytest.raises(ValueError, match=r"int64 \(B, 20\), got torch.int64 \(3, 19\)"):
        model(levels[:, 1:])
    with pytest.raises(ValueError, match=r"\(B, 0 to 19\), got torch.int64 \(3, 20\)"):
        model.prefill(levels)
    _, state = model.prefill(levels[:, :-1])
    with pytest.raises(ValueError, match="num_pixels 20: none is left after 20"):
        model.step(levels[:, -1], state)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        sample(model, levels[:, :3], temperature=0)
    with pytest.raises(ValueError, match="attention must be one of"):
        PixelModel(K, N, attention="reformer")
