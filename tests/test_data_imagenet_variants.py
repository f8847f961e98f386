"""Every ImageNet variant maps its folders and file names to the right classes, and judges logits by them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from taylorvit.config import DataConfig
from taylorvit.data import build_dataset, get_variant
from taylorvit.data.images import ImageDataset

SYNSETS = ImageNetInfo().label_names()
NUMBER = {synset: number for number, synset in enumerate(SYNSETS)}


def folder(root: Path, classes: list[str], files: tuple[str, ...] = ("0.png",)) -> ImageDataset:
    for name in classes:
        (root / "val" / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (4, 4)).save(root / "val" / name / file, "PNG")
    return build_dataset(DataConfig(root=str(root)), "val", in_chans=3)


def logits_for(*ranking: int) -> torch.Tensor:
    """Return (1, 1000) logits whose largest are these classes, best first."""
    logits = torch.linspace(-1, -2, 1000)[None].clone()
    for place, number in enumerate(ranking):
        logits[0, number] = 20.0 - place
    return logits


def judge(variant, logits, label: int, index: int = 0):
    confusion = torch.zeros(variant.num_classes, variant.num_classes, dtype=torch.int64)
    counts = variant.judge(logits, torch.tensor([label]), torch.tensor([index]), confusion)
    return counts, confusion


def test_v2_folders_are_numbers_not_words(tmp_path):
    dataset = folder(tmp_path, ["0", "2", "10", "100", "999"])
    variant = get_variant("imagenet-v2", dataset)
    for label, name in enumerate(dataset.classes):
        counts, confusion = judge(variant, logits_for(int(name)), label)
        assert counts[[0, 2, 3]].tolist() == [1, 1, 1]
        assert confusion[int(name), int(name)] == 1
    assert variant.classes == SYNSETS


def test_sketch_maps_synsets_even_where_some_are_missing(tmp_path):
    chosen = [SYNSETS[number] for number in (3, 500, 999)]
    variant = get_variant("imagenet-sketch", folder(tmp_path, chosen))
    for label, number in enumerate((3, 500, 999)):
        assert judge(variant, logits_for(number), label)[0][2] == 1
        assert judge(variant, logits_for(4, number), label)[0].tolist()[2:] == [0, 1]


@pytest.mark.parametrize(
    ("name", "inside", "outside"), [("imagenet-a", "n01498041", "n01440764"), ("imagenet-r", "n01443537", "n01440764")]
)
def test_a_and_r_judge_their_200_classes_only(tmp_path, name, inside, outside):
    variant = get_variant(name, folder(tmp_path, [inside, "n07749582"]))  # the lemon is in both
    assert variant.num_classes == 200
    assert [SYNSETS[number] for number in variant.logit_indices.tolist()] == variant.classes
    assert NUMBER[outside] not in variant.logit_indices
    counts, confusion = judge(variant, logits_for(NUMBER[outside], NUMBER[inside]), label=0)
    assert counts[2] == 1  # the best class of the other 800 is not in the running
    assert confusion[variant.classes.index(inside), variant.classes.index(inside)] == 1
    assert judge(variant, logits_for(NUMBER["n07749582"]), label=1)[0][2] == 1
    assert judge(variant, logits_for(NUMBER["n07749582"]), label=0)[0][2] == 0
    with pytest.raises(ValueError, match=f"class folder '{outside}' does not belong to {name}, whose folders are 200 synsets"):
        get_variant(name, folder(tmp_path / "other", [outside]))


def test_real_labels_follow_the_file_name_and_skip_images_without_labels(tmp_path):
    # ReaL gives image 1 no label, image 2 [970, 795], image 4 [809]
    files = tuple(f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 4))
    folder(tmp_path, ["n01440764", "n01443537"], files)
    (tmp_path / "val/n01443537/ILSVRC2012_val_00000002.JPEG").unlink()
    dataset = build_dataset(DataConfig(root=str(tmp_path)), "val", in_chans=3)
    variant = get_variant("imagenet-real", dataset)
    by_name = {
        Path(dataset.sample_name(index)).stem[-1] + Path(dataset.sample_name(index)).parent.name[-1]: index
        for index in range(5)
    }
    assert judge(variant, logits_for(0), 0, by_name["14"])[0].tolist()[0] == 0
    for number in (970, 795):
        counts, confusion = judge(variant, logits_for(number), 0, by_name["24"])
        assert counts[[0, 2, 3]].tolist() == [1, 1, 1]
        assert math.isnan(counts[1])
        assert confusion[number, number] == 1
    counts, confusion = judge(variant, logits_for(5, 6, 795), 0, by_name["24"])
    assert counts[2:].tolist() == [0, 1]
    assert confusion.sum() == 1
    assert confusion[[795, 970], 5].sum() == 1
    assert judge(variant, logits_for(809), 1, by_name["47"])[0][2] == 1


def test_a_batch_is_the_sum_of_its_images(tmp_path):
    variant = get_variant("imagenet-r", folder(tmp_path, ["n01443537", "n07749582"]))
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    confusion = torch.zeros(200, 200, dtype=torch.int64)
    whole = variant.judge(logits, labels, torch.arange(6), confusion)
    single = sum(judge(variant, logits[i : i + 1], int(labels[i]))[0] for i in range(6))
    assert torch.allclose(whole, single, rtol=1e-5)
    columns = variant.logit_indices
    loss = torch.nn.functional.cross_entropy(logits[:, columns], variant.label_map[labels], reduction="sum")
    assert whole[1].item() == pytest.approx(loss.item(), rel=1e-5)
    assert confusion.sum() == 6


def test_what_does_not_belong_is_named(tmp_path):
    dataset = folder(tmp_path, ["n01440764"])
    with pytest.raises(ValueError, match="unknown ImageNet variant 'imagenet-rael'; did you mean 'imagenet-real'"):
        get_variant("imagenet-rael", dataset)
    with pytest.raises(ValueError, match="'n01440764' does not belong to imagenet-v2, whose folders are numbers"):
        get_variant("imagenet-v2", dataset)
    with pytest.raises(ValueError, match=r"file names ILSVRC2012_val_00000001.JPEG .* found .*0.png"):
        get_variant("imagenet-real", dataset)
    with pytest.raises(ValueError, match="imagenet-sketch needs the 1000 ImageNet classes; this model has 10"):
        judge(get_variant("imagenet-sketch", dataset), torch.randn(1, 10), 0)
