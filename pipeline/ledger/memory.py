"""Memory pressure of a stage: what the device's allocator and the host gave at most, and what was
left.

The device's figures are the statistics of torch's caching allocator, whose peaks and counters begin
anew with each stage. What goes past it is in none of them: the CUDA context, libraries that
allocate for themselves, and managed memory (`cudaMallocManaged`, which paged optimizers use).
NVML's peak, beside them, sees the whole board, foreign processes included.

The host's figure is the kernel's high-water mark of this process's resident memory (`VmHWM`), which
`/proc/self/clear_refs` sets back at the beginning of a stage. `ru_maxrss` would be the peak of the
whole life, and after an `exec` even that of the process before it.
Source: torch's memory_stats; proc(5), /proc/pid/clear_refs (value 5, Linux 4.0).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.values import Value, derive, measured, null

ON_DEVICE = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "fragmentation",
    "alloc_retries",
    "ooms",
    "headroom_bytes",
    "total_bytes",
    "nvml_peak_bytes",
)
MEMORY = (*ON_DEVICE, "host_peak_rss_bytes")
"""The ledger's memory group, in order; what each means stands in the catalogue."""
RESET_PEAK = "5\n"  # what clear_refs takes to set the high-water mark back
UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|B|KiB|MiB|GiB|TiB)")
_DEVICE_WORDS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_HOST_WORDS = "DefaultCPUAllocator"  # how errors begin that torch raises as plain RuntimeError
# torch's name for it, and its older one
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class MemoryMeter:
    """Peak memory between `start` and `read`, of one device and of this process.

    Args:
        proc: The kernel's folder on this process; another one in tests.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self._why_no_host: str | None = "its reading was never started"
        self._why_no_device: str | None = None

    def start(self, device: Any) -> None:
        """Begin new peaks and counters."""
        self._why_no_device = attempted(
            lambda: _reset(device), lambda why: unmeasured("the device's memory", why)
        )
        self._why_no_host = attempted(
            self._reset_host, lambda why: unmeasured("the process's memory", why)
        )

    def _reset_host(self) -> str | None:
        try:
            # Without this the peak would be that of the whole process, earlier stages included.
            (self._proc / "clear_refs").write_text(RESET_PEAK)
        except OSError as error:
            return f"the process's peak cannot be set back to one stage's ({error.strerror})"
        return None

    def read(self, device: Any, nvml_peak: Value | None = None) -> dict[str, Value]:
        """Return the memory group of the ledger since `start`.

        Args:
            nvml_peak: Most bytes in use on the whole board in the same time, from a sampler.
        """
        own = device_of(device)
        found = unread(own.why_no_memory())
        if own.counts_memory:
            gone = lambda why: dict.fromkeys(ON_DEVICE, null(why))
            failed = lambda why: gone(unmeasured("the device's memory", why))
            found |= (
                gone(self._why_no_device)
                if self._why_no_device
                else attempted(lambda: _on_device(own), failed)
            )
            found["nvml_peak_bytes"] = nvml_peak or null("NVML's memory was not sampled")
        host = attempted(self._host_peak, lambda why: null(unmeasured("the process's memory", why)))
        return {**found, "host_peak_rss_bytes": host}

    def _host_peak(self) -> Value:
        if self._why_no_host is not None:
            return null(self._why_no_host)
        peak = _status_bytes(self._proc, "VmHWM")
        return null("the kernel states no VmHWM") if peak is None else measured(peak)


def unread(why: str) -> dict[str, Value]:
    """Return a memory group that nobody measured."""
    return {name: null(why) for name in MEMORY}


def _reset(device: Any) -> None:
    device_of(device).reset_memory()


def _on_device(device: Device) -> dict[str, Value]:
    now = device.allocator()
    allocated, reserved = measured(now.peak_allocated), measured(now.peak_reserved)
    total = measured(device.total_bytes())
    return {
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "fragmentation": _fragmentation(allocated, reserved),
        "alloc_retries": _counted(now.retries),
        "ooms": _counted(now.ooms),
        "headroom_bytes": derive(lambda whole, held: whole - held, total, reserved),
        "total_bytes": total,
    }


def _counted(number: int | None) -> Value:
    return null("torch does not count them on this device") if number is None else measured(number)


def _fragmentation(allocated: Value, reserved: Value) -> Value:
    """Return the share of the reserved peak that tensors never filled.

    The two peaks need not fall together: at the reserved peak itself it was this much or more.
    """
    if not reserved.value:
        return null("nothing was allocated on the device")
    return derive(lambda used, held: 1 - used / held, allocated, reserved)


def _status_bytes(proc: Path, name: str) -> int | None:
    """Return a figure of /proc/<pid>/status, which states kB and means KiB; None where it has
    none.
    """
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None
    )


# -- when there is not enough ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A device's memory at the moment it did not suffice, in bytes; None where it could not be
    read.

    Attributes:
        asked: Of the allocation that failed.
        allocated: In tensors of this process.
        reserved: Held by torch: allocated, and pieces that nothing fitted into.
        free: As the driver sees it.
        total: Of the device.
        expandable: Whether segments can grow, so that pieces do not get lost.
    """

    asked: int | None
    allocated: int
    reserved: int
    free: int | None
    total: int | None
    expandable: bool

    @property
    def unused(self) -> int:
        """Bytes held by torch and in no tensor. Before it gives up torch returns what it can: this
        is in pieces.
        """
        return self.reserved - self.allocated

    @property
    def elsewhere(self) -> int | None:
        """Bytes held by other processes, and by CUDA itself."""
        return (
            None
            if self.free is None or self.total is None
            else max(0, self.total - self.free - self.reserved)
        )

    @property
    def is_fragmented(self) -> bool:
        """Whether what was asked for would have fitted into what is free or held for nothing, were
        it in one piece.
        """
        return self.asked is not None and self.unused + (self.free or 0) >= self.asked


def read_pressure(error: BaseException, device: Any) -> Pressure:
    """Return how full a device that counts its memory is, now that `error` says it was too full."""
    own = device_of(device)
    try:
        free, total = own.free_bytes()
    except RuntimeError:  # after some errors the driver answers nothing any more
        free = total = None
    now = own.allocator()
    settings = next((os.environ[name] for name in _ALLOCATOR_SETTINGS if name in os.environ), "")
    return Pressure(
        asked=asked_bytes(error),
        allocated=now.allocated,
        reserved=now.reserved,
        free=free,
        total=total,
        expandable="expandable_segments:true" in settings.lower(),
    )


def is_of_host(error: BaseException) -> bool:
    """Return whether an error says that the host's memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _HOST_WORDS in str(error)
    )


def is_of_device(error: BaseException) -> bool:
    """Return whether an error says that the device's memory ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_WORDS)
    )


def asked_bytes(error: BaseException) -> int | None:
    """Return the bytes of the allocation that failed, or None where the message does not tell."""
    found = _ASKED.search(str(error))
    return None if found is None else round(float(found[1]) * UNITS[found[2]])


def host_now(proc: Path = Path("/proc")) -> tuple[int | None, int | None]:
    """Return bytes that this process holds, and bytes that the machine could still give."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        lines = []
    available = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )
    return _status_bytes(proc / "self", "VmRSS"), available


def write_snapshot(path: Path, device: Any) -> None:
    """Write the allocator's map of segments and blocks as JSON: for people, nothing here reads it
    back.

    It costs nothing until it is taken. Who allocated a block is in it only where
    torch's recording of memory history was on before, which is never done here, because it takes
    time. The member `snapshot`, pickled, is what torch's viewer at pytorch.org/memory_viz
    takes.

    Raises:
        OSError: If it cannot be written.
        RuntimeError: If the device answers nothing any more.
    """
    snapshot = device_of(device).memory_map()
    traced = any(snapshot.get("device_traces", []))
    about = "torch's CUDA allocator when memory ran out; addresses and sizes in bytes"
    text = json.dumps(
        {"about": about, "history_recorded": traced, "snapshot": snapshot},
        default=str,
        skipkeys=True,
    )
    path.write_text(text)
