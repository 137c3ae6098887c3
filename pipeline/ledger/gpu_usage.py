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
NO_MODULE = "not a superchip: the GPU shares its module with no CPU"
SHARED_MODULE = "several GPUs may share a module"
MOST_APART = 0.05  # counter against integrated power, as a share; beyond it the energy is suspect


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Figures of a window over all devices of the job."""

    energy_j: Value
    energy_integral_j: Value
    module_energy_j: Value
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

ADDED = ("power_cap_share", "module_energy_j")
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
    module: Value
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
        module_energy_j=energy.module,
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
    if any(each.on_superchip for _, intervals in own for each in intervals):
        return _of_superchips(own, seconds)
    counters = [_counter(uuid, intervals, seconds) for uuid, intervals in own]
    integrals = [_integral(uuid, intervals) for uuid, intervals in own]
    result = _Energy(_add(counters), _add(integrals), null(NO_MODULE), _resets(own))
    # NVML's power is the mean of the last second on some boards: at the edges of a short window it
    # speaks of the time before.
    lags = (
        any(each.power_is_mean for _, intervals in own for each in intervals)
        and seconds < LAGGING_S
    )
    if not lags:
        result.problems += _suspect(result.counter, result.integral)
    return result


def _resets(own: _Own) -> list[str]:
    return [
        f"energy: the counter of {uuid} was reset"
        for uuid, intervals in own
        if any(each.was_reset for each in intervals)
    ]


def _apart(counter: Value, integral: Value) -> float | None:
    """Return by what share of the larger one two energies differ; None where one is missing."""
    if counter.value is None or integral.value is None:
        return None
    return abs(counter.value - integral.value) / max(counter.value, integral.value)


def _suspect(counter: Value, integral: Value) -> list[str]:
    apart = _apart(counter, integral)
    if apart is None or apart <= MOST_APART:
        return []
    return [f"energy suspect: counter and integrated power differ by {apart:.0%}"]


def _of_superchips(own: _Own, seconds: float) -> _Energy:
    """Return the energy of GPUs that share a module with a CPU.

    The counter is the GPU's on some, the module's on others: whose power over time it agrees with
    tells. Where it is not the GPU's, the GPU's energy is its power over time, an estimate.
    Source: ml-energy/zeus, pull request 172 (the counter of a GH200 is the whole module's).
    """
    parts = [_of_superchip(uuid, intervals, seconds) for uuid, intervals in own]
    module = parts[0].module if len(parts) == 1 else null(SHARED_MODULE)
    return _Energy(
        _add([part.counter for part in parts]),
        _add([part.integral for part in parts]),
        module,
        [*_resets(own), *(problem for part in parts for problem in part.problems)],
    )


def _of_superchip(uuid: str, intervals: list[Interval], seconds: float) -> _Energy:
    counter, integral = _counter(uuid, intervals, seconds), _integral(uuid, intervals)
    joules = total(each.module_j for each in intervals)
    module = null(f"{uuid}: NVML: no power of the module") if joules is None else estimated(joules)
    apart = _apart(counter, integral)
    if apart is None or apart <= MOST_APART:
        return _Energy(counter, integral, module)
    of_module = _apart(counter, module)
    if of_module is not None and of_module <= MOST_APART:
        return _Energy(integral, integral, counter)
    return _Energy(integral, integral, module, _suspect(counter, integral))


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
