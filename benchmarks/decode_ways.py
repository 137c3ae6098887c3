"""Which way of writing tokens is the fastest here? A growing cache, one of fixed size, captured,
compiled.

    python benchmarks/decode_ways.py [--device cuda] [--shape 124m] [--batches 1 8] [--blocks 8]
        [--processor-time] [--save]

A Llama with random weights, served by this project's own server in each way that the device has,
and read against the growing cache in interleaved blocks at every batch size. Reported are the time
over the growing cache's with its 90% interval over blocks, how each was served, and how long its
first batch took, compiling included. On a CPU that others use, --processor-time reads the time of
this process's one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantized_decode import LOADS, SHAPES, source
from results import save_result

from pipeline.compare.statistics import abba_saving
from pipeline.config.settings.serving import Decode, ServingConfig, ServingLoad
from pipeline.evaluation.serving.measure import measure_interleaved
from pipeline.evaluation.serving.server import Server, load
from pipeline.ledger.devices.table import device_of
from pipeline.tasks.table import Task

PLAIN = Decode.dynamic


def ways(device: torch.device) -> list[Decode]:
    """Return the ways that a device has, beside the growing cache."""
    captured = [Decode.graph] if device_of(device).captures else []
    return [Decode.static, *captured, Decode.compile]


def read(servers: dict[str, Server], batch: int, blocks: int, device: torch.device) -> Any:
    """Return each way's time over the growing cache's at one batch size, and how it was served."""
    prompt, new = LOADS[device.type]
    draw = np.random.default_rng(0)
    prompts = [draw.integers(2, servers[PLAIN.value].model.config.vocab_size, 4096)]
    ids = np.stack([prompts[0][:prompt]] * batch)
    made_s: dict[str, float] = {}
    for name, server in servers.items():
        start = time.perf_counter()
        server.once(ids, new)
        made_s[name] = time.perf_counter() - start
    pairs = [(name, PLAIN.value) for name in servers if name != PLAIN.value]
    load_at = ServingLoad(prompt=prompt, new=new, batch=batch)
    config = ServingConfig(load=load_at, batches=[], blocks=blocks)
    found = measure_interleaved(servers, pairs, config=config, prompts=prompts, seed=0)
    lines: dict[str, Any] = {}
    for name, base in pairs:
        saving = abba_saving(*found.seconds[name, base])
        lines[name] = {
            "how": found.readings[name].at_load[0].how,
            "time_ratio": 1 - saving.estimate,
            "ci": [1 - saving.high, 1 - saving.low],
            "first_batch_s": made_s[name],
        }
    return lines


def main() -> None:
    """Read every way at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device, lines = torch.device(args.device), list[str]()
    figures: dict[str, Any] = {}
    if args.processor_time:
        torch.set_num_threads(1)
    now_ns = time.process_time_ns if args.processor_time else time.perf_counter_ns
    with tempfile.TemporaryDirectory() as root:
        folder = source(SHAPES[args.shape], Path(root), device)
        servers = {
            way.value: load(folder, Task.causal_lm, device, labels=None, now_ns=now_ns, decode=way)
            for way in (PLAIN, *ways(device))
        }
        for batch in args.batches:
            figures[f"batch {batch}"] = found = read(servers, batch, args.blocks, device)
            for name, each in found.items():
                low, high = each["ci"]
                lines.append(
                    f"batch {batch}, {name}: {each['time_ratio']:.2f}x ({low:.2f} to {high:.2f})"
                    f" of a growing cache's time; {each['how']}; its first batch took"
                    f" {each['first_batch_s']:.1f} s"
                )
                print(lines[-1], flush=True)
            if args.save:  # a run that is cut short leaves what it has
                save_result("decode_ways", {args.shape: figures}, "\n".join(lines))


if __name__ == "__main__":
    main()
