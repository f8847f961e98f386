"""The softmax baseline: timm's own `Attention`, fused scaled dot-product attention and all, untouched."""

from timm.layers import Attention as Softmax

__all__ = ["Softmax", "check_options"]


def check_options() -> None:
    """Accept no options: the baseline is what timm builds."""
