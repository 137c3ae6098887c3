"""`python -m pipeline history [--model NAME]`: the verdicts of the last releases, from the MLflow
store, with alarms.

A verdict that was given again counts once; a pair that was judged under several policies, data or
devices has a line each, which says so. What an alarm means: `compare/history.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.options import read_options
from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError, one_line
from pipeline.ledger.numbers import how_many
from pipeline.ledger.shapes import VerdictHistory

USAGE = """Usage: python -m pipeline history [options]

  --model NAME        of the registry (default: all, by model)
  --last N            releases to list of each (default: 10); alarms read all there are
  --csv               write CSV instead of a table
  --fail-on-alarm     end with exit code 3 where an alarm stands
  --root FOLDER       of the runs' store (default: mlruns)
  --uri URI           of the store itself; else MLFLOW_TRACKING_URI

Step: the newest release reads below where the earlier ones (three or more, same policy and device)
would have another one; one-sided alpha 5% for serving and for the primary quality each. Drift: what
champions lost one after another since the best of them lies beyond the margin, and is no chance at
5%."""
OPTIONS, FLAGS = ("--model", "--last", "--root", "--uri"), ("--csv", "--fail-on-alarm")
MOST = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    uri: str
    model: str | None = None
    last: int = 10
    csv: bool = False
    fail_on_alarm: bool = False


@clean_output()
def main(argv: list[str], _started_ns: int = 0) -> int:
    """Print the history; return 0, 1 where it was refused, 2 where the command line cannot be read,
    3 on an alarm.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE
    try:
        settings = read_settings(argv)
        histories = read_histories(settings)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    return _show(settings, histories)


def read_settings(argv: Sequence[str]) -> Settings:
    """Return what a command line amounts to.

    Raises:
        UserError: Naming the option.
    """
    from pipeline.tracking.deliver import store_uri

    given = read_options(argv, "history", OPTIONS, flags=FLAGS).values
    last = given.get("--last", "10")
    if not (last.isascii() and last.isdecimal() and 1 <= int(last[:9]) <= MOST):
        raise UserError(
            "--last", f"{one_line(last, 40)!r} is no number of releases", f"give 1 to {MOST}"
        )
    if "--root" in given and not Path(given["--root"]).expanduser().is_dir():
        raise UserError(
            "--root",
            f"there is no folder {one_line(given['--root'], 200)}",
            "name the one with mlflow.db",
        )
    root = Path(given.get("--root", "mlruns")).expanduser()
    typed = f"sqlite:///{root.resolve() / 'mlflow.db'}" if "--root" in given else None
    return Settings(
        uri=given.get("--uri") or typed or store_uri(root, None),
        model=given.get("--model"),
        last=int(last),
        csv="--csv" in given,
        fail_on_alarm="--fail-on-alarm" in given,
    )


def read_histories(settings: Settings) -> list[VerdictHistory]:
    """Return a history per model, by name; the models come last that are none.

    Raises:
        UserError: If there is no store, it does not answer, or it holds no verdict on the model
            that was named.
    """
    from pipeline.gate.history import histories
    from pipeline.tracking.registry import is_empty, read_verdicts

    key = "--uri" if settings.uri.partition(":")[0] != "sqlite" else "--root"
    if is_empty(settings.uri):
        raise UserError(key, "there is no MLflow store", "name the folder that holds mlflow.db")
    found = histories(read_verdicts(settings.uri, model=settings.model), settings.last)
    if settings.model is not None and not found:
        raise UserError(
            "--model",
            f"no verdict names {one_line(settings.model, 80)!r}",
            "see the list without --model",
        )
    return found


def _show(settings: Settings, histories: Sequence[VerdictHistory]) -> int:
    from pipeline.report.history import NO_MODEL, alarms, remarks, table, to_csv

    found = [each for history in histories for each in alarms(history)]
    if settings.csv:
        sys.stdout.write(to_csv(histories))
    elif not histories:
        print("no gate has judged a release here")
    else:
        for history in histories:
            shown, total = len(history["releases"]), history["of"]
            print(
                f"{one_line(history['model'] or NO_MODEL, 100)}: {shown} of"
                f" {how_many(total, 'release')}, the newest last\n"
            )
            print(
                "\n".join(
                    [
                        *table(history),
                        "",
                        *(f"- {each}" for each in [*alarms(history), *remarks(history)]),
                        "",
                    ]
                )
            )
    if settings.csv and found:
        print("\n".join(found), file=sys.stderr)
    return Exit.FAIL if found and settings.fail_on_alarm else Exit.DONE
