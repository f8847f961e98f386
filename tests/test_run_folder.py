"""The run folder: lock, atomic small files, metrics that survive a kill, and what environment.json says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from taylorvit import run_folder
from taylorvit.run_folder import RunFolder, replace_file

HOLD = """
import os, sys, time
from taylorvit.run_folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    if os.fork() == 0:
        time.sleep(60)  # a loader worker that outlives its parent
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""
CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=2, distributed_type="NO", mixed_precision="bf16")


@pytest.mark.fault("A14")
def test_two_runs_in_one_folder_are_refused_until_the_owner_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "locked\n"
            with (
                pytest.raises(ValueError, match=f"in use by process {owner.pid} on .* since 20"),
                RunFolder(tmp_path / "run").locked(),
            ):
                pass
            owner.kill()
            owner.wait()
            with RunFolder(tmp_path / "run").locked():
                assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.fault("A14")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EAGAIN, "in use by another process"),
        (errno.EACCES, "in use by another process"),
        (errno.ENOLCK, r"file system refuses locks \(No locks available\); choose another run_dir"),
        (errno.EOPNOTSUPP, "file system refuses locks"),
    ],
)
def test_a_file_system_without_locks_is_not_a_run_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(ValueError, match=message), RunFolder(tmp_path / "run").locked():
        pass


def test_only_the_active_process_locks(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked(active=False):
        assert not (tmp_path / "run").exists()
    with RunFolder(tmp_path / "run").locked():
        assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.fault("E6")
@pytest.mark.parametrize("bad", ["", "  ", "a\nb", "a\0b", "x" * 300])
def test_paths_that_are_no_folder(bad: str) -> None:
    with pytest.raises(ValueError, match="run_dir=") as caught:
        RunFolder(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("E6")
@pytest.mark.parametrize("name", ["-rf", "~", "../../x", "$HOME", "*", "a b", "--help"])
def test_a_name_is_taken_as_it_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is the user's to choose, also one outside of the folder that they are in; nothing in it is expanded."""
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with RunFolder(name).locked():
        pass
    made = {path.resolve() for path in tmp_path.rglob("*")} - {here, here.parent}
    assert made == {path.resolve() for path in (here / name, here / name / ".lock", here / name / "checkpoints")}


@pytest.mark.fault("B10")
def test_a_file_or_a_broken_link_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for bad in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"file is a file"):
            RunFolder(tmp_path / bad)
    with pytest.raises(ValueError, match="broken link"):
        RunFolder(tmp_path / "link" / "run")


def test_holds_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.holds_run()
    with run.locked():
        assert not run.holds_run()
    (run.checkpoints / "damaged-step-00000003").mkdir()
    assert run.holds_run()
    (run.checkpoints / "damaged-step-00000003").rmdir()
    run.write_status("failed", update=0, epoch=0)
    assert not run.holds_run()
    run.append_metrics({"update": 1})
    assert run.holds_run()


def test_status(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_status() == {}
    run.write_status("preempted", update=7, epoch=1, message="SIGTERM")
    status = run.read_status()
    assert status.pop("time").startswith("20")
    assert status == {"state": "preempted", "update": 7, "epoch": 1, "message": "SIGTERM"}
    run.write_status("starting", update=0, epoch=0)
    with pytest.raises(AssertionError):
        run.write_status("runing", update=0, epoch=0)
    run.status.write_text("{")
    with pytest.raises(ValueError, match=r"status\.json: it is not valid JSON"):
        run.read_status()


@pytest.mark.fault("B1")
def test_replacing_a_file_never_shows_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    replace_file(path, "old")

    def fail(path: Path, text: str) -> None:
        path.write_text(text[:1])
        raise OSError("disk full")

    monkeypatch.setattr(run_folder, "write_durably", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_metrics_are_exact_and_plain_json(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    record = {
        "update": 1,
        "loss": np.float32(0.1),
        "top1": torch.tensor(2.5),
        "norm": float("inf"),
        "tag": "train",
        "lr": 1 / 3,
    }
    run.append_metrics(record)
    text = run.metrics.read_text()
    loaded = json.loads(text, parse_constant=pytest.fail)
    assert loaded == {"update": 1, "loss": float(np.float32(0.1)), "top1": 2.5, "norm": "inf", "tag": "train", "lr": 1 / 3}
    assert text.count("\n") == 1


@pytest.mark.parametrize("torn", ["", '{"update": 9', '{"update": 9, "loss": 1.0}', "\0\0"])
def test_resume_drops_later_and_torn_lines(tmp_path: Path, torn: str) -> None:
    run = RunFolder(tmp_path)
    for update in (1, 2, 3, 4):
        run.append_metrics({"update": update, "loss": update / 3})
    with run.metrics.open("a") as file:
        file.write(torn)
    assert [record["update"] for record in run.read_metrics()] == [1, 2, 3, 4]
    run.open({"seed": 3, "optim": {"lr": 1e-3}}, update=2, epoch=0)
    assert yaml.safe_load(run.config.read_text()) == {"seed": 3, "optim": {"lr": 1e-3}}
    run.append_metrics({"update": 3, "loss": 1.0})
    assert run.read_metrics() == [
        {"update": 1, "loss": 1 / 3},
        {"update": 2, "loss": 2 / 3},
        {"update": 3, "loss": 1.0},
    ]


def test_an_evaluation_that_will_come_again_is_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for epoch in (1, 2):
        run.append_metrics({"kind": "train", "update": 3 * epoch, "epoch": epoch})
        run.append_metrics({"kind": "evaluate", "update": 3 * epoch, "epoch": epoch})
    run.open({}, update=6, epoch=1)
    assert [(record["kind"], record["epoch"]) for record in run.read_metrics()] == [("train", 1), ("evaluate", 1), ("train", 2)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"update": 1}\nhello\n{"update": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: it is not valid JSON"):
        run.read_metrics()


@pytest.mark.fault("E8")
def test_environment_says_what_ran_where_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2hunter2")
    run = RunFolder(tmp_path)
    run.write_environment(CPU)  # type: ignore[arg-type]
    text = run.environment.read_text()
    record = json.loads(text)
    assert "hunter2" not in text
    assert "SOME_API" not in text
    assert record["packages"]["torch"] == torch.__version__.split("+")[0] or record["packages"]["torch"] == torch.__version__
    assert (record["world_size"], record["mixed_precision"], record["device"]) == (2, "bf16", "cpu")
    assert record["cores"] >= 1
    assert record["memory_bytes"] > 2**28


@pytest.mark.fault("B1")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        run.append_metrics({"update": 1})


@pytest.mark.fault("B10")
def test_a_folder_that_may_not_be_written_is_one_error() -> None:
    """As another user than root, whom no permission stops."""
    folder = Path(tempfile.mkdtemp())
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run").chmod(0o555)
    folder.chmod(0o755)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"Permission denied: .*\.lock"), RunFolder(folder / "run").locked():
            pass
        with pytest.raises(ValueError, match=r"cannot be created: Permission denied"), RunFolder(folder / "no").locked():
            pass
    finally:
        if is_root:
            os.seteuid(0)
        (folder / "run").chmod(0o755)
        shutil.rmtree(folder)
