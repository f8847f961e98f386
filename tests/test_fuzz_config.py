"""Every shipped configuration with random edits: a config that can be built, or one line that names its file or a key.

Edits are lines lost, repeated, swapped or taken from other files, values of other kinds and sizes, misspelt keys, random bytes.
"""

from __future__ import annotations

import random
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from taylorvit.config import Config
from taylorvit.config_loading import build_parser, flatten, load_config
from taylorvit.data import check_augment, check_mixing, check_no_augment, holds_sequences
from taylorvit.distributed import split_batch
from taylorvit.models import attention_forms, build_model
from taylorvit.optim import build_optimizer, build_scheduler

ROOT = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted([*ROOT.glob("*.yaml"), *(ROOT / "attentions").glob("*.yaml")])
LINES = [line for file in SHIPPED for line in file.read_text().splitlines() if line and not line.startswith("#")]
PARSER = build_parser()
KEYS = {word for key in flatten(Config()) for word in key.split(".")} | {line.partition(":")[0].strip() for line in LINES}
NAMES = re.compile(r"\b(" + "|".join(sorted(KEYS)) + r")\b")
SMALL = ["", "0", "1", "-1", "0.5", "1.5", "1e-3", "7", "1000", "null", "true", "no", "x", "[]", "{}", "[1, 2]", "{a: 1}"]
HUGE = ["1e308", "-1e308", ".inf", ".nan", str(2**31), str(2**63), "1" + "0" * 400, "1e400", "0x" + "f" * 40, "9" * 5000]
ODD = ['""', "' '", "[[1]]", "[null]", "12:30", "!!python/object/apply:os.getcwd []", "!!int x", "!!binary x", "&a [*a]"]
ODD += ["*b", "'a", '"\\0"', "2026-01-01", "{a: {b: [1]}}", "[1, 2, 3, 4]", "${HOME}", "%", "@", "- 1", "? x", "|", "é\u2028"]


KINDS = ("lose", "repeat", "insert", "swap", "value", "value", "value", "misspell", "indent", "bytes")
LIKELY = ("value", "likely")  # what a program could have made, and what mostly loads


def edited(draw: random.Random, text: str, kinds: Sequence[str]) -> bytes:
    """Return the text after one to three random edits of these kinds."""
    lines = text.splitlines()
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        number = draw.randrange(len(lines)) if lines else 0
        shown = [place for place, line in enumerate(lines) if line and not line.startswith("#")]
        if shown and draw.random() < 0.9:
            number = draw.choice(shown)  # comments are half of a file
        lines[number : number + 1] = edit(draw, draw.choice(kinds), lines[number] if lines else "", lines)
    content = "\n".join(lines).encode()
    if "bytes" in kinds and draw.random() < 0.1:
        place = draw.randrange(len(content) + 1)
        content = content[:place] + draw.randbytes(draw.randint(1, 4)) + content[place + draw.randint(0, 4) :]
    return content


def edit(draw: random.Random, kind: str, line: str, lines: list[str]) -> list[str]:
    """Return what stands in the place of a line."""
    key, colon, _ = line.partition(":")
    if kind == "repeat":
        return [line, line]
    if kind == "insert":
        return [line, draw.choice(LINES)]
    if kind == "swap" and lines:
        other = draw.randrange(len(lines))
        line, lines[other] = lines[other], line
        return [line]
    if kind == "value" and colon:
        return [f"{key}: {draw.choice(draw.choice([SMALL, HUGE, ODD]))}"]
    if kind == "likely" and colon:
        return [f"{key}: {draw.choice([*SMALL[1:8], *HUGE[4:7]])}"]
    if kind == "misspell" and key.strip():
        place = draw.randrange(len(key))
        return [key[:place] + draw.choice("axq_ .") + key[place + draw.randint(0, 1) :] + line[len(key) :]]
    if kind == "indent":
        return [draw.choice([line.lstrip(), "  " + line, "\t" + line, " " + line])]
    return [] if kind == "lose" else [line]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Fail where something takes longer than this: a configuration that is never refused, nor built."""

    def give_up(*_: Any) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def message_of(error: Exception, place: str) -> str:
    """Return the message, which must be one line of bearable length that names the file or a key."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert len(text) < 1500, text
    assert place in text or NAMES.search(text), text
    return text


def edits(file: Path, count: int, kinds: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield the path of so many edited copies, one after the other, the same every time."""
    draw = random.Random(f"{file.name} {kinds}")
    copy = folder / "edited.yaml"
    for _ in range(count):
        copy.write_bytes(edited(draw, file.read_text(), kinds))
        yield str(copy)


def check_edits(file: Path, count: int, kinds: Sequence[str], folder: Path, figures: Counter[str]) -> list[Config]:
    """Load edited copies of a file; return what those gave that were not refused."""
    configs = []
    for copy in edits(file, count, kinds, folder):
        try:
            with limited(20):
                configs.append(load_config(["--config", copy], PARSER)[0])
        except ValueError as error:
            message_of(error, copy)
            figures["messages given"] += 1
    figures["inputs tried"] += count
    return configs


def assemble(config: Config) -> None:
    """Build what needs no data, in the order of `build_session`."""
    split = split_batch(config.train.global_batch_size, config.train.micro_batch_size, rank=0, world_size=1)
    if holds_sequences(config.data.dataset):
        check_no_augment(config.augment, config.data.dataset)
    else:
        check_augment(config.augment)
    check_mixing(config.augment, split.micro_batch_size)
    model = build_model(config.model, device="meta")
    attention_forms(model)
    optimizer = build_optimizer(model, config.optim, global_batch_size=config.train.global_batch_size)
    build_scheduler(optimizer, config.schedule, updates_per_epoch=10)


@pytest.mark.fault("E1")
@pytest.mark.fault("E2")
@pytest.mark.fault("E3")
@pytest.mark.fault("E4")
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("count", [18, pytest.param(300, marks=pytest.mark.slow)])
def test_an_edited_file_is_a_config_or_one_line(file: Path, count: int, tmp_path: Path, figures: Counter[str]) -> None:
    check_edits(file, count, KINDS, tmp_path, figures)
    assert figures["messages given"]


@pytest.mark.fault("E4")
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_what_loads_is_built_or_refused_in_one_line(file: Path, count: int, tmp_path: Path, figures: Counter[str]) -> None:
    for config in check_edits(file, count, LIKELY, tmp_path, figures):
        try:
            with limited(60):
                assemble(config)
        except ValueError as error:
            message_of(error, str(tmp_path))
            figures["messages given"] += 1


@pytest.mark.fault("E5")
def test_a_hostile_tag_is_refused(tmp_path: Path) -> None:
    """YAML's way to a call, where a value, an entry and a key stand; variables of the environment are not read."""
    canary = tmp_path / "canary"
    tag = f'!!python/object/apply:os.mkdir ["{canary}"]'
    for text in (f"seed: {tag}", f"model: {{kwargs: {{a: {tag}}}}}", f"? {tag}\n: 1", f"data:\n  mean: [{tag}]", tag):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"x\.yaml") as caught:
            load_config(["--config", str(tmp_path / "x.yaml")], PARSER)
        assert "\n" not in str(caught.value)
        assert not canary.exists()
    (tmp_path / "x.yaml").write_text("run_dir: ${HOME}/$USER/{oc.env:HOME}\n")
    assert load_config(["--config", str(tmp_path / "x.yaml")], PARSER)[0].run_dir == "${HOME}/$USER/{oc.env:HOME}"
    yaml.unsafe_load(tag)
    assert canary.exists(), "the tag calls nothing, even for a careless reader"
