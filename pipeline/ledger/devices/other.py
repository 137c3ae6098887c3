"""Accelerators that torch drives and nothing here has run on: Intel's, Apple's, any other."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.precision import Precision
from pipeline.ledger.devices.device import Allocator, Device, Event
from pipeline.ledger.devices.reader import Absent, Reader

if TYPE_CHECKING:
    import torch


BF16 = (Precision.bf16, Precision.bf16_pure)
BF16_MACOS = (14, 0)  # source: torch.backends.mps, dtypes


class Other(Device):
    """A device of any kind, by what torch has for all kinds."""

    def __init__(self, at: torch.device) -> None:
        super().__init__(at)
        self.kind = at.type

    @classmethod
    def count(cls) -> int:
        return 1  # torch has named it

    def name(self) -> str:
        """Return what its library calls it; else its kind and its host, never the CPU alone."""
        import torch

        ask: Any = getattr(getattr(torch, self.kind, None), "get_device_name", None)
        host = platform.processor() or platform.machine()
        return str(ask(self.at)) if callable(ask) else f"{self.kind} of {host}"


class Xpu(Other):
    """Intel's GPUs.

    Source: torch.xpu, its events, streams, random numbers and memory.
    """

    kind = "xpu"
    numbered = True
    events = True
    counts_memory = True
    fused_optimizer = True

    @classmethod
    def count(cls) -> int:
        import torch

        return torch.xpu.device_count()

    def make_current(self) -> None:
        import torch

        # torch.device("xpu") has no index, whatever its stubs say
        if self.at.index is not None:  # pyright: ignore[reportUnnecessaryComparison]
            torch.xpu.set_device(self.at)

    def make_event(self) -> Event:
        return _XpuEvent(self.at)

    def generators(self) -> list[torch.device]:
        return [self.at]

    def generator_state(self) -> torch.Tensor | None:
        import torch

        return torch.xpu.get_rng_state(self.at)

    def set_generator_state(self, state: torch.Tensor) -> None:
        import torch

        torch.xpu.set_rng_state(state, self.at)

    def reset_memory(self) -> None:
        import torch

        torch.xpu.reset_peak_memory_stats(self.at)

    def release_memory(self) -> None:
        import torch

        torch.xpu.empty_cache()

    def allocator(self) -> Allocator:
        import torch

        stats = torch.xpu.memory_stats(self.at)
        return Allocator(
            allocated=stats["allocated_bytes.all.current"],
            reserved=stats["reserved_bytes.all.current"],
            peak_allocated=stats["allocated_bytes.all.peak"],
            peak_reserved=stats["reserved_bytes.all.peak"],
            retries=stats.get("num_alloc_retries"),
            ooms=stats.get("num_ooms"),
        )

    def total_bytes(self) -> int:
        return self.free_bytes()[1]

    def free_bytes(self) -> tuple[int, int]:
        import torch

        return torch.xpu.mem_get_info(self.at)

    def memory_map(self) -> dict[str, Any]:
        raise RuntimeError("torch's viewer reads no map of an xpu's memory")

    def why_not_precision(self, precision: Precision) -> str | None:
        import torch

        if precision in BF16 and not torch.xpu.is_bf16_supported(including_emulation=False):
            return f"{precision.value} needs an xpu that computes in bf16, which this one does not"
        # torch scales losses on it too
        return None if precision is Precision.fp16 else super().why_not_precision(precision)

    def alone_in_environment(self) -> dict[str, str]:
        return {"ZE_AFFINITY_MASK": str(self.at.index or 0)}


class _XpuEvent:
    """An event in the stream of one device, whichever device is the thread's current one."""

    __slots__ = ("_at", "_event")

    def __init__(self, at: torch.device) -> None:
        import torch

        self._at, self._event = at, torch.xpu.Event(enable_timing=True)

    def record(self) -> None:
        import torch

        self._event.record(torch.xpu.current_stream(self._at))

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end_event: _XpuEvent) -> float:
        return self._event.elapsed_time(end_event._event)


class Mps(Other):
    """Apple's GPUs. They share the host's memory.

    Source: torch.mps.
    """

    kind = "mps"
    events = True
    fused_optimizer = True

    @classmethod
    def count(cls) -> int:
        import torch

        return int(torch.backends.mps.is_available())

    def synchronise(self) -> None:
        import torch

        torch.mps.synchronize()

    def make_event(self) -> Event:
        import torch

        return torch.mps.event.Event(enable_timing=True)

    def reader(
        self, *, others: Sequence[str] = (), now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Reader:
        return Absent("macOS tells the energy of an mps device to its administrator alone")

    def generators(self) -> list[torch.device]:
        return [self.at]

    def generator_state(self) -> torch.Tensor | None:
        import torch

        return torch.mps.get_rng_state(self.at)

    def set_generator_state(self, state: torch.Tensor) -> None:
        import torch

        torch.mps.set_rng_state(state, self.at)

    def release_memory(self) -> None:
        import torch

        torch.mps.empty_cache()

    def why_not_precision(self, precision: Precision) -> str | None:
        import torch

        if precision in BF16 and not torch.backends.mps.is_macos_or_newer(*BF16_MACOS):
            return f"{precision.value} on mps needs macOS {BF16_MACOS[0]}"
        return super().why_not_precision(precision)
