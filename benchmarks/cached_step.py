"""Training steps from a cached teacher, beside cross-entropy alone and a teacher that runs along.

    python benchmarks/cached_step.py [--device cuda] [--shape gpt2] [--rounds 10] [--steps 8]
    [--draws 20] [--save]

Three arms of this project's loop on the same packed documents, in blocks of steps that take turns:
`ce` has no teacher, `cached` reads draws from a cache on disk, `online` runs the teacher. Told are
each one's time over that of `ce`, online's over cached, and what the cache takes of a token. What
is in the cache is made up: distributions as peaked as trained models have, by the project's own
codec; how long a step takes depends on how many entries a token has, not on which. How near such a
student comes to one with the whole teacher is no question of time, and is not asked here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import Block, blocks_of, encoded, free, pace, settings_of
from distillation_head import ratio
from distillation_step import SHAPES, Shape, documents
from results import attempt, save_result

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.data.batches import IGNORE, PackedBatches
from pipeline.distillation.cache import TeacherCache, shard_name, write_manifest, write_shard
from pipeline.distillation.losses import Loss
from pipeline.distillation.sparse import Sampled
from pipeline.ledger.phases import PhaseClock
from pipeline.stages.teaching import IndexedBatches
from pipeline.tasks.table import Task
from pipeline.training.objective import CachedTeacher, Objective, Teacher
from pipeline.training.reading import examine

WINDOWS = 64  # of the epoch, all of them cached
PEAKED = 3.0  # standard deviation of made-up logits: an entropy of about 6 nats at 50,257 tokens


def windows_of(shape: Shape, batch: int) -> PackedBatches:
    """Return the first windows of the documents, packed."""
    found, wanted = documents(shape), max(WINDOWS, batch) * shape.length
    read = np.cumsum([len(ids) for ids in found])
    first = encoded(found[: int(np.searchsorted(read, wanted, side="right")) + 1])
    return PackedBatches(first, sequence_length=shape.length, batch_size=batch, seed=0)


def cached(
    windows: PackedBatches, shape: Shape, folder: Path, draws: int, device: torch.device
) -> TeacherCache:
    """Write a cache of made-up distributions for all windows, and open it."""
    codec = Sampled(draws, shape.teacher.vocab_size, 1.0)
    parts, tokens, draw = [], 0, torch.Generator(device).manual_seed(0)
    for row in range(windows.num_rows):
        targets = int((windows.read(np.array([row]))["labels"] != IGNORE).sum())
        logits = torch.randn(targets, codec.vocabulary, generator=draw, device=device)
        chance = torch.rand(targets, draws, generator=draw, device=device, dtype=torch.float64)
        drawn = codec.of(PEAKED * logits, chance)
        parts.append(codec.pack({name: each.cpu().numpy() for name, each in drawn.items()}))
        tokens += targets
    rows = range(windows.num_rows)
    path = folder / shard_name(0)
    sha256 = write_shard(path, rows, [windows.content(row) for row in rows], parts)
    size = path.stat().st_size
    unknown = dict.fromkeys(("teacher", "data", "tokenizer", "packing"), "")
    write_manifest(
        folder,
        {
            "method": codec.method,
            "draws": draws,
            "k": None,
            "temperature": 1.0,
            "vocabulary": codec.vocabulary,
            "precision": "fp32",
            "seed": 0,
            "sequence_length": shape.length,
            "batch_size": 1,
            "steps": windows.num_rows,
            **unknown,
        },
        [{"sha256": sha256, "windows": windows.num_rows, "tokens": tokens, "bytes": size}],
    )
    cache = TeacherCache(folder, "cached_step")
    cache.check({}, windows, np.arange(windows.num_rows))
    return cache


def arm_of(
    arm: str, shape: Shape, device: torch.device, windows: PackedBatches, cache: TeacherCache
) -> Block:
    """Return an arm's blocks of steps."""
    student, teacher = shape.models(device)
    cuda = device.type == "cuda"
    precision = Precision.bf16 if cuda else Precision.fp32
    taught = {
        "ce": lambda: None,
        "cached": lambda: CachedTeacher(cache, Loss(0.0)),
        "online": lambda: Teacher(teacher, precision, Loss(0.0), examine(teacher, device)),
    }[arm]()
    objective = Objective(
        student,
        Task.causal_lm,
        precision,
        device,
        PhaseClock(),
        taught,
        read=examine(student, device),
    )
    batches: Any = IndexedBatches(windows, cache, 1) if arm == "cached" else windows
    settings = partial(settings_of, len(windows.rows(0)), shape.length)
    return blocks_of(objective, batches, PrecisionConfig(name=precision), settings, compiled=cuda)


def measure(
    shape: Shape,
    device: torch.device,
    rounds: int,
    steps: int,
    draws: int,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return the figures of all arms; `keep` is given what there is as it comes."""
    windows = windows_of(shape, shape.batches[min(1, len(shape.batches) - 1)])
    found: dict[str, Any] = {"not_here": {}, "draws": draws}
    times: dict[str, list[float]] = {arm: [] for arm in ("ce", "cached", "online")}
    with tempfile.TemporaryDirectory() as folder:
        cache = cached(windows, shape, Path(folder), draws, device)
        found["bytes_per_token"] = cache.manifest["bytes_per_token"]
        blocks = dict[str, Block]()
        for number in range(rounds):
            for arm in sorted(times, reverse=bool(number % 2)):
                made = partial(arm_of, arm, shape, device, windows, cache)
                taken, why = attempt(partial(pace, arm, made, blocks, steps))
                if taken is None:
                    found["not_here"][arm] = why
                    del times[arm]
                    free()
                else:
                    times[arm].append(taken)
            keep(found | _figures(times))
    return found | _figures(times)


def _figures(times: dict[str, list[float]]) -> dict[str, Any]:
    over = {
        f"{slow} / {quick}": ratio(times[slow], times[quick])
        for slow, quick in (("cached", "ce"), ("online", "ce"), ("online", "cached"))
        if slow in times and quick in times
    }
    rates = {arm: 1 / statistics.median(each) for arm, each in times.items()}
    return {"tokens_per_s": rates, "times": over, "all_s_per_token": times}


def table(name: str, found: dict[str, Any]) -> str:
    """Return the figures in lines."""
    lines = [f"{name}: {found['draws']} draws, {found['bytes_per_token']:.1f} bytes a token"]
    lines += [f"{arm:8} {rate:12,.0f} tokens/s" for arm, rate in found["tokens_per_s"].items()]
    lines += [
        f"{what}: {each['ratio']:.2f} [{each['low']:.2f}, {each['high']:.2f}]"
        for what, each in found["times"].items()
    ]
    absent: dict[str, str] = found["not_here"]
    return "\n".join([*lines, *(f"{arm}: not here: {why}" for arm, why in absent.items())])


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = args.shape or ("gpt2" if device.type == "cuda" else "small")

    def keep(found: dict[str, Any]) -> None:
        if args.save:
            save_result("cached_step", found, table(name, found))

    found = measure(SHAPES[name], device, args.rounds, args.steps, args.draws, keep)
    print(table(name, found))
    if found["not_here"]:
        sys.exit("an arm was not measured")


if __name__ == "__main__":
    main()
