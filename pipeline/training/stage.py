"""What `train` and `distill` share: build model, batches and objective, run the loop, save the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.assess.scoring import check_vocabulary, validation_metric
from pipeline.config import Task, TrainingConfig
from pipeline.data.batches import IGNORE, PackedBatches, PaddedBatches
from pipeline.data.completions import encode_completions, read_completions
from pipeline.data.encode import encode_all
from pipeline.distillation.cache import TeacherCache, needed
from pipeline.distillation.head import Head
from pipeline.distillation.hidden import HiddenSignal, WithProjections, layer_pairs
from pipeline.distillation.losses import Loss
from pipeline.distillation.relations import relation_signal
from pipeline.distillation.selfcheck import LEAST_SHARE, check_teacher, gradient_share
from pipeline.errors import StageFailed, UserError
from pipeline.ledger.flops import FlopsPerSequence, count_flops, suspicion
from pipeline.ledger.gpu_phases import GpuPhases, device_phases
from pipeline.ledger.traced_steps import StepTracer, step_tracer
from pipeline.metrics import PRIMARY
from pipeline.models import load_model, load_tokenizer, save_model
from pipeline.stages.context import Context, Output
from pipeline.stages.distill import MIXTURES, DistillStage
from pipeline.stages.settings import STUDENT_INIT, student_source, training_precision, training_settings
from pipeline.student import layer_count, make_student, stack_layers
from pipeline.training.head_choice import choose_head
from pipeline.training.loop import Hooks, Progress, steps_between_evaluations, train
from pipeline.training.objective import (
    CachedTeacher,
    Objective,
    Teacher,
    check_body,
    check_tokenizers,
    parameter_hash,
)
from pipeline.training.precision import arithmetic
from pipeline.training.schedule import first_row, ramp, sequence_length
from pipeline.values import Value, derive, estimated, measured, null

if TYPE_CHECKING:
    from pipeline.stages.train import TrainStage
    from pipeline.store import Artifact

NO_TEACHER = "no distillation in this stage"
VALIDATION_BYTES = 1024  # of each validation document that a reading during training looks at
VALIDATION_DOCUMENTS = {Task.causal_lm: 32, Task.sequence_classification: 256}  # of such a reading, unless declared


def run_training(
    stage: TrainStage | DistillStage, distill: DistillStage | None, inputs: Mapping[str, Artifact], ctx: Context
) -> Output:
    """Train (or distil) as `stage` says and save the model into `ctx.out`."""
    if distill is not None and distill.completions is not None:  # taught by texts: no distribution to follow
        distill = None
    settings = planned_settings(stage, ctx)
    torch.manual_seed(ctx.seed)
    with ctx.clock.phase("model_load"):
        model, tokenizer = start_weights(stage.model, inputs, ctx, new_head=settings.steps > 0)
        if stage.stack is not None:
            stack_layers(model, stage.stack, f"stages.{ctx.stage}.stack")
        model.to(ctx.device)
    if settings.steps == 0:
        with ctx.clock.phase("checkpoint"):
            save_model(model, tokenizer, ctx.out)
        return Output(counts=_no_counts(), existing=True, notes=(f"{ctx.stage}: 0 steps, used as it is",))
    teacher = None
    if distill is not None and distill.cache is None:
        teacher = _load_teacher(distill, inputs, tokenizer, ctx)
    precision = training_precision(stage, ctx.run)
    with ctx.clock.phase("prepare"):
        masked = False
        if ctx.run.task is Task.causal_lm:
            masked = check_body(model, ctx.device)
            teacher = None if teacher is None else replace(teacher, masked=check_body(teacher.model, ctx.device))
        batches = make_batches(model, tokenizer, settings, ctx, completions=getattr(stage, "completions", None))
        signal = teacher
        if distill is not None and distill.cache is not None:
            signal = _open_cache(distill, distill.cache, inputs, batches, model, tokenizer, settings, ctx)
            batches = Numbered(batches, signal.cache, settings.gradient_accumulation)
        objective = Objective(model, ctx.run.task, precision, ctx.device, ctx.clock, signal, masked=masked)
        if distill is not None:
            objective.losses = partial(_loss_at, distill, settings)
            objective.at(0)
            _read_inside(distill, objective, ctx)
        validate = _validation(model, tokenizer, settings, precision, ctx)
        own = count_flops(model, ctx.run.task, backward=True)  # before it is compiled: counting would slow it
        extra = None if teacher is None else count_flops(teacher.model, ctx.run.task, backward=False)
        doubt = suspicion(own, model, ctx.run.task, settings.sequence_length)
        frozen = None if teacher is None else parameter_hash(teacher.model)
    if teacher is not None and distill is not None and not distill.insist:
        _check_teacher(teacher, tokenizer, settings, validate, ctx)
    head = (
        None if distill is None else choose_head(f"stages.{ctx.stage}.head", distill.head, objective, batches, settings)
    )
    if settings.compile:
        with ctx.clock.phase("compile"):
            model.compile()
    trained = model if objective.hidden is None else WithProjections(model, objective.hidden)
    with (
        ctx.progress(f"{ctx.stage}", settings.steps) as advance,
        device_phases(ctx.clock, ctx.device) as phases,
        _tracer(settings, ctx) as tracer,
    ):
        hooks = Hooks(
            validate=validate, flops=lambda batch: _flops(batch, own, extra, objective), points=ctx.points,
            history=ctx.history, checkpointed=ctx.checkpointed, resumed=ctx.resumed, should_stop=ctx.should_stop,
            advance=_advancing(advance, phases), say=ctx.say, tracer=tracer,
        )  # fmt: skip
        progress = train(
            trained, batches, objective, settings=settings, precision=ctx.run.precision, folder=ctx.checkpoints,
            clock=ctx.clock, hooks=hooks,
        )  # fmt: skip
        timeline = _timeline(phases, tracer, ctx)
    share = None if objective.loss is None else _gradient_share(objective, batches, settings, ctx)
    with ctx.clock.phase("checkpoint"):
        if teacher is not None and parameter_hash(teacher.model) != frozen:
            raise StageFailed("the teacher's parameters changed while the student trained")
        save_model(model, tokenizer, ctx.out)
    output = _output(progress, own, extra, settings, distill, objective, doubt, share)
    output = output if head is None else replace(output, notes=(*output.notes, f"{ctx.stage}: {head}"))
    return replace(output, gpu_timeline=timeline)


def _check_teacher(
    teacher: Teacher, tokenizer: Any, settings: TrainingConfig, student: Callable[[], float], ctx: Context
) -> None:
    """Refuse a teacher that knows no more than the student, which has not been trained yet."""
    with ctx.clock.phase("eval"):
        theirs = _validation(teacher.model, tokenizer, settings, teacher.precision, ctx)()
        check_teacher(f"stages.{ctx.stage}", PRIMARY[ctx.run.task], theirs, student())


def _gradient_share(objective: Objective, batches: Any, settings: TrainingConfig, ctx: Context) -> float:
    """Return the teacher's share of the gradient on the last micro-batch."""
    with ctx.clock.phase("eval"):
        rows = settings.batch_size // settings.gradient_accumulation
        last = batches.batch(settings.steps - 1)
        return gradient_share(objective, {name: tensor[:rows] for name, tensor in last.items()})


def _tracer(settings: TrainingConfig, ctx: Context) -> StepTracer:
    return step_tracer(
        ctx.traces, ctx.device, total=settings.steps, count=ctx.run.ledger.traced_steps,
        eval_every=steps_between_evaluations(settings),
    )  # fmt: skip


def _advancing(advance: Callable[[int, int], None], phases: GpuPhases | None) -> Callable[[int, int], None]:
    """Return what to do after each step: show it, and book the device time that has become known."""

    def advanced(step: int, tokens: int) -> None:
        advance(step, tokens)
        if phases is not None:
            phases.resolve()

    return advanced


def _timeline(phases: GpuPhases | None, tracer: StepTracer, ctx: Context) -> dict[str, Any]:
    """Return what the device did, as `Output.gpu_timeline` has it; the steps are over, so it may be waited for."""
    phases_s: dict[str, float] = {}
    if phases is not None:
        with ctx.clock.phase("optimizer"):  # what the last step still does
            phases.finish(lambda: torch.cuda.synchronize(ctx.device))
        phases_s = phases.phases_s()
    with ctx.clock.phase("log"):
        found = tracer.result()
    if phases is not None and phases.why_none is not None:
        found["notes"].append(f"device time by phase is not known: {phases.why_none}")
    return {**found, "phases_s": phases_s}


def planned_settings(stage: TrainStage | DistillStage, ctx: Context) -> TrainingConfig:
    """Return the settings in force; `match_compute` sets the steps that the matched stage's FLOPs would have bought.

    Raises:
        StageFailed: If the matched stage has no FLOP count.
    """
    settings = training_settings(stage, ctx.run)
    if not getattr(stage, "match_compute", False):
        return settings
    flops = ctx.matched_flops
    per_step = None if ctx.matched is None else ctx.matched.flops_per_step
    if flops is None or per_step is None:
        raise StageFailed(f"{stage.like} counted no FLOPs to match")
    settings.steps = max(1, int(flops // per_step))
    return settings


def start_weights(name: str, inputs: Mapping[str, Artifact], ctx: Context, *, new_head: bool) -> tuple[Any, Any]:
    """Return the model and tokenizer that `name` stands for (an arm, or the student's initial weights)."""
    run, labels = ctx.run, ctx.data.labels
    if name != STUDENT_INIT:
        path = inputs[name].path
        return load_model(path, run.task, labels=labels, new_head=new_head), load_tokenizer(path)
    source = inputs[student_source(run)].path if run.student.path is None else ctx.out
    return make_student(run.student, source, run.task, labels)


def _load_teacher(stage: DistillStage, inputs: Mapping[str, Artifact], tokenizer: Any, ctx: Context) -> Teacher:
    with ctx.clock.phase("model_load"):
        path = inputs[stage.teacher].path
        model = load_model(path, ctx.run.task, device=ctx.device, labels=ctx.data.labels)
        model.requires_grad_(requires_grad=False)
        check_tokenizers(tokenizer, load_tokenizer(path))
    precision = stage.teacher_precision or training_precision(stage, ctx.run)
    return Teacher(model, precision, _loss(stage))


def _loss(stage: DistillStage) -> Loss:
    mixture = MIXTURES.get(stage.divergence, 0.5) if stage.mixture is None else stage.mixture
    return Loss(stage.ce_weight, stage.divergence, stage.temperature, mixture)


def _read_inside(stage: DistillStage, objective: Objective, ctx: Context) -> None:
    """Have the objective read what the stage wants of the teacher's inside; its seed draws the projections."""
    if objective.teacher is None:
        return
    student, teacher, key = objective.model, objective.teacher.model, f"stages.{ctx.stage}"
    if stage.hidden_weight:
        configs = [each.config.get_text_config() for each in (student, teacher)]
        counts = [layer_count(config) for config in configs]
        pairs = layer_pairs(stage.layer_map, counts[0], counts[1], f"{key}.layer_map")
        widths = configs[0].hidden_size, configs[1].hidden_size
        objective.hidden = HiddenSignal(pairs, widths, stage.hidden_weight).to(ctx.device)
    if stage.relation_weight:
        objective.relations = relation_signal(
            student, teacher, layer=stage.relation_layer, heads=stage.relation_heads, weight=stage.relation_weight,
            key=key,
        )  # fmt: skip


def _loss_at(stage: DistillStage, settings: TrainingConfig, step: int) -> Loss:
    """Return what is minimised at a step: temperature and weight of the hard labels may change over the training."""
    along = partial(ramp, step, settings.steps, stage.ramp_fraction)
    loss = _loss(stage)
    return replace(
        loss, temperature=along(stage.start_temperature, loss.temperature),
        ce_weight=along(stage.start_ce_weight, loss.ce_weight),
    )  # fmt: skip


def _open_cache(
    stage: DistillStage, name: str, inputs: Mapping[str, Artifact], batches: PackedBatches | PaddedBatches, model: Any,
    tokenizer: Any, settings: TrainingConfig, ctx: Context,
) -> CachedTeacher:  # fmt: skip
    """Open a teacher cache and have it prove that it was captured for this training.

    Raises:
        UserError: Naming what differs.
    """
    from pipeline.training.capture import expected

    key = f"stages.{ctx.stage}.cache"
    cache = TeacherCache(inputs[name].path, key)
    wanted = expected(ctx.run.stages[name], batches, tokenizer, inputs[stage.teacher], ctx)
    cache.check(wanted, batches, needed(batches, settings.steps, settings.batch_size))
    outputs = (
        model.config.num_labels if ctx.run.task is Task.sequence_classification else Head.of(model).weight.shape[0]
    )
    if outputs < cache.vocabulary:
        problem = f"the cache speaks of {cache.vocabulary} tokens or classes, the student has {outputs}"
        raise UserError(key, problem, "use a student of the teacher's family")
    return CachedTeacher(cache, _loss(stage))


class Numbered:
    """Batches that say which windows they consist of: what a cache is asked by, here already, for each micro-batch."""

    def __init__(self, batches: PackedBatches | PaddedBatches, cache: TeacherCache, num_micro: int = 1) -> None:
        self._batches, self._cache, self._num_micro = batches, cache, num_micro

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step with `windows`, (B,) int64."""
        windows = torch.from_numpy(self._batches.rows(step).astype("int64"))
        for part in windows.chunk(self._num_micro):
            self._cache.read_ahead(part.tolist())
        return {**self._batches.batch(step), "windows": windows}


def make_batches(
    model: Any, tokenizer: Any, settings: TrainingConfig, ctx: Context, *, completions: str | None = None
) -> PackedBatches | PaddedBatches:
    """Return what a training with these settings reads, as a pure function of the step.

    Args:
        completions: A file of them to read in place of the train split.
    """
    if completions is None:
        encoded = encode_all(ctx.data.splits["train"], tokenizer, ctx.run.task, max_length=settings.sequence_length)
    else:
        key = f"stages.{ctx.stage}.completions"
        encoded = encode_completions(read_completions(completions, ctx.run.data, key), tokenizer)
    check_vocabulary(model, (item.input_ids for item in encoded), tokenizer.pad_token_id)
    rows = partial(first_row, settings=settings)
    if ctx.run.task is Task.causal_lm:
        return PackedBatches(
            encoded, sequence_length=settings.sequence_length, batch_size=rows, seed=ctx.seed,
            length_at=lambda step: sequence_length(step, settings),
        )  # fmt: skip
    return PaddedBatches(encoded, batch_size=rows, seed=ctx.seed, pad_id=tokenizer.pad_token_id)


def _validation(
    model: Any, tokenizer: Any, settings: TrainingConfig, precision: Any, ctx: Context
) -> Callable[[], float]:
    documents = sorted(ctx.data.splits["validation"], key=lambda document: document.digest)
    count = settings.eval_documents or VALIDATION_DOCUMENTS[ctx.run.task]
    encoded = encode_all(
        documents[:count], tokenizer, ctx.run.task,
        max_length=settings.sequence_length, max_bytes=VALIDATION_BYTES,
    )  # fmt: skip

    def validate() -> float:
        with arithmetic(precision, ctx.device):
            return validation_metric(
                model, encoded, ctx.run.task, sequence_length=settings.sequence_length,
                batch_size=settings.batch_size, device=ctx.device, pad_id=tokenizer.pad_token_id,
            )  # fmt: skip

    return validate


def _flops(
    batch: dict[str, Any], own: FlopsPerSequence, teacher: FlopsPerSequence | None,
    objective: Objective,
) -> tuple[float, float]:  # fmt: skip
    """Return the FLOPs of a batch as it is computed, all its positions, padding too, and heads on the targets.

    Of the model's own part, which `match_compute` divides by, and of all that a teacher adds.
    """
    rows, length = batch["input_ids"].shape
    targets = int((batch["labels"] != IGNORE).sum())
    added = 0.0 if teacher is None else teacher.batch(rows, length, targets)
    if objective.hidden is not None:
        added += objective.hidden.flops(rows * length)
    if objective.relations is not None:
        added += objective.relations.flops(rows, length)
    return own.batch(rows, length, targets), added


def _no_counts() -> dict[str, Value]:
    nothing = {"steps": measured(0), "tokens": measured(0), "examples": measured(0), "model_flops": estimated(0),
               "steps_lost": measured(0)}  # fmt: skip
    return {**nothing, **dict.fromkeys(("distillation_share", "distillation_gradient_share"), null(NO_TEACHER))}


def _output(
    progress: Progress, own: FlopsPerSequence, teacher: FlopsPerSequence | None, settings: TrainingConfig,
    distill: DistillStage | None, objective: Objective, doubt: str | None, gradient: float | None,
) -> Output:  # fmt: skip
    shares = {"distillation_share": _share(progress, distill),
              "distillation_gradient_share": null(NO_TEACHER) if gradient is None else measured(gradient)}  # fmt: skip
    counts = {
        "steps": measured(progress.step), "tokens": measured(progress.tokens),
        "examples": measured(progress.examples), "model_flops": estimated(progress.flops), "steps_lost": measured(0),
        **shares,
    }  # fmt: skip
    notes: list[str] = [] if doubt is None else [doubt]
    teacher_model = None if objective.teacher is None else objective.teacher.model
    if teacher_model is not None and teacher_model.config.vocab_size != objective.model.config.vocab_size:
        notes.append(f"vocabularies differ by padding: the first {objective.vocabulary} tokens are compared")
    least = min((value.v for value in shares.values() if value.v is not None), default=1.0)
    if distill is not None and least < LEAST_SHARE:
        notes.append(f"the teacher makes {least:.2%} of the loss or its gradient: it hardly teaches; lower ce_weight")
    return Output(
        counts=counts, flops_per_step=progress.own_flops / progress.step, curve=progress.curve,
        seconds_in_steps=progress.step_ns / 1e9, notes=tuple(notes),
    )  # fmt: skip


def _share(progress: Progress, distill: DistillStage | None) -> Value:
    """Return the share of the loss that the teacher's signal contributes, over the last tenth of the steps."""
    if distill is None:
        return null(NO_TEACHER)
    if progress.taught + progress.hard == 0:
        return null("the loss is zero")
    return derive(lambda part, rest: part / (part + rest), measured(progress.taught), measured(progress.hard))
