"""The CPU implementation against the reference: accuracy, every way through its tilings, memory, strides, autocast, edge cases.

Uninitialised memory is NaN in all of these tests.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from taylorvit.ops import cpu, cpu_direct, cpu_efficient, reference, taylor_attention
from taylorvit.ops.pieces import pieces

Shape = tuple[int, int, int, int]

FORMS = ("direct", "efficient")
RESULTS = ("y", "dq", "dk", "dv", "dtemperature")
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what `empty` returns with NaN, and leave the number of threads as it was."""
    num_threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)


def inputs(
    shape: Shape, dtype: torch.dtype = torch.float64, kind: str = "normal", temperature: float | None = None, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Draw q, k, v and a temperature a head, and the gradient of y; `kind` says what is difficult about them."""
    batch, num_heads, _, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    q, k, v, grad = (draw(shape) for _ in range(4))
    if kind == "large mean":
        v += 100
    elif kind == "clustered keys":
        k = draw(batch, num_heads, 1, head_dim) + 0.01 * k
        v += 10
    elif kind == "zero vectors":
        q[:, :, ::3] = 0
        k[:, :, 1::2] = 0
    elif kind != "normal":
        q, k = float(kind) * q, float(kind) * k
    lowest, highest = (-1.0, 3.0) if temperature is None else (temperature, 1.1 * temperature)
    tau = torch.linspace(lowest, highest, num_heads, dtype=torch.float64)
    return [*(x.to(dtype) for x in (q, k, v)), tau.to(torch.promote_types(dtype, torch.float32))], grad.to(dtype)


def attend(tensors: Sequence[Tensor], grad: Tensor, form: str, impl: str = "cpu") -> list[Tensor]:
    """Return y and the gradients of q, k, v and temperature."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = taylor_attention(*leaves, form=form, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def in_fp64(tensors: Sequence[Tensor], grad: Tensor, form: str = "direct") -> list[Tensor]:
    return attend([x.double() for x in tensors], grad.double(), form, "reference")


def assert_equals_reference(tensors: Sequence[Tensor], grad: Tensor, form: str) -> None:
    """Compare all results in fp64: whatever differs but rounding is an error."""
    for name, ours, exact in zip(RESULTS, attend(tensors, grad, form), in_fp64(tensors, grad)):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11, msg=f"{name} differs by {(ours - exact).abs().max()}")


# ---- accuracy


def rounding_units(tensors: Sequence[Tensor], grad: Tensor, exact: Sequence[Tensor]) -> list[float]:
    """Return the size of the numbers that are rounded on the way to each result.

    The gradients of q, k and temperature are small differences of such numbers: of dx/|x| before its part along x is taken off,
    and of that part summed over the tokens.
    """
    q, k, v, temperature = (x.double() for x in tensors)
    lengths = [x.norm(dim=-1, keepdim=True) for x in (q, k)]
    units = [(x / length.clamp_min(reference.ZERO_LENGTH)).requires_grad_() for x, length in zip((q, k), lengths)]
    x = temperature[:, None, None] * units[0] @ units[1].mT
    w = 1 + x + x.square() / 2
    y = math.sqrt(v.shape[2] / v.shape[3]) * w @ v / w.sum(dim=-1, keepdim=True)
    dunits = torch.autograd.grad(y, units, grad.double())
    dq, dk = (d / length.clamp_min(reference.GRADIENT_LENGTH) for d, length in zip(dunits, lengths))
    radial = (units[0] * dunits[0]).sum(dim=-1).abs().sum(dim=(0, 2)) / temperature.abs().clamp_min(1)
    return [x.detach().abs().max().item() for x in (exact[0], dq, dk, exact[3], torch.maximum(radial, exact[4].abs()))]


def assert_within_budget(tensors: Sequence[Tensor], grad: Tensor, form: str, reference_form: str, exact: list[Tensor]) -> None:
    """Check error <= 2 error of the reference + rounding of the result, in the mean square and, twice as much, anywhere."""
    units = rounding_units(tensors, grad, exact) if tensors[0].shape[2] < 2000 else [x.abs().max().item() for x in exact]
    results = zip(RESULTS, attend(tensors, grad, form), attend(tensors, grad, reference_form, "reference"), exact, units)
    for name, ours, theirs, truth, unit in results:
        rounding = unit * torch.finfo(ours.dtype).eps + 1e-14
        ours_off, theirs_off = ours.double() - truth, theirs.double() - truth
        for norm, factor in ((lambda x: x.square().mean().sqrt().item(), 1), (lambda x: x.abs().max().item(), 2)):
            error, budget = norm(ours_off), factor * (2 * norm(theirs_off) + rounding)
            assert error <= budget, f"{name}: {error:.2e}, budget {budget:.2e}, the reference {norm(theirs_off):.2e}"


CASES: list[tuple[Shape, str, float]] = [
    ((2, 3, 1, 8), "normal", 10),
    ((1, 7, 1, 64), "large mean", -1),
    ((3, 5, 2, 1), "1e-4", 100),
    ((1, 1, 2, 17), "clustered keys", 1),
    ((3, 1, 31, 2), "zero vectors", 0),
    ((1, 7, 31, 64), "clustered keys", 100),
    ((5, 3, 31, 16), "1e-10", 1),
    ((1, 5, 197, 3), "large mean", 100),
    ((2, 3, 197, 64), "normal", 1),
    ((1, 7, 197, 32), "zero vectors", -8),
    ((1, 3, 577, 16), "clustered keys", -3),
    ((3, 1, 577, 17), "large mean", 0),
    ((1, 3, 577, 1), "1e-10", 10),
    ((1, 1, 577, 64), "normal", 100),
    ((1, 3, 1030, 8), "normal", 10),
    ((1, 1, 1030, 32), "1e-4", 1),
    ((1, 1, 1030, 64), "large mean", 10),
]


@each_form
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "kind", "temperature"), CASES, ids=str)
def test_error_budget(form: str, shape: Shape, kind: str, temperature: float, half: torch.dtype) -> None:
    """Half of the cases goes with bf16, half with fp16; all go in fp32."""
    is_even = CASES.index((shape, kind, temperature)) % 2 == 0
    dtype = half if is_even == (half == torch.float16) else torch.float32
    tensors, grad = inputs(shape, dtype, kind, temperature)
    assert_within_budget(tensors, grad, form, form, in_fp64(tensors, grad))


@pytest.mark.slow
@each_form
@pytest.mark.parametrize(
    ("head_dim", "kind", "temperature"), [(8, "clustered keys", 100), (16, "normal", 1), (32, "large mean", 10)]
)
def test_error_budget_of_16385_tokens(form: str, head_dim: int, kind: str, temperature: float) -> None:
    """The direct reference would take gigabytes: the efficient one stands for it, in fp64 for the truth too."""
    tensors, grad = inputs((1, 2, 16385, head_dim), torch.float32, kind, temperature)
    assert_within_budget(tensors, grad, form, "efficient", in_fp64(tensors, grad, "efficient"))


@each_form
@pytest.mark.parametrize("kind", ["normal", "large mean", "clustered keys"])
def test_temperature_gradient_is_as_accurate_as_the_reference(form: str, kind: str) -> None:
    """One number a head, and a difference of large ones: the mean over many heads tells, a single one is chance."""
    tensors, grad = inputs((1, 40, 150, 16), torch.float32, kind, -3)
    exact = in_fp64(tensors, grad)[4]
    ours, theirs = (attend(tensors, grad, form, impl)[4].double() - exact for impl in ("cpu", "reference"))
    assert ours.norm() <= 1.5 * theirs.norm()


@pytest.mark.fault("F7")
@each_form
@pytest.mark.parametrize(("shape", "kind", "temperature"), CASES, ids=str)
def test_fp64_is_fp64_throughout(form: str, shape: Shape, kind: str, temperature: float) -> None:
    """The sums may cancel, by N values of mean 100 or by a square of the temperature, but an fp32 number on the way shows."""
    tensors, grad = inputs(shape, torch.float64, kind, temperature)
    exact = in_fp64(tensors, grad)
    for name, ours, truth, unit in zip(RESULTS, attend(tensors, grad, form), exact, rounding_units(tensors, grad, exact)):
        assert ours.dtype == torch.float64
        assert (ours - truth).abs().max() <= 1e-10 * unit + 1e-13, name


@each_form
@pytest.mark.parametrize("shape", [(2, 2, 5, 3), (1, 2, 6, 4), (1, 1, 3, 1)], ids=str)
def test_gradcheck(form: str, shape: Shape) -> None:
    tensors, _ = inputs(shape)
    assert torch.autograd.gradcheck(
        partial(taylor_attention, form=form, impl="cpu"), [x.requires_grad_() for x in tensors], fast_mode=False
    )


@each_form
@pytest.mark.parametrize("needed", range(4))
def test_gradient_of_a_single_input(form: str, needed: int) -> None:
    tensors, grad = inputs((2, 3, 9, 5))
    tensors[needed].requires_grad_()
    (computed,) = torch.autograd.grad(taylor_attention(*tensors, form=form, impl="cpu"), tensors[needed], grad)
    torch.testing.assert_close(computed, in_fp64(tensors, grad)[1 + needed])


# ---- tilings

# One head's keys in several tiles, its queries in several steps; several heads a step; groups of images, of heads; ragged ends.
DIRECT = {"TILE_QUERIES": 3, "TILE_KEYS": 7, "MIN_QUERIES": 2}
TILINGS: dict[str, tuple[Shape, dict[str, int]]] = {
    "one piece": ((2, 3, 13, 4), {}),
    "queries in steps": ((2, 3, 30, 4), DIRECT),
    "queries in steps, the last one ragged": ((2, 3, 31, 5), DIRECT),
    "one step of tiles": ((2, 3, 11, 4), DIRECT | {"TILE_QUERIES": 64}),
    "few queries in several tiles of keys": ((2, 3, 15, 4), DIRECT | {"MIN_QUERIES": 100}),
    "some heads at a time, the last ones fewer": ((1, 5, 8, 4), {"TILE_QUERIES": 8, "TILE_KEYS": 8, "MIN_QUERIES": 100}),
    "some heads at a time, several tiles of keys": ((1, 5, 10, 4), {"TILE_QUERIES": 20, "TILE_KEYS": 4, "MIN_QUERIES": 100}),
    "heads uneven for the threads, all in tiles": ((1, 5, 11, 4), {"TILE_KEYS": 4, "MIN_QUERIES": 3}),
    "some heads at a time, all in tiles": (
        (1, 5, 11, 3),
        {"TILE_QUERIES": 2, "TILE_KEYS": 4, "MIN_QUERIES": 3},
    ),
    "chunks": ((2, 3, 24, 6), {"CHUNK_TOKENS": 8}),
    "ragged chunks, odd head dimension": ((2, 3, 23, 5), {"CHUNK_TOKENS": 8}),
    "chunks of one token": ((1, 2, 5, 2), {"CHUNK_TOKENS": 1}),
    "ragged chunks, head by head": ((2, 3, 23, 4), {"CHUNK_TOKENS": 8, "FEATURES_PER_THREAD": 1}),
    "ragged chunks, some heads": ((1, 5, 23, 4), {"CHUNK_TOKENS": 8, "FEATURES_PER_THREAD": 2 * 16 * 8}),
    "groups of images": ((5, 3, 9, 4), {"GROUP_SIZE": 2 * 3 * 9 * 4}),
    "groups of heads": ((3, 5, 9, 4), {"GROUP_SIZE": 2 * 9 * 4}),
    "head by head": ((2, 3, 9, 4), {"GROUP_SIZE": 1}),
    "everything": (
        (3, 5, 31, 3),
        DIRECT | {"CHUNK_TOKENS": 8, "FEATURES_PER_THREAD": 2 * 9 * 8, "GROUP_SIZE": 3 * 31 * 3},
    ),
}


@each_form
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("tiling", TILINGS)
def test_tilings_are_all_the_same_function(form: str, tiling: str, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, sizes = TILINGS[tiling]
    for name, size in sizes.items():
        module = next(module for module in (cpu, cpu_direct, cpu_efficient) if hasattr(module, name))
        monkeypatch.setattr(module, name, size)
    torch.set_num_threads(num_threads)
    assert_equals_reference(*inputs(shape), form)


def test_pieces_tile_the_range() -> None:
    for total in range(40):
        for largest in range(1, 12):
            sizes = [piece.stop - piece.start for piece in pieces(total, largest)]
            assert [i for piece in pieces(total, largest) for i in range(total)[piece]] == list(range(total))
            assert len(sizes) == math.ceil(total / largest)
            assert all(0 < size <= largest for size in sizes)


# ---- memory layout


def laid_out(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """Return q, k, v as other people's strides have them, with the same numbers where the layout allows it."""
    q, k, v = tensors
    if layout == "packed":  # what a layer's qkv projection gives
        return list(torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2).permute(2, 0, 3, 1, 4).unbind(0))
    if layout == "transposed":
        return [x.mT.contiguous().mT for x in (q, k, v)]
    if layout == "expanded":
        return [q[:1].expand_as(q), k[:, :1].expand_as(k), v[:, :, :1].expand_as(v)]
    if layout == "every other number":
        return [torch.stack([x, x.new_full((), math.nan).expand_as(x)], dim=-1)[..., 0] for x in (q, k, v)]
    shifted = v.new_empty(v.numel() + 1)[1:].view_as(v).copy_(v)
    return [q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), k, shifted]


@pytest.mark.fault("F7")
@each_form
@pytest.mark.parametrize("group_size", [cpu.GROUP_SIZE, 1], ids=str)
@pytest.mark.parametrize("layout", ["packed", "transposed", "expanded", "every other number", "reversed and shifted"])
def test_any_strides(form: str, layout: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GROUP_SIZE", group_size)
    tensors, grad = inputs((2, 3, 11, 6))
    strided = [*laid_out(tensors[:3], layout), tensors[3][:1].expand(3)]
    results = attend(strided, laid_out([grad] * 3, layout)[0], form)
    for ours, exact in zip(results, in_fp64([x.contiguous() for x in strided], laid_out([grad] * 3, layout)[0].contiguous())):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inputs_stay_as_they_are(form: str, dtype: torch.dtype) -> None:
    """Twice, as centred values or unit vectors written over the inputs would show in the second result at the latest."""
    tensors, grad = inputs((2, 3, 31, 8), dtype)
    before = [x.clone() for x in (*tensors, grad)]
    first, second = (attend(tensors, grad, form) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip((*tensors, grad), before))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@each_form
def test_backward_can_run_twice(form: str) -> None:
    """What is saved for the backward pass is not worked on in place."""
    tensors, grad = inputs((2, 3, 31, 8), torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    y = taylor_attention(*leaves, form=form, impl="cpu")
    kept = y.detach().clone()
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    assert all(torch.equal(x, z) for x, z in zip(first, torch.autograd.grad(y, leaves, grad)))
    assert torch.equal(y, kept)


@each_form
@pytest.mark.parametrize("group_size", [cpu.GROUP_SIZE, 1], ids=str)
def test_joining_the_heads_is_a_view(form: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GROUP_SIZE", group_size)
    tensors, _ = inputs((2, 3, 31, 8))
    y = taylor_attention(*tensors, form=form, impl="cpu")
    assert y.transpose(1, 2).reshape(2, 31, 24).data_ptr() == y.data_ptr()


# ---- autocast


@pytest.mark.fault("F7")
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_under_autocast_rounds_nothing_inside(form: str, dtype: torch.dtype) -> None:
    tensors, grad = inputs((2, 3, 50, 8), torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    rounded = [*(x.detach().to(dtype) for x in tensors[:3]), tensors[3].detach()]
    wanted = attend(rounded, grad.to(dtype), form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", dtype=dtype):
            y = taylor_attention(*leaves, form=form, impl="cpu")
            inside = torch.autograd.grad(y, leaves, grad.to(dtype), retain_graph=True)
        outside = torch.autograd.grad(y, leaves, grad.to(dtype))
    assert torch.equal(y, wanted[0])
    for name, ours, theirs, alone in zip(RESULTS[1:], inside, outside, wanted[1:]):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), name
        assert torch.equal(ours, alone.float()), name


# ---- edges


@pytest.mark.fault("F6")
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 3, 5, 4), (2, 0, 5, 4), (0, 0, 0, 1)], ids=str)
def test_nothing_gives_nothing(form: str, dtype: torch.dtype, shape: Shape) -> None:
    tensors, grad = inputs(shape, dtype)
    results = attend(tensors, grad, form)
    assert all(x.shape == shape and x.dtype == dtype for x in results[:4])
    assert torch.equal(results[4], torch.zeros_like(tensors[3]))
    assert all(x.isfinite().all() for x in getattr(torch.ops.taylorvit, f"cpu_{form}")(*tensors))  # the state of no tokens is 0


@pytest.mark.fault("F6")
@each_form
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 1, 3), (1, 4, 2, 1), (3, 1, 5, 2), (2, 2, 6, 9), (1, 1, 3, 65)], ids=str
)
def test_smallest_sizes(form: str, shape: Shape) -> None:
    assert_equals_reference(*inputs(shape), form)


@pytest.mark.fault("F9")
@each_form
@pytest.mark.parametrize("tiling", ["one piece", "everything"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("position", range(5), ids=["q", "k", "v", "temperature", "grad"])
def test_not_finite_where_it_takes_part_and_only_there(
    form: str, position: int, bad: float, tiling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in TILINGS[tiling][1].items():
        module = next(module for module in (cpu, cpu_direct, cpu_efficient) if hasattr(module, name))
        monkeypatch.setattr(module, name, size)
    tensors, grad = inputs((2, 3, 13, 4), torch.float32)
    *right, right_dtemperature = attend(tensors, grad, form)
    images = slice(1, 2)
    if position == 3:
        tensors[3][1] = bad
        images = slice(0, 2)
    else:
        (*tensors[:3], tensors[3], grad)[position][1, 1, 2, 3] = bad
    *wrong, dtemperature = attend(tensors, grad, form)
    for name, ours, untouched in zip(RESULTS, wrong, right):
        others = torch.ones(2, 3, dtype=torch.bool)
        others[images, 1] = False
        torch.testing.assert_close(ours[others], untouched[others], msg=name)
    torch.testing.assert_close(dtemperature[[0, 2]], right_dtemperature[[0, 2]])

    y, dq, dk, dv = (x[images, 1] for x in wrong)
    rows, columns = slice(None), slice(None)
    if position == 0:
        rows = slice(2, 3)  # of a query: its own output
    elif position == 2:
        columns = slice(3, 4)  # of a value: its own component of every output
    elif position == 4:
        rows = slice(0, 0)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[:, rows, columns] = True
    assert torch.equal(~y.isfinite(), touched)
    if position in (0, 1, 3):
        assert not any(x.isfinite().any() for x in (dk, dv))
    if position == 4:
        assert not dq[:, 2].isfinite().any()
        assert not dk.isfinite().any()
        assert not dv[..., 3].isfinite().any()
    assert not dtemperature[1].isfinite()


@pytest.mark.fault("F9")
@each_form
@pytest.mark.parametrize("position", [0, 1], ids=["q", "k"])
def test_a_length_beyond_the_range_is_nan_not_a_zero_vector(form: str, position: int) -> None:
    tensors, grad = inputs((1, 2, 5, 4), torch.float32)
    tensors[position][0, 1, 3] *= 1e30
    y, *_ = attend(tensors, grad, form)
    assert y[0, 0].isfinite().all()
    assert y[0, 1, 3 if position == 0 else slice(None)].isnan().all()


# ---- memory


class Memory(NamedTuple):
    peak: int  # bytes held at once, without the inputs
    largest: int  # bytes of the largest tensor


def memory_of_a_step(shape: Shape, form: str) -> Memory:
    """Follow every allocation of a forward and backward pass."""
    tensors, grad = inputs(shape, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    torch.use_deterministic_algorithms(False)  # poison is written, not held: only slower
    torch.set_num_threads(1)  # a tile a thread
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        y = taylor_attention(*leaves, form=form, impl="cpu")
        gradients = torch.autograd.grad(y, leaves, grad)
    del gradients
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return Memory(peak, largest)


def bytes_of_tokens(shape: Shape) -> int:
    return math.prod(shape) * 4


@each_form
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(2050, 32), (1500, 64)], ids=str)
def test_memory_of_a_step_is_linear_in_tokens(form: str, num_tokens: int, head_dim: int) -> None:
    """It at most doubles with N, and no tensor comes near N x N or N x D^2 numbers, 8 MiB or more each in all of these."""
    once, twice = (memory_of_a_step((1, 2, N, head_dim), form) for N in (num_tokens, 2 * num_tokens))
    assert twice.peak <= 2 * once.peak
    for memory, N in ((once, num_tokens), (twice, 2 * num_tokens)):
        assert memory.largest <= max(bytes_of_tokens((1, 2, N, head_dim)), 2**20 * 5 // 2)


@pytest.mark.parametrize(
    ("form", "num_tokens"),
    [("efficient", 16385), ("direct", 4097), pytest.param("direct", 16385, marks=pytest.mark.slow)],
)
def test_memory_of_a_long_step(form: str, num_tokens: int) -> None:
    """All that a forward and backward pass takes, results included, against q, k, v, y and their gradients."""
    shape = (1, 3, num_tokens, 64)
    assert memory_of_a_step(shape, form).peak <= 1.5 * 8 * bytes_of_tokens(shape)
