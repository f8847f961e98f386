"""The folder of one run: its layout, its lock, and the small files that tell people and programs how the run stands.

    config.yaml        the resolved configuration          environment.json   versions, commit, hardware, launch geometry
    status.json        how the run stands, and why it ended  metrics.jsonl    one JSON object a line, each with its "update"
    checkpoints/       see `taylorvit.checkpoint`          export/            the model for timm, see `taylorvit.export`
    tensorboard/       event files                         .lock              held by the process that owns the run
    bad_samples.txt    what could not be read, see `taylorvit.bad_samples`
    STOP               made by a person who wants the run to save and leave

Small files are replaced atomically: a reader sees the old or the new content, never a part.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from taylorvit.checkpoint import names_file, sync_folder, write_durably
from taylorvit.provenance import cpu_name, git_state

if TYPE_CHECKING:
    from accelerate import Accelerator

STATES = ("starting", "running", "finished", "preempted", "failed")
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")


class RunFolder:
    """Paths, lock and small files of a run. Only the main process writes.

    Raises:
        ValueError: the path cannot be a folder, or a file is in its place.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = _checked(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.export = self.path / "export"
        self.stop_file = self.path / "STOP"

    def holds_run(self) -> bool:
        """Whether a run trained here: a start that failed before its first record leaves nothing to lose."""
        return bool(self.read_metrics()) or any(self.checkpoints.glob("*step-*"))

    @contextmanager
    def locked(self, *, active: bool = True) -> Iterator[None]:
        """Own the run inside the `with` block; the folder is made. Does nothing in a process that is not `active`.

        The lock ends with the process, however that ends. It is a record lock, which belongs to the process and not to the file
        handle: loader workers do not inherit it, so they cannot keep the run locked after their parent was killed.

        Raises:
            ValueError: another process owns the run, which the message names, or the file system refuses the folder or locks.
        """
        if not active:
            yield
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir={str(self.path)!r} cannot be created: {error.strerror}") from error
        with open(self.path / ".lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"run_dir={str(self.path)!r}: its file system refuses locks ({error.strerror}); choose another run_dir"
                    ) from error
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                raise ValueError(
                    f"run_dir={str(self.path)!r} is in use by {owner}: stop that run or choose another run_dir"
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
            lock.flush()
            yield

    def open(self, config: Mapping[str, Any], *, update: int, epoch: int) -> None:
        """Start or continue the run after `update` updates and `epoch` epochs: write config.yaml, drop later metrics."""
        replace_file(self.config, yaml.safe_dump(dict(config), sort_keys=False))
        self.truncate_metrics(update, epoch)

    def write_status(self, state: str, *, update: int, epoch: int, message: str = "") -> None:
        """Say how the run stands: one of STATES, whole updates and epochs done, and the reason of an end."""
        assert state in STATES, state
        record = {"state": state, "update": update, "epoch": epoch, "message": message, "time": _now()}
        replace_file(self.status, json.dumps(record, indent=1) + "\n")

    def read_status(self) -> dict[str, Any]:
        """Return the content of status.json, empty if there is none yet.

        Raises:
            ValueError: the file is not JSON.
        """
        if not self.status.exists():
            return {}
        return _parse(self.status.read_text(encoding="utf-8", errors="replace"), self.status)

    def write_environment(self, accelerator: Accelerator) -> None:
        """Record versions, commit, hardware and launch geometry; no environment variables, which may hold secrets."""
        device = accelerator.device
        launch = {
            "world_size": accelerator.num_processes,
            "distributed_type": str(accelerator.distributed_type),
            "mixed_precision": accelerator.mixed_precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }
        replace_file(self.environment, json.dumps(describe_environment() | launch, indent=1) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; `record` has the key "update".

        NumPy and PyTorch scalars become numbers; NaN and infinities, which JSON lacks, the strings "nan", "inf" and "-inf".
        """
        assert "update" in record, record
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        with names_file(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl; a last line cut by a kill is left out.

        Raises:
            ValueError: another line is not such a record.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        return [
            _parse_record(line, f"{self.metrics}, line {number}") for number, line in enumerate(lines[:-1], start=1) if line
        ]

    def truncate_metrics(self, update: int, epoch: int) -> None:
        """Drop the records that a run resumed after this update and epoch will write again, and a torn last line.

        An epoch is done when it was evaluated: its evaluation bears the number of its last update, but comes again if the run
        ended in between.
        """
        kept = [
            json.dumps(record) + "\n"
            for record in self.read_metrics()
            if record["update"] <= update and (record.get("kind") != "evaluate" or record["epoch"] <= epoch)
        ]
        if self.metrics.exists():
            replace_file(self.metrics, "".join(kept))


def replace_file(path: Path, text: str) -> None:
    """Replace a small text file atomically and durably."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def describe_environment() -> dict[str, Any]:
    """Return versions, the code's commit and the machine, as JSON types."""
    return {
        "time": _now(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _checked(path: Path | str) -> Path:
    text = str(path)
    if not text.strip() or not text.isprintable():
        raise ValueError(f"run_dir={text!r} is not allowed: give a folder's path, without control characters")
    path = Path(text)
    try:
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                raise ValueError(f"run_dir={text!r} is not allowed: {place} is a broken link")
            if place.exists() and not place.is_dir():
                raise ValueError(f"run_dir={text!r} is not allowed: {place} is a file")
    except OSError as error:
        raise ValueError(f"run_dir={text!r} is not allowed: {error.strerror}") from error
    return path


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parse(text: str, where: Path | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a {type(value).__name__} where an object is expected")
    return value


def _parse_record(text: str, where: str) -> dict[str, Any]:
    """Read one line of metrics.jsonl: by "update" and, of an evaluation, "epoch" it is kept or dropped."""
    record = _parse(text, where)
    for key in ("update", "epoch") if record.get("kind") == "evaluate" else ("update",):
        if not isinstance(record.get(key), int):
            raise ValueError(f"{where}: {key!r} is {record.get(key)!r}; a whole number is needed")
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
