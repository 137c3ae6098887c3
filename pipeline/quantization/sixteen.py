"""Sixteen bits as a format: every weight in bf16 or fp16, multiplied in it, by torch itself.

bf16 has fp32's range and 8 bits of precision, fp16 11 bits of precision and ends at 65504. What a
model keeps in fp32 whatever its dtype (`_keep_in_fp32_modules` of transformers) stays there.
Whether it saves time is a matter of units: `models/sixteen_bits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.errors import UserError
from pipeline.models.load import auto_class, load_config
from pipeline.models.sixteen_bits import torch_dtype, why_not
from pipeline.quantization.layers import Layer
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def refuse_device(fmt: Format, *, device: torch.device, key: str) -> None:
    """Refuse a device that cannot compute in `fmt`.

    Raises:
        UserError: If it cannot.
    """
    why = why_not(fmt, device)
    if why is not None:
        other = next(
            (
                each.value
                for each in SIXTEEN_BITS
                if each is not fmt and why_not(each, device) is None
            ),
            None,
        )
        raise UserError(
            key,
            why,
            f"use {other}" if other else "use a format of 8 bits, or a device with such units",
        )


def quiet() -> None:
    """Nothing to silence."""


def refuse_layers(layers: Sequence[Layer], fmt: Format, *, device: torch.device, key: str) -> None:
    """Take every shape."""


def load_quantized(
    source: Path,
    fmt: Format,
    task: Task,
    *,
    device: torch.device,
    rest_dtype: torch.dtype,
    keep: Sequence[str],
) -> PreTrainedModel:
    """Load `source` in 16 bits; `rest_dtype` and `keep` are of formats that take single layers."""
    return (
        auto_class(task)
        .from_pretrained(
            source,
            config=load_config(source),
            device_map={"": str(device)},
            dtype=torch_dtype(fmt),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        .eval()
    )


def refuse_too_large(model: Any, fmt: Format, key: str) -> None:
    """Refuse a model with a weight that `fmt` cannot hold.

    Raises:
        UserError: Naming the first such weight.
    """
    for name, weight in model.named_parameters():
        # Casting beyond 65504 gave infinity.
        if not bool(weight.isfinite().all()):
            problem = f"{name} holds a weight that {fmt.value} has no number for"
            raise UserError(key, problem, "use bf16, which reaches as far as fp32")


def is_quantized(module: torch.nn.Module) -> bool:
    """Return whether a module's own weights have a 16-bit dtype."""
    import torch

    return any(
        own.dtype in (torch.bfloat16, torch.float16) for own in module.parameters(recurse=False)
    )


def round_trip(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return what is left of a weight, in its own shape and dtype."""
    return weight.to(torch_dtype(fmt)).to(weight.dtype)
