"""Records in metrics.jsonl, TensorBoard and on the console; pictures of what is trained on; silence on other processes."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from taylorvit.config import LogConfig
from taylorvit.logger import Logger
from taylorvit.run_folder import RunFolder

CLASSES = [f"class{number}" for number in range(10)]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def build(run: RunFolder, *, active: bool = True, update: int = 0, total: int = 100, **settings: Any) -> Logger:
    return Logger(run, LogConfig(**settings), active=active, update=update, total_updates=total)


def events(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard), size_guidance={"histograms": 0}).Reload()  # 0 keeps all of them


def scalars(run: RunFolder, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events(run).Scalars(tag)}


# ---- records


def test_records_reach_the_file_tensorboard_and_the_console(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    logger = build(run)
    logger.record("train", update=1, epoch=1, values={"loss": 2.5, "lr": 1e-5, "mfu": None, "peak_memory_bytes": 2**30})
    logger.record("train", update=2, epoch=1, values={"loss": torch.tensor(1.5).item(), "images_per_second": 12345.6})
    logger.record("evaluate", update=2, epoch=1, values={"top1": 50.0, "samples": 41})
    logger.close()
    first, second, third = run.read_metrics()
    assert first == {
        "kind": "train", "update": 1, "epoch": 1, "loss": 2.5, "lr": 1e-5, "mfu": None, "peak_memory_bytes": 2**30
    }  # fmt: skip
    assert (second["loss"], third["kind"], third["top1"]) == (1.5, "evaluate", 50.0)
    assert scalars(run, "train/loss") == {1: 2.5, 2: 1.5}
    assert scalars(run, "evaluate/samples") == {2: 41.0}
    assert "train/mfu" not in events(run).Tags()["scalars"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("[train] epoch 1  update 1/100  loss 2.5  lr 1e-05  peak_memory_bytes 1024 MiB  left ")
    assert "images_per_second 12,346" in lines[1]
    assert "mfu" not in lines[0]


def test_values_that_are_no_numbers_are_recorded_too(run: RunFolder) -> None:
    logger = build(run)
    logger.record(
        "train", update=1, epoch=1, values={"loss": float("nan"), "grad_norm": float("inf"), "zero": 0.0, "minus": -0.001}
    )
    logger.close()
    assert run.read_metrics()[0]["loss"] == "nan"
    assert np.isnan(scalars(run, "train/loss")[1])
    assert scalars(run, "train/grad_norm")[1] == float("inf")


def test_a_resumed_run_replaces_what_the_interrupted_one_had_written_further_on(run: RunFolder) -> None:
    first = build(run)
    for update in range(1, 11):
        first.record("train", update=update, epoch=1, values={"loss": 1.0})
    first.close()
    second = build(run, update=6)
    for update in (7, 8):
        second.record("train", update=update, epoch=1, values={"loss": 2.0})
    second.close()
    assert scalars(run, "train/loss") == dict.fromkeys(range(1, 7), 1.0) | {7: 2.0, 8: 2.0}


def test_without_tensorboard_there_is_no_event_file(run: RunFolder) -> None:
    logger = build(run, tensorboard=False)
    logger.record("train", update=1, epoch=1, values={"loss": 1.0})
    logger.temperatures(nn.Linear(1, 1), 1)
    logger.close()
    assert not run.tensorboard.exists()
    assert len(run.read_metrics()) == 1


@pytest.mark.fault("B11")
def test_a_file_in_place_of_the_tensorboard_folder_costs_one_warning(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.tensorboard.write_text("")
    logger = build(run)
    for update in (1, 2):
        logger.record("train", update=update, epoch=1, values={"loss": 1.0})
    logger.temperatures(Temperatures(), 2)
    logger.close()
    assert len(run.read_metrics()) == 2
    assert capsys.readouterr().out.count("warning: TensorBoard or its pictures end here") == 1


@pytest.mark.fault("B11")
def test_a_disk_that_fills_up_under_tensorboard_costs_one_warning(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = build(run)
    logger.record("train", update=1, epoch=1, values={"loss": 1.0})
    assert logger.writer is not None

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logger.writer, "add_scalar", full)
    for update in (2, 3):
        logger.record("train", update=update, epoch=1, values={"loss": 1.0})
    logger.close()
    assert len(run.read_metrics()) == 3
    assert capsys.readouterr().out.count("No space left on device; training goes on with metrics.jsonl") == 1


@pytest.mark.fault("B11")
def test_metrics_that_cannot_be_written_are_an_error(run: RunFolder) -> None:
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        build(run, tensorboard=False).record("train", update=1, epoch=1, values={"loss": 1.0})


def test_a_process_that_is_not_the_main_one_is_silent(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = build(run, active=False)
    logger.say("hello")
    logger.advance(3)
    logger.record("train", update=1, epoch=1, values={"loss": 1.0})
    logger.images(torch.rand(2, 3, 8, 8), torch.eye(10)[:2], CLASSES, [0.0], [1.0])
    logger.temperatures(Temperatures(), 1)
    logger.close()
    assert list(run.path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# ---- console


def test_without_a_terminal_there_are_plain_lines(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    logger = build(run, tensorboard=False)
    logger.say("one line")
    logger.advance(1)
    logger.record("train", update=1, epoch=1, values={"loss": 1.0})
    logger.close()
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 2
    assert "\r" not in output.out
    assert "\x1b" not in output.out


def test_on_a_terminal_there_is_a_bar(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = build(run, tensorboard=False, update=40)
    assert logger.bar is not None
    logger.advance(43)
    assert (logger.bar.n, logger.bar.initial, logger.bar.total) == (43, 40, 100)
    logger.say("one line")
    logger.close()
    output = capsys.readouterr()
    assert "one line\n" in output.out
    assert "/100" in output.err


def test_time_left_counts_this_start_only(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("taylorvit.logger.time.monotonic", lambda: now[0])
    logger = build(run, tensorboard=False, update=10, total=60)
    now[0] += 100.0
    logger.record("train", update=20, epoch=1, values={"loss": 1.0})
    now[0] += 3600.0
    logger.record("train", update=20, epoch=1, values={"loss": 1.0})
    logger.record("evaluate", update=60, epoch=1, values={})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("left ")[1] for line in lines] == ["0:06:40", "4:06:40", "0:00:00"]


def test_time_left_before_the_first_update(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    build(run, tensorboard=False, update=10).record("evaluate", update=10, epoch=1, values={"top1": 1.0})
    assert "left 0:00:00" in capsys.readouterr().out


# ---- pictures


def grid_of(run: RunFolder, images: Tensor, targets: Tensor, mean: list[float], std: list[float]) -> np.ndarray:
    logger = build(run)
    logger.images(images, targets, CLASSES, mean, std)
    logger.close()
    with Image.open(run.path / "train_images.png") as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("count", "channels", "side", "width", "height"),
    [
        (16, 1, 32, 4 * 100 + 4, 4 * 114 + 4),  # small images are enlarged to 96 pixels, 14 more hold the label
        (5, 3, 32, 4 * 100 + 4, 2 * 114 + 4),
        (2, 3, 224, 2 * 228 + 4, 242 + 4),
        (4, 1, 28, 4 * 88 + 4, 102 + 4),  # 3 x 28
    ],
)
def test_the_grid_has_the_right_size(run: RunFolder, count: int, channels: int, side: int, width: int, height: int) -> None:
    targets = torch.eye(10)[torch.arange(count) % 10]
    pixels = grid_of(run, torch.rand(count, channels, side, side), targets, [0.5] * channels, [0.5] * channels)
    assert pixels.shape == (height, width, 3)
    (shown,) = events(run).Images("train/images")
    assert (shown.width, shown.height, shown.step) == (width, height, 0)


def test_the_grid_shows_the_images_as_they_were_before_normalising(run: RunFolder) -> None:
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.4, 0.6]])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = ((colours - torch.tensor(mean)) / torch.tensor(std))[:, :, None, None].expand(2, 3, 96, 96)
    pixels = grid_of(run, images, torch.eye(10)[:2], mean, std)
    assert pixels[50, 50].tolist() == pytest.approx([255, 0, 0], abs=1)
    assert pixels[50, 150].tolist() == pytest.approx([51, 102, 153], abs=1)


def test_the_grid_of_grey_images_and_single_means(run: RunFolder) -> None:
    pixels = grid_of(run, torch.full((4, 1, 96, 96), 2.0), torch.eye(10)[:4], [0.2], [0.1])
    assert pixels[50, 50].tolist() == [102, 102, 102]


def test_the_grid_clips_what_augmentation_threw_out_of_range(run: RunFolder) -> None:
    images = torch.stack([torch.full((1, 96, 96), value) for value in (-1.5, 2.5)])
    pixels = grid_of(run, images, torch.eye(10)[:2], [0.0], [1.0])
    assert (pixels[50, 50].tolist(), pixels[50, 150].tolist()) == ([0, 0, 0], [255, 255, 255])


def test_labels_stand_below_their_images(run: RunFolder) -> None:
    mixed = torch.zeros(3, 10)
    mixed[0, 3] = 1.0
    mixed[1, 3], mixed[1, 7] = 0.7, 0.3
    mixed[2] = 0.1  # smoothed to nothing: no class stands out
    pixels = grid_of(run, torch.zeros(3, 1, 96, 96), mixed, [0.0], [1.0])
    captions = [pixels[100:114, 4 + 100 * column : 100 + 100 * column] for column in range(3)]
    widths = [int((caption > 100).any(axis=(0, 2)).sum()) for caption in captions]  # columns with ink
    assert widths[1] > 1.2 * widths[0] > 0
    assert widths[2] == 0


def test_images_may_be_few_and_in_half_precision(run: RunFolder) -> None:
    pixels = grid_of(run, torch.zeros(1, 3, 96, 96, dtype=torch.bfloat16), torch.ones(1, 1), [0.5], [0.5])
    assert pixels.shape == (110, 96, 3)


class Temperatures(nn.Module):
    """Two layers with a temperature and one parameter that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for layer, block in enumerate(self.blocks):
            block.temperature = nn.Parameter(torch.arange(3.0) + 10 * layer)
        self.weight = nn.Parameter(torch.zeros(3))


def test_temperatures_are_histograms_by_layer(run: RunFolder) -> None:
    logger = build(run)
    logger.temperatures(Temperatures(), 5)
    logger.temperatures(Temperatures().bfloat16(), 9)
    logger.close()
    found = events(run)
    assert found.Tags()["histograms"] == ["temperature/blocks.0.temperature", "temperature/blocks.1.temperature"]
    first, second = found.Histograms("temperature/blocks.1.temperature")
    assert (first.step, second.step) == (5, 9)
    assert (first.histogram_value.min, first.histogram_value.max, first.histogram_value.num) == (10.0, 12.0, 3)
