"""Putting weights into a model: strictly, or adapted to another image size, class count, channel count or attention.

Every adaptation keeps the function that the weights compute where that is possible, and is reported in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from taylorvit.original import grid_side
from taylorvit.training_state import named_state

CLASSIFIER = ("head.weight", "head.bias")
SHOWN = 3


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, adapt: bool = False) -> list[str]:
    """Copy weights into a model and return, in words, what was changed on the way.

    Args:
        model: the target, changed in place.
        state: weights by name, as `load_weights` returns them.
        adapt: fit the weights to the model: another image size (position embedding resampled), class token with or without a
            position, other channels, other number of classes (classifier left as the model has it), no temperature or no
            LayerScale in the weights. Without it, names and shapes must agree.

    Raises:
        ValueError: a tensor is not finite or not real, or names and shapes do not agree; the model is then unchanged.
    """
    state, target = dict(state), named_state(model)
    _check_numbers(state, target)
    _check_finite(state)
    notes: list[str] = []
    if adapt:
        for step in (_adapt_position, _adapt_channels, _adapt_classifier, _keep_temperature, _neutral_layer_scale):
            notes += step(model, state, target)
    _check_fit(state, target, adapt=adapt)
    notes += _dtype_notes(state, target)
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(state[name])
    return notes


def _check_numbers(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Refuse whole or complex numbers where the model has real ones: converting them would not be what anyone meant."""
    for name, value in state.items():
        wanted = target.get(name, value)
        if value.is_complex() or value.is_floating_point() != wanted.is_floating_point():
            given = f"{name} is {value.dtype} in the weights, {wanted.dtype} in the model"
            raise ValueError(f"the weights are of another kind: {given}".replace("torch.", ""))


def _check_finite(state: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(_readable(value)).all()]
    if bad:
        raise ValueError(f"{len(bad)} of the weights have NaN or infinite values: {', '.join(bad[:SHOWN])}")


def _readable(value: Tensor) -> Tensor:
    """Return the tensor as PyTorch can compute with it: numbers of one byte are only stored."""
    return value.float() if value.dtype.itemsize == 1 else value


def _check_fit(state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, adapt: bool) -> None:
    different = [name for name in {**target, **state} if _shape(state.get(name)) != _shape(target.get(name))]
    if not different:
        return
    shown = [f"{name} {_shape(state.get(name))} in the weights, {_shape(target.get(name))} in the model" for name in different]
    hint = ""
    if not adapt and set(different) <= {"pos_embed", *CLASSIFIER}:
        hint = "; fine-tuning from these weights (train.finetune, or adapt=True) resizes the position embedding and the head"
    raise ValueError(f"the weights do not fit the model in {len(different)} tensors: {'; '.join(shown[:SHOWN])}{hint}")


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))


def _dtype_notes(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    pairs = {(state[name].dtype, value.dtype) for name, value in target.items() if state[name].dtype != value.dtype}
    return [f"converted from {source} to {wanted}".replace("torch.", "") for source, wanted in sorted(pairs, key=str)]


def _adapt_position(model: Any, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Resample the position embedding, and move the class token's position to where the model keeps it.

    A model with `no_embed_class` gives the class token no position: adding that position to the token is the same sum.
    """
    if "pos_embed" not in state or "pos_embed" not in target or not hasattr(model, "patch_embed"):
        return []
    source, notes = state["pos_embed"], []
    side, source_prefix = grid_side(source.shape[1])
    target_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    prefix, patches = source[:, :source_prefix], source[:, source_prefix:]
    if (source_prefix, target_prefix) == (1, 0) and "cls_token" in state:
        state["cls_token"] = state["cls_token"] + prefix
        prefix = prefix[:, :0]
        notes.append("position of the class token added to the class token")
    elif (source_prefix, target_prefix) == (0, 1):
        prefix = torch.zeros_like(patches[:, :1])
        notes.append("class token given the position 0")
    grid = model.patch_embed.grid_size
    if (side, side) != tuple(grid):
        patches = resample_abs_pos_embed(patches, new_size=list(grid), old_size=[side, side], num_prefix_tokens=0)
        notes.append(f"position embedding resampled from {side}x{side} to {grid[0]}x{grid[1]} patches")
    state["pos_embed"] = torch.cat([prefix, patches], dim=1)
    return notes


def _adapt_channels(model: nn.Module, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    name = "patch_embed.proj.weight"
    source, wanted = state.get(name), target.get(name)
    if source is None or wanted is None or source.shape[1] != 3 or wanted.shape[1] == 3:
        return []
    state[name] = adapt_input_conv(wanted.shape[1], source)
    return [f"patch embedding changed from 3 to {wanted.shape[1]} channels"]


def _adapt_classifier(model: nn.Module, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    if all(_shape(state.get(name)) == _shape(target.get(name)) for name in CLASSIFIER):
        return []
    had = f"{state['head.weight'].shape[0]} classes" if "head.weight" in state else "none"
    for name in CLASSIFIER:
        state.pop(name, None)
        if name in target:
            state[name] = target[name]
    return [f"classifier left at its initialisation (the weights have {had})"]


def _keep_temperature(model: nn.Module, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in target if name.endswith(".attn.temperature") and name not in state]
    state.update({name: target[name] for name in missing})
    return [f"{len(missing)} temperatures left at their initialisation"] if missing else []


def _neutral_layer_scale(model: nn.Module, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Set LayerScale to 1 where the weights have none: at its small initial value it would mute the pretrained blocks."""
    missing = [name for name in target if name.endswith((".ls1.gamma", ".ls2.gamma")) and name not in state]
    state.update({name: torch.ones_like(target[name]) for name in missing})
    return [f"{len(missing)} LayerScale vectors set to 1, as the weights have none"] if missing else []
