"""Matrix products at an odd vocabulary against the next multiple of 64: what padding is worth.

    python benchmarks/products.py [--device cuda] [--vocabulary 50257] [--width 768]
    [--rows 512 1024 2048 4096] [--rounds 20] [--save]

The three products of a head, as `pipeline/distillation/head.py` does them, on some rows: logits
(rows x width by width x vocabulary), the gradient of the hidden states, and that of the weight.
Both widths take turns; TFLOP/s count the columns that are asked for, so the padded ones bear what
padding adds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from distillation_head import MULTIPLE, ratio, seconds
from results import attempt, save_result
from torch import Tensor


def calls_of(rows: int, columns: int, width: int, device: torch.device) -> dict[str, Any]:
    """Return the three products by name."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    there: Callable[..., Tensor] = lambda *size: torch.randn(*size, generator=draw).to(
        device, dtype
    )
    hidden, weight, tile = there(rows, width), there(columns, width), there(rows, columns)
    return {
        "logits": lambda: hidden @ weight.T,
        "hidden gradient": lambda: tile @ weight,
        "weight gradient": lambda: tile.T @ hidden,
    }


def measure(
    rows: int, vocabulary: int, width: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Return by product both widths' seconds and TFLOP/s, and the odd one's time over the even."""
    padded = vocabulary + -vocabulary % MULTIPLE
    both = {columns: calls_of(rows, columns, width, device) for columns in (vocabulary, padded)}
    found = dict[str, Any]()
    flops = 2.0 * rows * vocabulary * width
    for name in both[vocabulary]:
        times: dict[int, list[float]] = {columns: [] for columns in both}
        for number in range(-3, rounds):  # three to choose kernels
            for columns in sorted(both, reverse=bool(number % 2)):
                taken = seconds(both[columns][name], device)
                if number >= 0:
                    times[columns].append(taken)
        medians = {columns: statistics.median(each) for columns, each in times.items()}
        found[name] = {
            "median_s": medians,
            "tflops": {columns: flops / each / 1e12 for columns, each in medians.items()},
            "odd_over_even": ratio(times[vocabulary], times[padded]),
        }
    return found


def line(rows: int, name: str, each: dict[str, Any]) -> str:
    """Return a product's figures in a line."""
    over, rates = each["odd_over_even"], each["tflops"]
    told = ", ".join(f"{columns}: {rate:.2f} TFLOP/s" for columns, rate in rates.items())
    interval = f"{over['ratio']:.2f} [{over['low']:.2f}, {over['high']:.2f}]"
    return f"{rows:6} rows, {name:16} {told}; odd over even {interval}"


def main() -> None:
    """Measure, print, and save after each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device, figures, lines = torch.device(args.device), dict[str, Any](), list[str]()
    for rows in args.rows:
        call = partial(measure, rows, args.vocabulary, args.width, device, args.rounds)
        found, why = attempt(call)
        figures[str(rows)] = {"not_here": why} if found is None else found
        some = {} if found is None else found
        told = [line(rows, name, each) for name, each in some.items()] or [f"{rows} rows: {why}"]
        print("\n".join(told), flush=True)
        lines += told
        if args.save:
            save_result("products", figures, "\n".join(lines))
    if any("not_here" in each for each in figures.values()):
        sys.exit("some were not measured")


if __name__ == "__main__":
    main()
