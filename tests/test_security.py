"""Files of strangers: none runs code, loads another file, writes outside its folder or keeps a reader waiting."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Canary, as_arguments, finish, launch, tiny_config, write_legacy_tar
from safetensors.torch import load_file, save_file

from taylorvit.checkpoint import _manifest, list_checkpoints, read_meta
from taylorvit.config import Config, ModelConfig
from taylorvit.data.imdb import Imdb
from taylorvit.data.webdataset import build_shard_source, build_tar_source
from taylorvit.distributed import build_accelerator
from taylorvit.engine import train
from taylorvit.models import build_model
from taylorvit.run_folder import RunFolder
from taylorvit.saving import _named_step, describe_start, restore
from taylorvit.session import Session, build_session
from taylorvit.training_state import CheckpointError, encode
from taylorvit.weights import load_weights
from tools import convert_checkpoint, export_checkpoint


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
def test_no_reader_runs_what_a_file_asks_for(tmp_path: Path, kind: str, place: str, figures: Counter[str]) -> None:
    canary = tmp_path / "canary"
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
        assert not canary.exists()
    figures["code executions"] = int(canary.exists())


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


@pytest.fixture(scope="module")
def trained(digit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a run of one epoch whose step folder is the best there is to go on from."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_config(digit_folder, run_dir, schedule__stop_epoch=1, data__num_workers=0, checkpoint__every_updates=None)
    assert train(config) == 0
    return config


@pytest.fixture
def session(trained: Config, fresh_accelerate: None) -> Session:
    return build_session(trained, build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=60))


def newest(config: Config) -> Path:
    return list_checkpoints(Path(config.run_dir) / "checkpoints")[-1]


def resign(step: Path, meta: dict[str, Any]) -> None:
    """Write another meta.json and the manifest that goes with it, as anybody can."""
    (step / "meta.json").write_text(json.dumps(encode(meta, "meta")))
    (step / "manifest.json").write_text(_manifest(step, int(step.name[-8:])))


ODD: tuple[Any, ...] = (None, 7, "x", [], [1], {}, {"a": 1}, [[1]], True)
RESUMED = ("config", "progress", "split", "data", "environment", "state")
BELOW = ("progress.update", "progress.best", "progress.epoch_loss", "environment.packages", "state.ema", "state.scaler")
BELOW += ("state.optimizer", *(f"state.optimizer.{key}" for key in ("class", "names", "groups", "state")), "data.train")
BELOW += ("state.optimizer.state.0", "state.optimizer.state.0.exp_avg", "state.optimizer.groups.0")


@pytest.mark.fault("C1")
@pytest.mark.parametrize("key", [*RESUMED, *BELOW])
def test_a_signed_checkpoint_of_a_stranger_is_restored_or_named(
    key: str, trained: Config, session: Session, tmp_path: Path, figures: Counter[str]
) -> None:
    """The manifest fits: nothing but what is read says that a key is gone, or holds something else."""
    refused = 0
    for number, odd in enumerate((*ODD, "remove")):
        step = tmp_path / str(number) / newest(trained).name
        shutil.copytree(newest(trained), step)
        meta = json.loads((step / "meta.json").read_text())
        place, last = meta, key.split(".")[-1]
        for part in key.split(".")[:-1]:
            place = place[int(part)] if isinstance(place, list) else place[part]
        index: Any = int(last) if isinstance(place, list) else last
        if odd == "remove":
            del place[index]
        else:
            place[index] = odd
        resign(step, meta)
        try:
            restore(session, step)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message
            assert str(step) in message or message.startswith(("resume: ", "the checkpoint ", "parameter group ")), message
            refused += 1
        if key == "config" and not isinstance(odd, dict):
            with pytest.raises(CheckpointError, match=r"meta\.json: config is "):
                describe_start(replace(trained, resume=str(step)), RunFolder(trained.run_dir))
    assert refused >= 1
    figures["messages given"] += refused
    figures["inputs tried"] = len(ODD) + 1


@pytest.mark.fault("C1")
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq"])
def test_moments_of_another_shape_are_named(entry: str, trained: Config, session: Session, tmp_path: Path) -> None:
    """They would be found at the first update, and not by name."""
    step = tmp_path / newest(trained).name
    shutil.copytree(newest(trained), step)
    tensors = load_file(step / "state.safetensors")
    name = next(name for name, value in tensors.items() if name.endswith(f".{entry}") and value.ndim == 2)
    save_file(tensors | {name: tensors[name][1:].contiguous()}, step / "state.safetensors")
    resign(step, read_meta(step))
    before = session.bare_model.state_dict()["head.weight"].clone()
    with pytest.raises(CheckpointError, match=rf"optimizer tensor {name[10:]} is \(.* its parameter \("):
        restore(session, step)
    assert torch.equal(before, session.bare_model.state_dict()["head.weight"])


@pytest.mark.fault("C1")
def test_a_signed_checkpoint_that_nobody_changed_is_restored(trained: Config, session: Session, tmp_path: Path) -> None:
    step = tmp_path / newest(trained).name
    shutil.copytree(newest(trained), step)
    resign(step, read_meta(step))
    assert restore(session, step)[0].update == 6


@pytest.mark.fault("C1")
@pytest.mark.filterwarnings("ignore:damaged checkpoint")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("file", ["meta.json", "state.safetensors", "manifest.json"])
def test_resuming_runs_no_pickle(file: str, signed: bool, trained: Config, tmp_path: Path) -> None:
    shutil.copytree(trained.run_dir, tmp_path / "run")
    config = replace(trained, run_dir=str(tmp_path / "run"))
    for kind in ("zip", "pickle"):
        for step in list_checkpoints(tmp_path / "run" / "checkpoints"):
            FORMATS[kind](step / file, Canary(tmp_path / "canary"))
            if signed and file != "manifest.json":
                (step / "manifest.json").write_text(_manifest(step, int(step.name[-8:])))
        for resume in (str(newest(config)), "auto"):
            with pytest.raises(CheckpointError, match="step-|is damaged") as caught:
                train(replace(config, resume=resume))
            assert "\n" not in str(caught.value)
        for aside in (tmp_path / "run" / "checkpoints").glob("damaged-*"):
            aside.rename(aside.with_name(aside.name.removeprefix("damaged-")))
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("C1")
@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_no_program_runs_what_a_file_asks_for(kind: str, trained: Config, tmp_path: Path, figures: Counter[str]) -> None:
    """From the shell: evaluation, fine-tuning, a named step, and a folder that is to be continued."""
    canary, run_dir = tmp_path / "canary", tmp_path / "run"
    shutil.copytree(trained.run_dir, run_dir)
    for step in list_checkpoints(run_dir / "checkpoints"):
        for name in ("state.safetensors", "meta.json"):
            FORMATS[kind](step / name, Canary(canary))
        (step / "manifest.json").write_text(_manifest(step, int(step.name[-8:])))
    hostile = plant(tmp_path, "x.pth", FORMATS[kind], Canary(canary))
    arguments = as_arguments(replace(trained, run_dir=str(run_dir)))
    started = [
        launch("eval.py", [str(hostile), "--data.dataset=folder", f"--data.root={trained.data.root}"]),
        launch("eval.py", [str(run_dir)]),
        launch("train.py", [*arguments, f"--run_dir={tmp_path / 'new'}", f"--train.finetune={hostile}"]),
        launch("train.py", [*arguments, f"--resume={newest(trained).relative_to(trained.run_dir)}"]),
        launch("train.py", [*arguments, f"--resume={list_checkpoints(run_dir / 'checkpoints')[-1]}"]),
        launch("train.py", [*arguments, "--resume=auto"]),
    ]
    for process in started:
        output = finish(process, code=2)
        assert len([line for line in output.splitlines() if line.startswith("error:")]) == 1, output
        assert "Traceback" not in output
        assert not canary.exists()
        figures["messages given"] += 1


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
