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
Ampere on (GA100 left out), which lags behind in short windows. On superchips (GH200, GB200) power
is the GPU's and, beside it, that of its module, CPU and memory included; the energy counter may be
either's, which `ledger/gpu_usage.py` tells by comparing. A MIG slice has memory, processes and
activity of its own; clocks, heat and the power limit are its board's, which it feels; energy, power
and utilization of the board are not its own.
Source: NVML API reference, device queries, field values and GPM functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.cuda import questions
from pipeline.ledger.devices.cuda.gpm import ACTIVITY, Gpm
from pipeline.ledger.devices.cuda.handles import Slice, find, initialised, slice_of
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
    "power_capped_ns",
    "foreign_processes",
)
FIELDS = (*COUNTERS, *ACTIVITY)
_OF_THE_BOARD = ("energy_mj", "power_w", "busy")
"""What a MIG slice or a virtual GPU shares with its neighbours: readings are not the job's own."""
_SHARED = "the counter is the whole board's"
SUPERCHIPS = ("GH200", "GB200", "GB300")
"""In the names of boards whose GPUs share a module, and its power, with a CPU."""
OF_THE_MODULE = (
    "energy and power are the GPU's; where its counter is of the whole module (CPU and memory"
    " are in it), the energy is the GPU's power over time, and the module's stands apart"
)
LOST = "the GPU fell off its bus and answers no more: it needs a reset, or its machine a restart"


@dataclass(slots=True)
class _Device:
    uuid: str
    handle: Any
    board: Any  # the same, of a MIG slice its board's handle; None where that is not told
    gpm: Gpm
    shared: dict[str, str]  # by figure, why the reading is not the job's own
    superchip: bool  # shares a module with a CPU
    averages: bool  # the older question for power is a mean
    lost: bool = False


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
        self._devices = [self._device(uuid, handle) for uuid, handle in handles.items()]

    def _device(self, uuid: str, handle: Any) -> _Device:
        nvml, is_slice = self._nvml, uuid.startswith("MIG-")
        place = slice_of(nvml, uuid, handle)
        board = place.board if place is not None else None if is_slice else handle
        gpm = Gpm(nvml, handle if board is None else board, place and place.instance)
        name = str(self._or_none(lambda: nvml.nvmlDeviceGetName(handle)) or "")
        return _Device(
            uuid,
            handle,
            board,
            gpm,
            _of_slice(place) if is_slice else _of_board(nvml, handle),
            any(chip in name for chip in SUPERCHIPS),
            questions.averages_power(nvml, handle if board is None else board),
        )

    def read(self) -> tuple[Reading, ...]:
        """Return one reading per device; what a device does not tell is missing with the reason."""
        return tuple(self._read(device) for device in self._devices)

    def _read(self, device: _Device) -> Reading:
        figures: dict[str, Any] = {}
        missing = dict(device.shared)
        for name, ask in self._questions(device).items():
            if name in missing:
                continue
            answer = LOST if device.lost else self._answer(device, ask, name)
            (missing if isinstance(answer, str) else figures)[name] = answer
        if "power_w" in figures:
            figures["power_w"], figures["power_is_mean"] = figures["power_w"]
        at_ns = self._now_ns()
        if not device.lost:
            activity, gone = device.gpm.read(at_ns)
            figures |= activity
            missing |= gone
        missing |= {name: LOST for name in FIELDS if device.lost} | device.shared
        figures = {name: figure for name, figure in figures.items() if name not in missing}
        if (processes := figures.pop("foreign_processes", None)) is not None:
            if processes < self._own:
                missing["foreign_processes"] = "NVML does not show this container's processes"
            else:
                figures["foreign_processes"] = processes - self._own
        if device.superchip:
            figures["module_power_w"] = self._or_none(lambda: self._module_power(device))
        return Reading(
            at_ns=at_ns, uuid=device.uuid, missing=missing, on_superchip=device.superchip, **figures
        )

    def _answer(self, device: _Device, ask: Callable[[], Any], name: str) -> Any:
        """Return what a question gives, or a text: why it gives nothing. A lost device is not asked
        again: each question to one may take seconds.
        """

        def said() -> Any:
            try:
                return ask()
            except self._nvml.NVMLError as error:
                device.lost = error.value == self._nvml.NVML_ERROR_GPU_IS_LOST
                return LOST if device.lost else f"NVML: {error}"

        return attempted(said, lambda why: unmeasured(name, why))

    def _questions(self, device: _Device) -> dict[str, Callable[[], Any]]:
        """Return how each counter is asked for, in the units of `Reading`; power with whether it is
        a mean.
        """
        nvml, handle, board = self._nvml, device.handle, device.board
        return {
            "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
            "power_w": lambda: self._power(device),
            "busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "memory_used_bytes": lambda: questions.memory_of_processes(nvml, handle),
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: questions.temperature_c(nvml, board),
            "throttle": lambda: questions.clock_reasons(nvml, board),
            "power_capped_ns": lambda: questions.capped_ns(nvml, board),
            "foreign_processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }

    def _power(self, device: _Device) -> tuple[float, bool] | str:
        """Return watts of the GPU, and whether they are the mean of the last second: where a driver
        has no power of now.
        """
        nvml, handle = self._nvml, device.handle
        now = lambda: (questions.power_w(nvml, handle, module=False), False)
        if device.superchip:  # the older question does not say whose power it is
            try:
                return now()
            except (nvml.NVMLError, AttributeError):
                return questions.NOT_APART
        older = lambda: (nvml.nvmlDeviceGetPowerUsage(handle) / 1000, device.averages)
        return questions.first(nvml, now, older)

    def _module_power(self, device: _Device) -> float | None:
        if device.lost or device.shared:
            return None
        return questions.power_w(self._nvml, device.handle, module=True)

    def placement(self) -> ReportedDevices:
        """Return what the driver tells of the devices; None for what it does not."""
        nvml, devices = self._nvml, self._devices
        tell = lambda ask: [self._or_none(lambda d=d: ask(nvml, d)) for d in devices]
        return {
            "uuids": list(self.uuids),
            "device_names": tell(lambda nvml, d: nvml.nvmlDeviceGetName(d.handle)),
            "driver": self._or_none(nvml.nvmlSystemGetDriverVersion),
            "cuda_driver": self._or_none(nvml.nvmlSystemGetCudaDriverVersion),
            "mig": any(why.startswith("MIG") for d in devices for why in d.shared.values()),
            "exclusive": self._exclusive(devices[0].board),
            "power_limit_w": tell(lambda nvml, d: questions.power_limit_w(nvml, d.board)),
            "power_scope": "module" if any(d.superchip for d in devices) else "board",
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


def _each(names: Sequence[str], why: str) -> dict[str, str]:
    return dict.fromkeys(names, why)


def _of_slice(place: Slice | None) -> dict[str, str]:
    """Say which readings are not a MIG slice's own, and why."""
    shared = _each(_OF_THE_BOARD, f"MIG: {_SHARED}")
    if place is None:
        why = "MIG: NVML does not tell this slice's board"
        of_board = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "throttle")
        return shared | _each((*of_board, "power_capped_ns", *ACTIVITY), why)
    if place.alone is None:
        return shared | _each(
            ACTIVITY, "MIG: NVML does not tell who else is counted with this slice"
        )
    if not place.alone:
        return shared | _each(ACTIVITY, "MIG: other compute instances are counted with this slice")
    return shared


def _of_board(nvml: Any, handle: Any) -> dict[str, str]:
    """Say why a board's counters are not this device's own; nothing where they are."""
    mig = lambda: nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    virtual = lambda: (
        nvml.nvmlDeviceGetVirtualizationMode(handle) == nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU
    )
    # a device without either does not know the question
    kind = next((k for k, is_so in (("MIG", mig), ("vGPU", virtual)) if _asked(is_so)), None)
    names = (*_OF_THE_BOARD, "foreign_processes", *ACTIVITY)
    return {} if kind is None else _each(names, f"{kind}: {_SHARED}")


def _asked(question: Callable[[], bool]) -> bool:
    return attempted(question, lambda _: False)


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
                name, handle = find(nvml, uuid)
            except nvml.NVMLError as error:
                return Absent(_cannot_open(nvml, uuid, error))
            handles[name] = handle
        return NvmlReader(nvml, handles, own_processes=own_processes, now_ns=now_ns)

    return attempted(opened, lambda why: Absent(unmeasured("the GPU's state", why)))


def _cannot_open(nvml: Any, uuid: str, error: Any) -> str:
    if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
        return f"NVML cannot open {uuid}: {LOST}"
    known = "does not know" if error.value == nvml.NVML_ERROR_NOT_FOUND else "cannot open"
    return f"NVML {known} {uuid} ({error})"
