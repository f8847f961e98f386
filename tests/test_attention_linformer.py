"""Linformer: the limit in which it is softmax attention, shorter inputs, what it needs to know of the tokens, and the rest."""

from __future__ import annotations

import attention_checks as checks
import pytest
import timm
import torch
from attention_checks import heads, relative_error, softmax_attention
from torch import Tensor

from taylorvit.attention import Linformer, bind_options, check_attention_options
from taylorvit.attention.linformer import linformer_attention
from taylorvit.models import SequenceEncoder

each_sharing = pytest.mark.parametrize("share_kv", [False, True])


def projections(num_tokens: int = 11, k: int = 6) -> tuple[Tensor, Tensor]:
    E, F = torch.randn(2, num_tokens, k, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return E, F


def attention(**options: object) -> Linformer:
    torch.manual_seed(0)
    return Linformer(16, num_heads=4, **{"num_tokens": 13, "k": 6, **options})


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_with_identities_it_is_softmax_attention(scale: float) -> None:
    q, k, v = heads(scale=scale)
    identity = torch.eye(11, dtype=torch.float64)
    wanted = softmax_attention(q, k, v)
    torch.testing.assert_close(linformer_attention(q, k, v, identity, identity), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linformer_attention(q, k, v, identity), wanted, rtol=1e-12, atol=1e-12)
    # Any order of the mixtures is the same attention, as long as keys and values have the same one.
    order = identity[:, torch.randperm(11, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(linformer_attention(q, k, v, order), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(linformer_attention(q, k, v, order, identity), wanted, atol=1e-2)


def test_it_is_softmax_attention_to_the_mixtures() -> None:
    (q, k, v), (E, F) = heads(), projections()
    keys, values = torch.einsum("nm,bhnd->bhmd", E, k), torch.einsum("nm,bhnd->bhmd", F, v)
    wanted = softmax_attention(q, keys, values)
    torch.testing.assert_close(linformer_attention(q, k, v, E, F), wanted, rtol=1e-12, atol=1e-12)


def test_queries_do_not_meet_but_the_order_of_the_keys_matters() -> None:
    (q, k, v), (E, F) = heads(), projections()
    y = linformer_attention(q, k, v, E, F)
    torch.testing.assert_close(linformer_attention(q.flip(-2), k, v, E, F), y.flip(-2))
    assert not torch.allclose(linformer_attention(q, k.flip(-2), v.flip(-2), E, F), y, atol=1e-2)


def test_fewer_tokens_are_the_same_as_zeros_behind_them() -> None:
    (q, k, v), (E, F) = heads(), projections()
    y = linformer_attention(*(x[..., :7, :] for x in (q, k, v)), E, F)
    k, v = k.clone(), v.clone()
    k[..., 7:, :], v[..., 7:, :] = 0, 0
    torch.testing.assert_close(y, linformer_attention(q, k, v, E, F)[..., :7, :])


@each_sharing
def test_parameters_belong_to_tokens_and_start_within_the_bound(share_kv: bool) -> None:
    module = attention(num_tokens=50, k=16, share_kv=share_kv)
    assert module.key_projection.shape == (50, 16)
    assert (module.value_projection is None) == share_kv
    names = {name for name, _ in module.named_parameters() if "projection" in name}
    assert names == {"key_projection"} | (set() if share_kv else {"value_projection"})
    for projection in (module.key_projection, module.value_projection):
        if projection is not None:
            assert 0.24 < float(projection.detach().abs().max()) <= 0.25
            assert float(projection.detach().mean()) == pytest.approx(0, abs=0.02)
    if not share_kv:
        assert not torch.allclose(module.key_projection, module.value_projection)
    before = module.key_projection.clone()
    torch.manual_seed(5)
    module.reset_parameters()
    assert not torch.allclose(module.key_projection, before)


def test_layers_and_seeds_start_from_other_projections() -> None:
    model = checks.vit("linformer", k=5)
    first, second = (block.attn.key_projection for block in model.blocks)
    assert not torch.allclose(first, second)
    assert torch.equal(checks.vit("linformer", k=5).blocks[1].attn.key_projection, second)
    torch.manual_seed(1)
    assert not torch.allclose(Linformer(16, 4, num_tokens=17, k=5).key_projection, first)


def test_the_rest_of_a_model_starts_as_softmax_s() -> None:
    ours, theirs = checks.vit("linformer", k=5).state_dict(), checks.vit("softmax").state_dict()
    assert set(theirs) < set(ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@each_sharing
def test_the_operation_gets_its_own_projections(share_kv: bool) -> None:
    module = attention(share_kv=share_kv)
    x = checks.tokens()
    q, k, v = module.qkv(x).reshape(2, 13, 3, 4, 4).permute(2, 0, 3, 1, 4)
    E, F = module.key_projection, module.key_projection if share_kv else module.value_projection
    y = softmax_attention(q, E.mT @ k, F.mT @ v)
    torch.testing.assert_close(module(x), module.proj(y.transpose(1, 2).flatten(2)))


def test_gradients() -> None:
    inputs = (x.requires_grad_() for x in (*heads(N=5, D=3), *projections(6, 4)))
    assert torch.autograd.gradcheck(linformer_attention, tuple(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_long_sequences_of_half_precision(dtype: torch.dtype, scale: float) -> None:
    """1,024 tokens of dimension 64: the error is that of rounding the output, even where scores are large."""
    q, k, v = (x.to(dtype) for x in heads(B=1, H=1, N=1024, D=64, scale=scale))
    E, F = (x / 8 for x in projections(1024, 32))
    truth = linformer_attention(q.double(), k.double(), v.double(), E, F)
    y = linformer_attention(q, k, v, E.float(), F.float())
    assert y.dtype == dtype
    assert relative_error(y.double(), truth) < torch.finfo(dtype).eps / 2


def test_bad_options_and_too_many_tokens_are_refused() -> None:
    for options, message in [
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 2.0}, r"k must be .*, got 2\.0"),
        ({"share_kv": 1}, "share_kv must be true or false, got 1"),
        ({"num_tokens": 17}, r"no option 'num_tokens' \(options: k, share_kv\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_attention_options("linformer", options)
    with pytest.raises(ValueError, match="num_tokens must be a whole number of at least 1, got 0"):
        attention(num_tokens=0)
    with pytest.raises(ValueError, match="built for num_tokens 13: it takes at most that many tokens, got 14"):
        attention()(checks.tokens(N=14))
    with pytest.raises(ValueError, match="cannot leave out keys: attn_mask must be None, got torch.bool"):
        attention()(checks.tokens(), attn_mask=torch.ones(2, 1, 1, 13, dtype=torch.bool))
    assert "num_heads=4, num_tokens=13, k=6, share_kv=False" in repr(attention())


def test_the_registry_hands_the_number_of_tokens_on_and_asks_for_it() -> None:
    with pytest.raises(ValueError, match="'linformer' has parameters for every token: num_tokens must be given, got None"):
        bind_options("linformer", {})
    module = bind_options("linformer", {"k": 5}, num_tokens=9)(16, num_heads=4)
    assert type(module) is Linformer
    assert module.key_projection.shape == (9, 5)
    assert bind_options("linformer", {}, 9)(16, num_heads=4).k == 256
    assert bind_options("linear", {}, 9) is bind_options("linear", {})


@pytest.mark.parametrize(
    ("sizes", "num_tokens"),
    [
        ({}, 17),
        ({"class_token": False, "global_pool": "avg"}, 16),
        ({"reg_tokens": 3}, 20),
        ({"img_size": (16, 40), "patch_size": (8, 4)}, 21),
        ({"img_size": 36, "dynamic_img_size": True, "dynamic_img_pad": True}, 26),
    ],
)
def test_a_vision_transformer_tells_it_the_tokens_of_its_images(sizes: dict, num_tokens: int) -> None:
    base = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 4, "depth": 1, "attention_options": {"k": 5}}
    model = timm.create_model("taylorvit_tiny_patch16_224", attention="linformer", **{**base, **sizes})
    assert model.blocks[0].attn.num_tokens == num_tokens
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    height, width = (sizes.get("img_size", 32),) * 2 if isinstance(sizes.get("img_size", 32), int) else sizes["img_size"]
    assert model(torch.randn(1, 3, height, width)).isfinite().all()
    assert seen == [num_tokens]


def test_a_vision_transformer_takes_smaller_images_and_refuses_larger_ones() -> None:
    model = checks.vit("linformer", k=5).eval()
    with pytest.raises(ValueError, match=r"img_size \(40, 40\) with patch_size \(8, 8\) gives 26 tokens, .* at most 17"):
        model.set_input_size((40, 40))
    with pytest.raises(ValueError, match=r"img_size \(32, 32\) with patch_size \(4, 4\) gives 65 tokens"):
        model.set_input_size(patch_size=(4, 4))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)  # nothing was changed
    model.set_input_size(24)
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, 5)
    model.set_input_size((32, 32))
    checks.vit("softmax").set_input_size((40, 40))
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 4, "depth": 1, "attention_options": {"k": 5}}
    dynamic = timm.create_model("taylorvit_tiny_patch16_224", attention="linformer", dynamic_img_size=True, **sizes)
    assert dynamic(torch.randn(1, 3, 16, 40)).shape == (1, 1000)
    with pytest.raises(ValueError, match="built for num_tokens 17: .*, got 26"):
        dynamic(torch.randn(1, 3, 40, 40))


@pytest.mark.parametrize(("global_pool", "num_tokens"), [("token", 13), ("avg", 12)])
def test_the_sequence_model_tells_it_its_longest_sequence(global_pool: str, num_tokens: int) -> None:
    sizes = {"vocab_size": 20, "max_length": 12, "embed_dim": 16, "attention": "linformer", "attention_options": {"k": 5}}
    model = SequenceEncoder(global_pool=global_pool, **sizes)
    assert model.blocks[0].attn.num_tokens == num_tokens
    for length in (12, 4):
        model(torch.zeros(2, length, dtype=torch.long)).square().sum().backward()
    assert model.blocks[0].attn.key_projection.grad.isfinite().all()
    with pytest.raises(ValueError, match="attention 'linformer' cannot leave out padding: padding_idx must be None, got 0"):
        SequenceEncoder(padding_idx=0, **sizes)


def test_what_every_attention_does() -> None:
    E, F = projections()
    checks.check_core_is_full_precision(lambda q, k, v: linformer_attention(q, k, v, E, F))
    for share_kv in (False, True):
        options = {"num_tokens": 13, "k": 6, "share_kv": share_kv}
        checks.check_samples_do_not_meet("linformer", **options)
        checks.check_half_precision("linformer", torch.float16, 2e-3, **options)
        checks.check_half_precision("linformer", torch.bfloat16, 2e-2, **options)
        checks.check_evaluation_is_deterministic("linformer", **options)
        checks.check_building_draws_like_softmax("linformer", **options)
        checks.check_copies("linformer", **options)
        checks.check_resume("linformer", **options)


def test_it_compiles_and_works_in_whole_models() -> None:
    torch.compiler.reset()
    module = attention()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(checks.tokens()), module(checks.tokens()))
    compiled(checks.tokens()).square().sum().backward()
    checks.check_vision_transformer("linformer", k=5)


def test_the_package_of_the_same_name_agrees() -> None:
    package = pytest.importorskip("linformer", reason="optional oracle: pip install linformer")
    torch.manual_seed(0)
    theirs = package.LinformerSelfAttention(16, seq_len=13, k=6, heads=4)
    ours = attention(proj_bias=True)
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight]))
        ours.key_projection.copy_(theirs.proj_k)
        ours.value_projection.copy_(theirs.proj_v)
        ours.proj.load_state_dict(theirs.to_out.state_dict())
    torch.testing.assert_close(ours(checks.tokens()), theirs(checks.tokens()))
