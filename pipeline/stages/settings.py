"""What every training stage can be told, and how a stage's settings fall back on `training.*`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Optional

from pipeline.config.arms import BEST_16_BIT
from pipeline.config.settings import (
    OptimizerKind,
    Precision,
    Run,
    Schedule,
    Task,
    TrainingConfig,
    at_least_0,
    fraction,
    positive,
)
from pipeline.errors import UserError

# ruff: noqa: UP045

BASE = "base"
STUDENT_INIT = "student_init"
RESERVED = (BASE, STUDENT_INIT, BEST_16_BIT)


@dataclass(kw_only=True, slots=True)
class TrainingOverrides:
    """A stage's own training settings. Null inherits: from the stage named by `like`, then from
    `training.*`.
    """

    optional: bool = False  # skipped with its reason where this device cannot do it
    # starts from: base, student_init (the student's initial weights), or an earlier stage
    model: str = BASE
    like: Optional[str] = None  # the stage whose training settings this one inherits
    precision: Optional[Precision] = None
    steps: Optional[int] = at_least_0(None)
    epochs: Optional[float] = positive(None)
    batch_size: Optional[int] = positive(None)
    gradient_accumulation: Optional[int] = positive(None)
    sequence_length: Optional[int] = field(default=None, metadata={"min": 8})
    learning_rate: Optional[float] = positive(None)
    weight_decay: Optional[float] = at_least_0(None)
    warmup_fraction: Optional[float] = fraction(None)
    schedule: Optional[Schedule] = None
    decay_fraction: Optional[float] = fraction(None)
    max_grad_norm: Optional[float] = positive(None)
    eval_every: Optional[int] = positive(None)
    eval_documents: Optional[int] = positive(None)
    checkpoint_every: Optional[int] = positive(None)
    checkpoint_seconds: Optional[float] = positive(None)
    divergence_factor: Optional[float] = field(default=None, metadata={"above": 1})
    compile: Optional[bool] = None
    optimizer: Optional[OptimizerKind] = None
    activation_checkpointing: Optional[bool] = None
    start_batch_size: Optional[int] = positive(None)
    start_sequence_length: Optional[int] = field(default=None, metadata={"min": 8})
    growth_fraction: Optional[float] = field(default=None, metadata={"above": 0, "max": 1})
    # times that the start's layers are put on top of one another; null: once
    stack: Optional[int] = positive(None)

    type: ClassVar[str]
    version: ClassVar[int]


def _layers(stage: Any, run: Run) -> list[Any]:
    """Return where a setting is looked up, the stage itself first."""
    return [stage] if stage.like is None else [stage, run.stages[stage.like]]


def training_settings(stage: TrainingOverrides, run: Run) -> TrainingConfig:
    """Return the settings in force for `stage`: its own, else those of `like`, else `training.*`.

    Where `epochs` are in force, `steps` is not yet known, and above 0: see `steps_of`.
    """
    chosen = {
        item.name: getattr(run.training, item.name) for item in dataclasses.fields(TrainingConfig)
    }
    for layer in reversed(_layers(stage, run)):
        if layer.steps is not None:  # what is nearer to the stage wins, as steps or as epochs
            chosen["epochs"] = None
        for name in chosen:
            if getattr(layer, name) is not None:
                chosen[name] = getattr(layer, name)
    if chosen["epochs"] is not None:
        chosen["steps"] = max(1, chosen["steps"])
    return TrainingConfig(**chosen)


def settle_epochs(run: Run, given: Collection[str]) -> None:
    """Have `epochs` that the user gave win over steps of a profile or recipe, and steps over their
    epochs.

    Args:
        given: The settings of the command line.

    Raises:
        UserError: If the user gave both, of one stage or of all.
    """
    own = {
        f"stages.{name}": stage
        for name, stage in run.stages.items()
        if isinstance(stage, TrainingOverrides)
    }
    for key in ("training", *own):
        if f"{key}.steps" in given and f"{key}.epochs" in given:
            raise UserError(f"{key}.epochs", f"does not go with {key}.steps", "give one of the two")
    if "training.steps" in given:
        run.training.epochs = None
    for key, stage in own.items():
        if f"{key}.steps" in given:
            stage.epochs = None
        # 0: used as it is
        elif f"{key}.epochs" in given or ("training.epochs" in given and stage.steps):
            stage.steps = None


def steps_of(settings: TrainingConfig, num_rows: int) -> int:
    """Return how many steps the epochs in force take; `settings.steps` where none are.

    Args:
        num_rows: Windows, or examples, of an epoch.
    """
    if settings.epochs is None:
        return settings.steps
    from pipeline.training.schedule import first_row

    wanted = math.ceil(round(settings.epochs * num_rows, 6))
    steps = max(1, math.ceil(wanted / settings.batch_size))
    # batches that grow read less at first; how long they grow depends on the steps in turn
    while (read := first_row(steps, dataclasses.replace(settings, steps=steps))) < wanted:
        steps += math.ceil((wanted - read) / settings.batch_size)
    return steps


def read_as(stage: Any, run: Run) -> TrainingConfig | None:
    """Return the training settings that decide which batches a stage reads; None where it reads
    none.

    A capture reads what the stage named by `like` will train on.
    """
    if isinstance(stage, TrainingOverrides):
        return training_settings(stage, run)
    like = run.stages.get(getattr(stage, "like", ""))
    return training_settings(like, run) if isinstance(like, TrainingOverrides) else None


def training_precision(stage: Any, run: Run) -> Precision:
    """Return the precision in force for a stage that has `precision` and `like`."""
    named = [layer.precision for layer in _layers(stage, run) if layer.precision is not None]
    return named[0] if named else run.precision.name


def reads_model(name: str, run: Run) -> list[str]:
    """Return the arms that building the start weights `name` reads."""
    if name != STUDENT_INIT:
        return [name]
    return [student_source(run)] if run.student.path is None else []


def student_source(run: Run) -> str:
    """Return the arm that the student's layers, configuration and tokenizer are copied from."""
    if run.student.source is not None:
        return run.student.source
    teachers = [stage.teacher for stage in run.stages.values() if hasattr(stage, "teacher")]
    return teachers[0] if teachers else BASE


def check_training(stage: TrainingOverrides, key: str, run: Run) -> None:
    """Refuse training settings that contradict each other.

    Raises:
        UserError: Naming the setting.
    """
    if stage.like is not None and stage.like not in run.stages:
        raise UserError(
            f"{key}.like",
            f"no stage is called {stage.like!r}",
            f"name one of {', '.join(run.stages)}",
        )
    if stage.steps is not None and stage.epochs is not None:
        raise UserError(f"{key}.epochs", f"does not go with {key}.steps", "give one of the two")
    settings = training_settings(stage, run)
    if settings.batch_size % settings.gradient_accumulation:
        raise UserError(
            f"{key}.gradient_accumulation",
            f"{settings.gradient_accumulation} does not divide batch_size {settings.batch_size}",
            "give a divisor",
        )
    _check_growth(settings, key, run)
    _check_optimizer(settings, key, run)
    for name in ("hidden_weight", "relation_weight"):
        if getattr(stage, name, 0) and training_precision(stage, run) is Precision.bf16_pure:
            raise UserError(
                f"{key}.precision",
                f"bf16_pure has nothing in fp32 that {name} could use",
                "give bf16",
            )


def _check_optimizer(settings: TrainingConfig, key: str, run: Run) -> None:
    kind = settings.optimizer
    if kind is OptimizerKind.adamw:
        return
    library = kind.value.rpartition("_")[2]
    if find_spec(library) is None:
        problem = f"{kind.value} needs {library}, which is not installed"
        raise UserError(f"{key}.optimizer", problem, "pip install -e '.[quant]'")
    if run.hardware.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problem = f"the moments of {kind.value} cannot be sharded over devices (FSDP2)"
        raise UserError(f"{key}.optimizer", problem, "give adamw, or one device")


def _check_growth(settings: TrainingConfig, key: str, run: Run) -> None:
    for name in ("batch_size", "sequence_length"):
        start, full = getattr(settings, f"start_{name}"), getattr(settings, name)
        if start is not None and full not in (start << at for at in range(full.bit_length())):
            problem = f"{start} doubled again and again does not become {name} {full}"
            raise UserError(f"{key}.start_{name}", problem, f"give {full} divided by 2, 4, 8, ...")
    if (
        settings.start_batch_size is not None
        and settings.start_batch_size % settings.gradient_accumulation
    ):
        problem = f"gradient_accumulation {settings.gradient_accumulation} does not divide it"
        raise UserError(f"{key}.start_batch_size", problem, "give a multiple")
    if settings.start_sequence_length is not None and run.task is not Task.causal_lm:
        problem = "has no effect: examples are padded to the longest of their batch"
        raise UserError(f"{key}.start_sequence_length", problem, "leave it out")
