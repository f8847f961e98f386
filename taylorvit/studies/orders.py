"""The study of the Taylor order: how near each polynomial comes to softmax, what it costs, and how it trains.

Approximation needs no model: the weights of order k and softmax get the same logits, temperature times cosine, of random unit
vectors. Two kinds of keys: "uniform" on the sphere, and "shared", where all keys share a direction, so that two of them have a
cosine of about 1/2 and a query can be opposed to all at once. Order 0, equal weights for all tokens, is the yardstick: what is
no nearer to softmax than that gains nothing by attending.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from taylorvit.benchmark.case import Case
from taylorvit.benchmark.timing import compare
from taylorvit.ops.orders import FORMS, MAX_FEATURES, crossover, num_features, order_attention, taylor_polynomial
from taylorvit.ops.reference import unit_vectors
from taylorvit.studies.sweep import Cell

Keys = Literal["uniform", "shared"]
KEYS: tuple[Keys, ...] = ("uniform", "shared")
NUM_DRAWS = 8  # sets of N queries and N keys
TRAINED = ("taylorshift", "taylor_order", "softmax")  # attentions that are trained
GROUP = ("attention", "order", "temperature_init")  # what the runs of one row of the training table have in common
MAX_ERROR = 1e-5  # of the largest output: fp32 sums over up to some thousand tokens


@dataclass(frozen=True)
class Approximation:
    """One order against softmax of the same logits, over all rows of all draws, in fp64."""

    keys: Keys
    head_dim: int
    num_tokens: int
    temperature: float
    order: int
    total_variation: float  # half the sum of |weight - softmax's| of a row, mean of the rows
    kl: float | None  # of softmax from this order, nats, mean of the rows; None where a weight is not positive
    output_error: float  # |y - softmax's| / |softmax's| for standard normal v, median of the rows
    smallest_weight: float  # before the division by the row sum
    negative_share: float
    smallest_row_sum: float  # |row sum| / N
    largest_output: float  # longest mean / longest v: at most 1 where no weight is negative
    weight_error: float  # largest |w(x) / exp(x) - 1|
    weight_error_bound: float  # `largest_weight_error`


@dataclass(frozen=True)
class Timing:
    """The time of one call on one head, one image, in fp32."""

    head_dim: int
    num_tokens: int
    candidate: str  # "softmax", or form and order as in "direct_2"
    seconds: float
    seconds_low: float
    seconds_high: float
    speedup: float  # over softmax, median of the ratios within the rounds
    error: float | None  # against fp64, of the largest output; of softmax not looked at
    rounds: int


def largest_weight_error(order: int, temperature: float) -> float:
    """Return the largest |w(x) / exp(x) - 1| for |x| <= temperature: its value at x = -temperature.

    R(x) = 1 - w(x) exp(-x) has the derivative x^k exp(-x) / k!. So |R| grows on both sides of 0, to at most 1 on the right, and
    faster on the left, where exp(-x) > 1.
    """
    polynomial = math.fsum((-temperature) ** m / math.factorial(m) for m in range(order + 1))
    return abs(polynomial * math.exp(temperature) - 1)


def draw_cosines(keys: Keys, head_dim: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Return the cosines of random queries, uniform on the sphere, and keys: (NUM_DRAWS, N, N) in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_DRAWS, num_tokens, head_dim)
    queries, k = unit_vectors(torch.randn(shape, generator=generator, dtype=torch.float64))
    if keys == "shared":
        direction = torch.zeros(head_dim, dtype=torch.float64)
        direction[0] = 1
        k = unit_vectors(k + direction)
    return queries @ k.mT


def approximate(
    keys: Keys, head_dim: int, num_tokens: int, temperatures: Iterable[float], orders: Sequence[int], seed: int = 0
) -> list[Approximation]:
    """Return a row for each temperature and order; order 0 is equal weights."""
    cosines = draw_cosines(keys, head_dim, num_tokens, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    v = torch.randn((NUM_DRAWS, num_tokens, head_dim), generator=generator, dtype=torch.float64)
    rows = []
    for temperature in temperatures:
        x = temperature * cosines  # (draws, N, N)
        softmax = x.softmax(dim=-1)
        for order in orders:
            w = taylor_polynomial(x, order) if order else torch.ones_like(x)
            bound = largest_weight_error(order, temperature)
            measured = _compare(x, w, softmax, v)
            rows.append(Approximation(keys, head_dim, num_tokens, temperature, order, **measured, weight_error_bound=bound))
    return rows


def _compare(x: Tensor, w: Tensor, softmax: Tensor, v: Tensor) -> dict[str, Any]:
    row_sums = w.sum(dim=-1, keepdim=True)  # (draws, N, 1)
    normalised = w / row_sums
    y, wanted = normalised @ v, softmax @ v  # (draws, N, D)
    kl = (softmax * (softmax / normalised).log()).sum(dim=-1) if bool((w > 0).all()) else None
    return {
        "total_variation": ((normalised - softmax).abs().sum(dim=-1) / 2).mean().item(),
        "kl": None if kl is None else kl.mean().item(),
        "output_error": (_length(y - wanted) / _length(wanted)).median().item(),
        "smallest_weight": w.min().item(),
        "negative_share": (w < 0).double().mean().item(),
        "smallest_row_sum": row_sums.abs().min().item() / x.shape[-1],
        "largest_output": (_length(y).max() / _length(v).max()).item(),
        "weight_error": (w * (-x).exp() - 1).abs().max().item(),
    }


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def feature_table(head_dims: Iterable[int], orders: Sequence[int]) -> list[dict[str, Any]]:
    """Return, for each head dimension and order, the features and the tokens above which they save operations."""
    return [
        {
            "head_dim": head_dim,
            "order": order,
            "features": num_features(head_dim, order),
            "state_numbers": num_features(head_dim, order) * (head_dim + 1),
            "crossover_tokens": crossover(head_dim, order),
            "allowed": num_features(head_dim, order) <= MAX_FEATURES,
        }
        for head_dim, order in itertools.product(head_dims, orders)
    ]


def time_forms(head_dim: int, num_tokens: int, orders: Sequence[int], *, seconds: float) -> list[Timing]:
    """Time softmax and both forms of each order against one another; too many features are left out.

    Raises:
        RuntimeError: a form is not within MAX_ERROR of the direct form in fp64.
    """
    case = Case(1, 1, num_tokens, head_dim)
    calls: dict[str, Callable[..., Tensor]] = {"softmax": _softmax}
    errors: dict[str, float] = {}
    for order, form in itertools.product(orders, FORMS):
        if form == "efficient" and num_features(head_dim, order) > MAX_FEATURES:
            continue
        name = f"{form}_{order}"
        calls[name] = partial(order_attention, order=order, form=form)
        errors[name] = _checked_error(name, calls[name], case, order)
    with torch.no_grad():
        comparison = compare(calls, case.make_inputs, seconds=seconds)
    rows = []
    for name in calls:
        spent, speedup = comparison.seconds(name), comparison.speedup(name, over="softmax").median
        times = (spent.median, spent.low, spent.high, speedup)
        rows.append(Timing(head_dim, num_tokens, name, *times, errors.get(name), comparison.num_rounds))
    return rows


def _softmax(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _checked_error(name: str, function: Callable[..., Tensor], case: Case, order: int) -> float:
    """Return the largest error against the direct form in fp64, relative to the largest output, if that is small enough."""
    inputs = case.make_inputs(0)
    exact = order_attention(*(x.double() for x in inputs), order=order)
    error = ((function(*inputs) - exact).abs().max() / exact.abs().max()).item()
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{name} is {error:.1e} off fp64 at D = {case.head_dim}, N = {case.num_tokens}")
    return error


def training_cells(
    orders: Iterable[int], temperatures: Sequence[float], seeds: Iterable[int], *, shared: Mapping[str, Sequence[str]]
) -> list[Cell]:
    """Return a cell for each order, initial temperature and seed, and the twins with TaylorShift and with softmax.

    `shared` holds the arguments of all cells of an attention.
    """

    def cell(labels: dict[str, Any]) -> Cell:
        options = {key: labels[key] for key in ("order", "temperature_init") if key in labels}
        own = *(f"--model.attention_options.{key}={value}" for key, value in options.items()), f"--seed={labels['seed']}"
        return Cell(labels, (*shared[labels["attention"]], *own))

    cells = []
    for seed in seeds:
        for temperature in temperatures:
            labels = {"temperature_init": temperature, "seed": seed}
            cells.append(cell({"attention": "taylorshift", **labels}))
            cells += [cell({"attention": "taylor_order", "order": order, **labels}) for order in orders]
        cells.append(cell({"attention": "softmax", "seed": seed}))
    return cells


def summarise(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each attention, order and initial temperature: means and standard deviations over the seeds.

    `top1` is of the test split where there is one, else of validation. Runs that diverged are counted and not averaged.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result.get(label) for label in GROUP), []).append(result)
    return [dict(zip(GROUP, key)) | _summary(group) for key, group in groups.items()]


def _summary(group: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [result for result in group if result["status"] == "ok"]
    split = "test" if all(result["test_top1"] is not None for result in finished) else "val"
    top1 = [result[f"{split}_top1"] for result in finished]
    learned = [value for result in finished for layer in result["temperatures"] for value in layer]
    return {
        "runs": len(group),
        "diverged": len(group) - len(finished),
        "split": split if finished else None,
        "top1": statistics.mean(top1) if top1 else None,
        "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
        "temperature_low": min(learned, default=None),
        "temperature_high": max(learned, default=None),
        "train_seconds": statistics.mean(result["train_seconds"] for result in group),
    }
