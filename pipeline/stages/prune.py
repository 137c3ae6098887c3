"""Prune: drop whole layers, those that validation misses least, and recover by distillation.

What it does: leaves out each layer in turn, reads the primary metric on validation without it, and
drops the one whose absence costs least; so again until `drop` layers are gone. The model that is
left is trained on the predictions of the one it was cut from. The trials are charged to the stage
(phase `search`), the losses of every trial stand in artifact.json.
When it helps: a deep model that is served often. It is a student whose layers were measured rather
than taken evenly (`student.layers`), at the price of the trials.
Settings worth changing: drop, steps, ce_weight.
Source: Kim et al. 2024, "Shortened LLaMA", arXiv 2402.02834, section 3.2 (perplexity criterion),
here one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional, TypedDict

from pipeline.config.arms import BASE
from pipeline.config.settings.ranges import positive
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.ledger.metrics import DIRECTION, PRIMARY
from pipeline.ledger.numbers import agreed, how_many
from pipeline.ledger.shapes import About
from pipeline.stages.base import BeforeRun, config_of
from pipeline.stages.distill_settings import DistillSettings
from pipeline.stages.settings import training_precision, training_settings
from pipeline.training.ranks import agreed_stop

if TYPE_CHECKING:
    import torch

    from pipeline.stages.context import Context, Output
    from pipeline.stages.training import Start
    from pipeline.store.artifacts import Artifact
    from pipeline.training.holding import Holding

# ruff: noqa: UP045

SHARE = 4  # one layer in so many is dropped where no number is given


class Pruned(TypedDict):
    """What was dropped, as artifact.json has it.

    `trials` holds, for every layer that was dropped, what the model read without each of those that
    were left.
    """

    layers: int
    dropped: list[int]
    trials: list[dict[int, float]]


class AboutPruned(About, total=False):
    """What this stage found out."""

    pruning: Pruned


@dataclass(kw_only=True, slots=True)
class PruneStage(DistillSettings):
    """Settings of a `prune` stage."""

    model: str = BASE  # is cut: base, or an earlier stage
    teacher: str = BASE  # best the very model that is cut
    drop: Optional[int] = positive(None)  # layers; null: a quarter of them

    type: ClassVar[str] = "prune"
    version: ClassVar[int] = 1
    word: ClassVar[str | None] = "pruned model"

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        DistillSettings.check(self, key, run)
        if training_settings(self, run).steps == 0:
            raise UserError(
                f"{key}.steps", "is 0, and what is left has to recover", "give a number of steps"
            )
        for name in ("cache", "stack"):
            if getattr(self, name) is not None:
                raise UserError(f"{key}.{name}", "does not go with dropping layers", "leave it out")

    def keeps_layers(self) -> bool:
        """Return False."""
        return False

    def makes_config(self, known: BeforeRun) -> Any | None:
        """Return that of what it cuts, with as many layers as are left: which go is yet to be
        found.
        """
        from pipeline.models.layers import cut_config, layer_count

        config = config_of(self.model, known)
        if config is None:
            return None
        total = layer_count(config)
        return cut_config(config, range(total - self.num_dropped(total, "drop")), "drop")

    def num_dropped(self, num_layers: int, key: str) -> int:
        """Return how many layers go.

        Raises:
            UserError: If none would be left.
        """
        count = max(1, num_layers // SHARE) if self.drop is None else self.drop
        if count >= num_layers:
            raise UserError(
                f"{key}.drop",
                f"{count} of {how_many(num_layers, 'layer')}"
                f" {agreed(count, 'leaves', 'leave')} none",
                "drop fewer",
            )
        return count

    def preflight(self, key: str, known: BeforeRun) -> None:
        """Refuse a model that cannot do with fewer layers; one that is made first is looked at when
        its turn comes.
        """
        from pipeline.models.layers import check_layers, layer_count

        config = config_of(self.model, known)
        if config is not None:
            total = layer_count(config)
            left = range(total - self.num_dropped(total, key))
            check_layers(config, known.run.task, left, f"{key}.drop")
        DistillSettings.preflight(self, key, known)

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Drop layers, train what is left, and leave it in `ctx.out`."""
        from pipeline.stages.training import run_training

        found: Pruned = {"layers": 0, "dropped": [], "trials": []}
        # A cut that reads as well as the whole model is what one hopes for, and no weak teacher.
        of_itself = self.allow_weak_teacher or self.teacher == self.model
        made = run_training(
            self,
            inputs,
            ctx,
            distill=replace(self, allow_weak_teacher=of_itself),
            start=lambda held: self._start(inputs, ctx, held, found),
        )
        said = f"{ctx.stage}: dropped layers {', '.join(map(str, found['dropped']))} of"
        said = f"{said} {found['layers']}"
        about: AboutPruned = {**made.about, "pruning": found}
        return replace(made, notes=(said, *made.notes), about=about)

    def _start(
        self, inputs: Mapping[str, Artifact], ctx: Context, held: Holding, found: Pruned
    ) -> Start:
        """Return the cut model, its tokenizer, and what saves it; `found` takes what was found."""
        from pipeline.models.layers import layer_count, with_layers
        from pipeline.models.load import save_model
        from pipeline.stages.training import start_weights

        key = f"stages.{ctx.stage}"
        model: Any
        model, tokenizer = start_weights(self.model, inputs, ctx, new_head=False)
        kept = list(range(layer_count(model.config)))
        found["layers"] = len(kept)

        def cut(chosen: Sequence[int], device: torch.device = ctx.device) -> Any:
            made: Any = with_layers(model, chosen, f"{key}.drop", scratch=ctx.out.parent)
            return made.to(device)

        with ctx.clock.phase("search"):
            for _ in range(self.num_dropped(len(kept), key)):
                read = self._trials(cut, kept, tokenizer, ctx)
                least_missed = min(read, key=lambda layer: read[layer])
                found["trials"].append(read)
                found["dropped"].append(least_missed)
                kept.remove(least_missed)
        left = held.made(lambda: cut(kept, held.device))
        return left, tokenizer, lambda trained: save_model(trained, tokenizer, ctx.out)

    def _trials(
        self, cut: Any, kept: Sequence[int], tokenizer: Any, ctx: Context
    ) -> dict[int, float]:
        """Return what the model reads without each layer; ranks try one layer each at a time.

        Raises:
            BudgetSpent, Preempted: If the run is to stop.
        """
        ranks, read = ctx.ranks, dict[int, float]()
        for start in range(0, len(kept), ranks.size):
            stop = agreed_stop(ctx.should_stop(), ranks)
            if stop is not None:
                raise stop(
                    "stopped while layers were tried; the same command starts the trials again"
                )
            own = kept[start : start + ranks.size][ranks.rank :][:1]  # none, of the last ranks
            found = {layer: self._reading(cut, kept, layer, tokenizer, ctx) for layer in own}
            with ctx.clock.phase("comm_wait") if ranks.several else nullcontext():
                for each in ranks.gathered(found):
                    read |= each
        return read

    def _reading(
        self, cut: Any, kept: Sequence[int], without: int, tokenizer: Any, ctx: Context
    ) -> float:
        """Return the primary metric on validation without a layer, smaller for better."""
        from pipeline.stages.training import validation_reading

        settings = training_settings(self, ctx.run)
        precision = training_precision(self, ctx.run)
        model = cut([layer for layer in kept if layer != without])
        metric = validation_reading(model, tokenizer, settings, precision, ctx)()
        return -DIRECTION[PRIMARY[ctx.run.task]] * metric
