"""Which model drafts for which: `serving.draft`, read by what stages say of their models."""

from __future__ import annotations

from pipeline.config.arms import BASE, Draft
from pipeline.config.settings.run import Measure, Run
from pipeline.errors import UserError
from pipeline.stages.base import stages_of
from pipeline.store.artifacts import MODEL

KEY = "serving.draft"
STUDENT = "student"
"""The value that stands for the recipe's student, whatever its arm is called."""


def draft_of(run: Run) -> Draft | None:
    """Return which arm drafts for which, from the settings alone; None where none was asked for.

    Raises:
        UserError: If the setting names no model that learnt from one that is served.
    """
    if run.serving.draft is None:
        return None
    if not run.task.kind.is_language:
        raise UserError(KEY, f"a {run.task.kind.word} generates nothing", "leave it out")
    arm = _named(run, run.serving.draft)
    teacher = _teacher(run, arm)
    if teacher is None:
        raise UserError(
            KEY,
            f"{arm} learns from no teacher, so it drafts for none",
            f"name an arm that is distilled, or made from one{_listed(_students(run))}",
        )
    if teacher == BASE:
        raise UserError(
            KEY,
            f"the teacher of {arm} is the given model itself, which no arm of this recipe serves",
            "add a train stage of 0 steps that starts from base, and make it the teacher",
        )
    served = {Measure.serving, Measure.payback}
    if not any(teacher in (pair.arm, pair.base) and served & set(pair.on) for pair in run.compare):
        raise UserError(
            KEY,
            f"the recipe does not compare {teacher}, the teacher of {arm}, on serving",
            f"compare an arm with it: {{arm: {arm}, base: {teacher}, on: [serving]}}",
        )
    return Draft(arm, teacher, run.serving.draft_tokens)


def _named(run: Run, value: str) -> str:
    """Return the arm that the setting names: by its role, else by its name."""
    students = _students(run)
    if value == STUDENT and len(students) == 1:
        return students[0]
    if value in stages_of(run):
        return value
    if value == STUDENT and not students:
        problem = "no arm of this recipe learns from a teacher"
        raise UserError(KEY, problem, "leave it out, or distill one")
    if value == STUDENT:
        problem = "several arms learn from a teacher"
        raise UserError(KEY, problem, f"name an arm{_listed(students)}")
    raise UserError(KEY, f"{value!r} is no arm of this recipe", f"give student{_listed(students)}")


def _students(run: Run) -> list[str]:
    """Return the arms that are models and learn from a teacher."""
    return [
        name
        for name, stage in stages_of(run).items()
        if stage.makes == MODEL and stage.learns_from() is not None
    ]


def _teacher(run: Run, arm: str) -> str | None:
    """Return the teacher of an arm, or of the nearest model that it was made from."""
    stages, seen = stages_of(run), set[str]()
    while arm in stages and arm not in seen:
        seen.add(arm)
        stage = stages[arm]
        if stage.makes == MODEL and stage.learns_from() is not None:
            return stage.learns_from()
        arm = stage.reference() or stage.starts_from() or ""
    return None


def _listed(students: list[str]) -> str:
    return f", e.g. {', '.join(students)}" if students else ""
