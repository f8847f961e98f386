"""Weights from wherever they lie: run, step and export folders, safetensors, foreign .pth/.tar files, timm by name.

Foreign files are data from strangers. They are read with PyTorch's restricted unpickler, which builds tensors and plain
containers and refuses everything else, and only after their unpacked size was looked at. `adaptation` puts what was read into a
model.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from taylorvit.adaptation import load_into
from taylorvit.checkpoint import best_checkpoint, find_newest_valid, load_checkpoint, read_meta
from taylorvit.config import ModelConfig
from taylorvit.config_loading import config_from_dict
from taylorvit.original import infer_model_config, is_original
from taylorvit.suggest import nearest
from taylorvit.training_state import clean_name

__all__ = ["MAX_BYTES", "Source", "Step", "load_into", "load_weights", "parse_step"]

MAX_BYTES = 4 * 2**30
RAW_KEYS = ("model_state", "state_dict", "model")  # where training scripts put the weights in their files
EMA_KEYS = ("state_dict_ema", "model_ema", "ema")
DATA_KEYS = ("mean", "std", "crop_pct", "interpolation")
Step = Literal["best", "newest"] | int


@dataclass(frozen=True)
class Source:
    """Where weights came from and what is known about them.

    Attributes:
        path: the folder or file that was read, or `timm:NAME`.
        kind: "step", "export", "safetensors", "file", "original" (the paper authors' code) or "timm".
        weights: "raw" or "ema".
        step: updates done, where it is known.
        model_config: fields of `ModelConfig`, where they are known.
        data_config: mean, std, crop_pct and interpolation that belong to the weights, where they are known.
        class_names: in the order of the classifier's outputs, where they are known.
        config: the whole configuration of the run, where there is one.
        metrics: what was measured at this step, where it was.
    """

    path: str
    kind: str
    weights: str
    step: int | None = None
    model_config: dict[str, Any] | None = None
    data_config: dict[str, Any] | None = None
    class_names: list[str] | None = None
    config: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def checked_model_config(self) -> ModelConfig:
        """Return the model's configuration, checked as a user's is: it comes from a file.

        Raises:
            ValueError: there is none, or a key or value is wrong.
        """
        if self.model_config is None:
            raise ValueError(f"{self.path}: it does not say which model it belongs to")
        try:
            any_channels = {"mean": [0.5], "std": [0.5]}
            return config_from_dict({"model": self.model_config, "data": any_channels}).model
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def load_weights(
    path: Path | str, *, weights: str = "raw", step: Step = "best", max_bytes: int = MAX_BYTES
) -> tuple[dict[str, Tensor], Source]:
    """Read weights on the CPU under timm's names.

    Args:
        path: a run folder, a step folder, an export folder, a .safetensors file, a file written by `torch.save` (that of the
            paper authors' code included), or `timm:NAME` for timm's pretrained weights.
        weights: "raw", "ema" for the averaged weights of a step or a file that has them, or "best" for those by which a run
            ranks its checkpoints (`checkpoint.metric`); elsewhere "best" is "raw". `Source.weights` says which were read.
        step: which checkpoint of a run folder: the best by the run's own metric, the newest, or a number of updates.
        max_bytes: a foreign file that unpacks to more is refused.

    Raises:
        ValueError: one line that names the path: nothing there, not weights, damaged, unsafe, too large, no averaged weights,
            a step asked of what is no run folder.
    """
    if weights not in ("raw", "ema", "best"):
        raise ValueError(f"weights={weights!r} is not allowed: 'raw', 'ema' or 'best'")
    if Path(path).is_dir():
        return _load_folder(Path(path), weights, step)
    weights = "raw" if weights == "best" else weights
    if str(path).startswith("timm:"):
        _no_step(path, step)
        return _load_timm(str(path).removeprefix("timm:"), weights)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is nothing there{' (a broken link)' if path.is_symlink() else ''}")
    if not path.is_file():
        raise ValueError(f"{path}: it is neither a file nor a folder")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    _no_step(path, step)
    if path.suffix == ".safetensors":
        _no_ema(path, weights)
        return _read_safetensors(path), Source(str(path), "safetensors", weights)
    return _load_pickled(path, weights, max_bytes)


def parse_step(text: str) -> Step:
    """Return a step as `load_weights` takes it from a word of the command line.

    Raises:
        ValueError: it is none.
    """
    words: dict[str, Step] = {"best": "best", "newest": "newest"}
    if text in words:
        return words[text]
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"--step {text}: expected best, newest or a number of updates")
    return int(text)


def _load_folder(path: Path, weights: str, step: Step) -> tuple[dict[str, Tensor], Source]:
    if (path / "manifest.json").exists() or (path / "meta.json").exists() or re.fullmatch(r"step-\d+", path.name):
        _no_step(path, step)
        return _load_step(path, weights)
    if (path / "checkpoints").is_dir():
        return _load_step(_choose_step(path / "checkpoints", step), weights)
    if (path / "config.json").exists():
        _no_step(path, step)
        _no_ema(path, weights)
        return _load_export(path)
    raise ValueError(f"{path}: it is no run folder (checkpoints/), step folder (manifest.json) or export folder (config.json)")


def _choose_step(folder: Path, step: Step) -> Path:
    """Return a step folder; read only, since a training process may be writing there."""
    newest = find_newest_valid(folder)
    if newest is None:
        raise ValueError(f"{folder}: there is no valid checkpoint")
    if step == "newest":
        return newest
    if step == "best":
        metric = _metric(read_meta(newest))
        best = best_checkpoint(folder, metric)
        if best is None:
            raise ValueError(
                f"{folder}: no checkpoint has been evaluated yet ({metric}): ask for the newest or name a step folder"
            )
        return best
    chosen = folder / f"step-{step:08d}"
    if not chosen.is_dir():
        raise ValueError(f"{folder}: there is no step {step}")
    return chosen


def _metric(meta: Mapping[str, Any]) -> str:
    """Return what the run ranks its checkpoints by."""
    section = (meta.get("config") or {}).get("checkpoint", {})
    return section.get("metric", "top1") if isinstance(section, dict) else "top1"


def _load_step(path: Path, weights: str) -> tuple[dict[str, Tensor], Source]:
    checkpoint = load_checkpoint(path)
    config = checkpoint.meta.get("config") or {}
    if weights == "best":
        weights = "ema" if _metric(checkpoint.meta) == "ema_top1" else "raw"
    prefix = "model." if weights == "raw" else "ema."
    state = {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}
    if not state:
        raise ValueError(f"{path}: it holds no {'weights' if weights == 'raw' else 'averaged (EMA) weights'}")
    try:
        data = {key: config["data"][key] for key in DATA_KEYS} if "data" in config else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'meta.json'}: config.data is incomplete ({error!r})") from error
    return state, Source(
        path=str(path),
        kind="step",
        weights=weights,
        step=checkpoint.step,
        model_config=config.get("model"),
        data_config=data,
        class_names=_class_names(checkpoint.meta.get("classes"), path / "meta.json"),
        config=config or None,
        metrics=checkpoint.meta.get("metrics", {}),
    )


def _load_export(path: Path) -> tuple[dict[str, Tensor], Source]:
    description = path / "config.json"
    if not description.is_file():
        raise ValueError(f"{description}: it is no file")
    try:
        config = json.loads(description.read_bytes())
        card = config["pretrained_cfg"]
        model = config.get("taylorvit", {}).get("model") or _model_config(
            config["architecture"], config.get("model_args", {}), card
        )
        data = {key: card[key] for key in DATA_KEYS}
        names = config.get("label_names") or card.get("label_names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{description}: it is not a timm model's description ({type(error).__name__}: {_first_line(error)})"
        ) from error
    data = _data_of_run(path.parent / "config.yaml") | data
    state, names = _read_safetensors(path / "model.safetensors"), _class_names(names, description)
    return state, Source(str(path), "export", "raw", model_config=model, data_config=data, class_names=names)


def _data_of_run(file: Path) -> dict[str, Any]:
    """Return what the configuration beside an export, still in its run's folder, says of the data; {} without one."""
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: it is not a run's configuration ({_first_line(error)})") from error
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: it is not a run's configuration (no section data)")
    return data


def _class_names(names: Any, file: Path) -> list[str] | None:
    if names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return names
    raise ValueError(f"{file}: the class names are {str(names)[:60]!r}, not a list of words")


def _load_timm(name: str, weights: str) -> tuple[dict[str, Tensor], Source]:
    _no_ema(f"timm:{name}", weights)
    if not timm.is_model(name):
        raise ValueError(f"timm:{name}: timm has no such model{nearest(name, timm.list_models(pretrained=True))}")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client and its transport raise errors of many families
        raise ValueError(f"timm:{name}: the pretrained weights are not to be had ({_first_line(error)})") from error
    card = model.pretrained_cfg
    data = {key: card[key] for key in DATA_KEYS}
    known = _model_config(name, {}, card)
    return dict(model.state_dict()), Source(f"timm:{name}", "timm", weights, model_config=known, data_config=data)


def _model_config(architecture: str, model_args: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's description of a model as fields of `ModelConfig`; what has no field of its own goes to kwargs."""
    if not isinstance(architecture, str):
        raise TypeError(f"the architecture is {architecture!r}")
    in_chans, height, width = card.get("input_size", (3, 224, 224))
    if height != width:
        raise ValueError(f"only square inputs are supported, not {height} x {width}")
    config: dict[str, Any] = {
        "name": architecture,
        "num_classes": card.get("num_classes", 1000),
        "in_chans": in_chans,
        "img_size": height,
    }
    if not architecture.startswith("taylorvit_"):
        config["attention"] = "softmax"
    own = {item.name for item in fields(ModelConfig)} - {"name", "kwargs", "img_size"}
    config.update({key: value for key, value in model_args.items() if key in own})
    config["kwargs"] = {key: value for key, value in model_args.items() if key not in own | {"img_size"}}
    return config


def _load_pickled(path: Path, weights: str, max_bytes: int) -> tuple[dict[str, Tensor], Source]:
    content = _read_pickled(path, max_bytes)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it holds a {type(content).__name__} where a dictionary of weights is expected")
    keys = RAW_KEYS if weights == "raw" else EMA_KEYS
    found = next((key for key in keys if isinstance(content.get(key), dict)), None)
    if found is None:
        _no_ema(path, weights)
    state = _tensors_only(content if found is None else content[found], path, max_bytes)
    if not is_original(state, content):
        return state, Source(str(path), "file", weights)
    state = {name: value.reshape(-1) if name.endswith(".temperature") else value for name, value in state.items()}
    try:
        model = infer_model_config(state, content.get("args"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state, Source(str(path), "original", weights, model_config=model)


def _read_pickled(path: Path, max_bytes: int) -> Any:
    """Unpickle without running foreign code.

    argparse.Namespace, in which the original code keeps its arguments, is allowed besides tensors and containers: it only holds
    attributes, and building one calls nothing.
    """
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than the limit of {max_bytes}")
    if zipfile.is_zipfile(path):
        _check_archive(path, max_bytes)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can make the unpickler fail in any way
        refused = re.search(r"(?:GLOBAL|class|function) [`']?([\w.]+\.[\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path}: refused, it asks for {refused[1]} and loading that could run foreign code; "
                "ask its author for safetensors or a file that holds tensors alone"
            ) from error
        # PyTorch's own text is not repeated: it advises to load without the restriction.
        raise ValueError(f"{path}: it is damaged or was not written by torch.save ({type(error).__name__})") from error


def _check_archive(path: Path, max_bytes: int) -> None:
    """Refuse a zip bomb: PyTorch stores its entries uncompressed, so that no entry is larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: it is a damaged archive ({error})") from error
    total = sum(entry.file_size for entry in entries)
    if total > min(max_bytes, path.stat().st_size):
        limit = f"the limit of {max_bytes}" if total > max_bytes else "PyTorch writes into a file of this size"
        raise ValueError(f"{path}: refused, it unpacks to {total} bytes, more than {limit}")


def _tensors_only(state: Mapping[Any, Any], path: Path, max_bytes: int) -> dict[str, Tensor]:
    """Return the state under clean names, each tensor with memory of its own size."""
    if not state:
        raise ValueError(f"{path}: the dictionary of weights is empty")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: no weights found; {str(name)[:60]!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{path}: {name[:60]!r} is no plain tensor ({value.layout}, {value.device.type}, {value.dtype})")
    total = sum(value.numel() * value.element_size() for value in state.values())
    if total > max_bytes:  # a stride of 0 makes any size out of a small file
        raise ValueError(f"{path}: refused, its tensors have {total} bytes, more than the limit of {max_bytes}")
    return {clean_name(name): value.detach() for name, value in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: it is no file")
    try:
        state = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: it is not a valid safetensors file ({_first_line(error)})") from error
    if not state:
        raise ValueError(f"{path}: there are no tensors in it")
    return {clean_name(name): value for name, value in state.items()}


def _no_ema(path: Path | str, weights: str) -> None:
    if weights == "ema":
        raise ValueError(f"{path}: it holds no averaged (EMA) weights; ask for the raw ones")


def _no_step(path: Path | str, step: Step) -> None:
    if step != "best":
        raise ValueError(f"{path}: step {step} can be chosen of a run folder only, and this is none")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
