"""Configuration: layers, names, types and ranges; every wrong file or value is one ValueError of one line."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from taylorvit.config import Config
from taylorvit.config_loading import (
    _RANGES,
    build_parser,
    check_config,
    check_yaml,
    config_from_dict,
    config_to_dict,
    flatten,
    load_config,
    nearest,
)

KEYS = list(flatten(Config()))
PARSER = build_parser()
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def written(folder: Path, content: str | bytes, name: str = "run.yaml") -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def load(file: str, *arguments: str) -> Config:
    return load_config(["--config", file, *arguments], PARSER)[0]


def refusal(*arguments: str) -> str:
    """Return the message of the refusal, which must be one line."""
    with pytest.raises(ValueError, match=".") as caught:
        load_config(list(arguments), PARSER)
    message = str(caught.value)
    assert "\n" not in message
    return message


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return `{"section": {"name": value}}`."""
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def with_value(key: str, value: Any) -> Config:
    """Return the defaults with one value replaced, unchecked."""
    config = Config()
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    return config


# ---- layers and types


@pytest.mark.fault("E3")
def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    """PyYAML itself reads 1e-3 as a word."""
    config = load(written(tmp_path, "optim:\n  lr: 1e-3\n  eps: 1E-7\n  kwargs: {a: 5e-4}\n"))
    assert (config.optim.lr, config.optim.eps, config.optim.kwargs) == (1e-3, 1e-7, {"a": 5e-4})
    assert load_config(["--optim.lr", "1e-3"])[0].optim.lr == 1e-3


def test_later_files_and_the_command_line_win(tmp_path: Path) -> None:
    first = written(tmp_path, "seed: 1\noptim: {lr: 1.0, weight_decay: 0.1}\nmodel: {depth: 3}\n", "a.yaml")
    second = written(tmp_path, "seed: 2\noptim: {lr: 2.0}\n", "b.yaml")
    config, _ = load_config(["--config", first, f"--config={second}", "--optim.lr=3.0"])
    assert (config.seed, config.optim.lr, config.optim.weight_decay, config.model.depth) == (2, 3.0, 0.1, 3)
    reverse, _ = load_config(["--config", second, "--config", first])
    assert (reverse.seed, reverse.optim.lr) == (1, 1.0)


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert load_config([], PARSER)[0] == Config()
    assert {type(getattr(load_config([], PARSER)[0], item.name)) for item in fields(Config)} == {
        type(getattr(Config(), item.name)) for item in fields(Config)
    }


def test_options_of_the_caller_come_back_beside_the_config(tmp_path: Path) -> None:
    parser = build_parser()
    parser.add_argument("--dry_run", action="store_true")
    config, options = load_config(["--config", written(tmp_path, "seed: 5"), "--dry_run"], parser)
    assert (config.seed, options) == (5, {"dry_run": True})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_load_and_survive_a_round_trip(file: Path) -> None:
    config = load(str(file))
    values = config_to_dict(config)
    assert json.loads(json.dumps(values)) == values
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(values))) == config


def test_resolved_config_reads_back_as_a_file(tmp_path: Path) -> None:
    settings = "seed: 3\noptim: {betas: [0.8, 0.9], lr: 1e-7}\ntrain: {mixed_precision: 'no'}\n"
    config = load(written(tmp_path, settings + "model: {attention_options: {form: direct}}"))
    again = load(written(tmp_path, yaml.safe_dump(config_to_dict(config), sort_keys=False), "resolved.yaml"))
    assert again == config
    assert again != Config()


def test_types_that_are_accepted(tmp_path: Path) -> None:
    config = load(
        written(tmp_path, "optim: {lr: 1, betas: [0.5, 0.5], layer_decay: null}\ntrain: {compile: true}\nmodel: {depth: 2}")
    )
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert tuple(config.optim.betas or ()) == (0.5, 0.5)
    assert config.train.compile is True
    assert config.model.depth == 2


def test_print_config_shows_the_resolved_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load(written(tmp_path, "seed: 7"), "--optim.lr=1e-5", "--print_config")
    assert left.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["optim"]["lr"], shown["model"]["img_size"]) == (7, 1e-5, 224)


# ---- names


def misspelt(word: str) -> Iterator[str]:
    """Yield the word with one letter changed, dropped and doubled."""
    middle = len(word) // 2
    yield word[:middle] + ("x" if word[middle] != "x" else "y") + word[middle + 1 :]
    yield word[:middle] + word[middle + 1 :]
    yield word[:middle] + word[middle] + word[middle:]


@pytest.mark.fault("E1")
def test_every_misspelt_key_is_refused_with_the_right_one(tmp_path: Path) -> None:
    for key in KEYS:
        section, _, name = key.rpartition(".")
        for wrong in misspelt(name):
            given = f"{section}.{wrong}" if section else wrong
            if given in KEYS:
                continue
            with pytest.raises(ValueError, match="unknown key") as caught:
                check_yaml(written(tmp_path, yaml.safe_dump(nested(given, 1))))
            line = 2 if section else 1
            assert str(caught.value) == f"{tmp_path}/run.yaml, line {line}: unknown key {given!r}; did you mean {key!r}?"


@pytest.mark.fault("E1")
@pytest.mark.parametrize("key", ["seed", "optim.weight_decay", "train.global_batch_size", "log.tensorboard"])
def test_misspelt_keys_on_the_command_line(key: str) -> None:
    for wrong in misspelt(key):
        assert refusal(f"--{wrong}=1") == f"unknown key {wrong!r}; did you mean {key!r}?"


@pytest.mark.fault("E1")
def test_misspelt_keys_in_a_dictionary() -> None:
    with pytest.raises(ValueError, match=r"^unknown key 'optim\.lrr'; did you mean 'optim\.lr'\?$"):
        config_from_dict({"optim": {"lrr": 1.0}})


@pytest.mark.fault("E1")
def test_misspelt_sections(tmp_path: Path) -> None:
    for section in (item.name for item in fields(Config) if hasattr(getattr(Config(), item.name), "__dataclass_fields__")):
        for wrong in misspelt(section):
            message = refusal("--config", written(tmp_path, f"{wrong}:\n  a: 1\n"))
            assert message.endswith(f"line 1: unknown key {wrong!r}; did you mean {section!r}?")


def test_a_key_in_the_wrong_section_points_to_the_right_one(tmp_path: Path) -> None:
    assert refusal("--lr=1").endswith("did you mean 'optim.lr'?")
    assert refusal("--config", written(tmp_path, "train:\n  epochs: 3\n")).endswith("did you mean 'schedule.epochs'?")


@pytest.mark.fault("E1")
def test_abbreviated_keys_are_unknown() -> None:
    assert refusal("--schedule.epoch=9") == "unknown key 'schedule.epoch'; did you mean 'schedule.epochs'?"
    assert "unknown key 'optim.weight_dec'" in refusal("--optim.weight_dec=0.5")


def test_words_that_only_jsonargparse_knows_are_unknown(tmp_path: Path) -> None:
    other = written(tmp_path, "seed: 9", "other.yaml")
    for content in (
        f"config: {other}",
        "__path__: 3",
        "optim:\n  class_path: taylorvit.config.OptimConfig\n  init_args: {lr: 1}",
    ):
        assert "unknown key" in refusal("--config", written(tmp_path, content))
    assert "optim is a section" in refusal("--config", written(tmp_path, f"optim: {other}"))


def test_nearest_is_silent_without_a_likeness() -> None:
    assert nearest("adamv", ["adamw", "lamb"]) == "; did you mean 'adamw'?"
    assert nearest("zzz", ["adamw", "lamb"]) == ""


# ---- files


@pytest.mark.fault("E2")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing where `key: value` lines are expected"),
        ("# all commented out\n", "nothing where"),
        ("- a\n- b\n", "a sequence where"),
        ("just words", "a scalar where"),
        ("optim:\n\tlr: 1\n", "line 2: not valid YAML: .*'\\\\t'"),
        ("optim: {lr: 1\nseed: 3", "not valid YAML: while parsing a flow mapping"),
        ("optim: [1", "line 1: not valid YAML"),
        ("seed: 'a", "not valid YAML: .*quoted scalar"),
        ("seed: 1\n---\nseed: 2", "not valid YAML: expected a single document"),
        (b"run_dir: caf\xe9", "not UTF-8 text"),
        (b"\xff\xfes\x00e\x00", "not UTF-8 text"),
        (b"seed: \x00 3", "not valid YAML: unacceptable character"),
        ("optim: {lr: 1e-3, lr: 2e-3}", "line 1: the key 'optim.lr' is given twice"),
        ("seed: 1\noptim:\n  lr: 1.0\nseed: 2\n", "line 4: the key 'seed' is given twice"),
        ("optim:\n  lr: 1.0\nmodel: {depth: 2}\noptim:\n  eps: 1.0\n", "line 4: the key 'optim' is given twice"),
        ("optim.lr: 1.0\noptim: {lr: 2.0}", "line 2: the key 'optim.lr' is given twice"),
        ("model:\n  kwargs:\n    a: {b: 1}\n    c: 1\n    a: 2\n", "line 5: the key 'model.kwargs.a' is given twice"),
        ("? [a]\n: 3", "a sequence cannot be a key"),
        ("optim:\n", "line 1: optim is a section"),
        ("seed: 1\noptim: 3\n", "line 2: optim is a section"),
        ("model: {kwargs: {a: &a [*a]}}", "an alias may stand for plain values only"),
        ("model: {kwargs: &a {b: *a}}", "an alias may stand for plain values only"),
        ("model: {kwargs: {a: " + "[" * 1100 + "}}", "nested too deeply"),
        ("train:\n  mixed_precision: no\n", "line 2: train.mixed_precision: YAML takes no for another value; put it in quotes"),
        ("train: {compile: yes}", "train.compile: YAML takes yes for another value; .*write true, false"),
        ("schedule: {epochs: 12:30}", "schedule.epochs: YAML takes 12:30 for another value"),
        ("schedule: {epochs: 010}", "schedule.epochs: YAML takes 010 for another value"),
        ("data: {mean: [0.5, 1:30.5, 0.5]}", r"data.mean\[1\]: YAML takes 1:30.5 for another value"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load(file)
    assert str(caught.value).startswith(file)
    assert "\n" not in str(caught.value)


def test_alias_bomb_ends_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    content = "model:\n  kwargs:\n" + "\n".join(f"    {level}" for level in levels)
    assert "an alias may stand for plain values only" in refusal("--config", written(tmp_path, content))


def test_harmless_yaml_is_accepted(tmp_path: Path) -> None:
    content = (
        "data: {mean: &half [0.5, 0.5, 0.5], std: *half}\n"
        "train: {mixed_precision: 'no', compile: True}\n"
        "model: {kwargs: {a: [{b: 1}, {b: 2}], b: 1}}\n"
        "run_dir: 2024-01-01\n"
    )
    config = load(written(tmp_path, b"\xef\xbb\xbf" + content.encode()))
    assert config.data.mean == config.data.std == [0.5, 0.5, 0.5]
    assert (config.train.mixed_precision, config.train.compile) == ("no", True)
    assert (config.model.kwargs, config.run_dir) == ({"a": [{"b": 1}, {"b": 2}], "b": 1}, "2024-01-01")


@pytest.mark.fault("E5")
@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system", "!x"]
)
@pytest.mark.parametrize("place", ["{}", "optim: {}", "run_dir: {}", "model: {{kwargs: {{a: {}}}}}", "? {}\n: 1"])
def test_tags_run_nothing(tmp_path: Path, tag: str, place: str) -> None:
    canary = tmp_path / "canary"
    file = written(tmp_path, place.format(f"{tag} ['touch {canary}']"))
    assert refusal("--config", file).startswith(file)
    assert not canary.exists()


@pytest.mark.fault("E5")
def test_environment_is_not_read_into_values(tmp_path: Path) -> None:
    assert load(written(tmp_path, "run_dir: ${HOME}")).run_dir == "${HOME}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal("--config", str(tmp_path / "none.yaml")) == f"{tmp_path}/none.yaml: No such file or directory"
    assert refusal(f"--config={tmp_path}") == f"{tmp_path}: Is a directory"
    assert "expected one argument" in refusal("--config")


def test_the_file_with_the_wrong_type_is_named(tmp_path: Path) -> None:
    good, bad = written(tmp_path, "seed: 1", "good.yaml"), written(tmp_path, "optim: {lr: fast}", "bad.yaml")
    assert refusal("--config", good, "--config", bad) == f"{bad}: optim.lr: fast is not allowed; expected float"
    assert refusal("--config", good, "--optim.lr=fast") == "optim.lr: fast is not allowed; expected float"


# ---- types and ranges


@pytest.mark.fault("E3")
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("schedule.epochs", 1.5, "int"),
        ("schedule.epochs", True, "int"),
        ("schedule.epochs", None, "int"),
        ("schedule.epochs", "many", "int"),
        ("optim.lr", True, "float"),
        ("optim.lr", [1.0], "float"),
        ("optim.lr", None, "float"),
        ("optim.layer_decay", "x", "float | None"),
        ("optim.betas", [0.9], "tuple[float, float] | None"),
        ("optim.betas", 0.9, "tuple[float, float] | None"),
        ("optim.kwargs", [1], "dict[str, Any]"),
        ("model.name", 3, "str"),
        ("run_dir", None, "str"),
        ("resume", None, "str"),
        ("data.mean", 0.5, "list[float]"),
        ("data.mean", None, "list[float]"),
        ("augment.three_augment", 1, "bool"),
        ("augment.crop_scale", [0.1, 0.2, 0.3], "tuple[float, float]"),
        ("train.mixed_precision", "bf17", "one of no, bf16, fp16"),
        ("device", "gpu", "one of auto, cpu, cuda"),
        ("schedule.name", "cosin", "one of cosine, tanh, poly, constant, rsqrt"),
    ],
)
def test_wrong_types_say_key_value_and_type(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    message = refusal("--config", written(tmp_path, yaml.safe_dump(nested(key, value))))
    shown = "null" if value is None else value
    assert message.endswith(f"{key}: {shown} is not allowed; expected {expected}")


@pytest.mark.fault("E3")
def test_null_is_accepted_exactly_where_the_type_says_so(tmp_path: Path) -> None:
    optional = {key for key, annotation in _annotations_of(Config()).items() if "None" in annotation}
    assert {"optim.betas", "train.ema_decay", "log.peak_tflops"} <= optional
    for key in KEYS:
        arguments = ["--config", written(tmp_path, yaml.safe_dump(nested(key, None)))]
        if key in optional:
            assert flatten(load_config(arguments, PARSER)[0])[key] is None
        else:
            with pytest.raises(ValueError, match=rf"^{key}: null is not allowed; expected "):
                load_config(arguments, PARSER)


def _annotations_of(config: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        nested_fields = hasattr(value, "__dataclass_fields__")
        found |= _annotations_of(value, f"{item.name}.") if nested_fields else {prefix + item.name: str(item.type)}
    return found


BORDERS: dict[str, tuple[list[Any], list[Any]]] = {
    "1 to 1,000,000,000": ([1, 2, 10**9], [0, -1, 10**9 + 1, 10**400]),
    "1 to 10,000": ([1, 10**4], [0, 10**4 + 1]),
    "0 to 1,024": ([0, 1024], [-1, 1025]),
    "0 to 1,000,000": ([0, 10**6], [-1, 10**6 + 1]),
    "0 or more": ([0, 1, 10**400], [-1]),
    "2 or more: the newest may be the one being written": ([2], [1, 0]),
    "1 (grey) or 3 (RGB)": ([1, 3], [0, 2, 4]),
    "a finite number above 0": ([1e-300, 1e300], [0.0, -1e-9, math.inf, math.nan]),
    "a finite number, 0 or more": ([0.0, 1e300], [-1e-9, math.inf, -math.inf, math.nan]),
    "a probability, 0 to 1": ([0.0, 1.0], [-1e-9, 1.0000001, math.inf, math.nan]),
    "a share, 0 to 1": ([0.0, 1.0], [-1e-9, 1.0000001, math.inf, math.nan]),
    "0 or more, below 1": ([0.0, 0.9999999], [-1e-9, 1.0, math.nan]),
    "above 0, at most 1": ([1e-9, 1.0], [0.0, 1.0000001, math.nan]),
    "finite numbers": ([[0.0], [-1.0, 0.0, 5.0]], [[math.nan], [0.1, 0.2, math.inf]]),
    "finite numbers above 0": ([[1e-9], [1.0, 2.0, 3.0]], [[0.0], [1.0, 1.0, -1.0], [math.inf]]),
    "two rates in 0..1, below 1": ([(0.0, 0.9999)], [(0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9)]),
}


@pytest.mark.fault("E4")
@pytest.mark.parametrize(("keys", "allowed"), [(keys, allowed) for keys, allowed, _ in _RANGES])
def test_ranges_and_their_borders(keys: str, allowed: str) -> None:
    inside, outside = BORDERS[allowed]
    for key in keys.split():
        for value in inside:
            config = with_value(key, value)
            if key == "schedule.epochs":
                config.schedule.warmup_epochs = 0.0
            elif key == "schedule.warmup_epochs":  # which is bounded by the epochs
                config.schedule.epochs, config.schedule.warmup_epochs = 10**9, min(value, 1e8)
            elif key == "schedule.stop_epoch":
                config.schedule.epochs = 10**9
            elif key == "model.in_chans":
                config.data.mean, config.data.std = [0.5], [0.5]
            check_config(config)
        for value in outside:
            with pytest.raises(ValueError, match="is not allowed; expected") as caught:
                check_config(with_value(key, value))
            shown = list(value) if isinstance(value, tuple) else value
            assert str(caught.value) == f"{key}: {shown!r} is not allowed; expected {allowed}"


def test_every_number_has_a_range() -> None:
    """A new setting with a number needs a rule, or a word here on who checks it."""
    ruled = {key for keys, *_ in _RANGES for key in keys.split()}
    elsewhere = {"augment.crop_scale", "augment.crop_ratio"}  # check_augment, which knows that they are ordered pairs
    numeric = {key for key, kind in _annotations_of(Config()).items() if "int" in kind or "float" in kind}
    assert numeric - ruled == elsewhere


@pytest.mark.fault("E4")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule.warmup_epochs": 5.0, "schedule.epochs": 5}, "schedule.warmup_epochs: 5.0 must be below schedule.epochs 5"),
        ({"data.mean": [0.5, 0.5]}, r"data.mean: \[0.5, 0.5\] must have one value, or one for each of model.in_chans 3"),
        ({"model.in_chans": 1}, "data.mean: .* must have one value"),
        ({"optim.max_grad_norm": 0.0}, "optim.max_grad_norm: 0.0 is not allowed; expected a finite number above 0"),
        ({"schedule.name": "rsqrt", "schedule.warmup_epochs": 0.0}, "schedule.warmup_epochs: 0 is not allowed with .* 'rsqrt'"),
        ({"schedule.stop_epoch": 301}, "schedule.stop_epoch: 301 is beyond schedule.epochs 300"),
        (
            {"optim.decay_temperature": True, "model.attention": "softmax"},
            "optim.decay_temperature: true has no effect: model.attention 'softmax'",
        ),
        (
            {"optim.temperature_lr_scale": 10.0, "model.attention": "softmax"},
            "optim.temperature_lr_scale: 10.0 has no effect: model.attention 'softmax'",
        ),
        ({"train.freeze": "backbone"}, "train.freeze: 'backbone' would train a classifier on random features"),
        ({"checkpoint.metric": "ema_top1"}, "checkpoint.metric: 'ema_top1' needs averaged weights; set train.ema_decay"),
    ],
)
def test_values_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    values = config_to_dict(Config())
    for key, value in changes.items():
        values[key.partition(".")[0]][key.partition(".")[2]] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        config_from_dict(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule.stop_epoch": 300},
        {"optim.max_grad_norm": None},
        {"optim.decay_temperature": True},
        {"model.attention": "softmax"},
        {"train.freeze": "backbone", "train.finetune": "weights.pth"},
        {"data.mean": [0.5], "data.std": [0.5]},
    ],
    ids=str,
)
def test_values_that_agree(changes: dict[str, Any]) -> None:
    values = config_to_dict(Config())
    for key, value in changes.items():
        values[key.partition(".")[0]][key.partition(".")[2]] = value
    config = flatten(config_from_dict(values))
    assert {key: config[key] for key in changes} == changes


@pytest.mark.fault("E4")
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
def test_infinities_are_refused_in_files(tmp_path: Path, value: str) -> None:
    for key in ("optim.lr", "optim.weight_decay", "schedule.min_lr", "data.crop_pct", "train.ema_decay"):
        section, name = key.split(".")
        assert f"{key}: " in refusal("--config", written(tmp_path, f"{section}: {{{name}: {value}}}"))


@pytest.mark.fault("E4")
def test_random_edits_give_a_config_or_one_line(tmp_path: Path) -> None:
    """300 random values at random keys, through the command line and through files: a ValueError or a config, nothing else."""
    draw = random.Random(0)
    numbers = [0, 1, -1, 3, 2**70, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf]
    words = ["", " ", "x", "a: b", "a\nb", "1e-3", "[", "{", "no", "12:30", "null", "-", "--seed", "é\u2028"]
    nests = [[], [0.5], [None], [[1]], ["a", "b"], {}, {"a": 1}, {"a": {"b": [1]}}, {"": 0}]
    odd = [None, True, False, *numbers, *words, *nests]
    outcomes, messages = {"refused": 0, "accepted": 0}, []
    for _ in range(300):
        key, value = draw.choice(KEYS), draw.choice(odd)
        arguments = [f"--{key}={value}"]
        if draw.random() < 0.3:
            arguments = ["--config", written(tmp_path, yaml.safe_dump(nested(key, value)))]
        try:
            check_config(load_config(arguments, PARSER)[0])
            outcomes["accepted"] += 1
        except ValueError as error:
            messages.append(str(error))
            outcomes["refused"] += 1
    assert not [message for message in messages if len(message.splitlines()) != 1]
    assert min(outcomes.values()) > 30, outcomes
