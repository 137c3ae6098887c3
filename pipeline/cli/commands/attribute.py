"""`python -m pipeline attribute RUN`: what each stage or setting of an arm brought, by leaving it
out and by Shapley values.

Arms that no run has yet are made by runs of their own (`cli/variant_runs.py`), and only within a
`budget.device_hours` that is given. The same command goes on where one of them was stopped.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import read_options
from pipeline.cli.pages import places_of, write_page
from pipeline.cli.variant_runs import (
    BUDGET,
    Job,
    Question,
    changed_in,
    composed,
    existing,
    finished,
    jobs_of,
    make,
    recipe_of,
    tracked_as,
    types_of,
    words_of,
)
from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError, one_line

if TYPE_CHECKING:
    from pipeline.config.settings.run import Run
    from pipeline.runs.receipts.receipt import Kept

USAGE = """Usage: python -m pipeline attribute RUN [options] [budget.device_hours=HOURS]

RUN is a run's id (of mlruns/runs), latest, or a run's folder.

  --arm ARM           whose parts are looked at (default: the run's primary arm)
  --base ARM          what has none of them (default: what the recipe compares the arm with)
  --leave-one-out     only that: n + 1 arms of n parts, where Shapley values take 2^n
  --out FOLDER        where report.html and report.md go (default: ROOT/attribute/NAME)
  --root FOLDER       of the runs' store (default: mlruns)

A part is a stage of the arm that its base has not, or a setting in which the first stage of both
differs. Arms that do not exist yet are made only where budget.device_hours says how many hours that
may take; without it, the forecast of them is printed.

Exit codes: 0 attributed as far as there are arms, 1 refused, 2 command line not parsable; those of
a run that was stopped: 7 budget spent, 75 preempted, 130 interrupted."""
STOPPED = (Exit.BUDGET_SPENT, Exit.PREEMPTED, Exit.INTERRUPTED)
HOUR_NS = 3600 * 10**9
OPTIONS, FLAGS = ("--arm", "--base", "--out", "--root"), ("--leave-one-out",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    run: str
    root: Path
    arm: str | None = None
    base: str | None = None
    out: Path | None = None
    leave_one_out: bool = False
    budget_h: float | None = None


@clean_output()
def main(argv: list[str], started_ns: int = 0) -> int:
    """Attribute; return the exit code."""
    if not argv or any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE if argv else Exit.UNPARSABLE
    try:
        command = shlex.join(["python", "-m", "pipeline", "attribute", *argv])
        return _all(read_settings(argv), command, started_ns or time.monotonic_ns())
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return Exit.INTERRUPTED


def read_settings(argv: Sequence[str]) -> Settings:
    """Return what a command line amounts to.

    Raises:
        UserError: Naming the option.
    """
    read = read_options(
        argv, "attribute", OPTIONS, flags=FLAGS, takes_names=True, takes_empty=False
    )
    given = read.values
    runs = [each for each in read.names if "=" not in each]
    hours: float | None = None
    for word in (each for each in read.names if "=" in each):
        name, _, value = word.partition("=")
        if name != BUDGET:
            raise Unparsable(one_line(word, 80), "is no option of attribute", "--help lists them")
        if hours is not None:
            raise UserError(BUDGET, "is given twice", "give it once")
        hours = _hours(value)
    if len(runs) != 1:
        problem = "none is named" if not runs else f"{len(runs)} are named"
        raise UserError("RUN", problem, "give one")
    return Settings(
        run=runs[0],
        root=Path(given.get("--root", "mlruns")).expanduser(),
        arm=given.get("--arm"),
        base=given.get("--base"),
        out=Path(given["--out"]).expanduser() if "--out" in given else None,
        leave_one_out="--leave-one-out" in given,
        budget_h=hours,
    )


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 < hours < float("inf"):
        raise UserError(BUDGET, f"{one_line(text, 40)!r} is no number of hours", "give one above 0")
    return hours


def _all(settings: Settings, command: str, started_ns: int) -> int:
    """Find the arms, make those that are to be made, and report."""
    from pipeline.runs.attribution import Member, attribute

    question = _asked(settings)
    own = existing(question)
    members = {each: Member(question.kept, arm) for each, arm in own.items()}
    name = f"{_name_of(question)}{'-leave-one-out' if settings.leave_one_out else ''}"
    place = settings.out or settings.root / "attribute" / name
    jobs = jobs_of(question, own)
    code, spent_h = int(Exit.DONE), 0.0
    open_jobs: list[Job] = []
    for job in jobs:
        done = finished(settings.root, job)
        if done is None and settings.budget_h is not None and code not in STOPPED:
            left_h, begun_ns = settings.budget_h - spent_h, time.monotonic_ns()
            made = make(job, place, question.kept, settings.root, left_h, started_ns)
            done = finished(settings.root, job)
            # how the process began was the first one's to pay, whatever became of it
            started_ns = time.monotonic_ns()
            if done is None and made == Exit.DONE:
                print("note: that run made not all of its arms; its report says why")
            code = code if done is not None else max(code, made)
            devices = question.kept.result["device"]["count"]
            lost_h = (started_ns - begun_ns) * devices / HOUR_NS  # what no result tells
            spent_h += lost_h if done is None else done.result["run"]["spent"]["value"] or 0.0
        if done is None:
            open_jobs.append(job)
        else:
            members |= {each: Member(done, arm) for each, arm in job.arms.items()}
    found = attribute(question.parts, members, _recorded(settings.root, question.kept))
    _show(found, question, place, command)
    if open_jobs and settings.budget_h is None:
        _foretell(open_jobs, place, question.kept, settings)
    elif code == Exit.BUDGET_SPENT:
        print(f"\nthe same command with a larger {BUDGET} goes on from here")
    return code


# -- which arms there are -------------------------------------------------------------------------


def _asked(settings: Settings) -> Question:
    """Read the run, and find out what its parts are.

    Raises:
        UserError: If it cannot be read, or its arms cannot be taken apart.
    """
    from pipeline.compare.attribution import coalitions
    from pipeline.runs.attribution import has_arm, read_run
    from pipeline.stages.variants import Arms, parts_of

    kept = read_run(_folder(settings))
    if kept.result.get("is_release_check"):
        raise UserError("RUN", "a release check has no recipe", "give a run of a recipe")
    run = composed(recipe_of(kept, changed_in(kept), types_of(kept)), kept, settings.root)
    arm = settings.arm or run.primary_arm
    base = settings.base or _base_of(run, arm)
    parts = parts_of(run, arm, base)
    for name in (arm, base):
        if not has_arm(kept, name):
            raise UserError("RUN", f"it made no {name}", "give --arm and --base that it made")
    arms = Arms(run, parts)
    names = frozenset(parts.names)
    wanted = coalitions(parts.names)
    if settings.leave_one_out:
        wanted = [each for each in wanted if len(each) in (0, len(names) - 1, len(names))]
    return Question(kept, run, arms, {each: arms.place(each) for each in wanted})


def _folder(settings: Settings) -> Path:
    """Return the folder of the run that is named.

    Raises:
        UserError: If there is none.
    """
    places = places_of(settings.run, settings.root)
    try:
        return next(each for each in places if (each / "journal.jsonl").is_file()).resolve()
    except (StopIteration, OSError, ValueError):
        problem = f"there is no run {one_line(settings.run, 80)} in {settings.root}"
        raise UserError("RUN", problem, "give an id, latest or a folder") from None


def _base_of(run: Run, arm: str) -> str:
    """Return the arm that the recipe compares another with, training first; of several the first
    whose parts can be told.

    Raises:
        UserError: If there is none.
    """
    from pipeline.config.settings.run import Measure
    from pipeline.stages.variants import parts_of

    if arm not in run.stages:
        problem = f"{one_line(arm, 60)!r} is no arm of this run"
        raise UserError("--arm", problem, f"give {', '.join(run.stages)}")
    pairs = [pair for pair in run.compare if pair.arm == arm and pair.base in run.stages]
    pairs.sort(key=lambda pair: Measure.training not in pair.on)
    whole: list[tuple[int, str]] = []
    for pair in pairs:
        try:
            whole.append((-len(parts_of(run, arm, pair.base).each), pair.base))
        except UserError:
            continue
    if not whole:
        problem = f"the recipe compares {arm} with nothing that it has parts against"
        raise UserError("--base", problem, f"name one of {', '.join(run.stages)}")
    return min(whole)[1]


def _foretell(jobs: Sequence[Job], place: Path, kept: Kept, settings: Settings) -> None:
    """Say what the missing arms would take."""
    from pipeline.cli import main as cli
    from pipeline.ledger.attempted import attempted
    from pipeline.ledger.numbers import how_many, significant
    from pipeline.ledger.phases import PhaseClock
    from pipeline.runs.forecasting import foresee
    from pipeline.runs.opening import opened_aside

    highs: list[float] = []
    unforeseen: list[str] = []

    def look(run: Any, *_: Any) -> int:
        with opened_aside(run, PhaseClock()) as (running, known):
            forecast = foresee(running, known)
        unforeseen.extend(forecast.record["missing"])
        if (hours := forecast.hours()) is not None:
            highs.append(hours["high"])
        return Exit.DONE

    for job in jobs:
        words = [*words_of(job, place), *tracked_as(kept, settings.root)]
        attempted(
            lambda words=words: cli.main(words, started_ns=time.monotonic_ns(), execute=look),
            lambda why: print(f"note: no forecast: {why}", file=sys.stderr),
        )
    runs = how_many(len(jobs), "run")
    if len(highs) == len(jobs) and not unforeseen:
        most = f"{BUDGET}={significant(sum(highs), 2)}"
        print(f"\n{runs} would make what is missing: add {most} (the upper end of its forecast)")
    elif highs:
        parts = ", ".join(dict.fromkeys(unforeseen))
        print(
            f"\n{runs} would make what is missing: add {BUDGET}=HOURS, above"
            f" {significant(sum(highs), 2)}: that is without {one_line(parts, 200)}, of which"
            " nothing is known here"
        )
    else:
        print(
            f"\n{runs} would make what is missing: add {BUDGET}=HOURS (nobody knows how many yet)"
        )


# -- the answer -----------------------------------------------------------------------------------


def _recorded(root: Path, kept: Kept) -> Any | None:
    """Return the spread of trainings on the run's device, by the store's self-tests."""
    from pipeline.compare.statistics import RunSpread
    from pipeline.tracking.deliver import store_uri
    from pipeline.tracking.registry import find_spread

    device = kept.result["device"]
    try:
        found = find_spread(store_uri(root, None), device["name"], device["count"])
    except UserError as error:
        print(f"note: no spread of trainings is known: {error}", file=sys.stderr)
        return None
    return None if found is None else RunSpread(found.sd_log, found.runs - 1)


def _name_of(question: Question) -> str:
    """Return the name of the folder that an attribution goes to."""
    run_id, parts = question.kept.result["run_id"], question.parts
    return f"{run_id}-{parts.arm}-{parts.base}"


def _show(found: Any, question: Question, place: Path, command: str) -> None:
    from pipeline.report.attribution import page_of, terminal

    print("\n".join(terminal(found)))
    head, sections = page_of(found, question.kept.result, command)
    write_page(place, head, sections)
