"""Money: a declared rate times the hours it is owed for, and never more than what somebody
declared.

What is charged follows from what is declared:

- Nothing: null. Hours are shown all the same.
- `cost=rented` (rate, currency, source, date): rate x hours. The rate has power and cooling in it,
  so neither is added.
- `cost=owned` (a price per owned device-hour): the same, and power by its price and a PUE where
  both are declared.

Hours are what the scheduler held for the job (`gpu_hours.allocated`). Where nobody granted anything
they are those the job was attached for: a lower bound, since a device may have been held for
longer, and so `estimated`. So is a sum that should hold power of devices whose energy could not be
read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from typing import Any

from pipeline.config.settings.cost import CostConfig, CostKind
from pipeline.errors import UserError
from pipeline.ledger.shapes import LedgerRecord, Money
from pipeline.ledger.values import Provenance, Value, declared, derive, estimated, null

JOULES_PER_KWH = 3.6e6
NO_RATE = "no rate declared"
NO_PUE = "no PUE declared"
NO_CO2 = "no intensity declared: cost.co2_g_per_kwh"
_CURRENCY = re.compile(r"[A-Z]{3}")  # ISO 4217


def money(
    device_hours: float,
    cost: CostConfig,
    *,
    allocated: Value | None = None,
    energy_j: Value | None = None,
) -> Money:
    """Return what device-hours cost, as a ledger holds it: `{"amount": value, "currency",
    "facility_energy_j": value}`.

    Args:
        device_hours: Attached.
        allocated: GPU-hours that a scheduler held for them; None or null: nobody tells.
        energy_j: Board energy in them, in joules; part of the amount only where an energy price is
            declared.
    """
    energy_j = energy_j or null("not read")
    amount = _amount(device_hours, cost, allocated or null("not reported"), energy_j)
    return {
        "amount": amount.to_json(),
        "currency": None if amount.value is None else cost.currency,
        "facility_energy_j": facility_energy(energy_j, cost).to_json(),
    }


def priced(record: LedgerRecord, cost: CostConfig) -> LedgerRecord:
    """Return a row's ledger with its money at the rate that is declared now."""
    hours, allocated = (
        record["device_hours"]["attached"],
        Value.from_json(record["gpu_hours"]["allocated"]),
    )
    if hours["value"] is None:
        return {**record, "cost": {"amount": hours, "currency": None, "facility_energy_j": hours}}
    energy_j = Value.from_json(record["energy_j"])
    return {**record, "cost": money(hours["value"], cost, allocated=allocated, energy_j=energy_j)}


def _amount(device_hours: float, cost: CostConfig, allocated: Value, energy_j: Value) -> Value:
    if cost.per_device_hour is None:
        return null(NO_RATE)
    held = estimated(device_hours) if allocated.value is None else allocated
    amount = _times(declared(cost.per_device_hour), held)
    if cost.energy_price_per_kwh is None:
        return amount
    power = _times(
        # Per joule, because energy is in joules.
        declared(cost.energy_price_per_kwh / JOULES_PER_KWH),
        facility_energy(energy_j, cost),
    )
    if power.value is None:  # what is known of it
        return estimated(amount.value or 0.0)
    return Value(
        (amount.value or 0.0) + power.value,
        Provenance.ESTIMATED
        if Provenance.ESTIMATED in (amount.provenance, power.provenance)
        else Provenance.DECLARED,
    )


def _times(price: Value, quantity: Value) -> Value:
    """Multiply; a lower bound of hours, or an estimate of energy, shows although a price is
    declared.
    """
    product = derive(lambda a, b: a * b, price, quantity)
    return (
        estimated(product.value)
        if quantity.provenance is Provenance.ESTIMATED and product.value is not None
        else product
    )


def facility_energy(energy_j: Value, cost: CostConfig) -> Value:
    """Return joules that the facility drew for what the boards drew; null without a declared
    PUE.
    """
    if cost.pue is None:
        return null(NO_PUE)
    return derive(lambda board, pue: board * pue, energy_j, declared(cost.pue))


def cost_in(settings: Mapping[str, Any]) -> CostConfig:
    """Return what the settings of a run that has ended declare; later settings have defaults."""
    rates: dict[str, Any] = dict(settings["cost"])
    kind = rates.pop("kind", None)
    return CostConfig(kind=None if kind is None else CostKind(kind), **rates)


def check_cost(cost: CostConfig) -> None:
    """Refuse money that nobody can vouch for, and power that is paid twice.

    Raises:
        UserError: Naming the setting.
    """
    for name, value in asdict(cost).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"cost.{name}", f"{value} is out of range", "give a finite number")
    if cost.per_device_hour is not None:
        _check_said(cost)
    elif cost.kind is not None:
        what = "asks for" if cost.kind is CostKind.rented else "is put at"
        raise UserError(
            "cost.per_device_hour",
            "is missing",
            f"say what a device-hour {what}, or leave cost= out",
        )
    elif said := [
        name for name in ("currency", "source", "date") if getattr(cost, name) is not None
    ]:
        raise UserError(
            "cost.per_device_hour", "is missing", f"give the rate, or leave cost.{said[0]} out"
        )
    if cost.energy_price_per_kwh is not None:
        _check_power(cost)
    if cost.co2_g_per_kwh is not None and not (cost.co2_source or "").strip():
        problem = "an intensity without its source is a guess"
        raise UserError("cost.co2_source", problem, "say who publishes cost.co2_g_per_kwh")
    if cost.co2_g_per_kwh is None and cost.co2_source is not None:
        raise UserError("cost.co2_g_per_kwh", "is missing", "give it, or leave cost.co2_source out")


def emissions_g(energy_j: Value, cost: CostConfig) -> Value:
    """Return grams of CO2 equivalent for what the boards drew, of the facility where a PUE is
    declared; null without a declared intensity.
    """
    if cost.co2_g_per_kwh is None:
        return null(NO_CO2)
    drawn = energy_j if cost.pue is None else facility_energy(energy_j, cost)
    return _times(declared(cost.co2_g_per_kwh / JOULES_PER_KWH), drawn)


def _check_said(cost: CostConfig) -> None:
    if not (cost.source or "").strip():
        raise UserError(
            "cost.source", "a rate without its source is a guess", "say where the rate comes from"
        )
    if cost.date is None or not _is_date(cost.date):
        problem = (
            "a rate without its date is a guess"
            if cost.date is None
            else f"{cost.date!r} is no date"
        )
        raise UserError("cost.date", problem, "say when the source said so, e.g. 2026-11-23")
    if cost.currency is None or not _CURRENCY.fullmatch(cost.currency):
        problem = (
            "a rate without its currency is no price"
            if cost.currency is None
            else f"{cost.currency!r} is none"
        )
        raise UserError("cost.currency", problem, "give its three letters, e.g. EUR")


def _check_power(cost: CostConfig) -> None:
    key = "cost.energy_price_per_kwh"
    if cost.kind is not CostKind.owned:
        raise UserError(
            key, "is for owned devices: what is rented has its power in the rate", "use cost=owned"
        )
    if cost.per_device_hour is None:
        raise UserError(
            "cost.per_device_hour",
            "is missing",
            "say what an owned device-hour is put at without power",
        )
    if cost.pue is None:
        raise UserError(
            "cost.pue",
            "is not declared, and a bill is for all that a facility draws",
            "give e.g. 1.2",
        )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
