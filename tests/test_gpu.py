"""What only a GPU can show; run with `make test-gpu`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, history, losses, tiny_config

from taylorvit.checkpoint import list_checkpoints
from taylorvit.engine import train
from taylorvit.ops import taylor_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["direct", "efficient"])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 8), (197, 64), (1025, 32)])
def test_output_and_gradients_stay_within_the_rounding_of_the_inputs(
    dtype: torch.dtype, form: str, tokens: int, dim: int
) -> None:
    """Against fp64 on the CPU, from inputs that are already rounded; TF32 stays off, as is PyTorch's default."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, tokens, dim).to(dtype) for _ in range(3)]
    temperature = torch.tensor([0.5, 1.0, 4.0])
    weight = torch.randn(2, 3, tokens, dim).to(dtype)

    def run(device: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(device, kind).requires_grad_() for tensor in inputs]
        scale = temperature.to(device, torch.promote_types(kind, torch.float32)).requires_grad_()
        out = taylor_attention(*leaves, scale, form=form)
        out.backward(weight.to(device, kind))
        return [out.detach(), *(leaf.grad for leaf in [*leaves, scale] if leaf.grad is not None)]

    for exact, found in zip(run("cpu", torch.float64), run("cuda", dtype), strict=True):
        error = (found.cpu().double() - exact).abs().max()
        # the result is rounded once to its dtype; the sums behind it are fp32
        budget = 2 * torch.finfo(dtype).eps + 64 * math.sqrt(tokens) * torch.finfo(torch.float32).eps
        assert error <= budget * exact.abs().max().clamp_min(1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__mixed_precision": "bf16"},
        {"train__mixed_precision": "fp16"},
        {"train__mixed_precision": "bf16", "train__compile": True},
    ],
    ids=str,
)
def test_training_is_finite_and_continues(changes: dict[str, object], digit_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(digit_folder, tmp_path / "run", device="cuda", schedule__epochs=2, **changes)
    assert train(config) == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())


def test_two_runs_on_one_gpu_are_the_same(digit_folder: Path, tmp_path: Path) -> None:
    """Without cuDNN and atomics in the model's way, the same device gives the same bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name in ("one", "two"):
        train(tiny_config(digit_folder, tmp_path / name, device="cuda", schedule__epochs=1, schedule__warmup_epochs=0.5))
    torch.use_deterministic_algorithms(False)
    assert history(tmp_path / "one") == history(tmp_path / "two")
    assert_same_state(*(list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("one", "two")))
