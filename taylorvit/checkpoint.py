"""Training checkpoints on disk: one directory per saved step, written so that a kill at any instant leaves a valid one behind.

    step-00001234/state.safetensors   model, averaged weights and every optimizer tensor
    step-00001234/meta.json           counters, parameter groups, config, class names, metrics
    step-00001234/manifest.json       size and SHA-256 of the two files above

The directory is written under a temporary name, each file and then the directory is fsynced, and the rename into place is the
commit. The manifest makes a single flipped bit visible. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taylorvit.training_state import CheckpointError, decode, encode, pack_state, unpack_state

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "best_checkpoint",
    "find_newest",
    "list_checkpoints",
    "load_checkpoint",
    "names_file",
    "pack_state",
    "prune_checkpoints",
    "read_meta",
    "save_checkpoint",
    "set_newer_aside",
    "sync_folder",
    "unpack_state",
    "verify_checkpoint",
    "write_durably",
]

FORMAT = 1
STATE, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: every tensor on the CPU by name, and the JSON value that was saved with them."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save_checkpoint(folder: Path | str, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write folder/step-XXXXXXXX and return its path; when this returns, the checkpoint survives a kill and a power cut.

    `meta` holds JSON types, tuples and non-finite floats, and comes back equal. A checkpoint of the same step is replaced: it
    is moved aside, and `find_newest` moves it back should the process die before the new one is in place.

    Raises:
        CheckpointError: the disk refused or `meta` holds something else; older checkpoints are untouched, nothing is left over.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{target.name}-{os.getpid()}"
    text = json.dumps(encode(meta, "meta"), indent=1, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        write_durably(temporary / META, text)
        _write_tensors(temporary / STATE, tensors)
        write_durably(temporary / MANIFEST, _manifest(temporary, step))
        sync_folder(temporary)
        _commit(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = find_newest_valid(folder)
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error}; the last good one is {good.name if good else 'none'}"
        ) from error
    return target


def verify_checkpoint(path: Path | str) -> int:
    """Compare a checkpoint with its manifest and return its step.

    Raises:
        CheckpointError: a file is missing, unknown, of another size or content, or the manifest is unusable.
    """
    path = Path(path)
    manifest = _read_json(path / MANIFEST)
    try:
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        expected = {name: (files[name]["size"], files[name]["sha256"]) for name in (STATE, META)}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: it is not a checkpoint's manifest ({error!r})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {version} is unknown, this version reads format {FORMAT}")
    if not isinstance(step, int):
        raise CheckpointError(f"{path / MANIFEST}: step {step!r} is no number of updates")
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{path / MANIFEST}: it belongs to step {step}, not to {path.name}")
    for extra in sorted({entry.name for entry in path.iterdir()} - {STATE, META, MANIFEST}):
        raise CheckpointError(f"{path / extra}: this file does not belong to the checkpoint")
    for name, (size, sha256) in expected.items():
        _verify_file(path / name, size, sha256)
    return step


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Verify a step folder and read it.

    Raises:
        CheckpointError: see `verify_checkpoint`.
    """
    path = Path(path)
    step = verify_checkpoint(path)
    try:
        tensors = load_file(path / STATE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / STATE}: {error}") from error
    return Checkpoint(path, step, tensors, read_meta(path))


def read_meta(path: Path | str) -> dict[str, Any]:
    """Return the JSON part of a step folder without verifying it.

    Raises:
        CheckpointError: it is missing or not what a checkpoint has there.
    """
    file = Path(path) / META
    value = _read_json(file)
    try:
        meta = decode(value)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{file}: a {type(meta).__name__} where an object is expected")
    for key in ("config", "metrics"):
        if not isinstance(meta.get(key, {}), dict):
            raise CheckpointError(f"{file}: {key} is a {type(meta[key]).__name__} where an object is expected")
    return meta


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Return the step folders, oldest first, unverified."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((entry for entry in folder.iterdir() if STEP_NAME.fullmatch(entry.name)), key=_step_of)


def find_newest(folder: Path | str) -> Path | None:
    """Return the newest valid checkpoint, or None if the run has not saved any.

    Only the process that owns the run may call this: it sweeps what a killed save left behind, and renames each damaged
    checkpoint to damaged-step-XXXXXXXX with a warning, so that its step can be saved again.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    folder = Path(folder)
    _sweep(folder)
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            aside = _set_aside(path, "damaged")
            warnings.warn(f"damaged checkpoint, renamed to {aside.name}: {error}", stacklevel=2)
    if any(folder.glob("damaged-step-*")):
        raise CheckpointError(f"every checkpoint in {folder} is damaged; remove the folder's damaged-step-* to start from zero")
    return None


def set_newer_aside(folder: Path | str, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to abandoned-step-XXXXXXXX and return the new paths.

    A run that goes back to an earlier step would otherwise be pruned and resumed by the numbers of the future it left.
    """
    return [_set_aside(path, "abandoned") for path in list_checkpoints(folder) if _step_of(path) > step]


def best_checkpoint(folder: Path | str, metric: str) -> Path | None:
    """Return the step folder with the highest meta["metrics"][metric], unverified; the newer of equals, None if none has it."""
    ranked = _ranked(list_checkpoints(folder), metric)
    return ranked[0] if ranked else None


def prune_checkpoints(folder: Path | str, *, keep_last: int, keep_best: int, metric: str) -> list[Path]:
    """Remove all checkpoints but the newest, the best by `metric` and the milestones; return the removed paths.

    A milestone has meta["milestone"] true. One that cannot be removed costs a warning, never the run.

    Raises:
        ValueError: keep_last below 2, which would leave nothing should the newest be damaged.
    """
    if keep_last < 2:
        raise ValueError(f"keep_last={keep_last} is not allowed: keep at least 2, as the newest may be damaged")
    steps = list_checkpoints(folder)
    keep = {*steps[-keep_last:], *_ranked(steps, metric)[:keep_best]}
    removed = []
    for path in steps:
        if path in keep or _meta_or_empty(path).get("milestone"):
            continue
        doomed = path.with_name(f".tmp-pruned-{path.name}")
        try:
            path.rename(doomed)  # a kill in the middle of the removal must not leave half a step-* folder
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"cannot remove old checkpoints in {folder}: {error.strerror}", stacklevel=2)
            break
        removed.append(path)
    return removed


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until the disk has it."""
    with names_file(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Let an error of the disk name the file: one of a write, such as "No space left on device", does not by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(_storable(tensors), path)
    shutil.copymode(path.with_name(META), path)  # safetensors writes mode 0600, whatever the umask
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory, as the format requires; tied ones are written twice."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        storable[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return storable


def _manifest(folder: Path, step: int) -> str:
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in (STATE, META)}
    return json.dumps({"format": FORMAT, "step": step, "files": files}, separators=(",", ":"))


def _commit(temporary: Path, target: Path) -> None:
    """Rename the finished directory into place and wait until the disk knows."""
    aside = target.with_name(f".old-{target.name}")
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    sync_folder(target.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _sweep(folder: Path) -> None:
    """Remove unfinished saves; put a checkpoint back whose replacement was not finished."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    for aside in folder.glob(".old-step-*"):
        target = aside.with_name(aside.name.removeprefix(".old-"))
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)


def _set_aside(path: Path, why: str) -> Path:
    aside, count = path.with_name(f"{why}-{path.name}"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{why}-{path.name}-{count}")
    path.rename(aside)
    return aside


def find_newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint without changing anything: for readers of a folder that another process writes."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError:
            continue
    return None


def _verify_file(path: Path, size: int, sha256: str) -> None:
    _refuse_pipe(path)
    try:
        actual = path.stat().st_size
        if actual != size:
            raise CheckpointError(f"{path}: {actual} bytes instead of {size}")
        if _sha256(path) != sha256:
            raise CheckpointError(f"{path}: its content has changed since it was written (SHA-256 differs)")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _refuse_pipe(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
        raise CheckpointError(f"{path}: it is no file")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    _refuse_pipe(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is not valid JSON ({error})") from error


def _step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _meta_or_empty(path: Path) -> dict[str, Any]:
    """Return a checkpoint's meta, empty if unreadable: judging damage is `find_newest`'s task."""
    try:
        return read_meta(path)
    except CheckpointError:
        return {}


def _ranked(steps: list[Path], metric: str) -> list[Path]:
    """Return the steps that have the metric, best first, newer before older among equals."""
    scores = {path: _meta_or_empty(path).get("metrics", {}).get(metric) for path in steps}
    scored = {path: score for path, score in scores.items() if isinstance(score, int | float) and math.isfinite(score)}
    return sorted(scored, key=lambda path: (scored[path], _step_of(path)), reverse=True)
