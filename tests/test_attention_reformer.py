"""Reformer: full attention where two chunks hold all tokens, its hashes, and what every attention does."""

from __future__ import annotations

from functools import partial

import attention_checks as checks
import pytest
import torch
from attention_checks import heads, relative_error
from torch import Tensor
from torch.nn.functional import normalize

from taylorvit.attention import Reformer, check_attention_options
from taylorvit.attention.reformer import SELF_SCORE, draw_rotations, lsh_attention


def rotations(R: int, buckets: int, D: int = 4, seed: int = 7) -> Tensor:
    return torch.randn(R, D, buckets // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_attention(q: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Attention with shared queries and keys, written out: a token attends to itself only where it is alone."""
    scores = q @ normalize(q, dim=-1).mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.eye(q.shape[-2], dtype=torch.bool), SELF_SCORE)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1) @ v


def attention_token_by_token(q: Tensor, k: Tensor, v: Tensor, R: Tensor, b: int, keep: list[bool]) -> Tensor:
    """The definition for one head (N, D), with lists and sets."""
    N, y = len(q), []
    unit = normalize(k, dim=-1)
    reach: list[list[set[int]]] = []
    for rotation in R:
        hashed = torch.cat([unit @ rotation, -unit @ rotation], dim=-1).argmax(dim=-1).tolist()
        order = sorted(range(N), key=lambda j: (not keep[j], hashed[j], j))
        chunks = [order[start : start + b] for start in range(0, N, b)]
        reach.append([{*chunks[c], *chunks[c - 1]} for i in range(N) for c in range(len(chunks)) if i in chunks[c]])
    for i in range(N):
        rounds = []
        for found in reach:
            seen = [j for j in sorted(found[i]) if keep[j] and j != i] or [i]
            scores = unit[seen] @ q[i] / q.shape[-1] ** 0.5 if seen != [i] else torch.full_like(q[0, :1], SELF_SCORE)
            rounds.append((scores.logsumexp(0), scores.softmax(0) @ v[seen]))
        weights = torch.stack([z for z, _ in rounds]).softmax(0)
        y.append(sum(weight * value for weight, (_, value) in zip(weights, rounds)))
    return torch.stack(y)


@pytest.mark.parametrize("num_tokens", [24, 21])
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_token_by_token(num_tokens: int, masked: bool) -> None:
    q, k, v = heads(B=2, H=2, N=num_tokens)
    keep = torch.ones(2, num_tokens, dtype=torch.bool)
    if masked:
        keep[0, ::3] = False
        keep[1, 5:] = False
    R = rotations(3, 6)
    y = lsh_attention(q, k, v, R, bucket_size=4, key_mask=keep if masked else None)
    for sample in range(2):
        kept = keep[sample]
        for head in range(2):
            wanted = attention_token_by_token(q[sample, head], k[sample, head], v[sample, head], R, 4, kept.tolist())
            torch.testing.assert_close(y[sample, head][kept], wanted[kept], rtol=1e-9, atol=1e-9)
    assert y.isfinite().all()


@pytest.mark.parametrize("num_tokens", [16, 13, 8, 3, 1])
def test_two_chunks_are_full_attention(num_tokens: int) -> None:
    """N <= 2 x bucket_size, for any hashes and number of rounds."""
    q, _, v = heads(N=num_tokens)
    for R in (1, 3):
        y = lsh_attention(q, q, v, rotations(R, 4), bucket_size=8)
        torch.testing.assert_close(y, full_attention(q, v), rtol=1e-10, atol=1e-10)


def test_three_chunks_are_not_and_more_rounds_come_nearer() -> None:
    q, _, v = heads(N=64, D=8)
    truth = full_attention(q, v)
    error = [relative_error(lsh_attention(q, q, v, rotations(R, 8, 8), bucket_size=8), truth) for R in (1, 4, 32)]
    assert error[0] > error[1] > error[2] > 0.01


def test_similar_tokens_find_each_other() -> None:
    """Pairs of near twins far apart in the sequence: what hashing is for. A window of the same size would not see them."""
    half = 5 * torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.cat([half, half + 0.01], dim=-2)
    v = torch.eye(64, dtype=torch.float64)[None, None]
    weights = lsh_attention(q, q, v, rotations(8, 16, 8), bucket_size=4)[0, 0]
    twin = (torch.arange(64) + 32) % 64
    assert (weights.argmax(dim=-1) == twin).double().mean() > 0.9


def test_a_mask_is_attention_over_the_kept_keys() -> None:
    q, _, v = heads(N=16)
    keep = torch.arange(16).expand(2, -1) % 3 != 0
    y = lsh_attention(q, q, v, rotations(2, 2), bucket_size=8, key_mask=keep)
    kept = keep[0]
    torch.testing.assert_close(y[:, :, kept], full_attention(q, v, keep)[:, :, kept], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[:, :, kept], full_attention(q[:, :, kept], v[:, :, kept]), rtol=1e-10, atol=1e-10)


def test_a_token_that_is_alone_attends_to_itself() -> None:
    q, k, v = heads()
    keep = (torch.arange(11) == 4).expand(2, -1)
    y = lsh_attention(q, k, v, rotations(2, 4), bucket_size=4, key_mask=keep)
    torch.testing.assert_close(y[:, :, 4], v[:, :, 4])
    assert lsh_attention(q, k, v, rotations(2, 4), bucket_size=4, key_mask=torch.zeros_like(keep)).isfinite().all()


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in heads(B=1, N=9)]
    operation = partial(lsh_attention, rotations=rotations(2, 4), bucket_size=3)
    assert torch.autograd.gradcheck(operation, inputs)
    assert torch.autograd.gradcheck(partial(operation, key_mask=torch.arange(9)[None] % 4 != 1), inputs)


def test_rotations() -> None:
    like = torch.zeros(2, 3, 197, 16, dtype=torch.bfloat16)
    R = draw_rotations(like, 64, 8, 0)
    assert (R.shape, R.dtype) == ((8, 16, 2), torch.float32)
    assert torch.equal(R, draw_rotations(like, 64, 8, 0))
    assert not torch.equal(R, draw_rotations(like, 64, 8, 1))
    assert not torch.equal(draw_rotations(like, 64, 8, None), draw_rotations(like, 64, 8, None))
    assert draw_rotations(like[:, :, :5], 64, 8, 0).shape == (8, 16, 1)
    assert draw_rotations(like[:, :, :129], 64, 8, 0).shape == (8, 16, 2)
    assert abs(float(draw_rotations(like, 1, 8, 0).std()) - 1) < 0.02


def test_queries_and_keys_are_one_projection() -> None:
    attention = checks.build("reformer")
    assert attention.qkv.weight.shape == (32, 16)
    x = checks.tokens()
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    assert torch.equal(q, k)
    q, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in (q, v))
    torch.testing.assert_close(attention(x), attention.proj(full_attention(q, v).transpose(1, 2).flatten(2)))
    with pytest.raises(RuntimeError, match="size mismatch for qkv.weight"):
        attention.load_state_dict(checks.build("softmax").state_dict())


def test_norms_of_queries_and_keys_learn() -> None:
    attention = checks.build("reformer", bucket_size=4, qk_norm=True, norm_layer=torch.nn.LayerNorm)
    attention(checks.tokens()).square().sum().backward()
    assert (attention.q_norm.weight.grad != 0).all()
    assert (attention.k_norm.weight.grad != 0).all()


def test_training_draws_and_evaluation_does_not() -> None:
    attention, x = checks.build("reformer", bucket_size=2, num_hashes=1), checks.tokens()
    assert torch.equal(attention(x), attention(x))
    assert not torch.equal(attention.train()(x), attention(x))
    assert not torch.equal(attention.eval()(x), checks.build("reformer", bucket_size=2, num_hashes=1, seed=1)(x))


def test_options_reach_the_module() -> None:
    attention = checks.build("reformer", bucket_size=5, num_hashes=2, seed=3)
    assert "num_heads=4, bucket_size=5, num_hashes=2, seed=3" in repr(attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_size": 0}, "bucket_size must be a whole number of at least 1, got 0"),
        ({"num_hashes": 0}, "num_hashes must be a whole number of at least 1, got 0"),
        ({"seed": "1"}, "seed must be a whole number of at least 0, got '1'"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options("reformer", options)
    with pytest.raises(ValueError, match=message):
        Reformer(16, num_heads=4, **options)


@pytest.mark.parametrize("bucket_size", [3, 64])
def test_samples_do_not_meet(bucket_size: int) -> None:
    checks.check_samples_do_not_meet("reformer", bucket_size=bucket_size)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """With full attention: rounding to half precision before the hash can send a token to another bucket."""
    checks.check_half_precision("reformer", dtype, tolerance)


def test_core_is_full_precision() -> None:
    checks.check_core_is_full_precision(partial(lsh_attention, rotations=rotations(2, 4), bucket_size=3))


def test_evaluation_is_deterministic() -> None:
    checks.check_evaluation_is_deterministic("reformer", bucket_size=3)


def test_copies() -> None:
    checks.check_copies("reformer", bucket_size=3)


def test_compiles() -> None:
    checks.check_compiles("reformer", bucket_size=3)


def test_a_traced_graph_draws() -> None:
    checks.check_a_traced_graph_draws("reformer", bucket_size=2, num_hashes=1)


def test_vision_transformer() -> None:
    checks.check_vision_transformer("reformer", bucket_size=4)


@pytest.mark.parametrize(("bucket_size", "exact"), [(4, False), (16, True)])
def test_padding_in_the_sequence_model(bucket_size: int, exact: bool) -> None:
    checks.check_padding_in_the_sequence_model("reformer", exact, bucket_size=bucket_size)


def test_resume() -> None:
    checks.check_resume("reformer", bucket_size=2)


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_agrees_with_the_package(num_tokens: int) -> None:
    """reformer-pytorch, where it is installed: one round, as of several its look-back goes from one to the next."""
    package = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    q, _, v = heads(N=num_tokens)
    torch.manual_seed(0)
    wanted, *_ = package.LSHAttention(bucket_size=8, n_hashes=1)(q.flatten(0, 1), v.flatten(0, 1))
    torch.manual_seed(0)
    R = torch.randn(1, 4, num_tokens // 16, dtype=torch.float64)  # what it draws first
    y = lsh_attention(q, q, v, R, bucket_size=8)
    torch.testing.assert_close(y.flatten(0, 1), wanted, rtol=1e-6, atol=1e-6)
