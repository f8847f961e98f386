"""Losses and gradients that are no numbers: every process stops before anything is spoiled; an fp16 overflow is skipped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, as_arguments, finish, launch, losses, tiny_config
from torch import Tensor

from taylorvit import engine
from taylorvit.checkpoint import list_checkpoints, read_meta, verify_checkpoint
from taylorvit.distributed import build_accelerator
from taylorvit.engine import NonFiniteError, train
from taylorvit.run_folder import RunFolder
from taylorvit.signals import StopRequest

# train.py whose second process has a loss that is not a number at its fourth update; each process says what that changed.
NAN = """
import math, os, sys
sys.path[:0] = [ROOT, ROOT + "/tests"]
import torch
from taylorvit import cli, engine
from test_not_finite import snapshot
import train
run_update, count = engine.run_update, [0]
def spoilt(loop, *arguments, **keywords):
    count[0] += 1
    criterion = loop.session.criterion
    if count[0] == 4 and os.environ["RANK"] == "1":
        loop.session.criterion = lambda *given: criterion(*given) * VALUE
    before = snapshot(loop)
    try:
        return run_update(loop, *arguments, **keywords)
    except engine.NonFiniteError:
        after = snapshot(loop)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        print(f"process {os.environ['RANK']}: {len(after)} tensors, untouched: {same}", flush=True)
        raise
engine.run_update = spoilt
cli.run_program(train.main)
"""


def snapshot(loop: engine.Loop) -> dict[str, Tensor]:
    """Return copies of weights, averaged weights and optimizer tensors."""
    session = loop.session
    assert session.ema is not None
    tensors = {f"model.{name}": value for name, value in session.bare_model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in session.ema.module.state_dict().items()}
    for index, entries in session.optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": value for name, value in entries.items() if isinstance(value, Tensor)}
    return {name: value.detach().clone() for name, value in tensors.items()}


@pytest.mark.fault("F1")
@pytest.mark.parametrize("value", ["math.nan", pytest.param("math.inf", marks=pytest.mark.slow)])
def test_one_process_without_a_number_stops_all_before_the_update(value: str, digit_folder: Path, tmp_path: Path) -> None:
    program, run_dir = tmp_path / "spoilt.py", tmp_path / "run"
    program.write_text(NAN.replace("ROOT", repr(str(ROOT))).replace("VALUE", value))
    config = tiny_config(digit_folder, run_dir, log__every_updates=2)
    output = finish(launch(str(program), as_arguments(config), processes=2), code=1)
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert f"loss {value[5:]} at update 4 (epoch 1): gradient norm " in line
    for part in ("learning rate ", "temperatures {'blocks.0.attn'", "was not applied", "--resume auto", "lower optim.lr"):
        assert part in line
    assert [f"process {rank}:" in output and output.count("untouched: True") for rank in (0, 1)] == [2, 2]
    assert "untouched: False" not in output
    assert "exitcode  : 5" in output  # of the first to leave; torchrun may end the other before it has
    status = RunFolder(run_dir).read_status()
    assert (status["state"], status["update"]) == ("failed", 3)
    assert "NonFiniteError: loss" in status["message"]
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-00000002"]
    assert verify_checkpoint(list_checkpoints(run_dir / "checkpoints")[0]) == 2
    assert sorted(losses(run_dir)) == [2]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Give runs on the CPU the gradient scaler of an fp16 run on a GPU; the returned "init" is its first scale."""
    settings = {"init": 2.0**127}

    def build(**arguments: Any) -> Any:
        accelerator = build_accelerator(**arguments)
        scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=settings["init"])
        monkeypatch.setattr(
            accelerator, "unscale_gradients", lambda: scaler.unscale_(accelerator._optimizers[0].optimizer)
        )  # accelerate's own does so for fp16 alone, which a CPU has not
        return accelerator

    monkeypatch.setattr(engine, "build_accelerator", build)
    return settings


@pytest.mark.fault("F2")
@pytest.mark.usefixtures("fresh_accelerate")
def test_an_overflow_is_skipped_halves_the_scale_and_is_saved(
    scaled: dict[str, float], digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the first loss overflows fp32 at this scale. The update counts: its images are not seen again."""
    original, seen = engine.run_update, []

    def watched(loop: engine.Loop, *arguments: Any, **keywords: Any) -> engine.UpdateResult:
        if not seen:  # an average that differs from the weights, so that another update of it would show
            for parameter in loop.session.ema.module.parameters():  # type: ignore[union-attr]
                parameter.data += 1
        scale, before = loop.session.accelerator.scaler.get_scale(), snapshot(loop)
        result = original(loop, *arguments, **keywords)
        after = snapshot(loop)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        seen.append((scale, loop.session.accelerator.scaler.get_scale(), same, math.isfinite(result.grad_norm)))
        return result

    monkeypatch.setattr(engine, "run_update", watched)
    monkeypatch.setattr(StopRequest, "requested", True)  # one update a start
    config = tiny_config(digit_folder, tmp_path / "run", data__num_workers=0)
    train(config)
    assert seen == [(2.0**127, 2.0**126, True, False)]
    (step,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert step.name == "step-00000001"
    assert read_meta(step)["state"]["scaler"]["scale"] == 2.0**126
    scaled["init"] = 1.0  # the checkpoint's counts
    for _ in range(20):
        train(replace(config, resume="auto"))
        if seen[-1][3]:
            break
    scales = [before for before, *_ in seen]
    assert scales == [2.0 ** (127 - number) for number in range(len(seen))]
    assert [same for *_, same, _ in seen] == [True] * (len(seen) - 1) + [False]  # until the scale fits
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.fault("F2")
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_gradient_that_no_scale_makes_finite_ends_the_run(
    scaled: dict[str, float], digit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, scales = engine.run_update, []

    def endless(loop: engine.Loop, *arguments: Any, **keywords: Any) -> engine.UpdateResult:
        scales.append(loop.session.accelerator.scaler.get_scale())
        if len(scales) == 1:
            next(loop.session.bare_model.parameters()).register_hook(lambda gradient: gradient * math.inf)
        return original(loop, *arguments, **keywords)

    monkeypatch.setattr(engine, "run_update", endless)
    scaled["init"] = 2.0
    with pytest.raises(NonFiniteError, match=r"loss \d.* at update 3 .*gradient norm (nan|inf), "):
        train(tiny_config(digit_folder, tmp_path / "run", data__num_workers=0))
    assert scales == [2.0, 1.0, 0.5]
