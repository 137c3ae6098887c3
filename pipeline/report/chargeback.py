"""The chargeback: who spent what in a period, as lines that add up, for a terminal and as CSV.

A line holds one group on one device model in one currency, so that nothing is added that does not
add up; hours without a rate are a line of their own. Of what some charges do not tell (energy,
waste) a line holds the known sum, and beside it the device-hours of which it is not known.
"""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import one_line
from pipeline.ledger.charges import OUTSIDE, Charge, known_waste_h
from pipeline.ledger.cost import JOULES_PER_KWH
from pipeline.ledger.numbers import agreed, percent
from pipeline.report.text import pad, shorten

TOTAL, IDLE = "total", "idle capacity"
COLUMNS = (
    "kind",
    "group",
    "device",
    "currency",
    "runs",
    "device_hours",
    "reused_device_hours",
    "gpu_hours",
    "allocated_gpu_hours",
    "energy_kwh",
    "energy_unread_device_hours",
    "amount",
    "wasted_device_hours",
    "waste_unknown_device_hours",
    "waste_share",
)
_HEAD = (
    "",
    "device",
    "runs",
    "device-h",
    "GPU-h",
    "energy kWh",
    "money",
    "wasted h",
    "waste",
    "reused h",
)
_NAME_WIDTH = 28
SHOWN = 5  # groups that a footnote names
_FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\N{FULLWIDTH EQUALS SIGN}",
    "\N{FULLWIDTH PLUS SIGN}",
    "\N{FULLWIDTH HYPHEN-MINUS}",
    "\N{FULLWIDTH COMMERCIAL AT}",
)
"""What a spreadsheet takes for the beginning of a formula. Source: OWASP, CSV Injection."""


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
    groups: dict[tuple[str, str, str], list[Charge]] = {}
    for charge in charges:
        group = charge.owner.get(by) or f"(no {by})"
        groups.setdefault((group, charge.device or "(unknown)", charge.currency or ""), []).append(
            charge
        )
    found = [_line(*key, members) for key, members in groups.items()]
    found.sort(key=lambda line: (-line.device_h, line.group, line.device, line.currency))
    return [*found, *totals(found)]


def _line(group: str, device: str, currency: str, charges: Sequence[Charge]) -> Line:
    joules = _sum(charge.energy_j for charge in charges)
    unread = [charge.device_h for charge in charges if charge.energy_j is None]
    known = charges if _tells(charges) else []
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


def _tells(charges: Sequence[Charge]) -> bool:
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


# -- terminal -------------------------------------------------------------------------------------
def table(found: Sequence[Line]) -> list[str]:
    """Return the table's lines."""
    body = [_cells(line) for line in found]
    names = list(dict.fromkeys(row[0] for row in body))
    short = dict(zip(names, shorten(names, _NAME_WIDTH), strict=True))
    rows = [list(_HEAD), *([short[row[0]], *row[1:]] for row in body)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_HEAD))]
    return [
        "  ".join(
            pad(cell, width, right=index > 1)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(line: Line) -> list[str]:
    share = line.waste_share
    is_idle = line.kind == "idle"
    return [
        one_line(line.group, 200),
        one_line(line.device, _NAME_WIDTH),
        "" if is_idle else str(len(line.runs)),
        _hours(line.device_h),
        *(
            [""] * 6
            if is_idle
            else [
                _hours(line.gpu_h),
                _hours(line.energy_kwh),
                _money(line),
                _hours(line.wasted_h),
                "-" if share is None else percent(share),
                _hours(line.reused_h),
            ]
        ),
    ]


def _hours(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def _money(line: Line) -> str:
    return (
        "-"
        if line.amount is None
        else f"{_hours(line.amount)} {one_line(line.currency, 8)}".strip()
    )


def footnotes(found: Sequence[Line]) -> list[str]:
    """Return what has to be said of the figures of these lines."""
    said: list[tuple[float, str]] = []
    every = [line for line in found if line.kind == TOTAL]
    unpriced_h = math.fsum(line.device_h for line in every if line.amount is None)
    said.append((unpriced_h, "have no declared rate: money -"))
    said.append(
        (
            math.fsum(line.energy_unread_h for line in every),
            "have no energy reading and are not in energy",
        )
    )
    said.append(
        (
            math.fsum(line.waste_unknown_h for line in every),
            "do not tell waste; shares leave them out",
        )
    )
    no_gpu_h = math.fsum(line.device_h for line in every if line.gpu_h is None)
    said.append((no_gpu_h, "are on no GPU, or of runs that do not say: GPU-h -"))
    return [
        *(f"{_hours(hours)} device-hours {text}" for hours, text in said if hours > 0),
        *_several_lines(found),
    ]


def _several_lines(found: Sequence[Line]) -> list[str]:
    """Say why a group has more than one line of one device: money is added in one currency."""
    times = Counter((line.group, line.device) for line in found if line.kind == "group")
    groups = list(dict.fromkeys(one_line(group, 60) for (group, _), n in times.items() if n > 1))
    if not groups:
        return []
    named = ", ".join(groups[:SHOWN]) + (f" and {len(groups) - SHOWN} more" * (len(groups) > SHOWN))
    stands = agreed(len(groups), "stands", "stand")
    return [
        f"{named} {stands} on more than one line: each currency has one, and so have hours without"
        " a rate"
    ]


# -- CSV ------------------------------------------------------------------------------------------
def to_csv(found: Iterable[Line]) -> str:
    """Return the lines as CSV (RFC 4180); numbers are numbers, what is not known is empty, no cell
    is a formula.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for line in found:
        values = (
            line.kind,
            line.group,
            line.device,
            line.currency,
            None if line.kind == "idle" else len(line.runs),
            line.device_h,
            line.reused_h,
            line.gpu_h,
            line.allocated_gpu_h,
            line.energy_kwh,
            line.energy_unread_h,
            line.amount,
            line.wasted_h,
            line.waste_unknown_h,
            line.waste_share,
        )
        writer.writerow([harmless(value) if isinstance(value, str) else value for value in values])
    return text.getvalue()


def harmless(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula, with nothing in it that hides."""
    is_shown: Callable[[str], bool] = lambda c: (
        c in "\t\r\n" or not unicodedata.category(c).startswith("C")
    )
    shown = "".join(filter(is_shown, text))
    return f"'{shown}" if shown.lstrip(" \N{NO-BREAK SPACE}").startswith(_FORMULA) else shown
