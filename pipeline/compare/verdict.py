"""The verdict on a release: each criterion from its readings, and what they come to. Arithmetic
only.

A criterion is read on an interval, never on a point: with the policy's `alpha`, PASS needs the
one-sided lower bound on the good side of the threshold, FAIL the upper bound on the bad side; in
between it is INCONCLUSIVE, with the number of items that would decide. A plain "no worse than the
margin" passes a model exactly at the margin half of the time.

What cannot be compared at all (other data, other hardware, NaN, a disturbed machine) is INVALID,
whatever it reads. Criteria that the policy does not ask for are shown and decide nothing. All that
it asks for must pass, so that alpha bounds the chance of a false PASS without a correction for
their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from pipeline.compare import statistics
from pipeline.compare.blocks import disturbances
from pipeline.compare.quality import Items, compare_items, is_binary
from pipeline.config.settings.policy import PolicyConfig
from pipeline.ledger.numbers import how_many, percents_apart
from pipeline.ledger.shapes import CriterionRecord, Figures, Payback
from pipeline.ledger.values import Provenance, Value, derive, null
from pipeline.tasks.table import QUALITIES


class Outcome(StrEnum):
    """What a criterion, or a whole release, comes to."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"
    NO_BASELINE = "NO_BASELINE"


ROUND_OFF = 1e-12  # 1 - 90/100 is a little less than 0.1
_WORST_FIRST = (Outcome.INVALID, Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One question of a policy and its answer.

    Attributes:
        name: `quality/<key>`, `training`, `serving`, `memory`, `energy` or `payback`.
        outcome: Of the reading; a criterion that is not gating has one too, where there is a
            threshold to read it on.
        value: Positive is better for the candidate; of payback, units.
        ci: Its interval at `level`, each end a one-sided bound.
        threshold: Below it the candidate is not good enough (of payback: above it).
        gating: Whether the policy asks for it.
        n: Items, documents or blocks that it rests on.
        needed: Items in all that would decide it; groups where `groups` is given.
        groups: Groups that the documents form; None where each is a source of its own, or it rests
            on no documents.
        available: Documents (or groups) that the test split has in all; None where that is not
            known.
        smallest_visible_damage: Share of documents (or groups) below which damage would not be in
            the sample.
        why: What speaks against the reading, or explains it.
    """

    name: str
    outcome: Outcome
    value: Value
    ci: tuple[float, float] | None = None
    threshold: float | None = None
    gating: bool = True
    level: float | None = None
    n: int | None = None
    needed: int | None = None
    groups: int | None = None
    available: int | None = None
    smallest_visible_damage: float | None = None
    why: str | None = None
    unit: str = "1"

    def to_json(self) -> CriterionRecord:
        """Return the form it has in verdict.json."""
        return {
            "name": self.name,
            "outcome": self.outcome.value,
            "gating": self.gating,
            "value": self.value.to_json(),
            "ci": None if self.ci is None else list(self.ci),
            "level": self.level,
            "threshold": self.threshold,
            "unit": self.unit,
            "n": self.n,
            "needed": self.needed,
            "groups": self.groups,
            "available": self.available,
            "smallest_visible_damage": self.smallest_visible_damage,
            "why": self.why,
        }


def decide(criteria: Sequence[Criterion]) -> Outcome:
    """Return the worst outcome of the criteria that the policy asks for: INVALID, FAIL,
    INCONCLUSIVE, PASS.
    """
    gating = [each.outcome for each in criteria if each.gating]
    assert gating, "a policy that asks for nothing was refused"
    return next(outcome for outcome in _WORST_FIRST if outcome in gating)


def judged(low: float, high: float, threshold: float) -> Outcome:
    """Return what an interval says of a threshold that the truth must lie above, in its unit."""
    if low > threshold:
        return Outcome.PASS
    return Outcome.FAIL if high < threshold else Outcome.INCONCLUSIVE


def invalid(criterion: Criterion, reasons: Sequence[str]) -> Criterion:
    """Return the criterion as INVALID where there are reasons; what it read stays for the
    reader.
    """
    if not reasons:
        return criterion
    return replace(criterion, outcome=Outcome.INVALID, why="; ".join(reasons))


def disturbed(policy: PolicyConfig, here: str, conditions: Figures) -> list[str]:
    """Return why a serving pass measured more than its artifacts: other hardware than the policy
    asks for, throttling, other processes.

    Args:
        here: Exact name of the device it ran on.
        conditions: Values of `throttle_share` and `foreign_load`, as `ServePass.conditions` has
            them.
    """
    throttled, foreign = (conditions[name]["value"] for name in ("throttle_share", "foreign_load"))
    limit, reasons = policy.max_foreign_load, list[str]()
    if policy.hardware is not None and policy.hardware != here:
        reasons.append(f"measured on {here}, and the policy asks for {policy.hardware}")
    if throttled is not None and throttled > policy.max_throttle_share:
        share, most = percents_apart(throttled, policy.max_throttle_share)
        reasons.append(f"throttled {share} of the time, {most} allowed")
    if limit is not None and foreign is None:
        why = conditions["foreign_load"]["why_missing"]
        reasons.append(
            f"whether others used the machine is unknown ({why}); policy.max_foreign_load=null goes"
            " without"
        )
    elif limit is not None and foreign is not None and foreign > limit:
        share, most = percents_apart(foreign, limit)
        reasons.append(f"others used {share} of the machine, {most} allowed")
    return reasons


def moved(
    policy: PolicyConfig,
    arm: npt.ArrayLike,
    base: npt.ArrayLike,
    orders: Sequence[str],
    places: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Return the drift or the period that a look's readings show, where the policy has them tested.

    Args:
        policy: Its `max_disturbance`.
        arm: (blocks, 2): the candidate's readings.
        base: (blocks, 2): the baseline's.
        orders: Of each block.
        places: Of its four readings among all that were taken; None: one after the other.
    """
    if policy.max_disturbance is None:
        return []
    return [
        f"disturbed: {what}"
        for what in disturbances(arm, base, orders, places, least=policy.max_disturbance)
    ]


# -- quality --------------------------------------------------------------------------------------


def quality_criterion(
    key: str,
    arm: Items,
    base: Items,
    policy: PolicyConfig,
    *,
    margin: float,
    resamples: int = 2000,
    seed: int = 0,
) -> Criterion:
    """Compare candidate and baseline on one quality, document by document (`compare/quality.py`).

    Args:
        key: A quality key; of an lm-eval task's items, `task/<task>/<metric>`.
        arm: The candidate's per-document columns.
        base: The baseline's.
        policy: Its alpha, and how many items or documents an answer needs.
        margin: Loss that still passes: relative for bits per byte, absolute for shares.
    """
    # Two-sided level whose ends are one-sided bounds at alpha.
    level = 1 - 2 * policy.alpha
    least = policy.min_items if _is_right_or_wrong(key, arm, base) else policy.min_documents
    read = compare_items(
        key.rpartition("/")[2],
        arm,
        base,
        margin=margin,
        min_documents=least,
        resamples=resamples,
        seed=seed,
        level=level,
    )
    value = Value.from_json(read)
    made = Criterion(
        name=f"quality/{key}",
        outcome=Outcome.INVALID,
        value=value,
        threshold=-margin,
        level=level,
        n=read["n"],
        groups=read.get("groups"),
        smallest_visible_damage=read.get("smallest_visible_damage"),
    )
    if value.value is None:
        return replace(made, why=value.why_missing)
    if read["ci"] is None:
        return replace(made, outcome=Outcome.INCONCLUSIVE, why=read.get("why_undecided"))
    low, high = read["ci"]
    outcome, why = judged(low, high, -margin), read.get("why_undecided")
    counted, what = (
        (read["n"], ("item", "items"))
        if made.groups is None
        else (made.groups, ("group of items", "groups of items"))
    )
    if counted < least:
        few = f"{how_many(counted, *what)}, and the policy decides nothing on fewer than {least}"
        why = f"{few}; {why}" if why else few
    if why is not None:
        outcome = Outcome.INCONCLUSIVE
    needed = (
        None if outcome is not Outcome.INCONCLUSIVE else max(least, read["items_to_decide"] or 0)
    )
    return replace(
        made, outcome=outcome, ci=(low, high), why=why, needed=needed if needed != counted else None
    )


def _is_right_or_wrong(key: str, arm: Items, base: Items) -> bool:
    quality = QUALITIES.get(key)  # None of an lm-eval task's metric, whose column has its name
    column = key.rpartition("/")[2] if quality is None else quality.right_or_wrong
    if column is None:
        return False
    return column in arm and column in base and is_binary(arm[column]) and is_binary(base[column])


# -- serving, energy, memory ----------------------------------------------------------------------


def serving_criterion(
    arm_s: npt.ArrayLike,
    base_s: npt.ArrayLike,
    *,
    minimum: float | None,
    alpha: float,
    name: str = "serving",
) -> Criterion:
    """Read the saving on ABBA blocks at one-sided `alpha` (of this look).

    Args:
        arm_s: (blocks, 2): readings of the candidate (arm, base, base, arm), in seconds or joules
            for the same work.
        base_s: (blocks, 2): the baseline's between them.
        minimum: The least saving; None where the policy does not ask for one.
    """
    level = 1 - 2 * alpha
    saving = statistics.abba_saving(arm_s, base_s, level=level)
    return _saving(
        name,
        Value(saving.estimate, Provenance.DERIVED),
        (saving.low, saving.high),
        minimum,
        level=level,
        n=len(np.asarray(arm_s)),
    )


def memory_criterion(
    arm_bytes: Value, base_bytes: Value, *, of: str, minimum: float | None
) -> Criterion:
    """Read the share of the baseline's memory that is saved: counted, so that there is no interval.

    Args:
        of: What was counted: peak_bytes, or weights_bytes where a device counts no peak.
    """
    value = derive(lambda ours, theirs: 1 - ours / theirs, arm_bytes, base_bytes)
    read = None if value.value is None else (value.value, value.value)
    made = _saving("memory", value, read, minimum, level=None, n=None, at_least=True)
    return replace(made, ci=None, why=made.why or f"of {of}")


def unread(
    name: str, why: str, minimum: float | None, outcome: Outcome = Outcome.INVALID
) -> Criterion:
    """Return a criterion that could not be read at all."""
    return Criterion(
        name=name,
        outcome=outcome,
        value=null(why),
        threshold=minimum,
        gating=minimum is not None,
        why=why,
    )


def _saving(
    name: str,
    value: Value,
    ci: tuple[float, float] | None,
    minimum: float | None,
    *,
    level: float | None,
    n: int | None,
    at_least: bool = False,
) -> Criterion:
    """Return a criterion of a saving; one that the policy does not ask for is read on "any saving
    at all".
    """
    if value.value is None or ci is None:
        return replace(unread(name, value.why_missing or "no interval", minimum), value=value)
    threshold = 0.0 if minimum is None else minimum
    outcome = (
        Outcome.PASS
        if at_least and value.value >= threshold - ROUND_OFF
        else judged(*ci, threshold)
    )
    return Criterion(
        name=name,
        outcome=outcome,
        value=value,
        ci=ci,
        threshold=threshold,
        gating=minimum is not None,
        level=level,
        n=n,
    )


# -- training and payback -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """How far device-hours of the same training lie apart on the same device.

    Attributes:
        sd_log: Standard deviation of ln(device-hours) over repeated runs.
        runs: How many.
        source: Where they are recorded.
    """

    sd_log: float
    runs: int
    source: str


def training_criterion(
    c_arm: Value,
    c_base: Value,
    spread: Spread | None,
    *,
    minimum: float | None,
    alpha: float,
    arm_runs: Sequence[float] = (),
    base_runs: Sequence[float] = (),
) -> Criterion:
    """Read the saving of C, one run each, with the spread that repeated runs of one training have
    shown.

    Without such runs it is a point estimate, which decides nothing. A side whose own runs (other
    seeds) are recorded is read with their spread where that is larger. A candidate without them is
    taken to vary up to twice as much as what is recorded, a baseline as that
    (`statistics.own_spread`): self-tests repeat the champion's training. A baseline that has no
    ledger fails a policy that asks for this saving: it cannot be shown.

    Args:
        c_arm: Device-hours of the candidate's chain.
        c_base: Of the baseline's.
        spread: Of repeated runs of one training on this device.
        minimum: The least saving; None where the policy does not ask for one.
        alpha: The policy's, one-sided.
        arm_runs: Device-hours of the candidate's own runs, one a seed.
        base_runs: Of the baseline's.
    """
    value = derive(lambda ours, theirs: 1 - ours / theirs, c_arm, c_base)
    if value.value is None:
        return replace(
            unread("training", value.why_missing or "", minimum, Outcome.FAIL), value=value
        )
    threshold = 0.0 if minimum is None else minimum
    made = Criterion(
        name="training",
        outcome=Outcome.INCONCLUSIVE,
        value=value,
        threshold=threshold,
        gating=minimum is not None,
    )
    if spread is None:
        return replace(
            made,
            why=(
                "point estimate only: no repeated runs on this device are recorded "
                "(python -m pipeline selftest train=...)"
            ),
        )
    level = 1 - 2 * alpha
    recorded = statistics.RunSpread(spread.sd_log, spread.runs - 1)
    of_arm, how = statistics.own_spread(recorded, arm_runs)
    of_base, how_base = statistics.own_spread(recorded, base_runs, assumed=1.0)
    # A saving s of one run each: arm / base = 1 - s.
    saving = statistics.log_ratio_from_spread(
        1 - value.value, 1.0, arm_spread=of_arm, base_spread=of_base, level=level
    )
    why = (
        f"spread of {how_many(spread.runs, 'repeated run')} ({spread.source}); the candidate's"
        f" {how}, the baseline's {how_base}"
    )
    return replace(
        made,
        outcome=judged(saving.low, saving.high, threshold),
        ci=(saving.low, saving.high),
        level=level,
        n=spread.runs,
        why=why,
    )


def payback_criterion(payback: Payback, *, within: float | None, alpha: float) -> Criterion:
    """Read whether the release has paid for itself after `within` units: P(net > 0) at that volume
    against alpha.

    Args:
        payback: As `savings.payback` returns it, with `within` as its volume.
    """
    value = Value.from_json(payback)
    made = Criterion(
        name="payback",
        outcome=Outcome.FAIL,
        value=value,
        threshold=within,
        gating=within is not None,
        unit=payback["unit"],
        why=value.why_missing,
    )
    # "Never" is an answer (FAIL), not a missing figure (INVALID).
    never = value.why_missing is not None and value.why_missing.startswith("never")
    if value.value is None and not never:
        return replace(made, outcome=Outcome.INVALID)
    if within is None:
        # Without a volume no probability is computed; this outcome decides nothing.
        return replace(made, outcome=Outcome.FAIL if never else Outcome.PASS)
    probability = Value.from_json(payback["p_net_positive"])
    if probability.value is None:
        return replace(made, outcome=Outcome.INVALID, why=probability.why_missing)
    outcome = (
        Outcome.PASS
        if probability.value >= 1 - alpha
        else Outcome.FAIL
        if probability.value <= alpha
        else None
    )
    return replace(
        made,
        outcome=outcome or Outcome.INCONCLUSIVE,
        why=f"P(paid for itself by then) = {probability.value:.3g}",
    )
