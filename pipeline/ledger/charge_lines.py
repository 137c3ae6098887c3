"""Charges of a period as lines that add up: who spent what. `report/chargeback.py` shows them.

A line holds one group on one device model in one currency, so that nothing is added that does not
add up; hours without a rate are a line of their own. Of what some charges do not tell (energy,
waste) a line holds the known sum, and beside it the device-hours of which it is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.ledger.charges import OUTSIDE, Charge, known_waste_h
from pipeline.ledger.cost import JOULES_PER_KWH

TOTAL, IDLE = "total", "idle capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line. Hours are device-hours unless they say GPU; None is not known.

    Attributes:
        kind: `group`, `total` or `idle`.
        runs: Different runs in it.
        energy_unread_h: Of which no energy was read.
        waste_unknown_h: Of which nobody knows what was waste.
    """

    kind: str
    group: str
    device: str
    currency: str
    runs: frozenset[str] = frozenset()
    device_h: float = 0.0
    reused_h: float = 0.0
    gpu_h: float | None = None
    allocated_gpu_h: float | None = None
    energy_kwh: float | None = None
    energy_unread_h: float = 0.0
    amount: float | None = None
    wasted_h: float | None = None
    waste_unknown_h: float = 0.0

    @property
    def waste_share(self) -> float | None:
        """Waste of the hours of which it is known."""
        known_h = self.device_h - self.waste_unknown_h
        return None if self.wasted_h is None or known_h <= 0 else min(self.wasted_h / known_h, 1.0)


def lines(charges: Iterable[Charge], by: str) -> list[Line]:
    """Return a line per group, device model and currency, largest first, then the totals per device
    and currency.
    """
    found = [_line(*key, members) for key, members in grouped(charges, by).items()]
    found.sort(key=lambda line: (-line.device_h, line.group, line.device, line.currency))
    return [*found, *totals(found)]


def grouped(charges: Iterable[Charge], by: str) -> dict[tuple[str, str, str], list[Charge]]:
    """Return charges by group, device model and currency; what is not known has a name."""
    groups: dict[tuple[str, str, str], list[Charge]] = {}
    for charge in charges:
        group = charge.owner.get(by) or f"(no {by})"
        groups.setdefault((group, charge.device or "(unknown)", charge.currency or ""), []).append(
            charge
        )
    return groups


def _line(group: str, device: str, currency: str, charges: Sequence[Charge]) -> Line:
    joules = _sum(charge.energy_j for charge in charges)
    unread = [charge.device_h for charge in charges if charge.energy_j is None]
    known = charges if tells(charges) else []
    known_h = math.fsum(map(known_waste_h, known))
    return Line(
        kind="group",
        group=group,
        device=device,
        currency=currency,
        runs=frozenset(c.run for c in charges),
        device_h=math.fsum(c.device_h for c in charges),
        reused_h=math.fsum(c.reused_h for c in charges),
        gpu_h=_sum(c.gpu_h for c in charges),
        allocated_gpu_h=_sum(c.allocated_gpu_h for c in charges),
        energy_kwh=None if joules is None else joules / JOULES_PER_KWH,
        energy_unread_h=math.fsum(unread),
        amount=_sum(c.amount for c in charges),
        wasted_h=_sum(c.wasted_h for c in known),
        waste_unknown_h=math.fsum(c.device_h for c in charges) - known_h,
    )


def tells(charges: Sequence[Charge]) -> bool:
    """Tell whether any stage knows its waste, if one spent anything: overhead alone does not speak
    for silent ones.
    """
    stages = [each for each in charges if each.what not in OUTSIDE and each.device_h > 0]
    return not stages or any(known_waste_h(each) > 0 for each in stages)


def totals(found: Sequence[Line]) -> list[Line]:
    """Return a total per device model and currency: the sum of the lines that have these."""
    keys = sorted({(line.device, line.currency) for line in found})
    return [_total([line for line in found if (line.device, line.currency) == key]) for key in keys]


def _total(same: Sequence[Line]) -> Line:
    return Line(
        kind=TOTAL,
        group=TOTAL,
        device=same[0].device,
        currency=same[0].currency,
        runs=frozenset[str]().union(*(line.runs for line in same)),
        device_h=math.fsum(line.device_h for line in same),
        reused_h=math.fsum(line.reused_h for line in same),
        gpu_h=_sum(line.gpu_h for line in same),
        allocated_gpu_h=_sum(line.allocated_gpu_h for line in same),
        energy_kwh=_sum(line.energy_kwh for line in same),
        amount=_sum(line.amount for line in same),
        energy_unread_h=math.fsum(line.energy_unread_h for line in same),
        wasted_h=_sum(line.wasted_h for line in same),
        waste_unknown_h=math.fsum(line.waste_unknown_h for line in same),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def idle(
    found: Sequence[Line], device: str, num_devices: int, period_h: float
) -> tuple[Line | None, str]:
    """Return the idle capacity of a device model in a period, and the sentence that says how it
    was computed.

    Args:
        num_devices: Declared.
        period_h: Hours of the period that have passed.

    Returns:
        No line where more was used than was declared.
    """
    same = [line for line in found if line.kind == TOTAL and line.device == device]
    used_h = math.fsum(max(line.device_h, line.allocated_gpu_h or 0.0) for line in same)
    idle_h = num_devices * period_h - used_h
    said = f"capacity: {num_devices} x {device} (declared) x {period_h:g} h - {used_h:.3f} h used"
    if idle_h < 0:
        return (
            None,
            (
                f"{said} = {idle_h:.3f} h: more was used than was declared, so nothing is said of"
                " idle capacity"
            ),
        )
    return Line(kind="idle", group=IDLE, device=device, currency="", device_h=idle_h), said
