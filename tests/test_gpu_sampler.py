"""From readings to figures of a window, on an injected clock: joules, shares, and a reason wherever
there is none.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from fake_nvml import NO_PERMISSION, NOT_SUPPORTED, FakeNvml, Gpu
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger import gpu_sampler
from pipeline.ledger.devices.cuda.nvml import Absent, open_reader
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.gpu_usage import FIGURES, Usage
from pipeline.ledger.values import Provenance


def _sampler(nvml: FakeNvml) -> Sampler:
    sampler = Sampler(
        open_reader([gpu.uuid for gpu in nvml.gpus], nvml=nvml, now_ns=nvml.clock),
        now_ns=nvml.clock,
    )
    sampler.mark()
    return sampler


def _run(nvml: FakeNvml, sampler: Sampler, seconds: int) -> tuple[int, int]:
    """Let a window of so many seconds pass, read once a second; return its edges."""
    start_ns = nvml.now_ns
    sampler.mark()
    for _ in range(seconds):
        nvml.pass_time(1)
        sampler.tick()
    sampler.mark()
    return start_ns, nvml.now_ns


def _window(nvml: FakeNvml, seconds: int = 10) -> Usage:
    sampler = _sampler(nvml)
    return sampler.usage(_run(nvml, sampler, seconds))


def test_power_that_is_a_mean_is_held_against_the_counter_in_long_windows_only() -> None:
    """A mean of the last second lags behind: in short windows it differs from the counter for no
    fault of either.
    """
    lagging = lambda: Gpu(refuses={"field": NOT_SUPPORTED})
    for seconds, suspect in ((6, False), (12, True)):
        nvml = FakeNvml(lagging())
        nvml.nvmlDeviceGetPowerUsage = lambda handle: 150_000  # type: ignore[method-assign]
        assert any("suspect" in each for each in _window(nvml, seconds).problems) == suspect
    exact = FakeNvml(Gpu())
    field = exact.nvmlDeviceGetFieldValues

    def half(handle: Gpu, fieldIds: list[tuple[int, int]]) -> Any:
        found = field(handle, fieldIds)
        for each in found:
            each.value.uiVal //= 2
        return found

    exact.nvmlDeviceGetFieldValues = half  # type: ignore[method-assign]
    assert any("suspect" in each for each in _window(exact, 6).problems)


@pytest.mark.parametrize(
    ("counts_module", "joules", "provenance"),
    [(False, 2000.0, Provenance.MEASURED), (True, 2000.0, Provenance.ESTIMATED)],
)
def test_a_superchips_energy_is_the_gpus_whatever_its_counter_counts(
    counts_module: bool, joules: float, provenance: Provenance
) -> None:
    gpu = Gpu(name="NVIDIA GH200 480GB", module_w=450.0, counts_module=counts_module)
    usage = _window(FakeNvml(gpu))
    assert (usage.energy_j.value, usage.energy_j.provenance) == (joules, provenance)
    assert usage.module_energy_j.value == 4500.0
    assert usage.module_energy_j.provenance == (
        Provenance.MEASURED if counts_module else Provenance.ESTIMATED
    )
    assert (usage.power_w_mean.value, usage.problems) == (200.0, ())


def test_a_superchips_counter_that_is_nobodys_is_suspect() -> None:
    gpu = Gpu(name="NVIDIA GH200 480GB", module_w=450.0, counts_module=True)
    nvml = FakeNvml(gpu)
    sampler = _sampler(nvml)
    start_ns = nvml.now_ns
    for _ in range(10):
        gpu.energy_mj += 900_000
        nvml.pass_time(1)
        sampler.tick()
    sampler.mark()
    usage = sampler.usage((start_ns, nvml.now_ns))
    assert usage.problems == ("energy suspect: counter and integrated power differ by 85%",)
    assert usage.energy_j.provenance == Provenance.ESTIMATED


def test_a_modules_energy_is_not_added_up_over_the_gpus_that_share_it() -> None:
    two = [Gpu(uuid, name="NVIDIA GB200", module_w=900.0) for uuid in ("GPU-1", "GPU-2")]
    usage = _window(FakeNvml(*two))
    assert usage.energy_j.value == 4000.0
    assert usage.module_energy_j.why_missing == "several GPUs may share a module"
    alone = _window(FakeNvml())
    assert (alone.module_energy_j.why_missing or "").startswith("not a superchip")


def test_time_at_the_power_limit_is_the_drivers_count_where_it_counts() -> None:
    # seen at every reading, reached in a quarter of the time
    assert _window(FakeNvml(Gpu(throttle=0x04, capped=0.25))).power_cap_share.value == 0.25
    # between readings, seen at none
    assert _window(FakeNvml(Gpu(capped=0.1))).power_cap_share.value == pytest.approx(0.1)
    uncounted = Gpu(throttle=0x04, refuses={"capped": NOT_SUPPORTED})
    assert _window(FakeNvml(uncounted)).power_cap_share.value == 1.0


def test_a_gpu_that_is_lost_leaves_no_figure_of_its_window_and_those_before() -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    before = _run(nvml, sampler, 6)
    start_ns, _ = _run(nvml, sampler, 3)
    nvml.gpus[0].lost = True
    _, end_ns = _run(nvml, sampler, 3)
    usage = sampler.usage((start_ns, end_ns))
    assert {getattr(usage, name).value for name in FIGURES} == {None}
    assert "fell off its bus" in (usage.energy_j.why_missing or "")
    assert sampler.usage(before).energy_j.value == 1200.0


def test_a_window_by_hand() -> None:
    usage = _window(FakeNvml(Gpu(throttle=0x04 | 0x01)))
    assert (usage.energy_j.value, usage.energy_j.provenance) == (2000.0, Provenance.MEASURED)
    assert (usage.energy_integral_j.value, usage.energy_integral_j.provenance) == (
        2000.0,
        Provenance.ESTIMATED,
    )
    assert usage.power_w_mean.value == 200.0
    shares = [
        getattr(usage, name).value for name in ("busy", "sm_active", "tensor_active", "dram_active")
    ]
    assert shares == pytest.approx([0.9, 0.4, 0.25, 0.1])
    assert (usage.nvlink_bytes_per_s.value, usage.pcie_bytes_per_s.value) == pytest.approx(
        (3 * 2**20, 7 * 2**20)
    )
    assert (
        usage.temperature_c_max.value,
        usage.sm_clock_mhz_mean.value,
        usage.memory_used_peak_bytes.value,
    ) == (50, 1700, 10_000)
    # a board at its limit is not disturbed
    assert (usage.throttle_share.value, usage.power_cap_share.value) == (0.0, 1.0)
    assert usage.throttle_reasons == ("power cap",)
    assert (usage.foreign_load.value, usage.problems) == (0.0, ())


def test_idling_and_clocks_that_somebody_set_are_no_throttling() -> None:
    assert _window(FakeNvml(Gpu(throttle=0x01 | 0x02 | 0x10 | 0x100))).throttle_share.value == 0.0
    for reason in (0x08, 0x20, 0x40, 0x80):
        slowed = _window(FakeNvml(Gpu(throttle=reason | 0x04)))
        assert (slowed.throttle_share.value, slowed.power_cap_share.value) == (1.0, 1.0)


def test_shares_weigh_by_time_and_maxima_stay() -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    start_ns = nvml.now_ns
    for seconds, busy, temperature in ((3, 100, 80), (1, 20, 60)):
        nvml.gpus[0].busy, nvml.gpus[0].temperature = busy, temperature
        nvml.pass_time(seconds)
        sampler.mark()
    usage = sampler.usage((start_ns, nvml.now_ns))
    assert usage.busy.value == pytest.approx((3 * 1.0 + 1 * 0.2) / 4)
    assert usage.temperature_c_max.value == 80


def test_windows_apart_are_read_together_without_what_lies_between() -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    first = _run(nvml, sampler, 3)
    nvml.gpus[0].power_w = 10_000.0
    _run(nvml, sampler, 3)
    nvml.gpus[0].power_w = 400.0
    second = _run(nvml, sampler, 3)
    usage = sampler.usage(first, second)
    # 6 s in all, though neither has 5
    assert (usage.energy_j.value, usage.power_w_mean.value) == (1800.0, 300.0)
    assert sampler.usage(first).energy_j.why_missing == "window shorter than 5 s"


def test_devices_add_their_energy_and_average_their_shares() -> None:
    usage = _window(
        FakeNvml(Gpu("GPU-1", power_w=100.0, busy=100), Gpu("GPU-2", power_w=300.0, busy=50))
    )
    assert usage.energy_j.value == 4000.0
    assert usage.busy.value == pytest.approx(0.75)
    assert usage.power_w_mean.value == 400.0
    silent = _window(FakeNvml(Gpu("GPU-1"), Gpu("GPU-2", refuses={"energy": NOT_SUPPORTED})))
    assert silent.energy_j.why_missing == "GPU-2: NVML: Not Supported"
    assert silent.energy_integral_j.value == 4000.0


def test_a_short_window_has_no_energy_but_its_shares() -> None:
    usage = _window(FakeNvml(), 4)
    assert usage.energy_j.why_missing == "window shorter than 5 s"
    assert usage.busy.value == pytest.approx(0.9)


def test_a_reset_counter_is_no_energy_neither_absolute_nor_zero() -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    start_ns, _ = _run(nvml, sampler, 5)
    nvml.gpus[0].energy_mj = 0.0
    _, end_ns = _run(nvml, sampler, 5)
    usage = sampler.usage((start_ns, end_ns))
    assert usage.energy_j.why_missing == "GPU-1: the energy counter was reset during the window"
    assert usage.problems == ("energy: the counter of GPU-1 was reset",)
    assert usage.power_w_mean.provenance == Provenance.ESTIMATED
    after = sampler.usage(_run(nvml, sampler, 6))
    assert (after.energy_j.value, after.problems) == (1200.0, ())


def test_a_counter_that_stands_still_is_no_zero() -> None:
    usage = _window(FakeNvml(Gpu(frozen=True)))
    assert usage.energy_j.why_missing == "GPU-1: the energy counter stood still during the window"


@pytest.mark.parametrize(("factor", "suspect"), [(1.04, False), (1.07, True), (0.9, True)])
def test_counter_and_power_that_disagree_are_suspect(factor: float, suspect: bool) -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    start_ns = nvml.now_ns
    for _ in range(10):
        nvml.gpus[0].energy_mj += 200_000 * (factor - 1)
        nvml.pass_time(1)
        sampler.tick()
    sampler.mark()
    problems = sampler.usage((start_ns, nvml.now_ns)).problems
    assert bool(problems) == suspect
    assert all(
        problem.startswith("energy suspect: counter and integrated power differ by")
        for problem in problems
    )


def test_permission_lost_half_way_leaves_no_share_of_the_whole() -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    start_ns, _ = _run(nvml, sampler, 5)
    nvml.gpus[0].refuses["sample"] = NO_PERMISSION
    _, end_ns = _run(nvml, sampler, 5)
    usage = sampler.usage((start_ns, end_ns))
    assert usage.sm_active.why_missing == "GPU-1: GPM: Insufficient Permissions"
    assert usage.busy.value == pytest.approx(0.9)


def test_a_window_that_was_hardly_read_has_no_figures() -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    start_ns = nvml.now_ns
    nvml.pass_time(2)
    sampler.tick()
    nvml.pass_time(8)  # and the reader hangs
    usage = sampler.usage((start_ns, nvml.now_ns))
    assert {getattr(usage, name).why_missing for name in FIGURES} == {
        "GPU-1 was read in 20% of the window only"
    }


def test_nothing_to_read_is_nothing_with_the_reason() -> None:
    sampler = Sampler(Absent("a CPU run uses no GPU"))
    sampler.start()
    usage = sampler.usage((0, 10**10))
    sampler.stop()
    assert {getattr(usage, name).why_missing for name in FIGURES} == {"a CPU run uses no GPU"}
    assert sampler._thread is None


def test_usage_reads_back_what_it_wrote() -> None:
    usage = _window(FakeNvml(Gpu(throttle=0x40, refuses={"power": NOT_SUPPORTED})))
    assert Usage.from_json(usage.to_json()) == usage


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(0, 1000), st.integers(0, 100)),
        min_size=2,
        max_size=8,
    )
)
def test_every_joule_of_a_run_is_in_one_window(windows: list[tuple[int, float, int]]) -> None:
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    joules, first_mj = 0.0, nvml.gpus[0].energy_mj
    for seconds, power, busy in windows:
        nvml.gpus[0].power_w, nvml.gpus[0].busy = power, busy
        edges = _run(nvml, sampler, seconds)
        usage = sampler.usage(edges)
        assert usage.busy.value == pytest.approx(busy / 100)
        inside = [
            each for each in sampler._intervals["GPU-1"] if edges[0] <= each.middle_ns <= edges[1]
        ]
        joules += sum(each.counter_j or 0.0 for each in inside if each.elapsed_ns)
    assert joules == pytest.approx(
        (nvml.gpus[0].energy_mj - first_mj) / 1000, abs=0.01 * len(windows)
    )


def test_a_run_of_days_keeps_few_intervals_and_all_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sampler, "MOST", 100)
    nvml = FakeNvml()
    sampler = _sampler(nvml)
    first = _run(nvml, sampler, 50)
    nvml.gpus[0].power_w, nvml.gpus[0].busy = 400.0, 50
    long = _run(nvml, sampler, 3000)
    usage = sampler.usage(long)
    assert len(sampler._intervals["GPU-1"]) <= 100
    assert usage.energy_j.value == pytest.approx(400.0 * 3000)
    assert usage.busy.value == pytest.approx(0.5)
    # edges are never merged away
    assert sampler.usage(first).energy_j.value == pytest.approx(200.0 * 50)


def test_the_background_reads_and_ends() -> None:
    nvml = FakeNvml()
    sampler = Sampler(open_reader(["GPU-1"], nvml=nvml), interval_s=0.005)
    sampler.start()
    deadline = time.monotonic() + 10
    while len(sampler._intervals["GPU-1"]) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.stop()
    assert len(sampler._intervals["GPU-1"]) >= 3
    asked: Any = nvml.asked
    time.sleep(0.03)
    assert nvml.asked == asked
    assert nvml.samples == 0
