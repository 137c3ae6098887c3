"""Settings of a capture, and what a run asks of it; `capture.py` is the stage."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from pipeline.config.settings.distillation import CaptureMethod
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.ranges import positive
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.errors import UserError
from pipeline.stages.base import (
    LIKE,
    TEACHER,
    BeforeRun,
    PrecisionInForce,
    Reference,
    Stage,
    WarmUp,
    Workload,
    config_of,
    settings_of,
    stages_of,
)
from pipeline.stages.settings import (
    TrainingOverrides,
    check_classes,
    precision_in_force,
    smaller_batches,
    training_precision,
    training_settings,
    warm_batches,
)

if TYPE_CHECKING:
    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class CaptureSettings(Stage):
    """Settings of a `capture` stage."""

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

    def references(self, run: Run) -> dict[str, Reference]:
        """Return the teacher, and the stage that it captures for."""
        like = Reference(self.like, LIKE, reads=False, instead=None, comes_earlier=False)
        return {TEACHER: Reference(self.teacher, TEACHER), LIKE: like}

    def learns_from(self) -> str | None:
        """Return the teacher whose predictions it records."""
        return self.teacher

    def batches_like(self, run: Run) -> TrainingConfig | None:
        """Return the settings of the stage that it captures for."""
        return training_settings(self._captured_for(run), run)

    def precisions(self, key: str, run: Run) -> list[PrecisionInForce]:
        """Return that of the teacher."""
        return [precision_in_force(self, key, run, trains=False)]

    def is_split(self, run: Run) -> bool:
        """Return that shards are: each rank captures some."""
        return True

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        check_classes(key, run)
        like = stages_of(run).get(self.like)
        if not isinstance(like, TrainingOverrides):
            named = [
                name for name, stage in run.stages.items() if isinstance(stage, TrainingOverrides)
            ]
            problem = f"{self.like!r} is no stage that trains"
            raise UserError(
                f"{key}.like", problem, f"name one of {', '.join(named) or 'the training stages'}"
            )
        if like.matched(run) or training_settings(like, run).steps == 0:
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
        settings = training_settings(self._captured_for(run), run)
        names = (
            "sequence_length",
            "batch_size",
            "gradient_accumulation",
            "steps" if settings.epochs is None else "epochs",
        )
        return {
            "temperature": self.temperature_in_force(run),
            **{name: getattr(settings, name) for name in names},
        }

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return its own settings and those of the stage that it captures for."""
        return settings_of(self, "optional", LIKE) | self._in_force(run)

    def shown_settings(self, run: Run) -> dict[str, Any]:
        """Return the same."""
        settings = settings_of(self) | self._in_force(run)
        return {name: value for name, value in settings.items() if value is not None}

    def _in_force(self, run: Run) -> dict[str, Any]:
        return {**self.captured(run), "precision": training_precision(self, run).value}

    def workload(self, name: str, known: BeforeRun) -> Workload | None:
        """Return the teacher's reading of what it captures."""
        from pipeline.training.precision import frozen

        config = config_of(self.teacher, known)
        if config is None:
            return None
        precision = frozen(training_precision(self, known.run), known.device)
        return Workload(config=config, precision=precision, batches=self.batches_like(known.run))

    def warm_up(self, inputs: Mapping[str, Artifact], ctx: WarmUp) -> None:
        """Import the teacher's class and what captures; encode train."""
        settings = self.batches_like(ctx.run)
        assert settings is not None
        with ctx.clock.phase("import"):
            importlib.import_module("pipeline.stages.capturing")
        warm_batches(inputs, settings, ctx)

    def memory_remedy(self, name: str, run: Run) -> str:
        """Return smaller micro-batches of the stage that it captures for: the teacher reads
        those.
        """
        return smaller_batches(self._captured_for(run), self.like, run)

    def _captured_for(self, run: Run) -> TrainingOverrides:
        like = stages_of(run)[self.like]
        assert isinstance(like, TrainingOverrides)
        return like

    def temperature_in_force(self, run: Run) -> float:
        """Return the temperature: its own, else that of the stage it captures for, else 1."""
        if self.temperature is not None:
            return self.temperature
        return getattr(self._captured_for(run), "temperature", 1.0)
