"""Reading GPUs: what NVML tells, and a reason for everything that it does not."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from fake_nvml import NO_DRIVER, NO_LIBRARY, NO_PERMISSION, NOT_SUPPORTED, FakeNvml, Gpu

from pipeline.ledger.gpm import ACTIVITY
from pipeline.ledger.nvml import COUNTERS, FIELDS, NvmlReader, Reading, open_reader, reader_for


def _open(nvml: FakeNvml, *uuids: str) -> Any:
    return open_reader(uuids or ("GPU-1",), nvml=nvml, now_ns=nvml.clock)


def _second(nvml: FakeNvml, reader: Any) -> Reading:
    """Return a reading a second after the first one."""
    reader.read()
    nvml.pass_time(1)
    return reader.read()[0]


def test_the_stand_in_has_the_real_modules_names_and_signatures() -> None:
    for name, member in vars(FakeNvml).items():
        if name.startswith(("nvml", "NVML", "c_nvml")):
            real = getattr(pynvml, name)
            if name.startswith("nvml"):
                ours = [p for p in inspect.signature(member).parameters if p != "self"]
                needed = [p.name for p in inspect.signature(real).parameters.values() if p.default is p.empty]
                assert len(needed) <= len(ours) <= len(inspect.signature(real).parameters), name
            elif isinstance(member, int):
                assert member == real, name
    request = pynvml.c_nvmlGpmMetricsGet_t()
    assert {"version", "numMetrics", "sample1", "sample2", "metrics"} <= {name for name, _ in request._fields_}
    assert {"metricId", "nvmlReturn", "value"} <= {name for name, _ in request.metrics[0]._fields_}
    assert {"isSupportedDevice"} <= {name for name, _ in pynvml.c_nvmlGpmSupport_t._fields_}


def test_a_reading_is_in_the_units_it_says() -> None:
    nvml = FakeNvml(Gpu(processes=3, throttle=4))
    reading = _second(nvml, _open(nvml))
    assert reading.missing == {}
    assert (reading.energy_mj, reading.power_w, reading.busy) == (5_200_000, 200.0, 0.9)
    assert (reading.memory_used_bytes, reading.sm_clock_mhz, reading.temperature_c) == (10_000, 1700, 50)
    assert (reading.throttle, reading.foreign_processes) == (4, 2)
    assert (reading.sm_active, reading.tensor_active, reading.dram_active) == pytest.approx((0.4, 0.25, 0.1))
    assert (reading.nvlink_bytes_per_s, reading.pcie_bytes_per_s) == (3 * 2**20, 7 * 2**20)


def test_only_the_jobs_own_devices_are_read() -> None:
    nvml = FakeNvml(Gpu("GPU-1"), Gpu("GPU-2", power_w=700.0))
    reader = _open(nvml, "GPU-2")
    assert [(reading.uuid, reading.power_w) for reading in reader.read()] == [("GPU-2", 700.0)]
    assert reader.placement()["uuids"] == ["GPU-2"]


@pytest.mark.parametrize(
    ("nvml", "uuids", "why"),
    [
        (FakeNvml(init=NO_LIBRARY), ["GPU-1"], "no NVIDIA driver to ask (Library Not Found)"),
        (FakeNvml(init=NO_DRIVER), ["GPU-1"], "no NVIDIA driver to ask (Driver Not Loaded)"),
        (FakeNvml(), ["GPU-9"], "NVML does not know GPU-9 (Not Found)"),
        (FakeNvml(), [], "this run uses no GPU"),
    ],
)
def test_what_cannot_be_opened_says_why(nvml: FakeNvml, uuids: list[str], why: str) -> None:
    reader = open_reader(uuids, nvml=nvml)
    assert (reader.why, reader.read(), reader.placement()) == (why, (), {})


def test_a_missing_library_and_other_devices_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_reader(["GPU-1"]).why == "nvidia-ml-py is not installed"
    assert reader_for(SimpleNamespace(type="cpu")).why == "a CPU run uses no GPU"
    assert reader_for(SimpleNamespace(type="xpu")).why == "no counters of xpu devices are read yet"


QUESTIONS = {"energy": "energy_mj", "power": "power_w", "utilization": "busy", "memory": "memory_used_bytes",
             "clock": "sm_clock_mhz", "temperature": "temperature_c", "throttle": "throttle",
             "processes": "foreign_processes"}  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_one_call_refuses_is_missing_alone(question: str) -> None:
    nvml = FakeNvml(Gpu(refuses={question: NOT_SUPPORTED}))
    reading = _second(nvml, _open(nvml))
    name = QUESTIONS[question]
    assert reading.missing[name] == "NVML: Not Supported"
    assert getattr(reading, name) is None
    assert set(reading.missing) <= {name, "memory_clock_mhz"}


def test_every_field_is_a_figure_or_has_a_reason() -> None:
    everything = dict.fromkeys([*QUESTIONS, "gpm"], NO_PERMISSION)
    for gpu in (Gpu(), Gpu(refuses=everything), Gpu(mig=1), Gpu(virtual=2), Gpu(gpm=False), Gpu(processes=0)):
        nvml = FakeNvml(gpu)
        reading = _second(nvml, _open(nvml))
        for name in FIELDS:
            assert (getattr(reading, name) is None) == (name in reading.missing), (gpu, name)


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (Gpu(mig=1), "MIG: the counter is the whole board's"),
        (Gpu("MIG-1"), "MIG: the counter is the whole board's"),
        (Gpu(virtual=2), "vGPU: the counter is the whole board's"),
    ],
)
def test_a_slice_of_a_board_has_no_counters_of_its_own(gpu: Gpu, why: str) -> None:
    nvml = FakeNvml(gpu)
    reading = _second(nvml, _open(nvml, gpu.uuid))
    for name in ("energy_mj", "power_w", "busy", "sm_active"):
        assert (getattr(reading, name), reading.missing[name]) == (None, why)
    assert reading.temperature_c == 50


def test_a_container_that_hides_processes_knows_no_foreign_load() -> None:
    nvml = FakeNvml(Gpu(processes=0))
    reading = _open(nvml).read()[0]
    assert reading.missing["foreign_processes"] == "NVML does not show this container's processes"


def test_activity_needs_hopper_and_two_samples() -> None:
    old = FakeNvml(Gpu(gpm=False))
    assert _second(old, _open(old)).missing["sm_active"].startswith("GPM: this device has no such counters")
    new = FakeNvml()
    assert _open(new).read()[0].missing["sm_active"] == "GPM: no sample before this one"


def test_samples_that_are_too_close_repeat_what_was_read() -> None:
    nvml = FakeNvml()
    reader = _open(nvml)
    _second(nvml, reader)
    nvml.gpus[0].metrics["NVML_GPM_METRIC_SM_UTIL"] = 80.0
    nvml.pass_time(0.05)
    assert reader.read()[0].sm_active == pytest.approx(0.4)
    nvml.pass_time(0.06)
    assert reader.read()[0].sm_active == pytest.approx(0.8)


def test_permission_lost_mid_run_stays_lost_and_no_sample_leaks() -> None:
    nvml = FakeNvml()
    reader = _open(nvml)
    assert _second(nvml, reader).sm_active is not None
    nvml.gpus[0].refuses["sample"] = NO_PERMISSION
    for _ in range(3):
        nvml.pass_time(1)
        reading = reader.read()[0]
        assert [reading.missing[name] for name in ACTIVITY] == ["GPM: Insufficient Permissions"] * len(ACTIVITY)
        assert reading.energy_mj is not None
    reader.close()
    assert nvml.samples == 0


def test_a_metric_that_the_device_lacks_is_missing_alone() -> None:
    nvml = FakeNvml()
    del nvml.gpus[0].metrics["NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC"]
    nvml.gpus[0].metrics["NVML_GPM_METRIC_DRAM_BW_UTIL"] = float("nan")
    reading = _second(nvml, _open(nvml))
    assert reading.nvlink_bytes_per_s is None  # half of a sum is no sum
    assert reading.missing["dram_active"] == "GPM: the driver gave no number"
    assert reading.sm_active == pytest.approx(0.4)


def test_placement_is_what_the_driver_tells() -> None:
    nvml = FakeNvml(Gpu("GPU-1"), Gpu("GPU-2"))
    reader = _open(nvml, "GPU-1", "GPU-2")
    assert isinstance(reader, NvmlReader)
    here = reader.placement()
    assert (here["driver"], here["mig"], here["exclusive"]) == ("999.1", False, "no")
    assert (here["device_names"], here["power_limit_w"]) == (["NVIDIA H200"] * 2, [700.0, 700.0])
    assert len(COUNTERS) == 9
