"""Top-k against a naive count, FLOPs of a known model, and speeds against a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch

import taylorvit  # noqa: F401  (registers the models)
from taylorvit.attention import ATTENTIONS
from taylorvit.complexity import ops_direct, ops_efficient
from taylorvit.metrics import PEAK_TFLOPS, Pace, correct_in_top, forward_flops, peak_flops, peak_memory_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Stands for time.monotonic; the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("taylorvit.metrics.time.monotonic", clock)
    return clock


# ---- top-k


@pytest.mark.parametrize("num_classes", [1, 2, 4, 5, 6, 30])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k_against_counting_greater_logits(num_classes: int, k: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(200, num_classes, generator=generator)
    labels = torch.randint(num_classes, (200,), generator=generator)
    naive = [sum(other > row[label] for other in row.tolist()) < k for row, label in zip(logits, labels.tolist())]
    found = correct_in_top(logits, labels, k)
    assert found.dtype == torch.bool
    assert found.tolist() == naive
    assert found.all() == (num_classes <= k or all(naive))


def test_top_k_of_no_images() -> None:
    assert correct_in_top(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), 5).shape == (0,)


# ---- FLOPs


def test_flops_of_known_models() -> None:
    """DeiT's figures for ViT-Ti and ViT-S are 1.25 and 4.6 G multiply-adds."""
    tiny, small = (
        timm.create_model(f"taylorvit_{size}_patch16_224", attention="softmax", device="meta") for size in ("tiny", "small")
    )
    assert forward_flops(tiny, (3, 224, 224)) == pytest.approx(2.507e9, rel=5e-4)
    assert forward_flops(small, (3, 224, 224)) == pytest.approx(9.198e9, rel=5e-4)
    assert forward_flops(timm.create_model("vit_tiny_patch16_224", device="meta"), (3, 224, 224)) == forward_flops(
        tiny, (3, 224, 224)
    )


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_flops_of_every_attention_are_counted_without_computing(attention: str) -> None:
    sizes = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("taylorvit_tiny_patch16_224", attention=attention, device="meta", **sizes)
    projections = 2 * 2 * 65 * (3 + 1 + 8) * 32**2  # qkv, proj and mlp of both blocks; Reformer has no keys of its own
    assert forward_flops(model, (3, 32, 32)) > projections - 2 * 2 * 65 * 32**2


def test_flops_follow_the_form_of_the_attention() -> None:
    def count(form: str) -> int:
        options = {"attention_options": {"form": form}, "depth": 1, "num_heads": 3, "device": "meta"}
        return forward_flops(timm.create_model("taylorvit_tiny_patch16_224", **options), (3, 224, 224))

    softmax = forward_flops(
        timm.create_model("taylorvit_tiny_patch16_224", attention="softmax", depth=1, num_heads=3, device="meta"), (3, 224, 224)
    )
    assert count("direct") == softmax  # the same two products; what is between them is no matrix product
    assert count("efficient") > count("direct")
    assert (ops_efficient(197, 64) > ops_direct(197, 64)) == (count("efficient") > count("direct"))


# ---- peaks


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, key: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU, "bf16") == (PEAK_TFLOPS[key][0] * 1e12 if key else None)
    assert peak_flops(GPU, "fp16") == peak_flops(GPU, "bf16")
    assert peak_flops(GPU, "no") == (PEAK_TFLOPS[key][1] * 1e12 if key else None)


def test_the_peak_without_mixed_precision_is_plain_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is off, and would be 8 times as much."""
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    assert peak_flops(GPU, "no") == 19.5e12
    assert all(single < half for half, single in PEAK_TFLOPS.values())


def test_a_cpu_has_no_peak_but_uses_memory() -> None:
    assert peak_flops(CPU, "bf16") is None
    before = peak_memory_bytes(CPU)
    assert before > 50 * 2**20  # torch alone is more
    block = torch.ones(2**24)
    assert peak_memory_bytes(CPU) >= before
    assert peak_memory_bytes(CPU) < 2**40
    del block


# ---- pace


def pace(clock: Clock, *, peak: float | None = 1e12) -> Pace:
    return Pace(images_per_update=32, training_flops=10**9, peak_flops=peak, device=CPU)


def test_pace_is_images_over_time(clock: Clock) -> None:
    reader = pace(clock)
    clock.now += 8.0
    figures = reader.read(10)
    assert figures["images_per_second"] == pytest.approx(10 * 32 / 8)
    assert figures["mfu"] == pytest.approx(40 * 1e9 / 1e12)
    assert figures["data_wait_share"] == 0.0
    assert figures["peak_memory_bytes"] == peak_memory_bytes(CPU)
    clock.now += 1.0
    assert reader.read(12)["images_per_second"] == pytest.approx(2 * 32)


def test_pace_without_a_peak_has_no_utilisation(clock: Clock) -> None:
    reader = pace(clock, peak=None)
    clock.now += 1.0
    assert reader.read(1)["mfu"] is None


def test_pace_counts_the_wait_for_data_and_nothing_else(clock: Clock) -> None:
    def batches() -> Iterator[list[torch.Tensor]]:
        for seconds in (1.0, 0.0, 2.0):
            clock.now += seconds
            yield []

    reader = pace(clock)
    seen = 0
    for _ in reader.timed(batches()):
        clock.now += 3.0  # the update
        seen += 1
    assert seen == 3
    assert reader.read(3)["data_wait_share"] == pytest.approx(3.0 / 12.0)
    clock.now += 1.0
    assert reader.read(4)["data_wait_share"] == 0.0


def test_pace_restart_forgets_what_was_between(clock: Clock) -> None:
    reader = pace(clock)
    clock.now += 50.0  # an evaluation
    reader.restart(7)
    clock.now += 2.0
    assert reader.read(8)["images_per_second"] == pytest.approx(16.0)


def test_pace_survives_a_clock_that_stands(clock: Clock) -> None:
    assert torch.isfinite(torch.tensor(pace(clock).read(1)["images_per_second"]))
