"""Quantize a model folder: refuse early, convert, save before any forward, prove the reload.

A backend is a module with the four functions of `Backend`; `BACKENDS` says which one does which format. To add a
format: a member of `config.Format`, and a row here; to add a library: such a module, and its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import Format, Task
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models import check_model_folder, load_config, load_tokenizer, save_model
from pipeline.quantization import bnb
from pipeline.quantization.layers import Layer, LayerPlan, plan_layers, weights_bytes
from pipeline.quantization.reload_check import Reference, check_bit_equal, take_reference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class Backend(Protocol):
    """What a quantization library has to offer. Raises UserError where it refuses."""

    def refuse_device(self, fmt: Format, *, device: torch.device, key: str) -> None:
        """Refuse a machine that the library cannot work on."""
        ...

    def refuse_layers(self, layers: Sequence[Layer], fmt: Format, *, device: torch.device, key: str) -> None:
        """Refuse layer shapes that its kernels cannot take."""
        ...

    def load_quantized(
        self,
        source: Path,
        fmt: Format,
        task: Task,
        *,
        device: torch.device,
        rest_dtype: torch.dtype,
        keep: Sequence[str],
    ) -> PreTrainedModel:
        """Load and quantize, leaving alone the layers named in `keep`, without running the model."""
        ...  # fmt: skip

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Say whether a layer is one that it quantized."""
        ...


BACKENDS: dict[Format, Backend] = {Format.int8: bnb, Format.nf4: bnb}


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantizing did.

    Attributes:
        quantized_layers: Names of the linear layers in `fmt`.
        kept_layers: Names of the linear layers left in `rest_dtype`: heads and tied weights.
        rest_dtype: Of everything that is not quantized (`float32`, `bfloat16`).
        bytes_before: Of the source's weight files.
        bytes_after: Of the quantized weight files.
        logits_sha256: Of the probes' outputs, equal in memory and after the reload.
    """

    fmt: Format
    quantized_layers: tuple[str, ...]
    kept_layers: tuple[str, ...]
    rest_dtype: str
    bytes_before: int
    bytes_after: int
    logits_sha256: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return the facts worth keeping beside the artifact."""
        return {
            "format": self.fmt.value,
            "quantized_layers": len(self.quantized_layers),
            "kept_layers": list(self.kept_layers),
            "rest_dtype": self.rest_dtype,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "logits_sha256": list(self.logits_sha256),
        }


def quantize(
    source: Path,
    out: Path,
    fmt: Format,
    task: Task,
    *,
    device: torch.device | str,
    key: str,
    clock: PhaseClock | None = None,
) -> Quantized:
    """Write `source` to `out` in `fmt`, with its tokenizer, so that a plain `from_pretrained(out)` loads it.

    Refusals name `key` (`stages.int8.format`). `clock` books the library's import (import), reading and planning
    (model_load), quantizing (convert: weights are quantized as they are read), saving (checkpoint) and the reload
    check (eval).

    Raises:
        UserError: If the model, its shapes or the device cannot take the format; nothing is written.
        StageFailed: If what was saved is not, bit for bit, what was quantized; `out` is not to be used.
    """
    import torch

    device = torch.device(device)
    with _phase(clock, "import"):
        BACKENDS[fmt].refuse_device(fmt, device=device, key=key)
    with _phase(clock, "model_load"):
        check_model_folder(source, key)
        config = load_config(source, key=key)
        plan = refuse_unsupported(config, fmt, task, device=device, key=key)
        rest_dtype = _rest_dtype(config, device)
    layers, reference = _convert(
        source, out, fmt, task, plan, device=device, rest_dtype=rest_dtype, key=key, clock=clock
    )
    with _phase(clock, "eval"):
        check = check_bit_equal(out, task, reference, device=device)
    return Quantized(
        fmt=fmt,
        quantized_layers=layers,
        kept_layers=tuple(layer.name for layer in (*plan.quantize, *plan.keep) if layer.name not in set(layers)),
        rest_dtype=str(rest_dtype).removeprefix("torch."),
        bytes_before=weights_bytes(source),
        bytes_after=weights_bytes(out),
        logits_sha256=check.digests,
    )


def refuse_unsupported(
    config: PreTrainedConfig, fmt: Format, task: Task, *, device: torch.device, key: str
) -> LayerPlan:
    """Refuse, from its configuration alone, a model that cannot be quantized; return the layers that will be.

    Raises:
        UserError: If it is quantized already, cannot do the task, has no linear layers, or has shapes that crash.
    """
    previous = getattr(config, "quantization_config", None)
    if previous is not None:
        method = previous.get("quant_method") if isinstance(previous, dict) else previous.quant_method
        raise UserError(key, f"the model is quantized already ({method})", "quantize the model it was made from")
    plan = plan_layers(config, task, key=key)
    BACKENDS[fmt].refuse_layers(plan.quantize, fmt, device=device, key=key)
    return plan


def _rest_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of what is not quantized: bfloat16 on accelerators, on CPUs what the source is stored in."""
    import torch

    if device.type != "cpu":
        return torch.bfloat16
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _convert(
    source: Path,
    out: Path,
    fmt: Format,
    task: Task,
    plan: LayerPlan,
    *,
    device: torch.device,
    rest_dtype: torch.dtype,
    key: str,
    clock: PhaseClock | None,
) -> tuple[tuple[str, ...], Reference]:
    """Quantize, save, and only then run the model; it is gone from memory when this returns."""
    backend = BACKENDS[fmt]
    with _phase(clock, "model_load"):
        tokenizer = load_tokenizer(source, key=key)
    with _phase(clock, "convert"):
        keep = [layer.name for layer in plan.keep]
        model = backend.load_quantized(source, fmt, task, device=device, rest_dtype=rest_dtype, keep=keep)
    with _phase(clock, "checkpoint"):
        save_model(model, tokenizer, out)  # before any forward: running the model may spoil its weights (see bnb.py)
    with _phase(clock, "eval"):
        reference = take_reference(model)
    return tuple(name for name, module in model.named_modules() if backend.is_quantized(module)), reference


def _phase(clock: PhaseClock | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if clock is None else clock.phase(name)
