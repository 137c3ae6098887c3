"""The stage contract: all that a run asks a stage, so that nothing else has to know its type.

A stage is a dataclass whose fields are its settings. `inputs`, `check` and `run` are its own to
write; everything else has an answer here that suits a stage with nothing special to say. To add a
type: a file with a subclass of `Stage`, and a line in `table.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline.config.arms import BASE, STUDENT_INIT, stage_name
from pipeline.errors import UserError
from pipeline.store.artifacts import MODEL as MODEL_KIND
from pipeline.store.artifacts import plain

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config.settings.precision import Precision
    from pipeline.config.settings.quantization import Format
    from pipeline.config.settings.run import Run
    from pipeline.config.settings.training import TrainingConfig
    from pipeline.data.documents import Dataset
    from pipeline.ledger.phases import PhaseClock
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact

MODEL = "model"
TEACHER = "teacher"
CACHE = "cache"
LIKE = "like"
STUDENT_SOURCE = "student_source"
RELEASE = "release"
"""Roles of what a stage is given: the model it starts from, its teacher, a teacher cache, the stage
whose settings it takes, what the student is cut from, and a released artifact.
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """Another arm that a stage names, in one role.

    Attributes:
        arm: The arm.
        setting: What names it: a setting of the stage, or a full one with a dot in it.
        reads: Whether its artifact is read; else only its settings or its counts are.
        kind: Of the artifact that is expected.
        instead: What could be given in its place in any recipe; None: nothing could.
        comes_earlier: Whether it has to stand before this stage.
    """

    arm: str
    setting: str
    reads: bool = True
    kind: str = MODEL_KIND
    instead: str | None = BASE
    comes_earlier: bool = True

    def full_setting(self, key: str) -> str:
        """Return the setting's full name; `key` is the stage's, `stages.NAME`."""
        return self.setting if "." in self.setting else f"{key}.{self.setting}"


@dataclass(frozen=True, slots=True)
class Control:
    """What a stage is a control of: the same training without what `of` adds.

    Attributes:
        of: The arm.
        matches: What both have in common: the FLOPs, or the tokens.
    """

    of: str
    matches: Literal["compute", "tokens"]


@dataclass(frozen=True, slots=True)
class PrecisionInForce:
    """A precision that a stage computes in, and the setting that decides it."""

    setting: str
    precision: Precision
    is_own: bool  # the stage's setting gives it; else `precision` does
    trains: bool = True


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What was made outside of this run, by work that the stage's arm is charged with.

    Attributes:
        arm: The name it has among what is charged.
        path: The model whose artifact.json may tell its cost; None where nothing is looked up.
        unknown: Why nothing is known of its cost; None where `path` says.
    """

    arm: str
    path: str | None = None
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class BeforeRun:
    """What is known before anything is made: settings, data, device, and the given model's files.

    Attributes:
        base: Where the model of `model.*` lies: a folder, or a name on the Hub.
        config: Its transformers configuration.
        configs: Of arms that were asked for, which takes a model on the meta device each.
    """

    run: Run
    data: Dataset
    device: Any
    base: str | Path
    config: Any
    configs: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a stage reads sequences with, as far as it is known before anything is made.

    Attributes:
        config: transformers configuration of the model.
        precision: That it computes in.
        batches: By which it reads train: sizes, lengths, steps, the optimizer; None where it reads
            none of it.
        trains: Whether it computes gradients.
        teacher: Configuration of a frozen model that reads every batch beside it, and the precision
            of that.
        writes: Whether the model writes some of what it reads.
    """

    config: Any
    precision: Precision
    batches: TrainingConfig | None = None
    trains: bool = False
    teacher: tuple[Any, Precision] | None = None
    writes: bool = False


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What a stage may do before its window opens, as overhead of the run."""

    run: Run
    data: Dataset
    device: Any
    clock: PhaseClock


@dataclass(frozen=True, slots=True)
class Attempts:
    """How a stage has its fallbacks tried, each with a row of its own.

    Attributes:
        attempt: Brings a fallback to its row; returns why it could not be made, or None.
        skip: Gives a fallback a row that says why it was not tried.
        made: Returns the output of an arm that was made, else None.
        unavailable: Returns why a stage cannot be done here with the artifacts there are, or None.
        artifact: Returns the artifact of an arm.
        skip_stage: Gives the stage itself a row that says why it is left out.
    """

    run: Run
    device: Any
    attempt: Callable[[str, Stage], Exception | None]
    skip: Callable[[str, Stage, str], None]
    made: Callable[[str], Output | None]
    unavailable: Callable[[Stage], str | None]
    artifact: Callable[[str], Artifact]
    skip_stage: Callable[[str], None]
    say: Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Stage(ABC):
    """Settings of a stage, and its answers to what a run asks."""

    optional: bool = False  # skipped with its reason where this device cannot do it

    type: ClassVar[str]
    # part of the artifact's key: raise it when the same settings make something else
    version: ClassVar[int]
    makes: ClassVar[str] = MODEL_KIND  # kind of the artifact
    # what reports call the arm; None: by its role in the run, such as student or teacher
    word: ClassVar[str | None] = None

    # -- what it reads ----------------------------------------------------------------------------

    @abstractmethod
    def references(self, run: Run) -> dict[str, Reference]:
        """Return the other arms that this stage names, by role."""

    def inputs(self, run: Run) -> dict[str, str]:
        """Return the arms whose artifacts this stage reads, by role."""
        return {role: each.arm for role, each in self.references(run).items() if each.reads}

    def starts_from(self) -> str | None:
        """Return the arm (or `base`, `student_init`) whose weights it changes, or None."""
        return None

    def learns_from(self) -> str | None:
        """Return the arm whose predictions it learns from or records, or None."""
        return None

    def takes_release(self) -> bool:
        """Return whether its artifact is one that was released, given as input `release`."""
        return False

    # -- what it does -----------------------------------------------------------------------------

    @abstractmethod
    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, from the settings alone.

        Args:
            key: The stage's settings, `stages.NAME`.

        Raises:
            UserError: Naming the setting.
        """

    @abstractmethod
    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Do the work and leave the artifact's files in `ctx.out`.

        Args:
            inputs: The artifacts of `inputs`, by role.
        """

    def planned(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output | None:
        """Return what it will report of its FLOPs, without doing it; None where its steps decide
        that.
        """
        return None

    def trains(self, run: Run) -> bool:
        """Return whether it takes optimizer steps."""
        return False

    def is_split(self, run: Run) -> bool:
        """Return whether all ranks of a run do it together; else the first one does it alone."""
        return False

    def batches_like(self, run: Run) -> TrainingConfig | None:
        """Return the training settings by which it reads batches of train, or None."""
        return None

    def sets_of_training(self, name: str, run: Run) -> bool | None:
        """Return whether it has a `training.*` setting of its own; None where it reads none."""
        return None

    def precisions(self, key: str, run: Run) -> list[PrecisionInForce]:
        """Return the precisions that it computes in."""
        return []

    def lengths(self, key: str, run: Run) -> Iterator[tuple[str, int]]:
        """Yield the sequence lengths that it is sure to read, in tokens, by their settings."""
        return iter(())

    def leaves_model(self, run: Run) -> bool:
        """Return whether what it makes is the very model that it starts from."""
        return False

    def keeps_layers(self) -> bool:
        """Return whether what it makes has the layers of what it starts from."""
        return True

    def matched(self, run: Run) -> tuple[str, ...]:
        """Return the arms whose FLOPs say how many steps it takes; the first is like it."""
        return ()

    # -- what a result is read against ------------------------------------------------------------

    def reference(self) -> str | None:
        """Return the arm that this stage stores in other numbers, or None: what it is read
        against.
        """
        return None

    def stored_format(self) -> Format | None:
        """Return the number format that it stores a whole model or its layers in, or None."""
        return None

    def control(self, run: Run) -> Control | None:
        """Return what this stage is a control of, or None."""
        return None

    def made_elsewhere(self, name: str, run: Run) -> list[Elsewhere]:
        """Return what other work, outside of this run, its arm rests on."""
        if self.starts_from() != STUDENT_INIT:
            return []
        return [Elsewhere(STUDENT_INIT, run.student.path)]

    def left_unchanged(self, output: Output) -> str | None:
        """Return why the model was left as it is where something else was wanted, or None."""
        return None

    # -- settings ---------------------------------------------------------------------------------

    def no_effect(self, setting: str, run: Run) -> str | None:
        """Return why a setting of this stage has no effect, as it continues `has no effect`."""
        return None

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return the settings that decide what it makes: a part of the artifact's key."""
        return settings_of(self, "optional", LIKE)

    def shown_settings(self, run: Run) -> dict[str, Any]:
        """Return the settings in force, as the journal and MLflow show them."""
        return {name: value for name, value in settings_of(self).items() if value is not None}

    def files(self) -> dict[str, str]:
        """Return the files that it reads beside the data, by their settings."""
        return {}

    def libraries(self, run: Run) -> list[str]:
        """Return the distributions beside torch and transformers that have a hand in what it
        makes.
        """
        return []

    # -- before it runs ---------------------------------------------------------------------------

    def refuse_device(self, key: str, run: Run, device: Any) -> None:
        """Refuse what this device cannot do; an optional stage is skipped when its turn comes.

        Raises:
            UserError: Naming the setting.
        """
        from pipeline.training.precision import why_not

        for each in [] if self.optional else self.precisions(key, run):
            reason = why_not(each.precision, device)
            if reason is not None:
                remedy = "choose fp32 or bf16, or mark the stage optional: true"
                raise UserError(each.setting, reason, remedy)

    def preflight(self, key: str, known: BeforeRun) -> None:  # noqa: B027 - most refuse nothing
        """Refuse what this model or this data does not allow, before anything is made.

        Raises:
            UserError: Naming the setting.
        """

    def workload(self, name: str, known: BeforeRun) -> Workload | None:
        """Return what it computes, for forecasts; None where that is not known before its turn."""
        return None

    def trial(self, steps: int, run: Run) -> Stage | None:
        """Return the same stage with so few steps, of which the second half is read by itself; None
        where a few steps tell nothing of it.
        """
        return None

    def makes_config(self, known: BeforeRun) -> Any | None:
        """Return the configuration of the model that it makes; None where its turn decides it."""
        start = self.starts_from()
        return None if start is None or not self.keeps_layers() else config_of(start, known)

    def unavailable(self, run: Run, device: Any, inputs: Mapping[str, Artifact]) -> str | None:
        """Return why this device, or what it would read, does not allow the stage, or None."""
        from pipeline.training.precision import why_not

        reasons = (why_not(each.precision, device) for each in self.precisions("", run))
        return next((reason for reason in reasons if reason is not None), None)

    def warm_up(  # noqa: B027 - most have nothing in common
        self, inputs: Mapping[str, Artifact], ctx: WarmUp
    ) -> None:
        """Import and prepare what all arms use alike; else the first one would pay for the
        others.
        """

    # -- when it fails ----------------------------------------------------------------------------

    def fallbacks(self, name: str) -> dict[str, Stage]:
        """Return the stages that may be tried in its place, by their arms (`NAME/...`)."""
        return {}

    def settle(self, name: str, attempts: Attempts) -> Stage | None:
        """Try the fallbacks in order; return the stage that then runs under this name.

        Returns:
            This stage where there is nothing to try; None where it is skipped, with a row.
        """
        return self

    def may_be_refused(self) -> bool:
        """Return whether the run continues where the stage turns out to be impossible."""
        return False

    def refusals(self, key: str) -> AbstractContextManager[None]:
        """Return what makes refusals of the errors by which a library says that it cannot."""
        return nullcontext()

    def memory_remedy(self, name: str, run: Run) -> str:
        """Return the setting that needs less memory at the smallest loss, with the value to try."""
        return "a device with more memory (this stage has no setting that needs less)"


def stages_of(run: Run) -> dict[str, Stage]:
    """Return a composed recipe's stages by name, in the order they run."""
    return run.stages


def config_of(arm: str, known: BeforeRun) -> Any | None:
    """Return the configuration of an arm's model, as far as it is known before anything is made.

    Args:
        arm: Of a stage, `base` or `student_init`.
    """
    if arm == BASE:
        return known.config
    if arm != STUDENT_INIT:
        return stages_of(known.run)[arm].makes_config(known)
    if arm not in known.configs:
        known.configs[arm] = _student_config(known)
    return known.configs[arm]


def _student_config(known: BeforeRun) -> Any | None:
    from pipeline.models.student import student_config

    student = known.run.student
    if student.path is None and not is_base_shaped(student_source(known.run), known.run):
        return None
    return student_config(student, known.base, known.run.task)


def student_source(run: Run) -> str:
    """Return the arm that the student's layers, configuration and tokenizer are copied from."""
    if run.student.source is not None:
        return run.student.source
    teachers = (stage.learns_from() for stage in stages_of(run).values())
    return next((teacher for teacher in teachers if teacher is not None), BASE)


def settings_of(stage: Stage, *left_out: str) -> dict[str, Any]:
    """Return a stage's settings as plain JSON."""
    return {name: value for name, value in plain(stage).items() if name not in left_out}


def arms_read(stage: Stage, run: Run) -> list[str]:
    """Return the arms whose artifacts a stage reads, each once."""
    return list(dict.fromkeys(stage.inputs(run).values()))


def made_arms_read(stage: Stage, run: Run) -> list[str]:
    """Return those of them that another stage makes: `base` is given."""
    return [arm for arm in arms_read(stage, run) if arm != BASE]


def stage_of(run: Run, arm: str) -> Stage:
    """Return the stage behind an arm, a fallback's too; from the settings alone."""
    name = stage_name(arm)
    stage = stages_of(run)[name]
    # A fallback is named `NAME/...` and stands in no recipe: its stage makes it.
    return stage if name == arm else stage.fallbacks(name)[arm]


def teacher_of(run: Run, arm: str) -> str | None:
    """Return the arm whose predictions those of `arm` are compared with, or None.

    Its own teacher; else that of the stage it is like (a control's), or that of the model it
    starts from; else the only one there is.
    """
    stages, seen = stages_of(run), set[str]()
    # Breadth first: what is nearest to the arm decides. `seen` ends a circle of references.
    ahead = [stage_name(arm)]
    while ahead:
        name = ahead.pop(0)
        if name in seen or name not in stages:
            continue
        seen.add(name)
        stage = stages[name]
        teacher = stage.learns_from()
        if teacher is not None:
            return teacher
        named = stage.references(run)
        ahead += [named[role].arm for role in (LIKE, MODEL) if role in named]
    teachers = {stage.learns_from() for stage in stages.values()} - {None}
    return teachers.pop() if len(teachers) == 1 else None


def is_base_shaped(arm: str, run: Run) -> bool:
    """Return whether an arm has the layers of `base`: nothing on the way to it changes them."""
    while arm != BASE:
        stage = stages_of(run).get(arm)
        start = None if stage is None else stage.starts_from()
        if stage is None or start is None or not stage.keeps_layers():
            return False
        arm = start
    return True


def refusal_words(arm: str, error: Exception) -> str:
    """Return why a format is none for this model, without the setting and the stage that a refusal
    names.
    """
    if isinstance(error, UserError):
        return error.problem
    return str(error).removeprefix(f"stage {arm}: ")
