"""Every reader of files, given files with random damage: what was written, or one line that names the file, and nothing else.

Damage is bits, cuts, insertions and blocks out of place, and in JSON also values of other kinds in the place of a value. A file
with a checksum must come back equal or be refused; any other may come back changed, but whole and of the right kind.

More of it: pytest tests/test_fuzz_readers.py --hypothesis-profile=thorough --hypothesis-seed=1
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import damage, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from taylorvit.checkpoint import best_checkpoint, find_newest_valid, load_checkpoint, pack_state, save_checkpoint
from taylorvit.config import Config, ModelConfig
from taylorvit.config_loading import config_to_dict, load_config
from taylorvit.data.images import ImageDataset
from taylorvit.data.imdb import Imdb
from taylorvit.data.listops import ListOps
from taylorvit.data.samples import FashionMnist
from taylorvit.data.webdataset import build_shard_source, build_tar_source
from taylorvit.models import build_model
from taylorvit.ops import form_table
from taylorvit.run_folder import RunFolder
from taylorvit.studies.results import read_measurement, store_measurement, stored_rows
from taylorvit.weights import load_into, load_weights
from tools import calibrate, convert_checkpoint, export_checkpoint

SMALL = ModelConfig(depth=1, embed_dim=12, num_heads=2, img_size=16, patch_size=8, num_classes=3, in_chans=1)
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    0.5,
    "",
    "x",
    "../../x",
    [],
    [1],
    {},
    {"a": 1},
    [[[]]],
    {"__dtype__": "load"},
]


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: `write` fills a folder, `damage` names the files that are hurt, `read` returns plain values."""

    write: Callable[[Path], Any]
    damage: tuple[str, ...]
    read: Callable[[Path], Any]
    exact: bool = False  # a checksum stands over it all
    rewrite: Callable[[Path], None] = lambda folder: None  # after the damage, such as a checksum that fits it
    blames: str = ""  # a pattern of messages that name something else than the file


# What is written


def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(SMALL)


def write_step(folder: Path) -> None:
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    tensors, state = pack_state(network, None, optimizer, None)
    config = config_to_dict(Config(model=SMALL))
    config["data"] |= {"mean": [0.5], "std": [0.5]}
    meta = {"state": state, "config": config, "classes": ["a", "b", "c"], "metrics": {"top1": 5.0}, "milestone": False}
    save_checkpoint(folder / "checkpoints", 7, tensors, meta)


def sign(folder: Path) -> None:
    """Make the manifest fit the damaged files, as a stranger would."""
    step = folder / "checkpoints" / "step-00000007"
    files = {
        name: {"size": (step / name).stat().st_size, "sha256": hashlib.sha256((step / name).read_bytes()).hexdigest()}
        for name in ("state.safetensors", "meta.json")
    }
    (step / "manifest.json").write_text(json.dumps({"format": 1, "step": 7, "files": files}))


def write_export(folder: Path) -> None:
    write_step(folder)
    export_checkpoint.export_checkpoint(folder, folder / "export")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(Config())))


def write_original(folder: Path) -> None:
    state = {
        name: value.reshape(1, -1, 1, 1) if name.endswith("temperature") else value
        for name, value in model().state_dict().items()
    }
    torch.save({"model_state": state, "args": argparse.Namespace(model="taylor_shift_eff_vit"), "epoch": 3}, folder / "x.tar")


def write_metrics(folder: Path) -> None:
    run = RunFolder(folder)
    for update in range(1, 6):
        run.append_metrics({"kind": "train", "update": update, "epoch": 1, "loss": 0.5})
    run.append_metrics({"kind": "evaluate", "update": 5, "epoch": 1, "top1": 50.0})
    run.write_status("running", update=5, epoch=1, message="epoch 1 done")


def write_idx(folder: Path) -> None:
    for kind, header, size in (("images-idx3", (0x0803, 4, 5, 5), 100), ("labels-idx1", (0x0801, 4), 4)):
        content = struct.pack(f">{len(header)}I", *header) + bytes(value % 10 for value in range(size))
        with gzip.open(folder / f"train-{kind}-ubyte.gz", "wb") as packed:
            packed.write(content)
        (folder / f"t10k-{kind}-ubyte").write_bytes(content)


def write_listops(folder: Path) -> None:
    lines = ["Source\tTarget", "[MAX 2 9 [MIN 4 7 ] 0 ]\t9", "( ( [SM 1 ) 2 ]\t3", "5\t5"]
    (folder / "basic_train.tsv").write_text("\n".join(lines) + "\n")


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_reviews(folder: Path) -> None:
    reviews = {f"aclImdb/train/{name}/{number}_1.txt": b"film " * 9 for name in ("neg", "pos") for number in range(3)}
    write_tar(folder / "reviews.tar", reviews)
    write_tar(folder / "reviews.tar.gz", reviews, "w:gz")


def write_tars(folder: Path) -> None:
    write_tar(folder / "train.tar", {f"{name}/{number}.png": png(number) for name in "ab" for number in range(3)})
    samples = {f"{number}{suffix}": content for number in range(3) for suffix, content in shard_sample(number)}
    write_tar(folder / "shard-train-0.tar", samples)


def shard_sample(number: int) -> list[tuple[str, bytes]]:
    label = (".json", b'{"label": 1}') if number == 2 else (".cls", str(number % 2).encode())
    return [(".png", png(number)), label]


# What is read


def tensors_of(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tuple(value.shape), str(value.dtype), value.double().numpy().tobytes()) for name, value in state.items()}


def read_step(folder: Path) -> Any:
    found = load_checkpoint(folder / "checkpoints" / "step-00000007")
    return tensors_of(found.tensors), found.meta, found.step


def read_steps(folder: Path) -> Any:
    """Call what reads a run's checkpoints without knowing yet whether they are whole."""
    best = best_checkpoint(folder / "checkpoints", "top1")
    newest = find_newest_valid(folder / "checkpoints")
    return None if newest is None else (best and best.name, newest.name)


def read_weights(path: Path) -> Any:
    state, source = load_weights(path)
    assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
    if source.model_config is not None:
        source.checked_model_config()
    target = model()
    try:
        load_into(target, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors_of(state), source.class_names


def read_export(folder: Path) -> Any:
    return read_weights(folder / "export")


def read_original(folder: Path) -> Any:
    convert_checkpoint.convert(folder / "x.tar", folder / "again")
    return None


def read_metrics(folder: Path) -> Any:
    run = RunFolder(folder)
    run.truncate_metrics(4, 1)
    assert all(isinstance(record["update"], int) for record in run.read_metrics())
    return run.read_status().get("state")


def read_source(source: Any) -> Any:
    data = ImageDataset(source, in_chans=1)
    return [(np.asarray(image).tobytes(), label) for image, label in (data[index] for index in range(len(data)))]


def read_reviews(path: Path) -> Any:
    source = Imdb(path, "train")
    return [(source.content(index), int(source.labels[index]), source.paths[index]) for index in range(len(source))]


def read_listops(folder: Path) -> Any:
    source = ListOps(folder, "train")
    return [(source.content(index), int(source.labels[index])) for index in range(len(source))]


def read_crossovers(folder: Path) -> Any:
    table = form_table.load(folder / "crossovers.json")
    assert all(isinstance(count, float | int) for counts in table.values() for count in counts.values())
    return None


def read_results(folder: Path) -> Any:
    stored_rows(folder / "results.json", {"case": {"tokens": 5}})
    return len(read_measurement(folder / "results.json", ["case"])["rows"])


STEP = "checkpoints/step-00000007"
READERS: dict[str, Reader] = {
    "checkpoint": Reader(
        write_step, (f"{STEP}/state.safetensors", f"{STEP}/meta.json", f"{STEP}/manifest.json"), read_step, exact=True
    ),
    "checkpoints of a run": Reader(write_step, (f"{STEP}/meta.json", f"{STEP}/manifest.json"), read_steps),
    "weights of a step": Reader(
        write_step,
        (f"{STEP}/state.safetensors", f"{STEP}/meta.json"),
        lambda folder: read_weights(folder / STEP),
        rewrite=sign,
    ),
    "weights of a run": Reader(write_step, (f"{STEP}/meta.json",), read_weights, rewrite=sign),
    "export of a hostile run": Reader(
        write_step,
        (f"{STEP}/meta.json",),
        lambda folder: bool(export_checkpoint.export_checkpoint(folder, folder / "x")),
        rewrite=sign,
    ),
    "export folder": Reader(write_export, ("export/config.json", "export/model.safetensors", "config.yaml"), read_export),
    "safetensors": Reader(
        lambda folder: save_file(model().state_dict(), folder / "x.safetensors"),
        ("x.safetensors",),
        lambda folder: read_weights(folder / "x.safetensors"),
    ),
    "pth": Reader(
        lambda folder: torch.save(model().state_dict(), folder / "x.pth"),
        ("x.pth",),
        lambda folder: read_weights(folder / "x.pth"),
    ),
    "legacy pth": Reader(
        lambda folder: torch.save({"state_dict": model().state_dict()}, folder / "x.pth", _use_new_zipfile_serialization=False),
        ("x.pth",),
        lambda folder: read_weights(folder / "x.pth"),
    ),
    "authors' file": Reader(write_original, ("x.tar",), read_original),
    "metrics and status": Reader(write_metrics, ("metrics.jsonl", "status.json"), read_metrics),
    "idx.gz": Reader(
        write_idx,
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        lambda folder: read_source(FashionMnist(folder, "train")),
        exact=True,
    ),
    "idx": Reader(
        write_idx,
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        lambda folder: len(read_source(FashionMnist(folder, "test"))),
    ),
    "ListOps": Reader(write_listops, ("basic_train.tsv",), read_listops),
    "IMDB tar": Reader(write_reviews, ("reviews.tar",), lambda folder: len(read_reviews(folder / "reviews.tar"))),
    "IMDB tar.gz": Reader(write_reviews, ("reviews.tar.gz",), lambda folder: read_reviews(folder / "reviews.tar.gz")),
    "image tar": Reader(write_tars, ("train.tar",), lambda folder: read_source(build_tar_source(folder, "train"))),
    "webdataset": Reader(write_tars, ("shard-train-0.tar",), lambda folder: read_source(build_shard_source(folder, "train"))),
    "index of tars": Reader(
        lambda folder: (write_tars(folder), build_tar_source(folder, "train")),
        (".taylorvit-tar-train.json",),
        lambda folder: read_source(build_tar_source(folder, "train")),
        exact=True,  # damaged, it is made anew
    ),
    "config": Reader(
        lambda folder: (folder / "run.yaml").write_text(yaml.safe_dump(config_to_dict(Config()), sort_keys=False)),
        ("run.yaml",),
        lambda folder: bool(load_config(["--config", str(folder / "run.yaml")])),
        blames=r"[a-z_.]+: .*(allowed|must|beyond|needs|has no effect|would)",  # a value out of range: its key
    ),
    "crossovers": Reader(
        lambda folder: shutil.copy(form_table.PATH, folder / "crossovers.json"), ("crossovers.json",), read_crossovers
    ),
    "calibration": Reader(
        lambda folder: shutil.copy(form_table.PATH, folder / "crossovers.json"),
        ("crossovers.json",),
        lambda folder: bool(calibrate.read_table(folder / "crossovers.json")),
    ),
    "results of a tool": Reader(
        lambda folder: store_measurement(folder / "results.json", {"case": {"tokens": 5}}, [{"seconds": 1.0}]),
        ("results.json",),
        read_results,
    ),
}

HEALED = ("index of tars", "checkpoints of a run")  # only a cache; others are looked for

# Damage

numbers = st.integers(0, 2**20)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "insert", "repeat", "zero", "swap", "value", "value", "value", "remove"]),
        numbers,
        numbers,
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, kind: str, first: int, second: int, extra: bytes) -> bytes:
    """Return the bytes with one damage; positions wrap around."""
    if kind in ("value", "remove"):
        return changed_json(content, kind, first, second)
    start, other = first % (len(content) + 1), second % (len(content) + 1)
    size = min(1 + second % 600, len(content) - start)
    if kind == "flip" and start < len(content):
        return content[:start] + bytes([content[start] ^ 1 << second % 8]) + content[start + 1 :]
    return {
        "flip": content,
        "cut": content[:start],
        "insert": content[:start] + extra + content[start:],
        "repeat": content[: start + size] + content[start : start + size] + content[start + size :],
        "zero": content[:start] + bytes(size) + content[start + size :],
        "swap": content[start:] + content[:start] if other % 2 else content[:start] + content[start + size :],
    }[kind]


def changed_json(content: bytes, kind: str, first: int, second: int) -> bytes:
    """Put an odd value in the place of one of the values of a JSON file or line, or remove it; other files stay."""
    lines = content.split(b"\n") if content.startswith(b'{"kind"') else [content]
    number = first % len(lines)
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return content
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(value)
    if places:
        # Half of the time near the root, where a value matters most.
        container, key = places[first % len(places)] if second % 2 else places[first % min(9, len(places))]
        if kind == "remove":
            del container[key]
        else:
            container[key] = ODD_VALUES[second // 2 % len(ODD_VALUES)]
    lines[number] = json.dumps(value).encode()
    return b"\n".join(lines)


@pytest.mark.fault("B3")
@pytest.mark.parametrize("name", READERS)
def test_damage_is_noticed_or_harmless(name: str, tmp_path: Path, figures: Counter[str]) -> None:
    reader = READERS[name]
    pristine, folder = tmp_path / "pristine", tmp_path / "folder"
    pristine.mkdir()
    reader.write(pristine)
    shutil.copytree(pristine, folder, symlinks=True)
    whole = reader.read(folder)

    @given(st.sampled_from(reader.damage), edits)
    def one(file: str, changes: list[tuple[str, int, int, bytes]]) -> None:
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        content = (pristine / file).read_bytes()
        for change in changes:
            content = damaged(content, *change)
        damage(folder / file, content, figures)
        figures["inputs tried"] += 1
        reader.rewrite(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = reader.read(folder)
        except (ValueError, OSError) as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            assert str(folder) in message or re.match(reader.blames or r"\Z", message), message
            assert len(message) < 1200, message
            figures["messages given"] += 1
            return
        if reader.exact:
            assert found == whole

    one()
    assert figures["messages given"] > 0 or name in HEALED


def test_a_careless_reader_is_found_out(tmp_path: Path) -> None:
    """The damage reaches what a reader without checks would trip over."""
    READERS["careless"] = Reader(
        lambda folder: (folder / "x.json").write_text('{"a": {"b": [1, 2]}}'),
        ("x.json",),
        lambda folder: json.loads((folder / "x.json").read_text())["a"]["b"][1] + 1,
    )
    try:
        with pytest.raises((KeyError, TypeError, IndexError, AssertionError, ExceptionGroup)):
            test_damage_is_noticed_or_harmless("careless", tmp_path, Counter())
    finally:
        del READERS["careless"]
