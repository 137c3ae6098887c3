"""Training by 1, 2, 4, ... ranks: tokens a second.

    python benchmarks/parallel.py [--ranks 1 2] [--mode ddp] [--steps 12] [--rounds 5]
        [--device cpu] [--save]

Each number of ranks trains the same model on the same batches: this project's own loop, by torch's
DistributedDataParallel or FSDP2. One rank is the loop as it is, without either. A round takes each
number in turn, in processes of its own; steps are timed in them after a few that are not. Ratios
are taken round by round. Ranks on a CPU share its cores, which threads of one rank would use as
well: there the ratio says what sharing costs, and not how it scales.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import WARM_UP, between, edge_hooks, encoded, settings_of
from results import save_result
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.settings.parallel import Parallel, ParallelConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.data.batches import PackedBatches
from pipeline.ledger.devices.table import open_device
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.loop import train
from pipeline.training.objective import Objective
from pipeline.training.ranks import ALONE, join, place_in
from pipeline.training.reading import examine

ROWS, LENGTH, VOCABULARY = 16, 128, 4096
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def one_rank(args: argparse.Namespace) -> None:
    """Train as one rank; the first prints seconds and tokens of its timed steps."""
    place = place_in()
    at = "" if place is None or args.device == "cpu" else f":{place.local}"
    device = open_device(f"{args.device}{at}")
    assert device is not None
    device.make_current()
    if place is not None and args.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.on_host))
    ranks = ALONE
    if place is not None:
        ranks = join(place, backend=device.collectives, timeout_seconds=300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **SHAPE)
    model: Any = LlamaForCausalLM(config).to(device.at)
    precision = Precision.fp32 if args.device == "cpu" else Precision.bf16
    objective = Objective(
        model, Task.causal_lm, precision, device.at, PhaseClock(), read=examine(model, device.at)
    )
    drawn = np.random.default_rng(0)
    documents = encoded(drawn.integers(3, VOCABULARY, LENGTH) for _ in range(4 * ROWS))
    edges: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            PackedBatches(documents, sequence_length=LENGTH, batch_size=ROWS, seed=0),
            objective,
            settings=settings_of(ROWS, LENGTH, WARM_UP + args.steps),
            precision=PrecisionConfig(name=precision),
            folder=Path(folder),
            clock=objective.clock,
            hooks=edge_hooks(edges, args.steps, device.at),
            ranks=ranks,
            parallel=ParallelConfig(mode=Parallel(args.mode)),
        )
    if ranks.is_first:
        print(json.dumps(between(edges)))
    ranks.leave()


def tokens_per_second(size: int, args: argparse.Namespace) -> float:
    """Return the rate of a training by so many ranks."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, __file__, "--one", *sys.argv[1:]]
    started: list[subprocess.Popen[str]] = []
    for rank in range(size):
        environment = {
            **os.environ,
            **{"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}"},
            **{"LOCAL_WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"},
        }
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    output = [each.communicate()[0] for each in started]
    assert all(each.returncode == 0 for each in started)
    seconds, tokens = json.loads(output[0].splitlines()[-1])
    return tokens / seconds


def main() -> None:
    """Measure, print, and save where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--mode", choices=("ddp", "fsdp", "hsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_rank(args)
        return
    rates: dict[int, list[float]] = {size: [] for size in args.ranks}
    for number in range(args.rounds):
        for size in args.ranks if number % 2 == 0 else reversed(args.ranks):
            rates[size].append(tokens_per_second(size, args))
    first = args.ranks[0]
    lines: list[str] = []
    figures: dict[str, Any] = {"mode": args.mode, "rates": {}, "times_first": {}}
    for size, found in rates.items():
        figures["rates"][size] = found
        speed = [rate / own for rate, own in zip(found, rates[first], strict=True)]
        figures["times_first"][size] = speed
        lines.append(
            f"{size} ranks: {statistics.median(found):,.0f} tokens/s,"
            f" {statistics.median(speed):.2f}x of {first}"
            f" ({min(speed):.2f} to {max(speed):.2f}, n={len(speed)})"
        )
    print("\n".join(lines))
    if args.save:
        save_result("parallel", figures, "\n".join(lines), part=args.mode)


if __name__ == "__main__":
    main()
