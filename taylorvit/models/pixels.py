"""A small causal model of grey images, pixel by pixel: the probabilities of each pixel's level given the pixels before it.

Images are read row by row as tokens (`taylorvit.data.sequences`). A start token stands before the first pixel, and position t
gives the logits of pixel t, so that training computes all positions at once and generation feeds each drawn pixel back. The
model is there to show that the recurrent form of an attention computes what the parallel form was trained to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from taylorvit.attention.causal import State, build_causal_attention

__all__ = ["PixelModel", "PixelState", "bits_per_pixel", "sample"]


class PixelBlock(nn.Module):
    """A pre-norm transformer block around a causal attention: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attention: str, **factory: Any) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = build_causal_attention(attention, dim, num_heads, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Compute all tokens at once."""
        return self._mlp(x + self.attn(self.norm1(x)))

    def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, State]:
        """Compute the first tokens (B, N, C) and the state after them."""
        y, state = self.attn.prefill(self.norm1(x), max_length=max_length)
        return self._mlp(x + y), state

    def step(self, x: Tensor, state: State) -> Tensor:
        """Compute one more token, (B, C) -> (B, C), and change the state."""
        return self._mlp(x + self.attn.step(self.norm1(x), state))

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


@dataclass
class PixelState:
    """The states of all layers after num_pixels pixels and the start token."""

    layers: list[State]
    num_pixels: int

    @property
    def num_bytes(self) -> int:
        """Size of all layers for the whole batch."""
        return sum(layer.num_bytes for layer in self.layers)


class PixelModel(nn.Module):
    """Predict each pixel from those before it: levels (B, N) int64 -> logits (B, N, num_levels), N = num_pixels.

    Args:
        num_levels: pixels have the levels 0 ... num_levels - 1.
        num_pixels: of an image.
        attention: "taylorshift", "linear" or "softmax", see `taylorvit.attention.causal`.
        embed_dim: width C.
        depth: number of blocks.
        num_heads: heads H, a divisor of the width.
        mlp_ratio: hidden width of the MLP over C.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: the attention is unknown, or num_heads does not divide embed_dim.
    """

    def __init__(
        self,
        num_levels: int,
        num_pixels: int,
        *,
        attention: str = "taylorshift",
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_levels, self.num_pixels = num_levels, num_pixels
        self.embedding = nn.Embedding(num_levels + 1, embed_dim, **factory)  # the last one is the start token
        self.positions = nn.Parameter(torch.empty(num_pixels, embed_dim, **factory))
        self.blocks = nn.ModuleList(PixelBlock(embed_dim, num_heads, mlp_ratio, attention, **factory) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, **factory)
        self.head = nn.Linear(embed_dim, num_levels, **factory)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights; the logits start at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, levels: Tensor) -> Tensor:
        """Return the logits of all pixels; those of pixel t depend on pixels before t only.

        Raises:
            ValueError: levels are not int64 (B, num_pixels).
        """
        self._check(levels, self.num_pixels, self.num_pixels)
        x = self._embed(levels[:, :-1])  # (B, N, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def prefill(self, levels: Tensor) -> tuple[Tensor, PixelState]:
        """Read the first pixels (B, T), 0 <= T < num_pixels; return the logits of the next (B, num_levels) and the state.

        Raises:
            ValueError: levels are not int64 (B, T), or no pixel is left to predict.
        """
        self._check(levels, 0, self.num_pixels - 1)
        x = self._embed(levels)  # (B, T + 1, C)
        layers = []
        for block in self._layers:
            x, state = block.prefill(x, self.num_pixels)
            layers.append(state)
        return self.head(self.norm(x[:, -1])), PixelState(layers, levels.shape[1])

    @torch.no_grad()
    def step(self, levels: Tensor, state: PixelState) -> Tensor:
        """Read one more pixel (B,), add it to the state, in place, and return the logits of the next (B, num_levels).

        Raises:
            ValueError: no pixel is left to predict.
        """
        if state.num_pixels + 1 >= self.num_pixels:
            raise ValueError(f"an image has num_pixels {self.num_pixels}: none is left after {state.num_pixels + 1}")
        state.num_pixels += 1
        x = self.embedding(levels) + self.positions[state.num_pixels]  # (B, C)
        for block, layer in zip(self._layers, state.layers):
            x = block.step(x, layer)
        return self.head(self.norm(x))

    @property
    def _layers(self) -> list[PixelBlock]:
        return cast("list[PixelBlock]", list(self.blocks))

    def _embed(self, levels: Tensor) -> Tensor:
        """Put the start token before the pixels and add the positions: (B, T) -> (B, T + 1, C)."""
        start = levels.new_full((levels.shape[0], 1), self.num_levels)
        tokens = torch.cat([start, levels], dim=1)
        return self.embedding(tokens) + self.positions[: tokens.shape[1]]

    def _check(self, levels: Tensor, least: int, most: int) -> None:
        if levels.ndim != 2 or levels.dtype != torch.int64 or not least <= levels.shape[1] <= most:
            wanted = f"(B, {most})" if least == most else f"(B, {least} to {most})"
            raise ValueError(f"levels must be torch.int64 {wanted}, got {levels.dtype} {tuple(levels.shape)}")


def bits_per_pixel(model: PixelModel, levels: Tensor) -> Tensor:
    """Return the mean of -log2 of the probability that the model gives to each pixel, a scalar, with gradients."""
    logits = model(levels)  # (B, N, K)
    return cross_entropy(logits.flatten(0, 1).float(), levels.flatten()) / math.log(2)


@torch.no_grad()
def sample(model: PixelModel, given: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw the rest of images one pixel at a time, by the recurrent form.

    Args:
        model: gives the probabilities.
        given: first pixels of each image, (B, T) int64; T = 0 draws whole images.
        temperature: the logits are divided by it; towards 0 the most probable level is always drawn.
        generator: of the random numbers; its state decides the images, bit for bit on one machine.

    Returns:
        (B, num_pixels) int64, the given pixels first.

    Raises:
        ValueError: temperature is not above 0, or see `PixelModel.prefill`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logits, state = model.prefill(given)
    levels = [given]
    for place in range(given.shape[1], model.num_pixels):
        probabilities = (logits.double() / temperature).softmax(dim=-1)  # (B, K)
        levels.append(torch.multinomial(probabilities, 1, generator=generator))  # (B, 1)
        if place + 1 < model.num_pixels:
            logits = model.step(levels[-1][:, 0], state)
    return torch.cat(levels, dim=1)
