"""Training that makes up for what quantizing lost: adapters on the quantized model, or its own weights, fake-quantized.

Both are distillations from the unquantized model into what it is once quantized; what is saved is quantized once more
from what was trained, as every artifact is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Rung
from pipeline.models import load_config, load_model, load_tokenizer, save_model
from pipeline.quantization.backend import backend_of, quantize, rest_dtype
from pipeline.quantization.fake import fake_quantize
from pipeline.quantization.layers import plan_layers
from pipeline.quantization.merge import add_adapters, merge, what_adapters_add
from pipeline.stages.context import Context, Output
from pipeline.stages.quantize import format_key
from pipeline.training.stage import run_training

if TYPE_CHECKING:
    from pipeline.stages.recover import RecoverStage
    from pipeline.store import Artifact


def run_recovery(stage: RecoverStage, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
    """Train as `stage` says and leave the quantized model in `ctx.out`."""
    with tempfile.TemporaryDirectory(dir=ctx.out.parent, prefix="recover.") as folder:
        work = Path(folder)
        source = _smoothed(stage, inputs[stage.model].path, work / "smoothed", ctx)
        way = (_Adapters if stage.rung is Rung.lora else _FakeQuantized)(stage, source, work, ctx)
        trained = run_training(stage, stage, inputs, ctx, start=way.start, save=way.save)
        done = stage.into.convert(work / "trained", ctx, smoothed=False)
    return replace(trained, notes=(*trained.notes, *done.notes), about={**trained.about, **done.about})


def _smoothed(stage: RecoverStage, source: Path, folder: Path, ctx: Context) -> Path:
    """Return where the model lies that is quantized: the source, or a smoothed one in `folder`."""
    if stage.into.smoothing is None:
        return source
    model: Any = load_model(source, ctx.run.task, device=ctx.device, labels=ctx.data.labels)
    stage.into.smooth(model, source, ctx)
    _save(model, source, folder, ctx)
    return folder


def _save(model: Any, source: Path, folder: Path, ctx: Context) -> None:
    """Save an unquantized model in the dtype that its source is stored in."""
    dtype: Any = load_config(source).dtype
    with ctx.clock.phase("checkpoint"):
        save_model(model.to(dtype), load_tokenizer(source), folder)


@dataclass(slots=True)
class _Adapters:
    """Adapters on the quantized model, merged when they are trained."""

    stage: RecoverStage
    source: Path
    work: Path
    ctx: Context

    def start(self) -> tuple[Any, Any]:
        """Return the quantized model with adapters, on the device, and its tokenizer."""
        stage, ctx = self.stage, self.ctx
        quantize(self.source, self._quantized, stage.into.format, ctx.run.task, device=ctx.device,
                 key=format_key(ctx), choice=stage.into.choice(), prove=False)  # fmt: skip
        model: Any = self._load()
        is_quantized = backend_of(stage.into.format).is_quantized
        names = [name for name, module in model.named_modules() if is_quantized(module)]
        add_adapters(model, names, rank=stage.rank, alpha=stage.alpha)
        return model, load_tokenizer(self.source)

    def save(self, model: Any) -> None:
        """Save the unquantized model that the trained one stands for."""
        ctx = self.ctx
        with ctx.clock.phase("convert"):
            added = what_adapters_add(model)
            plain: Any = load_model(self.source, ctx.run.task, device=ctx.device, labels=ctx.data.labels)
            merge(plain, self._load(), added, backend_of(self.stage.into.format))
        _save(plain, self.source, self.work / "trained", ctx)

    @property
    def _quantized(self) -> Path:
        return self.work / "quantized"

    def _load(self) -> Any:
        return load_model(self._quantized, self.ctx.run.task, device=self.ctx.device, labels=self.ctx.data.labels)


@dataclass(slots=True)
class _FakeQuantized:
    """The unquantized model, computing as it will once quantized."""

    stage: RecoverStage
    source: Path
    work: Path
    ctx: Context
    _undo: Callable[[], None] = field(init=False)

    def start(self) -> tuple[Any, Any]:
        """Return the model on the device, and its tokenizer."""
        ctx, into = self.ctx, self.stage.into
        model: Any = load_model(self.source, ctx.run.task, device=ctx.device, labels=ctx.data.labels)
        plan = plan_layers(model.config, ctx.run.task, key=format_key(ctx), choice=into.choice())
        dtype = rest_dtype(load_config(self.source), ctx.device)
        self._undo = fake_quantize(model, plan.quantize, into.format, dtype)
        return model, load_tokenizer(self.source)

    def save(self, model: Any) -> None:
        """Save the model with the weights that were trained, unrounded."""
        self._undo()
        _save(model, self.source, self.work / "trained", self.ctx)
