"""Training that makes up for what quantizing lost: a distillation from the unquantized model into
its quantized self.

What is trained, its adapters or all its weights, computes as it will once quantized
(`quantization/fake.py`); it is saved unrounded and then quantized as every artifact is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.models.load import load_config, load_model, load_tokenizer, save_model
from pipeline.quantization.backend import plan_for, rest_dtype
from pipeline.quantization.fake import Adapters, fake_quantize
from pipeline.stages.base import MODEL
from pipeline.stages.context import Context, Output
from pipeline.stages.conversion import Conversion, setting
from pipeline.stages.distill_settings import DistillSettings
from pipeline.stages.training import Start, run_training
from pipeline.training.holding import Holding

if TYPE_CHECKING:
    from pipeline.store.artifacts import Artifact


def run_recovery(
    stage: DistillSettings,
    into: Conversion,
    adapters: Adapters | None,
    inputs: Mapping[str, Artifact],
    ctx: Context,
) -> Output:
    """Train as `stage` says and leave the model, quantized as `into` says, in `ctx.out`.

    Args:
        adapters: What is trained beside frozen weights; None: all weights are trained.

    Of several ranks the first one alone leaves a model.
    """
    with tempfile.TemporaryDirectory(dir=ctx.out.parent, prefix="recover.") as folder:
        source = _smoothed(into, inputs[MODEL].path, Path(folder) / "smoothed", ctx)
        trained = Path(folder) / "trained"

        def start(held: Holding) -> Start:
            task, labels = ctx.run.task, ctx.data.labels
            model: Any = held.made(
                lambda: load_model(source, task, device=held.device, labels=labels)
            )
            plan = plan_for(
                into.format,
                model.config,
                ctx.run.task,
                key=setting(ctx, "format"),
                choice=into.choice(),
            )
            # fused experts are rounded afterwards alone
            linear = [layer for layer in plan.quantize if not layer.fused]
            dtype = rest_dtype(load_config(source), ctx.device)
            undo = fake_quantize(model, linear, into.format, dtype, adapters)

            def save(faked: Any) -> None:
                # Before saving: a folder holds plain weights, which are quantized once, by the
                # library.
                undo()
                _save(faked, source, trained, ctx)

            return model, load_tokenizer(source), save

        made = run_training(stage, inputs, ctx, distill=stage, start=start)
        if not ctx.ranks.is_first:  # the first one has saved what all trained, and quantizes it
            return made
        done = into.convert(trained, ctx, smoothed=False)
    return replace(made, notes=(*made.notes, *done.notes), about={**made.about, **done.about})


def _smoothed(into: Conversion, source: Path, folder: Path, ctx: Context) -> Path:
    """Return where the model lies that is quantized: the source, or a smoothed one in `folder`."""
    if into.smoothing is None:
        return source
    model: Any = load_model(source, ctx.run.task, device=ctx.device, labels=ctx.data.labels)
    into.smooth(model, source, ctx)
    _save(model, source, folder, ctx)
    return folder


def _save(model: Any, source: Path, folder: Path, ctx: Context) -> None:
    """Save an unquantized model in the dtype that its source is stored in."""
    dtype: Any = load_config(source).dtype
    with ctx.clock.phase("checkpoint"):
        save_model(model.to(dtype), load_tokenizer(source), folder)
