"""Training by 1, 2, 4, ... ranks: tokens a second.

    python benchmarks/parallel.py [--ranks 1 2] [--mode ddp] [--steps 12] [--rounds 5]
        [--device cpu] [--save]
    python benchmarks/parallel.py --wrapper [--mode ddp] [--steps 6] [--rounds 10] [--save]

Each number of ranks trains the same model on the same batches: this project's own loop, by torch's
DistributedDataParallel or FSDP2. One rank is the loop as a run of one device has it, which takes
neither. A round takes each number in turn, in processes of its own; steps are timed in them after a
few that are not. Ratios are taken round by round. Ranks on a CPU share its cores, which threads of
one rank would use as well: there the ratio says what sharing costs, and not how it scales.

`--wrapper` asks what the wrapper costs where it shares nothing: one rank as it is, and one that is
wrapped in spite of being alone, in one process, in blocks of ABBA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import WARM_UP, between, edge_hooks, encoded, settings_of
from results import save_result
from scipy.special import stdtrit
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.settings.parallel import Parallel, ParallelConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.data.batches import PackedBatches
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.table import open_device
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.loop import train
from pipeline.training.objective import Objective
from pipeline.training.ranks import ALONE, Place, Ranks, join, place_in
from pipeline.training.reading import examine

ROWS, LENGTH, VOCABULARY = 16, 128, 4096
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class Wrapped(Ranks):
    """One rank that is told to share its training, with nobody."""

    __slots__ = ()

    @property
    def several(self) -> bool:
        """Whether there are others: so it is told."""
        return True


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
    seconds, tokens = timed_steps(device, ranks, args)
    if ranks.is_first:
        print(json.dumps((seconds, tokens)))
    ranks.leave()


def timed_steps(device: Device, ranks: Ranks, args: argparse.Namespace) -> tuple[float, int]:
    """Return seconds and tokens of the timed steps of a training."""
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
    return between(edges)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wrapper(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return what the wrapper costs a rank that is alone, and the lines that say so."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    device = open_device(args.device)
    assert device is not None
    device.make_current()
    met = join(Place(), backend=device.collectives, timeout_seconds=300)
    wrapped = Wrapped(met.place, met.control, met.hosts, met.meeting, met.files)
    logs: list[float] = []
    for number in range(-1, args.rounds):  # the first is not kept
        taken: dict[bool, float] = {True: 0.0, False: 0.0}
        order = (True, False, False, True) if number % 2 else (False, True, True, False)
        for is_wrapped in order:
            seconds, tokens = timed_steps(device, wrapped if is_wrapped else ALONE, args)
            taken[is_wrapped] += math.log(seconds / tokens) / 2
        if number >= 0:
            logs.append(taken[True] - taken[False])
    met.leave()
    low, high = t_interval(logs)
    mean = statistics.fmean(logs)
    cost = [math.expm1(each) for each in (mean, low, high)]
    line = (
        f"{args.mode} around one rank costs {100 * cost[0]:+.1f}% of a step's time (95% t interval"
        f" {100 * cost[1]:+.1f}% to {100 * cost[2]:+.1f}%, n={len(logs)} blocks of ABBA)"
    )
    return {"mode": args.mode, "cost": cost, "log_ratios": logs}, [line]


def t_interval(logs: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the interval of a mean."""
    half = stdtrit(len(logs) - 1, (1 + level) / 2) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    return mean - half, mean + half


def tokens_per_second(size: int) -> float:
    """Return the rate of a training by so many ranks."""
    port = free_port()
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
    parser.add_argument("--wrapper", action="store_true")
    args = parser.parse_args()
    if args.one:
        one_rank(args)
        return
    figures, lines = wrapper(args) if args.wrapper else scaling(args)
    print("\n".join(lines))
    if args.save:
        part = f"wrapper-{args.mode}" if args.wrapper else args.mode
        save_result("parallel", figures, "\n".join(lines), part=part)


def scaling(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return the rates by number of ranks, and the lines that say them."""
    rates: dict[int, list[float]] = {size: [] for size in args.ranks}
    for number in range(args.rounds):
        for size in args.ranks if number % 2 == 0 else reversed(args.ranks):
            rates[size].append(tokens_per_second(size))
    first = args.ranks[0]
    lines: list[str] = []
    figures: dict[str, Any] = {"mode": args.mode, "rates": rates, "times_first": {}}
    for size, found in rates.items():
        speed = [rate / own for rate, own in zip(found, rates[first], strict=True)]
        figures["times_first"][size] = speed
        lines.append(
            f"{size} ranks: {statistics.median(found):,.0f} tokens/s,"
            f" {statistics.median(speed):.2f}x of {first}"
            f" ({min(speed):.2f} to {max(speed):.2f}, n={len(speed)})"
        )
    return figures, lines


if __name__ == "__main__":
    main()
