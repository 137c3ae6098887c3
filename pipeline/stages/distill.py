"""Distill: train a student on its teacher's predictions, mixed with the hard labels.

What it does: minimises a divergence from the teacher's distribution at a temperature (forward KL
unless said otherwise), times T squared, plus cross-entropy. The teacher is frozen, which a hash of
its parameters before and after proves, and runs in its own precision. With `cache` no teacher is
loaded: an earlier stage captured its predictions.
When it helps: for a student initialised from its teacher, or served often. A live teacher costs
more FLOPs per step than plain training, so read the student against both controls of
`recipe=distill`.
Settings worth changing: ce_weight, temperature, divergence, steps.
Source: Hinton et al. 2015, arXiv 1503.02531, section 2; `distillation/losses.py` has the sources of
the divergences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.stages.distill_settings import DistillSettings

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact


@dataclass(kw_only=True, slots=True)
class DistillStage(DistillSettings):
    """The stage `distill`."""

    type: ClassVar[str] = "distill"
    version: ClassVar[int] = 6

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Train and leave the model in `ctx.out`."""
        from pipeline.stages.training import run_training

        return run_training(self, inputs, ctx, distill=self)

    def planned(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output | None:
        """Return the FLOPs of its batches; None where the student writes some of them."""
        from pipeline.stages.training import planned_flops

        return None if self.on_policy else planned_flops(self, inputs, ctx, distill=self)
