"""Faults of images, folders and storage: the right pixels, or an error that names the file, and never a wait or a crash."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import count_updates_lost, damage, history, tiny_config, write_digit_folder, write_tar
from PIL import Image

from taylorvit.config import AugmentConfig, DataConfig
from taylorvit.data import ImageError, build_dataset, build_eval_loader
from taylorvit.data import images as images_module
from taylorvit.data.augment import build_eval_transform, build_train_transform
from taylorvit.data.images import ImageDataset, StorageError
from taylorvit.engine import train
from taylorvit.run_folder import RunFolder

NOISE = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
RAMP = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg() -> bytes:
    return encoded(Image.fromarray(NOISE), "JPEG")


def write_class_folder(root: Path, files: dict[str, bytes], split: str = "train") -> Path:
    for name, content in files.items():
        (root / split / "cat").mkdir(parents=True, exist_ok=True)
        (root / split / "cat" / name).write_bytes(content)
    return root


def open_folder(root: Path, **data: object) -> ImageDataset:
    return build_dataset(DataConfig(root=str(root), io_retries=0, **data), "train", in_chans=3)


DAMAGED = {
    "half of it": lambda: jpeg()[: len(jpeg()) // 2],
    "ten bytes short": lambda: encoded(Image.fromarray(NOISE), "PNG")[
        :-22
    ],  # ten before the end mark, which is 12 more: without that alone no pixel is missing
    "ten bytes short (JPEG)": lambda: jpeg()[:-10],
    "bit rot": lambda: encoded(Image.fromarray(NOISE), "PNG")[:60] + b"\7" * 30 + encoded(Image.fromarray(NOISE), "PNG")[90:],
    "empty": lambda: b"",
    "HTML": lambda: b"<html><body>404 Not Found</body></html>",
    "text": lambda: b"no image\n" * 1000,
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "int32 TIFF": lambda: encoded(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF"),
    "float TIFF": lambda: encoded(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"),
}


@pytest.mark.fault("D1")
@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_whole_image_is_named_and_skipped_only_on_request(tmp_path: Path, kind: str, figures: Counter[str]) -> None:
    write_class_folder(tmp_path, {f"{number}.jpg": jpeg() for number in range(3)})
    damage(tmp_path / "train/cat/1.jpg", DAMAGED[kind](), figures)
    with pytest.raises(ImageError, match=r"cannot read image .*cat/1\.jpg: .+") as caught:
        open_folder(tmp_path)[1]
    assert not isinstance(caught.value, StorageError)
    data = DataConfig(root=str(tmp_path), on_error="skip", max_bad_share=0.4, num_workers=0, io_retries=0)
    loader = build_eval_loader(open_folder(tmp_path), data=data, img_size=8, batch_size=1, rank=0, world_size=1)
    assert [batch[2].item() for batch in loader] == [0, 2]
    assert list(loader.unreadable) == [1]


def kinds() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return encoded images of every kind with the grey values they must come to."""
    grey = Image.fromarray(RAMP)
    color = grey.convert("RGB")
    other = Image.fromarray(255 - RAMP)
    alpha = color.copy()
    alpha.putalpha(Image.fromarray(RAMP.T.copy()))
    palette = grey.convert("P")
    wide = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    white = np.full((8, 8), 255, dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return {
        "L": (encoded(grey, "PNG"), RAMP),
        "LA": (encoded(alpha.convert("LA"), "PNG"), RAMP),
        "RGBA": (encoded(alpha, "PNG"), RAMP),
        "CMYK": (encoded(color.convert("CMYK"), "JPEG", quality=100), RAMP),
        "palette": (encoded(palette, "PNG"), RAMP),
        "palette with transparency": (encoded(palette, "PNG", transparency=b"\0\x80"), RAMP),
        "1-bit": (encoded(Image.fromarray(white).convert("1"), "PNG"), white),
        "16-bit": (encoded(wide, "PNG"), RAMP),
        "16-bit TIFF": (encoded(wide, "TIFF"), RAMP),
        "animated GIF": (encoded(grey, "GIF", save_all=True, append_images=[other]), RAMP),
        "animated PNG": (encoded(grey, "PNG", save_all=True, append_images=[other]), RAMP),
        "animated WebP": (encoded(color, "WEBP", save_all=True, append_images=[other.convert("RGB")], lossless=True), RAMP),
        "EXIF rotation, which is ignored": (encoded(color, "PNG", exif=exif), RAMP),
        "PNG named .jpg": (encoded(color, "PNG"), RAMP),
    }


@pytest.mark.fault("D2")
@pytest.mark.fault("D3")
@pytest.mark.parametrize("kind", kinds())
def test_images_of_every_kind_come_to_the_right_pixels(tmp_path: Path, kind: str) -> None:
    """As torchvision's loader has them, but for 16 bits, which it makes white. Neither turns an image as its EXIF data ask."""
    content, expected = kinds()[kind]
    write_class_folder(tmp_path, {"0.jpg": content})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow suggests to convert palettes with transparency to RGBA
        pixels = np.asarray(open_folder(tmp_path)[0][0]).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels - expected[..., None].astype(int)).max() <= 3
    assert abs(pixels.mean() - expected.mean()) <= 2


@pytest.mark.fault("D4")
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("crop", ["simple", "random_resized", "none"])
def test_images_of_one_pixel_width_become_finite_tensors(tmp_path: Path, size: tuple[int, int], crop: str) -> None:
    write_class_folder(tmp_path, {"0.png": encoded(Image.new("RGB", size, (9, 9, 9)), "PNG")})
    image, _ = open_folder(tmp_path)[0]
    options = {"img_size": 32, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    for transform in (
        build_train_transform(AugmentConfig(crop=crop), in_chans=3, **options),
        build_eval_transform(crop_pct=0.9, **options),
    ):
        tensor = transform(image)
        assert tensor.shape == (3, 32, 32)
        assert tensor.isfinite().all()


def png_header_bomb(side: int) -> bytes:
    """Return a small PNG of side x side one-bit pixels, written without ever holding them."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, row = zlib.compressobj(9), b"\0" * (1 + side // 8 + 1)
    data = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def read_bomb(root: Path, dataset: str, num_workers: int, answer: object) -> None:
    """Read the bomb and report by how many bytes the peak memory of this process and of its workers rose."""
    warnings.simplefilter("ignore")
    data = DataConfig(
        dataset=dataset, root=str(root), num_workers=num_workers, on_error="skip", max_bad_share=1.0, io_retries=0
    )
    for split in ("warm", "train"):
        images = build_dataset(data, split, in_chans=3)
        before = peak_bytes()
        loader = build_eval_loader(images, data=data, img_size=8, batch_size=1, rank=0, world_size=1)
        batches = len(list(loader))
    answer.put((batches, loader.unreadable[0], peak_bytes() - before))


def peak_bytes() -> int:
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@pytest.mark.fault("D5")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("dataset", "side"), [("folder", 12_000), ("folder", 20_000), ("tar", 20_000), ("wds", 20_000)])
def test_a_bomb_takes_no_memory(tmp_path: Path, dataset: str, side: int, num_workers: int, figures: Counter[str]) -> None:
    for split, content in (("warm", jpeg()), ("train", png_header_bomb(side))):
        if dataset == "folder":
            write_class_folder(tmp_path, {"0.png": content}, split)
        else:
            write_tar(tmp_path / f"{split}{'-0' if dataset == 'wds' else ''}.tar", {"cat/0.png": content, "cat/0.cls": b"0"})
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=read_bomb, args=(tmp_path, dataset, num_workers, answer))
    process.start()
    batches, message, rise = answer.get(timeout=60)
    process.join(30)
    figures["bytes of memory for a bomb, most"] = rise
    assert batches == 0
    assert "cat/0.png" in message
    figures["messages given"] += 1
    assert rise < 100e6


@pytest.mark.fault("D6")
def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    write_class_folder(tmp_path, {"0.jpg": jpeg()})
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(ValueError, match="no image in .*train/dog: fill this class folder, or remove it"):
        open_folder(tmp_path)
    (tmp_path / "train/dog/x.jpg").mkdir()  # a folder is no image, whatever it is called
    with pytest.raises(ValueError, match="no image in .*train/dog"):
        open_folder(tmp_path)


@pytest.mark.fault("D6")
def test_links_in_circles_are_refused_and_broken_ones_named(tmp_path: Path) -> None:
    write_class_folder(tmp_path, {"0.jpg": jpeg()})
    (tmp_path / "train/cat/1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(StorageError, match=r"cat/1\.jpg: .*No such file"):
        open_folder(tmp_path)[1]
    (tmp_path / "train/cat/again").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="cat/again is a link to a folder that it lies in"):
        open_folder(tmp_path)


@pytest.mark.fault("D6")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    write_class_folder(tmp_path, {"0.jpg": jpeg()})
    os.mkfifo(tmp_path / "train/cat/1.jpg")
    with pytest.raises(ImageError, match=r"cat/1\.jpg"):
        open_folder(tmp_path)[1]


@pytest.mark.fault("D10")
def test_order_and_labels_do_not_depend_on_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that timm's natural order takes for equal, too, as of classes "A" and "a" and of files 1 and 01."""
    for name in ("A", "a", "10", "2", "02"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in ("1.png", "01.png", "10.png", "9.png"):
            (tmp_path / "train" / name / file).write_bytes(jpeg())
    first = open_folder(tmp_path)
    real = os.walk

    def backwards(*args: object, **options: object):
        for place, folders, files in real(*args, **options):
            yield place, folders, files[::-1]
            folders.reverse()

    monkeypatch.setattr(os, "walk", backwards)
    second = open_folder(tmp_path)
    assert first.classes == second.classes == ["02", "2", "10", "A", "a"]
    assert first.source.identity() == second.source.identity()


@pytest.mark.fault("D7")
def test_labels_that_are_no_class_are_named(tmp_path: Path) -> None:
    write_class_folder(tmp_path, {"0.jpg": jpeg()})
    dataset = open_folder(tmp_path)
    dataset.source.labels[0] = -1  # as hidden test labels of Hugging Face sets
    with pytest.raises(ImageError, match=r"cat/0\.jpg has label -1; the classes are 0 to 0"):
        dataset[0]


class Failing:
    """A file system that fails a number of times before it answers."""

    def __init__(self, times: int, number: int) -> None:
        self.left, self.number, self.waits = times, number, []

    def open(self, path: str, flags: int) -> int:
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), path)
        return os.open(path, flags)


@pytest.mark.fault("D8")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_storage_errors_are_tried_again_and_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    write_class_folder(tmp_path, {"0.jpg": jpeg(), "1.jpg": jpeg()})
    data = DataConfig(root=str(tmp_path), io_retries=3, num_workers=0, on_error="skip", max_bad_share=1.0)
    dataset = build_dataset(data, "train", in_chans=3)
    failing = Failing(3, number)
    monkeypatch.setattr("taylorvit.data.folder._open_at_once", failing.open)
    monkeypatch.setattr(images_module.time, "sleep", failing.waits.append)
    assert dataset[0][1] == 0
    assert failing.waits == [0.5, 1.0, 2.0]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("0.jpg" in line and os.strerror(number) in line and "reading it again" in line for line in said)
    failing.left = 10
    loader = build_eval_loader(dataset, data=data, img_size=8, batch_size=1, rank=0, world_size=1)
    with pytest.raises(StorageError, match=os.strerror(number)):
        list(loader)
    assert loader.unreadable == {}


@pytest.mark.fault("D8")
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_folder_that_vanishes_ends_the_run_and_the_resume_is_exact_once_it_is_back(
    digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Counter[str]
) -> None:
    shutil.copytree(digit_folder, tmp_path / "data")
    changes = {"schedule__epochs": 2, "data__num_workers": 0, "data__io_retries": 0}
    train(tiny_config(tmp_path / "data", tmp_path / "undisturbed", **changes))
    config = tiny_config(tmp_path / "data", tmp_path / "run", **changes)
    reads = []

    def vanish(path: str, flags: int) -> int:
        reads.append(path)
        if len(reads) == 40:
            (tmp_path / "data").rename(tmp_path / "away")
        return os.open(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr("taylorvit.data.folder._open_at_once", vanish)
        with pytest.raises(StorageError, match="No such file or directory"):
            train(config)
    assert RunFolder(tmp_path / "run").read_status()["state"] == "failed"
    count_updates_lost(tmp_path / "run", figures)
    (tmp_path / "away").rename(tmp_path / "data")
    train(replace(config, resume="auto"))
    assert history(tmp_path / "run") == history(tmp_path / "undisturbed")


@pytest.mark.fault("D8")
def test_a_tar_that_changed_or_gives_too_few_bytes_is_never_skipped(tmp_path: Path) -> None:
    """A resumed run, which finds the bytes again, would otherwise train on other images."""
    write_tar(tmp_path / "train.tar", {"cat/0.jpg": jpeg(), "cat/1.jpg": jpeg()})
    data = DataConfig(dataset="tar", root=str(tmp_path), io_retries=0, num_workers=0, on_error="skip", max_bad_share=1.0)
    dataset = build_dataset(data, "train", in_chans=3)
    dataset.source.index.sizes[1] = 10**6  # as storage that gives less than there is
    assert dataset[0][1] == 0
    loader = build_eval_loader(dataset, data=data, img_size=8, batch_size=1, rank=0, world_size=1)
    with pytest.raises(StorageError, match=r"train\.tar/cat/1\.jpg: .* bytes instead of 1000000"):
        list(loader)
    write_tar(tmp_path / "train.tar", {"cat/0.jpg": jpeg() + b"x", "cat/1.jpg": jpeg()})
    with pytest.raises(StorageError, match=r"train\.tar/cat/0\.jpg: .* the tar is not the one that was indexed"):
        list(loader)
    assert loader.unreadable == {}


@pytest.mark.fault("D9")
def test_fewer_validation_images_than_processes(tmp_path: Path) -> None:
    root = write_digit_folder(tmp_path / "data", train=20)
    for path in sorted((root / "val").glob("*/*.png"))[:]:
        path.unlink()
    first = sorted((root / "train").glob("*/*.png"))
    for path in first[:1]:
        (root / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "val" / path.parent.name / path.name)
    data = DataConfig(root=str(root), num_workers=0, val_split="val")
    shutil.rmtree(root / "val" / "none", ignore_errors=True)
    for folder in (root / "val").iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    dataset = build_dataset(data, "val", in_chans=3)
    shares = [
        list(build_eval_loader(dataset, data=data, img_size=8, batch_size=4, rank=rank, world_size=2)) for rank in range(2)
    ]
    assert [len(share) for share in shares] == [1, 0]
