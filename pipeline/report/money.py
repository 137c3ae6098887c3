"""Money of a run in words: what its stages cost, what their facility drew, what its model took
until it converged.

Nothing is said of what nobody declared: a rate, a PUE, the quality from which a model counts as
converged.
"""

from __future__ import annotations

from typing import Literal

from pipeline.errors import one_line
from pipeline.ledger.converged import NO_TARGET
from pipeline.ledger.numbers import count, duration, how_many, significant
from pipeline.ledger.shapes import Allocated, ConvergedRecord, Result, Row, RunMoney

CONVERGED_KEYS = ("compute/per_converged_model_device_hours", "cost/per_converged_model")


def money(v: float, currency: str | None) -> str:
    """Return an amount with its currency: `4.03 EUR`, `0.00123 EUR`."""
    return (
        f"{v:.2f} {currency or ''}".strip()
        if v >= 1
        else f"{significant(v)} {currency or ''}".strip()
    )


def joules(v: float) -> str:
    """Return joules with their prefix: `12.3 kJ`."""
    return f"{count(v)} J".replace(" k J", " kJ").replace(" M J", " MJ").replace(" G J", " GJ")


def money_lines(result: Result) -> list[str]:
    """Return a line for each thing that is known, for below the table of arms."""
    own = [
        row
        for row in result["rows"]
        if not row["reused"] and row["ledger"]["device_hours"]["attached"]["value"]
    ]
    currency = next((row["ledger"]["cost"]["currency"] for row in own), None)
    amount, drawn = _sum(own, "amount"), _sum(own, "facility_energy_j")
    whole = cost_of_run(result["run"].get("cost"))
    converged = _converged(result["run"].get("per_converged_model"))
    return [
        *([] if whole is None else [whole]),
        *([] if amount is None else [f"cost of the stages made here {money(amount, currency)}"]),
        *([] if drawn is None else [f"facility energy of the stages made here {joules(drawn)}"]),
        *([] if converged is None else [converged]),
    ]


def cost_of_run(cost: RunMoney | None) -> str | None:
    """Say what the run cost, overhead and comparison pass included, and at whose word."""
    if cost is None or cost["rate"] is None:
        return None
    rate, amount = cost["rate"], cost["amount"]
    said = (
        f"- ({amount['why_missing']})"
        if amount["value"] is None
        else money(amount["value"], cost["currency"])
    )
    kind = f"{rate['kind']}, " if rate["kind"] else ""
    price = f"{significant(rate['per_device_hour'])} {cost['currency']} per device-hour"
    return (
        f"cost of this run {said}: {price} ({kind}{one_line(rate['source'], 80)}, {rate['date']}) x"
        f" {cost['basis']}"
    )


def held(allocated: Allocated | None) -> str | None:
    """Say what a scheduler held for the run's jobs; nothing without one."""
    if allocated is None or not allocated["grants"]:
        return None
    hours, grants = allocated["gpu_hours"], allocated["grants"]
    jobs = ", ".join(dict.fromkeys(one_line(grant["job_id"], 40) for grant in grants))
    if hours["value"] is None:
        return f"what Slurm held is not known: {one_line(hours['why_missing'])}"
    lasts = ", which had not ended yet" if not all(grant["ended"] for grant in grants) else ""
    starts = how_many(len(grants), "start")
    taken = duration(3600 * hours["value"])
    return f"Slurm held {taken} of GPU time for it (job {jobs}, {starts}{lasts})"


def _sum(rows: list[Row], name: Literal["amount", "facility_energy_j"]) -> float | None:
    """Return the sum over rows; None where one of them does not know."""
    figures = [row["ledger"]["cost"].get(name) for row in rows]
    found = [None if figure is None else figure["value"] for figure in figures]
    known = [v for v in found if v is not None]
    return sum(known) if known and len(known) == len(found) else None


def _converged(record: ConvergedRecord | None) -> str | None:
    if record is None or record["device_hours"]["why_missing"] == NO_TARGET:
        return None
    if record["device_hours"]["value"] is None:
        return f"its model has not converged: {one_line(record['device_hours']['why_missing'])}"
    paid, why = record["amount"]["value"], record["amount"]["why_missing"]
    cost = f"cost unknown ({one_line(why)})" if paid is None else money(paid, record["currency"])
    taken = duration(3600 * record["device_hours"]["value"])
    return (
        f"until its model converged: {taken} of device time, {cost}; reached in run"
        f" {one_line(record['run'], 60)}"
    )
