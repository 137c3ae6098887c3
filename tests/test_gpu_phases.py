"""Device time by phase, on a device that runs behind its host: what the host measures is not what
the device does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger.gpu_phases import GpuPhases, device_phases
from pipeline.ledger.phases import PhaseClock, difference

CPU = torch.device("cpu")


class Device:
    """A host and a device with one stream. Milliseconds; only the test moves time."""

    def __init__(self) -> None:
        self.host_ms = self.free_ms = 0.0
        self.made = self.waits = 0

    def now_ns(self) -> int:
        return round(self.host_ms * 1e6)

    def launch(self, device_ms: float, host_ms: float = 0.0) -> None:
        self.host_ms += host_ms
        self.free_ms = max(self.free_ms, self.host_ms) + device_ms

    def synchronise(self) -> None:
        self.waits += 1
        self.host_ms = max(self.host_ms, self.free_ms)

    def event(self) -> Event:
        self.made += 1
        return Event(self)


class Event:
    """Passed by the device when it is done with what was launched before; read too early it fails,
    as CUDA's does.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.passed_ms = max(self.device.free_ms, self.device.host_ms)

    def query(self) -> bool:
        return self.device.host_ms >= self.passed_ms

    def elapsed_time(self, end_event: Event) -> float:
        assert self.query(), "device not ready"
        assert end_event.query(), "device not ready"
        return end_event.passed_ms - self.passed_ms


def steps(
    device: Device,
    clock: PhaseClock,
    count: int,
    after: Callable[[], None],
    *,
    backward_ms: float = 70.0,
) -> None:
    """A loop that asks for 160 ms of work in 3 ms, and waits for the step before the last."""
    done: list[float] = []
    for _ in range(count):
        with clock.phase("data_wait"):
            device.host_ms += 1
        with clock.phase("forward"):
            device.launch(80, host_ms=1)
        with clock.phase("backward"):
            device.launch(backward_ms, host_ms=0.5)
        with clock.phase("optimizer"):
            device.launch(10, host_ms=0.5)
        done.append(device.free_ms)
        after()
        if len(done) > 2:
            with clock.phase("backward"):
                device.host_ms = max(device.host_ms, done[-3])


def test_the_host_says_one_millisecond_and_the_device_eighty() -> None:
    device = Device()
    clock = PhaseClock(device.now_ns)
    with device_phases(clock, CPU, device.event) as phases:
        assert phases is not None
        steps(device, clock, 1, phases.resolve)
        assert phases.phases_s() == pytest.approx({"data_wait": 0.001})  # the rest is not done yet
        assert device.waits == 0
        phases.finish(device.synchronise)
    host = clock.read_ns()
    assert (host["forward"], host["backward"]) == (1_000_000, 500_000)
    found = phases.phases_s()
    assert {name: found[name] for name in ("forward", "backward", "optimizer")} == pytest.approx(
        # the device waits 1 ms for its first launch
        {"forward": 0.081, "backward": 0.070, "optimizer": 0.010}
    )


def test_in_a_row_the_hosts_waiting_hides_what_the_device_does() -> None:
    """On the host nearly all the time is `backward`, where it waits; on the device it is where the
    work is.
    """
    device = Device()
    clock = PhaseClock(device.now_ns)
    with device_phases(clock, CPU, device.event) as phases:
        assert phases is not None
        steps(device, clock, 20, phases.resolve)
        assert device.waits == 0
        phases.finish(device.synchronise)
    host, found = clock.read_ns(), phases.phases_s()
    assert host["backward"] > 0.8 * sum(host.values())
    assert found["forward"] == pytest.approx(20 * 0.080 + 0.001)
    assert found["backward"] == pytest.approx(20 * 0.070)
    assert found["optimizer"] == pytest.approx(20 * 0.010)
    assert sum(found.values()) == pytest.approx(device.free_ms / 1e3)


def test_a_delay_in_backward_lands_in_backward_and_nowhere_else() -> None:
    found: list[dict[str, float]] = []
    for backward_ms in (70.0, 95.0):
        device = Device()
        clock = PhaseClock(device.now_ns)
        with device_phases(clock, CPU, device.event) as phases:
            assert phases is not None
            steps(device, clock, 10, phases.resolve, backward_ms=backward_ms)
            phases.finish(device.synchronise)
        found.append(phases.phases_s())
    more = {name: found[1][name] - found[0][name] for name in found[0]}
    assert more.pop("backward") == pytest.approx(10 * 0.025)
    assert more == pytest.approx(dict.fromkeys(more, 0.0))


def test_events_are_used_again_and_few_are_ever_made() -> None:
    device = Device()
    clock = PhaseClock(device.now_ns)
    with device_phases(clock, CPU, device.event) as phases:
        assert phases is not None
        steps(device, clock, 200, phases.resolve)
    assert device.made < 50  # 200 steps have 1,800 edges


def test_a_device_that_never_comes_this_far_is_given_up() -> None:
    device = Device()
    phases = GpuPhases(device.event, most_pending=10)
    for _ in range(100):
        phases.edge("forward")
        device.launch(80)
        phases.resolve()
    assert device.made == 10
    phases.finish(device.synchronise)
    assert phases.phases_s() == {}
    assert phases.why_none == "the device was behind by more than 10 edges of phases"


def test_on_a_cpu_nothing_is_recorded() -> None:
    clock = PhaseClock()
    with device_phases(clock, CPU) as phases:
        assert phases is None
        assert clock.observer is None


def test_the_clock_is_observed_only_inside_also_when_something_fails() -> None:
    device = Device()
    clock = PhaseClock(device.now_ns)
    with (
        pytest.raises(ZeroDivisionError),
        device_phases(clock, CPU, device.event),
        clock.phase("forward"),
    ):
        raise ZeroDivisionError
    assert clock.observer is None
    made = device.made
    with clock.phase("forward"):
        pass
    assert device.made == made


spans = st.lists(
    st.tuples(
        st.sampled_from(["forward", "backward", "teacher", "log"]),
        st.integers(0, 50),
        st.integers(0, 50),
        st.booleans(),
    ),
    max_size=20,
)


@given(spans)
def test_device_time_closes_and_host_time_is_untouched(
    drawn: list[tuple[str, int, int, bool]],
) -> None:
    """Device time sums to the time from the first edge to the last, however phases nest."""
    device = Device()
    clock = PhaseClock(device.now_ns)
    before = clock.read_ns()
    with device_phases(clock, CPU, device.event) as phases:
        assert phases is not None
        for name, device_ms, host_ms, nested in drawn:
            with clock.phase(name):
                device.launch(device_ms, host_ms)
                if nested:
                    with clock.phase("h2d"):
                        device.launch(host_ms, device_ms)
            phases.resolve()
        phases.finish(device.synchronise)
    last = device.free_ms if drawn else 0.0
    assert sum(phases.phases_s().values()) == pytest.approx(
        max(last, device.host_ms if drawn else 0) / 1e3
    )
    host = difference(clock.read_ns(), before)
    assert sum(host.values()) == device.now_ns()


def test_what_comes_after_a_nested_phase_is_the_outer_ones_again() -> None:
    device = Device()
    clock = PhaseClock(device.now_ns)
    with device_phases(clock, CPU, device.event) as phases:
        assert phases is not None
        with clock.phase("forward"):
            device.launch(5)
            with clock.phase("teacher"):
                device.launch(20)
            device.launch(7)
        device.launch(3)
        with clock.phase("log"):
            pass
        phases.finish(device.synchronise)
    assert phases.phases_s() == pytest.approx({"forward": 0.012, "teacher": 0.020, "other": 0.003})
