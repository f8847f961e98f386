"""What a run says while it trains: console, metrics.jsonl and TensorBoard, from the main process only.

metrics.jsonl is part of the run: not to be able to write it is an error. TensorBoard and the picture are views of it, without
which a run goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from taylorvit.cli import one_line
from taylorvit.config import LogConfig
from taylorvit.run_folder import RunFolder


class Logger:
    """Write records of metrics; on a process that is not the main one every method does nothing.

    Args:
        run: the run folder.
        config: what to record.
        active: whether this is the main process.
        update: updates already done; TensorBoard events after it are those of a run that was interrupted, and are dropped.
        total_updates: updates of the whole run, for the time that is left.
    """

    def __init__(self, run: RunFolder, config: LogConfig, *, active: bool, update: int, total_updates: int) -> None:
        self.run, self.active = run, active
        self.first_update, self.total_updates, self.started = update, total_updates, time.monotonic()
        on_terminal = active and sys.stderr.isatty()
        self.bar = tqdm(total=total_updates, initial=update, unit="update", dynamic_ncols=True) if on_terminal else None
        self.writer: SummaryWriter | None = None
        if active and config.tensorboard:
            self._try(self._open_writer)

    def say(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        if self.active:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def advance(self, update: int) -> None:
        """Move the progress bar."""
        if self.bar:
            self.bar.update(update - self.bar.n)

    def record(self, kind: str, *, update: int, epoch: int, values: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl and TensorBoard, and print it with the time that is left."""
        if not self.active:
            return
        self.run.append_metrics({"kind": kind, "update": update, "epoch": epoch, **values})
        for name, value in values.items():
            if value is not None:
                self._write_event("add_scalar", f"{kind}/{name}", float(value), update)
        shown = "  ".join(f"{name} {_shown(name, value)}" for name, value in values.items() if value is not None)
        self.say(f"[{kind}] epoch {epoch}  update {update}/{self.total_updates}  {shown}  left {self._time_left(update)}")

    def images(self, images: Tensor, targets: Tensor, classes: Sequence[str], mean: list[float], std: list[float]) -> None:
        """Show a grid of augmented training images (B, C, H, W) with their mixed labels (B, K); also saved as a PNG."""
        if not self.active:
            return
        scale = max(1, 96 // images.shape[-1])
        shift, spread = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        pixels = (images.float().cpu() * spread + shift).clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        cells = [_captioned(image, target, classes) for image, target in zip(pixels, targets.cpu(), strict=True)]
        grid = make_grid(torch.stack(cells), nrow=4, padding=4)
        self._try(to_pil_image(grid).save, self.run.path / "train_images.png")
        self._write_event("add_image", "train/images", grid, self.first_update)

    def temperatures(self, model: nn.Module, update: int) -> None:
        """Record a histogram of the attention temperatures of each layer."""
        for name, parameter in model.named_parameters():
            if name.endswith("temperature"):
                self._write_event("add_histogram", f"temperature/{name}", parameter.detach().float().cpu(), update)

    def close(self) -> None:
        """Flush and close."""
        if self.bar:
            self.bar.close()
        self._write_event("close")

    def _open_writer(self) -> None:
        self.writer = SummaryWriter(str(self.run.tensorboard), purge_step=self.first_update + 1)

    def _write_event(self, method: str, *arguments: Any) -> None:
        if self.writer and not self._try(getattr(self.writer, method), *arguments):
            self.writer = None

    def _try(self, write: Callable[..., None], *arguments: Any) -> bool:
        """Write a view of the run; where the disk refuses, say so and return False."""
        try:
            write(*arguments)
        except OSError as error:
            self.say(f"warning: TensorBoard or its pictures end here: {one_line(error)}; training goes on with metrics.jsonl")
            return False
        return True

    def _time_left(self, update: int) -> str:
        done = update - self.first_update
        seconds = int((time.monotonic() - self.started) / max(done, 1) * (self.total_updates - update))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**20:.0f} MiB"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _captioned(image: Tensor, target: Tensor, classes: Sequence[str]) -> Tensor:
    """Return (3, H + 14, W): the image (C, H, W) over its two strongest labels."""
    picture = to_pil_image(image).convert("RGB")
    cell = Image.new("RGB", (picture.width, picture.height + 14))
    cell.paste(picture, (0, 0))
    weights, labels = target.topk(min(2, len(target)))
    text = " ".join(f"{classes[label][:9]} {weight:.2f}" for weight, label in zip(weights, labels) if weight > 0.1)
    ImageDraw.Draw(cell).text((2, picture.height + 1), text, fill="white")
    return pil_to_tensor(cell)
