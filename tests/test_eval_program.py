"""eval.py from its command line to its table, JSON and CSV: every kind of checkpoint, every override, everything it refuses."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convert_checkpoint import original_file

import eval as program
from taylorvit import engine
from taylorvit.checkpoint import list_checkpoints
from taylorvit.config import ModelConfig
from taylorvit.models import build_model
from taylorvit.run_folder import RunFolder
from taylorvit.weights import Source, load_weights

IMAGES = 41
Evaluate = Callable[..., list[dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def run(digit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on the digits: steps 2, 4 and 6, of which the last is evaluated, and the export."""
    run_dir = tmp_path_factory.mktemp("eval") / "run"
    engine.train(tiny_config(digit_folder, run_dir, data__num_workers=0, schedule__epochs=1, schedule__warmup_epochs=0.0))
    return run_dir


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Evaluate:
    """Run the program in this process and return what it wrote as JSON."""

    def call(*arguments: object) -> list[dict[str, Any]]:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # a program starts in a process of its own
        file = tmp_path / "results" / "results.json"
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments), f"--json={file}"])
        assert program.main() == 0
        return json.loads(file.read_text())

    return call


def logged(run: Path) -> dict[str, Any]:
    return [record for record in RunFolder(run).read_metrics() if record["kind"] == "evaluate"][-1]


# Kinds of checkpoints


def test_a_run_gives_what_training_logged(run: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    raw, averaged = evaluate(run, "--weights", "both")
    record = logged(run)
    for row, prefix in ((raw, ""), (averaged, "ema_")):
        assert (row["top1"], row["top5"]) == (record[f"{prefix}top1"], record[f"{prefix}top5"])
        assert row["loss"] == pytest.approx(record[f"{prefix}loss"], rel=1e-6)
        assert row["logged_top1"] == row["top1"]
    assert (raw["weights"], averaged["weights"]) == ("raw", "ema")
    assert raw["loss"] != averaged["loss"]
    assert {key: raw[key] for key in ("kind", "step", "images", "form", "device", "world_size", "precision", "compile")} == {
        "kind": "step",
        "step": 6,
        "images": IMAGES,
        "form": "direct",
        "device": "cpu",
        "world_size": 1,
        "precision": "no",
        "compile": False,
    }
    assert raw["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert printed.count("worst classes of") == 2
    assert f"{raw['top1']:.3f}" in printed


def test_every_kind_of_checkpoint_gives_the_same_figures(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    newest = list_checkpoints(run / "checkpoints")[-1]
    whole, step, export = evaluate(run, newest, run / "export", "--data.num_workers", 0)  # an export knows its run's data
    (bare,) = evaluate(run / "export" / "model.safetensors", "--config", run / "config.yaml")
    config = ModelConfig(**load_weights(run)[1].model_config)
    model = build_model(config)
    model.load_state_dict(load_file(run / "export" / "model.safetensors"))
    (original,) = evaluate(
        original_file(tmp_path / "theirs.tar", model), f"--data.root={data_root(run)}", "--data.num_workers=0"
    )
    found = [whole, step, export, bare, original]
    assert [row["kind"] for row in found] == ["step", "step", "export", "safetensors", "original"]
    assert {row["images"] for row in found} == {IMAGES}
    assert {(row["top1"], row["top5"]) for row in found} == {(whole["top1"], whole["top5"])}
    assert [row["loss"] for row in found] == pytest.approx([whole["loss"]] * 5, rel=1e-6)


def data_root(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]


def test_any_step_of_a_run(run: Path, evaluate: Evaluate) -> None:
    (early,), (newest,) = evaluate("--step", 2, run), evaluate(run, "--step=newest")
    assert (early["step"], newest["step"]) == (2, 6)
    assert early["logged_top1"] is None
    assert early["loss"] != newest["loss"]
    assert evaluate(early["checkpoint"])[0]["loss"] == early["loss"]


# Overrides


@pytest.mark.fault("C4")
def test_another_image_size_resamples_and_says_so(run: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = evaluate(run, "--model.img_size", 24)
    assert row["img_size"] == 24
    assert row["notes"] == ["position embedding resampled from 4x4 to 6x6 patches"]
    assert "position embedding resampled from 4x4 to 6x6 patches" in capsys.readouterr().out


def test_the_crop_changes_the_images(run: Path, evaluate: Evaluate) -> None:
    whole, cropped = evaluate(run)[0], evaluate(run, "--data.crop_pct", 0.6)[0]
    assert (whole["crop_pct"], cropped["crop_pct"]) == (1.0, 0.6)
    assert cropped["loss"] != whole["loss"]


def test_the_forms_agree(run: Path, evaluate: Evaluate) -> None:
    direct, efficient = (evaluate(run, f"--model.attention_options.form={form}")[0] for form in ("direct", "efficient"))
    assert (direct["form"], efficient["form"]) == ("direct", "efficient")
    assert (direct["top1"], direct["top5"]) == (efficient["top1"], efficient["top5"])
    assert efficient["loss"] == pytest.approx(direct["loss"], rel=1e-5)


def test_half_precision(run: Path, evaluate: Evaluate) -> None:
    full, half = evaluate(run)[0], evaluate(run, "--train.mixed_precision", "bf16")[0]
    assert (full["precision"], half["precision"]) == ("no", "bf16")
    assert half["loss"] != full["loss"]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02)


def test_settings_are_checked_with_the_checkpoint_s_others() -> None:
    """The default mean has three values, which a grey model must not meet; one value that the checkpoint has is right."""
    data = {"mean": [0.5], "std": [0.2], "crop_pct": 1.0, "interpolation": "bicubic"}
    source = Source("somewhere", "export", "raw", model_config={"in_chans": 3}, data_config=data)
    config = program.checkpoint_config(source, ["--model.in_chans", "1", "--data.root=x"])
    assert (config.model.in_chans, config.data.mean, config.train.mixed_precision) == (1, [0.5], "no")
    _, overrides = program.split_arguments(["x", "--model.in_chans=1"])
    assert overrides == ["--model.in_chans=1"]


def test_a_checkpoint_s_own_wrong_setting_names_the_checkpoint() -> None:
    source = Source("some/step", "step", "raw", config={"model": {"widht": 3}})
    with pytest.raises(ValueError, match="some/step, line 2: unknown key 'model.widht'"):
        program.checkpoint_config(source, ["--data.root=x"])


# Reports


def test_rows_by_class_sum_to_the_whole(
    run: Path, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "classes.csv"
    (row,) = evaluate(run, "--per_class", file, "--worst=3")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [line["class"] for line in rows] == [str(number) for number in range(10)]
    assert sum(int(line["images"]) for line in rows) == IMAGES
    assert 100 * sum(int(line["correct"]) for line in rows) / IMAGES == pytest.approx(row["top1"])
    table = capsys.readouterr().out.split("worst classes of ")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + 3
    shares = [float(line["top1"]) for line in rows]
    assert [line.split()[3] for line in table[2:]] == [f"{share:.3f}" for share in sorted(shares)[:3]]


def test_no_worst_classes(run: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(run, "--worst", 0)
    assert "worst" not in capsys.readouterr().out


def test_help_shows_what_an_evaluation_uses() -> None:
    text = program.build_eval_parser().format_help()
    assert all(f"--{key} " in text for key in program.USED)
    assert not any(word in text for word in ("--optim.", "--schedule.", "--augment.", "--log.", "--resume", "--print_config"))


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "3"], "optim.lr: an evaluation does not use this setting"),
        (["--schedule.epochs=3"], "schedule.epochs: an evaluation does not use"),
        (["--resume", "auto"], "resume: an evaluation does not use"),
        (["--train.finetune", "x"], "train.finetune: an evaluation does not use"),
        (["--data.train_split=x"], "data.train_split: an evaluation does not use"),
        (["--evaluate.every_epochs=1"], "evaluate.every_epochs: an evaluation does not use"),
        (["--model.drop_rate=0.1"], "model.drop_rate: an evaluation does not use"),
        (["--run_dir", "x"], "run_dir: an evaluation does not use"),
        (["--print_config"], "unknown key 'print_config'"),
        (["--wieghts", "ema"], "unknown key 'wieghts'; did you mean 'weights'"),
        (["--model.img_sze=3"], "unknown key 'model.img_sze'; did you mean 'model.img_size'"),
        (["--model.img_size=-3"], "model.img_size: -3 is not allowed"),
        (["--model.img_size"], "expected one argument"),
        (["--worst", "-1"], "--worst -1: expected 0 or more"),
        (["--worst=many"], "worst"),
        (["--step", "-1"], "--step -1: expected best, newest or a number of updates"),
        (["--step", "3"], "there is no step 3"),
        (["--weights", "both", "--per_class", "x.csv"], "holds one evaluation"),
        (["--model.num_classes=9"], "model.num_classes is 9, but the data has 10"),
        (["--model.embed_dim=64"], "the weights do not fit the model"),
        (["--data.root=nowhere"], "nowhere"),
        (["--variant=imagenet-b"], "unknown ImageNet variant 'imagenet-b'; did you mean"),
    ],
)
def test_what_it_refuses(run: Path, evaluate: Evaluate, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(run, *arguments)


def test_a_file_without_data_says_what_to_give(run: Path, evaluate: Evaluate) -> None:
    with pytest.raises(ValueError, match="does not say which data it belongs to; give --data.dataset"):
        evaluate(run / "export" / "model.safetensors")


def test_outputs_are_checked_before_anything_is_loaded(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--per_class .*this is a folder"):
        evaluate(tmp_path / "nothing", "--per_class", tmp_path)


def test_a_step_is_chosen_of_a_run_only(run: Path, evaluate: Evaluate) -> None:
    for path in (list_checkpoints(run / "checkpoints")[-1], run / "export", run / "export" / "model.safetensors"):
        with pytest.raises(ValueError, match="step 2 can be chosen of a run folder only"):
            evaluate(path, "--step", 2)


@pytest.mark.fault("C3")
def test_averaged_weights_that_are_not_there(run: Path, evaluate: Evaluate) -> None:
    with pytest.raises(ValueError, match="it holds no averaged"):
        evaluate(run / "export", "--weights=both")


@pytest.mark.fault("C7")
def test_data_with_other_classes(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    for number in range(10):
        folder = tmp_path / "val" / f"digit {number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "x.png")
    with pytest.raises(ValueError, match="class 0 is '0' in .* but 'digit 0' in the data set"):
        evaluate(run, f"--data.root={tmp_path}")


def test_precisions_must_agree(run: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **options: Any) -> tuple[dict[str, torch.Tensor], Source]:
        state, source = load_weights(path, **options)
        train = {"mixed_precision": "bf16" if path.endswith("export") else "no"}
        return state, replace(source, config={**load_weights(run)[1].config, "train": train})

    monkeypatch.setattr(program, "load_weights", load)
    with pytest.raises(ValueError, match="different precisions; choose one with --train.mixed_precision"):
        evaluate(run, run / "export")
    assert [row["precision"] for row in evaluate(run, run / "export", "--train.mixed_precision=no")] == ["no", "no"]


# Variants


def test_imagenet_a_leaves_the_other_800_classes_out(evaluate: Evaluate, tmp_path: Path) -> None:
    """The classifier's bias alone decides: class outside ImageNet-A before the first class of ImageNet-A before the others."""
    synsets, judged = (
        resources.files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text().split()
        for name in ("imagenet", "imagenet_a")
    )
    settings = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 16}
    model = build_model(ModelConfig(**settings))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["head.weight"].zero_()
    state["head.bias"][synsets.index(judged[0])] = 5.0
    state["head.bias"][next(number for number, name in enumerate(synsets) if name not in judged)] = 9.0
    save_file(state, tmp_path / "model.safetensors")
    for name, images in ((judged[0], 3), (judged[7], 1)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    arguments = [f"--model.{key}={value}" for key, value in settings.items()]
    (row,) = evaluate(
        tmp_path / "model.safetensors",
        *arguments,
        *("--variant", "imagenet-a", "--data.root", tmp_path / "data", "--data.val_split", "", "--data.num_workers=0"),
        *("--device=cpu", "--per_class", tmp_path / "classes.csv"),
    )
    assert (row["images"], row["top1"]) == (4, 75.0)
    with (tmp_path / "classes.csv").open() as stream:
        rows = {line["class"]: line for line in csv.DictReader(stream)}
    assert len(rows) == 200
    assert (rows[judged[7]]["images"], rows[judged[7]]["most_confused_with"]) == ("1", judged[0])


def test_the_readme_s_commands_are_split_as_meant() -> None:
    own, overrides = program.split_arguments(
        ["runs/x", "--model.img_size", "288", "--json", "r.json", "runs/y", "--data.val_split", "", "--model.kwargs.a=1"]
    )
    assert own == ["runs/x", "runs/y", "--json", "r.json"]
    assert overrides == ["--model.img_size", "288", "--data.val_split", "", "--model.kwargs.a=1"]
    assert program.read_options(own)["checkpoints"] == ["runs/x", "runs/y"]
