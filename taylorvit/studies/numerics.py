"""How exact TaylorShift is in each precision: errors of every implementation against fp64, on inputs drawn here.

The rest of the numerical study: sizes of intermediates in `numerics_sizes`, what the normalisation is for in
`numerics_normalisation`, files and tables in `numerics_report`, pictures in `numerics_pictures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taylorvit.benchmark.case import DTYPES, Case
from taylorvit.benchmark.check import NAMES
from taylorvit.benchmark.peers import Peer, all_peers
from taylorvit.ops import FORMS, IMPLEMENTATIONS, resolve_form

KINDS = {
    "normal": "q, k, v standard normal",
    "shifted": "the same, 30 added to every value",
    "clustered": "values standard normal, all keys about 6 degrees around one direction",
}
VALUE_MEAN, CLUSTER_WIDTH = 30.0, 0.1
IMPLS = (*IMPLEMENTATIONS, "paper")
MAX_BYTES = 2**32  # of what one call holds, as Peer.needed_bytes estimates it
MAX_MATRIX_BYTES = 2**28  # of one N x N or N x D^2 matrix that is only looked at


@dataclass(frozen=True)
class ErrorRow:
    """One tensor's error against fp64, all seeds together, or the reason why there is none.

    `rms`: of the error over that of the exact tensor; `largest`: largest error over largest exact entry; both None if any
    entry is not finite. `rounding`: the `rms` of the exact tensor rounded to the result's dtype, the least there can be.
    """

    candidate: str
    dtype: str
    kind: str
    num_tokens: int
    head_dim: int
    temperature: float
    tensor: str
    rms: float | None
    largest: float | None
    rounding: float | None
    num_nan: int
    num_inf: int
    num_entries: int
    note: str = ""


def candidates(impls: Iterable[str], device: str) -> dict[str, Peer]:
    """Return both forms of each implementation by name; "paper" is `benchmark.paper`.

    Raises:
        ValueError: an implementation is unknown or does not run on the device.
    """
    peers, chosen = all_peers(), {}
    for impl in impls:
        if impl not in IMPLS:
            raise ValueError(f"--impl must be of {', '.join(IMPLS)}, got {impl!r}")
        for form in FORMS[1:]:
            name = f"paper_{form}" if impl == "paper" else f"taylor_{form}_{impl}"
            if name in peers:
                if device not in peers[name].devices:
                    raise ValueError(f"--impl {impl} runs on {', '.join(peers[name].devices)} only, got --device {device}")
                chosen[name] = peers[name]
    return chosen


def truth_of(case: Case) -> Peer:
    """Return the reference in the form with fewer operations; in fp64 both are the same to 1e-15."""
    form = resolve_form(case.num_tokens, case.head_dim, impl="reference")
    return all_peers()[f"taylor_{form}_reference"]


def draw(kind: str, case: Case, temperature: float, seed: int) -> list[Tensor]:
    """Return q, k, v, temperature (H,) and the output's gradient, all rounded to the dtype of the case; see KINDS."""
    q, k, v, upstream, centre = standard_normal(case, seed, [case.shape] * 4 + [(case.head_dim,)])
    if kind == "shifted":
        v = v + VALUE_MEAN
    if kind == "clustered":
        k = centre + CLUSTER_WIDTH * k
    tau = torch.full((case.num_heads,), temperature, device=case.device)
    return [x.to(DTYPES[case.dtype]) for x in (q, k, v, tau, upstream)]


def standard_normal(case: Case, seed: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Draw fp64 tensors one after the other."""
    generator = torch.Generator(case.device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=case.device, dtype=torch.float64) for shape in shapes]


def error_rows(case: Case, kind: str, temperature: float, peers: dict[str, Peer], num_seeds: int) -> Iterator[ErrorRow]:
    """Yield a row for every candidate and tensor: the output and the gradients of q, k, v and temperature."""
    inputs = [draw(kind, case, temperature, seed) for seed in range(num_seeds)]
    exact = [_evaluate(truth_of(case), case, [x.double() for x in one]) for one in inputs]
    where = (case.dtype, kind, case.num_tokens, case.head_dim, temperature)
    for name, peer in peers.items():
        if (size := peer.needed_bytes(case)) > MAX_BYTES:
            note = f"skipped: needs {size / 2**30:.1f} GiB"
            yield from (ErrorRow(name, *where, tensor, None, None, None, 0, 0, 0, note) for tensor in NAMES)
            continue
        # The paper's way has everything in one dtype; the operation takes the temperature in fp32, as parameters are.
        results = [_evaluate(peer, case, one if name.startswith("paper") else _wide_temperature(one)) for one in inputs]
        for index, tensor in enumerate(NAMES):
            pair = [torch.cat([result[index].flatten() for result in side]) for side in (results, exact)]
            rms, largest, rounding = _errors(*pair)
            got = pair[0]
            counts = int(got.isnan().sum()), int(got.isinf().sum()), got.numel()
            yield ErrorRow(name, *where, tensor, rms, largest, rounding, *counts)


def _evaluate(peer: Peer, case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    return case.bind(peer.build(), "taylor")(*leaves, inputs[4])


def _wide_temperature(inputs: list[Tensor]) -> list[Tensor]:
    wide = torch.promote_types(inputs[3].dtype, torch.float32)
    return [*inputs[:3], inputs[3].to(wide), inputs[4]]


def _errors(got: Tensor, exact: Tensor) -> tuple[float | None, float | None, float | None]:
    """Return rms, largest and rounding error; None for what is not finite."""
    rounded = exact.to(got.dtype).double()
    rounding = _relative_rms(rounded, exact) if rounded.isfinite().all() else None
    if not got.isfinite().all():
        return None, None, rounding
    largest = float((got.double() - exact).abs().max() / exact.abs().max())
    return _relative_rms(got.double(), exact), largest, rounding


def _relative_rms(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())
