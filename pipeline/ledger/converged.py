"""Cost per converged model: everything spent under one `model.name` until its first artifact at the
declared quality.

Attempts, trials, failures and start-up count, whoever's run they were in; so does what was taken
over from runs under other names. Stages that ended later do not, nor does the comparison pass of
the run that made the artifact. Without a declared quality (`cost.converged_at`), or before any
artifact has it, the cost is null and says why. What was made under a meter has the hours of the
meter's run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.ledger.charge_sources import journal_facts
from pipeline.ledger.charges import Charge, RunFacts, charges, not_counted_twice
from pipeline.ledger.journal import read_events, read_first
from pipeline.ledger.metrics import DIRECTION
from pipeline.ledger.records import STARTED, sound_events, why_damaged
from pipeline.ledger.shapes import ConvergedRecord, RunTotals
from pipeline.ledger.values import Value, estimated, measured, null

NO_TARGET = "no quality declared: cost.converged_at"
_WITHOUT_RATE = "{:.6g} device-hours have no rate"


@dataclass(frozen=True, slots=True)
class Converged:
    """What a model took until it converged.

    Attributes:
        device_hours: Null with the reason where it has not.
        amount: In `currency`; a lower bound, as all money of attached hours is.
        run: The run that made the first artifact at the declared quality.
    """

    device_hours: Value
    amount: Value
    currency: str | None = None
    run: str | None = None

    def to_json(self) -> ConvergedRecord:
        """Return the form it has in result.json."""
        return {
            "device_hours": self.device_hours.to_json(),
            "amount": self.amount.to_json(),
            "currency": self.currency,
            "run": self.run,
        }


def per_converged_model(runs: Iterable[RunFacts], target: float | None) -> Converged:
    """Return what the runs of one model took until its first artifact at the declared quality.

    Args:
        runs: All under one `model.name`.
        target: On `quality/primary`, in the direction the catalogue gives it.
    """
    if target is None:
        return _not_yet(NO_TARGET)
    runs = list(runs)
    found = [charge for run in not_counted_twice(runs)[0] for charge in charges(run)]
    assessed = [charge for run in runs for charge in run.stages if charge.quality is not None]
    reached = [charge for charge in assessed if _is_reached(charge, target)]
    if not reached:
        return _not_yet(_how_far(assessed, target))
    first = min(reached, key=lambda charge: charge.ended_s)
    counted = [charge for charge in found if _counts(charge, first, _outermost(first.run, runs))]
    # Hours taken over from runs that are not among these: from runs under another name. Each stage
    # counts once, however many runs took it over.
    taken = {
        (charge.reused_from, charge.what): charge
        for charge in counted
        if charge.reused_from not in (None, *(charge.run for charge in found))
    }
    hours = math.fsum([*(c.device_h for c in counted), *(c.reused_h for c in taken.values())])
    return Converged(measured(hours), *_money(counted, list(taken.values())), run=first.run)


def _counts(charge: Charge, first: Charge, holder: str) -> bool:
    """Tell whether a charge came before the first artifact; one made under a meter has all of the
    meter's run.
    """
    before_its_end = charge.run == holder and (
        holder != first.run or charge.what in ("overhead", "open")
    )
    return charge.ended_s <= first.ended_s or before_its_end


def _outermost(run: str, runs: Iterable[RunFacts]) -> str:
    """Return the metered run whose seconds a run's are, if there is one, else the run itself."""
    inside = {each.run: each.nested_in for each in runs}
    # A meter may run inside a meter.
    while (outer := inside.get(run)) is not None and outer in inside:
        run = outer
    return run


def _is_reached(charge: Charge, target: float) -> bool:
    assert charge.quality is not None
    key, value = charge.quality
    return (value - target) * DIRECTION[key] >= 0


def _how_far(assessed: Sequence[Charge], target: float) -> str:
    if not assessed:
        return "not reached yet: no artifact was assessed"
    values = [charge.quality for charge in assessed if charge.quality is not None]
    key, best = max(values, key=lambda quality: quality[1] * DIRECTION[quality[0]])
    return f"not reached yet: best {key} {best:.6g} of {target:.6g}"


def _not_yet(why: str) -> Converged:
    return Converged(null(why), null(why))


def _money(counted: Sequence[Charge], taken: Sequence[Charge]) -> tuple[Value, str | None]:
    """Return what charges cost, and in which currency; null where a part has no rate, or another
    currency.
    """
    paid = [(c.amount, c.currency, c.device_h) for c in counted if c.device_h]
    paid += [(c.reused_amount, c.currency, c.reused_h) for c in taken]
    unpriced_h = math.fsum(hours for amount, _, hours in paid if amount is None)
    currencies = sorted({currency or "" for amount, currency, _ in paid if amount is not None})
    if unpriced_h or not paid:
        return null(_WITHOUT_RATE.format(unpriced_h)), None
    if len(currencies) > 1:
        return null(f"paid in {' and '.join(currencies)}, which do not add up"), None
    return (
        estimated(math.fsum(amount for amount, _, _ in paid if amount is not None)),
        currencies[0] or None,
    )


def of_this_run(
    folder: Path, totals: RunTotals, target: float | None, model_name: str
) -> Converged:
    """Return what the model of a run took until it converged, from the journals of all runs beside
    it.

    Args:
        folder: Of the run, which is about to end.
        totals: The `run` of its result.
        target: `cost.converged_at`.
        model_name: `model.name`.
    """
    if target is None:
        return _not_yet(NO_TARGET)
    runs: list[RunFacts] = []
    for other in sorted(folder.parent.glob("*/journal.jsonl")):
        start = read_first(other)
        if start is None or start["e"] != "run_start" or why_damaged(start, STARTED) is not None:
            continue
        if start["params"].get("model.name") == model_name:
            events = sound_events(read_events(other), other)
            if (
                all(
                    why_damaged(each, STARTED) is None
                    for each in events
                    if each["e"] == "run_start"
                )
                and events
            ):
                runs.append(journal_facts(events, totals if other.parent == folder else None))
    return per_converged_model(runs, target)
