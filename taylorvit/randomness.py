"""Randomness as a function of position: every random draw is keyed by what it is for and where in the run it stands.

There is no generator state to save, so a resumed run draws what the uninterrupted one would have drawn, and the number of
loader workers or processes changes nothing.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(purpose: str, *position: int) -> int:
    """Return a 64-bit seed for one purpose (such as "sample") at one position (such as seed, epoch, index)."""
    text = "/".join([purpose, *(str(int(part)) for part in position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_all(purpose: str, *position: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (CPU, and GPU where in use) for one purpose at one position."""
    seed = derive_seed(purpose, *position)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also queue work for GPUs that this process never uses, once for every sample of a loader worker
    torch.default_generator.manual_seed(seed % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed % 2**63)


def numpy_generator(purpose: str, *position: int) -> np.random.Generator:
    """Return an independent NumPy generator for one purpose at one position."""
    return np.random.Generator(np.random.Philox(derive_seed(purpose, *position)))
