"""What a teacher adds to a training: where its signal comes from, how it is mixed in, and whether
it taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches, PaddedBatches
from pipeline.data.prompts import PartlySampled, Prompts
from pipeline.data.tokenizer import tokenizer_digest
from pipeline.distillation.cache import TeacherCache, Wanted, Windows, needed, packing_digest
from pipeline.distillation.hidden import HiddenSignal, layer_pairs
from pipeline.distillation.losses import Loss
from pipeline.distillation.on_policy import Writing
from pipeline.distillation.relations import relation_signal
from pipeline.distillation.sparse import Dense
from pipeline.errors import UserError
from pipeline.models.layers import layer_count
from pipeline.models.load import load_model, load_tokenizer
from pipeline.stages.base import CACHE, TEACHER
from pipeline.stages.context import Context
from pipeline.stages.distill_settings import MIXTURES, DistillSettings
from pipeline.stages.settings import training_precision, training_settings
from pipeline.training.holding import Holding
from pipeline.training.objective import CachedTeacher, Objective, Teacher, check_tokenizers
from pipeline.training.parallel import Shared
from pipeline.training.precision import frozen
from pipeline.training.prefetch import Batches
from pipeline.training.schedule import ramp
from pipeline.training.selfcheck import gradient_share

if TYPE_CHECKING:
    from pipeline.data.encode import Encoded
    from pipeline.store.artifacts import Artifact


def load_teacher(
    stage: DistillSettings,
    inputs: Mapping[str, Artifact],
    tokenizer: Any,
    held: Holding,
    ctx: Context,
) -> Teacher:
    """Load a live teacher, frozen.

    Raises:
        UserError: If it numbers tokens differently.
    """
    with ctx.clock.phase("model_load"):
        path, labels = inputs[TEACHER].path, ctx.data.labels
        model = held.made(lambda: load_model(path, ctx.run.task, device=held.device, labels=labels))
        model.requires_grad_(requires_grad=False)
        check_tokenizers(tokenizer, load_tokenizer(path))
    precision = frozen(stage.teacher_precision or training_precision(stage, ctx.run), ctx.device)
    return Teacher(model, precision, _loss(stage))


def open_cache(
    stage: DistillSettings,
    inputs: Mapping[str, Artifact],
    batches: PackedBatches | PaddedBatches,
    outputs: int,
    tokenizer: Any,
    settings: TrainingConfig,
    ctx: Context,
) -> CachedTeacher:
    """Open a teacher cache and have it prove that it was captured for this training.

    Args:
        outputs: Tokens or classes that the student knows.

    Raises:
        UserError: Naming what differs.
    """
    key = f"stages.{ctx.stage}.cache"
    cache = TeacherCache(inputs[CACHE].path, key)
    wanted = _expected(stage, batches, tokenizer, inputs[TEACHER], ctx)
    # All of it is compared before the first step: a wrong cache would train silently.
    cache.check(wanted, batches, needed(batches, settings.steps, settings.batch_size))
    if outputs < cache.vocabulary:
        problem = (
            f"the cache speaks of {cache.vocabulary} tokens or classes, the student has {outputs}"
        )
        raise UserError(key, problem, "use a student of the teacher's family")
    return CachedTeacher(cache, _loss(stage))


def _expected(
    own: DistillSettings, windows: Windows, tokenizer: Any, teacher: Artifact, ctx: Context
) -> Wanted:
    """Return what a cache must say of itself for a stage that reads `windows` to take it."""
    run = ctx.run
    stage = run.stages[own.cache or ""]  # the capture that made it, by this recipe
    wanted: Wanted = {
        "sequence_length": training_settings(own, run).sequence_length,
        "tokenizer": tokenizer_digest(tokenizer),
        "data": ctx.data.digest,
        "packing": packing_digest(windows),
        "teacher": teacher.digest,
        "precision": frozen(training_precision(stage, run), ctx.device).value,
        "method": Dense.method if run.task.kind.labelled else stage.method.value,
    }
    if not run.task.kind.labelled:  # logits serve every temperature
        wanted["temperature"] = own.temperature
    if run.task.kind.is_language and stage.draws is not None:
        wanted["draws"] = stage.draws
    if run.task.kind.is_language and stage.k is not None:
        wanted["k"] = stage.k
    return wanted


class IndexedBatches:
    """Batches that say which windows they consist of: what a cache is asked by, here already, for
    each micro-batch.
    """

    def __init__(
        self, batches: PackedBatches | PaddedBatches, cache: TeacherCache, num_micro: int = 1
    ) -> None:
        self._batches, self._cache, self._num_micro = batches, cache, num_micro

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step with `windows`, (B,) int64."""
        windows = torch.from_numpy(self._batches.rows(step).astype("int64"))
        # As the loop cuts a batch: the cache is asked by micro-batch. This runs in the thread that
        # makes batches ahead, so reading the disk overlaps with training.
        for part in windows.chunk(self._num_micro):
            self._cache.read_ahead(part.tolist())
        return {**self._batches.batch(step), "windows": windows}


def configure_loss(
    stage: DistillSettings, objective: Objective, settings: TrainingConfig, ctx: Context
) -> None:
    """Have an objective minimise what the stage says, step by step, and read what it wants of a
    teacher's inside.
    """
    objective.losses = partial(loss_at, stage, settings)
    objective.at(0)
    if objective.teacher is None:
        return
    student, teacher, key = objective.model, objective.teacher.model, f"stages.{ctx.stage}"
    if stage.hidden_weight and (
        student.config.is_encoder_decoder or teacher.config.is_encoder_decoder
    ):
        problem = "compares layers of one stack, and an encoder-decoder has two"
        raise UserError(f"{key}.hidden_weight", problem, "leave it at 0")
    if stage.hidden_weight:
        configs = [each.config.get_text_config() for each in (student, teacher)]
        counts = [layer_count(config) for config in configs]
        pairs = layer_pairs(stage.layer_map, counts[0], counts[1], f"{key}.layer_map")
        widths = configs[0].hidden_size, configs[1].hidden_size
        objective.hidden = HiddenSignal(pairs, widths, stage.hidden_weight).to(ctx.device)
    if stage.relation_weight:
        objective.relations = relation_signal(
            student,
            teacher,
            layer=stage.relation_layer,
            heads=stage.relation_heads,
            weight=stage.relation_weight,
            key=key,
        )


def loss_at(stage: DistillSettings, settings: TrainingConfig, step: int) -> Loss:
    """Return what is minimised at a step: temperature and weight of the hard labels may change over
    the training.
    """
    along = partial(ramp, step, settings.steps, stage.ramp_fraction)
    loss = _loss(stage)
    return replace(
        loss,
        temperature=along(stage.start_temperature, loss.temperature),
        ce_weight=along(stage.start_ce_weight, loss.ce_weight),
    )


def on_policy_batches(
    stage: DistillSettings,
    objective: Objective,
    text: PackedBatches,
    encoded: list[Encoded],
    tokenizer: Any,
    settings: TrainingConfig,
    ctx: Context,
) -> PartlySampled:
    """Have the student write in a share of the steps; return the batches of both kinds.

    Args:
        text: The batches of the other steps.
        encoded: What `text` is made of, and prompts are.
    """
    length = stage.on_policy_length or settings.sequence_length // 2
    assert objective.vocabulary is not None
    objective.writing = Writing(
        length,
        stage.on_policy_temperature or 1.0,
        objective.vocabulary,
        _ends(objective.model, tokenizer),
        ctx.seed,
    )
    # Prompt and answer together fill a sequence.
    longest = settings.sequence_length - length
    prompts = Prompts(encoded, longest=longest, batch_size=settings.batch_size, seed=ctx.seed)
    return PartlySampled(text, prompts, stage.on_policy, ctx.seed)


def teachers_share(
    objective: Objective,
    text: Batches,
    settings: TrainingConfig,
    shared: Shared | None,
    ctx: Context,
) -> float:
    """Return the teacher's share of the gradient on the last micro-batch of text.

    Args:
        shared: How ranks share the weights, each of which calls this; None: this process has all.
    """
    with ctx.clock.phase("eval"):
        rows = settings.batch_size // settings.gradient_accumulation
        last = text.batch(settings.steps - 1)
        batch = {name: tensor[:rows] for name, tensor in last.items()}
        return gradient_share(objective, batch, shared)


def _loss(stage: DistillSettings) -> Loss:
    mixture = MIXTURES.get(stage.divergence, 0.5) if stage.mixture is None else stage.mixture
    return Loss(stage.ce_weight, stage.divergence, stage.temperature, mixture)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end what a model writes: of its text, and as its settings name them,
    of its turn.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    turn = named if isinstance(named, list) else [named]
    return sorted({each for each in (*turn, tokenizer.eos_token_id) if each is not None})
