"""What is tried where a quantized model loses more than is allowed: other formats, or training.

Every fallback is a stage of its own with an arm (`int8/lora`), a row, a key and a charge, and
reports what it loses on validation in place of an assessment. What a stage comes to is a copy of
one of them, assessed on the test split as any other: nothing was chosen there.
Source: `quantization/fake.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from pipeline.config.settings.quantization import Fallback, Format
from pipeline.config.settings.run import Run
from pipeline.ledger.shapes import RecoveryRecord
from pipeline.stages.base import MODEL, Reference, Stage
from pipeline.stages.conversion import NOTHING_HOLDS, Conversion, read_with
from pipeline.stages.distill_settings import DistillSettings
from pipeline.store.artifacts import MANIFEST, copy_model, read_json

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045

BETTER: dict[Format, tuple[Format, ...]] = {
    Format.bf16: (Format.fp16,),
    Format.fp16: (Format.bf16,),
    Format.fp4: (Format.nf4, Format.int8_weight_only),
    Format.fp4_double: (Format.nf4, Format.int8_weight_only),
    Format.nf4: (Format.int8_weight_only,),
    Format.nf4_double: (Format.nf4, Format.int8_weight_only),
    Format.int4_weight_only: (Format.int8_weight_only,),
    Format.int8: (Format.int8_weight_only,),
    Format.int8_dynamic: (Format.int8_weight_only,),
    Format.float8_dynamic: (Format.float8_weight_only, Format.int8_weight_only),
    Format.float8_weight_only: (Format.int8_weight_only,),
}
"""By format, those that keep more, the least change first: more bits, or activations left alone."""


@dataclass(kw_only=True, slots=True)
class FormatFallback(Conversion):
    """A format, and how far it moves the model on validation."""

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 4

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return its settings, and what decides the reading."""
        return {**Conversion.key_settings(self, run, inputs), **read_with(run)}

    def may_be_refused(self) -> bool:
        """Return True: others are tried then."""
        return True

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Quantize, leave the model in `ctx.out`, and read it."""
        done = Conversion.run(self, inputs, ctx)
        return read_output(done, inputs[MODEL], ctx) if "quantization" in done.about else done


@dataclass(kw_only=True, slots=True)
class TrainedFallback(DistillSettings):
    """Distillation from the unquantized model with fake quantization in the forward pass: of
    adapters (lora), or of all weights (qat).
    """

    fallback: Fallback = Fallback.lora
    # the format, and which layers
    into: FormatFallback = field(default_factory=lambda: FormatFallback())
    rank: int = 16
    alpha: float = 32.0

    type: ClassVar[str] = "recover"
    version: ClassVar[int] = 3

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return its settings, those of the format, and what decides the reading."""
        into = self.into.key_settings(run, inputs)
        own = DistillSettings.key_settings(self, run, inputs)
        return {**own, "into": into, **read_with(run)}

    def libraries(self, run: Run) -> list[str]:
        """Return that of the format."""
        return [*DistillSettings.libraries(self, run), *self.into.libraries(run)]

    def may_be_refused(self) -> bool:
        """Return True: others are tried then."""
        return True

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Train, quantize, leave the model in `ctx.out`, and read it."""
        from pipeline.quantization.fake import Adapters
        from pipeline.stages.recovering import run_recovery

        adapters = Adapters(self.rank, self.alpha) if self.fallback is Fallback.lora else None
        made = run_recovery(self, self.into, adapters, inputs, ctx)
        if not ctx.ranks.is_first:
            return made
        return read_output(made, inputs[MODEL], ctx)


@dataclass(kw_only=True, slots=True)
class Published(Stage):
    """What a quantize stage comes to: a copy of the fallback that holds, or of the model it started
    from.
    """

    model: str
    made: list[str]  # fallbacks that were made, in order; the stage is charged with all
    chosen: Optional[str]  # null: none is within the tolerance
    last_resort: bool = False  # what was chosen are the 16 bits that were made first

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 3

    def references(self, run: Run) -> dict[str, Reference]:
        """Return the model, and every fallback that was made."""
        made = {f"fallback {arm}": Reference(arm, "recover") for arm in self.made}
        return {MODEL: Reference(self.model, MODEL), **made}

    def starts_from(self) -> str | None:
        """Return the model."""
        return self.model

    def check(self, key: str, run: Run) -> None:
        """Refuse nothing: no recipe places it."""

    def may_be_refused(self) -> bool:
        """Return whether it is optional."""
        return self.optional

    def left_unchanged(self, output: Output) -> str | None:
        """Return why the model stays in the numbers that it had, or None."""
        return None if "quantization" in output.about else NOTHING_HOLDS

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Leave the model in `ctx.out`."""
        from pipeline.stages.context import Output

        source = inputs[MODEL if self.chosen is None else f"fallback {self.chosen}"].path
        with ctx.clock.phase("convert"):
            copy_model(source, ctx.out)
        said = f"is {self.chosen}" if self.chosen else f"stays as {self.model} is: {NOTHING_HOLDS}"
        said = f"{said}: no other fallback is within the tolerance" if self.last_resort else said
        made = (read_json(source / MANIFEST) or {}).get("quantization") if self.chosen else None
        return Output(
            notes=(f"{ctx.stage}: {said}",), about={} if made is None else {"quantization": made}
        )


def read_output(done: Output, source: Artifact, ctx: Context) -> Output:
    """Return `done` with what the model in `ctx.out` loses against its source, on validation."""
    from pipeline.quantization.search import finite
    from pipeline.quantization.yardstick import Yardstick

    with ctx.clock.phase("eval"):
        yard = Yardstick(
            source.path, ctx.run, ctx.data, ctx.device, read_with(ctx.run)["sequence_length"]
        )
        loss, kl = yard.read(ctx.out)
    read: RecoveryRecord = {
        "loss": finite(loss),
        "kl": finite(kl),
        "documents": len(yard.validation),
    }
    return replace(done, about={**done.about, "recovery": read})
