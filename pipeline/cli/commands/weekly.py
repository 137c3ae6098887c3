"""`python -m pipeline weekly`: one page on what a period's GPU time went to, from the MLflow store
alone.

Days are UTC; the last one is not part of the period. Hours are counted as `chargeback` counts them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.options import read_options
from pipeline.cli.pages import write_page
from pipeline.cli.period import (
    behind,
    day_of,
    inside_others,
    key_of_groups,
    lower_bounds,
    runs_between,
    store_of,
)
from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError, one_line

if TYPE_CHECKING:
    from pipeline.ledger.shapes import VerdictHistory
    from pipeline.report.weekly import Period

USAGE = """Usage: python -m pipeline weekly [options]

One page on what a period's GPU time went to, read from the MLflow store: spent against budget,
waste by cause with the first thing to try, how good forecasts were, what gates said, and savings
over releases. It is written as report.html and report.md.

  --from DAY          first day (UTC; default: seven days before --to)
  --to DAY            the day after the last one (UTC; default: tomorrow)
  --by KEY            team (default), cost_center, purpose, model (or model_name), recipe
  --budget HOURS      device-hours of the period; NAME=HOURS for a group, and again for others;
                      else what runs declared (budget.device_hours)
  --out FOLDER        where the page goes (default: ROOT/weekly/DAY, its first day)
  --root FOLDER       of the runs' store (default: mlruns)
  --uri URI           of the store itself; else MLFLOW_TRACKING_URI

Hours of different device models, and money of different currencies, are never added.

Exit codes: 0 written, 1 refused, 2 command line not parsable."""
OPTIONS = ("--from", "--to", "--by", "--budget", "--out", "--root", "--uri")
DAY_S = 86400.0
DAYS = 7
FIRST = "1970-01-01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says. Times are UTC, in seconds since 1970.

    Attributes:
        budget_h: Device-hours of the period; `budgets_h` by group.
    """

    start_s: float
    end_s: float
    by: str
    budget_h: float | None = None
    budgets_h: dict[str, float] = field(default_factory=dict[str, float])
    out: Path
    uri: str
    root: Path = Path("mlruns")

    @property
    def days(self) -> tuple[str, str]:
        """The first day, and the one after the last."""
        first, until = (
            datetime.fromtimestamp(each, UTC).date().isoformat()
            for each in (self.start_s, self.end_s)
        )
        return first, until


@clean_output()
def main(argv: list[str], _started_ns: int = 0, *, now_s: Callable[[], float] = time.time) -> int:
    """Write the page of a period; return 0, 1 where it was refused, 2 where the command line cannot
    be read.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE
    try:
        settings = read_settings(argv, now_s())
        _write(settings, read_period(settings))
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    return Exit.DONE


def read_settings(argv: Sequence[str], now_s: float) -> Settings:
    """Return what a command line amounts to.

    Args:
        now_s: UTC, seconds since 1970: today is in the period where none is named.

    Raises:
        UserError: Naming the option.
    """
    read = read_options(argv, "weekly", OPTIONS, repeated=("--budget",))
    given = read.values
    tomorrow_s = (now_s // DAY_S + 1) * DAY_S
    end_s = day_of("--to", given["--to"]) if "--to" in given else tomorrow_s
    start_s = day_of("--from", given["--from"]) if "--from" in given else end_s - DAYS * DAY_S
    if start_s < day_of("--from", FIRST):
        raise UserError("--to", f"the period begins before {FIRST}", "give a later day")
    if end_s <= start_s:
        key = "--to" if "--to" in given else "--from"
        problem = "--to is not after --from" if key == "--to" else "is later than today"
        raise UserError(key, problem, "give the day after the last one as --to")
    budget_h, budgets_h = _budgets(read.all_values["--budget"])
    root = Path(given.get("--root") or "mlruns").expanduser()
    first = datetime.fromtimestamp(start_s, UTC).date().isoformat()
    return Settings(
        start_s=start_s,
        end_s=end_s,
        by=key_of_groups(given.get("--by")),
        budget_h=budget_h,
        budgets_h=budgets_h,
        out=Path(given["--out"]).expanduser() if given.get("--out") else root / "weekly" / first,
        uri=store_of(given.get("--root"), given.get("--uri")),
        root=root,
    )


def _budgets(texts: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """Return the budget of all, and those of groups."""
    found: dict[str, float] = {}
    for text in texts:
        group, equals, number = text.rpartition("=")
        hours = _hours(number)
        if hours is None or (equals and not group.strip()):
            problem = f"{one_line(text, 80)!r} is no number of device-hours"
            raise UserError("--budget", problem, "write 40, or vision=40")
        if group in found:
            whose = f"of {one_line(group, 60)}" if group else "of the period"
            raise UserError("--budget", f"the one {whose} is given twice", "give it once")
        found[group] = hours
    total_h = found.pop("", None)
    if total_h is not None and found:
        raise UserError(
            "--budget", "there is one for all and one for a group", "give one of the two kinds"
        )
    return total_h, found


def _hours(text: str) -> float | None:
    try:
        hours = float(text)
    except ValueError:
        return None
    return hours if math.isfinite(hours) and hours > 0 else None


def read_period(settings: Settings) -> Period:
    """Return what the store tells of a period.

    Raises:
        UserError: If it does not answer.
    """
    from pipeline.ledger.charge_sources import stored_runs_facts
    from pipeline.ledger.charges import charges, not_counted_twice
    from pipeline.ledger.weekly import foreseen, losses, own_budgets, spent
    from pipeline.report.weekly import Period

    stored, notes = runs_between(settings.uri, settings.start_s, settings.end_s)
    known = stored_runs_facts(stored)
    runs, inside = not_counted_twice(known)
    paid = [
        charge
        for run in runs
        for charge in charges(run)
        if settings.start_s <= charge.ended_s < settings.end_s
    ]
    first, until = settings.days
    return Period(
        first=first,
        until=until,
        by=settings.by,
        spent=spent(paid, settings.by),
        budget_h=settings.budget_h,
        budgets_h=settings.budgets_h,
        own=own_budgets(runs, paid, stored, settings.by),
        losses=losses(paid, stored, known, settings.by),
        foreseen=foreseen(stored, settings.start_s, settings.end_s),
        histories=_histories(settings.uri, until),
        notes=[*lower_bounds(runs), *inside_others(inside), *notes, *behind(settings.root)],
    )


def _histories(uri: str, until: str) -> list[VerdictHistory]:
    """Return the releases of every model that were judged before a day."""
    from pipeline.tracking.registry import read_verdicts

    judged = [each for each in read_verdicts(uri) if each.created < until]
    if not judged:
        return []
    from pipeline.gate.history import histories

    return histories(judged, last=len(judged))


def _write(settings: Settings, period: Period) -> None:
    from pipeline.report.weekly import page_of, text_lines

    head, sections = page_of(period)
    print("\n".join(text_lines(head, sections)))
    write_page(settings.out, head, sections)
