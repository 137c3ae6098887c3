"""Settings that were given and would change nothing: refused, since whoever gave them believes that
they do.

What says how to measure something that this recipe does not measure is said in a note instead: one
line of settings may serve several recipes.

One table says, by setting, under what it has no effect. Asked for are only settings that a user
gave, on the command line or in a recipe of their own: what profiles set beside them is nobody's
belief. What single stages cannot take is in their `check`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipeline.config.arms import STUDENT_INIT
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Measure, Run
from pipeline.errors import UserError
from pipeline.gate.checks import is_gate
from pipeline.stages.base import stages_of

Rule = Callable[[Run], str | None]
"""Returns why a setting has no effect in a run, as it continues `has no effect`; None where it may
have one.
"""


def check_given(run: Run, given: Collection[str]) -> None:
    """Refuse a setting that was given and has no effect; of those in `NOTED`, say so.

    Args:
        given: Settings by their full name; a group stands for the choice of one (`policy=strict`).

    Raises:
        UserError: Naming the first of them.
    """
    for key in sorted(given):
        why = why_no_effect(run, key)
        if why is not None and key.startswith(NOTED):
            print(f"note: {key} has no effect {why}", flush=True)
        elif why is not None:
            raise UserError(key, f"has no effect {why}", "leave it out")


def why_no_effect(run: Run, key: str) -> str | None:
    """Return why a setting has no effect in this run, or None."""
    if key.startswith("stages."):
        return _why_of_stage(run, key)
    at = max(
        (name for name in RULES if key == name or key.startswith(f"{name}.")), key=len, default=None
    )
    why = None if at is None else RULES[at](run)
    if why is None and key.startswith("training."):
        return _why_of_training(run, key.partition(".")[2])
    return why


# -- training -------------------------------------------------------------------------------------


def _why_of_training(run: Run, name: str) -> str | None:
    """Return why `training.NAME` has no effect: nothing trains, each stage sets its own, or another
    setting decides.
    """
    if name == "sequence_length":  # what is assessed has that length, too
        return None
    stages = stages_of(run).values()
    reading = [each for each in stages if each.sets_of_training(name, run) is not None]
    if not reading:
        return "where no stage trains"
    if all(each.sets_of_training(name, run) for each in reading):
        return "where each stage sets its own"
    reasons = [each.no_effect(name, run) for each in reading]
    return reasons[0] if all(reasons) else None


def _why_of_stage(run: Run, key: str) -> str | None:
    _, name, *rest = key.split(".")
    stage = stages_of(run).get(name)
    return None if stage is None else stage.no_effect(".".join(rest), run)


# -- all others -----------------------------------------------------------------------------------


def _model_given(run: Run) -> str | None:
    return "beside model.path" if run.model.path is not None else _no_model(run)


def _no_model(run: Run) -> str | None:
    return "in a release check, which takes candidate and baseline" if is_gate(run) else None


def _local(path: str | None) -> str | None:
    return "with a local folder" if path is not None and Path(path).expanduser().is_dir() else None


def _no_student(run: Run) -> str | None:
    reads = any(stage.starts_from() == STUDENT_INIT for stage in stages_of(run).values())
    return None if reads else "without a stage that starts from the student"


def _student_copied(run: Run) -> str | None:
    return _no_student(run) or ("beside student.path" if run.student.path is not None else None)


def _precisions(run: Run) -> set[Precision]:
    in_force = (each for stage in stages_of(run).values() for each in stage.precisions("", run))
    return {each.precision for each in in_force if each.trains}


def _needs_precision(*precisions: Precision) -> Rule:
    """Return the rule of a setting that is read in some precisions, and where they are tried."""

    def why(run: Run) -> str | None:
        if _precisions(run) & {*precisions, Precision.auto}:
            return None
        return (
            "unless a stage trains in"
            f" {' or '.join(each.value for each in (*precisions, Precision.auto))}"
        )

    return why


def _embedded(run: Run) -> str | None:
    return "on the embedded data" if run.data.path is None and run.data.hub is None else None


def _no_gate(run: Run) -> str | None:
    return None if is_gate(run) else f"in recipe={run.recipe}; it is for recipe=release_check"


def _not_served(run: Run) -> str | None:
    """Return why nothing of serving is measured; a search over formats serves as well."""
    measures = {Measure.serving, Measure.payback}
    served = is_gate(run) or any(measures & set(pair.on) for pair in run.compare)
    return (
        None
        if served or _quantizes(run)
        else "where no pair of arms is compared on serving or payback"
    )


def _quantizes(run: Run) -> bool:
    return any(stage.reference() is not None for stage in stages_of(run).values())


def _no_teacher(run: Run) -> str | None:
    taught = any(stage.learns_from() is not None for stage in stages_of(run).values())
    return None if taught else "without a teacher"


def _nothing_quantized(run: Run) -> str | None:
    return None if _quantizes(run) else "without a quantize stage"


def _nothing_trains(run: Run) -> str | None:
    computes = any(stage.precisions("", run) for stage in stages_of(run).values())
    return None if computes else "where no stage trains"


RULES: dict[str, Rule] = {
    "model.shape": _model_given,
    "model.path": _no_model,
    "model.revision": lambda run: _local(run.model.path) or _no_model(run),
    "student": _no_student,
    # one that cannot be loaded is refused for that, wherever it is given
    "student.path": lambda _: None,
    "student.revision": lambda run: _local(run.student.path),
    "student.source": _student_copied,
    "data.vocabulary_size": (
        lambda run: _model_given(run) and f"{_model_given(run)}, whose tokenizer is used"
    ),
    "data.format": _embedded,
    "data.columns": _embedded,
    "data.label_map": _embedded,
    "data.group_field": _embedded,
    "data.splits": _embedded,
    "precision": _nothing_trains,
    "precision.loss_scale": _needs_precision(Precision.fp16),
    "precision.loss_tolerance": _needs_precision(),
    "precision.fp8_least_width": _needs_precision(Precision.fp8_tensorwise, Precision.fp8_rowwise),
    "quality.max_bytes_per_document": lambda run: (
        None if run.task.kind.is_language else f"for a {run.task.kind.word}"
    ),
    "serving.draft_tokens": (
        lambda run: None if run.serving.draft is not None else "without serving.draft"
    ),
    "budget.wall_reserve_seconds": (
        lambda run: None if run.budget.wall_seconds is not None else "without budget.wall_seconds"
    ),
    "serving.volume": _not_served,
    "serving.rate": _not_served,
    "policy": _no_gate,
    "store.url": _no_gate,
    "cost.teacher_shared_by": _no_teacher,
    "seed": lambda run: "beside seeds" if run.seeds is not None else None,
    "allow_no_speedup": _nothing_quantized,
}
"""By setting, or by the group of some: under what it has no effect. The most exact name counts."""


NOTED = (
    "serving.",
    "quality.",
    "allow_no_speedup",
    "cost.teacher_shared_by",
    "data.vocabulary_size",
)
"""How to measure, show or read what another recipe, task or model has."""


def given_keys(settings: Collection[str]) -> set[str]:
    """Return the settings that a command line names; what is set to null is asked for by nobody."""
    pairs = [arg.partition("=") for arg in settings if "=" in arg]
    named = {key.lstrip("+"): value for key, _, value in pairs}
    return {
        key
        for key, value in named.items()
        if value != "null" and not key.startswith(("hydra", "stage@"))
    }


def recipe_keys(settings: Any, prefix: str = "") -> set[str]:
    """Return the settings that a recipe of a user's holds; in stages, those of the stages."""
    if not isinstance(settings, dict):
        return {prefix} if settings is not None else set()
    whole = prefix in (
        "student.config",
        "policy.metrics",
        "data.columns",
        "data.label_map",
        "data.splits",
    )
    if whole or not settings:
        return {prefix}
    left_out = ("defaults", "recipe", "question", "compare", "primary_arm") if not prefix else ()
    return {
        key
        for name, item in settings.items()
        if name not in left_out
        for key in recipe_keys(item, f"{prefix}.{name}" if prefix else str(name))
    }
