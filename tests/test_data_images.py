"""Image sets by name: what is read, in which mode, under which label, and the message for everything that cannot be read."""

from __future__ import annotations

import builtins
import io
import json
import multiprocessing
import pickle
import sys
import tarfile
import time
import traceback
import types
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from helpers import write_tar
from PIL import Image
from timm.data import create_reader

from taylorvit.config import DataConfig
from taylorvit.data import ImageError, build_dataset, build_eval_loader, check_classes, check_num_classes
from taylorvit.data.images import ImageDataset, convert_image


def encode(color: int, suffix: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (color, color, color)).save(buffer, "JPEG" if suffix == "jpg" else "PNG")
    return buffer.getvalue()


def write_folder(root: Path, split: str, classes: list[str], images_per_class: int = 2) -> Path:
    """Write a class-folder split whose images have the grey value 10 * (class number) + (image number)."""
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for image in range(images_per_class):
            (root / split / name / f"{image}.png").write_bytes(encode(10 * number + image))
    return root


def grey(dataset: ImageDataset, index: int) -> int:
    return int(np.asarray(dataset[index][0]).flat[0])


def contents(dataset: ImageDataset) -> list[tuple[int, str]]:
    return sorted((grey(dataset, index), dataset.classes[dataset[index][1]]) for index in range(len(dataset)))


def test_folder_gives_images_labels_and_names(tmp_path):
    write_folder(tmp_path, "train", ["cat", "dog"])
    dataset = build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)
    assert dataset.classes == ["cat", "dog"]
    assert contents(dataset) == [(0, "cat"), (1, "cat"), (10, "dog"), (11, "dog")]
    assert dataset.sample_name(3).endswith("train/dog/1.png")
    assert dataset[0][0].mode == "RGB"
    assert build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=1)[0][0].mode == "L"


@pytest.mark.fault("D6")
def test_folder_ignores_hidden_files_and_folders(tmp_path):
    write_folder(tmp_path, "train", [".ipynb_checkpoints", "cat", "dog"])
    (tmp_path / "train/cat/._0.png").write_bytes(b"resource fork")
    (tmp_path / "train/.DS_Store").write_bytes(b"x")
    dataset = build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)
    assert dataset.classes == ["cat", "dog"]
    assert contents(dataset) == [(10, "cat"), (11, "cat"), (20, "dog"), (21, "dog")]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("foldr", "did you mean 'folder'"),
        ("tfds/mnist", "can only be streamed"),
        ("hfids/mnist", "can only be streamed"),
        ("torch/cifar11", "did you mean 'cifar10'"),
        ("folder", "has no folder 'train'; it holds other"),
        ("tar", "neither .*train.tar nor tar files"),
        ("wds", "holds no shards of split 'train'"),
        ("fashion_mnist", "neither .*train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
        ("torch/mnist", "its files are not in"),
        ("torch/cifar10", "its files are not in"),
        ("torch/imagenet", "its files are not in"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, dataset, message):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=message):
        build_dataset(DataConfig(dataset=dataset, root=str(tmp_path)), "train", in_chans=3)


@pytest.mark.fault("D6")
def test_missing_root_empty_split_and_stray_image_are_named(tmp_path):
    with pytest.raises(ValueError, match="'/no/such' is not a folder"):
        build_dataset(DataConfig(root="/no/such"), "train", in_chans=3)
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images .*in the class folders of .*train"):
        build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)
    (tmp_path / "train/stray.png").write_bytes(encode(0))
    with pytest.raises(ValueError, match=r"stray.png lies in no class folder"):
        build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)


def test_a_split_that_is_missing_is_not_replaced_by_the_root(tmp_path):
    write_folder(tmp_path, "training", ["cat"])  # timm would read the whole of root as "train"
    with pytest.raises(ValueError, match="holds training"):
        build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)


@pytest.mark.parametrize("damage", ["cut", "empty", "html", "rot", "gone"])
def test_a_broken_image_stops_with_its_name(tmp_path, damage):
    write_folder(tmp_path, "train", ["cat"], images_per_class=3)
    path = tmp_path / "train/cat/1.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    dataset = build_dataset(DataConfig(root=str(tmp_path), io_retries=0), "train", in_chans=3)
    damaged = {
        "cut": content[:-2000],
        "empty": b"",
        "html": b"<html>404</html>",
        "rot": content[:60] + b"\7" * 30 + content[90:],
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(ImageError, match=r"cannot read image .*cat/1\.png: .+"):
        dataset[1]
    assert dataset[2][1] == 0


@pytest.mark.fault("D1")
def test_a_broken_image_met_by_a_worker_is_named_in_the_last_line(tmp_path):
    write_folder(tmp_path, "val", ["cat"], images_per_class=3)
    (tmp_path / "val/cat/1.png").write_bytes(b"")
    config = DataConfig(root=str(tmp_path), num_workers=1)
    loader = build_eval_loader(
        build_dataset(config, "val", in_chans=3), data=config, img_size=8, batch_size=2, rank=0, world_size=1
    )
    with pytest.raises(ImageError) as caught:
        list(loader)
    assert "cannot read image" in str(caught.value).strip().splitlines()[-1]
    assert "cat/1.png" in str(caught.value).strip().splitlines()[-1]
    traceback.clear_frames(caught.tb)  # else the loader's workers stay until the garbage collector comes by


@pytest.mark.fault("D2")
def test_images_of_every_mode_become_rgb_and_grey(figures):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    color = Image.fromarray(np.stack([ramp, ramp, ramp], axis=2))
    for mode in ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "P", "PA", "HSV", "1"):
        image = color.convert("L").convert("1") if mode == "1" else color.convert("P" if mode == "PA" else mode).convert(mode)
        for wanted in ("RGB", "L"):
            converted = convert_image(image, wanted)
            assert converted.mode == wanted
            figures["inputs tried"] += 1
            if mode != "1":
                assert abs(np.asarray(converted).mean() - ramp.mean()) < 2


@pytest.mark.fault("D3")
def test_sixteen_bit_images_are_scaled_and_unknown_ranges_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    write_folder(tmp_path, "train", ["cat"], images_per_class=1)
    Image.fromarray(ramp).save(tmp_path / "train/cat/sixteen.png")
    dataset = build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)
    assert np.abs(np.asarray(dataset[1][0])[..., 0] - ramp / 257).max() <= 0.5
    for name, pixels in (("int.tif", ramp.astype(np.int32)), ("float.tif", ramp.astype(np.float32))):
        Image.fromarray(pixels).save(tmp_path / "train/cat" / name)
        dataset = build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)
        index = next(index for index in range(len(dataset)) if dataset.sample_name(index).endswith(name))
        with pytest.raises(ImageError, match=rf"{name}: pixels of mode .* no known range"):
            dataset[index]


@pytest.mark.fault("D5")
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path):
    write_folder(tmp_path, "train", ["cat"], images_per_class=1)
    Image.new("1", (11_000, 10_000)).save(tmp_path / "train/cat/0.png")
    dataset = build_dataset(DataConfig(root=str(tmp_path)), "train", in_chans=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="11000 x 10000 pixels"):
            dataset[0]


@pytest.mark.fault("D7")
def test_class_lists_that_differ_are_named(tmp_path):
    write_folder(tmp_path, "train", ["a", "b", "c"])
    write_folder(tmp_path, "val", ["a", "c"])
    write_folder(tmp_path, "more", ["a", "b", "c", "d"])
    train, val, more = (build_dataset(DataConfig(root=str(tmp_path)), split, in_chans=3) for split in ("train", "val", "more"))
    check_classes(train, train)
    with pytest.raises(ValueError, match="class 'b' is in the training set but not in the validation set"):
        check_classes(train, val)
    with pytest.raises(ValueError, match="class 'd' is in the validation set but not in the training set"):
        check_classes(train, more)
    check_num_classes(train, 3)
    with pytest.raises(ValueError, match="num_classes is 10, but the data has 3 classes"):
        check_num_classes(train, 10)


def class_files(classes: int, images: int) -> dict[str, bytes]:
    return {f"class{number}/{image}.png": encode(10 * number + image) for number in range(classes) for image in range(images)}


def test_one_tar_equals_timms_reader(tmp_path):
    files = {"./" + name: content for name, content in class_files(11, 2).items()}
    path = write_tar(tmp_path / "train.tar", {**files, "class3/._0.png": b"hidden", "class3/notes.txt": b"x"})
    dataset = build_dataset(DataConfig(dataset="tar", root=str(tmp_path)), "train", in_chans=3)
    write_tar(tmp_path / "plain.tar", files)
    reader = create_reader("", root=str(tmp_path / "plain.tar"))
    assert dataset.classes == list(reader.class_name_to_idx)  # natural order: class2 before class10
    for index in range(len(reader)):
        file, label = reader[index]
        assert (grey(dataset, index), dataset[index][1]) == (int(np.asarray(Image.open(file)).flat[0]), label)
    assert dataset.sample_name(0).startswith(str(path))


def test_a_tar_per_class_and_tars_in_a_tar(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"train/n{number}.tar", {f"{image}.png": encode(10 * number + image) for image in range(2)})
    nested = {f"n{number}.tar": (tmp_path / f"train/n{number}.tar").read_bytes() for number in range(2)}
    write_tar(tmp_path / "val.tar", nested)
    config = DataConfig(dataset="tar", root=str(tmp_path))
    expected = [(0, "n0"), (1, "n0"), (10, "n1"), (11, "n1")]
    assert contents(build_dataset(config, "train", in_chans=1)) == expected
    assert contents(build_dataset(config, "val", in_chans=1)) == expected


def write_shards(root: Path, split: str, num_samples: int, *, per_shard: int = 3, label: str = "cls", shift: int = 0) -> None:
    for start in range(0, num_samples, per_shard):
        files = {}
        for number in range(start, min(start + per_shard, num_samples)):
            files[f"s{number:04d}.jpg"] = encode(10 * number, "jpg")
            value = (number + shift) % 4
            files[f"s{number:04d}.{label}"] = str(value).encode() if label == "cls" else b'{"label": %d}' % value
        write_tar(root / f"{split}-{start // per_shard:05d}.tar", files)


@pytest.mark.parametrize("label", ["cls", "json"])
def test_webdataset_shards_are_read_by_number(tmp_path, label):
    write_shards(tmp_path, "train", 8, label=label)
    dataset = build_dataset(DataConfig(dataset="wds", root=str(tmp_path)), "train", in_chans=3)
    assert dataset.classes == ["0", "1", "2", "3"]
    for index in (7, 0, 5, 2, 7):
        assert abs(grey(dataset, index) - 10 * index) <= 2
        assert dataset[index][1] == index % 4
    assert dataset.sample_name(4).endswith("train-00001.tar/s0004.jpg")
    copy = pickle.loads(pickle.dumps(dataset))  # as a spawned worker receives it
    assert grey(copy, 6) == grey(dataset, 6)


def test_the_shard_index_is_cached_and_renewed(tmp_path, monkeypatch):
    write_shards(tmp_path, "train", 4)
    config = DataConfig(dataset="wds", root=str(tmp_path))
    assert len(build_dataset(config, "train", in_chans=3)) == 4
    (cache,) = tmp_path.glob(".taylorvit-*.json")
    content = json.loads(cache.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("the cached index was not used"))
        assert grey(build_dataset(config, "train", in_chans=3), 3) in range(28, 33)
    write_shards(tmp_path, "train", 5)  # the second shard has grown
    assert len(build_dataset(config, "train", in_chans=3)) == 5
    assert json.loads(cache.read_text()) != content
    cache.write_text("{damaged")
    assert len(build_dataset(config, "train", in_chans=3)) == 5


def test_a_read_only_root_needs_no_cache(tmp_path, monkeypatch):
    write_shards(tmp_path, "train", 4)

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # the kernel says so even of a file that is not there
    assert len(build_dataset(DataConfig(dataset="wds", root=str(tmp_path)), "train", in_chans=3)) == 4
    assert not list(tmp_path.glob(".taylorvit-*"))


def write_slowly(path: Path, text: str) -> None:
    """Write in two halves, as a large file is."""
    with path.open("w") as file:
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            file.write(half)
            file.flush()
            time.sleep(0.005)


def open_shards_again_and_again(root: Path, barrier: Barrier) -> None:
    Path.write_text = write_slowly  # in this process only
    barrier.wait(30)
    for _ in range(20):
        dataset = build_dataset(DataConfig(dataset="wds", root=str(root)), "train", in_chans=3)
        assert [dataset[index][1] for index in (0, 5, 39)] == [0, 1, 3]
        time.sleep(0.01)  # for the test to see the file
        for cache in root.glob(".taylorvit-*.json"):
            cache.unlink(missing_ok=True)


def test_two_processes_may_index_the_shards_at_once(tmp_path):
    write_shards(tmp_path, "train", 40)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=open_shards_again_and_again, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        try:
            (cache,) = tmp_path.glob(".taylorvit-*.json")
            text = cache.read_text()
        except (ValueError, FileNotFoundError):  # just deleted
            continue
        json.loads(text)  # whole, whenever it is there
        seen += 1
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen > 5
    assert not list(tmp_path.glob(".taylorvit-*.json.*"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": encode(0)}, "sample 'a' has neither a .cls nor a .json"),
        ({"a.cls": b"1"}, "sample 'a' has 0 images"),
        ({"a.jpg": encode(0), "a.png": encode(0), "a.cls": b"1"}, "sample 'a' has 2 images"),
        ({"a.jpg": encode(0), "a.cls": b"cat"}, "a.cls holds no class number"),
        ({"a.jpg": encode(0), "a.cls": b"-1"}, "gives class -1"),
        ({"a.jpg": encode(0), "a.json": b'{"other": 1}'}, "a.json holds no class number"),
        ({}, "no image in the 1 tar files"),
    ],
)
def test_malformed_samples_of_a_shard_are_named(tmp_path, files, message):
    write_tar(tmp_path / "train-0.tar", files)
    with pytest.raises(ValueError, match=message):
        build_dataset(DataConfig(dataset="wds", root=str(tmp_path)), "train", in_chans=3)


@pytest.mark.fault("D1")
def test_damaged_shards_are_named(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ValueError, match=r"train-0.tar: not a readable, uncompressed tar"):
        build_dataset(DataConfig(dataset="wds", root=str(tmp_path)), "train", in_chans=3)
    write_shards(tmp_path, "val", 3)
    dataset = build_dataset(DataConfig(dataset="wds", root=str(tmp_path), io_retries=0), "val", in_chans=3)
    shard = tmp_path / "val-00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"val-00000.tar/s0002.jpg: .* the tar is not the one that was indexed"):
        dataset[2]


class FakeHuggingFace:
    """The part of `datasets` that timm's reader uses, with six tiny images."""

    def __init__(self, names: list[str] | None) -> None:
        label = types.SimpleNamespace(names=names) if names else types.SimpleNamespace()
        self.info = types.SimpleNamespace(features={"label": label}, splits={})

    def cast_column(self, key: str, feature: object) -> FakeHuggingFace:
        return self

    def remove_columns(self, key: str) -> list[dict]:
        return [self[index] for index in range(len(self))]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        return {"image": {"bytes": encode(10 * index), "path": None}, "label": index % 3}


@pytest.mark.parametrize(("names", "classes"), [(["x", "y", "z"], ["x", "y", "z"]), (None, ["0", "1", "2"])])
def test_hugging_face_sets_come_through_timms_reader(monkeypatch, names, classes):
    calls = []

    def load_dataset(name: str, split: str, cache_dir: str) -> FakeHuggingFace:
        calls.append((name, split, cache_dir))
        return FakeHuggingFace(names)

    stub = types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: None)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    dataset = build_dataset(DataConfig(dataset="hfds/some/Set", root="cache"), "validation", in_chans=1)
    del sys.modules["timm.data.readers.reader_hfds"]  # built on the stub
    assert calls == [("some/Set", "validation", "cache")]
    assert dataset.classes == classes
    assert (len(dataset), grey(dataset, 4), dataset[4][1], dataset[4][0].mode) == (6, 40, 1, "L")
    assert dataset.sample_name(4) == "hfds/some/Set split validation[4]"


def test_hugging_face_sets_without_the_package_say_what_to_install(monkeypatch):
    original = builtins.__import__

    def without_datasets(name: str, *args: object, **kwargs: object) -> types.ModuleType:
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match="needs the package datasets: pip install datasets"):
        build_dataset(DataConfig(dataset="hfds/mnist", root="cache"), "train", in_chans=1)


def test_torchvision_sets_are_converted_and_their_splits_checked(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 3), ("t10k", 2)):
        header = b"".join(size.to_bytes(4, "big") for size in (0x0803, count, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + bytes([count] * (count * 784)))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(
            (0x0801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(range(count))
        )
    config = DataConfig(dataset="torch/mnist", root=str(tmp_path))
    train, val = (build_dataset(config, split, in_chans=3) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (3, 2, 10)
    assert train[2][0].mode == "RGB"  # torchvision gives "L", whatever mode timm is asked for
    assert (grey(train, 2), train[2][1]) == (3, 2)
    with pytest.raises(ValueError, match="no split 'trian'; did you mean 'train'"):  # timm would read the test split
        build_dataset(config, "trian", in_chans=3)
