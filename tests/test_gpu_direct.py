"""The Triton kernels of the direct form against the reference: accuracy, every launch, ragged ends, strides, edge cases.

Without a GPU they run in Triton's interpreter, which has fp16 and fp32 only and is slow: most tests replace the block sizes of
the launch table by smaller ones. Uninitialised memory is NaN in all of these tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    HARD_KINDS,
    each_dtype,
    greatest,
    hard_inputs,
    needs_kernels,
    replace_blocks,
    results_of,
    rms,
    rounded,
)
from test_cpu_ops import RESULTS, Shape, in_fp64, inputs, laid_out
from torch import Tensor

from taylorvit.ops import gpu_direct, kernels, reference

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]
each_variant = pytest.mark.parametrize("variant", ["one launch", "prepared keys"])


@pytest.fixture(autouse=True)
def _variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the variant of the forward pass that the test's parameter names, whatever N."""
    variant = getattr(request.node, "callspec", None) and request.node.callspec.params.get("variant")
    if variant:
        monkeypatch.setattr(gpu_direct, "MAX_FUSED_TOKENS", 10**9 if variant == "one launch" else 0)


def use_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Make all blocks `rows` queries or `columns` keys long."""
    replace_blocks(monkeypatch, gpu_direct, BLOCK_M=rows, BLOCK_N=columns)


def run(tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return y and the gradients of q, k, v and temperature."""
    return results_of(gpu_direct, tensors, grad)


# ---- accuracy


FP32_EPS = torch.finfo(torch.float32).eps


def with_rounded_operands(tensors: Sequence[Tensor], grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results in fp64 but for what matrix products in the dtype of q take away, and the size of other rounding.

    Rounded are the weights without their constant, the deviations from the mean of the values, the gradient of y over z where
    it is an operand, that of the scores, and the keys less their mean. Scores are exact, what delta is off by is corrected for.
    """
    dtype = tensors[0].dtype
    q, k, v, temperature = (x.double() for x in tensors)
    (queries, keys), tau = [reference.unit_vectors(x) for x in (q, k)], temperature[:, None, None]
    cosines = queries @ keys.mT
    x = tau * cosines
    p, slope = reference.A * x.square() + reference.B * x, 2 * reference.A * x + reference.B
    weights, scale = p + reference.C, math.sqrt(v.shape[2] / v.shape[3])
    z, mean = weights.sum(dim=-1, keepdim=True), v.mean(dim=2, keepdim=True)
    y = (rounded(p, dtype) + reference.C) @ v / z
    deviation, g = rounded(y - mean, dtype), scale * grad.double() / z
    t = g @ (v - mean).mT - (g * deviation).sum(dim=-1, keepdim=True)
    error = (weights * t).sum(dim=-1, keepdim=True) / z
    centre, dx = keys.mean(dim=2, keepdim=True), (t - error) * slope
    dq = rounded(t * slope, dtype) @ rounded(keys - centre, dtype) + dx.sum(dim=-1, keepdim=True) * centre
    operand = rounded(g, dtype)
    t = operand @ (v - mean).mT - (operand * deviation).sum(dim=-1, keepdim=True) - error
    dk = rounded(t * slope, dtype).mT @ queries
    dv = rounded(p, dtype).mT @ operand + reference.C * g.sum(dim=2, keepdim=True)
    dtau, size = ((f(dx) * f(cosines)).sum(dim=(0, 2, 3)) for f in (lambda x: x, torch.abs))
    lengths = [x.norm(dim=-1, keepdim=True).clamp_min(reference.GRADIENT_LENGTH) for x in (q, k)]
    sizes = [tau * gradient / length for gradient, length in zip((dq, dk), lengths)]
    dq, dk = (x - (x * unit).sum(dim=-1, keepdim=True) * unit for x, unit in zip(sizes, (queries, keys)))
    # Of sums and results: the reference's error has most of it. A sum in fp32 may be off by more than in another order.
    share = 2 * FP32_EPS if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    other = [share * x for x in (scale * y, *sizes, dv)]
    if v.shape[2] == 1:  # the gradients are 0: g . v less delta, equal but for fp32. That of the reference may be 0 by chance
        terms = 2 * FP32_EPS * (g * y).abs().sum(dim=-1, keepdim=True) * (tau * slope).abs()
        other[1:3] = (terms / length for length in lengths)
        size = (g * y).abs().sum(dim=-1).sum(dim=(0, 2))
    return [scale * y, dq, dk, dv, dtau], [*other, 2 * FP32_EPS * size]


def errors(tensors: Sequence[Tensor], grad: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return what each result is off by (ours, the reference's, that of rounded operands) and the size of other rounding."""
    exact = in_fp64(tensors, grad)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = reference.direct(*leaves)
    theirs = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    model, other = with_rounded_operands(tensors, grad)
    ours = run(tensors, grad)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    return [[x.double() - truth for x in results] for *results, truth in zip(ours, theirs, model, exact)], other


def assert_within_budget(tensors: Sequence[Tensor], grad: Tensor) -> None:
    """Check error <= 2 (error of the reference + what rounded operands cost) + other rounding: see `with_rounded_operands`.

    In the mean square and, twice as much, anywhere. Where there are few numbers chance decides: twice as much for one or two
    tokens, and more for the gradient of the temperature, one number a head, which has a test of its own.
    """
    for name, off, other in zip(RESULTS, *errors(tensors, grad)):
        chance = 5 if name == "dtemperature" else 2 if grad.shape[2] <= 2 else 1
        for norm, factor in ((rms, 1), (greatest, 2)):
            error, *allowed = (norm(x) for x in off)
            budget = chance * factor * (2 * sum(allowed) + norm(other) + 1e-14)
            assert error <= budget, f"{name}: {error:.2e}, budget {budget:.2e}, reference and operands {allowed}"


CASES: list[tuple[Shape, str, float]] = [
    ((1, 2, 1, 8), "normal", 10),
    ((1, 3, 2, 17), "clustered keys", 1),
    ((2, 1, 17, 1), "1e-4", 100),
    ((1, 2, 31, 64), "large mean", -1),
    ((1, 2, 33, 16), "clustered keys", 100),
    ((1, 1, 65, 32), "zero vectors", -8),
    ((1, 2, 33, 48), "zero vectors", 0),
    ((1, 1, 49, 80), "normal", 3),
    ((1, 1, 63, 64), "normal", 100),
    ((2, 1, 33, 16), "large mean", 10),
    ((1, 2, 32, 32), "1e-10", 1),
    ((1, 1, 34, 24), "1e3", -3),
    ((1, 1, 65, 8), "large mean", 0),
    ((1, 1, 33, 128), "clustered keys", 10),
    ((1, 2, 17, 16), "normal", 1e5),  # beyond the range of fp16
]


@each_dtype
@pytest.mark.parametrize(("shape", "kind", "temperature"), CASES, ids=str)
def test_error_budget(shape: Shape, kind: str, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 by 16: for most of them several of each and ragged ends. The variants of the forward pass take turns."""
    use_blocks(monkeypatch, 32, 16)
    monkeypatch.setattr(
        gpu_direct, "MAX_FUSED_TOKENS", (CASES.index((shape, kind, temperature)) + DTYPES.index(dtype)) % 2 * 512
    )
    assert_within_budget(*inputs(shape, dtype, kind, temperature))


@each_dtype
@pytest.mark.parametrize(("kind", "temperature"), [("normal", 3), ("large mean", 0.01), ("clustered keys", 10)])
def test_temperature_gradient_is_as_accurate_as_it_can_be(dtype: torch.dtype, kind: str, temperature: float) -> None:
    """The mean over many heads tells, where chance decides about a single one."""
    (*_, (ours, theirs, _)), _ = errors(*inputs((1, 10, 33, 16), dtype, kind, temperature))
    assert ours.norm() <= 2 * theirs.norm()


# Error of 16 bits over that of the reference in the same dtype, in the mean square, where it is above 2.2: the deviation of y
# from the mean of the values is small against what is rounded; even powers cancel between the two clusters; what all queries
# have in common cancels out of dk and dv.
EXCEPTIONS = {("large mean", "dq"): 18, ("opposite keys", "dq"): 6.5, ("queries", "dk"): 150, ("queries", "dv"): 200}


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize("kind", HARD_KINDS)
def test_sixteen_bits_are_as_accurate_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    for name, (ours, theirs, _) in zip(RESULTS, errors(*hard_inputs(kind, dtype))[0]):
        allowed = EXCEPTIONS.get((kind, name), 2.2)
        assert rms(ours) <= allowed * rms(theirs), f"{name}: {rms(ours) / rms(theirs):.2f} times, {allowed} allowed"


@each_variant
@each_dtype
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_every_entry_of_the_launch_table(width: int, dtype: torch.dtype, variant: str) -> None:
    """One token more than the largest block: two blocks of each, one of them almost empty."""
    bits = torch.finfo(dtype).bits
    launches = [launch for (_, *key), launch in gpu_direct.TABLE.items() if key == [width, bits]]
    largest = max(size for launch in launches for size in launch.blocks.values())
    assert_within_budget(*inputs((1, 1, largest + 1, width), dtype, temperature=3.0))


def test_launch_table_is_complete() -> None:
    names = {name for name, *_ in gpu_direct.TABLE}
    assert names == {
        "prepare_keys", "forward_short", "forward", "prepare_backward", "backward_queries", "backward_keys",
    }  # fmt: skip
    assert set(gpu_direct.TABLE) == set(itertools.product(names, (16, 32, 64, 128), (16, 32)))


# ---- sizes


def assert_equals_reference(tensors: Sequence[Tensor], grad: Tensor) -> None:
    """Compare in fp32, where rounding is far smaller than any other error."""
    for name, result, exact in zip(RESULTS, run(tensors, grad), in_fp64(tensors, grad)):
        torch.testing.assert_close(
            result.double(), exact, rtol=2e-5, atol=2e-5, msg=f"{name} differs by {(result - exact).abs().max()}"
        )


@each_variant
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65])
def test_lengths_around_the_blocks(num_tokens: int, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, *((16, 32) if variant == "one launch" else (32, 16)))
    assert_equals_reference(*inputs((1, 1, num_tokens, 8), torch.float32, temperature=2.0))


@each_variant
def test_length_of_a_vision_transformer(variant: str) -> None:
    assert_equals_reference(*inputs((1, 1, 197, 32), torch.float32, temperature=2.0))


def test_sums_in_more_parts_than_are_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """19 parts of the sum of the values, and of that of g; 16 are added at a time."""
    small = {key: replace(launch, blocks=dict.fromkeys(launch.blocks, 16)) for key, launch in gpu_direct.TABLE.items()}
    monkeypatch.setattr(gpu_direct, "TABLE", gpu_direct.TABLE | {key: x for key, x in small.items() if "prepare" in key[0]})
    monkeypatch.setattr(gpu_direct, "MAX_FUSED_TOKENS", 0)
    assert_equals_reference(*inputs((1, 1, 290, 8), torch.float32, temperature=2.0))


@pytest.mark.parametrize(
    ("num_tokens", "kernels_used"), [(197, ["forward"]), (512, ["forward"]), (513, ["prepare_keys", "forward"])]
)
def test_short_sequences_take_one_launch(num_tokens: int, kernels_used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *args, **kwargs: launched.append(kernel.__name__))
    q = torch.empty(2, 3, num_tokens, 64, dtype=torch.bfloat16, device="meta")
    gpu_direct.forward(q, q, q, torch.ones(3), training=True)
    assert launched == kernels_used


@each_dtype
@pytest.mark.parametrize("head_dim", [1, 2, 8, 15, 16, 17, 24, 32, 33, 48, 64, 65, 80, 96, 127, 128])
def test_head_dimensions(head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between powers of two the kernels' columns are partly empty. Odd ones take the prepared keys, even ones one launch."""
    monkeypatch.setattr(gpu_direct, "MAX_FUSED_TOKENS", 0 if head_dim % 2 else 512)
    use_blocks(monkeypatch, 32, 16)
    assert_within_budget(*inputs((1, 1, 33, head_dim), dtype, temperature=3.0))


@each_variant
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)], ids=str)
def test_nothing_to_attend_to(shape: Shape, variant: str) -> None:
    tensors, grad = inputs(shape, torch.float32)
    y, *gradients, dtemperature = run(tensors, grad)
    assert all(x.shape == shape for x in (y, *gradients))
    assert torch.equal(dtemperature, torch.zeros(shape[1]))


# ---- memory


LAYOUTS = ["packed", "transposed", "expanded", "every other number", "reversed and shifted"]


@each_variant
@pytest.mark.parametrize("first", range(5), ids=LAYOUTS)
def test_any_strides(first: int, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor has a layout of its own: strides that are taken for those of another one show."""
    use_blocks(monkeypatch, 16, 16)
    (q, k, v, temperature), grad = inputs((2, 2, 17, 6), torch.float32)
    q, k, v, grad = (laid_out([x] * 3, LAYOUTS[(first + i) % 5])[i % 3] for i, x in enumerate((q, k, v, grad)))
    assert_equals_reference([q, k, v, temperature], grad)


@each_variant
def test_gradient_that_is_one_number_expanded(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass of a sum gives."""
    use_blocks(monkeypatch, 16, 16)
    tensors, grad = inputs((2, 2, 17, 6), torch.float32)
    assert_equals_reference(tensors, torch.ones(()).expand_as(grad))


@each_variant
@each_dtype
def test_results_are_laid_out_as_documented(dtype: torch.dtype, variant: str) -> None:
    """Also on the meta device, which is how PyTorch asks for shapes; y and the gradients join their heads without a copy."""
    tensors, grad = inputs((2, 3, 5, 8), dtype)
    meta = gpu_direct.empty_results(tensors[0].to("meta"), True)
    device_tensors = [x.to(DEVICE) for x in tensors]
    results = gpu_direct.forward(*device_tensors, training=True)
    for result, expected in zip(results, meta, strict=True):
        assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert result.isfinite().all()
    gradients = gpu_direct.backward(grad.to(DEVICE), *device_tensors, *results[1:])
    for x in (results[0], *gradients[:3]):
        assert x.transpose(1, 2).is_contiguous()
        assert x.dtype == dtype
    assert [tuple(x.shape) for x in results[1:]] == [(2, 3, 5, 8), (2, 3, 5), (2, 3, 8)]


@each_variant
def test_nothing_is_kept_without_training(variant: str) -> None:
    tensors = [x.to(DEVICE) for x in inputs((2, 3, 5, 8), torch.float32)[0]]
    y, *saved = gpu_direct.forward(*tensors, training=False)
    assert [x.numel() for x in saved] == [0, 0, 0]
    assert [x.dtype for x in saved] == [x.dtype for x in gpu_direct.empty_results(tensors[0], True)[1:]]
    assert torch.equal(y, gpu_direct.forward(*tensors, training=True)[0])


@each_variant
@each_dtype
def test_same_inputs_give_the_same_bits_and_stay_as_they_are(
    dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, 16, 16)
    tensors, grad = inputs((1, 2, 17, 8), dtype)
    before = [x.clone() for x in (*tensors, grad)]
    first, second = (run(tensors, grad) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert all(torch.equal(x, y) for x, y in zip((*tensors, grad), before))


# ---- heads


@each_variant
@each_dtype
def test_a_head_does_not_depend_on_the_others(dtype: torch.dtype, variant: str) -> None:
    tensors, grad = inputs((2, 3, 17, 8), dtype)
    *together, _ = run(tensors, grad)
    for image, head in itertools.product(range(2), range(3)):
        part = slice(image, image + 1), slice(head, head + 1)
        *alone, _ = run([*(x[part] for x in tensors[:3]), tensors[3][head : head + 1].clone()], grad[part])
        assert all(torch.equal(x, y[part]) for x, y in zip(alone, together))


@each_variant
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", range(4), ids=["q", "k", "v", "temperature"])
def test_what_is_not_finite_stays_in_its_head(position: int, bad: float, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 16, 16)
    tensors, grad = inputs((1, 3, 18, 8), torch.float32)
    right = run(tensors, grad)
    tensors[position][1 if position == 3 else (0, 1, 2, 3)] = bad
    y, *gradients, dtemperature = wrong = run(tensors, grad)
    for result, untouched in zip(wrong[:4], right):
        assert torch.equal(result[:, [0, 2]], untouched[:, [0, 2]])
    assert torch.equal(dtemperature[[0, 2]], right[4][[0, 2]])
    assert not dtemperature[1].isfinite()
    if position == 0:  # of a query: its own output
        assert not y[0, 1, 2].isfinite().any()
        assert y[0, 1, 3:].isfinite().all()
    elif position == 2:  # of a value: its own component of every output
        assert not y[0, 1, :, 3].isfinite().any()
        assert y[0, 1, :, 4:].isfinite().all()
    else:
        assert not any(x[0, 1].isfinite().any() for x in (y, gradients[0], gradients[1]))


@each_variant
@pytest.mark.parametrize("position", [0, 1], ids=["q", "k"])
def test_a_length_beyond_the_range_is_nan_not_a_zero_vector(position: int, variant: str) -> None:
    tensors, grad = inputs((1, 2, 5, 4), torch.float32)
    tensors[position][0, 1, 3] *= 1e30
    y, *_ = run(tensors, grad)
    assert y[0, 0].isfinite().all()
    assert y[0, 1, 3 if position == 0 else slice(None)].isnan().all()


# ---- everything


@pytest.mark.slow
@each_variant
@each_dtype
@pytest.mark.parametrize("temperature", [-8.0, 0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", ["normal", "large mean", "clustered keys", "zero vectors", "1e-4", "1e-10", "1e3"])
def test_error_budget_of_everything(
    kind: str, temperature: float, dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, 32, 16)
    for num_tokens, head_dim in itertools.product((1, 2, 17, 65), (1, 8, 16, 24, 32, 48, 64, 80, 128)):
        assert_within_budget(*inputs((1, 2, num_tokens, head_dim), dtype, kind, temperature))


@pytest.mark.slow
@each_variant
@each_dtype
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 63, 64, 65, 127, 128, 129, 197, 257])
def test_blocks_of_the_table_at_every_length(num_tokens: int, head_dim: int, dtype: torch.dtype, variant: str) -> None:
    assert_within_budget(*inputs((1, 2, num_tokens, head_dim), dtype, temperature=3.0))
