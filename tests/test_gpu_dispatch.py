"""When the Triton kernels are taken, when they are refused, and that modules, masks and training work through them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from taylorvit.complexity import num_features
from taylorvit.ops import gpu, resolve_form, resolve_impl


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    gpu._look_for_missing.cache_clear()
    yield
    gpu._look_for_missing.cache_clear()


def test_auto_takes_the_kernels_on_a_gpu_and_the_reference_where_they_cannot() -> None:
    assert resolve_impl("cuda") == "triton"
    assert resolve_impl("cuda", dtype=torch.bfloat16, head_dim=128) == "triton"
    assert resolve_impl("cuda", dtype=torch.float64, head_dim=64) == "reference"
    assert resolve_impl("cuda", dtype=torch.float32, head_dim=129) == "reference"
    assert resolve_impl("cpu") == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "impl 'triton' computes in float16, bfloat16, float32 only, got float64"),
        ({"head_dim": 192}, "impl 'triton' takes head dimensions up to 128, got 192"),
    ],
)
def test_by_name_it_is_refused_with_the_reason(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_impl("cuda", "triton", **arguments)


def test_on_cpu_it_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="impl 'triton' runs on cuda, meta only, got tensors on cpu"):
        resolve_impl("cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_impl("cpu", "triton") == "triton"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert resolve_impl("cuda") == "reference"
    with pytest.raises(ValueError, match="impl 'triton' needs the package triton, which is not installed"):
        resolve_impl("cuda", "triton")


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 0 else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    assert resolve_impl("cuda") == "reference"
    with pytest.raises(ValueError, match=r"compute capability 8.0 or more, but Old GPU has 7.5"):
        resolve_impl("cuda", "triton")


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 48, 64, 80, 96, 128])
def test_until_it_is_measured_the_form_switches_where_the_counts_cross(head_dim: int) -> None:
    features = num_features(head_dim, "tiles")
    assert resolve_form(features, head_dim, impl="triton") == "direct"
    assert resolve_form(features + 1, head_dim, impl="triton") == "efficient"
    assert resolve_form(round(2 * features / 3), head_dim, impl="triton", training=True) == "direct"
    assert resolve_form(round(2 * features / 3) + 1, head_dim, impl="triton", training=True) == "efficient"
