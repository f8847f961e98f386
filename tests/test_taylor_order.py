"""The attention module of other orders: TaylorShift's own behaviour with another polynomial, in a model that trains."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from taylorvit.attention import TaylorOrder, TaylorShift, bind_options, check_attention_options
from taylorvit.config import ModelConfig
from taylorvit.models import attention_forms, build_model
from taylorvit.ops import orders

each_form = pytest.mark.parametrize("form", ["direct", "efficient"])
each_order = pytest.mark.parametrize("order", orders.ORDERS)


def tokens(B: int = 2, N: int = 10, C: int = 12) -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(0))


def small_model(**options: object) -> nn.Module:
    config = ModelConfig(
        "taylorvit_tiny_patch16_224", "taylor_order", options, img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=4
    )
    return build_model(config)


@each_form
def test_order_2_is_taylorshift_with_the_same_weights(form: str) -> None:
    ours, theirs = TaylorOrder(12, 3, qkv_bias=True, form=form), TaylorShift(12, 3, qkv_bias=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))


@each_form
@each_order
def test_options_reach_the_operation(form: str, order: int) -> None:
    attention = bind_options("taylor_order", {"order": order, "form": form, "temperature_init": 0.5})(12, num_heads=3)
    assert type(attention) is TaylorOrder
    x = tokens()
    q, k, v = attention.qkv(x).reshape(2, 10, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    y = getattr(orders, form)(q, k, v, torch.full((3,), 0.5), order)
    assert torch.equal(attention(x), attention.proj(y.transpose(1, 2).flatten(2)))
    assert f"num_heads=3, order={order}, form={form}, temperature_init=0.5" in repr(attention)


@pytest.mark.parametrize("autocast", [False, True])
@each_form
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_model_trains_a_few_steps(order: int, form: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = small_model(order=order, form=form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all((block.attn.temperature.grad != 0).all() for block in model.blocks)


@each_form
def test_autocast_computes_inside_in_single_precision(form: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = orders.order_attention(q, k, v, torch.ones(2), order=4, form=form)
    assert y.dtype == torch.bfloat16
    exact = orders.direct(*(x.bfloat16().double() for x in (q, k, v)), torch.ones(2).double(), 4)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_the_form_is_the_one_asked_for() -> None:
    assert attention_forms(small_model()) == ["direct"] * 2
    assert attention_forms(small_model(order=3, form="efficient"), training=True) == ["efficient"] * 2
    assert TaylorOrder(12, 3).resolved_form(10**6, training=False) == "direct"


def test_a_hook_receives_the_matrix_of_the_direct_form() -> None:
    attention, seen = TaylorOrder(12, 3, order=3), []
    wanted = attention(tokens())
    attention.attn_drop.register_forward_hook(lambda module, given, matrix: seen.append(matrix))
    torch.testing.assert_close(attention(tokens()), wanted)
    (matrix,) = seen
    assert matrix.shape == (2, 3, 10, 10)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 10))


@each_form
@pytest.mark.parametrize("hooked", [False, True])
def test_a_key_mask_leaves_tokens_out(form: str, hooked: bool) -> None:
    """The first 6 tokens see what they would see without the last 4; so too where the matrix is formed for a hook."""
    attention = TaylorOrder(12, 3, order=4, form=form)
    if hooked:
        attention.attn_drop.register_forward_hook(lambda module, given, matrix: None)
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[..., 6:] = False
    torch.testing.assert_close(attention(tokens(), attn_mask=mask)[:, :6], attention(tokens()[:, :6]))


def test_tracing_keeps_the_operation_whole() -> None:
    model = timm.create_model(
        "taylorvit_tiny_patch16_224", attention="taylor_order", attention_options={"order": 4}, img_size=32, depth=1
    ).eval()
    traced = torch.fx.symbolic_trace(model.blocks[0].attn)
    assert "order_attention" in [node.name for node in traced.graph.nodes]
    torch.testing.assert_close(traced(tokens(C=192)), model.blocks[0].attn(tokens(C=192)))


def test_negative_weights_can_divide_by_zero_in_odd_orders_only() -> None:
    """Two keys opposite to the queries, at temperature 1: order 1 gives both the weight 0, and 0 for their sum."""
    q, k, v = torch.ones(1, 1, 2, 4), -torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    odd, even = (orders.order_attention(q, k, v, torch.ones(1), order=order) for order in (1, 2))
    assert not odd.isfinite().any()
    torch.testing.assert_close(even, math.sqrt(2 / 4) * v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "order must be one of 1, 2, 3, 4, 5, 6, got 0"),
        ({"order": 2.0}, "got 2.0"),
        ({"order": "4"}, "got '4'"),
        ({"order": True}, "got True"),
        ({"form": "auto"}, "form must be one of direct, efficient, got 'auto'"),
        ({"temperature_init": float("inf")}, "temperature_init must be finite, got inf"),
        ({"impl": "cpu"}, r"no option 'impl' \(options: order, form, temperature_init\)"),
        ({"oder": 4}, "did you mean 'order'?"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options("taylor_order", options)
    with pytest.raises(ValueError, match=message):
        bind_options("taylor_order", options)


def test_too_many_features_are_refused_when_it_is_built() -> None:
    TaylorOrder(64, 4, order=4, form="efficient")
    with pytest.raises(ValueError, match="order 4 has 814,385 features at head dimension 64"):
        TaylorOrder(64, 1, order=4, form="efficient")
    TaylorOrder(64, 1, order=4, form="direct")
