"""The optimizer and the learning-rate schedule, both timm's, built from their config sections."""

from __future__ import annotations

import inspect
import math
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from taylorvit.config import OptimConfig, ScheduleConfig
from taylorvit.config_loading import nearest


def scaled_learning_rate(config: OptimConfig, global_batch_size: int) -> float:
    """Return the peak learning rate after the batch-size rule `optim.lr_scaling`."""
    ratio = global_batch_size / config.lr_base_batch_size
    return config.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def build_optimizer(model: nn.Module, config: OptimConfig, *, global_batch_size: int) -> torch.optim.Optimizer:
    """Build the timm optimizer named in the config over the parameters that require gradients.

    Weight decay leaves out biases, norms and what `model.no_weight_decay()` names. An optimizer that clips by itself (LAMB) has
    that switched off: `max_grad_norm` is applied once, by the training loop.

    Raises:
        ValueError: an unknown optimizer, or a keyword it does not take.
    """
    if config.name.lower() not in (names := timm.optim.list_optimizers()):
        raise ValueError(f"optim.name: {config.name!r} is not one of timm's optimizers{nearest(config.name.lower(), names)}")
    given = {"eps": config.eps, "betas": config.betas}
    keywords: dict[str, Any] = {key: value for key, value in given.items() if value is not None} | config.kwargs
    accepted = inspect.signature(timm.optim.get_optimizer_class(config.name.lower(), bind_defaults=False)).parameters
    for key in keywords:
        if key not in accepted:
            raise ValueError(f"optim.{key}: {config.name} takes no such setting; it takes {', '.join(accepted)}")
    if "max_grad_norm" in accepted:
        keywords["max_grad_norm"] = None
    return timm.optim.create_optimizer_v2(
        _parameter_groups(model, config),
        opt=config.name.lower(),
        lr=scaled_learning_rate(config, global_batch_size),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **keywords,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, updates_per_epoch: int) -> Scheduler:
    """Build the schedule; `step_update(n)` sets the learning rate of update n, whatever came before."""
    constant = config.name == "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else config.name,
        num_epochs=config.epochs,
        decay_epochs=config.epochs + 1,  # a step schedule that never steps is constant
        decay_rate=1.0,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    scheduler.step_update(0)
    return scheduler


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the classifier trainable (linear probe)."""
    head = {id(parameter) for parameter in model.get_classifier().parameters()}  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in head)


def _parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=spared, layer_decay=config.layer_decay
        )
    return _with_decayed_temperatures(model, groups) if config.decay_temperature else groups


def _with_decayed_temperatures(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move the temperatures into the decayed group of their layer, as the authors' code decays them."""
    temperatures = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("temperature")}
    for spared in [group for group in groups if group["weight_decay"] == 0.0]:
        decayed = next(
            group for group in groups if group["weight_decay"] != 0.0 and group.get("lr_scale") == spared.get("lr_scale")
        )
        decayed["params"] += [parameter for parameter in spared["params"] if id(parameter) in temperatures]
        spared["params"] = [parameter for parameter in spared["params"] if id(parameter) not in temperatures]
    return [group for group in groups if group["params"]]
