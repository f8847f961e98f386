"""Read a `Config` from YAML files and the command line, and check it.

jsonargparse does the reading and the types; what it rejects is said in one line that names the file, the key, the value and the
nearest known word. Ranges, and what YAML lets pass in silence (a key given twice, `no` for false), are checked here, so that a
wrong value stops a run before anything is loaded.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import jsonargparse
import yaml

from taylorvit.config import Config
from taylorvit.suggest import nearest


def build_parser(**parser_options: Any) -> jsonargparse.ArgumentParser:
    """Return a parser that takes layered `--config FILE`s, every key of `Config` as `--section.key`, and `--print_config`."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, **parser_options)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    parser.add_class_arguments(Config)
    return parser


def load_config(arguments: Sequence[str], parser: jsonargparse.ArgumentParser | None = None) -> tuple[Config, dict[str, Any]]:
    """Read YAML files and overrides from command-line arguments.

    Returns:
        the checked config, and the values of arguments that the caller added to the parser.

    Raises:
        ValueError: a file that cannot be read, an unknown key (with the nearest known one), a value of the wrong type, or one
            out of range.
    """
    parser = parser or build_parser()
    for file in _config_files(arguments):
        check_yaml(file)
    try:
        parsed = parser.parse_args(list(arguments))
    except _REFUSALS as error:
        raise ValueError(_blamed_file(arguments) + _explain(str(error))) from error
    config = _checked(parser, parsed)
    return config, {key: value for key, value in vars(parsed).items() if key not in vars(config) and key != "config"}


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a config from the plain dictionary of `config_to_dict`, checking types and names as `load_config` does."""
    parser = build_parser()
    try:
        parsed = parser.parse_object(values)
    except _REFUSALS as error:
        raise ValueError(_explain(str(error))) from error
    return _checked(parser, parsed)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a config or section as plain JSON types (tuples become lists)."""
    return _plain(asdict(config))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"section.key": value}` for every setting."""
    flat: dict[str, Any] = {}
    for key, value in (config_to_dict(config) if is_dataclass(config) else config).items():
        if isinstance(value, dict) and not key.endswith(("kwargs", "_options")):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_yaml(file: str) -> None:
    """Check what YAML itself lets pass: keys, repetitions, and words it takes for another value.

    Raises:
        ValueError: names file and line.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason})") from error
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{_place(error.problem_mark)}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file}: {'a ' + root.id if root else 'nothing'} where `key: value` lines are expected")
    _check_node(root, "", set())


def check_config(config: Config) -> None:
    """Raise a ValueError for the first value that is out of range: the key, the value, what is allowed."""
    values = flatten(config)
    for keys, allowed, holds in _RANGES:
        for key in keys.split():
            value = values[key]
            if value is not None and not holds(value):
                raise ValueError(f"{key}: {value!r} is not allowed; expected {allowed}")
    _check_combinations(config)


def _check_combinations(config: Config) -> None:
    """Raise a ValueError for values that are each in range but contradict one another."""
    schedule, chans = config.schedule, config.model.in_chans
    if schedule.warmup_epochs >= schedule.epochs and schedule.warmup_epochs > 0:
        raise ValueError(f"schedule.warmup_epochs: {schedule.warmup_epochs} must be below schedule.epochs {schedule.epochs}")
    if schedule.name == "rsqrt" and schedule.warmup_epochs == 0:
        raise ValueError(
            "schedule.warmup_epochs: 0 is not allowed with schedule.name 'rsqrt', which falls by the warm-up's length"
        )
    if schedule.stop_epoch is not None and schedule.stop_epoch > schedule.epochs:
        raise ValueError(f"schedule.stop_epoch: {schedule.stop_epoch} is beyond schedule.epochs {schedule.epochs}")
    for key, channels in (("data.mean", config.data.mean), ("data.std", config.data.std)):
        if len(channels) not in (1, chans):
            raise ValueError(f"{key}: {channels} must have one value, or one for each of model.in_chans {chans}")
    if config.checkpoint.metric == "ema_top1" and config.train.ema_decay is None:
        raise ValueError("checkpoint.metric: 'ema_top1' needs averaged weights; set train.ema_decay")
    if config.model.attention == "softmax":
        for key, off in (("decay_temperature", False), ("temperature_lr_scale", 1)):
            if (value := getattr(config.optim, key)) != off:
                given = f"optim.{key}: {str(value).lower()}"
                raise ValueError(f"{given} has no effect: model.attention 'softmax' has no temperature")
    if config.train.freeze == "backbone" and config.train.finetune is None:
        raise ValueError("train.freeze: 'backbone' would train a classifier on random features; set train.finetune")


def _at_least(low: float) -> Any:
    return lambda value: low <= value < math.inf


def _between(low: int, high: int) -> Any:
    return lambda value: low <= value <= high


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _share_below_one(value: float) -> bool:
    return 0 <= value < 1


_COUNTS = (
    "model.num_classes model.vocab_size model.max_length model.img_size model.patch_size model.embed_dim model.num_heads "
    "data.prefetch_factor optim.lr_base_batch_size schedule.epochs schedule.updates_per_epoch schedule.stop_epoch "
    "train.global_batch_size train.micro_batch_size evaluate.batch_size evaluate.every_epochs checkpoint.every_epochs "
    "checkpoint.every_updates checkpoint.keep_best checkpoint.milestone_every_epochs log.every_updates timeout_seconds"
)
_RANGES: tuple[tuple[str, str, Any], ...] = (
    # Above these limits nobody means what is written, and torch or the clock would fail in its own words, or work for ever.
    (_COUNTS, "1 to 1,000,000,000", _between(1, 10**9)),
    ("model.depth", "1 to 10,000", _between(1, 10**4)),
    ("data.num_workers", "0 to 1,024", _between(0, 2**10)),
    ("data.io_retries log.image_grid log.histogram_every_epochs augment.crop_padding", "0 to 1,000,000", _between(0, 10**6)),
    ("seed", "0 or more", _at_least(0)),
    ("checkpoint.keep_last", "2 or more: the newest may be the one being written", _at_least(2)),
    ("model.in_chans", "1 (grey) or 3 (RGB)", lambda value: value in (1, 3)),
    (
        "optim.lr optim.temperature_lr_scale optim.max_grad_norm log.peak_tflops model.mlp_ratio",
        "a finite number above 0",
        _positive,
    ),
    (
        "optim.weight_decay optim.eps optim.momentum schedule.warmup_epochs schedule.warmup_lr "
        "schedule.min_lr augment.color_jitter augment.mixup_alpha augment.cutmix_alpha",
        "a finite number, 0 or more",
        _at_least(0),
    ),
    ("augment.hflip augment.random_erasing augment.mix_prob augment.mix_switch_prob", "a probability, 0 to 1", _share),
    ("data.max_bad_share", "a share, 0 to 1", _share),
    ("augment.label_smoothing model.drop_path_rate model.drop_rate train.ema_decay", "0 or more, below 1", _share_below_one),
    ("data.crop_pct optim.layer_decay", "above 0, at most 1", lambda value: 0 < value <= 1),
    ("data.mean", "finite numbers", lambda value: all(map(math.isfinite, value))),
    ("data.std", "finite numbers above 0", lambda value: all(map(_positive, value))),
    ("optim.betas", "two rates in 0..1, below 1", lambda value: all(map(_share_below_one, value))),
)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _annotations(section: type, prefix: str = "") -> dict[str, str]:
    """Return `{"section.key": annotation}`, as the dataclasses' source has it, for every setting."""
    found: dict[str, str] = {}
    for item in fields(section):
        if is_dataclass(item.default_factory):
            found |= _annotations(item.default_factory, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = str(item.type)
    return found


_REFUSALS = (jsonargparse.ArgumentError, OverflowError, ValueError)  # the latter two of integers with very many digits
_TYPES = _annotations(Config)
_SECTIONS = {key.partition(".")[0] for key in _TYPES if "." in key}


def _checked(parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace) -> Config:
    """Build and check the config; jsonargparse lets null stand for any value, which only an optional one may be."""
    for section in _SECTIONS:
        if not isinstance(parsed[section], jsonargparse.Namespace):
            raise ValueError(f"{section}: {parsed[section]!r} is not allowed; it is a section, give its keys")
    for key, annotation in _TYPES.items():
        if parsed[key] is None and "None" not in annotation:
            raise ValueError(f"{key}: null is not allowed; expected {annotation}")
    built = parser.instantiate(parsed)
    config = Config(**{item.name: built[item.name] for item in fields(Config)})
    check_config(config)
    return config


def _check_node(node: yaml.Node, key: str, seen: set[int | str]) -> None:
    """Check a YAML node and what is below it; `seen` holds the keys and the identities of the nodes met before."""
    if isinstance(node, yaml.ScalarNode):
        if _is_misread(node):
            raise ValueError(
                f"{_place(node.start_mark)}: {key}: YAML takes {node.value} for another value; "
                "put it in quotes, or write true, false or a decimal number"
            )
        return
    below = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    if id(node) in seen and not all(isinstance(child, yaml.ScalarNode) for child in below):
        raise ValueError(f"{_place(node.start_mark)}: {key}: an alias may stand for plain values only")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(below):
            _check_node(child, f"{key}[{position}]", seen)
        return
    for name, value in node.value:
        _check_key(name, value, key, seen)


def _check_key(name: yaml.Node, value: yaml.Node, section: str, seen: set[int | str]) -> None:
    """Check one `name: value` of a mapping: known, not given before, and what is below it."""
    place = _place(name.start_mark)
    if not isinstance(name, yaml.ScalarNode):
        raise ValueError(f"{place}: a {name.id} cannot be a key")
    key = f"{section}.{name.value}" if section else name.value
    if section in ("", *_SECTIONS) and key not in (*_TYPES, *_SECTIONS):
        raise ValueError(f"{place}: unknown key {key!r}{_nearest_key(key)}")
    if key in _SECTIONS and not isinstance(value, yaml.MappingNode):
        raise ValueError(f"{place}: {key} is a section: its keys stand below it, indented")
    if key in seen:
        raise ValueError(f"{place}: the key {key!r} is given twice")
    seen.add(key)
    _check_node(value, key, seen)


def _is_misread(node: yaml.ScalarNode) -> bool:
    """Whether YAML 1.1 makes of an unquoted word what few expect: no -> false, 12:30 -> 750, 010 -> 8."""
    kind = node.tag.rpartition(":")[2]
    return (
        (kind == "bool" and node.value.lower() not in ("true", "false"))
        or (kind == "int" and not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value))
        or (kind == "float" and ":" in node.value)
    )


def _place(mark: yaml.Mark | None) -> str:
    return f"{mark.name}, line {mark.line + 1}" if mark else "configuration"


def _config_files(arguments: Sequence[str]) -> list[str]:
    joined = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--config=")]
    return joined + [after for before, after in itertools.pairwise(arguments) if before == "--config"]


def _blamed_file(arguments: Sequence[str]) -> str:
    """Return "FILE: " for the first configuration file that is not accepted on its own."""
    for file in _config_files(arguments):
        try:
            build_parser().parse_args(["--config", file])
        except _REFUSALS:
            return f"{file}: "
    return ""


def _explain(message: str) -> str:
    """Turn jsonargparse's message into one line that ends with the nearest known name or what is allowed."""
    text = " ".join(message.split())
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        key = f"{match[1]}.{match[2]}"
        return f"unknown key {key!r}{_nearest_key(key, 'config', 'print_config')}"
    if match := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)", text):
        key = match[1] or match[2]
        return f"unknown key {key!r}{_nearest_key(key, 'config', 'print_config')}"
    match = re.search(r'Parser key "([^"]+)": .*(?:Got|Given) value: (.*)$', text)
    if match and (annotation := _TYPES.get(match[1])):
        words = re.findall(r"'([^']+)'", annotation)
        allowed = f"one of {', '.join(words)}" if words else annotation
        return f"{match[1]}: {match[2]} is not allowed; expected {allowed}"
    return re.sub(r'Parser key "([^"]+)":', r"\1:", text)


def _nearest_key(word: str, *others: str) -> str:
    by_leaf = [key for key in _TYPES if key.rpartition(".")[2] == word.rpartition(".")[2]]
    return f"; did you mean {by_leaf[0]!r}?" if by_leaf else nearest(word, [*_TYPES, *_SECTIONS, *others])
