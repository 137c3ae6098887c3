"""Release: take an artifact as it was released, to be assessed and served beside another one.

What it does: brings the artifact that `candidate` or `baseline` refers to into the store, bytes
    unchanged; trains
nothing. When it helps: in `recipe=release_check`, whose two arms it makes. Settings worth changing:
    none; give the references on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.config.settings import Run
from pipeline.errors import UserError
from pipeline.stages.settings import TrainingOverrides

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact

CANDIDATE, BASELINE = "candidate", "baseline"


@dataclass(kw_only=True, slots=True)
class ReleaseStage:
    """Settings of a `release` stage; its name says which reference it takes."""

    optional: bool = False

    type: ClassVar[str] = "release"
    version: ClassVar[int] = 1

    def reads(self, run: Run) -> list[str]:
        """Return the arms this stage reads: none of this run's."""
        return []

    def check(self, key: str, run: Run) -> None:
        """Refuse a release that nothing refers to, or that stands among stages that make models.

        Raises:
            UserError: Naming the setting.
        """
        name = key.rpartition(".")[2]
        if name not in (CANDIDATE, BASELINE):
            raise UserError(
                key, "is neither candidate nor baseline", "name it so: a gate compares these two"
            )
        if any(isinstance(stage, TrainingOverrides) for stage in run.stages.values()):
            raise UserError(
                key, "stands beside stages that train", "give a release a recipe of its own"
            )

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Leave the artifact's files in `ctx.out`, as hard links where the disk allows."""
        from pipeline.ledger.record import COUNTS
        from pipeline.ledger.values import null
        from pipeline.stages.context import Output
        from pipeline.store.artifacts import MANIFEST, bring

        source = ctx.released
        assert source is not None, "a run with a release stage resolves its references first"
        with ctx.clock.phase("convert"):
            for path in sorted(source.rglob("*")):
                target = ctx.out / path.relative_to(source)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                elif path.name != MANIFEST:
                    bring(path, target)
        return Output(
            existing=True,
            counts=dict.fromkeys(COUNTS, null("a release is taken as it is: nothing is trained")),
        )
