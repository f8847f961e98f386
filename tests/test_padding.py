"""Keys that are left out: the attention over the others, exactly, with its gradients, in every form and implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylorvit.ops import taylor_attention, taylor_attention_weights

each_form = pytest.mark.parametrize("form", ["direct", "efficient"])
each_impl = pytest.mark.parametrize("impl", ["reference", "cpu"])


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Draw q, k, v (2, 3, 20, 8), a temperature per head, and a mask that keeps 13 and 20 keys, not the first ones alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, ::3] = False
    return [q, k, v, torch.tensor([0.5, 2.0, 8.0], dtype=dtype)], mask


@each_form
@each_impl
def test_equals_the_attention_over_the_keys_that_are_kept(form: str, impl: str) -> None:
    tensors, mask = inputs()
    y = taylor_attention(*tensors, form=form, impl=impl, key_mask=mask)
    q, k, v, temperature = tensors
    for sample, kept in enumerate(mask):
        few = [x[sample : sample + 1, :, kept] for x in (q, k, v)]
        expected = taylor_attention(*few, temperature, form=form, impl="reference")
        torch.testing.assert_close(y[sample : sample + 1, :, kept], expected, rtol=1e-11, atol=1e-11)


@each_form
@each_impl
def test_what_is_left_out_changes_nothing_and_gets_no_gradient(form: str, impl: str) -> None:
    tensors, mask = inputs()
    leaves = [x.requires_grad_() for x in tensors]
    y = taylor_attention(*leaves, form=form, impl=impl, key_mask=mask)[0, :, mask[0]]
    others = [x.detach().clone() for x in tensors]
    for x in others[1:3]:
        x[0, :, ~mask[0]] = 1e3
    torch.testing.assert_close(taylor_attention(*others, form=form, impl=impl, key_mask=mask)[0, :, mask[0]], y.detach())
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert all(bool((gradient[0, :, ~mask[0]] == 0).all()) for gradient in gradients[1:3])


@each_form
def test_gradients(form: str) -> None:
    tensors, mask = inputs()
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *x: taylor_attention(*x, form=form, impl="reference", key_mask=mask), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@each_form
def test_rounding_stays_near_that_of_the_attention_itself(form: str, dtype: torch.dtype) -> None:
    tensors, mask = inputs(dtype)
    exact = taylor_attention(*(x.double() for x in tensors), form="direct", impl="reference", key_mask=mask)
    y = taylor_attention(*tensors, form=form, key_mask=mask)
    assert y.dtype == dtype
    error = (y.double() - exact).abs().max() / exact.abs().max()
    assert error < 3 * torch.finfo(dtype).eps


@each_form
def test_infinities_that_are_left_out_do_no_harm(form: str) -> None:
    tensors, mask = inputs()
    tensors[2][0, :, ~mask[0]] = torch.inf
    assert bool(taylor_attention(*tensors, form=form, impl="reference", key_mask=mask).isfinite().all())


def test_the_mask_of_all_keys_is_no_mask() -> None:
    tensors, _ = inputs()
    everything = torch.ones(2, 20, dtype=torch.bool)
    torch.testing.assert_close(taylor_attention(*tensors, key_mask=everything), taylor_attention(*tensors))


def test_weights_of_keys_that_are_left_out_are_zero() -> None:
    (q, k, _, temperature), mask = inputs()
    weights = taylor_attention_weights(q, k, temperature, key_mask=mask)
    assert bool((weights[0, ..., ~mask[0]] == 0).all())
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 20, dtype=torch.float64))


@pytest.mark.parametrize("mask", [torch.ones(2, 19).bool(), torch.ones(2, 20), torch.ones(20).bool()], ids=str)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor) -> None:
    tensors, _ = inputs()
    with pytest.raises(ValueError, match=r"key_mask must be torch.bool \(2, 20\) on cpu, got torch"):
        taylor_attention(*tensors, key_mask=mask)
    with pytest.raises(ValueError, match="key_mask must be"):
        taylor_attention_weights(tensors[0], tensors[1], tensors[3], key_mask=mask)
