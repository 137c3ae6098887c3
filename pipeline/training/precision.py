"""Arithmetic of training: fp32, tf32, bf16 and fp16, all with fp32 master weights.

bf16 and fp16 run matmuls in 16 bits under autocast; fp16's narrow exponent needs loss scaling. tf32
keeps fp32 tensors and rounds matmul inputs to 10 mantissa bits on the GPU. fp32 is IEEE, so that it
can be a reference.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from pipeline.config.settings.precision import Precision
from pipeline.ledger.devices.table import device_of
from pipeline.training.float8 import RECIPES, why_not_float8

AUTOCAST = {
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp8_tensorwise: torch.bfloat16,
    Precision.fp8_rowwise: torch.bfloat16,
}


def why_not(precision: Precision, device: torch.device) -> str | None:
    """Return why `device` cannot train in `precision`, or None where it can."""
    if precision in RECIPES:
        return why_not_float8(precision, device)
    return device_of(device).why_not_precision(precision)


def compute_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of matmuls under `precision`."""
    return (
        torch.bfloat16
        if precision is Precision.bf16_pure
        else AUTOCAST.get(precision, torch.float32)
    )


def frozen(precision: Precision, device: torch.device) -> Precision:
    """Return the precision of a frozen model beside a training (a teacher). `auto`, `bf16_pure` and
    float8 become bf16, or fp32 where the device has no bf16: a frozen model needs no master
    weights.
    """
    # These say how weights are kept or layers trained; for a frozen model bf16 is the nearest.
    if precision in (Precision.bf16_pure, Precision.auto, *RECIPES):
        return Precision.fp32 if why_not(Precision.bf16, device) else Precision.bf16
    return precision


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Generator[None]:
    """Compute in `precision` inside: autocast for 16 bits, tf32 or IEEE fp32 matmuls otherwise.

    Weights keep their dtype: autocast rounds what enters a matmul.
    """
    with (
        matmuls(precision, device),
        torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST),
    ):
        yield


def matmuls(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Multiply fp32 matrices in tf32 or IEEE fp32 inside: all that a backward pass needs.

    Its 16-bit dtypes are those that the forward pass recorded; torch advises against autocast
    around it.
    """
    return device_of(device).matmuls(tf32=precision is Precision.tf32)


def round_weights(model: Any, precision: Precision) -> None:
    """Keep a frozen model's matrices in the 16 bits that autocast would round them to anew in every
    forward pass.

    What it computes under `arithmetic(precision)` stays the same to the bit, in about half the
    memory. An embedding that is the output head as well keeps its 32 bits, as do norms, and layers
    that are quantized stay as they are.
    """
    from transformers.pytorch_utils import Conv1D

    if precision not in AUTOCAST:
        return
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for module in model.modules():
        # The exact types: a subclass may be a quantized layer. Conv1D is GPT-2's linear layer.
        if type(module) in (torch.nn.Linear, Conv1D) and module.weight is not embedding:
            module.to(AUTOCAST[precision])
