"""Intervals: what one device did between two readings, and how neighbours become one without
changing a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.ledger.devices.reader import Reading

SHARES = (
    "busy",
    "sm_active",
    "tensor_active",
    "dram_active",
    "nvlink_bytes_per_s",
    "pcie_bytes_per_s",
)
# of a window that readings may leave out, whichever is more
UNREAD_SHARE, UNREAD_NS = 0.01, 100_000_000
LOWERING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Reasons for lower clocks that take performance; idling and clocks that somebody set do not.
Source: NVML API reference, nvmlClocksEventReasons."""
POWER_CAP = 0x04
"""Software power cap: boards at their power limit (an L4, a 4090, an A10) run so all the time. It
is how they work, not a disturbance: its share stands apart.
"""
DISTURBING = sum(LOWERING) - POWER_CAP


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What one device did between two readings; figures that could not be read are None, `missing`
    says why.

    Attributes:
        counter_j: Difference of the energy counter; negative after a reset.
        integral_j: Integrated power, of the GPU.
        module_j: The same of the module that a superchip's GPU shares with a CPU.
        on_superchip: Whether it shares one: then the counter may be of the module.
        throttled: Share of it in which heat or hardware held clocks down.
        capped: Share of it in which the power limit did: by the driver's counter, or, where none
            runs, as the reading at its end has it.
        power_is_mean: Power readings are means of the last second.
        edge: A window begins or ends at its end: it is not merged with the next one.
    """

    start_ns: int
    end_ns: int
    counter_j: float | None
    integral_j: float | None
    shares: dict[str, float]
    clock_mhz: float | None
    clock_min_mhz: float | None
    memory_bytes: float | None
    temperature_c: float | None
    throttled: float | None
    capped: float | None
    throttle: int
    foreign: float | None
    missing: dict[str, str]
    module_j: float | None = None
    on_superchip: bool = False
    was_reset: bool = False
    power_is_mean: bool = False
    edge: bool = False

    @property
    def elapsed_ns(self) -> int:
        """Its length in nanoseconds."""
        return self.end_ns - self.start_ns

    @property
    def middle_ns(self) -> float:
        """The moment, on the monotonic clock in nanoseconds, that decides which window it belongs
        to: one at most, so that nothing is counted twice.
        """
        return (self.start_ns + self.end_ns) / 2


def between(before: Reading, after: Reading, *, edge: bool) -> Interval:
    """Return what happened between two readings; shares and clocks are those read at its end."""
    # Shares are read at the end alone, so the reading before them may lack them.
    missing = {name: why for name, why in before.missing.items() if name not in SHARES} | dict(
        after.missing
    )
    seconds = (after.at_ns - before.at_ns) / 1e9
    counter = None
    if before.energy_mj is not None and after.energy_mj is not None:
        # Millijoules to joules
        counter = (after.energy_mj - before.energy_mj) / 1000
    reasons = after.throttle
    return Interval(
        start_ns=before.at_ns,
        end_ns=after.at_ns,
        counter_j=counter,
        integral_j=_trapezoid(before.power_w, after.power_w, seconds),
        module_j=_trapezoid(before.module_power_w, after.module_power_w, seconds),
        on_superchip=after.on_superchip,
        shares={name: v for name in SHARES if (v := getattr(after, name)) is not None},
        clock_mhz=after.sm_clock_mhz,
        clock_min_mhz=after.sm_clock_mhz,
        memory_bytes=_most(before, after),
        temperature_c=after.temperature_c,
        throttle=reasons or 0,
        throttled=None if reasons is None else float(bool(reasons & DISTURBING)),
        capped=_capped(before, after),
        foreign=None if after.foreign_processes is None else float(after.foreign_processes > 0),
        missing=missing,
        was_reset=counter is not None and counter < 0,
        edge=edge,
        power_is_mean=after.power_is_mean,
    )


def _trapezoid(first: float | None, last: float | None, seconds: float) -> float | None:
    return None if first is None or last is None else (first + last) / 2 * seconds


def _capped(before: Reading, after: Reading) -> float | None:
    """Return the share of the time at the power limit. A counter that stands still while readings
    tell of the limit is none: some boards never count.
    """
    seen = None if after.throttle is None else float(bool(after.throttle & POWER_CAP))
    if before.power_capped_ns is None or after.power_capped_ns is None:
        return seen
    counted = (after.power_capped_ns - before.power_capped_ns) / (after.at_ns - before.at_ns)
    was_seen = bool((before.throttle or 0) & POWER_CAP) and bool(seen)
    return seen if counted < 0 or (was_seen and not counted) else min(1.0, counted)


def _most(before: Reading, after: Reading) -> float | None:
    known = [v for v in (before.memory_used_bytes, after.memory_used_bytes) if v is not None]
    return max(known) if len(known) == 2 else None


def thinned(own: list[Interval]) -> list[Interval]:
    """Return about half as many intervals: merge neighbours two by two, those at the edge of a
    window left alone.
    """
    result: list[Interval] = []
    for each in own:
        before = result[-1] if result else None
        # A pair that was just merged is longer than its neighbour: it is not merged again.
        if before is not None and not before.edge and before.elapsed_ns <= each.elapsed_ns:
            result[-1] = _merged(before, each)
        else:
            result.append(each)
    return result


def _merged(a: Interval, b: Interval) -> Interval:
    both = [a, b]
    return Interval(
        start_ns=a.start_ns,
        end_ns=b.end_ns,
        counter_j=total(each.counter_j for each in both),
        integral_j=total(each.integral_j for each in both),
        shares={
            name: v
            for name in SHARES
            if (v := mean(both, lambda each, n=name: each.shares.get(n))) is not None
        },
        clock_mhz=mean(both, lambda each: each.clock_mhz),
        clock_min_mhz=least(each.clock_min_mhz for each in both),
        memory_bytes=largest(each.memory_bytes for each in both),
        temperature_c=largest(each.temperature_c for each in both),
        throttled=mean(both, lambda each: each.throttled),
        capped=mean(both, lambda each: each.capped),
        power_is_mean=a.power_is_mean or b.power_is_mean,
        module_j=total(each.module_j for each in both),
        on_superchip=a.on_superchip or b.on_superchip,
        throttle=a.throttle | b.throttle,
        foreign=mean(both, lambda each: each.foreign),
        missing={**a.missing, **b.missing},
        was_reset=a.was_reset or b.was_reset,
        edge=b.edge,
    )


def total(parts: Iterable[float | None]) -> float | None:
    """Return the sum; None where a part is."""
    known = list(parts)
    return (
        None
        if any(part is None for part in known)
        else sum(part for part in known if part is not None)
    )


def mean(own: Sequence[Interval], read: Callable[[Interval], float | None]) -> float | None:
    """Return the mean weighted by time; None where it is missing for more than 1% of the time (or
    0.1 seconds, if that is more).
    """
    values = [(v, each.elapsed_ns) for each in own if (v := read(each)) is not None]
    known_ns, whole_ns = sum(ns for _, ns in values), sum(each.elapsed_ns for each in own)
    if not known_ns or whole_ns - known_ns > max(UNREAD_SHARE * whole_ns, UNREAD_NS):
        return None
    return sum(v * ns for v, ns in values) / known_ns


def largest(parts: Iterable[float | None]) -> float | None:
    """Return the maximum; None where a part is, or there is none."""
    known = list(parts)
    return None if not known or None in known else max(part for part in known if part is not None)


def least(parts: Iterable[float | None]) -> float | None:
    """Return the minimum; None where a part is, or there is none."""
    known = list(parts)
    return None if not known or None in known else min(part for part in known if part is not None)
