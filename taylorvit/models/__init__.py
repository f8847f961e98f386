"""The networks by name: our registered vision transformers and sequence encoder, and timm's models as softmax baselines."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from taylorvit.attention import Softmax, TaylorShift, check_attention_options
from taylorvit.models import sequence
from taylorvit.models.sequence import SequenceEncoder
from taylorvit.models.taylor_vit import TaylorViT, default_cfgs
from taylorvit.suggest import nearest

if TYPE_CHECKING:
    from taylorvit.config import ModelConfig

__all__ = [
    "MODEL_NAMES",
    "SEQUENCE_NAMES",
    "SequenceEncoder",
    "TaylorViT",
    "attention_forms",
    "build_model",
    "random_inputs",
]

MODEL_NAMES: tuple[str, ...] = tuple(default_cfgs)
SEQUENCE_NAMES: tuple[str, ...] = tuple(sequence.default_cfgs)
IMAGE_KEYS = ("in_chans", "img_size", "patch_size")
SEQUENCE_KEYS = ("vocab_size", "max_length")
# Keywords of timm.create_model that read files or the network: a configuration may come from a stranger's checkpoint.
LOADING_KEYS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def build_model(config: ModelConfig, *, device: torch.device | str | None = None) -> nn.Module:
    """Build the configured network with fresh weights, on `device` ("meta" gives shapes without memory).

    Our vision transformers take every key of the config but vocab_size and max_length, the sequence encoder every one but those
    of images. Any other timm model is built as timm defines it, with attention "softmax"; one
    that takes images of any size, as a convolutional network does, is not told img_size.
    In `config.kwargs`, `init_values: null` switches LayerScale off.

    Raises:
        ValueError: a name, keyword, option or size is not valid; the message lists what is.
    """
    check_attention_options(config.attention, config.attention_options)
    _check_kind(config)
    keywords = {**_sizes(config), **_extra_keywords(config)}
    if device is not None:
        keywords["device"] = device
    try:
        return _create(config, keywords)
    except (TypeError, AssertionError, KeyError, RuntimeError) as error:  # how timm and torch refuse a keyword or a size
        reason = str(error).partition("\nException raised from ")[0]  # torch appends its own stack
        raise ValueError(f"model {config.name!r} refuses these settings: {type(error).__name__}: {reason}") from error


def random_inputs(
    config: ModelConfig, batch_size: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return what the model of this config takes, for measurements: standard normal images (B, C, H, W) or tokens (B, N)."""
    if config.name in SEQUENCE_NAMES:
        assert config.vocab_size is not None
        assert config.max_length is not None
        return torch.randint(config.vocab_size, (batch_size, config.max_length), device=device, generator=generator)
    shape = (batch_size, config.in_chans, config.img_size, config.img_size)
    return torch.randn(shape, device=device, generator=generator)


def _create(config: ModelConfig, keywords: dict[str, Any]) -> nn.Module:
    if config.name in MODEL_NAMES + SEQUENCE_NAMES:
        return timm.create_model(
            config.name, attention=config.attention, attention_options=config.attention_options, **keywords
        )
    if not timm.is_model(config.name):
        ours = MODEL_NAMES + SEQUENCE_NAMES
        hint = nearest(config.name, [*ours, *timm.list_models()])
        raise ValueError(f"no model {config.name!r}{hint} (ours: {', '.join(ours)}; others: timm's)")
    if config.attention != "softmax":
        raise ValueError(
            f"model {config.name!r} is timm's and has its own attention: set attention to 'softmax' "
            f"or use one of {', '.join(MODEL_NAMES)}, got attention {config.attention!r}"
        )
    if not timm.get_pretrained_cfg(config.name, allow_unregistered=False).fixed_input_size:
        del keywords["img_size"]
    return _create_foreign(config.name, keywords)


def attention_forms(model: nn.Module, num_tokens: int | None = None, *, training: bool = False) -> list[str]:
    """Name what each attention layer computes for this many tokens: "direct", "efficient" or "softmax".

    Without num_tokens it is the count at the model's own image size or greatest length. A model without such layers gives [].
    """
    layers = [module for module in model.modules() if isinstance(module, (TaylorShift, Softmax))]
    if num_tokens is None and isinstance(model, VisionTransformer):
        num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    if num_tokens is None and isinstance(model, SequenceEncoder):
        num_tokens = model.num_tokens
    forms = []
    for layer in layers:
        if isinstance(layer, TaylorShift):
            if num_tokens is None:
                raise ValueError(f"num_tokens is needed for a {type(model).__name__}, got None")
            forms.append(layer.resolved_form(num_tokens, training=training))
        else:
            forms.append("softmax")
    return forms


def _create_foreign(name: str, keywords: dict[str, Any]) -> nn.Module:
    """Create one of timm's own models; a rate of 0 is left out where the network has no such rate."""
    try:
        return timm.create_model(name, **keywords)
    except TypeError as error:
        off = [key for key in ("drop_path_rate", "drop_rate") if keywords.get(key) == 0 and f"'{key}'" in str(error)]
        if not off:
            raise
        return _create_foreign(name, {key: value for key, value in keywords.items() if key not in off})


def _check_kind(config: ModelConfig) -> None:
    """Raise ValueError for a key that belongs to the other kind of model, images or sequences."""
    if config.name not in SEQUENCE_NAMES:
        for key in SEQUENCE_KEYS:
            if getattr(config, key) is not None:
                raise ValueError(f"model.{key} is {getattr(config, key)}, but {config.name} reads images: leave it out")
        return
    for key in SEQUENCE_KEYS:
        if getattr(config, key) is None:
            raise ValueError(f"model.{key} must be given for {config.name}")
    for item in fields(config):
        if item.name in IMAGE_KEYS and getattr(config, item.name) != item.default:
            raise ValueError(
                f"model.{item.name} is {getattr(config, item.name)}, but {config.name} reads no images: leave it out"
            )


def _sizes(config: ModelConfig) -> dict[str, Any]:
    """Collect the config's plain sizes and rates; null keeps the registered model's."""
    others = ("name", "attention", "attention_options", "kwargs", *(IMAGE_KEYS if config.name in SEQUENCE_NAMES else ()))
    names = [field.name for field in fields(config) if field.name not in others]
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _extra_keywords(config: ModelConfig) -> dict[str, Any]:
    """Check `config.kwargs` against the model's keywords and what the config has a key of its own for."""
    own = {field.name for field in fields(config)}
    model = SequenceEncoder if config.name in SEQUENCE_NAMES else VisionTransformer
    known = set(inspect.signature(model.__init__).parameters) - own - {"self", "attn_layer", "device", "dtype"}
    for key in config.kwargs:
        if key in own:
            raise ValueError(f"model.kwargs must not hold {key!r}: set model.{key}")
        if key in LOADING_KEYS:
            raise ValueError(f"model.kwargs must not hold {key!r}, which loads weights: set train.finetune")
        if config.name in MODEL_NAMES + SEQUENCE_NAMES and key not in known:
            hint = nearest(key, [*known, *own])
            raise ValueError(f"model.kwargs has unknown keyword {key!r}{hint} (known: {', '.join(sorted(known))})")
    extra = dict(config.kwargs)
    if extra.get("init_values", 0) is None:
        extra["init_values"] = 0.0  # timm drops a None and would keep the model's default; 0 builds no LayerScale
    return extra
