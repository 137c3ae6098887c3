"""Memory that a training takes on each device, part by part, before anything is allocated.

Weights, gradients and moments follow from the number of parameters; activations from what one layer
leaves for the backward pass; the head from its chunks. What an allocator loses between tensors, and
what a device keeps for itself, is in the upper end of the interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.compare.statistics import Interval
from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import OptimizerKind
from pipeline.forecast.sizes import THIRTY_TWO, kept_bytes, size_of
from pipeline.ledger.attempted import attempted
from pipeline.stages.base import Workload
from pipeline.tasks.table import Task

FP32, HALF = 4, 2  # bytes
TILE_BYTES = 2**25  # of a chunk of the head on a device that names no size of its own
# of the estimate: what was found beside torch's own count (tests/test_forecast_memory.py)
LEAST, MOST = 0.85, 1.25
# bytes that a token leaves in a layer, for each unit of width: more than any architecture was seen
# to, by a factor of three
AT_MOST_KEPT = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device, by what they hold.

    Attributes:
        weights: As they are computed with, and their fp32 masters where those lie beside them.
        gradients: In fp32; where ranks average them, their buffers too.
        moments: Of the optimizer.
        teacher: Weights of a frozen model.
        activations: What the forward pass of a micro-batch leaves for the backward pass; None where
            it could not be counted.
        again: Activations of one layer that are computed a second time.
        head: Chunks of logits, hidden states and their gradient; 16-bit copies of weights.
        accumulates: Whether gradients of earlier micro-batches are there from the start.
    """

    weights: float
    gradients: float
    moments: float
    teacher: float
    activations: float | None
    again: float
    head: float
    accumulates: bool

    @property
    def total(self) -> Interval:
        """The fullest moment of a step, with a 90% interval: at the head, where all activations are
        there; in the backward pass, where one layer's are computed again; or at the update.

        Without a count of activations it is the least that is needed.
        """
        fixed = self.weights + self.moments + self.teacher
        before = self.gradients if self.accumulates else 0.0
        kept = self.activations or 0.0
        passing = kept + self.again + self.gradients if self.again else 0.0
        whole = fixed + max(before + kept + self.head, passing, self.gradients)
        high = float("inf") if self.activations is None else MOST * whole
        return Interval(whole, LEAST * whole, high)

    def parts(self) -> dict[str, float]:
        """Return the parts that are known, by name."""
        known = {
            "weights": self.weights,
            "gradients": self.gradients,
            "moments": self.moments,
            "teacher": self.teacher,
            "activations": (self.activations or 0.0) + self.again,
            "head": self.head,
        }
        return {name: size for name, size in known.items() if size}


@dataclass(frozen=True, slots=True)
class Spread:
    """How ranks share a training.

    Attributes:
        ranks: How many read a part of each micro-batch.
        shards: Over how many each weight is cut; 1: every rank holds all of it.
    """

    ranks: int = 1
    shards: int = 1

    @classmethod
    def of(cls, mode: Parallel, ranks: int, on_host: int) -> Spread:
        """Return how ranks share a training in a mode."""
        if ranks == 1 or not mode.shards:
            return cls(ranks)
        return cls(ranks, on_host if mode is Parallel.hsdp else ranks)


def training_memory(
    work: Workload, task: Task, spread: Spread, tile_bytes: int | None = None
) -> TrainingMemory:
    """Return what a training takes on one device.

    Args:
        work: Of a stage that trains.
        tile_bytes: Of a chunk of the head on this device.

    Raises:
        Exception: Of any kind, where transformers cannot make the model.
    """
    assert work.batches is not None
    size, settings = size_of(work.config, task), work.batches
    wide = work.precision in THIRTY_TWO
    own = size.parameters / spread.shards
    pure = work.precision is Precision.bf16_pure and spread.shards == 1
    rows = max(settings.batch_size, settings.start_batch_size or 0)
    tokens = settings.sequence_length * -(-rows // (settings.gradient_accumulation * spread.ranks))
    eight_bit = settings.optimizer is not OptimizerKind.adamw
    buffers = spread.ranks > 1 and spread.shards == 1  # DistributedDataParallel's buckets
    # what a shard is gathered into: this layer and the next
    gathered = 2 * size.of_largest * (FP32 if wide else HALF) if spread.shards > 1 else 0
    cast = 0 if wide or pure or spread.shards > 1 else HALF * size.of_layers
    teacher = 0.0
    if work.teacher is not None:
        taught_by, precision = work.teacher
        of = size_of(taught_by, task)
        layers = (FP32 if precision in THIRTY_TWO else HALF) * of.of_layers
        # its embeddings and head are whole on every device
        teacher = FP32 * (of.parameters - of.of_layers) + layers / spread.shards
    kept, again = _activations(work, task, tokens)
    return TrainingMemory(
        weights=own * (FP32 + HALF if pure else FP32) + gathered,
        gradients=own * FP32 * (2 if buffers else 1),
        moments=own * (2 if eight_bit else 2 * FP32),
        teacher=teacher,
        activations=kept,
        again=again,
        head=cast + _head_bytes(size.vocabulary, size.width, tokens, tile_bytes or TILE_BYTES),
        accumulates=settings.gradient_accumulation > 1,
    )


def surely_fits(work: Workload, task: Task, spread: Spread, have: float) -> bool:
    """Return whether a training takes so little of what there is that it need not be counted.

    Raises:
        Exception: Of any kind, where transformers cannot make the model.
    """
    assert work.batches is not None
    sizes = [size_of(work.config, task)]
    if work.teacher is not None:
        sizes.append(size_of(work.teacher[0], task))
    tokens = work.batches.batch_size * work.batches.sequence_length
    weights = sum(5 * FP32 * each.parameters for each in sizes)
    passing = sum(AT_MOST_KEPT * each.width * each.layers for each in sizes) * tokens
    heads = sum(2 * FP32 * each.vocabulary for each in sizes) * tokens
    return (weights + passing + heads) * spread.ranks < have / 2


def _activations(work: Workload, task: Task, tokens: int) -> tuple[float | None, float]:
    """Return the bytes of a micro-batch that wait for the backward pass, and those of a layer that
    is computed again; None where they cannot be counted.
    """
    assert work.batches is not None
    length = work.batches.sequence_length
    kept = attempted(lambda: kept_bytes(work.config, task, work.precision, length), lambda _: None)
    if kept is None:
        return None, 0.0
    size = size_of(work.config, task)
    if not work.batches.activation_checkpointing:
        return kept * tokens, 0.0
    # each layer keeps its input
    inputs = size.layers * size.width * (FP32 if work.precision in THIRTY_TWO else HALF)
    return inputs * tokens, kept / max(size.layers, 1) * tokens


def _head_bytes(vocabulary: int, width: int, tokens: int, tile_bytes: int) -> float:
    """Return what the head holds at once: hidden states, their gradient, and a chunk of logits."""
    if vocabulary == 0:
        return 0.0
    return min(tile_bytes, FP32 * tokens * vocabulary) * 2 + 2 * FP32 * tokens * width


def remedies(
    work: Workload, task: Task, spread: Spread, have: float, tile_bytes: int | None = None
) -> Iterator[str]:
    """Yield what would make a training fit, in the order of what it costs: each alone."""
    assert work.batches is not None
    settings = work.batches

    def fits(changed: Any, over: Spread = spread) -> bool:
        found = training_memory(replace(work, batches=changed), task, over, tile_bytes)
        return found.total.estimate <= have

    if (
        spread.ranks > 1
        and spread.shards == 1
        and fits(settings, Spread(spread.ranks, spread.ranks))
    ):
        yield "parallel.mode=fsdp"
    smallest = settings.batch_size // spread.ranks
    parts = [
        n
        for n in range(settings.gradient_accumulation + 1, smallest + 1)
        if settings.batch_size % n == 0
    ]
    enough = (n for n in parts if fits(replace(settings, gradient_accumulation=n)))
    if (found := next(enough, None)) is not None:
        yield f"training.gradient_accumulation={found}"
    if not settings.activation_checkpointing and fits(
        replace(settings, activation_checkpointing=True)
    ):
        yield "training.activation_checkpointing=true"
    eight_bit = OptimizerKind.adamw_8bit_torchao
    if settings.optimizer is OptimizerKind.adamw and fits(replace(settings, optimizer=eight_bit)):
        yield f"training.optimizer={eight_bit.value}"
    all_of_it = replace(
        settings,
        activation_checkpointing=True,
        gradient_accumulation=max(parts, default=settings.gradient_accumulation),
        optimizer=eight_bit,
    )
    for number in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        if number > spread.ranks and fits(all_of_it, Spread(number, number)):
            yield f"hardware.devices={number} parallel.mode=fsdp with all of these"
            return
