"""Generate images with causal attention as a recurrent network: train small pixel models, draw from them, time their steps.

    python tools/generate.py train --attention taylorshift linear softmax
    python tools/generate.py sample --attention taylorshift --complete
    python tools/generate.py bench

`train` trains one model for each attention, alike in everything else, on the grey pixels of small images, and writes bits per
pixel on the held-out ones (generation_train.json, .csv, .md); the same command continues a training that was stopped. The
models lie in OUT/ATTENTION/checkpoints. `sample` draws a grid of images with a trained model, one pixel at a time by the
recurrent form, or completes the upper halves of held-out images, and writes a PNG. `bench` times one more token of one layer
over the number of tokens before it, and counts the state, for softmax with and without a cache, linear attention, and
TaylorShift (generation_cost.json, .csv, .md, .png). Needs matplotlib (requirements-dev.txt) for `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from taylorvit.attention.causal import CAUSAL_ATTENTIONS
from taylorvit.cli import need_matplotlib, positive_float, positive_int, run_program, thread_count
from taylorvit.models.pixels import PixelModel, sample
from taylorvit.provenance import provenance
from taylorvit.studies.generation import (
    Pixels,
    Settings,
    check_settings,
    draw_grid,
    held_out_bits,
    independent_bits,
    load_pixel_model,
    load_pixels,
    sampling_generator,
    train_pixel_model,
)
from taylorvit.studies.generation_cost import cost_table, draw_costs, measure_position
from taylorvit.studies.results import make_folder, markdown_table, write_results

DEFAULT = Settings()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    add_train_options(parts.add_parser("train", help="train pixel models"))
    add_sample_options(parts.add_parser("sample", help="draw images"))
    add_bench_options(parts.add_parser("bench", help="time the steps"))
    for part in parts.choices.values():
        part.add_argument("--out", type=Path, default=Path("results/generation"), help="folder (default: %(default)s)")
        part.add_argument("--threads", type=thread_count, help="of PyTorch (default: its own choice)")
    return parser


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of `Settings`."""
    parser.add_argument("--attention", choices=CAUSAL_ATTENTIONS, nargs="+", default=list(CAUSAL_ATTENTIONS))
    for item in dataclasses.fields(Settings):
        default = getattr(DEFAULT, item.name)
        if item.name == "seed":
            parser.add_argument("--seed", type=int, default=default, help="(default: %(default)s)")
        elif item.name != "attention":
            kind: Any = {int: positive_int, float: positive_float, str: str}[type(default)]
            parser.add_argument(f"--{item.name}", type=kind, default=default, help="(default: %(default)s)")
    parser.add_argument("--save_every", type=positive_int, default=100, metavar="STEPS", help="(default: %(default)s)")


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sample`."""
    parser.add_argument("--attention", choices=CAUSAL_ATTENTIONS, default="taylorshift", help="which of the trained models")
    parser.add_argument("--num_images", type=positive_int, default=40, help="(default: %(default)s)")
    parser.add_argument("--columns", type=positive_int, default=10, help="of the grid (default: %(default)s)")
    parser.add_argument("--temperature", type=positive_float, default=1.0, help="of the draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--complete", action="store_true", help="upper halves of held-out images, which are shown first")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument("--num_tokens", type=positive_int, nargs="+", default=[64, 256, 1024, 4096], metavar="N")
    parser.add_argument("--head_dim", type=positive_int, nargs="+", default=[8, 16, 32], metavar="D", help="of TaylorShift")
    parser.add_argument("--embed_dim", type=positive_int, default=256, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="sequences (default: %(default)s)")
    parser.add_argument("--seconds", type=positive_float, default=0.5, help="for each candidate (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")


def run_train(options: argparse.Namespace) -> None:
    """Train each attention's model, and compare their bits per pixel."""
    names = [item.name for item in dataclasses.fields(Settings) if item.name != "attention"]
    runs = [
        Settings(attention=name, **{key: getattr(options, key) for key in names}) for name in dict.fromkeys(options.attention)
    ]
    for settings in runs:
        check_settings(settings)
    splits = (runs[0].train_split, runs[0].val_split)
    train, held_out = (load_pixels(runs[0].dataset, runs[0].root, split) for split in splits)
    rows: list[dict[str, Any]] = [
        {"model": "each pixel on its own", "bits_per_pixel": independent_bits(train.levels, held_out.levels, len(train.grey))}
    ]
    for settings in runs:
        start = time.perf_counter()
        model = train_pixel_model(settings, train, options.out / settings.attention, save_every=options.save_every)
        seconds = time.perf_counter() - start
        bits = held_out_bits(model, held_out.levels)
        count = sum(parameter.numel() for parameter in model.parameters())
        rows.append({"model": settings.attention, "bits_per_pixel": bits, "parameters": count, "seconds": seconds})
    write(options, "generation_train", rows, train_table(rows, runs[0], train, held_out))


def train_table(rows: list[dict[str, Any]], settings: Settings, train: Pixels, held_out: Pixels) -> str:
    """Return the bits per pixel of each model."""
    title = (
        f"{settings.dataset}: {len(train.levels)} images to train, {len(held_out.levels)} held out, {len(train.grey)} levels; "
        f"{settings.num_steps} steps of {settings.batch_size} images"
    )
    lines = [[row["model"], f"{row['bits_per_pixel']:.3f}", f"{row.get('parameters', 0):,}"] for row in rows]
    return f"{title}:\n\n{markdown_table(['model', 'bits per pixel, held out', 'parameters'], lines)}"


def run_sample(options: argparse.Namespace) -> None:
    """Draw a grid of images."""
    model, settings, pixels = load_pixel_model(options.out / options.attention)
    num_pixels = model.num_pixels
    given = torch.empty(options.num_images, 0, dtype=torch.int64)
    shown, stem = [], f"samples_{options.attention}"
    if options.complete:
        held_out = load_pixels(settings.dataset, settings.root, settings.val_split).levels
        columns = min(options.columns, len(held_out))
        originals = held_out[torch.arange(columns) * len(held_out) // columns]  # sets may be sorted by class
        lines = max(1, options.num_images // len(originals))
        height = num_pixels // pixels.width
        given = originals[:, : height // 2 * pixels.width].repeat(lines, 1)
        shown, stem = [originals], f"completions_{options.attention}"
        options.columns = len(originals)
    start = time.perf_counter()
    drawn = sample(model, given, temperature=options.temperature, generator=sampling_generator(options.seed))
    seconds = time.perf_counter() - start
    path = options.out / f"{stem}.png"
    draw_grid(torch.cat([*shown, drawn]), pixels, path, columns=options.columns)
    check_drawn(model, drawn)
    print(f"{path}: {len(drawn)} images in {seconds:.2f} s")


def check_drawn(model: PixelModel, drawn: torch.Tensor) -> None:
    """Print how far the recurrent logits that the images were drawn by are from the parallel ones, for the first image."""
    with torch.no_grad():
        parallel = model(drawn[:1])
        logits, state = model.prefill(drawn[:1, :0])
        error = (logits - parallel[:, 0]).abs().max()
        for place in range(model.num_pixels - 1):
            logits = model.step(drawn[:1, place], state)
            error = torch.maximum(error, (logits - parallel[:, place + 1]).abs().max())
    print(f"largest difference of recurrent and parallel logits: {error:.1e}")


def run_bench(options: argparse.Namespace) -> None:
    """Time every candidate at every position."""
    need_matplotlib()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here")
    rows = []
    for position in sorted(set(options.num_tokens)):
        print(f"{position} tokens", flush=True)
        rows += measure_position(
            position,
            embed_dim=options.embed_dim,
            batch_size=options.batch_size,
            head_dims=list(dict.fromkeys(options.head_dim)),
            seconds=options.seconds,
            device=options.device,
        )
    picture = options.out / "generation_cost.png"
    draw_costs(rows, picture)
    markdown = f"{cost_table(rows)}\n\n![]({picture.name})"
    write(options, "generation_cost", [dataclasses.asdict(row) for row in rows], markdown)


PARTS = {"train": run_train, "sample": run_sample, "bench": run_bench}


def write(options: argparse.Namespace, stem: str, rows: list[dict[str, Any]], markdown: str) -> None:
    """Write the three files, and print the tables."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    header = {"provenance": provenance(), "settings": settings}
    command = header["provenance"]["command"]
    write_results(options.out, stem, header, rows, f"`{command}`\n\n{markdown}")
    print(f"\n{markdown}\n\n{options.out / stem}.md", flush=True)


def main() -> int:
    """Command line -> one part -> its files."""
    options = build_parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    make_folder(options.out)
    PARTS[options.part](options)
    return 0


if __name__ == "__main__":
    run_program(main)
