"""The operation: both forms against the definition written out token by token, and every property that definition implies."""

import logging
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from taylorvit.complexity import flops_crossover
from taylorvit.ops import FASTEST, IMPLEMENTATIONS, resolve_form, resolve_impl, taylor_attention, taylor_attention_weights
from taylorvit.ops.reference import GRADIENT_LENGTH, box, unit_vectors

FORMS = ("direct", "efficient")
HALF_AND_FULL = (torch.float16, torch.bfloat16, torch.float32)
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.float64], ids=str)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test of this file with each implementation as the one that "auto" chooses."""
    monkeypatch.setitem(FASTEST, "cpu", request.param)


def inputs(B: int = 2, H: int = 3, N: int = 11, D: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Draw q, k, v of one dtype and a temperature per head."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return [q, k, v, torch.linspace(0.5, 3.0, H, dtype=torch.float64).to(dtype)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Evaluate the definition one pair of tokens at a time, in Python floats."""
    B, H, N, D = q.shape
    y = torch.zeros(B, H, N, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                cosines = torch.nn.functional.cosine_similarity(q[b, h, i].double(), k[b, h].double(), dim=-1)
                x = float(temperature[h]) * cosines
                w = 1 + x + x**2 / 2
                y[b, h, i] = math.sqrt(N / D) * (w @ v[b, h].double()) / w.sum()
    return y


def gradients(form: str, tensors: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = taylor_attention(*leaves, form=form)
    return list(torch.autograd.grad(y, leaves, cotangent.to(y.dtype)))


@each_form
@pytest.mark.parametrize("shape", [(2, 3, 11, 5), (1, 1, 1, 4), (1, 2, 2, 1), (2, 1, 30, 8), (1, 2, 7, 64)], ids=str)
def test_equals_the_definition(form: str, shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    torch.testing.assert_close(taylor_attention(*tensors, form=form), by_hand(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.fault("F6")
@pytest.mark.parametrize("shape", [(2, 3, 50, 8), (1, 2, 197, 16), (1, 3, 20, 3), (1, 1, 72, 8), (1, 1, 73, 8)], ids=str)
def test_forms_agree_in_fp64(shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    direct, efficient = (taylor_attention(*tensors, form=form) for form in FORMS)
    torch.testing.assert_close(direct, efficient, rtol=1e-12, atol=1e-12)


def test_forms_agree_in_their_gradients() -> None:
    tensors = inputs(2, 3, 40, 8)
    cotangent = torch.randn_like(tensors[0])
    for direct, efficient in zip(*(gradients(form, tensors, cotangent) for form in FORMS)):
        torch.testing.assert_close(direct, efficient, rtol=1e-11, atol=1e-12)


@each_form
def test_gradcheck_in_all_four_inputs(form: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 2, 6, 3)]
    assert torch.autograd.gradcheck(partial(taylor_attention, form=form), tensors)


@each_form
def test_permuted_tokens_give_permuted_outputs(form: str) -> None:
    q, k, v, temperature = inputs()
    order = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(1))
    y = taylor_attention(q, k, v, temperature, form=form)
    permuted = taylor_attention(q[:, :, order], k[:, :, order], v[:, :, order], temperature, form=form)
    torch.testing.assert_close(permuted, y[:, :, order], rtol=1e-12, atol=1e-12)
    only_keys = taylor_attention(q, k[:, :, order], v[:, :, order], temperature, form=form)
    torch.testing.assert_close(only_keys, y, rtol=1e-12, atol=1e-12)


def test_rows_of_weights_sum_to_one_and_give_the_attention() -> None:
    q, k, v, temperature = inputs()
    weights = taylor_attention_weights(q, k, temperature)
    N, D = q.shape[-2:]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-13, atol=0)
    assert (weights > 0).all()
    torch.testing.assert_close(math.sqrt(N / D) * weights @ v, taylor_attention(q, k, v, temperature, form="efficient"))


@each_form
def test_values_of_ones_give_the_output_scale(form: str) -> None:
    q, k, v, temperature = inputs(1, 3, 12, 4)
    y = taylor_attention(q, k, torch.ones_like(v), temperature, form=form)
    torch.testing.assert_close(y, torch.full_like(y, math.sqrt(12 / 4)), rtol=1e-13, atol=0)


@pytest.mark.fault("F5")
@each_form
def test_no_temperature_gives_the_scaled_mean(form: str) -> None:
    q, k, v, temperature = inputs()
    N, D = q.shape[-2:]
    mean = math.sqrt(N / D) * v.mean(dim=-2, keepdim=True).expand_as(v)
    torch.testing.assert_close(taylor_attention(q, k, v, 0 * temperature, form=form), mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(taylor_attention(q, k, v, 1e-8 * temperature, form=form), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.fault("F5")
@each_form
def test_negative_temperature_turns_the_queries_round(form: str) -> None:
    q, k, v, temperature = inputs()
    negative = taylor_attention(q, k, v, -temperature, form=form)
    torch.testing.assert_close(negative, taylor_attention(-q, k, v, temperature, form=form), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(negative, taylor_attention(q, k, v, temperature, form=form))


@each_form
def test_lengths_of_queries_and_keys_do_not_matter(form: str) -> None:
    q, k, v, temperature = inputs()
    y = taylor_attention(q, k, v, temperature, form=form)
    torch.testing.assert_close(taylor_attention(1e-12 * q, 1e6 * k, v, temperature, form=form), y, rtol=1e-12, atol=1e-12)


@each_form
def test_short_fp32_vectors_keep_their_direction(form: str) -> None:
    q, k, v, temperature = inputs(dtype=torch.float32)
    exact = taylor_attention(q.double(), k.double(), v.double(), temperature.double(), form="direct")
    y = taylor_attention(1e-6 * q, 1e-6 * k, v, temperature, form=form)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.fault("F5")
@each_form
@pytest.mark.parametrize("value", [-1.0, 300.0, 1e4, 1e16], ids=str)
def test_large_temperatures_agree_with_fp64(form: str, value: float) -> None:
    q, k, v, _ = inputs(1, 2, 30, 4, dtype=torch.float32)
    temperature = torch.tensor([value, 1.0])
    exact = taylor_attention(q.double(), k.double(), v.double(), temperature.double(), form="direct")
    torch.testing.assert_close(taylor_attention(q, k, v, temperature, form=form).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.fault("F5")
@each_form
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30], ids=str)
def test_temperatures_beyond_the_range_give_nan_in_their_head_only(form: str, value: float) -> None:
    q, k, v, _ = inputs(1, 2, 6, 4, dtype=torch.float32)
    y = taylor_attention(q, k, v, torch.tensor([value, 1.0]), form=form)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isfinite().all()


def max_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).abs().max() / exact.abs().max()).item()


@each_form
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 197, 64), (1, 2, 577, 16), (1, 1, 2000, 8)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_error_budget_against_fp64(form: str, dtype: torch.dtype, shape: tuple[int, int, int, int], temperature: float) -> None:
    """With the inputs already rounded, only the output's rounding and a few fp32 roundings remain."""
    q, k, v, _ = inputs(*shape, dtype=dtype)
    tau = torch.full((shape[1],), temperature)
    exact = taylor_attention(q.double(), k.double(), v.double(), tau.double(), form=form)
    y = taylor_attention(q, k, v, tau, form=form)
    assert y.dtype == dtype
    budget = torch.finfo(dtype).eps / 2 * 1.01 + 32 * torch.finfo(torch.float32).eps
    assert max_error(y, exact) <= budget


@each_form
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_gradient_error_budget_against_fp64(form: str, dtype: torch.dtype) -> None:
    tensors = inputs(1, 2, 300, 16, dtype=dtype)
    cotangent = torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = gradients("direct", [x.double() for x in tensors], cotangent.double())
    budget = torch.finfo(dtype).eps / 2 * 1.01 + 128 * torch.finfo(torch.float32).eps
    for computed, wanted, name in zip(gradients(form, tensors, cotangent), exact, ("q", "k", "v", "temperature")):
        assert computed.dtype == dtype
        assert max_error(computed, wanted) <= budget, name


@each_form
def test_unit_vectors_are_exact_to_rounding(form: str) -> None:
    x = inputs(1, 1, 1000, 64)[0]
    assert (unit_vectors(x).norm(dim=-1) - 1).abs().max() <= 4 * torch.finfo(torch.float64).eps
    error = (unit_vectors(x.float()).double() - unit_vectors(x.float().double())).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.fault("F6")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tokens_in_half_precision(dtype: torch.dtype) -> None:
    """In half precision the original's ones column, sqrt(d / N) / N, loses its digits and then vanishes (NaN)."""
    N, D = 262144, 8
    q, k, v, temperature = inputs(1, 1, N, D, dtype=dtype)
    y = taylor_attention(q, k, v + 1, temperature, form="efficient")
    exact = taylor_attention(q.double(), k.double(), (v + 1).double(), temperature.double(), form="efficient")
    assert max_error(y, exact) <= torch.finfo(dtype).eps / 2 * 1.01 + 1e-4


def test_many_tokens_agree_with_fp64_in_fp32() -> None:
    tensors = inputs(1, 1, 65536, 4, dtype=torch.float32)
    exact = taylor_attention(*(x.double() for x in tensors), form="efficient")
    assert max_error(taylor_attention(*tensors, form="efficient"), exact) <= 1e-4


def test_half_precision_gradients_do_not_underflow() -> None:
    """Computed in fp16, gradients of this size fall below its smallest number and a share of them is lost."""
    tensors = inputs(1, 1, 1024, 8, dtype=torch.float16)
    cotangent = 1e-3 * torch.randn(1, 1, 1024, 8, generator=torch.Generator().manual_seed(5))
    exact = gradients("direct", [x.double() for x in tensors], cotangent.half().double())
    leaves = [x.float() for x in tensors]  # fp32 leaves: the gradient is not rounded to fp16 on its way out
    for form in FORMS:
        for computed, wanted in zip(gradients(form, leaves, cotangent.half()), exact):
            assert max_error(computed, wanted) <= 1e-4


@each_form
def test_fp32_temperature_with_half_precision_activations(form: str) -> None:
    q, k, v, _ = inputs(dtype=torch.bfloat16)
    temperature = torch.tensor([1.001, 1.002, 1.003], requires_grad=True)  # equal numbers in bf16
    y = taylor_attention(q, k, v, temperature, form=form)
    exact = taylor_attention(q.double(), k.double(), v.double(), temperature.double(), form=form)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16())
    assert torch.autograd.grad(y.sum(), temperature)[0].dtype == torch.float32


@pytest.mark.fault("F7")
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_inputs_and_nothing_inside(form: str, dtype: torch.dtype) -> None:
    q, k, v, temperature = inputs(1, 3, 197, 16, dtype=torch.float32)
    rounded = [x.to(dtype) for x in (q, k, v)]
    wanted = taylor_attention(*rounded, temperature, form=form)
    with torch.autocast("cpu", dtype=dtype):
        y = taylor_attention(q, k, v, temperature, form=form)
        mixed = taylor_attention(q, k, rounded[2], temperature, form=form)  # as with a q_norm: LayerNorm returns fp32
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        double = taylor_attention(q.double(), k.double(), v.double(), temperature, form=form)
        assert taylor_attention_weights(q, k, temperature).dtype == torch.float32
    assert y.dtype == sdpa.dtype == dtype
    assert torch.equal(y, wanted)
    assert torch.equal(mixed, wanted)
    assert double.dtype == torch.float64


@pytest.mark.fault("F4")
@each_form
@each_dtype
@pytest.mark.parametrize("which", ["q", "k", "v", "all", "one query", "one key"])
def test_zero_vectors_give_finite_results_and_bounded_gradients(form: str, dtype: torch.dtype, which: str) -> None:
    tensors = inputs(1, 3, 20, 64, dtype=dtype)
    cotangent = torch.randn(1, 3, 20, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    typical = [g.double().abs().mean() for g in gradients(form, tensors, cotangent)]
    for position, name in enumerate("qkv"):
        if which in (name, "all"):
            tensors[position].zero_()
    if which == "one query":
        tensors[0][:, :, 7] = 0
    if which == "one key":
        tensors[1][:, :, 7] = 0
    assert taylor_attention(*tensors, form=form).isfinite().all()
    for gradient, usual in zip(gradients(form, tensors, cotangent), typical):
        assert gradient.isfinite().all()
        assert gradient.double().abs().max() <= 1e4 * usual


@pytest.mark.fault("F4")
@each_form
def test_zero_query_attends_evenly(form: str) -> None:
    q, k, v, temperature = inputs()
    q[:, :, 3] = 0
    N, D = q.shape[-2:]
    y = taylor_attention(q, k, v, temperature, form=form)
    torch.testing.assert_close(y[:, :, 3], math.sqrt(N / D) * v.mean(dim=-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-18, 1e-12, 1e-6, 1e-3, GRADIENT_LENGTH, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_a_unit_vector_is_capped_and_otherwise_exact(length: float, dtype: torch.dtype) -> None:
    direction = torch.tensor([0.6, 0.8, 0.0], dtype=dtype)
    x = (length * direction).requires_grad_()
    across = torch.tensor([-0.8, 0.6, 0.0], dtype=dtype)
    (gradient,) = torch.autograd.grad(unit_vectors(x), x, across)
    torch.testing.assert_close(gradient, across / max(length, GRADIENT_LENGTH))


@pytest.mark.fault("F4")
@each_form
def test_equal_queries_and_keys(form: str) -> None:
    q, _, v, temperature = inputs()
    y = taylor_attention(q, q, v, temperature, form=form)
    torch.testing.assert_close(y, by_hand(q, q, v, temperature), rtol=1e-12, atol=1e-12)


@pytest.mark.fault("F6")
@each_form
@each_dtype
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 3, 5, 4), (2, 0, 5, 4)], ids=str)
def test_no_tokens_give_an_empty_output(form: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    tensors = [x.requires_grad_() for x in inputs(*shape, dtype=dtype)]
    y = taylor_attention(*tensors, form=form)
    assert y.shape == shape
    assert y.dtype == dtype
    y.sum().backward()
    assert tensors[0].grad.shape == shape


@pytest.mark.fault("F6")
@each_form
def test_one_token_returns_its_value_scaled(form: str) -> None:
    q, k, v, temperature = inputs(2, 3, 1, 4)
    torch.testing.assert_close(taylor_attention(q, k, v, temperature, form=form), v / 2, rtol=1e-14, atol=0)


@pytest.mark.fault("F9")
@each_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_inf_are_never_hidden(form: str, bad: float, position: int) -> None:
    tensors = inputs(1, 2, 6, 4, dtype=torch.float32)
    tensors[position][0, 0, 2, 1] = bad
    y = taylor_attention(*tensors, form=form)
    touched = y[0, 0, 2] if position == 0 else y[0, 0]  # a query touches its row, a key or value every row of its head
    if position == 2:
        touched = touched[..., 1]
    assert not touched.isfinite().any()
    assert y[0, 1].isfinite().all()


@pytest.mark.fault("F9")
@each_form
def test_values_beyond_the_range_are_never_a_wrong_number(form: str) -> None:
    q, k, v, temperature = inputs(1, 2, 6, 4, dtype=torch.float32)
    exact = taylor_attention(q.double(), k.double(), 1e38 * v.double(), temperature.double(), form="direct")
    y = taylor_attention(q, k, 1e38 * v, temperature, form=form)
    held = y.isfinite()
    torch.testing.assert_close(y[held].double(), exact[held], rtol=1e-4, atol=1e34)
    assert not taylor_attention(1e30 * q, k, v, temperature, form=form).isfinite().any()  # |q|^2 overflows fp32


@pytest.mark.fault("F9")
@each_form
def test_subnormal_inputs(form: str) -> None:
    q, k, v, temperature = inputs(1, 2, 6, 4, dtype=torch.float32)
    assert taylor_attention(1e-40 * q, 1e-40 * k, 1e-40 * v, temperature, form=form).isfinite().all()


@each_form
def test_inputs_are_untouched(form: str) -> None:
    """The original multiplied v in place: wrong under no_grad, an error in training."""
    qkv = torch.randn(2, 10, 3, 3, 4)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    before = qkv.clone()
    with torch.no_grad():
        taylor_attention(q, k, v, torch.ones(3), form=form)
    assert torch.equal(qkv, before)


@pytest.mark.fault("F7")
@each_form
def test_strided_views_train(form: str) -> None:
    qkv = torch.randn(2, 10, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    temperature = torch.ones(3, dtype=torch.float64)
    y = taylor_attention(q, k, v, temperature, form=form)
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    wanted = taylor_attention(*plain, temperature, form=form)
    torch.testing.assert_close(y, wanted)
    (gradient,) = torch.autograd.grad(y.square().sum(), qkv)
    parts = torch.autograd.grad(wanted.square().sum(), plain)
    torch.testing.assert_close(gradient, torch.stack(parts).permute(1, 3, 0, 2, 4))


@pytest.mark.fault("F7")
@each_form
def test_expanded_and_transposed_inputs(form: str) -> None:
    q, k, v, temperature = inputs()
    y = taylor_attention(q, k[:1].expand(2, -1, -1, -1), v.mT.contiguous().mT, temperature[:1].expand(3), form=form)
    wanted = taylor_attention(q, k[:1].repeat(2, 1, 1, 1), v, temperature[:1].repeat(3), form=form)
    torch.testing.assert_close(y, wanted)


def test_auto_takes_the_form_with_fewer_operations() -> None:
    for D in (1, 4, 8, 16, 32, 64, 128):
        n0 = flops_crossover(D)
        assert resolve_form(math.floor(n0), D, impl="reference") == "direct"
        assert resolve_form(math.floor(n0) + 1, D, impl="reference") == "efficient"
    assert resolve_form(1, 64, "efficient", impl="cpu") == "efficient"
    assert resolve_form(10**6, 4, "direct", impl="cpu") == "direct"


@pytest.mark.parametrize(("num_tokens", "form"), [(20, "direct"), (21, "efficient")])
def test_auto_runs_the_resolved_form(num_tokens: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in FORMS:
        monkeypatch.setitem(IMPLEMENTATIONS["reference"], name, lambda q, k, v, t, name=name: called.append(name) or v)
    taylor_attention(*inputs(1, 2, num_tokens, 4), impl="reference")
    assert called == [form]


def test_an_implementation_plugs_in_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        seen.append((q.dtype, temperature.dtype, torch.is_autocast_enabled("cpu")))
        return v

    monkeypatch.setitem(IMPLEMENTATIONS, "other", {"direct": direct})
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taylor_attention(*tensors, form="direct", impl="other")
    assert seen == [(torch.bfloat16, torch.float32, False)]
    with pytest.raises(ValueError, match="impl 'other' has form direct only, got 'efficient'"):
        taylor_attention(*tensors, form="efficient", impl="other")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tensors = inputs(1, 1, 43, 7)
    with caplog.at_level(logging.INFO, logger="taylorvit"):
        for _ in range(3):
            taylor_attention(*tensors)
    assert [record.getMessage() for record in caplog.records] == [
        f"taylor_attention: form direct, impl {FASTEST['cpu']} for 43 tokens of head dimension 7"
    ]


Q = torch.zeros(2, 3, 5, 4)
TAU = torch.ones(3)


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: taylor_attention(Q, Q[:, :, :4], Q, TAU), r"k \(2, 3, 4, 4\)"),
        (lambda: taylor_attention(Q, Q, Q[..., :3], TAU), r"v \(2, 3, 5, 3\)"),
        (lambda: taylor_attention(Q[:1], Q, Q, TAU), r"q \(1, 3, 5, 4\)"),
        (lambda: taylor_attention(Q[0], Q[0], Q[0], TAU), r"one shape \(B, H, N, D\) with D > 0, got q \(3, 5, 4\)"),
        (lambda: taylor_attention(Q[..., :0], Q[..., :0], Q[..., :0], TAU), r"D > 0, got q \(2, 3, 5, 0\)"),
        (lambda: taylor_attention(Q, Q, Q, TAU[:2]), r"temperature must have shape \(3,\).* got \(2,\)"),
        (lambda: taylor_attention(Q, Q, Q, TAU.view(1, 3, 1, 1)), r"got \(1, 3, 1, 1\)"),
        (lambda: taylor_attention(Q, Q.half(), Q, TAU), "got float32, float16, float32"),
        (lambda: taylor_attention(Q.int(), Q.int(), Q.int(), TAU), "one dtype of float16, .* got int32, int32, int32"),
        (lambda: taylor_attention(Q, Q, Q, TAU.int()), "temperature must have a dtype of .* got int32"),
        (lambda: taylor_attention(Q, Q.to("meta"), Q, TAU), "got cpu, meta, cpu, cpu"),
        (lambda: taylor_attention(Q, Q, Q, TAU, form="quadratic"), "auto, direct, efficient, got 'quadratic'"),
        (lambda: taylor_attention(Q, Q, Q, TAU, impl="cuda"), "one of auto, reference, cpu, triton, got 'cuda'"),
        (lambda: taylor_attention_weights(Q, Q[:1], TAU), r"k \(1, 3, 5, 4\)"),
        (lambda: resolve_impl("cpu", ""), "got ''"),
    ],
)
def test_errors_quote_what_was_given(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.fault("F7")
@each_form
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_break(form: str, autocast: bool) -> None:
    def attend(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return taylor_attention(*tensors, form=form)

    tensors = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    y, wanted = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors), attend(*tensors)
    torch.testing.assert_close(y, wanted)
    for computed, expected in zip(*(torch.autograd.grad(out.float().square().sum(), tensors) for out in (y, wanted))):
        torch.testing.assert_close(computed, expected)


@each_form
def test_compiled_under_autocast(form: str) -> None:
    """Around a compiled function autocast reaches into its backward pass: those gradients are rounded as bf16 products are."""
    tensors = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    compiled = torch.compile(partial(taylor_attention, form=form), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = compiled(*tensors), taylor_attention(*tensors, form=form)
    torch.testing.assert_close(y, wanted)
    for computed, expected in zip(*(torch.autograd.grad(out.float().square().sum(), tensors) for out in (y, wanted))):
        assert max_error(computed, expected.double()) <= 3 * torch.finfo(torch.bfloat16).eps


@each_form
def test_exports_with_dynamic_batch(form: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
            return taylor_attention(q, k, v, temperature, form=form)

    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = ({0: batch}, {0: batch}, {0: batch}, None)
    program = torch.export.export(Attend(), tuple(inputs(2)), dynamic_shapes=dynamic)
    tensors = inputs(5)
    torch.testing.assert_close(program.module()(*tensors), taylor_attention(*tensors, form=form))


def test_meta_tensors_give_shapes() -> None:
    q = torch.empty(2, 3, 5, 4, device="meta")
    assert taylor_attention(q, q, q, torch.empty(3, device="meta")).shape == (2, 3, 5, 4)


def test_box_product_multiplies_dot_products() -> None:
    x, y = torch.randn(2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close((box(x) * box(y)).sum(-1), (x * y).sum(-1) ** 2)
