"""Whole runs in this process: a run learns, ends as asked, and continues bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers import assert_same_state, count_updates_lost, history, losses, tiny_config

from taylorvit import engine
from taylorvit.checkpoint import list_checkpoints, read_meta
from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten
from taylorvit.engine import NonFiniteError, dry_run, train
from taylorvit.run_folder import RunFolder
from taylorvit.saving import check_same_run
from taylorvit.signals import StopRequest
from taylorvit.weights import load_weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def undisturbed(digit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 18 updates that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(tiny_config(digit_folder, run_dir)) == 0
    return run_dir


def stop_at(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Ask the next run to stop after so many of its updates; updates=0 never asks."""
    count = iter(range(1, 10**6))
    monkeypatch.setattr(StopRequest, "requested", property(lambda _: next(count) == updates))


def resumed(config: Config) -> Config:
    return replace(config, resume="auto")


def last_checkpoint(run_dir: Path) -> Path:
    return list_checkpoints(run_dir / "checkpoints")[-1]


def test_a_run_leaves_what_users_look_for(undisturbed: Path) -> None:
    status = RunFolder(undisturbed).read_status()
    assert (status["state"], status["update"], status["epoch"]) == ("finished", 18, 3)
    assert sorted(losses(undisturbed)) == list(range(1, 19))
    evaluations = [record for record in RunFolder(undisturbed).read_metrics() if record["kind"] == "evaluate"]
    assert [record["epoch"] for record in evaluations] == [1, 2, 3]
    assert all(record["samples"] == 41 for record in evaluations)
    assert {"top1", "top5", "ema_top1", "ema_top5", "train_loss"} <= evaluations[0].keys()
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["world_size"] == 1
    exported = timm.create_model(f"local-dir:{undisturbed / 'export'}", pretrained=True)
    assert exported(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_learning_rate_follows_the_update_number(undisturbed: Path) -> None:
    rates = [record["lr"] for record in RunFolder(undisturbed).read_metrics() if record["kind"] == "train"]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[:6] == sorted(rates[:6])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert max(rates) == pytest.approx(3e-3 * 5 / 6, rel=0.01)  # the last update of the warm-up


@pytest.mark.fault("A16")
@pytest.mark.fault("B5")
@pytest.mark.parametrize("stops", [(4,), (6,), (3, 4, 5)], ids=["mid-epoch", "epoch-end", "three-stops"])
def test_a_stopped_run_continues_bit_for_bit(
    stops: tuple[int, ...], undisturbed: Path, digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", checkpoint__every_updates=None)
    for number, updates in enumerate(stops):
        stop_at(monkeypatch, updates)
        train(config if number == 0 else resumed(config))
        status = RunFolder(tmp_path / "run").read_status()
        assert (status["state"], status["update"]) == ("preempted", sum(stops[: number + 1]))
    stop_at(monkeypatch, 0)
    assert train(resumed(config)) == 0
    assert history(tmp_path / "run") == history(undisturbed)
    assert_same_state(last_checkpoint(tmp_path / "run"), last_checkpoint(undisturbed))


@pytest.mark.fault("A1")
def test_a_crash_costs_only_the_updates_since_the_last_checkpoint(
    undisturbed: Path, digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Counter[str]
) -> None:
    config = tiny_config(digit_folder, tmp_path / "run")
    done = iter(range(1, 10**6))
    original = engine.run_update

    def crashing(*arguments: object, **keywords: object) -> object:
        if next(done) == 10:
            raise MemoryError("made up")
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "run_update", crashing)
    with pytest.raises(MemoryError):
        train(config)
    assert RunFolder(tmp_path / "run").read_status()["state"] == "failed"
    assert read_meta(last_checkpoint(tmp_path / "run"))["progress"]["update"] == 8
    count_updates_lost(tmp_path / "run", figures)
    monkeypatch.setattr(engine, "run_update", original)
    assert train(resumed(config)) == 0
    assert history(tmp_path / "run") == history(undisturbed)
    assert_same_state(last_checkpoint(tmp_path / "run"), last_checkpoint(undisturbed))


def test_going_back_to_an_earlier_step_leaves_the_later_ones_behind(
    undisturbed: Path, digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", schedule__stop_epoch=2, checkpoint__keep_last=2)
    train(config)
    steps = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name[-2:] for path in steps] == ["10", "12"]
    stop_at(monkeypatch, 1)
    train(replace(config, resume=str(steps[0])))
    assert last_checkpoint(tmp_path / "run").name == "step-00000011"
    stop_at(monkeypatch, 0)
    train(resumed(replace(config, schedule=replace(config.schedule, stop_epoch=None))))
    assert history(tmp_path / "run") == history(undisturbed)
    assert_same_state(last_checkpoint(tmp_path / "run"), last_checkpoint(undisturbed))


@pytest.mark.fault("B5")
def test_workers_and_threads_of_the_loader_change_nothing(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", data__num_workers=0, schedule__stop_epoch=1)
    train(config)
    here = losses(tmp_path / "run")
    assert here == {update: loss for update, loss in losses(undisturbed).items() if update <= 6}


@pytest.mark.fault("A16")
def test_stop_epoch_leaves_early_and_can_be_raised(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", schedule__stop_epoch=1)
    assert train(config) == 0
    assert RunFolder(tmp_path / "run").read_status()["epoch"] == 1
    longer = resumed(replace(config, schedule=replace(config.schedule, stop_epoch=None)))
    assert train(longer) == 0
    assert_same_state(last_checkpoint(tmp_path / "run"), last_checkpoint(undisturbed))
    assert train(longer) == 0  # already finished


@pytest.mark.fault("A16")
def test_a_finished_run_is_not_overwritten(undisturbed: Path, digit_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already.*--resume auto"):
        train(tiny_config(digit_folder, undisturbed))
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}


@pytest.mark.fault("B7")
def test_resuming_with_another_recipe_is_refused(undisturbed: Path, digit_folder: Path) -> None:
    config = tiny_config(digit_folder, undisturbed, optim__lr=1e-3, augment__hflip=0.0)
    with pytest.raises(ValueError, match=r"augment.hflip 0.5 -> 0.0; optim.lr 0.003 -> 0.001"):
        train(resumed(config))


@pytest.mark.fault("F1")
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(digit_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        digit_folder,
        tmp_path / "run",
        optim__name="sgd",
        optim__lr=1e30,
        optim__max_grad_norm=None,
        schedule__warmup_epochs=0.0,
    )
    with pytest.raises(NonFiniteError, match=r"loss nan at update \d+ \(epoch 1\): gradient norm .*temperatures"):
        train(config)
    status = RunFolder(tmp_path / "run").read_status()
    assert status["state"] == "failed"
    assert "NonFiniteError" in status["message"]


def test_dry_run_says_what_would_happen_and_writes_nothing(digit_folder: Path, tmp_path: Path) -> None:
    text = "\n".join(dry_run(tiny_config(digit_folder, tmp_path / "run", train__micro_batch_size=8)))
    assert "16 images an update = 1 process(es) x 8 images x 2 accumulation step(s)" in text
    assert "6 an epoch x 3 epochs = 18" in text
    assert "direct x 2" in text
    assert "28,046 parameters, 28,046 trained, 0.001 GFLOP a sample forward" in text
    assert "learning rate 0.003 (as given)" in text
    assert "anew" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("E4")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_heads": 5}, "num_heads must divide the width 32"),
        ({"model__attention_options": {"form": "efficent"}}, "form.*efficent"),
        ({"model__num_classes": 11}, "11"),
        ({"train__global_batch_size": 18}, "train.global_batch_size: 18 cannot be split.*16 could"),
        ({"train__global_batch_size": 9, "train__micro_batch_size": 3}, "train.micro_batch_size is 3"),
        ({"train__global_batch_size": 128}, "only 96 training images"),
        ({"data__root": "/nowhere"}, "/nowhere"),
        ({"optim__name": "lam"}, "optim.name: 'lam' is not one of timm's optimizers; did you mean 'lamb'"),
        ({"train__mixed_precision": "fp16"}, "train.mixed_precision: 'fp16' needs a GPU"),
        ({"train__finetune": "/nowhere"}, "/nowhere"),
        ({"resume": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_settings_are_one_error_and_lose_nothing(
    changes: dict[str, object], message: str, digit_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tiny_config(digit_folder, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not RunFolder(tmp_path / "run").holds_run()  # a corrected start is not refused


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(digit_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(digit_folder, tmp_path)
    older = {key: value for key, value in flatten(config_to_dict(config)).items() if key != "optim.temperature_lr_scale"}
    check_same_run(older, config)
    changed = replace(config, optim=replace(config.optim, temperature_lr_scale=10.0))
    with pytest.raises(ValueError, match="optim.temperature_lr_scale 1.0 -> 10.0; change them in a new run_dir"):
        check_same_run(older, changed)


@pytest.mark.fault("B7")
def test_settings_named_in_allow_change_may_differ(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    changed = tiny_config(digit_folder, tmp_path / "run", optim__lr=1e-3, train__mixed_precision="bf16", resume="auto")
    with pytest.raises(ValueError, match=r"--allow_change '\[optim.lr, train.mixed_precision\]'"):
        train(changed)
    with pytest.raises(ValueError, match="'optim.lrr' cannot change within a run; did you mean 'optim.lr'"):
        train(replace(changed, allow_change=["optim.lrr"]))
    assert train(replace(changed, allow_change=["optim.lr", "train.mixed_precision"])) == 0


def test_an_allowed_change_takes_effect_at_once(
    undisturbed: Path, digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    seen: list[float] = []
    original = engine.run_update

    def watched(loop: engine.Loop, *arguments: object, **keywords: object) -> object:
        seen.append(max(group["weight_decay"] for group in loop.session.optimizer.param_groups))
        return original(loop, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "run_update", watched)
    step = tmp_path / "run" / "checkpoints" / "step-00000014"
    config = tiny_config(digit_folder, tmp_path / "run", optim__lr=3e-5, optim__weight_decay=0.7, resume=str(step))
    train(replace(config, allow_change=["optim.lr", "optim.weight_decay"]))
    assert seen == [0.7] * 4
    records = [record for record in RunFolder(tmp_path / "run").read_metrics() if record["kind"] == "train"]
    assert all(record["lr"] < 3.1e-5 for record in records if record["update"] > 14)


@pytest.mark.fault("B7")
def test_what_defines_positions_cannot_be_changed(undisturbed: Path, digit_folder: Path) -> None:
    config = tiny_config(digit_folder, undisturbed, train__global_batch_size=8, resume="auto")
    with pytest.raises(ValueError, match="train.global_batch_size 16 -> 8; change them in a new run_dir$"):
        train(config)
    with pytest.raises(ValueError, match="'train.global_batch_size' cannot change within a run"):
        train(replace(config, allow_change=["train.global_batch_size"]))


def test_a_failed_start_does_not_leave_an_old_status(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    """A batch system that queues preempted runs again must not do so with one that cannot start."""
    shutil.copytree(undisturbed, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.write_status("preempted", update=18, epoch=3)
    with pytest.raises(ValueError, match="/nowhere"):
        train(tiny_config(digit_folder, tmp_path / "run", data__root="/nowhere", resume="auto"))
    assert run.read_status()["state"] == "failed"
    assert "/nowhere" in run.read_status()["message"]


@pytest.mark.fault("B7")
def test_other_images_are_noticed_on_resume(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.copytree(digit_folder, tmp_path / "data")
    image = min((tmp_path / "data" / "train").rglob("*.png"))
    image.rename(image.with_name("renamed.png"))
    with pytest.raises(ValueError, match="the train images at .* are not those"):
        train(tiny_config(tmp_path / "data", tmp_path / "run", resume="auto"))


def test_the_best_epoch_is_kept_whenever_it_comes(digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(engine, "evaluate_epoch", lambda *_: {"top1": next(scores)})
    config = tiny_config(
        digit_folder, tmp_path / "run", checkpoint__every_epochs=3, checkpoint__every_updates=None, data__num_workers=0
    )
    train(config)
    kept = [read_meta(path)["metrics"].get("top1") for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [10.0, 30.0, 20.0]
    assert load_weights(tmp_path / "run", step="best")[1].step == 12


@pytest.mark.fault("A1")
def test_a_kill_during_an_evaluation_costs_no_update(
    undisturbed: Path, digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Counter[str]
) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", checkpoint__every_updates=None)
    original = engine.evaluate_epoch

    def killed(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "evaluate_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert read_meta(last_checkpoint(tmp_path / "run"))["progress"]["update"] == 6
    count_updates_lost(tmp_path / "run", figures)
    monkeypatch.setattr(engine, "evaluate_epoch", original)
    assert train(resumed(config)) == 0
    assert history(tmp_path / "run") == history(undisturbed)


def test_fine_tuning_at_another_size_and_class_count(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    lines = dry_run(
        tiny_config(
            digit_folder, tmp_path / "run", model__img_size=24, train__finetune=str(undisturbed), train__freeze="backbone"
        )
    )
    text = "\n".join(lines)
    assert "position embedding" in text
    assert " 330 trained" in text  # 10 classes x (32 + 1)


def test_accumulation_changes_no_image_and_only_rounds_the_loss(digit_folder: Path, tmp_path: Path) -> None:
    for micro in (4, 16):
        config = tiny_config(
            digit_folder,
            tmp_path / f"{micro}",
            model__drop_path_rate=0.0,
            data__num_workers=0,
            schedule__stop_epoch=1,
            train__micro_batch_size=micro,
        )
        train(config)
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "16"), rel=1e-5)


@pytest.mark.parametrize("changes", [{"train__grad_checkpointing": True}, {"train__channels_last": True}], ids=str)
def test_what_saves_memory_does_not_change_the_loss(
    changes: dict[str, object], undisturbed: Path, digit_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", data__num_workers=0, schedule__stop_epoch=1, **changes)
    assert train(config) == 0
    expected = losses(undisturbed)
    assert losses(tmp_path / "run") == pytest.approx({update: expected[update] for update in range(1, 7)}, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__mixed_precision": "bf16"},
        {"train__loss": "bce"},
        {"model__attention": "softmax"},
        {"model__attention_options": {"form": "efficient"}},
        {"optim__layer_decay": 0.75, "optim__name": "adamw"},
        pytest.param({"train__compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_way_to_train_leaves_a_usable_export(changes: dict[str, object], digit_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        digit_folder, tmp_path / "run", data__num_workers=0, schedule__epochs=1, schedule__warmup_epochs=0.5, **changes
    )
    assert train(config) == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())
    exported = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert exported(torch.zeros(1, 3, 16, 16)).isfinite().all()


@pytest.mark.fault("A15")
@pytest.mark.fault("B2")
@pytest.mark.fault("B11")
def test_a_full_disk_is_announced_and_neither_the_clock_nor_tensorboard_changes_a_run(
    undisturbed: Path, digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run with a clock that goes back an hour a call, a file in place of TensorBoard's folder, and 1,000 bytes free."""
    times = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    monkeypatch.setattr("taylorvit.saving.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    config = tiny_config(digit_folder, tmp_path / "run", log__tensorboard=True, data__num_workers=0)
    assert train(config) == 0
    output = capsys.readouterr().out
    assert "two checkpoints take about" in output
    assert "has 1,000 free: make room" in output
    assert output.count("warning: TensorBoard or its pictures end here") == 1
    records = RunFolder(tmp_path / "run").read_metrics()
    assert all(record["images_per_second"] > 0 for record in records if record["kind"] == "train")
    assert history(tmp_path / "run") == history(undisturbed)
    assert_same_state(last_checkpoint(tmp_path / "run"), last_checkpoint(undisturbed))
