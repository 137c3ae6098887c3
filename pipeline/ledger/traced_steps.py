"""A few steps of a training traced with torch's profiler: small files for Perfetto, and the shares
of the GPU timeline.

Which steps is a function of their number alone, so that a resumed run samples the same ones. Each
is traced together with the step before it: the profiler begins on an empty device, and without a
step of lead-in all that the host does before its first launch would show as idle time, which in a
row of steps hides behind the device's work. Ending the profiler waits for the device. That is
allowed on sampled steps only, is booked to `log`, and is no time in steps. All other steps ask one
set whether they are in it.

A profiler that does not work (no CUPTI, no permission, another profiler there) is a reason, not an
error: the figures are null, the training continues.
Source: torch.profiler.profile, whose `stop` synchronises; ui.perfetto.dev opens the files as they
are.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.gpu_timeline import (
    FIGURES,
    NO_GPU,
    NOT_TRACED,
    Classes,
    by_device,
    parse,
    read_trace,
    summary,
)
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import TracedSteps
from pipeline.ledger.values import null

WARM_UP = 10  # steps that are not sampled: compiling, allocator and autotuning settle in them
LIMIT_BYTES = 4 * 2**20  # of a compressed trace; some 100,000 events
LEFT_OUT = (("python_function",), ("ac2g", "fwdbwd"), ("cpu_op",))
"""Categories left out of a trace, in this order, the first always: what the timeline is read from
stays.
"""
HEAD = ("schemaVersion", "displayTimeUnit", "baseTimeNanoseconds", "deviceProperties")


class Profiler(Protocol):
    """What is needed of `torch.profiler.profile`."""

    def start(self) -> None:
        """Trace from here."""

    def stop(self) -> None:
        """Trace until here; waits for the device."""

    def export_chrome_trace(self, path: str) -> None:
        """Write the trace."""


def sampled_steps(total: int, count: int, eval_every: int | None = None) -> tuple[int, ...]:
    """Return which of the steps 1 to `total` are traced: one soon after the warm-up, the others
    spread over the rest.

    Args:
        eval_every: Steps between evaluations. No step is sampled right after one, or the evaluation
            would be traced with its lead-in.
    """
    # In a short training the warm-up takes half of the steps at most.
    first = min(WARM_UP + 1, total // 2 + 1)
    span = total - first + 1
    if total < 2 or count < 1:
        return ()
    # Each takes two steps: its lead-in and itself.
    count = min(count, max(1, span // 2))
    numbers = (first + index * span // count for index in range(count))
    every = eval_every or total
    return tuple(
        # One later, where the step before it ends in an evaluation.
        number + ((number - 1) % every == 0 and every > 1 and number < total)
        for number in numbers
    )


class StepTracer:
    """Traces single steps of a training.

    Args:
        folder: Where the files go; made when there is one.
        device: What the training runs on.
        steps: The numbers (from 1) of the steps to trace; none: every call is a no-op.
        limit_bytes: No file is larger.
        make_profiler: Instead of torch's, for tests.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: Any = None,
        steps: Collection[int] = (),
        *,
        limit_bytes: int = LIMIT_BYTES,
        make_profiler: Callable[[Any], Profiler] | None = None,
    ) -> None:
        self._folder, self._device = folder, device
        self._steps = frozenset(() if folder is None else steps)
        self._limit_bytes, self._make_profiler = limit_bytes, make_profiler or _torch_profiler
        self._profiler: Profiler | None = None
        self._failed = False
        self._classes: dict[int, dict[int, Classes]] = {}
        self._notes: list[str] = []

    def opens_at(self, number: int) -> bool:
        """Tell whether tracing begins with this step: it is sampled, or precedes one that is."""
        wanted = number in self._steps or number + 1 in self._steps
        return wanted and self._profiler is None and not self._failed

    def closes_after(self, number: int) -> bool:
        """Tell whether tracing ends with this step."""
        return self._profiler is not None and number in self._steps

    def open(self, clock: PhaseClock) -> None:
        """Start the profiler."""
        with clock.phase("log"):
            self._profiler = attempted(self._started, self._fail)

    def _started(self) -> Profiler:
        profiler = self._make_profiler(self._device)
        profiler.start()
        return profiler

    def annotate(self, number: int) -> AbstractContextManager[Any]:
        """Mark a step in the trace, where one is being made."""
        if self._profiler is None:
            return nullcontext()

        def failed(why: str) -> AbstractContextManager[Any]:
            self._fail(why)
            return nullcontext()

        return attempted(lambda: _marked(number), failed)

    def close(self, number: int, clock: PhaseClock) -> None:
        """Stop the profiler after a sampled step, keep its trace, and classify the step."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        assert self._folder is not None
        with clock.phase("log"):
            attempted(lambda: self._classify(profiler, number), self._fail)

    def _classify(self, profiler: Profiler, number: int) -> None:
        profiler.stop()
        raw = _exported(profiler)
        self._classes[number] = by_device(parse(raw), _name(number))
        self._keep(number, raw)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the profiler where the training ended between the beginning and the end of a
        trace.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        attempted(profiler.stop, self._fail)

    def result(self) -> TracedSteps:
        """Return shares of step time, each step's classes, file names and what is to be said of
        them; plain JSON.

        Steps that an earlier attempt at the same training traced are read from the files it left.
        """
        for number in sorted(self._steps - set(self._classes)):
            self._recall(number)
        return attempted(self._result, self._no_result)

    def _no_result(self, why: str) -> TracedSteps:
        said = unmeasured("traced steps", why)
        shares = {name: null(said).to_json() for name in FIGURES}
        return {"shares": shares, "steps": [], "traces": [], "notes": [*self._notes, said]}

    def _result(self) -> TracedSteps:
        found = {number: self._classes[number] for number in sorted(self._classes)}
        shares = summary(list(found.values()), why_none=self._why_none())
        return {
            "shares": {name: value.to_json() for name, value in shares.items()},
            "steps": [
                _plain(number, device, classes)
                for number, devices in found.items()
                for device, classes in devices.items()
            ],
            "traces": [
                _file(number) for number in sorted(self._steps) if self._path(number).exists()
            ],
            "notes": self._notes,
        }

    def _why_none(self) -> str:
        if self._device is None or self._device.type == "cpu":
            return NO_GPU
        if self._classes and not self._failed:
            return "traces hold no activity of the device: CUPTI gave none"
        return self._notes[0] if self._failed else NOT_TRACED

    def _fail(self, why: str) -> None:
        """Trace nothing more, and say why."""
        self._failed = True
        self._notes.append(f"steps could not be traced ({why})")

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / _file(number)

    def _keep(self, number: int, raw: Mapping[str, Any]) -> None:
        """Write a trace if it can be made small enough."""
        found = shrink(raw, self._limit_bytes)
        path = self._path(number)
        path.unlink(missing_ok=True)
        if found is None:
            self._notes.append(
                f"the trace of step {number} is not kept: more than {self._limit_bytes} bytes"
            )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(found)
        os.replace(part, path)

    def _recall(self, number: int) -> None:
        if not self._path(number).exists():
            return

        def read() -> None:
            self._classes[number] = by_device(read_trace(self._path(number)), _name(number))

        attempted(
            read, lambda why: self._notes.append(f"{_file(number)} cannot be read back ({why})")
        )


def step_tracer(
    folder: Path | None, device: Any, *, total: int, count: int, eval_every: int | None = None
) -> StepTracer:
    """Return the tracer of a training: on a GPU, with a folder to write to, of `count` of its
    `total` steps.
    """
    traced = device_of(device).profiler_activity() is not None
    steps = sampled_steps(total, count, eval_every) if traced else ()
    return StepTracer(folder, device, steps)


def shrink(raw: Mapping[str, Any], limit_bytes: int) -> bytes | None:
    """Return a trace, compressed, with so much left out that it is within the limit; None where it
    cannot be.
    """
    events, left_out = list(raw["traceEvents"]), list[str]()
    head = {name: raw[name] for name in HEAD if name in raw}
    for categories in LEFT_OUT:
        kept = [event for event in events if event.get("cat") not in categories]
        left_out += [
            name for name in categories if any(event.get("cat") == name for event in events)
        ]
        events = kept
        text = json.dumps({**head, "otherData": {"left_out": left_out}, "traceEvents": events})
        # `mtime=0`: the same trace gives the same bytes.
        small = gzip.compress(text.encode(), mtime=0)
        if len(small) <= limit_bytes:
            return small
    return None


def _exported(profiler: Profiler) -> dict[str, Any]:
    with TemporaryDirectory(prefix="trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_bytes())


def _torch_profiler(device: Any) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if (own := device_of(device).profiler_activity()) is not None:
        activities.append(own)
    return profile(
        activities=activities, record_shapes=False, with_stack=False, profile_memory=False
    )


def _marked(number: int) -> AbstractContextManager[Any]:
    from torch.profiler import record_function

    return record_function(_name(number))


def _name(number: int) -> str:
    return f"step {number}"


def _file(number: int) -> str:
    return f"step-{number:06d}.json.gz"


def _plain(number: int, device: int, classes: Classes) -> dict[str, int]:
    return {
        "step": number,
        "device": device,
        **{name: getattr(classes, name) for name in Classes.__slots__},
    }
