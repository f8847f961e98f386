"""tools/make_listops.py: the files are a function of the options, nothing is there twice, and nothing is ever replaced."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from helpers import ROOT, run_tool

from taylorvit.data.listops import ListOps, ReferenceLines, Shape, value_of
from tools import make_listops

SMALL = ["--num_train", "300", "--num_val", "30", "--num_test", "20", "--min_length", "4", "--max_length", "20"]
NAMES = ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv", "listops.json"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, made by the program itself."""
    folder = tmp_path_factory.mktemp("made") / "new" / "listops"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_tool(monkeypatch, make_listops.main, "--out", str(folder), *SMALL) == 0
    return folder


def test_the_files_are_what_was_asked_for(made: Path) -> None:
    assert list(contents(made)) == NAMES
    splits = {split: ListOps(made, split) for split in ("train", "val", "test")}
    assert [len(samples) for samples in splits.values()] == [300, 30, 20]
    texts = [samples.content(index) for samples in splits.values() for index in range(len(samples))]
    assert len(set(texts)) == 350
    assert {len(text) for text in texts} == set(range(5, 20))
    for samples in splits.values():
        assert samples.labels.tolist() == [value_of(samples.content(index)) for index in range(len(samples))]
    assert (made / "basic_val.tsv").read_text().startswith("Source\tTarget\n[")


def test_the_manifest_holds_options_checksums_and_lines(made: Path) -> None:
    manifest = json.loads((made / "listops.json").read_text())
    shape = {"min_length": 4, "max_length": 20, "max_depth": 10, "max_args": 10}
    assert manifest["parameters"] == {"seed": 0, "num_train": 300, "num_val": 30, "num_test": 20, **shape}
    assert sorted(manifest["files"]) == NAMES[:3]
    lines = ReferenceLines(ListOps(made, "train"))
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((made / name).read_bytes()).hexdigest()
        samples = ListOps(made, name[6:-4])
        assert entry["samples"] == len(samples)
        assert entry["tokens"]["max"] == samples.longest
        assert entry["reference_lines"] == pytest.approx(lines.accuracy(samples), abs=0.01)


@pytest.mark.parametrize("jobs", [1, 2])
def test_neither_hash_seed_nor_jobs_change_the_files(made: Path, tmp_path: Path, jobs: int) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_listops.py"), "--out", str(tmp_path), *SMALL, "--jobs", str(jobs)],
        env=os.environ | {"PYTHONHASHSEED": str(jobs), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    assert contents(tmp_path) == contents(made)


def number_itself(block: int) -> list[tuple[bytes, int]]:
    return [(b"", block)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_blocks_come_in_order_and_none_is_left_out(jobs: int) -> None:
    blocks = list(islice(make_listops._blocks(number_itself, jobs), 30))
    assert blocks == [number_itself(number) for number in range(30)]


def test_these_options_give_these_very_files(made: Path) -> None:
    """Whoever changes the way from a seed to the files must raise VERSION with it."""
    manifest = json.loads((made / "listops.json").read_text())
    assert manifest["version"] == make_listops.VERSION == 1
    assert manifest["files"]["basic_train.tsv"]["sha256"].startswith("a20e07e568a9204c")


def test_another_seed_gives_other_files(made: Path) -> None:
    shape = Shape(min_length=4, max_length=20)
    first, second = (list(islice(make_listops.draw_samples(seed, shape, jobs=1), 300)) for seed in (0, 1))
    train = ListOps(made, "train")
    assert [train.content(index) for index in range(300)] == [tokens for tokens, _ in first]
    assert len(set(first) & set(second)) < 100


def test_the_same_command_again_checks_and_keeps_the_files(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, times = contents(made), [path.stat().st_mtime_ns for path in made.iterdir()]
    assert run_tool(monkeypatch, make_listops.main, "--out", str(made), *SMALL, "--jobs", "2") == 0
    printed = capsys.readouterr().out
    assert f"was already in {made}" in printed
    row = next(line for line in printed.splitlines() if line.startswith("train"))
    lines = json.loads(before["listops.json"])["files"]["basic_train.tsv"]["reference_lines"]
    assert [f"{value:.2f}" for value in lines.values()] == row.replace("%", "").split()[-3:]
    assert (contents(made), [path.stat().st_mtime_ns for path in made.iterdir()]) == (before, times)


def test_files_of_other_options_are_not_replaced(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(made)
    assert run_tool(monkeypatch, make_listops.main, "--out", str(made), *SMALL, "--seed", "1") == 2
    assert "holds files of other options" in capsys.readouterr().err
    assert contents(made) == before


@pytest.mark.parametrize("name", NAMES[:3])
def test_files_without_a_manifest_are_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert run_tool(monkeypatch, make_listops.main, "--out", str(tmp_path), *SMALL) == 2
    assert f"holds {name} without listops.json" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("basic_val.tsv", "changed", "basic_val.tsv is missing or is not what listops.json says"),
        ("basic_val.tsv", None, "basic_val.tsv is missing or is not what listops.json says"),
        ("listops.json", "[]", "not a manifest of this tool"),
        ("listops.json", "{", "not a manifest of this tool"),
        ("listops.json", '{"version": 1, "parameters": {}, "files": []}', "not a manifest of this tool"),
    ],
)
def test_a_changed_set_is_refused(
    name: str,
    content: str | None,
    message: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, data in contents(made).items():
        (tmp_path / file).write_bytes(data)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    assert run_tool(monkeypatch, make_listops.main, "--out", str(tmp_path), *SMALL) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    describe = make_listops.describe_files

    def slow_describe(*arguments: object) -> dict:
        (tmp_path / "basic_val.tsv").write_text("mine")
        return describe(*arguments)

    monkeypatch.setattr(make_listops, "describe_files", slow_describe)
    assert run_tool(monkeypatch, make_listops.main, "--out", str(tmp_path), *SMALL) == 2
    assert "basic_val.tsv has appeared meanwhile" in capsys.readouterr().err
    assert (tmp_path / "basic_val.tsv").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_too_many_samples_of_a_length_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are ten expressions of one token."""
    monkeypatch.setattr(make_listops, "MOST_FRUITLESS", 2)
    arguments = ["--out", str(tmp_path), "--min_length", "0", "--max_length", "2"]
    assert run_tool(monkeypatch, make_listops.main, *arguments) == 2
    assert "attempts brought no new sample after 10: ask for fewer, or for other lengths than 0 to 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_impossible_lengths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_tool(monkeypatch, make_listops.main, "--out", str(tmp_path), "--min_length", "30", "--max_length", "30") == 2
