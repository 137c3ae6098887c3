"""A stand-in for the pynvml module, scripted: what a GPU does, and every way in which it may refuse
to tell.

`test_nvml.py` checks its names and signatures against the real module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

WORDS = {
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    9: "Driver Not Loaded",
    12: "Library Not Found",
    15: "GPU is lost",
}


class NVMLError(Exception):
    """As pynvml's: made from a code, says its name."""

    def __init__(self, code: int) -> None:
        self.value = code
        super().__init__(WORDS[code])


NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NO_DRIVER, NO_LIBRARY, LOST = 3, 4, 6, 9, 12, 15
OF_BOARDS = (
    "energy",
    "power",
    "utilization",
    "clock",
    "temperature",
    "throttle",
    "limit",
    "capped",
)
"""What no handle of a MIG slice is asked for: its board's handle is."""


@dataclass
class Gpu:
    """One device. `power_w` draws joules as the clock goes.

    Attributes:
        board: Of a MIG slice; `slices` are those of its GPU instance, and of itself.
        capability: What it computes like; (8, 0) is a GA100.
        module_w: Power of the module that a superchip's GPU shares with a CPU, in all.
        counts_module: Whether its energy counter is of the module.
        capped: Share of the time at its power limit, which its counter has.
        limit_mw: The limit that somebody set, and the one that is enforced.
        lost: Whether it fell off its bus.
    """

    uuid: str = "GPU-1"
    name: str = "NVIDIA H200"
    power_w: float = 200.0
    energy_mj: float = 5_000_000.0
    busy: int = 90
    memory: int = 10_000
    clock: int = 1700
    temperature: int = 50
    throttle: int = 0
    processes: int = 1
    mig: int = 0
    virtual: int = 0
    gpm: bool = True
    board: Gpu | None = None
    slices: tuple[int, int] = (1, 1)
    capability: tuple[int, int] = (9, 0)
    module_w: float | None = None
    counts_module: bool = False
    capped: float = 0.0
    capped_ns: int = 0
    limit_mw: tuple[int, int] = (700_000, 700_000)
    reserved: int = 0
    lost: bool = False
    frozen: bool = False  # the counters stand still
    metrics: dict[str, float] = field(
        default_factory=lambda: {
            "NVML_GPM_METRIC_SM_UTIL": 40.0,
            "NVML_GPM_METRIC_ANY_TENSOR_UTIL": 25.0,
            "NVML_GPM_METRIC_DRAM_BW_UTIL": 10.0,
            "NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC": 1.0,
            "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC": 2.0,
            "NVML_GPM_METRIC_PCIE_TX_PER_SEC": 3.0,
            "NVML_GPM_METRIC_PCIE_RX_PER_SEC": 4.0,
        }
    )
    refuses: dict[str, int] = field(default_factory=dict)  # by function: the error code


class FakeNvml:
    """Enough of pynvml for the reader. `pass_time` lets its clock and its devices go on."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_ERROR_NOT_FOUND, NVML_ERROR_GPU_IS_LOST = NOT_FOUND, LOST
    NVML_PERF_POLICY_POWER = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    (
        NVML_DEVICE_MIG_ENABLE,
        NVML_GPU_VIRTUALIZATION_MODE_VGPU,
        NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
    ) = (1, 2, 3)
    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_FI_DEV_POWER_INSTANT, NVML_POWER_SCOPE_GPU, NVML_POWER_SCOPE_MODULE = 186, 0, 1
    nvmlMemory_v2 = 33554472
    NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_ANY_TENSOR_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL = (
        2,
        5,
        10,
    )
    NVML_GPM_METRIC_PCIE_TX_PER_SEC, NVML_GPM_METRIC_PCIE_RX_PER_SEC = 20, 21
    NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC = 60, 61

    def __init__(self, *gpus: Gpu, init: int | None = None) -> None:
        self.gpus, self.init, self.now_ns = list(gpus or [Gpu()]), init, 10**15
        self.samples, self.asked = 0, 0
        self.scopes: list[int] = []  # of power, as they were asked for
        self.by_slice: list[int] = []  # GPU instances whose activity was asked for

    def clock(self) -> int:
        return self.now_ns

    def pass_time(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)
        for gpu in self.gpus:
            if not gpu.frozen:
                watts = gpu.module_w if gpu.counts_module and gpu.module_w else gpu.power_w
                gpu.energy_mj += watts * seconds * 1000
            gpu.capped_ns += round(gpu.capped * seconds * 1e9)

    def _ask(self, gpu: Gpu, name: str) -> Gpu:
        self.asked += 1
        if gpu.lost or (gpu.board is not None and gpu.board.lost):
            raise NVMLError(LOST)
        if gpu.board is not None and name in OF_BOARDS:
            raise NVMLError(NOT_SUPPORTED)
        if name in gpu.refuses:
            raise NVMLError(gpu.refuses[name])
        return gpu

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise NVMLError(self.init)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "999.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self._ask(self.gpus[index], "handle")

    def nvmlDeviceGetUUID(self, handle: Gpu) -> str:
        return self._ask(handle, "uuid").uuid

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        """As the driver: one lost GPU ends the search."""
        for gpu in self.gpus:
            self._ask(gpu, "handle")
        found = [gpu for gpu in self.gpus if gpu.uuid == uuid]
        if not found:
            raise NVMLError(NOT_FOUND)
        return found[0]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Gpu) -> int:
        return int(self._ask(handle, "energy").energy_mj)

    def nvmlDeviceGetPowerUsage(self, handle: Gpu) -> int:
        return int(self._ask(handle, "power").power_w * 1000)

    def nvmlDeviceGetUtilizationRates(self, handle: Gpu) -> Any:
        return SimpleNamespace(gpu=self._ask(handle, "utilization").busy)

    def nvmlDeviceGetFieldValues(self, handle: Gpu, fieldIds: list[tuple[int, int]]) -> Any:
        self.scopes += [scope for _, scope in fieldIds]
        code = handle.refuses.get("field", 0)
        own = self._ask(handle, "power").power_w
        watts = {self.NVML_POWER_SCOPE_GPU: own, self.NVML_POWER_SCOPE_MODULE: handle.module_w}
        return [
            SimpleNamespace(
                nvmlReturn=code if watts[scope] is not None else NOT_SUPPORTED,
                value=SimpleNamespace(uiVal=int((watts[scope] or 0) * 1000)),
            )
            for _, scope in fieldIds
        ]

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu, version: int | None = None) -> Any:
        """As the driver: version 1 counts what it reserves for itself."""
        if version is not None and "memory v2" in handle.refuses:
            raise NVMLError(handle.refuses["memory v2"])
        return SimpleNamespace(
            used=self._ask(handle, "memory").memory + (0 if version else handle.reserved)
        )

    def nvmlDeviceGetClockInfo(self, handle: Gpu, type: int) -> int:
        return self._ask(handle, "clock").clock

    def nvmlDeviceGetTemperature(self, handle: Gpu, sensor: int) -> int:
        return self._ask(handle, "temperature").temperature

    def nvmlDeviceGetTemperatureV(self, handle: Gpu, sensor: int) -> int:
        if "temperature v" in handle.refuses:
            raise NVMLError(handle.refuses["temperature v"])
        return self._ask(handle, "temperature").temperature

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Gpu) -> int:
        return self._ask(handle, "throttle").throttle

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: Gpu) -> Gpu:
        board = self._ask(migDevice, "parent").board
        assert board is not None, "no slice"
        return board

    def nvmlDeviceGetAttributes_v2(self, device: Gpu) -> Any:
        of_instance, own = self._ask(device, "attributes").slices
        return SimpleNamespace(gpuInstanceSliceCount=of_instance, computeInstanceSliceCount=own)

    def nvmlDeviceGetGpuInstanceId(self, device: Gpu) -> int:
        return 7

    def nvmlGpmMigSampleGet(self, device: Gpu, gpuInstanceId: int, gpmSample: Any) -> Any:
        self.by_slice.append(gpuInstanceId)
        return self.nvmlGpmSampleGet(device, gpmSample)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Gpu) -> int:
        return self._ask(handle, "throttle").throttle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Gpu) -> list[Any]:
        return [SimpleNamespace(pid=n) for n in range(self._ask(handle, "processes").processes)]

    def nvmlDeviceGetMigMode(self, handle: Gpu) -> list[int]:
        return [self._ask(handle, "mig").mig, 0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: Gpu) -> tuple[int, int]:
        return self._ask(handle, "capability").capability

    def nvmlDeviceGetViolationStatus(self, device: Gpu, perfPolicyType: int) -> Any:
        assert perfPolicyType == self.NVML_PERF_POLICY_POWER
        return SimpleNamespace(violationTime=self._ask(device, "capped").capped_ns)

    def nvmlDeviceGetVirtualizationMode(self, handle: Gpu) -> int:
        return self._ask(handle, "virtual").virtual

    def nvmlDeviceGetComputeMode(self, handle: Gpu) -> int:
        return 0

    def nvmlDeviceGetName(self, handle: Gpu) -> str:
        return self._ask(handle, "name").name

    def nvmlDeviceGetPowerManagementLimit(self, handle: Gpu) -> int:
        return self._ask(handle, "limit").limit_mw[0]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Gpu) -> int:
        if "enforced limit" in handle.refuses:
            raise NVMLError(handle.refuses["enforced limit"])
        return self._ask(handle, "limit").limit_mw[1]

    def nvmlGpmQueryDeviceSupport(self, device: Gpu) -> Any:
        return SimpleNamespace(isSupportedDevice=int(self._ask(device, "gpm").gpm))

    def nvmlGpmSampleAlloc(self) -> Any:
        self.samples += 1
        return SimpleNamespace(gpu=None, at_ns=None)

    def nvmlGpmSampleGet(self, device: Gpu, gpmSample: Any) -> Any:
        gpmSample.gpu, gpmSample.at_ns = self._ask(device, "sample"), self.now_ns
        return gpmSample

    def nvmlGpmSampleFree(self, gpmSample: Any) -> None:
        self.samples -= 1

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        metrics = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(20)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=metrics)

    def nvmlGpmMetricsGet(self, metricsGet: Any) -> Any:
        assert metricsGet.sample2.at_ns - metricsGet.sample1.at_ns >= 100_000_000, (
            "samples too close"
        )
        names = {getattr(self, name): name for name in metricsGet.sample2.gpu.metrics}
        for metric in metricsGet.metrics[: metricsGet.numMetrics]:
            name = names.get(metric.metricId)
            metric.nvmlReturn, metric.value = (
                (0, metricsGet.sample2.gpu.metrics[name]) if name else (NOT_SUPPORTED, 0.0)
            )
        return metricsGet
