"""Quantize: store a model in 16 bits (torch), or its linear layers in 8 or 4 bits (bitsandbytes,
torchao).

What it does: weights in `format`, saved before any forward pass and proven bit-equal after a reload
in a fresh process. `bf16` and `fp16` take the whole model; the others leave embeddings alone.
When it helps: memory, nearly always; speed, only where this device has units or kernels for the
format. The comparison pass measures it, against the best 16-bit form where the recipe has one
(`base: best_16_bit`).
Where the format loses more than `tolerance` on validation, fallbacks are tried: 16 bits of the
whole model, where the device has units for them; then those of `recover` in order: formats that
keep more (`format`), adapters trained with fake quantization in the forward pass (`lora`), all
weights so trained (`qat`). The first that is within the tolerance is published; else the 16 bits,
if they are within it.
Settings worth changing: format; exclude (layers that suffer); smoothing, with formats that quantize
activations (int8, int8_dynamic); recover, with lora.steps and qat.steps.
Source: Dettmers et al. 2022, arXiv 2208.07339 (int8); Dettmers et al. 2023, arXiv 2305.14314 (NF4);
Xiao et al. 2022, arXiv 2211.10438 (smoothing); quantization/ao.py for torchao's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.quantization import (
    SIXTEEN_BITS,
    Fallback,
    Format,
    LoraSettings,
    QatSettings,
)
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import Compile
from pipeline.errors import UserError
from pipeline.ledger.numbers import percents_apart
from pipeline.ledger.shapes import RecoveryRecord
from pipeline.stages.base import MODEL, Attempts, PrecisionInForce, Stage, refusal_words
from pipeline.stages.conversion import Conversion
from pipeline.stages.fallbacks import BETTER, FormatFallback, Published, TrainedFallback

if TYPE_CHECKING:
    from pipeline.stages.context import Output
    from pipeline.store.artifacts import Artifact

# recovery: what keeps weights in fp32
TRAINED_IN = (Precision.fp32, Precision.tf32, Precision.bf16, Precision.fp16)
SEARCH = "search"  # the first fallback of format=auto
AnyFallback = FormatFallback | TrainedFallback


@dataclass(kw_only=True, slots=True)
class QuantizeStage(Conversion):
    """Settings of a `quantize` stage."""

    # Where more than `tolerance` is lost:
    # what is tried, in order (format, lora, qat); empty: nothing
    recover: list[Fallback] = field(default_factory=list)
    lora: LoraSettings = field(default_factory=LoraSettings)
    qat: QatSettings = field(default_factory=QatSettings)

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 4

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        Conversion.check(self, key, run)
        self._check_recovery(key, run)

    def _check_recovery(self, key: str, run: Run) -> None:
        if len(set(self.recover)) < len(self.recover):
            raise UserError(f"{key}.recover", "names one twice", "give each once")
        for fallback, settings in ((Fallback.lora, self.lora), (Fallback.qat, self.qat)):
            own = f"{key}.{fallback.value}"
            if fallback not in self.recover:
                if settings != type(settings)():
                    raise UserError(
                        own,
                        f"has no effect without {fallback.value} in recover",
                        f"add it to {key}.recover",
                    )
                continue
            precision = settings.precision or run.precision.name
            if precision not in (*TRAINED_IN, Precision.native):
                known = ", ".join(each.value for each in TRAINED_IN)
                raise UserError(
                    f"{own}.precision", f"{precision.value} is not for this", f"give one of {known}"
                )
            if settings.steps is None and run.training.steps == 0:
                raise UserError(
                    f"{own}.steps", "training.steps is 0, and this trains", "give a number of steps"
                )
        if Fallback.format in self.recover and self.format is Format.auto:
            raise UserError(
                f"{key}.recover",
                "with format: auto the search is that one",
                "leave format out of it",
            )

    def recovers(self) -> bool:
        """Return whether fallbacks are tried."""
        return bool(self.recover)

    def sets_of_training(self, name: str, run: Run) -> bool | None:
        """Return False where a fallback trains by `training.*`."""
        return False if self.recover else None

    def precisions(self, key: str, run: Run) -> list[PrecisionInForce]:
        """Return those of the fallbacks that train."""
        found: list[PrecisionInForce] = []
        for fallback in self.recover:
            if fallback is not Fallback.format:
                own = self.lora if fallback is Fallback.lora else self.qat
                is_own, chosen = own.precision is not None, own.precision or run.precision.name
                setting = f"{key}.{fallback.value}.precision" if is_own else "precision"
                found.append(PrecisionInForce(setting, chosen, is_own))
        return found

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return what decides the conversion; with fallbacks to try, it is not what is made."""
        settings = Conversion.key_settings(self, run, inputs)
        left_out = ("recover", "lora", "qat")
        return {name: value for name, value in settings.items() if name not in left_out}

    def fallbacks(self, name: str) -> dict[str, Stage]:
        """Return all that may be tried, 16 bits of the whole model among them."""
        if not self.recover:
            return {}
        return {**dict(_in_order(name, self)), **_sixteen_bits(name, self)}

    def settle(self, name: str, attempts: Attempts) -> Stage | None:
        """Try the fallbacks in order until one is within the tolerance."""
        if not self.recover or attempts.unavailable(self) is not None:
            return self
        return _Trial(name, self, attempts).run()


def _in_order(name: str, stage: QuantizeStage) -> Iterator[tuple[str, AnyFallback]]:
    """Yield the fallbacks by the arm each has, in the order they are tried: what was asked for
    first.
    """
    first = _conversion(stage)
    yield f"{name}/{SEARCH if stage.format is Format.auto else stage.format.value}", first
    for fallback in stage.recover:
        if fallback is Fallback.format:
            for fmt in BETTER.get(stage.format, ()):
                yield f"{name}/{fmt.value}", replace(first, format=fmt)
        else:
            yield f"{name}/{fallback.value}", _training(stage, fallback)


def _sixteen_bits(name: str, stage: QuantizeStage) -> dict[str, FormatFallback]:
    """Return 16 bits of the whole model, of which a device does one best; a search tries them
    itself.
    """
    if stage.format in (Format.auto, *SIXTEEN_BITS):
        return {}
    whole = replace(
        _conversion(stage),
        include=[],
        exclude=[],
        quantize_head=False,
        smoothing=None,
        calibration=None,
    )
    return {f"{name}/{fmt.value}": replace(whole, format=fmt) for fmt in SIXTEEN_BITS}


def _conversion(stage: Conversion) -> FormatFallback:
    """Return the conversion alone: what it makes does not depend on what is tried after it."""
    own = {each.name: getattr(stage, each.name) for each in fields(FormatFallback)}
    own |= {"optional": False}
    if stage.format is not Format.auto:
        own["tolerance"] = None
    return FormatFallback(**own)


def _training(stage: QuantizeStage, fallback: Fallback) -> TrainedFallback:
    own = stage.lora if fallback is Fallback.lora else stage.qat
    return TrainedFallback(
        fallback=fallback,
        into=_conversion(stage),
        model=stage.model,
        teacher=stage.model,
        allow_weak_teacher=True,
        compile=Compile.never,
        **{each.name: getattr(own, each.name) for each in fields(own)},
    )


@dataclass(slots=True)
class _Trial:
    """One stage's fallbacks being tried, for one seed."""

    name: str
    stage: QuantizeStage
    attempts: Attempts
    made: list[str] = field(default_factory=list)
    refused: list[Exception] = field(default_factory=list)
    not_here: dict[Format, str] = field(default_factory=dict)

    def run(self) -> Stage | None:
        """Return a copy of the first fallback that is within the tolerance, or of the model.

        Returns:
            None where an optional stage has no fallback that could be made: it is skipped.

        Raises:
            UserError, StageFailed: Why the first fallback could not be made, where none could.
        """
        # First, so that there is something to publish where no fallback holds.
        sixteen = self._try_sixteen_bits()
        ahead = list(_in_order(self.name, self.stage))
        while ahead:
            arm, fallback = ahead.pop(0)
            output = self._try(arm, fallback)
            if output is None:
                continue
            self.made.append(arm)
            if (read := output.about.get("recovery")) is not None:
                if self._is_within(arm, read):
                    return self._publish(arm)
            # a search that found nothing: what came nearest is resumed from
            elif isinstance(fallback, FormatFallback):
                nearest = self._nearest(output)
                # Without the first: that format was just measured by the search.
                ahead = [] if nearest is None else list(_in_order(self.name, nearest))[1:]
        if not self.made and self.refused:
            if not self.stage.optional:
                raise self.refused[0]
            self.attempts.skip_stage(refusal_words(self.name, self.refused[0]))
            return None
        return self._publish(sixteen, last_resort=sixteen is not None)

    def _publish(self, chosen: str | None, *, last_resort: bool = False) -> Published:
        return Published(
            model=self.stage.model,
            made=self.made,
            chosen=chosen,
            last_resort=last_resort,
            optional=self.stage.optional,
        )

    def _try(self, arm: str, fallback: AnyFallback) -> Output | None:
        """Bring a fallback to its row; None where it was not made, which its row explains."""
        unable = None
        if isinstance(fallback, TrainedFallback):
            unable = self.not_here.get(fallback.into.format)
        elif self.made:
            inputs = {MODEL: self.attempts.artifact(fallback.model)}
            unable = fallback.unable(self.attempts.run, self.attempts.device, inputs)
        if unable is not None:
            self.attempts.skip(arm, fallback, unable)
            return None
        failed = self.attempts.attempt(arm, fallback)
        if failed is not None:
            self.refused.append(failed)
            if isinstance(fallback, FormatFallback):
                # Training into a format that this model does not run in would be in vain.
                self.not_here[fallback.format] = refusal_words(arm, failed)
        return self.attempts.made(arm)

    def _try_sixteen_bits(self) -> str | None:
        """Make 16 bits of the whole model, where the device has units; return the arm where it is
        within the tolerance.
        """
        from pipeline.models.sixteen_bits import best_first, has_units

        best = best_first(self.attempts.device)[0]
        forms = _sixteen_bits(self.name, self.stage).items()
        found = [(arm, form) for arm, form in forms if form.format is best]
        if not found or not has_units(best, self.attempts.device):
            return None
        arm, form = found[0]
        # where it fails its row says why, and the others are tried
        output = None if self.attempts.attempt(arm, form) is not None else self.attempts.made(arm)
        if output is None:
            return None
        self.made.append(arm)
        read = output.about.get("recovery")
        return arm if read is not None and self._is_within(arm, read) else None

    def _is_within(self, arm: str, read: RecoveryRecord) -> bool:
        """Say what a fallback loses on validation, and return whether that is allowed."""
        loss = read["loss"]
        allowed = self.stage.allowed(self.attempts.run)
        if loss is None:
            self.attempts.say(f"{arm}: its loss on validation is no number")
            return False
        lost, most = percents_apart(loss, allowed)
        self.attempts.say(f"{arm}: loses {lost} on validation where {most} is allowed")
        return loss <= allowed

    def _nearest(self, output: Output) -> QuantizeStage | None:
        """Return the stage with the format that its search would have taken, had it been within the
        tolerance.
        """
        search = output.about.get("search")
        missed = None if search is None else search["next"]
        if missed is None:
            return None
        found = self.stage.settled(Format(missed["format"]), missed["exclude"])
        assert isinstance(found, QuantizeStage)
        return found
