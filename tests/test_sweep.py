"""Grids of trainings: resumed, never run twice, refused early, stopped and continued; and how their results are summarised."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from taylorvit.config_loading import load_config
from taylorvit.run_folder import RunFolder
from taylorvit.studies import sweep, trainings
from taylorvit.studies.results import best_row, mean_and_spread, summarise, write_results
from taylorvit.studies.sweep import Cell, plan_cells, run_cells
from taylorvit.studies.trainings import StudyStopped, environment

CONFIG = ROOT / "configs" / "digits_pixels.yaml"
# A stand-in for train.py: notes its call, and ends as the seed says, 0 finished, else with that exit code.
STAND_IN = """
import json, pathlib, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv if "=" in word)
run, code = pathlib.Path(given["--run_dir"]), int(given["--seed"])
with open(run / "calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if code == 2:
    print("error: what it refused")
print("said by the training")


def leave(*_):
    time.sleep(0.3)
    (run / "saved").touch()
    sys.exit(143)


if code == 99:
    signal.signal(signal.SIGTERM, leave)
    (run / "ready").touch()
    time.sleep(30)
if code == 3:
    time.sleep(0.5)
states = {61: ("failed", "process 0: NonFiniteError: loss nan"), 62: ("preempted", "SIGTERM"), 77: ("preempted", "STOP")}
state, message = states.get(code, ("finished" if code < 2 else "failed", ""))
if code not in (2, 3, 5, 130, 143):
    (run / "status.json").write_text(json.dumps({"state": state, "message": message}))
sys.exit({0: 0, 1: 0, 77: 0, 61: 1, 62: 1}.get(code, code))
"""


def cell(seed: int, *arguments: str) -> Cell:
    return Cell({"seed": seed}, (f"--seed={seed}", *arguments))


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A launcher that runs the stand-in, whose checkpoints nobody judges."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def judge(plan: sweep.Plan, *, diverged: bool, seconds: float) -> dict[str, Any]:
        status = "diverged" if diverged else "ok"
        config = sweep.config_to_dict(plan.config)
        return {**plan.cell.labels, "status": status, "val_top1": 50.0, "test_top1": None, "config": config}

    monkeypatch.setattr(sweep, "judge", judge)
    monkeypatch.setattr(sweep, "check_data", lambda config: None)
    return [sys.executable, str(script)]


def calls(out: Path, name: str) -> list[str]:
    file = out / "runs" / name / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_a_cell_is_trained_and_judged_on_both_splits_and_never_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    small = ("--schedule.epochs=2", "--model.depth=1", "--train.global_batch_size=256", f"--data.root={tmp_path / 'digits'}")
    cells = [Cell({"seed": 3}, ("--seed=3", "--schedule.warmup_epochs=1", "--device=cpu", *small))]
    (row,) = run_cells(cells, configs=[CONFIG], out=out)
    assert row["status"] == "ok"
    assert row["seed"] == 3
    logged = [record for record in RunFolder(out / "runs" / "seed-3").read_metrics() if record["kind"] == "evaluate"]
    assert row["val_top1"] == logged[-1]["top1"]
    assert row["val_loss"] == logged[-1]["loss"]
    assert logged[-1]["samples"] == 140
    assert row["test_top1"] == pytest.approx(100 * round(row["test_top1"] * 355 / 100) / 355)  # of the 355 test images
    assert row["test_loss"] != row["val_loss"]
    assert [len(layer) for layer in row["temperatures"]] == [4]
    assert row["form"] == "direct"
    assert row["parameters"] > 0
    log = out / "runs" / "seed-3" / "train.log"
    before = log.read_bytes()
    assert run_cells(cells, configs=[CONFIG], out=out) == [row]
    assert log.read_bytes() == before
    assert "1 of 1 cells are finished already" in capsys.readouterr().out


def test_a_result_is_of_the_checkpoint_that_validation_chose(tmp_path: Path) -> None:
    """The averaged weights where those rank the checkpoints, and not the newest ones."""
    small = ("--schedule.epochs=3", "--model.depth=1", "--train.global_batch_size=256", f"--data.root={tmp_path / 'digits'}")
    ema = ("--train.ema_decay=0.5", "--checkpoint.metric=ema_top1", "--evaluate.every_epochs=1", "--checkpoint.every_epochs=1")
    arguments = ("--schedule.warmup_epochs=0", "--optim.lr=0.05", "--device=cpu", *small, *ema)
    (row,) = run_cells([Cell({"seed": 0}, arguments)], configs=[CONFIG], out=tmp_path / "study")
    logged = [record for record in RunFolder(tmp_path / "study" / "runs" / "seed-0").read_metrics() if "ema_top1" in record]
    best = max(record["ema_top1"] for record in logged)
    assert row["val_top1"] == best
    assert row["val_loss"] in [record["ema_loss"] for record in logged if record["ema_top1"] == best]


def test_every_training_gets_its_settings_and_its_folder(tmp_path: Path, launcher: list[str]) -> None:
    rows = run_cells([cell(0), cell(1, "--model.num_heads=8")], configs=[CONFIG], out=tmp_path, launcher=launcher, jobs=2)
    assert [row["seed"] for row in rows] == [0, 1]
    (call,) = calls(tmp_path, "seed-1")
    assert call.split()[0] == str(ROOT / "train.py")
    expected = f"--config {CONFIG} --seed=1 --model.num_heads=8 --run_dir={tmp_path / 'runs' / 'seed-1'} --resume=auto"
    assert call.endswith(expected)


def test_a_loss_that_is_not_finite_is_a_result(tmp_path: Path, launcher: list[str]) -> None:
    (row,) = run_cells([cell(5)], configs=[CONFIG], out=tmp_path, launcher=launcher)
    assert row["status"] == "diverged"


def test_a_training_that_fails_ends_the_study_with_what_it_said(tmp_path: Path, launcher: list[str]) -> None:
    with pytest.raises(
        RuntimeError, match=r"stand_in.py .*--seed=3 .* ended with code 3: said by the training \(all of it: .*log"
    ):
        run_cells([cell(3), cell(0)], configs=[CONFIG], out=tmp_path, launcher=launcher)
    assert not list((tmp_path / "cells").iterdir())


def test_settings_that_the_training_refuses_are_one_line(tmp_path: Path, launcher: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--seed=2 .*: error: what it refused$"):
        run_cells([cell(2)], configs=[CONFIG], out=tmp_path, launcher=launcher)


def test_how_a_training_ended_does_not_depend_on_the_launcher_s_code(tmp_path: Path, launcher: list[str]) -> None:
    """`accelerate launch` ends with 1 whatever its training ended with; status.json knows better."""
    (row,) = run_cells([cell(61)], configs=[CONFIG], out=tmp_path / "a", launcher=launcher)
    assert row["status"] == "diverged"
    with pytest.raises(StudyStopped):
        run_cells([cell(62)], configs=[CONFIG], out=tmp_path / "b", launcher=launcher)


def test_a_failed_cell_lets_the_others_save(tmp_path: Path, launcher: list[str]) -> None:
    with pytest.raises(RuntimeError, match="--seed=3"):
        run_cells([cell(99), cell(3)], configs=[CONFIG], out=tmp_path, launcher=launcher, jobs=2)
    assert (tmp_path / "runs" / "seed-99" / "saved").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--data.test_split=nonsense", "has no folder 'nonsense'"),
        ("--model.num_classes=11", "model.num_classes is 11, but the data has 10 classes"),
        ("--model.max_length=63", "model.max_length is 63, but the data needs 64"),
        ("--augment.hflip=0.5", "augment.hflip is 0.5, but sequences are not augmented"),
        ("--data.test_split=train[80%:]", "data.train_split 'train.:90%.' and data.test_split 'train.80%:.' share samples"),
        ("--data.val_split=val", "data.val_split 'val' and data.test_split 'val' share samples"),
    ],
)
def test_data_that_a_cell_will_need_is_opened_first(setting: str, message: str, tmp_path: Path) -> None:
    settings = (setting, f"--data.root={tmp_path / 'digits'}")
    with pytest.raises(ValueError, match=message):
        run_cells([cell(0, *settings)], configs=[CONFIG], out=tmp_path / "out", launcher=["false"])


@pytest.mark.parametrize(("seed", "code"), [(130, 130), (143, 143), (77, 143)])
def test_a_training_that_was_stopped_stops_the_study(seed: int, code: int, tmp_path: Path, launcher: list[str]) -> None:
    with pytest.raises(StudyStopped) as stopped:
        run_cells([cell(seed), cell(0)], configs=[CONFIG], out=tmp_path, launcher=launcher)
    assert stopped.value.code == code
    assert calls(tmp_path, "seed-0") == []
    assert not list((tmp_path / "cells").iterdir())


def test_a_signal_reaches_the_trainings_and_the_same_call_continues(tmp_path: Path, launcher: list[str]) -> None:
    def send() -> None:
        ready = tmp_path / "runs" / "seed-99" / "ready"
        while not ready.exists():
            pause.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    pause, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(StudyStopped) as stopped:
        run_cells([cell(0), cell(99), cell(1)], configs=[CONFIG], out=tmp_path, launcher=launcher)
    sender.join()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(calls(tmp_path, "seed-0")) == 1
    assert calls(tmp_path, "seed-1") == []
    run_cells([cell(0), cell(1)], configs=[CONFIG], out=tmp_path, launcher=launcher)
    assert [len(calls(tmp_path, f"seed-{seed}")) for seed in (0, 1)] == [1, 1]


def test_a_result_of_other_settings_is_refused_before_anything_runs(tmp_path: Path, launcher: list[str]) -> None:
    run_cells([cell(0)], configs=[CONFIG], out=tmp_path, launcher=launcher)
    with pytest.raises(ValueError, match=r"seed-0.json was made with other settings: model.depth 2 -> 3; choose another --out"):
        run_cells([cell(1), cell(0, "--model.depth=3")], configs=[CONFIG], out=tmp_path, launcher=launcher)
    assert calls(tmp_path, "seed-1") == []
    run_cells([cell(0, "--data.num_workers=1", "--log.every_updates=7")], configs=[CONFIG], out=tmp_path, launcher=launcher)
    for setting in ("data.test_split=train", "schedule.stop_epoch=3", "evaluate.every_epochs=9"):
        with pytest.raises(ValueError, match=f"made with other settings: {setting.partition('=')[0]}"):
            run_cells([cell(0, f"--{setting}")], configs=[CONFIG], out=tmp_path, launcher=launcher)
    (tmp_path / "cells" / "seed-0.json").write_text("{}")
    with pytest.raises(ValueError, match="seed-0.json: it is not a cell's result"):
        run_cells([cell(0)], configs=[CONFIG], out=tmp_path, launcher=launcher)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "there is nothing to train: the grid is empty"),
        ([cell(0), cell(0)], "the grid holds seed-0 twice"),
        ([cell(0), cell(1, "--model.num_heads=7")], r"num_heads must divide the width 64: one of \[1, 2, .*\], got 7"),
        ([cell(0), cell(1, "--train.mixed_precision=bf16")], "train.mixed_precision: all cells of a study must have one"),
        ([cell(0, "--model.num_head=7")], "unknown key 'model.num_head'; did you mean 'model.num_heads'"),
    ],
)
def test_bad_grids_are_refused_before_anything_runs(
    cells: list[Cell], message: str, tmp_path: Path, launcher: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        run_cells(cells, configs=[CONFIG], out=tmp_path / "out", launcher=launcher)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        plan_cells([cell(0)], configs=[CONFIG], out=tmp_path / "file")
    with pytest.raises(ValueError, match=r"no.yaml: No such file"):
        plan_cells([cell(0)], configs=[tmp_path / "no.yaml"], out=tmp_path / "out")


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it with python and name --launcher"):
        plan_cells([cell(0)], configs=[CONFIG], out=tmp_path)


def test_trainings_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(trainings.torch.cuda, "device_count", lambda: 0)
    assert environment(0, 3)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(trainings.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "6", "4"]
    assert environment(0, 1)["CUDA_VISIBLE_DEVICES"] == "4,6"


def result(seed: int, top1: float | None, **labels: object) -> dict[str, Any]:
    status = "ok" if top1 is not None else "diverged"
    values = {"val_top1": top1, "val_loss": None, "test_top1": None if top1 is None else top1 - 1, "test_loss": None}
    return {"seed": seed, **labels, "status": status, **values}


def test_seeds_become_mean_and_sample_deviation() -> None:
    rows = summarise([result(0, 90.0, lr=1), result(1, 94.0, lr=1), result(0, None, lr=2), result(1, 99.0, lr=2)], ["lr"])
    assert [(row["lr"], row["seeds"], row["diverged"]) for row in rows] == [(1, 2, 0), (2, 2, 1)]
    assert (rows[0]["val_top1"], rows[0]["val_top1_sd"]) == (92.0, pytest.approx(8**0.5))
    assert (rows[1]["test_top1"], rows[1]["test_top1_sd"]) == (98.0, None)
    assert mean_and_spread(rows[0], "val_top1") == "92.00 ± 2.83"
    assert mean_and_spread(rows[1], "val_top1") == "99.00"
    assert mean_and_spread(rows[0], "val_loss") == "-"
    assert best_row(rows) is rows[0]  # a setting with which a seed diverged is no choice
    assert best_row([rows[1]]) is None
    assert best_row([{"val_top1": None, "diverged": 0}]) is None


def test_results_are_three_files(tmp_path: Path) -> None:
    write_results(tmp_path, "study", {"commit": "abc"}, [{"a": 1, "b": float("nan")}, {"a": 2, "c": float("inf")}], "| table |")
    assert json.loads((tmp_path / "study.json").read_text()) == {
        "commit": "abc",
        "rows": [{"a": 1, "b": None}, {"a": 2, "c": None}],
    }
    assert (tmp_path / "study.csv").read_text().splitlines() == ["a,b,c", "1,nan,", "2,,inf"]
    assert (tmp_path / "study.md").read_text() == "| table |\n"


def test_settings_drop_the_options_of_another_attention(tmp_path: Path) -> None:
    import argparse

    from taylorvit.studies.options import settings_of

    file = tmp_path / "config.yaml"
    file.write_text("model: {attention_options: {temperature_init: 5.0}}\n")
    options = argparse.Namespace(config=[file], set=["schedule.epochs=7"])
    varied = ["optim.lr"]
    for attention, kept in (("taylorshift", {"temperature_init": 5.0}), ("softmax", {})):
        config, _ = load_config(["--config", str(file), *settings_of(options, attention, varied=varied)])
        assert (config.model.attention, config.model.attention_options, config.schedule.epochs) == (attention, kept, 7)
    for word, message in (
        ("epochs", "--set epochs: expected KEY=VALUE"),
        ("optim.lr=1", "--set optim.lr=1: this study sets model.attention, seed, run_dir, resume, optim.lr itself"),
        ("model.attention=softmax", "--set model.attention=softmax: this study sets"),
    ):
        options.set = [word]
        with pytest.raises(ValueError, match=message):
            settings_of(options, "softmax", varied=varied)
