"""TaylorViT: vision transformers with TaylorShift attention. Importing the package registers its models with timm."""

from taylorvit import models as models

__version__ = "0.1.0"
