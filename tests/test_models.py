"""The registered models: parameter counts, timm's tools, and building from a config.

Every tool is tried with every model and the two attentions that are compared most, and with every other attention in one model.
"""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.layers import DropPath
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import AttentionExtract, ModelEmaV3
from torch import nn

from taylorvit.attention import ATTENTIONS, TaylorShift
from taylorvit.config import ModelConfig
from taylorvit.models import MODEL_NAMES, TaylorViT, attention_forms, build_model

TWINS = ("taylorshift", "softmax")
OPTIONS: dict[str, dict] = {
    "taylorshift": {"form": "efficient", "temperature_init": 2.0},
    "taylor_order": {"order": 4, "form": "efficient"},
    "linformer": {"k": 3, "share_kv": True},
    "nystrom": {"num_landmarks": 3, "pinv_iterations": 2, "conv_kernel_size": 3},
    "performer": {"num_features": 8, "seed": 3},
    "rfa": {"num_features": 8, "seed": 3},
    "reformer": {"bucket_size": 2, "num_hashes": 2},
    "eva": {"window_size": 2, "overlap": 1, "num_landmarks": 3},
}
each_model = pytest.mark.parametrize("name", MODEL_NAMES)
each_twin = pytest.mark.parametrize("attention", TWINS)
each_attention = pytest.mark.parametrize("attention", list(ATTENTIONS))
each_pair = pytest.mark.parametrize(
    ("name", "attention"),
    [(name, twin) for name in MODEL_NAMES for twin in TWINS]
    + [(MODEL_NAMES[0], other) for other in ATTENTIONS if other not in TWINS],
)


def small(name: str, attention: str = "taylorshift", **kwargs) -> nn.Module:
    """Create the model with two blocks, for images of 32 px: 4 patches and the class token."""
    torch.manual_seed(0)
    return timm.create_model(name, **{"attention": attention, "img_size": 32, "depth": 2, "num_classes": 7, **kwargs}).eval()


def images(side: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "parameters", "heads"), [("tiny", 5_721_868, 3), ("small", 22_059_568, 6), ("base", 86_585_464, 12)]
)
def test_parameter_counts(size: str, parameters: int, heads: int) -> None:
    model = timm.create_model(f"taylorvit_{size}_patch16_224", device="meta")
    assert count(model) == parameters
    assert len(model.blocks) == 12
    twin = timm.create_model(f"taylorvit_{size}_patch16_224", attention="softmax", device="meta")
    assert count(model) - count(twin) == 12 * heads  # one temperature per head and layer
    without = timm.create_model(f"taylorvit_{size}_patch16_224", init_values=0.0, device="meta")
    assert count(model) - count(without) == 12 * 2 * model.embed_dim


def test_importing_the_package_registers_the_models() -> None:
    code = "import timm, taylorvit; print(*timm.list_models('taylorvit*'), *timm.list_models(module='taylor_vit'))"
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert sorted(set(result.stdout.split())) == sorted([*MODEL_NAMES, "taylorvit_sequence"])
    assert not result.stderr
    assert set(MODEL_NAMES) == {f"taylorvit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    assert not timm.list_models("taylorvit*", pretrained=True)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_card_s_input_size_is_the_model_s(name: str) -> None:
    """A fixed_input_size card tells timm to build the model for its images, as for every ViT."""
    model = timm.create_model(name, depth=1, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    assert model.patch_embed.img_size == (64, 64)


@each_model
@each_twin
def test_data_config_is_the_authors_evaluation(name: str, attention: str) -> None:
    config = resolve_data_config(model=timm.create_model(name, attention=attention, device="meta"))
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 224, 224), 1.0, "bicubic")
    assert config["mean"] == (0.485, 0.456, 0.406)


@each_model
@each_attention
def test_forward_and_backward_reach_every_parameter(name: str, attention: str) -> None:
    model = small(name, attention)
    assert all(type(block.attn) is ATTENTIONS[attention] for block in model.blocks)
    y = model(images())
    assert y.shape == (2, 7)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@each_model
def test_twins_start_from_the_same_weights(name: str) -> None:
    ours, softmax = small(name).state_dict(), small(name, "softmax").state_dict()
    assert set(ours) - set(softmax) == {f"blocks.{i}.attn.temperature" for i in range(2)}
    assert all(torch.equal(ours[key], softmax[key]) for key in softmax)


@each_model
@each_twin
@pytest.mark.parametrize("num_heads", [1, 2, 4, 12, 64, 192])
def test_head_count_override(name: str, attention: str, num_heads: int) -> None:
    model = timm.create_model(name, attention=attention, num_heads=num_heads, device="meta")
    default = timm.create_model(name, attention=attention, device="meta")
    change = 12 * (num_heads - default.blocks[0].attn.num_heads) if attention == "taylorshift" else 0
    assert count(model) - count(default) == change
    assert model.blocks[0].attn.head_dim == model.embed_dim // num_heads


def test_more_heads_run() -> None:
    assert small("taylorvit_tiny_patch16_224", num_heads=192)(images()).isfinite().all()  # head dimension 1


@each_pair
def test_image_sizes(name: str, attention: str) -> None:
    assert small(name, attention, img_size=48)(images(48)).shape == (2, 7)
    largest = 80 if attention == "linformer" else 32  # which takes no more tokens than it was built for
    model = small(name, attention, img_size=largest)
    model.set_input_size((64, 64))
    assert model(images(64)).shape == (2, 7)
    dynamic = small(name, attention, dynamic_img_size=True, img_size=largest)
    assert dynamic(torch.randn(1, 3, 48, 80)).shape == (1, 7)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(images(32))


@each_pair
def test_features(name: str, attention: str) -> None:
    extractor = timm.create_model(name, attention=attention, features_only=True, img_size=32, depth=4, out_indices=(1, 2, 3))
    assert [tuple(feature.shape[-2:]) for feature in extractor(images())] == [(2, 2)] * 3
    model = small(name, attention).eval()
    last, intermediates = model.forward_intermediates(images(), indices=2, norm=True)
    assert len(intermediates) == 2
    torch.testing.assert_close(last, model.forward_features(images()))
    model.prune_intermediate_layers([0])
    assert len(model.blocks) == 1
    assert model(images()).shape == (2, 5, model.embed_dim)  # the tokens, without pooling and classifier


@each_model
@each_twin
def test_gradient_checkpointing_changes_nothing(name: str, attention: str) -> None:
    model = small(name, attention)
    plain = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing(True)
    checkpointed = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    for left, right in zip(plain, checkpointed):
        torch.testing.assert_close(left, right)


@each_pair
def test_reset_classifier(name: str, attention: str) -> None:
    model = small(name, attention)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.embed_dim)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_heads": 12, "attention_options": OPTIONS},
        {"img_size": 48, "in_chans": 1, "init_values": 0.0},
    ],
    ids=["plain", "options", "sizes"],
)
@each_pair
def test_save_for_hf_round_trip(name: str, attention: str, overrides: dict, tmp_path: Path) -> None:
    if "attention_options" in overrides:
        own = {"attention_options": OPTIONS[attention]} if attention in OPTIONS else {}
        overrides = {"num_heads": 12, **own}
    model = small(name, attention, **overrides)
    save_for_hf(model, tmp_path, safe_serialization=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_args"]["attention"] == attention
    assert stored["model_args"].get("attention_options") == overrides.get("attention_options")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, overrides.get("in_chans", 3), *[overrides.get("img_size", 32)] * 2)
    assert torch.equal(loaded(x), model(x))
    assert repr(loaded.blocks[0].attn) == repr(model.blocks[0].attn)


@each_model
def test_fine_tuning_adapts_head_and_position_embedding(name: str, tmp_path: Path) -> None:
    source = small(name)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 7}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, img_size=64, depth=2)
    assert model.pos_embed.shape[1] == 16
    assert model.head.out_features == 5
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert torch.equal(model.blocks[1].attn.temperature, source.blocks[1].attn.temperature)


@each_pair
def test_compiles_without_graph_break(name: str, attention: str) -> None:
    model = small(name, attention)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images()), model(images()))


@each_model
@each_twin
def test_exports_with_dynamic_batch(name: str, attention: str) -> None:
    model = small(name, attention)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(batch=5)), model(images(batch=5)))


@each_model
@each_twin
def test_layer_decay_groups(name: str, attention: str) -> None:
    groups = param_groups_layer_decay(
        timm.create_model(name, attention=attention, device="meta"), weight_decay=0.05, layer_decay=0.75
    )
    assert len(groups) == 28
    assert len({group["lr_scale"] for group in groups}) == 14


@each_model
def test_no_weight_decay_on_temperature(name: str) -> None:
    model = small(name)
    # The shape alone would exempt (H,); the name must do so too, for a group matcher that looks at names only.
    assert "*.temperature" in model.no_weight_decay()
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    named = dict(model.named_parameters())
    spared = {key for key, parameter in named.items() if id(parameter) not in decayed}
    assert {"blocks.0.attn.temperature", "pos_embed", "cls_token"} <= spared
    assert "blocks.0.attn.qkv.weight" not in spared


@each_model
def test_attention_maps_by_hook(name: str) -> None:
    model = small(name, attention_options={"form": "direct"})
    wanted = model(images())
    heads = model.blocks[0].attn.num_heads
    maps = AttentionExtract(model, method="hook")(images())
    assert list(maps) == ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    for matrix in maps.values():
        assert matrix.shape == (2, heads, 5, 5)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, heads, 5))
    torch.testing.assert_close(model(images()), wanted)


@each_model
@each_twin
def test_fx_tracing(name: str, attention: str) -> None:
    model = small(name, attention)
    extract = AttentionExtract(model, names=["blocks.1.attn.proj"], method="fx")
    (feature,) = extract(images()).values()
    assert feature.shape == (2, 5, model.embed_dim)


@each_model
@each_twin
def test_deferred_initialisation(name: str, attention: str) -> None:
    """A model made on `meta` and materialised later has no uninitialised parameter."""
    model = timm.create_model(name, attention=attention, img_size=32, depth=1, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights(needs_reset=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if attention == "taylorshift":
        assert (model.blocks[0].attn.temperature == 1).all()


@each_pair
def test_dtype_ema_and_copies(name: str, attention: str) -> None:
    assert small(name, attention, dtype=torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16
    model = small(name, attention, attention_options={"form": "efficient"} if attention == "taylorshift" else {})
    wanted = model(images())
    ema = ModelEmaV3(model)
    ema.update(model)
    for other in (ema.module, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(images()), wanted)


@each_model
def test_forms_agree_in_the_whole_model(name: str) -> None:
    direct = small(name, attention_options={"form": "direct"}).double()
    efficient = small(name, attention_options={"form": "efficient"}).double()
    efficient.load_state_dict(direct.state_dict())
    torch.testing.assert_close(direct(images().double()), efficient(images().double()), rtol=1e-12, atol=1e-12)


@each_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, r"num_heads must divide the width \d+: one of \[1, 2, 3, .*\], got 5"),
        ({"attn_drop_rate": 0.1}, "attn_drop must be 0, got 0.1"),
        ({"img_size": 40}, "img_size must be a positive multiple of patch_size 16, got 40"),
        ({"attention": "sofmax"}, "did you mean 'softmax'"),
        ({"attention_options": {"frm": "direct"}}, "did you mean 'form'"),
        ({"attention": "softmax", "num_heads": 5}, "num_heads must divide"),
        ({"attention": "softmax", "attention_options": {"form": "direct"}}, "options: none"),
    ],
)
def test_wrong_keywords_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device="meta", **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        timm.create_model(name, device="meta", heads=4)


def test_build_model_hands_every_key_on() -> None:
    config = ModelConfig(
        name="taylorvit_small_patch16_224",
        attention="taylorshift",
        attention_options={"form": "efficient", "temperature_init": 4},
        num_classes=11,
        in_chans=1,
        img_size=28,
        patch_size=7,
        embed_dim=48,
        depth=3,
        num_heads=8,
        mlp_ratio=2.0,
        drop_path_rate=0.3,
        drop_rate=0.2,
        kwargs={"init_values": None, "global_pool": "avg", "class_token": False, "qk_norm": True},
    )
    model = build_model(config)
    assert isinstance(model, TaylorViT)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 11)
    attention = model.blocks[2].attn
    assert (attention.form, attention.num_heads, attention.head_dim) == ("efficient", 8, 6)
    assert attention.temperature.tolist() == [4.0] * 8
    assert isinstance(attention.q_norm, nn.LayerNorm)
    assert isinstance(model.blocks[0].ls1, nn.Identity)
    assert model.blocks[0].mlp.fc1.out_features == 96
    assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.head_drop.p == 0.2
    assert model.patch_embed.num_patches == 16
    assert model.cls_token is None


def test_build_model_on_meta_and_layer_scale_default() -> None:
    model = build_model(ModelConfig(), device="meta")
    assert count(model) == 5_721_868
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (build_model(ModelConfig(depth=1)).blocks[0].ls1.gamma == 1e-4).all()


def test_build_model_takes_timm_s_models_as_softmax_baseline() -> None:
    model = build_model(ModelConfig(name="vit_tiny_patch16_224", attention="softmax", img_size=32, num_classes=3, depth=2))
    assert attention_forms(model) == ["softmax", "softmax"]
    assert model(images()).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_build_model_takes_timm_s_other_networks(name: str) -> None:
    """A convolutional network has no img_size: the config's says how large the images are made."""
    model = build_model(ModelConfig(name=name, attention="softmax", img_size=64, in_chans=1, num_classes=3)).eval()
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    assert attention_forms(model) == []
    assert count(build_model(ModelConfig(name=name, attention="softmax", drop_path_rate=0.1), device="meta")) > 1e6


def test_a_rate_of_zero_is_off_in_any_network() -> None:
    """Swin's own drop path is 0.1; RepViT has none, so that 0 is what it has and 0.1 is refused."""
    swin = ModelConfig(name="swin_tiny_patch4_window7_224", attention="softmax")
    assert not any(isinstance(module, DropPath) for module in build_model(swin, device="meta").modules())
    repvit = ModelConfig(name="repvit_m0_9", attention="softmax", img_size=64)
    assert count(build_model(repvit, device="meta")) > 1e6
    with pytest.raises(ValueError, match="repvit_m0_9' refuses these settings: .*drop_path_rate"):
        build_model(dataclasses.replace(repvit, drop_path_rate=0.1), device="meta")


def test_build_model_names_what_a_network_does_not_have() -> None:
    with pytest.raises(ValueError, match="model 'resnet18' refuses these settings: .*num_heads"):
        build_model(ModelConfig(name="resnet18", attention="softmax", num_heads=2), device="meta")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "taylorvit_tny_patch16_224"},
            r"no model 'taylorvit_tny_patch16_224'; did you mean 'taylorvit_tiny_patch16_224'",
        ),
        ({"name": "vit_tiny_patch16_225"}, "did you mean .vit_tiny_patch16_224"),
        ({"name": "vit_tiny_patch16_224"}, "set attention to 'softmax' or use one of taylorvit_tiny.*got attention 'taylorsh"),
        (
            {"name": "vit_tiny_patch16_224", "attention": "softmax", "attention_options": {"form": "direct"}},
            r"no option 'form' \(options: none\)",
        ),
        (
            {"name": "vit_tiny_patch16_224", "attention": "softmax", "num_heads": 5},
            "refuses these settings: .*dim should be div",
        ),
        ({"name": "vit_tiny_patch16_224", "attention": "softmax", "kwargs": {"layerscale": 1}}, "refuses these settings"),
        ({"attention": "taylorshfit"}, "did you mean 'taylorshift'"),
        ({"attention_options": {"form": "fast"}}, "got 'fast'"),
        ({"num_heads": 5}, r"one of \[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192\], got 5"),
        ({"img_size": 28}, "multiple of patch_size 16, got 28"),
        ({"kwargs": {"qk_nrm": True}}, "unknown keyword 'qk_nrm'; did you mean 'qk_norm'"),
        ({"kwargs": {"depth": 3}}, "must not hold 'depth': set model.depth"),
        ({"kwargs": {"attn_layer": "diff"}}, "unknown keyword 'attn_layer'"),
    ],
)
def test_build_model_explains_what_is_wrong(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(**settings), device="meta")


def test_attention_forms_follow_tokens_and_options() -> None:
    model = build_model(ModelConfig(), device="meta")
    assert attention_forms(model) == ["direct"] * 12  # 197 tokens, N0(64) = 4161
    assert attention_forms(model, 4161) == ["efficient"] * 12
    many_heads = build_model(ModelConfig(num_heads=24, depth=2), device="meta")
    assert attention_forms(many_heads) == ["efficient"] * 2  # N0(8) = 73
    forced = build_model(ModelConfig(attention_options={"form": "efficient"}, depth=1), device="meta")
    assert attention_forms(forced) == ["efficient"]
    assert attention_forms(build_model(ModelConfig(attention="softmax", depth=3), device="meta")) == ["softmax"] * 3
    large = build_model(ModelConfig(img_size=1040, depth=1), device="meta")
    assert attention_forms(large) == ["efficient"]  # 65 * 65 + 1 = 4226 tokens
    edge = timm.create_model(MODEL_NAMES[0], img_size=(96, 192), num_heads=24, depth=1, device="meta")
    assert attention_forms(edge) == ["efficient"]  # 72 patches alone would still be direct: N0(8) = 72.7
    assert attention_forms(nn.Linear(2, 2)) == []
    with pytest.raises(ValueError, match="num_tokens is needed for a TaylorShift"):
        attention_forms(TaylorShift(12, 3))
