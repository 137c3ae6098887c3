"""The host timeline: one stack of exclusive phases whose self times sum to the wall time, to the
nanosecond.

A nanosecond belongs to the innermost open phase; outside any phase it belongs to `other`, which is
waste named `unattributed`. So a forgotten marker shows as `other`, never as a gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from pipeline.ledger.metrics import PHASES


class PhaseClock:
    """Books elapsed time to phases.

    Args:
        now_ns: Monotonic clock in integer nanoseconds; injectable so that tests own the time.

    Attributes:
        observer: Called at every edge with the phase that is open from now on. It must be quick:
            its time is booked to that phase.
    """

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.now_ns = now_ns
        self.observer: Callable[[str], None] | None = None
        # At the bottom, so that time outside any phase has a name as well.
        self._stack: list[str] = ["other"]
        self._since = now_ns()
        self._self_ns: dict[str, int] = {}

    @property
    def current(self) -> str:
        """The phase that is open."""
        return self._stack[-1]

    def _book(self) -> None:
        # One reading ends the old interval and begins the new one: no gap between them.
        now = self.now_ns()
        top = self._stack[-1]
        self._self_ns[top] = self._self_ns.get(top, 0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Book what happens inside to `name`, less what nested phases take.

        Raises:
            ValueError: If `name` is not one of `metrics.PHASES`.
        """
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is not one of {', '.join(PHASES)}")
        self._book()
        self._stack.append(name)
        self._tell()
        try:
            yield
        finally:
            self._book()
            self._stack.pop()
            self._tell()

    def _tell(self) -> None:
        if self.observer is not None:
            self.observer(self._stack[-1])

    def rebook(self, ns: int, source: str, target: str) -> int:
        """Book time of one phase to another, which it turned out to be; return how much: no more
        than there is.
        """
        self._book()
        moved = max(0, min(ns, self._self_ns.get(source, 0)))
        if moved:
            self._self_ns[source] -= moved
            self._self_ns[target] = self._self_ns.get(target, 0) + moved
        return moved

    def replace(self, before: dict[str, int], phases_ns: dict[str, int]) -> None:
        """Book what passed since a mark as other phases: those of several devices in the mean.

        Args:
            before: Self times at the mark.
            phases_ns: In place of those since; what they leave of the time is `idle_rank`.
        """
        passed = sum(difference(self.mark()[1], before).values())
        idle = passed - sum(phases_ns.values())
        assert idle >= 0, idle
        self._self_ns = total(before, phases_ns, {"idle_rank": idle})

    def mark(self) -> tuple[int, dict[str, int]]:
        """Return the time now and the self times until exactly then: between two marks, they
        close.
        """
        self._book()
        return self._since, dict(self._self_ns)

    def read_ns(self) -> dict[str, int]:
        """Return the self time of every phase so far, the open one included (integer
        nanoseconds).
        """
        return self.mark()[1]


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Return `after - before` by phase in nanoseconds, without phases in which no time passed."""
    return {
        name: ns - before.get(name, 0) for name, ns in after.items() if ns != before.get(name, 0)
    }


def total(*parts: dict[str, int], times: int = 1) -> dict[str, int]:
    """Return the sum of self times by phase in nanoseconds, each taken `times` times (devices);
    empty phases are left out.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {name: times * sum(part.get(name, 0) for part in parts) for name in names}
    return {name: ns for name, ns in sums.items() if ns}
