"""Evaluation and its report: counts against a naive loop, classes that cannot be compared, tables people can read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from taylorvit.config import Config
from taylorvit.config_loading import config_from_dict
from taylorvit.evaluation import Evaluation, Judgement, evaluate, evaluate_checkpoint
from taylorvit.models import build_model
from taylorvit.report import format_table, per_class_rows, result_row, save_csv, save_json, worst_classes
from taylorvit.weights import Source

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Fixed(nn.Module):
    """A "model" whose logits are its inputs."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.flatten(1)


@pytest.mark.parametrize(("images", "batch_size", "classes"), [(13, 4, 7), (5, 5, 10), (3, 8, 3)])
def test_counts_equal_a_naive_loop(images: int, batch_size: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(images)
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    data = [(logits[index].view(1, 1, -1), labels[index], index) for index in range(images)]
    model = Fixed().train()
    found = evaluate(
        model, DataLoader(data, batch_size=batch_size), Accelerator(cpu=True), num_classes=classes, with_confusion=True
    )
    ranked = [row.sort(descending=True).indices.tolist() for row in logits]
    assert found.samples == images
    assert found.top1 == pytest.approx(100 * sum(ranked[i][0] == labels[i] for i in range(images)) / images)
    assert found.top5 == pytest.approx(100 * sum(labels[i] in ranked[i][:5] for i in range(images)) / images)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.confusion is not None
    assert found.confusion.sum() == images
    assert 100 * found.confusion.diag().sum() / images == pytest.approx(found.top1)
    assert model.training


def test_no_confusion_is_counted_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 21,841 classes it would take 3.8 GB at every evaluation of a training run."""
    data = [(torch.eye(4)[label].view(1, 1, -1), label, label) for label in range(3)]
    loader, accelerator = DataLoader(data, batch_size=2), Accelerator(cpu=True)
    real, sizes = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: sizes.append(size) or real(*size, **options))
    found = evaluate(Fixed(), loader, accelerator, num_classes=4)
    assert (found.samples, found.top1, found.confusion) == (3, 100.0, None)
    assert (4, 4) not in sizes
    assert evaluate(Fixed(), loader, accelerator, num_classes=4, with_confusion=True).confusion is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_run_is_judged_compiled(digit_folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: calls.append(module))
    model = {"name": "taylorvit_tiny_patch16_224", "num_classes": 10, "img_size": 16, "patch_size": 8, "depth": 1}
    data = {"root": str(digit_folder), "num_workers": 0}
    config = config_from_dict({"model": model, "data": data, "train": {"compile": compiled}})
    judgement = evaluate_checkpoint(
        build_model(config.model).state_dict(), Source("somewhere", "step", "raw"), config, Accelerator(cpu=True)
    )
    assert len(calls) == compiled
    assert judgement.evaluation.confusion is not None
    row = result_row(judgement)
    assert (row["compile"], row["device"], row["world_size"], row["torch"]) == (compiled, "cpu", 1, torch.__version__)


@pytest.mark.fault("C7")
def test_classes_named_differently_are_refused(digit_folder: Path) -> None:
    config = config_from_dict(
        {"model": {"num_classes": 10, "img_size": 16, "patch_size": 4}, "data": {"root": str(digit_folder)}}
    )
    names = [str(number) for number in range(10)]
    names[3] = "three"
    source = Source("somewhere", "step", "raw", class_names=names)
    with pytest.raises(ValueError, match="class 3 is 'three' in somewhere but '3' in the data set"):
        evaluate_checkpoint({}, source, config, Accelerator(cpu=True))


def test_another_number_of_classes_is_refused(digit_folder: Path) -> None:
    config = config_from_dict(
        {"model": {"num_classes": 10, "img_size": 16, "patch_size": 4}, "data": {"root": str(digit_folder)}}
    )
    source = Source("somewhere", "step", "raw", model_config={"num_classes": 5, "img_size": 16})
    with pytest.raises(ValueError, match="model.num_classes: 10 differs from the 5 of somewhere"):
        evaluate_checkpoint({}, source, config, Accelerator(cpu=True))


def test_per_class_rows_name_the_commonest_mistake() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 5, 0], [0, 0, 0]])
    rows = per_class_rows(confusion, ["cat", "dog", "eel"])
    assert [row["top1"] for row in rows] == [75.0, 100.0, None]
    assert (rows[0]["most_confused_with"], rows[0]["confused_images"]) == ("dog", 1)
    assert rows[1]["most_confused_with"] is None
    assert [row["class"] for row in worst_classes(rows, 5)] == ["cat", "dog"]


def test_reports_are_read_back(tmp_path: Path) -> None:
    evaluation = Evaluation(samples=8, loss=float("nan"), top1=87.5, top5=100.0, confusion=torch.eye(2))
    source = Source("runs/x", "step", "ema", step=5, metrics={"top1": 1.0, "ema_top1": 87.5})
    row = result_row(Judgement(source, Config(), evaluation, ["a", "b"], [], 10, ["direct"], {}, 1.0, "cpu", 2))
    assert (row["logged_top1"], row["loss"]) == (87.5, None)
    save_json(tmp_path / "new" / "rows.json", [row])
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == [row]
    save_csv(tmp_path / "classes.csv", per_class_rows(torch.eye(2, dtype=torch.int64), ["a", "b"]))
    with (tmp_path / "classes.csv").open() as file:
        assert [line["class"] for line in csv.DictReader(file)] == ["a", "b"]
    header, line = format_table([row]).splitlines()
    assert header.index("top1") == line.index("87.500")
