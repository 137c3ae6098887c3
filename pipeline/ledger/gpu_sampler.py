"""From readings of the devices, once a second and at the edges of windows, to figures of a window.

Two readings of a device bound an *interval*: joules by the counter's difference and by the power's
trapezoid, shares and rates as they were read at its end (they speak of the time before). A window
adds up intervals: shares are weighted by time, energies add over devices, maxima stay maxima. What
is missing in one interval of one device is missing for the window: the part that was read is not
presented as the whole.

Memory stays bounded: beyond `MOST` intervals, neighbours inside one window are merged into one,
which changes no sum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.reader import Reader, Reading
from pipeline.ledger.gpu_intervals import UNREAD_NS, UNREAD_SHARE, Interval, between, thinned
from pipeline.ledger.gpu_usage import Usage, summed, unread

MOST = 20_000  # intervals kept per device: five hours at one a second


class Sampler:
    """Reads devices in the background; `mark` reads once more, at the edge of a window.

    Args:
        reader: Of the job's own devices.
        interval_s: Seconds between readings.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        now_ns: Callable[[], int] = time.monotonic_ns,
        interval_s: float = 1.0,
    ) -> None:
        self.reader, self._now_ns, self._interval_s = reader, now_ns, interval_s
        self._last: dict[str, Reading] = {}
        self._intervals: dict[str, list[Interval]] = {uuid: [] for uuid in reader.uuids}
        # a reading failed: what became of the rest of the run is unknown
        self.why_not: str | None = None
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Read now, and from now on in the background where there is anything to read."""
        self.mark()
        if self.reader.why is None:
            self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Read a last time and end."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self.mark()
        attempted(self.reader.close, lambda _: None)  # what it holds ends with the process

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self.tick()

    def mark(self) -> None:
        """Read at the edge of a window."""
        self.tick(edge=True)

    def tick(self, *, edge: bool = False) -> None:
        """Read every device once. A reader that fails in a way nobody foresaw is not asked
        again.
        """
        if self.why_not is None:
            self.why_not = attempted(
                lambda: self._tick(edge=edge), lambda why: unmeasured("the GPU's state", why)
            )

    def _tick(self, *, edge: bool) -> None:
        with self._lock:
            for reading in self.reader.read():
                self._take(reading, edge=edge)

    def _take(self, reading: Reading, *, edge: bool) -> None:
        own, before = self._intervals[reading.uuid], self._last.get(reading.uuid)
        if before is not None and reading.at_ns <= before.at_ns:  # the clock has not ticked since
            if own and edge:
                own[-1] = replace(own[-1], edge=True)
            return
        self._last[reading.uuid] = reading
        if before is not None:
            own.append(between(before, reading, edge=edge))
            if len(own) > MOST:
                self._intervals[reading.uuid] = thinned(own)

    def busy(self) -> float | None:
        """Return the share of their last sampling period in which devices computed, the mean of
        all; None where it is not read.
        """
        shares = [each.busy for each in [*self._last.values()] if each.busy is not None]
        return sum(shares) / len(shares) if shares else None

    def usage(self, *windows: tuple[int, int]) -> Usage:
        """Return the figures of windows, together, whose edges (start and end) were marked."""
        why = self.reader.why or self.why_not
        if why is not None:
            return unread(why)
        return attempted(
            lambda: self._usage(windows), lambda why: unread(unmeasured("the GPU's state", why))
        )

    def _usage(self, windows: tuple[tuple[int, int], ...]) -> Usage:
        whole_ns = sum(end - start for start, end in windows)
        if not whole_ns:
            return unread("no time passed")
        with self._lock:
            inside = {
                uuid: [
                    each
                    for each in own
                    # By its middle, an interval belongs to one window at most.
                    if any(start <= each.middle_ns <= end for start, end in windows)
                ]
                for uuid, own in self._intervals.items()
            }
        for uuid, own in inside.items():
            read_ns = sum(each.elapsed_ns for each in own)
            # A part that was read is not shown as if it were the whole.
            if whole_ns - read_ns > max(UNREAD_SHARE * whole_ns, UNREAD_NS):
                return unread(f"{uuid} was read in {read_ns / whole_ns:.0%} of the window only")
        return summed(list(inside.items()), whole_ns)
