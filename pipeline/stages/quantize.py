"""Quantize: store a model's linear layers in 8 or 4 bits (bitsandbytes), head and embeddings left alone.

What it does: LLM.int8() or NF4 weights, saved before any forward pass and proven bit-equal after a reload in a fresh
process. When it helps: memory, nearly always; speed, only where this device's kernels say so, which is why the
comparison pass measures it. Settings worth changing: format.
Source: Dettmers et al. 2022, arXiv 2208.07339 (int8); Dettmers et al. 2023, arXiv 2305.14314 (NF4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from pipeline.config import Format, Run
from pipeline.errors import UserError
from pipeline.stages.settings import BASE

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Output
    from pipeline.store import Artifact


@dataclass(kw_only=True, slots=True)
class QuantizeStage:
    """Settings of a `quantize` stage."""

    optional: bool = False
    model: str = BASE  # base, or an earlier stage
    format: Format = Format.int8

    type: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1

    def reads(self, run: Run) -> list[str]:
        """Return the arms this stage reads."""
        return [self.model]

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        if find_spec("bitsandbytes") is None:
            raise UserError(f"{key}.format", "bitsandbytes is not installed", "pip install -e '.[quant]'")

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        """Quantize and leave the model in `ctx.out`."""
        from pipeline.quantization.backend import quantize
        from pipeline.stages.context import Output

        done = quantize(
            inputs[self.model].path, ctx.out, self.format, ctx.run.task,
            device=ctx.device, key=f"stages.{ctx.stage}.format", clock=ctx.clock,
        )  # fmt: skip
        notes = (f"{ctx.stage}: {len(done.quantized_layers)} linear layers in {self.format.value}, left alone: "
                 f"{', '.join(done.kept_layers) or 'none'}",)  # fmt: skip
        return Output(notes=notes)
