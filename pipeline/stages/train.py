"""Train: plain fine-tuning or training from scratch, next-token or classification cross-entropy.

What it does: the one training loop on the hard labels.
When it helps: as the baseline of every claim, as the teacher of a distillation, and (with
`match_compute`) as the control that shows what a teacher's FLOPs would have bought.
Settings worth changing: steps, learning_rate, precision, schedule. `steps: 0` takes the model as it
is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.stages.base import CACHE, LIKE, Control, Reference, stages_of
from pipeline.stages.settings import TrainingOverrides, check_training, training_settings

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact


@dataclass(kw_only=True, slots=True)
class TrainStage(TrainingOverrides):
    """Settings of a `train` stage."""

    # steps are those that the FLOPs of the stage named by `like` would have bought
    match_compute: bool = False

    type: ClassVar[str] = "train"
    # part of the artifact's key: raise it when the same settings train another model
    version: ClassVar[int] = 5

    def references(self, run: Run) -> dict[str, Reference]:
        """Return what its weights start from, and the stage that it is like or matches."""
        named = TrainingOverrides.references(self, run)
        if LIKE in named and self.match_compute:
            named[LIKE] = replace(named[LIKE], instead=None)
        return named

    def matched(self, run: Run) -> tuple[str, ...]:
        """Return the stage whose FLOPs are matched, and the capture of the cache that it reads: a
        live teacher's are in the stage's own.
        """
        if not self.match_compute or self.like is None:
            return ()
        read = stages_of(run)[self.like].inputs(run)
        return (self.like, read[CACHE]) if CACHE in read else (self.like,)

    def control(self, run: Run) -> Control | None:
        """Return the taught stage that this one repeats without its teacher."""
        like = None if self.like is None else stages_of(run)[self.like]
        if self.like is None or like is None or like.learns_from() is None:
            return None
        if (like.starts_from(), like.keeps_layers()) != (self.model, self.keeps_layers()):
            return None  # another model
        return Control(self.like, "compute" if self.match_compute else "tokens")

    def is_split(self, run: Run) -> bool:
        """Return whether there are steps to share."""
        return self.trains(run)

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        check_training(self, key, run)
        if self.match_compute and self.like is None:
            raise UserError(f"{key}.match_compute", "needs a stage to match", f"set {key}.like")
        matched = run.stages.get(self.like or "") if self.match_compute else None
        if isinstance(matched, TrainingOverrides) and training_settings(matched, run).steps == 0:
            raise UserError(
                f"{key}.match_compute",
                f"{self.like} takes no steps to match",
                "give it steps above 0",
            )
        for name in ("steps", "epochs"):
            if self.match_compute and getattr(self, name) is not None:
                raise UserError(
                    f"{key}.{name}", "is computed where match_compute is set", f"drop {key}.{name}"
                )

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Train and leave the model in `ctx.out`."""
        from pipeline.stages.training import run_training

        return run_training(self, inputs, ctx)

    def planned(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output | None:
        """Return the FLOPs of its batches."""
        from pipeline.stages.training import planned_flops

        return planned_flops(self, inputs, ctx)
