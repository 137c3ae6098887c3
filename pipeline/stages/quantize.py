"""Quantize: store a model's linear layers in 8 or 4 bits (bitsandbytes, torchao), embeddings left alone.

What it does: weights in `format`, saved before any forward pass and proven bit-equal after a reload in a fresh
process. When it helps: memory, nearly always; speed, only where this device's kernels say so, which is why the
comparison pass measures it. Settings worth changing: format; exclude (layers that suffer); smoothing, with formats that
quantize activations (int8, int8_dynamic).
Source: Dettmers et al. 2022, arXiv 2208.07339 (int8); Dettmers et al. 2023, arXiv 2305.14314 (NF4); Xiao et al. 2022,
arXiv 2211.10438 (smoothing); quantization/ao.py for torchao's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from pipeline.config import Format, Run, fraction, positive
from pipeline.errors import UserError
from pipeline.stages.settings import BASE

if TYPE_CHECKING:
    from pipeline.quantization.layers import Choice
    from pipeline.stages.context import Context, Output
    from pipeline.store import Artifact

# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class QuantizeStage:
    """Settings of a `quantize` stage."""

    optional: bool = False
    model: str = BASE  # base, or an earlier stage
    format: Format = Format.int8
    include: list[str] = field(default_factory=list)  # patterns of layers to quantize (*.mlp.*); empty: all of the body
    exclude: list[str] = field(default_factory=list)  # patterns of layers that are left alone all the same
    quantize_head: bool = False  # the output head as well, where it is not the embedding
    smoothing: Optional[float] = fraction(None)  # moves outliers of activations into weights: 0.5; null: not
    calibration: Optional[str] = None  # file of documents that smoothing looks at; null: the first of train
    calibration_documents: int = positive(32)

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 2

    def reads(self, run: Run) -> list[str]:
        """Return the arms this stage reads."""
        return [self.model]

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        from pipeline.quantization.backend import LIBRARIES

        library = LIBRARIES[self.format]
        if find_spec(library) is None:
            raise UserError(f"{key}.format", f"{library} is not installed", "pip install -e '.[quant]'")
        if self.calibration is not None and self.smoothing is None:
            raise UserError(f"{key}.calibration", "has no effect without smoothing", f"give {key}.smoothing=0.5")

    def choice(self) -> Choice:
        """Return which layers are to be quantized."""
        from pipeline.quantization.layers import Choice

        return Choice(tuple(self.include), tuple(self.exclude), self.quantize_head)

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Quantize and leave the model in `ctx.out`."""
        from pipeline.quantization.backend import quantize
        from pipeline.quantization.layers import abbreviate
        from pipeline.stages.context import Output

        source = inputs[self.model].path
        done = quantize(
            source, ctx.out, self.format, ctx.run.task, device=ctx.device, key=f"stages.{ctx.stage}.format",
            clock=ctx.clock, choice=self.choice(),
            prepare=None if self.smoothing is None else lambda model: self._smooth(model, source, ctx),
        )  # fmt: skip
        notes = (f"{ctx.stage}: {len(done.quantized_layers)} linear layers in {self.format.value}, left alone: "
                 f"{abbreviate(done.kept_layers)}",)  # fmt: skip
        return Output(notes=notes, about={"quantization": {**done.describe(), **self._calibrated(ctx)}})

    def _calibrated(self, ctx: Context) -> dict[str, Any]:
        """Return what activations were looked at."""
        if self.smoothing is None:
            return {"calibration": None}
        source = self.calibration or f"train split of {ctx.data.name}"
        return {"calibration": {"smoothing": self.smoothing, "source": source, "documents": self.calibration_documents}}

    def _smooth(self, model: Any, source: Any, ctx: Context) -> None:
        import torch

        from pipeline.data.encode import encode_all
        from pipeline.models import load_tokenizer
        from pipeline.quantization.calibration import calibration_documents
        from pipeline.quantization.smoothing import smooth

        with ctx.clock.phase("prepare"):
            documents = calibration_documents(self, ctx.run, ctx.data, f"stages.{ctx.stage}.calibration")
            length = ctx.run.training.sequence_length
            encoded = encode_all(documents, load_tokenizer(source), ctx.run.task, max_length=length)
            ids = [torch.from_numpy(each.input_ids[:length]).long()[None].to(ctx.device) for each in encoded]
        with ctx.clock.phase("calibrate"):
            smooth(model, ids, strength=self.smoothing or 0.0, key=f"stages.{ctx.stage}.smoothing")
