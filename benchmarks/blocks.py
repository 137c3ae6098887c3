"""Blocks of steps that take turns, as benchmarks of whole steps time them: this project's loop
doing nothing but step, and the clock read at the edges of a block.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.settings.precision import PrecisionConfig
from pipeline.config.settings.training import Compile, TrainingConfig
from pipeline.data.encode import Encoded
from pipeline.training.loop import Hooks, train
from pipeline.training.objective import Objective

WARM_UP = 3  # steps before the clock of a block starts
Block = Callable[[int], tuple[float, int]]
"""Runs so many steps; returns the seconds of those after the warm-up, and the tokens they read."""


def encoded(documents: Iterable[np.ndarray]) -> list[Encoded]:
    """Return documents of token ids as batches take them; every token but the first is a target."""
    return [
        Encoded(ids.astype(np.int32), np.arange(len(ids)) > 0, 0, None, str(at))
        for at, ids in enumerate(documents)
    ]


def settings_of(batch: int, length: int, steps: int, **more: Any) -> TrainingConfig:
    """Return settings that do nothing but step."""
    return TrainingConfig(
        steps=steps,
        batch_size=batch,
        sequence_length=length,
        eval_every=steps,
        checkpoint_seconds=1e9,
        compile=Compile.never,  # `blocks_of` compiles, where it is asked to
        **more,
    )


def blocks_of(
    objective: Objective,
    batches: Any,
    precision: PrecisionConfig,
    settings: Callable[[int], TrainingConfig],
    *,
    compiled: bool,
) -> Block:
    """Return blocks of this project's loop.

    Args:
        settings: By the number of steps.
        compiled: Compile the bodies of the model and of its live teacher.
    """
    if compiled:
        teachers = [] if objective.teacher is None else [objective.teacher.model]
        for model in (objective.model, *teachers):
            model.base_model.compile()
        objective.compiled = True

    def block(steps: int) -> tuple[float, int]:
        edges: list[tuple[float, int]] = []
        with tempfile.TemporaryDirectory() as folder:
            train(
                objective.model,
                batches,
                objective,
                settings=settings(WARM_UP + steps),
                precision=precision,
                folder=Path(folder),
                clock=objective.clock,
                hooks=edge_hooks(edges, steps, objective.device),
            )
        return between(edges)

    return block


def pace(
    arm: str, make: Callable[[], Block], blocks: MutableMapping[str, Block], steps: int
) -> float:
    """Return an arm's seconds a token over a block of steps; it is made where `blocks` lacks it."""
    if arm not in blocks:
        blocks[arm] = make()
    taken, tokens = blocks[arm](steps)
    return taken / tokens


def edge_hooks(edges: list[tuple[float, int]], steps: int, device: torch.device) -> Hooks:
    """Return hooks of a training that does nothing but step, and note time and tokens at the edges
    of its block.
    """

    def advance(step: int, tokens: int) -> None:
        if step in (WARM_UP, WARM_UP + steps):
            finish(device)
            edges.append((time.perf_counter(), tokens))

    nothing: Callable[..., None] = lambda *_: None
    return Hooks(
        validate=lambda: 0.0,
        flops=lambda _: (0.0, 0.0),
        points=nothing,
        history=lambda _: [],
        checkpointed=nothing,
        resumed=nothing,
        say=nothing,
        should_stop=lambda: None,
        advance=advance,
    )


def between(edges: list[tuple[float, int]]) -> tuple[float, int]:
    """Return seconds and tokens between the two edges of a block."""
    (start, before), (end, after) = edges
    return end - start, after - before


def finish(device: torch.device) -> None:
    """Wait for what the device was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
