"""From a session to a checkpoint and back: what is saved, what a continued run must agree on, and the final export."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from taylorvit.checkpoint import (
    META,
    Checkpoint,
    CheckpointError,
    find_newest,
    find_newest_valid,
    load_checkpoint,
    pack_state,
    prune_checkpoints,
    read_meta,
    save_checkpoint,
    set_newer_aside,
    unpack_state,
)
from taylorvit.cli import one_line
from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten
from taylorvit.export import export_model
from taylorvit.models import build_model
from taylorvit.run_folder import RunFolder
from taylorvit.session import Session
from taylorvit.suggest import nearest
from taylorvit.weights import load_into, load_weights

# Prefixes of settings that may differ between a run and its continuation without making it another run.
FREE_TO_CHANGE = (
    "run_dir",
    "resume",
    "allow_change",
    "device",
    "timeout_seconds",
    "evaluate.",
    "checkpoint.",
    "log.",
    "data.root",
    "data.test_split",
    "data.num_workers",
    "data.prefetch_factor",
    "data.pin_memory",
    "data.on_error",
    "data.max_bad_share",
    "data.io_retries",
    "schedule.stop_epoch",
    "train.micro_batch_size",
    "train.compile",
    "train.grad_checkpointing",
    "train.channels_last",
    "train.finetune",
)


# Settings that may be changed on purpose, by naming them in `allow_change`: they leave positions and parameters as they are.
CHANGEABLE = (
    "optim.lr",
    "optim.lr_scaling",
    "optim.lr_base_batch_size",
    "optim.weight_decay",
    "optim.eps",
    "optim.betas",
    "optim.momentum",
    "optim.max_grad_norm",
    "schedule.name",
    "schedule.epochs",
    "schedule.warmup_epochs",
    "schedule.warmup_lr",
    "schedule.min_lr",
    "train.mixed_precision",
    "train.loss",
    "model.drop_path_rate",
    "model.drop_rate",
    "augment.crop",
    "augment.crop_padding",
    "augment.crop_scale",
    "augment.crop_ratio",
    "augment.hflip",
    "augment.three_augment",
    "augment.color_jitter",
    "augment.auto_augment",
    "augment.random_erasing",
    "augment.mixup_alpha",
    "augment.cutmix_alpha",
    "augment.mix_prob",
    "augment.mix_switch_prob",
    "augment.label_smoothing",
)

# What a continued run reads in a checkpoint's meta.
_META_KINDS: dict[str, Any] = {
    "config": dict,
    "split": dict,
    "data": dict,
    "environment.packages": dict,
    "progress.best": (int, float, type(None)),
    "state.ema": bool,
    "state.scaler": (dict, type(None)),
    "state.optimizer.class": str,
    "state.optimizer.names": list,
    "state.optimizer.groups": list,
    "state.optimizer.state": dict,
}


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint.

    Attributes:
        update: optimizer updates done, over all epochs.
        epoch: epochs done, evaluation included.
        window_loss: sum of the losses since the last record, over `window_updates` updates.
        epoch_loss: sum of the losses of the current epoch.
        best: highest value so far of the metric that ranks checkpoints.
    """

    update: int = 0
    epoch: int = 0
    window_loss: float = 0.0
    window_updates: int = 0
    epoch_loss: float = 0.0
    best: float | None = None

    def advance(self, loss: float) -> None:
        """Count one update and its loss."""
        self.update += 1
        self.window_loss += loss
        self.window_updates += 1
        self.epoch_loss += loss

    def read_window(self) -> float:
        """Return the mean loss since the last call."""
        mean = self.window_loss / max(self.window_updates, 1)
        self.window_loss, self.window_updates = 0.0, 0
        return mean

    def finish_epoch(self, value: float | None) -> bool:
        """Count one epoch; return whether `value`, its metric, is the best so far."""
        self.epoch += 1
        self.epoch_loss = 0.0
        is_best = value is not None and (self.best is None or value > self.best)
        self.best = value if is_best else self.best
        return is_best


def find_checkpoint(config: Config, run: RunFolder, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to continue from, the same on every process; None starts anew.

    The main process must hold the run's lock: it sweeps what a killed save left behind.
    """
    found: Path | None = None
    if accelerator.is_main_process:
        if config.resume == "auto":
            found = find_newest(run.checkpoints)
        elif config.resume != "never":
            found = _named_step(config.resume)
    return broadcast_object_list([found])[0]


def describe_start(config: Config, run: RunFolder) -> str:
    """Return what a start with these settings would do with the run folder, without touching it.

    Raises:
        ValueError: it would be refused.
    """
    refuse_second_start(config, run)
    newest = find_newest_valid(run.checkpoints) if config.resume == "auto" else None
    found = newest if config.resume in ("auto", "never") else _named_step(config.resume)
    if found is None:
        return f"start      anew in {run.path}"
    meta = read_meta(found)
    _check_meta(found, meta)
    check_same_run(flatten(meta["config"]), config)
    return f"start      from {found}"


def refuse_second_start(config: Config, run: RunFolder) -> None:
    """Raise a ValueError where a new run would write over one that is there."""
    if config.resume == "never" and run.holds_run():
        raise ValueError(f"run_dir: {run.path} holds a run already; continue it with --resume auto, or name another folder")


def changed_settings(
    saved: dict[str, Any], config: Config, *, free: tuple[str, ...] = FREE_TO_CHANGE
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that make another run, with their value before and now.

    Args:
        saved: flattened config; a key that did not exist yet when it was saved had the effect of its default.
        config: of this start.
        free: prefixes of settings that may differ all the same.
    """
    before, now = flatten(Config()) | saved, flatten(config_to_dict(config))
    return {key: (before[key], now[key]) for key in now if before[key] != now[key] and not key.startswith(free)}


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Raise a ValueError that lists the settings whose change would make a continued run another run.

    Args:
        saved: flattened config of the checkpoint.
        config: of this start; its `allow_change` names keys that may differ all the same.
    """
    for key in config.allow_change:
        if key not in CHANGEABLE:
            raise ValueError(f"allow_change: {key!r} cannot change within a run{nearest(key, CHANGEABLE)}")
    changed = {key: values for key, values in changed_settings(saved, config).items() if key not in config.allow_change}
    if changed:
        shown = "; ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())
        hint = (
            f", or say that you mean it with --allow_change '[{', '.join(changed)}]'" if set(changed) <= set(CHANGEABLE) else ""
        )
        raise ValueError(f"resume: these settings differ from the checkpoint's: {shown}; change them in a new run_dir{hint}")


def restore(session: Session, found: Path) -> tuple[Progress, list[str]]:
    """Put a checkpoint's state into the session; return where the run stands, and notes on what will not be exact.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another recipe, model or data set.
    """
    checkpoint = load_checkpoint(found)
    _check_meta(found, checkpoint.meta)
    check_same_run(flatten(checkpoint.meta["config"]), session.config)
    _check_same_data(session, checkpoint)
    configured = [dict(group) for group in session.optimizer.param_groups]
    state, scaler = checkpoint.meta["state"], session.accelerator.scaler
    if (scaler is None) != (state["scaler"] is None):  # the precision was changed on purpose: a new scale starts, or none
        state, scaler = state | {"scaler": None}, None
    try:
        unpack_state(checkpoint.tensors, state, session.bare_model, session.ema, session.optimizer, scaler)
    except CheckpointError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:  # a checksum says nothing of the writer
        raise CheckpointError(f"{found / META}: state is none that a training saves ({one_line(error)})") from error
    _apply_changes(session, configured)
    return Progress(**checkpoint.meta["progress"]), _inexact(session, checkpoint)


def save(
    session: Session, run: RunFolder, progress: Progress, *, metrics: dict[str, float] | None = None, milestone: bool = False
) -> None:
    """Write a checkpoint of the run as it stands between two updates, and drop the ones no longer kept."""
    config, accelerator = session.config, session.accelerator
    if accelerator.is_main_process:
        tensors, state = pack_state(session.bare_model, session.ema, session.optimizer, accelerator.scaler)
        meta: dict[str, Any] = {
            "progress": asdict(progress),
            "split": asdict(session.split),
            "config": config_to_dict(config),
            "classes": session.train_set.classes,
            "data": session.fingerprints,
            "environment": session.environment,
            "state": state,
            "metrics": metrics or {},
            "milestone": milestone,
        }
        save_checkpoint(run.checkpoints, progress.update, tensors, meta)
        prune_checkpoints(
            run.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            metric=config.checkpoint.metric,
        )
    accelerator.wait_for_everyone()


def leave_the_future(run: RunFolder, progress: Progress) -> list[str]:
    """Set the checkpoints after `progress` aside, which a run that goes back to an earlier step writes again; return notes."""
    aside = set_newer_aside(run.checkpoints, progress.update)
    return [f"{path.name} holds updates after the one this run goes back to" for path in aside]


def space_notes(session: Session, run: RunFolder) -> list[str]:
    """Return a note where the disk will not hold two checkpoints, the newest and the one being written.

    The size is an estimate: the weights, their average, and two moments of the optimizer.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in session.bare_model.state_dict().values())
    needed = 2 * weights * (4 if session.ema is not None else 3)
    free = shutil.disk_usage(run.path).free
    if free >= needed:
        return []
    return [f"two checkpoints take about {needed:,} bytes, but the disk of {run.path} has {free:,} free: make room"]


def export_best(session: Session, run: RunFolder) -> str:
    """Write the best checkpoint's weights as a folder that timm loads; return what was written."""
    config = session.config
    kind = "ema" if config.checkpoint.metric == "ema_top1" else "raw"
    state, source = load_weights(run.path, weights=kind, step="best")
    model = build_model(config.model)
    load_into(model, state)
    export_model(
        model,
        run.export,
        model_config=config_to_dict(config.model),
        class_names=session.train_set.classes,
        mean=config.data.mean,
        std=config.data.std,
        crop_pct=config.data.crop_pct,
        interpolation=config.data.interpolation,
    )
    return f"exported {source.path} ({kind} weights) to {run.export}"


def _apply_changes(session: Session, configured: list[dict[str, Any]]) -> None:
    """Give the optimizer this start's values of the settings that were changed on purpose; the checkpoint brought its own."""
    named = [key.removeprefix("optim.") for key in session.config.allow_change if key.startswith("optim.")]
    names = {"initial_lr" if name.startswith("lr") else name for name in named}
    for group, wanted in zip(session.optimizer.param_groups, configured, strict=True):
        group.update({name: wanted[name] for name in names & wanted.keys()})


def _named_step(resume: str) -> Path:
    if not (Path(resume) / "manifest.json").is_file():
        raise ValueError(f"resume: {resume!r} is not auto, never or a step folder such as RUN_DIR/checkpoints/step-00001000")
    return Path(resume)


def _check_meta(found: Path, meta: dict[str, Any]) -> None:
    """Raise a CheckpointError for the first key of a checkpoint's meta that is missing or not what `save` writes there."""
    progress = {f"progress.{item.name}": int if item.type == "int" else (int, float) for item in fields(Progress)}
    for key, kinds in (progress | _META_KINDS).items():
        value: Any = meta
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise CheckpointError(f"{found / META}: {key} is missing, which a training saves")
            value = value[part]
        if not isinstance(value, kinds):
            raise CheckpointError(f"{found / META}: {key} is a {type(value).__name__}, which no training saves there")
    if unknown := meta["progress"].keys() - asdict(Progress()).keys():
        raise CheckpointError(f"{found / META}: progress.{min(unknown)} is unknown")


def _check_same_data(session: Session, checkpoint: Checkpoint) -> None:
    """Raise a ValueError where the images are not those the run began with: positions would mean other images."""
    for split, fingerprint in session.fingerprints.items():
        if checkpoint.meta["data"].get(split) != fingerprint:
            raise ValueError(
                f"data.root: the {split} images at {session.config.data.root} are not those that {checkpoint.path} was trained "
                "with: files were added, removed or renamed; restore them, or start a new run_dir"
            )


def _inexact(session: Session, checkpoint: Checkpoint) -> list[str]:
    """Say why the continued run will not repeat the uninterrupted one bit for bit, where it will not."""
    saved, here = checkpoint.meta["split"], asdict(session.split)
    split = [f"{key} {saved.get(key)} -> {here[key]}" for key in here if saved.get(key) != here[key] and key != "rank"]
    notes = (
        [f"{', '.join(split)}: same images, same order, but sums round differently and drop path draws afresh"] if split else []
    )
    before, now = checkpoint.meta["environment"]["packages"], session.environment["packages"]
    versions = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    return notes + ([f"{', '.join(versions)}: other versions may draw or round differently"] if versions else [])
