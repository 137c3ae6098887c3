"""Charges: what a run spent, as parts that add up to all the time its processes were attached.

A run's charges are its stage attempts, its overhead and its comparison pass; of a run that has not
ended, or was killed and never taken up again, what no row holds is one charge more: `open`. A
reused stage is a charge that spent nothing; so is `held`, what a scheduler held for a run's jobs
while none of its processes was attached.

    sum of `device_h` over a run's charges = compute/run_device_hours of the run

What is not known of a charge is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

ROUNDING_H = 1e-9  # sums of hours agree to this
OWNER = ("team", "cost_center", "purpose", "model_name", "recipe")
"""What charges can be grouped by."""
Outside = Literal["overhead", "compare", "open"]
OUTSIDE: tuple[Outside, ...] = ("overhead", "compare", "open")


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """A part of what a run spent. Hours are device-hours unless they say GPU.

    Attributes:
        what: The stage attempt's name, or `overhead`, `compare`, `open`, `held`.
        device: Exact name of the device model; of several, all of them.
        ended_s: When the stage attempt ended, or the run (UTC, seconds since 1970); the last sign
            of life without an end.
        reused_from: The run that spent the hours which this one took over.
        gpu_h: Attached GPU-hours; None on a CPU.
        allocated_gpu_h: What a scheduler held for them.
        wasted_h: None where the program does not tell its phases.
        waste_known_h: Of `device_h`, the hours that `wasted_h` speaks of; None: all, or none where
            that is unknown.
        quality: Key and value of the primary quality of a finished artifact.
    """

    run: str
    what: str
    owner: Mapping[str, str | None]
    device: str | None
    ended_s: float
    device_h: float
    reused_h: float = 0.0
    reused_from: str | None = None
    gpu_h: float | None = None
    allocated_gpu_h: float | None = None
    energy_j: float | None = None
    wasted_h: float | None = None
    waste_known_h: float | None = None
    amount: float | None = None
    reused_amount: float | None = None
    currency: str | None = None
    quality: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is known of a run beside its stage attempts.

    Attributes:
        ended_s: When it ended, or its last sign of life.
        total_h: Device-hours all its processes were attached; None where nobody noted it down.
        outside_h: Of them, overhead and comparison pass; empty where the run did not end.
        wasted_h: What of these was waste.
        rate: Declared price of a device-hour.
        converged_at: Declared quality from which its model counts as converged.
        nested_in: The metered run whose seconds these are, too.
        reused_h: What it took over of other runs, comparison passes included; None where nobody
            noted it down.
        allocated_h: GPU-hours that a scheduler held for its jobs, from grant to release; None where
            none tells.
    """

    run: str
    owner: Mapping[str, str | None]
    device: str | None
    ended_s: float
    total_h: float | None
    stages: tuple[Charge, ...]
    outside_h: Mapping[Outside, float] = field(default_factory=dict[Outside, float])
    wasted_h: Mapping[Outside, float] = field(default_factory=dict[Outside, float])
    rate: float | None = None
    currency: str | None = None
    converged_at: float | None = None
    nested_in: str | None = None
    reused_h: float | None = None
    allocated_h: float | None = None

    @property
    def rest_h(self) -> float | None:
        """Device-hours that no stage attempt holds; below zero, rows hold more than the run
        took.
        """
        if self.total_h is None:
            return None
        return self.total_h - math.fsum(stage.device_h for stage in self.stages)


def charges(run: RunFacts) -> list[Charge]:
    """Return all charges of a run: its stage attempts, and what none of them holds."""
    rest_h = max(run.rest_h or 0.0, 0.0)
    parts: dict[Outside, float] = {
        name: min(hours, rest_h) for name, hours in run.outside_h.items()
    }
    # A run without an end has no overhead or comparison pass on record yet.
    parts = parts or {"open": rest_h}
    if "overhead" in parts:  # takes the rounding, so that the sum is exact
        parts["overhead"] = max(
            rest_h - math.fsum(h for name, h in parts.items() if name != "overhead"), 0.0
        )
    outside = [_outside(run, name, hours) for name, hours in parts.items() if hours > 0]
    return [*run.stages, *outside, *_held(run, [*run.stages, *outside]), *_taken_over(run)]


def _held(run: RunFacts, charged: Sequence[Charge]) -> list[Charge]:
    """Return the charge of what a scheduler held beyond what is charged already: before the run's
    processes came, and after they went.
    """
    if run.allocated_h is None:
        return []
    known = (
        each.device_h if each.allocated_gpu_h is None else each.allocated_gpu_h for each in charged
    )
    hours = run.allocated_h - math.fsum(known)
    if hours <= ROUNDING_H:
        return []
    return [
        Charge(
            run=run.run,
            what="held",
            owner=run.owner,
            device=run.device,
            ended_s=run.ended_s,
            device_h=0.0,
            allocated_gpu_h=hours,
            wasted_h=0.0,
            amount=None if run.rate is None else run.rate * hours,
            currency=None if run.rate is None else run.currency,
        )
    ]


def _taken_over(run: RunFacts) -> list[Charge]:
    """Return the comparison pass that a run took over of another, which no stage attempt holds: it
    spent nothing.
    """
    hours = (run.reused_h or 0.0) - math.fsum(stage.reused_h for stage in run.stages)
    if hours <= ROUNDING_H:
        return []
    return [
        Charge(
            run=run.run,
            what="reused comparison",
            owner=run.owner,
            device=run.device,
            ended_s=run.ended_s,
            device_h=0.0,
            reused_h=hours,
            wasted_h=0.0,
            amount=None if run.rate is None else 0.0,
            reused_amount=None if run.rate is None else run.rate * hours,
            currency=None if run.rate is None else run.currency,
        )
    ]


def _outside(run: RunFacts, what: Outside, hours: float) -> Charge:
    """Return the charge of hours that belong to no stage: on the devices of the stages, held as
    these were.
    """
    spent = [stage for stage in run.stages if stage.device_h > 0]
    on_gpu = any(stage.gpu_h is not None for stage in spent)
    # The scheduler held idle devices in these hours as well, in the same proportion.
    held = _ratio(spent)
    device = run.device or next((stage.device for stage in spent if stage.device), None)
    allocated = None if held is None else hours * held
    amount = None if run.rate is None else run.rate * (hours if allocated is None else allocated)
    return Charge(
        run=run.run,
        what=what,
        owner=run.owner,
        device=device,
        ended_s=run.ended_s,
        device_h=hours,
        gpu_h=hours if on_gpu else None,
        allocated_gpu_h=allocated,
        wasted_h=run.wasted_h.get(what),
        amount=amount,
        currency=None if amount is None else run.currency,
    )


def _ratio(stages: Iterable[Charge]) -> float | None:
    """Return GPU-hours that a scheduler held per device-hour attached; None unless all stages
    know.
    """
    stages = list(stages)
    allocated = [stage.allocated_gpu_h for stage in stages if stage.allocated_gpu_h is not None]
    if not stages or len(allocated) < len(stages):
        return None
    return math.fsum(allocated) / math.fsum(stage.device_h for stage in stages)


def known_waste_h(charge: Charge) -> float:
    """Return the device-hours of a charge of which it is known what was waste."""
    if charge.wasted_h is None:
        return 0.0
    return charge.device_h if charge.waste_known_h is None else charge.waste_known_h


def not_counted_twice(runs: Iterable[RunFacts]) -> tuple[list[RunFacts], list[str]]:
    """Leave out runs inside a metered run that is there as well; return the rest, and the ids of
    what was left out.

    What a metered program did not tell of its waste, the runs inside it may.
    """
    runs = list(runs)
    known = {run.run for run in runs}
    inside: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.nested_in is not None and run.nested_in in known:
            inside.setdefault(run.nested_in, []).append(run)
    left_out = [run.run for nested in inside.values() for run in nested]
    return [
        _reported_by(run, inside.get(run.run, [])) for run in runs if run.run not in left_out
    ], left_out


def _reported_by(run: RunFacts, inside: Iterable[RunFacts]) -> RunFacts:
    """Return a metered run with the waste that runs inside it know of, on the one stage that it
    has.
    """
    known = [charge for each in inside for charge in charges(each) if charge.wasted_h is not None]
    if not known or len(run.stages) != 1 or run.stages[0].wasted_h is not None:
        return run
    stage, wasted_h = run.stages[0], math.fsum(charge.wasted_h or 0.0 for charge in known)
    known_h = min(math.fsum(map(known_waste_h, known)), stage.device_h)
    return replace(
        run, stages=(replace(stage, wasted_h=min(wasted_h, known_h), waste_known_h=known_h),)
    )
