"""Causal self-attention in parallel and one token at a time, in three kinds: taylorshift, linear (elu + 1) and softmax.

In training all tokens are given: `forward`. In generation each follows from those before it: `prefill` reads the tokens that
are given and returns a state, `step` adds one token to it. The state of taylorshift and linear has one size for any number of
tokens, that of softmax is the cache of all keys and values, which each step reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from taylorvit.attention.linear import EPS, elu_features
from taylorvit.complexity import head_dimension
from taylorvit.ops import autocast_off, causal
from taylorvit.ops.reference import widened
from taylorvit.ops.taylor_attention import apply_autocast, without_autocast
from taylorvit.suggest import nearest


@dataclass
class KeyValueCache:
    """Keys and values of the tokens so far, in storage for max_length of them.

    Attributes:
        keys: (B, H, max_length, D), the first num_tokens in use.
        values: likewise.
        num_tokens: t.
    """

    keys: Tensor
    values: Tensor
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Size of what is in use, for the whole batch."""
        B, H, _, D = self.keys.shape
        return 2 * B * H * self.num_tokens * D * self.keys.element_size()


State = causal.State | KeyValueCache


class CausalAttention(nn.Module):
    """Multi-head self-attention to the tokens so far, without its operation: (B, N, C) -> (B, N, C).

    A subclass gives the operation on heads in its three versions, `_attend`, `_prefill` and `_step`. Parameters have timm's
    names.

    Args:
        dim: width C.
        num_heads: heads H, a divisor of dim.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dimension(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Attend every token to itself and the ones before it, with gradients."""
        return self.merge_heads(self._attend(*self.split_heads(x)))

    @torch.no_grad()
    def prefill(self, x: Tensor, *, max_length: int) -> tuple[Tensor, State]:
        """Compute the first tokens (B, N, C) and the state after them, which will take max_length tokens in all.

        Raises:
            ValueError: max_length is less than N.
        """
        if max_length < x.shape[1]:
            raise ValueError(f"max_length must be at least {x.shape[1]}, got {max_length}")
        y, state = self._prefill(*self.split_heads(x), max_length)
        return self.merge_heads(y), state

    @torch.no_grad()
    def step(self, x: Tensor, state: Any) -> Tensor:
        """Compute one more token, (B, C) -> (B, C), and add it to the state, in place.

        Raises:
            ValueError: the cache is full, or the state is one of other shapes.
        """
        return self.merge_heads(self._step(*self.split_heads(x[:, None]), state))[:, 0]

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, (B, H, N, D) each, of x (B, N, C)."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        return qkv[0], qkv[1], qkv[2]

    def merge_heads(self, y: Tensor) -> Tensor:
        """Join the heads' outputs (B, H, N, D) and project them, (B, N, C)."""
        return self.proj(y.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute the attention (B, H, N, D) of q, k, v (B, H, N, D)."""
        raise NotImplementedError

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, max_length: int) -> tuple[Tensor, State]:
        """Compute the attention and the state after all tokens."""
        raise NotImplementedError

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        """Compute the attention (B, H, 1, D) of one token more, and change the state."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Name the heads in the module's printed form."""
        return f"num_heads={self.num_heads}"


class CausalTaylorShift(CausalAttention):
    """Causal TaylorShift, see `taylorvit.ops.causal`; one learned temperature a head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(self.proj.weight.new_empty(self.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the temperatures to 1."""
        nn.init.ones_(self.temperature)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal.causal_attention(q, k, v, self.temperature)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, max_length: int) -> tuple[Tensor, State]:
        return causal.prefill(q, k, v, self.temperature)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: causal.State) -> Tensor:
        return causal.step(q, k, v, self.temperature, state)


class CausalLinear(CausalAttention):
    """Causal linear attention, weights phi(q) . phi(k) with phi(x) = elu(x) + 1 (arXiv:2006.16236), in fp32 (fp64 for fp64).

        y_t = sum_(i <= t) (phi(q_t) . phi(k_i)) v_i / (sum_(i <= t) phi(q_t) . phi(k_i) + EPS)

    Its state has D (D + 1) numbers a head. EPS is that of `taylorvit.attention.linear`.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = apply_autocast(q, k, v)

        def attend(*given: Tensor) -> Tensor:
            z, _ = causal.chunked(PRODUCT, *_prepared(*given))
            return _mean(z, v.dtype)

        return without_autocast(attend, q, k, v)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, max_length: int) -> tuple[Tensor, State]:
        q, k, v = apply_autocast(q, k, v)
        with autocast_off(q):
            z, sums = causal.chunked(PRODUCT, *_prepared(q, k, v), wants_sums=True)
        assert sums is not None
        return _mean(z, v.dtype), causal.State(sums, q.shape[-2])

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: causal.State) -> Tensor:
        q, k, v = apply_autocast(q, k, v)
        with autocast_off(q):
            z = causal.advance(PRODUCT, *_prepared(q, k, v), state.sums)
        state.num_tokens += 1
        return _mean(z, v.dtype)


class CausalSoftmax(CausalAttention):
    """Causal softmax attention with PyTorch's fused operation, and a cache of keys and values for the steps."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, max_length: int) -> tuple[Tensor, State]:
        B, H, N, D = k.shape
        state = KeyValueCache(k.new_empty(B, H, max_length, D), v.new_empty(B, H, max_length, D), N)
        state.keys[:, :, :N] = k
        state.values[:, :, :N] = v
        return self._attend(q, k, v), state

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueCache) -> Tensor:
        t = state.num_tokens
        if t == state.keys.shape[2]:
            raise ValueError(f"the cache holds {t} tokens, its max_length, and cannot take one more")
        state.keys[:, :, t : t + 1] = k
        state.values[:, :, t : t + 1] = v
        state.num_tokens = t + 1
        return scaled_dot_product_attention(q, state.keys[:, :, : t + 1], state.values[:, :, : t + 1])


CAUSAL_ATTENTIONS: dict[str, type[CausalAttention]] = {
    "taylorshift": CausalTaylorShift,
    "linear": CausalLinear,
    "softmax": CausalSoftmax,
}


def build_causal_attention(name: str, dim: int, num_heads: int = 8, **factory: Any) -> CausalAttention:
    """Build the causal attention of that name; factory: device and dtype.

    Raises:
        ValueError: there is none, or num_heads does not divide dim.
    """
    check_causal_attention(name)
    return CAUSAL_ATTENTIONS[name](dim, num_heads, **factory)


def check_causal_attention(name: str) -> None:
    """Raise ValueError unless this is the name of a causal attention."""
    if name not in CAUSAL_ATTENTIONS:
        known = ", ".join(CAUSAL_ATTENTIONS)
        raise ValueError(f"attention must be one of {known}, got {name!r}{nearest(name, CAUSAL_ATTENTIONS)}")


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of q and k, and V' = [1, V], in the dtype of the sums."""
    q, k, v = widened(q, k, v)
    return elu_features(q), elu_features(k), causal.with_ones(v)


def _mean(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide numerators (..., D) by the denominators in column 0."""
    return (z[..., 1:] / (z[..., :1] + EPS)).to(dtype)


def _scalar_products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


def _unchanged(x: Tensor) -> Tensor:
    return x


PRODUCT = causal.Kernel(_scalar_products, _unchanged, _unchanged)  # of vectors that are features already
