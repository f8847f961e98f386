"""Pictures of the numerical study: the errors, and sizes, ones column and missing normalisation in a second one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from taylorvit.studies.numerics import ErrorRow
from taylorvit.studies.numerics_normalisation import NormalisationRow
from taylorvit.studies.numerics_report import TENSORS, Results, group
from taylorvit.studies.numerics_sizes import (
    CLAIMS,
    FP16_LARGEST,
    FP16_SUBNORMAL,
    FP16_ZERO,
    STATE,
    OnesRow,
    SizeRow,
    ones_column,
)

STYLE = {"font.size": 16, "lines.linewidth": 2.0, "lines.markersize": 6, "axes.grid": True, "grid.alpha": 0.3}


def draw_pictures(results: Results, folder: Path) -> None:
    """Draw numerics.png and numerics_sizes.png."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        _draw_all_errors(results["errors"], folder / "numerics.png")
        _draw_all_sizes(results, folder / "numerics_sizes.png")


def _draw_all_errors(errors: list[ErrorRow], path: Path) -> None:
    """Draw a column for each dtype: the output, and the gradients for each kind of inputs."""
    import matplotlib.pyplot as plt

    dtypes, kinds = (list(dict.fromkeys(getattr(row, name) for row in errors)) for name in ("dtype", "kind"))
    lines = [("output", kinds[0])] + [("gradients of q, k, v", kind) for kind in kinds]
    size = (5.2 * len(dtypes), 3.6 * len(lines) + 1.2)
    figure, axes = plt.subplots(len(lines), len(dtypes), figsize=size, layout="constrained", squeeze=False, sharey="col")
    for line, (what, kind) in zip(axes, lines):
        for axis, dtype in zip(line, dtypes):
            shown = [row for row in errors if (row.dtype, row.kind) == (dtype, kind) and row.tensor in TENSORS[what]]
            _draw_errors(axis, shown)
            axis.set_title(f"{what}\n{dtype}, {kind} inputs", fontsize=16)
        line[0].set_ylabel("relative rms error")
    for axis in axes[-1]:
        axis.set_xlabel("tokens N")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=15)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_all_sizes(results: Results, path: Path) -> None:
    """Draw sizes, scaling and the ones column above, the attention without normalisation below."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(19, 17), layout="constrained")
    _draw_claims(axes[0, 0], results["sizes"])
    _draw_scaled(axes[0, 1], results["sizes"])
    _draw_ones(axes[0, 2], results["ones_column"])
    _draw_normalisation(axes[1], results["normalisation"])
    for axis in axes.flat:
        axis.legend(fontsize=14, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _tokens_axis(axis: Any, tokens: Iterable[int]) -> None:
    """Make a logarithmic axis with the measured N as its ticks."""
    ticks = sorted(set(tokens))
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{N / 1024:g}k" if N >= 1024 and N % 1024 == 0 else str(N) for N in ticks])
    axis.minorticks_off()


def _draw_errors(axis: Any, rows: list[ErrorRow]) -> None:
    """Draw each candidate's worst error over all d and temperatures against N; a cross at the top: not finite."""
    _tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set_yscale("log")
    names = list(dict.fromkeys(row.candidate for row in rows))
    impls = list(dict.fromkeys(name.split("_")[-1] if "taylor" in name else "paper" for name in names))
    for name in names:
        impl = name.split("_")[-1] if "taylor" in name else "paper"
        style = {"color": f"C{impls.index(impl)}", "linestyle": "--" if "efficient" in name else "-"}
        width = 5 - 1.5 * min(impls.index(impl), 2)  # the same values over one another stay visible
        curve: dict[int, float] = {}
        for (N,), members in group([row for row in rows if row.candidate == name and not row.note], ("num_tokens",)).items():
            if any(row.rms is None for row in members):
                cross = {"marker": "X", "color": style["color"], "markersize": 12, "linestyle": "none"}
                axis.plot(N, 0.93, transform=axis.get_xaxis_transform(), label=f"{name}: NaN or Inf", **cross)
            else:
                curve[N] = max(row.rms or 0.0 for row in members)
        marker = "s" if "efficient" in name else "o"
        axis.plot(list(curve), list(curve.values()), marker=marker, label=name.removeprefix("taylor_"), lw=width, **style)
    floor = {N: max(row.rounding or 0.0 for row in members) for (N,), members in group(rows, ("num_tokens",)).items()}
    axis.plot(list(floor), list(floor.values()), color="black", linestyle=":", label="rounding of the exact result")


def _draw_claims(axis: Any, rows: list[SizeRow]) -> None:
    """Draw the sizes without scaling against N at the middle d, and what is claimed of them."""
    rows = [row for row in rows if (row.scaling, row.values) == ("none", "normal") and row.quantity in CLAIMS]
    head_dims = sorted({row.head_dim for row in rows})
    D = head_dims[len(head_dims) // 2]
    for index, (quantity, (text, claim)) in enumerate(CLAIMS.items()):
        curve = {row.num_tokens: row.norm for row in rows if (row.quantity, row.head_dim) == (quantity, D)}
        axis.plot(list(curve), list(curve.values()), "o", color=f"C{index}", label=f"{quantity}, claim {text}")
        axis.plot(list(curve), [claim(N, D) for N in curve], color=f"C{index}", linewidth=1.2)
    _tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set(yscale="log", xlabel="tokens N", ylabel="mean norm of a row (first: of the state)")
    axis.set_title(f"without scaling, d = {D}\nmeasured (dots), claimed (lines)", fontsize=16)


def _draw_scaled(axis: Any, rows: list[SizeRow]) -> None:
    """Draw the entries' rms against N at the middle d, without scaling and in the paper's way, and the range of fp16."""
    head_dims = sorted({row.head_dim for row in rows})
    D = head_dims[len(head_dims) // 2]
    quantities = ["ones", "V", STATE, "Y_denom"]
    for (scaling, style), (index, quantity) in itertools.product({"none": "--", "code": "-"}.items(), enumerate(quantities)):
        wanted = (scaling, "normal", quantity, D)
        curve = {row.num_tokens: row.rms for row in rows if (row.scaling, row.values, row.quantity, row.head_dim) == wanted}
        label = quantity if scaling == "code" else None
        axis.plot(list(curve), list(curve.values()), style, color=f"C{index}", marker="o", label=label)
    for bound, text in (
        (FP16_LARGEST, "largest"),
        (FP16_SUBNORMAL, "digits lost below"),
        (FP16_ZERO, "0"),
    ):
        axis.axhline(bound, color="black", linestyle=":")
        axis.annotate(f"fp16: {text}", (0.01, bound), xycoords=("axes fraction", "data"), va="bottom", fontsize=13)
    _tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set(yscale="log", xlabel="tokens N", ylabel="rms entry")
    axis.set_title(f"entries, d = {D}\nno scaling (dashed), the paper's way (solid)", fontsize=16)


def _draw_ones(axis: Any, rows: list[OnesRow]) -> None:
    """Draw the output's wrong scale in fp16 against N: what the rounded ones column predicts, and what was measured."""
    high = max(row.num_tokens for row in rows)
    rows = [row for row in rows if row.num_tokens >= high / 16]  # before, next to nothing happens
    low = min(row.num_tokens for row in rows)
    grid = [round(low * (high / low) ** (step / 600)) for step in range(601)]
    for index, D in enumerate(sorted({row.head_dim for row in rows})):
        columns = [ones_column(N, D) for N in grid]
        predicted = [100 * (exact / held - 1) if held else math.nan for exact, held in columns]
        axis.plot(grid, predicted, color=f"C{index}", linewidth=1)
        own = [row for row in rows if row.head_dim == D and row.num_entries]
        done = {row.num_tokens: 100 * row.measured for row in own if row.measured is not None}
        axis.plot(list(done), list(done.values()), "o", color=f"C{index}", label=f"d = {D}")
        lost = [row.num_tokens for row in own if row.measured is None]
        axis.plot(lost, [0] * len(lost), "X", color=f"C{index}", markersize=14, label=f"d = {D}: Inf, NaN" if lost else None)
    _tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set(ylim=(-60, 60), xlabel="tokens N", ylabel="change of the output's scale [%]")
    axis.set_title("fp16, the paper's ones column\nrounding predicts (lines), measured (dots)", fontsize=16)


def _draw_normalisation(axes: Any, rows: list[NormalisationRow]) -> None:
    """Draw output, row sums and gradients against N at the largest d, with and without normalisation."""
    rows = [row for row in rows if row.head_dim == max(row.head_dim for row in rows)]
    variants = list(dict.fromkeys(row.variant for row in rows))
    panels = {
        "output, with and without sqrt(N/d)": ("rms entry of the output", {"scaled_output": "-", "output": "--"}),
        "row sums": ("mean row sum of the weights", {"denominator": "-"}),
        "gradients": ("rms entry of the gradient of q", {"gradient_q": "-"}),
    }
    for axis, (title, (label, fields)) in zip(axes, panels.items()):
        for (index, variant), (field, style) in itertools.product(enumerate(variants), fields.items()):
            own = [row for row in rows if row.variant == variant]
            text = variant + (", no sqrt(N/d)" if style == "--" else "")
            values = [getattr(row, field) for row in own]
            axis.plot([row.num_tokens for row in own], values, style, marker="o", color=f"C{index}", label=text)
        if title == "row sums":
            axis.axhline(FP16_LARGEST, color="black", linestyle=":", label="largest fp16 number")
        _tokens_axis(axis, [row.num_tokens for row in rows])
        axis.set(yscale="log", xlabel="tokens N", ylabel=label)
        axis.set_title(f"{title}, d = {rows[0].head_dim if rows else 0}", fontsize=16)
