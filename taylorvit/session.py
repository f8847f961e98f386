"""Everything one training process holds, built in order from the config: what `engine` runs and what a dry run describes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from taylorvit.bad_samples import BadSamples
from taylorvit.config import Config, TrainConfig
from taylorvit.data import (
    AnyDataset,
    ImageDataset,
    Loader,
    Mixer,
    TrainLoader,
    build_dataset,
    build_eval_loader,
    build_train_loader,
    check_augment,
    check_classes,
    check_mixing,
    check_no_augment,
    check_num_classes,
    check_sequences,
    dataset_fingerprint,
    epoch_updates,
    format_reference_lines,
    holds_sequences,
    reference_lines,
)
from taylorvit.distributed import BatchSplit, split_batch
from taylorvit.metrics import forward_flops, peak_flops
from taylorvit.models import attention_forms, build_model, random_inputs
from taylorvit.optim import build_optimizer, build_scheduler, freeze_backbone, scaled_learning_rate
from taylorvit.randomness import seed_all
from taylorvit.run_folder import describe_environment
from taylorvit.weights import load_into, load_weights


@dataclass
class Session:
    """The objects of one training process; `model` and `optimizer` are as accelerate prepared them."""

    config: Config
    accelerator: Accelerator
    split: BatchSplit
    updates_per_epoch: int
    train_set: AnyDataset
    val_set: AnyDataset
    train_loader: TrainLoader
    eval_loader: Loader
    bad_samples: BadSamples
    mixer: Mixer
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    criterion: nn.Module
    notes: list[str]

    @property
    def total_updates(self) -> int:
        """Updates of the whole schedule."""
        return self.updates_per_epoch * self.config.schedule.epochs

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of the data sets, by which a continued run knows that its images are the same."""
        return {"train": dataset_fingerprint(self.train_set), "val": dataset_fingerprint(self.val_set)}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, commit and hardware, as they go into checkpoints."""
        return describe_environment()

    @cached_property
    def flops_per_image(self) -> int:
        """Forward FLOPs of one image or sequence (matrix products; a multiply-add is two)."""
        inputs = random_inputs(self.config.model, 1, device="meta")
        return forward_flops(build_model(self.config.model, device="meta"), tuple(inputs.shape[1:]), inputs.dtype)

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DistributedDataParallel wrapper."""
        return self.accelerator.unwrap_model(self.model)


def build_session(config: Config, accelerator: Accelerator, *, finetune: bool = True) -> Session:
    """Build everything a run needs, cheap checks first.

    Args:
        config: the run.
        accelerator: from `build_accelerator`.
        finetune: load `train.finetune`; not needed where a checkpoint follows.

    Raises:
        ValueError: anything in the config that cannot be honoured, by its key.
    """
    split = split_batch(
        config.train.global_batch_size,
        config.train.micro_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    if holds_sequences(config.data.dataset):
        check_no_augment(config.augment, config.data.dataset)
    else:
        check_augment(config.augment)
    check_mixing(config.augment, split.micro_batch_size)
    seed_all("init", config.seed)
    model = build_model(config.model)
    train_set, val_set = (
        build_dataset(config.data, split, in_chans=config.model.in_chans, max_length=config.model.max_length)
        for split in (config.data.train_split, config.data.val_split)
    )
    check_classes(train_set, val_set)
    check_num_classes(train_set, config.model.num_classes)
    for dataset in (train_set, val_set):
        check_sequences(dataset, config.model)
    updates_per_epoch = epoch_updates(len(train_set), config.train.global_batch_size, config.schedule.updates_per_epoch)
    notes = _prepare_model(model, config.train, finetune=finetune)
    model.to(accelerator.device)
    if config.train.channels_last:
        if not isinstance(train_set, ImageDataset):
            raise ValueError("train.channels_last: true is for images, and data.dataset holds sequences")
        model.to(memory_format=torch.channels_last)
    ema = None
    if config.train.ema_decay is not None:
        ema = ModelEmaV3(model, decay=config.train.ema_decay, use_warmup=config.train.ema_warmup)
    optimizer = build_optimizer(model, config.optim, global_batch_size=config.train.global_batch_size)
    scheduler = build_scheduler(optimizer, config.schedule, updates_per_epoch=updates_per_epoch)
    if config.train.compile:
        model.compile()  # in place: the names of the parameters stay as they are
        if ema is not None:
            ema.module.compile()  # evaluated like the raw weights
    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader = build_train_loader(
        train_set,
        data=config.data,
        augment=config.augment,
        img_size=config.model.img_size,
        seed=config.seed,
        micro_batch_size=split.micro_batch_size,
        rank=split.rank,
        world_size=split.world_size,
        accumulation=split.accumulation,
        updates_per_epoch=updates_per_epoch,
        timeout_seconds=config.timeout_seconds,
    )
    eval_loader = build_eval_loader(
        val_set,
        data=config.data,
        img_size=config.model.img_size,
        batch_size=config.evaluate.batch_size,
        rank=split.rank,
        world_size=split.world_size,
        timeout_seconds=config.timeout_seconds,
    )
    loaders: dict[str, Loader] = {"train": train_loader, "val": eval_loader}
    return Session(
        config=config,
        accelerator=accelerator,
        split=split,
        updates_per_epoch=updates_per_epoch,
        train_set=train_set,
        val_set=val_set,
        train_loader=train_loader,
        eval_loader=eval_loader,
        bad_samples=BadSamples(Path(config.run_dir) / "bad_samples.txt", loaders, config.data, accelerator),
        mixer=Mixer(config.augment, num_classes=config.model.num_classes, seed=config.seed),
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        criterion=SoftTargetCrossEntropy() if config.train.loss == "cross_entropy" else nn.BCEWithLogitsLoss(),
        notes=notes,
    )


def total_peak_flops(session: Session) -> float | None:
    """Return the peak FLOP/s of all processes' devices: the config's, or the table's, or None where it is unknown."""
    stated = session.config.log.peak_tflops
    one = stated * 1e12 if stated else peak_flops(session.accelerator.device, session.config.train.mixed_precision)
    return one * session.split.world_size if one else None


def describe(session: Session) -> list[str]:
    """Return what a run would do, a line each; the main process alone learns what ListOps results are held against."""
    return [*_describe_model(session), *_describe_data(session), *_describe_training(session)]


def _describe_model(session: Session) -> list[str]:
    config, model = session.config.model, session.bare_model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    gigaflops = session.flops_per_image / 1e9
    forms = attention_forms(model, training=True)
    counted = ", ".join(f"{form} x {forms.count(form)}" for form in dict.fromkeys(forms)) or "the network's own"
    return [
        f"model      {config.name}, attention {config.attention} {config.attention_options or ''}".rstrip(),
        f"           {parameters:,} parameters, {trained:,} trained, {gigaflops:.3f} GFLOP a sample forward",
        f"form       {counted} (by layer: {' '.join(forms)})",
        *(f"weights    {note}" for note in session.notes),
    ]


def _describe_data(session: Session) -> list[str]:
    config, split = session.config, session.split
    kind = "images" if isinstance(session.train_set, ImageDataset) else "sequences"
    left_out = len(session.train_set) - session.updates_per_epoch * split.global_batch_size
    lines = reference_lines(session.val_set, lambda: session.train_set) if session.accelerator.is_main_process else {}
    return [
        f"data       {config.data.dataset} at {config.data.root}: {len(session.train_set):,} training and "
        f"{len(session.val_set):,} validation {kind}, {len(session.train_set.classes)} classes",
        f"batch      {split.global_batch_size} {kind} an update = {split.world_size} process(es) x "
        f"{split.micro_batch_size} {kind} x {split.accumulation} accumulation step(s)",
        f"updates    {session.updates_per_epoch:,} an epoch x {config.schedule.epochs} epochs = {session.total_updates:,}; "
        f"{left_out} {kind} sit an epoch out, others each time",
        *([f"to beat    on the validation samples {format_reference_lines(lines)}"] if lines else []),
    ]


def _describe_training(session: Session) -> list[str]:
    config, optim, schedule = session.config, session.config.optim, session.config.schedule
    rate = scaled_learning_rate(optim, session.split.global_batch_size)
    end = "not below" if schedule.name == "rsqrt" else "to"
    rule = f"{optim.lr_scaling} rule from {optim.lr:g} at batch {optim.lr_base_batch_size}"
    return [
        f"optimizer  {optim.name}, learning rate {rate:g} ({'as given' if optim.lr_scaling == 'none' else rule}), "
        f"weight decay {optim.weight_decay:g}, gradient norm clipped at {optim.max_grad_norm}",
        f"schedule   {schedule.name} {end} {schedule.min_lr:g}, {schedule.warmup_epochs:g} warm-up epoch(s) "
        f"from {schedule.warmup_lr:g}, stepped every update",
        f"device     {session.accelerator.device}, precision {config.train.mixed_precision}",
        f"run        {config.run_dir}, seed {config.seed}, resume {config.resume}",
    ]


def _prepare_model(model: nn.Module, config: TrainConfig, *, finetune: bool) -> list[str]:
    """Load foreign weights, freeze and set checkpointing; return notes on what was adapted."""
    notes: list[str] = []
    if config.finetune and finetune:
        state, source = load_weights(config.finetune, weights="best")
        notes = [f"{source.path} ({source.weights})", *load_into(model, state, adapt=True)]
    if config.freeze == "backbone":
        freeze_backbone(model)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return notes
