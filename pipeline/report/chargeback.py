"""The chargeback: who spent what in a period, as lines that add up, for a terminal and as CSV. The
lines are made in `ledger/charge_lines.py`.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from pipeline.errors import one_line
from pipeline.ledger.charge_lines import TOTAL, Line
from pipeline.ledger.numbers import agreed, percent
from pipeline.report.text import pad, shorten

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
    asked: tuple[tuple[Callable[[Line], float], str], ...] = (
        (
            lambda line: line.device_h if line.amount is None else 0.0,
            "have no declared rate: money -",
        ),
        (lambda line: line.energy_unread_h, "have no energy reading and are not in energy"),
        (lambda line: line.waste_unknown_h, "do not tell waste; shares leave them out"),
        (
            lambda line: line.device_h if line.gpu_h is None else 0.0,
            "are on no GPU, or of runs that do not say: GPU-h -",
        ),
    )
    said = [f"{hours} {text}" for read, text in asked if (hours := _by_device(found, read))]
    return [*said, *_several_lines(found)]


def _by_device(found: Sequence[Line], read: Callable[[Line], float]) -> str:
    """Return hours of all lines in words, those of different device models apart; empty where
    there are none.
    """
    hours: dict[str, float] = {}
    for line in found:
        if line.kind == TOTAL:
            hours[line.device] = hours.get(line.device, 0.0) + read(line)
    known = {device: each for device, each in hours.items() if each > 0}
    if len(hours) == 1:
        return "".join(f"{_hours(each)} device-hours" for each in known.values())
    said = (f"{_hours(each)} on {one_line(device, 60)}" for device, each in known.items())
    return f"device-hours ({', '.join(said)})" if known else ""


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
