"""What a system takes to a given loss, read on a ladder of runs that are each planned to their
length. Arithmetic only.

A learning rate that falls to the end makes no point on a curve stand for a run of that length, so
every point here is a run of its own (MEASUREMENT, "Training savings"). Q is the base's loss at its
full length, worsened by the margin. By one rule for every system, the base included, a system is
charged at the first of two consecutive runs at Q; the longest has none after it and stands by
itself. That the base is charged by the same rule is what keeps the margin from
being given to one side: a system against itself saves exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.compare.savings import Spend, Trained, target_metric, training_saving
from pipeline.compare.statistics import mean_interval
from pipeline.ledger.values import Provenance, Value, null

FULL = 1.0
FIGURES = ("saving", "systems", "algorithmic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run, planned to its length.

    Attributes:
        fraction: Of the full length.
        tokens: That its last model read, and those that it grew from.
        metric: Validation bits per byte at its end; lower is better.
        work_h: Device-hours of all that its model depends on, evaluation left out.
        retry_h: Device-hours of failed attempts and replayed steps.
        flops: Model FLOPs of the work.
    """

    fraction: float
    tokens: int
    metric: float
    work_h: float
    flops: float
    retry_h: float = 0.0


Runs = Mapping[float, Planned]
"""By fraction. One that was not run counts as short of every target: see `settled`."""


def target(base: Runs, margin: float) -> float:
    """Return Q, the loss at which all are compared with this base."""
    return target_metric(base[FULL].metric, margin, lower_is_better=True)


def first_held(runs: Runs, ladder: Sequence[float], q: float) -> Planned | None:
    """Return the first of two consecutive runs at Q, or the longest if that alone is; None if it is
    not.

    Args:
        ladder: All fractions, rising.
    """
    at_q = [fraction in runs and runs[fraction].metric <= q for fraction in ladder]
    held = (at for at, following in enumerate([*at_q[1:], True]) if at_q[at] and following)
    first = next(held, None)
    return None if first is None else runs[ladder[first]]


def settled(runs: Runs, ladder: Sequence[float], q: float) -> bool:
    """Tell whether shorter runs need not be tried: the two shortest so far, next to one another,
    are short of Q.

    Runs are made from the longest down.
    """
    tried = [fraction for fraction in ladder if fraction in runs]
    shortest = tried[:2]
    return len(shortest) == 2 and all(runs[fraction].metric > q for fraction in shortest)


def compare(
    arm: str, runs: Runs, base: str, base_runs: Runs, ladder: Sequence[float], margin: float
) -> dict[str, Any]:
    """Return what `arm` saves of what `base` takes to Q, for one seed, as `training_saving` has it.

    Beside it: Q, and for both sides the run that was compared (`at`). Where the arm was at Q on the
    shortest run of the ladder already it may need less than that, and `at_least` is true; where
    both were, the saving is null.
    """
    q = target(base_runs, margin)
    of_base = first_held(base_runs, ladder, q)
    assert of_base is not None, "the base's full length is within the margin of itself"
    of_arm = first_held(runs, ladder, q)
    at_shortest = [run is not None and run.fraction == ladder[0] for run in (of_arm, of_base)]
    of_arm = of_arm or runs[FULL]
    spends = {name: _spend(name, each) for name, each in ((arm, of_arm), (base, of_base))}
    found = training_saving(
        Trained(arm=arm, final=of_arm.metric),
        Trained(arm=base, final=base_runs[FULL].metric),
        spends,
        margin=margin,
        lower_is_better=True,
    )
    rule = (
        f"first of two consecutive planned runs at Q = {q:.4g}, {base}'s"
        f" {base_runs[FULL].metric:.4g} and the margin"
    )
    at = {
        name: {"fraction": each.fraction, "tokens": each.tokens, "metric": each.metric}
        for name, each in (("arm", of_arm), ("base", of_base))
    }
    if all(at_shortest):  # neither's cost is known from below
        hidden = null(f"both hold Q = {q:.4g} on the shortest run there is").to_json()
        found |= {**hidden, **dict.fromkeys(("systems", "algorithmic", "bound"), hidden)}
    return {**found, "rule": rule, "q": q, "at": at, "at_least": at_shortest == [True, False]}


def _spend(name: str, run: Planned) -> Spend:
    return Spend(arm=name, work_h=run.work_h, retry_h=run.retry_h, flops=run.flops)


def over_seeds(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return saving, systems and algorithmic over seeds: 1 - exp(mean ln(arm/base)), with t
    intervals at 90%.

    Means of logarithms keep (1 - systems)(1 - algorithmic) = 1 - saving. A figure that is null for
    one seed is null, and `bound` is what the saving would stay below: the censored seeds' bounds
    with the others' savings.
    """
    reasons = [each["why_missing"] for each in per_seed if each["value"] is None]
    if reasons:
        why = f"{reasons[0]} (in {len(reasons)} of {len(per_seed)} seeds)"
        figures = {name: {**null(why).to_json(), "ci": None} for name in FIGURES}
        known = [
            each["bound"]["value"] if each["value"] is None else each["value"] for each in per_seed
        ]
        bound = _mean(known) if None not in known else {**null(why).to_json(), "ci": None}
    else:
        parts = [
            [each["value"], each["systems"]["value"], each["algorithmic"]["value"]]
            for each in per_seed
        ]
        figures = {
            name: _mean(values)
            for name, values in zip(FIGURES, zip(*parts, strict=True), strict=True)
        }
        bound = {**null("not censored").to_json(), "ci": None}
    return {
        **figures,
        "bound": bound,
        "n": len(per_seed),
        "at_least": any(each["at_least"] for each in per_seed),
    }


def _mean(savings: Sequence[float]) -> dict[str, Any]:
    logs = [math.log1p(-share) for share in savings]
    if len(logs) == 1:
        return {**Value(savings[0], Provenance.DERIVED).to_json(), "ci": None}
    mean, low, high = mean_interval(logs)
    return {
        **Value(-math.expm1(mean), Provenance.DERIVED).to_json(),
        "ci": [-math.expm1(high), -math.expm1(low)],
    }
