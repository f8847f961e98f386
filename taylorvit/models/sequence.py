"""The encoder for token sequences, registered with timm: embedding, fixed positions, the vision transformer's blocks, a class.

It is the model of the TaylorShift paper's sequence tasks (arXiv:2403.02920): one class token, sinusoidal positions that are not
learned, pre-norm blocks as in the ViT, and no patch. timm reads `default_cfgs` from the module that defines an entry point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint, named_apply
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from taylorvit.attention import bind_options
from taylorvit.complexity import head_dimension

__all__ = ["SequenceEncoder"]

POOLS = ("token", "avg")
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # as in timm's ViT


class SequenceEncoder(nn.Module):
    """Classify sequences of tokens: (B, N) int64 -> (B, num_classes), N at most max_length.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        max_length: longest sequence, the class token not counted.
        num_classes: outputs.
        embed_dim: width C.
        depth: number of blocks.
        num_heads: heads H, a divisor of the width.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: bias of the q, k, v projection.
        init_values: initial LayerScale; None or 0 is no LayerScale.
        attention: a name in `taylorvit.attention.ATTENTIONS`.
        attention_options: options of that attention, plain JSON types.
        global_pool: "token" reads the class token; "avg" has none and takes the mean over the tokens that are no padding.
        padding_idx: token that fills short sequences up and is attended to by none; None: there is none. A sequence of nothing
            else gives NaN with "avg".
        fill_idx: token that ends every sequence shorter than max_length and is attended to like any other: for attentions that
            take no mask, so that what fills up a batch changes no sample's output. None: sequences stay as they are.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth at the last block, rising linearly from 0.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a value that is not valid.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_classes: int = 10,
        embed_dim: int = 256,
        depth: int = 1,
        num_heads: int = 4,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        attention: str = "taylorshift",
        attention_options: Mapping[str, Any] | None = None,
        global_pool: str = "token",
        padding_idx: int | None = None,
        fill_idx: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = 1 if global_pool == "token" else 0
        attn_layer = bind_options(attention, attention_options or {}, max_length + self.num_prefix_tokens)
        _check(embed_dim, num_heads, global_pool, vocab_size, padding_idx=padding_idx, fill_idx=fill_idx)
        if padding_idx is not None and not getattr(attn_layer, "takes_key_mask", True):
            raise ValueError(
                f"attention {attention!r} cannot leave out padding: padding_idx must be None, got {padding_idx}; "
                "with fill_idx it sees every sequence filled up to max_length"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.vocab_size, self.max_length, self.padding_idx, self.fill_idx = vocab_size, max_length, padding_idx, fill_idx
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.grad_checkpointing = False

        self.embedding = nn.Embedding(vocab_size, embed_dim, **factory)  # drawn from N(0, 1), the size of the positions
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if self.num_prefix_tokens else None
        self.positions: Tensor
        self.register_buffer("positions", torch.empty(max_length, embed_dim, **factory), persistent=False)
        rates = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    init_values=init_values or None,
                    drop_path=rate,
                    norm_layer=LAYER_NORM,
                    attn_layer=attn_layer,
                    **factory,
                )
                for rate in rates
            )
        )
        self.norm = LAYER_NORM(embed_dim, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes else nn.Identity()
        if torch.device(device or "cpu").type != "meta":
            self.init_weights(needs_reset=False)

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights as timm draws those of a ViT, and set the positions; the classifier starts at 0.

        needs_reset: also reset the parameters that their modules set when they are made, as timm's `init_weights` does: they
        are not set after a model was made on `meta`.
        """
        self.positions.copy_(sinusoidal_positions(*self.positions.shape, device=self.positions.device))
        self.embedding.reset_parameters()
        for part in (self.blocks, self.norm):
            named_apply(partial(init_weights_vit_timm, needs_reset=needs_reset), part, include_root=True)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def num_tokens(self) -> int:
        """Tokens that the attention sees of the longest sequence."""
        return self.max_length + self.num_prefix_tokens

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay would harm: embedding, class token and temperatures."""
        return {"embedding.weight", "cls_token", "*.temperature"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of the layers, for layer decay."""
        return {"stem": r"^cls_token|^embedding", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, of no classes an identity.

        Raises:
            ValueError: global_pool would add or remove the class token.
        """
        if global_pool not in (None, self.global_pool):
            raise ValueError(f"global_pool is {self.global_pool!r} for good, got {global_pool!r}")
        self.num_classes = num_classes
        weight = self.norm.weight
        self.head = nn.Linear(self.embed_dim, num_classes).to(weight) if num_classes else nn.Identity()

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Return the tokens' features, the class token's first: (B, N) -> (B, 1 + N, C), or (B, N, C) with global_pool "avg".

        Raises:
            ValueError: the sequences are too long, or no sequences of whole numbers.
        """
        if self.fill_idx is not None:
            tokens = fill_up(tokens, self.max_length, self.fill_idx)  # (B, N), N now max_length
        x = positions_of(tokens, self.positions) + self.embedding(tokens)  # (B, N, C)
        keep = None if self.padding_idx is None else tokens != self.padding_idx  # (B, N)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, C)
            keep = None if keep is None else nn.functional.pad(keep, (1, 0), value=True)
        attn_mask = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, N): the same keys for every head and query
        for block in self.blocks:
            x = checkpoint(block, x, attn_mask=attn_mask) if self.grad_checkpointing else block(x, attn_mask=attn_mask)
        return self.norm(x)

    def forward_head(self, x: Tensor, tokens: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """Pool and classify: features (B, N', C) -> (B, num_classes), or (B, C) with pre_logits.

        The tokens (B, N) that the features are of are needed by global_pool "avg" where there is padding.
        """
        pooled = x[:, 0] if self.global_pool == "token" else self._mean(x, tokens)
        pooled = self.head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify: (B, N) int64 -> (B, num_classes)."""
        return self.forward_head(self.forward_features(tokens), tokens)

    def _mean(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        if self.padding_idx is None:
            return x.mean(dim=1)
        if tokens is None:
            raise ValueError("global_pool 'avg' with padding_idx needs the tokens that the features are of, got None")
        keep = (tokens != self.padding_idx).unsqueeze(-1)  # (B, N, 1)
        return x.masked_fill(~keep, 0).sum(dim=1) / keep.sum(dim=1)


def sinusoidal_positions(length: int, width: int, *, device: Any = None) -> Tensor:
    """Return the fixed positions of "Attention Is All You Need" (arXiv:1706.03762), (length, width) fp32.

    Sines in the even columns, cosines in the odd ones, with wavelengths from 2 pi to 10000 times that.
    """
    place = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width))
    angle = place * rate  # (length, ceil(width / 2))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


def _check(embed_dim: int, num_heads: int, global_pool: str, vocab_size: int, **tokens: int | None) -> None:
    head_dimension(embed_dim, num_heads)
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(POOLS)}, got {global_pool!r}")
    for name, token in tokens.items():
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name} must be a token, 0 to {vocab_size - 1}, got {token}")
    if None not in tokens.values():
        raise ValueError(
            f"only one of padding_idx and fill_idx can be given, got {tokens['padding_idx']} and {tokens['fill_idx']}"
        )


def fill_up(tokens: Tensor, length: int, fill_idx: int) -> Tensor:
    """Return tokens (B, N) followed by fill_idx up to a length (B, length); what is longer stays as it is."""
    return nn.functional.pad(tokens, (0, max(0, length - tokens.shape[-1])), value=fill_idx)


def positions_of(tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the positions (N, C) of tokens (B, N), out of those of the longest sequence.

    Raises:
        ValueError: the sequences are too long, or no sequences of tokens.
    """
    if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be int64 or int32 (B, N), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.shape[1] > len(positions):
        raise ValueError(f"sequences have at most max_length {len(positions)} tokens, got {tokens.shape[1]}")
    return positions[: tokens.shape[1]]


torch.fx.wrap("positions_of")  # these look at shapes that FX tracing does not know
torch.fx.wrap("fill_up")


default_cfgs = generate_default_cfgs(
    {"taylorvit_sequence": {"num_classes": 10, "pool_size": None, "first_conv": None, "classifier": "head"}}
)


@register_model
def taylorvit_sequence(pretrained: bool = False, **kwargs: Any) -> SequenceEncoder:
    """Build a sequence encoder; vocab_size and max_length must be given, the rest is the paper's model for CIFAR pixels.

    Raises:
        ValueError: features_only, as there are no feature maps, or see `SequenceEncoder`.
    """
    if kwargs.pop("features_only", False):
        raise ValueError("taylorvit_sequence has no feature maps: features_only must be False, got True")
    return build_model_with_cfg(
        SequenceEncoder, "taylorvit_sequence", pretrained, kwargs_filter=("in_chans", "img_size"), **kwargs
    )
