"""A training step, eager and compiled: this project's against a plain loop, in turns.

    python benchmarks/compiled_step.py [--rounds 7] [--steps 3] [--precision fp32 bf16] [--save]

Four arms, one model (4 layers of 256, a vocabulary of 4,096) and one batch (16 x 128 tokens, a
document a row, so that the plain loop reads the same): transformers' own forward pass with its
loss, and this project's objective with its fused head, each as it is and compiled. All take the
same AdamW. A fifth pair packs documents, which the plain loop cannot. The first step, which
compiles, is timed apart. Ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from results import save_result
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches
from pipeline.data.encode import Encoded
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.compiling import as_compiled, graphs_so_far
from pipeline.training.objective import Objective
from pipeline.training.precision import arithmetic
from pipeline.training.reading import examine

ROWS, LENGTH, VOCABULARY = 16, 128, 4096
CPU = torch.device("cpu")
ARMS = {
    "plain": (False, False, False),
    "plain, compiled": (False, True, False),
    "ours": (True, False, False),
    "ours, compiled": (True, True, False),
    "ours, packed": (True, False, True),
    "ours, packed, compiled": (True, True, True),
}
"""By name: ours or plain, compiled, packed."""
PAIRS = (
    ("plain", "plain, compiled"),
    ("plain", "ours, compiled"),
    ("ours", "ours, compiled"),
    ("ours, packed", "ours, packed, compiled"),
    ("plain", "ours"),
    ("plain, compiled", "ours, compiled"),
)


def model_of() -> LlamaForCausalLM:
    """Return a model with random weights in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def batch_of(*, packed: bool) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens: a document a row, or about four."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(8, 64, 4 * ROWS * LENGTH // 36) if packed else np.full(ROWS, LENGTH)
    documents = [
        Encoded(
            draw.integers(0, VOCABULARY, size).astype(np.int32),
            np.arange(size) > 0,
            0,
            None,
            str(at),
        )
        for at, size in enumerate(sizes)
    ]
    return PackedBatches(documents, sequence_length=LENGTH, batch_size=ROWS, seed=0).batch(0)


def step_of(
    precision: Precision, kept: ExitStack, *, ours: bool, compiled: bool, packed: bool
) -> Callable[[], float]:
    """Return one arm's optimizer step, which gives its loss."""
    model, batch = model_of(), batch_of(packed=packed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if ours:
        read = examine(model, CPU)
        objective = Objective(model, Task.causal_lm, precision, CPU, PhaseClock(), read=read)
        if compiled:
            kept.enter_context(as_compiled(objective, TrainingConfig()))
        forward: Callable[[], Any] = lambda: objective(batch).loss
    else:
        called = torch.compile(model) if compiled else model
        ids = batch["input_ids"]

        def forward() -> Any:
            with arithmetic(precision, CPU):
                return called(input_ids=ids, labels=ids).loss

    def step() -> float:
        loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measured(precision: Precision, rounds: int, steps: int) -> dict[str, Any]:
    """Measure all arms in one precision; return their figures."""
    readings: dict[str, list[float]] = {name: [] for name in ARMS}
    first, losses = dict[str, float](), dict[str, float]()
    graphs = dict[str, list[int]]()
    with ExitStack() as kept:
        arms: dict[str, Callable[[], float]] = {}
        for name, (ours, compiled, packed) in ARMS.items():
            arms[name] = step_of(precision, kept, ours=ours, compiled=compiled, packed=packed)
            before, started = graphs_so_far(), time.perf_counter()
            losses[name] = arms[name]()
            first[name] = time.perf_counter() - started
            graphs[name] = [now - then for now, then in zip(graphs_so_far(), before, strict=True)]
        for number in range(rounds):
            # a drift of the machine meets all alike
            for name in list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]:
                started = time.perf_counter()
                for _ in range(steps):
                    arms[name]()
                readings[name].append((time.perf_counter() - started) / steps)
    assert abs(losses["plain"] - losses["ours"]) < 2e-2, losses
    ratios = {}
    for slow, quick in PAIRS:
        each = sorted(a / b for a, b in zip(readings[slow], readings[quick], strict=True))
        ratios[f"{slow} / {quick}"] = [statistics.median(each), each[0], each[-1]]
    return {
        "precision": precision.value,
        "seconds": {name: statistics.median(values) for name, values in readings.items()},
        "first_step_seconds": first,
        "graphs_and_breaks": graphs,
        "losses": losses,
        "ratios": ratios,
        "n": rounds,
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    figures, lines = list[dict[str, Any]](), list[str]()
    for name in given.precision:
        found = measured(Precision(name), given.rounds, given.steps)
        figures.append(found)
        said = [
            f"{name} {what}: {median:.2f}x ({low:.2f} to {high:.2f}, n={found['n']})"
            for what, (median, low, high) in found["ratios"].items()
        ]
        tokens = ROWS * LENGTH / 1e3
        said += [
            f"{name} {arm}: {tokens / seconds:.1f}k tokens/s, first step"
            f" {found['first_step_seconds'][arm]:.1f} s, graphs and breaks"
            f" {found['graphs_and_breaks'][arm]}"
            for arm, seconds in found["seconds"].items()
        ]
        print("\n".join(said))
        lines += said
    if given.save:
        save_result("compiled_step", {"arms": figures}, "\n".join(lines))


if __name__ == "__main__":
    main()
