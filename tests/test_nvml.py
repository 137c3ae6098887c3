"""Reading GPUs: what NVML tells, and a reason for everything that it does not."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from fake_nvml import NO_DRIVER, NO_LIBRARY, NO_PERMISSION, NOT_SUPPORTED, OF_BOARDS, FakeNvml, Gpu

from pipeline.ledger.devices.cuda.gpm import ACTIVITY
from pipeline.ledger.devices.cuda.handles import full_uuid
from pipeline.ledger.devices.cuda.nvml import (
    COUNTERS,
    FIELDS,
    LOST,
    NvmlReader,
    Reading,
    open_reader,
)
from pipeline.ledger.devices.table import device_of


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
            if name.startswith("nvml") and callable(member):
                ours = [p for p in inspect.signature(member).parameters if p != "self"]
                needed = [
                    p.name
                    for p in inspect.signature(real).parameters.values()
                    if p.default is p.empty
                ]
                assert len(needed) <= len(ours) <= len(inspect.signature(real).parameters), name
            elif isinstance(member, int):
                assert member == real, name
    request = pynvml.c_nvmlGpmMetricsGet_t()
    assert {"version", "numMetrics", "sample1", "sample2", "metrics"} <= {
        name for name, _ in request._fields_
    }
    assert {"metricId", "nvmlReturn", "value"} <= {name for name, _ in request.metrics[0]._fields_}
    for struct, names in (
        (pynvml.c_nvmlGpmSupport_t, {"isSupportedDevice"}),
        (pynvml.c_nvmlMemory_v2_t, {"total", "reserved", "free", "used"}),
        (pynvml.c_nvmlViolationTime_t, {"referenceTime", "violationTime"}),
        (pynvml.c_nvmlDeviceAttributes, {"gpuInstanceSliceCount", "computeInstanceSliceCount"}),
        (pynvml.c_nvmlFieldValue_t, {"fieldId", "scopeId", "nvmlReturn", "value"}),
    ):
        assert names <= {field[0] for field in struct._fields_}


def test_a_reading_is_in_the_units_it_says() -> None:
    nvml = FakeNvml(Gpu(processes=3, throttle=4))
    reading = _second(nvml, _open(nvml))
    assert reading.missing == {}
    assert (reading.energy_mj, reading.power_w, reading.busy) == (5_200_000, 200.0, 0.9)
    assert (reading.memory_used_bytes, reading.sm_clock_mhz, reading.temperature_c) == (
        10_000,
        1700,
        50,
    )
    assert (reading.throttle, reading.foreign_processes) == (4, 2)
    assert (reading.sm_active, reading.tensor_active, reading.dram_active) == pytest.approx(
        (0.4, 0.25, 0.1)
    )
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
        (FakeNvml(Gpu(lost=True)), ["GPU-1"], f"NVML cannot open GPU-1: {LOST}"),
        (
            FakeNvml(Gpu(refuses={"handle": NO_PERMISSION})),
            ["GPU-1"],
            "NVML cannot open GPU-1 (Insufficient Permissions)",
        ),
        (FakeNvml(), [], "this run uses no GPU"),
    ],
)
def test_what_cannot_be_opened_says_why(nvml: FakeNvml, uuids: list[str], why: str) -> None:
    reader = open_reader(uuids, nvml=nvml)
    assert (reader.why, reader.read(), reader.placement()) == (why, (), {})


def test_a_missing_library_and_other_devices_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_reader(["GPU-1"]).why == "nvidia-ml-py is not installed"
    assert device_of(SimpleNamespace(type="cpu")).reader().why == "a CPU run uses no GPU"
    assert (
        device_of(SimpleNamespace(type="xpu")).reader().why
        == "no counters of xpu devices are read yet"
    )


QUESTIONS = {
    "energy": "energy_mj",
    "power": "power_w",
    "utilization": "busy",
    "memory": "memory_used_bytes",
    "clock": "sm_clock_mhz",
    "temperature": "temperature_c",
    "throttle": "throttle",
    "capped": "power_capped_ns",
    "processes": "foreign_processes",
}


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
    for gpu in (
        Gpu(),
        Gpu(refuses=everything),
        Gpu(mig=1),
        Gpu(virtual=2),
        Gpu(gpm=False),
        Gpu(processes=0),
    ):
        nvml = FakeNvml(gpu)
        reading = _second(nvml, _open(nvml))
        for name in FIELDS:
            assert (getattr(reading, name) is None) == (name in reading.missing), (gpu, name)


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (Gpu(mig=1), "MIG: the counter is the whole board's"),
        (Gpu(virtual=2), "vGPU: the counter is the whole board's"),
    ],
)
def test_a_slice_of_a_board_has_no_counters_of_its_own(gpu: Gpu, why: str) -> None:
    nvml = FakeNvml(gpu)
    reading = _second(nvml, _open(nvml, gpu.uuid))
    for name in ("energy_mj", "power_w", "busy", "sm_active"):
        assert (getattr(reading, name), reading.missing[name]) == (None, why)
    assert reading.temperature_c == 50


def _slice(**more: Any) -> Gpu:
    board = Gpu("GPU-1", mig=1, clock=1500, temperature=70, throttle=4, capped=0.5)
    return Gpu("MIG-1", board=board, memory=700, processes=2, **more)


def test_a_slice_has_its_own_memory_processes_and_activity() -> None:
    nvml = FakeNvml(_slice())
    reading = _second(nvml, _open(nvml, "MIG-1"))
    assert (reading.memory_used_bytes, reading.foreign_processes) == (700, 1)
    assert reading.sm_active == pytest.approx(0.4)
    assert nvml.by_slice == [7, 7]  # samples of the slice, not of its board
    for name in ("energy_mj", "power_w", "busy"):
        assert (getattr(reading, name), reading.missing[name]) == (
            None,
            "MIG: the counter is the whole board's",
        )


def test_a_slice_feels_its_boards_heat_clocks_and_power_limit() -> None:
    """Its own handle tells none of them."""
    nvml = FakeNvml(_slice())
    reader = _open(nvml, "MIG-1")
    reading = _second(nvml, reader)
    assert (reading.sm_clock_mhz, reading.temperature_c, reading.throttle) == (1500, 70, 4)
    assert set(reading.missing) == {"energy_mj", "power_w", "busy"}
    here = reader.placement()
    assert (here["mig"], here["power_limit_w"], here["uuids"]) == (True, [700.0], ["MIG-1"])
    assert {"energy", "power", "clock"} <= set(OF_BOARDS)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"slices": (2, 1)}, "MIG: other compute instances are counted with this slice"),
        (
            {"refuses": {"attributes": NOT_SUPPORTED}},
            "MIG: NVML does not tell who else is counted with this slice",
        ),
        ({"refuses": {"parent": NOT_SUPPORTED}}, "MIG: NVML does not tell this slice's board"),
    ],
)
def test_activity_that_may_be_a_neighbours_is_not_the_slices_own(
    more: dict[str, Any], why: str
) -> None:
    nvml = FakeNvml(_slice(**more))
    reading = _second(nvml, _open(nvml, "MIG-1"))
    assert (reading.sm_active, reading.missing["sm_active"]) == (None, why)
    assert reading.memory_used_bytes == 700
    for name in FIELDS:
        assert (getattr(reading, name) is None) == (name in reading.missing), name


def test_a_slice_is_found_by_the_name_that_torch_has_for_it() -> None:
    """Torch tells a slice's UUID without a prefix: `GPU-` before it names nothing."""
    nvml = FakeNvml(Gpu("MIG-1-2", board=Gpu("GPU-1", mig=1)))
    assert _open(nvml, "GPU-1-2").uuids == ("MIG-1-2",)
    assert full_uuid("1-2", {"CUDA_VISIBLE_DEVICES": "MIG-9, MIG-1-2"}) == "MIG-1-2"
    assert full_uuid("1-2", {}) == "GPU-1-2"
    assert full_uuid("MIG-1-2", {}) == "MIG-1-2"
    assert _open(nvml, "GPU-7").why == "NVML does not know GPU-7 (Not Found)"


def test_a_gpu_that_falls_off_its_bus_is_asked_no_more() -> None:
    nvml = FakeNvml()
    reader = _open(nvml)
    assert _second(nvml, reader).missing == {}
    nvml.gpus[0].lost = True
    nvml.pass_time(1)
    assert reader.read()[0].missing == dict.fromkeys(FIELDS, LOST)
    asked = nvml.asked
    nvml.pass_time(1)
    assert reader.read()[0].missing == dict.fromkeys(FIELDS, LOST)
    assert nvml.asked == asked
    assert reader.placement()["device_names"] == [None]
    reader.close()


def test_a_lost_neighbour_does_not_hide_the_jobs_own_gpu() -> None:
    """A search by UUID ends at the lost one."""
    nvml = FakeNvml(Gpu("GPU-1", lost=True), Gpu("GPU-2", power_w=300.0))
    (reading,) = _open(nvml, "GPU-2").read()
    assert (reading.uuid, reading.power_w) == ("GPU-2", 300.0)


@pytest.mark.parametrize(
    ("capability", "is_mean"), [((7, 0), False), ((8, 0), False), ((8, 6), True), ((9, 0), True)]
)
def test_power_is_that_of_the_moment_and_else_says_that_it_is_a_mean(
    capability: tuple[int, int], is_mean: bool
) -> None:
    """The older question's answer is a mean from Ampere on, on all but its largest chip."""
    now = FakeNvml(Gpu(capability=capability))
    reading = _second(now, _open(now))
    assert (reading.power_w, reading.power_is_mean) == (200.0, False)
    assert set(now.scopes) == {FakeNvml.NVML_POWER_SCOPE_GPU}
    older = FakeNvml(Gpu(capability=capability, refuses={"field": NOT_SUPPORTED}))
    reading = _second(older, _open(older))
    assert (reading.power_w, reading.power_is_mean) == (200.0, is_mean)
    unknown = FakeNvml(Gpu(refuses={"field": NOT_SUPPORTED, "capability": NOT_SUPPORTED}))
    assert _second(unknown, _open(unknown)).power_is_mean


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA GB200"])
def test_a_superchips_power_is_the_gpus_and_its_modules_stands_beside_it(name: str) -> None:
    nvml = FakeNvml(Gpu(name=name, module_w=450.0))
    reader = _open(nvml)
    reading = _second(nvml, reader)
    assert (reading.power_w, reading.module_power_w, reading.on_superchip) == (200.0, 450.0, True)
    assert reader.placement()["power_scope"] == "module"
    nvml.gpus[0].refuses["field"] = NOT_SUPPORTED  # the older question does not say whose it is
    reading = _second(nvml, reader)
    assert (reading.power_w, reading.module_power_w) == (None, None)
    assert "does not tell the GPU's power apart" in reading.missing["power_w"]
    board = FakeNvml()
    assert _open(board).placement()["power_scope"] == "board"
    assert _second(board, _open(board)).module_power_w is None


def test_memory_is_without_what_the_driver_reserves_or_is_not_told() -> None:
    nvml = FakeNvml(Gpu(reserved=500))
    assert _open(nvml).read()[0].memory_used_bytes == 10_000
    nvml.gpus[0].refuses["memory v2"] = NOT_SUPPORTED
    reading = _open(nvml).read()[0]
    assert reading.memory_used_bytes is None
    assert reading.missing["memory_used_bytes"].startswith("this driver counts what it reserves")


def test_the_power_limit_is_the_one_that_is_enforced() -> None:
    nvml = FakeNvml(Gpu(limit_mw=(700_000, 450_000)))
    assert _open(nvml).placement()["power_limit_w"] == [450.0]
    nvml.gpus[0].refuses["enforced limit"] = NOT_SUPPORTED
    assert _open(nvml).placement()["power_limit_w"] == [700.0]


def test_older_forms_of_questions_are_asked_where_the_newer_are_not_known() -> None:
    nvml = FakeNvml(Gpu(refuses={"temperature v": NOT_SUPPORTED}, throttle=8))

    def unknown(handle: Gpu) -> int:
        raise AttributeError("module 'pynvml' has no attribute")

    nvml.nvmlDeviceGetCurrentClocksEventReasons = unknown  # type: ignore[method-assign]
    reading = _open(nvml, "GPU-1").read()[0]
    assert (reading.temperature_c, reading.throttle) == (50, 8)


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError, AttributeError, OSError])
@pytest.mark.parametrize(
    "name",
    [
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetName",
        "nvmlGpmQueryDeviceSupport",
        "nvmlGpmSampleAlloc",
        "nvmlGpmMetricsGet",
        "nvmlDeviceGetHandleByUUID",
        "nvmlInit",
        "nvmlShutdown",
        "nvmlSystemGetDriverVersion",
    ],
)
def test_no_failure_of_the_library_gets_out(name: str, error: type[Exception]) -> None:
    nvml = FakeNvml()

    def fail(*_: Any, **__: Any) -> Any:
        raise error("unforeseen")

    setattr(nvml, name, fail)
    reader = _open(nvml, "GPU-1")
    if reader.why is not None:
        assert reader.why == f"the GPU's state could not be measured ({error.__name__}: unforeseen)"
        return
    reading = _second(nvml, reader)
    reader.placement()
    reader.close()
    assert any("unforeseen" in why for why in reading.missing.values()) or name in (
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetName",
        "nvmlShutdown",
        "nvmlSystemGetDriverVersion",
    )


def test_a_container_that_hides_processes_knows_no_foreign_load() -> None:
    nvml = FakeNvml(Gpu(processes=0))
    reading = _open(nvml).read()[0]
    assert reading.missing["foreign_processes"] == "NVML does not show this container's processes"


def test_activity_needs_hopper_and_two_samples() -> None:
    old = FakeNvml(Gpu(gpm=False))
    assert (
        _second(old, _open(old))
        .missing["sm_active"]
        .startswith("GPM: this device has no such counters")
    )
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
        assert [reading.missing[name] for name in ACTIVITY] == [
            "GPM: Insufficient Permissions"
        ] * len(ACTIVITY)
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
    assert len(COUNTERS) == 10
