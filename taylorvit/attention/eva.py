"""EVA: softmax attention over a local window and one summary of every chunk of the sequence (arXiv:2302.04542).

Not to be confused with the vision transformers of the same name that timm has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylorvit.attention.multi_head import MultiHeadAttention
from taylorvit.attention.option_checks import check_whole_number
from taylorvit.ops import autocast_off
from taylorvit.ops.reference import widened

Landmarks = tuple[Tensor, Tensor, Tensor, Tensor]  # weight (D, D) and bias (D,) for the means of queries, and for those of keys


def check_options(*, window_size: int = 8, overlap: int = 4, num_landmarks: int = 49, seed: int = 0) -> None:
    """Raise ValueError unless these are valid options of `EVA`."""
    check_whole_number("window_size", window_size, 1)
    check_whole_number("overlap", overlap, 0)
    check_whole_number("num_landmarks", num_landmarks, 0)
    check_whole_number("seed", seed, 0)


class EVA(MultiHeadAttention):
    """Multi-head self-attention with EVA: (B, N, C) -> (B, N, C).

    4 N D (w + 2 o + c) operations per head for windows of w tokens, overlap o and c chunks, and about 4 N D (1 + 2 o / s) for
    the summaries of chunks of s tokens: linear in N, as c does not grow with it. Nothing in the parameters depends on N.

    The order of the tokens matters: windows and chunks are one-dimensional, also over images. There is no relative position
    bias, as in TaylorShift's comparison (arXiv:2403.02920), whose settings are the defaults.

    Tokens of the window are in a chunk, too, and count twice: EVA is softmax attention only without landmarks and with a window
    over all tokens. In training a summary is one sample, from PyTorch's global generator; evaluation draws nothing.

    Two things differ from the authors' code: means leave out what is beyond the ends instead of counting it as 0, and every
    token is in a chunk, where theirs leaves the last N mod s tokens without.

    Args:
        args, kwargs: as for `MultiHeadAttention`.
        window_size: tokens w of a window; every token attends to its window.
        overlap: tokens o on either side that belong to windows, and to chunks, as well.
        num_landmarks: chunks have max(1, floor(N / num_landmarks)) tokens, which makes this many to twice as many chunks of N
            tokens or more. 0: no chunks and no parameters for them, which is attention in windows.
        seed: of the initial landmark projections.

    Raises:
        ValueError: as for `MultiHeadAttention`, or an option is not valid.
    """

    landmark_q_weight: Tensor
    landmark_q_bias: Tensor
    landmark_k_weight: Tensor
    landmark_k_bias: Tensor

    def __init__(
        self,
        *args: Any,
        window_size: int = 8,
        overlap: int = 4,
        num_landmarks: int = 49,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_options(window_size=window_size, overlap=overlap, num_landmarks=num_landmarks, seed=seed)
        super().__init__(*args, **kwargs)
        self.window_size = window_size
        self.overlap = overlap
        self.num_landmarks = num_landmarks
        self.seed = seed
        D, weight = self.head_dim, self.proj.weight
        # No nn.Linear: drawn by timm, they would change the draws of all that follows, and models start from other weights.
        for name in ("landmark_q", "landmark_k"):
            self.register_parameter(f"{name}_weight", nn.Parameter(weight.new_empty(D, D)) if num_landmarks else None)
            self.register_parameter(f"{name}_bias", nn.Parameter(weight.new_empty(D)) if num_landmarks else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the landmark projections as timm draws those of a ViT, from a generator of their own; timm calls this."""
        if self.num_landmarks:
            generator = torch.Generator().manual_seed(self.seed)
            for weight, bias in (
                (self.landmark_q_weight, self.landmark_q_bias),
                (self.landmark_k_weight, self.landmark_k_bias),
            ):
                on_cpu = torch.empty(weight.shape, device="cpu")
                with torch.no_grad():
                    weight.copy_(nn.init.trunc_normal_(on_cpu, std=0.02, generator=generator))
                nn.init.zeros_(bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        landmarks = None
        if self.num_landmarks:
            landmarks = self.landmark_q_weight, self.landmark_q_bias, self.landmark_k_weight, self.landmark_k_bias
        return eva_attention(
            q,
            k,
            v,
            landmarks,
            window_size=self.window_size,
            overlap=self.overlap,
            num_landmarks=self.num_landmarks,
            sample=self.training,
            key_mask=key_mask,
        )

    def extra_repr(self) -> str:
        """Name the heads and the options in the module's printed form."""
        windows = f"window_size={self.window_size}, overlap={self.overlap}"
        return f"num_heads={self.num_heads}, {windows}, num_landmarks={self.num_landmarks}, seed={self.seed}"


def eva_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Landmarks | None,
    *,
    window_size: int,
    overlap: int,
    num_landmarks: int,
    sample: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend to the window and to the summaries of chunks, in fp32 (fp64 for fp64 inputs), whatever autocast says.

    J(i) are the tokens of i's window, E_c those of chunk c, both with `overlap` more on either side. With the learned maps of
    means A_q, A_k:

        kb_c    = A_k(mean_{j in E_c} k_j)
        omega_c = (A_q(mean_{j in E_c} q_j) + kb_c) / 2, plus N(0, 1) where `sample` is true
        beta_c  = sum_{j in E_c} softmax_j((omega_c . k_j - |k_j|^2 / 2) / sqrt(D)) v_j
        y_i     = (sum_{j in J(i)} exp(q_i . k_j / sqrt(D)) v_j + sum_c exp(q_i . kb_c / sqrt(D)) beta_c) / Z_i
        Z_i     = sum_{j in J(i)} exp(q_i . k_j / sqrt(D)) + sum_c exp(q_i . kb_c / sqrt(D))

    Keys that are left out are in no window, mean or sum, and a chunk of nothing else is left out itself.

    q, k, v: (B, H, N, D); landmarks: weight (D, D) and bias (D,) of A_q and of A_k, or None for no chunks; key_mask: (B, N),
    true for the keys that count. Returns (B, H, N, D) in the dtype of v.
    """
    with autocast_off(q):
        queries, keys, values = widened(q, k, v)
        B, _, N, D = q.shape
        keep = (q.new_ones(B, N, dtype=torch.bool) if key_mask is None else key_mask)[:, None, :, None]  # (B, 1, N, 1)

        local_keys, local_values, seen = (_windows(x, window_size, overlap) for x in (keys, values, keep))
        scores = _windows(queries, window_size, 0) @ local_keys.mT * D**-0.5  # (B, H, n, w, w + 2 o)
        scores = _leave_out(scores, seen.mT)
        if landmarks is None:
            return (scores.softmax(dim=-1) @ local_values).flatten(2, 3)[:, :, :N].to(v.dtype)

        size = max(1, N // num_landmarks)
        chunks = [_windows(x, size, overlap) for x in (queries, keys, values, keep)]  # (B, H, c, s + 2 o, D)
        summary_keys, summary_values = _summaries(chunks, landmarks, sample)  # (B, H, c, D)
        remote = _leave_out(queries @ summary_keys.mT * D**-0.5, chunks[-1].any(dim=3).mT)  # (B, H, N, c)
        weights = torch.cat([scores, _windows(remote, window_size, 0)], dim=-1).softmax(dim=-1)  # (B, H, n, w, w + 2 o + c)
        local, remote = weights.split([scores.shape[-1], remote.shape[-1]], dim=-1)
        y = (local @ local_values).flatten(2, 3) + remote.flatten(2, 3) @ summary_values  # (B, H, n w, D)
        return y[:, :, :N].to(v.dtype)


def _summaries(chunks: list[Tensor], landmarks: Landmarks, sample: bool) -> tuple[Tensor, Tensor]:
    """Return kb and beta (B, H, c, D) of q, k, v in chunks (B, H, c, s, D) and what counts in them (B, 1, c, s, 1)."""
    q, k, v, keep = chunks
    q_weight, q_bias, k_weight, k_bias = (x.to(q.dtype) for x in landmarks)
    share = keep / keep.sum(dim=3, keepdim=True).clamp_min(1).to(q.dtype)  # (B, 1, c, s, 1)
    query = nn.functional.linear((share * q).sum(dim=3), q_weight, q_bias)  # (B, H, c, D)
    key = nn.functional.linear((share * k).sum(dim=3), k_weight, k_bias)
    omega = (query + key) / 2
    if sample:
        omega = omega + torch.randn_like(omega)
    scores = (omega.unsqueeze(3) @ k.mT - k.square().sum(dim=-1).unsqueeze(3) / 2) * k.shape[-1] ** -0.5  # (B, H, c, 1, s)
    return key, (_leave_out(scores, keep.mT).softmax(dim=-1) @ v).squeeze(3)


def _windows(x: Tensor, size: int, overlap: int) -> Tensor:
    """Cut (B, H, N, D) into windows (B, H, ceil(N / size), size + 2 overlap, D), with 0 (false) beyond the ends."""
    padding = -x.shape[2] % size
    return nn.functional.pad(x, (0, 0, overlap, overlap + padding)).unfold(2, size + 2 * overlap, size).mT


def _leave_out(scores: Tensor, keep: Tensor) -> Tensor:
    """Make scores so low that they count for nothing; finite, as a row may have no other."""
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min)


torch.fx.wrap("eva_attention")  # looks at values and shapes that FX tracing does not know: a single node of a traced graph
