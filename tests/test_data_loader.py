"""Loader workers that die, hang or have no room: one line with the likely cause, and an exact resume."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, as_arguments, assert_same_state, count_updates_lost, finish, history, launch, tiny_config
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from taylorvit.checkpoint import list_checkpoints
from taylorvit.config import AugmentConfig, DataConfig
from taylorvit.data import LoaderError, build_train_loader
from taylorvit.data import loader as loader_module
from taylorvit.data.images import ImageDataset
from taylorvit.data.loader import Loader, explain_failure, explained_loader_failures
from taylorvit.run_folder import RunFolder
from taylorvit.signals import SIGNALS


class Ending:
    """A source whose image 3 ends or stops the process that reads it."""

    classes = ["0"]

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> tuple[Image.Image, int]:
        if index == 3 and multiprocessing.parent_process() is not None:
            self.end()
        return Image.new("RGB", (8, 8)), 0

    def name(self, index: int) -> str:
        return f"image {index}"


def kill(number: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


def run_out_of_shared_memory() -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_17_3>: No space left on device (28)")


ENDINGS: dict[str, tuple[Callable[[], object], str]] = {
    "SIGKILL": (
        kill(signal.SIGKILL),
        r"loader worker 0 \(process \d+\) was killed by the signal Killed: most often the memory",
    ),
    "SIGSEGV": (
        kill(signal.SIGSEGV),
        r"loader worker 0 \(process \d+\) was killed by the signal Segmentation fault: a library",
    ),
    "SIGBUS": (kill(signal.SIGBUS), r"loader worker 0 \(process \d+\) was killed by the signal Bus error: .*--shm-size"),
    "exit 3": (lambda: os._exit(3), r"loader worker 0 \(process \d+\) exited unexpectedly with exit code 3: something in it"),
    "exit 0": (lambda: os._exit(0), r"loader worker 0 \(process \d+\) exited unexpectedly with exit code 0: something in it"),
    "shared memory": (run_out_of_shared_memory, r"cannot pass its batch on: the shared memory \(/dev/shm\) is full"),
    "hang": (lambda: time.sleep(600), r"loader worker 0 \(process \d+\) has given no batch for 2 s .* most likely the storage"),
}


class Three(Dataset):
    """Three samples; something happens at the last."""

    def __init__(self, event: Callable[[], object]) -> None:
        self.event = event

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, None]:
        if index == 2:
            self.event()
        return index, None


def three_loader(event: Callable[[], object]) -> Loader:
    return Loader(
        Three(event), data=DataConfig(num_workers=1), collate=None, timeout_seconds=600, persistent=False, batch_size=3
    )


@pytest.mark.fault("A12")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_worker_that_ends_or_hangs_is_named_in_one_line_with_the_likely_cause(ending: str) -> None:
    end, message = ENDINGS[ending]
    dataset = ImageDataset(Ending(end), in_chans=3)
    loader = build_train_loader(
        dataset,
        data=DataConfig(num_workers=1),
        augment=AugmentConfig(),
        img_size=8,
        seed=0,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        accumulation=1,
        timeout_seconds=2.5,
    )
    started = time.monotonic()
    with pytest.raises(LoaderError, match=message) as caught, explained_loader_failures():
        list(loader)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


@pytest.mark.fault("A12")
def test_a_dead_worker_whose_report_was_lost_is_noticed_long_before_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reports a death by raising in a signal handler; inside a callback Python drops what is raised."""
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 1.0)
    batches = iter(three_loader(kill(signal.SIGKILL)))
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    started = time.monotonic()
    try:
        with pytest.raises(LoaderError, match=ENDINGS["SIGKILL"][1]):
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_ends_a_run_is_for_the_training_process_alone(number: signal.Signals) -> None:
    """Launchers and terminals send it to the workers too, which the last update needs."""
    assert [batch.tolist() for batch in three_loader(kill(number))] == [[0, 1, 2]]


def test_a_loader_waits_longer_than_it_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.2)
    loader = three_loader(lambda: time.sleep(1.5))
    assert [batch.tolist() for batch in loader] == [[0, 1, 2]]


LIMITS = {
    errno.ENOSPC: r"the shared memory \(/dev/shm\) is full",
    errno.EMFILE: r"raise the limit of open files \(ulimit -n\)",
    errno.EAGAIN: "the memory or the limit of processes",
    errno.ENOMEM: "the memory or the limit of processes",
}


@pytest.mark.fault("A12")
@pytest.mark.parametrize("number", [*LIMITS, errno.EPERM])
def test_workers_that_cannot_start_name_the_limit(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(DataLoader, "__iter__", refuse)
    message = f"^the loader's workers cannot start: {LIMITS[number]}" if number in LIMITS else "Operation not permitted"
    with pytest.raises(LoaderError if number in LIMITS else PermissionError, match=message):
        iter(three_loader(lambda: None))


IN_LITTLE_MEMORY = 'mount -t tmpfs -o size=$0 tmpfs /dev/shm && exec "$@"'


def own_shared_memory() -> bool:
    """Whether this process may mount a /dev/shm of its own, as root may."""
    return subprocess.run(["unshare", "-m", "sh", "-c", IN_LITTLE_MEMORY, "4k", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.fault("A12")
@pytest.mark.parametrize(
    ("size", "message"),
    [("4k", "the loader's workers cannot start"), ("64k", "a loader worker cannot pass its batch on")],
    ids=["none", "little"],
)
def test_full_shared_memory_is_one_line(
    size: str, message: str, digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    if not own_shared_memory():
        pytest.skip("only root may mount a /dev/shm of its own")
    config = tiny_config(digit_folder, tmp_path / "run", train__micro_batch_size=16)
    command = [sys.executable, str(ROOT / "train.py"), *as_arguments(config)]
    wrapped = ["unshare", "-m", "sh", "-c", IN_LITTLE_MEMORY, size, *command]
    ended = subprocess.run(wrapped, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}: the shared memory (/dev/shm) is full: set data.num_workers")
    assert "Traceback" not in ended.stderr
    assert RunFolder(tmp_path / "run").read_status()["state"] == "failed"
    figures["messages given"] += 1


def test_other_errors_are_left_as_they_are() -> None:
    assert explain_failure("mat1 and mat2 shapes cannot be multiplied") is None
    assert explain_failure("Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: other") is None
    with pytest.raises(RuntimeError, match="^other$"), explained_loader_failures():
        raise RuntimeError("other")


@pytest.mark.fault("A12")
def test_a_killed_worker_fails_the_run_in_one_line_and_the_resume_is_exact(
    digit_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", schedule__epochs=2)
    program = (
        "import os, sys\n"
        "from taylorvit.data.folder import FolderSource\n"
        "real = FolderSource.read\n"
        "def read(self, index):\n"
        f"    if index == {int(np.random.default_rng(0).integers(96))} and not os.path.exists(sys.argv[0] + '.once'):\n"
        "        open(sys.argv[0] + '.once', 'w').close()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return real(self, index)\n"
        "FolderSource.read = read\n"
        "from taylorvit.cli import run_program\n"
        "from train import main\n"
        "run_program(main)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{program}")
    output = finish(launch(str(script), as_arguments(config)), code=2)
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "was killed by the signal Killed: most often the memory ran out" in errors[0]
    assert "Traceback" not in output
    count_updates_lost(tmp_path / "run", figures)
    figures["messages given"] += 1
    status = RunFolder(tmp_path / "run").read_status()
    assert status["state"] == "failed"
    assert "loader worker" in status["message"]
    finish(launch(str(script), [*as_arguments(config), "--resume=auto"]))
    undisturbed = tiny_config(digit_folder, tmp_path / "undisturbed", schedule__epochs=2)
    finish(launch("train.py", as_arguments(undisturbed)))
    assert history(tmp_path / "run") == history(tmp_path / "undisturbed")
    last = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("run", "undisturbed")]
    assert_same_state(*last)
