"""ListOps: what expressions are worth, which are drawn, what files are read or refused, the reference lines, and whole runs."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, assert_same_state, history, run_tool, tiny_config

import eval as eval_program
from taylorvit import session
from taylorvit.checkpoint import list_checkpoints
from taylorvit.config import AugmentConfig, Config, DataConfig, ModelConfig
from taylorvit.config_loading import load_config
from taylorvit.data import (
    TokenDataset,
    build_dataset,
    build_eval_loader,
    build_train_loader,
    check_sequences,
    dataset_fingerprint,
    share_samples,
)
from taylorvit.data.listops import (
    CLASSES,
    MED,
    OPERATORS,
    TOKENS,
    ListOps,
    ReferenceLines,
    Shape,
    _grow,
    evaluate,
    generate_block,
    parse,
    to_text,
    value_of,
)
from taylorvit.distributed import build_accelerator
from taylorvit.engine import train
from taylorvit.models import build_model
from taylorvit.run_folder import RunFolder

SHORT = Shape(min_length=5, max_length=40)


def write_tsv(path: Path, samples: list[tuple[str, object]], *, header: str = "Source\tTarget", end: str = "\n") -> Path:
    """Write a file of samples, and return its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(f"{source}\t{target}" for source, target in samples)]
    path.write_bytes((end.join(lines) + end).encode())
    return path.parent


def plain_value(text: str) -> int:
    """Compute an expression in the plainest way: replace one innermost bracket after another by its value."""
    functions = {"MIN": min, "MAX": max, "SM": lambda values: sum(values) % 10, "MED": lambda values: int(np.median(values))}
    while match := re.search(r"\[(MIN|MAX|MED|SM) ([\d ]+) \]", text):
        value = functions[match[1]]([int(word) for word in match[2].split()])
        text = text[: match.start()] + str(value) + text[match.end() :]
    return int(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 4 [SM 5 6 2 ] 7 ]", 3),
        ("[MED 1 2 ]", 1),  # 1.5 is cut off
        ("[MED 9 0 4 ]", 4),
        ("[MED 8 1 6 3 ]", 4),
        ("[SM 9 9 9 ]", 7),
        ("7", 7),
    ],
)
def test_values(text: str, value: int) -> None:
    assert value_of(parse(text.encode())) == value == plain_value(text)


def test_drawn_values_are_those_of_the_expressions() -> None:
    samples = generate_block(0, 0, SHORT)
    assert len(samples) > 100
    for tokens, value in samples:
        assert parse(to_text(tokens).encode()) == tokens
        assert plain_value(to_text(tokens)) == value == value_of(tokens)


def test_drawn_expressions_have_the_shape_that_was_asked_for() -> None:
    shape = Shape(min_length=5, max_length=20, max_depth=3, max_args=4)
    drawn = [tokens for block in range(3) for tokens, _ in generate_block(1, block, shape)]
    lengths = {len(tokens) for tokens in drawn}
    assert (min(lengths), max(lengths)) == (6, 19)
    arguments, depths = set(), set()
    for tokens in drawn:
        open_brackets: list[int] = []
        for token in tokens:
            depths.add(len(open_brackets) + 1 if token < 14 else 1)
            if token == 14:
                arguments.add(open_brackets.pop())
            elif open_brackets:
                open_brackets[-1] += 1
            if token in OPERATORS:
                open_brackets.append(0)
    assert arguments == {2, 3, 4}
    assert max(depths) == 3


def test_the_draws_are_long_range_arenas() -> None:
    """Without limits on the length: a quarter are operators, alike, with 2 to 10 arguments, alike."""
    drawn = [tokens for block in range(2) for tokens, _ in generate_block(2, block, Shape(min_length=0, max_length=10**9))]
    assert len(drawn) == 40_000
    roots = [tokens[0] for tokens in drawn if tokens[0] in OPERATORS]
    assert len(roots) / len(drawn) == pytest.approx(0.25, abs=0.01)
    assert [roots.count(operator) / len(roots) for operator in OPERATORS] == pytest.approx([0.25] * 4, abs=0.02)
    digits = [tokens[0] for tokens in drawn if len(tokens) == 1]
    assert [digits.count(digit) / len(digits) for digit in range(10)] == pytest.approx([0.1] * 10, abs=0.01)
    flat = [len(tokens) - 2 for tokens in drawn if len(tokens) > 1 and not set(OPERATORS) & set(tokens[1:])]
    assert set(flat) == set(range(2, 11))
    assert flat.count(3) / flat.count(2) == pytest.approx(0.75, abs=0.12)  # one more argument that must be a digit


def test_giving_up_early_changes_no_draw() -> None:
    """An expression is drawn as if there were no limit, or not at all."""
    limited, free = Shape(min_length=0, max_length=60), Shape(min_length=0, max_length=10**9)
    lengths = []
    for seed in range(2000):
        whole, tried = bytearray(), bytearray()
        value = _grow(whole, 1, free, random.Random(seed))
        result = _grow(tried, 1, limited, random.Random(seed))
        assert (result, tried) == (value, whole) if len(whole) < 60 else result is None
        assert len(tried) < 60 + free.max_depth  # operators without arguments so far
        lengths.append(len(whole))
    assert max(lengths) > 1000


def test_lengths_and_the_lines_are_those_measured_for_long_range_arena(tmp_path: Path) -> None:
    samples = [sample for block in range(2) for sample in generate_block(0, block, Shape())]
    assert statistics.mean(len(tokens) for tokens, _ in samples) == pytest.approx(1050, abs=40)
    assert len(samples) / 40_000 == pytest.approx(0.082, abs=0.005)  # of all expressions that are begun
    folder = write_tsv(tmp_path / "basic_train.tsv", [(to_text(tokens), value) for tokens, value in samples])
    scores = ReferenceLines(train := ListOps(folder, "train")).accuracy(train)
    assert list(scores.values()) == pytest.approx([17.8, 36.8, 48.3], abs=5)


def test_blocks_depend_on_seed_and_number_alone() -> None:
    assert generate_block(0, 3, SHORT) == generate_block(0, 3, SHORT)
    assert generate_block(0, 3, SHORT) != generate_block(0, 4, SHORT)
    assert generate_block(0, 3, SHORT) != generate_block(1, 3, SHORT)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"min_length": 5, "max_length": 6}, "min_length 5 and max_length 6: 0 <= min_length <= max_length - 2 is needed"),
        ({"min_length": -1}, "min_length -1"),
        ({"max_args": 1}, "max_depth must be 1 or more and max_args 2 or more, got 10 and 1"),
        ({"max_depth": 0}, "got 0 and 10"),
    ],
)
def test_impossible_shapes_are_refused(shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**shape)


def test_files_of_both_kinds_are_read(tmp_path: Path) -> None:
    ours = write_tsv(tmp_path / "ours" / "basic_val.tsv", [("[MAX 2 [SM 3 4 ] ]", 7), ("[MIN 5 1 ]", 1)])
    theirs = write_tsv(
        tmp_path / "theirs" / "basic_val.tsv",
        [("( ( ( [MAX 2 ) ( ( ( [SM 3 ) 4 ) ] ) ) ] )", 7), ("( ( ( [MIN 5 ) 1 ) ] )", 1)],
        end="\r\n",
    )
    first, second = ListOps(ours, "val"), ListOps(theirs, "val")
    assert [TOKENS[token] for token in first.content(0)] == ["[MAX", "2", "[SM", "3", "4", "]", "]"]
    assert (first.labels.tolist(), first.classes, first.vocab_size) == ([7, 1], CLASSES, 16)
    assert first.identity() == second.identity()
    assert second.name(1) == f"{theirs}/basic_val.tsv:3"


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    folder = write_tsv(tmp_path / "basic_val.tsv", [("1\t7", "[MIN 5 1 ]")], header="Target\tId\tSource")
    assert ListOps(folder, "val").labels.tolist() == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[MIN 5 1 ]", "expected 2 tab-separated columns, got 1"),
        ("[MIN 5 1 ]\t1\t1", "expected 2 tab-separated columns, got 3"),
        ("", "expected 2 tab-separated columns, got 1"),
        ("[MIN 5 1 ]\t10", "Target must be a digit 0 to 9, got '10'"),
        ("[MIN 5 1 ]\t", "Target must be a digit 0 to 9, got ''"),
        ("[MIN 5 1 ]\t²", "Target must be a digit 0 to 9, got '²'"),
        ("\t1", "there is no expression"),
        ("[MIN 5 12 ]\t5", "'12' is no token of ListOps"),
        ("[FIRST 5 1 ]\t5", "'[FIRST' is no token"),
        ("[MIN 5 1]\t1", "'1]' is no token"),
        ("[MINI 5 1 ]\t1", "'[MINI' is no token"),
        ("a 5 1 ]\t1", "'a' is no token"),
        ("[MIN 5 \xff ]\t1", "is no token"),
        ("[MIN 5 [MAX 1 ]\t1", "1 brackets are not closed"),
        ("[MIN 5 1 ] ]\t1", "the expression ends at token 4 of 5"),
        ("5 1\t1", "the expression ends at token 1 of 2"),
        ("] 1\t1", "the expression ends at token 1 of 2"),
        ("]\t1", "the expression ends at token 1 of 1"),
        ("[MIN 1 ] [MAX 2 ]\t1", "the expression ends at token 3 of 6"),
        ("[MIN 1 [MAX ] ]\t1", "an operator has no arguments"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "basic_val.tsv"
    file.write_text(f"Source\tTarget\n[MIN 5 1 ]\t1\n{line}\n[MIN 5 1 ]\t1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}:3: .*{re.escape(message)}"):
        ListOps(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: expected tab-separated columns Source and Target, got ''"),
        ("[MIN 5 1 ]\t1\n", r":1: expected tab-separated columns Source and Target, got '\[MIN 5 1 \]\\t1'"),
        ("Source Target\n", ":1: expected tab-separated"),
        ("Source\tTarget\n", ": there are no samples in it"),
    ],
)
def test_a_bad_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "basic_val.tsv").write_text(content)
    with pytest.raises(ValueError, match=f"basic_val.tsv{message}"):
        ListOps(tmp_path, "val")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_tsv(tmp_path / "basic_test.tsv", [("5", 5)])
    with pytest.raises(ValueError, match=r"no file .*basic_val.tsv \(found there: basic_test.tsv\); tools/make_listops.py"):
        ListOps(tmp_path, "val")


def test_reference_lines_by_hand(tmp_path: Path) -> None:
    train_samples = [
        ("[MAX 1 9 ]", 9),
        ("[MAX [MIN 9 8 ] 3 ]", 8),
        ("[MAX 9 [SM 1 1 ] ]", 9),
        ("[MIN [SM 1 1 ] [SM 1 1 ] ]", 2),
    ]
    train_samples += [("[MIN 2 7 ]", 2), ("[MIN 3 [SM 1 1 ] ]", 2), ("[MED 2 4 ]", 3)]
    folder = write_tsv(tmp_path / "basic_train.tsv", train_samples)
    write_tsv(tmp_path / "basic_test.tsv", [("[SM 4 5 ]", 9), ("[MIN [SM 9 9 ] [SM 9 9 ] ]", 8), ("7", 7)])
    lines = ReferenceLines(learned := ListOps(folder, "train"))
    assert lines.predict(parse(b"[MAX [MIN 9 8 ] 3 ]")) == (2, 9, 3)
    assert lines.predict(parse(b"[MAX [SM 1 1 ] [SM 9 9 ] ]")) == (2, 9, 9)
    assert lines.predict(parse(b"[SM 4 [MIN 1 2 ] 5 ]")) == (2, 2, 9)
    assert list(lines.accuracy(learned).values()) == pytest.approx([300 / 7, 600 / 7, 500 / 7])
    assert list(lines.accuracy(ListOps(folder, "test")).values()) == pytest.approx([0, 0, 200 / 3])


def test_median_of_every_length() -> None:
    for length in range(1, 11):
        values = [(7 * number + 3) % 10 for number in range(length)]
        assert evaluate(MED, values) == int(np.median(values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 96 training and 41 validation samples of 6 to 39 tokens."""
    path = tmp_path_factory.mktemp("listops")
    drawn = [(to_text(tokens), value) for tokens, value in dict(generate_block(0, 0, SHORT)).items()]
    write_tsv(path / "basic_train.tsv", drawn[:96])
    write_tsv(path / "basic_val.tsv", drawn[96:137])
    return path


def data_config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(dataset="listops", root=str(folder), num_workers=0, **changes)


def test_samples_are_numbers_from_1_and_labels(folder: Path) -> None:
    dataset = build_dataset(data_config(folder), "train", in_chans=3, max_length=4)
    assert isinstance(dataset, TokenDataset)
    source = ListOps(folder, "train")
    assert (len(dataset), dataset.vocab_size, dataset.max_length) == (96, 16, source.longest)
    tokens, label = dataset[5]
    assert tokens.dtype == torch.int64
    assert [token - 1 for token in tokens.tolist()] == list(source.content(5))  # never cut: its value would be another
    assert label == source.labels[5] == value_of(source.content(5))
    assert dataset.sample_name(5) == f"{folder}/basic_train.tsv:7"


def test_parts_and_splits_are_told_apart(folder: Path) -> None:
    splits = ("train", "val", "train[:90%]", "train[90%:]")
    sets = {split: build_dataset(data_config(folder), split, in_chans=1) for split in splits}
    assert [len(dataset) for dataset in sets.values()] == [96, 41, 90, 6]
    assert len({dataset_fingerprint(dataset) for dataset in sets.values()}) == 4
    assert not share_samples(sets["train"].source, sets["val"].source)
    assert not share_samples(sets["train[:90%]"].source, sets["train[90%:]"].source)
    assert share_samples(sets["train"].source, sets["train[90%:]"].source)


def test_the_fingerprint_knows_every_expression_and_label(tmp_path: Path) -> None:
    prints = set()
    for number, sample in enumerate([("[MAX 1 2 ]", 2), ("[SM 1 1 ]", 2), ("[SM 1 1 ]", 3), ("[SM 1 1 1 ]", 3)]):
        folder = write_tsv(tmp_path / str(number) / "basic_val.tsv", [sample])
        prints.add(dataset_fingerprint(build_dataset(data_config(folder), "val", in_chans=1)))
    assert len(prints) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_filled_up_to_their_longest(folder: Path, num_workers: int) -> None:
    data = replace(data_config(folder), num_workers=num_workers)
    dataset = build_dataset(data, "val", in_chans=1)
    options = {"data": data, "img_size": 224, "rank": 0, "world_size": 1}
    met = []
    for tokens, labels, indices in build_eval_loader(dataset, batch_size=8, **options):
        lengths = [len(dataset[index][0]) for index in indices.tolist()]
        assert tokens.shape == (len(indices), max(lengths))
        assert (tokens.dtype, labels.dtype, indices.dtype) == (torch.int64,) * 3
        for row, label, index, length in zip(tokens, labels.tolist(), indices.tolist(), lengths):
            assert row[:length].tolist() == dataset[index][0].tolist()
            assert not row[length:].any()
            assert label == dataset[index][1]
        met += indices.tolist()
    assert met == list(range(41))
    loader = build_train_loader(dataset, augment=AugmentConfig(), seed=0, micro_batch_size=8, accumulation=1, **options)
    tokens, labels = next(iter(loader))
    assert tokens.shape == (8, int((tokens != 0).sum(dim=1).max()))
    assert labels.shape == (8,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 15}, "model.vocab_size is 15, but the data needs 16"),
        ({"max_length": 20}, "model.max_length is 20, but the data needs "),
        ({"kwargs": {}}, "model.kwargs.padding_idx is None, but short sequences are filled up with 0"),
        ({"kwargs": {"padding_idx": 3}}, "model.kwargs.padding_idx is 3, but short sequences are filled up with 0"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(folder: Path, changes: dict, message: str) -> None:
    dataset = build_dataset(data_config(folder), "train", in_chans=1)
    model = ModelConfig(name="taylorvit_sequence", vocab_size=16, max_length=40, kwargs={"padding_idx": 0})
    check_sequences(dataset, model)
    with pytest.raises(ValueError, match=message):
        check_sequences(dataset, replace(model, **changes))


def test_padding_changes_no_logit(folder: Path) -> None:
    config = load_config(["--config", str(ROOT / "configs" / "listops_short.yaml")])[0]
    model = build_model(config.model).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    dataset = build_dataset(data_config(folder), "val", in_chans=1)
    (tokens, _, _), *_ = build_eval_loader(dataset, data=data_config(folder), img_size=224, batch_size=41, rank=0, world_size=1)
    with torch.no_grad():
        together = model(tokens)
        alone = torch.cat([model(dataset[index][0][None]) for index in range(41)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def run_config(folder: Path, run_dir: Path, **changes: object) -> Config:
    """Return a config of ListOps with workers, drop path, accumulation, LAMB and EMA on."""
    off = {"crop": "none", "hflip": 0.0, "color_jitter": 0.0, "auto_augment": None, "random_erasing": 0.0}
    off |= {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    settings = {f"augment__{key}": value for key, value in off.items()} | {
        "model__name": "taylorvit_sequence",
        "model__vocab_size": 16,
        "model__max_length": 40,
        "model__kwargs": {"padding_idx": 0},
        "model__img_size": 224,
        "model__patch_size": None,
        "data__dataset": "listops",
        "schedule__epochs": 2,
    }
    return tiny_config(folder, run_dir, **{**settings, **changes})


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder: Path, tmp_path: Path) -> None:
    assert train(run_config(folder, tmp_path / "whole", data__num_workers=0)) == 0
    config = run_config(folder, tmp_path / "run", schedule__stop_epoch=1)  # two workers
    assert train(config) == 0
    assert train(replace(config, resume="auto", schedule=replace(config.schedule, stop_epoch=None))) == 0
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert_same_state(*(list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("run", "whole")))
    assert [record["samples"] for record in RunFolder(tmp_path / "run").read_metrics() if record["kind"] == "evaluate"] == [
        41,
        41,
    ]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_as_in_long_range_arena_goes_on_at_its_learning_rate(folder: Path, tmp_path: Path) -> None:
    """Epochs of 4 of the 6 updates that there are, the first two of them warm-up; it is stopped after the first epoch."""
    settings = {"name": "rsqrt", "updates_per_epoch": 4, "warmup_epochs": 0.5, "warmup_lr": 0.0, "min_lr": 0.0}
    changes = {f"schedule__{key}": value for key, value in settings.items()} | {"data__num_workers": 0}
    assert train(run_config(folder, tmp_path / "whole", **changes)) == 0
    config = run_config(folder, tmp_path / "run", schedule__stop_epoch=1, **changes)
    assert train(config) == 0
    assert train(replace(config, resume="auto", schedule=replace(config.schedule, stop_epoch=None))) == 0
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert_same_state(*(list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("run", "whole")))
    rates = [record["lr"] for record in RunFolder(tmp_path / "run").read_metrics() if record["kind"] == "train"]
    assert rates == pytest.approx([config.optim.lr * factor for factor in (0, 0.5, *(math.sqrt(2 / t) for t in range(2, 8)))])


@pytest.mark.usefixtures("fresh_accelerate")
def test_only_the_main_process_learns_the_reference_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(folder, tmp_path / "run", data__num_workers=0)
    built = session.build_session(config, build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=60))
    assert any(line.startswith("to beat") for line in session.describe(built))
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.delattr(session, "reference_lines")
    assert not any(line.startswith("to beat") for line in session.describe(built))


@pytest.mark.usefixtures("fresh_accelerate")
def test_every_result_stands_beside_its_reference_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"data__train_split": "train[:90%]", "data__val_split": "train[90%:]"}
    config = run_config(folder, tmp_path / "run", data__num_workers=0, **parts)
    learned, judged = (build_dataset(config.data, split, in_chans=1).source for split in parts.values())
    lines = ReferenceLines(learned).accuracy(judged)
    assert len(set(lines.values())) > 1
    shown = "without looking inside: " + ", ".join(f"{name} {value:.1f} %" for name, value in lines.items())
    assert train(config) == 0
    assert f"to beat    on the validation samples {shown}" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert run_tool(monkeypatch, eval_program.main, str(tmp_path / "run"), "--worst=0", f"--json={report}") == 0
    assert shown in capsys.readouterr().out
    assert json.loads(report.read_text())[0]["reference_lines"] == lines


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment__hflip": 0.5}, "augment.hflip is 0.5, but sequences are not augmented"),
        ({"train__channels_last": True}, "train.channels_last: true is for images"),
        ({"model__kwargs": {}}, "model.kwargs.padding_idx is None"),
    ],
)
def test_a_run_that_cannot_be_is_refused(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(run_config(folder, tmp_path / "run", **changes))
