"""A CPU that passes for a device with graphs: it counts captures, and what would wait raises as
torch's sync-debug mode does on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.ledger.devices.cpu import Cpu
from pipeline.ledger.devices.device import Waits

aten = torch.ops.aten
WAITING = {aten.item, aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
"""What copies a value of the device to the host, or needs one to know a shape."""


class _Refusing(TorchDispatchMode):
    """Raises where an operation would wait."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch run what it compiled, which waits for nothing where it is one graph."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise Waits(f"a step waits for the device ({func})")
        return func(*args, **(kwargs or {}))


class Capturing(Cpu):
    """Replays a step by running it; `captured` counts captures, `dry` the runs before them."""

    kind = "capturing"
    captures = True
    captured = dry = 0

    @contextmanager
    def no_waits(self) -> Generator[None]:
        Capturing.dry += 1
        with _Refusing():
            yield

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        Capturing.captured += 1
        step()
        return step
