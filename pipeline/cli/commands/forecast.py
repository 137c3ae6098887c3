"""`python -m pipeline forecast recipe=NAME ...`: what a run will take, part by part, before it is
started; and how good the forecasts of this store have been.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError, one_line

USAGE = """Usage: python -m pipeline forecast recipe=NAME [key=value ...] [options]

Says what a run with these settings will take, each figure with a 90% interval: device-hours by
stage, memory of a device, disk and energy. It is known from earlier runs of the store, from a few
steps taken now of each training that was never seen here, and else from FLOPs. Nothing is trained,
and no run is recorded; what is done already counts as nothing. Each run keeps its own forecast and
is compared with it when it ends; the record of that is shown below the forecast.

  --no-probe          take no steps: earlier runs and FLOPs alone
  --json              write the forecast as JSON
  any setting of a run, --recipe-dir DIR, --config-dir DIR    as for a run

Exit codes: 0 forecast, 1 refused, 2 command line not parsable."""
OWN = ("--no-probe", "--json")
FOLDERS = ("--recipe-dir", "--config-dir")


@clean_output()
def main(argv: list[str], started_ns: int) -> int:
    """Print a forecast; return the exit code."""
    if not argv or any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE if argv else Exit.UNPARSABLE
    try:
        settings = _settings(argv)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE
    from pipeline.cli import main as cli

    probes, as_json = "--no-probe" not in argv, "--json" in argv

    def foretell(run: Any, *_: Any) -> int:
        return _show(run, probes=probes, as_json=as_json)

    return cli.main(settings, started_ns=started_ns, execute=foretell)


def _settings(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line that are the run's.

    Raises:
        Unparsable: If there is an unknown flag, or no recipe.
    """
    rest = [arg for arg in argv if arg not in OWN]
    for arg in rest:
        flag = arg.partition("=")[0]
        if flag.startswith("-") and flag not in (*FOLDERS, "--debug"):
            raise Unparsable(one_line(arg, 60), "is no flag of forecast", "--help lists them")
    if not any(arg.startswith("recipe=") for arg in rest):
        raise Unparsable("recipe", "none is named", "add recipe=NAME")
    return rest


def _show(run: Any, *, probes: bool, as_json: bool) -> int:
    from pipeline.ledger.phases import PhaseClock
    from pipeline.report.forecast import forecast_line, forecast_table, record_lines
    from pipeline.report.tables import WIDTH
    from pipeline.report.text import wrap
    from pipeline.runs.forecasting import foresee
    from pipeline.runs.opening import opened_aside

    with opened_aside(run, PhaseClock()) as (running, known):
        found = foresee(running, known, probes=probes)
    if as_json:
        print(json.dumps(found.record, indent=1))
        return Exit.DONE
    line = wrap(forecast_line(found.record), WIDTH, "    ")
    print("\n".join([*line, "", *forecast_table(found.record)]))
    print("\nForecasts of this store so far:")
    print("\n".join(f"- {line}" for line in record_lines(found.past.records)))
    return Exit.DONE
