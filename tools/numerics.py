"""Study the numerics of TaylorShift: errors against fp64, sizes of intermediates, and what the normalisation is for.

    python tools/numerics.py --out results/numerics
    python tools/numerics.py --num_tokens 256 1024 --head_dim 32 --impl reference cpu --dtype bfloat16 --seeds 5

Errors: every implementation in both forms, `paper` being the paper's way of computing, over all of --num_tokens, --head_dim,
--temperature, --dtype and --kind; inputs are rounded to the dtype before the fp64 truth is computed, so only the computing is
judged. A result with NaN or infinities has no error, they are counted instead. Temperature 1: sizes, the paper's scaling (up to
65,536 tokens) and its ones column in fp16 over --long_tokens, and without normalisation over --num_tokens up to 5,792.

Writes numerics.json (everything), numerics.csv (the errors), numerics.md (tables), numerics.png (errors) and
numerics_sizes.png (all else) into --out, whose earlier results are replaced. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.benchmark.case import DTYPES, Case
from taylorvit.benchmark.check import NAMES
from taylorvit.cli import positive_float, positive_int, run_program
from taylorvit.ops import DEVICE_TYPES
from taylorvit.provenance import provenance
from taylorvit.studies import numerics
from taylorvit.studies.numerics import CLAIMS, KINDS, SCALINGS, STATE, ClaimRow, ErrorRow, NormalisationRow, OnesRow, SizeRow

HALF_TO_FULL = ("float16", "bfloat16", "float32")
TENSORS = {"output": NAMES[:1], "gradients of q, k, v": NAMES[1:4], "gradient of temperature": NAMES[4:]}
STYLE = {"font.size": 16, "lines.linewidth": 2.0, "lines.markersize": 6, "axes.grid": True, "grid.alpha": 0.3}
READING_NAMES = {"norm": "mean norm of a row", "rms": "rms entry"}
Results = dict[str, list[Any]]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num_tokens", type=positive_int, nargs="+", default=[128, 512, 2048], metavar="N")
    add("--head_dim", type=positive_int, nargs="+", default=[16, 32, 64], metavar="D")
    add("--temperature", type=positive_float, nargs="+", default=[1.0, 8.0])
    add("--dtype", nargs="+", default=HALF_TO_FULL, choices=DTYPES)
    add(
        "--kind", nargs="+", default=list(KINDS), choices=KINDS, help="; ".join(f"{key}: {text}" for key, text in KINDS.items())
    )
    add("--long_tokens", type=positive_int, nargs="+", default=[256, 1024, 4096, 16384, 65536, 131072, 262144], metavar="N")
    add("--impl", nargs="+", choices=numerics.IMPLS, help="default: all that run on the device")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seeds", type=positive_int, default=2, help="drawings of the inputs, judged together (default: %(default)s)")
    add("--out", type=Path, default=Path("results/numerics"), metavar="FOLDER")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what argparse lets through, and make the folder; --impl gets its default."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures need matplotlib: pip install -r requirements-dev.txt")
    if options.impl is None:
        options.impl = [impl for impl in numerics.IMPLS if options.device in DEVICE_TYPES.get(impl, (options.device,))]
    numerics.candidates(options.impl, options.device)
    for num_tokens, head_dim in itertools.product(options.num_tokens, options.head_dim):
        case = Case(1, 1, num_tokens, head_dim, "float64", True, options.device)
        if (size := numerics.truth_of(case).needed_bytes(case)) > numerics.MAX_BYTES:
            need = f"the fp64 truth needs {size / 2**30:.3g} GiB, allowed are {numerics.MAX_BYTES / 2**30:g}"
            raise ValueError(f"--num_tokens {num_tokens} with --head_dim {head_dim}: {need}")
    make_writable(options.out)


def make_writable(folder: Path) -> None:
    """Make the folder and try to write in it.

    Raises:
        ValueError: it cannot be made or written.
    """
    probe = folder / f".tmp-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error


def measure(options: argparse.Namespace) -> Results:
    """Return all rows by study."""
    head_dims, device = sorted(set(options.head_dim)), options.device
    tokens, long = sorted(set(options.num_tokens)), sorted(set(options.long_tokens))
    scaled = [(scaling, "normal") for scaling in SCALINGS] + [("none", "unit")]
    sizes = [
        row
        for D, N, (scaling, values) in itertools.product(head_dims, long, scaled)
        for row in numerics.size_rows(Case(1, 1, N, D, "float64", device=device), scaling, values)
    ]
    print(f"{len(sizes)} sizes of intermediates", flush=True)
    ones = [numerics.ones_row(Case(1, 1, N, D, "float16", device=device)) for D, N in itertools.product(head_dims, long)]
    print(f"{len(ones)} ones columns", flush=True)
    normalisation = [
        row
        for D, N in itertools.product(head_dims, tokens)
        for row in numerics.normalisation_rows(Case(1, 1, N, D, "float64", device=device), seed=0)
    ]
    print(f"{len(normalisation)} cases with and without normalisation", flush=True)
    return {
        "errors": measure_errors(options),
        "sizes": sizes,
        "claims": numerics.claim_rows(sizes),
        "fp16_range": numerics.range_rows(sizes),
        "ones_column": ones,
        "normalisation": normalisation,
    }


def measure_errors(options: argparse.Namespace) -> list[ErrorRow]:
    """Return the errors of all candidates over the whole grid."""
    peers = numerics.candidates(options.impl, options.device)
    rows: list[ErrorRow] = []
    shapes = itertools.product(sorted(set(options.head_dim)), sorted(set(options.num_tokens)))
    for head_dim, num_tokens in shapes:
        for dtype, kind, temperature in itertools.product(
            *map(dict.fromkeys, (options.dtype, options.kind, options.temperature))
        ):
            case = Case(1, 1, num_tokens, head_dim, dtype, True, options.device)
            rows += numerics.error_rows(case, kind, temperature, peers, options.seeds)
        print(f"errors: D = {head_dim}, N = {num_tokens}", flush=True)
    return rows


def write(results: Results, options: argparse.Namespace) -> None:
    """Write JSON, CSV, tables and pictures."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    rows = {study: [dataclasses.asdict(row) for row in rows] for study, rows in results.items()}
    content = {"provenance": provenance(), "settings": settings, **rows}
    (options.out / "numerics.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with (options.out / "numerics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(ErrorRow)])
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in row.items()} for row in rows["errors"])
    (options.out / "numerics.md").write_text(markdown(results), encoding="utf-8")
    draw(results, options.out)


def short(value: Any) -> Any:
    """Return a float with four digits; the JSON file has them all."""
    return f"{value:.4g}" if isinstance(value, float) else value


def markdown(results: Results) -> str:
    """Return all tables."""
    errors = results["errors"]
    leaving = [row for row in results["fp16_range"] if row.overflows or row.subnormal or row.vanishes]
    parts = [
        "## Errors against fp64",
        "Relative rms / largest error over largest entry; the worst of all N, d and temperatures. "
        "`rounding`: rms of the exact result rounded to the dtype.",
        error_table(errors, ("dtype", "kind", "tensor")),
        f"Relative rms, {errors[0].kind} inputs: output; the worst of the gradients of q, k, v; gradient of the temperature.",
        grid_table([row for row in errors if row.kind == errors[0].kind]),
        "## Sizes of intermediates",
        "Measured over claimed size, for N from N0(d) on; exponents of N and d, fitted.",
        claim_table(results["claims"]),
        "N from which on fp16 cannot hold an intermediate: its largest entry exceeds 65504, its rms entry falls below 2^-14 "
        "and 2^-25. Those that stay within the range are left out.",
        field_table(leaving),
        "## The ones column of the paper's way in fp16",
        field_table(results["ones_column"]),
        "## Without normalisation",
        field_table(results["normalisation"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def number(value: Any) -> str:
    """Return a cell; None is a dash."""
    if isinstance(value, float):
        if 1e4 <= abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def field_table(rows: list[Any]) -> str:
    """Return rows with their fields as columns."""
    names = [field.name for field in dataclasses.fields(rows[0])] if rows else ["none"]
    return table(names, [[number(getattr(row, name)) for name in names] for row in rows])


def group(rows: Iterable[ErrorRow], fields: Sequence[str]) -> dict[tuple[Any, ...], list[ErrorRow]]:
    """Return the rows by the values of these fields."""
    groups: dict[tuple[Any, ...], list[ErrorRow]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
    return groups


def worst(rows: Iterable[ErrorRow], measure: Callable[[ErrorRow], float | None]) -> str:
    """Return the largest error, or in how many cases there is none: a case that is not finite is never left out."""
    done = [row for row in rows if not row.note]
    broken = [row for row in done if row.num_nan + row.num_inf]
    if broken:
        return f"**NaN/Inf in {len(broken)} of {len(done)}**"
    return number(max(measure(row) or 0.0 for row in done)) if done else "skipped"


def error_table(rows: list[ErrorRow], fields: Sequence[str]) -> str:
    """Return the worst error of each candidate by these fields."""
    names = list(dict.fromkeys(row.candidate for row in rows))
    lines = []
    for key, members in group(rows, fields).items():
        cells = []
        for name in names:
            own = [row for row in members if row.candidate == name]
            rms, largest = worst(own, lambda row: row.rms), worst(own, lambda row: row.largest)
            cells.append(rms if rms == largest else f"{rms} / {largest}")
        lines.append([*map(str, key), *cells, number(max((row.rounding or 0.0 for row in members), default=None))])
    return table([*fields, *names, "rounding"], lines)


def grid_table(rows: list[ErrorRow]) -> str:
    """Return the rms errors of output, gradients and temperature's gradient, a line for every case."""
    names = list(dict.fromkeys(row.candidate for row in rows))
    lines = []
    for key, members in group(rows, ("dtype", "head_dim", "num_tokens", "temperature")).items():
        cells = []
        for name in names:
            own = [row for row in members if row.candidate == name]
            parts = [[row for row in own if row.tensor in tensors] for tensors in TENSORS.values()]
            cells.append("; ".join(worst(part, lambda row: row.rms) for part in parts))
        lines.append([*map(str, key), *cells])
    return table(["dtype", "d", "N", "temperature", *names], lines)


def claim_table(rows: list[ClaimRow]) -> str:
    """Return the claims with their readings."""
    header = ["quantity", "claimed", "reading of size", "measured / claimed", "exponents measured", "exponents claimed"]
    lines = []
    for row in rows:
        reading = f"{READING_NAMES[row.measure]}, values {row.values}"
        fits = [f"N^{fit[0]:.2f} d^{fit[1]:.2f}" if fit else "-" for fit in (row.exponents, row.claimed_exponents)]
        lines.append([row.quantity, row.claim, reading, f"{row.low:.3f} to {row.high:.3f}", *fits])
    return table(header, lines)


def draw(results: Results, folder: Path) -> None:
    """Draw numerics.png and numerics_sizes.png."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        draw_all_errors(results["errors"], folder / "numerics.png")
        draw_all_sizes(results, folder / "numerics_sizes.png")


def draw_all_errors(errors: list[ErrorRow], path: Path) -> None:
    """Draw a column for each dtype: the output, and the gradients for each kind of inputs."""
    import matplotlib.pyplot as plt

    dtypes, kinds = (list(dict.fromkeys(getattr(row, name) for row in errors)) for name in ("dtype", "kind"))
    lines = [("output", kinds[0])] + [("gradients of q, k, v", kind) for kind in kinds]
    size = (5.2 * len(dtypes), 3.6 * len(lines) + 1.2)
    figure, axes = plt.subplots(len(lines), len(dtypes), figsize=size, layout="constrained", squeeze=False, sharey="col")
    for line, (what, kind) in zip(axes, lines):
        for axis, dtype in zip(line, dtypes):
            shown = [row for row in errors if (row.dtype, row.kind) == (dtype, kind) and row.tensor in TENSORS[what]]
            draw_errors(axis, shown)
            axis.set_title(f"{what}\n{dtype}, {kind} inputs", fontsize=16)
        line[0].set_ylabel("relative rms error")
    for axis in axes[-1]:
        axis.set_xlabel("tokens N")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=15)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_all_sizes(results: Results, path: Path) -> None:
    """Draw sizes, scaling and the ones column above, the attention without normalisation below."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(19, 17), layout="constrained")
    draw_claims(axes[0, 0], results["sizes"])
    draw_scaled(axes[0, 1], results["sizes"])
    draw_ones(axes[0, 2], results["ones_column"])
    draw_normalisation(axes[1], results["normalisation"])
    for axis in axes.flat:
        axis.legend(fontsize=14, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def tokens_axis(axis: Any, tokens: Iterable[int]) -> None:
    """Make a logarithmic axis with the measured N as its ticks."""
    ticks = sorted(set(tokens))
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{N / 1024:g}k" if N >= 1024 and N % 1024 == 0 else str(N) for N in ticks])
    axis.minorticks_off()


def draw_errors(axis: Any, rows: list[ErrorRow]) -> None:
    """Draw each candidate's worst error over all d and temperatures against N; a cross at the top: not finite."""
    tokens_axis(axis, [row.num_tokens for row in rows])
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


def draw_claims(axis: Any, rows: list[SizeRow]) -> None:
    """Draw the sizes without scaling against N at the middle d, and what is claimed of them."""
    rows = [row for row in rows if (row.scaling, row.values) == ("none", "normal") and row.quantity in CLAIMS]
    head_dims = sorted({row.head_dim for row in rows})
    D = head_dims[len(head_dims) // 2]
    for index, (quantity, (text, claim)) in enumerate(CLAIMS.items()):
        curve = {row.num_tokens: row.norm for row in rows if (row.quantity, row.head_dim) == (quantity, D)}
        axis.plot(list(curve), list(curve.values()), "o", color=f"C{index}", label=f"{quantity}, claim {text}")
        axis.plot(list(curve), [claim(N, D) for N in curve], color=f"C{index}", linewidth=1.2)
    tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set(yscale="log", xlabel="tokens N", ylabel="mean norm of a row (first: of the state)")
    axis.set_title(f"without scaling, d = {D}\nmeasured (dots), claimed (lines)", fontsize=16)


def draw_scaled(axis: Any, rows: list[SizeRow]) -> None:
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
        (numerics.FP16_LARGEST, "largest"),
        (numerics.FP16_SUBNORMAL, "digits lost below"),
        (numerics.FP16_ZERO, "0"),
    ):
        axis.axhline(bound, color="black", linestyle=":")
        axis.annotate(f"fp16: {text}", (0.01, bound), xycoords=("axes fraction", "data"), va="bottom", fontsize=13)
    tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set(yscale="log", xlabel="tokens N", ylabel="rms entry")
    axis.set_title(f"entries, d = {D}\nno scaling (dashed), the paper's way (solid)", fontsize=16)


def draw_ones(axis: Any, rows: list[OnesRow]) -> None:
    """Draw the output's wrong scale in fp16 against N: what the rounded ones column predicts, and what was measured."""
    high = max(row.num_tokens for row in rows)
    rows = [row for row in rows if row.num_tokens >= high / 16]  # before, next to nothing happens
    low = min(row.num_tokens for row in rows)
    grid = [round(low * (high / low) ** (step / 600)) for step in range(601)]
    for index, D in enumerate(sorted({row.head_dim for row in rows})):
        columns = [numerics.ones_column(N, D) for N in grid]
        predicted = [100 * (exact / held - 1) if held else math.nan for exact, held in columns]
        axis.plot(grid, predicted, color=f"C{index}", linewidth=1)
        own = [row for row in rows if row.head_dim == D and row.num_entries]
        done = {row.num_tokens: 100 * row.measured for row in own if row.measured is not None}
        axis.plot(list(done), list(done.values()), "o", color=f"C{index}", label=f"d = {D}")
        lost = [row.num_tokens for row in own if row.measured is None]
        axis.plot(lost, [0] * len(lost), "X", color=f"C{index}", markersize=14, label=f"d = {D}: Inf, NaN" if lost else None)
    tokens_axis(axis, [row.num_tokens for row in rows])
    axis.set(ylim=(-60, 60), xlabel="tokens N", ylabel="change of the output's scale [%]")
    axis.set_title("fp16, the paper's ones column\nrounding predicts (lines), measured (dots)", fontsize=16)


def draw_normalisation(axes: Any, rows: list[NormalisationRow]) -> None:
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
            axis.axhline(numerics.FP16_LARGEST, color="black", linestyle=":", label="largest fp16 number")
        tokens_axis(axis, [row.num_tokens for row in rows])
        axis.set(yscale="log", xlabel="tokens N", ylabel=label)
        axis.set_title(f"{title}, d = {rows[0].head_dim if rows else 0}", fontsize=16)


def main() -> int:
    """Command line -> rows -> files and tables."""
    options = build_parser().parse_args()
    check_options(options)
    results = measure(options)
    write(results, options)
    print(f"\n{markdown(results)}\n{options.out / 'numerics.json'}")
    return 0


if __name__ == "__main__":
    run_program(main)
