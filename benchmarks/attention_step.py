"""A training step by what keeps documents apart, eager and compiled, and what a new shape costs.

    python benchmarks/attention_step.py [--device cuda] [--shape 124m] [--rounds 20] [--save]

This project's own step (forward pass, fused head, backward pass) in bf16 on a CUDA device, fp32 on
a CPU. Told what to attend to by a dense (B, 1, T, T) `mask` or by `lengths`, both on the same
packed documents of a few hundred tokens; `causal` reads one document a row, which needs neither.
Arms take turns. `new_shape` is the first step at another length, eager and compiled, with the one
after it: the difference is what kernels and compilers do once for each shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from distillation_head import ratio, seconds
from precision import SHAPES, Shape
from results import attempt, save_result

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches
from pipeline.data.encode import Encoded
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.compiling import as_compiled, graphs_so_far
from pipeline.training.objective import Objective
from pipeline.training.reading import Apart, Examined, examine

DOCUMENT = 200  # tokens in the mean, where packed
# of the whole length: 64 beyond a multiple of 128 is where masked kernels were reported wrong
PARTS = (1.0, 0.5, 0.5625)
ARMS = tuple(
    (apart, compiled) for compiled in (False, True) for apart in ("lengths", "causal", "mask")
)


class Step:
    """One arm: a model of its own and its step."""

    def __init__(self, shape: Shape, device: torch.device, apart: str, kept: ExitStack | None):
        """Make it; where `kept` is given it runs compiled until that closes."""
        self._shape, self._packed = shape, apart != "causal"
        self.model = shape.model(device)
        cuda = device.type == "cuda"
        read = Examined(apart=Apart.mask) if apart == "mask" else examine(self.model, device)
        assert apart == "mask" or read.apart is Apart.lengths, read.apart
        self._objective = Objective(
            self.model,
            Task.causal_lm,
            Precision.bf16 if cuda else Precision.fp32,
            device,
            PhaseClock(),
            read=read,
        )
        if kept is not None:
            kept.enter_context(as_compiled(self._objective, TrainingConfig()))
        self._batches = dict[int, dict[str, torch.Tensor]]()
        self.loss = 0.0

    def batch(self, length: int) -> dict[str, torch.Tensor]:
        """Return the batch of rows of this length, the same for all arms that pack."""
        if length not in self._batches:
            self._batches[length] = batch_of(self._shape, length, packed=self._packed)
        return self._batches[length]

    def __call__(self, length: int) -> None:
        loss = self._objective(self.batch(length)).loss
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        self.loss = float(loss.detach())


def batch_of(shape: Shape, length: int, *, packed: bool) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens: documents of many sizes, or one a row."""
    draw, tokens = np.random.default_rng(0), shape.batch * length
    mean = min(DOCUMENT, length // 3)
    sizes = np.full(shape.batch, length)
    if packed:
        sizes = np.clip(draw.exponential(mean, 4 * tokens // mean).astype(int), 8, length)
    ids = [draw.integers(0, shape.config.vocab_size, size).astype(np.int32) for size in sizes]
    documents = [
        Encoded(each, np.arange(len(each)) > 0, 0, None, str(at)) for at, each in enumerate(ids)
    ]
    batches = PackedBatches(documents, sequence_length=length, batch_size=shape.batch, seed=0)
    return batches.batch(0)


def first_calls(step: Step, length: int, device: torch.device) -> list[dict[str, Any]]:
    """Return for each length the seconds of the first step and of the next."""
    found = list[dict[str, Any]]()
    for part in PARTS:
        rows, before = int(part * length), graphs_so_far()[0]
        step.batch(rows)  # made beforehand
        first, second = (seconds(partial(step, rows), device) for _ in range(2))
        told = {"length": rows, "first_s": first, "second_s": second}
        found.append({**told, "graphs": graphs_so_far()[0] - before, "loss": step.loss})
    return found


def measure(shape: Shape, device: torch.device, rounds: int, keep: Any) -> dict[str, Any]:
    """Return the figures of all arms; `keep` is given what there is as it comes."""
    found: dict[str, Any] = {"not_here": {}, "new_shape": {}, "seconds": {}, "median_s": {}}
    with ExitStack() as kept:
        steps = dict[str, Step]()
        for apart, compiled in ARMS:
            name = f"{apart}, {'compiled' if compiled else 'eager'}"
            made, why = attempt(
                partial(_begun, shape, device, apart, kept if compiled else None, found, name)
            )
            if made is None:
                found["not_here"][name] = why
            else:
                steps[name] = made
            keep(found)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds):
            for name in sorted(times, reverse=bool(number % 2)):
                call = partial(seconds, partial(steps[name], shape.length), device)
                taken, why = attempt(call)
                if taken is None:
                    found["not_here"][name] = why
                    del times[name]
                else:
                    times[name].append(taken)
    found["seconds"] = times
    found["median_s"] = {name: statistics.median(each) for name, each in times.items()}
    best = times.get("lengths, compiled")
    found["times_lengths_compiled"] = {} if best is None else _ratios(times, best)
    keep(found)
    return found


def _begun(
    shape: Shape,
    device: torch.device,
    apart: str,
    kept: ExitStack | None,
    found: dict[str, Any],
    name: str,
) -> Step:
    step = Step(shape, device, apart, kept)
    found["new_shape"][name] = first_calls(step, shape.length, device)
    return step


def _ratios(times: dict[str, list[float]], best: list[float]) -> dict[str, Any]:
    return {name: ratio(each, best) for name, each in times.items()}


def table(name: str, shape: Shape, found: dict[str, Any]) -> str:
    """Return the figures in lines."""
    lines = [f"{name}: {shape.batch} rows of {shape.length} tokens"]
    for arm, median in found["median_s"].items():
        over = found["times_lengths_compiled"].get(arm)
        said = "" if over is None else f", {over['ratio']:.2f}x of lengths, compiled"
        rate = shape.batch * shape.length / median
        lines.append(f"{arm:18} {1e3 * median:9.1f} ms a step, {rate:10,.0f} tokens/s{said}")
    for arm, each in found["new_shape"].items():
        told = "; ".join(
            f"T={at['length']}: {at['first_s']:.2f} s, then {at['second_s']:.3f} s" for at in each
        )
        lines.append(f"{arm:18} first step at {told}")
    return "\n".join([*lines, *(f"{arm}: not here: {why}" for arm, why in _absent(found))])


def _absent(found: dict[str, Any]) -> list[tuple[str, str]]:
    return list(found["not_here"].items())


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = args.shape or ("124m" if device.type == "cuda" else "small")

    def keep(found: dict[str, Any]) -> None:
        if args.save:
            save_result("attention_step", found, table(name, SHAPES[name], found))

    found = measure(SHAPES[name], device, args.rounds, keep)
    print(table(name, SHAPES[name], found))
    if found["not_here"]:
        sys.exit("an arm was not measured")


if __name__ == "__main__":
    main()
