"""Evaluation: exact counts over any number of processes and any last batch, of a model or of a checkpoint on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from taylorvit.config import Config, DataConfig
from taylorvit.data import (
    ImageDataset,
    ImageError,
    Loader,
    Variant,
    build_dataset,
    build_eval_loader,
    check_num_classes,
    check_sequences,
    explained_loader_failures,
    get_variant,
    most_unreadable,
    reference_lines,
)
from taylorvit.metrics import correct_in_top
from taylorvit.models import attention_forms, build_model
from taylorvit.weights import Source, load_into


@dataclass(frozen=True)
class Evaluation:
    """Counts over a whole data set.

    Attributes:
        samples: images that were judged.
        loss: mean cross-entropy of the hard labels; nan where the labels are sets (ImageNet-ReaL).
        top1: per cent of images whose label has the largest logit.
        top5: per cent of images whose label is among the five largest logits.
        confusion: (K, K) int64, rows are labels and columns predictions; None where it was not asked for.
        unreadable: images that could not be read, are in none of these figures, and with data.on_error stop end the run.
    """

    samples: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor | None = None
    unreadable: int = 0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    *,
    num_classes: int,
    variant: Variant | None = None,
    with_confusion: bool = False,
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
        with_confusion: count the confusion matrix too: 8 MB at 1000 classes, 3.8 GB at 21,841.
    """
    module = accelerator.unwrap_model(model)
    was_training = module.training
    module.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # samples, loss, top-1, top-5
    seen = torch.zeros(1, dtype=torch.float64, device=accelerator.device)  # a variant may judge fewer
    confusion = None
    if with_confusion or variant is not None:
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=accelerator.device)
    for images, labels, indices in loader:
        images = images.to(accelerator.device, non_blocking=True)
        labels = labels.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = module(images)
        counts += _judge(logits.float(), labels, indices, confusion, variant)
        seen += len(labels)
    module.train(was_training)
    samples, loss, top1, top5, read = accelerator.reduce(torch.cat([counts, seen]), reduction="sum").tolist()
    total = max(samples, 1.0)
    return Evaluation(
        samples=round(samples),
        loss=loss / total,
        top1=100 * top1 / total,
        top5=100 * top5 / total,
        confusion=None if confusion is None else accelerator.reduce(confusion, reduction="sum").cpu(),
        unreadable=len(loader.dataset) - round(read),  # type: ignore[arg-type]
    )


def _judge(logits: Tensor, labels: Tensor, indices: Tensor, confusion: Tensor | None, variant: Variant | None) -> Tensor:
    """Return samples, summed loss, top-1 and top-5 counts of a batch, and add to the confusion matrix in place."""
    if variant is not None:
        assert confusion is not None
        return variant.judge(logits, labels, indices, confusion)
    if confusion is not None:
        confusion.view(-1).index_add_(0, labels * len(confusion) + logits.argmax(dim=1), torch.ones_like(labels))
    return torch.stack(
        [
            torch.tensor(float(len(labels)), device=logits.device),
            F.cross_entropy(logits, labels, reduction="sum"),
            correct_in_top(logits, labels, 1).sum(),
            correct_in_top(logits, labels, 5).sum(),
        ]
    ).double()


@dataclass(frozen=True)
class Judgement:
    """One checkpoint on one data set; `forms` are the attention forms met, `device` and `world_size` what computed it.

    `reference_lines` are the accuracies that the result is to be held against, see `taylorvit.data.reference_lines`.
    """

    source: Source
    config: Config
    evaluation: Evaluation
    classes: list[str]
    notes: list[str]
    parameters: int
    forms: list[str]
    reference_lines: dict[str, float]
    seconds: float
    device: str
    world_size: int


def evaluate_checkpoint(
    state: dict[str, Tensor], source: Source, config: Config, accelerator: Accelerator, *, variant_name: str | None = None
) -> Judgement:
    """Build the model and the data of `config`, load the weights, and judge every validation image.

    Args:
        state: weights, from `load_weights`.
        source: where they came from.
        config: its model and data sections say what to build; another img_size than the source's resamples the position
            embedding, anything else must fit exactly. With train.compile the model is compiled, as it was in training.
        accelerator: from `build_accelerator`.
        variant_name: one of `taylorvit.data.VARIANTS`, or None.

    Raises:
        ValueError: the weights do not fit the model, the classes of the data are not those of the checkpoint, or more images
            cannot be read than data.max_bad_share allows.
    """
    started = time.monotonic()
    dataset = build_dataset(
        config.data, config.data.val_split, in_chans=config.model.in_chans, max_length=config.model.max_length
    )
    if variant_name and not isinstance(dataset, ImageDataset):
        raise ValueError(f"variant {variant_name!r} is of ImageNet, and data.dataset {config.data.dataset!r} holds sequences")
    variant = get_variant(variant_name, dataset) if variant_name and isinstance(dataset, ImageDataset) else None
    if variant is None:
        check_num_classes(dataset, config.model.num_classes)
        _check_class_names(source, dataset.classes)
    check_sequences(dataset, config.model)
    model = build_model(config.model)
    notes = load_into(model, state, adapt=_is_resized(source, config))
    loader = build_eval_loader(
        dataset,
        data=config.data,
        img_size=config.model.img_size,
        batch_size=config.evaluate.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        timeout_seconds=config.timeout_seconds,
    )
    model = model.to(accelerator.device)
    if config.train.compile:
        model.compile()
    num_classes = variant.num_classes if variant else config.model.num_classes
    with explained_loader_failures():
        evaluation = evaluate(model, loader, accelerator, num_classes=num_classes, variant=variant, with_confusion=True)
    return Judgement(
        source=source,
        config=config,
        evaluation=evaluation,
        classes=variant.classes if variant else dataset.classes,
        notes=notes + _check_unreadable(loader, evaluation, config.data, accelerator),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        forms=list(dict.fromkeys(attention_forms(model))),
        reference_lines=reference_lines(
            dataset, lambda: build_dataset(config.data, config.data.train_split, in_chans=config.model.in_chans)
        ),
        seconds=time.monotonic() - started,
        device=_device_name(accelerator.device),
        world_size=accelerator.num_processes,
    )


def _check_unreadable(loader: Loader, evaluation: Evaluation, data: DataConfig, accelerator: Accelerator) -> list[str]:
    """Return a note on the images that are in no figure, or raise an ImageError where they are too many."""
    if not evaluation.unreadable:
        return []
    total = len(loader.dataset)  # type: ignore[arg-type]
    first = min(gather_object(list(loader.unreadable.values())))
    text = f"{evaluation.unreadable} of {total} images cannot be read, such as: {first}"
    if evaluation.unreadable > (most := most_unreadable(total, data)):
        raise ImageError(f"{text}; data.max_bad_share {data.max_bad_share:g} allows {most}")
    return [f"judged {total - evaluation.unreadable} of {total} images: {text}"]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_resized(source: Source, config: Config) -> bool:
    """Whether the image size differs from the checkpoint's; a changed number of classes is never adapted in an evaluation."""
    saved = source.model_config or {}
    if "num_classes" in saved and saved["num_classes"] != config.model.num_classes:
        raise ValueError(
            f"model.num_classes: {config.model.num_classes} differs from the {saved['num_classes']} of {source.path}; "
            "an evaluation needs the classifier that was trained"
        )
    return "img_size" in saved and saved["img_size"] != config.model.img_size


def _check_class_names(source: Source, classes: list[str]) -> None:
    """Raise a ValueError at the first class that the checkpoint and the data set name differently."""
    for number, (trained, found) in enumerate(zip(source.class_names or [], classes)):
        if trained != found:
            raise ValueError(
                f"class {number} is {trained!r} in {source.path} but {found!r} in the data set: the labels cannot be compared"
            )
