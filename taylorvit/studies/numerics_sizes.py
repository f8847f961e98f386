"""How large the intermediate numbers of TaylorShift grow, what the paper says of them, and where fp16 cannot hold them.

Sizes in fp64 (`size_rows`), the project page's claims held against them (`claim_rows`), where each leaves the range of fp16
(`range_rows`), and the ones column of the paper's way, which fp16 rounds (`ones_row`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taylorvit.benchmark import paper
from taylorvit.benchmark.case import Case
from taylorvit.complexity import flops_crossover
from taylorvit.ops import reference
from taylorvit.studies.numerics import MAX_MATRIX_BYTES, draw, standard_normal

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
FP16_LARGEST, FP16_SUBNORMAL, FP16_ZERO = 65504.0, 2.0**-14, 2.0**-25


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


def size_rows(case: Case, scaling: str, values: str) -> list[SizeRow]:
    """Measure the intermediates of both forms on unit vectors q, k and values that are standard normal or unit vectors.

    Returns no row above MOST_SIZE_TOKENS.
    """
    N, D = case.num_tokens, case.head_dim
    if N > MOST_SIZE_TOKENS:
        return []
    sizes: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(NUM_DRAWS):
        q, k, v = standard_normal(case, seed, [(NUM_QUERIES, D), (N, D), (N, D)])
        v = reference.unit_vectors(v) if values == "unit" else v
        q, k, v = _scaled(scaling, reference.unit_vectors(q), reference.unit_vectors(k), v)
        for quantity, x in _intermediates(q, k, v, scaling, with_state=seed == 0).items():
            norm = x.norm() if quantity == STATE else x.norm(dim=-1).mean()
            sizes.setdefault(quantity, []).append((float(norm), rms_entry(x), float(x.abs().max())))
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


def rms_entry(x: Tensor) -> float:
    """Return the root of the entries' mean square."""
    return float(x.square().mean().sqrt())
