"""IMDB reviews as bytes: the same from folder, tar and tar.gz, balanced parts, cut where asked, and damage that is named."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from taylorvit.config import AugmentConfig, DataConfig, ModelConfig
from taylorvit.data import (
    build_dataset,
    build_eval_loader,
    build_train_loader,
    check_sequences,
    dataset_fingerprint,
    share_samples,
)
from taylorvit.engine import train
from taylorvit.run_folder import RunFolder

COUNT = 100  # reviews of each class and split


def review(split: str, name: str, number: int) -> bytes:
    """Return the text of a review: of different length and language, with a byte that is no UTF-8."""
    return f"{split} {name} {number}<br /> caf\u00e9 {'.' * (7 * number % 31)}".encode() + b"\xff"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder aclImdb, with what else is in it."""
    root = tmp_path_factory.mktemp("imdb") / "aclImdb"
    for split in ("train", "test"):
        for name in ("pos", "neg"):
            (root / split / name).mkdir(parents=True)
            for number in reversed(range(COUNT)):
                (root / split / name / f"{number}_{number % 10 + 1}.txt").write_bytes(review(split, name, number))
            (root / split / name / "._0_1.txt").write_bytes(b"hidden")
            (root / split / name / "notes.md").write_bytes(b"other")
        (root / split / "urls_pos.txt").write_text("http://example.org\n")
    (root / "train" / "unsup").mkdir()
    (root / "train" / "unsup" / "0_0.txt").write_bytes(b"no label")
    (root / "README").write_text("a data set\n")
    return root


@pytest.fixture(scope="module")
def archive(folder: Path) -> Path:
    """The folder as a tar."""
    path = folder.parent / "reviews.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "some/where/aclImdb")
    return path


def data_config(root: Path) -> DataConfig:
    return DataConfig(dataset="imdb", root=str(root), num_workers=0)


def open_split(root: Path, split: str = "train", max_length: int | None = 4000):
    return build_dataset(data_config(root), split, in_chans=3, max_length=max_length)


def test_bytes_and_labels(folder: Path) -> None:
    dataset = open_split(folder)
    assert (len(dataset), dataset.classes, dataset.vocab_size) == (2 * COUNT, ["neg", "pos"], 257)
    assert [dataset[index][1] for index in range(2 * COUNT)] == [0] * COUNT + [1] * COUNT
    for index, name, number in ((0, "neg", 0), (11, "neg", 11), (COUNT + 2, "pos", 2)):
        tokens, _ = dataset[index]
        assert tokens.dtype == torch.int64
        assert bytes(token - 1 for token in tokens.tolist()) == review("train", name, number)
        assert dataset.sample_name(index) == f"{folder}/train/{name}/{number}_{number % 10 + 1}.txt"
    assert bytes(token - 1 for token in open_split(folder, "test")[3][0].tolist()) == review("test", "neg", 3)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tgz"])
def test_an_archive_is_the_folder(kind: str, folder: Path, archive: Path, tmp_path: Path) -> None:
    path = archive
    if kind != "tar":
        path = tmp_path / f"aclImdb_v1.{kind}"
        path.write_bytes(gzip.compress(archive.read_bytes(), compresslevel=1))
    for split in ("train", "test"):
        expected, found = open_split(folder, split), open_split(path, split)
        assert [(found[i][0].tolist(), found[i][1]) for i in range(len(found))] == [
            (expected[i][0].tolist(), expected[i][1]) for i in range(len(expected))
        ]
        assert dataset_fingerprint(found) == dataset_fingerprint(expected)
    assert found.sample_name(0) == f"{path}/test/neg/0_1.txt"


def test_a_balanced_part_is_held_out(folder: Path) -> None:
    whole, fit, held = (open_split(folder, split) for split in ("train", "train[:90%]", "train[90%:]"))
    assert (len(fit), len(held)) == (180, 20)
    assert sum(held[index][1] for index in range(20)) == 10
    names = [{dataset.sample_name(index) for index in range(len(dataset))} for dataset in (whole, fit, held)]
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    assert not share_samples(fit.source, held.source)
    assert share_samples(whole.source, held.source)
    assert not share_samples(whole.source, open_split(folder, "test").source)
    assert [held.sample_name(index) for index in range(20)] == [
        open_split(folder, "train[90%:]").sample_name(index) for index in range(20)
    ]


def test_long_reviews_are_cut(folder: Path) -> None:
    whole, cut = open_split(folder, max_length=None), open_split(folder, max_length=20)
    assert (cut.max_length, whole.max_length) == (20, max(len(whole[index][0]) for index in range(2 * COUNT)))
    assert open_split(folder, max_length=4000).max_length == whole.max_length
    for index in range(2 * COUNT):
        assert cut[index][0].tolist() == whole[index][0][:20].tolist()
    model = ModelConfig(name="taylorvit_sequence", vocab_size=257, max_length=20, kwargs={"padding_idx": 0})
    check_sequences(cut, model)
    with pytest.raises(ValueError, match="model.max_length is 20, but the data needs "):
        check_sequences(whole, model)


@pytest.mark.parametrize("crop", ["none", "random_window"])
def test_training_may_read_a_random_window(folder: Path, crop: str) -> None:
    """A window is a function of seed, epoch and index: workers, processes and the place in the epoch change none."""
    whole, cut = open_split(folder, max_length=None), open_split(folder, max_length=20)

    def epoch_of(epoch: int, *, seed: int = 3, workers: int = 0, processes: int = 1, start: int = 0) -> dict[int, list[int]]:
        """Return the tokens that each review gave, by its index."""
        found = {}
        for rank in range(processes):
            loader = build_train_loader(
                cut,
                data=replace(data_config(folder), num_workers=workers),
                augment=AugmentConfig(crop=crop),  # type: ignore[arg-type]
                img_size=224,
                seed=seed,
                micro_batch_size=8 // processes,
                rank=rank,
                world_size=processes,
                accumulation=1,
            )
            loader.set_position(epoch, start)
            keys = [index for batch in loader.batch_sampler for _, index in batch]
            rows = [row[row != 0].tolist() for tokens, _ in loader for row in tokens]
            found |= dict(zip(keys, rows, strict=True))
        return found

    first, second = epoch_of(0), epoch_of(1)
    starts = set()
    for index, tokens in first.items():
        text = whole[index][0].tolist()
        places = [at for at in range(max(1, len(text) - 19)) if text[at : at + 20] == tokens]
        assert places, index
        starts |= {(places[0], len(text))}
    if crop == "none":
        assert {at for at, _ in starts} == {0}
    else:
        assert any(at == 0 for at, _ in starts)
        assert any(at == length - 20 for at, length in starts)
        assert sum(first[index] != second[index] for index in first) > 150
        assert sum(first[index] != tokens for index, tokens in epoch_of(0, seed=4).items()) > 150
    assert epoch_of(0, workers=2) == first
    assert epoch_of(0, processes=2) == first
    assert epoch_of(1, start=20) == {index: second[index] for index in list(second)[160:]}
    evaluated = build_eval_loader(cut, data=data_config(folder), img_size=224, batch_size=50, rank=0, world_size=1)
    for tokens, _, indices in evaluated:
        for row, index in zip(tokens, indices.tolist()):
            assert row[row != 0].tolist() == whole[index][0][:20].tolist()


def test_batches_are_filled_up(folder: Path) -> None:
    dataset = open_split(folder, "test")
    loader = build_eval_loader(dataset, data=data_config(folder), img_size=224, batch_size=7, rank=1, world_size=3)
    tokens, labels, indices = next(iter(loader))
    lengths = [len(dataset[index][0]) for index in indices.tolist()]
    assert indices.tolist() == [1, 4, 7, 10, 13, 16, 19]
    assert tokens.shape == (7, max(lengths))
    assert (tokens != 0).sum(dim=1).tolist() == lengths
    assert labels.tolist() == [0] * 7


@pytest.mark.parametrize(("split", "message"), [("val", "train[:90%] and train[90%:]"), ("unsup", "it has train, test")])
def test_other_splits_are_refused(folder: Path, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"imdb has no split '{split}'.*{re.escape(message)}"):
        open_split(folder, split)


def test_what_is_no_imdb_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing' must be the folder aclImdb or a file .tar, .tar.gz, .tgz"):
        open_split(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"README' must be the folder aclImdb"):
        open_split(folder / "README")
    with pytest.raises(ValueError, match=f"no folder {folder.parent}/train/neg; .* must be aclImdb itself, it holds aclImdb"):
        open_split(folder.parent)
    with pytest.raises(ValueError, match="no folder .*/train/neg; .* it holds nothing"):
        open_split(tmp_path)
    for name in ("neg", "pos"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "neg" / "0_1.txt").write_bytes(b"bad")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no reviews train/pos/"):
        open_split(tmp_path)
    (tmp_path / "train" / "pos" / "0_9.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"the review {tmp_path}/train/pos/0_9.txt is empty"):
        open_split(tmp_path)


def test_archives_without_reviews_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("aclImdb/train/neg/0_1.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"bad"))
    with pytest.raises(ValueError, match=f"{path} holds no reviews train/pos/"):
        open_split(path)
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=f"{path}: not a readable archive"):
        open_split(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path}: not a readable archive"):
        open_split(path)
    shutil.copy(path, tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="a.tar.gz: not a readable archive"):
        open_split(tmp_path / "a.tar.gz")


def test_a_cut_archive_is_refused_wherever_it_is_cut(archive: Path, tmp_path: Path) -> None:
    """In the middle of a review or of a header, or between two; tarfile itself takes the last two for the end."""
    content = archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = [info for info in tar if info.isfile() and "/test/neg/" in info.name]
    start = members[50].offset
    for size in (start, start + 100, start + 512, start + 515):
        path = tmp_path / "cut.tar"
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut.tar: (the archive is cut or damaged after|not a readable archive)"):
            open_split(path)
    damaged = bytearray(content)
    damaged[start : start + 512] = b"x" * 512
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cut.tar: .*cut or damaged after"):
        open_split(path)


def test_a_damaged_gzip_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    packed = bytearray(gzip.compress(archive.read_bytes(), compresslevel=1))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"a.tar.gz: not a readable archive"):
        open_split(path)
    for byte in range(0, 256, 16):
        damaged = bytearray(packed)
        damaged[len(packed) // 2 : len(packed) // 2 + 200] = bytes([byte]) * 200
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.tar.gz: (not a readable archive|the archive is cut or damaged)"):
            open_split(path)


def test_the_fingerprint_knows_the_texts(tmp_path: Path) -> None:
    for name in ("neg", "pos"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0_1.txt").write_bytes(b"good")
    before = dataset_fingerprint(open_split(tmp_path))
    (tmp_path / "train" / "neg" / "0_1.txt").write_bytes(b"poor")
    assert dataset_fingerprint(open_split(tmp_path)) != before


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_of_it(folder: Path, tmp_path: Path) -> None:
    off = {"crop": "none", "hflip": 0.0, "color_jitter": 0.0, "auto_augment": None, "random_erasing": 0.0}
    off |= {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    settings = {f"augment__{key}": value for key, value in off.items()} | {
        "model__name": "taylorvit_sequence",
        "model__num_classes": 2,
        "model__vocab_size": 257,
        "model__max_length": 24,
        "model__kwargs": {"padding_idx": 0},
        "model__img_size": 224,
        "model__patch_size": None,
        "data__dataset": "imdb",
        "data__train_split": "train[:90%]",
        "data__val_split": "train[90%:]",
        "schedule__epochs": 1,
        "schedule__warmup_epochs": 0.0,
    }
    assert train(tiny_config(folder, tmp_path / "run", **settings)) == 0
    (logged,) = [record for record in RunFolder(tmp_path / "run").read_metrics() if record["kind"] == "evaluate"]
    assert (logged["samples"], logged["top5"]) == (20, 100)
