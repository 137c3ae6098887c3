"""What a period's GPU time went to, from the runs that a store holds: what was spent against a
budget, what was wasted by cause, how good forecasts were. Arithmetic alone; `report/weekly.py`
shows it.

Hours of different device models, and money of different currencies, are never added. What is not
known stays apart: hours whose waste nobody tells are in no share, and waste whose cause nobody
tells has a line of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from pipeline.ledger.charge_lines import grouped, lines, tells
from pipeline.ledger.charge_sources import RUN_TAG, finite
from pipeline.ledger.charges import OUTSIDE, ROUNDING_H, Charge, RunFacts, charges, known_waste_h
from pipeline.ledger.metrics import WASTE_CAUSES
from pipeline.ledger.shapes import StoredRun

NOT_TOLD = "cause not told"
OUTSIDE_STAGES = "outside stages"
BUDGET = "budget.device_hours"
"""The setting, and the parameter of a parent, by which a run has a budget of its own."""
Place = tuple[str, str]
"""A group and a device model."""


# -- what was spent, against a budget -------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a group spent on one device model. Hours are device-hours.

    Attributes:
        runs: Different runs in it.
        amounts: Money by currency.
        unpriced_h: Hours of which no rate is declared.
        reused_h: Taken over of other runs, and not spent.
        wasted_h: None: no stage tells.
        known_h: Hours of which it is known what was waste.
    """

    group: str
    device: str
    runs: frozenset[str]
    device_h: float
    amounts: Mapping[str, float]
    unpriced_h: float
    reused_h: float
    wasted_h: float | None
    known_h: float


def spent(paid: Iterable[Charge], by: str) -> list[Spent]:
    """Return what each group spent on each device model, the largest first."""
    same: dict[Place, list[Spent]] = {}
    for line in lines(paid, by):
        if line.kind != "group":
            continue
        one = Spent(
            group=line.group,
            device=line.device,
            runs=line.runs,
            device_h=line.device_h,
            amounts={} if line.amount is None else {line.currency: line.amount},
            unpriced_h=line.device_h if line.amount is None else 0.0,
            reused_h=line.reused_h,
            wasted_h=line.wasted_h,
            known_h=line.device_h - line.waste_unknown_h,
        )
        same.setdefault((line.group, line.device), []).append(one)
    found = [together(each, group) for (group, _), each in same.items()]
    return sorted(found, key=lambda each: (-each.device_h, each.group, each.device))


def together(parts: Sequence[Spent], group: str) -> Spent:
    """Return parts of one device model as one."""
    assert len({each.device for each in parts}) == 1
    currencies = sorted({currency for each in parts for currency in each.amounts})
    told = [each.wasted_h for each in parts if each.wasted_h is not None]
    return Spent(
        group=group,
        device=parts[0].device,
        runs=frozenset[str]().union(*(each.runs for each in parts)),
        device_h=math.fsum(each.device_h for each in parts),
        amounts={
            currency: math.fsum(each.amounts.get(currency, 0.0) for each in parts)
            for currency in currencies
        },
        unpriced_h=math.fsum(each.unpriced_h for each in parts),
        reused_h=math.fsum(each.reused_h for each in parts),
        wasted_h=math.fsum(told) if told else None,
        known_h=math.fsum(each.known_h for each in parts),
    )


def by_device(found: Iterable[Spent], group: str) -> list[Spent]:
    """Return what was spent on each device model, by name."""
    same: dict[str, list[Spent]] = {}
    for each in found:
        same.setdefault(each.device, []).append(each)
    return [together(same[device], group) for device in sorted(same)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnBudgets:
    """What runs of a group on one device model declared themselves.

    Attributes:
        allowed_h: Sum of their budgets.
        spent_h: All that these runs took, before the period too: a budget is of a whole run.
        num: Runs that have one.
        num_without: Runs that have none.
    """

    allowed_h: float = 0.0
    spent_h: float = 0.0
    num: int = 0
    num_without: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What the runs of a period declared as their budgets.

    Attributes:
        by_place: By group and device model.
        num_mixed: Runs that had a budget and used several device models: whose hours are not added.
        num_earlier: Runs that had one and spent a part of it before the period.
        over: Runs that took more than their own.
    """

    by_place: Mapping[Place, OwnBudgets] = field(default_factory=dict[Place, OwnBudgets])
    num_mixed: int = 0
    num_earlier: int = 0
    over: Sequence[str] = ()

    def of(self, device: str) -> OwnBudgets:
        """Return the budgets of all groups on a device model."""
        return _added([own for (_, on), own in self.by_place.items() if on == device])


def _added(parts: Sequence[OwnBudgets]) -> OwnBudgets:
    return OwnBudgets(
        allowed_h=math.fsum(each.allowed_h for each in parts),
        spent_h=math.fsum(each.spent_h for each in parts),
        num=sum(each.num for each in parts),
        num_without=sum(each.num_without for each in parts),
    )


def own_budgets(
    runs: Iterable[RunFacts], paid: Iterable[Charge], stored: Iterable[StoredRun], by: str
) -> Declared:
    """Return what the runs that spent something in a period declared themselves.

    Args:
        paid: What was spent in the period.
    """
    allowed = {run["tags"][RUN_TAG]: finite(run["params"].get(BUDGET)) for run in stored}
    in_period: dict[str, list[Charge]] = {}
    for charge in paid:
        if charge.device_h > 0:
            in_period.setdefault(charge.run, []).append(charge)
    found: dict[Place, list[OwnBudgets]] = {}
    mixed = earlier = 0
    over: list[str] = []
    for run in runs:
        if run.run not in in_period:
            continue
        every = charges(run)
        places = grouped([each for each in every if each.device_h > 0], by)
        devices, budget_h = {device for _, device, _ in places}, allowed.get(run.run)
        group = run.owner.get(by) or f"(no {by})"
        if budget_h is None:
            for device in devices:
                found.setdefault((group, device), []).append(OwnBudgets(num_without=1))
            continue
        if len(devices) > 1:
            mixed += 1
            continue
        whole_h = math.fsum(each.device_h for each in every)
        earlier += whole_h > math.fsum(each.device_h for each in in_period[run.run]) + ROUNDING_H
        if whole_h > budget_h + ROUNDING_H:
            over.append(run.run)
        own = OwnBudgets(allowed_h=budget_h, spent_h=whole_h, num=1)
        found.setdefault((group, next(iter(devices))), []).append(own)
    return Declared(
        by_place={place: _added(parts) for place, parts in found.items()},
        num_mixed=mixed,
        num_earlier=earlier,
        over=over,
    )


# -- what was wasted ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What one cause took on one device model.

    Attributes:
        cause: Its name, or `NOT_TOLD`.
        share: Of the hours whose waste is known.
        stage: That lost most by it, or `OUTSIDE_STAGES`; `run` is its run.
        is_metered: Whether that stage was another program.
        has_ranks: Whether several processes made it.
    """

    cause: str
    device: str
    device_h: float
    share: float
    stage: str
    run: str
    is_metered: bool = False
    has_ranks: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """What one stage attempt, or all that is outside of a run's stages, lost by its causes."""

    charge: Charge
    wasted_h: float
    causes: Mapping[str, float]
    stored: StoredRun | None


def losses(
    paid: Iterable[Charge], stored: Iterable[StoredRun], runs: Iterable[RunFacts], by: str
) -> list[Loss]:
    """Return what was wasted, by cause and device model, the largest first.

    The sum on a device model is what the chargeback calls wasted there.

    Args:
        paid: What was spent in the period.
        runs: All that the store has, those inside metered ones too: a metered program that does not
            tell its waste is known by what these tell.
    """
    held, inside = {run["tags"][RUN_TAG]: run for run in stored}, _inside(runs)
    known_h: dict[str, float] = {}
    found: dict[Place, list[tuple[float, _Part]]] = {}
    for (_, device, _), members in grouped(paid, by).items():
        if not tells(members):
            continue
        hours = math.fsum(map(known_waste_h, members))
        known_h[device] = known_h.get(device, 0.0) + hours
        for part in _parts(members, held, inside):
            rest_h = part.wasted_h - math.fsum(part.causes.values())
            causes = {**part.causes, NOT_TOLD: rest_h if rest_h > ROUNDING_H else 0.0}
            for cause, lost_h in causes.items():
                if lost_h > 0:
                    found.setdefault((cause, device), []).append((lost_h, part))
    lost = [
        _loss(cause, device, parts, known_h[device]) for (cause, device), parts in found.items()
    ]
    return sorted(lost, key=lambda each: (-each.device_h, each.cause, each.device))


def _inside(runs: Iterable[RunFacts]) -> dict[str, list[RunFacts]]:
    found: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.nested_in is not None:
            found.setdefault(run.nested_in, []).append(run)
    return found


def _parts(
    members: Iterable[Charge],
    held: Mapping[str, StoredRun],
    inside: Mapping[str, Sequence[RunFacts]],
) -> list[_Part]:
    found: list[_Part] = []
    outside: dict[str, list[Charge]] = {}
    for charge in members:
        if charge.what in OUTSIDE:
            outside.setdefault(charge.run, []).append(charge)
        elif charge.device_h > 0 and charge.wasted_h:
            own = held.get(f"{charge.run}/{charge.what}")
            causes = _told(own, "compute/wasted_{}_device_hours")
            if not causes:
                causes = _told_inside(inside.get(charge.run, ()), held)
            found.append(_Part(charge, charge.wasted_h, causes, own))
    for name, same in outside.items():
        wasted_h = math.fsum(each.wasted_h or 0.0 for each in same)
        causes = _told(held.get(name), "compute/run_wasted_{}_device_hours")
        found.append(_Part(same[0], wasted_h, causes if wasted_h > 0 else {}, None))
    return found


def _told(run: StoredRun | None, key: str) -> dict[str, float]:
    if run is None:
        return {}
    read = {cause: run["metrics"].get(key.format(cause)) for cause in WASTE_CAUSES}
    return {cause: hours for cause, hours in read.items() if hours is not None}


def _told_inside(runs: Iterable[RunFacts], held: Mapping[str, StoredRun]) -> dict[str, float]:
    """Return what runs inside a metered one tell of its waste."""
    found: dict[str, float] = {}
    for run in runs:
        for part in _parts(charges(run), held, {}):
            for cause, hours in part.causes.items():
                found[cause] = found.get(cause, 0.0) + hours
    return found


def _loss(cause: str, device: str, parts: Sequence[tuple[float, _Part]], known_h: float) -> Loss:
    worst = max(parts, key=lambda each: (each[0], each[1].charge.run, each[1].charge.what))[1]
    lost_h = math.fsum(hours for hours, _ in parts)
    return Loss(
        cause=cause,
        device=device,
        device_h=lost_h,
        share=min(lost_h / known_h, 1.0) if known_h > 0 else 0.0,
        stage=OUTSIDE_STAGES if worst.charge.what in OUTSIDE else worst.charge.what,
        run=worst.charge.run,
        is_metered=worst.stored is not None and worst.stored["tags"].get("type") == "metered",
        has_ranks=worst.stored is not None and _devices(worst.stored) > 1.5,
    )


def _devices(run: StoredRun) -> float:
    """Return on how many devices a stage attempt worked, on average."""
    seconds, wall_s = (
        run["metrics"].get(key, math.nan) for key in ("compute/device_seconds", "compute/wall_s")
    )
    return seconds / wall_s if wall_s > 0 else 1.0


# -- forecasts ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """How good the forecasts of device-hours were.

    Attributes:
        num: Runs that ended and had one.
        covered: Of them, those whose hours lay inside the 90% interval.
        error: Median of how far they lay from what was expected, as a share of that.
        width: Median of the interval's length, as a share of what was expected.
    """

    num: int
    covered: int
    error: float
    width: float


def foreseen(stored: Iterable[StoredRun], start_s: float, end_s: float) -> Foreseen | None:
    """Return how good the forecasts were of runs that ended in a period; None where none did.

    Args:
        start_s: UTC, seconds since 1970; `end_s` is no part of the period.
    """
    key = "forecast/device_hours"
    names = (key, f"{key}_low", f"{key}_high", "forecast/actual_device_hours")
    found: list[tuple[float, float, float, float]] = []
    for run in stored:
        ended_ms = run["end_ms"]
        if "/" in run["tags"][RUN_TAG] or ended_ms is None:
            continue
        expected, low, high, actual = (run["metrics"].get(name, math.nan) for name in names)
        # a run that did nothing of what was expected says nothing
        is_told = all(map(math.isfinite, (expected, low, high, actual))) and expected > 0 < actual
        if is_told and start_s * 1000 <= ended_ms < end_s * 1000:
            found.append((expected, low, high, actual))
    if not found:
        return None
    return Foreseen(
        num=len(found),
        covered=sum(low <= actual <= high for _, low, high, actual in found),
        error=median(abs(actual / expected - 1) for expected, _, _, actual in found),
        width=median((high - low) / expected for expected, low, high, _ in found),
    )
