"""`hardware.*`: what to run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from pipeline.config.settings.ranges import positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


ALL = "all"  # of the devices that a host has


@dataclass(kw_only=True, slots=True)
class PeakConfig:
    """Dense peak rates of one device in TFLOP/s, where the table of known devices lacks them: what
    MFU divides by.
    """

    fp32: Optional[float] = positive(None)  # TFLOP/s, dense
    tf32: Optional[float] = positive(None)  # TFLOP/s, dense
    bf16: Optional[float] = positive(None)  # TFLOP/s, dense
    fp16: Optional[float] = positive(None)  # TFLOP/s, dense
    fp8: Optional[float] = positive(None)  # TFLOP/s, dense


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """What to run on."""

    # auto, cpu, cuda, cuda:1, rocm, xpu, mps; auto takes the accelerator that torch finds
    device: str = "auto"
    devices: Any = 1  # of this host; each has a process (rank) of its own. all: all that torch sees
    num_threads: Optional[int] = positive(None)  # CPU threads of torch; null leaves torch's choice
    # null: as the vendor states for this device, if known
    peak_tflops: PeakConfig = field(default_factory=PeakConfig)
