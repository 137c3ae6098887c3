"""How fast a device multiplies matrices: what a forecast begins with where nothing is known."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

from pipeline.ledger.devices.table import device_of

REPEATS = 3
HOST, ACCELERATOR = 512, 4096  # sides of the matrices


@lru_cache(maxsize=8)
def device_rate(device: Any) -> float:
    """Return the FLOP/s of the best of a few products of square matrices: fp32 on a CPU, bf16 on
    another device.

    It takes some milliseconds, once a process.
    """
    import torch

    own = device_of(device)
    on_host = own.kind == "cpu"
    side, dtype = (HOST, torch.float32) if on_host else (ACCELERATOR, torch.bfloat16)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one starts libraries
        own.synchronise()
        before = time.perf_counter()
        _ = matrix @ matrix
        own.synchronise()
        best = min(best, time.perf_counter() - before)
    return 2.0 * side**3 / best
