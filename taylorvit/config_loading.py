"""Read a `Config` from YAML files and the command line, and check it.

jsonargparse does the reading and the types; what it rejects is said in one line that names the file, the key, the value and the
nearest known word. Ranges are checked here, so that a wrong value stops a run before anything is loaded.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import jsonargparse
import yaml

from taylorvit.config import Config


def build_parser(**parser_options: Any) -> jsonargparse.ArgumentParser:
    """Return a parser that takes layered `--config FILE`s, every key of `Config` as `--section.key`, and `--print_config`."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, **parser_options)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    parser.add_class_arguments(Config)
    return parser


def load_config(arguments: Sequence[str], parser: jsonargparse.ArgumentParser | None = None) -> tuple[Config, dict[str, Any]]:
    """Read YAML files and overrides from command-line arguments.

    Returns:
        the checked config, and the values of arguments that the caller added to the parser.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type, or one out of range.
    """
    parser = parser or build_parser()
    try:
        parsed = parser.instantiate(parser.parse_args(list(arguments)))
    except (jsonargparse.ArgumentError, yaml.YAMLError) as error:
        raise ValueError(_blamed_file(arguments) + _explain(str(error))) from error
    config = _checked(parsed)
    return config, {key: value for key, value in vars(parsed).items() if key not in vars(config) and key != "config"}


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a config from the plain dictionary of `config_to_dict`, checking types and names as `load_config` does."""
    parser = build_parser()
    try:
        return _checked(parser.instantiate(parser.parse_object(values)))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_explain(str(error))) from error


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a config or section as plain JSON types (tuples become lists)."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in _plain_items(config)}


def config_to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that `--config` reads back equal."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known word nearest to `word`, or nothing where none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"section.key": value}` for every setting."""
    flat: dict[str, Any] = {}
    for key, value in _plain_items(config) if is_dataclass(config) else config.items():
        if isinstance(value, dict) and not key.endswith(("kwargs", "_options")):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_config(config: Config) -> None:
    """Raise a ValueError for the first value that is out of range: the key, the value, what is allowed."""
    values = flatten(config)
    for keys, allowed, holds in _RANGES:
        for key in keys.split():
            value = values[key]
            if value is not None and not holds(value):
                raise ValueError(f"{key}: {value!r} is not allowed; expected {allowed}")
    if config.schedule.warmup_epochs >= config.schedule.epochs and config.schedule.warmup_epochs > 0:
        raise ValueError(
            f"schedule.warmup_epochs: {config.schedule.warmup_epochs} must be below schedule.epochs {config.schedule.epochs}"
        )
    for key in ("data.mean", "data.std"):
        if len(values[key]) not in (1, config.model.in_chans):
            raise ValueError(
                f"{key}: {values[key]} must have one value, or one for each of model.in_chans {config.model.in_chans}"
            )
    if config.checkpoint.metric == "ema_top1" and config.train.ema_decay is None:
        raise ValueError("checkpoint.metric: 'ema_top1' needs averaged weights; set train.ema_decay")


def _at_least(low: float) -> Any:
    return lambda value: math.isfinite(value) and value >= low


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _share_below_one(value: float) -> bool:
    return 0 <= value < 1


_COUNTS = (
    "model.num_classes model.img_size model.patch_size model.embed_dim model.depth model.num_heads "
    "data.prefetch_factor optim.lr_base_batch_size schedule.epochs schedule.stop_epoch train.global_batch_size "
    "train.micro_batch_size evaluate.batch_size evaluate.every_epochs checkpoint.every_epochs checkpoint.every_updates "
    "checkpoint.keep_best checkpoint.milestone_every_epochs log.every_updates timeout_seconds"
)
_RANGES: tuple[tuple[str, str, Any], ...] = (
    (_COUNTS, "1 or more", _at_least(1)),
    ("seed data.num_workers log.image_grid log.histogram_every_epochs augment.crop_padding", "0 or more", _at_least(0)),
    ("checkpoint.keep_last", "2 or more: the newest may be the one being written", _at_least(2)),
    ("model.in_chans", "1 (grey) or 3 (RGB)", lambda value: value in (1, 3)),
    ("optim.lr log.peak_tflops model.mlp_ratio", "a finite number above 0", _positive),
    (
        "optim.weight_decay optim.eps optim.max_grad_norm optim.momentum schedule.warmup_epochs schedule.warmup_lr "
        "schedule.min_lr augment.color_jitter augment.mixup_alpha augment.cutmix_alpha",
        "a finite number, 0 or more",
        _at_least(0),
    ),
    ("augment.hflip augment.random_erasing augment.mix_prob augment.mix_switch_prob", "a probability, 0 to 1", _share),
    ("augment.label_smoothing model.drop_path_rate model.drop_rate train.ema_decay", "0 or more, below 1", _share_below_one),
    ("data.crop_pct optim.layer_decay", "above 0, at most 1", lambda value: 0 < value <= 1),
    ("data.std", "numbers above 0", lambda value: all(map(_positive, value))),
    ("optim.betas", "two rates in 0..1, below 1", lambda value: all(map(_share_below_one, value))),
)


def _plain_items(config: Any) -> list[tuple[str, Any]]:
    items = asdict(config).items()
    return [(key, _plain(value)) for key, value in items]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _checked(parsed: Any) -> Config:
    config = Config(**{name.name: parsed[name.name] for name in fields(Config)})
    check_config(config)
    return config


def _blamed_file(arguments: Sequence[str]) -> str:
    """Return "FILE: " for the first configuration file that cannot be read on its own."""
    joined = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--config=")]
    spaced = [after for before, after in itertools.pairwise(arguments) if before == "--config"]
    for file in [*joined, *spaced]:
        try:
            build_parser().parse_args(["--config", file])
        except (jsonargparse.ArgumentError, yaml.YAMLError):
            return f"{file}: "
    return ""


def _explain(message: str) -> str:
    """Turn jsonargparse's message into one line that ends with the nearest known name or the allowed values."""
    text = " ".join(message.split())
    known = {key: key.rpartition(".")[2] for key in [*flatten(Config()), "config", "print_config"]}
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        group, option = match.groups()
        return f"unknown key {group}.{option}{_nearest_key(f'{group}.{option}', known)}"
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        return f"unknown key {match[1]}{_nearest_key(match[1], known)}"
    if match := re.search(r"unrecognized arguments: --([^\s=]+)", text):
        return f"unknown key {match[1]}{_nearest_key(match[1], known)}"
    if match := re.search(r'Parser key "([^"]+)": Expected a typing\.Literal\[(.+?)\]\. Got value: (\S+)', text):
        key, allowed, value = match.groups()
        words = re.findall(r"[\w-]+", allowed)
        return f"{key}: {value!r} is not one of {', '.join(words)}{nearest(value, words)}"
    return re.sub(r'Parser key "([^"]+)":', r"\1:", text)


def _nearest_key(word: str, known: dict[str, str]) -> str:
    sections = {key.rpartition(".")[0] for key in known} - {""}
    by_leaf = [key for key, leaf in known.items() if leaf == word.rpartition(".")[2]]
    return f"; did you mean {by_leaf[0]!r}?" if by_leaf else nearest(word, [*known, *sections])
