"""The sequence encoder: what it computes, padding, timm's conventions, and what it refuses."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import taylorvit  # noqa: F401  registers the models
from taylorvit.attention import ATTENTIONS
from taylorvit.config import ModelConfig
from taylorvit.models import SequenceEncoder, attention_forms, build_model, random_inputs
from taylorvit.models.sequence import sinusoidal_positions

SIZES = {"vocab_size": 20, "max_length": 12, "num_classes": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}


def encoder(**options: object) -> SequenceEncoder:
    torch.manual_seed(0)
    model = SequenceEncoder(**{**SIZES, **options})
    nn.init.normal_(model.head.weight)  # the classifier starts at 0, which would hide everything
    return model.eval()


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(1, 20, (3, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({"attention": "softmax"}, 464_906 - 256), ({}, 464_910 - 256), ({"num_heads": 64}, 464_906 + 64 - 256)],
)
def test_the_paper_s_model_for_cifar_pixels(options: dict, parameters: int) -> None:
    """The authors' first layer is linear on one-hot tokens with a bias of 256, which an embedding table contains."""
    model = timm.create_model("taylorvit_sequence", vocab_size=256, max_length=1024, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_positions_are_those_of_the_transformer() -> None:
    positions = sinusoidal_positions(50, 6)
    for place, column in [(0, 0), (7, 0), (7, 1), (49, 4), (49, 5)]:
        angle = place / 10000 ** (column // 2 * 2 / 6)
        assert positions[place, column] == pytest.approx(math.cos(angle) if column % 2 else math.sin(angle), abs=1e-5)
    assert sinusoidal_positions(4, 5).shape == (4, 5)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_order_matters_through_the_positions_alone(global_pool: str) -> None:
    model, x = encoder(global_pool=global_pool), tokens()
    assert not torch.allclose(model(x), model(x.flip(1)))
    model.positions.zero_()
    torch.testing.assert_close(model(x), model(x.flip(1)))


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name in ("taylorshift", "softmax")])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_padding_changes_nothing(attention: str, global_pool: str) -> None:
    model = encoder(padding_idx=0, attention=attention, global_pool=global_pool)
    x = tokens(7)
    padded = nn.functional.pad(x, (0, 5))
    torch.testing.assert_close(model(padded), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encoder(attention=attention, global_pool=global_pool)(padded), model(x), atol=1e-3)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_filling_up_leaves_no_sample_to_its_batch(global_pool: str) -> None:
    model = encoder(fill_idx=0, global_pool=global_pool)
    x = tokens(7)
    torch.testing.assert_close(model(nn.functional.pad(x, (0, 3))), model(x))
    filled = nn.functional.pad(x, (0, SIZES["max_length"] - 7))
    torch.testing.assert_close(encoder(global_pool=global_pool)(filled), model(x))
    with pytest.raises(ValueError, match="sequences have at most max_length 12 tokens, got 13"):
        model(tokens(13))


def test_without_padding_the_mask_changes_nothing() -> None:
    """The class token is no padding, whatever the mask says of the tokens."""
    torch.testing.assert_close(encoder(padding_idx=0)(tokens()), encoder()(tokens()))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = encoder(padding_idx=0), nn.functional.pad(tokens(8), (0, 4))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_timm_conventions() -> None:
    model = encoder()
    assert model.forward_head(model.forward_features(tokens()), tokens(), pre_logits=True).shape == (3, 16)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(tokens()).shape == (3, 7)
    model.reset_classifier(0)
    assert model(tokens()).shape == (3, 16)
    with pytest.raises(ValueError, match="global_pool is 'token' for good, got 'avg'"):
        model.reset_classifier(7, "avg")
    assert model.no_weight_decay() == {"embedding.weight", "cls_token", "*.temperature"}
    assert encoder().forward_head(torch.zeros(2, 13, 16)).shape == (2, 4)
    with pytest.raises(ValueError, match="needs the tokens that the features are of"):
        encoder(global_pool="avg", padding_idx=0).forward_head(torch.zeros(2, 12, 16))
    with pytest.raises(ValueError, match="features_only must be False"):
        timm.create_model("taylorvit_sequence", features_only=True, **SIZES)


def test_what_it_starts_from() -> None:
    model = SequenceEncoder(**SIZES)
    assert not model.head.weight.any()
    assert not any("ls1" in name for name, _ in model.named_parameters())
    assert any("ls1" in name for name, _ in SequenceEncoder(init_values=1e-4, **SIZES).named_parameters())
    assert "positions" not in model.state_dict()
    assert 0.8 < float(model.embedding.weight.detach().std()) < 1.2
    half = SequenceEncoder(dtype=torch.bfloat16, **SIZES)
    half.reset_classifier(3)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_a_model_from_meta_is_initialised(attention: str) -> None:
    model = SequenceEncoder(device="meta", attention=attention, **SIZES).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(math.nan)
    model.init_weights()
    torch.testing.assert_close(model.positions, sinusoidal_positions(12, 16))
    assert [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()] == []


def test_layer_decay_counts_layers() -> None:
    model = encoder()
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    found = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["embedding.weight"] == found["cls_token"] == 0.125
    assert (found["blocks.0.attn.qkv.weight"], found["blocks.1.attn.qkv.weight"]) == (0.25, 0.5)
    assert found["head.weight"] == 1.0


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0, "global_pool": "avg"}, {"attention": "softmax", "padding_idx": 0}])
def test_export_with_any_batch_and_length_and_fx(options: dict) -> None:
    model = encoder(**options, attention_options={"form": "direct"} if options.get("attention") != "softmax" else {})
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=12)
    with torch.no_grad():
        exported = torch.export.export(model, (tokens(8),), dynamic_shapes=({0: batch, 1: length},), strict=False).module()
        for x in (tokens(8), tokens(11)[:2]):
            torch.testing.assert_close(exported(x), model(x))
        if not options:
            torch.testing.assert_close(torch.fx.symbolic_trace(model)(tokens(8)), model(tokens(8)))


def test_every_parameter_gets_a_gradient_and_drop_path_rises() -> None:
    model = encoder(drop_path_rate=0.2)
    model(tokens()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == [0, 0.2]


def test_config_builds_it_and_names_the_form() -> None:
    config = ModelConfig(name="taylorvit_sequence", vocab_size=256, max_length=1024, num_classes=10, embed_dim=32, num_heads=8)
    model = build_model(config, device="meta")
    assert isinstance(model, SequenceEncoder)
    assert attention_forms(model) == ["efficient"]  # 1,025 tokens, d = 4
    inputs = random_inputs(config, 3)
    assert (inputs.shape, inputs.dtype) == ((3, 1024), torch.int64)
    assert build_model(config)(inputs).shape == (3, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "model.vocab_size must be given for taylorvit_sequence"),
        ({"max_length": None}, "model.max_length must be given for taylorvit_sequence"),
        ({"img_size": 32}, "model.img_size is 32, but taylorvit_sequence reads no images"),
        ({"patch_size": 4}, "model.patch_size is 4, but taylorvit_sequence reads no images"),
        ({"num_heads": 7}, r"num_heads must divide the width 256: one of \[1, 2, 4, .*256\], got 7"),
        ({"kwargs": {"global_pool": "map"}}, "global_pool must be one of token, avg, got 'map'"),
        ({"kwargs": {"fill_idx": 20}}, "fill_idx must be a token, 0 to 19, got 20"),
        ({"kwargs": {"fill_idx": 0, "padding_idx": 1}}, "only one of padding_idx and fill_idx can be given, got 1 and 0"),
        ({"kwargs": {"padding_idx": 20}}, "padding_idx must be a token, 0 to 19, got 20"),
        ({"kwargs": {"paddin_idx": 0}}, "unknown keyword 'paddin_idx'; did you mean 'padding_idx'"),
        ({"name": "taylorvit_tiny_patch16_224"}, "model.vocab_size is 20, but taylorvit_tiny_patch16_224 reads images"),
    ],
)
def test_bad_settings_are_named(changes: dict, message: str) -> None:
    settings = {"name": "taylorvit_sequence", "vocab_size": 20, "max_length": 12, **changes}
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(**settings), device="meta")


def test_bad_tokens_are_named() -> None:
    model = encoder()
    with pytest.raises(ValueError, match="at most max_length 12 tokens, got 13"):
        model(torch.zeros(1, 13, dtype=torch.long))
    for x in (torch.zeros(1, 3, 4, dtype=torch.long), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"tokens must be int64 or int32 \(B, N\), got torch"):
            model(x)
