"""What distil stages choose among."""

from __future__ import annotations

from enum import Enum


class Divergence(Enum):
    """How a student's distribution is compared with its teacher's (defined in
    `distillation/losses.py`).
    """

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    skewed_kl = "skewed_kl"
    skewed_reverse_kl = "skewed_reverse_kl"


class HeadKernel(Enum):
    """What computes the distillation head (defined in `distillation/kernels.py`)."""

    auto = "auto"
    torch = "torch"
    triton = "triton"
    liger = "liger"


class CaptureMethod(Enum):
    """What a teacher cache keeps of each distribution (defined in `distillation/sparse.py`)."""

    sample = "sample"
    top_k = "top_k"
