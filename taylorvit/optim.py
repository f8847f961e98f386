"""The optimizer and the learning-rate schedule, both timm's, built from their config sections."""

from __future__ import annotations

import inspect
import math
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import WSDLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from taylorvit.config import OptimConfig, ScheduleConfig
from taylorvit.suggest import nearest


def scaled_learning_rate(config: OptimConfig, global_batch_size: int) -> float:
    """Return the peak learning rate after the batch-size rule `optim.lr_scaling`."""
    ratio = global_batch_size / config.lr_base_batch_size
    return config.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def build_optimizer(model: nn.Module, config: OptimConfig, *, global_batch_size: int) -> torch.optim.Optimizer:
    """Build the timm optimizer named in the config over the parameters that require gradients.

    Weight decay leaves out biases, norms and what `model.no_weight_decay()` names. An optimizer that clips by itself (LAMB) has
    that switched off: `max_grad_norm` is applied once, by the training loop.

    Raises:
        ValueError: an optimizer that is unknown or cannot be built here, or a keyword it does not take.
    """
    accepted = _accepted_keywords(config.name)
    keywords = _keywords(config, accepted)
    if "max_grad_norm" in accepted:
        keywords["max_grad_norm"] = None
    return timm.optim.create_optimizer_v2(
        _parameter_groups(model, config),
        opt=config.name.lower(),
        lr=scaled_learning_rate(config, global_batch_size),
        weight_decay=config.weight_decay,
        **keywords,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, updates_per_epoch: int) -> Scheduler:
    """Build the schedule; `step_update(n)` sets the learning rate of update n, whatever came before."""
    if config.name == "rsqrt":
        scheduler = _inverse_square_root(optimizer, config, updates_per_epoch=updates_per_epoch)
    else:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=config.epochs,
            decay_rate=1.0,  # the power of `poly`: a straight line
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    scheduler.step_update(0)
    return scheduler


def _inverse_square_root(optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, updates_per_epoch: int) -> Scheduler:
    """Build Long Range Arena's schedule: with warmup_lr 0 it is lr sqrt(w) min(1, t / w) / sqrt(max(t, w)) in update t."""
    return WSDLRScheduler(
        optimizer,
        t_initial=config.epochs * updates_per_epoch + 1,
        decay_t=1,  # timm's descent to min_lr, which this schedule has not, would come after the last update
        lr_min=config.min_lr,
        stable_fn="rsqrt",
        warmup_t=config.warmup_epochs * updates_per_epoch,
        warmup_lr_init=config.warmup_lr,
        t_in_epochs=False,
    )


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate that the schedule has set, before the factors of single layers and of the temperatures."""
    return max(group["lr"] / group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the classifier trainable (linear probe)."""
    head = {id(parameter) for parameter in model.get_classifier().parameters()}  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in head)


def _accepted_keywords(name: str) -> list[str]:
    """Return the keywords of a timm optimizer's constructor, without the parameters that come first."""
    if name.lower() not in (names := timm.optim.list_optimizers()):
        raise ValueError(f"optim.name: {name!r} is not one of timm's optimizers{nearest(name.lower(), names)}")
    if timm.optim.get_optimizer_info(name.lower()).second_order:
        raise ValueError(f"optim.name: {name!r} needs second derivatives, which the training loop does not compute")
    try:
        optimizer = timm.optim.get_optimizer_class(name.lower(), bind_defaults=False)
    except (AssertionError, ImportError) as error:  # of NVIDIA apex and bitsandbytes
        raise ValueError(f"optim.name: {name!r} cannot be built here: {error}") from error
    return list(inspect.signature(optimizer).parameters)[1:]


def _keywords(config: OptimConfig, accepted: list[str]) -> dict[str, Any]:
    """Return eps, betas and `kwargs`, as far as they are set, refusing what the optimizer does not take."""
    free = [key for key in accepted if key not in ("lr", "weight_decay", "max_grad_norm")]
    own = {"eps": config.eps, "betas": config.betas, "momentum": config.momentum}
    given = own | {f"kwargs.{key}": value for key, value in config.kwargs.items()}
    keywords: dict[str, Any] = {}
    for key, value in given.items():
        name = key.removeprefix("kwargs.")
        if value is None and name == key:
            continue
        if name not in free or (name == "momentum" and key != name):
            hint = f"; set optim.{name}" if name in accepted else nearest(name, free)
            raise ValueError(f"optim.{key}: {config.name} takes no such setting{hint}; it takes {', '.join(free)}")
        if name in keywords:
            raise ValueError(f"optim.{key}: optim.{name} is set too; set one of them")
        keywords[name] = value
    num_betas = timm.optim.get_optimizer_info(config.name.lower()).num_betas
    if config.betas is not None and num_betas != len(config.betas):
        raise ValueError(f"optim.betas: {config.name} takes {num_betas} rates; give them as optim.kwargs.betas")
    return keywords


def _parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=spared, layer_decay=config.layer_decay
        )
    if not config.decay_temperature and config.temperature_lr_scale == 1:
        return groups
    return _with_temperature_groups(model, groups, config)


def _with_temperature_groups(model: nn.Module, groups: list[dict[str, Any]], config: OptimConfig) -> list[dict[str, Any]]:
    """Split the temperatures off into groups with their own weight decay and learning rate; timm's schedule reads lr_scale."""
    temperatures = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("temperature")}
    split: list[dict[str, Any]] = []
    for group in groups:
        others = [parameter for parameter in group["params"] if id(parameter) not in temperatures]
        moved = [parameter for parameter in group["params"] if id(parameter) in temperatures]
        own: dict[str, Any] = {"weight_decay": config.weight_decay} if config.decay_temperature else {}
        if config.temperature_lr_scale != 1:
            own["lr_scale"] = group.get("lr_scale", 1.0) * config.temperature_lr_scale
        split += [group | {"params": others}, group | {"params": moved} | own]
    return [group for group in split if group["params"]]
