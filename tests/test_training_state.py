"""A saved and restored run equals the uninterrupted one bit for bit, for every kind of optimizer state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from taylorvit.checkpoint import load_checkpoint, save_checkpoint
from taylorvit.training_state import CheckpointError, clean_name, decode, encode, pack_state, unpack_state

OPTIMIZERS = [
    "lamb",
    "adamw",
    "sgd",
    "muon",
    "lion",
    "adopt",
    "adafactor",
    "adafactorbv",
    "nadamw",
    "rmsproptf",
    "lookahead_adamw",
]


def build_run(name: str = "lamb", *, channels_last: bool = False, ema: bool = True, layer_decay: float | None = 0.8) -> tuple:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32, num_classes=5, init_values=1e-4
    )
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.02, layer_decay=layer_decay)
    return model, ModelEmaV3(model, decay=0.9, use_warmup=True) if ema else None, optimizer


def train(run: tuple, first: int, last: int) -> None:
    model, ema, optimizer = run
    for update in range(first, last):
        torch.manual_seed(update)
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        if ema is not None:
            ema.update(model, update + 1)


def assert_same(one: tuple, other: tuple) -> None:
    (tensors, state), (other_tensors, other_state) = pack_state(*one, None), pack_state(*other, None)
    assert repr(state) == repr(other_state)
    assert tensors.keys() == other_tensors.keys()
    for name, value in tensors.items():
        assert value.dtype == other_tensors[name].dtype, name
        assert value.stride() == other_tensors[name].stride(), name
        assert torch.equal(value, other_tensors[name]), name


def through_disk(folder: Path, run: tuple, scaler: Any = None) -> tuple[dict, dict]:
    tensors, state = pack_state(*run, scaler)
    json.dumps(state, allow_nan=False)
    loaded = load_checkpoint(save_checkpoint(folder, 3, tensors, {"state": state}))
    return loaded.tensors, loaded.meta["state"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, channels_last: bool) -> None:
    run = build_run(name, channels_last=channels_last)
    train(run, 0, 3)
    tensors, state = through_disk(tmp_path, run)
    train(run, 3, 6)
    resumed = build_run(name, channels_last=channels_last)
    train(resumed, 0, 1)  # a restore must replace whatever is there
    unpack_state(tensors, state, *resumed, None)
    train(resumed, 3, 6)
    assert_same(run, resumed)


def test_restoring_does_not_tie_two_runs_together() -> None:
    run, other = build_run(), build_run()
    train(run, 0, 2)
    unpack_state(*pack_state(*run, None), *other, None)
    train(run, 2, 4)
    train(other, 2, 4)
    assert_same(run, other)


def test_state_before_the_first_update(tmp_path: Path) -> None:
    run, resumed = build_run("adamw"), build_run("adamw")
    train(resumed, 0, 2)
    unpack_state(*through_disk(tmp_path, run), *resumed, None)
    train(run, 0, 2)
    train(resumed, 0, 2)
    assert_same(run, resumed)


def test_fp32_state_of_bf16_parameters_is_not_rounded(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3).bfloat16()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = build()
    fine = torch.tensor([[1 / 3, 1e-9, 1 + 2**-20]] * 3)
    optimizer.state[model.weight] = {"momentum_buffer": fine, "list": [fine[0] * 2, None, (1, 0.1)]}
    other, restored = build()
    unpack_state(*through_disk(tmp_path, (model, None, optimizer)), other, None, restored, None)
    entries = restored.state[other.weight]
    assert entries["momentum_buffer"].dtype == torch.float32
    assert torch.equal(entries["momentum_buffer"], fine)
    assert torch.equal(entries["list"][0], fine[0] * 2)
    assert entries["list"][1:] == [None, (1, 0.1)]


def test_group_types_survive(tmp_path: Path) -> None:
    run, resumed = build_run("lamb"), build_run("lamb")
    train(run, 0, 2)
    run[2].param_groups[0].update(betas=(0.9, 1 / 3), note=None, limit=math.inf, flags=[True, 2], step=torch.tensor(2.0))
    unpack_state(*through_disk(tmp_path, run), *resumed, None)
    group = resumed[2].param_groups[0]
    assert group["betas"] == (0.9, 1 / 3)
    assert group["limit"] == math.inf
    assert group["flags"] == [True, 2]
    assert isinstance(group["flags"][0], bool)
    assert isinstance(group["step"], torch.Tensor)
    assert isinstance(group["betas"], tuple)


@pytest.mark.fault("F2")
def test_scaler(tmp_path: Path) -> None:
    run = build_run()
    scaler, restored = torch.amp.GradScaler("cpu", init_scale=1 / 3 + 1000), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    tensors, state = through_disk(tmp_path, run, scaler)
    unpack_state(tensors, state, *run, restored)
    assert restored.state_dict() == scaler.state_dict()
    with pytest.raises(CheckpointError, match="has gradient scaler values, this run lacks them"):
        unpack_state(tensors, state, *run, None)


def test_tied_parameters(tmp_path: Path) -> None:
    def build() -> tuple:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model, None, torch.optim.AdamW(model.parameters(), lr=0.1)

    run, resumed = build(), build()
    run[0](torch.ones(2, 4)).sum().backward()
    run[2].step()
    unpack_state(*through_disk(tmp_path, run), *resumed, None)
    assert resumed[0][1].weight is resumed[0][0].weight
    assert_same(run, resumed)


MISFITS = {
    "the state of Lamb, this run uses AdamW": {"name": "adamw"},
    "has EMA weights, this run lacks them": {"ema": False},
    "parameter groups": {"layer_decay": None},
}


@pytest.mark.parametrize("message", MISFITS)
def test_another_run_is_refused_and_left_as_it_was(message: str) -> None:
    run, other = build_run(), build_run(**MISFITS[message])
    train(run, 0, 1)
    before = {name: value.clone() for name, value in other[0].state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        unpack_state(*pack_state(*run, None), *other, None)
    assert all(torch.equal(value, before[name]) for name, value in other[0].state_dict().items())


def test_another_model_is_named() -> None:
    run = build_run()
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32, num_classes=7)
    other = model, ModelEmaV3(model), create_optimizer_v2(model, opt="lamb", lr=1e-3)
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.ls1\.gamma is \(24,\) float32 in the checkpoint and absent in this run"
    ):
        unpack_state(*pack_state(*run, None), *other, None)


def test_reordered_parameters_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    forward, backward = (torch.optim.SGD(list(model.parameters())[::step], lr=0.1) for step in (1, -1))
    with pytest.raises(CheckpointError, match="differ in the order alone"):
        unpack_state(*pack_state(model, None, forward, None), model, None, backward, None)


def test_values_that_no_checkpoint_can_hold_are_named() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["schedule"] = print
    with pytest.raises(CheckpointError, match=r"optimizer\.group\.0\.schedule is a builtin_function_or_method"):
        pack_state(model, None, optimizer, None)


def test_encode_and_decode_are_inverse_and_idempotent() -> None:
    value = {"a": (1, [2.5, (math.inf, None)]), "dtype": torch.bfloat16, "text": "x", "empty": {}}
    once = encode(value, "value")
    assert json.loads(json.dumps(once, allow_nan=False)) == once
    assert encode(once, "value") == once
    assert decode(once) == value
    assert decode(decode(once)) == value


def test_wrappers_leave_no_trace_in_the_names() -> None:
    assert clean_name("module._orig_mod.blocks.0.attn.qkv.weight") == "blocks.0.attn.qkv.weight"
    assert clean_name("_orig_mod.module.blocks.0._orig_mod.norm1.bias") == "blocks.0.norm1.bias"
    model = nn.Linear(2, 2)
    wrapped = nn.ModuleDict({"module": model})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert pack_state(wrapped, None, optimizer, None)[0].keys() == pack_state(model, None, optimizer, None)[0].keys()
