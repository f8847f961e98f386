"""Weights from folders and files of every kind, hostile and damaged ones among them, and their way into a model."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import Canary, write_legacy_tar
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

import taylorvit
from taylorvit.checkpoint import pack_state, save_checkpoint
from taylorvit.config import Config, ModelConfig
from taylorvit.models import build_model
from taylorvit.weights import load_into, load_weights, parse_step

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


def small(**changes: Any) -> nn.Module:
    torch.manual_seed(len(str(changes)))
    return build_model(ModelConfig(**{**SMALL, **changes})).eval()


def noisy(model: nn.Module) -> nn.Module:
    """Give every parameter a value that its initialisation would not have."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_equal(state: dict, model: nn.Module) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def save_step(folder: Path, step: int, model: nn.Module, *, ema: bool = False, **meta: Any) -> Path:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = ModelEmaV3(noisy(small())) if ema else None
    tensors, state = pack_state(model, average, optimizer, None)
    config = asdict(Config(model=ModelConfig(**SMALL)))
    return save_checkpoint(folder, step, tensors, {"state": state, "config": config, "classes": list("abcde"), **meta})


# Folders


def test_run_folder_gives_best_newest_or_any_step(tmp_path: Path) -> None:
    models = {step: noisy(small()) for step in (2, 4, 6)}
    for step, score in ((2, 50.0), (4, 70.0), (6, 60.0)):
        save_step(tmp_path / "checkpoints", step, models[step], metrics={"top1": score})
    for wanted, step in (("best", 4), ("newest", 6), (2, 2)):
        state, source = load_weights(tmp_path, step=wanted)  # type: ignore[arg-type]
        assert_equal(state, models[step])
        assert (source.step, source.kind, source.class_names) == (step, "step", list("abcde"))
        assert source.model_config is not None
        assert_equal(state, models[step])
        load_into(build_model(ModelConfig(**source.model_config)), state)
    with pytest.raises(ValueError, match="there is no step 3"):
        load_weights(tmp_path, step=3)
    assert load_weights(tmp_path / "checkpoints" / "step-00000002")[1].step == 2


def test_a_damaged_newest_is_passed_over_and_left_in_place(tmp_path: Path) -> None:
    for step in (2, 4):
        save_step(tmp_path / "checkpoints", step, small())
    (tmp_path / "checkpoints" / "step-00000004" / "meta.json").unlink()
    assert load_weights(tmp_path, step="newest")[1].step == 2
    assert (tmp_path / "checkpoints" / "step-00000004").exists()
    with pytest.raises(ValueError, match="no checkpoint has been evaluated"):
        load_weights(tmp_path)


def test_averaged_weights(tmp_path: Path) -> None:
    model = small()
    path = save_step(tmp_path / "with", 1, model, ema=True)
    raw, averaged = load_weights(path)[0], load_weights(path, weights="ema")[0]
    assert_equal(raw, model)
    assert averaged.keys() == raw.keys()
    assert not torch.equal(averaged["head.weight"], raw["head.weight"])
    for place in (save_step(tmp_path / "without", 1, model), file_of(tmp_path / "x.pth", model.state_dict())):
        with pytest.raises(ValueError, match="no averaged"):
            load_weights(place, weights="ema")
    with pytest.raises(ValueError, match="weights='mean'"):
        load_weights(path, weights="mean")


@pytest.mark.parametrize(("metric", "wanted"), [("top1", "raw"), ("ema_top1", "ema")])
def test_best_weights_are_those_that_the_run_ranks(tmp_path: Path, metric: str, wanted: str) -> None:
    config = asdict(Config(model=ModelConfig(**SMALL))) | {"checkpoint": {"metric": metric}}
    for step, raw, averaged in ((1, 90.0, 20.0), (2, 10.0, 80.0)):
        metrics = {"top1": raw, "ema_top1": averaged}
        save_step(tmp_path / "checkpoints", step, noisy(small()), ema=True, config=config, metrics=metrics)
    state, source = load_weights(tmp_path, weights="best")
    assert (source.step, source.weights) == (1 if metric == "top1" else 2, wanted)
    expected = load_weights(source.path, weights=wanted)[0]
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert load_weights(source.path, weights="best")[1].weights == wanted
    assert load_weights(tmp_path, step=2, weights="best")[1].weights == wanted


def test_best_weights_elsewhere_are_the_raw_ones(tmp_path: Path) -> None:
    model = noisy(small())
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", file_of(tmp_path / "x.pth", model.state_dict())):
        state, source = load_weights(path, weights="best")
        assert_equal(state, model)
        assert source.weights == "raw"
    save_step(tmp_path / "run" / "checkpoints", 1, small())
    with pytest.raises(ValueError, match="no checkpoint has been evaluated yet"):
        load_weights(tmp_path / "run", weights="best")


def test_a_step_is_chosen_of_a_run_folder_only(tmp_path: Path) -> None:
    step = save_step(tmp_path / "checkpoints", 1, small())
    for path in (step, file_of(tmp_path / "x.pth", small().state_dict()), "timm:resnet18"):
        with pytest.raises(ValueError, match="step 3 can be chosen of a run folder only, and this is none"):
            load_weights(path, step=3)


def test_steps_of_the_command_line() -> None:
    assert [parse_step(text) for text in ("best", "newest", "12", "007")] == ["best", "newest", 12, 7]
    for text in ("-1", "latest", "", "1.5", "²"):
        with pytest.raises(ValueError, match="expected best, newest or a number of updates"):
            parse_step(text)


# Files


def file_of(path: Path, content: Any, **keywords: Any) -> Path:
    torch.save(content, path, **keywords)
    return path


@pytest.mark.fault("C3")
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state"])
@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_torch_save(tmp_path: Path, prefix: str, key: str | None, new_format: bool) -> None:
    model = small(attention="softmax")
    state = {prefix + name: value for name, value in model.state_dict().items()}
    content = state if key is None else {key: state, "epoch": 3, "args": argparse.Namespace(model="vit", lr=0.1)}
    path = file_of(tmp_path / "x.pth", content, _use_new_zipfile_serialization=new_format)
    assert_equal(load_weights(path)[0], model)


@pytest.mark.fault("C3")
def test_averaged_weights_of_a_timm_checkpoint(tmp_path: Path) -> None:
    raw, averaged = noisy(small()), noisy(small())
    path = file_of(tmp_path / "last.pth.tar", {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()})
    assert_equal(load_weights(path, weights="ema")[0], averaged)
    assert_equal(load_weights(path)[0], raw)


def test_safetensors(tmp_path: Path) -> None:
    model = small()
    save_file({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "x.safetensors")
    state, source = load_weights(tmp_path / "x.safetensors")
    assert_equal(state, model)
    assert source.kind == "safetensors"


def renamed_archive(path: Path, content: Any) -> None:
    """Write a zip as torch.save does, without going through torch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


WRITERS: dict[str, Callable[[Path, Any], Any]] = {
    "zip": lambda path, content: torch.save(content, path),
    "legacy": lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=False),
    "plain pickle": lambda path, content: path.write_bytes(pickle.dumps(content)),
    "old pickle": lambda path, content: path.write_bytes(pickle.dumps(content, protocol=0)),
    "tar": write_legacy_tar,
    "hand-made zip": renamed_archive,
}


@pytest.mark.fault("C1")
@pytest.mark.parametrize("name", ["x.pth", "x.tar", "x.bin", "x.pt", "x.safetensors", "model", "export", "step"])
@pytest.mark.parametrize("writer", WRITERS)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, name: str, writer: str) -> None:
    canary = tmp_path / "canary"
    for content in (Canary(canary), {"state_dict": {"head.weight": Canary(canary)}, "args": Canary(canary)}):
        path = tmp_path / name
        if name == "export":
            path.mkdir(exist_ok=True)
            (path / "config.json").write_text(
                '{"architecture": "x", "pretrained_cfg": {"mean":1,"std":1,"crop_pct":1,"interpolation":1}}'
            )
            WRITERS[writer](path / "model.safetensors", content)
        elif name == "step":
            path.mkdir(exist_ok=True)
            WRITERS[writer](path / "meta.json", content)
            WRITERS[writer](path / "manifest.json", content)
        else:
            WRITERS[writer](path, content)
        with pytest.raises(ValueError, match=name) as caught:
            load_weights(path)
        assert "\n" not in str(caught.value)
        assert not canary.exists()


@pytest.mark.fault("C1")
def test_the_canary_sings_for_a_careless_reader(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.pth", Canary(tmp_path / "canary"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.fault("C1")
def test_a_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.pth", {"state_dict": {"w": torch.ones(1)}, "args": Path("/data")})
    with pytest.raises(ValueError, match=r"x\.pth: refused, it asks for pathlib"):
        load_weights(path)


@pytest.mark.fault("C1")
def test_nothing_stays_allowed_after_loading(tmp_path: Path) -> None:
    load_weights(file_of(tmp_path / "x.pth", {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(a=1)}))
    with pytest.raises(pickle.UnpicklingError, match="argparse"):
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.fault("C2")
def test_zip_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    honest = file_of(tmp_path / "honest.pth", {"w": torch.zeros(2**20)})
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < 2**14
    assert torch.load(bomb, weights_only=True)["w"].shape == (2**20,)
    with pytest.raises(ValueError, match="unpacks to"):
        load_weights(bomb)
    with pytest.raises(ValueError, match="more than the limit of 1000000"):
        load_weights(honest, max_bytes=10**6)
    with pytest.raises(ValueError, match="more than the limit of 1000"):
        load_weights(
            file_of(tmp_path / "old.pth", {"w": torch.zeros(999)}, _use_new_zipfile_serialization=False), max_bytes=1000
        )
    with pytest.raises(ValueError, match="its tensors have"):
        load_weights(file_of(tmp_path / "wide.pth", {"w": torch.zeros(1).expand(2**40)}))


USELESS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>\n" * 20),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "empty folder": lambda path: path.mkdir(),
    "empty dictionary": lambda path: torch.save({}, path),
    "list": lambda path: torch.save([torch.ones(1)], path),
    "number": lambda path: torch.save(3, path),
    "not tensors": lambda path: torch.save({"epoch": 3, "lr": 0.1}, path),
    "numbers for names": lambda path: torch.save({0: torch.ones(1)}, path),
    "broken link": lambda path: path.symlink_to(path.with_name("gone")),
    "fifo": lambda path: os.mkfifo(path),
    "cut": lambda path: (torch.save({"w": torch.ones(1000)}, path), os.truncate(path, 2000)),
    "empty safetensors": lambda path: save_file({}, path),
}


@pytest.mark.fault("C6")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", USELESS)
def test_useless_paths_get_one_line(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"given{suffix}"
    USELESS[kind](path)
    with pytest.raises(ValueError, match=f"given{suffix}") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250
    assert "weights_only" not in str(caught.value)


def test_timm_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"timm has no such model; did you mean .*tiny_patch16_224"):
        load_weights("timm:vit_tiny_patch16_244")
    real, asked = timm.create_model, []

    def offline(name: str, **keywords: Any) -> nn.Module:
        asked.append(keywords)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"timm:vit_tiny_patch16_224: the pretrained weights are not to be had \(no route\)"):
        load_weights("timm:vit_tiny_patch16_224")
    assert asked == [{"pretrained": True}]
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: real(name))
    state, source = load_weights("timm:vit_tiny_patch16_224")
    monkeypatch.undo()
    assert source.model_config is not None
    assert load_into(build_model(ModelConfig(**source.model_config)), state) == []


# Into a model


@pytest.mark.fault("C3")
@pytest.mark.fault("C4")
def test_strict_loading_names_three_tensors_and_the_count() -> None:
    with pytest.raises(ValueError, match=r"do not fit the model in \d+ tensors: .*\(1, 1, 24\).*\(1, 1, 48\)") as caught:
        load_into(small(embed_dim=48), small().state_dict())
    assert str(caught.value).count(" in the model") == 3
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"pos_embed \(1, 16, 24\) in the weights, \(1, 36, 24\) in the model; fine-tuning"):
        load_into(small(img_size=48), small().state_dict())
    with pytest.raises(ValueError, match=r"temperature absent in the weights, \(3,\) in the model"):
        load_into(small(), small(attention="softmax").state_dict())


@pytest.mark.fault("C5")
def test_a_refused_load_leaves_the_model_alone() -> None:
    model, state = small(), noisy(small()).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state["norm.weight"][3] = float("nan")
    state["head.bias"][0] = float("inf")
    with pytest.raises(ValueError, match=r"2 of the weights have NaN or infinite values: norm\.weight, head\.bias"):
        load_into(model, state)
    del state["norm.weight"], state["head.bias"]
    with pytest.raises(ValueError, match="2 tensors"):
        load_into(model, state, adapt=False)
    assert_equal(before, model)


@pytest.mark.fault("C5")
def test_other_precisions_are_converted_and_said() -> None:
    source = noisy(small())
    model = small()
    notes = load_into(model, {name: value.half() for name, value in source.state_dict().items()})
    assert notes == ["converted from float16 to float32"]
    assert next(model.parameters()).dtype == torch.float32


def test_exact_weights_need_no_adaptation() -> None:
    source, model = noisy(small()), small()
    assert load_into(model, source.state_dict(), adapt=True) == []
    assert_equal(source.state_dict(), model)


@pytest.mark.fault("C4")
def test_other_size_classes_and_channels_are_adapted_and_said() -> None:
    source = noisy(small())
    model = small(img_size=48, num_classes=7, in_chans=1)
    head = model.head.weight.clone()
    assert load_into(model, source.state_dict(), adapt=True) == [
        "position embedding resampled from 4x4 to 6x6 patches",
        "patch embedding changed from 3 to 1 channels",
        "classifier left at its initialisation (the weights have 5 classes)",
    ]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    grey = torch.randn(2, 1, 32, 32)
    assert torch.allclose(model.patch_embed.proj(grey), source.patch_embed.proj(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, [6, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize("with_slot", [True, False])
def test_the_class_token_keeps_its_position(with_slot: bool) -> None:
    """A timm ViT gives the class token a position, ours does not: the function must survive the move, both ways."""
    timm_like = {"attention": "softmax", "kwargs": {"no_embed_class": False}}
    source = noisy(small(**(timm_like if with_slot else {"attention": "softmax"})))
    model = small(**({"attention": "softmax"} if with_slot else timm_like))
    images = torch.randn(2, 3, 32, 32)
    assert len(load_into(model, source.state_dict(), adapt=True)) == 1
    assert torch.allclose(model(images), source(images), atol=1e-6)


def test_a_softmax_vit_becomes_the_start_of_taylorshift() -> None:
    source = noisy(
        timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32, patch_size=8, num_classes=5)
    )
    model = small()
    assert load_into(model, source.state_dict(), adapt=True) == [
        "position of the class token added to the class token",
        "2 temperatures left at their initialisation",
        "4 LayerScale vectors set to 1, as the weights have none",
    ]
    assert torch.equal(model.blocks[0].ls1.gamma, torch.ones(24))
    twin = small(attention="softmax").eval()
    load_into(twin, source.state_dict(), adapt=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(twin(images), source.eval()(images), atol=1e-6), "with LayerScale 1 the blocks compute what they did"


@pytest.mark.fault("C3")
def test_adaptation_does_not_hide_another_architecture() -> None:
    for other in ({"depth": 3}, {"embed_dim": 48}, {"patch_size": 16}, {"mlp_ratio": 2.0}):
        with pytest.raises(ValueError, match="do not fit the model"):
            load_into(small(**other), small().state_dict(), adapt=True)


def test_loading_warns_about_nothing(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.pth", small().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(small(), load_weights(path)[0])
    assert taylorvit.__version__
