"""`python -m pipeline compare RUN RUN ...`: several runs side by side, in the terminal and as a
page.

A run is an id of this project's or of MLflow's, `latest`, or a folder with a result.json. A run
that MLflow knows and whose folder is elsewhere is read from its artifacts there: its result and
settings, without curves.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.options import read_options
from pipeline.cli.pages import places_of, write_page
from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError, one_line

if TYPE_CHECKING:
    from pipeline.ledger.shapes import Result
    from pipeline.report.comparing import Side

USAGE = """Usage: python -m pipeline compare RUN RUN ... [options]

RUN is a run's id (of mlruns/runs, or MLflow's), latest, or a folder with a result.json.

  --out FOLDER        where report.html, report.md and pictures go (default: ROOT/compare/NAME)
  --root FOLDER       of the runs' store (default: mlruns)
  --uri URI           of the MLflow store; else MLFLOW_TRACKING_URI

What differs in settings comes first. Figures that were read on other devices, on other data or
under another load are not drawn together, and a caution says so. Runs of other tasks are refused.

Exit codes: 0 compared, 1 refused, 2 command line not parsable."""
OPTIONS = ("--out", "--root", "--uri")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    runs: Sequence[str]
    root: Path
    out: Path
    uri: str


@clean_output()
def main(argv: list[str], _started_ns: int = 0) -> int:
    """Compare; return the exit code."""
    if not argv or any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE if argv else Exit.UNPARSABLE
    try:
        settings = read_settings(argv)
        sides = read_sides(settings)
        _show(settings, sides, shlex.join(["python", "-m", "pipeline", "compare", *argv]))
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    return Exit.DONE


def read_settings(argv: Sequence[str]) -> Settings:
    """Return what a command line amounts to.

    Raises:
        UserError: Naming the option.
    """
    from pipeline.report.comparing import MAX_RUNS
    from pipeline.tracking.deliver import store_uri

    read = read_options(argv, "compare", OPTIONS, takes_names=True, takes_empty=False)
    given, runs = read.values, read.names
    if not 2 <= len(runs) <= MAX_RUNS:
        raise UserError("RUN", f"{len(runs)} runs were named", f"give 2 to {MAX_RUNS}")
    root = Path(given.get("--root", "mlruns")).expanduser()
    name = hashlib.sha256("\0".join(runs).encode()).hexdigest()[:12]
    out = Path(given["--out"]).expanduser() if "--out" in given else root / "compare" / name
    typed = f"sqlite:///{root.resolve() / 'mlflow.db'}" if "--root" in given else None
    return Settings(
        runs=runs, root=root, out=out, uri=given.get("--uri") or typed or store_uri(root, None)
    )


def read_sides(settings: Settings) -> list[Side]:
    """Return the runs, each once.

    Raises:
        UserError: If one is none, cannot be read, or they share nothing.
    """
    from pipeline.report.comparing import check_sides

    found: dict[str, Side] = {}
    for reference in settings.runs:
        side = _side(reference, settings)
        run_id = side.material.result["run_id"]
        if run_id in found:
            problem = f"{one_line(reference, 80)} is run {one_line(run_id, 80)}, which stands there"
            raise UserError("RUN", problem, "name each run once")
        found[run_id] = side
    names = _names([side.material.result for side in found.values()])
    sides = [
        replace(side, material=replace(side.material, name=name))
        for side, name in zip(found.values(), names, strict=True)
    ]
    check_sides(sides)
    return sides


def _names(results: Sequence[Result]) -> list[str]:
    """Return what runs are called: the recipe and the end of the id, as in MLflow's list."""
    ids = [each["run_id"] for each in results]
    names = [
        f"{one_line(each['recipe'], 40)} {one_line(each['run_id'], 200).rpartition('-')[2][-8:]}"
        for each in results
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{number}: {one_line(each, 60)}" for number, each in enumerate(ids, 1)]


def _side(reference: str, settings: Settings) -> Side:
    if not reference.isprintable() or len(reference) > 4096:
        raise UserError("RUN", f"{reference[:80]!r} is no run", "give an id, latest or a folder")
    name = reference.removeprefix("runs:/")
    places = places_of(reference, settings.root)
    try:
        folder = next((each for each in places if (each / "result.json").is_file()), None)
    except OSError as error:
        problem = f"{reference[:80]} cannot be read ({error.strerror})"
        raise UserError("RUN", problem, "give an id, latest or a folder") from error
    if folder is not None:
        return _read(reference, folder.resolve())
    for each in places:
        if (each / "journal.jsonl").is_file():
            problem = f"{reference[:80]} has no result.json: it has not ended, or was killed"
            raise UserError("RUN", problem, "end it by the same command again")
    from pipeline.tracking.registry import run_files

    with tempfile.TemporaryDirectory() as scratch:
        stored = run_files(settings.uri, name, ("result.json", "config.json"), Path(scratch))
        if stored is None:
            problem = f"there is no run {reference[:80]} in {settings.root} or in MLflow"
            raise UserError("RUN", problem, "give an id, latest or a folder")
        return _read(reference, stored)


def _read(reference: str, folder: Path) -> Side:
    """Read a run's result and settings.

    Raises:
        UserError: If they are not what a run leaves.
    """
    from pipeline.ledger.records import parsed, why_damaged
    from pipeline.ledger.schema import RESULT_SCHEMA
    from pipeline.ledger.values import from_schema_1
    from pipeline.report.comparing import Side
    from pipeline.report.material import material_of
    from pipeline.store.artifacts import flat

    record, why = parsed(folder / "result.json")
    newer = isinstance(record, dict) and isinstance(record.get("schema"), int)
    if newer and record["schema"] > 2:
        why = f"its schema {record['schema']} is of a newer release"
    why = why or why_damaged(record, RESULT_SCHEMA)
    if why is not None:
        problem = f"{reference[:80]} has no result that can be read: {one_line(why, 200)}"
        raise UserError("RUN", problem, "give another run, or make it again")
    config, _ = parsed(folder / "config.json")
    settings = flat(config) if isinstance(config, dict) else {}
    return Side(material_of(from_schema_1(record), folder), settings)


def _show(settings: Settings, sides: Sequence[Side], command: str) -> None:
    from pipeline.report.comparing import comparable, differing, page_of
    from pipeline.report.tables import WIDTH, closing_table
    from pipeline.report.text import wrap

    table = differing(sides)
    print("What differs:")
    for row in [] if table is None else table.body:
        for line in wrap(f"{row[0]}: {'  |  '.join(row[1:])}", WIDTH - 2, "    "):
            print(f"  {line}")
    if table is None:
        print("  nothing")
    for caution in comparable(sides).cautions:
        for line in wrap(f"caution: {caution}", WIDTH, "  "):
            print(line)
    for side in sides:
        print(f"\n{side.name}, {one_line(side.material.result['recipe'], 60)}:")
        print(closing_table(side.material.result))
    head, sections = page_of(sides, command)
    write_page(settings.out, head, sections)
