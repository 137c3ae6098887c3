"""What the ledger says of a GPU under known load, small; benchmarks/gpu_known_load.py repeats it
and says how exactly.

Run with `pytest -m gpu`. `TEST_DEVICE=cpu` tries the tests themselves, on a GPU that is made up.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu import Simulated
from test_gpu import DEVICE, result_of

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
claims: Any = importlib.import_module("known_load.claims")
device: Any = importlib.import_module("known_load.device")
loads: Any = importlib.import_module("known_load.loads")
steps: Any = importlib.import_module("known_load.steps")

pytestmark = pytest.mark.gpu
PLAN = device.Plan(
    repeats=1,
    warm_s=1.0,
    lead_s=1.5,
    window_s=5.2,
    once_s=3.1,
    rest_s=0.5,
    settle_s=8.0,
    spin_s=3.0,
    steps=16,
    rows=4,
    length=64,
)


@pytest.fixture(scope="module")
def gpu() -> Generator[Any]:
    """The device under its meter."""
    found = device.Cuda() if DEVICE.type == "cuda" else Simulated()
    found.open()
    yield found
    found.close()


@pytest.fixture(scope="module")
def each_s(gpu: Any) -> float:
    """Seconds of a matmul on a warm device."""
    return loads.matmul_s(gpu, PLAN.warm_s)


@pytest.fixture(scope="module")
def idle(gpu: Any) -> list[dict[str, Any]]:
    """A window of context-idle."""
    loads.settle(gpu, PLAN)
    return [loads.window(gpu, lambda: gpu.sleep(PLAN.window_s))]


def holds(section: str, readings: dict[str, Any], *, only: str = "") -> None:
    """Assert the checks of a section whose names contain `only`."""
    checks = [check for check in claims.CHECKS if check.section == section and only in check.name]
    outcomes = [claims.outcome(check, readings) for check in checks]
    if outcomes[0].state == "skip":
        pytest.skip(outcomes[0].why)
    assert all(outcome.state == "pass" for outcome in outcomes), "\n".join(map(str, outcomes))


def test_flops_are_exact_and_mfu_is_a_share(gpu: Any) -> None:
    holds("flops", loads.measure_flops(gpu, PLAN))


@pytest.mark.parametrize(("load", "duty"), [("half", 0.5), ("full", 1.0)])
def test_counter_and_integrated_power_agree_under_load(
    gpu: Any, each_s: float, load: str, duty: float
) -> None:
    holds("energy", {load: loads.steady(gpu, PLAN, duty, each_s)}, only=f"integrated power, {load}")


def test_counter_and_integrated_power_agree_at_idle(idle: list[dict[str, Any]]) -> None:
    holds("energy", {"idle": idle}, only="integrated power, idle")


def test_twice_the_work_is_twice_the_energy_above_idle(
    gpu: Any, each_s: float, idle: list[dict[str, Any]]
) -> None:
    holds("energy", {"idle": idle, "doubling": loads.doubling(gpu, PLAN, each_s)}, only="2N / N")


def test_one_spinning_thread_is_all_utilization_and_no_activity(gpu: Any) -> None:
    holds("spin", loads.measure_spin(gpu, PLAN))


def test_injected_delays_are_found_in_their_class(gpu: Any) -> None:
    holds("delays", steps.measure_delays(gpu, PLAN))


def test_a_step_of_the_loop_waits_for_nothing(gpu: Any) -> None:
    holds("loop", steps.measure_loop(gpu, PLAN))


def test_the_loops_timeline_shows_a_late_batch(gpu: Any) -> None:
    holds("loop_timeline", steps.measure_loop_timeline(gpu, PLAN))


def test_a_recipe_has_a_timeline_its_traces_and_activity(tmp_path: Path) -> None:
    (row,) = result_of(tmp_path, "recipe=baseline")["rows"]
    ledger = row["ledger"]
    timeline, hours = ledger["gpu_timeline"], ledger["gpu_hours"]
    for figure in (timeline["busy"], hours["busy"], ledger["conditions"]["sm_active"]):
        assert (figure["value"] is None) == bool(figure["why_missing"])
    if DEVICE.type == "cpu":
        assert timeline["traces"] == []
        pytest.skip("a CPU has no timeline of a GPU, and says so")
    assert 0 < timeline["busy"]["value"] <= 1
    assert timeline["traced_steps"]["value"] == 2
    assert sum(
        timeline[name.removesuffix("_ns")]["value"] for name in claims.CLASSES
    ) == pytest.approx(1)
    kept = {path.name for path in tmp_path.glob("mlruns/runs/*/traces/*/*.json.gz")}
    assert len(timeline["traces"]) == 2
    assert {Path(name).name for name in timeline["traces"]} == kept
    assert 0 < hours["busy"]["value"] <= hours["attached"]["value"]
    assert timeline["phases_s"]["forward"] > 0
