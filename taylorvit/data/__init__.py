"""Data: images and sequences by name, the order of an epoch, augmentation and label mixing, all keyed by position.

`build_dataset` opens them, `build_train_loader` and `build_eval_loader` make batches of them, and `Mixer` mixes a batch.
"""

from taylorvit.data.augment import build_eval_transform, build_train_transform, check_augment
from taylorvit.data.comparison import check_classes, check_num_classes, dataset_fingerprint
from taylorvit.data.imagenet_variants import VARIANTS, Variant, get_variant
from taylorvit.data.images import DATASETS, ImageDataset, ImageError
from taylorvit.data.loader import Loader, LoaderError, explained_loader_failures
from taylorvit.data.mixing import Mixer, check_mixing, is_mixing
from taylorvit.data.sampling import TrainLoader, build_eval_loader, build_train_loader, epoch_updates, most_unreadable
from taylorvit.data.sequences import (
    PIXELS,
    AnyDataset,
    PixelDataset,
    TokenDataset,
    build_dataset,
    check_no_augment,
    check_sequences,
    format_reference_lines,
    holds_sequences,
    reference_lines,
)
from taylorvit.data.subset import share_samples

__all__ = [
    "DATASETS",
    "PIXELS",
    "VARIANTS",
    "AnyDataset",
    "ImageDataset",
    "ImageError",
    "Loader",
    "LoaderError",
    "Mixer",
    "PixelDataset",
    "TokenDataset",
    "TrainLoader",
    "Variant",
    "build_dataset",
    "build_eval_loader",
    "build_eval_transform",
    "build_train_loader",
    "build_train_transform",
    "check_augment",
    "check_classes",
    "check_mixing",
    "check_no_augment",
    "check_num_classes",
    "check_sequences",
    "dataset_fingerprint",
    "epoch_updates",
    "explained_loader_failures",
    "format_reference_lines",
    "get_variant",
    "holds_sequences",
    "is_mixing",
    "most_unreadable",
    "reference_lines",
    "share_samples",
]
