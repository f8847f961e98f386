"""Files of the paper authors' own code: telling them from others, and reading the model's shape off its tensors.

Such a file is a dictionary with `model_state` and `args`. Its keys are timm's, and besides every block has an
`attn.temperature`. The form of the attention is not a tensor: the model's name says it (`_eff_` or `_triv_`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

SIZES = {
    192: "taylorvit_tiny_patch16_224",
    384: "taylorvit_small_patch16_224",
    768: "taylorvit_base_patch16_224",
}
SOFTMAX_HEAD_DIM = 64  # nothing in a softmax model's tensors tells the number of heads; the authors' have this head dimension


def is_original(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> bool:
    """Whether a loaded file was written by the paper authors' code."""
    temperatures = [value for name, value in state.items() if name.endswith(".attn.temperature")]
    return "model_state" in content or any(value.ndim == 4 for value in temperatures)


def infer_model_config(state: Mapping[str, Tensor], args: Any = None) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that these tensors belong to.

    Args:
        state: weights under timm's names, temperatures of shape (H,).
        args: the arguments stored beside the weights, a mapping or a namespace; its `model` names the form.

    Raises:
        ValueError: a tensor that tells a size is missing, or the sizes do not fit together.
    """
    for name, rank in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2), ("head.weight", 2)):
        if name not in state:
            raise ValueError(f"the weights are not a vision transformer's: {name} is missing")
        if state[name].ndim != rank or not state[name].numel():
            raise ValueError(f"the weights are not a vision transformer's: {name} has the shape {tuple(state[name].shape)}")
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.([0-9]+)\.", name))}
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    side, prefix_tokens = grid_side(state["pos_embed"].shape[1])
    temperature = state.get("blocks.0.attn.temperature")
    kwargs: dict[str, Any] = {}
    if "blocks.0.ls1.gamma" not in state:
        kwargs["init_values"] = None
    if prefix_tokens:
        kwargs["no_embed_class"] = False
    if "blocks.0.attn.qkv.bias" not in state:
        kwargs["qkv_bias"] = False
    return {
        "name": SIZES.get(width, SIZES[192]),
        "attention": "softmax" if temperature is None else "taylorshift",
        "attention_options": {} if temperature is None else _form(args),
        "num_classes": state["head.weight"].shape[0],
        "in_chans": in_chans,
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len(blocks),  # not the highest number, which a file may choose
        "num_heads": max(1, width // SOFTMAX_HEAD_DIM) if temperature is None else temperature.numel(),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "kwargs": kwargs,
    }


def grid_side(num_positions: int) -> tuple[int, int]:
    """Return the side of the square patch grid and the number of prefix tokens (0, 1 or 2) among the positions.

    Raises:
        ValueError: the grid is not square.
    """
    for prefix_tokens in (0, 1, 2):
        side = math.isqrt(max(num_positions - prefix_tokens, 0))
        if side and side * side == num_positions - prefix_tokens:
            return side, prefix_tokens
    raise ValueError(f"pos_embed has {num_positions} positions, which is no square grid of patches")


def _form(args: Any) -> dict[str, str]:
    values = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    name = str(values.get("model", ""))
    forms = {"_eff_": "efficient", "_triv_": "direct"}
    return next(({"form": form} for mark, form in forms.items() if mark in name), {})
