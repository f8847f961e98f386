"""The evaluation loop: exact counts over any number of processes and any last batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from taylorvit.data import Variant
from taylorvit.metrics import correct_in_top


@dataclass(frozen=True)
class Evaluation:
    """Counts over a whole data set.

    Attributes:
        samples: images that were judged.
        loss: mean cross-entropy of the hard labels; nan where the labels are sets (ImageNet-ReaL).
        top1: per cent of images whose label has the largest logit.
        top5: per cent of images whose label is among the five largest logits.
        confusion: (K, K) int64, rows are labels and columns predictions.
    """

    samples: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, *, num_classes: int, variant: Variant | None = None
) -> Evaluation:
    """Judge every image once.

    Each process counts its own share and the counts are added up, so that no image is padded, dropped or counted twice. The
    model is called without its DistributedDataParallel wrapper: processes may have different numbers of batches.

    Args:
        model: a classifier; its mode is restored afterwards.
        loader: yields images (B, C, H, W), labels (B,) and sample indices (B,), from `build_eval_loader`.
        accelerator: gives device, precision and the sum over processes.
        num_classes: K, the classes that are judged.
        variant: maps logits and labels of a data set that shares ImageNet's classes; None judges as it stands.
    """
    module = accelerator.unwrap_model(model)
    was_training = module.training
    module.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # samples, loss, top-1, top-5
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=accelerator.device)
    for images, labels, indices in loader:
        images = images.to(accelerator.device, non_blocking=True)
        labels = labels.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = module(images)
        counts += _judge(logits.float(), labels, indices, confusion, variant)
    module.train(was_training)
    samples, loss, top1, top5 = accelerator.reduce(counts, reduction="sum").tolist()
    total = max(samples, 1.0)
    return Evaluation(
        samples=round(samples),
        loss=loss / total,
        top1=100 * top1 / total,
        top5=100 * top5 / total,
        confusion=accelerator.reduce(confusion, reduction="sum").cpu(),
    )


def _judge(logits: Tensor, labels: Tensor, indices: Tensor, confusion: Tensor, variant: Variant | None) -> Tensor:
    """Return samples, summed loss, top-1 and top-5 counts of a batch, and add to the confusion matrix in place."""
    if variant is not None:
        return variant.judge(logits, labels, indices, confusion)
    predictions = logits.argmax(dim=1)
    confusion.view(-1).index_add_(0, labels * len(confusion) + predictions, torch.ones_like(labels))
    return torch.stack(
        [
            torch.tensor(float(len(labels)), device=logits.device),
            F.cross_entropy(logits, labels, reduction="sum"),
            correct_in_top(logits, labels, 1).sum(),
            correct_in_top(logits, labels, 5).sum(),
        ]
    ).double()


def per_class_rows(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, object]]:
    """Return, for each class, its images, correct ones, top-1 in per cent, and the class it is most often taken for."""
    rows: list[dict[str, object]] = []
    for label, name in enumerate(classes):
        row = confusion[label].clone()
        images, correct = int(row.sum()), int(row[label])
        row[label] = 0
        mistaken = int(row.max())
        rows.append(
            {
                "class": name,
                "images": images,
                "correct": correct,
                "top1": 100 * correct / images if images else None,
                "most_confused_with": classes[int(row.argmax())] if mistaken else "",
                "confused_images": mistaken,
            }
        )
    return rows
