"""Nystrom attention: the formula by itself, where it becomes softmax attention, masks, and what every attention does."""

from __future__ import annotations

import math
from functools import partial

import attention_checks as checks
import pytest
import torch
from attention_checks import heads, relative_error, softmax_attention
from torch import Tensor

from taylorvit.attention import Nystrom, bind_options, check_attention_options
from taylorvit.attention.nystrom import nystrom_attention
from taylorvit.models import SequenceEncoder

each_size = pytest.mark.parametrize(("N", "m"), [(12, 4), (11, 4), (7, 6), (9, 1)])


def written_out(q: Tensor, k: Tensor, v: Tensor, m: int, iterations: int = 6) -> Tensor:
    """The paper's formula for one head, (N, D), with segments and norms by hand."""
    N, D = q.shape
    lengths = [N // m + (segment >= m - N % m) for segment in range(m)]
    q_marks, k_marks = (torch.stack([part.mean(dim=0) for part in x.split(lengths)]) for x in (q, k))

    def soften(queries: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(queries @ keys.T / math.sqrt(D), dim=-1)

    A = soften(q_marks, k_marks)
    Z = A.T / (torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(A, torch.inf))
    I = torch.eye(m, dtype=A.dtype)  # noqa: E741  the paper's letter
    for _ in range(iterations):
        Z = 0.25 * Z @ (13 * I - A @ Z @ (15 * I - A @ Z @ (7 * I - A @ Z)))
    return soften(q, k_marks) @ Z @ soften(q_marks, k) @ v


@each_size
@pytest.mark.parametrize("iterations", [1, 6])
def test_it_is_the_formula_written_out(N: int, m: int, iterations: int) -> None:
    q, k, v = heads(N=N)
    y = nystrom_attention(q, k, v, num_landmarks=m, pinv_iterations=iterations)
    for sample in range(2):
        for head in range(2):
            wanted = written_out(*(x[sample, head] for x in (q, k, v)), m, iterations)
            torch.testing.assert_close(y[sample, head], wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("m", [11, 12, 64])
def test_up_to_as_many_tokens_as_landmarks_it_is_softmax_attention(m: int) -> None:
    q, k, v = heads(scale=3.0)
    torch.testing.assert_close(nystrom_attention(q, k, v, num_landmarks=m), softmax_attention(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_with_a_landmark_for_every_different_token_it_converges_to_softmax_attention(masked: bool) -> None:
    """Every query and key twice: the means of pairs are the tokens, and more steps mend the one inexact thing, the inverse."""
    q, k, v = heads(N=12, D=8)
    q, k = (x.repeat_interleave(2, dim=-2) for x in (q, k))
    v = torch.cat([v, v.flip(-2)], dim=-2)
    mask = torch.ones(2, 24, dtype=torch.bool) if masked else None
    truth = softmax_attention(q, k, v)
    attend = partial(nystrom_attention, q, k, v, num_landmarks=12, key_mask=mask)
    errors = [relative_error(attend(pinv_iterations=steps), truth) for steps in (1, 6, 12, 20)]
    assert errors[0] > 10 * errors[1] > 1000 * errors[2]
    assert errors[3] < 1e-11


def test_on_smooth_sequences_the_error_falls_with_the_landmarks() -> None:
    place = torch.linspace(0, 2 * math.pi, 256, dtype=torch.float64)[:, None]
    waves = torch.cat([place.sin(), place.cos(), (2 * place).sin(), (2 * place).cos()], dim=-1)
    mix = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (waves @ mix)[:, None, None]
    errors = [relative_error(nystrom_attention(q, k, v, num_landmarks=m), softmax_attention(q, k, v)) for m in (4, 16, 64)]
    assert errors[0] > 5 * errors[1] > 5 * errors[2]
    assert errors[2] < 0.02


def test_weights_sum_to_1_and_segments_may_be_shuffled_inside() -> None:
    q, k, v = heads(N=12)
    ones = nystrom_attention(q, k, torch.ones_like(v), num_landmarks=4, pinv_iterations=30)
    torch.testing.assert_close(ones, torch.ones_like(v), rtol=1e-8, atol=1e-8)
    attend = partial(nystrom_attention, num_landmarks=4)
    inside = torch.tensor([1, 2, 0, 3, 5, 4, 8, 7, 6, 9, 11, 10])  # stays in its segment of 3
    torch.testing.assert_close(attend(*(x[..., inside, :] for x in (q, k, v))), attend(q, k, v)[..., inside, :])
    across = torch.tensor([3, 1, 2, 0, *range(4, 12)])
    assert not torch.allclose(attend(*(x[..., across, :] for x in (q, k, v))), attend(q, k, v)[..., across, :], atol=1e-3)


@pytest.mark.parametrize("kept", [11, 10, 7, 5, 4, 3, 1])
@pytest.mark.parametrize("m", [4, 6, 11])
def test_a_mask_is_the_attention_over_the_kept_tokens(kept: int, m: int) -> None:
    """In one batch: one sample keeps some scattered tokens, perhaps fewer than landmarks, and another all but one."""
    q, k, v = heads()
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, torch.randperm(11, generator=torch.Generator().manual_seed(kept))[:kept]] = True
    mask[1, 1:] = True
    attend = partial(nystrom_attention, num_landmarks=m)
    y = attend(q, k, v, key_mask=mask)
    junk = [x.masked_fill(~mask[:, None, :, None], torch.inf) for x in (q, k, v)]
    for sample in range(2):
        some = mask[sample]
        wanted = attend(*(x[sample : sample + 1, :, some] for x in (q, k, v)))[0]
        torch.testing.assert_close(y[sample, :, some], wanted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(attend(*junk, key_mask=mask)[sample, :, some], wanted, rtol=1e-11, atol=1e-11)


def test_a_mask_of_all_is_none_and_a_mask_of_nothing_gives_nan() -> None:
    q, k, v = heads()
    mask = torch.ones(2, 11, dtype=torch.bool)
    for m in (4, 20):
        wanted = nystrom_attention(q, k, v, num_landmarks=m)
        torch.testing.assert_close(nystrom_attention(q, k, v, num_landmarks=m, key_mask=mask), wanted)
        some = mask.clone()
        some[1] = False
        y = nystrom_attention(q, k, v, num_landmarks=m, key_mask=some)
        torch.testing.assert_close(y[0], wanted[0])
        assert y[1].isnan().all()


@pytest.mark.parametrize("m", [3, 20])
def test_the_convolution_runs_over_the_tokens_of_each_head(m: int) -> None:
    q, k, v = heads()
    weight = torch.randn(2, 1, 3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attend = partial(nystrom_attention, num_landmarks=m)
    around = torch.nn.functional.pad(v, (0, 0, 1, 1))
    taps = weight[:, 0].unsqueeze(-1)  # (H, 3, 1, 1)
    wanted = attend(q, k, v) + sum(taps[:, tap] * around[..., tap : tap + 11, :] for tap in range(3))
    torch.testing.assert_close(attend(q, k, v, conv_weight=weight), wanted)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 8:] = False
    y = attend(q, k, v, conv_weight=weight, key_mask=mask)[..., :8, :]
    torch.testing.assert_close(y, attend(*(x[..., :8, :] for x in (q, k, v)), conv_weight=weight))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in heads(N=5, D=3))
    mask = torch.tensor([[True] * 5, [True, False, False, True, False]]) if masked else None
    weight = torch.randn(2, 1, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, num_landmarks=3, pinv_iterations=2, conv_weight=weight, key_mask=mask)

    assert torch.autograd.gradcheck(attend, (q, k, v, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_long_sequences_of_half_precision(dtype: torch.dtype, scale: float) -> None:
    """1,024 tokens of dimension 64, where code that iterates in fp16 gets infinite gradients from large scores."""
    q, k, v = (x.to(dtype).requires_grad_() for x in heads(B=1, H=1, N=1024, D=64, scale=scale))
    truth = nystrom_attention(q.double(), k.double(), v.double(), num_landmarks=32)
    y = nystrom_attention(q, k, v, num_landmarks=32)
    assert y.dtype == dtype
    assert relative_error(y.double(), truth) < torch.finfo(dtype).eps / 2
    y.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_options_reach_the_operation() -> None:
    options = {"num_landmarks": 3, "pinv_iterations": 2, "conv_kernel_size": 5}
    torch.manual_seed(0)
    module = bind_options("nystrom", options)(16, num_heads=4)
    assert type(module) is Nystrom
    x = checks.tokens()
    q, k, v = module.qkv(x).reshape(2, 13, 3, 4, 4).permute(2, 0, 3, 1, 4)
    y = nystrom_attention(q, k, v, num_landmarks=3, pinv_iterations=2, conv_weight=module.conv_weight)
    torch.testing.assert_close(module(x), module.proj(y.transpose(1, 2).flatten(2)))
    assert "num_heads=4, num_landmarks=3, pinv_iterations=2, conv_kernel_size=5" in repr(module)
    assert module.conv_weight.shape == (4, 1, 5, 1)
    assert 0.3 < float(module.conv_weight.detach().abs().max()) <= 1 / math.sqrt(5)
    plain = Nystrom(16, num_heads=4)
    assert (plain.num_landmarks, plain.pinv_iterations, plain.conv_kernel_size) == (64, 6, None)
    assert set(plain.state_dict()) == set(bind_options("softmax", {})(16, num_heads=4).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_landmarks": 0}, "num_landmarks must be a whole number of at least 1, got 0"),
        ({"pinv_iterations": True}, "pinv_iterations must be a whole number of at least 1, got True"),
        ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, got 4"),
        ({"conv_kernel_size": 0}, "conv_kernel_size must be a whole number of at least 1, got 0"),
        ({"landmarks": 4}, "no option 'landmarks'; did you mean 'num_landmarks'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options("nystrom", options)


@pytest.mark.parametrize("options", [{"num_landmarks": 4}, {"num_landmarks": 5, "conv_kernel_size": 3}], ids=str)
def test_what_every_attention_does(options: dict) -> None:
    checks.check_core_is_full_precision(partial(nystrom_attention, num_landmarks=4))
    checks.check_samples_do_not_meet("nystrom", **options)
    checks.check_half_precision("nystrom", torch.float16, 5e-3, **options)
    checks.check_half_precision("nystrom", torch.bfloat16, 5e-2, **options)
    checks.check_evaluation_is_deterministic("nystrom", **options)
    checks.check_building_draws_like_softmax("nystrom", **options)
    checks.check_copies("nystrom", **options)
    checks.check_resume("nystrom", **options)


@pytest.mark.parametrize("num_landmarks", [5, 20])
def test_it_compiles_in_one_graph(num_landmarks: int) -> None:
    checks.check_compiles("nystrom", num_landmarks=num_landmarks, conv_kernel_size=3)


@pytest.mark.parametrize("num_landmarks", [6, 64])
def test_whole_models(num_landmarks: int) -> None:
    checks.check_vision_transformer("nystrom", num_landmarks=num_landmarks, conv_kernel_size=3)
    checks.check_padding_in_the_sequence_model("nystrom", exact=True, num_landmarks=num_landmarks, conv_kernel_size=3)


def test_a_sequence_model_without_padding_is_the_same_with_and_without_a_mask() -> None:
    masked = checks.encoder("nystrom", num_landmarks=6)
    plain = SequenceEncoder(
        attention="nystrom",
        attention_options={"num_landmarks": 6},
        vocab_size=20,
        max_length=24,
        num_classes=4,
        embed_dim=16,
        depth=2,
        num_heads=4,
    ).eval()
    plain.load_state_dict(masked.state_dict())
    x = torch.randint(1, 20, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), masked(x))
    plain(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in plain.parameters())


def test_the_package_of_the_same_method_agrees() -> None:
    """One head and one sample: theirs starts the pseudo-inverse from norms of the whole batch."""
    package = pytest.importorskip("nystrom_attention", reason="optional oracle: pip install nystrom-attention")
    torch.manual_seed(0)
    options = {"num_landmarks": 4, "pinv_iterations": 6, "residual": True, "residual_conv_kernel": 5}
    theirs = package.NystromAttention(16, dim_head=16, heads=1, **options)
    ours = Nystrom(16, num_heads=1, num_landmarks=4, conv_kernel_size=5)
    with torch.no_grad():
        ours.qkv.weight.copy_(theirs.to_qkv.weight)
        ours.conv_weight.copy_(theirs.res_conv.weight)
        ours.proj.load_state_dict(theirs.to_out[0].state_dict())
    torch.testing.assert_close(ours(checks.tokens(1, 12)), theirs(checks.tokens(1, 12)))
