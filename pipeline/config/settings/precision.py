"""`precision.*`: the arithmetic of training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pipeline.config.settings.ranges import positive


class Precision(Enum):
    """Arithmetic of training. Master weights stay fp32 in all of them.

    `native` is bf16 where the device has units for it, else fp32, and is decided before anything is
    made. `auto` tries those that the device can.
    """

    native = "native"
    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"  # autocast: weights are rounded anew for every product
    bf16_pure = "bf16_pure"  # the model itself is kept in bf16, beside its master weights
    fp16 = "fp16"
    # wide layers in float8, the rest as in bf16 (`training/float8.py`)
    fp8_tensorwise = "fp8_tensorwise"
    fp8_rowwise = "fp8_rowwise"


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """How training computes; a stage may name another precision of its own."""

    name: Precision = Precision.native  # of every stage that names none of its own
    loss_scale: float = positive(65536.0)  # fp16's first loss scale
    # of layers that fp8 takes: below, casting costs more than it saves
    fp8_least_width: int = positive(1024)
    # of auto: how far, relatively, a loss may lie from fp32's
    loss_tolerance: float = positive(0.005)
