"""Capture: run a teacher once over what a student will train on, and keep its predictions in a few
bytes a token.

What it does: reads the windows (or examples) that the stage named by `like` will read, runs the
    teacher over each once,
and writes a teacher cache: sampled tokens with their counts, or the k largest probabilities with
    the mass of the rest;
all logits of classes. When it helps: a teacher that does not fit beside its student, several epochs
    over the same data, several students of one teacher; a single epoch for one student costs what
    the live teacher costs, and disk.
Settings worth changing: draws (more: less noise, more bytes), method.
Source: Anshumann et al. 2025, arXiv 2503.16870; the formats in `distillation/sparse.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from pipeline.config.settings import CaptureMethod, Precision, Run, positive
from pipeline.errors import UserError
from pipeline.stages.settings import TrainingOverrides, training_settings

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class CaptureStage:
    """Settings of a `capture` stage."""

    optional: bool = False
    teacher: str = "teacher"  # base, or an earlier stage
    # the training stage whose windows are captured: its length, batch size, steps and seed
    like: str = "student"
    method: CaptureMethod = CaptureMethod.sample  # what is kept of each distribution
    # null: as 72 bytes a token hold
    draws: Optional[int] = field(default=None, metadata={"min": 12, "max": 64})
    k: Optional[int] = positive(None)  # of top_k; null: as 72 bytes a token hold
    temperature: Optional[float] = positive(None)  # null: that of the stage named by `like`
    # of the teacher; null: as the stage named by `like` trains
    precision: Optional[Precision] = None

    type: ClassVar[str] = "capture"
    version: ClassVar[int] = 3
    makes: ClassVar[str] = "teacher_cache"

    def reads(self, run: Run) -> list[str]:
        """Return the arms this stage reads."""
        return [self.teacher]

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        like = run.stages.get(self.like)
        if not isinstance(like, TrainingOverrides):
            named = [
                name for name, stage in run.stages.items() if isinstance(stage, TrainingOverrides)
            ]
            problem = f"{self.like!r} is no stage that trains"
            raise UserError(
                f"{key}.like", problem, f"name one of {', '.join(named) or 'the training stages'}"
            )
        if getattr(like, "match_compute", False) or training_settings(like, run).steps == 0:
            raise UserError(
                f"{key}.like",
                f"{self.like} has no steps of its own to capture for",
                "name another stage",
            )
        for name, method in (("draws", CaptureMethod.sample), ("k", CaptureMethod.top_k)):
            if getattr(self, name) is not None and self.method is not method:
                raise UserError(
                    f"{key}.{name}", f"has no effect with method: {self.method.value}", "drop it"
                )

    def captured(self, run: Run) -> dict[str, Any]:
        """Return the settings in force that decide what is captured; a part of the artifact's
        key.
        """
        like = run.stages[self.like]
        settings = training_settings(like, run)
        names = (
            "sequence_length",
            "batch_size",
            "gradient_accumulation",
            "steps" if settings.epochs is None else "epochs",
        )
        return {
            "temperature": capture_temperature(self, run),
            **{name: getattr(settings, name) for name in names},
        }

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Capture and leave the cache in `ctx.out`."""
        from pipeline.stages.capturing import run_capture

        return run_capture(self, inputs, ctx)


def capture_temperature(stage: CaptureStage, run: Run) -> float:
    """Return the temperature in force: the stage's own, else that of the stage it captures for,
    else 1.
    """
    if stage.temperature is not None:
        return stage.temperature
    return getattr(run.stages[stage.like], "temperature", 1.0)
