"""The two converters: files of the authors' code, and steps of our runs, become folders that timm loads equal."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import ROOT
from timm.utils import ModelEmaV3
from torch import nn

from taylorvit.checkpoint import pack_state, save_checkpoint
from taylorvit.cli import run_program
from taylorvit.config import Config, DataConfig, ModelConfig
from taylorvit.models import build_model
from taylorvit.weights import load_into, load_weights
from tools import convert_checkpoint, export_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "tiny": {"name": "taylorvit_tiny_patch16_224", "depth": 2, "num_classes": 1000},
    "small": {"name": "taylorvit_small_patch16_224", "depth": 1, "num_classes": 10, "img_size": 64},
    "other sizes": {
        "embed_dim": 48,
        "num_heads": 12,
        "depth": 11,
        "mlp_ratio": 2.0,
        "img_size": 32,
        "patch_size": 4,
        "in_chans": 1,
    },
    "no LayerScale": {"depth": 1, "img_size": 32, "kwargs": {"init_values": None}},
    "position of the class token": {"depth": 1, "img_size": 32, "kwargs": {"no_embed_class": False}},
    "no bias": {"depth": 1, "img_size": 32, "kwargs": {"qkv_bias": False}},
    "softmax": {"depth": 1, "img_size": 32, "attention": "softmax"},
}


def original_file(path: Path, model: nn.Module, name: str = "taylor_shift_tiny_vit") -> Path:
    """Write what the authors' code would have written for this model."""
    state = {
        f"module._orig_mod.{key}": value.reshape(1, -1, 1, 1) if key.endswith("temperature") else value
        for key, value in model.state_dict().items()
    }
    args = argparse.Namespace(model=name, lr=3e-3, dataset="ImageNet")
    torch.save({"model_state": state, "args": args, "epoch": 3, "stats": {"loss": [1.0]}, "optimizer_state": {}}, path)
    return path


def noisy(config: ModelConfig) -> nn.Module:
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_every_size_is_read_off_the_tensors(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**CASES[case])
    model = noisy(config)
    source = original_file(tmp_path / "run.tar", model)
    assert convert_checkpoint.main([str(source), str(tmp_path / "export")]) == 0
    printed = capsys.readouterr().out
    assert f"num_heads          {model.blocks[0].attn.num_heads}" in printed
    images = torch.randn(2, config.in_chans, config.img_size, config.img_size)
    converted = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    assert type(converted.blocks[0].attn) is type(model.blocks[0].attn)
    assert torch.equal(converted(images), model(images))
    state, found = load_weights(source)  # without conversion, as eval.py does
    assert found.kind == "original"
    assert found.model_config is not None
    direct = build_model(ModelConfig(**found.model_config)).eval()
    load_into(direct, state)
    assert torch.equal(direct(images), model(images))


@pytest.mark.parametrize(
    ("name", "form"), [("taylor_shift_eff_vit", "efficient"), ("taylor_shift_triv_vit", "direct"), ("taylor_shift_vit", "auto")]
)
def test_the_form_is_in_the_models_name(tmp_path: Path, name: str, form: str) -> None:
    source = original_file(tmp_path / "run.tar", noisy(ModelConfig(**CASES["no bias"])), name)
    converted = convert_checkpoint.convert(source, tmp_path / "export")
    assert converted.attention_options.get("form", "auto") == form
    assert convert_checkpoint.convert(source, tmp_path / "x", form="direct").attention_options == {"form": "direct"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("module._orig_mod.pos_embed"), "pos_embed is missing"),
        (
            lambda state: state.update({"module._orig_mod.pos_embed": torch.ones(1, 7, 192)}),
            "7 positions, which is no square grid",
        ),
        (lambda state: state.pop("module._orig_mod.blocks.0.norm1.bias"), r"norm1\.bias absent in the weights"),
        (lambda state: state.update(extra=torch.ones(2)), r"extra \(2,\) in the weights, absent in the model"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str) -> None:
    path = original_file(tmp_path / "run.tar", noisy(ModelConfig(**CASES["no bias"])))
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    damage(content["model_state"])
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint.convert(path, tmp_path / "export")
    with pytest.raises(SystemExit) as leaving:
        run_program(lambda: convert_checkpoint.main([str(path), str(tmp_path / "export")]))
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "export").exists()


def test_a_named_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = original_file(tmp_path / "run.tar", noisy(ModelConfig(**CASES["no bias"])))
    with pytest.raises(ValueError, match="no model 'vit_gigantic'"):
        convert_checkpoint.convert(source, tmp_path / "export", model="vit_gigantic")


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_step_of_a_run_is_exported(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(model=ModelConfig(depth=1, img_size=32, num_classes=3), data=DataConfig(crop_pct=0.9, mean=[0.2] * 3))
    model, average = noisy(config.model), noisy(config.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tensors, state = pack_state(model, ModelEmaV3(average), optimizer, None)
    meta = {"state": state, "config": asdict(config), "classes": ["a", "b", "c"], "metrics": {"top1": 1.0}}
    save_checkpoint(tmp_path / "run" / "checkpoints", 5, tensors, meta)
    arguments = [str(tmp_path / "run"), str(tmp_path / "export"), "--weights", weights]
    assert export_checkpoint.main([*arguments, "--step", "5"]) == 0
    assert "update 5" in capsys.readouterr().out
    exported = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(exported(images), (model if weights == "raw" else average)(images))
    assert exported.pretrained_cfg["crop_pct"] == 0.9
    with pytest.raises(ValueError, match="there is no step 6"):
        export_checkpoint.main([*arguments, "--step", "6"])
    with pytest.raises(ValueError, match="--step latest: expected best, newest or a number"):
        export_checkpoint.main([*arguments, "--step", "latest"])


@pytest.mark.parametrize("program", ["convert_checkpoint.py", "export_checkpoint.py"])
def test_a_wrong_path_is_one_line_and_code_2(tmp_path: Path, program: str) -> None:
    arguments = [sys.executable, str(ROOT / "tools" / program), str(tmp_path / "nothing"), str(tmp_path / "export")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nothing'}: there is nothing there\n"
