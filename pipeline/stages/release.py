"""Release: take an artifact as it was released, to be assessed and served beside another one.

What it does: brings the artifact that `candidate` or `baseline` refers to into the store, bytes
unchanged. It trains nothing.
When it helps: in `recipe=release_check`, whose two arms it makes.
Settings worth changing: none; give the references on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.config.arms import BASELINE, CANDIDATE
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.stages.base import RELEASE, Reference, Stage, stages_of

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact


@dataclass(kw_only=True, slots=True)
class ReleaseStage(Stage):
    """Settings of a `release` stage; its name says which reference it takes."""

    type: ClassVar[str] = "release"
    version: ClassVar[int] = 1

    def references(self, run: Run) -> dict[str, Reference]:
        """Return no other arm: it is given a release."""
        return {}

    def takes_release(self) -> bool:
        """Return True."""
        return True

    def leaves_model(self, run: Run) -> bool:
        """Return True."""
        return True

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
        if any(
            stage.sets_of_training("steps", run) is not None for stage in stages_of(run).values()
        ):
            raise UserError(
                key, "stands beside stages that train", "give a release a recipe of its own"
            )

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Leave the artifact's files in `ctx.out`, as hard links where the disk allows."""
        from pipeline.ledger.record import COUNTS
        from pipeline.ledger.values import null
        from pipeline.stages.context import Output
        from pipeline.store.artifacts import MANIFEST, bring

        source = inputs[RELEASE].path
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
