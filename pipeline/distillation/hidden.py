"""Hidden-state distillation: match the teacher's layers through learned projections, as in FitNets.

    S = mean over layer pairs, positions and features of (W h_student - h_teacher)^2

W is a linear map of its own for each pair, learnt with the student and thrown away with the
teacher; where both widths are the same there is none. Positions are those that the loss predicts
(of a classifier: all that are no padding, each example weighing the same), so that micro-batches
add up to their batch. What a layer gives out is meant; of the last one, after the model's final
norm.
Source: Romero et al. 2015, arXiv 1412.6550 (hints with a regressor); Jiao et al. 2020, arXiv
1909.10351, equation 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many

Pairs = list[tuple[int, int]]
"""Student's and teacher's layer, from 0."""


def layer_pairs(spec: Any, num_student: int, num_teacher: int, key: str) -> Pairs:
    """Return which layer of the student follows which of the teacher.

    Args:
        spec: None spreads evenly: layer i follows ceil((i + 1) T / S) - 1, which is where
            `student.layers` copies layer i from; `last` pairs the last layers alone; a list names
            the teacher's layer for each of the student's.

    Raises:
        UserError: If it fits no such models.
    """
    if spec is None:
        return [
            (at, math.ceil((at + 1) * num_teacher / num_student) - 1) for at in range(num_student)
        ]
    if spec == "last":
        return [(num_student - 1, num_teacher - 1)]
    is_fit = isinstance(spec, list) and all(
        isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < num_teacher
        for layer in spec
    )
    if not is_fit or len(spec) != num_student:
        problem = f"{spec!r} maps no {how_many(num_student, 'layer')} onto {num_teacher}"
        raise UserError(
            key,
            problem,
            f"give last, or a list of {how_many(num_student, 'layer')} below {num_teacher}",
        )
    return list(enumerate(spec))


class HiddenSignal(torch.nn.Module):
    """The projections, and the loss that they take part in.

    Args:
        pairs: Layers that are compared.
        widths: Hidden size of student and teacher.
        weight: Of the signal beside the other parts of the loss.
    """

    def __init__(self, pairs: Pairs, widths: tuple[int, int], weight: float) -> None:
        super().__init__()
        self.pairs, self.weight, self.widths = pairs, weight, widths
        mapped = widths[0] != widths[1]
        self.projections = torch.nn.ModuleList(
            torch.nn.Linear(*widths, bias=False) if mapped else torch.nn.Identity() for _ in pairs
        )

    def forward(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the mean of S over what is counted, 0-dim fp32.

        Args:
            ours: By layer, the student's states, (B, T, H_s); the embeddings first, as transformers
                gives them.
            theirs: The teacher's, (B, T, H_t).
            weights: Of positions, (B, T), summing to 1.
        """
        total = torch.zeros((), device=weights.device)
        for (student, teacher), projection in zip(self.pairs, self.projections, strict=True):
            # Entry 0 is the embeddings, so layer i stands at i + 1. (B, T, H_t)
            apart = projection(ours[student + 1]).float() - theirs[teacher + 1].float()
            total = total + (apart.square().mean(-1) * weights).sum()
        return total / len(self.pairs)

    def flops(self, positions: int) -> float:
        """Return the FLOPs of the projections, forward and backward, over so many positions."""
        mapped = self.widths[0] != self.widths[1]
        return (
            # 2 FLOPs a weight and position forward, 4 backward
            6.0 * self.widths[0] * self.widths[1] * len(self.pairs) * positions if mapped else 0.0
        )


class WithProjections(torch.nn.Module):
    """A student and what is trained with it: one model to the optimizer and to checkpoints."""

    def __init__(self, student: Any, signal: HiddenSignal) -> None:
        super().__init__()
        self.student, self.signal = student, signal

    def tie_weights(self) -> None:
        """Tie what was saved once."""
        self.student.tie_weights()
