"""Runs over images that cannot be read: what is skipped, listed, resumed and refused, from folders and from tars."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import as_arguments, assert_same_state, finish, history, launch, tiny_config, write_digit_folder, write_tar

from taylorvit.checkpoint import list_checkpoints
from taylorvit.config import Config, DataConfig
from taylorvit.data import most_unreadable
from taylorvit.engine import train
from taylorvit.run_folder import RunFolder

CUT_BYTES = 30


def spoil(root: Path, *names: str) -> None:
    """Cut the images with these numbers."""
    paths = [path for name in names for path in root.glob(f"*/*/{name}.png")]
    assert len(paths) == len(names)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-CUT_BYTES])


@pytest.fixture(scope="module")
def spoilt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training images, two of them damaged, and 41 for validation, one of them damaged."""
    root = write_digit_folder(tmp_path_factory.mktemp("spoilt"))
    spoil(root, "0010", "0033", "0110")
    return root


def skipping_config(data_root: Path, run_dir: Path, **changes: object) -> Config:
    return tiny_config(
        data_root, run_dir, **{"data__on_error": "skip", "data__max_bad_share": 0.03, "schedule__epochs": 2, **changes}
    )


def listed(run_dir: Path) -> list[tuple[str, str]]:
    lines = (run_dir / "bad_samples.txt").read_text().splitlines()
    return [(line.split("\t")[0], Path(line.split("\t")[2]).stem) for line in lines]


def pack(folder: Path, root: Path, dataset: str) -> Path:
    """Pack the image folder's splits, in its order: as a tar of class folders each, or as a webdataset shard."""
    for split in ("train", "val"):
        paths = sorted((folder / split).glob("*/*.png"))
        if dataset == "tar":
            write_tar(root / f"{split}.tar", {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths})
        else:
            labels = {f"{path.stem}.cls": path.parent.name.encode() for path in paths}
            write_tar(root / f"{split}-0.tar", labels | {path.name: path.read_bytes() for path in paths})
    return root


@pytest.fixture(scope="module")
def spoilt_run(spoilt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("spoilt_run") / "run"
    output = finish(launch("train.py", as_arguments(skipping_config(spoilt_folder, run_dir, data__num_workers=2))))
    assert "2 of 96 train samples cannot be read and are replaced by others" in output
    assert "1 of 41 val samples cannot be read and are left out" in output
    return run_dir


@pytest.mark.fault("D1")
@pytest.mark.usefixtures("fresh_accelerate")
def test_skipping_is_bit_identical_without_workers_and_across_a_resume(
    spoilt_folder: Path, spoilt_run: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    figures.update({"inputs tried": 3, "bytes corrupted": 3 * CUT_BYTES})
    assert sorted(listed(spoilt_run)) == [("train", "0010"), ("train", "0033"), ("val", "0110")]
    evaluations = [record for record in history(spoilt_run) if record["kind"] == "evaluate"]
    assert [(record["samples"], record["unreadable"]) for record in evaluations] == [(40, 1)] * 2
    run_dir = tmp_path / "run"
    config = skipping_config(spoilt_folder, run_dir, data__num_workers=0)
    train(config)
    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        if checkpoint.name > "step-00000004":
            shutil.rmtree(checkpoint)  # as if it had been killed after update 5
    train(replace(config, resume="auto"))
    assert history(run_dir) == history(spoilt_run)
    assert (run_dir / "bad_samples.txt").read_text() == (spoilt_run / "bad_samples.txt").read_text()
    assert_same_state(list_checkpoints(run_dir / "checkpoints")[-1], list_checkpoints(spoilt_run / "checkpoints")[-1])


@pytest.mark.fault("D1")
def test_two_processes_list_each_image_once_and_agree_to_stop(
    spoilt_folder: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    run_dir = tmp_path / "run"
    finish(launch("train.py", as_arguments(skipping_config(spoilt_folder, run_dir)), processes=2))
    assert sorted(listed(run_dir)) == [("train", "0010"), ("train", "0033"), ("val", "0110")]
    strict = skipping_config(spoilt_folder, tmp_path / "strict", data__max_bad_share=0.0001, schedule__epochs=3)
    output = finish(launch("train.py", as_arguments(strict), processes=2), code=1)
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert errors
    figures["messages given"] += 1
    assert all("2 of 96 train samples cannot be read; data.max_bad_share 0.0001 allows 1; " in line for line in errors)
    assert RunFolder(tmp_path / "strict").read_status()["state"] == "failed"
    assert sorted(name for split, name in listed(tmp_path / "strict") if split == "train") == ["0010", "0033"]


@pytest.mark.fault("D1")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("dataset", ["tar", "wds"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_images_in_tars_are_the_same_run(
    dataset: str, num_workers: int, spoilt_folder: Path, spoilt_run: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    figures["inputs tried"] = 3
    root = pack(spoilt_folder, tmp_path / "data", dataset)
    train(skipping_config(root, tmp_path / "run", data__dataset=dataset, data__num_workers=num_workers))
    assert history(tmp_path / "run") == history(spoilt_run)
    assert listed(tmp_path / "run") == listed(spoilt_run)
    place = {"tar": "train.tar/0/0010.png", "wds": "train-0.tar/0010.png"}[dataset]
    assert f"\t{root}/{place}\timage file is truncated" in (tmp_path / "run" / "bad_samples.txt").read_text()


@pytest.mark.slow
@pytest.mark.fault("D1")
@pytest.mark.parametrize("dataset", ["folder", "tar"])
def test_an_evaluation_says_of_how_many_images_it_is(
    dataset: str, spoilt_folder: Path, spoilt_run: Path, tmp_path: Path, figures: Counter[str]
) -> None:
    root = spoilt_folder if dataset == "folder" else pack(spoilt_folder, tmp_path / "data", dataset)
    arguments = [str(spoilt_run), "--step=newest", f"--data.dataset={dataset}", f"--data.root={root}"]
    for num_workers in (0, 2):
        output = finish(launch("eval.py", [*arguments, f"--data.num_workers={num_workers}"]))
        assert "judged 40 of 41 images: 1 of 41 images cannot be read, such as: cannot read image" in output
    output = finish(launch("eval.py", [*arguments, "--data.on_error=stop"]), code=2)
    assert [line for line in output.splitlines() if line.startswith("error: cannot read image") and "0110.png" in line]
    output = finish(launch("eval.py", [*arguments, "--data.max_bad_share=0"]), code=2)
    assert "data.max_bad_share 0 allows 0" in output
    figures["messages given"] += 3


def test_how_many_may_be_left_out() -> None:
    for share, total, most in (
        (0.0001, 10, 1),
        (0.0001, 10_000, 1),
        (0.0001, 10_001, 2),
        (0.07, 100, 7),
        (0, 100, 0),
        (1, 9, 9),
    ):
        assert most_unreadable(total, DataConfig(on_error="skip", max_bad_share=share)) == most
    assert most_unreadable(100, DataConfig(on_error="stop", max_bad_share=0.5)) == 0
