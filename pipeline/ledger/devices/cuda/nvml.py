"""What NVML tells of the job's own GPUs, found by UUID: one reading per device and moment, gaps
with their reasons.

Nothing here interprets: `ledger/gpu_sampler.py` turns readings into figures of a window. One
process of a node reads for a run: a recipe is one process, and a meter refuses to be started once
per rank.

What a container can read: energy, power, clocks, temperature, throttle reasons, memory, and mostly
activity (GPM, from Hopper on). What it cannot: which process did what (the driver knows them by the
host's numbers). "Utilization" is the share of time in which any kernel ran, 100% for a single
spinning thread: `sm_active` is what says whether a GPU worked. Power is that of the moment (field
POWER_INSTANT) where the driver has it: nvmlDeviceGetPowerUsage is the mean of the last second from
Ampere on (GA100 left out), which lags behind in short windows. On superchips (GH200, GB200) energy
and power are those of the module, CPU and memory included.
Source: NVML API reference, device queries, field values and GPM functions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.cuda.gpm import ACTIVITY, Gpm
from pipeline.ledger.devices.reader import Absent, Reader, Reading
from pipeline.ledger.shapes import ReportedDevices

COUNTERS = (
    "energy_mj",
    "power_w",
    "busy",
    "memory_used_bytes",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "temperature_c",
    "throttle",
    "foreign_processes",
)
FIELDS = (*COUNTERS, *ACTIVITY)
_OF_THE_BOARD = ("energy_mj", "power_w", "busy", "foreign_processes")
"""What a MIG slice or a virtual GPU shares with its neighbours: the reading is not the job's own.
"""
SUPERCHIPS = ("GH200", "GB200", "GB300")
"""In the names of boards whose power and energy NVML tells for the whole module."""
OF_THE_MODULE = "energy and power are of the whole module: its CPU and memory are in them"


@dataclass(slots=True)
class _Device:
    uuid: str
    handle: Any
    gpm: Gpm
    shared: str | None  # why readings of the board are not the job's own
    is_slice: bool  # its activity is its own: GPM tells it by slice
    module: bool  # power and energy are of a superchip's module
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
        self,
        nvml: Any,
        handles: Mapping[str, Any],
        *,
        own_processes: int = 1,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._nvml, self._now_ns, self._own = nvml, now_ns, own_processes
        self.uuids = tuple(handles)
        self._devices = [
            self._device(uuid, handle, number)
            for number, (uuid, handle) in enumerate(handles.items())
        ]

    def _device(self, uuid: str, handle: Any, number: int) -> _Device:
        parent = self._or_none(lambda: _slice(self._nvml, uuid, handle))
        gpm = Gpm(
            self._nvml,
            handle if parent is None else parent[0],
            None if parent is None else parent[1],
        )
        name = str(self._or_none(lambda: self._nvml.nvmlDeviceGetName(handle)) or "")
        return _Device(
            uuid,
            handle,
            gpm,
            _shared(self._nvml, uuid, handle),
            parent is not None,
            any(chip in name for chip in SUPERCHIPS),
            number,
        )

    def read(self) -> tuple[Reading, ...]:
        """Return one reading per device; what a device does not tell is missing with the reason."""
        return tuple(self._read(device) for device in self._devices)

    def _read(self, device: _Device) -> Reading:
        figures: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name, ask in self._questions(device).items():
            answer = self._answer(ask, name)
            (missing if isinstance(answer, str) else figures)[name] = answer
        if "power_w" in figures:
            figures["power_w"], figures["power_is_mean"] = figures["power_w"]
        at_ns = self._now_ns()
        activity, gone = device.gpm.read(at_ns)
        figures |= activity
        missing |= gone
        if device.shared is not None:
            for name in (*_OF_THE_BOARD, *(() if device.is_slice else ACTIVITY)):
                figures.pop(name, None)
                missing[name] = device.shared
        if (processes := figures.pop("foreign_processes", None)) is not None:
            if processes < self._own:
                missing["foreign_processes"] = "NVML does not show this container's processes"
            else:
                figures["foreign_processes"] = processes - self._own
        return Reading(at_ns=at_ns, uuid=device.uuid, missing=missing, **figures)

    def _answer(self, ask: Callable[[], Any], name: str) -> Any:
        """Return what a question gives, or a text: why it gives nothing."""

        def said() -> Any:
            try:
                return ask()
            except self._nvml.NVMLError as error:
                return f"NVML: {error}"

        return attempted(said, lambda why: unmeasured(name, why))

    def _questions(self, device: _Device) -> dict[str, Callable[[], Any]]:
        """Return how each counter is asked for, in the units of `Reading`; power with whether it is
        a mean.
        """
        nvml, handle = self._nvml, device.handle
        return {
            "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
            "power_w": lambda: self._power(handle, device.module),
            "busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "memory_used_bytes": lambda: memory_used(nvml, handle),
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: _first(
                nvml,
                lambda: nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU),
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            ),
            "throttle": lambda: _first(
                nvml,
                lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
                lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            ),
            "foreign_processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }

    def _power(self, handle: Any, module: bool) -> tuple[float, bool]:
        """Return watts, and whether they are the mean of the last second: where a driver has no
        power of now.
        """
        nvml = self._nvml
        return _first(
            nvml,
            lambda: (_power_now(nvml, handle, module), False),
            lambda: (nvml.nvmlDeviceGetPowerUsage(handle) / 1000, True),
        )

    def placement(self) -> ReportedDevices:
        """Return what the driver tells of the devices; None for what it does not."""
        nvml, first = self._nvml, self._devices[0].handle
        limits = [
            self._or_none(lambda d=d: nvml.nvmlDeviceGetPowerManagementLimit(d.handle) / 1000)
            for d in self._devices
        ]
        return {
            "uuids": list(self.uuids),
            "device_names": [
                self._or_none(lambda d=d: nvml.nvmlDeviceGetName(d.handle)) for d in self._devices
            ],
            "driver": self._or_none(nvml.nvmlSystemGetDriverVersion),
            "cuda_driver": self._or_none(nvml.nvmlSystemGetCudaDriverVersion),
            "mig": any(
                device.shared is not None and device.shared.startswith("MIG")
                for device in self._devices
            ),
            "exclusive": self._exclusive(first),
            "power_limit_w": limits,
            "power_scope": "module" if any(device.module for device in self._devices) else "board",
        }

    def _exclusive(self, handle: Any) -> str:
        mode = self._or_none(lambda: self._nvml.nvmlDeviceGetComputeMode(handle))
        if mode is None:
            return "unknown"
        return "yes" if mode == self._nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS else "no"

    def _or_none(self, ask: Callable[[], Any]) -> Any:
        return attempted(ask, lambda _: None)

    def close(self) -> None:
        """Give back what NVML holds for us."""
        for device in self._devices:
            device.gpm.close()
        self._or_none(self._nvml.nvmlShutdown)


def _first(nvml: Any, ask: Callable[[], Any], older: Callable[[], Any]) -> Any:
    """Return what the newer of two questions gives, or the older one where driver or library lack
    the newer.
    """
    try:
        return ask()
    except (nvml.NVMLError, AttributeError):
        return older()


def _power_now(nvml: Any, handle: Any, module: bool) -> float:
    """Return watts at this moment, of the board or of a superchip's module."""
    scope = nvml.NVML_POWER_SCOPE_MODULE if module else nvml.NVML_POWER_SCOPE_GPU
    field = nvml.nvmlDeviceGetFieldValues(handle, [(nvml.NVML_FI_DEV_POWER_INSTANT, scope)])[0]
    if field.nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(field.nvmlReturn)
    return field.value.uiVal / 1000


def memory_used(nvml: Any, handle: Any) -> int:
    """Return bytes that processes hold; version 1 of the question counts what the driver reserves,
    too.
    """
    return int(
        _first(
            nvml,
            lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2),
            lambda: nvml.nvmlDeviceGetMemoryInfo(handle),
        ).used
    )


def _slice(nvml: Any, uuid: str, handle: Any) -> tuple[Any, int] | None:
    """Return the board of a MIG slice and the number of its GPU instance; None where it is no
    slice.
    """
    if not uuid.startswith("MIG-"):
        return None
    return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(
        handle
    ), nvml.nvmlDeviceGetGpuInstanceId(handle)


def _shared(nvml: Any, uuid: str, handle: Any) -> str | None:
    """Say why the board's counters are not this device's own, or None."""
    if uuid.startswith("MIG-"):
        return "MIG: the counter is the whole board's"
    mig = lambda: nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    virtual = lambda: (
        nvml.nvmlDeviceGetVirtualizationMode(handle) == nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU
    )
    if attempted(mig, lambda _: False):  # a device without MIG does not know the question
        return "MIG: the counter is the whole board's"
    return "vGPU: the counter is the whole board's" if attempted(virtual, lambda _: False) else None


# -- opening --------------------------------------------------------------------------------------
def open_reader(
    uuids: Sequence[str],
    *,
    nvml: Any = None,
    own_processes: int = 1,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> Reader:
    """Return a reader of these GPUs, or one of nothing that says why.

    Args:
        nvml: The pynvml module; None imports it.
    """
    if not uuids:
        return Absent("this run uses no GPU")
    nvml, why = initialised(nvml)
    if why:
        return Absent(why)

    def opened() -> Reader:
        handles: dict[str, Any] = {}
        for uuid in uuids:
            try:
                name, handle = _found(nvml, uuid)
            except nvml.NVMLError as error:
                return Absent(f"NVML does not know {uuid} ({error})")
            handles[name] = handle
        return NvmlReader(nvml, handles, own_processes=own_processes, now_ns=now_ns)

    return attempted(opened, lambda why: Absent(unmeasured("the GPU's state", why)))


def initialised(nvml: Any = None) -> tuple[Any, str]:
    """Return NVML, ready, with an empty text; else None and why not."""

    def ready() -> tuple[Any, str]:
        library = nvml
        if library is None:
            try:
                import pynvml as library
            except ImportError:
                return None, "nvidia-ml-py is not installed"
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            return None, f"no NVIDIA driver to ask ({error})"
        return library, ""

    return attempted(ready, lambda why: (None, unmeasured("the GPU's state", why)))


def _found(nvml: Any, uuid: str) -> tuple[str, Any]:
    """Return a device's UUID as NVML knows it, and its handle: torch tells a slice's without its
    prefix.
    """
    try:
        return uuid, nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        if not uuid.startswith("GPU-"):
            raise
        slice_uuid = f"MIG-{uuid.removeprefix('GPU-')}"
        return slice_uuid, nvml.nvmlDeviceGetHandleByUUID(slice_uuid)


def full_uuid(uuid: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a UUID as torch tells it with its prefix: `MIG-` where the environment names such a
    slice, else `GPU-`.
    """
    if uuid.startswith(("GPU-", "MIG-")):
        return uuid
    visible = [entry.strip() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return f"MIG-{uuid}" if f"MIG-{uuid}" in visible else f"GPU-{uuid}"
