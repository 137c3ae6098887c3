"""Device time by phase: an event in the device's stream at every edge of a host phase, read a step
later.

A phase on the host is over when its work is asked for, not when it is done: `forward` may take the
host 1 ms and the device 80 ms, which the host then spends waiting, in whatever phase it waits. So
every edge of the phase clock records an event in the stream. The device passes the event when it is
done with what was launched before it, and the time between two of its events is what the phase
between them took *on the device*, its idle time included:

    host    |fwd|bwd|data |...                     edges at 0, 1, 2 ms
    device  |=======fwd=======|====bwd====|..      events at 0, 80, 150 ms:
                                                   forward 80 ms, backward 70 ms

Reading an event that the device has not passed would make the host wait for it. So nothing is read
before `query()` says that it has been passed, which is asked once per step, and what is left is
read after the window's final synchronisation. Events that were read are used again. They cover the
stream that is current on the host; work of other streams shows only where that one waits for it.
Time is of one device: the process's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.device import Event
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock

# edges that the device may be behind by: hundreds of steps, while the loop allows for four
MOST_PENDING = 8192


class GpuPhases:
    """Books device time to host phases.

    Args:
        make_event: Makes an event of the device; injectable so that tests own the device's time.
        most_pending: Edges that may wait to be read. Beyond that nothing more is recorded, and
            `why_none` says so.
    """

    def __init__(
        self, make_event: Callable[[], Event], *, most_pending: int = MOST_PENDING
    ) -> None:
        self._make_event, self._most_pending = make_event, most_pending
        self._pool: list[Event] = []
        # an event, and the phase that begins with it
        self._pending: deque[tuple[Event, str]] = deque()
        self._ms: dict[str, float] = {}
        self.why_none: str | None = None

    def edge(self, phase: str) -> None:
        """Record that `phase` is open from now on."""
        if self.why_none is not None:
            return
        if len(self._pending) >= self._most_pending:
            self.why_none = (
                f"the device was behind by more than {self._most_pending} edges of phases"
            )
            return
        self.why_none = attempted(
            lambda: self._record(phase), lambda why: unmeasured("device time by phase", why)
        )

    def _record(self, phase: str) -> None:
        event = self._pool.pop() if self._pool else self._make_event()
        event.record()
        self._pending.append((event, phase))

    def resolve(self) -> None:
        """Book what the device has passed; never waits. Once per step."""
        if self.why_none is None:
            self.why_none = attempted(
                self._resolve, lambda why: unmeasured("device time by phase", why)
            )

    def _resolve(self) -> None:
        # The phase of an event ends at the next one: both have to be passed.
        while len(self._pending) > 1 and self._pending[1][0].query():
            event, phase = self._pending.popleft()
            self._ms[phase] = self._ms.get(phase, 0.0) + event.elapsed_time(self._pending[0][0])
            self._pool.append(event)

    def finish(self, synchronise: Callable[[], None]) -> None:
        """Wait for the device, which a step may not but the end of a training does, and book all
        that is left.
        """
        synchronise()
        self.resolve()

    def phases_s(self) -> dict[str, float]:
        """Return seconds of device time by phase, of what was read so far; empty where not all
        edges were recorded.
        """
        return (
            {}
            if self.why_none is not None
            else {name: ms / 1e3 for name, ms in self._ms.items() if ms}
        )


@contextmanager
def device_phases(
    clock: PhaseClock, device: Any, make_event: Callable[[], Event] | None = None
) -> Generator[GpuPhases | None]:
    """Book device time to the phases of `clock` inside; None, and nothing is recorded, where the
    device has no events.

    Args:
        make_event: Instead of the device's own, for tests.
    """
    own = device_of(device)
    if make_event is None and not own.events:
        yield None
        return
    phases = GpuPhases(make_event or own.make_event)
    phases.edge("other")  # a stage begins with nothing open
    before, clock.observer = clock.observer, phases.edge
    try:
        yield phases
    finally:
        clock.observer = before
