"""The training loop, told in order: build, resume, then for each epoch train, evaluate, record, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from taylorvit.cli import ONE_LINE, exit_code_of, one_line
from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict
from taylorvit.data import explained_loader_failures
from taylorvit.distributed import Peers, build_accelerator
from taylorvit.evaluation import evaluate
from taylorvit.logger import Logger
from taylorvit.metrics import Pace
from taylorvit.optim import current_learning_rate
from taylorvit.randomness import seed_all
from taylorvit.run_folder import RunFolder
from taylorvit.saving import (
    Progress,
    describe_start,
    export_best,
    find_checkpoint,
    leave_the_future,
    refuse_second_start,
    restore,
    save,
    space_notes,
)
from taylorvit.session import Session, build_session, describe, total_peak_flops
from taylorvit.signals import StopRequest


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is not a number; the update was not applied."""


@dataclass
class Loop:
    """What the training loop works with."""

    session: Session
    run: RunFolder
    progress: Progress
    logger: Logger
    pace: Pace
    stop: StopRequest
    peers: Peers

    @property
    def last_epoch(self) -> int:
        """Epochs after which this start ends."""
        return self.session.config.schedule.stop_epoch or self.session.config.schedule.epochs


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
        LostProcessError: another process died, or did not answer for `timeout_seconds`.
        SystemExit: another process has reported the same error, or the one that this process suffers from.
    """
    accelerator = build_accelerator(
        device=config.device, mixed_precision=config.train.mixed_precision, timeout_seconds=config.timeout_seconds
    )
    peers = Peers(accelerator)
    try:
        return _train(config, accelerator, peers)
    except Exception as raised:
        error = peers.explain(raised)
        if isinstance(error, ONE_LINE) and not peers.is_first_to_say(error):
            raise SystemExit(exit_code_of(error)) from error
        if error is raised:
            raise
        raise error from raised


def _train(config: Config, accelerator: Accelerator, peers: Peers) -> int:
    """Own the run folder, find where the run stands, and train."""
    run = RunFolder(config.run_dir)
    refuse_second_start(config, run)
    accelerator.wait_for_everyone()  # nobody writes there before all have looked
    is_main = accelerator.is_main_process
    with run.locked(active=is_main), StopRequest(run.stop_file if is_main else None) as stop:
        progress = Progress()
        accelerator.wait_for_everyone()  # the folder is ours, or this start ends here and leaves it as it is
        try:
            if is_main:
                run.stop_file.unlink(missing_ok=True)
                run.write_status("starting", update=0, epoch=0)
            found = find_checkpoint(config, run, accelerator)
            session = build_session(config, accelerator, finetune=found is None)
            session.bad_samples.start(continued=found is not None)
            notes: list[str] = []
            if found is not None:
                progress, notes = restore(session, found)
                session.scheduler.step_update(progress.update)
                notes.append(f"resumed from {found}: update {progress.update}, epoch {progress.epoch}")
            elif run.read_metrics():
                notes.append(f"there is no checkpoint in {run.checkpoints}: the run starts again from zero")
            loop = _build_loop(session, run, progress, stop, peers, notes)
            try:
                with explained_loader_failures():
                    stopped = _train_epochs(loop)
            finally:
                loop.logger.close()
        except BaseException as raised:
            error = peers.explain(raised)
            _record_failure(run, progress, error, rank=accelerator.process_index)
            if error is raised:
                raise
            raise error from raised
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return stop.exit_code if stopped else 0


def dry_run(config: Config) -> list[str]:
    """Build everything, train nothing, write nothing in run_dir; print what would happen and return it, a line each.

    Raises:
        ValueError: a setting that cannot be honoured, or a run folder that training would refuse.
    """
    accelerator = build_accelerator(
        device=config.device, mixed_precision=config.train.mixed_precision, timeout_seconds=config.timeout_seconds
    )
    start = describe_start(config, RunFolder(config.run_dir))
    lines = [*describe(build_session(config, accelerator)), start]
    accelerator.print("\n".join(lines))
    accelerator.end_training()
    return lines


def _build_loop(
    session: Session, run: RunFolder, progress: Progress, stop: StopRequest, peers: Peers, notes: list[str]
) -> Loop:
    """Open the run folder for writing and say what will happen."""
    config, accelerator = session.config, session.accelerator
    if accelerator.is_main_process:
        notes += leave_the_future(run, progress) + space_notes(session, run)
        run.open(config_to_dict(config), update=progress.update, epoch=progress.epoch)
        run.write_environment(accelerator)
    accelerator.print("\n".join([*describe(session), *(f"note       {note}" for note in notes)]), flush=True)
    pace = Pace(
        images_per_update=session.split.global_batch_size,
        training_flops=3 * session.flops_per_image,  # the backward pass costs twice the forward
        peak_flops=total_peak_flops(session),
        device=accelerator.device,
    )
    last_epoch = config.schedule.stop_epoch or config.schedule.epochs
    logger = Logger(
        run,
        config.log,
        active=accelerator.is_main_process,
        update=progress.update,
        total_updates=last_epoch * session.updates_per_epoch,
    )
    return Loop(session, run, progress, logger, pace, stop, peers)


def _train_epochs(loop: Loop) -> bool:
    """Run the epochs that are left; return whether the run was stopped before its end."""
    progress, logger = loop.progress, loop.logger
    _write_status(loop, "running", "started")
    if progress.epoch >= loop.last_epoch:
        logger.say(f"already finished: {progress.update} updates, {progress.epoch} epochs")
    while progress.epoch < loop.last_epoch:
        if _train_epoch(loop):
            _save(loop)
            _write_status(loop, "preempted", loop.stop.reason)
            logger.say(f"stopped by {loop.stop.reason} after update {progress.update}; continue with --resume auto")
            return True
        _finish_epoch(loop)
    if loop.session.accelerator.is_main_process:
        logger.say(export_best(loop.session, loop.run))
    _write_status(loop, "finished", f"{progress.epoch} epochs done")
    return False


def _train_epoch(loop: Loop) -> bool:
    """Train the updates of the current epoch that are left; return whether a stop was requested."""
    session, progress, config = loop.session, loop.progress, loop.session.config
    epoch, first = progress.epoch, progress.update - progress.epoch * session.updates_per_epoch
    session.model.train()
    session.train_loader.set_position(epoch, first)
    loop.pace.restart(progress.update)
    batches = _noted(loop, loop.pace.timed(iter(session.train_loader)))
    for update in range(first, session.updates_per_epoch):
        loop.peers.note(f"update {progress.update + 1}")
        loop.stop.cut_off = loop.peers.cut_off
        learning_rate = current_learning_rate(session.optimizer)
        result = run_update(loop, batches, epoch=epoch, update=update)
        session.bad_samples.share()
        progress.advance(result.loss)
        session.scheduler.step_update(progress.update)
        loop.logger.advance(progress.update)
        last = update + 1 == session.updates_per_epoch
        if last or progress.update % config.log.every_updates == 0:
            values = {"loss": progress.read_window(), "lr": learning_rate, "grad_norm": result.grad_norm}
            scale = {"grad_scale": session.accelerator.scaler.get_scale()} if session.accelerator.scaler else {}
            values |= scale | loop.pace.read(progress.update)
            loop.logger.record("train", update=progress.update, epoch=epoch + 1, values=values)
        if result.stop:
            return True
        if not last and _saves_at(config, progress.update):
            _save(loop)
            loop.pace.restart(progress.update)
    return False


def _noted(loop: Loop, batches: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield the batches and tell the other processes whether this one waits for images or computes, and in which update."""
    while True:
        loop.peers.note(f"update {loop.progress.update + 1}, loading images")
        batch = next(batches, None)
        if batch is None:
            return
        loop.peers.note(f"update {loop.progress.update + 1}, computing")
        yield batch


def _finish_epoch(loop: Loop) -> None:
    """Evaluate, record and save as the config asks at the end of an epoch, and always at the end of the last."""
    config, session, progress = loop.session.config, loop.session, loop.progress
    epoch = progress.epoch + 1
    final = epoch == loop.last_epoch
    milestone = config.checkpoint.milestone_every_epochs is not None and epoch % config.checkpoint.milestone_every_epochs == 0
    saves = final or milestone or epoch % config.checkpoint.every_epochs == 0 or _saves_at(config, progress.update)
    metrics: dict[str, float] = {}
    if final or epoch % config.evaluate.every_epochs == 0:
        if saves:
            _save(loop)  # a kill during the evaluation then costs no update
        loop.peers.note(f"the evaluation of epoch {epoch}")
        metrics = evaluate_epoch(session, progress)
        loop.logger.record("evaluate", update=progress.update, epoch=epoch, values=metrics)
    for line in session.bad_samples.describe():
        loop.logger.say(line)
    if config.log.histogram_every_epochs and epoch % config.log.histogram_every_epochs == 0:
        loop.logger.temperatures(session.bare_model, progress.update)
    is_best = progress.finish_epoch(metrics.get(config.checkpoint.metric))
    if saves or is_best:
        _save(loop, metrics=metrics, milestone=milestone)
    _write_status(loop, "running", f"epoch {epoch} done")


def run_update(loop: Loop, batches: Iterator[list[Tensor]], *, epoch: int, update: int) -> UpdateResult:
    """Do one optimizer update: forward and backward over the accumulation steps, check, clip, step, average.

    An fp16 update that the gradient scaler skips still counts: the learning rate is a function of the position in the data.

    Args:
        update: number of the update within the epoch.

    Raises:
        NonFiniteError: on every process at once, before anything was changed.
    """
    session, config = loop.session, loop.session.config
    accelerator, split = session.accelerator, session.split
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
        if position == 0 and micro_step == 0 and config.log.image_grid and images.ndim == 4:  # sequences are no pictures
            shown = slice(config.log.image_grid)
            loop.logger.images(images[shown], targets[shown], session.train_set.classes, config.data.mean, config.data.std)
        if config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seed_all("step", config.seed, position, micro_step, split.rank)  # drop path and dropout
        last = micro_step + 1 == split.accumulation
        with nullcontext() if last else accelerator.no_sync(session.model):
            loss = session.criterion(session.model(images), targets) / split.accumulation
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(session.model.parameters(), config.optim.max_grad_norm or math.inf)
    result = _agree(session, total, norm, loop.stop)
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
    session.bad_samples.share()
    missing = {"unreadable": raw.unreadable} if raw.unreadable else {}
    return metrics | {"samples": raw.samples, **missing, "seconds": time.monotonic() - started}


def _save(loop: Loop, *, metrics: dict[str, float] | None = None, milestone: bool = False) -> None:
    loop.peers.note(f"the checkpoint of update {loop.progress.update}")
    save(loop.session, loop.run, loop.progress, metrics=metrics, milestone=milestone)


def _saves_at(config: Config, update: int) -> bool:
    every = config.checkpoint.every_updates
    return every is not None and update % every == 0


def _agree(session: Session, loss: Tensor, norm: Tensor, stop: StopRequest) -> UpdateResult:
    """Share the mean loss and the wish to stop over all processes: one small reduction and one synchronisation an update."""
    requested = torch.tensor(float(stop.requested), device=loss.device)
    shared = session.accelerator.reduce(torch.stack([loss.float(), requested]), reduction="sum")
    loss_sum, stops, grad_norm = torch.cat([shared, norm.float().reshape(1)]).tolist()
    return UpdateResult(loss=loss_sum / session.split.world_size, grad_norm=grad_norm, stop=stops > 0)


def _check_finite(session: Session, result: UpdateResult, *, epoch: int, position: int) -> None:
    """Raise a NonFiniteError where the update would spoil the weights.

    An fp16 gradient that overflows is left to the gradient scaler, which skips the update and halves its scale; a scale below
    1 means that the gradient is not finite by itself.
    """
    scaler = session.accelerator.scaler
    gradient_is_fine = math.isfinite(result.grad_norm) or (scaler is not None and scaler.get_scale() >= 1)
    if math.isfinite(result.loss) and gradient_is_fine:
        return
    temperatures = {
        name.removesuffix(".temperature"): [round(value, 4) for value in parameter.detach().float().tolist()]
        for name, parameter in session.bare_model.named_parameters()
        if name.endswith("temperature")
    }
    raise NonFiniteError(
        f"loss {result.loss} at update {position + 1} (epoch {epoch + 1}): gradient norm {result.grad_norm}, learning rate "
        f"{current_learning_rate(session.optimizer):g}, temperatures {temperatures}; the update was not "
        "applied and every checkpoint is older; the same settings would end the same way: continue for example with --resume "
        "auto --train.mixed_precision no --allow_change '[train.mixed_precision]', or with a lower optim.lr likewise"
    )


def _write_status(loop: Loop, state: str, message: str) -> None:
    """Let the main process say how the run stands, unless another one already said that it failed."""
    if loop.session.accelerator.is_main_process and loop.run.read_status().get("state") != "failed":
        loop.run.write_status(state, update=loop.progress.update, epoch=loop.progress.epoch, message=message)


def _record_failure(run: RunFolder, progress: Progress, error: BaseException, *, rank: int) -> None:
    """Let the process that failed first say why the run ended; the others only lost the connection to it.

    Where status.json cannot be read or written, as on a full disk, the error itself is what is to be reported.
    """
    with suppress(OSError, ValueError):
        if run.read_status().get("state") != "failed":
            message = f"process {rank}: {type(error).__name__}: {one_line(error)}"
            run.write_status("failed", update=progress.update, epoch=progress.epoch, message=message)
