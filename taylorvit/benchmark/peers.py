"""The attentions that are compared, by name, with one signature: f(q, k, v, temperature) -> y, all (B, H, N, D).

- `sdpa`: PyTorch's fused softmax attention, the backend it picks itself (on a GPU a row's note names it); `sdpa_<backend>`
  forces one. Softmax attention scales by 1/sqrt(D) and ignores the temperature.
- `flex`: FlexAttention over unit vectors with score_mod = log(a x^2 + b x + c), times sqrt(N/D): softmax of a logarithm is the
  normalised polynomial, so this is TaylorShift. PyTorch has no backward pass of it on CPU.
- `compiled_reference_<form>`: torch.compile of ops.reference. `paper_<form>`: see `paper`; `paper_<form>_fp32` takes half
  precision and computes in fp32, the only way in which the paper's equations are right for such inputs.
- `taylor_<form>_<impl>`: every entry of ops.IMPLEMENTATIONS. `taylor_auto`: form and implementation left to the operation.

Left out: flash-attn's function is what `sdpa_flash` calls on a GPU; flash-linear-attention's `parallel_based` is causal, so it
is another function with half the pairs.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from ..complexity import Packing, entries_direct, entries_efficient, ops_direct, ops_efficient
from ..ops import DEVICE_TYPES, IMPLEMENTATIONS, obstacle, reference, resolve_form, resolve_impl, taylor_attention
from . import paper
from .case import DTYPES, Attention, Case, Truth
from .limits import Form
from .memory import Prepared

Cost = Literal["softmax", "direct", "efficient", "auto"]

SDPA_BACKENDS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
BASELINE = "sdpa"
# Forward and backward over forward: 2 + 5 matrix products over 2 (the scores are computed again); the usual 1 + 2 over 1.
TRAINING_OPS = {"softmax": 3.5, "direct": 3.5, "efficient": 3.0}
# What plain PyTorch holds at its peak over complexity.entries_*, which count what the formula needs.
PLAIN_ENTRIES = {"forward": 2, "training": 4}
FLEX_HEAD_DIM = 16  # the least that FlexAttention's kernels take on a GPU
NO_BACKEND = ("No available kernel", "No viable backend")  # PyTorch, on a GPU and a CPU, where a forced backend refuses


@dataclass(frozen=True)
class Peer:
    """An attention to compare.

    `truth` names the function that it computes, `cost` the formula that counts its operations, `packing` the products the
    efficient form of it computes. `materialises`: it holds what `complexity.entries_*` counts; else its memory is linear in N.
    `make` returns the attention, which is to run inside `around()`; `build` returns it with that context inside. Entering the
    context takes longer than a small attention, so a time is taken of the former. `impl` is ours alone.
    """

    name: str
    make: Callable[[], Attention]
    truth: Truth = "taylor"
    cost: Cost = "direct"
    packing: Packing = "none"
    materialises: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    trains_on: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    backend: SDPBackend | None = None
    impl: str | None = None

    def around(self) -> AbstractContextManager[object]:
        """Return the context that what `make` returns is to run in."""
        return sdpa_kernel(self.backend) if self.backend else nullcontext()

    def build(self) -> Attention:
        """Return the attention as it runs anywhere."""
        attention = self.make()
        if not self.backend:
            return attention

        def forced(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
            with self.around():
                return attention(q, k, v, temperature)

        return forced

    def obstacle(self, case: Case) -> str | None:
        """Say why this attention cannot run in the case, or return None."""
        if case.device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if case.dtype not in self.dtypes:
            return f"computes in {', '.join(self.dtypes)} only"
        if case.training and case.device not in self.trains_on:
            return f"PyTorch has no backward pass of it on {case.device}"
        if self.compiled and case.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            return "torch.compile needs a C++ compiler on CPU"
        if self.name == "flex" and case.device == "cuda" and case.head_dim < FLEX_HEAD_DIM:
            return f"FlexAttention needs head dimensions from {FLEX_HEAD_DIM} on"
        if self.impl:
            return obstacle(self.impl, case.device, DTYPES[case.dtype], case.head_dim)
        return _sdpa_obstacle(self, case) if self.backend else None

    def resolve(self, case: Case) -> Peer:
        """Return the peer whose costs these are: itself, unless form and implementation depend on the shape."""
        if self.cost != "auto":
            return self
        impl = resolve_impl(case.device, dtype=DTYPES[case.dtype], head_dim=case.head_dim)
        form = resolve_form(case.num_tokens, case.head_dim, impl=impl, training=case.training)
        return all_peers()[f"taylor_{form}_{impl}"]

    def form(self, case: Case) -> Form:
        """Return the form whose matrix products it computes; softmax attention has those of the direct form."""
        return "efficient" if self.resolve(case).cost == "efficient" else "direct"

    def operations(self, case: Case) -> float:
        """Count the algorithm's operations, all heads: 4 N^2 D for softmax, `complexity.ops_*` for the others.

        Training counts 3.5 times the forward pass for softmax and direct (5 matrix products after 2), 3 times for efficient.
        """
        actual = self.resolve(case)
        B, H, N, D = case.shape
        if actual.cost == "efficient":
            forward = ops_efficient(N, D, actual.packing)
        else:
            forward = 4 * N**2 * D if actual.cost == "softmax" else ops_direct(N, D)
        return B * H * forward * (TRAINING_OPS[actual.cost] if case.training else 1)

    def needed_bytes(self, case: Case) -> int:
        """Estimate the memory of one call in bytes, inputs not counted."""
        actual = self.resolve(case)
        B, H, N, D = case.shape
        size = max(4, DTYPES[case.dtype].itemsize)  # sums are fp32 at least
        linear = N * D * (8 if case.training else 3) + D**3
        if not actual.materialises:
            return B * H * linear * size
        entries = entries_efficient(N, D, actual.packing) if actual.cost == "efficient" else entries_direct(N, D)
        return B * H * (PLAIN_ENTRIES[case.pass_name] * entries + linear) * size


def all_peers() -> dict[str, Peer]:
    """Return every attention by name, whether or not it runs here."""
    cuda, full, half = ("cuda",), ("float32", "float64"), ("float16", "bfloat16")
    peers = [
        Peer(BASELINE, lambda: sdpa, "softmax", "softmax"),
        *(
            Peer(
                name,
                lambda: sdpa,
                "softmax",
                "softmax",
                materialises=backend == SDPBackend.MATH,
                devices=("cpu", "cuda") if backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION) else cuda,
                backend=backend,
            )
            for name, backend in SDPA_BACKENDS.items()
        ),
        Peer("flex", _compiled_flex, trains_on=cuda, compiled=True),
        # Half precision: a ones column times sqrt(D/N)/N rounds or vanishes, and plain row sums overflow.
        Peer("paper_direct", lambda: paper.direct, materialises=True, dtypes=full),
        Peer("paper_efficient", lambda: paper.efficient, cost="efficient", materialises=True, dtypes=full),
        Peer("paper_direct_fp32", lambda: _in_fp32(paper.direct), materialises=True, devices=cuda, dtypes=half),
        Peer(
            "paper_efficient_fp32",
            lambda: _in_fp32(paper.efficient),
            cost="efficient",
            materialises=True,
            devices=cuda,
            dtypes=half,
        ),
    ]
    for form in ("direct", "efficient"):
        compile_form = partial(_compiled, getattr(reference, form))
        peers.append(Peer(f"compiled_reference_{form}", compile_form, cost=form, materialises=True, compiled=True))
    for impl, forms in IMPLEMENTATIONS.items():
        plain = impl == "reference"
        for form in forms:
            peer = Peer(
                f"taylor_{form}_{impl}",
                partial(_taylor, form, impl),
                cost="efficient" if form == "efficient" else "direct",
                packing="none" if plain else "symmetric",  # the fewest products there are: a rate never flatters
                materialises=plain,
                devices=DEVICE_TYPES.get(impl, ("cpu", "cuda")),
                impl=impl,
            )
            peers.append(peer)
    peers.append(Peer("taylor_auto", partial(_taylor, "auto", "auto"), cost="auto"))
    return {peer.name: peer for peer in peers}


def sdpa(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Softmax attention by PyTorch."""
    return F.scaled_dot_product_attention(q, k, v)


def flex_mean(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """TaylorShift by FlexAttention, without the factor sqrt(N/D)."""
    q = (temperature[:, None, None] * reference.unit_vectors(q.to(temperature.dtype))).to(v.dtype)
    k = reference.unit_vectors(k.to(temperature.dtype)).to(v.dtype)
    y = flex_attention(q, k, v, score_mod=_log_polynomial, scale=1.0)
    assert isinstance(y, Tensor)
    return y


def is_refusal(error: BaseException) -> bool:
    """Whether the error says that something cannot run here, not that it is broken."""
    return isinstance(error, NotImplementedError) or any(words in str(error) for words in NO_BACKEND)


def chosen_backend(case: Case) -> str:
    """Return the name of the backend that PyTorch takes for `sdpa` in this case."""
    q, k, v, *_ = case.make_inputs(0)
    return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.removesuffix("_ATTENTION").lower()


def forget_compiled() -> None:
    """Clear the compiler's cache, which refuses more than a few shapes of one function."""
    torch.compiler.reset()


def prepare_call(name: str, case: dict[str, object], seed: int = 0) -> Prepared:
    """Return the call of a peer for `memory.peak_bytes_on_cpu`.

    The warm-up is a tiny call, but the very call for compiled attentions, as a compiler's memory is none of the attention's.
    """
    peer, full = all_peers()[name], Case(**case)  # type: ignore[arg-type]
    call = full.bind(peer.build(), peer.truth)
    tiny = replace(full, batch_size=1, num_heads=1, num_tokens=8)
    inputs, first = full.make_inputs(seed), tiny.make_inputs(seed)
    return Prepared(partial(call, *(inputs if peer.compiled else first)), partial(call, *inputs))


def _log_polynomial(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.log(reference.A * x * x + reference.B * x + reference.C)


def _taylor(form: str, impl: str) -> Attention:
    return partial(taylor_attention, form=form, impl=impl)


def _compiled(function: Attention) -> Attention:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compiled_flex() -> Attention:
    mean = _compiled(flex_mean)

    def attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        N, D = v.shape[-2:]
        return math.sqrt(N / D) * mean(q, k, v, temperature)  # outside: on CPU FlexAttention fuses nothing behind it

    return attention


def _in_fp32(function: Attention) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        return function(q.float(), k.float(), v.float(), temperature).to(q.dtype)

    return attention


def _sdpa_obstacle(peer: Peer, case: Case) -> str | None:
    """Ask PyTorch for a tiny call: which backend takes what depends on the build, the GPU, D and the dtype."""
    tiny = replace(case, batch_size=1, num_tokens=16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny.bind(peer.build(), peer.truth)(*tiny.make_inputs(0))
    except RuntimeError as error:
        return f"PyTorch refuses this backend: {str(error).splitlines()[0]}"
    return None
