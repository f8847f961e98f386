"""Is this the data set that is meant: same classes in training and validation, and the same samples as before a resume."""

from __future__ import annotations

import hashlib
import json

from taylorvit.data.sequences import AnyDataset


def check_classes(train_dataset: AnyDataset, val_dataset: AnyDataset) -> None:
    """Raise ValueError, naming the first difference, unless both sets have the same classes.

    A class folder that is missing on one side would shift all later labels there.
    """
    train, val = train_dataset.classes, val_dataset.classes
    if train == val:
        return
    counts = f"{len(train)} training and {len(val)} validation classes"
    for name in train:
        if name not in val:
            raise ValueError(f"class {name!r} is in the training set but not in the validation set ({counts})")
    for name in val:
        if name not in train:
            raise ValueError(f"class {name!r} is in the validation set but not in the training set ({counts})")
    raise ValueError(f"the training and the validation set number their classes differently ({counts})")


def check_num_classes(dataset: AnyDataset, num_classes: int) -> None:
    """Raise ValueError unless the data set has `num_classes` classes."""
    if len(dataset.classes) != num_classes:
        shown = ", ".join(dataset.classes[:3])
        raise ValueError(f"model.num_classes is {num_classes}, but the data has {len(dataset.classes)} classes ({shown}, ...)")


def dataset_fingerprint(dataset: AnyDataset) -> str:
    """Return a hex digest of the number of samples, the class names, the sample names and the labels.

    It does not depend on the folder that the data lie in, and reads no image. Of torchvision and Hugging Face sets, whose
    samples have no names, it knows the set's name instead.
    """
    digest = hashlib.sha256()
    for part in (json.dumps([len(dataset), dataset.classes]).encode(), *dataset.source.identity()):
        digest.update(len(part).to_bytes(8, "little"))  # else bytes could move from one part to the next unseen
        digest.update(part)
    return digest.hexdigest()
