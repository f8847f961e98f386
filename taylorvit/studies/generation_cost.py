"""What one more token costs over the number of tokens so far: time and state of causal attentions, one layer of each.

Two things are called the speed-up of a recurrent attention, and they differ by orders of magnitude:

    over recomputing    against softmax attention that computes all tokens so far again for every new one
    over a cache        against softmax attention that keeps their keys and values, as every generating program does

A layer with its projections is timed, on one token behind t - 1 others. Recomputing takes the layer's pass over all t tokens,
as the layers above need all its outputs again. The result of every candidate is first compared with fp64, computed from the
definition for this one token; a wrong result is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import elu

from taylorvit.attention.causal import CausalAttention, CausalLinear, CausalTaylorShift, build_causal_attention
from taylorvit.attention.linear import EPS
from taylorvit.benchmark.timing import Comparison, compare
from taylorvit.ops.reference import taylor_weights
from taylorvit.randomness import seed_all
from taylorvit.studies.results import markdown_table

RECOMPUTED, CACHED, LINEAR = "softmax, recomputed", "softmax, cached", "linear"
SOFTMAX_HEAD_DIM = 32  # of linear too
TOLERANCE = 1e-4  # of the largest output, in fp32
BATCH_SECONDS = 0.05  # longer than the turns in which a system gives its cores to programs


@dataclass(frozen=True)
class Cost:
    """One candidate at one position.

    Attributes:
        candidate: what was timed.
        head_dim: D.
        position: t, the tokens with the new one.
        seconds: of one token for the whole batch, median of the rounds; `low` and `high` are the 10th and 90th percentile.
        state_bytes: of one sequence, in this layer; of the recomputed softmax its inputs.
        over_recomputing: how many times faster than RECOMPUTED, median of the ratios within the rounds.
        over_cache: likewise, than CACHED.
        error: largest difference from fp64 over the largest output.
    """

    candidate: str
    head_dim: int
    position: int
    batch_size: int
    seconds: float
    low: float
    high: float
    state_bytes: int
    over_recomputing: float
    over_cache: float
    error: float


@dataclass
class Candidate:
    """A layer with t - 1 tokens behind it, and the call that computes token t."""

    head_dim: int
    call: Callable[[Tensor], Tensor]
    state_bytes: int
    error: float


def taylorshift_name(head_dim: int) -> str:
    """Return the candidate's name."""
    return f"taylorshift, D = {head_dim}"


@torch.no_grad()
def measure_position(
    position: int,
    *,
    embed_dim: int = 256,
    batch_size: int = 1,
    head_dims: Sequence[int] = (8, 16, 32),
    seconds: float = 0.5,
    device: str = "cpu",
) -> list[Cost]:
    """Time token number `position` for all candidates in interleaved rounds, after a check of each.

    Raises:
        RuntimeError: a candidate's result is wrong.
    """
    seed_all("generation cost", position)
    x = torch.randn(batch_size, position, embed_dim, device=device)  # (B, t, C)
    found = candidates(x, head_dims)
    calls = {name: one.call for name, one in found.items()}
    timed = compare(
        calls,
        lambda index: (x[:, -1],),
        seconds=seconds,
        num_input_sets=1,
        min_batch_seconds=BATCH_SECONDS,
    )
    return [_cost(name, one, position, batch_size, timed) for name, one in found.items()]


def candidates(x: Tensor, head_dims: Sequence[int]) -> dict[str, Candidate]:
    """Build all candidates for the last token of x (B, t, C), each checked.

    Raises:
        RuntimeError: a candidate's result is wrong.
    """
    softmax, linear = (_layer(name, SOFTMAX_HEAD_DIM, x) for name in ("softmax", "linear"))
    found = {
        RECOMPUTED: _recomputing(softmax, x),
        CACHED: _stepping(CACHED, softmax, x),
        LINEAR: _stepping(LINEAR, linear, x),
    }
    for head_dim in head_dims:
        name = taylorshift_name(head_dim)
        found[name] = _stepping(name, _layer("taylorshift", head_dim, x), x)
    return found


def exact_last_output(attention: CausalAttention, x: Tensor) -> Tensor:
    """Compute the last token's output (B, C) in fp64 from the definition: its query, and the keys and values of all tokens."""
    attention = copy.deepcopy(attention).double()
    q, k, v = attention.split_heads(x.double())  # (B, H, t, D)
    q, scale, eps = q[:, :, -1:], 1.0, 0.0
    if isinstance(attention, CausalTaylorShift):
        w, scale = taylor_weights(q, k, attention.temperature), math.sqrt(x.shape[1] / attention.head_dim)  # (B, H, 1, t)
    elif isinstance(attention, CausalLinear):
        w, eps = (elu(q) + 1) @ (elu(k) + 1).mT, EPS
    else:
        w = (q @ k.mT / math.sqrt(attention.head_dim)).softmax(dim=-1)
    return attention.merge_heads(scale * (w @ v) / (w.sum(dim=-1, keepdim=True) + eps))[:, 0]


def cost_table(rows: Sequence[Cost]) -> str:
    """Return times, state sizes and both speed-ups, one line a position."""
    names = list(dict.fromkeys(row.candidate for row in rows))
    by_position: dict[int, dict[str, Cost]] = {}
    for row in rows:
        by_position.setdefault(row.position, {})[row.candidate] = row

    def table(title: str, cell: Callable[[Cost], str], chosen: Iterable[str] = names) -> str:
        chosen = list(chosen)
        lines = [[str(t), *(cell(found[name]) for name in chosen)] for t, found in by_position.items()]
        return f"{title}:\n\n{markdown_table(['tokens', *chosen], lines)}"

    recurrent = [name for name in names if name not in (RECOMPUTED, CACHED)]
    return "\n\n".join(
        [
            table("Time of one token [ms]", lambda row: f"{1e3 * row.seconds:.3g}"),
            table("State of one sequence [KiB]", lambda row: f"{row.state_bytes / 1024:,.1f}"),
            table("Speed-up over recomputing the prefix", lambda row: f"{row.over_recomputing:.3g}", [CACHED, *recurrent]),
            table("Speed-up over a cache of keys and values", lambda row: f"{row.over_cache:.3g}", recurrent),
        ]
    )


def draw_costs(rows: Sequence[Cost], path: Path) -> None:
    """Draw time and state over the number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Cost], float]]] = [
        ("time of one token [ms]", lambda row: 1e3 * row.seconds),
        ("state of one sequence [KiB]", lambda row: row.state_bytes / 1024),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, (title, value) in zip(axes, panels):
        for name in dict.fromkeys(row.candidate for row in rows):
            points = [row for row in rows if row.candidate == name]
            style = "--" if name in (RECOMPUTED, CACHED) else "-"
            axis.plot([row.position for row in points], [value(row) for row in points], style, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens so far", title=title)
        positions = sorted({row.position for row in rows})
        axis.set_xticks(positions, [str(position) for position in positions], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _layer(name: str, head_dim: int, x: Tensor) -> CausalAttention:
    width = x.shape[-1]
    if width % head_dim:
        raise ValueError(f"head dimensions must divide the width {width}, got {head_dim}")
    return build_causal_attention(name, width, width // head_dim, device=x.device).eval()


def _recomputing(attention: CausalAttention, x: Tensor) -> Candidate:
    def call(last: Tensor) -> Tensor:
        return attention(x)

    error = _checked(RECOMPUTED, attention, x, call(x[:, -1])[:, -1])
    return Candidate(attention.head_dim, call, x[0].numel() * x.element_size(), error)


def _stepping(name: str, attention: CausalAttention, x: Tensor) -> Candidate:
    """Read all tokens but the last; the call computes the last one, again and again at the same position."""
    B, t, _ = x.shape
    _, state = attention.prefill(x[:, :-1], max_length=t)

    def call(last: Tensor) -> Tensor:
        state.num_tokens = t - 1  # recurrent sums grow by each call, which takes no other time for it
        return attention.step(last, state)

    error = _checked(name, attention, x, call(x[:, -1]))
    return Candidate(attention.head_dim, call, state.num_bytes // B, error)


def _checked(name: str, attention: CausalAttention, x: Tensor, result: Tensor) -> float:
    """Return the error of the last token's output; refuse a wrong one."""
    exact = exact_last_output(attention, x)
    error = float((result.double() - exact).abs().max() / exact.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name} is wrong at {x.shape[1]} tokens: error {error:.2g}, allowed {TOLERANCE:g}")
    return error


def _cost(name: str, one: Candidate, position: int, batch_size: int, timed: Comparison) -> Cost:
    time = timed.seconds(name)
    return Cost(
        candidate=name,
        head_dim=one.head_dim,
        position=position,
        batch_size=batch_size,
        seconds=time.median,
        low=time.low,
        high=time.high,
        state_bytes=one.state_bytes,
        over_recomputing=timed.speedup(name, RECOMPUTED).median,
        over_cache=timed.speedup(name, CACHED).median,
        error=one.error,
    )
