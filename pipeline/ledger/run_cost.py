"""What a whole run cost: its stages, its comparison pass and its overhead, at the rate that is
declared now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config.settings.cost import CostConfig
from pipeline.ledger.charge_sources import journal_facts
from pipeline.ledger.charges import Charge, charges
from pipeline.ledger.cost import NO_RATE
from pipeline.ledger.shapes import Event, Rate, RunMoney, RunTotals
from pipeline.ledger.values import Value, estimated, null

HELD = "hours that the scheduler held"
ATTACHED = "attached hours, a lower bound of what was held"


def run_cost(events: Sequence[Event], totals: RunTotals, cost: CostConfig) -> RunMoney:
    """Return the money of a run as result.json has it: `{"amount", "currency", "rate", "basis"}`.

    Args:
        events: Of its journal, all rows among them.
        totals: The `run` of its result.
        cost: What was declared; without a rate, the amount is null.
    """
    if cost.per_device_hour is None:
        return {"amount": null(NO_RATE).to_json(), "currency": None, "rate": None, "basis": None}
    rate: Rate = {
        "per_device_hour": cost.per_device_hour,
        "kind": None if cost.kind is None else cost.kind.value,
        "source": cost.source,
        "date": cost.date,
    }
    unpaid: RunMoney = {
        "amount": null(NO_RATE).to_json(),
        "currency": cost.currency,
        "rate": rate,
        "basis": None,
    }
    return paid_for(unpaid, events, totals)


def paid_for(money: RunMoney, events: Sequence[Event], totals: RunTotals) -> RunMoney:
    """Return the money of a run at its own rate for what its totals say now."""
    facts = journal_facts(events, totals)
    paid = [each for each in charges(facts) if each.device_h or each.what == "held"]
    held = all(charge.allocated_gpu_h is not None for charge in paid)
    amount = _amount(paid, money["currency"]).to_json()
    return {**money, "amount": amount, "basis": HELD if held else ATTACHED}


def _amount(paid: Sequence[Charge], currency: str | None) -> Value:
    """Return the sum; null where an attempt of this run was charged in another currency, or at no
    rate.
    """
    other = [each for each in paid if each.amount is None or each.currency != currency]
    if other:
        hours = math.fsum(each.device_h for each in other)
        return null(f"{hours:.3g} device-hours were charged at no rate, or in another currency")
    return estimated(math.fsum(each.amount or 0.0 for each in paid))
