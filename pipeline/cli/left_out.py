"""Stages that a command line leaves out (`~stages.NAME`), and what goes with them.

The comparisons that name such a stage go with it. What cannot go without a word of the user's is
refused once, with all that would have to be given beside it: another primary arm, other arms for
the stages that stay and read this one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.stages.base import Reference, stages_of
from pipeline.store.artifacts import MODEL

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
    if any(stage.takes_release() for stage in stages_of(run).values()):
        raise UserError(key, "a release check compares candidate and baseline", "keep both")
    if not any(stage.makes == MODEL for stage in stages_of(run).values()):
        raise UserError(key, "no stage is left that makes a model", "keep one")
    needed = [f"{setting} is {reference.arm}" for setting, reference in _naming(run, gone).items()]
    if run.primary_arm in gone:
        needed.insert(0, f"primary_arm is {run.primary_arm}")
    if needed:
        ways = [way for way in (_leaving_more_out(run, gone), _reading_others(run, gone)) if way]
        raise UserError(key, ", ".join(needed), f"give as well: {', or instead: '.join(ways)}")


def _naming(run: Run, gone: Collection[str]) -> dict[str, Reference]:
    """Return the settings of what stays that name a stage that is left out."""
    found: dict[str, Reference] = {}
    if run.student.source in gone:
        found[SOURCE] = Reference(run.student.source or "", SOURCE)
    for name, stage in stages_of(run).items():
        for each in stage.references(run).values():
            # what the student is cut from is named there, or follows from its teacher
            if each.arm in gone and each.setting != SOURCE:
                found[each.full_setting(f"stages.{name}")] = each
    return found


def _leaving_more_out(run: Run, gone: Sequence[str]) -> str:
    """Return the words that leave out all that reads what is left out; empty where no model would
    be made then.
    """
    more: list[str] = []
    # in the order of the recipe, then once more: a capture names a later stage
    for _ in range(2):
        for name, stage in stages_of(run).items():
            named = {each.arm for each in stage.references(run).values()}
            if name not in more and named & {*gone, *more}:
                more.append(name)
    primary = _another_primary(run, {*gone, *more})
    return "" if primary is None else " ".join([*(f"~stages.{name}" for name in more), *primary])


def _reading_others(run: Run, gone: Sequence[str]) -> str:
    """Return the words that give each stage something else to read; empty where nothing else would
    do, or is needed.
    """
    found = _naming(run, gone)
    if not found or any(each.instead is None for each in found.values()):
        return ""  # some are nothing without the stage that they name
    words = [f"{setting}={each.instead}" for setting, each in found.items()]
    return " ".join([*words, *(_another_primary(run, gone) or [])])


def _another_primary(run: Run, gone: Collection[str]) -> list[str] | None:
    """Return the word that names another primary arm, where one is needed; None where there is none
    to name.
    """
    left = [
        name for name, stage in stages_of(run).items() if name not in gone and stage.makes == MODEL
    ]
    if not left or run.primary_arm not in gone:
        return [] if left else None
    others = f" (or {', '.join(left[1:])})" if left[1:] else ""
    return [f"primary_arm={left[0]}{others}"]
