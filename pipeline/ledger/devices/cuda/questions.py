"""Questions to NVML that changed with its releases, or whose answer depends on the board.

Source: NVML API reference, device queries and field values; nvml.h on scopes of power.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GA100 = (8, 0)  # compute capability: the last chip whose nvmlDeviceGetPowerUsage is of the moment
RESERVED = "this driver counts what it reserves for itself as used (releases before 510 do)"
NOT_APART = "this driver does not tell the GPU's power apart from that of its module"


def first(nvml: Any, ask: Callable[[], Any], older: Callable[[], Any]) -> Any:
    """Return what the newer of two questions gives, or the older one where driver or library lack
    the newer.
    """
    try:
        return ask()
    except (nvml.NVMLError, AttributeError):
        return older()


def power_w(nvml: Any, handle: Any, *, module: bool) -> float:
    """Return watts at this moment, of the GPU or of the module that it shares with a CPU.

    Raises:
        NVMLError: If driver or board lack this field or this scope.
    """
    scope = nvml.NVML_POWER_SCOPE_MODULE if module else nvml.NVML_POWER_SCOPE_GPU
    field = nvml.nvmlDeviceGetFieldValues(handle, [(nvml.NVML_FI_DEV_POWER_INSTANT, scope)])[0]
    if field.nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(field.nvmlReturn)
    return field.value.uiVal / 1000


def averages_power(nvml: Any, handle: Any) -> bool:
    """Return whether nvmlDeviceGetPowerUsage is the mean of the last second on this board."""
    try:
        return tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) > GA100
    except (nvml.NVMLError, AttributeError):
        return True  # it is on most boards, and then less is concluded from it


def power_limit_w(nvml: Any, handle: Any) -> float:
    """Return the limit that the driver enforces, in watts: the least of all that were set, outside
    of the driver too.
    """
    enforced = lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
    return first(nvml, enforced, lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle)) / 1000


def capped_ns(nvml: Any, handle: Any) -> int:
    """Return nanoseconds, since the driver was loaded, for which the power limit held clocks
    down.
    """
    return int(nvml.nvmlDeviceGetViolationStatus(handle, nvml.NVML_PERF_POLICY_POWER).violationTime)


def memory_used(nvml: Any, handle: Any) -> int:
    """Return bytes that processes hold; of an older driver with what it reserves for itself, which
    does not change.
    """
    now = lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    return int(first(nvml, now, lambda: nvml.nvmlDeviceGetMemoryInfo(handle)).used)


def memory_of_processes(nvml: Any, handle: Any) -> int | str:
    """Return bytes that processes hold, or why a driver does not tell them from what it reserves
    for itself.

    Raises:
        NVMLError: If the memory cannot be asked for at all.
    """
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    except (nvml.NVMLError, AttributeError):
        nvml.nvmlDeviceGetMemoryInfo(handle)
        return RESERVED


def temperature_c(nvml: Any, handle: Any) -> int:
    """Return degrees Celsius of the chip."""
    return first(
        nvml,
        lambda: nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU),
        lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    )


def clock_reasons(nvml: Any, handle: Any) -> int:
    """Return the bit mask of reasons for lower clocks."""
    return first(
        nvml,
        lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    )
