"""How fast a device multiplies matrices: what a forecast begins with where nothing is known."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

from pipeline.ledger.devices.table import device_of

REPEATS = 3
SMALLEST, HOST, ACCELERATOR = 128, 512, 4096  # sides of the matrices
LONG_S = 0.005  # a product that takes so long fills its device


@lru_cache(maxsize=8)
def device_rate(device: Any) -> float:
    """Return the FLOP/s of the best of a few products of square matrices: fp32 on a CPU, bf16 on
    another device.

    Matrices grow until a product takes long enough to tell. It takes some milliseconds, once a
    process, also on a device that has no units for bf16.
    """
    import torch

    own = device_of(device)
    on_host = own.kind == "cpu"
    largest, dtype = (HOST, torch.float32) if on_host else (ACCELERATOR, torch.bfloat16)
    side = SMALLEST
    while True:
        seconds = _of_product(torch.ones(side, side, device=device, dtype=dtype), own)
        if seconds >= LONG_S or side >= largest:
            return 2.0 * side**3 / seconds
        side *= 2


def _of_product(matrix: Any, own: Any) -> float:
    """Return the seconds of the quickest of a few squares of a matrix."""
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one starts libraries
        own.synchronise()
        before = time.perf_counter()
        _ = matrix @ matrix
        own.synchronise()
        best = min(best, time.perf_counter() - before)
    return best
