"""The settings of every stage that trains, and how its settings fall back on `training.*`."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Optional

from pipeline.config.arms import BASE, STUDENT_INIT
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.ranges import at_least_0, fraction, positive
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import (
    AUTO,
    Attention,
    Compile,
    OptimizerKind,
    Schedule,
    TrainingConfig,
    check_checkpoint_every,
)
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many
from pipeline.stages.base import (
    LIKE,
    MODEL,
    STUDENT_SOURCE,
    BeforeRun,
    PrecisionInForce,
    Reference,
    Stage,
    WarmUp,
    Workload,
    config_of,
    settings_of,
    student_source,
)
from pipeline.store.artifacts import plain
from pipeline.training.ranks import place_in

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class TrainingOverrides(Stage):
    """A stage's own training settings. Null inherits: from the stage named by `like`, then from
    `training.*`.
    """

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
    checkpoint_every: Any = None
    checkpoint_seconds: Optional[float] = positive(None)
    checkpoint_beside: Optional[bool] = None
    preempted_every_seconds: Optional[float] = positive(None)
    divergence_factor: Optional[float] = field(default=None, metadata={"above": 1})
    compile: Optional[Compile] = None
    attention: Optional[Attention] = None
    deterministic: Optional[bool] = None
    optimizer: Optional[OptimizerKind] = None
    activation_checkpointing: Optional[bool] = None
    start_batch_size: Optional[int] = positive(None)
    start_sequence_length: Optional[int] = field(default=None, metadata={"min": 8})
    growth_fraction: Optional[float] = field(default=None, metadata={"above": 0, "max": 1})
    # times that the start's layers are put on top of one another; null: once
    stack: Optional[int] = positive(None)

    def references(self, run: Run) -> dict[str, Reference]:
        """Return what its weights start from, and the stage whose settings it takes."""
        named = start_references(self.model, run)
        if self.like is not None:
            named[LIKE] = Reference(self.like, LIKE, reads=False, instead="null")
        return named

    def starts_from(self) -> str | None:
        """Return the arm, `base` or `student_init`."""
        return self.model

    def trains(self, run: Run) -> bool:
        """Return whether any step is taken; steps that are computed are at least one."""
        return bool(self.matched(run)) or training_settings(self, run).steps > 0

    def batches_like(self, run: Run) -> TrainingConfig | None:
        """Return the settings in force."""
        return training_settings(self, run)

    def sets_of_training(self, name: str, run: Run) -> bool | None:
        """Return whether it, or the stage it is like, sets `training.NAME` itself."""
        return any(getattr(layer, name, None) for layer in _layers(self, run))

    def precisions(self, key: str, run: Run) -> list[PrecisionInForce]:
        """Return the precision in force."""
        return [precision_in_force(self, key, run)]

    def lengths(self, key: str, run: Run) -> Iterator[tuple[str, int]]:
        """Yield the length of its windows."""
        settings = training_settings(self, run)
        if settings.steps > 0:
            own = self.sequence_length is not None
            yield f"{key if own else 'training'}.sequence_length", settings.sequence_length

    def keeps_layers(self) -> bool:
        """Return whether no layers are stacked."""
        return self.stack in (None, 1)

    def leaves_model(self, run: Run) -> bool:
        """Return whether it takes the model as it is."""
        return not self.trains(run) and self.keeps_layers()

    def no_effect(self, setting: str, run: Run) -> str | None:
        """Return what of its other training settings leaves one without effect."""
        settings = training_settings(self, run)
        if setting == "decay_fraction" and settings.schedule is not Schedule.constant_then_decay:
            return f"with schedule {settings.schedule.value}"
        starts = (settings.start_batch_size, settings.start_sequence_length)
        if setting == "growth_fraction" and starts == (None, None):
            return "without start_batch_size or start_sequence_length"
        if setting == "attention" and not run.task.kind.is_language:
            return f"with task {run.task.value}: no documents are packed"
        every = settings.checkpoint_every
        if setting == "checkpoint_seconds" and every not in (None, AUTO):
            return "beside checkpoint_every"
        if setting == "preempted_every_seconds" and every != AUTO:
            return f"without checkpoint_every={AUTO}"
        return None

    def refuse_device(self, key: str, run: Run, device: Any) -> None:
        """Refuse a precision, an attention or a compiler that this device does not have."""
        Stage.refuse_device(self, key, run, device)
        if not self.optional and self.trains(run):
            name, place = key.removeprefix("stages."), place_in()
            _check_device(self, name, run, device)
            if place is not None:
                _check_ranks(self, name, run, place.size)

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return its own settings, those it inherits, and what the student's weights are."""
        precision = training_precision(self, run)
        settings: dict[str, Any] = {
            **settings_of(self, "optional", LIKE),
            "training": plain(training_settings(self, run)),
            "precision": precision.value,
            "loss_scale": run.precision.loss_scale,
        }
        if precision is Precision.auto:
            settings["loss_tolerance"] = run.precision.loss_tolerance
        if self.model == STUDENT_INIT:
            settings["student"] = student_settings(run, inputs)
        return settings

    def shown_settings(self, run: Run) -> dict[str, Any]:
        """Return its own settings and those it inherits; steps that are computed are not among
        them: see `compute/steps`.
        """
        inherited = plain(training_settings(self, run))
        inherited["precision"] = training_precision(self, run).value
        if self.matched(run):
            inherited["epochs"] = None
        if self.matched(run) or inherited["epochs"] is not None:
            inherited["steps"] = None
        settings = {**settings_of(self), **inherited}
        return {name: value for name, value in settings.items() if value is not None}

    def libraries(self, run: Run) -> list[str]:
        """Return that of an optimizer that is not torch's."""
        kind = training_settings(self, run).optimizer
        return [] if kind is OptimizerKind.adamw else [kind.value.rpartition("_")[2]]

    def preflight(self, key: str, known: BeforeRun) -> None:
        """Refuse layers that cannot be stacked; a student's are stacked at its turn."""
        if self.keeps_layers() or self.model != BASE:
            return
        from pipeline.models.layers import check_layers
        from pipeline.models.student import stacked

        assert self.stack is not None
        config = stacked(known.config, self.stack)
        check_layers(known.config, known.run.task, config, f"{key}.stack")

    def workload(self, name: str, known: BeforeRun) -> Workload | None:
        """Return its training, where its model's configuration is known."""
        config = self.makes_config(known)
        if config is None:
            return None
        return Workload(
            config=config,
            precision=training_precision(self, known.run),
            batches=training_settings(self, known.run),
            trains=self.trains(known.run),
        )

    def trial(self, steps: int, run: Run) -> Stage | None:
        """Return itself with so few steps; None where it takes fewer, or as many as another stage
        bought.
        """
        settings = training_settings(self, run)
        is_short = settings.epochs is None and settings.steps <= 2 * steps
        if self.matched(run) or is_short:
            return None
        halves = {"steps": steps, "epochs": None, "eval_every": steps // 2}
        # a choice by trial would cost more than the probe
        never = Compile.never if settings.compile is Compile.auto else settings.compile
        return dataclasses.replace(self, **halves, checkpoint_every=steps, compile=never)

    def makes_config(self, known: BeforeRun) -> Any | None:
        """Return that of the model it starts from, stacked where it is."""
        config = config_of(self.model, known)
        if config is None or self.stack in (None, 1):
            return config
        from pipeline.models.layers import cut_config
        from pipeline.models.student import stacked

        return cut_config(config, stacked(config, self.stack), "stack")

    def warm_up(self, inputs: Mapping[str, Artifact], ctx: WarmUp) -> None:
        """Import the optimizer's library, the model's class and the loop; encode train."""
        from pipeline.training.optimizer import IMPORTED

        settings = training_settings(self, ctx.run)
        with ctx.clock.phase("import"):
            if settings.optimizer in IMPORTED:
                importlib.import_module(IMPORTED[settings.optimizer])
            importlib.import_module("pipeline.stages.training")
        warm_batches(inputs, settings, ctx)

    def memory_remedy(self, name: str, run: Run) -> str:
        """Return smaller micro-batches, else shorter windows."""
        return smaller_batches(self, name, run)


def _check_ranks(stage: TrainingOverrides, name: str, run: Run, ranks: int) -> None:
    """Refuse training settings that this many ranks cannot share.

    Raises:
        UserError: Naming the setting.
    """
    settings, precision = training_settings(stage, run), training_precision(stage, run)
    batch = settings.start_batch_size or settings.batch_size
    rows = batch // settings.gradient_accumulation
    if rows < ranks:
        setting = "batch_size" if settings.start_batch_size is None else "start_batch_size"
        problem = f"a micro-batch of {how_many(rows, 'sequence')} has too few for {ranks} ranks"
        least = ranks * settings.gradient_accumulation
        raise UserError(deciding(stage, name, run, setting), problem, f"give {least} or more")
    if precision is Precision.auto:
        key = precision_in_force(stage, f"stages.{name}", run).setting
        problem = f"auto times steps, and {ranks} ranks might choose differently"
        raise UserError(key, problem, "name a precision")
    if not run.parallel.mode.shards:
        return
    mode = run.parallel.mode.value
    if precision is Precision.fp16 and run.parallel.offload:
        problem = "scales losses by what lies on the device, and fp16 needs that"
        raise UserError("parallel.offload", problem, "give false, or precision=bf16")
    if settings.compile is Compile.always:
        key = deciding(stage, name, run, "compile")
        raise UserError(key, f"always: {mode} gathers weights where a graph cannot", "give auto")


USUAL_WIDTH = 64  # of an attention head


def _check_device(stage: TrainingOverrides, name: str, run: Run, device: Any) -> None:
    """Refuse training settings that this device cannot do.

    Raises:
        UserError: Naming the setting.
    """
    from pipeline.ledger.devices.table import device_of
    from pipeline.training.precision import compute_dtype

    settings, here = training_settings(stage, run), device_of(device)
    if settings.compile is Compile.always and (why := here.why_no_compile()) is not None:
        key = deciding(stage, name, run, "compile")
        raise UserError(key, f"always: {why}", "install it, or give auto")
    if settings.attention is Attention.lengths and run.task.kind.is_language:
        precision = training_precision(stage, run)
        tried = Precision.fp32 if precision is Precision.auto else precision  # it may become that
        if not here.takes_lengths(compute_dtype(tried), USUAL_WIDTH):
            key = deciding(stage, name, run, "attention")
            problem = f"lengths: there is no such attention on {here.kind} in {tried.value}"
            raise UserError(key, problem, "give auto or mask")


def warm_batches(inputs: Mapping[str, Artifact], settings: TrainingConfig, ctx: WarmUp) -> None:
    """Import the class of what is read, open the device, and encode train as `settings` have it."""
    if not inputs:
        return
    from pipeline.data.encode import encode_all
    from pipeline.models.load import example_length, import_model, load_config, load_tokenizer

    source = next(iter(inputs.values())).path
    with ctx.clock.phase("import"):
        import_model(source, ctx.run.task)
    with ctx.clock.phase("prepare"):
        _open_device(ctx.device)
        tokenizer = load_tokenizer(source)
        length = example_length(load_config(source), ctx.run.task, settings.sequence_length)
        encode_all(ctx.data.splits["train"], tokenizer, ctx.run.task, max_length=length)


def _open_device(device: Any) -> None:
    """Have libraries and threads of the device start: what they take comes once per process."""
    import torch

    square = torch.ones(64, 64, device=device, requires_grad=True)
    torch.autograd.backward((square @ square).sum())


def smaller_batches(stage: TrainingOverrides, name: str, run: Run) -> str:
    """Return the setting by which a stage that trains needs less memory, with the value to try."""
    now = training_settings(stage, run)
    parts = [
        n
        for n in range(now.gradient_accumulation + 1, now.batch_size + 1)
        if now.batch_size % n == 0
    ]
    if parts:
        wanted = next((n for n in parts if n >= 2 * now.gradient_accumulation), parts[-1])
        key = deciding(stage, name, run, "gradient_accumulation")
        return f"{key}={wanted} (now {now.gradient_accumulation}; the same batch in smaller parts)"
    length = deciding(stage, name, run, "sequence_length")
    shorter = f"{length}={max(8, now.sequence_length // 2)} (now {now.sequence_length})"
    wide = training_precision(stage, run) in (Precision.fp32, Precision.tf32)
    return f"{shorter}, or precision=bf16" if wide else shorter


def deciding(stage: TrainingOverrides, name: str, run: Run, setting: str) -> str:
    """Return the setting that decides: the stage's own, that of the stage it is like, or
    everybody's.
    """
    if getattr(stage, setting) is not None:
        return f"stages.{name}.{setting}"
    if stage.like is not None and getattr(run.stages[stage.like], setting) is not None:
        return f"stages.{stage.like}.{setting}"
    return f"training.{setting}"


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


def is_deterministic(stage: Stage, run: Run) -> bool:
    """Return whether a stage is to give the same bits each time."""
    settings = stage.batches_like(run)
    return settings is not None and settings.deterministic


def training_precision(stage: Any, run: Run) -> Precision:
    """Return the precision in force for a stage that has `precision` and `like`."""
    named = [layer.precision for layer in _layers(stage, run) if layer.precision is not None]
    return named[0] if named else run.precision.name


def refuse_native(precision: Precision | None, setting: str) -> None:
    """Refuse `native` where it is not what all stages inherit.

    Raises:
        UserError: Naming the setting.
    """
    if precision is Precision.native:
        problem = "native is for all stages that name no precision"
        raise UserError(setting, problem, "leave it out, or name a precision")


def precision_in_force(stage: Any, key: str, run: Run, *, trains: bool = True) -> PrecisionInForce:
    """Return the precision of a stage that has `precision` and `like`, with what decides it."""
    is_own = stage.precision is not None
    setting = f"{key}.precision" if is_own else "precision"
    return PrecisionInForce(setting, training_precision(stage, run), is_own, trains)


def start_references(name: str, run: Run) -> dict[str, Reference]:
    """Return the arms that building the start weights `name` reads, by role."""
    if name != STUDENT_INIT:
        return {MODEL: Reference(name, MODEL)}
    if run.student.path is not None:
        return {}
    return {STUDENT_SOURCE: Reference(student_source(run), "student.source")}


def student_settings(run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return what decides the student's initial weights, however its settings are spelt."""
    from pipeline.models.student import student_identity

    if run.student.path is not None:
        return {"source": None, **student_identity(run.student, None)}
    path: Path = inputs[STUDENT_SOURCE].path
    return {"source": student_source(run), **student_identity(run.student, path)}


def check_classes(stage: str, run: Run) -> None:
    """Refuse a stage that reads predictions as a distribution where the task has none.

    Args:
        stage: Its key.

    Raises:
        UserError: Naming the task.
    """
    if not run.task.kind.has_classes:
        raise UserError(
            "task",
            f"{stage} reads what models predict as a distribution, and {run.task.value} has none",
            "give another task, or leave the stage out",
        )


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
    check_checkpoint_every(stage.checkpoint_every, f"{key}.checkpoint_every")
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
    precision = precision_in_force(stage, key, run)
    if settings.deterministic and precision.precision is Precision.auto:
        problem = "auto takes the precision that a trial finds fastest, with training.deterministic"
        raise UserError(precision.setting, problem, "name a precision")
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
    if run.parallel.mode.shards and kind is OptimizerKind.adamw_8bit_bitsandbytes:
        problem = f"{kind.value} steps no shares of weights"
        raise UserError(
            f"{key}.optimizer", problem, "give adamw_8bit_torchao, adamw or parallel.mode=ddp"
        )


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
    if settings.start_sequence_length is not None and not run.task.kind.is_language:
        problem = "has no effect: examples are padded to the longest of their batch"
        raise UserError(f"{key}.start_sequence_length", problem, "leave it out")
