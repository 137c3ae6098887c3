"""Usage: the figures of a window over all devices of the job, from the intervals that fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.ledger.gpu_intervals import LOWERING, SHARES, Interval, largest, least, mean, total
from pipeline.ledger.shapes import UsageRecord
from pipeline.ledger.values import Value, estimated, measured, null

SHORTEST_S = 5.0  # energy of a shorter window: the counter's steps are too coarse
# power that is the mean of the last second is not held against the counter in a shorter window
LAGGING_S = 10.0
MOST_APART = 0.05  # counter against integrated power, as a share; beyond it the energy is suspect


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Figures of a window over all devices of the job."""

    energy_j: Value
    energy_integral_j: Value
    power_w_mean: Value
    busy: Value
    sm_active: Value
    tensor_active: Value
    dram_active: Value
    nvlink_bytes_per_s: Value
    pcie_bytes_per_s: Value
    memory_used_peak_bytes: Value
    sm_clock_mhz_mean: Value
    sm_clock_mhz_min: Value
    temperature_c_max: Value
    throttle_share: Value
    power_cap_share: Value
    foreign_load: Value
    throttle_reasons: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> UsageRecord:
        """Return what `from_json` reads back."""
        values = {name: getattr(self, name).to_json() for name in FIGURES}
        return UsageRecord(
            **values, throttle_reasons=list(self.throttle_reasons), problems=list(self.problems)
        )

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Usage:
        """Read back what `to_json` wrote."""
        lacking = {
            name: null("not recorded by the release that measured it").to_json() for name in ADDED
        }
        values = {name: Value.from_json({**lacking, **raw}[name]) for name in FIGURES}
        return Usage(
            **values,
            throttle_reasons=tuple(raw["throttle_reasons"]),
            problems=tuple(raw["problems"]),
        )


FIGURES = tuple(
    item.name for item in fields(Usage) if item.name not in ("throttle_reasons", "problems")
)

ADDED = ("power_cap_share",)
"""What rows of older releases lack."""


def unread(why: str) -> Usage:
    """Return the usage of a window that nothing was read in."""
    return Usage(**{name: null(why) for name in FIGURES}, throttle_reasons=(), problems=())


_Own = list[tuple[str, list[Interval]]]
"""By device, its intervals of a window."""


@dataclass(slots=True)
class _Energy:
    counter: Value
    integral: Value
    problems: list[str] = field(default_factory=list)


def summed(own: _Own, elapsed_ns: int) -> Usage:
    """Return the usage of a window of `elapsed_ns` from the intervals of every device in it: joules
    add over devices, shares are means, peaks are maxima.
    """
    energy = _energy(own, elapsed_ns / 1e9)
    every = [each for _, intervals in own for each in intervals]
    reasons = {word for bit, word in LOWERING.items() if any(each.throttle & bit for each in every)}
    average = lambda name, read: _figure(
        own, name, lambda intervals: mean(intervals, read), _average
    )
    most = lambda name, read: _figure(
        own, name, lambda intervals: largest(map(read, intervals)), max
    )
    power = energy.counter if energy.counter.value is not None else energy.integral
    return Usage(
        energy_j=energy.counter,
        energy_integral_j=energy.integral,
        power_w_mean=power
        if power.value is None
        else Value(power.value / (elapsed_ns / 1e9), power.provenance),
        **{name: average(name, lambda each, n=name: each.shares.get(n)) for name in SHARES},
        memory_used_peak_bytes=most("memory_used_bytes", lambda each: each.memory_bytes),
        sm_clock_mhz_mean=average("sm_clock_mhz", lambda each: each.clock_mhz),
        sm_clock_mhz_min=_figure(
            own, "sm_clock_mhz", lambda i: least(each.clock_min_mhz for each in i), min
        ),
        temperature_c_max=most("temperature_c", lambda each: each.temperature_c),
        throttle_share=average("throttle", lambda each: each.throttled),
        power_cap_share=average("throttle", lambda each: each.capped),
        foreign_load=average("foreign_processes", lambda each: each.foreign),
        throttle_reasons=tuple(sorted(reasons)),
        problems=tuple(energy.problems),
    )


def _average(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _figure(
    own: _Own,
    name: str,
    of_device: Callable[[list[Interval]], float | None],
    over_devices: Callable[[Iterable[float]], float],
) -> Value:
    """Return a figure over all devices; the first device that lacks it says why."""
    found: list[float] = []
    for uuid, intervals in own:
        value = of_device(intervals)
        if value is None:
            return null(_why(uuid, intervals, name))
        found.append(value)
    return measured(over_devices(found))


def _why(uuid: str, intervals: list[Interval], name: str) -> str:
    why = next(
        (each.missing[name] for each in intervals if name in each.missing), "it was not read"
    )
    return f"{uuid}: {why}"


def _energy(own: _Own, seconds: float) -> _Energy:
    """Return joules by the counter and by integrated power, and what speaks against them; never
    zero.
    """
    counters = [_counter(uuid, intervals, seconds) for uuid, intervals in own]
    integrals = [_integral(uuid, intervals) for uuid, intervals in own]
    result = _Energy(_add(counters), _add(integrals))
    result.problems += [
        f"energy: the counter of {uuid} was reset"
        for uuid, intervals in own
        if any(each.was_reset for each in intervals)
    ]
    counter, integral = result.counter.value, result.integral.value
    # NVML's power is the mean of the last second on some boards: at the edges of a short window it
    # speaks of the time before.
    lags = (
        any(each.power_is_mean for _, intervals in own for each in intervals)
        and seconds < LAGGING_S
    )
    if counter is not None and integral is not None and not lags:
        apart = abs(counter - integral) / max(counter, integral)
        if apart > MOST_APART:
            result.problems.append(
                f"energy suspect: counter and integrated power differ by {apart:.0%}"
            )
    return result


def _counter(uuid: str, intervals: list[Interval], seconds: float) -> Value:
    joules = total(each.counter_j for each in intervals)
    if joules is None:
        return null(_why(uuid, intervals, "energy_mj"))
    # A negative step is no energy: what was drawn around the reset is lost.
    if any(each.was_reset for each in intervals):
        return null(f"{uuid}: the energy counter was reset during the window")
    if seconds < SHORTEST_S:
        return null(f"window shorter than {SHORTEST_S:.0f} s")
    if joules == 0:  # an idle board draws tens of watts
        return null(f"{uuid}: the energy counter stood still during the window")
    return measured(joules)


def _integral(uuid: str, intervals: list[Interval]) -> Value:
    joules = total(each.integral_j for each in intervals)
    return null(_why(uuid, intervals, "power_w")) if joules is None else estimated(joules)


def _add(values: list[Value]) -> Value:
    missing = next((value for value in values if value.value is None), None)
    if missing is not None:
        return missing
    return Value(sum(value.value or 0.0 for value in values), values[0].provenance)
