"""The training loop, told in order: build, resume, then for each epoch train, evaluate, record, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from taylorvit.checkpoint import (
    find_newest,
    load_checkpoint,
    pack_state,
    prune_checkpoints,
    save_checkpoint,
    set_newer_aside,
    unpack_state,
)
from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten
from taylorvit.distributed import build_accelerator
from taylorvit.evaluation import evaluate
from taylorvit.export import export_model
from taylorvit.logger import Logger
from taylorvit.metrics import Pace
from taylorvit.models import build_model
from taylorvit.randomness import seed_all
from taylorvit.run_folder import RunFolder
from taylorvit.session import Session, build_session, check_same_run, describe, flops_per_image, total_peak_flops
from taylorvit.signals import StopRequest
from taylorvit.weights import load_into, load_weights


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is not a number; the update was not applied."""


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint.

    Attributes:
        update: optimizer updates done, over all epochs.
        epoch: epochs done, evaluation included.
        window_loss: sum of the losses since the last record, over `window_updates` updates.
        epoch_loss: sum of the losses of the current epoch.
    """

    update: int = 0
    epoch: int = 0
    window_loss: float = 0.0
    window_updates: int = 0
    epoch_loss: float = 0.0

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


@dataclass(frozen=True)
class UpdateResult:
    """One update, the same on every process."""

    loss: float
    grad_norm: float
    stop: bool


def train(config: Config) -> int:
    """Train to the end of the schedule, or until asked to stop, and return the exit code.

    Raises:
        ValueError: a setting that cannot be honoured.
        NonFiniteError: the loss or the gradient is not finite.
    """
    accelerator = build_accelerator(
        device=config.device, mixed_precision=config.train.mixed_precision, timeout_seconds=config.timeout_seconds
    )
    run = RunFolder(config.run_dir)
    if config.resume == "never" and run.holds_run():
        raise ValueError(f"run_dir: {run.path} holds a run already; continue it with --resume auto, or name another folder")
    accelerator.wait_for_everyone()  # nobody writes there before all have looked
    with run.locked(active=accelerator.is_main_process), StopRequest(run.stop_file) as stop:
        found = _find_checkpoint(config, run, accelerator)
        session = build_session(config, accelerator, finetune=found is None)
        progress = _open_run(session, run, found)
        pace = Pace(
            images_per_update=session.split.global_batch_size,
            training_flops=3 * flops_per_image(config),  # the backward pass costs twice the forward
            peak_flops=total_peak_flops(session),
            device=accelerator.device,
        )
        logger = Logger(
            run, config.log, active=accelerator.is_main_process, update=progress.update, total_updates=session.total_updates
        )
        try:
            stopped = _train_epochs(session, run, progress, logger, pace, stop)
        except BaseException as error:
            _write_status(session, run, "failed", progress, f"{type(error).__name__}: {error}")
            raise
        finally:
            logger.close()
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return stop.exit_code if stopped else 0


def dry_run(config: Config) -> list[str]:
    """Build everything, train nothing, write nothing in run_dir; print what would happen and return it, a line each."""
    accelerator = build_accelerator(
        device=config.device, mixed_precision=config.train.mixed_precision, timeout_seconds=config.timeout_seconds
    )
    lines = describe(build_session(config, accelerator))
    accelerator.print("\n".join(lines))
    accelerator.end_training()
    return lines


def _train_epochs(session: Session, run: RunFolder, progress: Progress, logger: Logger, pace: Pace, stop: StopRequest) -> bool:
    """Run the epochs that are left; return whether the run was stopped before its end."""
    last_epoch = min(session.config.schedule.stop_epoch or session.config.schedule.epochs, session.config.schedule.epochs)
    if progress.epoch >= last_epoch:
        logger.say(f"already finished: {progress.update} updates, {progress.epoch} epochs")
    while progress.epoch < last_epoch:
        if _train_epoch(session, run, progress, logger, pace, stop):
            save(session, run, progress)
            _write_status(session, run, "preempted", progress, stop.reason)
            logger.say(f"stopped by {stop.reason} after update {progress.update}; continue with --resume auto")
            return True
        _finish_epoch(session, run, progress, logger, final=progress.epoch + 1 == last_epoch)
    _export_best(session, run, logger)
    _write_status(session, run, "finished", progress, f"{last_epoch} epochs done")
    return False


def _finish_epoch(session: Session, run: RunFolder, progress: Progress, logger: Logger, *, final: bool) -> None:
    """Evaluate, record and save as the config asks at the end of an epoch, and always at the end of the last."""
    config, epoch = session.config, progress.epoch + 1
    metrics: dict[str, float] = {}
    if final or epoch % config.evaluate.every_epochs == 0:
        metrics = evaluate_epoch(session, progress)
        logger.record("evaluate", update=progress.update, epoch=epoch, values=metrics)
    if config.log.histogram_every_epochs and epoch % config.log.histogram_every_epochs == 0:
        logger.temperatures(session.bare_model, progress.update)
    progress.epoch, progress.epoch_loss = epoch, 0.0
    milestone = config.checkpoint.milestone_every_epochs is not None and epoch % config.checkpoint.milestone_every_epochs == 0
    if final or milestone or epoch % config.checkpoint.every_epochs == 0 or _saves_at(config, progress.update):
        save(session, run, progress, metrics=metrics, milestone=milestone)
    _write_status(session, run, "running", progress, f"epoch {epoch} done")


def _train_epoch(session: Session, run: RunFolder, progress: Progress, logger: Logger, pace: Pace, stop: StopRequest) -> bool:
    """Train the updates of the current epoch that are left; return whether a stop was requested."""
    config, epoch = session.config, progress.epoch
    first = progress.update - epoch * session.updates_per_epoch
    session.model.train()
    session.train_loader.set_position(epoch, first)
    pace.restart(progress.update)
    batches = pace.timed(iter(session.train_loader))
    for update in range(first, session.updates_per_epoch):
        learning_rate = max(group["lr"] for group in session.optimizer.param_groups)
        result = run_update(session, batches, logger, stop, epoch=epoch, update=update)
        progress.advance(result.loss)
        session.scheduler.step_update(progress.update)
        logger.advance(progress.update)
        last = update + 1 == session.updates_per_epoch
        if last or progress.update % config.log.every_updates == 0:
            values = {"loss": progress.read_window(), "lr": learning_rate, "grad_norm": result.grad_norm}
            logger.record("train", update=progress.update, epoch=epoch + 1, values=values | pace.read(progress.update))
        if result.stop:
            return True
        if not last and _saves_at(config, progress.update):
            save(session, run, progress)
    return False


def run_update(
    session: Session, batches: Iterator[list[Tensor]], logger: Logger, stop: StopRequest, *, epoch: int, update: int
) -> UpdateResult:
    """Do one optimizer update: forward and backward over the accumulation steps, check, clip, step, average.

    Args:
        update: number of the update within the epoch.

    Raises:
        NonFiniteError: on every process at once, before anything was changed.
    """
    config, accelerator, split = session.config, session.accelerator, session.split
    position = epoch * session.updates_per_epoch + update
    total = torch.zeros((), device=accelerator.device)
    for micro_step in range(split.accumulation):
        images, labels = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches))
        images, targets = session.mixer(
            images,
            labels,
            epoch=epoch,
            update=update,
            offset=split.offset(micro_step),
            global_batch_size=split.global_batch_size,
        )
        if position == 0 and micro_step == 0 and config.log.image_grid:
            shown = slice(config.log.image_grid)
            logger.images(images[shown], targets[shown], session.train_set.classes, config.data.mean, config.data.std)
        if config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seed_all("step", config.seed, position, micro_step, split.rank)  # drop path and dropout
        last = micro_step + 1 == split.accumulation
        with nullcontext() if last else accelerator.no_sync(session.model):
            loss = session.criterion(session.model(images), targets) / split.accumulation
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(session.model.parameters(), config.optim.max_grad_norm or math.inf)
    result = _agree(session, total, norm, stop)
    _check_finite(session, result, epoch=epoch, position=position)
    session.optimizer.step()
    session.optimizer.zero_grad()
    if session.ema is not None and not accelerator.optimizer_step_was_skipped:
        session.ema.update(session.bare_model, step=position)
    return result


def evaluate_epoch(session: Session, progress: Progress) -> dict[str, float]:
    """Evaluate the raw weights, and the averaged ones where there are any."""
    started = time.monotonic()
    classes = session.config.model.num_classes
    raw = evaluate(session.model, session.eval_loader, session.accelerator, num_classes=classes)
    metrics = {
        "train_loss": progress.epoch_loss / session.updates_per_epoch,
        "loss": raw.loss,
        "top1": raw.top1,
        "top5": raw.top5,
    }
    if session.ema is not None:
        averaged = evaluate(session.ema.module, session.eval_loader, session.accelerator, num_classes=classes)
        metrics |= {"ema_loss": averaged.loss, "ema_top1": averaged.top1, "ema_top5": averaged.top5}
    return metrics | {"samples": raw.samples, "seconds": time.monotonic() - started}


def save(
    session: Session, run: RunFolder, progress: Progress, *, metrics: dict[str, float] | None = None, milestone: bool = False
) -> None:
    """Write a checkpoint of the run as it stands between two updates, and drop the ones no longer kept."""
    config, accelerator = session.config, session.accelerator
    if accelerator.is_main_process:
        tensors, state = pack_state(session.bare_model, session.ema, session.optimizer, accelerator.scaler)
        meta: dict[str, Any] = {
            "progress": asdict(progress),
            "world_size": session.split.world_size,
            "config": config_to_dict(config),
            "classes": session.train_set.classes,
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


def _saves_at(config: Config, update: int) -> bool:
    every = config.checkpoint.every_updates
    return every is not None and update % every == 0


def _find_checkpoint(config: Config, run: RunFolder, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to continue from, the same on every process; None starts anew."""
    found: Path | None = None
    if accelerator.is_main_process:
        run.stop_file.unlink(missing_ok=True)
        if config.resume == "auto":
            found = find_newest(run.checkpoints)
        elif config.resume != "never":
            found = Path(config.resume)
    return broadcast_object_list([found])[0]


def _open_run(session: Session, run: RunFolder, found: Path | None) -> Progress:
    """Create or continue the run folder; return where the run stands."""
    config, accelerator = session.config, session.accelerator
    progress = Progress()
    if found is not None:
        checkpoint = load_checkpoint(found)
        check_same_run(flatten(checkpoint.meta["config"]), flatten(config))
        unpack_state(
            checkpoint.tensors,
            checkpoint.meta["state"],
            session.bare_model,
            session.ema,
            session.optimizer,
            accelerator.scaler,
        )
        progress = Progress(**checkpoint.meta["progress"])
        if checkpoint.meta["world_size"] != session.split.world_size:
            accelerator.print(
                f"note: the checkpoint was written by {checkpoint.meta['world_size']} process(es), this run has "
                f"{session.split.world_size}: same images, same order, but sums round differently and drop path draws afresh"
            )
    if accelerator.is_main_process:
        for path in set_newer_aside(run.checkpoints, progress.update):
            print(f"note: {path.name} holds updates after the one this run goes back to", flush=True)
        run.open(config_to_dict(config), update=progress.update)
        run.write_environment(accelerator)
        for line in describe(session):
            print(line, flush=True)
        if found is not None:
            print(f"resumed    {found}: update {progress.update}, epoch {progress.epoch}", flush=True)
    _write_status(session, run, "running", progress, f"resumed from {found}" if found else "started")
    return progress


def _agree(session: Session, loss: Tensor, norm: Tensor, stop: StopRequest) -> UpdateResult:
    """Share the mean loss and the wish to stop over all processes: one small reduction and one synchronisation an update."""
    requested = torch.tensor(float(stop.requested), device=loss.device)
    shared = session.accelerator.reduce(torch.stack([loss.float(), requested]), reduction="sum")
    loss_sum, stops, grad_norm = torch.cat([shared, norm.float().reshape(1)]).tolist()
    return UpdateResult(loss=loss_sum / session.split.world_size, grad_norm=grad_norm, stop=stops > 0)


def _check_finite(session: Session, result: UpdateResult, *, epoch: int, position: int) -> None:
    """Raise a NonFiniteError where the update would spoil the weights; an fp16 overflow is left to the gradient scaler."""
    gradient_matters = session.accelerator.scaler is None
    if math.isfinite(result.loss) and (math.isfinite(result.grad_norm) or not gradient_matters):
        return
    temperatures = {
        name.removesuffix(".temperature"): [round(value, 4) for value in parameter.detach().float().tolist()]
        for name, parameter in session.bare_model.named_parameters()
        if name.endswith("temperature")
    }
    raise NonFiniteError(
        f"loss {result.loss} at update {position + 1} (epoch {epoch + 1}): gradient norm {result.grad_norm}, learning rate "
        f"{max(group['lr'] for group in session.optimizer.param_groups):g}, temperatures {temperatures}; the update was not "
        "applied and the last checkpoint is good; lower optim.lr or use train.mixed_precision: no, then --resume auto"
    )


def _export_best(session: Session, run: RunFolder, logger: Logger) -> None:
    """Write the best checkpoint's weights as a folder that timm loads."""
    if not session.accelerator.is_main_process:
        return
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
    logger.say(f"exported {source.path} ({kind} weights) to {run.export}")


def _write_status(session: Session, run: RunFolder, state: str, progress: Progress, message: str) -> None:
    if session.accelerator.is_main_process:
        run.write_status(state, update=progress.update, epoch=progress.epoch, message=message)
