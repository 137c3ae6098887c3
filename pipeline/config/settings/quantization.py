"""Formats of stored weights, and what a quantize stage falls back to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.ranges import fraction, positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


class Format(Enum):
    """Weight formats; `quantization/backend.py` says which library does which, `auto` searches
    them.

    The order is that of trials: sixteen bits come first, because what other formats save is read
    against them.
    """

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"
    nf4 = "nf4"
    nf4_double = "nf4_double"
    fp4 = "fp4"
    fp4_double = "fp4_double"
    int8_weight_only = "int8_weight_only"
    int8_dynamic = "int8_dynamic"
    int4_weight_only = "int4_weight_only"
    float8_weight_only = "float8_weight_only"
    float8_dynamic = "float8_dynamic"

    @property
    def bits(self) -> int | None:
        """Bits of a stored weight; None where a search has yet to choose."""
        if self is Format.auto:
            return None
        if self in SIXTEEN_BITS:
            return 16
        return 4 if "4" in self.value else 8


SIXTEEN_BITS = (Format.bf16, Format.fp16)
"""Formats that take the whole model, and hold no library's layers."""


class Prefer(Enum):
    """What a search over formats saves."""

    time = "time"  # device-seconds to serve the declared load
    memory = "memory"  # bytes of weights


class Fallback(Enum):
    """What a quantize stage may try where its format loses too much (`stages/fallbacks.py`)."""

    format = "format"  # one that keeps more
    lora = "lora"  # adapters trained with fake quantization, then merged
    qat = "qat"  # quantization-aware distillation of all weights


@dataclass(kw_only=True, slots=True)
class QatSettings:
    """A fallback's training, with fake quantization in the forward pass.

    Null inherits `training.*` and `precision`.
    """

    steps: Optional[int] = positive(None)
    learning_rate: float = positive(2e-5)  # Source: Liu et al. 2023, arXiv 2305.17888, section 3.1
    precision: Optional[Precision] = None
    # both distributions are divided by it before they are compared
    temperature: float = positive(1.0)
    ce_weight: float = fraction(0.0)  # of the hard labels; the rest is the unquantized model's


@dataclass(kw_only=True, slots=True)
class LoraSettings(QatSettings):
    """The same, of adapters."""

    learning_rate: float = positive(2e-4)  # Source: Dettmers et al. 2023, arXiv 2305.14314, table 9
    rank: int = positive(16)  # of the adapters
    alpha: float = positive(32.0)  # what the adapters add is scaled by alpha / rank
