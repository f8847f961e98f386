"""Files of strangers: none runs code, loads another file, writes outside its folder or keeps a reader waiting."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taylorvit.config import ModelConfig
from taylorvit.data.imdb import Imdb
from taylorvit.data.webdataset import build_shard_source, build_tar_source
from taylorvit.models import build_model
from taylorvit.saving import _named_step
from taylorvit.weights import load_weights
from tools import convert_checkpoint, export_checkpoint


class Canary:
    """Unpickling this makes a folder, unless the reader refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def write_legacy_tar(path: Path, content: Any) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def write_script_archive(path: Path, content: Any) -> None:
    """Write what torch.jit.save would, with a hostile pickle for its data."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(content, protocol=2))
        archive.writestr("archive/code/__torch__.py", "op_version_set = 1\n")
        archive.writestr("archive/version", "3\n")


FORMATS: dict[str, Callable[[Path, Any], Any]] = {
    "zip": lambda path, content: torch.save(content, path),
    "legacy": lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path, content: path.write_bytes(pickle.dumps(content, protocol=2)),
    "legacy tar": write_legacy_tar,
    "TorchScript": write_script_archive,
}
PLACES = ("x.pth", "x.bin", "x.pth.tar", "x.safetensors", "step", "export")
CARD = {"architecture": "x", "pretrained_cfg": {"mean": 1, "std": 1, "crop_pct": 1, "interpolation": 1}}
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "load_weights": lambda path, out: load_weights(path),
    "convert": lambda path, out: convert_checkpoint.convert(path, out),
    "export": lambda path, out: export_checkpoint.export_checkpoint(path, out),
}


def plant(folder: Path, place: str, write: Callable[[Path, Any], Any], content: Any) -> Path:
    """Write the hostile content where a file, a step folder or an export folder has its files."""
    path = folder / place
    if place == "step":
        path.mkdir()
        for name in ("state.safetensors", "meta.json", "manifest.json"):
            write(path / name, content)
    elif place == "export":
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CARD))
        write(path / "model.safetensors", content)
    else:
        write(path, content)
    return path


@pytest.mark.fault("C1")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FORMATS)
def test_no_reader_runs_what_a_file_asks_for(
    tmp_path: Path, kind: str, place: str, record_property: Callable[[str, Any], None]
) -> None:
    canary, tried = tmp_path / "canary", 0
    for number, content in enumerate(
        (Canary(canary), {"state_dict": {"w": Canary(canary)}}, {"args": [{"a": Canary(canary)}]})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = plant(folder, place, FORMATS[kind], content)
        for read in READERS.values():
            with pytest.raises(ValueError, match=place) as caught:
                read(path, folder / "out")
            assert "\n" not in str(caught.value)
            assert not (folder / "out").exists()
            tried += 1
        assert not canary.exists()
    record_property("hostile files read", tried)
    record_property("code executions", int(canary.exists()))


@pytest.mark.fault("C1")
def test_the_canary_sings_for_a_careless_reader(tmp_path: Path) -> None:
    torch.load(plant(tmp_path, "x.pth", FORMATS["zip"], Canary(tmp_path / "canary")), weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "taylorvit_tiny_patch16_224", "resnet18"])
def test_a_configuration_cannot_make_timm_load_a_file(tmp_path: Path, name: str, key: str) -> None:
    attention = "taylorshift" if name.startswith("taylorvit") else "softmax"
    with pytest.raises(ValueError, match=f"model.kwargs .*{key}"):
        build_model(ModelConfig(name=name, attention=attention, kwargs={key: str(tmp_path)}), device="meta")


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "../../x"])
def test_a_model_name_cannot_be_a_place(name: str) -> None:
    with pytest.raises(ValueError, match="no model"):
        build_model(ModelConfig(name=name, attention="softmax"))


@pytest.mark.fault("C6")
@pytest.mark.parametrize("file", ["step/manifest.json", "export/config.json", "export/model.safetensors", "x.pth"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, file: str) -> None:
    place = file.partition("/")[0]
    path = plant(tmp_path, place, FORMATS["pickle"], {})
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(ValueError, match="it is (no|neither a) file"):
        load_weights(path)


def test_resume_takes_no_folder_of_pickles(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    path.mkdir()
    FORMATS["zip"](path / "optimizer.bin", Canary(tmp_path / "canary"))
    with pytest.raises(ValueError, match="is not auto, never or a step folder"):
        _named_step(str(path))
    assert not (tmp_path / "canary").exists()


def write_hostile_tar(path: Path, prefix: str, suffix: str, claimed: int = 0) -> None:
    """Write members that point out of the archive, and one honest or with a size that it has not."""
    with tarfile.open(path, "w") as archive:
        for name in (f"/abs/{prefix}/a{suffix}", f"../../{prefix}/b{suffix}"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            archive.addfile(entry, io.BytesIO(b"abc"))
        for kind, name in ((tarfile.SYMTYPE, "s"), (tarfile.LNKTYPE, "h"), (tarfile.CHRTYPE, "c"), (tarfile.FIFOTYPE, "f")):
            entry = tarfile.TarInfo(f"{prefix}/{name}{suffix}")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        if claimed:
            entry = tarfile.TarInfo(f"{prefix}/huge{suffix}")
            entry.size = claimed
            archive.fileobj.write(entry.tobuf())  # type: ignore[union-attr]


@pytest.mark.fault("D1")
def test_archives_are_read_in_place_and_nothing_outside_of_them(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write_hostile_tar(root / "train.tar", "cat", ".png")
    source = build_tar_source(root, "train")
    assert {source.read(index)[0].read() for index in range(len(source))} == {b"abc"}  # no link, no device
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".taylorvit-tar-train.json", "data", "train.tar"]


@pytest.mark.fault("D1")
@pytest.mark.parametrize("claimed", [2**33 - 1, 2**45])
def test_sizes_that_a_header_claims_are_not_believed(tmp_path: Path, claimed: int) -> None:
    write_hostile_tar(tmp_path / "reviews.tar", "train/neg", ".txt", claimed)
    with pytest.raises(ValueError, match=r"reviews\.tar"):
        Imdb(tmp_path / "reviews.tar", "train")
    write_hostile_tar(tmp_path / "x-train-0.tar", "", ".cls", claimed)
    with pytest.raises(ValueError, match=r"x-train-0\.tar"):
        build_shard_source(tmp_path, "train")
