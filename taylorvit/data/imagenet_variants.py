"""Judge a 1000-class ImageNet model on the test sets that share ImageNet's classes but not its labels.

- imagenet-real (arXiv:2006.07159): the validation images with a set of right labels each; images without any do not count.
- imagenet-v2 (arXiv:1902.10811): class folders are numbers; sorted as words, "10" would come before "2".
- imagenet-a (arXiv:1907.07174) and imagenet-r (arXiv:2006.16241): 200 classes; the other 800 logits are left out.
- imagenet-sketch (arXiv:1905.13549): ordinary synset folders.

Synsets, class numbers and the ReaL labels come with timm.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from taylorvit.data.images import ImageDataset
from taylorvit.suggest import nearest

VARIANTS = ["imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch"]


@dataclass(frozen=True)
class Variant:
    """How logits and labels of one data set are read.

    Attributes:
        name: one of VARIANTS.
        classes: synsets of the K classes that are judged.
        logit_indices: (K,) which of the 1000 logits these are.
        label_map: (classes of the data set,) its label -> position among the K.
        real_labels: of imagenet-real, the right labels of each image of the data set; else None.
    """

    name: str
    classes: list[str]
    logit_indices: Tensor
    label_map: Tensor
    real_labels: list[list[int]] | None = None

    @property
    def num_classes(self) -> int:
        """K, the classes that are judged."""
        return len(self.classes)

    def judge(self, logits: Tensor, labels: Tensor, indices: Tensor, confusion: Tensor) -> Tensor:
        """Return images judged, summed cross-entropy, top-1 and top-5 counts as (4,) float64, and add to the confusion.

        Args:
            logits: (B, 1000), in ImageNet's class order.
            labels: (B,) of the data set.
            indices: (B,) sample numbers.
            confusion: (K, K) int64, changed in place; an image with several right labels counts in the row of the predicted
                one where that is right, else of the first.

        Raises:
            ValueError: the model has not 1000 outputs.
        """
        if logits.shape[1] != 1000:
            raise ValueError(f"{self.name} needs the 1000 ImageNet classes; this model has {logits.shape[1]}")
        logits = logits[:, self.logit_indices.to(logits.device)]
        right = self._right_classes(labels, indices, logits.device)  # (B, K)
        counted = right.any(dim=1)
        logits, right = logits[counted], right[counted]
        top5 = logits.topk(5, dim=1).indices  # (B', 5)
        hits = right.gather(1, top5)
        first_right = right.to(torch.uint8).argmax(dim=1)
        rows = torch.where(hits[:, 0], top5[:, 0], first_right)
        confusion.view(-1).index_add_(0, rows * self.num_classes + top5[:, 0], torch.ones_like(rows))
        loss = math.nan if self.real_labels is not None else F.cross_entropy(logits, first_right, reduction="sum").item()
        counts = [len(logits), loss, hits[:, 0].sum().item(), hits.any(dim=1).sum().item()]
        return torch.tensor(counts, dtype=torch.float64, device=logits.device)

    def _right_classes(self, labels: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        """Return (B, K), true where a class is right for an image; a row without any is not judged."""
        right = torch.zeros(len(labels), self.num_classes, dtype=torch.bool, device=device)
        if self.real_labels is None:
            return right.scatter_(1, self.label_map.to(device)[labels.to(device)][:, None], True)
        for row, index in enumerate(indices.tolist()):
            right[row, self.real_labels[index]] = True
        return right


def get_variant(name: str, dataset: ImageDataset) -> Variant:
    """Return how to judge this data set as the named variant of ImageNet.

    Raises:
        ValueError: an unknown name, or class folders or file names that do not belong to that variant.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown ImageNet variant {name!r}{nearest(name, VARIANTS)} (known: {', '.join(VARIANTS)})")
    synsets = _lines("imagenet_synsets.txt")
    judged = synsets
    if name in ("imagenet-a", "imagenet-r"):
        judged = _lines(f"{name.replace('-', '_')}_synsets.txt")
    names = [str(number) for number in range(1000)] if name == "imagenet-v2" else judged
    position = {folder: number for number, folder in enumerate(names)}
    unknown = [folder for folder in dataset.classes if folder not in position]
    if unknown:
        kind = "numbers 0 to 999" if name == "imagenet-v2" else f"{len(judged)} synsets such as {judged[0]}"
        raise ValueError(f"class folder {unknown[0]!r} does not belong to {name}, whose folders are {kind}")
    number_of = {synset: number for number, synset in enumerate(synsets)}
    return Variant(
        name=name,
        classes=judged,
        logit_indices=torch.tensor([number_of[synset] for synset in judged]),
        label_map=torch.tensor([position[folder] for folder in dataset.classes]),
        real_labels=_real_labels(dataset) if name == "imagenet-real" else None,
    )


def _real_labels(dataset: ImageDataset) -> list[list[int]]:
    """Return each image's right labels, found by the number in its file name."""
    by_number = json.loads(_read("imagenet_real_labels.json"))
    labels = []
    for index in range(len(dataset)):
        name = dataset.sample_name(index)
        match = re.search(r"ILSVRC2012_val_(\d{8})\.", name)
        if match is None or not 1 <= int(match[1]) <= len(by_number):
            raise ValueError(f"imagenet-real needs the file names ILSVRC2012_val_00000001.JPEG to ...50000; found {name}")
        labels.append(by_number[int(match[1]) - 1])
    return labels


def _lines(name: str) -> list[str]:
    return _read(name).split()


def _read(name: str) -> str:
    return resources.files("timm.data").joinpath("_info", name).read_text()
