"""What is counted: correct predictions, floating-point operations, and the device's peak."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Peak in TFLOP/s from the vendor's data sheets: (bf16/fp16 on the matrix units, dense; plain fp32). The second is not TF32's:
# PyTorch multiplies fp32 matrices in fp32 unless it is told otherwise, and nothing here tells it.
PEAK_TFLOPS = {
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "A10G": (70.0, 31.2),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "B200": (2250.0, 80.0),
}


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return a boolean per image: is its label among the k largest logits? logits (B, K), labels (B,)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (B, k)
    return (top == labels[:, None]).any(dim=1)


def forward_flops(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """Count the FLOPs of one sample's forward pass (a multiply-add is two; matrix products only), on the meta device.

    Args:
        model: a model on the meta device, so that nothing is computed.
        input_shape: (C, H, W) of images, (N,) of sequences.
        dtype: of the input; int64 for sequences, default fp32.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *input_shape, dtype=dtype, device="meta"))
    return counter.get_total_flops()


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Return the device's peak in FLOP/s at this precision, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    column = 1 if mixed_precision == "no" else 0
    known = sorted((key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)), key=len)  # an L40 is not an L4
    return PEAK_TFLOPS[known[-1]][column] * 1e12 if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the allocator on a GPU, of the process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


class Pace:
    """Speed between two readings: images per second, share of the time spent waiting for data, memory, utilisation.

    Args:
        images_per_update: images of one update over all processes.
        training_flops: FLOPs of one image, forward and backward.
        peak_flops: peak FLOP/s of all devices together; None leaves the utilisation out.
        device: this process's device.
    """

    def __init__(self, *, images_per_update: int, training_flops: int, peak_flops: float | None, device: torch.device) -> None:
        self.images_per_update, self.training_flops = images_per_update, training_flops
        self.peak_flops, self.device = peak_flops, device
        self.restart(0)

    def restart(self, update: int) -> None:
        """Begin a new reading at this update."""
        self._update, self._started, self._waited_seconds = update, time.monotonic(), 0.0

    def timed(self, batches: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Yield the batches and add up the time spent waiting for them."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self._waited_seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def read(self, update: int) -> dict[str, float | None]:
        """Return the figures since the last reading, and begin a new one at this update."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        images_per_second = (update - self._update) * self.images_per_update / seconds
        waited = self._waited_seconds / seconds
        self.restart(update)
        return {
            "images_per_second": images_per_second,
            "data_wait_share": waited,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "mfu": images_per_second * self.training_flops / self.peak_flops if self.peak_flops else None,
        }
