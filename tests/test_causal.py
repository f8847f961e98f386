"""Causal attention: chunked, step by step and as the definition stands are one function, and nobody sees the future."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_checks import relative_error
from torch import Tensor, nn

from taylorvit.attention.causal import CAUSAL_ATTENTIONS, KeyValueCache, build_causal_attention
from taylorvit.ops import causal, reference
from taylorvit.ops.causal import State, causal_attention, monomials, num_features, polynomial_features, prefill, step

each_kind = pytest.mark.parametrize("kind", CAUSAL_ATTENTIONS)
SHAPES = [(2, 3, 23, 5), (1, 1, 1, 4), (1, 2, 16, 1), (1, 1, 40, 8)]


def inputs(B: int = 2, H: int = 3, N: int = 23, D: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw q, k, v of one dtype and a temperature per head, 4 and more, where weights differ by a factor of 25."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return [q, k, v + 1, torch.linspace(4, 6, H, dtype=torch.float64).to(dtype)]


def cut(tensors: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """Return the tokens from start to stop, and the temperature."""
    return [*(x[..., start:stop, :] for x in tensors[:3]), tensors[3]]


def in_steps(tensors: list[Tensor], start: int = 0, state: State | None = None) -> tuple[Tensor, State]:
    """Compute all tokens from `start` on one at a time."""
    B, H, N, D = tensors[0].shape
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    state = state or State(torch.zeros(B, H, num_features(D), D + 1, dtype=dtype), 0)
    return torch.cat([step(*cut(tensors, t, t + 1), state) for t in range(start, N)], dim=-2), state


def test_equals_the_definition() -> None:
    q, k, v, temperature = inputs(1, 1, 7, 3)
    for t in range(1, 8):
        x = temperature * torch.nn.functional.cosine_similarity(q[0, 0, t - 1], k[0, 0, :t], dim=-1)
        w = 1 + x + x**2 / 2
        y = math.sqrt(t / 3) * (w @ v[0, 0, :t]) / w.sum()
        torch.testing.assert_close(causal.direct(q, k, v, temperature)[0, 0, t - 1], y, rtol=1e-12, atol=1e-12)


def test_the_last_token_sees_what_it_sees_without_a_mask() -> None:
    tensors = inputs()
    for t in (1, 9, 23):
        y = reference.direct(*cut(tensors, 0, t))[..., -1, :]
        torch.testing.assert_close(causal.direct(*tensors)[..., t - 1, :], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 8])
def test_features_are_packed_and_their_product_is_the_polynomial(D: int) -> None:
    q, k = torch.randn(2, 6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    assert monomials(k).shape == (6, num_features(D)) == (6, 1 + D + math.comb(D + 1, 2))
    x = (q * k).sum(-1)
    torch.testing.assert_close((polynomial_features(q) * monomials(k)).sum(-1), 1 + x + x**2 / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, 8, 64])
def test_chunks_of_any_size_are_the_definition(shape: tuple[int, int, int, int], chunk_size: int) -> None:
    tensors = inputs(*shape)
    y = causal_attention(*tensors, chunk_size=chunk_size)
    torch.testing.assert_close(y, causal.direct(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_definition(shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    y, state = in_steps(tensors)
    torch.testing.assert_close(y, causal.direct(*tensors), rtol=1e-12, atol=1e-12)
    assert state.num_tokens == shape[2]


@pytest.mark.parametrize("split", [1, 8, 10, 22])
def test_prefill_then_steps_are_steps(split: int) -> None:
    tensors = inputs()
    y, all_steps = in_steps(tensors)
    first, state = prefill(*cut(tensors, 0, split), chunk_size=4)
    rest, state = in_steps(tensors, split, state)
    torch.testing.assert_close(torch.cat([first, rest], dim=-2), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.sums, all_steps.sums, rtol=1e-12, atol=1e-12)


def test_prefill_goes_on_from_a_state_and_leaves_it_alone() -> None:
    tensors = inputs()
    _, state = prefill(*cut(tensors, 0, 9), chunk_size=4)
    before = state.sums.clone()
    rest, after = prefill(*cut(tensors, 9, 23), state=state, chunk_size=4)
    torch.testing.assert_close(rest, causal.direct(*tensors)[..., 9:, :], rtol=1e-12, atol=1e-12)
    assert (state.num_tokens, after.num_tokens) == (9, 23)
    assert torch.equal(state.sums, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [23, 700])
def test_error_budget_against_fp64(dtype: torch.dtype, N: int) -> None:
    """With inputs already rounded: twice the error of the definition in that dtype, and rounding of sums and of the output.

    The features of a small weight are much larger than it is: hence a few roundings of fp32 more than the definition has.
    """
    tensors = inputs(1, 2, N, 8, dtype=dtype)
    exact = causal.direct(*(x.double() for x in tensors))
    rounding = (torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps) * exact.abs().max()
    budget = 2 * (causal.direct(*tensors).double() - exact).abs().max() + rounding
    for y in (causal_attention(*tensors), in_steps(tensors)[0]):
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() <= budget


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 2, 5, 2)]
    assert torch.autograd.gradcheck(lambda *given: causal_attention(*given, chunk_size=2), tensors)


def test_gradients_are_those_of_the_definition() -> None:
    gradients = []
    for attend in (causal.direct, lambda *given: causal_attention(*given, chunk_size=4)):
        tensors = [x.requires_grad_() for x in inputs()]
        y = attend(*tensors)
        gradients.append(torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), tensors))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attend", [causal.direct, lambda *given: causal_attention(*given, chunk_size=4)])
def test_a_token_changes_no_earlier_output(attend: Callable[..., Tensor]) -> None:
    """Not by a bit; and it does change its own and the later ones."""
    tensors = inputs()
    before = attend(*tensors)
    for t in (0, 3, 4, 13, 22):
        changed = [x.clone() for x in tensors]
        for x in changed[:3]:
            x[..., t, :] = 3 - 2 * x[..., t, :]
        after = attend(*changed)
        assert torch.equal(after[..., :t, :], before[..., :t, :])
        assert (after[..., t:, :] != before[..., t:, :]).any(dim=-1).all()


def test_the_state_does_not_grow() -> None:
    sizes = {N: prefill(*inputs(2, 3, N, 4))[1].num_bytes for N in (1, 7, 300)}
    assert set(sizes.values()) == {2 * 3 * 15 * 5 * 8}


def test_the_memory_kept_for_the_backward_pass_is_linear() -> None:
    def kept(N: int, D: int = 4, chunk_size: int = 16) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        tensors = [x.requires_grad_() for x in inputs(1, 1, N, D)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = causal_attention(*tensors, chunk_size=chunk_size)
        del result
        return sum(sizes.values())

    assert kept(1024) < 2.2 * kept(512)
    assert kept(1024) < 1024**2 * 8 / 4  # a quarter of one N x N matrix
    assert kept(128, 32, 64) < 128 * num_features(32) * 8  # no features either


def test_no_tokens_give_an_empty_output() -> None:
    tensors = inputs(2, 3, 0, 4)
    assert causal_attention(*tensors).shape == causal.direct(*tensors).shape == (2, 3, 0, 4)


def test_zero_vectors_give_finite_results() -> None:
    q, k, v, temperature = inputs()
    y = causal_attention(torch.zeros_like(q), k, v, temperature, chunk_size=4)
    scale = (torch.arange(1, 24, dtype=torch.float64) / 5).sqrt()[:, None]
    torch.testing.assert_close(y, scale * v.cumsum(-2) / torch.arange(1, 24)[:, None], rtol=1e-12, atol=1e-12)


def test_errors_quote_what_was_given() -> None:
    q, k, v, temperature = inputs()
    with pytest.raises(ValueError, match="chunk_size must be a whole number above 0, got 0"):
        causal_attention(q, k, v, temperature, chunk_size=0)
    with pytest.raises(ValueError, match=r"k \(2, 3, 4, 5\)"):
        causal_attention(q, k[..., :4, :], v, temperature)
    _, state = prefill(q, k, v, temperature)
    with pytest.raises(ValueError, match=r"one token.*got q \(2, 3, 23, 5\)"):
        step(q, k, v, temperature, state)
    with pytest.raises(ValueError, match=r"sums must be \(2, 3, 15, 5\).*got \(2, 3, 21, 6\)"):
        step(*(x[..., :1, :4] for x in (q, k, v)), temperature, state)


def build(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return build_causal_attention(kind, 12, num_heads=3, dtype=dtype).eval()


def drawn(N: int = 21, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, N, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@each_kind
def test_module_in_parallel_and_in_steps(kind: str) -> None:
    attention, x = build(kind), drawn(70)
    whole = attention(x)
    for split in (1, 16, 66):
        y, state = attention.prefill(x[:, :split], max_length=70)
        rest = [attention.step(x[:, t], state) for t in range(split, 70)]
        torch.testing.assert_close(torch.cat([y, torch.stack(rest, dim=1)], dim=1), whole, rtol=1e-12, atol=1e-12)


@each_kind
def test_module_is_its_definition(kind: str) -> None:
    """Weights written out, one head at a time."""
    attention, x = build(kind), drawn(9)
    q, k, v = attention.qkv(x).reshape(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    if kind == "taylorshift":
        y = causal.direct(q, k, v, attention.temperature)
    else:
        elu = torch.nn.functional.elu
        w = (elu(q) + 1) @ (elu(k) + 1).mT if kind == "linear" else (q @ k.mT / 2).exp()
        w = w.tril()
        y = w @ v / (w.sum(-1, keepdim=True) + (1e-6 if kind == "linear" else 0))
    torch.testing.assert_close(attention(x), attention.proj(y.transpose(1, 2).reshape(2, 9, 12)), rtol=1e-10, atol=1e-12)


@each_kind
def test_module_is_causal_and_samples_do_not_meet(kind: str) -> None:
    attention, x = build(kind), drawn()
    before = attention(x)
    changed = x.clone()
    changed[1] = 5.0
    changed[0, 10] = -1.0
    after = attention(changed)
    assert torch.equal(after[0, :10], before[0, :10])
    assert not torch.equal(after[0, 10:], before[0, 10:])
    changed[0] = x[0]
    assert torch.equal(attention(changed)[0], before[0])


@each_kind
def test_module_trains_every_parameter(kind: str) -> None:
    attention = build(kind)
    attention(drawn()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in attention.parameters())


@each_kind
def test_module_under_autocast_is_finite_and_near(kind: str) -> None:
    attention, x = build(kind, torch.float32), drawn(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
        first, state = attention.prefill(x[:, :20], max_length=40)
        rest = torch.stack([attention.step(x[:, t], state) for t in range(20, 40)], dim=1)
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())
    assert y.dtype == torch.bfloat16
    for result in (y, torch.cat([first, rest], dim=1)):
        assert relative_error(result.float(), attention(x)) < 0.02


@pytest.mark.parametrize("kind", ["taylorshift", "linear"])
def test_autocast_rounds_the_inputs_and_nothing_inside(kind: str) -> None:
    attention = build(kind, torch.float32)
    q, k, v = (x.float() for x in inputs(1, 3, 9, 4)[:3])

    def run(*given: Tensor) -> list[Tensor]:
        first, state = attention._prefill(*(x[..., :8, :] for x in given), 9)
        return [attention._attend(*given), first, attention._step(*(x[..., 8:, :] for x in given), state), state.sums]

    with torch.no_grad():
        plain = run(q.bfloat16(), k.bfloat16(), v.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(q, k, v)
    assert [x.dtype for x in cast] == [torch.bfloat16] * 3 + [torch.float32]
    assert all(map(torch.equal, plain, cast))


@each_kind
def test_state_sizes(kind: str) -> None:
    attention = build(kind, torch.float32)
    sizes = [attention.prefill(drawn(N, torch.float32), max_length=40)[1].num_bytes for N in (5, 40)]
    floats = {"taylorshift": [2 * 3 * 15 * 5] * 2, "linear": [2 * 3 * 4 * 5] * 2, "softmax": [2 * 2 * 12 * N for N in (5, 40)]}
    assert sizes == [4 * number for number in floats[kind]]


def test_a_full_cache_says_so() -> None:
    attention, x = build("softmax"), drawn(6)
    _, state = attention.prefill(x[:, :5], max_length=5)
    assert isinstance(state, KeyValueCache)
    with pytest.raises(ValueError, match="cache holds 5 tokens"):
        attention.step(x[:, 5], state)
    with pytest.raises(ValueError, match="max_length must be at least 6, got 5"):
        attention.prefill(x, max_length=5)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="attention must be one of taylorshift, linear, softmax, got 'eva'"):
        build_causal_attention("eva", 12)
