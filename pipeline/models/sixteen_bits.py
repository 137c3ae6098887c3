"""What a device does well in 16 bits, and in what an artifact that is stored in them is computed.

A CPU without units for 16 bits multiplies them up to a hundred times slower than fp32, which a
short product tells.
"""

from __future__ import annotations

import math
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.ledger.devices.table import KINDS, device_of
from pipeline.ledger.numbers import times
from pipeline.models.load import load_config, quantized_by

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

SLOWEST = 10.0  # times fp32's product: a device on which it takes longer is refused
SLOWER = 1.5  # times fp32's product: below, one reading does not tell which is faster
# rows, inputs, outputs of the product that tells: 17 million multiplications, under 1 ms
PRODUCT = (64, 512, 512)
REPEATS = 5  # of it, the quickest counts: what interrupts a product only makes it longer


def torch_dtype(fmt: Format) -> torch.dtype:
    """Return the dtype of torch that a 16-bit format is."""
    import torch

    return {Format.bf16: torch.bfloat16, Format.fp16: torch.float16}[fmt]


@cache
def product_ratio(fmt: Format, device_type: str) -> float:
    """Return the time of a matrix product in `fmt` over fp32's on this device; infinite where there
    is none.
    """
    import torch

    def quickest_s(dtype: torch.dtype) -> float:
        rows, inputs, outputs = PRODUCT
        left = torch.ones(rows, inputs, dtype=dtype, device=device_type)
        right = torch.ones(inputs, outputs, dtype=dtype, device=device_type)
        seconds: list[float] = []
        for _ in range(REPEATS + 1):  # the first one chooses its kernel
            start = time.perf_counter()
            (left @ right)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    try:
        return quickest_s(torch_dtype(fmt)) / quickest_s(torch.float32)
    except (RuntimeError, TypeError):  # torch's words for a dtype that a device does not have
        return math.inf


def has_units(fmt: Format, device: torch.device) -> bool:
    """Return whether a device multiplies in `fmt` faster than in fp32."""
    stated = device_of(device).has_units(torch_dtype(fmt))
    return product_ratio(fmt, device.type) < 1 if stated is None else stated


def why_not(fmt: Format, device: torch.device) -> str | None:
    """Return why a device cannot compute in `fmt`, or None where it can."""
    own = device_of(device)
    stated = own.has_units(torch_dtype(fmt))
    if stated is not None:
        return None if stated else f"{own.name()} has no units for {fmt.value}"
    if own.kind not in KINDS:
        return f"{fmt.value} is known to work on {', '.join(KINDS)}, not on {own.kind}"
    ratio = product_ratio(fmt, device.type)
    if ratio <= SLOWEST:
        return None
    how_long = "cannot be computed" if math.isinf(ratio) else f"takes {ratio:.0f} times fp32's time"
    return f"a product in {fmt.value} {how_long} on this {device.type}, which has no units for it"


def units_said(fmt: Format, device: torch.device) -> str:
    """Return what is to be said of a device that computes in `fmt` without units for it; empty
    where it has them.
    """
    if has_units(fmt, device):
        return ""
    ratio = product_ratio(fmt, device.type)
    return (
        f"this {device.type} has no units for {fmt.value} (a product takes {ratio:.1f} times fp32's"
        " time): it saves memory, and no time"
    )


def slower_than_fp32(fmt: Format, device: torch.device) -> str | None:
    """Return how much longer than fp32 a device takes in `fmt`; None where it has units for it, or
    where the times lie too close to say.
    """
    if has_units(fmt, device) or (ratio := product_ratio(fmt, device.type)) < SLOWER:
        return None
    return f"{fmt.value} takes {times(ratio)} fp32's time on this {device.type}"


def best_first(device: torch.device) -> list[Format]:
    """Return the 16-bit formats, the one that suits a device best first: bf16 where there are units
    for it.
    """
    return sorted(
        SIXTEEN_BITS, key=lambda fmt: (not has_units(fmt, device), why_not(fmt, device) is not None)
    )


# -- what an artifact is stored in ----------------------------------------------------------------


def stored_format(config: PreTrainedConfig) -> Format | None:
    """Return the 16-bit format that a model is stored in; None for fp32, and for what a library has
    quantized.
    """
    import torch

    if quantized_by(config) is not None:
        return None
    dtype = config.dtype or config.get_text_config().dtype
    return {torch.bfloat16: Format.bf16, torch.float16: Format.fp16}.get(dtype)  # pyright: ignore


def stored_dtype(folder: str | Path, device: torch.device | str) -> torch.dtype:
    """Return the dtype in which an unquantized artifact is assessed and served as it is: the one it
    is stored in.

    fp32 where this device cannot compute in that; `stored_said` tells.
    """
    import torch

    fmt = stored_format(load_config(folder))
    if fmt is None or why_not(fmt, torch.device(device)) is not None:
        return torch.float32
    return torch_dtype(fmt)


def stored_said(folder: str | Path, device: torch.device | str) -> str | None:
    """Return why an artifact that is stored in 16 bits is not computed in them here; None where it
    is.
    """
    import torch

    fmt = stored_format(load_config(folder))
    why = None if fmt is None else why_not(fmt, torch.device(device))
    return None if fmt is None or why is None else f"stored in {fmt.value}, computed in fp32: {why}"
