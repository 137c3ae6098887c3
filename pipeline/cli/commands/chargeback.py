"""`python -m pipeline chargeback --from DAY --to DAY --by team`: who spent what, from the MLflow
store.

Sums what was spent, each hour once: a reused stage spends nothing, failed, killed and unfinished
runs count, and so do those that were deleted in the UI. Days are UTC; the last one is not part of
the period.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config.redaction import clean_output, redact, redact_value
from pipeline.errors import Exit, Unparsable, UserError, one_line
from pipeline.ledger.charge_sources import stored_runs_facts
from pipeline.ledger.charges import OWNER, Charge, RunFacts, charges, not_counted_twice
from pipeline.ledger.converged import Converged, per_converged_model
from pipeline.ledger.numbers import agreed, how_many
from pipeline.report.chargeback import TOTAL, Line, footnotes, idle, lines, table, to_csv
from pipeline.tracking.writer import waiting

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
_SQLITE = re.compile(r"sqlite(?:\+\w+)?://(?:/(?P<path>[^?]*))?")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


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
    start_s, end_s = _day("--from", given["--from"]), _day("--to", given["--to"])
    if end_s <= start_s:
        raise UserError(
            "--to", f"{given['--to']} is not after --from", "give the day after the last one"
        )
    by = "model_name" if given.get("--by") == "model" else given.get("--by", OWNER[0])
    if by not in OWNER:
        raise UserError("--by", f"{by!r} is nothing to group by", f"give {', '.join(OWNER)}")
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
        uri=_store(given.get("--root"), given.get("--uri")),
        root=Path(given.get("--root") or "mlruns").expanduser(),
    )


def _read(argv: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    pending = iter(argv)
    for arg in pending:
        name, equals, value = arg.partition("=")
        if name not in OPTIONS:
            raise Unparsable(arg, "is no option of chargeback", "--help lists them")
        found = value if equals else next(pending, None)
        if found is None:
            raise Unparsable(name, "has no value", f"write {name} VALUE")
        given[name] = found
    for name in ("--from", "--to"):
        if name not in given:
            raise Unparsable(name, "is missing", f"write {name} 2026-11-01")
    return given


def _day(name: str, text: str) -> float:
    try:
        if _DAY.fullmatch(text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        pass
    raise UserError(name, f"{text!r} is no day", "write it as 2026-11-01; days are UTC")


def _capacity(text: str) -> tuple[str | None, int]:
    device, equals, number = text.rpartition("=")
    if not number.strip().isdecimal() or int(number) < 1 or (equals and not device.strip()):
        raise UserError(
            "--capacity", f"{text!r} is no number of devices", "write 64, or 'NVIDIA H200=64'"
        )
    return (device.strip() or None), int(number)


def _store(root: str | None, uri: str | None) -> str:
    """Return the URI of a store that is there; asking for what was spent makes none."""
    from pipeline.tracking.deliver import store_uri

    typed = f"sqlite:///{Path(root).expanduser().resolve() / 'mlflow.db'}" if root else None
    found = uri or typed or store_uri(Path("mlruns"), None)
    file = _SQLITE.match(found)
    if file:
        _check_file(Path(file["path"] or ""), "--uri" if uri else "--root")
    return found


def _check_file(path: Path, key: str) -> None:
    remedy = "name the folder that holds mlflow.db, or deliver with python -m pipeline sync"
    if not path.is_file():
        raise UserError(key, f"there is no store {path}", remedy)
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as database:
            known = database.execute(
                "SELECT name FROM sqlite_master WHERE name = 'experiments'"
            ).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(key, f"{path} cannot be read ({error})", remedy) from None
    if known is None:
        raise UserError(key, f"{path} holds no MLflow store", remedy)


def _report(settings: Settings, now_s: float) -> int:
    known, notes = _runs(settings)
    runs, inside = not_counted_twice(known)
    notes = [
        *_said(
            len(inside),
            "run inside a metered run is part of it",
            "runs inside a metered run are part of it",
        ),
        *notes,
    ]
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
    for note in (*footnotes(found), *said, *_notes(runs), *notes, *_behind(settings.root), *models):
        print(f"- {note}")
    return Exit.DONE


def _runs(settings: Settings) -> tuple[list[RunFacts], list[str]]:
    """Return the runs of the store that the period touches, and what is to be said of the
    others.
    """
    from pipeline.tracking.deliver import quiet, store_errors, stored_runs

    quiet()
    # what a model cost began earlier
    since_s = 0.0 if settings.by == "model_name" else settings.start_s
    try:
        stored, num_others = stored_runs(
            settings.uri, int(since_s * 1000), int(settings.end_s * 1000)
        )
    except store_errors() as error:
        text = redact_value("", one_line(error, 200))
        raise UserError(
            "--uri", f"the store does not answer ({text})", "see that it runs, and try again"
        ) from None
    deleted = sum(not run["active"] for run in stored)
    notes = [
        *_said(
            deleted,
            "run or stage was deleted in the UI; what it spent is spent",
            "runs and stages were deleted in the UI; what they spent is spent",
        ),
        *_said(
            num_others,
            "run of another program was left out",
            "runs of other programs were left out",
        ),
    ]
    return stored_runs_facts(stored), notes


def _said(num: int, one: str, many: str) -> list[str]:
    """Return the note on so many runs; none on none."""
    return [how_many(num, one, many)] if num else []


def _behind(root: Path) -> list[str]:
    """Return what to say where journals beside the store hold what it has not had."""
    behind = waiting(root)
    rest = f"more to tell than MLflow has had: python -m pipeline sync {root}"
    return _said(len(behind), f"run under {root} has {rest}", f"runs under {root} have {rest}")


def _notes(runs: Sequence[RunFacts]) -> list[str]:
    silent = sum(run.total_h is None for run in runs)
    more = sum((run.rest_h or 0.0) < -1e-6 for run in runs)
    return [
        *_said(
            silent,
            "run does not say what it took outside of stages: a lower bound",
            "runs do not say what they took outside of stages: a lower bound",
        ),
        *(
            [
                f"the stages of {how_many(more, 'run')} hold more than"
                f" {agreed(more, 'it', 'they')} took: {agreed(more, 'its', 'their')} stages are"
                " counted"
            ]
            if more
            else []
        ),
    ]


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
