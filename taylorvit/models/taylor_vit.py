"""The vision transformers, registered with timm: timm's own `VisionTransformer` with an attention chosen by name.

timm reads `default_cfgs` from the module that defines an entry point, so both stay in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from taylorvit.attention import bind_options, check_attention_options
from taylorvit.complexity import head_dimension

__all__ = ["TaylorViT"]


class TaylorViT(VisionTransformer):
    """A timm VisionTransformer whose attention is chosen by name.

    Args:
        attention: a name in `taylorvit.attention.ATTENTIONS`.
        attention_options: options of that attention, plain JSON types, so that timm can store and rebuild the model.
        **kwargs: every other keyword of timm's VisionTransformer. LayerScale is on with init_values > 0, off with 0.

    Raises:
        ValueError: attention or an option is not valid, num_heads does not divide embed_dim, or patch_size img_size.
    """

    def __init__(
        self,
        *,
        attention: str = "taylorshift",
        attention_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_attention_options(attention, attention_options or {})
        _check_geometry(**kwargs)
        attn_layer = bind_options(attention, attention_options or {}, _num_tokens(**kwargs))
        super().__init__(attn_layer=attn_layer, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay would harm: timm's embeddings and tokens, and the temperatures."""
        return super().no_weight_decay() | {"*.temperature"}

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Set the size of the images or of the patches, as timm does.

        Raises:
            ValueError: the attention has parameters for every token, and not for so many.
        """
        limits = [block.attn.num_tokens for block in self.blocks if hasattr(block.attn, "num_tokens")]
        if limits:
            self._check_num_tokens(
                min(limits), img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size
            )
        super().set_input_size(img_size, patch_size)

    def _check_num_tokens(self, limit: int, img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
        num_tokens = _num_patches(img_size, patch_size, self.patch_embed.dynamic_img_pad) + self.num_prefix_tokens
        if num_tokens > limit:
            raise ValueError(
                f"img_size {img_size} with patch_size {patch_size} gives {num_tokens} tokens, but the attention was built for "
                f"at most {limit}: build the model with the largest img_size"
            )


def _num_tokens(
    img_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    class_token: bool = True,
    reg_tokens: int = 0,
    dynamic_img_pad: bool = False,
    **_: Any,
) -> int:
    """Return how many tokens the attention of timm's VisionTransformer sees, from its keywords and with its defaults."""
    return _num_patches(img_size, patch_size, dynamic_img_pad) + int(class_token) + reg_tokens


def _num_patches(img_size: int | tuple[int, int], patch_size: int | tuple[int, int], pad: bool) -> int:
    rows, columns = (-(-side // size) if pad else side // size for side, size in zip(_pair(img_size), _pair(patch_size)))
    return rows * columns


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _check_geometry(
    embed_dim: int = 768,
    num_heads: int = 12,
    img_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    dynamic_img_pad: bool = False,
    **_: Any,
) -> None:
    head_dimension(embed_dim, num_heads)  # softmax, too, then says which numbers would do
    sides = zip(_pair(img_size), _pair(patch_size), strict=True)
    if not dynamic_img_pad and any(side < 1 or side % size for side, size in sides):
        raise ValueError(f"img_size must be a positive multiple of patch_size {patch_size}, got {img_size}")


def _cfg() -> dict[str, Any]:
    """Describe the input as the authors evaluate: the whole 224 px image, no centre crop inside a larger one."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        "taylorvit_tiny_patch16_224": _cfg(),
        "taylorvit_small_patch16_224": _cfg(),
        "taylorvit_base_patch16_224": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, size: dict[str, Any], **kwargs: Any) -> TaylorViT:
    # As in the paper: patches of 16, position embedding of the patches only, LayerScale from 1e-4.
    defaults = {"patch_size": 16, "no_embed_class": True, "init_values": 1e-4, **size}
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        TaylorViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def taylorvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> TaylorViT:
    """Build the paper's Ti: width 192, 12 blocks, 3 heads; 5,721,868 parameters."""
    size = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("taylorvit_tiny_patch16_224", pretrained, size, **kwargs)


@register_model
def taylorvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TaylorViT:
    """Build the paper's S: width 384, 12 blocks, 6 heads; 22,059,568 parameters."""
    size = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("taylorvit_small_patch16_224", pretrained, size, **kwargs)


@register_model
def taylorvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TaylorViT:
    """Build the next size of the ViT family: width 768, 12 blocks, 12 heads."""
    size = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("taylorvit_base_patch16_224", pretrained, size, **kwargs)
