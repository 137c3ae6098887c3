"""A training step of packed documents: told where they begin, against a dense mask, in turns.

    python benchmarks/attention.py [--rounds 5] [--steps 2] [--save]

Both arms are this project's own step on the same batches: forward pass, fused head, backward pass.
What differs is what the attention is told: `lengths`, or the (B, 1, T, T) `mask` that transformers'
models take. One round takes each arm in turn; the ratio is taken round by round. Memory is the
highest the process held in a step above what it held before, each arm in a process of its own. The
losses of both arms are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import save_result
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.settings.precision import Precision
from pipeline.data.batches import PackedBatches
from pipeline.data.encode import Encoded
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective
from pipeline.training.reading import Apart, Examined, examine

LENGTHS = (512, 1024)
TOKENS = 4096  # of a micro-batch
DOCUMENT = 200  # tokens of a document in the mean, as texts of a few paragraphs have
SHARE = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ARMS = ("lengths", "mask")


@dataclass(frozen=True)
class Step:
    """One arm's step.

    Attributes:
        objective: Its forward pass, under a clock that nobody reads.
        batch: Of CPU tensors.
    """

    objective: Objective
    batch: dict[str, torch.Tensor]

    def __call__(self) -> float:
        loss = self.objective(self.batch).loss
        loss.backward()
        self.objective.model.zero_grad(set_to_none=True)
        return float(loss.detach())


def step_of(arm: str, length: int, precision: Precision) -> Step:
    """Return an arm's step: a model of 4 layers of 256, 4,096 tokens a batch."""
    torch.manual_seed(0)
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
    model = LlamaForCausalLM(config).train()
    device = torch.device("cpu")
    read = examine(model, device) if arm == "lengths" else Examined(apart=Apart.mask)
    assert read.apart.value == arm
    draw = np.random.default_rng(0)
    sizes = np.clip(draw.exponential(DOCUMENT, 4 * TOKENS // DOCUMENT).astype(int), 8, length)
    documents = [
        Encoded(
            draw.integers(0, config.vocab_size, size).astype(np.int32),
            np.arange(size) > 0,
            0,
            None,
            str(at),
        )
        for at, size in enumerate(sizes)
    ]
    batches = PackedBatches(documents, sequence_length=length, batch_size=TOKENS // length, seed=0)
    objective = Objective(model, Task.causal_lm, precision, device, PhaseClock(), read=read)
    return Step(objective, batches.batch(0))


def seconds(step: Step, steps: int) -> float:
    """Return the wall seconds of some steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def peak_bytes(arm: str, length: int, precision: Precision) -> int:
    """Return the most that this process holds in a step above what it held before; Linux."""
    step = step_of(arm, length, precision)
    step()  # buffers that stay: gradients are freed, kernels are chosen
    clear, status = SHARE
    clear.write_text("5")  # the highest resident size is counted anew
    held = _resident(status, "VmRSS")
    step()
    return _resident(status, "VmHWM") - held


def _resident(status: Path, name: str) -> int:
    line = next(each for each in status.read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024


def compared(length: int, precision: Precision, rounds: int, steps: int) -> dict[str, Any]:
    """Measure both arms at one length; return their figures."""
    both = {arm: step_of(arm, length, precision) for arm in ARMS}
    losses = {arm: step() for arm, step in both.items()}
    assert abs(losses["lengths"] - losses["mask"]) < 1e-2, losses
    readings: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        # who comes first alternates: what the first leaves in the caches meets both alike
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            readings[arm].append(seconds(both[arm], steps) / steps)
    ratios = sorted(
        slow / quick for quick, slow in zip(readings["lengths"], readings["mask"], strict=True)
    )
    memory = {arm: _in_a_process_of_its_own(arm, length, precision) for arm in ARMS}
    return {
        "length": length,
        "precision": precision.value,
        "documents": int((both["mask"].batch["position_ids"] == 0).sum()),
        "loss": losses,
        "seconds": {arm: statistics.median(values) for arm, values in readings.items()},
        "mask_over_lengths": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
        "peak_bytes": memory,
        "n": rounds,
    }


def _in_a_process_of_its_own(arm: str, length: int, precision: Precision) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--peak", arm, str(length), precision.value],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("ARM", "LENGTH", "PRECISION"))
    given = parser.parse_args()
    if given.peak:
        arm, length, precision = given.peak
        print(json.dumps(peak_bytes(arm, int(length), Precision(precision))))
        return
    figures, lines = list[dict[str, Any]](), list[str]()
    for precision in (Precision.fp32, Precision.bf16):
        for length in LENGTHS:
            found = compared(length, precision, given.rounds, given.steps)
            figures.append(found)
            held = {arm: size / 2**20 for arm, size in found["peak_bytes"].items()}
            line = (
                f"{precision.value} T={length}: a step takes {found['seconds']['lengths']:.3f} s by"
                f" lengths, {found['seconds']['mask']:.3f} s under a mask:"
                f" {found['mask_over_lengths']:.2f}x ({found['range'][0]:.2f} to"
                f" {found['range'][1]:.2f}, n={found['n']}); memory of a step"
                f" {held['lengths']:.0f} against {held['mask']:.0f} MiB"
            )
            print(line)
            lines.append(line)
    if given.save:
        save_result("attention", {"arms": figures}, "\n".join(lines))


if __name__ == "__main__":
    main()
