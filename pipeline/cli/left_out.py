"""Stages that a command line leaves out (`~stages.NAME`), and what goes with them.

The comparisons that name such a stage go with it. What cannot go without a word of the user's is
refused once, with all that would have to be given beside it: another primary arm, other arms for
the stages that stay and read this one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pipeline.config.settings import Run
from pipeline.errors import UserError
from pipeline.stages.capture import CaptureStage
from pipeline.stages.release import ReleaseStage
from pipeline.stages.settings import BASE, student_source
from pipeline.stages.table import Stage

READS = {"model": BASE, "teacher": BASE, "cache": "null", "like": "null"}
"""By setting that names a stage: what can be given in its place, whatever else a recipe places."""
SOURCE = "student.source"


def names_left_out(settings: Iterable[str]) -> list[str]:
    """Return the stages that the words of a command line leave out."""
    keys = (word.partition("=")[0] for word in settings)
    return [key.removeprefix("~stages.") for key in keys if key.startswith("~stages.")]


def leave_out(run: Run, gone: Sequence[str]) -> str | None:
    """Take the comparisons of stages that were left out from a run; return what there is to say of
    it.

    Raises:
        UserError: Where what stays needs one of them, with what else to give.
    """
    if not gone:
        return None
    _refuse_needed(run, gone)
    dropped = [
        f"{pair.arm} against {pair.base}" for pair in run.compare if {pair.arm, pair.base} & {*gone}
    ]
    run.compare = [pair for pair in run.compare if not {pair.arm, pair.base} & {*gone}]
    said = f"left out: {', '.join(gone)}"
    return f"{said}; with it go the comparisons {', '.join(dropped)}" if dropped else said


def _refuse_needed(run: Run, gone: Sequence[str]) -> None:
    """Refuse where the primary arm is left out, or a stage that stays reads one that is."""
    key = " ".join(f"~stages.{name}" for name in gone)
    if any(isinstance(stage, ReleaseStage) for stage in run.stages.values()):
        raise UserError(key, "a release check compares candidate and baseline", "keep both")
    if not any(_makes_a_model(stage) for stage in run.stages.values()):
        raise UserError(key, "no stage is left that makes a model", "keep one")
    needed = [f"{setting} is {arm}" for setting, arm in _settings_that_name(run, gone).items()]
    if run.primary_arm in gone:
        needed.insert(0, f"primary_arm is {run.primary_arm}")
    if needed:
        ways = [way for way in (_leaving_more_out(run, gone), _reading_others(run, gone)) if way]
        raise UserError(key, ", ".join(needed), f"give as well: {', or instead: '.join(ways)}")


def _makes_a_model(stage: Stage) -> bool:
    return not isinstance(stage, CaptureStage)


def _settings_that_name(run: Run, gone: Collection[str]) -> dict[str, str]:
    """Return the settings of what stays that name a stage that is left out, with its name."""
    found: dict[str, str] = {}
    for name, stage in run.stages.items():
        read = {*stage.reads(run), getattr(stage, "like", None)} & {*gone}
        if student_source(run) in read and run.student.source in gone:
            found[SOURCE] = student_source(run)
        named = {each: str(getattr(stage, each, None)) for each in READS}
        found |= {f"stages.{name}.{each}": arm for each, arm in named.items() if arm in read}
    return found


def _leaving_more_out(run: Run, gone: Sequence[str]) -> str:
    """Return the words that leave out all that reads what is left out; empty where no model would
    be made then.
    """
    more: list[str] = []
    # in the order of reading, but for a capture, which names a later stage
    for name, stage in run.stages.items():
        more += [name] if {*stage.reads(run), getattr(stage, "like", None)} & {*gone, *more} else []
    more += [
        name
        for name, stage in run.stages.items()
        if name not in more and getattr(stage, "like", None) in more
    ]
    primary = _another_primary(run, {*gone, *more})
    return "" if primary is None else " ".join([*(f"~stages.{name}" for name in more), *primary])


def _reading_others(run: Run, gone: Sequence[str]) -> str:
    """Return the words that give each stage something else to read; empty where nothing else would
    do, or is needed.
    """
    words: list[str] = []
    for setting in _settings_that_name(run, gone):
        stage = run.stages.get(setting.split(".")[1]) if setting != SOURCE else None
        each = setting.rpartition(".")[2]
        if each == "like" and (
            isinstance(stage, CaptureStage) or getattr(stage, "match_compute", False)
        ):
            return ""  # these are nothing without a stage to be like
        words.append(f"{setting}={READS.get(each, BASE)}")
    return " ".join([*words, *(_another_primary(run, gone) or [])]) if words else ""


def _another_primary(run: Run, gone: Collection[str]) -> list[str] | None:
    """Return the word that names another primary arm, where one is needed; None where there is none
    to name.
    """
    left = [
        name for name, stage in run.stages.items() if name not in gone and _makes_a_model(stage)
    ]
    if not left or run.primary_arm not in gone:
        return [] if left else None
    others = f" (or {', '.join(left[1:])})" if left[1:] else ""
    return [f"primary_arm={left[0]}{others}"]
