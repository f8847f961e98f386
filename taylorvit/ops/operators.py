"""What the operators with a backward pass of their own share: how autograd gets at it, and the derivatives that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

Tensors = tuple[Tensor, ...]

NUM_GRADIENTS = 4  # of q, k, v and temperature


def register_gradient(operator: CustomOpDef, backward: CustomOpDef, impl: str) -> None:
    """Let `backward(gradient of y, *tensors, *saved)` differentiate `operator(q, k, v, temperature, *others) -> (y, *saved)`.

    `tensors` are those of the operator's arguments that are tensors, `saved` its results but y. `backward` has no derivative.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.num_others = len(inputs) - NUM_GRADIENTS
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients = backward(grad, *ctx.saved_tensors) if grad is not None else (None,) * NUM_GRADIENTS
        return *gradients, *(None,) * ctx.num_others

    def refuse(ctx: Any, *grads: Tensor | None) -> Tensors:
        raise NotImplementedError(f"impl {impl!r} has no second derivative: use impl='reference'")

    def keep_nothing(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        pass

    operator.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(refuse, setup_context=keep_nothing)


def refuse_forward_mode(impl: str, *tensors: Tensor) -> None:
    """Raise NotImplementedError for forward-mode derivatives, which PyTorch would take to be zero."""
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"impl {impl!r} has no forward-mode derivative: use impl='reference'")


def register_operations(operator: Callable[..., Any], count: Callable[[Any], int]) -> None:
    """Tell FlopCounterMode what the operator counts: `count(shape)` operations for the shape of its first argument."""

    @register_flop_formula(operator)
    def _(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return count(shape)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow an operation on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def empty_like_tokens(q: Tensor) -> Tensor:
    """Return an empty (B, H, N, D), stored as (B, N, H, D): to join the heads, which comes next, needs no copy then."""
    batch, num_heads, num_tokens, head_dim = q.shape
    return q.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)
