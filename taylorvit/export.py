"""Export for other programs: model.safetensors and config.json as timm writes and reads them, with our preprocessing in it.

import taylorvit, timm
model = timm.create_model("local-dir:runs/NAME/export", pretrained=True)
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn


def export_model(
    model: nn.Module,
    folder: Path | str,
    *,
    model_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
    interpolation: str,
) -> Path:
    """Write a timm model's weights and description, replacing an earlier export; return the folder.

    The keywords that rebuild the model are those it was created with, which timm records. Drop rates are not among them.

    Args:
        model: made by `build_model` or `timm.create_model`, without wrappers.
        folder: made if it is not there.
        model_config: fields of `ModelConfig`, kept in config.json for `load_weights`.
        class_names: one a class, in the order of the outputs.
        mean: per channel, as in training.
        std: per channel, as in training.
        crop_pct: of the evaluation.
        interpolation: of the evaluation.

    Raises:
        ValueError: the class names do not fit the classifier, or the folder cannot be written.
    """
    num_classes: int = model.num_classes  # type: ignore[assignment]
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names has {len(class_names)} names, the model {num_classes} classes")
    root: dict[str, Any] = {} if class_names is None else {"label_names": list(class_names)}
    if model_config is not None:
        root["taylorvit"] = {"model": dict(model_config)}
    data = {"mean": list(mean), "std": list(std), "crop_pct": crop_pct, "interpolation": interpolation}
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors refuses channels_last
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"cannot export to {folder}: the folder holds other files; name a new one or an earlier export")
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save_for_hf(plain, temporary, model_config=root, data_config=data, safe_serialization=True)
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # written 0600, whatever the umask
        folder.mkdir(exist_ok=True)
        for file in ("model.safetensors", "config.json"):
            (temporary / file).replace(folder / file)
    except OSError as error:
        raise ValueError(f"cannot export to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
