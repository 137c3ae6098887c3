"""How much of the machine's processors other processes use while something is measured on them."""

from __future__ import annotations

import os
import time

from pipeline.values import Value, measured, null

SHORTEST_S = 0.5
"""Seconds; processor times of a shorter window are counted too coarsely (in ticks of 10 ms)."""


class Others:
    """Counts from the moment it is made. This process and its children are the job's own."""

    def __init__(self) -> None:
        self._start_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()

    def share(self) -> Value:
        """Return the processor time of others over all that there was since, in [0, 1]."""
        elapsed_s = time.monotonic() - self._start_s
        if elapsed_s < SHORTEST_S:
            return null(f"window shorter than {SHORTEST_S:g} s")
        others_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return measured(min(1.0, max(0.0, others_s / (elapsed_s * (os.cpu_count() or 1)))))


def _busy_s() -> float:
    """Return the seconds that all processors together have worked for anyone."""
    import psutil

    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_s() -> float:
    """Return the seconds that this process and its children, ended ones too, have worked."""
    import psutil

    me = psutil.Process()
    total = sum(me.cpu_times()[:4])
    for child in me.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:2])
        except psutil.Error:  # it has just ended: among this process's `children` times now
            continue
    return total
