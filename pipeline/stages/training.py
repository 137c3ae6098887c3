"""What `train` and `distill` share: build model, batches and objective, run the loop, save the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.arms import BASE, STUDENT_INIT
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches, PaddedBatches
from pipeline.data.completions import read_completions
from pipeline.data.encode import Encoded, encode_all, encoding_notes
from pipeline.data.padding import Padding
from pipeline.data.prompts import PartlySampled
from pipeline.distillation.hidden import WithProjections
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality.scoring import check_vocabulary, validation_metric
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.gpu_phases import GpuPhases, device_phases
from pipeline.ledger.metrics import PRIMARY
from pipeline.ledger.numbers import agreed, how_many
from pipeline.ledger.shapes import About, StageTimeline
from pipeline.ledger.traced_steps import StepTracer, step_tracer
from pipeline.ledger.values import Value, derive, estimated, measured, null
from pipeline.models.load import (
    example_length,
    load_config,
    load_model,
    load_tokenizer,
    quantized_by,
    save_model,
)
from pipeline.models.student import make_student, stack_layers
from pipeline.models.weights import refuse_not_finite
from pipeline.stages.base import MODEL, STUDENT_SOURCE, TEACHER
from pipeline.stages.context import Context, Output
from pipeline.stages.distill_settings import DistillSettings
from pipeline.stages.head_choice import choose_head
from pipeline.stages.precision_choice import Choice, choose_precision
from pipeline.stages.settings import (
    TrainingOverrides,
    deciding,
    steps_of,
    training_precision,
    training_settings,
)
from pipeline.stages.step_flops import ModelFlops, StepFlops, doubt
from pipeline.stages.teaching import (
    IndexedBatches,
    configure_loss,
    load_teacher,
    on_policy_batches,
    open_cache,
    teachers_share,
)
from pipeline.store.artifacts import copy_model
from pipeline.tasks.table import Task
from pipeline.training.activations import checkpoint_activations
from pipeline.training.cadence import said as cadence_said
from pipeline.training.compiling import said as compile_said
from pipeline.training.holding import Holding
from pipeline.training.loop import Hooks, Progress, taught_by, train
from pipeline.training.objective import Objective, Teacher, columns_of, parameter_hash
from pipeline.training.overlapping import said as overlap_said
from pipeline.training.parallel import Shared, share
from pipeline.training.precision import arithmetic, round_weights
from pipeline.training.prefetch import Batches
from pipeline.training.reading import Examined, check_attention, examine, read_alike
from pipeline.training.schedule import first_row, sequence_length, steps_between_evaluations
from pipeline.training.selfcheck import LEAST_SHARE, check_teacher

if TYPE_CHECKING:
    from pipeline.store.artifacts import Artifact

Start = tuple[Any, Any, Callable[[Any], None]]
"""A model as `Holding` has it, its tokenizer, and what saves the model once it is trained."""
NO_TEACHER = "no distillation in this stage"
VALIDATION_BYTES = 1024  # of each validation document that a reading during training looks at


@dataclass(slots=True)
class _Prepared:
    """A training that is ready for its first step.

    Attributes:
        own: How the model is to be read; None for a classifier.
        text: Batches of data alone; `batches` are partly written by the student where it writes.
        num_rows: Windows, or examples, of one epoch.
        trained: What is optimised: the model, and projections of hidden states where there are any.
        active: Share of the parameters that a token meets.
        said: What there is to tell of how FLOPs are counted and logits made.
        frozen: A hash of the teacher's parameters before the first step.
        teacher_held: Who has the teacher's weights before they are shared.
    """

    model: Any
    tokenizer: Any
    own: Examined | None
    teacher: Teacher | None
    objective: Objective
    text: Batches
    batches: Batches
    num_rows: int
    trained: Any
    flops: StepFlops
    active: Value
    said: list[str | None]
    frozen: str | None
    teacher_held: Holding


def run_training(
    stage: TrainingOverrides,
    inputs: Mapping[str, Artifact],
    ctx: Context,
    *,
    distill: DistillSettings | None = None,
    start: Callable[[Holding], Start] | None = None,
) -> Output:
    """Train (or distil) as `stage` says and save the model into `ctx.out`.

    Args:
        distill: The same stage where it learns from a teacher, or from completions.
        start: Gives what to begin with in place of what `stage.model` names, held as it is told.
    """
    completions = None if distill is None else distill.completions
    if completions is not None:  # taught by texts: no distribution to follow
        distill = None
    settings = planned_settings(stage, ctx)
    # Before the model: a fresh student, and new heads, are drawn from it.
    torch.manual_seed(ctx.seed)
    held = Holding.of(ctx.ranks, ctx.run.parallel.mode, ctx.device)
    if settings.steps == 0:  # nothing is shared
        held = Holding(ctx.device)
    with ctx.clock.phase("model_load"):
        model, tokenizer, save = (
            _start(stage, inputs, settings, held, ctx) if start is None else start(held)
        )
        if settings.activation_checkpointing:
            where = "training" if stage.activation_checkpointing is None else f"stages.{ctx.stage}"
            checkpoint_activations(model, f"{where}.activation_checkpointing")
        # NaN weights would show as a loss of NaN hours later, far from their cause.
        held.found(lambda: refuse_not_finite(model, *_start_of(stage, ctx)))
    if settings.steps == 0:
        return _as_it_is(model, save, inputs, ctx)
    ready = _prepare(stage, distill, completions, model, tokenizer, inputs, settings, held, ctx)
    choice = None
    if ready.objective.precision is Precision.auto:
        choice = _chosen(stage, ready.trained, ready.objective, ready.batches, settings, ctx)
        ready.objective.precision = choice.precision
    precision = ready.objective.precision
    validate = validation_reading(model, tokenizer, settings, precision, ctx, held)
    check = _teaching_check(distill, ready, validate, settings, ctx)
    shared = _shared(ready, ctx) if held.is_apart else None
    with ctx.ranks.watched(), nullcontext() if shared is None else shared.whole():
        check()
    head = None
    if distill is not None:
        key = f"stages.{ctx.stage}.head"
        head = choose_head(
            key,
            distill.head,
            ready.objective,
            ready.text,
            settings,
            folder=ctx.checkpoints,
            ranks=ctx.ranks,
        )
    progress, timeline = _loop(ready, validate, settings, shared, ctx)
    share = null(NO_TEACHER)
    if ctx.ranks.is_first or shared is not None:  # of what ranks share, all have to be asked
        share = _share_of_teacher(distill, ready, settings, shared, ctx)
    with ctx.clock.phase("checkpoint"), ctx.ranks.watched():
        moved = ready.teacher is not None and parameter_hash(ready.teacher.model) != ready.frozen
        if shared is not None:
            shared.end()
    if not ctx.ranks.is_first:  # the first one saves, and says what it was
        return Output(counts=_no_counts())
    with ctx.clock.phase("checkpoint"):
        # A teacher that moved was not frozen: nobody could say what the student learnt from.
        if moved:
            raise StageFailed("the teacher's parameters changed while the student trained")
        save(model)
    output = _output(progress, ready.objective, distill, share, ready.flops, ready.active)
    # what a step of the same stage without a teacher takes: those of text
    if isinstance(ready.batches, PartlySampled):
        per_step = ready.flops.own_per_step(ready.text, settings.steps)
        output = replace(output, flops_per_step=per_step)
    output = ready.flops.add_to(output, progress.flops)
    compiled = progress.compiling
    read = _epochs_said(settings, ready.num_rows, ctx)
    head_said = None if head is None else head["said"]
    ways = (
        compile_said(compiled),
        overlap_said(progress.overlapping),
        cadence_said(progress.checkpoints, settings),
    )
    said = (*ready.said, choice, head_said, *ways, read)
    notes = (*(f"{ctx.stage}: {each}" for each in said if each is not None), *output.notes)
    about: About = {
        "compiling": compiled,
        "overlapping": progress.overlapping,
        "checkpoints": progress.checkpoints,
    }
    if ready.own is not None:
        taught_by = ready.objective.teacher_read if ready.teacher is not None else None
        about["attention"] = {
            "model": ready.own.apart.value,
            "teacher": None if taught_by is None else taught_by.apart.value,
        }
    if choice is not None:
        about["precision"] = choice.about
    if head is not None:
        about["head"] = head
    return replace(output, notes=notes, gpu_timeline=timeline, about=about)


def planned_flops(
    stage: TrainingOverrides,
    inputs: Mapping[str, Artifact],
    ctx: Context,
    *,
    distill: DistillSettings | None = None,
) -> Output | None:
    """Return the FLOPs that `run_training` will report: models and batches are made as it does, and
    no step is taken.
    """
    completions = None if distill is None else distill.completions
    if completions is not None:
        distill = None
    settings, held = planned_settings(stage, ctx), Holding(ctx.device)  # nothing is shared
    with ctx.clock.phase("model_load"):
        model, tokenizer, _ = _start(stage, inputs, settings, held, ctx)
    if settings.steps == 0:
        return None
    ready = _prepare(stage, distill, completions, model, tokenizer, inputs, settings, held, ctx)
    whole = of_model = 0.0
    with ctx.clock.phase("prepare"):
        for step in range(settings.steps):
            batch = ready.batches.batch(step)
            own, teacher = ready.flops(taught_by(batch, settings.gradient_accumulation)[1])
            of_model, whole = of_model + own, whole + own + teacher
    counts = {**_no_counts(), "model_flops": ready.flops.total(whole)}
    output = Output(counts=counts, flops_per_step=of_model / settings.steps)
    return ready.flops.add_to(output, whole)


def _as_it_is(
    model: Any, save: Callable[[Any], None], inputs: Mapping[str, Artifact], ctx: Context
) -> Output:
    """Leave the model as it was given in `ctx.out`."""
    with ctx.clock.phase("checkpoint"):
        if quantized_by(model.config) is not None:  # not every library can write what it reads
            copy_model(inputs[MODEL].path, ctx.out)
        else:
            save(model)
    notes = (f"{ctx.stage}: 0 steps, used as it is",)
    return Output(counts=_no_counts(), existing=True, notes=notes)


def _prepare(
    stage: TrainingOverrides,
    distill: DistillSettings | None,
    completions: str | None,
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Artifact],
    settings: TrainingConfig,
    held: Holding,
    ctx: Context,
) -> _Prepared:
    """Lay out batches, teacher and objective; `settings.steps` follows from epochs from here on."""
    teacher, teacher_held = None, held
    if distill is not None and distill.cache is None:
        if quantized_by(load_config(inputs[TEACHER].path)) is not None:
            teacher_held = Holding(ctx.device)  # what quantized layers hold is not told to others
        teacher = load_teacher(distill, inputs, tokenizer, teacher_held, ctx)
    with ctx.clock.phase("prepare"):
        own = _read_as(stage, model, settings, held, ctx)
        teacher = None if teacher is None else _examined(teacher, own, settings, teacher_held)
        encoded = read_encoded(model, tokenizer, settings, ctx, completions=completions)
        apart = _apart(own, teacher)
        text = make_batches(model, tokenizer, encoded, settings, ctx, held, apart=apart)
        num_rows = text.num_rows
        settings.steps = steps_of(settings, num_rows)  # batches that grow read it from here
        signal = teacher
        if distill is not None and distill.cache is not None:
            outputs = model.config.num_labels if own is None else columns_of(model, own.head)
            signal = open_cache(distill, inputs, text, outputs, tokenizer, settings, ctx)
            text = IndexedBatches(text, signal.cache, settings.gradient_accumulation)
        objective = Objective(
            model,
            ctx.run.task,
            training_precision(stage, ctx.run),
            ctx.device,
            ctx.clock,
            signal,
            read=own,
        )
        batches = text
        if distill is not None:
            configure_loss(distill, objective, settings, ctx)
            if distill.on_policy:
                _check_writes(own, model, ctx)
                assert isinstance(text, PackedBatches)
                batches = on_policy_batches(
                    distill, objective, text, encoded, tokenizer, settings, ctx
                )
        # before it is compiled: counting would slow it
        counted = ModelFlops.of(model, ctx.run.task, backward=True)
        said = [doubt(counted, model, ctx.run.task, settings.sequence_length), counted.said(model)]
        if own is not None:
            rows = settings.batch_size // settings.gradient_accumulation
            said += objective.full_logits(rows * settings.sequence_length)
        hidden = objective.hidden
        return _Prepared(
            model=model,
            tokenizer=tokenizer,
            own=own,
            teacher=teacher,
            objective=objective,
            text=text,
            batches=batches,
            num_rows=num_rows,
            trained=model if hidden is None else WithProjections(model, hidden),
            flops=StepFlops.counted(objective, counted),
            active=counted.active_share(model),
            said=said,
            frozen=(
                None
                if teacher is None
                else teacher_held.found(lambda: parameter_hash(teacher.model))
            ),
            teacher_held=teacher_held,
        )


def _read_as(
    stage: TrainingOverrides, model: Any, settings: TrainingConfig, held: Holding, ctx: Context
) -> Examined | None:
    """Return how the model is to be read; None for a classifier."""
    if not ctx.run.task.kind.is_language:
        return None
    read = _examine(model, settings, held)
    precision = training_precision(stage, ctx.run)
    if precision is Precision.auto:  # what it may become
        precision = Precision.bf16
    key = deciding(stage, ctx.stage, ctx.run, "attention")
    check_attention(model, read, precision, ctx.device, settings.attention, key)
    return read


def _examine(model: Any, settings: TrainingConfig, held: Holding) -> Examined:
    read = held.found(lambda: examine(model, held.device, settings.attention))
    if held.is_apart:
        read_alike(model, read)
    return read


def _examined(
    teacher: Teacher, own: Examined | None, settings: TrainingConfig, held: Holding
) -> Teacher:
    """Return the teacher, rounded to its precision, with how it is to be read."""
    if own is not None:
        teacher = replace(teacher, read=_examine(teacher.model, settings, held))
    # After `examine`, which runs without autocast: fp32 states would meet 16-bit weights there.
    round_weights(teacher.model, teacher.precision)
    return teacher


def _teaching_check(
    distill: DistillSettings | None,
    ready: _Prepared,
    validate: Callable[[], float],
    settings: TrainingConfig,
    ctx: Context,
) -> Callable[[], None]:
    """Return what refuses a live teacher that is no better than the student's start, unless that is
    allowed.
    """
    teacher = ready.teacher
    if distill is None or teacher is None or distill.allow_weak_teacher:
        return lambda: None
    model, precision, held = teacher.model, teacher.precision, ready.teacher_held
    with ctx.clock.phase("eval"):
        read = validation_reading(model, ready.tokenizer, settings, precision, ctx, held)

    def check() -> None:
        with ctx.clock.phase("eval"):
            check_teacher(f"stages.{ctx.stage}", PRIMARY[ctx.run.task], read(), validate())

    return check


def _shared(ready: _Prepared, ctx: Context) -> Shared:
    """Return how ranks share the weights, from here on."""
    with ctx.clock.phase("prepare"), ctx.ranks.watched():
        return share(ready.trained, ready.objective, ctx.ranks, ctx.run.parallel)


def _loop(
    ready: _Prepared,
    validate: Callable[[], float],
    settings: TrainingConfig,
    shared: Shared | None,
    ctx: Context,
) -> tuple[Progress, StageTimeline]:
    """Run the one training loop; return how it went, and what the device did meanwhile."""
    with (
        ctx.progress(f"{ctx.stage}", settings.steps) as advance,
        device_phases(ctx.clock, ctx.device) as phases,
        _tracer(settings, ctx) as tracer,
    ):
        hooks = Hooks(
            validate=validate,
            flops=ready.flops,
            points=ctx.points,
            history=ctx.history,
            checkpointed=ctx.checkpointed,
            resumed=ctx.resumed,
            should_stop=ctx.should_stop,
            advance=_advancing(advance, phases),
            say=ctx.say,
            tracer=tracer,
        )
        progress = train(
            ready.trained,
            ready.batches,
            ready.objective,
            settings=settings,
            precision=ctx.run.precision,
            folder=ctx.checkpoints,
            clock=ctx.clock,
            hooks=hooks,
            ranks=ctx.ranks,
            parallel=ctx.run.parallel,
            shared=shared,
        )
        return progress, _timeline(phases, tracer, ctx)


def _share_of_teacher(
    distill: DistillSettings | None,
    ready: _Prepared,
    settings: TrainingConfig,
    shared: Shared | None,
    ctx: Context,
) -> Value:
    """Return the teacher's share of the last gradient."""
    if distill is None:
        return null(NO_TEACHER)
    if distill.on_policy == 1:  # no hard label is learnt where all is sampled
        return measured(1.0)
    return attempted(
        lambda: measured(teachers_share(ready.objective, ready.text, settings, shared, ctx)),
        lambda why: null(unmeasured("the teacher's gradient", why)),
    )


def _start_of(stage: TrainingOverrides, ctx: Context) -> tuple[str, str]:
    """Return the setting that names what a stage starts from, and what it is, as refusals say
    it.
    """
    if stage.model == STUDENT_INIT and ctx.run.student.path is not None:
        return "student.path", ctx.run.student.path
    return (
        ("model.path", ctx.run.model.path or BASE)
        if stage.model == BASE
        else (f"stages.{ctx.stage}.model", stage.model)
    )


def _epochs_said(settings: TrainingConfig, num_rows: int, ctx: Context) -> str | None:
    """Return how often train is read, where steps follow from epochs or do not come to one."""
    what = f"{num_rows} {ctx.run.task.kind.rows} of train"
    steps = how_many(settings.steps, "step")
    if settings.epochs is not None:
        return f"{how_many(f'{settings.epochs:g}', 'epoch of', 'epochs of')} {what} are {steps}"
    read = first_row(settings.steps, settings)
    own = ctx.run.data.path is not None or ctx.run.data.hub is not None
    if not own or read >= num_rows:
        return None
    verb = agreed(settings.steps, "reads", "read")
    return f"{steps} {verb} {read} of {what}; training.epochs=1 reads each once"


def _start(
    stage: TrainingOverrides,
    inputs: Mapping[str, Artifact],
    settings: TrainingConfig,
    held: Holding,
    ctx: Context,
) -> Start:
    """Return what `stage.model` names; it is saved into `ctx.out`."""

    def make() -> tuple[Any, Any]:
        model: Any
        model, tokenizer = start_weights(stage.model, inputs, ctx, new_head=settings.steps > 0)
        if stage.stack is not None:
            model = stack_layers(
                model, stage.stack, f"stages.{ctx.stage}.stack", scratch=ctx.out.parent
            )
        if quantized_by(model.config) is None:
            model = model.to(held.device)
        return model, tokenizer

    model, tokenizer = held.made(make)
    return model, tokenizer, lambda trained: save_model(trained, tokenizer, ctx.out)


def _chosen(
    stage: TrainingOverrides,
    model: Any,
    objective: Objective,
    batches: Batches,
    settings: TrainingConfig,
    ctx: Context,
) -> Choice:
    """Return the precision found by trial: that of the stage named by `like`, so that like is
    compared with like.
    """
    matched = None if ctx.like is None else ctx.like.about.get("precision")
    if stage.precision is None and matched:
        return Choice(
            Precision(matched["chosen"]), {**matched, "said": [f"as {stage.like} has it"]}
        )
    left_out = (
        [] if objective.hidden is None and objective.relations is None else [Precision.bf16_pure]
    )
    return choose_precision(
        model,
        objective,
        batches,
        settings,
        ctx.run.precision,
        left_out=left_out,
        folder=ctx.checkpoints,
        clock=ctx.clock,
    )


def _tracer(settings: TrainingConfig, ctx: Context) -> StepTracer:
    return step_tracer(
        ctx.traces,
        ctx.device,
        total=settings.steps,
        count=ctx.run.ledger.traced_steps,
        eval_every=steps_between_evaluations(settings),
    )


def _advancing(
    advance: Callable[[int, int], None], phases: GpuPhases | None
) -> Callable[[int, int], None]:
    """Return what to do after each step: show it, and book the device time that has become
    known.
    """

    def advanced(step: int, tokens: int) -> None:
        advance(step, tokens)
        if phases is not None:
            phases.resolve()

    return advanced


def _timeline(phases: GpuPhases | None, tracer: StepTracer, ctx: Context) -> StageTimeline:
    """Return what the device did, as `Output.gpu_timeline` has it; the steps are over, so it may be
    waited for.
    """
    phases_s: dict[str, float] = {}
    if phases is not None:
        with ctx.clock.phase("optimizer"):  # what the last step still does
            phases.finish(device_of(ctx.device).synchronise)
        phases_s = phases.phases_s()
    with ctx.clock.phase("log"):
        found = tracer.result()
    if phases is not None and phases.why_none is not None:
        found["notes"].append(f"device time by phase is not known: {phases.why_none}")
    return {**found, "phases_s": phases_s}


def planned_settings(stage: TrainingOverrides, ctx: Context) -> TrainingConfig:
    """Return the settings in force; `match_compute` sets the steps that the matched stage's FLOPs
    would have bought.

    Raises:
        StageFailed: If the FLOPs of the matched stage are neither counted nor estimated.
    """
    settings = training_settings(stage, ctx.run)
    if not stage.matched(ctx.run):
        return settings
    flops = ctx.matched_flops
    per_step = None if ctx.like is None else ctx.like.flops_per_step
    if flops is None or per_step is None:
        raise StageFailed(f"{stage.like} has no FLOPs to match: {_why_no_flops(ctx)}")
    # Rounded down: a control may not get more compute than what it is a control of.
    settings.steps, settings.epochs = max(1, int(flops // per_step)), None
    why = _why_no_flops(ctx)
    if why is not None:
        ctx.say(
            f"{ctx.stage}: {how_many(settings.steps, 'step matches', 'steps match')}"
            f" {stage.like}'s FLOPs by the rule of thumb (6N, estimated), as they cannot be"
            f" counted: {why}"
        )
    return settings


def _why_no_flops(ctx: Context) -> str | None:
    """Return why the matched stage's FLOPs are not counted, or None."""
    if ctx.like is None:
        return "it did not run"
    return ctx.like.counts["model_flops"].why_missing


def start_weights(
    name: str, inputs: Mapping[str, Artifact], ctx: Context, *, new_head: bool
) -> tuple[Any, Any]:
    """Return the model and tokenizer that `name` stands for (an arm, or the student's initial
    weights).
    """
    run, labels = ctx.run, ctx.data.labels
    if name != STUDENT_INIT:
        path = inputs[MODEL].path
        return load_model(path, run.task, labels=labels, new_head=new_head), load_tokenizer(path)
    source = inputs[STUDENT_SOURCE].path if run.student.path is None else ctx.out
    return make_student(
        run.student, source, run.task, labels, new_head=new_head, scratch=ctx.out.parent
    )


def read_encoded(
    model: Any,
    tokenizer: Any,
    settings: TrainingConfig,
    ctx: Context,
    *,
    completions: str | None = None,
) -> list[Encoded]:
    """Return the encoded train split, or the completions of a file in its place; what is not read
    of them is said.
    """
    if completions is None:
        documents = ctx.data.splits["train"]
    else:
        given = read_completions(completions, ctx.run.data, f"stages.{ctx.stage}.completions")
        documents = [each.document for each in given]
    length = example_length(model.config, ctx.run.task, settings.sequence_length)
    for note in encoding_notes(documents, tokenizer, ctx.run.task, max_length=length):
        ctx.say(
            f"train split: {note}" if completions is None else f"{ctx.stage}: completions: {note}"
        )
    return encode_all(documents, tokenizer, ctx.run.task, max_length=length)


def _apart(own: Examined | None, teacher: Teacher | None) -> bool:
    """Return whether documents need rows of their own: student and teacher read the same rows."""
    return not all(
        each is None or each.packs for each in (own, None if teacher is None else teacher.read)
    )


def _check_writes(own: Examined | None, model: Any, ctx: Context) -> None:
    """Refuse a student that cannot write in batches: prompts of several lengths are placed by their
    positions.
    """
    if own is not None and not own.packs:
        problem = (
            f"{type(model).__name__} takes no positions, by which prompts of several lengths are"
            " placed"
        )
        raise UserError(f"stages.{ctx.stage}.on_policy", problem, "leave it out")


def make_batches(
    model: Any,
    tokenizer: Any,
    encoded: list[Encoded],
    settings: TrainingConfig,
    ctx: Context,
    held: Holding | None = None,
    *,
    apart: bool = False,
) -> PackedBatches | PaddedBatches:
    """Return what a training with these settings reads, as a pure function of the step.

    Args:
        held: Who has the model's weights; None: this process.
        apart: Documents of a language model are not packed: each has rows of its own.
    """
    check_vocabulary(model, (item.input_ids for item in encoded), tokenizer.pad_token_id)
    rows = partial(first_row, settings=settings)
    if ctx.run.task.kind.is_language:
        packed = PackedBatches(
            encoded,
            sequence_length=settings.sequence_length,
            batch_size=rows,
            seed=ctx.seed,
            length_at=lambda step: sequence_length(step, settings),
            apart=apart,
        )
        if apart:
            share = packed.packing.padding / max(1, packed.packing.window_tokens)
            ctx.say(
                f"{ctx.stage}: documents are not packed, which not all models here keep apart: each"
                f" has rows of its own, {share:.0%} of which is padding"
            )
        for note in packed.packing.notes():
            ctx.say(f"{ctx.stage}: {note}")
        return packed
    padding = _padding(model, tokenizer, held, ctx)
    if padding.note is not None:
        ctx.say(f"{ctx.stage}: {padding.note}")
    return PaddedBatches(encoded, batch_size=rows, seed=ctx.seed, padding=padding)


def _padding(model: Any, tokenizer: Any, held: Holding | None, ctx: Context) -> Padding:
    """Return how texts are padded for a model, which a classifier is run to find."""
    held = held or Holding(ctx.device)
    found = held.found(lambda: Padding.of(tokenizer, model, ctx.run.task))
    if held.is_apart and not ctx.run.task.kind.is_language:
        found.note_on(model)
    return found


def validation_reading(
    model: Any,
    tokenizer: Any,
    settings: TrainingConfig,
    precision: Any,
    ctx: Context,
    held: Holding | None = None,
) -> Callable[[], float]:
    """Return a function that reads the primary metric of a model in memory on validation, as
    training does.

    Args:
        held: Who has the model's weights now; None: this process.
    """
    # By digest: every arm and every attempt reads the same ones.
    documents = sorted(ctx.data.splits["validation"], key=lambda document: document.digest)
    count = settings.eval_documents or ctx.run.task.kind.validation_documents
    encoded = encode_all(
        documents[:count],
        tokenizer,
        ctx.run.task,
        max_length=example_length(model.config, ctx.run.task, settings.sequence_length),
        max_bytes=VALIDATION_BYTES,
    )

    padding = _padding(model, tokenizer, held, ctx)

    def validate() -> float:
        with arithmetic(precision, ctx.device):
            return validation_metric(
                model,
                encoded,
                ctx.run.task,
                sequence_length=settings.sequence_length,
                batch_size=settings.batch_size,
                device=ctx.device,
                padding=padding,
            )

    return validate


def _no_counts() -> dict[str, Value]:
    nothing = {
        "steps": measured(0),
        "tokens": measured(0),
        "target_tokens": measured(0),
        "examples": measured(0),
        "model_flops": estimated(0),
        "steps_lost": measured(0),
    }
    return {
        **nothing,
        **dict.fromkeys(("distillation_share", "distillation_gradient_share"), null(NO_TEACHER)),
    }


def _output(
    progress: Progress,
    objective: Objective,
    distill: DistillSettings | None,
    gradient: Value,
    flops: StepFlops,
    active: Value,
) -> Output:
    shares = {
        "distillation_share": _share(progress, distill),
        "distillation_gradient_share": gradient,
    }
    counts = {
        "steps": measured(progress.step),
        "tokens": measured(progress.tokens),
        "target_tokens": _target_tokens(progress, objective.task),
        "examples": measured(progress.examples),
        "model_flops": flops.total(progress.flops),
        "steps_lost": measured(0),
        "active_parameter_share": active,
        **shares,
    }
    notes: list[str] = []
    teacher_model = None if objective.teacher is None else objective.teacher.model
    if teacher_model is not None and _vocabulary(teacher_model) != _vocabulary(objective.model):
        notes.append(
            f"vocabularies differ by padding: the first {objective.vocabulary} tokens are compared"
        )
    least = min((value.value for value in shares.values() if value.value is not None), default=1.0)
    if distill is not None and least < LEAST_SHARE:
        notes.append(
            f"the teacher makes {least:.2%} of the loss or its gradient: it hardly teaches; lower"
            " ce_weight"
        )
    return Output(
        counts=counts,
        # The model's own part: a control that matches compute has no teacher.
        flops_per_step=progress.own_flops / progress.step,
        curve=progress.curve,
        seconds_in_steps=progress.step_ns / 1e9,
        notes=tuple(notes),
    )


def _vocabulary(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _target_tokens(progress: Progress, task: Task) -> Value:
    """Return how many tokens were learnt; a classifier learns labels."""
    return (
        measured(progress.target_tokens)
        if task.kind.is_language
        else null("labels are learnt, not tokens")
    )


def _share(progress: Progress, distill: DistillSettings | None) -> Value:
    """Return the share of the loss that the teacher's signal contributes, over the last tenth of
    the steps.
    """
    if distill is None:
        return null(NO_TEACHER)
    if progress.taught + progress.hard == 0:
        return null("the loss is zero")
    return derive(
        lambda part, rest: part / (part + rest), measured(progress.taught), measured(progress.hard)
    )
