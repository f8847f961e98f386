"""How exact TaylorShift is in each precision, how large its intermediate numbers grow, and what its normalisation is for.

Four measurements, each a list of rows: errors of every implementation against fp64 (`error_rows`), sizes of intermediates and
what the paper says of them (`size_rows`, `claim_rows`, `range_rows`), the ones column of the paper's way in fp16 (`ones_row`),
and the attention without its normalisations (`normalisation_rows`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..benchmark import paper
from ..benchmark.case import DTYPES, Case
from ..benchmark.check import NAMES
from ..benchmark.peers import Peer, all_peers
from ..complexity import flops_crossover
from ..ops import FORMS, IMPLEMENTATIONS, reference, resolve_form

KINDS = {
    "normal": "q, k, v standard normal",
    "shifted": "the same, 30 added to every value",
    "clustered": "values standard normal, all keys about 6 degrees around one direction",
}
VALUE_MEAN, CLUSTER_WIDTH = 30.0, 0.1
IMPLS = (*IMPLEMENTATIONS, "paper")
MAX_BYTES = 2**32  # of what one call holds, as Peer.needed_bytes estimates it
MAX_MATRIX_BYTES = 2**28  # of one N x N or N x D^2 matrix that is only looked at

SCALINGS = {
    "none": "unit vectors, V' = [1, V]",
    "paper": "q, k times d^(1/4), V' = [1, V] / N",
    "code": "the same, V' = [sqrt(d/N), V] / N, as benchmark/paper.py",
}
STATE = "(K[x]2)^T V'"
# The project page's sizes without scaling, V' = [1, V].
CLAIMS: dict[str, tuple[str, Callable[[int, int], float]]] = {
    STATE: ("N / sqrt(d)", lambda N, d: N / math.sqrt(d)),
    "(Q K^T)^(.2) V'": ("N / d", lambda N, d: N / d),
    "Q K^T V'": ("sqrt(N) (1 + 1/(4d))", lambda N, d: math.sqrt(N) * (1 + 1 / (4 * d))),
    "Y_denom": ("N (2 + 1/d)", lambda N, d: N * (2 + 1 / d)),
    "Y": ("sqrt(d / N)", lambda N, d: math.sqrt(d / N)),
}
READINGS = (("norm", "normal"), ("norm", "unit"), ("rms", "normal"))  # (measure, values)
NUM_QUERIES = 64  # whose rows are looked at: they do not depend on one another
NUM_DRAWS = 16  # of keys and values: all outputs of one draw lie near the mean of its values
KEYS_AT_A_TIME = 4096
MOST_SIZE_TOKENS = 2**16  # of which sizes are measured; power laws say the rest
MOST_TOKENS = 2**24  # beyond it nobody asks where fp16 ends
UNIT = "normalised"
INPUT_SCALES = (1.0, 4.0)  # of q and k that are not normalised
FP16_LARGEST, FP16_SUBNORMAL, FP16_ZERO = 65504.0, 2.0**-14, 2.0**-25


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


@dataclass(frozen=True)
class SizeRow:
    """The size of one intermediate in fp64, mean of NUM_DRAWS draws (the state: of one, it averages over all keys itself).

    `norm`: the mean Euclidean norm of its rows, one a token, or for a state (one a head) its Frobenius norm.
    """

    scaling: str
    values: str
    quantity: str
    num_tokens: int
    head_dim: int
    norm: float
    rms: float
    largest: float


@dataclass(frozen=True)
class ClaimRow:
    """A statement of the project page held against one reading of "size", over all N from N0(d) on.

    `low`, `high`: measured over claimed size. Exponents of N and d: of power laws fitted to the measured and the claimed sizes.
    """

    quantity: str
    claim: str
    measure: str
    values: str
    low: float
    high: float
    exponents: tuple[float, float] | None
    claimed_exponents: tuple[float, float] | None


@dataclass(frozen=True)
class RangeRow:
    """From which N on an intermediate leaves the range of fp16, by a power law through its measured sizes; None: never.

    `overflows`: its largest entry exceeds 65504. `subnormal`, `vanishes`: its rms falls below 2^-14 and 2^-25.
    """

    scaling: str
    quantity: str
    head_dim: int
    overflows: float | None
    subnormal: float | None
    vanishes: float | None


@dataclass(frozen=True)
class OnesRow:
    """The paper's efficient form in fp16, temperature 1, standard normal inputs.

    `column`: the ones column as it is held; `expected`: relative change of the output that its rounding explains; `measured`:
    that of the projection of the output on the one in fp32, None where an output is not finite or the form was not computed
    (`num_entries` 0).
    """

    num_tokens: int
    head_dim: int
    exact_column: float
    column: float
    expected: float | None
    measured: float | None
    num_nan: int
    num_inf: int
    num_entries: int


@dataclass(frozen=True)
class NormalisationRow:
    """The attention with and without L2-normalised q and k, temperature 1, in fp64 but for the last two.

    `effective_keys`: mean of 1 / sum_j p_ij^2 over N; `largest_weight`: mean of N max_j p_ij; both are 1 for equal weights.
    Outputs and gradients: rms entry, for an upstream gradient of rms 1; the gradients are of the output with sqrt(N/d).
    In fp16, weights divided by their sum first: `zero_rows`: share of the outputs that are all 0; `non_finite`: of the entries.
    """

    variant: str
    num_tokens: int
    head_dim: int
    logit_rms: float
    logit_largest: float
    effective_keys: float
    largest_weight: float
    denominator: float
    output: float
    scaled_output: float
    gradient_q: float
    gradient_k: float
    gradient_v: float
    zero_rows: float
    non_finite: float


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
    q, k, v, upstream, centre = _standard_normal(case, seed, [case.shape] * 4 + [(case.head_dim,)])
    if kind == "shifted":
        v = v + VALUE_MEAN
    if kind == "clustered":
        k = centre + CLUSTER_WIDTH * k
    tau = torch.full((case.num_heads,), temperature, device=case.device)
    return [x.to(DTYPES[case.dtype]) for x in (q, k, v, tau, upstream)]


def _standard_normal(case: Case, seed: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
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


def size_rows(case: Case, scaling: str, values: str) -> list[SizeRow]:
    """Measure the intermediates of both forms on unit vectors q, k and values that are standard normal or unit vectors.

    Returns no row above MOST_SIZE_TOKENS.
    """
    N, D = case.num_tokens, case.head_dim
    if N > MOST_SIZE_TOKENS:
        return []
    sizes: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(NUM_DRAWS):
        q, k, v = _standard_normal(case, seed, [(NUM_QUERIES, D), (N, D), (N, D)])
        v = reference.unit_vectors(v) if values == "unit" else v
        q, k, v = _scaled(scaling, reference.unit_vectors(q), reference.unit_vectors(k), v)
        for quantity, x in _intermediates(q, k, v, scaling, with_state=seed == 0).items():
            norm = x.norm() if quantity == STATE else x.norm(dim=-1).mean()
            sizes.setdefault(quantity, []).append((float(norm), _rms(x), float(x.abs().max())))
    return [SizeRow(scaling, values, quantity, N, D, *np.mean(each, axis=0).tolist()) for quantity, each in sizes.items()]


def _scaled(scaling: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and V' = [ones, V] (N, D + 1) as SCALINGS says."""
    N, D = v.shape
    ones = torch.ones_like(v[:, :1])
    if scaling == "none":
        return q, k, torch.cat([ones, v], dim=-1)
    ones = math.sqrt(D / N) * ones if scaling == "code" else ones
    return D**0.25 * q, D**0.25 * k, torch.cat([ones, v], dim=-1) / N


def _intermediates(q: Tensor, k: Tensor, values: Tensor, scaling: str, *, with_state: bool) -> dict[str, Tensor]:
    """Return what both forms hold on their way, for scaled q, k and V' (N, D + 1)."""
    alpha = 1.0 if scaling == "none" else q.shape[-1] ** 0.25
    x = q @ k.mT
    quadratic, linear = x.square() @ values, x @ values
    y = reference.A * quadratic + reference.B * alpha**2 * linear + reference.C * alpha**4 * values.sum(dim=0)
    chunks = zip(k.split(KEYS_AT_A_TIME), values.split(KEYS_AT_A_TIME)) if with_state else ()
    state = {STATE: torch.stack([reference.box(a).mT @ b for a, b in chunks]).sum(dim=0)} if with_state else {}
    return {
        "ones": values[:, :1],
        "V": values[:, 1:],
        **state,  # (D^2, D + 1)
        "(Q K^T)^(.2) V'": quadratic,
        "Q K^T V'": linear,
        "Y_denom": y[:, :1],
        "Y": y[:, 1:] / y[:, :1],
    }


def claim_rows(rows: list[SizeRow]) -> list[ClaimRow]:
    """Hold the claims against every reading of the sizes without scaling."""
    found = []
    for (quantity, (text, claim)), (measure, values) in itertools.product(CLAIMS.items(), READINGS):
        points = [
            (row.num_tokens, row.head_dim, float(getattr(row, measure)))
            for row in rows
            if (row.scaling, row.values, row.quantity) == ("none", values, quantity)
            and row.num_tokens >= flops_crossover(row.head_dim)
        ]
        if points:
            ratios = [size / claim(N, d) for N, d, size in points]
            fits = fit_exponents(points), fit_exponents([(N, d, claim(N, d)) for N, d, _ in points])
            found.append(ClaimRow(quantity, text, measure, values, min(ratios), max(ratios), *fits))
    return found


def fit_exponents(points: list[tuple[int, int, float]]) -> tuple[float, float] | None:
    """Fit size = c N^a d^b to points (N, d, size) and return a and b, or None where N and d do not vary apart."""
    design = np.array([(math.log(N), math.log(d), 1.0) for N, d, _ in points])
    if np.linalg.matrix_rank(design) < 3:
        return None
    a, b, _ = np.linalg.lstsq(design, np.log([size for *_, size in points]), rcond=None)[0]
    return float(a), float(b)


def range_rows(rows: list[SizeRow]) -> list[RangeRow]:
    """Return where each intermediate of every scaling and d leaves the range of fp16; values standard normal."""
    curves: dict[tuple[str, str, int], list[SizeRow]] = {}
    for row in rows:
        if row.values == "normal":
            curves.setdefault((row.scaling, row.quantity, row.head_dim), []).append(row)
    found = []
    for key, curve in curves.items():
        largest, rms = ([(row.num_tokens, float(getattr(row, name))) for row in curve] for name in ("largest", "rms"))
        bounds = (reach(largest, FP16_LARGEST, 1), reach(rms, FP16_SUBNORMAL, -1), reach(rms, FP16_ZERO, -1))
        found.append(RangeRow(*key, *bounds))
    return found


def reach(curve: list[tuple[int, float]], bound: float, direction: int) -> float | None:
    """Return the N at which the power law through the curve's last two points passes the bound upwards (1) or downwards (-1).

    None if it does not below MOST_TOKENS.
    """
    if len(curve) < 2:
        return None
    (before, start), (after, end) = sorted(curve)[-2:]
    slope = math.log(end / start) / math.log(after / before)
    if direction * slope < 0.1:  # flat, but for chance
        return None
    tokens = after * math.exp(math.log(bound / end) / slope)
    return tokens if tokens < MOST_TOKENS else None


def ones_row(case: Case) -> OnesRow:
    """Measure how far the paper's efficient form in fp16 misses the scale of the output; not where N x D^2 is too large."""
    N, D = case.num_tokens, case.head_dim
    exact, column = ones_column(N, D)
    expected = exact / column - 1 if column else None
    if 4 * N * D**2 > MAX_MATRIX_BYTES:
        return OnesRow(N, D, exact, column, expected, None, 0, 0, 0)
    inputs = draw("normal", case, 1.0, seed=0)[:4]
    with torch.no_grad():
        y = paper.efficient(*inputs).float()
        right = reference.efficient(*(x.float() for x in inputs))
    finite = bool(y.isfinite().all())
    measured = float((y * right).sum() / right.square().sum()) - 1 if finite else None
    return OnesRow(N, D, exact, column, expected, measured, int(y.isnan().sum()), int(y.isinf().sum()), y.numel())


def ones_column(num_tokens: int, head_dim: int) -> tuple[float, float]:
    """Return sqrt(d/N) / N, and as fp16 computes and holds it."""
    first = math.sqrt(head_dim / num_tokens)
    return first / num_tokens, float(torch.full((1,), first, dtype=torch.float16) / num_tokens)


def normalisation_rows(case: Case, seed: int) -> list[NormalisationRow]:
    """Compare unit vectors with standard normal q and k, also times 4; none where an N x N matrix is too large."""
    N, D = case.num_tokens, case.head_dim
    if 8 * N**2 > MAX_MATRIX_BYTES:
        return []
    q, k, v, upstream = _standard_normal(case, seed, [(N, D)] * 4)
    variants = {UNIT: 1.0} | {f"not normalised, x {scale:g}": scale for scale in INPUT_SCALES}
    return [_normalisation_row(name, scale * q, scale * k, v, upstream) for name, scale in variants.items()]


def _normalisation_row(variant: str, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> NormalisationRow:
    N, D = v.shape
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    x, w, y = _attend(*leaves, unit=variant == UNIT)
    gradients = torch.autograd.grad(math.sqrt(N / D) * y, leaves, upstream)
    x, w, y = x.detach(), w.detach(), y.detach()
    p = w / w.sum(dim=-1, keepdim=True)
    half = _attend(q.half(), k.half(), v.half(), unit=variant == UNIT)[2]
    return NormalisationRow(
        variant,
        N,
        D,
        logit_rms=_rms(x),
        logit_largest=float(x.abs().max()),
        effective_keys=float((1 / p.square().sum(dim=-1)).mean()) / N,
        largest_weight=N * float(p.amax(dim=-1).mean()),
        denominator=float(w.sum(dim=-1).mean()),
        output=_rms(y),
        scaled_output=math.sqrt(N / D) * _rms(y),
        gradient_q=_rms(gradients[0]),
        gradient_k=_rms(gradients[1]),
        gradient_v=_rms(gradients[2]),
        zero_rows=float((half == 0).all(dim=-1).double().mean()),
        non_finite=float((~half.isfinite()).double().mean()),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, *, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits and weights (N, N) and the weighted mean of v, all in the dtype of the inputs, as `paper.direct`."""
    if unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    x = q @ k.mT
    w = reference.A * x.square() + reference.B * x + reference.C
    return x, w, (w / w.sum(dim=-1, keepdim=True)) @ v


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
