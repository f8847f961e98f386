"""The operation with random shapes, layouts, dtypes and extreme values: each form and implementation against fp64.

More of it: pytest tests/test_fuzz_ops.py --hypothesis-profile=thorough --hypothesis-seed=1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taylorvit.ops import taylor_attention

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other number": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "shifted": lambda x: torch.cat([x[:, :, :1], x], dim=2)[:, :, 1:],
}
cases = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 20)),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(sorted(LAYOUTS)),
        "scale": st.sampled_from([1.0, 1e-3, 1e-6, 30.0]),  # of q and k, whose lengths do not matter
        "mean": st.sampled_from([0.0, 0.0, 5.0]),  # of v
        "temperature": st.sampled_from([0.0, 1e-8, -1e-8, -1.0, 1.0, 8.0, 300.0, 1e4]),
        "zero": st.sampled_from(["", "", "q", "k", "v", "token"]),
        "seed": st.integers(0, 1000),
    }
)


def draw(case: dict[str, Any]) -> list[Tensor]:
    """Return q, k, v and the temperature of a case, and the gradient of the output."""
    generator = torch.Generator().manual_seed(case["seed"])
    q, k, v, grad = (torch.randn(case["shape"], generator=generator) for _ in range(4))
    q, k, v = q * case["scale"], k * case["scale"], v + case["mean"]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if case["zero"] == name:
            x.zero_()
        elif case["zero"] == "token":
            x[:, :, -1] = 0
    arrange = LAYOUTS[case["layout"]]
    temperature = torch.full((case["shape"][1],), case["temperature"])
    return [*(arrange(x.to(case["dtype"])) for x in (q, k, v)), temperature, grad.to(case["dtype"])]


def results(tensors: list[Tensor], **options: str) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    y = taylor_attention(*leaves, tensors[3], **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors[4])]


def smallest(tensors: list[Tensor]) -> list[float]:
    """Return for the output and each gradient the size below which what is computed is rounding.

    Gradients of q and k may be sums that cancel; 0.01 of what is added up is such a size. They are in proportion to the
    temperature where scores are near 0, as for a zero vector, and rounding of that size for one token or one channel, whose
    exact gradients are 0; else a high temperature makes them no larger. The CPU implementation takes a temperature of 0 for
    1e-18, whose gradients it does not round to 0.
    """
    q, k, v, temperature, grad = (x.double() for x in tensors)
    tokens, channels = q.shape[-2:]
    added = 0.01 * grad.abs().max() * max(tokens / channels, 1) ** 0.5
    vanishing = 1 in (tokens, channels) or not (q.any(dim=-1) & k.any(dim=-1)).all()
    factor = temperature.abs().max().clamp_max(torch.inf if vanishing else 1) if temperature.any() else 1e-4
    score = added * v.abs().max() * channels * factor
    lengths = [x.norm(dim=-1).max().clamp_min(0.01) for x in (q, k)]  # below 0.01 they are taken for that
    return [1e-30, *((score / length).clamp_min(1e-30).item() for length in lengths), added.item()]


def error(found: Tensor, exact: Tensor, floor: float) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(floor)).item()


@pytest.mark.fault("F4")
@pytest.mark.fault("F5")
@pytest.mark.fault("F7")
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("form", ["direct", "efficient"])
def test_within_the_error_budget_of_fp64(form: str, impl: str, figures: Counter[str]) -> None:
    """The reference in the case's own dtype, direct form, sets the budget of the gradients; the output's is fixed."""

    @given(cases)
    def one(case: dict[str, Any]) -> None:
        figures["inputs tried"] += 1
        tensors = draw(case)
        exact = results([x.double() for x in tensors], form="direct", impl="reference")
        usual = results(tensors, form="direct", impl="reference")
        found = results(tensors, form=form, impl=impl)
        rounding = torch.finfo(case["dtype"]).eps + 1e3 * torch.finfo(torch.promote_types(case["dtype"], torch.float32)).eps
        for computed, reference, wanted, floor in zip(found, usual, exact, smallest(tensors), strict=True):
            assert computed.isfinite().all() or not reference.isfinite().all()
            if reference.isfinite().all():
                assert computed.dtype == case["dtype"]
                assert error(computed, wanted, floor) <= 4 * error(reference, wanted, floor) + rounding

    one()


@pytest.mark.fault("F9")
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("form", ["direct", "efficient"])
def test_what_is_not_finite_never_gives_a_wrong_finite_number(form: str, impl: str, figures: Counter[str]) -> None:
    """A query reaches its own row, a key every row of its head, a value every row of its column."""

    @given(cases, st.sampled_from("qkv"), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    def one(case: dict[str, Any], which: str, bad: float) -> None:
        figures["inputs tried"] += 1
        tensors = [x.clone() for x in draw(case)]
        tensors["qkv".index(which)][0, 0, 0, 0] = bad
        y = taylor_attention(*tensors[:4], form=form, impl=impl)
        reached = {"q": y[0, 0, 0], "k": y[0, 0], "v": y[0, 0, :, 0]}[which]
        assert not reached.isfinite().any()
        assert y[1:].isfinite().all()

    one()
