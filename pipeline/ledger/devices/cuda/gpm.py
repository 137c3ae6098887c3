"""GPU activity from NVML's GPM counters (Hopper and later): what the SMs, tensor cores, memory and
links really did.

Two samples at least 100 ms apart give the shares between them. The permission to read may vanish
while a run lasts: from then on every figure is missing, with that reason.
Source: NVML API reference, "GPM Functions" and "GPM Metrics": SM_UTIL is the share of SMs that were
busy, ANY_TENSOR_UTIL the share of time in which SMs did tensor operations, DRAM_BW_UTIL the share
of the bandwidth used; the transfer rates are in MiB/s.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured

ACTIVITY = ("sm_active", "tensor_active", "dram_active", "nvlink_bytes_per_s", "pcie_bytes_per_s")
APART_NS = 100_000_000
PERCENT, MIB = 0.01, float(2**20)
_METRICS: dict[str, tuple[tuple[str, ...], float]] = {
    "sm_active": (("NVML_GPM_METRIC_SM_UTIL",), PERCENT),
    "tensor_active": (("NVML_GPM_METRIC_ANY_TENSOR_UTIL",), PERCENT),
    "dram_active": (("NVML_GPM_METRIC_DRAM_BW_UTIL",), PERCENT),
    "nvlink_bytes_per_s": (
        ("NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC", "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC"),
        MIB,
    ),
    "pcie_bytes_per_s": (
        ("NVML_GPM_METRIC_PCIE_TX_PER_SEC", "NVML_GPM_METRIC_PCIE_RX_PER_SEC"),
        MIB,
    ),
}
"""By figure: the metrics that are added up, and what one of their units is in ours."""


class Gpm:
    """Activity of one device between readings.

    Args:
        nvml: The pynvml module.
        handle: The device's; of a MIG slice its board's.
        instance: Number of the slice's GPU instance; None: the whole board.
    """

    def __init__(self, nvml: Any, handle: Any, instance: int | None = None) -> None:
        self._nvml, self._handle, self._instance = nvml, handle, instance
        self._before: Any = None
        self._before_ns = 0
        self._last: tuple[dict[str, float], dict[str, str]] | None = None
        self._why = self._unsupported()

    def _unsupported(self) -> str | None:
        def asked() -> str | None:
            try:
                supported = self._nvml.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice
            except self._nvml.NVMLError as error:
                return f"GPM: {error}"
            return (
                None if supported else "GPM: this device has no such counters (Hopper and later do)"
            )

        return attempted(asked, lambda why: unmeasured("GPU activity", why))

    def read(self, at_ns: int) -> tuple[dict[str, float], dict[str, str]]:
        """Return figures since the reading before, and why others are missing.

        A reading less than 100 ms after the one before repeats its figures.
        """
        if self._why is not None:
            return {}, dict.fromkeys(ACTIVITY, self._why)
        if self._last is not None and at_ns - self._before_ns < APART_NS:
            return self._last
        return attempted(
            lambda: self._sampled(at_ns), lambda why: self._lost(unmeasured("GPU activity", why))
        )

    def _sampled(self, at_ns: int) -> tuple[dict[str, float], dict[str, str]]:
        try:
            sample = self._nvml.nvmlGpmSampleAlloc()
        except self._nvml.NVMLError as error:
            return self._lost(f"GPM: {error}")
        try:
            if self._instance is None:
                self._nvml.nvmlGpmSampleGet(self._handle, sample)
            else:
                self._nvml.nvmlGpmMigSampleGet(self._handle, self._instance, sample)
            found = self._between(self._before, sample)
        except self._nvml.NVMLError as error:
            self._nvml.nvmlGpmSampleFree(sample)
            return self._lost(f"GPM: {error}")
        self.close()
        self._before, self._before_ns, self._last = sample, at_ns, found
        return found

    def _lost(self, why: str) -> tuple[dict[str, float], dict[str, str]]:
        self._why = why
        return {}, dict.fromkeys(ACTIVITY, self._why)

    def _between(self, before: Any, after: Any) -> tuple[dict[str, float], dict[str, str]]:
        if before is None:
            return {}, dict.fromkeys(ACTIVITY, "GPM: no sample before this one")
        wanted = [(name, metric) for name, (metrics, _) in _METRICS.items() for metric in metrics]
        request = self._nvml.c_nvmlGpmMetricsGet_t()
        request.version, request.numMetrics = self._nvml.NVML_GPM_METRICS_GET_VERSION, len(wanted)
        request.sample1, request.sample2 = before, after
        for index, (_, metric) in enumerate(wanted):
            request.metrics[index].metricId = getattr(self._nvml, metric)
        found = self._nvml.nvmlGpmMetricsGet(request)
        figures: dict[str, float] = {}
        missing: dict[str, str] = {}
        for index, (name, _) in enumerate(wanted):
            metric = found.metrics[index]
            if metric.nvmlReturn != self._nvml.NVML_SUCCESS:
                missing[name] = f"GPM: {self._nvml.NVMLError(metric.nvmlReturn)}"
            # NaN: the driver has no figure for this pair of samples
            elif metric.value != metric.value:
                missing[name] = "GPM: the driver gave no number"
            else:
                figures[name] = figures.get(name, 0.0) + metric.value * _METRICS[name][1]
        return {name: v for name, v in figures.items() if name not in missing}, missing

    def close(self) -> None:
        """Free the sample that is held."""
        if self._before is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlGpmSampleFree(self._before)
            self._before = None
