"""Export folders: timm rebuilds the model bit for bit, with our preprocessing, whatever was overridden."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from taylorvit.config import ModelConfig
from taylorvit.export import export_model
from taylorvit.models import build_model
from taylorvit.weights import load_into, load_weights

TINY: dict[str, Any] = {"depth": 1, "img_size": 32, "patch_size": 8, "num_classes": 4}
CASES: dict[str, dict[str, Any]] = {
    "ours": {},
    "heads": {"num_heads": 12},
    "grey 48 px": {"in_chans": 1, "img_size": 48, "num_classes": 10, "patch_size": 4},
    "softmax": {"attention": "softmax"},
    "options": {"attention_options": {"form": "efficient", "temperature_init": 2.5}},
    "width": {"embed_dim": 48, "depth": 3, "mlp_ratio": 2.0},
    "no LayerScale, pooled": {"kwargs": {"init_values": None, "global_pool": "avg"}},
    "dropout": {"drop_path_rate": 0.3, "drop_rate": 0.2},
    "timm's": {"name": "vit_tiny_patch16_224", "attention": "softmax", "in_chans": 1},
}


def config_of(case: str) -> ModelConfig:
    return ModelConfig(**{**TINY, **CASES[case]})


def export(config: ModelConfig, folder: Path, **changes: Any) -> tuple[torch.nn.Module, Path]:
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    keywords: dict[str, Any] = {
        "model_config": asdict(config),
        "class_names": [f"class {number}" for number in range(config.num_classes)],
        "mean": [0.1] * config.in_chans,
        "std": [0.3] * config.in_chans,
        "crop_pct": 0.95,
        "interpolation": "bilinear",
    }
    return model, export_model(model, folder, **{**keywords, **changes})


def same_outputs(one: torch.nn.Module, other: torch.nn.Module, config: ModelConfig) -> bool:
    images = torch.randn(2, config.in_chans, config.img_size, config.img_size)
    return torch.equal(one.eval()(images), other.eval()(images))


@pytest.mark.parametrize("case", CASES)
def test_timm_rebuilds_it_bit_for_bit(tmp_path: Path, case: str) -> None:
    config = config_of(case)
    model, folder = export(config, tmp_path / "export")
    rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same_outputs(model, rebuilt, config)
    data = timm.data.resolve_model_data_config(rebuilt)
    assert data["input_size"] == (config.in_chans, config.img_size, config.img_size)
    assert list(data["mean"]) == [0.1] * config.in_chans
    assert list(data["std"]) == [0.3] * config.in_chans
    assert (data["crop_pct"], data["interpolation"]) == (0.95, "bilinear")
    assert rebuilt.pretrained_cfg["label_names"] == [f"class {number}" for number in range(config.num_classes)]
    assert rebuilt.pretrained_cfg["num_classes"] == config.num_classes


@pytest.mark.parametrize("described_by", ["us", "timm"])
@pytest.mark.parametrize("case", CASES)
def test_we_rebuild_it_from_our_or_timms_description(tmp_path: Path, case: str, described_by: str) -> None:
    config = config_of(case)
    model, folder = export(config, tmp_path / "export", **({} if described_by == "us" else {"model_config": None}))
    state, source = load_weights(folder)
    assert source.model_config is not None
    assert source.class_names == [f"class {number}" for number in range(config.num_classes)]
    assert source.data_config == {
        "mean": [0.1] * config.in_chans,
        "std": [0.3] * config.in_chans,
        "crop_pct": 0.95,
        "interpolation": "bilinear",
    }
    rebuilt = build_model(ModelConfig(**source.model_config))
    assert load_into(rebuilt, state) == []
    assert same_outputs(model, rebuilt, config)


def test_timm_adapts_an_export_to_other_classes_and_size(tmp_path: Path) -> None:
    _, folder = export(config_of("ours"), tmp_path / "export")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, img_size=64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_an_export_replaces_the_earlier_one(tmp_path: Path) -> None:
    export(config_of("ours"), tmp_path / "export")
    model, folder = export(config_of("heads"), tmp_path / "export")
    assert same_outputs(model, timm.create_model(f"local-dir:{folder}", pretrained=True), config_of("heads"))
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["config.json", "export", "model.safetensors"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="holds other files"):
        export(config_of("ours"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_model_is_left_alone_and_may_be_channels_last(tmp_path: Path) -> None:
    config = config_of("ours")
    model = build_model(config).to(memory_format=torch.channels_last).eval()
    strides = [parameter.stride() for parameter in model.parameters()]
    folder = export_model(model, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0, interpolation="bicubic")
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert "label_names" not in json.loads((folder / "config.json").read_text())
    rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in rebuilt.state_dict().items())


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _, folder = export(config_of("ours"), tmp_path / "export")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_names has 3 names, the model 4 classes"):
        export(config_of("ours"), tmp_path / "export", class_names=["a", "b", "c"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot export to .*file"):
        export(config_of("ours"), tmp_path / "file")
