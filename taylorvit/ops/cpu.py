"""The CPU implementation: one PyTorch operator for the forward and one for the backward pass of each form.

An operator takes a few heads at a time. What both forms need before the sums (unit vectors, centred values) and after them (the
division, the gradient of the unit vectors) is here; the sums, where the time goes, are in `cpu_direct` and `cpu_efficient`.

The weights are a mean, so the values can be centred first and their mean added at the end. That drops the constant of the
polynomial from the numerator, where it would cancel, and keeps the digits of values that differ by less than their mean.

All is computed in fp32, or fp64 for fp64 inputs. Nothing of size N x N or N x D^2 is ever held. Derivation: README.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import cpu_direct, cpu_efficient
from .operators import Tensors, empty_like_tokens, refuse_forward_mode, register_gradient, register_operations
from .pieces import pieces
from .reference import GRADIENT_LENGTH, ZERO_LENGTH

P = ParamSpec("P")
R = TypeVar("R")
Group = tuple[slice, slice]  # of the images and of the heads

GROUP_SIZE = 2**17  # numbers of q in a group of heads


def direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the attention in O(N^2 D) operations, tile by tile. Arguments and result as in `reference.direct`."""
    refuse_forward_mode("cpu", q, k, v, temperature)
    return _direct(q, k, v, temperature)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute the attention in O(N D^3) operations, chunk by chunk. Arguments and result as in `reference.efficient`."""
    refuse_forward_mode("cpu", q, k, v, temperature)
    return _efficient(q, k, v, temperature)[0]


@torch.library.custom_op("taylorvit::cpu_direct", mutates_args=(), device_types="cpu")
def _direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and for the backward pass the means of the centred values (B, H, N, D) and the weights' sums (B, H, N, 1)."""
    y, means, sums = _forward(cpu_direct, q, k, v, temperature)
    return y, means, sums


@torch.library.custom_op("taylorvit::cpu_efficient", mutates_args=(), device_types="cpu")
def _efficient(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_direct` returns and the state of every head (B, H, rows, D)."""
    y, means, sums, state = _forward(cpu_efficient, q, k, v, temperature)
    return y, means, sums, state


@torch.library.custom_op("taylorvit::cpu_direct_backward", mutates_args=(), device_types="cpu")
def _direct_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, means: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and temperature from that of y."""
    return _backward(cpu_direct, grad, q, k, v, temperature, means, sums)


@torch.library.custom_op("taylorvit::cpu_efficient_backward", mutates_args=(), device_types="cpu")
def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, means: Tensor, sums: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and temperature from that of y."""
    return _backward(cpu_efficient, grad, q, k, v, temperature, means, sums, state)


@_direct.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensors:
    return _empty_results(cpu_direct, q)


@_efficient.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensors:
    return _empty_results(cpu_efficient, q)


@_direct_backward.register_fake
@_efficient_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *saved: Tensor) -> Tensors:
    return *(empty_like_tokens(q) for _ in range(3)), torch.empty_like(temperature)


register_gradient(_direct, _direct_backward, "cpu")
register_gradient(_efficient, _efficient_backward, "cpu")


def _rows(head_dim: int) -> int:
    """Rows of the state and of the Gram matrix: what a token is multiplied with in the efficient form."""
    return cpu_efficient.state_shape(head_dim)[0] + head_dim


# What FlopCounterMode counts: the matrix products over the tokens, a multiply-add as two operations.
_OPERATORS = torch.ops.taylorvit
register_operations(_OPERATORS.cpu_direct, lambda q: 4 * math.prod(q) * q[-2])
register_operations(_OPERATORS.cpu_direct_backward, lambda grad: 10 * math.prod(grad) * grad[-2])
register_operations(_OPERATORS.cpu_efficient, lambda q: 4 * math.prod(q) * _rows(q[-1]))
register_operations(_OPERATORS.cpu_efficient_backward, lambda grad: 8 * math.prod(grad) * _rows(grad[-1]))


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside: `backward()` may be called under it, and it would round what is fp32."""

    @functools.wraps(function)
    def switched_off(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return switched_off


@_without_autocast
def _forward(form: ModuleType, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensors:
    """Compute y and what the backward pass needs, a few heads at a time."""
    num_tokens, head_dim = q.shape[-2:]
    scale = math.sqrt(num_tokens / head_dim)
    tau = temperature.to(_sum_dtype(q)).view(1, -1, 1, 1)
    results = _empty_results(form, q)
    for group in _groups(form, q):
        y, means, sums, *state = (_part(x, group) for x in results)
        queries, keys, values, centre, _ = _prepare(*(_part(x, group) for x in (q, k, v, tau)))
        numerator, weight_sum, *new_state = form.forward(queries, keys, values)
        torch.add(weight_sum.view(sums.shape), num_tokens, out=sums)
        torch.div(numerator.view(means.shape), sums, out=means)
        torch.add(centre * scale, means, alpha=scale, out=y)
        for stored, new in zip(state, new_state, strict=True):
            stored.copy_(new.view(stored.shape))
    return results


@_without_autocast
def _backward(
    form: ModuleType, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients, a few heads at a time."""
    num_tokens, head_dim = q.shape[-2:]
    scale = math.sqrt(num_tokens / head_dim)
    dq, dk, dv = (empty_like_tokens(q) for _ in range(3))
    # The backward pass divides by the temperature: 0 is a number too small to make a difference.
    tau = temperature.to(_sum_dtype(q)).view(1, -1, 1, 1)
    tau = tau.masked_fill(tau.abs() < ZERO_LENGTH, ZERO_LENGTH)
    dtau = torch.zeros_like(tau)
    for group in _groups(form, q):
        means, sums, *state = (_part(x, group) for x in saved)
        g, q_part, k_part, v_part, tau_part = (_part(x, group) for x in (grad, q, k, v, tau))
        queries, keys, values, _, (q_length, k_length) = _prepare(q_part, k_part, v_part, tau_part)
        dnumerator = _contiguous(torch.mul, g, scale / sums)  # (n, N, D)
        dsum = (dnumerator * means.view_as(dnumerator)).sum(dim=-1, keepdim=True).neg_()  # (n, N, 1)
        dqueries, dkeys, dvalues = form.backward(queries, keys, values, dnumerator, dsum, *(x.flatten(0, 1) for x in state))
        # v = centre + values: the gradient of the values is centred in turn, and that of the centre is shared by all tokens.
        # Their sum, (n, 1, D). Not as a product: `sum` adds pairwise, which long sequences need.
        total = (sums.view(-1, num_tokens, 1) * dnumerator).sum(dim=1, keepdim=True)
        shared = total.sub_(dvalues.sum(dim=1, keepdim=True)).div_(num_tokens)
        torch.add(dvalues.view(means.shape), shared.view(*means.shape[:2], 1, head_dim), out=_part(dv, group))
        _unit_gradient(keys, dkeys, None, k_length, _part(dk, group))
        radial = _unit_gradient(queries, dqueries, tau_part, q_length, _part(dq, group))
        _part(dtau, group).add_(radial.sum(dim=(0, 2), keepdim=True) / tau_part)
    return dq, dk, dv, dtau.flatten().to(temperature.dtype)


def _prepare(q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return unit queries times tau, unit keys, centred values, (n, N, D) each, the centre (b, h, 1, D), and the lengths."""
    q_length, k_length = _lengths(q), _lengths(k)
    centre = v.mean(dim=-2, keepdim=True, dtype=tau.dtype)
    queries, keys = _contiguous(torch.mul, q, tau / q_length), _contiguous(torch.div, k, k_length)
    return queries, keys, _contiguous(torch.sub, v, centre), centre, (q_length, k_length)


def _lengths(x: Tensor) -> Tensor:
    """Return |x| as the reference divides by it: not below ZERO_LENGTH, NaN where it leaves the range of the dtype."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_sum_dtype(x)).clamp_(min=ZERO_LENGTH)
    return length.nan_to_num_(nan=math.nan, posinf=math.nan)


def _unit_gradient(unit: Tensor, dunit: Tensor, tau: Tensor | None, length: Tensor, dx: Tensor) -> Tensor:
    """Write to dx the gradient of x from that of tau x / |x|; return the gradient's part along tau x / |x|, (b, h, N, 1)."""
    unit, dunit = unit.view(dx.shape), dunit.view(dx.shape)
    radial = (unit * dunit).sum(dim=-1, keepdim=True)
    dunit.addcmul_(unit, radial if tau is None else radial / tau.square(), value=-1)
    factor = length.clamp_(min=GRADIENT_LENGTH).reciprocal_()
    torch.mul(dunit, factor if tau is None else factor.mul_(tau), out=dx)
    return radial


def _contiguous(function: Callable[..., Tensor], x: Tensor, other: Tensor) -> Tensor:
    """Call function(x, other) and lay the result, (b, h, N, D) of any strides, out as (b h, N, D)."""
    result = other.new_empty(x.shape)
    function(x, other, out=result)
    return result.flatten(0, 1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _groups(form: ModuleType, q: Tensor) -> Iterator[Group | None]:
    """Cut (B, H) into groups of heads: all heads of some images, or some heads of one.

    A group has about GROUP_SIZE numbers, as larger blocks of scratch memory are slow to get, but enough heads for all threads.
    """
    batch, num_heads, num_tokens, head_dim = q.shape
    if not q.numel():
        return
    at_once = max(form.min_heads(head_dim), GROUP_SIZE // (num_tokens * head_dim))
    if at_once >= batch * num_heads:
        yield None
        return
    for images in pieces(batch, max(1, at_once // num_heads)):
        for heads in pieces(num_heads, at_once):
            yield images, heads


def _part(x: Tensor, group: Group | None) -> Tensor:
    """Take the group's heads, None being all, of (B, H, ...), or of (1, H, ...), which all images share."""
    if group is None:
        return x
    images, heads = group
    return x[images if len(x) > 1 else slice(None), heads]


def _empty_results(form: ModuleType, q: Tensor) -> Tensors:
    """Make room for y, the means of the centred values, the weights' sums, and the state if the form has one."""
    batch, num_heads, num_tokens, head_dim = q.shape
    dtype = _sum_dtype(q)
    means = q.new_empty(q.shape, dtype=dtype)
    sums = q.new_empty(batch, num_heads, num_tokens, 1, dtype=dtype)
    state_shape = form.state_shape(head_dim)
    state = [q.new_zeros(batch, num_heads, *state_shape, dtype=dtype)] if state_shape else []  # without tokens it is 0
    return empty_like_tokens(q), means, sums, *state
