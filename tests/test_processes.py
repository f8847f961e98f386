"""The programs as users start them: on two processes, killed at bad moments, resumed, evaluated."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import (
    ROOT,
    as_arguments,
    assert_same_state,
    count_updates_lost,
    finish,
    history,
    launch,
    losses,
    tiny_config,
)

from taylorvit.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
from taylorvit.config import Config
from taylorvit.data import build_dataset
from taylorvit.engine import train
from taylorvit.randomness import numpy_generator
from taylorvit.run_folder import RunFolder
from taylorvit.studies.fault_runs import parts, seconds_until_gone

SLACK_SECONDS = 10  # of a busy machine, where the end of an interpreter with PyTorch in it takes that long, and unloaded one


def start(config: Config, *extra: str, processes: int = 1) -> subprocess.Popen[str]:
    return launch("train.py", [*as_arguments(config), *extra], processes=processes)


def world_size(run_dir: Path) -> int:
    """Return how many processes really trained there."""
    return json.loads((run_dir / "environment.json").read_text())["world_size"]


# train.py with a fault in it: how, in which process, before which of this start's updates.
FAULTY = """
import os, signal, sys, time
how, rank, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[1:4] = []
from taylorvit import checkpoint, engine, cli
import train
run_update, write_tensors, count = engine.run_update, checkpoint._write_tensors, [0]
def fail(how):
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise": raise RuntimeError("made up")
    if how.startswith("exit"): sys.exit(int(how[4:]))
    if how == "hang": time.sleep(1000)
def faulty(*arguments, **keywords):
    count[0] += 1
    if count[0] == at and os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        fail(how)
    return run_update(*arguments, **keywords)
def faulty_write(path, tensors):
    if how == "full": raise OSError(28, "No space left on device", str(path))
    if how.startswith("slow"): print("saving", flush=True); time.sleep(float(how[4:]))
    write_tensors(path, tensors)
engine.run_update, checkpoint._write_tensors = faulty, faulty_write
cli.run_program(train.main)
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """The program FAULTY."""
    program = tmp_path / "faulty.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{FAULTY}")
    return program


def start_faulty(program: Path, fault: str, config: Config, *extra: str, **options: Any) -> subprocess.Popen[str]:
    """Start it on two processes; the fault is in the second one, at its fourth update."""
    return launch(str(program), [fault, "1", "4", *as_arguments(config), *extra], **({"processes": 2} | options))


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], *, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


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


@pytest.mark.fault("A1")
@pytest.mark.fault("A2")
def test_killed_in_an_epoch_and_in_a_checkpoint_two_processes_continue_bit_for_bit(
    two_process_run: Path, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir)
    kill_when(start(config, processes=2), lambda: run_dir.exists() and max(losses(run_dir), default=0) >= 3)
    count_updates_lost(run_dir, figures)
    before = list_checkpoints(run_dir / "checkpoints")

    def is_saving() -> bool:
        newer = len(list_checkpoints(run_dir / "checkpoints")) > len(before)
        return newer and any((run_dir / "checkpoints").glob(".tmp-step-*"))

    kill_when(start(config, "--resume=auto", "--checkpoint.every_updates=1", processes=2), is_saving)
    count_updates_lost(run_dir, figures)
    figures["faults injected"] = 2
    output = finish(start(config, "--resume=auto", processes=2))
    assert "resumed" in output
    assert world_size(run_dir) == 2
    assert history(run_dir) == history(two_process_run)
    assert_same_state(list_checkpoints(run_dir / "checkpoints")[-1], list_checkpoints(two_process_run / "checkpoints")[-1])


@pytest.mark.fault("B6")
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


@pytest.mark.fault("A4")
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


@pytest.mark.fault("A8")
@pytest.mark.fault("A14")
def test_a_second_start_is_refused_and_ctrl_c_saves_and_leaves_with_the_shell_s_code(
    digit_folder: Path, tmp_path: Path, figures: Counter[str]
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
    count_updates_lost(run_dir, figures)
    figures["messages given"] += 2
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


@pytest.mark.fault("A1")
@pytest.mark.fault("A16")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills_at_random_moments_end_where_an_undisturbed_run_ends(
    processes: int, digit_folder: Path, tmp_path: Path, figures: Counter[str]
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
        count_updates_lost(run_dir, figures)
    figures["faults injected"] = len(kills)
    finish(start(tiny_config(digit_folder, run_dir, **changes), "--resume=auto", processes=processes))
    print(f"{processes} process(es), killed after updates {kills}")
    assert world_size(run_dir) == processes
    assert history(run_dir) == history(undisturbed)
    assert_same_state(list_checkpoints(run_dir / "checkpoints")[-1], list_checkpoints(undisturbed / "checkpoints")[-1])


ALL_SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}


@pytest.mark.fault("A4")
@pytest.mark.fault("A5")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "target"),
    [
        (launcher, number, target)
        for launcher in ("torchrun", "accelerate")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        for target in ("launcher", "ranks", "all")
    ],
)
def test_a_signal_to_any_part_saves_and_leaves_nobody_behind(
    launcher: str, number: signal.Signals, target: str, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    """`ranks` is one of them; `all` has the loader workers too."""
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=200)
    process = launch("train.py", as_arguments(config), processes=2, launcher=launcher, environment=ALL_SIGNALS)
    wait_for(process, lambda: max(losses(run_dir), default=0) >= 2)
    tree = parts(process, processes=2)
    assert len(tree["workers"]) >= 4
    for victim in tree[target][:1] if target == "ranks" else tree[target]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
    assert seconds_until_gone(tree["all"], limit=60) is not None
    process.communicate()
    status, trained = RunFolder(run_dir).read_status(), max(losses(run_dir))
    assert (status["state"], world_size(run_dir)) == ("preempted", 2)
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{status['update']:08d}"
    assert status["update"] == trained
    figures["updates lost, most"] = trained - status["update"]


@pytest.mark.fault("A5")
@pytest.mark.slow
def test_without_the_variable_a_launcher_that_dies_of_a_signal_leaves_no_orphan(digit_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=2000)
    process = start(config, processes=2)
    wait_for(process, lambda: max(losses(run_dir), default=0) >= 2)
    tree = parts(process, processes=2)
    tree["launcher"][0].send_signal(signal.SIGUSR1)
    assert seconds_until_gone(tree["all"], limit=60) is not None
    status = RunFolder(run_dir).read_status()
    assert (status["state"], status["message"]) == ("preempted", "the end of its launcher")


@pytest.mark.fault("A10")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise", "exit3", "exit0"])
def test_when_one_process_ends_the_others_name_it_and_end_too(
    how: str, faulty: Path, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    process = start_faulty(faulty, how, tiny_config(digit_folder, tmp_path / "run"))
    wait_for(process, lambda: max(losses(tmp_path / "run"), default=0) >= 3)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert seconds < 30, "15 s, and as much again on a busy machine"
    assert process.returncode == 1
    (line,) = error_lines(output)
    assert line.startswith("error: lost process 1 (update 4")
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["state"], status["update"]) == ("failed", 3)
    assert "process 1" in status["message"]
    figures["seconds until gone, most"] = round(seconds)
    figures["messages given"] += 1


@pytest.mark.fault("A11")
@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_after_the_timeout(
    faulty: Path, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    """torchrun gives those left 30 s after the first has left, whatever TORCH_ELASTIC_SHUTDOWN_TIMEOUT says."""
    config = tiny_config(digit_folder, tmp_path / "run", timeout_seconds=20)
    process = start_faulty(faulty, "hang", config)
    wait_for(process, lambda: max(losses(tmp_path / "run"), default=0) >= 3)
    tree, started, gone = parts(process, processes=2), time.monotonic(), list[float]()
    psutil.wait_procs(tree["ranks"], timeout=90, callback=lambda _: gone.append(time.monotonic() - started))
    output, _ = process.communicate(timeout=30)
    assert len(gone) == 2
    assert gone[0] < 20 + 10 + SLACK_SECONDS
    assert gone[1] - gone[0] < 30 + SLACK_SECONDS
    assert seconds_until_gone(tree["all"], limit=SLACK_SECONDS) is not None
    (line,) = error_lines(output)
    assert line.startswith("error: lost process 1 (update 4); process 0 waited in update 4, computing: Timed out")
    figures["seconds beyond the timeout, most"] = round(gone[0] - 20)
    figures["messages given"] += 1


@pytest.mark.fault("A13")
@pytest.mark.fault("B1")
@pytest.mark.slow
def test_a_save_that_fails_ends_every_process_with_one_line(
    faulty: Path, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    process = start_faulty(faulty, "full", tiny_config(digit_folder, tmp_path / "run"))
    output = finish(process, code=1)
    (line,) = error_lines(output)
    figures["messages given"] += 1
    assert "cannot write the checkpoint" in line
    assert "No space left on device" in line
    assert RunFolder(tmp_path / "run").read_status()["state"] == "failed"


@pytest.mark.fault("A6")
@pytest.mark.slow
@pytest.mark.parametrize("grace", [2, 60])
def test_a_save_that_takes_longer_than_the_launcher_waits(grace: int, faulty: Path, digit_folder: Path, tmp_path: Path) -> None:
    """The launcher's time is what decides; the checkpoint before stays whole."""
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=200)
    process = start_faulty(faulty, "slow8", config, environment={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace)})
    wait_for(process, lambda: max(losses(run_dir), default=0) >= 8)  # the first epoch's end was saved
    saved = list_checkpoints(run_dir / "checkpoints")
    process.terminate()
    process.communicate(timeout=90)
    steps = list_checkpoints(run_dir / "checkpoints")
    assert [verify_checkpoint(path) for path in steps]
    assert (len(steps) > len(saved)) == (grace == 60)
    assert RunFolder(run_dir).read_status()["state"] == ("preempted" if grace == 60 else "running")


@pytest.mark.fault("A7")
@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_a_second_signal_during_a_save(late: bool, faulty: Path, digit_folder: Path, tmp_path: Path) -> None:
    """A quick one is ignored until the save is done; a late one forces the process out, and nothing half-written counts."""
    run_dir = tmp_path / "run"
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=200)
    process = start_faulty(faulty, "slow6", config, processes=1)
    wait_for(process, lambda: max(losses(run_dir), default=0) >= 2)
    process.terminate()
    wait_for(process, lambda: any((run_dir / "checkpoints").glob(".tmp-step-*")))
    time.sleep(4 if late else 0.2)
    process.terminate()
    process.communicate(timeout=60)
    steps = list_checkpoints(run_dir / "checkpoints")
    assert process.returncode == (-signal.SIGTERM if late else 128 + signal.SIGTERM)
    assert len([verify_checkpoint(path) for path in steps]) == (0 if late else 1)


@pytest.mark.fault("A1")
@pytest.mark.slow
def test_a_launcher_that_restarts_continues_bit_for_bit(
    two_process_run: Path, faulty: Path, digit_folder: Path, tmp_path: Path
) -> None:
    """The empty folder starts anew under --resume auto; the second start goes on from the last checkpoint."""
    config = tiny_config(digit_folder, tmp_path / "run")
    output = finish(start_faulty(faulty, "kill", config, "--resume=auto", launcher_options=["--max-restarts=3"]))
    assert "resumed" in output
    assert history(tmp_path / "run") == history(two_process_run)
    ends = (list_checkpoints(path / "checkpoints")[-1] for path in (tmp_path / "run", two_process_run))
    assert_same_state(*ends)


@pytest.mark.fault("B6")
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    first: int, second: int, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    """Sums round differently, and that is all: the weights after 12 more updates differ by at most 1e-5."""
    undisturbed, moved = tmp_path / "undisturbed", tmp_path / "moved"
    changes: dict[str, Any] = {"model__drop_path_rate": 0.0}
    finish(start(tiny_config(digit_folder, undisturbed, **changes), processes=first))
    finish(start(tiny_config(digit_folder, moved, schedule__stop_epoch=1, **changes), processes=first))
    output = finish(start(tiny_config(digit_folder, moved, resume="auto", **changes), processes=second))
    assert "sums round differently" in output
    left, right = (load_checkpoint(list_checkpoints(path / "checkpoints")[-1]).tensors for path in (undisturbed, moved))
    largest = max((left[name] - right[name]).abs().max().item() for name in left if name.startswith("model."))
    assert 0 < largest <= 1e-5
    figures["largest difference of weights in 1e-9, most"] = round(largest * 1e9)


@pytest.mark.fault("A5")
@pytest.mark.slow
def test_the_slurm_script_passes_its_signal_on_and_queues_the_job_again(digit_folder: Path, tmp_path: Path) -> None:
    """Slurm's programs are stand-ins: srun becomes what it starts, as far as signals go."""
    run_dir, calls = tmp_path / "run", tmp_path / "calls"
    programs = {
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$*" >> {calls}; fi',
        "srun": 'shift\nexec "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    config = tiny_config(digit_folder, run_dir, checkpoint__every_updates=None, schedule__epochs=200)
    script = ROOT / "configs" / "slurm" / "train_multi_node.sbatch"
    process = subprocess.Popen(
        ["bash", str(script), *as_arguments(config)],
        cwd=ROOT,
        env=os.environ | slurm | own,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for(process, lambda: max(losses(run_dir), default=0) >= 2)
    process.send_signal(signal.SIGUSR1)  # to the batch script alone
    output, _ = process.communicate(timeout=90)
    assert RunFolder(run_dir).read_status()["state"] == "preempted", output
    assert calls.read_text() == "requeue 77\n"
