"""Checkpoints on disk: exact round trips, damage of every kind, kills and failures inside a save, retention."""

from __future__ import annotations

import errno
import functools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import damage

from taylorvit import checkpoint
from taylorvit.checkpoint import (
    CheckpointError,
    best_checkpoint,
    find_newest,
    find_newest_valid,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)

FILES = ("state.safetensors", "meta.json", "manifest.json")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((64, 64), float(step)), "optimizer.0.step": torch.tensor(step)}


def save(folder: Path, step: int, **meta: Any) -> Path:
    return save_checkpoint(folder, step, tensors_of(step), {"update": step, **meta})


def assert_valid(path: Path | None, step: int) -> None:
    assert path is not None
    loaded = load_checkpoint(path)
    assert loaded.step == step
    assert loaded.meta["update"] == step
    assert all(torch.equal(loaded.tensors[name], value) for name, value in tensors_of(step).items())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Round trips


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    tensors = {
        "fp32": torch.tensor([0.1, float("nan"), -0.0, float("inf"), 1e-45]),
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp16": torch.randn(7).half(),
        "fp64": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor([2**62, -1]),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(5, 3).t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "tied_a": shared,
        "tied_b": shared,
        "row_1": shared[1],
        "column_1": shared[:, 1],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 7, tensors, {})).tensors
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype, name
        assert loaded[name].shape == value.shape, name
        same = loaded[name].contiguous().flatten().view(torch.uint8), value.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(*same), name


def test_meta_comes_back_equal_and_of_the_same_types(tmp_path: Path) -> None:
    meta = {
        "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf],
        "tuple": (0.9, (0.999, None)),
        "large": 2**80,
        "text": "Zürich\n\u2028",
        "nested": {"": {"flag": True, "none": None, "list": []}},
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {}, meta | {"nan": math.nan})).meta
    assert math.isnan(loaded.pop("nan"))
    assert loaded == meta
    assert repr(loaded) == repr(meta)


def test_meta_that_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"meta\.a\.1 is a set"):
        save_checkpoint(tmp_path, 1, {}, {"a": [1, {2}]})
    assert names(tmp_path) == []


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert names(path) == sorted(FILES)
    json.loads((path / "meta.json").read_text())
    json.loads((path / "manifest.json").read_text())


@pytest.mark.fault("B9")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    for name in FILES:
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o666 & ~mask, name
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask


@pytest.mark.fault("A15")
def test_newest_is_chosen_by_step_and_not_by_time_or_text(tmp_path: Path) -> None:
    for step in (99999999, 100000000, 5):
        os.utime(save(tmp_path, step), (10**9 - step, 10**9 - step))
    assert_valid(find_newest(tmp_path), 100000000)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-99999999", "step-100000000"]


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("other files are nobody's business")
    assert find_newest(tmp_path) is None
    assert names(tmp_path) == ["notes.txt"]


# Damage

CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "last byte": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "one bit": lambda content: flipped(content, 8 * (len(content) * 2 // 3) + 3),
    "longer": lambda content: content + b" ",
}
REPLACED: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def flipped(content: bytes, position: int) -> bytes:
    """Return the bytes with one bit the other way round."""
    byte = position // 8
    return content[:byte] + bytes([content[byte] ^ 1 << position % 8]) + content[byte + 1 :]


@pytest.mark.fault("B3")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [*CHANGED, *REPLACED])
def test_damage_costs_one_warning_and_one_step(tmp_path: Path, name: str, kind: str, figures: Counter[str]) -> None:
    save(tmp_path, 4)
    file = save(tmp_path, 8) / name
    if kind in CHANGED:
        damage(file, CHANGED[kind](file.read_bytes()), figures)
    else:
        REPLACED[kind](file)
    if (name, kind) == ("manifest.json", "longer"):
        assert_valid(find_newest(tmp_path), 8)  # a blank behind JSON changes nothing
        return
    with pytest.warns(UserWarning, match="damaged checkpoint, renamed to damaged-step-00000008") as caught:
        assert_valid(find_newest(tmp_path), 4)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert any(file in message for file in (FILES if name == "manifest.json" else [name]))
    assert "\n" not in message
    assert names(tmp_path) == ["damaged-step-00000008", "step-00000004"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_valid(find_newest(tmp_path), 4)
        save(tmp_path, 8)  # the damaged one does not block its step
        assert_valid(find_newest(tmp_path), 8)


@pytest.mark.fault("B3")
@pytest.mark.parametrize(
    ("text", "reason"),
    [("{}", "not a checkpoint's manifest"), ("[1]", "not a checkpoint's manifest"), ("x", "not valid JSON")],
)
def test_manifest_that_is_something_else(tmp_path: Path, text: str, reason: str, figures: Counter[str]) -> None:
    path = save(tmp_path, 8)
    damage(path / "manifest.json", text.encode(), figures)
    with pytest.raises(CheckpointError, match=reason):
        verify_checkpoint(path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 8)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format":1', '"format":2'))
    with pytest.raises(CheckpointError, match="format 2 is unknown"):
        verify_checkpoint(path)


@pytest.mark.fault("B3")
def test_extra_file_and_renamed_step_are_noticed(tmp_path: Path, figures: Counter[str]) -> None:
    figures["faults injected"] = 2
    path = save(tmp_path, 8)
    (path / "custom_checkpoint_0.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl"):
        load_checkpoint(path)
    (path / "custom_checkpoint_0.pkl").unlink()
    with pytest.raises(CheckpointError, match="belongs to step 8"):
        load_checkpoint(path.rename(tmp_path / "step-00000009"))
    assert load_checkpoint((tmp_path / "step-00000009").rename(tmp_path / "a copy elsewhere")).step == 8


@pytest.mark.fault("B3")
@pytest.mark.parametrize("name", FILES)
def test_single_flipped_bits_are_noticed(tmp_path: Path, name: str, figures: Counter[str]) -> None:
    path = save_checkpoint(tmp_path, 3, {"w": torch.arange(3.0)}, {"a": 0.5})
    original = (path / name).read_bytes()
    for position in range(0, 8 * len(original), 5):  # every bit of a byte gets its turn
        damage(path / name, flipped(original, position), figures)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)
        (path / name).write_bytes(original)
    verify_checkpoint(path)


@pytest.mark.fault("B4")
def test_all_damaged_is_an_error_now_and_next_time(tmp_path: Path, figures: Counter[str]) -> None:
    figures["faults injected"] = 2
    for step in (4, 8):
        (save(tmp_path, step) / "meta.json").unlink()
    with (
        pytest.warns(UserWarning, match="damaged checkpoint") as caught,
        pytest.raises(CheckpointError, match="every checkpoint"),
    ):
        find_newest(tmp_path)
    assert len(caught) == 2
    with pytest.raises(CheckpointError, match="every checkpoint"):
        find_newest(tmp_path)


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (save(tmp_path, 8) / "meta.json").unlink()
    (tmp_path / ".tmp-step-00000012-77").mkdir()
    before = names(tmp_path)
    assert_valid(find_newest_valid(tmp_path), 4)
    assert names(tmp_path) == before


# Failures and kills inside a save


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 8)
    save(tmp_path, 8, metrics={"top1": 71.5})
    assert load_checkpoint(tmp_path / "step-00000008").meta["metrics"] == {"top1": 71.5}
    assert names(tmp_path) == ["step-00000008"]


@pytest.mark.fault("B1")
def test_disk_full_names_path_reason_and_last_good(tmp_path: Path, figures: Counter[str]) -> None:
    save(tmp_path, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 100, 1000, 10000):  # within meta, tensors
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            figures["faults injected"] += 1
            with pytest.raises(CheckpointError) as caught:
                save(tmp_path, 8, padding="x" * 500)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert "step-00000008" in str(caught.value)
            assert "File too large" in str(caught.value)
            assert "last good one is step-00000004" in str(caught.value)
            assert names(tmp_path) == ["step-00000004"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert_valid(find_newest(tmp_path), 4)


@pytest.mark.fault("B1")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_at_any_file_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path, 4)
    original = {"write_durably": checkpoint.write_durably, "_write_tensors": checkpoint._write_tensors}

    def full(path: Path, content: Any, *, writer: str) -> None:
        if path.name == name:
            path.write_bytes(b"half of")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original[writer](path, content)

    for writer in original:
        monkeypatch.setattr(checkpoint, writer, functools.partial(full, writer=writer))
    with pytest.raises(CheckpointError, match=f"No space left on device: .*{name}.*; the last good one is step-00000004"):
        save(tmp_path, 8)
    assert names(tmp_path) == ["step-00000004"]
    monkeypatch.undo()
    assert_valid(save(tmp_path, 8), 8)


@pytest.mark.fault("B10")
def test_a_folder_removed_during_a_save_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint._write_tensors

    def removed(path: Path, tensors: Any) -> None:
        original(path, tensors)
        shutil.rmtree(tmp_path / "checkpoints")

    monkeypatch.setattr(checkpoint, "_write_tensors", removed)
    with pytest.raises(CheckpointError, match="No such file or directory: .*; the last good one is none"):
        save(tmp_path / "checkpoints", 8)


@pytest.mark.fault("B10")
def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(tmp_path / "checkpoints", 1)


@pytest.mark.fault("A3")
def test_order_of_the_writes_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path / "checkpoints", 8)
    written = {("fsync", name) for name in FILES}
    assert set(events[:3]) == written
    assert events[3] == ("fsync", f".tmp-step-00000008-{os.getpid()}")
    assert events[4:] == [("rename", "step-00000008"), ("fsync", "checkpoints")]


def dying(call: Callable[..., Any], countdown: list[int]) -> Callable[..., Any]:
    """Return `call` that ends the process, as a kill would, once the countdown is over: before or after its work."""

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] == 0:
            os._exit(9)
        result = call(*arguments, **keywords)
        countdown[0] -= 1
        if countdown[0] == 0:
            os._exit(9)
        return result

    return wrapped


def half_written(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the tensors' file in two parts, with a place to die between them."""
    content = safetensors.torch.save(tensors)
    path.write_bytes(content[: len(content) // 2])
    os.fsync(os.open(path.parent, os.O_RDONLY))
    path.write_bytes(content)


def save_and_die(folder: Path, point: int) -> None:
    """Save step 8 and prune, dying at the given place."""
    countdown = [point]
    for module, name in ((os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "rmdir"), (os, "unlink")):
        setattr(module, name, dying(getattr(module, name), countdown))
    checkpoint.save_file = half_written  # type: ignore[assignment]
    save(folder, 8)
    prune_checkpoints(folder, keep_last=2, keep_best=0, metric="top1")


def save_for_ever(folder: Path, log: Path, first: int) -> None:
    """Save and prune until killed; each finished step is reported in `log`."""
    report = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for step in range(first, 10**6):
        save(folder, step)
        os.write(report, f"{step}\n".encode())
        prune_checkpoints(folder, keep_last=2, keep_best=0, metric="top1")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start in milliseconds, forked from a server that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "resource", "safetensors.torch", "taylorvit.checkpoint"])
    return context


@pytest.mark.fault("A2")
@pytest.mark.parametrize("existing", [(2, 4), (2, 4, 8)], ids=["new step", "same step again"])
def test_every_place_to_die_inside_a_save_leaves_a_valid_newest(
    tmp_path: Path, processes: Any, existing: tuple, figures: Counter[str]
) -> None:
    died, before = 0, tmp_path / "before"
    for step in existing:
        save(before, step)
    for point in range(1, 200):
        folder = shutil.copytree(before, tmp_path / str(point))
        process = processes.Process(target=save_and_die, args=(folder, point))
        process.start()
        process.join(60)
        assert process.exitcode in (0, 9)
        died += process.exitcode == 9
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            newest = find_newest(folder)
        assert newest is not None
        assert_valid(newest, 8 if 8 in existing or newest.name.endswith("8") else 4)
        assert all(name.startswith("step-") for name in names(folder)), "leftovers are swept"
        assert [verify_checkpoint(path) for path in list_checkpoints(folder)], "none is half removed"
        shutil.rmtree(folder)
        if process.exitcode == 0:
            break
    figures["faults injected"] = died
    assert died >= 14
    assert process.exitcode == 0


@pytest.mark.fault("A1")
@pytest.mark.fault("A2")
def test_random_kills_never_cost_a_reported_checkpoint(tmp_path: Path, processes: Any, figures: Counter[str]) -> None:
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    moments, first, torn = random.Random(0), 1, 0
    for _ in range(15):
        process = processes.Process(target=save_for_ever, args=(folder, log, first))
        process.start()
        seen = log.read_text() if log.exists() else ""
        deadline = time.monotonic() + 60
        while (not log.exists() or log.read_text() == seen) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        reported = int(log.read_text().splitlines()[-1])
        torn += any(name.startswith(".") for name in names(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            newest = find_newest(folder)
        assert newest is not None
        step = int(newest.name.removeprefix("step-"))
        assert reported <= step <= reported + 1
        figures["faults injected"] += 1
        figures["updates lost, most"] = max(figures["updates lost, most"], reported - step)
        assert_valid(newest, step)
        first = step + 1
    assert torn >= 3, "the kills must hit saves for this test to mean something"


# Retention


def test_newest_best_and_milestones_are_kept(tmp_path: Path) -> None:
    scores = {1: 10.0, 2: 30.0, 3: 20.0, 4: 30.0, 5: math.nan, 6: None, 7: 5.0, 8: 1.0}
    for step, score in scores.items():
        save(tmp_path, step, metrics={} if score is None else {"top1": score}, milestone=step == 1)
    removed = prune_checkpoints(tmp_path, keep_last=2, keep_best=2, metric="top1")
    assert [path.name[-1] for path in removed] == ["3", "5", "6"]
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "2", "4", "7", "8"]
    best = best_checkpoint(tmp_path, "top1")
    assert best is not None
    assert best.name == "step-00000004"
    assert best_checkpoint(tmp_path, "ema_top1") is None


@pytest.mark.parametrize("scores", [(math.nan, 5.0), (5.0, math.nan), (math.nan, 5.0, math.nan), (math.inf, 5.0)])
def test_what_is_not_finite_is_never_the_best(tmp_path: Path, scores: tuple[float, ...]) -> None:
    for step, score in enumerate(scores):
        save(tmp_path, step, metrics={"top1": score})
    assert best_checkpoint(tmp_path, "top1") == tmp_path / f"step-{scores.index(5.0):08d}"


@pytest.mark.fault("B8")
@pytest.mark.parametrize("keep_last", [1, 0, -3])
def test_fewer_than_two_are_refused(tmp_path: Path, keep_last: int) -> None:
    with pytest.raises(ValueError, match=f"keep_last={keep_last}"):
        prune_checkpoints(tmp_path, keep_last=keep_last, keep_best=1, metric="top1")


@pytest.mark.fault("B8")
def test_failing_to_prune_warns_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(1, 7):
            save(tmp_path, step)
            prune_checkpoints(tmp_path, keep_last=2, keep_best=0, metric="top1")
    assert [str(warning.message) for warning in caught] == [
        f"cannot remove old checkpoints in {tmp_path}: Read-only file system"
    ]
    monkeypatch.undo()
    assert_valid(find_newest(tmp_path), 6)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
