"""Board energy from NVML's counter: a difference over a window, or null with the reason. Never power times time."""

from __future__ import annotations

from typing import Any

from pipeline.values import Value, measured, null

SHORTEST_WINDOW_S = 5.0  # the counter's steps are too coarse below


class EnergyMeter:
    """Reads the total energy of one CUDA device; knows why where it cannot."""

    def __init__(self, device: Any) -> None:
        self._handle: Any = None
        self.why = "a CPU run: no NVML device"
        if device.type == "cuda":
            self._open(device)

    def _open(self, device: Any) -> None:
        import torch

        try:
            import pynvml
        except ImportError:
            self.why = "pynvml is not installed"
            return
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            self._handle, self.why = None, f"NVML: {error}"

    def read_mj(self) -> int | None:
        """Return the counter in millijoules since the driver was loaded, or None."""
        if self._handle is None:
            return None
        import pynvml

        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            self.why = f"NVML: {error}"
            return None

    def spent(self, before_mj: int | None, after_mj: int | None, seconds: float) -> Value:
        """Return joules between two readings that lie `seconds` apart, or null with the reason; never zero."""
        if before_mj is None or after_mj is None:
            return null(self.why)
        if seconds < SHORTEST_WINDOW_S:
            return null(f"window shorter than {SHORTEST_WINDOW_S:.0f} s")
        if after_mj < before_mj:
            return null("the energy counter was reset during the window")
        if after_mj == before_mj:  # an idle board draws tens of watts
            return null("the energy counter stood still during the window")
        return measured((after_mj - before_mj) / 1000)
