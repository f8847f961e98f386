"""What only a GPU can show; run with `make test-gpu`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, history, losses, tiny_config
from torch import Tensor

from taylorvit.checkpoint import list_checkpoints
from taylorvit.engine import train
from taylorvit.ops import taylor_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WIDTHS = [8, 16, 32, 48, 64, 128]  # head dimensions: every width of the launch tables, and two that are padded
each_form = pytest.mark.parametrize("form", ["direct", "efficient"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what `empty` returns with NaN: a number that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    num_tokens: int, head_dim: int, dtype: torch.dtype, *, batch: int = 2, heads: int = 3, seed: int = 0
) -> list[Tensor]:
    """Draw q, k, v as views of a packed projection, temperatures from -2 to 4, and the gradient of y."""
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=generator, device="cuda").to(dtype)
    grad = torch.randn(batch, num_tokens, heads, head_dim, generator=generator, device="cuda").to(dtype).transpose(1, 2)
    return [*qkv.permute(2, 0, 3, 1, 4).unbind(0), torch.linspace(-2.0, 4.0, heads, device="cuda"), grad]


def attend(tensors: list[Tensor], form: str, impl: str = "auto") -> list[Tensor]:
    """Return y and the gradients of q, k, v and temperature."""
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = taylor_attention(*leaves, form=form, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact_and_plain(tensors: list[Tensor], form: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the reference gives in fp64, and in the dtype of the inputs."""
    return attend([x.double() for x in tensors], form, "reference"), attend(tensors, form, "reference")


def assert_near(found: list[Tensor], exact: list[Tensor], plain: list[Tensor], form: str) -> None:
    """Check error <= 2 error of the reference + rounding, relative to the tensor's largest number.

    In 16 bits operands of products are rounded, which the reference does not do. In the direct form those of the scores are
    not, and the gradient of the temperature is a sum of fp32 numbers. In the efficient form unit vectors and features are, and
    the gradients of q, k and above all of the temperature are differences of larger numbers. test_gpu_direct and
    test_gpu_efficient hold them to a model of that rounding, also for inputs that make it large.
    """
    num_tokens, dtype = found[0].shape[2], found[0].dtype
    largest = max(float(x.abs().max()) for x in exact)
    units = {"efficient": {"dq": 4, "dk": 4, "dv": 2, "dtemperature": 8}, "direct": {"dtemperature": 0}}
    allowed = units[form] if dtype != torch.float32 else {}
    for name, ours, theirs, truth in zip(("y", "dq", "dk", "dv", "dtemperature"), found, plain, exact, strict=True):
        assert ours.isfinite().all(), name
        scale = max(float(truth.abs().max()), max(1e-3, 0.1 / num_tokens) * largest)
        error, own = (float((x.double() - truth).abs().max()) / scale for x in (ours, theirs))
        sums = torch.finfo(torch.float32).eps * (128 + 8 * math.sqrt(num_tokens))
        assert error <= 2 * own + allowed.get(name, 1) * torch.finfo(dtype).eps + sums, (
            f"{name}: {error:.2e}, reference {own:.2e}"
        )


@each_form
@each_dtype
@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("num_tokens", [1, 17, 64, 65, 197, 513, 1025])
def test_results_stay_within_the_rounding_of_the_inputs(form: str, dtype: torch.dtype, head_dim: int, num_tokens: int) -> None:
    """Every width of the launch tables, both ways of the direct forward pass, ragged ends; the reference is without TF32."""
    tensors = inputs(num_tokens, head_dim, dtype)
    assert_near(attend(tensors, form, "triton"), *exact_and_plain(tensors, "direct"), form)


@each_form
@each_dtype
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(4097, 64), (16385, 32), (16385, 16)])
def test_long_sequences(form: str, dtype: torch.dtype, num_tokens: int, head_dim: int) -> None:
    tensors = inputs(num_tokens, head_dim, dtype, batch=1, heads=2)
    assert_near(attend(tensors, form, "triton"), *exact_and_plain(tensors, "efficient"), form)


@each_form
@each_dtype
def test_values_with_a_large_mean_and_clustered_keys(form: str, dtype: torch.dtype) -> None:
    q, k, v, temperature, grad = inputs(1025, 64, dtype)
    k = (k[:, :, :1] + 0.05 * k).contiguous()
    tensors = [q, k, v + 10, temperature, grad]
    y = attend(tensors, form, "triton")[0]
    exact = attend([x.double() for x in tensors], "direct", "reference")[0]
    units = 8 if dtype == torch.float32 else 1  # the mean of the values is itself a sum in fp32
    assert (y.double() - exact).abs().max() <= units * torch.finfo(dtype).eps * exact.abs().max()


@each_form
@each_dtype
@pytest.mark.parametrize("num_tokens", [197, 2049])
def test_equal_calls_give_equal_bits(form: str, dtype: torch.dtype, num_tokens: int) -> None:
    tensors = inputs(num_tokens, 64, dtype)
    first = attend(tensors, form, "triton")
    for _ in range(20):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(attend(tensors, form, "triton"), first))


@each_form
def test_a_cuda_graph_replays_forward_and_backward(form: str) -> None:
    tensors, others = inputs(577, 64, torch.bfloat16), inputs(577, 64, torch.bfloat16, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(tensors, form, "triton")  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend(tensors, form, "triton")
    for held, new in zip(tensors, others):
        held.copy_(new)
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, attend(others, form, "triton")))


@each_form
def test_compiled_with_inductor(form: str) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return taylor_attention(2 * q, k, v, temperature, form=form).transpose(1, 2).flatten(2) + 1

    *leaves, _ = inputs(197, 64, torch.float32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*leaves), layer(*leaves))


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    double = inputs(20, 16, torch.float64)[:4]
    wide = inputs(20, 192, torch.bfloat16)[:4]
    for tensors in (double, wide):
        assert torch.equal(taylor_attention(*tensors), taylor_attention(*tensors, impl="reference"))
        with pytest.raises(ValueError, match="impl 'triton' "):
            taylor_attention(*tensors, impl="triton")


@each_form
def test_tensors_beyond_the_first_four_gigabytes(form: str) -> None:
    """Offsets do not fit 32 bits. Only the last sample is compared; alone, its tokens are split otherwise."""
    qkv = torch.zeros(24, 40_000, 3, 12, 64, device="cuda", dtype=torch.bfloat16)  # 4.4 GB
    qkv[-1] = torch.randn(qkv.shape[1:], device="cuda").to(torch.bfloat16)
    temperature = torch.ones(12, device="cuda")
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = taylor_attention(q, k, v, temperature, form=form, impl="triton")[-1:].float()
    alone = taylor_attention(q[-1:], k[-1:], v[-1:], temperature, form=form, impl="triton").float()
    assert (y - alone).abs().max() <= torch.finfo(torch.bfloat16).eps * alone.abs().max()


@each_form
def test_tensors_that_are_not_aligned(form: str) -> None:
    """Kernels are compiled anew where a pointer or stride is no multiple of 16."""
    tensors = inputs(65, 33, torch.bfloat16)
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in tensors[:3]]
    results = [attend(x, form, "triton") for x in (tensors, [*shifted, *tensors[3:]])]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


@each_form
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one(form: str) -> None:
    tensors = inputs(197, 64, torch.bfloat16)
    others = [x.to("cuda:1") for x in tensors]
    assert all(
        torch.equal(ours, theirs.to(ours.device))
        for ours, theirs in zip(attend(tensors, form, "triton"), attend(others, form, "triton"))
    )


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
    for name in ("one", "two"):
        train(tiny_config(digit_folder, tmp_path / name, device="cuda", schedule__epochs=1, schedule__warmup_epochs=0.5))
    assert history(tmp_path / "one") == history(tmp_path / "two")
    assert_same_state(*(list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("one", "two")))
