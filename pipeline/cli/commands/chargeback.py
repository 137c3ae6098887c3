"""`python -m pipeline chargeback --from DAY --to DAY --by team`: who spent what, from the MLflow
store.

Sums what was spent, each hour once: a reused stage spends nothing, failed, killed and unfinished
runs count, and so do those that were deleted in the UI. Days are UTC; the last one is not part of
the period.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.cli.options import read_options
from pipeline.cli.period import (
    behind,
    day_of,
    inside_others,
    key_of_groups,
    lower_bounds,
    runs_between,
    store_of,
)
from pipeline.config.redaction import clean_output, redact
from pipeline.errors import Exit, Unparsable, UserError, one_line
from pipeline.ledger.charge_lines import TOTAL, Line, idle, lines
from pipeline.ledger.charge_sources import stored_runs_facts
from pipeline.ledger.charges import OWNER, Charge, RunFacts, charges, not_counted_twice
from pipeline.ledger.converged import Converged, per_converged_model
from pipeline.report.chargeback import footnotes, table, to_csv

USAGE = """Usage: python -m pipeline chargeback --from 2026-11-01 --to 2026-12-01 [options]

  --from DAY          first day (UTC)
  --to DAY            the day after the last one (UTC)
  --by KEY            team (default), cost_center, purpose, model (or model_name), recipe
  --csv FILE          write the lines as CSV, too
  --capacity N        devices that were there: idle capacity gets a line; DEVICE=N where there are
                      several models
  --root FOLDER       of the runs' store (default: mlruns)
  --uri URI           of the store itself; else MLFLOW_TRACKING_URI

A stage attempt belongs to the moment it ended, what a run spent outside of stages to its end, what
a run spent that has not ended to its last sign of life. Money of different currencies, and hours of
different device models, are never added."""
OPTIONS = ("--from", "--to", "--by", "--csv", "--capacity", "--root", "--uri")
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says. Times are UTC, in seconds since 1970."""

    start_s: float
    end_s: float
    by: str = OWNER[0]
    csv: Path | None = None
    capacity: tuple[str | None, int] | None = None
    uri: str
    root: Path = Path("mlruns")


@clean_output()
def main(argv: list[str], _started_ns: int = 0, *, now_s: Callable[[], float] = time.time) -> int:
    """Print the chargeback of a period; return 0, 1 where it was refused, 2 where the command line
    cannot be read.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE
    try:
        return _report(read_settings(argv), now_s())
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED


def read_settings(argv: Sequence[str]) -> Settings:
    """Return what a command line amounts to.

    Raises:
        UserError: Naming the option.
    """
    given = _read(argv)
    start_s, end_s = day_of("--from", given["--from"]), day_of("--to", given["--to"])
    if end_s <= start_s:
        raise UserError(
            "--to", f"{given['--to']} is not after --from", "give the day after the last one"
        )
    by = key_of_groups(given.get("--by"))
    csv = given.get("--csv")
    if csv is not None and (not csv or not Path(csv).expanduser().resolve().parent.is_dir()):
        raise UserError(
            "--csv", f"{csv!r} lies in no folder", "name a file in a folder that is there"
        )
    return Settings(
        start_s=start_s,
        end_s=end_s,
        by=by,
        csv=None if csv is None else Path(csv).expanduser(),
        capacity=_capacity(given["--capacity"]) if "--capacity" in given else None,
        uri=store_of(given.get("--root"), given.get("--uri")),
        root=Path(given.get("--root") or "mlruns").expanduser(),
    )


def _read(argv: Sequence[str]) -> dict[str, str]:
    given = read_options(argv, "chargeback", OPTIONS).values
    for name in ("--from", "--to"):
        if name not in given:
            raise Unparsable(name, "is missing", f"write {name} 2026-11-01")
    return given


def _capacity(text: str) -> tuple[str | None, int]:
    device, equals, number = text.rpartition("=")
    if not number.strip().isdecimal() or int(number) < 1 or (equals and not device.strip()):
        raise UserError(
            "--capacity", f"{text!r} is no number of devices", "write 64, or 'NVIDIA H200=64'"
        )
    return (device.strip() or None), int(number)


def _report(settings: Settings, now_s: float) -> int:
    # what a model cost began earlier
    since_s = 0.0 if settings.by == "model_name" else settings.start_s
    stored, notes = runs_between(settings.uri, since_s, settings.end_s)
    known = stored_runs_facts(stored)
    runs, inside = not_counted_twice(known)
    notes = [*inside_others(inside), *notes]
    paid = [
        charge
        for run in runs
        for charge in charges(run)
        if settings.start_s <= charge.ended_s < settings.end_s
    ]
    found = lines(paid, settings.by)
    idle_lines, said = _idle(settings, found, now_s)
    models = _converged(known, paid) if settings.by == "model_name" else []
    if settings.csv is not None:
        _write(settings.csv, to_csv([*found, *idle_lines]))
    days = [datetime.fromtimestamp(each, UTC).date() for each in (settings.start_s, settings.end_s)]
    print(f"spent from {days[0]} until before {days[1]} (UTC), by {settings.by}\n")
    print(
        "\n".join(
            table([*found, *idle_lines])
            if found or idle_lines
            else ["no run spent anything in this period"]
        )
    )
    notes = [*footnotes(found), *said, *lower_bounds(runs), *notes, *behind(settings.root)]
    for note in (*notes, *models):
        print(f"- {note}")
    return Exit.DONE


def _idle(settings: Settings, found: Sequence[Line], now_s: float) -> tuple[list[Line], list[str]]:
    if settings.capacity is None:
        return [], []
    device, number = settings.capacity
    models = sorted({line.device for line in found if line.kind == TOTAL})
    if device is None and len(models) > 1:
        raise UserError(
            "--capacity", f"there are {len(models)} device models", f"write '{models[0]}={number}'"
        )
    period_h = max(0.0, min(settings.end_s, now_s) - settings.start_s) / HOUR_S
    line, said = idle(found, device or next(iter(models), "(any)"), number, period_h)
    return ([] if line is None else [line]), [said]


def _converged(runs: Sequence[RunFacts], paid: Sequence[Charge]) -> list[str]:
    """Return a line per model that was paid for in the period: what it took until it converged."""
    names = sorted({name for charge in paid if (name := charge.owner["model_name"])})
    return [_say(name, converged_model(runs, name)) for name in names]


def converged_model(runs: Sequence[RunFacts], name: str) -> Converged:
    """Return what a model took until it converged, at the quality that its newest run declares."""
    own = sorted(
        (run for run in runs if run.owner["model_name"] == name), key=lambda run: run.ended_s
    )
    declared = [run.converged_at for run in own if run.converged_at is not None]
    return per_converged_model(own, declared[-1] if declared else None)


def _say(name: str, cost: Converged) -> str:
    text = f"{one_line(name, 60)} until converged: "
    if cost.device_hours.value is None:
        return f"{text}- ({cost.device_hours.why_missing})"
    money = (
        f"- ({cost.amount.why_missing})"
        if cost.amount.value is None
        else f"{cost.amount.value:.3f} {cost.currency or ''}"
    )
    return (
        f"{text}{cost.device_hours.value:.3f} device-hours, {money.strip()}, reached in {cost.run}"
    )


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(redact(text), encoding="utf-8", newline="")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            "--csv", f"{path} cannot be written ({error.strerror})", "name another file"
        ) from None
