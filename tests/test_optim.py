"""Optimizers by name, who is decayed and how fast each layer learns; schedules as a function of the update number."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import timm
import torch
from timm.optim import Lamb
from torch import Tensor, nn

import taylorvit  # noqa: F401  (registers the models)
from taylorvit.config import OptimConfig, ScheduleConfig
from taylorvit.optim import (
    build_optimizer,
    build_scheduler,
    current_learning_rate,
    freeze_backbone,
    scaled_learning_rate,
)

NAMES = (
    "lamb", "lambc", "adamw", "adam", "sgd", "sgdw", "nesterov", "muon", "nadamuon", "lion", "clion", "adopt", "adoptw",
    "adafactor", "adafactorbv", "nadamw", "adamp", "adan", "lars", "larc", "laprop", "mars", "novograd", "rmsprop",
    "rmsproptf", "madgrad", "adabelief", "adagrad", "adadelta", "adamax",
)  # fmt: skip


def small_model(*, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "taylorvit_tiny_patch16_224", depth=depth, embed_dim=16, num_heads=2, img_size=32, num_classes=5, init_values=1e-4
    )


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()


def groups_by_name(model: nn.Module, config: OptimConfig) -> dict[str, dict]:
    """Return the parameter group of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config, global_batch_size=64)
    found = [(names[id(parameter)], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert max(Counter(name for name, _ in found).values()) == 1
    return dict(found)


# ---- optimizers


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_of_many_kinds_take_a_step(name: str) -> None:
    model = small_model(depth=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01), global_batch_size=64)
    for _ in range(3):  # the first one of ADOPT only sets its second moment; two of Lion may cancel out
        backward(model)
        optimizer.step()
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {"head.weight", "head.bias", "blocks.0.attn.qkv.weight"} <= set(moved)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_the_optimizer_is_the_one_that_was_named() -> None:
    model = small_model(depth=1)
    assert type(build_optimizer(model, OptimConfig(name="lamb"), global_batch_size=64)) is Lamb
    assert type(build_optimizer(model, OptimConfig(name="AdamW"), global_batch_size=64)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, "optim.name: 'adamv' is not one of timm's optimizers; did you mean 'adam"),
        ({"name": "lamp"}, "did you mean 'lamb'"),
        ({"name": "lookahead_adamw"}, "optim.name: 'lookahead_adamw' is not one"),
        ({"name": "adahessian"}, "optim.name: 'adahessian' needs second derivatives"),
        ({"name": "sgd", "eps": 1e-8}, "optim.eps: sgd takes no such setting; it takes "),
        ({"name": "lion", "eps": 1e-8}, "optim.eps: lion takes no such setting"),
        ({"name": "rmsprop", "betas": (0.9, 0.99)}, "optim.betas: rmsprop takes no such setting"),
        ({"name": "adamw", "momentum": 0.9}, "optim.momentum: adamw takes no such setting"),
        ({"name": "adan", "betas": (0.9, 0.99)}, "optim.betas: adan takes 3 rates; give them as optim.kwargs.betas"),
        (
            {"name": "adamw", "kwargs": {"amsgrat": True}},
            "optim.kwargs.amsgrat: adamw takes no such setting; did you mean 'amsgrad'",
        ),
        ({"name": "adamw", "kwargs": {"lr": 1.0}}, "optim.kwargs.lr: adamw takes no such setting; set optim.lr"),
        ({"name": "adamw", "kwargs": {"weight_decay": 1.0}}, "set optim.weight_decay"),
        ({"name": "sgd", "kwargs": {"momentum": 0.5}}, "set optim.momentum"),
        ({"name": "lamb", "kwargs": {"max_grad_norm": 1.0}}, "set optim.max_grad_norm"),
        ({"name": "adamw", "kwargs": {"params": []}}, "optim.kwargs.params: adamw takes no such setting"),
        ({"name": "adamw", "eps": 1e-8, "kwargs": {"eps": 1e-6}}, "optim.kwargs.eps: optim.eps is set too"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match="optim") as caught:
        build_optimizer(small_model(depth=1), OptimConfig(**settings), global_batch_size=64)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="apex and bitsandbytes could be installed")
@pytest.mark.parametrize("name", ["fusedlamb", "bnbadamw8bit"])
def test_an_optimizer_that_cannot_be_built_here_is_not_replaced(name: str) -> None:
    with pytest.raises(ValueError, match=f"optim.name: '{name}' cannot be built here: .*CUDA"):
        build_optimizer(small_model(depth=1), OptimConfig(name=name), global_batch_size=64)


def test_settings_reach_the_optimizer() -> None:
    config = OptimConfig(name="adamw", lr=0.5, eps=1e-5, betas=(0.8, 0.95), weight_decay=0.3, kwargs={"amsgrad": True})
    optimizer = build_optimizer(small_model(depth=1), config, global_batch_size=64)
    for group in optimizer.param_groups:
        assert (group["lr"], group["eps"], tuple(group["betas"]), group["amsgrad"]) == (0.5, 1e-5, (0.8, 0.95), True)
    momenta = {
        group["momentum"]
        for group in build_optimizer(small_model(), OptimConfig(name="sgd", momentum=0.7), global_batch_size=1).param_groups
    }
    assert momenta == {0.7}
    adan = build_optimizer(
        small_model(depth=1), OptimConfig(name="adan", kwargs={"betas": (0.9, 0.8, 0.7)}), global_batch_size=1
    )
    assert tuple(adan.param_groups[0]["betas"]) == (0.9, 0.8, 0.7)


def lamb_after_two_gradients(optimizer_of: object, norms: tuple[float, float]) -> Tensor:
    model = nn.Linear(8, 8, bias=False)
    torch.manual_seed(0)
    nn.init.normal_(model.weight)
    directions = [torch.randn(8, 8) for _ in norms]
    optimizer = optimizer_of(model)  # type: ignore[operator]
    for direction, norm in zip(directions, norms):
        model.weight.grad = direction / direction.norm() * norm
        optimizer.step()
    return model.weight.detach()


def test_lamb_does_not_clip_by_itself() -> None:
    """Gradients of norm 1, then 100: where LAMB clips to 1, its default, it cannot tell which one was the greater."""
    config = OptimConfig(name="lamb", lr=0.1, weight_decay=0.01)
    ours = lamb_after_two_gradients(lambda model: build_optimizer(model, config, global_batch_size=64), (1.0, 100.0))
    settings = {"lr": 0.1, "weight_decay": 0.01}
    unclipped = lamb_after_two_gradients(lambda model: Lamb(model.parameters(), **settings, max_grad_norm=None), (1.0, 100.0))
    clipped = lamb_after_two_gradients(lambda model: Lamb(model.parameters(), **settings), (1.0, 100.0))
    torch.testing.assert_close(ours, unclipped, rtol=0, atol=0)
    assert (ours - clipped).abs().max() > 1e-3


# ---- weight decay and layers


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_weight_decay_is_for_matrices_only(layer_decay: float | None) -> None:
    model = small_model()
    found = groups_by_name(model, OptimConfig(name="adamw", weight_decay=0.3, layer_decay=layer_decay))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert found[name]["weight_decay"] == (0.0 if spared else 0.3), name
    spared_kinds = ("attn.temperature", "norm1.weight", "ls1.gamma", "qkv.bias", "pos_embed", "cls_token")
    for kind in spared_kinds:
        assert [name for name in found if name.endswith(kind)], kind


@pytest.mark.parametrize("layer_decay", [None, 0.7, 1.0])
def test_decay_temperature_moves_the_temperatures_and_nothing_else(layer_decay: float | None) -> None:
    model = small_model()
    plain = groups_by_name(model, OptimConfig(name="lamb", weight_decay=0.3, layer_decay=layer_decay))
    moved = groups_by_name(model, OptimConfig(name="lamb", weight_decay=0.3, layer_decay=layer_decay, decay_temperature=True))
    changed = {name for name in plain if plain[name]["weight_decay"] != moved[name]["weight_decay"]}
    assert changed == {"blocks.0.attn.temperature", "blocks.1.attn.temperature"}
    assert all(moved[name]["weight_decay"] == 0.3 for name in changed)
    for name in plain:
        assert plain[name].get("lr_scale") == moved[name].get("lr_scale")


def test_decay_temperature_without_decay_or_with_a_frozen_backbone() -> None:
    without = groups_by_name(small_model(), OptimConfig(weight_decay=0.0, decay_temperature=True))
    assert {group["weight_decay"] for group in without.values()} == {0.0}
    model = small_model()
    freeze_backbone(model)
    frozen = groups_by_name(model, OptimConfig(weight_decay=0.3, decay_temperature=True))
    assert {name: group["weight_decay"] for name, group in frozen.items()} == {"head.weight": 0.3, "head.bias": 0.0}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_temperature_lr_scale_reaches_the_temperatures_and_nothing_else(layer_decay: float | None) -> None:
    model = small_model()
    config = OptimConfig(name="adamw", lr=1e-2, layer_decay=layer_decay, temperature_lr_scale=10.0)
    plain = groups_by_name(model, OptimConfig(name="adamw", lr=1e-2, layer_decay=layer_decay))
    scaled = groups_by_name(model, config)
    for name, group in scaled.items():
        factor = 10.0 if name.endswith("temperature") else 1.0
        assert group.get("lr_scale", 1.0) == plain[name].get("lr_scale", 1.0) * factor, name
        assert group["weight_decay"] == plain[name]["weight_decay"], name
    optimizer = build_optimizer(model, config, global_batch_size=1)
    scheduler = build_scheduler(optimizer, ScheduleConfig(epochs=2, warmup_epochs=0, min_lr=0.0), updates_per_epoch=4)
    scheduler.step_update(4)  # half of the cosine
    assert current_learning_rate(optimizer) == pytest.approx(5e-3)
    (last,) = [
        group["lr"] for group in optimizer.param_groups for p in group["params"] if p is model.blocks[1].attn.temperature
    ]
    assert last == pytest.approx(5e-3 * 10 * (layer_decay or 1.0))


def test_layer_decay_counts_layers_from_the_head() -> None:
    model = small_model(depth=3)
    found = groups_by_name(model, OptimConfig(layer_decay=0.5))
    expected = {
        "head": 1.0,
        "norm": 0.5,  # timm counts the last norm to the last block
        "blocks.2": 0.5,
        "blocks.1": 0.25,
        "blocks.0": 0.125,
        "patch_embed": 0.0625,
        "pos_embed": 0.0625,
    }
    for prefix, scale in expected.items():
        scales = {group["lr_scale"] for name, group in found.items() if name == prefix or name.startswith(prefix + ".")}
        assert scales == {scale}, prefix
    assert all("lr_scale" not in group for group in groups_by_name(model, OptimConfig()).values())


def test_layer_decay_reaches_the_step() -> None:
    model = small_model(depth=2)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5), global_batch_size=64)
    scheduler = build_scheduler(optimizer, ScheduleConfig(name="constant", epochs=2, warmup_epochs=0.0), updates_per_epoch=2)
    scheduler.step_update(1)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125}


def test_frozen_backbone_trains_the_classifier_alone() -> None:
    model = small_model()
    freeze_backbone(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=1.0), global_batch_size=64)
    backward(model)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_rules(rule: str, factor: float) -> None:
    config = OptimConfig(name="adamw", lr=0.1, lr_scaling=rule, lr_base_batch_size=256)  # type: ignore[arg-type]
    assert scaled_learning_rate(config, 1024) == pytest.approx(0.1 * factor)
    assert scaled_learning_rate(config, 256) == pytest.approx(0.1)
    assert build_optimizer(small_model(depth=1), config, global_batch_size=1024).param_groups[0]["lr"] == pytest.approx(
        0.1 * factor
    )


# ---- schedules


def trace(config: ScheduleConfig, *, updates_per_epoch: int, lr: float = 1.0, start: int = 0) -> list[float]:
    """Return the learning rate of every update, as the training loop asks for it."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
    scheduler = build_scheduler(optimizer, config, updates_per_epoch=updates_per_epoch)
    if start:
        scheduler.step_update(start)
    rates = []
    for update in range(start, config.epochs * updates_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
    return rates


NAMES_OF_SCHEDULES = ("cosine", "tanh", "poly", "constant", "rsqrt")


@pytest.mark.parametrize("name", NAMES_OF_SCHEDULES)
def test_warm_up_is_a_straight_line_from_the_first_update(name: str) -> None:
    config = ScheduleConfig(name=name, epochs=10, warmup_epochs=3.0, warmup_lr=0.1, min_lr=0.01)  # type: ignore[arg-type]
    rates = trace(config, updates_per_epoch=7)
    assert rates[0] == 0.1
    assert rates[:21] == pytest.approx([0.1 + 0.9 * update / 21 for update in range(21)], abs=1e-3)
    assert rates[21] == pytest.approx(1.0, abs=0.31)


def test_cosine_falls_from_the_peak_to_the_end() -> None:
    config = ScheduleConfig(name="cosine", epochs=10, warmup_epochs=2.0, warmup_lr=0.0, min_lr=0.2)
    rates = trace(config, updates_per_epoch=5)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * update / 50)) / 2 for update in range(50)]
    assert rates[10:] == pytest.approx(expected[10:])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.2 + 0.8 * 0.002
    assert trace(config, updates_per_epoch=5, start=49) == rates[-1:]


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly"])
def test_schedules_only_fall_and_end_at_the_minimum(name: str) -> None:
    config = ScheduleConfig(name=name, epochs=20, warmup_epochs=0.0, min_lr=0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    rates = trace(config, updates_per_epoch=10)
    assert rates[0] == pytest.approx(1.0, abs=0.01)
    assert rates == sorted(rates, reverse=True)
    build_scheduler(optimizer, config, updates_per_epoch=10).step_update(200)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_poly_is_a_straight_line() -> None:
    config = ScheduleConfig(name="poly", epochs=4, warmup_epochs=0.0, min_lr=0.0)
    assert trace(config, updates_per_epoch=2) == pytest.approx([1 - update / 8 for update in range(8)])


def test_constant_stays() -> None:
    config = ScheduleConfig(name="constant", epochs=6, warmup_epochs=1.0, warmup_lr=0.5, min_lr=0.0)
    assert trace(config, updates_per_epoch=4)[4:] == [1.0] * 20


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(10, 2.0), (10, 0.5), (1, 0.9), (3, 0.01)])
def test_rsqrt_falls_as_the_inverse_square_root_to_the_last_update(epochs: int, warmup_epochs: float) -> None:
    config = ScheduleConfig(name="rsqrt", epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=0.0, min_lr=0.0)
    w, lr = 20 * warmup_epochs, 0.3
    expected = [lr * math.sqrt(w) * min(1, t / w) / math.sqrt(max(t, w)) for t in range(20 * epochs)]
    assert trace(config, updates_per_epoch=20, lr=lr) == pytest.approx(expected, rel=1e-12)
    for start in (1, 9, 10, 19):
        assert trace(config, updates_per_epoch=20, lr=lr, start=start) == pytest.approx(expected[start:], rel=1e-12)


def test_rsqrt_does_not_fall_below_the_minimum() -> None:
    config = ScheduleConfig(name="rsqrt", epochs=8, warmup_epochs=1.0, warmup_lr=0.1, min_lr=0.5)
    rates = trace(config, updates_per_epoch=4)
    assert rates[0] == 0.1
    assert rates[4:16] == pytest.approx([math.sqrt(4 / t) for t in range(4, 16)])
    assert rates[16:] == [0.5] * 16


@pytest.mark.parametrize("name", NAMES_OF_SCHEDULES)
def test_a_resumed_schedule_goes_on_as_if_nothing_had_been(name: str) -> None:
    config = ScheduleConfig(name=name, epochs=5, warmup_epochs=1.5, warmup_lr=0.01)  # type: ignore[arg-type]
    whole = trace(config, updates_per_epoch=6)
    for start in (1, 8, 9, 10, 29):
        assert trace(config, updates_per_epoch=6, start=start) == whole[start:]


def test_warm_up_may_be_a_part_of_an_epoch() -> None:
    config = ScheduleConfig(epochs=4, warmup_epochs=0.5, warmup_lr=0.0)
    rates = trace(config, updates_per_epoch=8)
    assert rates[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert max(rates) == rates[4]
    odd = trace(ScheduleConfig(epochs=4, warmup_epochs=0.3, warmup_lr=0.0), updates_per_epoch=8)
    assert odd[:3] == pytest.approx([0.0, 1 / 2.4, 2 / 2.4])


def test_no_warm_up_begins_at_the_peak() -> None:
    assert trace(ScheduleConfig(epochs=3, warmup_epochs=0.0, warmup_lr=1e-6), updates_per_epoch=2)[0] == 1.0
