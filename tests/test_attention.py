"""The attention modules: timm's signature, options checked by name, and TaylorShift's own behaviour."""

import copy
import math
import pickle

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import Block
from torch import nn

from taylorvit.attention import ATTENTIONS, Softmax, TaylorShift, bind_options, check_attention_options, get_attention
from taylorvit.ops import taylor_attention

each_attention = pytest.mark.parametrize("name", list(ATTENTIONS))


def tokens(B: int = 2, N: int = 10, C: int = 12) -> torch.Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(0))


@each_attention
def test_timm_constructor_forward_and_attributes(name: str) -> None:
    attention = bind_options(name, {}, num_tokens=10)(
        12,
        num_heads=3,
        qkv_bias=True,
        qk_norm=True,
        scale_norm=True,
        proj_bias=False,
        attn_drop=0.0,
        proj_drop=0.1,
        norm_layer=nn.LayerNorm,
        device="cpu",
        dtype=torch.float64,
    )
    y = attention(tokens().double(), attn_mask=None, is_causal=False)
    assert y.shape == (2, 10, 12)
    assert y.dtype == torch.float64
    assert (attention.num_heads, attention.head_dim) == (3, 4)
    assert attention.qkv.bias is not None
    assert attention.proj.bias is None
    assert attention.proj_drop.p == 0.1
    assert attention.attn_drop.p == 0.0
    assert attention.q_norm.normalized_shape == attention.k_norm.normalized_shape == (4,)
    assert attention.norm.normalized_shape == (12,)


def test_softmax_is_timm_s_own_class_untouched() -> None:
    assert Softmax is timm.layers.Attention
    assert bind_options("softmax", {}) is timm.layers.Attention


@pytest.mark.parametrize("form", ["direct", "efficient"])
def test_forward_is_projection_attention_projection(form: str) -> None:
    attention = TaylorShift(12, num_heads=3, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, form=form)
    x = tokens()
    q, k, v = attention.qkv(x).chunk(3, dim=-1)  # (B, N, C) each; head h holds the channels h * D ... (h + 1) * D - 1
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in (q, k, v))
    y = taylor_attention(attention.q_norm(q), attention.k_norm(k), v, attention.temperature, form="direct")
    wanted = attention.proj(attention.norm(y.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(attention(x), wanted)


def test_options_reach_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = TaylorShift(12, num_heads=3, form="efficient", impl="reference", temperature_init=2.5)
    given = {}
    monkeypatch.setattr(
        "taylorvit.attention.taylorshift.taylor_attention", lambda q, k, v, temperature, **options: given.update(options) or v
    )
    attention(tokens())
    assert given == {"form": "efficient", "impl": "reference", "key_mask": None}
    assert (attention.form, attention.impl) == ("efficient", "reference")
    assert attention.temperature.tolist() == [2.5] * 3
    assert TaylorShift(12, num_heads=3).temperature.tolist() == [1.0] * 3
    assert "num_heads=3, form=efficient, impl=reference, temperature_init=2.5" in repr(attention)


def test_temperature_is_one_vector_that_learns() -> None:
    attention = TaylorShift(12, num_heads=3)
    attention(tokens()).square().sum().backward()
    assert attention.temperature.shape == (3,)
    assert (attention.temperature.grad != 0).all()


def test_heads_attend_separately_with_their_own_temperature() -> None:
    attention = TaylorShift(12, num_heads=3)
    nn.init.eye_(attention.proj.weight)
    nn.init.zeros_(attention.proj.bias)
    x = tokens()
    before = attention(x)
    with torch.no_grad():
        attention.temperature[1] = 5.0
    changed = (attention(x) != before).any(dim=(0, 1))
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_reset_parameters_sets_the_temperature_only() -> None:
    attention = TaylorShift(12, num_heads=3, temperature_init=0.5, device="meta").to_empty(device="cpu")
    weight = attention.qkv.weight.data.fill_(3.0).clone()
    attention.temperature.data.fill_(float("nan"))
    attention.reset_parameters()
    assert attention.temperature.tolist() == [0.5] * 3
    assert torch.equal(attention.qkv.weight, weight)


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, r"num_heads must divide the width 12: one of \[1, 2, 3, 4, 6, 12\], got 5"),
        ({"num_heads": 0}, "got 0"),
        ({"attn_drop": 0.1}, "attn_drop must be 0, got 0.1"),
        ({"qk_norm": True}, "need a norm_layer"),
        ({"scale_norm": True}, "need a norm_layer"),
        ({"form": "linear"}, "form must be one of auto, direct, efficient, got 'linear'"),
        ({"impl": "fast"}, "impl must be one of auto, reference, cpu, triton, got 'fast'"),
        ({"temperature_init": float("nan")}, "temperature_init must be finite, got nan"),
        ({"temperature_init": "1"}, "temperature_init must be a number, got '1'"),
        ({"temperature_init": True}, "got True"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaylorShift(12, **{"num_heads": 3, **arguments})


@pytest.mark.parametrize("mask", [torch.ones(10, 10), torch.ones(2, 1, 1, 10), torch.ones(2, 1, 10, 10).bool()], ids=str)
def test_masks_of_more_than_keys_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"attn_mask must be None or torch.bool \(2, 1, 1, 10\), got torch"):
        TaylorShift(12, num_heads=3)(tokens(), attn_mask=mask)


def test_causal_attention_is_refused() -> None:
    attention = TaylorShift(12, num_heads=3)
    with pytest.raises(ValueError, match="is_causal must be False, got True"):
        attention(tokens(), is_causal=True)
    with pytest.raises(ValueError, match="not causal"):
        Block(12, 3, attn_layer=TaylorShift)(tokens(), is_causal=True)


@pytest.mark.parametrize("name", ["taylorshift", "softmax"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_key_mask_leaves_tokens_out(name: str, hooked: bool) -> None:
    """The first 6 tokens see what they would see without the last 4; so too where the attention matrix is formed for a hook."""
    attention = get_attention(name)(12, num_heads=3)
    if hooked:
        attention.attn_drop.register_forward_hook(lambda module, inputs, output: None)
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[..., 6:] = False
    expected = attention(tokens()[:, :6])
    torch.testing.assert_close(attention(tokens(), attn_mask=mask)[:, :6], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("form", ["auto", "direct"])
def test_a_hook_receives_the_attention_matrix(form: str, hook: str) -> None:
    attention = TaylorShift(12, num_heads=3, form=form)
    x = tokens()
    wanted = attention(x)
    seen = []
    handle = getattr(attention.attn_drop, hook)(lambda module, inputs, *output: seen.append(inputs[0]))
    torch.testing.assert_close(attention(x), wanted)
    handle.remove()
    attention(x)
    (matrix,) = seen
    assert matrix.shape == (2, 3, 10, 10)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 10))
    v = attention.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (3, 4)).transpose(1, 2)
    y = math.sqrt(10 / 4) * matrix @ v
    torch.testing.assert_close(attention.proj(y.transpose(1, 2).flatten(2)), wanted)


def test_without_a_hook_no_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("formed a matrix nobody asked for")

    monkeypatch.setattr("taylorvit.attention.taylorshift.taylor_attention_weights", refuse)
    TaylorShift(12, num_heads=3, form="direct")(tokens())
    hooked = TaylorShift(12, num_heads=3, form="efficient")
    hooked.attn_drop.register_forward_hook(lambda *_: None)
    hooked(tokens())


def test_mixed_precision_with_query_norms() -> None:
    """Under autocast LayerNorm gives fp32 queries beside bf16 values; they must meet in one dtype."""
    attention = TaylorShift(12, num_heads=3, qk_norm=True, norm_layer=nn.LayerNorm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(tokens())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert attention.temperature.grad.dtype == torch.float32


def test_bound_options_build_a_plain_instance() -> None:
    bound = bind_options("taylorshift", {"form": "efficient", "temperature_init": 3})
    assert issubclass(bound, TaylorShift)
    attention = bound(12, num_heads=3, qkv_bias=True)
    assert type(attention) is TaylorShift
    assert attention.form == "efficient"
    assert attention.temperature.tolist() == [3.0] * 3
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        torch.testing.assert_close(copied(tokens()), attention(tokens()))
    assert TaylorShift(12, num_heads=3).form == "auto"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("taylorshft", {}, r"one of taylorshift, softmax, .*, got 'taylorshft'; did you mean 'taylorshift'?"),
        ("taylorshift", {"from": "direct"}, r"no option 'from'; did you mean 'form'\? \(options: form, impl, temp"),
        ("taylorshift", {"form": "efficent"}, "one of auto, direct, efficient, got 'efficent'"),
        ("taylorshift", {"form": None}, "got None"),
        ("taylorshift", {"form": ["direct"]}, r"got \['direct'\]"),
        ("taylorshift", {"impl": "reference2"}, "impl must be one of auto, reference"),
        ("taylorshift", {"temperature_init": "warm"}, "must be a number, got 'warm'"),
        ("taylorshift", {1: 2}, "no option 1"),
        ("softmax", {"form": "direct"}, r"'softmax' has no option 'form' \(options: none\)"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_options(name, options)
    with pytest.raises(ValueError, match=message):
        bind_options(name, options)


def test_valid_options_pass() -> None:
    check_attention_options("taylorshift", {})
    check_attention_options("taylorshift", {"form": "auto", "impl": "auto", "temperature_init": 1})
    check_attention_options("softmax", {})
