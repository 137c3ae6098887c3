"""When a training writes a checkpoint: every so many steps, every so many seconds, or as often as
loses the least time.

A checkpoint takes time, and what was computed since the last one is lost where a machine is taken
away without warning. `training.checkpoint_every=auto` balances the two by what checkpoints of this
very stage took and by the mean time between such losses (`training.preempted_every_seconds`).
Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps",
Future Generation Computer Systems 22 (3), eq. 37, doi 10.1016/j.future.2004.11.016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config.settings.training import AUTO, TrainingConfig
from pipeline.ledger.numbers import how_many
from pipeline.ledger.shapes import CheckpointsRecord


def fresh() -> CheckpointsRecord:
    """Return the record of a training that has written none."""
    return {"count": 0, "seconds": 0.0, "every_s": None}


def best_interval(save_s: float, lost_every_s: float) -> float:
    """Return the seconds of work between two checkpoints that lose the least time.

    Args:
        save_s: That one takes; the work waits meanwhile.
        lost_every_s: Mean time between losses, which come at random.
    """
    if save_s >= 2 * lost_every_s:
        return lost_every_s
    part = save_s / (2 * lost_every_s)
    first_order = math.sqrt(2 * save_s * lost_every_s)
    return first_order * (1 + math.sqrt(part) / 3 + part / 9) - save_s


@dataclass(slots=True)
class Cadence:
    """What the loop asks after every step.

    Attributes:
        record: All that stays of it: in the progress, and so in checkpoints.
        last_ns: When the last one was there.
    """

    settings: TrainingConfig
    record: CheckpointsRecord
    now_ns: Callable[[], int]
    last_ns: int

    @classmethod
    def of(
        cls, settings: TrainingConfig, record: CheckpointsRecord, now_ns: Callable[[], int]
    ) -> Cadence:
        """Return that of a training that begins, or goes on, now."""
        return cls(settings, record, now_ns, now_ns())

    def is_due(self, step: int) -> bool:
        """Return whether one is due after a step."""
        every = self.settings.checkpoint_every
        if every is not None and every != AUTO:
            return step % every == 0
        return self.now_ns() - self.last_ns > 1e9 * self.interval_s

    @property
    def interval_s(self) -> float:
        """Seconds between two; `checkpoint_seconds` until one was timed."""
        every_s = self.record["every_s"]
        return self.settings.checkpoint_seconds if every_s is None else every_s

    def saved(self, seconds: float) -> None:
        """Take note of a checkpoint, and of how long the training waited for it."""
        record = self.record
        record["count"] += 1
        record["seconds"] += seconds
        if self.settings.checkpoint_every == AUTO:
            mean = record["seconds"] / record["count"]
            record["every_s"] = best_interval(mean, self.settings.preempted_every_seconds)
        self.last_ns = self.now_ns()


def said(record: CheckpointsRecord, settings: TrainingConfig) -> str | None:
    """Return what a row says of it; None where the interval was not computed."""
    if record["every_s"] is None:
        return None
    lost_h = settings.preempted_every_seconds / 3600
    return (
        f"a checkpoint every {record['every_s']:.3g} s (training.checkpoint_every=auto): one takes"
        f" {record['seconds'] / record['count']:.3g} s, as"
        f" {how_many(record['count'], 'checkpoint')} did, and what ends without warning is said to"
        f" do so every {lost_h:.3g} h (preempted_every_seconds)"
    )
