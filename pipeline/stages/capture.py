"""Capture: run a teacher once over what a student will train on, and keep its predictions in a few
bytes a token.

What it does: reads the windows (or examples) that the stage named by `like` will read, and runs
the teacher over each once. It writes a teacher cache: sampled tokens with their counts, or the k
largest probabilities with the mass of the rest; of a classifier all logits.
When it helps: where a teacher does not fit beside its student, for several epochs over the same
data, or for several students of one teacher. For one student and one epoch it costs what a live
teacher costs, and disk.
Settings worth changing: draws (more: less noise, more bytes), method.
Source: Anshumann et al. 2025, arXiv 2503.16870; the formats in `distillation/sparse.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.stages.capture_settings import CaptureSettings

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact


@dataclass(kw_only=True, slots=True)
class CaptureStage(CaptureSettings):
    """The stage `capture`."""

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Capture and leave the cache in `ctx.out`."""
        from pipeline.stages.capturing import run_capture

        return run_capture(self, inputs, ctx)
