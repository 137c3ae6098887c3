"""The processors of a host, which count as one device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.reader import Absent, Reader

if TYPE_CHECKING:
    import torch


class Cpu(Device):
    """A host. What was asked of it is done when the call returns: nothing is waited for."""

    kind = "cpu"
    fused_optimizer = True
    torchao = True

    @classmethod
    def count(cls) -> int:
        return 1

    def name(self) -> str:
        """Return the processor's name with its number of cores."""
        info = Path("/proc/cpuinfo")
        lines = attempted(
            lambda: info.read_text().splitlines() if info.is_file() else [], lambda _: list[str]()
        )
        named = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            "CPU",
        )
        return f"{named} x{os.cpu_count()}"

    def why_no_memory(self) -> str:
        return "a cpu run: no CUDA allocator"

    def synchronise(self) -> None:
        pass

    def why_no_compile(self) -> str | None:
        named = os.environ.get("CXX")
        which = "none is here" if named is None else f"CXX={named} is none"
        return attempted(_has_compiler, lambda _: f"torch.compile needs a C++ compiler, {which}")

    def reader(
        self, *, others: Sequence[str] = (), now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Reader:
        return Absent("a CPU run uses no GPU")

    def takes_lengths(self, dtype: torch.dtype, width: int) -> bool:
        return True


def _has_compiler() -> None:
    """Have torch look for the compiler of its C++; it raises where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()
