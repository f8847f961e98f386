"""Time whole models against one another: the same network with different attentions, over image sizes.

    python tools/bench_model.py --img_size 224 384 512 1024 --pass inference training
    python tools/bench_model.py --model taylorvit_tiny_patch16_224 --attention taylorshift softmax --batch_size 8

`inference` is the forward pass without gradients, `training` the forward pass, the loss and the backward pass; the optimizer's
step, the same for all, is not in it. All candidates run in one process in interleaved rounds on rotating random images; the
ratio is the median of the ratios within the rounds, above 1 where the candidate is faster than the last attention named.
Before TaylorShift is timed, its logits are compared with those of the plain PyTorch reference with the same weights.

Writes model.json into --out and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from taylorvit.attention import ATTENTIONS
from taylorvit.benchmark.timing import compare
from taylorvit.cli import positive_float, positive_int, run_program
from taylorvit.config import ModelConfig
from taylorvit.models import MODEL_NAMES, TaylorViT, attention_forms, build_model
from taylorvit.provenance import provenance
from taylorvit.run_folder import replace_file

PASSES = ("inference", "training")
MAX_LOGIT_ERROR = 1e-4  # of the largest logit; both are fp32 and a dozen layers deep


@dataclasses.dataclass
class Row:
    """One model at one image size, forward or forward and backward; times are of one batch."""

    attention: str
    img_size: int
    num_tokens: int
    form: str
    pass_name: str
    batch_size: int
    seconds: float
    seconds_low: float
    seconds_high: float
    images_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    rounds: int


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default="taylorvit_small_patch16_224",
        choices=MODEL_NAMES,
        metavar="NAME",
        help=f"one of {', '.join(MODEL_NAMES)}",
    )
    add("--attention", nargs="+", default=["taylorshift", "softmax"], choices=ATTENTIONS, help="the last one is the baseline")
    add("--img_size", type=positive_int, nargs="+", default=[224])
    add("--num_heads", type=positive_int, help="default: the model's")
    add("--batch_size", type=positive_int, default=1)
    add("--pass", dest="passes", choices=PASSES, nargs="+", default=["inference"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive_int, help="of PyTorch (default: its own choice)")
    add("--seconds", type=positive_float, default=5.0, help="time for each candidate in each case (default: %(default)s)")
    add("--min_rounds", type=positive_int, default=5, help="at least, whatever they take (default: %(default)s)")
    add("--out", type=Path, default=Path("results/model"), metavar="FOLDER", help="an earlier run's result is replaced")
    return parser


def model_config(attention: str, img_size: int, options: argparse.Namespace) -> ModelConfig:
    """Return the configuration of the model with this attention."""
    return ModelConfig(name=options.model, attention=attention, img_size=img_size, num_heads=options.num_heads)


def build_candidate(attention: str, img_size: int, options: argparse.Namespace) -> TaylorViT:
    """Return the model with this attention and seeded weights, the same for every attention where the names are."""
    torch.manual_seed(0)
    model = build_model(model_config(attention, img_size, options))
    assert isinstance(model, TaylorViT)
    return model.to(options.device)


def logit_error(model: TaylorViT, images: Tensor, options: argparse.Namespace) -> float:
    """Return the largest difference from the plain PyTorch reference, relative to the largest logit."""
    config = model_config("taylorshift", images.shape[-1], options)
    config.attention_options = {"impl": "reference"}
    plain = build_model(config).to(options.device)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = model.eval()(images), plain.eval()(images)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def infer(model: TaylorViT, images: Tensor, labels: Tensor) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        return model(images)


def train(model: TaylorViT, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss, with the gradients in the parameters."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def measure(img_size: int, pass_name: str, options: argparse.Namespace) -> list[Row]:
    """Return a row for each attention.

    Raises:
        RuntimeError: TaylorShift's logits are not the reference's.
    """
    training = pass_name == "training"

    def make_inputs(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(options.device).manual_seed(seed)
        shape = (options.batch_size, 3, img_size, img_size)
        images = torch.randn(shape, generator=generator, device=options.device)
        return images, torch.zeros(options.batch_size, dtype=torch.long, device=options.device)

    models = {name: build_candidate(name, img_size, options) for name in options.attention}
    if "taylorshift" in models:
        error = logit_error(models["taylorshift"], make_inputs(0)[0][:1], options)
        if not error <= MAX_LOGIT_ERROR:
            raise RuntimeError(f"taylorshift's logits are {error:.1e} off the reference's at {img_size} pixels")
    run = train if training else infer
    calls = {name: partial(run, model.train(training)) for name, model in models.items()}
    comparison = compare(calls, make_inputs, seconds=options.seconds, min_rounds=options.min_rounds, num_input_sets=4)
    rows = []
    for name, model in models.items():
        seconds, speedup = comparison.seconds(name), comparison.speedup(name, over=options.attention[-1])
        num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        form = "+".join(dict.fromkeys(attention_forms(model, training=training)))
        times = (seconds.median, seconds.low, seconds.high, options.batch_size / seconds.median)
        ratio = (speedup.median, speedup.low, speedup.high)
        rows.append(Row(name, img_size, num_tokens, form, pass_name, options.batch_size, *times, *ratio, comparison.num_rounds))
    return rows


def markdown_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| pixels | tokens | pass | attention | form | batch | time of a batch | images/s | x baseline | 10 - 90 % |",
        "|---:|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.img_size} | {row.num_tokens} | {row.pass_name} | {row.attention} | {row.form} | {row.batch_size} "
            f"| {row.seconds:.4g} s | {row.images_per_second:.4g} | {row.speedup:.2f} "
            f"| {row.speedup_low:.2f} - {row.speedup_high:.2f} |"
        )
    return "\n".join(lines)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what argparse lets through; build every model on the meta device, which costs nothing."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    for img_size in options.img_size:
        for attention in options.attention:
            build_model(model_config(attention, img_size, options), device="meta")


def main() -> int:
    """Command line -> rows -> file and table."""
    options = build_parser().parse_args()
    check_options(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"provenance": provenance(), "model": options.model, "seconds": options.seconds}
    rows: list[Row] = []
    for pass_name in dict.fromkeys(options.passes):
        for img_size in dict.fromkeys(options.img_size):
            new = measure(img_size, pass_name, options)
            print(markdown_table(new), flush=True)
            rows += new
            content = {**header, "rows": [dataclasses.asdict(row) for row in rows]}
            replace_file(options.out / "model.json", json.dumps(content, indent=1) + "\n")
    print(f"\n{markdown_table(rows)}\n{options.out / 'model.json'}")
    return 0


if __name__ == "__main__":
    run_program(main)
