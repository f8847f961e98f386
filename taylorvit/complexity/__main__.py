"""Which form for my width, heads and resolution, what does it cost, and where does it switch? The formulas' answer as a table.

python -m taylorvit.complexity --embed_dim 384 --num_heads 6 12 24 --img_size 224 512 1024 --depth 12
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, Literal, get_args

from . import Packing, entries_mhsa, flops_crossover, memory_crossover, ops_mhsa

MOST = 10**9  # of anything that the command line takes: beyond it square roots leave the range of floats


def switch_points(embed_dim: int, num_heads: int) -> dict[str, Any]:
    """Return d, N0 and N1 of every packing, as JSON types."""
    head_dim = embed_dim // num_heads
    packings: tuple[Packing, ...] = get_args(Packing)
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "flops_crossover": {packing: flops_crossover(head_dim, packing) for packing in packings},
        "memory_crossover": {packing: memory_crossover(head_dim, packing) for packing in packings},
    }


def attention_costs(embed_dim: int, num_heads: int, num_tokens: int, depth: int = 1) -> dict[str, Any]:
    """Return what the attention cores of `depth` layers cost in both forms, as JSON types.

    `operations` are of one forward pass through all layers, `entries` the numbers that one layer holds at once: the next layer
    has the same memory. `cheaper` names the form with less of either, direct where they are equal, by packing.
    """
    result: dict[str, Any] = {"num_heads": num_heads, "head_dim": embed_dim // num_heads}
    result |= {"num_tokens": num_tokens, "depth": depth, "operations": {}, "entries": {}, "cheaper": {}}
    for quantity, count, layers in (("operations", ops_mhsa, depth), ("entries", entries_mhsa, 1)):
        direct = layers * count("direct", num_tokens, embed_dim, num_heads)
        efficient = layers * count("efficient", num_tokens, embed_dim, num_heads)
        symmetric = layers * count("efficient", num_tokens, embed_dim, num_heads, "symmetric")
        result[quantity] = {"direct": direct, "efficient": efficient, "efficient_symmetric": symmetric}
        result["cheaper"][quantity] = {
            "none": "efficient" if efficient < direct else "direct",
            "symmetric": "efficient" if symmetric < direct else "direct",
        }
    return result


def build_parser() -> argparse.ArgumentParser:
    """Return the command line, in timm's names."""
    parser = argparse.ArgumentParser(
        description="Which form of TaylorShift attention for which shape, what it costs, and where the cheaper one changes.",
    )
    add = parser.add_argument
    add("--embed_dim", type=_count, default=384, metavar="C", help="width of the model (default: %(default)s)")
    add("--num_heads", type=_count, nargs="+", default=[6], metavar="H", help="divisors of the width (default: 6)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--img_size", type=_count, nargs="+", default=[224], metavar="PIXELS", help="square images (default: 224)"
    )
    size.add_argument("--num_tokens", type=_count, nargs="+", metavar="N", help="instead of images")
    add("--patch_size", type=_count, default=16, metavar="PIXELS", help="default: %(default)s")
    add("--num_prefix_tokens", type=int, default=1, metavar="COUNT", help="class tokens and the like (default: %(default)s)")
    add(
        "--depth", type=_count, default=1, metavar="LAYERS", help="operations of so many layers together (default: %(default)s)"
    )
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Command line -> tables or JSON. What cannot be answered ends with one line and exit code 2."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if fault := _fault(options):
        parser.error(fault)
    images = [(size, (size // options.patch_size) ** 2 + options.num_prefix_tokens) for size in options.img_size]
    shapes = [(None, N) for N in options.num_tokens] if options.num_tokens else images
    heads = list(dict.fromkeys(options.num_heads))
    switches = [switch_points(options.embed_dim, H) for H in heads]
    costs = [{"img_size": size, **attention_costs(options.embed_dim, H, N, options.depth)} for H in heads for size, N in shapes]
    if options.json:
        print(json.dumps({"embed_dim": options.embed_dim, "switch_points": switches, "costs": costs}, indent=2))
    else:
        print("\n".join([*_switch_table(switches), *_cost_table(costs, "operations"), *_cost_table(costs, "entries")]))


def _fault(options: argparse.Namespace) -> str:
    """Say what cannot be answered in the command line, or return nothing."""
    width, patch = options.embed_dim, options.patch_size
    if wrong := [heads for heads in options.num_heads if width % heads]:
        small = [heads for heads in range(1, math.isqrt(width) + 1) if width % heads == 0]
        divisors = sorted({*small, *(width // heads for heads in small)})
        return f"--num_heads {_list(wrong)} does not divide --embed_dim {width}; its divisors are {_list(divisors)}"
    if not 0 <= options.num_prefix_tokens <= MOST:
        return f"--num_prefix_tokens: a whole number from 0 to {MOST:,} is needed, got {options.num_prefix_tokens}"
    uneven = [pixels for pixels in options.img_size if pixels % patch]
    if uneven and not options.num_tokens:
        return f"--img_size {_list(uneven)} is not a multiple of --patch_size {patch}"
    return ""


def _switch_table(switches: list[dict[str, Any]]) -> list[str]:
    packed = get_args(Packing)[1:]
    rows = [["heads", "d", "N0", *packed, "N1", *packed]]
    for switch in switches:
        crossings = [*switch["flops_crossover"].values(), *switch["memory_crossover"].values()]
        shown = [f"{math.floor(N) + 1:,} ({N:.3f})" for N in crossings]
        rows.append([f"{switch['num_heads']}", f"{switch['head_dim']}", *shown])
    return [
        "The efficient form takes fewer operations from N0 tokens on and holds fewer numbers from N1 on; in brackets: exactly.",
        "N0 and N1 are the paper's, with all d^2 products; the columns behind each are those of packed products.",
        "",
        *_align(rows),
    ]


def _cost_table(costs: list[dict[str, Any]], quantity: Literal["operations", "entries"]) -> list[str]:
    """Return the operations or the stored numbers of every shape, with the cheaper form behind either way of packing."""
    rows = [["heads", "d", "pixels", "N", "direct", "efficient", "cheaper", "symmetric", "cheaper"]]
    for cost in costs:
        shape = [f"{cost['num_heads']}", f"{cost['head_dim']}", f"{cost['img_size'] or ''}", f"{cost['num_tokens']:,}"]
        direct, efficient, symmetric = map(_short, cost[quantity].values())
        rows.append(
            [*shape, direct, efficient, cost["cheaper"][quantity]["none"], symmetric, cost["cheaper"][quantity]["symmetric"]]
        )
    depth = costs[0]["depth"]
    titles = {
        "operations": f"Operations of one forward pass through the attention cores of {depth} layer{'s' * (depth > 1)}:",
        "entries": "Numbers that one layer's attention core holds at once, forward:",
    }
    return ["", titles[quantity], "", *_align(rows)]


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _short(count: int) -> str:
    """Write a count with four digits and the unit's letter."""
    for letter, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:#.4g} {letter}"
    return f"{count}"


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to {MOST:,} is needed, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
