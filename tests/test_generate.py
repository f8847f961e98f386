"""Trainings, samples and timings of causal attention: what they claim, and whole runs of the program."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_tool
from PIL import Image

sys.path.insert(0, str(ROOT / "tools"))

import generate

from taylorvit.attention.causal import CAUSAL_ATTENTIONS, CausalAttention
from taylorvit.benchmark.timing import Comparison
from taylorvit.checkpoint import list_checkpoints
from taylorvit.studies import generation, generation_cost
from taylorvit.studies.generation import (
    Pixels,
    Settings,
    draw_grid,
    held_out_bits,
    independent_bits,
    learning_rate,
    load_pixel_model,
    load_pixels,
    train_pixel_model,
)
from taylorvit.studies.generation_cost import CACHED, LINEAR, RECOMPUTED, candidates, measure_position, taylorshift_name

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "batch_size": 8, "num_steps": 6, "warmup_steps": 2}
OPTIONS = [f"--{key}={value}" for key, value in TINY.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def digits(root: str) -> Pixels:
    return load_pixels("pixels/digits", root, "train[:10%]")


def settings(**changes: object) -> Settings:
    return Settings(**{**TINY, **changes})  # type: ignore[arg-type]


def test_digits_have_17_levels_and_come_back_as_grey(digits: Pixels, root: str) -> None:
    assert len(digits.grey) == 17
    assert set(digits.levels.flatten().tolist()) == set(range(17))
    assert digits.levels.shape[1] == 64
    assert digits.width == 8
    from taylorvit.config import DataConfig
    from taylorvit.data.sequences import build_dataset

    tokens, _ = build_dataset(DataConfig(dataset="pixels/digits", root=root), "train[:10%]", in_chans=1)[3]
    assert torch.equal(digits.grey[digits.levels[3]].long(), tokens)


def test_a_set_of_images_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="dataset must be pixels/NAME, got 'digits'"):
        load_pixels("digits", root, "train")


def test_independent_bits_are_the_entropy_of_each_place() -> None:
    levels = torch.tensor([[0, 1], [1, 1]] * 500)
    assert independent_bits(levels, levels, 2) == pytest.approx(0.5, abs=0.02)  # 1 bit and 0 bits
    assert independent_bits(levels, 1 - levels, 2) > 4


def test_held_out_bits_are_the_mean_over_images(digits: Pixels) -> None:
    torch.manual_seed(0)
    model = generation.build_pixel_model(settings(), digits)
    torch.nn.init.normal_(model.head.weight)
    each = [held_out_bits(model, digits.levels[i : i + 1]) for i in range(7)]
    assert held_out_bits(model, digits.levels[:7], batch_size=3) == pytest.approx(sum(each) / 7, rel=1e-6)


def test_learning_rate_rises_and_falls_to_zero() -> None:
    chosen = settings(num_steps=10, warmup_steps=4, lr=1.0)
    rates = [learning_rate(chosen, step) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == pytest.approx(0)


@pytest.mark.parametrize("kind", CAUSAL_ATTENTIONS)
def test_a_continued_training_is_the_uninterrupted_one(kind: str, digits: Pixels, tmp_path: Path) -> None:
    whole = train_pixel_model(settings(attention=kind), digits, tmp_path / "whole", save_every=3)

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        raise Killed(line)

    with pytest.raises(Killed, match="step 3 of 6"):
        train_pixel_model(settings(attention=kind), digits, tmp_path / "killed", save_every=3, report=kill)
    lines: list[str] = []
    again = train_pixel_model(settings(attention=kind), digits, tmp_path / "killed", save_every=3, report=lines.append)
    assert len(lines) == 1
    loaded, found, _ = load_pixel_model(tmp_path / "killed")
    assert found == settings(attention=kind)
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        assert torch.equal(loaded.state_dict()[name], weight)


def test_other_settings_are_refused(digits: Pixels, tmp_path: Path) -> None:
    train_pixel_model(settings(), digits, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.003 -> 0.1\)"):
        train_pixel_model(settings(lr=0.1), digits, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000006"]


def test_a_loss_that_is_not_finite_stops_the_training(digits: Pixels, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="loss of step"):
        train_pixel_model(settings(lr=math.inf), digits, tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_no_training_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no training"):
        load_pixel_model(tmp_path)


def test_the_grid_shows_the_images_row_by_row(tmp_path: Path) -> None:
    pixels = Pixels(torch.empty(0, 6, dtype=torch.int64), torch.tensor([0, 100, 255], dtype=torch.uint8), 3)
    levels = torch.tensor([[0, 1, 2, 2, 2, 1], [1] * 6, [2] * 6])
    draw_grid(levels, pixels, tmp_path / "grid.png", columns=2, zoom=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (7, 9)
    assert sheet[1:3, 1:4].tolist() == [[0, 100, 255], [255, 255, 100]]
    assert (sheet[1:3, 5:8] == 100).all()
    assert (sheet[4:6, 1:4] == 255).all()


def test_costs_are_of_checked_results() -> None:
    rows = {row.candidate: row for row in measure_position(33, embed_dim=32, batch_size=2, head_dims=[4], seconds=0.01)}
    assert list(rows) == [RECOMPUTED, CACHED, LINEAR, taylorshift_name(4)]
    for row in rows.values():
        assert row.seconds > 0
        assert row.error < 1e-5
    assert rows[RECOMPUTED].over_recomputing == rows[CACHED].over_cache == 1
    assert rows[CACHED].over_recomputing == pytest.approx(1 / rows[RECOMPUTED].over_cache, rel=0.5)
    sizes = [row.state_bytes // 4 for row in rows.values()]
    assert sizes == [33 * 32, 2 * 33 * 32, 32 * 33, 8 * 15 * 5]


@pytest.mark.parametrize("name", ["linear", "softmax", "taylorshift"])
def test_a_wrong_step_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = CAUSAL_ATTENTIONS[name]._step

    def wrong(self: CausalAttention, *given: object) -> torch.Tensor:
        return 1.001 * healthy(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(CAUSAL_ATTENTIONS[name], "_step", wrong)
    with pytest.raises(RuntimeError, match=f"{name}.* is wrong at 20 tokens"), torch.no_grad():
        candidates(torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0)), [8])


def test_program_trains_samples_and_completes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: str) -> None:
    out = tmp_path / "out"
    kinds = ["taylorshift", "softmax"]
    common = [f"--root={root}", "--train_split=train[:10%]", "--val_split=val[:10%]", *OPTIONS, f"--out={out}"]
    assert run_tool(monkeypatch, generate.main, "train", "--attention", *kinds, *common) == 0
    content = json.loads((out / "generation_train.json").read_text())
    assert [row["model"] for row in content["rows"]] == ["each pixel on its own", *kinds]
    assert all(1 < row["bits_per_pixel"] < 4.1 for row in content["rows"])
    assert "softmax" in (out / "generation_train.md").read_text()

    for seed, same in ((3, True), (4, False)):
        pictures = []
        for number in (3, seed):
            assert run_tool(monkeypatch, generate.main, "sample", "--num_images=4", f"--seed={number}", f"--out={out}") == 0
            pictures.append((out / "samples_taylorshift.png").read_bytes())
        assert (pictures[0] == pictures[1]) == same

    arguments = ["sample", "--attention=softmax", "--complete", "--num_images=6", "--columns=3", f"--out={out}"]
    assert run_tool(monkeypatch, generate.main, *arguments) == 0
    sheet = np.asarray(Image.open(out / "completions_softmax.png").resize((28, 28), Image.Resampling.NEAREST))
    held_out = load_pixels("pixels/digits", root, "val[:10%]")
    for column, number in enumerate((0, len(held_out.levels) // 3, 2 * len(held_out.levels) // 3)):
        left, original = 9 * column + 1, held_out.grey[held_out.levels[number]].view(8, 8).numpy()
        assert np.array_equal(sheet[1:9, left : left + 8], original)
        for top in (10, 19):  # the upper halves are the original's
            assert np.array_equal(sheet[top : top + 4, left : left + 8], original[:4])


def test_program_benches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--num_tokens", "24", "8", "--head_dim", "8", "--embed_dim=32", "--batch_size=1", "--seconds=0.01"]
    assert run_tool(monkeypatch, generate.main, "bench", *arguments, f"--out={tmp_path}") == 0
    content = json.loads((tmp_path / "generation_cost.json").read_text())
    assert [row["position"] for row in content["rows"]] == [8] * 4 + [24] * 4
    text = (tmp_path / "generation_cost.md").read_text()
    for title in ("Speed-up over recomputing the prefix", "Speed-up over a cache of keys and values", "Time of one token"):
        assert title in text
    assert (tmp_path / "generation_cost.png").stat().st_size > 1000
    assert len((tmp_path / "generation_cost.csv").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--attention=linear"], "holds no training"),
        (["train", "--num_heads=3"], "num_heads must divide embed_dim 64, got 3"),
        (["bench", "--head_dim=24"], "head dimensions must divide the width 256, got 24"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, generate.main, *arguments, f"--out={tmp_path}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_layers_are_alike_but_for_the_attention(digits: Pixels) -> None:
    """Equal seeds give equal weights wherever the shapes agree; TaylorShift alone has temperatures."""
    models = {kind: generation.build_pixel_model(settings(attention=kind), digits).state_dict() for kind in CAUSAL_ATTENTIONS}
    assert generation_cost.SOFTMAX_HEAD_DIM == 32
    for name, weight in models["softmax"].items():
        assert all(torch.equal(model[name], weight) for model in models.values())
    assert [name for name in models["taylorshift"] if name not in models["softmax"]] == ["blocks.0.attn.temperature"]


def test_both_speed_ups_are_of_ratios_within_the_rounds() -> None:
    rounds = {RECOMPUTED: [8.0, 80.0, 16.0], CACHED: [2.0, 30.0, 6.0], LINEAR: [1.0, 10.0, 2.0]}
    one = generation_cost.Candidate(32, torch.neg, 99, 0.0)
    cost = generation_cost._cost(LINEAR, one, 7, 1, Comparison(rounds, dict.fromkeys(rounds, 1)))
    assert (cost.seconds, cost.over_recomputing, cost.over_cache) == (2.0, 8.0, 3.0)
    cached = generation_cost._cost(CACHED, one, 7, 1, Comparison(rounds, dict.fromkeys(rounds, 1)))
    assert (cached.over_cache, cached.over_recomputing) == (1.0, 8 / 3)
