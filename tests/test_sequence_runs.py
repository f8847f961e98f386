"""Whole runs of a sequence model: train.py's engine and eval.py treat sequences as they treat images."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import assert_same_state, history, tiny_config

import eval as program
from taylorvit.checkpoint import list_checkpoints
from taylorvit.config import Config
from taylorvit.engine import dry_run, train
from taylorvit.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OFF = {
    "augment__crop": "none",
    "augment__hflip": 0.0,
    "augment__color_jitter": 0.0,
    "augment__auto_augment": None,
    "augment__random_erasing": 0.0,
    "augment__mixup_alpha": 0.0,
    "augment__cutmix_alpha": 0.0,
}


def sequence_config(root: Path, run_dir: Path, **changes: object) -> Config:
    """Return a config of the pixel task over 8 x 8 images, with workers, drop path, accumulation, LAMB and EMA on."""
    model = {"model__name": "taylorvit_sequence", "model__vocab_size": 256, "model__max_length": 64}
    images = {"model__img_size": 224, "model__patch_size": None, "data__dataset": "pixels/folder", "schedule__epochs": 2}
    return tiny_config(root, run_dir, **{**model, **images, **OFF, **changes})


@pytest.fixture(scope="module")
def undisturbed(digit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("sequences") / "run"
    assert train(sequence_config(digit_folder, run_dir)) == 0
    return run_dir


def test_a_resumed_run_is_the_run_that_was_not_interrupted(undisturbed: Path, digit_folder: Path, tmp_path: Path) -> None:
    config = sequence_config(digit_folder, tmp_path / "run", schedule__stop_epoch=1)
    assert train(config) == 0
    assert train(replace(config, resume="auto", schedule=replace(config.schedule, stop_epoch=None))) == 0
    assert history(tmp_path / "run") == history(undisturbed)
    pair = [list_checkpoints(folder / "checkpoints")[-1] for folder in (tmp_path / "run", undisturbed)]
    assert_same_state(*pair)


def test_eval_gives_what_training_logged_for_run_and_export(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logged = [record for record in RunFolder(undisturbed).read_metrics() if record["kind"] == "evaluate"][-1]
    for path in (undisturbed, undisturbed / "export"):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        file = tmp_path / f"{path.name}.json"
        monkeypatch.setattr(sys, "argv", ["eval.py", str(path), f"--json={file}"])
        assert program.main() == 0
        (row,) = json.loads(file.read_text())
        assert row["images"] == logged["samples"] == 41
        assert row["top1"] == row["logged_top1"] or path.name == "export"
        assert row["img_size"] is None
    exported = timm.create_model(f"local-dir:{undisturbed / 'export'}", pretrained=True)
    assert exported(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 10)


def test_a_dry_run_speaks_of_sequences(digit_folder: Path, tmp_path: Path) -> None:
    text = "\n".join(dry_run(sequence_config(digit_folder, tmp_path / "run")))
    assert "pixels/folder at" in text
    assert "96 training and 41 validation sequences, 10 classes" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment__hflip": 0.5}, "augment.hflip is 0.5, but sequences are not augmented"),
        ({"train__channels_last": True}, "train.channels_last: true is for images"),
        ({"model__max_length": 63}, "model.max_length is 63, but the data needs 64"),
        ({"data__dataset": "folder"}, "which reads sequences, but data.dataset holds images"),
    ],
)
def test_what_does_not_fit_sequences_is_refused(changes: dict, message: str, digit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(sequence_config(digit_folder, tmp_path / "run", **changes))
