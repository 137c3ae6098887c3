"""What NVML tells of the job's own GPUs, found by UUID: one reading per device and moment, gaps with their reasons.

`Reader` is the one small interface to an accelerator's counters; NVIDIA's stands here, others have `Absent` until
somebody writes theirs. Nothing here interprets: `gpu_sampler.py` turns readings into figures of a window.
One process of a node reads for a run: a recipe is one process, and a meter refuses to be started once per rank.

What a container can read: energy, power, clocks, temperature, throttle reasons, memory, and mostly activity (GPM, from
Hopper on). What it cannot: which process did what (the driver knows them by the host's numbers). "Utilization" is the
share of time in which any kernel ran, 100% for a single spinning thread: `sm_active` is what says whether a GPU worked.
Source: NVML API reference, device queries and GPM functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.ledger.gpm import ACTIVITY, Gpm

COUNTERS = ("energy_mj", "power_w", "busy", "memory_used_bytes", "sm_clock_mhz", "memory_clock_mhz", "temperature_c",
            "throttle", "foreign_processes")  # fmt: skip
FIELDS = (*COUNTERS, *ACTIVITY)
_OF_THE_BOARD = ("energy_mj", "power_w", "busy", "foreign_processes")
"""What a MIG slice or a virtual GPU shares with its neighbours: the reading is not the job's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One device at one moment. Every figure is None where it could not be read; `missing` says why.

    Attributes:
        at_ns: Monotonic clock.
        energy_mj: Millijoules of the whole board since the driver was loaded.
        busy: Share of NVML's last sampling period in which a kernel ran.
        throttle: Bit mask of reasons for lower clocks.
        foreign_processes: Processes with a context beyond the job's own.
        sm_active: Share of the time since the reading before in which an SM had a warp; `tensor_active` and
            `dram_active` likewise. `nvlink_bytes_per_s` and `pcie_bytes_per_s` are both directions together.
    """

    at_ns: int
    uuid: str
    energy_mj: float | None = None
    power_w: float | None = None
    busy: float | None = None
    memory_used_bytes: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttle: int | None = None
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
    def placement(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Absent:
    """A reader of nothing, that knows why."""

    why: str
    uuids: tuple[str, ...] = ()

    def read(self) -> tuple[Reading, ...]:
        """Return no reading."""
        return ()

    def placement(self) -> dict[str, Any]:
        """Return nothing: no device told anything."""
        return {}

    def close(self) -> None:
        """Nothing was opened."""


@dataclass(slots=True)
class _Device:
    uuid: str
    handle: Any
    gpm: Gpm
    shared: str | None  # why readings of the board are not the job's own
    number: int  # place among the job's devices


class NvmlReader:
    """Reads NVIDIA GPUs.

    Args:
        nvml: The pynvml module, initialised.
        handles: By UUID.
        own_processes: How many processes of this job hold a context on each of its devices.
    """

    why: str | None = None

    def __init__(
        self, nvml: Any, handles: Mapping[str, Any], *, own_processes: int = 1,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        self._nvml, self._now_ns, self._own = nvml, now_ns, own_processes
        self.uuids = tuple(handles)
        self._devices = [
            _Device(uuid, handle, Gpm(nvml, handle), _shared(nvml, uuid, handle), number)
            for number, (uuid, handle) in enumerate(handles.items())
        ]

    def read(self) -> tuple[Reading, ...]:
        """Return one reading per device; what a device does not tell is missing with the reason."""
        return tuple(self._read(device) for device in self._devices)

    def _read(self, device: _Device) -> Reading:
        figures: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name, ask in self._questions(device.handle).items():
            try:
                figures[name] = ask()
            except self._nvml.NVMLError as error:
                missing[name] = f"NVML: {error}"
        at_ns = self._now_ns()
        activity, gone = device.gpm.read(at_ns)
        figures |= activity
        missing |= gone
        if device.shared is not None:
            for name in (*_OF_THE_BOARD, *ACTIVITY):
                figures.pop(name, None)
                missing[name] = device.shared
        if (processes := figures.pop("foreign_processes", None)) is not None:
            if processes < self._own:
                missing["foreign_processes"] = "NVML does not show this container's processes"
            else:
                figures["foreign_processes"] = processes - self._own
        return Reading(at_ns=at_ns, uuid=device.uuid, missing=missing, **figures)

    def _questions(self, handle: Any) -> dict[str, Callable[[], float]]:
        """Return how each counter is asked for, in the units of `Reading`."""
        nvml = self._nvml
        return {
            "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "throttle": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "foreign_processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }

    def placement(self) -> dict[str, Any]:
        """Return what the driver tells of the devices; None for what it does not."""
        nvml, first = self._nvml, self._devices[0].handle
        limits = [self._or_none(lambda d=d: nvml.nvmlDeviceGetPowerManagementLimit(d.handle) / 1000)
                  for d in self._devices]  # fmt: skip
        return {
            "uuids": list(self.uuids),
            "device_names": [self._or_none(lambda d=d: nvml.nvmlDeviceGetName(d.handle)) for d in self._devices],
            "driver": self._or_none(nvml.nvmlSystemGetDriverVersion),
            "cuda_driver": self._or_none(nvml.nvmlSystemGetCudaDriverVersion),
            "mig": any(device.shared is not None and device.shared.startswith("MIG") for device in self._devices),
            "exclusive": self._exclusive(first),
            "power_limit_w": limits,
        }

    def _exclusive(self, handle: Any) -> str:
        mode = self._or_none(lambda: self._nvml.nvmlDeviceGetComputeMode(handle))
        if mode is None:
            return "unknown"
        return "yes" if mode == self._nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS else "no"

    def _or_none(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        """Give back what NVML holds for us."""
        for device in self._devices:
            device.gpm.close()
        self._or_none(self._nvml.nvmlShutdown)


def _shared(nvml: Any, uuid: str, handle: Any) -> str | None:
    """Say why the board's counters are not this device's own, or None."""
    if uuid.startswith("MIG-"):
        return "MIG: the counter is the whole board's"
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE:
            return "MIG: the counter is the whole board's"
    except nvml.NVMLError:
        pass  # a device without MIG
    try:
        if nvml.nvmlDeviceGetVirtualizationMode(handle) == nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
            return "vGPU: the counter is the whole board's"
    except nvml.NVMLError:
        pass
    return None


# -- opening -----------------------------------------------------------------------------------------------------------
def open_reader(
    uuids: Sequence[str], *, nvml: Any = None, own_processes: int = 1, now_ns: Callable[[], int] = time.monotonic_ns
) -> Reader:
    """Return a reader of these GPUs, or one of nothing that says why.

    Args:
        nvml: The pynvml module; None imports it.
    """
    if not uuids:
        return Absent("this run uses no GPU")
    if nvml is None:
        try:
            import pynvml as nvml
        except ImportError:
            return Absent("nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Absent(f"no NVIDIA driver to ask ({error})")
    handles: dict[str, Any] = {}
    for uuid in uuids:
        try:
            handles[uuid] = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            return Absent(f"NVML does not know {uuid} ({error})")
    return NvmlReader(nvml, handles, own_processes=own_processes, now_ns=now_ns)


def reader_for(device: Any, *, now_ns: Callable[[], int] = time.monotonic_ns) -> Reader:
    """Return a reader of one torch device."""
    if device.type == "cpu":
        return Absent("a CPU run uses no GPU")
    if device.type != "cuda":
        return Absent(f"no counters of {device.type} devices are read yet")
    import torch

    if torch.version.hip is not None:
        return Absent("no counters of AMD devices are read yet")
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return open_reader([uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"], now_ns=now_ns)
