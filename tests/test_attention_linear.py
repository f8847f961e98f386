"""Linear attention: its kernel written out, what moves with the tokens, small and large features, and what every one does."""

from __future__ import annotations

import attention_checks as checks
import pytest
import torch
from attention_checks import heads, relative_error
from torch import Tensor
from torch.nn.functional import elu

from taylorvit.attention import LinearAttention, check_attention_options
from taylorvit.attention.linear import EPS, linear_attention
from taylorvit.models import SequenceEncoder


def kernel_matrix(q: Tensor, k: Tensor) -> Tensor:
    """The weights (B, H, N, N), not yet divided by their sums, pair by pair."""
    return ((elu(q)[..., :, None, :] + 1) * (elu(k)[..., None, :, :] + 1)).sum(dim=-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_it_is_the_kernel_matrix_with_normalised_rows(scale: float) -> None:
    q, k, v = heads(scale=scale)
    weights = kernel_matrix(q, k)
    wanted = weights @ v / (weights.sum(dim=-1, keepdim=True) + EPS)
    torch.testing.assert_close(linear_attention(q, k, v), wanted, rtol=1e-12, atol=1e-12)


def test_equal_keys_give_the_mean_of_the_values() -> None:
    q, k, v = heads()
    mean = v.mean(dim=-2, keepdim=True).expand_as(v)
    torch.testing.assert_close(linear_attention(q, k[..., :1, :].expand_as(k), v), mean, rtol=1e-5, atol=1e-5)


def test_permuted_tokens_give_the_permuted_output() -> None:
    q, k, v = heads()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    y = linear_attention(*(x[..., order, :] for x in (q, k, v)))
    torch.testing.assert_close(y, linear_attention(q, k, v)[..., order, :])


def test_small_features_keep_their_digits_and_eps_takes_over_below() -> None:
    """In fp32 elu(x) + 1 is 0 from x = -17 on; exp(x) is not. With eps of the same size as the sum half of the mean is left."""
    q, k, v = (x.float() for x in heads())
    q, k = q.abs() * 0, k - 12  # phi(q) = 1, phi(k) about 6e-6
    v = torch.ones_like(v)
    total = k.double().exp().sum(dim=(-2, -1))[..., None, None]
    torch.testing.assert_close(linear_attention(q, k, v).double(), (total / (total + EPS)).expand_as(v), rtol=1e-5, atol=0)
    assert linear_attention(q, k - 40, v).abs().max() < 1e-10
    y = linear_attention(q - 20.0, k + 12.0, v).double()  # exp(-20) = 2e-9
    assert 0 < y.min() < y.max() < 1


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in heads(N=5, D=3))
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    assert torch.autograd.gradcheck(linear_attention, (q, k, v))
    assert torch.autograd.gradcheck(linear_attention, (q, k, v, mask))


def test_the_gradient_is_that_of_elu_at_0_and_finite_far_out() -> None:
    q, k, v = (x.requires_grad_() for x in heads(scale=0.0, N=3))
    weights = kernel_matrix(q, k)
    wanted = torch.autograd.grad((weights @ v / (weights.sum(-1, keepdim=True) + EPS)).square().sum(), (q, k))
    found = torch.autograd.grad(linear_attention(q, k, v).square().sum(), (q, k))
    torch.testing.assert_close(found, wanted)
    far = [x.detach().float() for x in heads(scale=1e4)]
    for x in far:
        x.requires_grad_()
    linear_attention(*far).sum().backward()
    assert all(x.grad.isfinite().all() for x in far)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_long_sequences_of_half_precision(dtype: torch.dtype, scale: float) -> None:
    """1,024 tokens of dimension 64: the denominator, about 1e5, is beyond fp16, where naive code returns zeros."""
    q, k, v = (x.to(dtype) for x in heads(B=1, H=1, N=1024, D=64, scale=scale))
    v = v + 1
    weights = kernel_matrix(q.double(), k.double())
    truth = weights @ v.double() / (weights.sum(dim=-1, keepdim=True) + EPS)
    assert weights.sum(dim=-1).min() > 65504
    y = linear_attention(q, k, v)
    assert y.dtype == dtype
    assert relative_error(y.double(), truth) < torch.finfo(dtype).eps / 2


def test_a_mask_is_the_attention_over_the_kept_keys() -> None:
    q, k, v = heads()
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, [0, 3, 4, 9]] = True
    mask[1, 2:] = True
    y = linear_attention(q, k, v, mask)
    for sample in range(2):
        keys, values = k[sample, :, mask[sample]], v[sample, :, mask[sample]]
        weights = kernel_matrix(q[sample], keys)
        wanted = weights @ values / (weights.sum(dim=-1, keepdim=True) + EPS)
        torch.testing.assert_close(y[sample], wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(linear_attention(q, k, v, torch.ones_like(mask)), linear_attention(q, k, v))
    assert not linear_attention(q, k, v, torch.zeros_like(mask)).any()


def test_there_are_no_options() -> None:
    assert "num_heads=3" in repr(LinearAttention(12, num_heads=3))
    check_attention_options("linear", {})
    with pytest.raises(ValueError, match=r"'linear' has no option 'eps' \(options: none\)"):
        check_attention_options("linear", {"eps": 0.1})
    with pytest.raises(ValueError, match="attn_drop must be 0, got 0.1"):
        LinearAttention(12, num_heads=3, attn_drop=0.1)


def test_what_every_attention_does() -> None:
    checks.check_core_is_full_precision(linear_attention)
    checks.check_samples_do_not_meet("linear")
    checks.check_half_precision("linear", torch.float16, 2e-3)
    checks.check_half_precision("linear", torch.bfloat16, 2e-2)
    checks.check_evaluation_is_deterministic("linear")
    checks.check_building_draws_like_softmax("linear")
    checks.check_copies("linear")
    checks.check_resume("linear")
    checks.check_compiles("linear")


def test_whole_models() -> None:
    checks.check_vision_transformer("linear")
    checks.check_padding_in_the_sequence_model("linear", exact=True)


def test_a_sequence_model_without_padding_is_the_same_with_and_without_a_mask() -> None:
    masked = checks.encoder("linear")
    plain = SequenceEncoder(
        attention="linear", vocab_size=20, max_length=24, num_classes=4, embed_dim=16, depth=2, num_heads=4
    ).eval()
    plain.load_state_dict(masked.state_dict())
    x = torch.randint(1, 20, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), masked(x))
    plain(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in plain.parameters())
