"""A training step of packed documents by what its attention is told, in turns.

    python benchmarks/attention.py [--device cpu] [--rounds 5] [--steps 2] [--save]
    python benchmarks/attention.py --ways [--device cuda] [--shape 124m] [--rounds 20] [--save]

All arms are this project's own step (forward pass, fused head, backward pass) on documents of a few
hundred tokens. What differs is what keeps them apart: `lengths`, or the (B, 1, T, T) `mask` that
transformers' models take.

The two are compared on a small model, in fp32 and bf16: time, the ratio taken round by round,
and memory: the highest a process of its own held in a step above what it held before. The losses of
both are compared before anything is timed.

`--ways` takes each eager and compiled, and `causal` beside them, one document a row, which needs
neither; in bf16 on a CUDA device, fp32 on a CPU. `new_shape` is the first step at another length,
with the one after it: the difference is what kernels and compilers do once for each shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import encoded
from distillation_head import ratio, seconds
from precision import SHAPES, Shape
from results import attempt, save_result
from transformers import LlamaConfig

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.compiling import as_compiled, graphs_so_far
from pipeline.training.objective import Objective
from pipeline.training.reading import Apart, Examined, examine

DOCUMENT = 200  # tokens in the mean, as texts of a few paragraphs have
TOKENS = 4096  # of a micro-batch of the small model
LENGTHS = (512, 1024)
BOTH = ("lengths", "mask")
SHARE = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# of the whole length: 64 beyond a multiple of 128 is where masked kernels were reported wrong
PARTS = (1.0, 0.5, 0.5625)
WAYS = tuple(
    (apart, compiled) for compiled in (False, True) for apart in ("lengths", "causal", "mask")
)


class Step:
    """One arm: a model of its own and its step."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        precision: Precision,
        apart: str,
        kept: ExitStack | None = None,
    ) -> None:
        """Make it; where `kept` is given it runs compiled until that closes."""
        self._shape, self._packed = shape, apart != "causal"
        self.model = shape.model(device).train()
        read = Examined(apart=Apart.mask) if apart == "mask" else examine(self.model, device)
        assert apart == "mask" or read.apart is Apart.lengths, read.apart
        self._objective = Objective(
            self.model, Task.causal_lm, precision, device, PhaseClock(), read=read
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
    mean = DOCUMENT if length > 2 * DOCUMENT else length // 3
    sizes = np.full(shape.batch, length)
    if packed:
        sizes = np.clip(draw.exponential(mean, 4 * tokens // mean).astype(int), 8, length)
    documents = encoded([draw.integers(0, shape.config.vocab_size, size) for size in sizes])
    batches = PackedBatches(documents, sequence_length=length, batch_size=shape.batch, seed=0)
    return batches.batch(0)


# -- lengths against a mask ------------------------------------------------------------------------


def shape_of(length: int) -> Shape:
    """Return a model of 4 layers of 256, and 4,096 tokens a batch."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return Shape(config, length, TOKENS // length)


def compared(
    length: int, precision: Precision, device: torch.device, rounds: int, steps: int
) -> dict[str, Any]:
    """Measure both arms at one length; return their figures."""
    both = {arm: Step(shape_of(length), device, precision, arm) for arm in BOTH}
    for step in both.values():
        step(length)
    losses = {arm: step.loss for arm, step in both.items()}
    assert abs(losses["lengths"] - losses["mask"]) < 1e-2, losses
    readings: dict[str, list[float]] = {arm: [] for arm in BOTH}
    for number in range(rounds):
        # who comes first alternates: what the first leaves in the caches meets both alike
        for arm in BOTH if number % 2 == 0 else BOTH[::-1]:
            taken = seconds(partial(_times, both[arm], length, steps), device)
            readings[arm].append(taken / steps)
    ratios = sorted(
        slow / quick for quick, slow in zip(readings["lengths"], readings["mask"], strict=True)
    )
    return {
        "length": length,
        "precision": precision.value,
        "documents": int((both["mask"].batch(length)["position_ids"] == 0).sum()),
        "loss": losses,
        "seconds": {arm: statistics.median(values) for arm, values in readings.items()},
        "mask_over_lengths": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
        "peak_bytes": {arm: _peak_elsewhere(arm, length, precision, device) for arm in BOTH},
        "n": rounds,
    }


def _times(step: Step, length: int, steps: int) -> None:
    for _ in range(steps):
        step(length)


def peak_bytes(arm: str, length: int, precision: Precision, device: torch.device) -> int:
    """Return the most that this process holds in a step above what it held before: of a GPU's
    memory, else of the host's, as Linux tells it.
    """
    step = Step(shape_of(length), device, precision, arm)
    step(length)  # buffers that stay: gradients are freed, kernels are chosen
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step(length)
        return torch.cuda.max_memory_allocated() - held
    clear, status = SHARE
    clear.write_text("5")  # the highest resident size is counted anew
    held = _resident(status, "VmRSS")
    step(length)
    return _resident(status, "VmHWM") - held


def _resident(status: Path, name: str) -> int:
    line = next(each for each in status.read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024


def _peak_elsewhere(arm: str, length: int, precision: Precision, device: torch.device) -> int:
    words = ["--device", device.type, "--peak", arm, str(length), precision.value]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=True
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def in_words(found: dict[str, Any]) -> str:
    """Return the figures of one length in a line."""
    held = {arm: size / 2**20 for arm, size in found["peak_bytes"].items()}
    return (
        f"{found['precision']} T={found['length']}: a step takes"
        f" {found['seconds']['lengths']:.3f} s by lengths, {found['seconds']['mask']:.3f} s under a"
        f" mask: {found['mask_over_lengths']:.2f}x ({found['range'][0]:.2f} to"
        f" {found['range'][1]:.2f}, n={found['n']}); memory of a step"
        f" {held['lengths']:.0f} against {held['mask']:.0f} MiB"
    )


def against_mask(args: argparse.Namespace, device: torch.device) -> None:
    """Measure both arms at all lengths, print and save."""
    figures, lines = list[dict[str, Any]](), list[str]()
    for precision in (Precision.fp32, Precision.bf16):
        for length in LENGTHS:
            figures.append(compared(length, precision, device, args.rounds, args.steps))
            lines.append(in_words(figures[-1]))
            print(lines[-1], flush=True)
    if args.save:
        save_result("attention", {"arms": figures}, "\n".join(lines))


# -- all ways, eager and compiled ------------------------------------------------------------------


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
        for apart, compiled in WAYS:
            name = f"{apart}, {'compiled' if compiled else 'eager'}"
            given = kept if compiled else None
            made, why = attempt(partial(_begun, shape, device, apart, given, found, name))
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
    precision = Precision.bf16 if device.type == "cuda" else Precision.fp32
    step = Step(shape, device, precision, apart, kept)
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
    absent: dict[str, str] = found["not_here"]
    return "\n".join([*lines, *(f"{arm}: not here: {why}" for arm, why in absent.items())])


def all_ways(args: argparse.Namespace, device: torch.device) -> None:
    """Measure all arms at one shape, print and save."""
    name = args.shape or ("124m" if device.type == "cuda" else "small")

    def keep(found: dict[str, Any]) -> None:
        if args.save:
            said = table(name, SHAPES[name], found)
            save_result("attention", {"ways": found}, said, part="ways")

    found = measure(SHAPES[name], device, args.rounds, keep)
    print(table(name, SHAPES[name], found))
    if found["not_here"]:
        sys.exit("an arm was not measured")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", action="store_true", help="eager and compiled, and one a row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="default: 5; of the ways 20")
    parser.add_argument("--steps", type=int, default=2, help="of a round; of the ways 1")
    parser.add_argument("--shape", choices=SHAPES, help="of the ways")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.peak:
        arm, length, precision = args.peak
        print(json.dumps(peak_bytes(arm, int(length), Precision(precision), device)))
        return
    args.rounds = args.rounds or (20 if args.ways else 5)
    (all_ways if args.ways else against_mask)(args, device)


if __name__ == "__main__":
    main()
