"""The GPU timeline of a traced step: every nanosecond of it is compute, exposed communication,
exposed copy, or idle.

A trace is the JSON that torch's profiler exports (Chrome's trace format, written by Kineto). Read
are events of `ph: X`, whose `ts` and `dur` are microseconds to three decimals:

    cat                         what it is                              fields in `args`
    kernel                      a kernel on the device                  device, stream, correlation
    gpu_memcpy, gpu_memset      a copy or a fill on the device          device, stream, correlation
    cuda_runtime, cuda_driver   a call on the host that launches them   correlation (same number)
    user_annotation             what the program marked, on the host

At each moment a device is in the first of these that holds, whatever the stream: some kernel
computes (*compute*); only kernels that communicate run (*communication, exposed*); only copies and
fills run (*copy, exposed*); nothing runs (*idle*). Work that overlaps is thus counted once, and
communication behind computing is not exposed.

Idle has its cause in the activity K that ends it. A device waits first for the host to ask, then
for K to arrive:

    device  ====busy====|            gap             |====K====
    host      data loading, Python |[launch of K]              time ->
                        | host_wait|   launch_gap    |

- `host_wait`: the part of the gap before the call that launched K began. The host was loading data,
  ran Python, waited.
- `launch_gap`: the part from there to K's start: the launch itself, its way to the device, and what
  K still waited for in its stream. Where the call began before the gap did, K was queued and the
  whole gap is launch_gap.
- `other`: no activity follows in the trace, or none that can be traced to the call that launched
  it.

A kernel of a CUDA graph belongs to the one call that launched the graph.

A step's window is the wall time of the step as the device sees it. The host runs ahead: when it
begins a step, the device may still be at the one before, and when it ends it, the device may not be
done. So the window begins when the host begins the step or, if that is later, when what was
launched before has ended; and it ends when the host ends the step or, if that is later, when what
it launched has ended. In a row of equal steps it is as long as a step takes: the device's time
where the device is slower, the host's where the host is.
Source: libkineto's ChromeTraceLogger, as torch.profiler writes it. Holistic Trace Analysis asks for
causes of idle time as well (idle time breakdown), and decides by the length of a gap; here the
launch calls decide.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.ledger.values import Value, estimated, measured, null

NO_GPU = "a CPU run uses no GPU"
NOT_TRACED = "no step was traced"
KERNEL, COPY = "kernel", ("gpu_memcpy", "gpu_memset")
LAUNCH = ("_runtime", "_driver")  # how the categories of calls on the host end
COMMUNICATION = (
    "nccl",
    "nvshmem",
    "allreduce",
    "allgather",
    "reducescatter",
    "alltoall",
    "crossdevicereduce",
)
"""What names of kernels that communicate contain, in lower case and without underscores; RCCL's are
called nccl.
"""
# kinds of activity; where several run at once, the first counts
COMPUTES, COMMUNICATES, COPIES = range(3)


class Span(NamedTuple):
    """A stretch of time, in nanoseconds of the trace's clock."""

    start_ns: int
    end_ns: int


class Activity(NamedTuple):
    """What a device did, and when the call that launched it began on the host; None where no call
    is known.
    """

    start_ns: int
    end_ns: int
    kind: int
    launched_ns: int | None


@dataclass(frozen=True, slots=True)
class Trace:
    """What is needed of a trace: activities by device, in order of their start, and annotations by
    name.
    """

    activities: Mapping[int, Sequence[Activity]]
    annotations: Mapping[str, Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Nanoseconds of one device in one window; they sum to its length exactly."""

    compute_ns: int = 0
    comm_exposed_ns: int = 0
    copy_exposed_ns: int = 0
    idle_host_wait_ns: int = 0
    idle_launch_gap_ns: int = 0
    idle_other_ns: int = 0

    @property
    def window_ns(self) -> int:
        """The length of the window in nanoseconds: the sum of all classes."""
        return sum(getattr(self, item.name) for item in fields(self))


SHARES = tuple(item.name.removesuffix("_ns") for item in fields(Classes))
FIGURES = ("traced_steps", *SHARES, "busy")
_BUSY_NS = {COMPUTES: "compute_ns", COMMUNICATES: "comm_exposed_ns", COPIES: "copy_exposed_ns"}

# -- from a file to activities --------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Read a trace, compressed or not.

    Raises:
        ValueError: If it is no trace.
        OSError: If it cannot be read.
    """
    raw = path.read_bytes()
    return parse(json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw))


def parse(raw: Mapping[str, Any]) -> Trace:
    """Return what is needed of a trace; the order of its events does not matter.

    Raises:
        ValueError: If it is no trace.
    """
    if not isinstance(raw.get("traceEvents"), list):
        raise ValueError("a trace has a list `traceEvents`")
    events = [event for event in raw["traceEvents"] if event.get("ph") == "X"]
    launched = _launches(events)
    activities: dict[int, list[Activity]] = {}
    annotations: dict[str, Span] = {}
    for event in events:
        category, args = event.get("cat"), event.get("args", {})
        if category == KERNEL or category in COPY:
            kind = (
                COPIES
                if category != KERNEL
                else COMMUNICATES
                if _communicates(event["name"])
                else COMPUTES
            )
            device = int(args.get("device", event["pid"]))
            of_device = activities.setdefault(device, [])
            of_device.append(Activity(*_span(event), kind, launched.get(args.get("correlation"))))
        elif category == "user_annotation":
            span, name = _span(event), str(event["name"])
            # Marks of one name may be nested: the outermost is the step's.
            annotations[name] = max(
                span, annotations.get(name, span), key=lambda found: found.end_ns - found.start_ns
            )
    return Trace(
        {device: sorted(found, key=_order) for device, found in sorted(activities.items())},
        annotations,
    )


def _launches(events: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Return when a call with a correlation began; of a runtime call and the driver call inside it,
    the outer one.
    """
    began: dict[int, int] = {}
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if str(event.get("cat")).endswith(LAUNCH) and correlation:  # 0 stands for none
            start_ns = _span(event).start_ns
            began[correlation] = min(start_ns, began.get(correlation, start_ns))
    return began


def _communicates(name: str) -> bool:
    plain = name.lower().replace("_", "")
    return any(word in plain for word in COMMUNICATION)


def _span(event: Mapping[str, Any]) -> Span:
    start_ns = _ns(event["ts"])
    return Span(start_ns, start_ns + _ns(event["dur"]))


def _ns(us: float | int | str) -> int:
    """Return nanoseconds, exactly: a trace's clock reads up to 10^13 us, where 1000 times a float
    is 1 ns off.
    """
    return int((Decimal(str(us)) * 1000).to_integral_value())


def _order(activity: Activity) -> tuple[int, bool, int]:
    """By start; of several at once, the one that was asked for first says why the device had waited
    until then.
    """
    return activity.start_ns, activity.launched_ns is None, activity.launched_ns or 0


# -- from activities to classes -------------------------------------------------------------------


def step_window(trace: Trace, name: str, device: int) -> Span:
    """Return the window of the step that the annotation `name` marks, as this device sees it.

    Raises:
        KeyError: If nothing in the trace is called so.
    """
    host = trace.annotations[name]
    known = [
        (each.launched_ns, each.end_ns)
        for each in trace.activities.get(device, ())
        if each.launched_ns is not None
    ]
    # What was asked for before the step began delays it on the device.
    earlier = (end_ns for launched_ns, end_ns in known if launched_ns < host.start_ns)
    own = (end_ns for launched_ns, end_ns in known if host.start_ns <= launched_ns < host.end_ns)
    window = Span(max((host.start_ns, *earlier)), max((host.end_ns, *own)))
    # older work of another stream outlived the step
    return window if window.start_ns < window.end_ns else host


def classify(trace: Trace, window: Span, device: int) -> Classes:
    """Return what a device did in a window."""
    activities = trace.activities.get(device, ())
    starts = [each.start_ns for each in activities]
    ns = dict.fromkeys((item.name for item in fields(Classes)), 0)
    for span, kind in _segments(activities, window):
        if kind is not None:
            ns[_BUSY_NS[kind]] += span.end_ns - span.start_ns
            continue
        for name, part_ns in _causes(span, activities, starts):
            ns[name] += part_ns
    return Classes(**ns)


def by_device(trace: Trace, name: str) -> dict[int, Classes]:
    """Return the classes of a step on every device that did something in the trace."""
    return {
        device: classify(trace, step_window(trace, name, device), device)
        for device in trace.activities
    }


def _segments(activities: Iterable[Activity], window: Span) -> Iterable[tuple[Span, int | None]]:
    """Cut a window into stretches of one kind each; None is idle."""
    # A sweep over starts and ends: (time, kind, +1 or -1)
    edges: list[tuple[int, int, int]] = []
    for each in activities:
        start_ns, end_ns = max(each.start_ns, window.start_ns), min(each.end_ns, window.end_ns)
        if start_ns < end_ns:
            edges += [(start_ns, each.kind, 1), (end_ns, each.kind, -1)]
    # How many activities of each kind run now
    running, since = [0, 0, 0], window.start_ns
    for at, kind, change in sorted(edges):
        if at > since:
            yield Span(since, at), _kind(running)
            since = at
        running[kind] += change
    if since < window.end_ns:
        yield Span(since, window.end_ns), None


def _kind(running: Sequence[int]) -> int | None:
    # In the order of the constants: computing hides communication, which hides copies.
    return next((kind for kind, count in enumerate(running) if count), None)


def _causes(
    gap: Span, activities: Sequence[Activity], starts: Sequence[int]
) -> Iterable[tuple[str, int]]:
    """Split idle time by what the activity that ends it waited for; one without a length ends it
    too.
    """
    at = gap.start_ns
    while at < gap.end_ns:
        # The first activity that starts after this moment
        following = bisect_right(starts, at)
        if following == len(starts):
            yield "idle_other_ns", gap.end_ns - at
            return
        end_ns, launched_ns = min(starts[following], gap.end_ns), activities[following].launched_ns
        if launched_ns is None:
            yield "idle_other_ns", end_ns - at
        else:
            # Clipped to the gap: a launch before it leaves no host_wait.
            asked_ns = min(max(at, launched_ns), end_ns)
            yield "idle_host_wait_ns", asked_ns - at
            yield "idle_launch_gap_ns", end_ns - asked_ns
        at = end_ns


# -- from classes to figures ----------------------------------------------------------------------


def summary(
    steps: Sequence[Mapping[int, Classes]], *, why_none: str = NOT_TRACED
) -> dict[str, Value]:
    """Return the share of step wall time that each class has over traced steps and their devices,
    by the names in `FIGURES`.

    The shares are measured, of the steps that were traced; `busy` speaks of the whole run by them:
    estimated.

    Args:
        steps: Of each traced step, its classes by device; a trace without activities of a device
            counts for nothing.
        why_none: Why there are no figures, where there are no steps.
    """
    every = [classes for devices in steps for classes in devices.values()]
    wall_ns = sum(classes.window_ns for classes in every)
    if not wall_ns:
        return dict.fromkeys(FIGURES, null(why_none))
    total_ns = {name: sum(getattr(classes, f"{name}_ns") for classes in every) for name in SHARES}
    busy_ns = sum(ns for name, ns in total_ns.items() if not name.startswith("idle"))
    shares = {name: measured(ns / wall_ns) for name, ns in total_ns.items()}
    return {
        "traced_steps": measured(sum(map(bool, steps))),
        **shares,
        "busy": estimated(busy_ns / wall_ns),
    }
