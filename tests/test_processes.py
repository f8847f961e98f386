"""The programs as users start them: on two processes, killed at bad moments, resumed, evaluated."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, as_arguments, assert_same_state, finish, history, launch, losses, tiny_config

from taylorvit.checkpoint import list_checkpoints
from taylorvit.config import Config
from taylorvit.data import build_dataset
from taylorvit.engine import train
from taylorvit.randomness import numpy_generator
from taylorvit.run_folder import RunFolder


def start(config: Config, *extra: str, processes: int = 1) -> subprocess.Popen[str]:
    return launch("train.py", [*as_arguments(config), *extra], processes=processes)


def world_size(run_dir: Path) -> int:
    """Return how many processes really trained there."""
    return json.loads((run_dir / "environment.json").read_text())["world_size"]


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool], *, timeout: float = 90) -> None:
    """SIGKILL every process of the launch as soon as the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to kill never came"
    launcher = psutil.Process(process.pid)
    for victim in [launcher, *launcher.children(recursive=True)]:  # torchrun gives its processes sessions of their own
        victim.kill()
    process.communicate()


@pytest.fixture(scope="module")
def two_process_run(digit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 18 updates on two processes."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    finish(start(tiny_config(digit_folder, run_dir), processes=2))
    assert world_size(run_dir) == 2
    return run_dir


def test_killed_in_an_epoch_and_in_a_checkpoint_two_processes_continue_bit_for_bit(
    two_process_run: Path, digit_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir)
    kill_when(start(config, processes=2), lambda: run_dir.exists() and max(losses(run_dir), default=0) >= 3)
    before = list_checkpoints(run_dir / "checkpoints")

    def is_saving() -> bool:
        newer = len(list_checkpoints(run_dir / "checkpoints")) > len(before)
        return newer and any((run_dir / "checkpoints").glob(".tmp-step-*"))

    kill_when(start(config, "--resume=auto", "--checkpoint.every_updates=1", processes=2), is_saving)
    output = finish(start(config, "--resume=auto", processes=2))
    assert "resumed" in output
    assert world_size(run_dir) == 2
    assert history(run_dir) == history(two_process_run)
    assert_same_state(list_checkpoints(run_dir / "checkpoints")[-1], list_checkpoints(two_process_run / "checkpoints")[-1])


@pytest.mark.usefixtures("fresh_accelerate")
def test_one_and_two_processes_train_on_the_same_images_at_the_same_rates(digit_folder: Path, tmp_path: Path) -> None:
    """Equal up to rounding: the same order, augmentation, mixing, learning rates, and evaluation of every image once."""
    one, two = (
        tiny_config(digit_folder, tmp_path / name, model__drop_path_rate=0.0, schedule__epochs=1, schedule__warmup_epochs=0.5)
        for name in ("one", "two")
    )
    train(one)
    finish(start(two, processes=2))
    assert (world_size(tmp_path / "one"), world_size(tmp_path / "two")) == (1, 2)
    first, second = (RunFolder(tmp_path / name).read_metrics() for name in ("one", "two"))
    for left, right in zip(first, second, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        for key in ("lr", "update", "epoch", "samples"):
            assert left.get(key) == right.get(key)


def test_the_process_that_failed_says_why_the_run_ended(digit_folder: Path, tmp_path: Path) -> None:
    """A broken image that only the second process meets; the first one merely loses the connection."""
    shutil.copytree(digit_folder, tmp_path / "data")
    config = tiny_config(tmp_path / "data", tmp_path / "run")
    order = numpy_generator("order", config.seed, 0).permutation(96)
    image = build_dataset(config.data, "train", in_chans=3).sample_name(int(order[4]))  # rank 1 takes positions 4 to 7
    Path(image).write_bytes(b"no image")
    output = finish(start(config, processes=2), code=1)
    errors = [line for line in output.splitlines() if line.startswith("error (process 1)")]
    assert len(errors) == 1
    assert f"cannot read image {image}: cannot identify image file" in errors[0]
    assert image in RunFolder(tmp_path / "run").read_status()["message"]


def test_sigterm_to_one_process_saves_and_ends_both(digit_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=200)
    process = start(config, processes=2)
    while max(losses(run_dir), default=0) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    psutil.Process(process.pid).children()[-1].terminate()
    process.communicate(timeout=60)
    status = RunFolder(run_dir).read_status()
    assert world_size(run_dir) == 2
    assert status["state"] == "preempted"
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{status['update']:08d}"


def test_a_second_start_is_refused_and_ctrl_c_saves_and_leaves_with_the_shell_s_code(
    digit_folder: Path, tmp_path: Path
) -> None:
    """The signal reaches the loader's workers too, as it does in a terminal."""
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=2000)
    process = start(config)
    while max(losses(run_dir), default=0) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    assert "is in use by process" in finish(start(config, "--resume=auto", processes=2), code=1)
    assert RunFolder(run_dir).read_status()["state"] == "running"
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, code=128 + signal.SIGINT, timeout=60)
    assert "stopped by SIGINT after update" in output
    assert RunFolder(run_dir).read_status()["state"] == "preempted"


def test_evaluation_on_two_processes_gives_the_figure_that_training_logged(two_process_run: Path, tmp_path: Path) -> None:
    """41 images over two processes and batches of 16: no share and no last batch is even."""
    logged = [record for record in RunFolder(two_process_run).read_metrics() if record["kind"] == "evaluate"][-1]
    for processes in (1, 2):
        file = tmp_path / f"{processes}.json"
        arguments = [str(two_process_run), "--step=newest", "--weights=both", f"--json={file}"]
        finish(launch("eval.py", arguments, processes=processes))
        raw, averaged = json.loads(file.read_text())
        assert (raw["images"], averaged["images"]) == (41, 41)
        assert raw["world_size"] == processes
        assert (raw["top1"], raw["top5"]) == (logged["top1"], logged["top5"])
        assert (averaged["top1"], averaged["top5"]) == (logged["ema_top1"], logged["ema_top5"])


def test_a_wrong_setting_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    output = finish(launch("train.py", ["--optim.lerning_rate", "1", "--run_dir", str(tmp_path / "run")]), code=2)
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "optim.lerning_rate" in errors[0]
    assert "Traceback" not in output


def quick_start(folder: Path, *extra: str, processes: int) -> dict[str, object]:
    """Run the quick start's configuration and return the last evaluation."""
    arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--device=cpu"]
    folders = [f"--run_dir={folder / 'run'}", f"--data.root={folder / 'digits'}"]
    finish(launch("train.py", [*arguments, *folders, *extra], processes=processes), timeout=900)
    assert world_size(folder / "run") == processes
    return [record for record in RunFolder(folder / "run").read_metrics() if record["kind"] == "evaluate"][-1]


def test_the_quick_start_runs_on_two_processes(tmp_path: Path) -> None:
    last = quick_start(tmp_path, "--schedule.epochs=4", processes=2)
    assert last["samples"] == 355
    assert last["top1"] > 30  # three times chance after a tenth of its epochs


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_quick_start_reaches_95_per_cent(processes: int, tmp_path: Path) -> None:
    assert quick_start(tmp_path, processes=processes)["top1"] >= 95


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills_at_random_moments_end_where_an_undisturbed_run_ends(
    processes: int, digit_folder: Path, tmp_path: Path
) -> None:
    chance = random.Random(processes)
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    changes = {"schedule__epochs": 40, "checkpoint__every_updates": 1, "checkpoint__keep_last": 3}
    finish(start(tiny_config(digit_folder, undisturbed, **changes), processes=processes))
    kills: list[int] = []

    def is_due(target: int, deadline: float) -> bool:
        return max(losses(run_dir), default=0) >= target and time.monotonic() >= deadline

    while len(kills) < 10:
        process = start(tiny_config(digit_folder, run_dir, **changes), "--resume=auto", processes=processes)
        target = max(losses(run_dir), default=0) + chance.randint(1, 8)
        kill_when(process, functools.partial(is_due, target, time.monotonic() + chance.uniform(0.0, 8.0)))
        kills.append(max(losses(run_dir)))
    finish(start(tiny_config(digit_folder, run_dir, **changes), "--resume=auto", processes=processes))
    print(f"{processes} process(es), killed after updates {kills}")
    assert world_size(run_dir) == processes
    assert history(run_dir) == history(undisturbed)
    assert_same_state(list_checkpoints(run_dir / "checkpoints")[-1], list_checkpoints(undisturbed / "checkpoints")[-1])
