"""What changes over a training, as pure functions of the step, so that resuming needs no scheduler
state.

Learning rate; batch size and sequence length that grow by doubling; temperature and weight of the
hard labels that go linearly from a start to where they stay. The learning rate does not follow the
batch size: with Adam the usual rule is its square root (Malladi et al. 2022, arXiv 2205.10287), and
a small batch early on then meets the warm-up.

Source: Smith et al. 2018, arXiv 1711.00489 (batch size); Li et al. 2022, arXiv 2108.06084, and
Pouransari et al. 2024, arXiv 2405.13226 (sequence length, the latter at as many tokens a step, as
here).
"""

from __future__ import annotations

import math

from pipeline.config.settings.training import Schedule, TrainingConfig


def learning_rate(step: int, settings: TrainingConfig) -> float:
    """Return the learning rate of `step` (from 0) in a run planned to `settings.steps`."""
    return settings.learning_rate * factor(step, settings)


def factor(step: int, settings: TrainingConfig) -> float:
    """Return the share of the peak rate: linear warm-up, then cosine to 10%, or constant and linear
    decay to 0.
    """
    total = max(settings.steps, 1)
    warmup = _share(total, settings.warmup_fraction)
    if step < warmup:
        # From 1, so that the first step moves the weights.
        return (step + 1) / warmup
    if settings.schedule is Schedule.cosine:
        progress = (step - warmup) / max(total - warmup, 1)
        # From 1 at the end of the warm-up to 0.1 at the end.
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    decay = _share(total, settings.decay_fraction)
    # 1 until the decay begins, `decay` steps before the end.
    return min(1.0, (total - step) / decay) if decay else 1.0


def is_constant(step: int, settings: TrainingConfig) -> bool:
    """Return whether a reading at `step` lies in a constant-rate phase, where a curve's points are
    comparable.
    """
    if settings.schedule is not Schedule.constant_then_decay:
        return False
    warmup = _share(settings.steps, settings.warmup_fraction)
    return warmup <= step <= settings.steps - _share(settings.steps, settings.decay_fraction)


def sequence_length(step: int, settings: TrainingConfig) -> int:
    """Return how long the windows of a step are; a shorter one reads as many tokens in more
    windows.
    """
    start, full = (
        settings.start_sequence_length or settings.sequence_length,
        settings.sequence_length,
    )
    # Doubled once for each edge that was passed.
    return start << sum(step >= edge for edge in _edges(_doublings(start, full), settings))


def first_row(step: int, settings: TrainingConfig) -> int:
    """Return how many sequences of full length (or examples) the steps before this one read."""
    start, full = settings.start_batch_size or settings.batch_size, settings.batch_size
    read, since = 0, 0
    for at, edge in enumerate(_edges(_doublings(start, full), settings)):
        until = min(step, edge)
        read, since = read + (until - since) * (start << at), until
    return read + (step - since) * full


def steps_between_evaluations(settings: TrainingConfig) -> int:
    """Return how many steps lie between two evaluations: a fifth of all, unless declared."""
    return settings.eval_every or max(1, math.ceil(settings.steps / 5))


def _doublings(start: int, full: int) -> int:
    # log2 of the ratio, in whole numbers
    return (full // start).bit_length() - 1


def _edges(doublings: int, settings: TrainingConfig) -> list[int]:
    """Return the steps at which something doubles: the growing part of the training in equal
    parts.
    """
    growing = _share(settings.steps, settings.growth_fraction)
    return [growing * (at + 1) // doublings for at in range(doublings)]


def ramp(step: int, steps: int, fraction: float, start: float | None, end: float) -> float:
    """Return what goes linearly from `start` to `end` over a share of the steps, and stays
    there.
    """
    length = _share(steps, fraction)
    if start is None or step >= length:
        return end
    return start + (end - start) * step / length


def _share(steps: int, fraction: float) -> int:
    """Return a share of the steps, rounded up; 7% of 100 are 7, whatever 100 * 0.07 is in
    binary.
    """
    return math.ceil(round(steps * fraction, 6))
