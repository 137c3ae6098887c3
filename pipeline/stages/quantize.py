"""Quantize: store a model in 16 bits (torch), or its linear layers in 8 or 4 (bitsandbytes,
torchao).

What it does: weights in `format`, saved before any forward pass and proven bit-equal after a reload
    in a fresh process. `bf16` and `fp16` take the whole model; the others leave embeddings alone.
    When it helps: memory, nearly always; speed, only where this device has units or kernels for it,
    which is why the comparison pass measures it, against the best 16-bit form where the recipe has
    one (`base: best_16_bit`). Settings worth changing: format; exclude (layers that suffer);
    smoothing, with formats that quantize activations (int8, int8_dynamic); recover (what to do
    where the
format loses too much: `recover.py`).
Source: Dettmers et al. 2022, arXiv 2208.07339 (int8); Dettmers et al. 2023, arXiv 2305.14314 (NF4);
    Xiao et al. 2022, arXiv 2211.10438 (smoothing); quantization/ao.py for torchao's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from pipeline.config.arms import stage_name
from pipeline.config.settings import (
    SIXTEEN_BITS,
    Format,
    LoraSettings,
    Precision,
    Prefer,
    QatSettings,
    Run,
    Rung,
    at_least_0,
    fraction,
    positive,
)
from pipeline.errors import UserError
from pipeline.stages.settings import BASE
from pipeline.store.artifacts import MANIFEST

if TYPE_CHECKING:
    from pipeline.data.documents import Document
    from pipeline.quantization.layers import Choice
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045

CALIBRATION_DOCUMENTS = 32
# recovery: what keeps weights in fp32
TRAINED_IN = (Precision.fp32, Precision.tf32, Precision.bf16, Precision.fp16)


@dataclass(kw_only=True, slots=True)
class QuantizeStage:
    """Settings of a `quantize` stage."""

    optional: bool = False
    model: str = BASE  # base, or an earlier stage
    format: Format = Format.int8  # of the weights; auto searches for one
    # patterns of layers to quantize (*.mlp.*); empty: all of the body
    include: list[str] = field(default_factory=list)
    # patterns of layers that are left alone all the same
    exclude: list[str] = field(default_factory=list)
    quantize_head: bool = False  # the output head as well, where it is not the embedding
    # moves outliers of activations into weights: 0.5; null: not
    smoothing: Optional[float] = fraction(None)
    # file of documents that smoothing looks at; null: the first of train
    calibration: Optional[str] = None
    calibration_documents: int = positive(CALIBRATION_DOCUMENTS)  # that smoothing looks at
    # largest loss of quality on validation; null: quality.margin
    tolerance: Optional[float] = at_least_0(None)
    # Of format=auto:
    # formats to try; empty: all that work here
    candidates: list[Format] = field(default_factory=list)
    prefer: Prefer = Prefer.time  # what to save
    search_device_hours: Optional[float] = positive(None)  # null: all candidates are tried
    # Where more than `tolerance` is lost:
    # what is tried, in order (format, lora, qat); empty: nothing
    recover: list[Rung] = field(default_factory=list)
    lora: LoraSettings = field(default_factory=LoraSettings)
    qat: QatSettings = field(default_factory=QatSettings)

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 3

    def reads(self, run: Run) -> list[str]:
        """Return the arms this stage reads."""
        return [self.model]

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        from pipeline.quantization.backend import LIBRARIES

        search = self.format is Format.auto
        if Format.auto in self.candidates:
            raise UserError(
                f"{key}.candidates", "auto is no format to try", "name formats, or leave it empty"
            )
        for fmt in self.candidates if search else [self.format]:
            if find_spec(LIBRARIES[fmt]) is None:
                where = "candidates" if search else "format"
                raise UserError(
                    f"{key}.{where}",
                    f"{fmt.value} needs {LIBRARIES[fmt]}, which is not installed",
                    "pip install -e '.[quant]'",
                )
        for name, default in (
            ("candidates", []),
            ("search_device_hours", None),
            ("prefer", Prefer.time),
        ):
            if not search and getattr(self, name) != default:
                raise UserError(
                    f"{key}.{name}",
                    f"has no effect with format: {self.format.value}",
                    "give format=auto",
                )
        if self.tolerance is not None and not search and not self.recover:
            problem = f"has no effect with format: {self.format.value} and nothing to recover with"
            raise UserError(
                f"{key}.tolerance", problem, "give format=auto, or recover: [format, lora, qat]"
            )
        for name, default in (
            ("calibration", None),
            ("calibration_documents", CALIBRATION_DOCUMENTS),
        ):
            if self.smoothing is None and getattr(self, name) != default:
                raise UserError(
                    f"{key}.{name}", "has no effect without smoothing", f"give {key}.smoothing=0.5"
                )
        if search and self.smoothing is not None:
            raise UserError(
                f"{key}.smoothing",
                "has no effect with format: auto",
                "give the format that was found",
            )
        if self.format in SIXTEEN_BITS:
            self._check_whole(key)
        self._check_recovery(key, run)

    def _check_whole(self, key: str) -> None:
        """Refuse settings of single layers in a format that takes the whole model."""
        own = {"include": [], "exclude": [], "quantize_head": False, "smoothing": None}
        for name, default in own.items():
            if getattr(self, name) != default:
                problem = (
                    f"has no effect with format: {self.format.value}, which takes the whole model"
                )
                raise UserError(f"{key}.{name}", problem, "leave it out")

    def _check_recovery(self, key: str, run: Run) -> None:
        if len(set(self.recover)) < len(self.recover):
            raise UserError(f"{key}.recover", "names a rung twice", "give each once")
        for rung, settings in ((Rung.lora, self.lora), (Rung.qat, self.qat)):
            own = f"{key}.{rung.value}"
            if rung not in self.recover:
                if settings != type(settings)():
                    raise UserError(
                        own,
                        f"has no effect without {rung.value} in recover",
                        f"add it to {key}.recover",
                    )
                continue
            precision = settings.precision or run.precision.name
            if precision not in TRAINED_IN:
                known = ", ".join(each.value for each in TRAINED_IN)
                raise UserError(
                    f"{own}.precision", f"{precision.value} is not for this", f"give one of {known}"
                )
            if settings.steps is None and run.training.steps == 0:
                raise UserError(
                    f"{own}.steps", "training.steps is 0, and this trains", "give a number of steps"
                )
        if Rung.format in self.recover and self.format is Format.auto:
            raise UserError(
                f"{key}.recover",
                "with format: auto the search is that rung",
                "leave format out of it",
            )

    def searched(self, run: Run) -> dict[str, Any]:
        """Return what decides how a search ends beside its settings; a part of the artifact's
        key.
        """
        if self.format is not Format.auto:
            return {}
        return {"tolerance": self.allowed(run), "load": run.serving.load, **read_with(run)}

    def allowed(self, run: Run) -> float:
        """Return the largest loss of the primary quality: a fraction of bits per byte, a difference
        of accuracy.
        """
        return run.quality.margin if self.tolerance is None else self.tolerance

    def choice(self) -> Choice:
        """Return which layers are to be quantized."""
        from pipeline.quantization.layers import Choice

        return Choice(tuple(self.include), tuple(self.exclude), self.quantize_head)

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Quantize and leave the model in `ctx.out`."""
        if self.format is Format.auto:
            return self._search(inputs, ctx)
        return self.convert(inputs[self.model].path, ctx, smoothed=self.smoothing is not None)

    def convert(self, source: Path, ctx: Context, *, smoothed: bool) -> Output:
        """Quantize `source` into `ctx.out` and prove the reload; `smoothed`: after smoothing."""
        from pipeline.models.sixteen_bits import units_said
        from pipeline.quantization.backend import quantize
        from pipeline.stages.context import Output

        done = quantize(
            source,
            ctx.out,
            self.format,
            ctx.run.task,
            device=ctx.device,
            key=setting(ctx, "format"),
            clock=ctx.clock,
            choice=self.choice(),
            prepare=(lambda model: self.smooth(model, source, ctx)) if smoothed else None,
        )
        units = units_said(self.format, ctx.device) if self.format in SIXTEEN_BITS else ""
        notes = (f"{ctx.stage}: {done.say()}", *([f"{ctx.stage}: {units}"] if units else []))
        return Output(
            notes=notes, about={"quantization": {**done.describe(), **self._calibrated(ctx)}}
        )

    def _search(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Find the format, and quantize in it; or leave the model as it is where none pays."""
        from pipeline.models.sixteen_bits import best_first
        from pipeline.quantization.backend import formats, why_not
        from pipeline.quantization.search import Searcher
        from pipeline.quantization.trials import Bench, able
        from pipeline.stages.context import Output

        source, key, started_ns = (
            inputs[self.model].path,
            setting(ctx, "format"),
            ctx.clock.now_ns(),
        )
        limit_h = self.search_device_hours

        def spent() -> bool:
            stop = ctx.should_stop()
            if stop is not None:
                raise stop(
                    "stopped while formats were tried; the same command starts the search again"
                )
            return limit_h is not None and (ctx.clock.now_ns() - started_ns) / 3.6e12 >= limit_h

        with ctx.clock.phase("search"):
            asked = self.candidates or formats()
            first = [fmt for fmt in best_first(ctx.device) if why_not(fmt, ctx.device) is None][:1]
            candidates, reasons = able(
                asked, source, ctx.run.task, device=ctx.device, choice=self.choice(), key=key
            )
            bench = Bench(
                source,
                ctx.run,
                ctx.data,
                ctx.device,
                self.choice(),
                key,
                ctx.clock,
                ctx.out.parent,
                _sequence_length(ctx.run),
            )
            searcher = Searcher(
                bench.measure, bench.sensitive, self.allowed(ctx.run), self.prefer, spent
            )
            found = searcher.run(candidates, [fmt for fmt in first if fmt not in candidates])
        said = [f"{ctx.stage}: tried {trial.say(self.allowed(ctx.run))}" for trial in found.trials]
        said += [f"{ctx.stage}: not tried: {reason}" for reason in (*reasons, *found.refused)]
        missed = found.missed
        about: dict[str, Any] = {
            "search": {
                "prefer": self.prefer.value,
                "tolerance": self.allowed(ctx.run),
                "why": found.why,
                "trials": [trial.to_json() for trial in found.trials],
                "next": None if missed is None else missed.to_json(),
            }
        }
        if found.best is None:
            with ctx.clock.phase("convert"):
                copy_model(source, ctx.out)
            kept = f"{ctx.stage}: stays as {self.model} is: {found.why}"
            return Output(notes=(*said, kept), about=about)
        done = self.settled(found.best.fmt, found.best.exclude).convert(source, ctx, smoothed=False)
        return replace(done, notes=(*said, *done.notes), about={**done.about, **about})

    def settled(self, fmt: Format, exclude: Sequence[str]) -> QuantizeStage:
        """Return this search's stage with a format in its place, and more layers left alone."""
        return replace(
            self,
            format=fmt,
            exclude=[*self.exclude, *exclude],
            candidates=[],
            prefer=Prefer.time,
            tolerance=None,
            search_device_hours=None,
        )

    def _looked_at(self, ctx: Context) -> Sequence[Document]:
        from pipeline.quantization.calibration import calibration_documents

        return calibration_documents(self, ctx.run, ctx.data, setting(ctx, "calibration"))

    def _calibrated(self, ctx: Context) -> dict[str, Any]:
        """Return what activations were looked at."""
        if self.smoothing is None:
            return {"calibration": None}
        from pipeline.data.completions import file_digest

        with ctx.clock.phase("prepare"):
            documents = self._looked_at(ctx)
            given = None if self.calibration is None else file_digest(self.calibration)
        source = self.calibration or f"train split of {ctx.data.name}"
        return {
            "calibration": {
                "smoothing": self.smoothing,
                "source": source,
                "documents": len(documents),
                **({} if given is None else {"digest": given}),
            }
        }

    def smooth(self, model: Any, source: Path, ctx: Context) -> None:
        """Move outliers of activations into the weights of `model`, in place; it looks at
        calibration documents.
        """
        import torch

        from pipeline.data.encode import encode_all
        from pipeline.models.load import example_length, load_config, load_tokenizer
        from pipeline.quantization.smoothing import smooth

        with ctx.clock.phase("prepare"):
            documents = self._looked_at(ctx)
            length = example_length(
                load_config(source), ctx.run.task, ctx.run.training.sequence_length
            )
            encoded = encode_all(documents, load_tokenizer(source), ctx.run.task, max_length=length)
            ids = [
                torch.from_numpy(each.input_ids[:length]).long()[None].to(ctx.device)
                for each in encoded
            ]
        with ctx.clock.phase("calibrate"):
            smooth(model, ids, strength=self.smoothing or 0.0, key=setting(ctx, "smoothing"))


def setting(ctx: Context, name: str) -> str:
    """Return the full key of a stage's setting, as refusals name it; a rung's settings are its
    stage's.
    """
    return f"stages.{stage_name(ctx.stage)}.{name}"


def read_with(run: Run) -> dict[str, Any]:
    """Return what decides a reading on validation."""
    return {
        "batch_size": run.quality.batch_size,
        "max_bytes": run.quality.max_bytes_per_document,
        "sequence_length": _sequence_length(run),
    }


def _sequence_length(run: Run) -> int:
    return run.quality.sequence_length or run.training.sequence_length


def copy_model(source: Path, out: Path) -> None:
    """Copy a model's files, but what the store says of them."""
    for file in source.iterdir():
        if file.is_file() and file.name != MANIFEST:
            shutil.copyfile(file, out / file.name)
