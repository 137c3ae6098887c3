"""Conversion of a model to a number format: the settings and the work that `quantize` and its
fallbacks share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypedDict

from pipeline.config.arms import BASE, stage_name
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format, Prefer
from pipeline.config.settings.ranges import at_least_0, fraction, positive
from pipeline.config.settings.run import Run, scored_length
from pipeline.errors import UserError
from pipeline.ledger.shapes import About, CalibrationRecord
from pipeline.stages.base import (
    MODEL,
    BeforeRun,
    Reference,
    Stage,
    WarmUp,
    Workload,
    config_of,
    is_base_shaped,
    settings_of,
)
from pipeline.stages.settings import check_classes
from pipeline.store.artifacts import copy_model, plain
from pipeline.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    import torch

    from pipeline.data.documents import Document
    from pipeline.quantization.layers import Choice
    from pipeline.stages.context import Context, Output
    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045

NOTHING_HOLDS = "no fallback is within the tolerance"
CALIBRATION_DOCUMENTS = 32
LEAST_DOCUMENTS = 2  # of a rank: for less, each would load a model that it hardly uses


@dataclass(kw_only=True, slots=True)
class Conversion(Stage):
    """Settings of a conversion to a number format, searched for or named."""

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

    def references(self, run: Run) -> dict[str, Reference]:
        """Return the model that is quantized."""
        return {MODEL: Reference(self.model, MODEL)}

    def starts_from(self) -> str | None:
        """Return that model."""
        return self.model

    def reference(self) -> str | None:
        """Return that model: what the quantized one is read against."""
        return self.model

    def stored_format(self) -> Format | None:
        """Return the format; `auto` where it is searched for."""
        return self.format

    def recovers(self) -> bool:
        """Return whether something is tried where the format loses too much."""
        return False

    def workload(self, name: str, known: BeforeRun) -> Workload | None:
        """Return the model that it reads and writes again."""
        config = config_of(self.model, known)
        return None if config is None else Workload(config=config, precision=Precision.fp32)

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        from pipeline.quantization.backend import LIBRARIES

        check_classes(key, run)
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
        if self.tolerance is not None and not search and not self.recovers():
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

    def _check_whole(self, key: str) -> None:
        """Refuse settings of single layers in a format that takes the whole model."""
        own = {"include": [], "exclude": [], "quantize_head": False, "smoothing": None}
        for name, default in own.items():
            if getattr(self, name) != default:
                problem = (
                    f"has no effect with format: {self.format.value}, which takes the whole model"
                )
                raise UserError(f"{key}.{name}", problem, "leave it out")

    def is_split(self, run: Run) -> bool:
        """Return whether there are activations to look at: the other ranks do nothing else."""
        return self.smoothing is not None

    def files(self) -> dict[str, str]:
        """Return that of the documents that smoothing looks at."""
        return {} if self.calibration is None else {"calibration": self.calibration}

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return its settings, and what decides how a search ends."""
        from pipeline.data.completions import file_digest

        settings = settings_of(self, "optional")
        if self.calibration is not None:
            settings["calibration"] = file_digest(self.calibration)
        if self.format is Format.auto:
            # A search decides by quality and by serving, so both are part of what it makes.
            searched = {"tolerance": self.allowed(run), "load": run.serving.load}
            settings |= plain(searched | read_with(run))
        return settings

    def libraries(self, run: Run) -> list[str]:
        """Return those of the formats it may use."""
        from pipeline.quantization.backend import LIBRARIES

        named = self.candidates or list(LIBRARIES) if self.format is Format.auto else [self.format]
        return sorted({LIBRARIES[fmt] for fmt in named} - {"torch"})

    def refuse_device(self, key: str, run: Run, device: Any) -> None:
        """Refuse a format that this device cannot take."""
        from pipeline.quantization.backend import backend_of

        Stage.refuse_device(self, key, run, device)
        for setting, fmt in [] if self.optional else self._named_formats(key):
            backend_of(fmt).refuse_device(fmt, device=device, key=setting)

    def preflight(self, key: str, known: BeforeRun) -> None:
        """Refuse calibration documents that do not fit, and layers that a format cannot take."""
        from pipeline.quantization.calibration import calibration_documents

        if self.calibration is not None:
            calibration_documents(self, known.run, known.data, f"{key}.calibration")
        # a student's layers are looked at when its turn comes
        if is_base_shaped(self.model, known.run):
            self._check_layers(key, known)

    def _check_layers(self, key: str, known: BeforeRun) -> None:
        from pipeline.models.load import from_config, language_config, load_config_of_weights
        from pipeline.quantization.backend import why_not
        from pipeline.quantization.smoothing import check_smoothable

        config, task = known.config, known.run.task
        if Path(known.base).expanduser().is_dir():
            config = load_config_of_weights(known.base, task, key="model.path")
        for setting, fmt in self._named_formats(key):
            if why_not(fmt, known.device) is None:
                self._check_takes(fmt, setting, config, known)
        if self.smoothing is not None:
            import torch

            with torch.device("meta"):
                twin = from_config(language_config(config, task), task, None)
                check_smoothable(twin, f"{key}.smoothing")

    def _check_takes(self, fmt: Format, setting: str, config: Any, known: BeforeRun) -> None:
        """Refuse layers that a format cannot take; an optional stage is then skipped when its turn
        comes.
        """
        from pipeline.quantization.backend import refuse_unsupported

        task, device = known.run.task, known.device
        try:
            refuse_unsupported(config, fmt, task, device=device, key=setting, choice=self.choice())
        except UserError as error:
            if not self.optional or error.key != setting:
                raise

    def _named_formats(self, key: str) -> list[tuple[str, Format]]:
        """Return the formats that it names, with the setting that names each."""
        if self.format is not Format.auto:
            return [(f"{key}.format", self.format)]
        return [(f"{key}.candidates", fmt) for fmt in self.candidates]

    def unavailable(self, run: Run, device: Any, inputs: Mapping[str, Artifact]) -> str | None:
        """Return why this device, or the shapes of this model, cannot take the format."""
        from pipeline.quantization.backend import why_not

        if self.format is Format.auto:
            return None
        unable = self.unable(run, device, inputs) if self.optional else None
        return why_not(self.format, device) if unable is None else unable.partition(": ")[2]

    def unable(self, run: Run, device: Any, inputs: Mapping[str, Artifact]) -> str | None:
        """Return why the format cannot be made of this model here, with its name, or None."""
        from pipeline.quantization.trials import able

        source, choice = inputs[MODEL].path, self.choice()
        _, reasons = able(
            [self.format], source, run.task, device=device, choice=choice, key="format"
        )
        return reasons[0] if reasons else None

    def warm_up(self, inputs: Mapping[str, Artifact], ctx: WarmUp) -> None:
        """Import the format's library."""
        from pipeline.quantization.backend import import_library

        if self.format is not Format.auto:
            with ctx.clock.phase("import"):
                import_library(self.format)

    def may_be_refused(self) -> bool:
        """Return whether it is optional."""
        return self.optional

    def refusals(self, key: str) -> AbstractContextManager[None]:
        """Return what makes refusals of a library's errors while an optional format is assessed."""
        from pipeline.quantization.backend import refusing

        if self.format is Format.auto or not self.may_be_refused():
            return nullcontext()
        return refusing("what was made", self.format, f"{key}.format")

    def left_unchanged(self, output: Output) -> str | None:
        """Return why the model stays in the numbers that it had, or None."""
        if "quantization" in output.about:
            return None
        search = output.about.get("search")
        return (None if search is None else search["why"]) or NOTHING_HOLDS

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
        """Quantize and leave the model in `ctx.out`. Ranks other than the first look at activations
        alone.
        """
        if not ctx.ranks.is_first:
            return self._look(inputs[MODEL].path, ctx)
        if self.format is Format.auto:
            return self._search(inputs, ctx)
        return self.convert(inputs[MODEL].path, ctx, smoothed=self.smoothing is not None)

    def convert(self, source: Path, ctx: Context, *, smoothed: bool) -> Output:
        """Quantize `source` into `ctx.out` and prove the reload; `smoothed`: after smoothing."""
        from pipeline.models.sixteen_bits import units_said
        from pipeline.quantization.backend import quantize
        from pipeline.stages.context import Output

        looked = False

        def smooth(model: Any) -> None:
            nonlocal looked
            looked = True
            self.smooth(model, source, ctx)

        try:
            done = quantize(
                source,
                ctx.out,
                self.format,
                ctx.run.task,
                device=ctx.device,
                key=setting(ctx, "format"),
                clock=ctx.clock,
                choice=self.choice(),
                prepare=smooth if smoothed else None,
            )
        except Exception as error:
            if smoothed and not looked:  # the other ranks do, and wait for this one
                self._sharing(ctx).shared(partial(_raise, error))
            raise
        units = units_said(self.format, ctx.device) if self.format in SIXTEEN_BITS else ""
        notes = (f"{ctx.stage}: {done.say()}", *([f"{ctx.stage}: {units}"] if units else []))
        return Output(
            notes=notes,
            about={"quantization": {**done.describe(), "calibration": self._calibrated(ctx)}},
        )

    def _search(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Find the format, and quantize in it; or leave the model as it is where none pays."""
        from pipeline.models.sixteen_bits import best_first
        from pipeline.quantization.backend import formats, why_not
        from pipeline.quantization.search import Searcher
        from pipeline.quantization.trials import Bench, able
        from pipeline.stages.context import Output

        source, key, started_ns = (inputs[MODEL].path, setting(ctx, "format"), ctx.clock.now_ns())
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
            # The best 16-bit form is tried first: others have to be cheaper than it.
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
                scored_length(ctx.run),
            )
            searcher = Searcher(
                bench.measure, bench.sensitive, self.allowed(ctx.run), self.prefer, spent
            )
            found = searcher.run(candidates, [fmt for fmt in first if fmt not in candidates])
        said = [f"{ctx.stage}: tried {trial.say(self.allowed(ctx.run))}" for trial in found.trials]
        said += [f"{ctx.stage}: not tried: {reason}" for reason in (*reasons, *found.refused)]
        missed = found.missed
        about: About = {
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

    def settled(self, fmt: Format, exclude: Sequence[str]) -> Conversion:
        """Return a conversion to a format that was searched for, with more layers left alone."""
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

    def _calibrated(self, ctx: Context) -> CalibrationRecord | None:
        """Return what activations were looked at; None where none were."""
        if self.smoothing is None:
            return None
        from pipeline.data.completions import file_digest

        with ctx.clock.phase("prepare"):
            documents = self._looked_at(ctx)
            given = None if self.calibration is None else file_digest(self.calibration)
        source = self.calibration or f"train split of {ctx.data.name}"
        found: CalibrationRecord = {
            "smoothing": self.smoothing,
            "source": source,
            "documents": len(documents),
        }
        if given is not None:
            found["digest"] = given
        return found

    def _sharing(self, ctx: Context) -> Ranks:
        """Return the ranks that look at activations: all, where each has documents enough."""
        enough = self.calibration_documents >= LEAST_DOCUMENTS * ctx.ranks.size
        return ctx.ranks if enough else ALONE

    def smooth(self, model: Any, source: Path, ctx: Context) -> None:
        """Move outliers of activations into the weights of `model`, in place; it looks at
        calibration documents. Of several ranks each looks at its part: all that share a stage call
        this, or `_look`.
        """
        from pipeline.quantization.smoothing import Largest, smooth

        ids, ranks = self._own_ids(source, ctx), self._sharing(ctx)

        def everywhere(look: Callable[[], Largest]) -> list[Largest]:
            def timed() -> Largest:
                with ctx.clock.phase("calibrate"):
                    return look()

            with ctx.clock.phase("comm_wait"):
                return ranks.shared(timed)

        with ctx.clock.phase("calibrate"):
            smooth(
                model,
                ids,
                strength=self.smoothing or 0.0,
                key=setting(ctx, "smoothing"),
                everywhere=everywhere,
            )

    def _look(self, source: Path, ctx: Context) -> Output:
        """Give the first rank what it smooths by, of this rank's part of the documents."""
        from pipeline.models.load import load_model
        from pipeline.quantization.smoothing import Largest, largest_inputs
        from pipeline.stages.context import Output

        def look() -> Largest:
            with ctx.clock.phase("model_load"):
                model = load_model(source, ctx.run.task, device=ctx.device)
            ids = self._own_ids(source, ctx)
            with ctx.clock.phase("calibrate"):
                return largest_inputs(model, ids, key=setting(ctx, "smoothing"))

        ranks = self._sharing(ctx)
        if ranks.several:
            with ctx.clock.phase("comm_wait"):
                ranks.shared(look)
        return Output()

    def _own_ids(self, source: Path, ctx: Context) -> list[torch.Tensor]:
        """Return this rank's calibration documents as token ids, (1, T) each, on the device."""
        import torch

        from pipeline.data.encode import encode_all
        from pipeline.models.load import example_length, load_config, load_tokenizer

        ranks = self._sharing(ctx)
        with ctx.clock.phase("prepare"):
            documents = self._looked_at(ctx)
            length = example_length(
                load_config(source), ctx.run.task, ctx.run.training.sequence_length
            )
            encoded = encode_all(documents, load_tokenizer(source), ctx.run.task, max_length=length)
            # A file may hold fewer than there are ranks; to see one twice changes no maximum.
            own = encoded[ranks.rank :: ranks.size] or encoded[:1]
            return [
                torch.from_numpy(each.input_ids[:length]).long()[None].to(ctx.device)
                for each in own
            ]


def _raise(error: Exception) -> None:
    raise error


def setting(ctx: Context, name: str) -> str:
    """Return the full key of a stage's setting, as refusals name it; a fallback's settings are
    its stage's.
    """
    return f"stages.{stage_name(ctx.stage)}.{name}"


class ReadWith(TypedDict):
    """What decides a reading on validation."""

    batch_size: int
    max_bytes: int | None
    sequence_length: int


def read_with(run: Run) -> ReadWith:
    """Return what decides a reading on validation."""
    return {
        "batch_size": run.quality.batch_size,
        "max_bytes": run.quality.max_bytes_per_document,
        "sequence_length": scored_length(run),
    }
