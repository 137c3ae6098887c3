"""What a system takes to a given loss, read on a ladder of runs that are each planned to their length. Arithmetic only.

A learning rate that falls to the end makes no point on a curve stand for a run of that length, so every point here is
a run of its own (MEASUREMENT, "Training savings"). Q is the base's loss at its full length, worsened by the margin. By
one rule for every system, the base included, a system is charged at the first of two consecutive runs at Q; the
longest has none after it and stands by itself. That the base is charged by the same rule is what keeps the margin from
being given to one side: a system against itself saves exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.compare.savings import Spend, Trained, target_metric, training_saving
from pipeline.compare.statistics import mean_interval
from pipeline.values import Prov, Value, null

FULL = 1.0
HOUR_NS = 3600e9
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
    """Return the first of two consecutive runs at Q, or the longest if that alone is; None if it is not.

    Args:
        ladder: All fractions, rising.
    """
    at_q = [fraction in runs and runs[fraction].metric <= q for fraction in ladder]
    held = (at for at, following in enumerate([*at_q[1:], True]) if at_q[at] and following)
    first = next(held, None)
    return None if first is None else runs[ladder[first]]


def settled(runs: Runs, ladder: Sequence[float], q: float) -> bool:
    """Tell whether shorter runs need not be tried: the two shortest so far, next to one another, are short of Q.

    Runs are made from the longest down.
    """
    tried = [fraction for fraction in ladder if fraction in runs]
    shortest = tried[:2]
    return len(shortest) == 2 and all(runs[fraction].metric > q for fraction in shortest)


def compare(arm: str, runs: Runs, base: str, base_runs: Runs, ladder: Sequence[float], margin: float) -> dict[str, Any]:
    """Return what `arm` saves of what `base` takes to Q, for one seed, as `training_saving` has it.

    Beside it: Q, and for both sides the run that was compared (`at`). Where the arm was at Q on the shortest run of the
    ladder already it may need less than that, and `at_least` is true.
    """
    q = target(base_runs, margin)
    of_base = first_held(base_runs, ladder, q)
    assert of_base is not None, "the base's full length is within the margin of itself"
    of_arm = first_held(runs, ladder, q)
    at_least = of_arm is not None and of_arm.fraction == ladder[0]
    of_arm = of_arm or runs[FULL]
    spends = {name: _spend(name, each) for name, each in ((arm, of_arm), (base, of_base))}
    found = training_saving(
        Trained(arm=arm, final=of_arm.metric), Trained(arm=base, final=base_runs[FULL].metric), spends,
        margin=margin, lower_is_better=True,
    )  # fmt: skip
    rule = f"first of two consecutive planned runs at Q = {q:.4g}, {base}'s {base_runs[FULL].metric:.4g} and the margin"
    at = {name: {"fraction": each.fraction, "tokens": each.tokens, "metric": each.metric}
          for name, each in (("arm", of_arm), ("base", of_base))}  # fmt: skip
    return {**found, "rule": rule, "q": q, "at": at, "at_least": at_least}


def _spend(name: str, run: Planned) -> Spend:
    return Spend(arm=name, work_h=run.work_h, retry_h=run.retry_h, flops=run.flops)


def over_seeds(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return saving, systems and algorithmic over seeds: 1 - exp(mean ln(arm/base)), with t intervals at 90%.

    Means of logarithms keep (1 - systems)(1 - algorithmic) = 1 - saving. A figure that one seed censors is null, and
    `bound` is what the saving would stay below: the censored seeds' bounds with the others' savings.
    """
    censored = [each["why_null"] for each in per_seed if each["v"] is None]
    by_name = {
        "saving": [each["v"] for each in per_seed],
        "systems": [each["systems"]["v"] for each in per_seed],
        "algorithmic": [each["algorithmic"]["v"] for each in per_seed],
    }
    if censored:
        why = f"{censored[0]} (in {len(censored)} of {len(per_seed)} seeds)"
        figures = {name: {**null(why).to_json(), "ci": None} for name in FIGURES}
        known = [each["bound"]["v"] if each["v"] is None else each["v"] for each in per_seed]
        bound = _mean(known)
    else:
        figures = {name: _mean(values) for name, values in by_name.items()}
        bound = {**null("not censored").to_json(), "ci": None}
    return {**figures, "bound": bound, "n": len(per_seed), "at_least": any(each["at_least"] for each in per_seed)}


def _mean(savings: Sequence[float]) -> dict[str, Any]:
    logs = [math.log1p(-share) for share in savings]
    if len(logs) == 1:
        return {**Value(savings[0], Prov.DERIVED).to_json(), "ci": None}
    mean, low, high = mean_interval(logs)
    return {**Value(-math.expm1(mean), Prov.DERIVED).to_json(), "ci": [-math.expm1(high), -math.expm1(low)]}


def charged(rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a recipe's rows took, stage by stage and in all: what its model is charged with.

    Every stage that the rows name counts, reused ones at what they once took. Evaluation stands apart: the assessment,
    and what training read on validation (a compiled model compiles for it anew).

    Args:
        events: Of the run's journal; its windows say what part of the work was evaluation.
    """
    stages: dict[str, dict[str, float]] = {}
    for row in rows:
        hours, counts = row["ledger"]["device_hours"], row["ledger"]["counts"]
        nothing = {"work_h": 0.0, "retry_h": 0.0, "evaluation_h": 0.0, "flops": 0.0, "tokens": 0}
        stage = stages.setdefault(row["arm"], nothing)
        for name, part in (("work_h", "work"), ("retry_h", "retry"), ("evaluation_h", "assess")):
            stage[name] += hours[part]["v"] or 0.0
        if row["artifact"] is not None:  # an attempt that led nowhere counted what another one counts again
            stage["flops"], stage["tokens"] = counts["model_flops"]["v"], counts["tokens"]["v"]
    phases_ns: dict[str, int] = {}
    for event in work_windows(events):
        evaluated_h = event["phases_ns"].get("eval", 0) / HOUR_NS
        stages[event["arm"]]["work_h"] -= evaluated_h
        stages[event["arm"]]["evaluation_h"] += evaluated_h
        for name, spent_ns in event["phases_ns"].items():
            phases_ns[name] = phases_ns.get(name, 0) + spent_ns
    names = ("work_h", "retry_h", "evaluation_h", "flops")
    whole = {name: math.fsum(stage[name] for stage in stages.values()) for name in names}
    return {**whole, "stages": stages, "phases_s": {name: each / 1e9 for name, each in phases_ns.items()}}


def work_windows(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the windows in which stages worked, of those that were not lost."""
    windows = [event for event in events if event["e"] == "window"]
    return [event for event in windows if event["window"]["kind"] == "work" and event["window"]["kept_ns"] > 0]
