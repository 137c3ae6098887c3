"""Booking elapsed time: every nanosecond of an attempt goes to exactly one account.

An invocation of a run is an *attempt*; the same command again is the next one. Within it, *windows*
are open: a stage at work, an artifact being assessed, the comparison pass. What no window covers is
overhead. What a killed or failed attempt had not secured in a checkpoint is lost and books as
retry: the attempt that replays those steps books them as work, since those are the ones that led to
the artifact.

    attached = work + assess + retry + compare + overhead     (exactly, in integer nanoseconds)

A device-nanosecond is a nanosecond of one device. The number of devices belongs to the attempt, so
that a run that resumes with another number of them still adds up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.ledger.phases import total
from pipeline.ledger.shapes import RunHours
from pipeline.ledger.values import measured

NS_PER_HOUR = 3_600_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of one attempt with one purpose. Clock readings are monotonic and belong to that
    attempt alone.

    Attributes:
        kind: `work` on a stage, `assess` of its artifact, or `compare` (the comparison pass, of no
            arm).
        arm: The stage's arm; None for `compare`.
        seed: The arm's seed; -1 for `compare`.
        attempt: The invocation it happened in.
        start_ns: Clock at its start.
        end_ns: Clock at its end.
        kept_ns: How much of it counts: all of it when it ended well, the part up to the last valid
            checkpoint when it was killed, nothing when it failed. A comparison pass counts whole.
        beside: Among how many ranks the devices were shared out meanwhile, a stage each. Windows of
            such stages follow one another, each as long as its stage's share of all devices'
            time.
    """

    kind: Literal["work", "assess", "compare"]
    arm: str | None
    seed: int = -1
    attempt: int = 1
    start_ns: int
    end_ns: int
    kept_ns: int
    beside: int = 1

    @property
    def elapsed_ns(self) -> int:
        """Its length, in integer nanoseconds (1e-9 seconds), as all times here."""
        return self.end_ns - self.start_ns

    @property
    def lost_ns(self) -> int:
        """The part, in nanoseconds, that has to be done again."""
        return self.elapsed_ns - self.kept_ns


class Span(NamedTuple):
    """An attempt from start to end (or last sign of life), and how many devices it was attached
    to.
    """

    start_ns: int
    end_ns: int
    devices: int = 1

    @property
    def device_ns(self) -> int:
        """Its length times its devices, in device-nanoseconds."""
        return (self.end_ns - self.start_ns) * self.devices


@dataclass(frozen=True, slots=True)
class ArmTime:
    """What one arm's own stage took, over all attempts, in device-nanoseconds."""

    work_ns: int = 0
    assess_ns: int = 0
    retry_ns: int = 0

    @property
    def total_ns(self) -> int:
        """Work, assessment and retry together."""
        return self.work_ns + self.assess_ns + self.retry_ns


@dataclass(frozen=True, slots=True)
class Booking:
    """Where the time of a run went, in device-nanoseconds.

    Attributes:
        arms: By arm and seed.
        compare_ns: The comparison pass.
        overhead_ns: What no window covers: start-up, composing, reports.
        attached_ns: All attempts from start to end; the sum of everything else.
    """

    arms: Mapping[tuple[str, int], ArmTime]
    compare_ns: int
    overhead_ns: int
    attached_ns: int

    @property
    def work_ns(self) -> int:
        """Work that led to artifacts, over all arms."""
        return sum(time.work_ns for time in self.arms.values())

    @property
    def assess_ns(self) -> int:
        """Assessment of artifacts, over all arms."""
        return sum(time.assess_ns for time in self.arms.values())

    @property
    def retry_ns(self) -> int:
        """Time lost to failures and preemption, over all arms."""
        return sum(time.retry_ns for time in self.arms.values())

    @property
    def reusable_ns(self) -> int:
        """Device-nanoseconds that a later run saves which finds all of this done: work, assessment
        and comparison; no retry.
        """
        return self.work_ns + self.assess_ns + self.compare_ns


def book(windows: Iterable[Window], spans: Mapping[int, Span]) -> Booking:
    """Book the time of all attempts of a run, in device-nanoseconds that sum exactly.

    Args:
        windows: Of all attempts, in any order.
        spans: By attempt.
    """
    windows = list(windows)
    for attempt, span in spans.items():
        _check_disjoint([window for window in windows if window.attempt == attempt], span)
    assert all(window.attempt in spans for window in windows), (
        "a window of an attempt without a span"
    )
    arms: dict[tuple[str, int], ArmTime] = {}
    for window in windows:
        if window.arm is not None:
            key = window.arm, window.seed
            arms[key] = _add(arms.get(key, ArmTime()), window, spans[window.attempt].devices)
    # Counted whole, however it ended: no arm is there to book a part of it as retry.
    compare_ns = sum(
        w.elapsed_ns * spans[w.attempt].devices for w in windows if w.kind == "compare"
    )
    attached_ns = sum(span.device_ns for span in spans.values())
    # What is left over, not measured: so the accounts add up exactly.
    overhead_ns = attached_ns - compare_ns - sum(time.total_ns for time in arms.values())
    assert overhead_ns >= 0, overhead_ns
    return Booking(arms, compare_ns, overhead_ns, attached_ns)


def _check_disjoint(windows: list[Window], span: Span) -> None:
    """Assert that windows lie inside their attempt and share no time: else a nanosecond would be
    booked twice.
    """
    before = span.start_ns
    # In order of time, each may begin only where the one before it ended.
    for window in sorted(windows, key=lambda window: (window.start_ns, window.end_ns)):
        assert before <= window.start_ns <= window.end_ns <= span.end_ns, (window, span)
        assert 0 <= window.kept_ns <= window.elapsed_ns, window
        assert (window.kind == "compare") == (window.arm is None), window
        before = window.end_ns


def _add(time: ArmTime, window: Window, devices: int) -> ArmTime:
    kept, is_work = window.kept_ns * devices, window.kind == "work"
    return ArmTime(
        work_ns=time.work_ns + (kept if is_work else 0),
        assess_ns=time.assess_ns + (0 if is_work else kept),
        retry_ns=time.retry_ns + window.lost_ns * devices,
    )


def outside_ns(
    booked: Booking, before_ns: dict[str, int], own_ns: dict[str, int]
) -> dict[str, int]:
    """Return the overhead of a run by phase, in device-nanoseconds.

    Args:
        before_ns: That of its earlier attempts.
        own_ns: That of its last one, as far as a clock has seen it. What passed before there was a
            clock is the interpreter's start: `import`.
    """
    start_ns = booked.overhead_ns - sum(own_ns.values()) - sum(before_ns.values())
    return total(before_ns, own_ns, {"import": start_ns})


def device_hours(device_ns: int) -> float:
    """Return device-nanoseconds as device-hours."""
    return device_ns / NS_PER_HOUR


def run_hours(booked: Booking) -> RunHours:
    """Return the device-hours of a run as result.json has them."""
    hours = lambda device_ns: measured(device_hours(device_ns)).to_json()
    return {
        "total": hours(booked.attached_ns),
        "work": hours(booked.work_ns),
        "assess": hours(booked.assess_ns),
        "retry": hours(booked.retry_ns),
        "compare": hours(booked.compare_ns),
        "overhead": hours(booked.overhead_ns),
    }
