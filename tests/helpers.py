"""What tests share: a small image folder, a small config with everything switched on, launching processes, hostile pickles."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_digits

from taylorvit.checkpoint import find_newest_valid, load_checkpoint
from taylorvit.cli import run_program
from taylorvit.config import Config
from taylorvit.config_loading import config_from_dict, config_to_dict, flatten
from taylorvit.run_folder import RunFolder
from taylorvit.studies.fault_runs import SMALL_RUN, differences, start_run
from taylorvit.studies.fault_runs import history as history

ROOT = Path(__file__).resolve().parents[1]


def write_digit_folder(root: Path, *, train: int = 96, val: int = 41) -> Path:
    """Write the first real handwritten digits as an image folder of ten classes; 41 images make every last batch ragged."""
    from PIL import Image

    digits = load_digits()
    for number in range(train + val):
        split = "train" if number < train else "val"
        folder = root / split / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[number] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number:04d}.png")
    return root


def tiny_config(data_root: Path, run_dir: Path, **changes: Any) -> Config:
    """Return a config that trains in seconds with workers, augmentation, mixing, drop path, accumulation, LAMB and EMA on.

    96 images at 16 an update are 6 updates an epoch. `changes` are dotted keys with `__` for the dot.
    """
    settings = (
        SMALL_RUN
        | {
            "run_dir": str(run_dir),
            "data.root": str(data_root),
            "schedule.epochs": 3,
            "train.global_batch_size": 16,
            "train.micro_batch_size": 4,
            "evaluate.batch_size": 16,
            "checkpoint.every_updates": 2,
            "checkpoint.keep_last": 50,
        }
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    values = config_to_dict(Config())
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return config_from_dict(values)


def as_arguments(config: Config) -> list[str]:
    """Return the config as command-line arguments."""
    default = flatten(Config())
    return [f"--{key}={value}" for key, value in flatten(config).items() if value != default[key] and value is not None]


def launch(program: str, arguments: Sequence[str], *, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """Start train.py or eval.py, on several processes through torchrun, in a process group of its own."""
    return start_run(program, arguments, processes=processes, **options)


def finish(process: subprocess.Popen[str], *, code: int = 0, timeout: float = 180) -> str:
    """Wait for the end, check the exit code, and return what was printed."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def losses(run_dir: Path) -> dict[int, float]:
    """Return the training loss of every update."""
    return {record["update"]: record["loss"] for record in RunFolder(run_dir).read_metrics() if record["kind"] == "train"}


def count_updates_lost(run_dir: Path, figures: Counter[str]) -> None:
    """Count how many updates a run that was ended had done since its newest whole checkpoint; the most so far is kept."""
    newest = find_newest_valid(run_dir / "checkpoints")
    kept = int(newest.name.removeprefix("step-")) if newest else 0
    figures["updates lost, most"] = max(figures["updates lost, most"], max(losses(run_dir), default=0) - kept)


def assert_same_state(first: Path, second: Path) -> None:
    """Compare two checkpoints bit for bit: weights, averaged weights, every optimizer tensor, counters and loss sums."""
    names = load_checkpoint(first).tensors.keys()
    assert any(name.startswith("ema.") for name in names)
    assert any(name.startswith("optimizer.") for name in names)
    assert differences(first, second) == []


def run_tool(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], *arguments: str) -> int:
    """Run a program's `main` in this process as its command line would, and return the exit code."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    return int(ended.value.code)


def damage(file: Path, content: bytes, figures: Counter[str]) -> None:
    """Write other content into a file, and count the fault and the bytes that differ, lost and added ones among them."""
    before = file.read_bytes()
    file.write_bytes(content)
    figures["faults injected"] += 1
    figures["bytes corrupted"] += sum(old != new for old, new in zip_longest(before, content))


class Canary:
    """Unpickling this makes a folder, unless the reader refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def write_tar(path: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    """Write a tar of files, by their paths in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_legacy_tar(path: Path, content: Any) -> None:
    """Write a tar as torch.save of old did, with the content as each of its pickles."""
    write_tar(path, dict.fromkeys(("storages", "tensors", "pickle"), pickle.dumps(content)))
