"""What a device can compute at most, by its exact name: the divisor of MFU. An unknown device has
none.

Names are those that the device's own library gives: an H100 PCIe is no H100 SXM, and an unlisted
board is never taken for its sibling. Rates are dense: datasheets that print twice as much say "with
sparsity", and the half stands here. 16-bit and fp8 rates are those with fp32 accumulation, which is
how torch multiplies. A precision that is missing is one that the source does not state, or that the
device does not have. All sources are NVIDIA's.

Left out on purpose: A10G, H20 and other boards of one customer or market without a public
datasheet; the L40, whose datasheet halves the tensor rates that its chip has in the whitepaper.
`hardware.peak_tflops` declares what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ledger.devices.table import device_of
from pipeline.ledger.values import Value, declared, null


@dataclass(frozen=True, slots=True)
class Peaks:
    """Dense peak rates of one device.

    Attributes:
        source: Document, date or version, and the place in it.
        tflops: TFLOP/s (int8: TOP/s) by arithmetic: fp32 (no tensor cores), tf32, bf16, fp16, fp8,
            int8.
    """

    source: str
    tflops: Mapping[str, float] = field(default_factory=dict[str, float])


def _rates(
    *,
    fp32: float,
    tf32: float | None = None,
    half: float | None = None,
    fp16: float | None = None,
    fp8: float | None = None,
    int8: float | None = None,
) -> dict[str, float]:
    """Return the rates that there are; `half` is both bf16's and fp16's."""
    every = {
        "fp32": fp32,
        "tf32": tf32,
        "bf16": half,
        "fp16": half or fp16,
        "fp8": fp8,
        "int8": int8,
    }
    return {name: rate for name, rate in every.items() if rate is not None}


_HALF = "half of the rates with sparsity"
_V100 = (
    "NVIDIA Tesla V100 GPU Architecture whitepaper, WP-08608-001 v1.1 (2017), table 1;"
    " V100 datasheet (Jan 2020)"
)
_T4 = "NVIDIA T4 Tensor Core GPU datasheet (2019), performance"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (Jun 2021), specifications, dense figures"
_A10 = "NVIDIA A10 Tensor Core GPU datasheet (2021), specifications, dense figures"
_A30 = "NVIDIA A30 Tensor Core GPU datasheet (2021), specifications, dense figures"
_A40 = "NVIDIA A40 datasheet (2021), specifications, dense figures"
_GA102 = (
    "NVIDIA Ampere GA102 GPU Architecture whitepaper v2.1 (2021), appendix A, dense,"
    " fp32 accumulate"
)
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper v1.04 (2023), table 2, dense"
_H100_NVL = f"NVIDIA H100 Tensor Core GPU datasheet (2024), H100 NVL column, {_HALF}"
_H200 = f"NVIDIA H200 Tensor Core GPU datasheet (2024), H200 SXM column, {_HALF}"
_H200_NVL = f"NVIDIA H200 Tensor Core GPU datasheet (2024), H200 NVL column, {_HALF}"
_B200 = f"NVIDIA Blackwell datasheet (2025), individual GPU, HGX B200 column, {_HALF}"
_L4 = f"NVIDIA L4 Tensor Core GPU datasheet (2023), specifications, {_HALF}"
_L40S = "NVIDIA L40S datasheet (2023), specifications, dense figures"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2.1 (2023), appendix A, dense, fp32 accumulate"

_a100 = Peaks(_A100, _rates(fp32=19.5, tf32=156, half=312, int8=624))
_v100_sxm = Peaks(_V100, _rates(fp32=15.7, fp16=125))
_v100_pcie = Peaks(_V100, _rates(fp32=14, fp16=112))
_h100_sxm = Peaks(_H100, _rates(fp32=66.9, tf32=494.7, half=989.4, fp8=1978.9, int8=1978.9))
_nvl_rates = _rates(fp32=60, tf32=417.5, half=835.5, fp8=1670.5, int8=1670.5)
_rtx_4090 = Peaks(_ADA, _rates(fp32=82.6, tf32=82.6, half=165.2, fp8=330.3, int8=660.6))

PEAKS: dict[str, Peaks] = {
    "Tesla V100-SXM2-16GB": _v100_sxm,
    "Tesla V100-SXM2-32GB": _v100_sxm,
    "Tesla V100-PCIE-16GB": _v100_pcie,
    "Tesla V100-PCIE-32GB": _v100_pcie,
    "Tesla T4": Peaks(_T4, _rates(fp32=8.1, fp16=65, int8=130)),
    "NVIDIA A100-SXM4-40GB": _a100,
    "NVIDIA A100-SXM4-80GB": _a100,
    "NVIDIA A100-PCIE-40GB": _a100,
    "NVIDIA A100 80GB PCIe": _a100,
    "NVIDIA A10": Peaks(_A10, _rates(fp32=31.2, tf32=62.5, half=125, int8=250)),
    "NVIDIA A30": Peaks(_A30, _rates(fp32=10.3, tf32=82, half=165, int8=330)),
    "NVIDIA A40": Peaks(_A40, _rates(fp32=37.4, tf32=74.8, half=149.7, int8=299.3)),
    "NVIDIA GeForce RTX 3090": Peaks(_GA102, _rates(fp32=35.6, tf32=35.6, half=71, int8=284)),
    "NVIDIA H100 80GB HBM3": _h100_sxm,
    "NVIDIA H100 PCIe": Peaks(_H100, _rates(fp32=51.2, tf32=378, half=756, fp8=1513, int8=1513)),
    "NVIDIA H100 NVL": Peaks(_H100_NVL, _nvl_rates),
    "NVIDIA H200": Peaks(_H200, _rates(fp32=67, tf32=494.5, half=989.5, fp8=1979, int8=1979)),
    "NVIDIA H200 NVL": Peaks(_H200_NVL, _nvl_rates),
    "NVIDIA B200": Peaks(_B200, _rates(fp32=75, tf32=1100, half=2250, fp8=4500, int8=4500)),
    "NVIDIA L4": Peaks(_L4, _rates(fp32=30.3, tf32=60, half=121, fp8=242.5, int8=242.5)),
    "NVIDIA L40S": Peaks(_L40S, _rates(fp32=91.6, tf32=183, half=362.05, fp8=733, int8=733)),
    "NVIDIA GeForce RTX 4090": _rtx_4090,
}


_told: dict[tuple[str, str], str] = {}
"""By kind and device, the name that it told last."""


def device_name(device: Any) -> str:
    """Return the exact model name of a torch device; of a lost one the name that it told before.

    Raises:
        RuntimeError: If it answers no more and never told.
    """
    own = device_of(device)
    key = (own.kind, str(device))
    try:
        _told[key] = own.name()
    except RuntimeError:
        if key not in _told:
            raise
    return _told[key]


def peak(name: str, precision: str, stated: float | None = None) -> Value:
    """Return the dense peak of one device in TFLOP/s, `declared` either way: by its vendor or by
    the user.

    Args:
        name: Exactly as the device's own library gives it. A slice of a GPU (MIG) has a name
            of its own.
        precision: fp32, tf32, bf16, fp16, fp8 or int8.
        stated: The user's own figure (`hardware.peak_tflops`), which comes first.
    """
    if stated is not None:
        return declared(stated)
    known = PEAKS.get(name)
    if known is None:
        return null(
            f"no peak rate known for {name} at {precision}; hardware.peak_tflops.{precision}"
            " declares it"
        )
    if precision not in known.tflops:
        return null(f"{known.source} states no {precision} rate for {name}")
    return declared(known.tflops[precision])
