"""What benchmarks/gpu_known_load.py claims can fail: readings that break each bound, a made-up GPU
with faults.
"""

from __future__ import annotations

import copy
import gzip
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu import Simulated
from test_gpu_timeline import kernel, launch, x

from pipeline.ledger.gpu_phases import device_phases
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.traced_steps import StepTracer
from pipeline.ledger.values import declared, null

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
claims: Any = importlib.import_module("known_load.claims")
loads: Any = importlib.import_module("known_load.loads")
steps: Any = importlib.import_module("known_load.steps")
script: Any = importlib.import_module("gpu_known_load")

Readings = dict[str, Any]
device: Any = importlib.import_module("known_load.device")
PLAN = device.TINY
NAMES = [check.name for check in claims.CHECKS]
PEAK = declared(989.5).to_json()


@pytest.fixture(scope="module")
def whole() -> Readings:
    """Readings in which every check holds: of the made-up GPU, and by hand where only a real one
    has them.
    """
    gpu = Simulated()
    return {
        "flops": {
            "counted": 10**15,
            "known": 10**15,
            "seconds": [1.4, 1.5],
            "peak": PEAK,
            "ledger": 5.0,
            "counter": 5,
            "by_hand": 5,
        },
        "energy": loads.measure_energy(gpu, PLAN),
        "spin": loads.measure_spin(gpu, PLAN),
        "delays": steps.measure_delays(gpu, PLAN),
        "loop": {"places": [], "said": None},
        "loop_timeline": {
            "peak": PEAK,
            "runs": [
                {
                    "waits": [],
                    "host_wait_gain_ns": 199,
                    "slept_ns": 200,
                    "phases_s": {"forward": 0.6, "backward": 0.4},
                    "wall_s": 1.0,
                    "flops": 10**14,
                    "step_s": 1.0,
                }
            ],
        },
    }


@pytest.fixture
def readings(whole: Readings) -> Readings:
    return copy.deepcopy(whole)


def failed(readings: Readings) -> set[str]:
    outcomes = claims.judge(readings)
    assert all(outcome.state in ("pass", "FAIL") for outcome in outcomes)
    return {outcome.check.name for outcome in outcomes if outcome.state == "FAIL"}


def test_everything_holds_on_a_gpu_without_a_fault(readings: Readings) -> None:
    assert failed(readings) == set()
    assert [outcome.check.name for outcome in claims.judge(readings)] == NAMES


# -- each bound can be broken ---------------------------------------------------------------------


def _first(readings: Readings, load: str) -> Readings:
    return readings["energy"][load][0]


def _scale(figure: Readings, by: float) -> None:
    figure["value"] *= by


BROKEN: dict[str, Callable[[Readings], object]] = {
    "FLOPs of a matmul, counted / known": lambda r: r["flops"].update(counted=10**15 + 1),
    "FLOPs of a transformer, ledger / torch's counter on the device": (
        lambda r: r["flops"].update(counter=6)
    ),
    "FLOPs of a transformer, ledger less by hand": lambda r: r["flops"].update(by_hand=4),
    "MFU of matmuls": lambda r: r["flops"].update(seconds=[1.4, 1.0]),
    "energy above context-idle, 2N / N matmuls": lambda r: _scale(
        r["energy"]["doubling"][0]["twice"]["energy_j"], 1.06
    ),
    "energy, counter / integrated power, idle": lambda r: _scale(
        _first(r, "idle")["energy_integral_j"], 1.06
    ),
    "energy, counter / integrated power, half": lambda r: _scale(
        _first(r, "half")["energy_integral_j"], 0.94
    ),
    "energy, counter / integrated power, full": lambda r: _scale(
        _first(r, "full")["energy_integral_j"], 1.06
    ),
    "threads of the spinning kernel": lambda r: r["spin"].update(threads=32),
    "it spins until the window's end": lambda r: r["spin"]["windows"][0].update(lasted=False),
    "utilization as NVML has it": lambda r: _scale(r["spin"]["windows"][0]["busy"], 0.94),
    "SM activity as GPM has it": lambda r: _scale(r["spin"]["windows"][0]["sm_active"], 3),
    "host sleep in a step: gain of idle_host_wait / sleep": (
        lambda r: r["delays"]["steps"][0]["sleep"].update(idle_host_wait_ns=48 * 10**6)
    ),
    "host sleep in a step: largest change elsewhere / sleep": (
        lambda r: r["delays"]["steps"][0]["sleep"].update(idle_launch_gap_ns=2 * 10**6)
    ),
    "all classes of that step / its wall time": (
        lambda r: r["delays"]["steps"][0]["sleep"].update(wall_ns=60 * 10**6)
    ),
    "pageable copy: gain of copy_exposed / gain of the step": (
        lambda r: r["delays"]["steps"][0]["pageable"].update(copy_exposed_ns=5 * 10**6)
    ),
    "copy behind computing: exposed / copied": (
        lambda r: r["delays"]["steps"][0]["hidden"].update(copy_exposed_ns=10**6)
    ),
    "places where a step of the loop waits for the device": (
        lambda r: r["loop"].update(places=["loop.py:1"])
    ),
    "calls that wait for the device in traced steps": (
        lambda r: r["loop_timeline"]["runs"][0]["waits"].append("sync")
    ),
    "sleep in data loading: gain of idle_host_wait / sleep": (
        lambda r: r["loop_timeline"]["runs"][0].update(host_wait_gain_ns=179)
    ),
    "device time by phase, sum / wall time": (
        lambda r: r["loop_timeline"]["runs"][0].update(wall_s=1.03)
    ),
    "MFU of the training": lambda r: r["loop_timeline"]["runs"][0].update(flops=0),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_reading_fails_its_check_and_no_other(readings: Readings, name: str) -> None:
    BROKEN[name](readings)
    assert failed(readings) == {name}


def test_no_energy_above_idle_fails(readings: Readings) -> None:
    for window in readings["energy"]["doubling"][0].values():
        if isinstance(window, dict):
            window["energy_j"]["value"] = (
                readings["energy"]["idle"][0]["energy_j"]["value"] / 5.2 * window["seconds"]
            )
    assert "energy above context-idle, 2N / N matmuls" in failed(readings)


# -- what was not measured ------------------------------------------------------------------------


def test_a_null_fails_with_its_reason(readings: Readings) -> None:
    readings["spin"]["windows"][0]["sm_active"] = null("GPM: Insufficient Permissions").to_json()
    (outcome,) = [each for each in claims.judge(readings) if each.state == "FAIL"]
    assert outcome.check.name == "SM activity as GPM has it"
    assert "not measured: GPM: Insufficient Permissions" in str(outcome)
    assert outcome.to_json()["n"] == 0


def test_activity_of_zero_is_no_reading(readings: Readings) -> None:
    readings["spin"]["windows"][0]["sm_active"]["value"] = 0.0
    assert failed(readings) == {"SM activity as GPM has it"}


def test_a_section_that_broke_fails_all_its_checks(readings: Readings) -> None:
    readings["delays"] = {"failed": "RuntimeError: CUPTI"}
    assert failed(readings) == {check.name for check in claims.CHECKS if check.section == "delays"}


def test_no_repetition_fails(readings: Readings) -> None:
    readings["loop_timeline"]["runs"] = []
    assert failed(readings) == {
        check.name for check in claims.CHECKS if check.section == "loop_timeline"
    }


def test_a_copy_that_the_trace_does_not_show_is_not_hidden(readings: Readings) -> None:
    readings["delays"]["steps"][0]["hidden"]["copied_ns"] = 0
    assert failed(readings) == {"copy behind computing: exposed / copied"}


def test_one_repetition_outside_fails_whatever_the_mean() -> None:
    check = claims.Check("s", "n", claims.Bound(0.9, 1.1), lambda r: r["figures"])
    assert claims.outcome(check, {"figures": [1.0, 1.0, 1.11]}).state == "FAIL"
    assert claims.outcome(check, {"figures": [0.9, 1.1]}).state == "pass"
    assert claims.outcome(check, {"skipped": "why"}).state == "skip"
    assert not claims.Bound(0, 1, above=True).holds(0)
    assert not claims.Bound(0, 1).holds(float("nan"))


# -- a GPU with a fault ---------------------------------------------------------------------------

INTEGRAL = {f"energy, counter / integrated power, {load}" for load in claims.LOADS}
FAULTS: list[tuple[Readings, str, set[str]]] = [
    ({"integral_scale": 1.06}, "energy", INTEGRAL),
    ({"integral_scale": 0.94}, "energy", INTEGRAL),
    ({"fade": 40.0}, "energy", {"energy above context-idle, 2N / N matmuls"}),
    ({"spin_busy": 60}, "spin", {"utilization as NVML has it"}),
    ({"spin_sm": 2.5}, "spin", {"SM activity as GPM has it"}),
    ({"threads": 132}, "spin", {"threads of the spinning kernel"}),
    ({"copy_late_s": 0.005}, "delays", {"pageable copy: gain of copy_exposed / gain of the step"}),
    ({"hides": False}, "delays", {"copy behind computing: exposed / copied"}),
]


@pytest.mark.parametrize(("fault", "section", "expected"), FAULTS)
def test_a_fault_is_found(fault: Readings, section: str, expected: set[str]) -> None:
    assert failed({section: script.SECTIONS[section](Simulated(**fault), PLAN)}) == expected


def test_a_kernel_that_ends_early_is_noticed() -> None:
    found = failed({"spin": loads.measure_spin(Simulated(spin_share=0.5), PLAN)})
    assert "it spins until the window's end" in found


# -- the rest of the script -----------------------------------------------------------------------


def test_the_ledgers_count_of_a_transformer_is_torchs_and_by_hand() -> None:
    found = loads.transformer_flops(torch.device("cpu"))
    assert found["ledger"] == found["counter"] == found["by_hand"] > 0


def test_reads_on_the_host_are_noted_where_a_device_would_compute() -> None:
    clock = PhaseClock()
    with steps.HostReads(clock) as reads:
        reads.looks = True
        for phase in ("h2d", "forward", "log"):
            with clock.phase(phase):
                bool(torch.ones(3).all())
        reads.looks = False
        with clock.phase("forward"):
            torch.ones(1).item()
    assert len(reads.places) == 1
    assert reads.places[0].startswith(f"tests/{Path(__file__).name}:")


def test_a_step_of_the_loop_reads_nothing_on_the_host() -> None:
    plan = script.replace(PLAN, steps=4, rows=2, length=16)
    assert steps.measure_loop(Simulated(), plan)["places"] == []


def test_calls_that_wait_are_counted_inside_steps_only(tmp_path: Path) -> None:
    events = [
        x("user_annotation", "step 2", 100, 50),
        x("user_annotation", "other", 0, 500),
        x("cuda_runtime", "cudaStreamSynchronize", 120, 5),
        x("cuda_runtime", "cudaLaunchKernel", 130, 5),
        x("cuda_runtime", "cudaDeviceSynchronize", 150, 5),
        x("cuda_runtime", "cudaEventSynchronize", 99, 5),
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert steps.waiting_calls(path) == ["cudaStreamSynchronize"]


# -- what only CUDA has, with its parts replaced --------------------------------------------------


class Event:
    """Of a device that is always done."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at_ns = 0

    def record(self) -> None:
        self._at_ns = time.monotonic_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Event) -> float:
        return (end_event._at_ns - self._at_ns) / 1e6


def test_the_gpus_own_calls_fit_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda count: (cycles.append(count), time.sleep(count / 1e12))
    )
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    gpu = device.Cuda.__new__(device.Cuda)
    gpu.at, gpu.size, gpu._cycles_per_s, gpu._aside = torch.device("cpu"), 8, 0.0, None
    gpu._a, gpu._b, gpu._out = (torch.zeros(8, 8) for _ in range(3))
    gpu._pageable, gpu._pinned, gpu._there = (torch.ones(16, dtype=torch.uint8) for _ in range(3))
    assert gpu.counted_flops(3) == 3 * 2 * 8**3
    assert gpu.seconds_of(2) > 0
    assert gpu.spin(0.001)() is False
    assert cycles[:2] == [10**8, 10**9]
    assert cycles[2] == int(0.001 * gpu._cycles_per_s) > 0
    gpu.copy(aside=False)
    gpu.copy(aside=True)
    assert gpu.tracer(tmp_path).opens_at(1)


def test_threads_of_the_widest_kernel() -> None:
    kernels = [x("kernel", "spin", 0, 1, grid=[1, 1, 1], block=[1, 1, 1]), x("cpu_op", "mm", 0, 1)]
    assert device.threads(kernels) == 1
    assert (
        device.threads([*kernels, x("kernel", "k", 0, 1, grid=[132, 1, 1], block=[32, 4, 1])])
        == 132 * 128
    )
    with pytest.raises(claims.Unmeasured, match="no kernel"):
        device.threads([])


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the modes that torch is asked for."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", asked.append)
    return asked


def test_waiting_is_forbidden_in_steps_and_allowed_in_evaluations(
    modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(device: Any, plan: Any, clock: Any, before: Any, validate: Any) -> None:
        for step in range(4):
            before(step)
        validate()

    monkeypatch.setattr(steps, "training", training)
    assert steps.waits(Simulated(), PLAN, "error") == []
    assert modes == ["error", "error", "default", "default"]


def test_where_torch_says_that_it_waited(modes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def training(*_: Any) -> None:
        if mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn(
            "Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1
        )

    monkeypatch.setattr(steps, "training", training)
    for mode in ("error", "warn"):
        (where,) = steps.waits(Simulated(), PLAN, mode)
        assert where.startswith(f"tests/{Path(__file__).name}:")
        assert modes[-1] == "default"
    monkeypatch.setattr(
        steps, "training", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.waits(Simulated(), PLAN, "error")


class Profiler:
    """Torch's own on the CPU; a kernel of the device stands where the host asked for a product."""

    def __init__(self, _: Any) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.start, self.stop = self._profile.start, self._profile.stop

    def export_chrome_trace(self, path: str) -> None:
        self._profile.export_chrome_trace(path)
        raw = json.loads(Path(path).read_bytes())
        products = [
            event for event in raw["traceEvents"] if event.get("name") in ("aten::mm", "aten::bmm")
        ]
        for number, event in enumerate(products, start=1):
            raw["traceEvents"] += [
                launch(event["ts"], number, 0.1),
                kernel(event["ts"] + 0.2, 1, number),
            ]
        Path(path).write_text(json.dumps(raw))


@pytest.mark.slow
def test_a_late_batch_shows_in_the_loops_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = lambda folder, at, numbers: StepTracer(
        folder, torch.device("cuda"), numbers, make_profiler=Profiler
    )
    monkeypatch.setattr(steps, "StepTracer", lambda *args: tracer(*args) if args else StepTracer())
    monkeypatch.setattr(steps, "device_phases", lambda clock, at: device_phases(clock, at, Event))
    plan = script.replace(PLAN, rows=2, length=16)
    found: Readings = {"peak": PEAK, "runs": [steps.loop_timeline(Simulated(), plan)]}
    (run,) = found["runs"]
    assert run["slept_ns"] >= steps.LOOP_SLEEP_S * 1e9
    # other processes may have the processor
    assert run["host_wait_gain_ns"] > 0.5 * run["slept_ns"]
    assert run["waits"] == []
    assert sum(run["phases_s"].values()) == pytest.approx(run["wall_s"], rel=0.02)
    assert claims.outcome(claims.CHECKS[-1], found).state == "pass"


# -- the whole script -----------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "code"), [({}, 0), ({"threads": 2}, 1)])
def test_the_script_ends_with_1_where_a_check_fails(
    fault: Readings, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "simulated", lambda: Simulated(**fault))
    monkeypatch.setattr(script, "save_result", lambda *_: pytest.fail("a made-up GPU is no result"))
    monkeypatch.setattr(
        sys, "argv", ["x", "--device", "cpu", "--tiny", "--only", "spin", "loop_timeline"]
    )
    assert script.main() == code
    table = capsys.readouterr().out
    assert ("FAIL" in table) == bool(code)
    assert "skip calls that wait" in table


def test_a_section_that_raises_is_a_failure_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(device: Any, plan: Any) -> Readings:
        raise RuntimeError("CUDA error: out of luck\nand a stack")

    monkeypatch.setitem(script.SECTIONS, "energy", breaks)
    readings, log = script.measure(Simulated(), PLAN, ["energy", "spin"])
    assert readings["energy"] == {"failed": "RuntimeError: CUDA error: out of luck"}
    assert "threads" in readings["spin"]
    assert "Traceback" in log[0]


def test_remarks_name_rates_and_watts(readings: Readings) -> None:
    text = "\n".join(claims.remarks(readings))
    assert "TFLOP/s" in text
    assert "idle: power_w_mean=110.0" in text
    assert claims.remarks({"flops": {"failed": "x"}}) == []
