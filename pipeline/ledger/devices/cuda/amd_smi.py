"""What AMD SMI tells of an AMD GPU, found by its address on the bus.

Energy is a counter of ticks of some microjoules each. Power is that of the moment where the driver
tells it, else a mean; which words a board answers depends on its generation ("N/A" for the others).
Source: AMD SMI Python API reference: amdsmi_get_energy_count, amdsmi_get_power_info,
amdsmi_get_gpu_activity, amdsmi_get_gpu_vram_usage, amdsmi_get_clock_info, amdsmi_get_temp_metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.reader import Absent, Reader, Reading
from pipeline.ledger.shapes import ReportedDevices

NOW = ("socket_power", "current_socket_power")  # newest release first
MIB = 2**20
MISSING = {
    "throttle": "AMD SMI: reasons for lower clocks are not read yet",
    "foreign_processes": "AMD SMI: which processes are this job's own is not told",
    "sm_active": "AMD SMI has no such counter",
    "tensor_active": "AMD SMI has no such counter",
    "dram_active": "AMD SMI has no such counter",
    "nvlink_bytes_per_s": "AMD SMI: traffic between GPUs is not read yet",
    "pcie_bytes_per_s": "AMD SMI: traffic with the host is not read yet",
}


class AmdReader:
    """Reads one AMD GPU.

    Args:
        smi: The amdsmi module, initialised.
        address: Of the device, as `domain:bus:device.function`.
        handle: AMD SMI's of it.
    """

    why: str | None = None

    def __init__(self, smi: Any, address: str, handle: Any, now_ns: Callable[[], int]) -> None:
        self._smi, self._handle, self._now_ns = smi, handle, now_ns
        self.uuids = (address,)

    def read(self) -> tuple[Reading, ...]:
        """Return one reading; what the device does not tell is missing with the reason."""
        figures: dict[str, Any] = {}
        missing = dict(MISSING)
        for name, ask in self._questions().items():
            answer = attempted(ask, lambda why, n=name: f"AMD SMI: {unmeasured(n, why)}")
            (missing if isinstance(answer, str) else figures)[name] = answer
        if "power_w" in figures:
            figures["power_w"], figures["power_is_mean"] = figures["power_w"]
        return (Reading(at_ns=self._now_ns(), uuid=self.uuids[0], missing=missing, **figures),)

    def _questions(self) -> dict[str, Callable[[], Any]]:
        """Return how each counter is asked for, in the units of `Reading`."""
        smi, handle = self._smi, self._handle
        clock = lambda kind: smi.amdsmi_get_clock_info(handle, getattr(smi.AmdSmiClkType, kind))
        return {
            "energy_mj": self._energy_mj,
            "power_w": self._power,
            "busy": lambda: _told(smi.amdsmi_get_gpu_activity(handle), "gfx_activity", scale=0.01),
            "memory_used_bytes": lambda: _told(
                smi.amdsmi_get_gpu_vram_usage(handle), "vram_used", scale=MIB
            ),
            "sm_clock_mhz": lambda: _told(clock("GFX"), "clk", "cur_clk"),
            "memory_clock_mhz": lambda: _told(clock("MEM"), "clk", "cur_clk"),
            "temperature_c": lambda: smi.amdsmi_get_temp_metric(
                handle, smi.AmdSmiTemperatureType.JUNCTION, smi.AmdSmiTemperatureMetric.CURRENT
            ),
        }

    def _energy_mj(self) -> float | str:
        count = self._smi.amdsmi_get_energy_count(self._handle)
        # microjoules a tick
        return _told(count, "energy_accumulator", "power", scale=count["counter_resolution"] / 1000)

    def _power(self) -> tuple[float, bool] | str:
        """Return watts, and whether they are a mean."""
        told = self._smi.amdsmi_get_power_info(self._handle)
        now = _told(told, *NOW)
        watts = _told(told, "average_socket_power") if isinstance(now, str) else now
        return watts if isinstance(watts, str) else (watts, isinstance(now, str))

    def placement(self) -> ReportedDevices:
        """Return what the driver tells of the device; None for what it does not."""
        smi, handle = self._smi, self._handle
        name = lambda: str(smi.amdsmi_get_gpu_asic_info(handle)["market_name"])
        driver = lambda: str(smi.amdsmi_get_gpu_driver_info(handle)["driver_version"])
        return {
            "uuids": list(self.uuids),
            "device_names": [attempted(name, lambda _: None)],
            "driver": attempted(driver, lambda _: None),
            "exclusive": "unknown",
            "power_scope": "board",
        }

    def close(self) -> None:
        """Give back what AMD SMI holds for us."""
        attempted(self._smi.amdsmi_shut_down, lambda _: None)


def _told(answer: Any, *names: str, scale: float = 1) -> float | str:
    """Return the first of some fields that holds a number, or why none does."""
    found = next((answer[n] for n in names if isinstance(answer.get(n), int | float)), None)
    return f"AMD SMI: no {names[0]} on this device" if found is None else found * scale


def open_reader(
    address: str, *, smi: Any = None, now_ns: Callable[[], int] = time.monotonic_ns
) -> Reader:
    """Return a reader of the GPU at an address, or one of nothing that says why.

    Args:
        smi: The amdsmi module; None imports it.
    """
    if smi is None:
        try:
            import amdsmi as smi  # pyright: ignore[reportMissingImports] - comes with ROCm
        except ImportError:
            return Absent("amdsmi, which ROCm brings, is not installed")

    def opened() -> Reader:
        smi.amdsmi_init()
        return AmdReader(smi, address, smi.amdsmi_get_processor_handle_from_bdf(address), now_ns)

    return attempted(opened, lambda why: Absent(f"AMD SMI cannot open {address} ({why})"))
