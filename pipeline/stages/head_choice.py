"""Which kernel computes a stage's head: the one that is named, or on CUDA the fastest of those that
are right.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.settings.distillation import Divergence, HeadKernel
from pipeline.config.settings.training import TrainingConfig
from pipeline.distillation.kernels import NOT_FOR_LIGER, fastest, in_words, kernel_of, why_not
from pipeline.distillation.transform import Unknown
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.training.objective import Objective, columns_of

SKEWED = (Divergence.skewed_kl, Divergence.skewed_reverse_kl)


def choose_head(
    key: str, wanted: HeadKernel, objective: Objective, batches: Any, settings: TrainingConfig
) -> str | None:
    """Have `objective` use a kernel; return what a probe found where there was a choice.

    `auto` probes on CUDA only: elsewhere Liger's chunked loss, the one other kernel, has never been
    the faster one (benchmarks/distillation_head.py), and a run would pay for finding that out
    again.

    Args:
        key: Of the setting, for who must change it.

    Raises:
        UserError: If Liger is wanted for models of two vocabularies, or whose logits are more than
            a product.
    """
    if not objective.task.kind.is_language:
        return None
    if wanted is HeadKernel.liger and objective.teacher is not None:
        _refuse_for_liger(key, objective, objective.teacher.model)
    if isinstance(objective.head, Unknown):
        return (
            None
            if wanted is HeadKernel.auto
            else f"head={wanted.value} has no effect: logits are held in full"
        )
    if wanted is not HeadKernel.auto:
        objective.head_loss = kernel_of(wanted)
        return None
    if not device_of(objective.device).triton:
        return None
    return probe_heads(objective, batches, settings)


def _refuse_for_liger(key: str, objective: Objective, teacher: Any) -> None:
    """Refuse heads that Liger's loss does not compute."""
    remedy = "use auto or torch"
    for model, head in ((objective.model, objective.head), (teacher, objective.teacher_head)):
        if isinstance(head, Unknown):
            raise UserError(
                key, f"{NOT_FOR_LIGER}; those of {type(model).__name__} are not", remedy
            )
        if not head.plain:
            problem = f"{NOT_FOR_LIGER}; {type(model).__name__} has {head.in_words()} after it"
            raise UserError(key, problem, remedy)
    sizes = [
        columns_of(objective.model, objective.head),
        columns_of(teacher, objective.teacher_head),
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            key, f"Liger takes one vocabulary, student and teacher have {sizes}", remedy
        )


def probe_heads(objective: Objective, batches: Any, settings: TrainingConfig) -> str:
    """Time the kernels that are there on the first micro-batch and take the fastest; return what
    was found.
    """
    with objective.clock.phase("search"):
        asked = _asked_of_head(objective, batches, settings)
        kernels = {
            name: kernel_of(name)
            for name in (HeadKernel.torch, HeadKernel.triton, HeadKernel.liger)
            if why_not(name, objective.device) is None
            and not (name is HeadKernel.liger and _is_not_ligers(objective))
        }
        chosen, found = fastest(kernels, *asked[0], **asked[1])
        objective.head_loss = kernels[chosen]
    return in_words(chosen, found)


def _is_not_ligers(objective: Objective) -> bool:
    skewed = objective.loss is not None and objective.loss.divergence in SKEWED
    return skewed or objective.cached is not None


def _asked_of_head(
    objective: Objective, batches: Any, settings: TrainingConfig
) -> tuple[Any, dict[str, Any]]:
    """Return what the objective asks of its head on the first micro-batch; no generator and no
    weight changes.
    """
    asked: list[tuple[Any, dict[str, Any]]] = []
    usual = objective.head_loss

    def noting(*inputs: Any, **settings: Any) -> Any:
        asked.append((inputs, settings))
        return usual(*inputs, **settings)

    # A micro-batch: the shape that the head will meet.
    rows = settings.batch_size // settings.gradient_accumulation
    batch = {name: tensor[:rows] for name, tensor in batches.batch(0).items()}
    objective.head_loss = noting
    # The probe must leave the training as it was, dropout's random numbers included.
    with torch.random.fork_rng(), torch.no_grad():
        objective(batch)
    objective.head_loss = usual
    (hidden, head, labels), more = asked[0]
    assert more["taught"] is not None
    return (hidden.detach(), head, labels), more
