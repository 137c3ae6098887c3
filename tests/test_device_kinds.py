"""What each kind of device says that it can, and that every question is asked of the run's own one.

Torch's modules of Intel's, Apple's and AMD's devices are stood in for; their names are torch's own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml, Gpu

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.quantization import Format
from pipeline.config.settings.run import Run
from pipeline.config.settings.serving import Decode
from pipeline.errors import UserError
from pipeline.ledger.devices import table
from pipeline.ledger.devices.cuda import amd_smi, device, rocm
from pipeline.ledger.devices.cuda.nvml import open_reader
from pipeline.ledger.devices.table import KINDS, device_of, open_device
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.memory import ON_DEVICE, MemoryMeter
from pipeline.ledger.peaks import device_name
from pipeline.quantization import ao
from pipeline.runs.opening import _reader
from pipeline.runs.preflight import check_decode
from pipeline.training.precision import frozen, why_not
from pipeline.training.prefetch import made_ahead
from pipeline.training.ranks import Place, Ranks

ROOT = Path(__file__).resolve().parent.parent
SECOND = torch.device("cuda:1")
XPU = torch.device("xpu:1")


@pytest.fixture
def hip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch one that was built for AMD's devices, two of which are there."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(table, "_opened", {})


# -- cuda:1 ---------------------------------------------------------------------------------------

ASKED = {
    "get_device_name": "name",
    "synchronize": "synchronise",
    "get_rng_state": "generator_state",
    "reset_peak_memory_stats": "reset_memory",
    "memory_stats": "allocator",
    "mem_get_info": "free_bytes",
    "get_device_capability": "capability",
    "set_device": "make_current",
}
"""By function of torch.cuda, the question that asks it."""


@pytest.mark.parametrize("function", ASKED)
def test_torch_is_asked_of_the_second_device(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    stats = dict.fromkeys(
        [
            f"{what}_bytes.all.{when}"
            for what in ("allocated", "reserved")
            for when in ("current", "peak")
        ]
        + ["num_alloc_retries", "num_ooms"],
        0,
    )
    monkeypatch.setattr(torch.cuda, "reset_accumulated_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, function, lambda at: asked.append(at) or stats)
    getattr(device_of(SECOND), ASKED[function])()
    assert set(asked) == {SECOND}


def test_a_state_is_set_and_memory_asked_for_on_the_second_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    known = SimpleNamespace(total_memory=8, uuid="b")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: asked.append(at))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: asked.append(at) or known)
    own = device_of(SECOND)
    own.set_generator_state(torch.zeros(1))
    assert own.total_bytes() == 8
    assert own.generators() == [SECOND]
    assert asked == [SECOND, SECOND]


def test_counters_are_of_the_second_visible_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch numbers what CUDA_VISIBLE_DEVICES leaves; NVML numbers all: the UUID tells which."""
    nvml = FakeNvml(
        *(Gpu(f"GPU-{each}", power_w=watts) for each, watts in zip("abc", (1, 2, 3), strict=True))
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    visible = {0: "c", 1: "b"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda at: SimpleNamespace(uuid=visible[at.index])
    )
    monkeypatch.setattr(
        device, "open_reader", lambda uuids, now_ns: open_reader(uuids, nvml=nvml, now_ns=now_ns)
    )
    reader = device_of(SECOND).reader()
    assert (reader.uuids, reader.read()[0].power_w) == (("GPU-b",), 2)
    # of several ranks of a host, all devices'; their joules add up (tests/test_gpu_sampler.py)
    first = torch.device("cuda", 0)
    names = [device_of(each).counted_as() for each in (first, SECOND)]
    assert names == ["GPU-c", "GPU-b"]
    ranks = Ranks(Place(0, 2, 0, 2), counted=tuple(names))
    found = _reader(first, ranks).read()
    assert [(each.uuid, each.power_w) for each in found] == [("GPU-c", 3), ("GPU-b", 2)]
    apart = dataclasses.replace(ranks, hosts=2)
    assert _reader(first, apart).why == "it was on 2 hosts, and counters are read of one alone"
    unnamed = dataclasses.replace(ranks, counted=("GPU-c", None))
    assert "several cuda devices are not read yet" in str(_reader(first, unnamed).why)


def test_batches_are_made_with_the_runs_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread begins on device 0, and page-locked memory would open it."""
    now = SimpleNamespace(device=None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: setattr(now, "device", at))
    made: list[Any] = []

    class Batch(dict[str, Any]):
        pass

    def batch(step: int) -> Batch:
        made.append(now.device)
        return Batch()

    with made_ahead(SimpleNamespace(batch=batch), 0, 2, SECOND) as ahead:
        ahead.batch(0)
    assert set(made) == {SECOND}


# -- what a kind can ------------------------------------------------------------------------------


@pytest.fixture
def modern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Intel's and Apple's devices ones that compute in bf16."""
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)


ABILITIES = {
    "cpu": {"fp32", "bf16", "bf16_pure", "auto", "native"},
    "xpu": {"fp32", "bf16", "bf16_pure", "auto", "native", "fp16"},
    "mps": {"fp32", "bf16", "bf16_pure", "auto", "native"},
    "rocm": {"fp32", "bf16", "bf16_pure", "auto", "native", "fp16"},
}


@pytest.mark.parametrize("kind", ABILITIES)
def test_the_precisions_of_a_kind(kind: str, modern: None) -> None:
    """What it cannot is said in a line that names the precision."""
    own = KINDS[kind](KINDS[kind].place(kind))
    reasons = {each.value: own.why_not_precision(each) for each in Precision}
    assert {name for name, why in reasons.items() if why is None} == ABILITIES[kind]
    assert all(why is None or name in why for name, why in reasons.items())


def test_older_devices_of_intel_and_apple_have_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert (why_not(Precision.bf16, XPU) or "").startswith("bf16 needs an xpu that")
    assert why_not(Precision.bf16_pure, torch.device("mps")) == "bf16_pure on mps needs macOS 14"
    assert frozen(Precision.auto, XPU) is Precision.fp32


def test_the_table_of_the_documentation_is_that_of_the_classes(
    monkeypatch: pytest.MonkeyPatch, modern: None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    lines = (ROOT / "docs/explanation.md").read_text().splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("| | `cpu` | `cuda`"))
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[first:]]
    kinds = [cell.partition("`")[0] for cell in cells[0][1:]]
    assert kinds == [kind for kind in ("cpu", "cuda", "rocm", "xpu", "mps") if kind in KINDS]
    stated = {row[0]: dict(zip(kinds, row[1:], strict=True)) for row in cells[2:8]}
    flags = {
        "time by phase on the device": "events",
        "memory": "counts_memory",
        "torchao's formats": "torchao",
        "captured decode": "captures",
    }
    for kind in kinds:
        own = KINDS[kind](KINDS[kind].place(kind))
        able = {each.value for each in Precision if own.why_not_precision(each) is None}
        told = stated["precisions"][kind]
        assert able - {"auto", "native"} == (
            {each.value for each in Precision} - {"auto", "native"}
            if told.startswith("all")
            else set(told.split(", "))
        ), kind
        for name, flag in flags.items():
            assert (stated[name][kind] == "yes") == getattr(own, flag), (kind, name)


@pytest.mark.parametrize(
    ("capability", "able"),
    [
        ((7, 5), {"fp32", "auto", "native", "fp16"}),
        ((8, 0), {"fp32", "auto", "native", "fp16", "tf32", "bf16", "bf16_pure"}),
        ((8, 9), {"fp32", "auto", "native", "fp16", "tf32", "bf16", "bf16_pure", "fp8_tensorwise"}),
        ((9, 0), {each.value for each in Precision}),
    ],
)
def test_the_precisions_of_a_cuda_device_follow_from_its_capability(
    capability: tuple[int, int], able: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert {each.value for each in Precision if why_not(each, SECOND) is None} == able


def test_a_decode_and_a_format_that_a_device_cannot_do_are_refused_with_the_remedy() -> None:
    run = Run()
    run.serving.decode = Decode.graph
    for kind in ("cpu", "mps", "xpu"):
        with pytest.raises(UserError, match=r"serving.decode: .*; give auto or compile"):
            check_decode(run, torch.device(kind))
    check_decode(run, torch.device("cuda"))
    with pytest.raises(UserError, match=r"stages.q.format: .* not on xpu; use one of them"):
        ao.refuse_device(Format.int8_weight_only, device=XPU, key="stages.q.format")


@pytest.mark.parametrize("kind", ["mps", "cpu"])
def test_memory_that_torch_does_not_count_is_null_with_the_kinds_reason(kind: str) -> None:
    figures = MemoryMeter().read(torch.device(kind))
    reasons = {figures[name].why_missing for name in ON_DEVICE}
    assert reasons == {device_of(torch.device(kind)).why_no_memory()}
    assert kind in "".join(map(str, reasons))


# -- Intel's and Apple's --------------------------------------------------------------------------


class Xpu:
    """As much of torch.xpu as the pipeline asks; `asked` are the devices it was asked of."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def _at(self, device: Any) -> None:
        self.asked.append(device)

    def device_count(self) -> int:
        return 2

    def set_device(self, device: Any) -> None:
        self._at(device)

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return self._at(device) or torch.ones(1)

    def set_rng_state(self, new_state: torch.Tensor, device: Any) -> None:
        self._at(device)

    def reset_peak_memory_stats(self, device: Any) -> None:
        self._at(device)

    def memory_stats(self, device: Any) -> dict[str, int]:
        self._at(device)
        sizes = {"allocated": 3, "reserved": 4}
        return {
            f"{k}_bytes.all.{when}": v for k, v in sizes.items() for when in ("current", "peak")
        }

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self._at(device) or (10, 16)

    def empty_cache(self) -> None:
        pass


def test_an_xpu_has_memory_generator_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    real, xpu = torch.xpu, Xpu()
    for name in (each for each in vars(Xpu) if not each.startswith("_")):
        assert callable(getattr(real, name)), name
    monkeypatch.setattr(torch, "xpu", xpu)
    monkeypatch.setattr(table, "_opened", {})
    own = open_device("xpu:1")
    assert own is not None
    assert open_device("xpu:2") is None
    own.make_current()
    state = own.generator_state()
    assert state is not None
    own.set_generator_state(state)
    figures = MemoryMeter()
    figures.start(XPU)
    read = figures.read(XPU)
    assert (read["peak_allocated_bytes"].value, read["total_bytes"].value) == (3, 16)
    assert read["ooms"].why_missing == "torch does not count them on this device"
    assert set(xpu.asked) == {XPU}
    assert own.alone_in_environment() == {"ZE_AFFINITY_MASK": "1"}


def test_an_mps_device_is_waited_for_and_keeps_its_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("synchronize", "get_rng_state", "set_rng_state", "empty_cache", "event")
    assert all(hasattr(torch.mps, name) for name in names)
    waits: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append("waited"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: torch.ones(2))
    own = device_of(torch.device("mps"))
    own.synchronise()
    assert waits == ["waited"]
    assert own.generators() == [torch.device("mps")]
    assert (own.generator_state() == torch.ones(2)).all()
    assert "administrator" in (own.reader().why or "")


# -- AMD's ----------------------------------------------------------------------------------------


class AmdError(Exception):
    pass


class Smi:
    """As much of the amdsmi module as is asked, of a board of 200 W."""

    AmdSmiClkType = SimpleNamespace(GFX="gfx", MEM="mem")
    AmdSmiTemperatureType = SimpleNamespace(JUNCTION="junction")
    AmdSmiTemperatureMetric = SimpleNamespace(CURRENT="current")

    def __init__(self, **power: Any) -> None:
        self.power = power or {"socket_power": "N/A", "current_socket_power": 200}
        self.ticks, self.now_ns, self.open = 10**9, 10**15, 0

    def pass_time(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)
        self.ticks += round(200 * seconds * 1e6 / 15.3)

    def amdsmi_init(self) -> None:
        self.open += 1

    def amdsmi_shut_down(self) -> None:
        self.open -= 1

    def amdsmi_get_processor_handle_from_bdf(self, bdf: str) -> str:
        if bdf != "0000:c1:00.0":
            raise AmdError("not found")
        return bdf

    def amdsmi_get_energy_count(self, handle: str) -> dict[str, Any]:
        return {"energy_accumulator": self.ticks, "counter_resolution": 15.3}

    def amdsmi_get_power_info(self, handle: str) -> dict[str, Any]:
        return self.power

    def amdsmi_get_gpu_activity(self, handle: str) -> dict[str, Any]:
        return {"gfx_activity": 75}

    def amdsmi_get_gpu_vram_usage(self, handle: str) -> dict[str, Any]:
        return {"vram_used": 100}

    def amdsmi_get_clock_info(self, handle: str, kind: str) -> dict[str, Any]:
        return {"clk": {"gfx": 2100, "mem": 1300}[kind]}

    def amdsmi_get_temp_metric(self, handle: str, sensor: str, metric: str) -> int:
        raise AmdError("no permission")

    def amdsmi_get_gpu_asic_info(self, handle: str) -> dict[str, str]:
        return {"market_name": "AMD Instinct MI300X"}

    def amdsmi_get_gpu_driver_info(self, handle: str) -> dict[str, str]:
        return {"driver_version": "6.12"}


@pytest.mark.parametrize("named", ["auto", "cuda:1", "rocm:1"])
def test_an_amd_device_is_its_own_kind_under_any_of_its_names(
    named: str, hip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda:1"))
    own = open_device(named)
    assert own is not None
    assert (own.kind, own.at, own.is_gpu) == ("rocm", SECOND, True)
    assert device_of(SECOND).kind == "rocm"
    assert (own.capability(), own.for_vllm, own.torchao) == (None, False, False)
    assert not own.takes_lengths(torch.bfloat16, 64)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3,5")
    assert own.alone_in_environment() == {"HIP_VISIBLE_DEVICES": "5"}
    assert open_device("rocm:2") is None


def test_a_torch_for_nvidia_has_no_amd_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(table, "_opened", {})
    assert open_device("rocm") is None
    assert device_of(torch.device("cuda")).kind == "cuda"


def test_what_amd_smi_tells_is_in_the_units_of_a_reading(hip: None) -> None:
    smi = Smi()
    sampler = Sampler(
        amd_smi.open_reader("0000:c1:00.0", smi=smi, now_ns=lambda: smi.now_ns),
        now_ns=lambda: smi.now_ns,
    )
    start_ns = smi.now_ns
    sampler.mark()
    for _ in range(10):
        smi.pass_time(1)
        sampler.mark()
    usage = sampler.usage((start_ns, smi.now_ns))
    assert usage.energy_j.value == pytest.approx(2000, rel=1e-3)
    assert (usage.energy_integral_j.value, usage.busy.value) == (2000.0, 0.75)
    assert usage.memory_used_peak_bytes.value == 100 * 2**20
    assert (usage.sm_clock_mhz_mean.value, usage.problems) == (2100, ())
    assert "no permission" in (usage.temperature_c_max.why_missing or "")
    assert "AMD SMI has no such counter" in (usage.sm_active.why_missing or "")
    assert "own is not told" in (usage.foreign_load.why_missing or "")
    placement = sampler.reader.placement()
    assert placement["device_names"] == ["AMD Instinct MI300X"]
    sampler.stop()
    assert smi.open == 0


def test_power_of_an_older_amd_board_is_a_mean_or_missing() -> None:
    open_it = lambda **power: amd_smi.open_reader("0000:c1:00.0", smi=Smi(**power))
    (mean,) = open_it(current_socket_power="N/A", average_socket_power=180).read()
    assert (mean.power_w, mean.power_is_mean) == (180, True)
    (none,) = open_it(average_socket_power="N/A").read()
    assert none.missing["power_w"] == "AMD SMI: no average_socket_power on this device"


def test_an_amd_device_is_found_by_its_address_or_says_why_not(
    hip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: bus)
    asked: list[str] = []
    monkeypatch.setattr(rocm, "open_reader", lambda address, now_ns: asked.append(address))
    device_of(SECOND).reader()
    assert asked == ["0000:c1:00.0"]
    assert amd_smi.open_reader("0000:c1:00.0").why == "amdsmi, which ROCm brings, is not installed"
    assert amd_smi.open_reader("0000:00:00.0", smi=Smi()).why == (
        "AMD SMI cannot open 0000:00:00.0 (AmdError: not found)"
    )


# -- lost -----------------------------------------------------------------------------------------


def test_a_lost_device_has_the_name_that_it_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(at: Any) -> str:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: "NVIDIA H200")
    assert device_name(SECOND) == "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert device_name(SECOND) == "NVIDIA H200"
    assert not device_of(SECOND).answers()
    with pytest.raises(torch.AcceleratorError):
        device_name(torch.device("cuda:7"))
