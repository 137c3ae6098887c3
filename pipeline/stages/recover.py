"""Recovery: what a quantize stage does where its format loses more than is allowed, rung by rung.

What it does: sixteen bits first, where the device has units for them: what is left where nothing
    else holds. Then the format as it was asked for, then those of `recover` in order: formats that
    keep more (`format`), adapters trained inside the rounding and merged (`lora`),
    quantization-aware distillation of all weights (`qat`), both from the unquantized model; the
    first that holds the tolerance on validation is kept, else the 16 bits, if they hold it. Every
    rung is a stage of its own, `int8/lora`, with its own row, key and charge; the stage itself then
    only takes over what was found, and is assessed on the test split as any other, so that nothing
    was chosen there. When it helps: a format of 4 bits, or
a small model. Settings worth changing: tolerance; lora.steps, qat.steps.
Source: `quantization/fake.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from pipeline.config.arms import stage_name
from pipeline.config.settings import SIXTEEN_BITS, Format, LoraSettings, QatSettings, Run, Rung
from pipeline.stages.distill import DistillStage
from pipeline.stages.quantize import QuantizeStage, copy_model, read_with
from pipeline.store.artifacts import MANIFEST, read_json

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
SEARCH = "search"  # the first rung of format=auto


@dataclass(kw_only=True, slots=True)
class FormatRung(QuantizeStage):
    """A format, and how far it moves the model on validation."""

    def searched(self, run: Run) -> dict[str, Any]:
        """Return what decides how it ends beside its settings."""
        return {**QuantizeStage.searched(self, run), **read_with(run)}

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Quantize, leave the model in `ctx.out`, and read it."""
        done = QuantizeStage.run(self, inputs, ctx)
        return read_output(done, inputs[self.model], ctx) if "quantization" in done.about else done


@dataclass(kw_only=True, slots=True)
class RecoverStage(DistillStage):
    """Training of a quantized model towards the unquantized one: of adapters (lora), or of its own
    weights (qat).
    """

    rung: Rung = Rung.lora
    into: QuantizeStage = field(default_factory=QuantizeStage)  # the format, and which layers
    rank: int = 16
    alpha: float = 32.0

    type: ClassVar[str] = "recover"
    version: ClassVar[int] = 2

    def searched(self, run: Run) -> dict[str, Any]:
        """Return what decides how it ends beside its settings."""
        return read_with(run)

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Train, quantize, leave the model in `ctx.out`, and read it."""
        from pipeline.stages.recovering import run_recovery

        return read_output(run_recovery(self, inputs, ctx), inputs[self.model], ctx)


@dataclass(kw_only=True, slots=True)
class RecoveredStage:
    """What a quantize stage comes to after its rungs: the model of the one that held, or the one it
    started from.
    """

    model: str
    rungs: list[str]  # that were made, in order
    chosen: Optional[str]  # null: none held
    last_resort: bool = False  # what was chosen are the 16 bits that were made first

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 2

    def reads(self, run: Run) -> list[str]:
        """Return the arms this stage reads."""
        return [self.model, *self.rungs]

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Leave the model in `ctx.out`."""
        from pipeline.stages.context import Output

        source = inputs[self.chosen or self.model].path
        with ctx.clock.phase("convert"):
            copy_model(source, ctx.out)
        kept = (
            f"is {self.chosen}"
            if self.chosen
            else f"stays as {self.model} is: no rung holds the tolerance"
        )
        kept = f"{kept}: no other rung holds the tolerance" if self.last_resort else kept
        made = (read_json(source / MANIFEST) or {}).get("quantization") if self.chosen else None
        return Output(
            notes=(f"{ctx.stage}: {kept}",), about={} if made is None else {"quantization": made}
        )


AnyRung = FormatRung | RecoverStage


def stage_of(run: Run, arm: str) -> Any:
    """Return the stage behind an arm's rows, be it a rung; from the settings alone."""
    name = stage_name(arm)
    stage = run.stages[name]
    return stage if name == arm else dict([*rungs(name, stage), *sixteen_rungs(name, stage)])[arm]


def sixteen_rungs(name: str, stage: QuantizeStage) -> Iterator[tuple[str, FormatRung]]:
    """Yield the rungs that a ladder may begin with: 16 bits of the whole model, one of which a
    device does best.
    """
    whole = replace(
        _format_rung(stage),
        include=[],
        exclude=[],
        quantize_head=False,
        smoothing=None,
        calibration=None,
    )
    if stage.format not in (Format.auto, *SIXTEEN_BITS):  # a search tries them itself
        for fmt in SIXTEEN_BITS:
            yield f"{name}/{fmt.value}", replace(whole, format=fmt)


def rungs(name: str, stage: QuantizeStage) -> Iterator[tuple[str, AnyRung]]:
    """Yield the rungs of a stage by the arm each has, in the order they are climbed, what was asked
    for first.
    """
    first = _format_rung(stage)
    yield f"{name}/{SEARCH if stage.format is Format.auto else stage.format.value}", first
    for rung in stage.recover:
        if rung is Rung.format:
            for fmt in BETTER.get(stage.format, ()):
                yield f"{name}/{fmt.value}", replace(first, format=fmt)
        else:
            yield f"{name}/{rung.value}", _training_rung(stage, rung)


def _format_rung(stage: QuantizeStage) -> FormatRung:
    """Return the stage without its ladder: what it makes does not depend on that."""
    own: dict[str, Any] = _by_name(stage) | {
        "recover": [],
        "lora": LoraSettings(),
        "qat": QatSettings(),
        "optional": False,
    }
    own["tolerance"] = stage.tolerance if stage.format is Format.auto else None
    return FormatRung(**own)


def _training_rung(stage: QuantizeStage, rung: Rung) -> RecoverStage:
    own = stage.lora if rung is Rung.lora else stage.qat
    return RecoverStage(
        rung=rung,
        into=_format_rung(stage),
        model=stage.model,
        teacher=stage.model,
        insist=True,
        compile=False,
        **_by_name(own),
    )


def _by_name(settings: Any) -> dict[str, Any]:
    return {each.name: getattr(settings, each.name) for each in fields(settings)}


def found_format(stage: QuantizeStage, about: Mapping[str, Any]) -> QuantizeStage | None:
    """Return `stage` with the format that its search would have taken, had it held; None where none
    pays.

    Args:
        about: Of the search's output.
    """
    missed = about["search"]["next"]
    if missed is None:
        return None
    return stage.settled(Format(missed["format"]), missed["exclude"])


def read_output(done: Output, source: Artifact, ctx: Context) -> Output:
    """Return `done` with what the model in `ctx.out` loses against its source, on validation."""
    from pipeline.quantization.search import finite
    from pipeline.quantization.yardstick import Yardstick

    with ctx.clock.phase("eval"):
        yard = Yardstick(
            source.path, ctx.run, ctx.data, ctx.device, read_with(ctx.run)["sequence_length"]
        )
        loss, kl = yard.read(ctx.out)
    read = {"loss": finite(loss), "kl": finite(kl), "documents": len(yard.validation)}
    return replace(done, about={**done.about, "recovery": read})
