"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from pipeline.config import Schedule, TrainingConfig


def learning_rate(step: int, settings: TrainingConfig) -> float:
    """Return the learning rate of `step` (from 0) in a run planned to `settings.steps`."""
    return settings.learning_rate * factor(step, settings)


def factor(step: int, settings: TrainingConfig) -> float:
    """Return the share of the peak rate: linear warm-up, then cosine to 10%, or constant and linear decay to 0."""
    total = max(settings.steps, 1)
    warmup = _share(total, settings.warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule is Schedule.cosine:
        progress = (step - warmup) / max(total - warmup, 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    decay = _share(total, settings.decay_fraction)
    return min(1.0, (total - step) / decay) if decay else 1.0


def is_constant(step: int, settings: TrainingConfig) -> bool:
    """Return whether a reading at `step` lies in a constant-rate phase, where a curve's points are comparable."""
    if settings.schedule is not Schedule.constant_then_decay:
        return False
    warmup = _share(settings.steps, settings.warmup_fraction)
    return warmup <= step <= settings.steps - _share(settings.steps, settings.decay_fraction)


def _share(steps: int, fraction: float) -> int:
    """Return a share of the steps, rounded up; 7% of 100 are 7, whatever 100 * 0.07 is in binary."""
    return math.ceil(round(steps * fraction, 6))
