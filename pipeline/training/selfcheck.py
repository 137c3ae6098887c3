"""Does the teacher teach? Asked before a student trains, and answered with a figure afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data.batches import num_targets
from pipeline.errors import StageFailed
from pipeline.ledger.metrics import DIRECTION
from pipeline.training.parallel import Shared
from pipeline.training.shares import whole_of

if TYPE_CHECKING:
    from pipeline.training.objective import Objective, StepLoss

LEAST_SHARE = 0.01  # of loss or gradient; below it a run with a teacher is one without


def check_teacher(key: str, metric: str, theirs: float, start: float) -> None:
    """Refuse a teacher that is no better than its student before a step: there is nothing to learn
    from it.

    Args:
        key: Of the stage, as the user would type it (`stages.student`).
        metric: What both were read on: `bits_per_byte` or `accuracy`.
        theirs: The teacher's reading.
        start: The student's, before its first step.

    Raises:
        StageFailed: If so, or if the teacher gives no number.
    """
    better = theirs < start if DIRECTION[metric] < 0 else theirs > start
    if not better:
        said = (
            f"the teacher's {theirs:.4g} {metric} on validation is no better than the student's"
            f" {start:.4g}"
        )
        raise StageFailed(
            f"{said} before a step; train the teacher longer, or {key}.allow_weak_teacher=true"
        )


def gradient_share(
    objective: Objective, batch: dict[str, torch.Tensor], shared: Shared | None = None
) -> float:
    """Return the part of the gradient that the teacher's signal makes, by norm over all parameters.

    With g_ce the gradient of the weighted hard labels and g_d that of all else (divergence, hidden
    states, relations), |g_d| / (|g_d| + |g_ce|). Two backward passes; the gradients that were there
    are lost.

    Args:
        shared: How ranks share the weights, each of which calls this; None: this process has all.
    """
    loss, shared = objective.loss, shared or Shared()
    assert loss is not None
    own, targets = shared.own_rows(batch), num_targets(batch)

    def norm(ce_weight: float, part: Callable[[StepLoss], torch.Tensor]) -> float:
        objective.loss = replace(loss, ce_weight=ce_weight)
        objective.model.zero_grad(set_to_none=True)
        with shared.gradients(last=True):
            done = shared.computed(objective, own)
            value = part(done) * shared.share(done.count, targets)
            if value.requires_grad:
                value.backward()
        return _norm(objective.model)

    try:
        # With `ce_weight` 0 or 1 a pass computes one part alone, unweighted; its weight is put back
        # here.
        taught = norm(0.0, lambda done: _taught(done, 1 - loss.ce_weight))
        hard = norm(1.0, lambda done: _alone(done) * loss.ce_weight)
    finally:
        objective.loss = loss
        objective.model.zero_grad(set_to_none=True)
    return taught / (taught + hard) if taught + hard else 0.0


def _alone(done: StepLoss) -> torch.Tensor:
    """Return the loss without the parts that the teacher's inside has in it."""
    return done.loss - sum(done.drawn.values())


def _taught(done: StepLoss, weight: float) -> torch.Tensor:
    """Return the teacher's part of a loss without labels; a divergence without weight, infinite or
    not, has none.
    """
    drawn = sum(done.drawn.values(), torch.zeros_like(done.loss))
    return _alone(done) * weight + drawn if weight else drawn


def _norm(model: Any) -> float:
    # The norm of all norms is the norm over all parameters.
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not gradients:
        return 0.0
    norms = [whole_of(gradient.float().norm()) for gradient in gradients]
    return float(torch.stack(norms).norm())
