"""The one small interface to an accelerator's counters: a reading per device and moment.

A kind of device whose counters nobody reads yet has `Absent`, which says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.ledger.shapes import ReportedDevices


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One device at one moment. Every figure is None where it could not be read; `missing` says
    why.

    Attributes:
        at_ns: Monotonic clock.
        energy_mj: Millijoules of the whole board since the driver was loaded; on some superchips of
            its module.
        module_power_w: Of the module that a superchip's GPU shares with a CPU.
        on_superchip: Whether it shares one.
        power_is_mean: Whether power is the mean of the last second, not that of the moment.
        busy: Share of NVML's last sampling period in which a kernel ran.
        memory_used_bytes: Without what the driver reserves for itself.
        throttle: Bit mask of reasons for lower clocks.
        power_capped_ns: Nanoseconds, since the driver was loaded, for which the power limit held
            clocks down.
        foreign_processes: Processes with a context beyond the job's own.
        sm_active: Share of the time since the reading before in which an SM had a warp;
            `tensor_active` and `dram_active` likewise. `nvlink_bytes_per_s` and `pcie_bytes_per_s`
            are both directions together.
    """

    at_ns: int
    uuid: str
    energy_mj: float | None = None
    power_w: float | None = None
    module_power_w: float | None = None
    on_superchip: bool = False
    power_is_mean: bool = False
    busy: float | None = None
    memory_used_bytes: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttle: int | None = None
    power_capped_ns: int | None = None
    foreign_processes: int | None = None
    sm_active: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None
    nvlink_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """Reads the counters of the job's own devices.

    Attributes:
        uuids: The devices.
        why: Why there is nothing to read; None where there is.
    """

    @property
    def uuids(self) -> tuple[str, ...]: ...
    @property
    def why(self) -> str | None: ...
    def read(self) -> tuple[Reading, ...]: ...
    def placement(self) -> ReportedDevices: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Absent:
    """A reader of nothing, that knows why."""

    why: str
    uuids: tuple[str, ...] = ()

    def read(self) -> tuple[Reading, ...]:
        """Return no reading."""
        return ()

    def placement(self) -> ReportedDevices:
        """Return nothing: no device reported anything."""
        return {}

    def close(self) -> None:
        """Nothing was opened."""
