"""Runs that have arms which another run lacks: their recipes, and how they are made.

Such a run is one like any other: composed from a recipe file that stays, kept in the same store,
and gone on with by the same command where it was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.arms import STUDENT_INIT, VARIANT
from pipeline.errors import Exit, UserError, one_line

if TYPE_CHECKING:
    from pipeline.compare.attribution import Coalition
    from pipeline.config.settings.run import Run
    from pipeline.runs.receipts.receipt import Kept
    from pipeline.stages.variants import Arms, Parts, Placed

BUDGET = "budget.device_hours"


@dataclass(frozen=True, slots=True)
class Job:
    """A run that has arms which no run has yet.

    Attributes:
        recipe: Its recipe file's text.
        arms: By coalition, the arms that are read from it.
    """

    recipe: str
    arms: Mapping[Coalition, str]

    @property
    def name(self) -> str:
        """The name of its recipe: the same arms of the same settings have the same."""
        return f"{VARIANT}{hashlib.sha256(self.recipe.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a run, as far as its settings tell.

    Attributes:
        kept: The run's files.
        run: Its settings.
        places: Where the arms of the coalitions stand that are read, the base's and the whole's
            among them.
    """

    kept: Kept
    run: Run
    arms: Arms
    places: Mapping[Coalition, Placed]

    @property
    def parts(self) -> Parts:
        """What the arm has and its base has not."""
        return self.arms.parts


def existing(question: Question) -> dict[Coalition, str]:
    """Return the arms that the run itself has."""
    from pipeline.runs.attribution import has_arm

    return {
        each: place.arm
        for each, place in question.places.items()
        if not place.changes
        and place.arm not in question.arms.new
        and has_arm(question.kept, place.arm)
    }


def jobs_of(question: Question, own: Mapping[Coalition, str]) -> list[Job]:
    """Return the runs that have what the run lacks: one for each change of its settings."""
    lacking = [place for each, place in question.places.items() if each not in own]
    changes = list({json.dumps(place.changes): place.changes for place in lacking}.values())
    found: list[Job] = []
    for change in changes:
        arms = {
            each: place.arm
            for each, place in question.places.items()
            if each and place.changes == change
        }
        found.append(Job(_variant(question, change, arms), arms))
    return found


# -- recipes --------------------------------------------------------------------------------------

APART = ("tracking.", "budget.", "policy.", "question", "recipe")
"""Settings that the command line has, or that no variant needs."""


def changed_in(kept: Kept) -> dict[str, Any]:
    """Return the settings of a run that are not the defaults, by dotted name."""
    from pipeline.store.artifacts import flat

    settings = flat(kept.settings)
    return {name: settings[name] for name in kept.start.get("changed", ()) if name in settings}


def types_of(kept: Kept) -> dict[str, str]:
    """Return the types of a run's stages, in its order."""
    types = {event["arm"]: event["type"] for event in kept.events if event["e"] == "stage_start"}
    types |= {row["arm"]: row["type"] for row in kept.result["rows"]}
    return {name: types[name] for name in kept.settings["stages"] if name in types}


def recipe_of(kept: Kept, changed: Mapping[str, Any], types: Mapping[str, str]) -> str:
    """Return a recipe file's text.

    Args:
        changed: Its settings, by dotted name.
        types: Of its stages, in the order in which they stand.
    """
    import yaml

    nested: dict[str, Any] = {}
    for name, value in changed.items():
        if name.startswith(APART):
            continue
        *folders, last = name.split(".")
        if folders[:1] == ["stages"] and folders[1] not in types:
            continue
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    stages = nested.setdefault("stages", {})
    for name in types:
        stages.setdefault(name, {})
    placed = [{f"/stage@stages.{name}": each} for name, each in types.items()]
    question = one_line(kept.result["question"], 200).replace("${", "$ {")
    text = yaml.safe_dump({"defaults": placed, **nested}, sort_keys=False, allow_unicode=True)
    return f"# {question}\n{text}"


def _variant(question: Question, change: Mapping[str, Any], arms: Mapping[Coalition, str]) -> str:
    """Return the recipe that has arms, and the base beside them.

    Args:
        change: Settings that it has in place of the run's.
    """
    from pipeline.runs.changed import stage_defaults
    from pipeline.stages.base import STUDENT_SOURCE, student_source
    from pipeline.stages.table import STAGES
    from pipeline.stages.variants import needed

    kept, run, new = question.kept, question.run, question.arms.new
    names = needed(run, new, [question.parts.base, *arms.values()])
    known = types_of(kept)
    types = {name: new[name].type if name in new else known[name] for name in names}
    changed = changed_in(kept)
    for name in (each for each in names if each in new):
        defaults = stage_defaults(STAGES[new[name].type])
        changed |= {
            f"stages.{name}.{key}": value
            for key, value in new[name].settings.items()
            if value != defaults.get(key)
        }
    reads = [run.stages[name].references(run) for name in names if name in run.stages]
    if any(STUDENT_SOURCE in each for each in reads) or any(
        each.settings.get("model") == STUDENT_INIT for each in new.values()
    ):
        changed["student.source"] = student_source(run)  # else it follows the stages that are left
    changed["primary_arm"] = arms[max(arms, key=len)]
    if any(stage.reference() is not None for stage in run.stages.values()):
        changed["allow_no_speedup"] = True  # what each part brings is the question
    changed["compare"] = _compared(question, arms)
    return recipe_of(kept, {**changed, **change}, types)


def _compared(question: Question, arms: Mapping[Coalition, str]) -> list[dict[str, Any]]:
    """Return the pairs of a variant: each arm with the base, and the largest with those that lack
    one part. Serving is read where the run reads it.
    """
    from pipeline.config.settings.run import Measure

    whole, base = max(arms, key=len), question.parts.base
    serves = any({Measure.serving, Measure.payback} & set(p.on) for p in question.run.compare)
    serving = ["serving"] if serves else []
    pairs = {(arm, base): ["quality", *serving] for arm in arms.values()}
    for each, arm in arms.items():
        if serves and len(each) == len(whole) - 1:
            pairs.setdefault((arms[whole], arm), serving)
    return [
        {"arm": arm, "base": other, "on": on} for (arm, other), on in pairs.items() if arm != other
    ]


def composed(recipe: str, kept: Kept, root: Path) -> Run:
    """Return the settings that a recipe amounts to, here.

    Raises:
        UserError: If they are refused.
    """
    from pipeline.cli import main as cli

    found: list[Run] = []

    def take(run: Run, *_: Any) -> int:
        found.append(run)
        return Exit.DONE

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
        name = f"{VARIANT}of"
        Path(folder, f"{name}.yaml").write_text(recipe, encoding="utf-8")
        words = ["--recipe-dir", folder, f"recipe={name}", *tracked_as(kept, root)]
        code = cli.main(words, started_ns=time.monotonic_ns(), execute=take)
    if code == Exit.INTERRUPTED:
        raise KeyboardInterrupt
    if not found:
        why = one_line(said.getvalue().removeprefix("refused: "), 300)
        raise UserError("RUN", f"its settings are refused here ({why})", "give another run")
    return found[0]


def tracked_as(kept: Kept, root: Path) -> list[str]:
    """Return how a variant is tracked: as the run was, in the same store."""
    own = {name: value for name, value in changed_in(kept).items() if name.startswith("tracking.")}
    own["tracking.root"] = str(root)
    own.pop("tracking.resume", None)
    return [f"{name}={json.dumps(value)}" for name, value in own.items() if value is not None]


# -- making them ----------------------------------------------------------------------------------


def finished(root: Path, job: Job) -> Kept | None:
    """Return the newest run of a job that has finished and made its arms; None: there is none."""
    from pipeline.runs.attribution import has_arm, read_run

    for folder in sorted(root.glob(f"runs/*-{job.name}-*"), reverse=True):
        try:
            kept = read_run(folder)
        except UserError:
            continue
        if all(has_arm(kept, arm) for arm in job.arms.values()):
            return kept
    return None


def make(job: Job, place: Path, kept: Kept, root: Path, budget_h: float, started_ns: int) -> int:
    """Run a job; return its exit code."""
    from pipeline.cli import main as cli

    if budget_h <= 0:
        print(f"{BUDGET} is spent: the rest is not made", file=sys.stderr)
        return Exit.BUDGET_SPENT
    words = [*words_of(job, place), *tracked_as(kept, root), f"{BUDGET}={budget_h!r}"]
    print(f"making what is missing: {shlex.join(['python', '-m', 'pipeline', *words])}", flush=True)
    return cli.main(words, started_ns=started_ns)


def words_of(job: Job, place: Path) -> list[str]:
    """Write a job's recipe; return what a command line says of it.

    Raises:
        UserError: If it cannot be written.
    """
    from pipeline.store.artifacts import write_text

    folder = place / "recipes"
    try:
        write_text(folder / f"{job.name}.yaml", job.recipe)
    except OSError as error:
        raise UserError(
            "--out", f"{folder} cannot be written ({error.strerror})", "give another folder"
        ) from error
    return ["--recipe-dir", str(folder), f"recipe={job.name}"]
